"""An experiment: samples and the engine that continues them, made from the flags that such programs share."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cli
from decoding.engine import Engine
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from drafting.policy import DraftPolicy
from generate import decode
from loading.files import check_writable, make_folder, write_json
from scripts.common import samples
from scripts.common.commands import decode_defaults
from scripts.common.journal import digest
from scripts.common.ranks import Ranks


def add_flags(parser: argparse.ArgumentParser, output_dir: str, dataset: str = "code", num_samples: int = 8) -> None:
    """Add the flags of a program that decodes samples and writes into a folder."""
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    samples.add_sample_flags(parser, dataset, num_samples)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir", default=output_dir, metavar="DIR", help=f"default: {output_dir}")


class Experiment:
    """Samples and the engine that continues them. Opening reads no weights; `load` does.

    Attributes: engine; config, of every text; dataset; samples, each with its token ids; folder, to write into; plain,
    the runner and the policy of plain decoding at its fastest, after `load`.
    """

    plain: tuple[Runner, DraftPolicy]

    def __init__(self, flags: argparse.Namespace, ranks: Ranks):
        """Raises UserError for whatever is wrong with the flags, the dataset, or the folder to write into."""
        self.flags, self.ranks = flags, ranks
        if ranks.leads:
            check_writable(flags.json)
        config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
        self.engine: Engine = ranks.open_engine(flags)
        self.config = dataclasses.replace(config, eos_ids=cli.eos_ids(flags, self.engine))
        self.dataset = samples.read_dataset(flags)
        self.samples = samples.encoded(self.dataset, flags, self.engine, config)
        self.folder = Path(flags.output_dir)
        if ranks.leads:
            make_folder(self.folder)

    @property
    def n_layer(self) -> int:
        return self.engine.n_layer

    @property
    def title(self) -> str:
        """The model, the samples and the lengths of their texts, in a line."""
        name, dtype = Path(self.flags.checkpoint_path).name, str(self.engine.dtype).removeprefix("torch.")
        return f"{name}, {dtype}, {self.dataset.name}: {len(self.samples)} × {self.flags.max_new_tokens} tokens"

    def policy(self, text: str) -> DraftPolicy:
        """Make a policy; --num_draft_tokens is the K of a policy string that has none."""
        return self.engine.policy(text, num_draft_tokens=self.flags.num_draft_tokens)

    def settings(self, policies: Sequence[DraftPolicy]) -> dict:
        """Return all that tokens and times depend on, but for the policy. Equal settings may share a table."""
        names = [name for name in decode_defaults() if name != "json"]
        settings = {name: getattr(self.flags, name) for name in (*names, "dataset", "compile")}
        prompts = [ids for _, ids in self.samples]
        contents = digest(prompts, (), policies, self.engine.source, self.ranks.size)
        return settings | {"device": self.engine.device} | contents

    def load(self, policies: Sequence[DraftPolicy]) -> None:
        """Read the weights and make ready what the policies, and plain decoding, run on; let policies measure."""
        length = max(len(ids) for _, ids in self.samples) + self.flags.max_new_tokens
        self.engine.prepare(policies, length, self.config.sampling)
        self.plain = self.engine.fastest_plain()
        self.engine.warm_up()

    def decode(self, policy: DraftPolicy, ids: Sequence[int]) -> Generation:
        """Continue a prompt by a policy, with the padding that equal bits may need."""
        return Generation.collect(decode(self.engine.runner(policy), ids, self.config, policy))

    def decode_plain(self, ids: Sequence[int]) -> Generation:
        """Continue a prompt by plain decoding at its fastest."""
        runner, policy = self.plain
        return Generation.collect(decode(runner, ids, self.config, policy))

    def must_equal_plain(self, policy: DraftPolicy) -> bool:
        """Tell whether a policy's text has to be that of plain decoding at its fastest.

        Rejection sampling writes another text. So may padded decoding, where bits depend on the number of rows.
        """
        sampling = self.config.sampling
        exact_text = sampling.temperature == 0 or sampling.verification == "coupled"
        return exact_text and self.engine.runner(policy).rows_independent

    def write_result(self, name: str, result: dict) -> None:
        """Write results and their circumstances as a JSON file `name` of the folder, and as --json."""
        config = vars(self.flags) | {"device": self.engine.device, "ranks": self.ranks.size}
        result = {"title": self.title, **result, "config": config, **cli.environment()}
        for path in filter(None, (self.flags.json, self.folder / name)):
            write_json(path, result)
