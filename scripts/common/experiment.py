"""What the programs that decode samples share: the flags checked, the samples encoded, a model with its runners."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cli
from decoding.calibrate import SAMPLE_TEXT, calibrate
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner, check_draft_vocab, check_num_draft_tokens
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from generate import CALIBRATION_TOKENS, decode
from loading import checkpoint
from loading.files import check_writable, make_folder
from scripts.benchmark.__main__ import Runners
from scripts.common import samples
from scripts.common.journal import digest
from scripts.common.ranks import Ranks


def add_flags(parser: argparse.ArgumentParser, output_dir: str, dataset: str = "code", num_samples: int = 8) -> None:
    """The flags of a program that decodes samples and writes into a folder."""
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    samples.add_sample_flags(parser, dataset, num_samples)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir", default=output_dir, metavar="DIR", help=f"default: {output_dir}")


class Experiment:
    """Samples and the model that continues them. Opening reads no weights; `load` does."""

    def __init__(self, flags: argparse.Namespace, ranks: Ranks):
        """Raises ValueError for whatever is wrong with the flags, the dataset, or the folder to write to."""
        self.flags, self.ranks = flags, ranks
        if ranks.leads:
            check_writable(flags.json)
        config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
        self.session = ranks.open_session(flags)
        self.config = GenerateConfig(config.max_new_tokens, config.sampling, self.session.eos_ids(flags))
        check_draft_vocab(flags.draft_vocab, self.session.args.vocab_size)
        self.dataset = samples.read_dataset(flags)
        self.samples = samples.encoded(self.dataset, flags, self.session, config)
        self.folder = Path(flags.output_dir)
        if ranks.leads:
            make_folder(self.folder)

    @property
    def n_layer(self) -> int:
        return self.session.args.n_layer

    def policy(self, text: str) -> DraftPolicy:
        args = self.session.args
        policy = make_policy(text, args.n_layer, args.dim, num_draft_tokens=self.flags.num_draft_tokens)
        check_num_draft_tokens(policy.num_draft_tokens)
        return policy

    def settings(self, policies: Sequence[DraftPolicy]) -> dict:
        """What tokens and times depend on, but for the policy: results with equal settings may stand in one table."""
        names = (
            "checkpoint_path",
            "device",
            "precision",
            "quantize",
            "threads",
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "seed",
            "verification",
            "num_draft_tokens",
            "ignore_eos",
            "draft_vocab",
            "draft_quantize",
            "dataset",
            "compile",
        )
        found = digest([ids for _, ids in self.samples], (), policies, self.session.source, self.ranks.size)
        return {name: getattr(self.flags, name) for name in names} | found

    def load(self, policies: Sequence[DraftPolicy]) -> None:
        """Read the weights and make what the policies, and plain decoding, run on."""
        flags, most = self.flags, self.session.args.max_seq_len
        length = max(len(ids) for _, ids in self.samples) + flags.max_new_tokens
        if any(policy.plans_to_time() for policy in policies):
            length = max(length, min(CALIBRATION_TOKENS, most))
        model = self.session.load(length)
        self.runners = Runners(model, length, flags.draft_vocab, self.session.load_drafter(policies))
        plain = self.runner(None)
        if plain.rows_independent and flags.threads is None:
            plain.choose_threads()
        for policy in policies:
            self.runner(policy)
        self.runners.warm_up()

    def runner(self, policy: DraftPolicy | None) -> Runner:
        """Where a policy runs; None: plain decoding at its fastest, without the padding that exactness may need."""
        if policy is None:
            plain = self.runners.get(1, self.flags.compile)
            return plain if plain.rows_independent else self.runners.get(1, self.flags.compile, False)
        copies = bool(self.runners.drafter) and policy.draft_depth(self.n_layer) > 0
        width, skips = 1 + policy.num_draft_tokens, policy.skips_sublayers
        return self.runners.get(width, self.flags.compile, skips=skips, copies=copies)

    def calibrate(self, policy: DraftPolicy) -> None:
        """Let a policy measure what it wants to know before decoding."""
        calibrate(self.runner(policy), policy, self.session.tokenizer.encode(SAMPLE_TEXT), self.config.sampling)

    def decode(self, policy: DraftPolicy, ids: Sequence[int], runner: Runner | None = None) -> Generation:
        return Generation.collect(decode(runner or self.runner(policy), ids, self.config, policy))

    def title(self) -> str:
        flags = self.flags
        dtype = checkpoint.resolve_dtype(self.session.args, checkpoint.DTYPES.get(flags.precision))
        name = Path(flags.checkpoint_path).name
        return f"{name}, {str(dtype)[6:]}, {self.dataset.name}: {len(self.samples)} × {flags.max_new_tokens} tokens"

    def config_json(self) -> dict:
        return {"config": vars(self.flags) | {"ranks": self.ranks.size}, **cli.environment()}
