"""Measure decoding speed: policies against our own fastest plain decoding, and against other engines, in turns.

Every round runs every row on every prompt, row after row in a new order for each prompt; a row's tokens/s is the median
over rounds, a speedup the median of the ratios inside a round. The ceiling (memory bandwidth, measured in the same
process) is printed before anything is timed. `policy_sets.py` has the sets of policies, `rows.py` makes the numbers and
tables, `picture.py` draws the picture.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import time
from pathlib import Path

import torch

import cli
import tp
from decoding.calibrate import SAMPLE_TEXT, calibrate
from decoding.compare import fastest_plain, share_equal
from decoding.generation import GenerateConfig, Generation, check_prompt, head_cost_layers
from decoding.runner import MAX_ROWS, Runner, check_draft_vocab
from drafting.catalogue import make_policy
from drafting.exits import Static
from drafting.policy import DraftPolicy
from errors import UserError
from generate import CALIBRATION_TOKENS, decode, early_exit
from kernels.formats import PLAIN, Format
from loading.files import check_writable, make_folder, read_text, write_json
from model import Transformer
from scripts.benchmark import peers, picture
from scripts.benchmark.peers import Contender
from scripts.benchmark.prompt_lengths import check_lengths, measure_lengths
from scripts.benchmark.table import Models, print_results, result_rows, streamed_bytes
from scripts.common import policy_sets, samples
from scripts.common.journal import Journal, digest
from scripts.common.ranks import Ranks
from scripts.common.turns import Quality, measure

PROMPT_SETS = Path(__file__).parents[2] / "benchmarks" / "prompts"
PROMPTS = (  # none ends in white space: a tokenizer may join it with what follows
    'def read_config(path):\n    """',
    "import os\nimport sys\n\ndef main():",
    "class Node:\n    def __init__(self, value",
    "    def test_empty(self):",
    '"""This module provides access to',
    "for line in lines:\n    if line.startswith(",
    "    try:\n        import json\n    except ImportError:",
    "def parse_args(argv=None):\n    parser =",
)


def read_bandwidth(device: str = "cpu", gib: float = 1.0, repeats: int = 5) -> float:
    """Bytes/s at which torch sums a buffer far larger than the caches: a floor of the memory's read bandwidth."""
    buffer = torch.ones(int(gib * 2**28), dtype=torch.float32, device=device)
    buffer.sum().item()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


def peak_memory_bytes(device: str) -> int:
    """The most that this process has taken: of a GPU's memory what torch has given out, else of the machine's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def skipfast_contender(
    runner: Runner,
    policy: DraftPolicy,
    name: str,
    config: GenerateConfig,
    exact: bool = True,
    verified: bool = True,
    quantize: str = "none",
) -> Contender:
    """A row of ours. verified=False: early exit, named so, with a judge of its text. quantize: the model's format."""
    decoding = decode if verified else early_exit

    def run(prompt, count):
        wanted = dataclasses.replace(config, max_new_tokens=count)
        generation = Generation.collect(decoding(runner, prompt, wanted, policy))
        return generation.tokens, generation.decode_s, generation.summary(runner.model)

    def judge(prompt, text):
        return share_equal(runner, prompt, text, config.sampling)

    return Contender(
        "skipfast",
        name if verified else f"{name} (unverified)",
        runner.compiled,
        run,
        runner.backend,
        exact,
        torch.get_num_threads(),
        quantize,
        None if verified else judge,
    )


class Runners:
    """The runners of one model, made when first asked for; all share one cache."""

    def __init__(self, model: Transformer, length: int, draft_vocab: int | None, drafter: Transformer | None = None):
        """length: positions that a prompt and its text may take. drafter: low-bit copies for those that want them."""
        model.setup_cache(length + MAX_ROWS)
        self.model, self.length, self.draft_vocab, self.drafter = model, length, draft_vocab, drafter
        self.made: dict[tuple, Runner] = {}
        self.skipping: set[tuple] = set()  # those that must be ready to leave sublayers out

    def get(self, width: int, compile: bool, exact: bool = True, skips: bool = False, copies: bool = False) -> Runner:
        key = width, compile, exact, copies
        if key not in self.made:
            drafter = self.drafter if copies else None
            self.made[key] = Runner(
                self.model, self.length, width, compile, exact, cli.notice, self.draft_vocab, drafter
            )
        if skips:
            self.skipping.add(key)
        return self.made[key]

    def warm_up(self) -> None:
        for key, runner in self.made.items():
            runner.warm_up(key in self.skipping)


def our_contenders(session: cli.Session, config: GenerateConfig, length: int, choose_threads: bool) -> list[Contender]:
    """The rows of the session's model, in its format; plain decoding, eager and compiled, is always among them.

    length: positions that a prompt and its text may take. choose_threads: of the CPU, for all rows still to run.
    """
    flags, plain = session.flags, make_policy("none", session.args.n_layer)
    policies, again = make_policies(session), make_policies(session)  # each remembers what it measures of its model
    runners = Runners(session.model, length, flags.draft_vocab, session.load_drafter(policies.values()))
    if choose_threads and flags.compile and runners.get(1, True).rows_independent:
        runners.get(1, True).choose_threads()
    found, measuring = [], []
    for compile in (True, False) if flags.compile else (False,):
        exact = runners.get(1, compile)
        found.append(skipfast_contender(exact, plain, "none", config))
        if exact.backend == "c++":
            found.append(skipfast_contender(exact, fast := fastest_plain(exact), str(fast), config))
        if not exact.rows_independent:  # padding costs time: plain decoding is faster without
            found.append(skipfast_contender(runners.get(1, compile, False), plain, "none", config, exact=False))
    for name, policy in policies.items():
        width, skips = 1 + policy.num_draft_tokens, policy.skips_sublayers
        runner = runners.get(width, flags.compile, skips=skips)
        measuring.append((runner, policy))
        found.append(skipfast_contender(runner, policy, name, config))
        if flags.no_verify and not policy.verifiable_only:
            found.append(skipfast_contender(runner, policy, name, config, verified=False))
        if runners.drafter and policy.draft_depth(session.args.n_layer):
            measuring.append((runners.get(width, flags.compile, skips=skips, copies=True), again[name]))
            found.append(skipfast_contender(*measuring[-1], f"{name} (drafts {session.draft_format})", config))
    runners.warm_up()
    for runner, policy in measuring:
        calibrate(runner, policy, session.tokenizer.encode(SAMPLE_TEXT), config.sampling)
    for contender in found:
        contender.device, contender.quantize = flags.device, session.quantize
    return found


def make_policies(session: cli.Session) -> dict[str, DraftPolicy]:
    """The policies that the flags name, but for plain decoding. Raises UserError for what the model does not take."""
    flags = session.flags
    return policy_sets.make_policies(flags.policies, flags.policy, session.args, flags.num_draft_tokens)


def peer_contenders(
    session: cli.Session,
    policies: dict[str, DraftPolicy],
    formats: list[Format],
    length: int,
    cleanup: contextlib.ExitStack,
) -> list[Contender]:
    """The rows of other engines, on the session's device. cleanup: ends the processes that they need."""
    found, against, counts = [], session.flags.against, peers.thread_counts(session.flags)
    if "transformers" in against:
        drafting = next((policy for policy in policies.values() if isinstance(policy, Static)), None)
        found += peers.transformers_contenders(session, drafting, counts)
    for format in formats if "llama.cpp" in against else ():
        engine = cleanup.enter_context(contextlib.closing(peers.LlamaCpp(session, length, counts, format)))
        found.append(engine.contender())
    for contender in found:
        contender.device = session.flags.device
    return found


def read_prompts(path: str | None, session: cli.Session) -> list[list[int]]:
    """Prompts as token ids: lines of a .txt, `prompt` of a .jsonl, `ids` of a .json list, or built-in ones.

    path: a file, or the name of one in benchmarks/prompts.
    """
    if path is None:
        return [session.tokenizer.encode(prompt) for prompt in PROMPTS]
    if not Path(path).exists() and (known := PROMPT_SETS / f"{path}.jsonl").exists():
        path = str(known)
    text = read_text(path)
    encode = session.tokenizer.encode
    try:
        if path.endswith(".json"):
            prompts = [[int(token) for token in row["ids"]] for row in json.loads(text)]
        elif path.endswith(".jsonl"):
            prompts = [encode(json.loads(line)["prompt"]) for line in text.splitlines() if line.strip()]
        else:
            prompts = [encode(line) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the prompts expected ({type(error).__name__}: {error})") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.benchmark --policies all --prompts code --output_dir out",
    )
    comma = lambda text: text.split(",")
    cli.add_model_flags(parser, device=False, quantize=False)
    parser.add_argument(
        "--device",
        dest="devices",
        action="append",
        choices=cli.DEVICES,
        help="measure on this device (repeatable; default: cpu)",
    )
    parser.add_argument(
        "--quantize",
        dest="formats",
        action="append",
        metavar="FORMAT",
        help="measure with weights of this format: none, int8, int4, … (repeatable; default: none)",
    )
    cli.add_decode_flags(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME:key=value,…",
        help="repeatable; default: auto and static:L/4",
    )
    parser.add_argument(
        "--policies",
        default=[],
        type=comma,
        metavar="SET,…",
        help="all: every policy with its default settings, and some combinations; "
        "grid: static exits and numbers of drafts, and how near auto comes to the best of them",
    )
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="also a row of early exit for each policy that can: another text than the full model's",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt (a line each), .jsonl (`prompt`) or .json (`ids`), or one of benchmarks/prompts: "
        + ", ".join(sorted(path.stem for path in PROMPT_SETS.glob("*.jsonl"))),
    )
    parser.add_argument("--num_prompts", type=int, metavar="N", help="only the first N")
    samples.add_sample_flags(parser, dataset=None)
    parser.add_argument(
        "--split",
        choices=["model", "samples"],
        default="model",
        help="what torchrun's processes share: one model (tensor parallelism), or the samples, with a whole model each",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--against",
        default=[],
        type=comma,
        metavar="ENGINE,…",
        help="other engines to measure: " + ", ".join(peers.NEEDS),
    )
    parser.add_argument(
        "--prompt_lengths",
        default=[],
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="N,…",
        help="also time prefill and plain decoding after prompts of these lengths, as in 100,512,2000",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--picture", metavar="PATH", help="draw the rows of drafting policies as a PNG")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="also write DIR/benchmark.json, samples.jsonl and policies.png, and go on with a run of "
        "the same settings that was killed",
    )
    flags = parser.parse_args(argv)
    flags.ignore_eos = True  # every row must decode the same number of tokens
    flags.devices = flags.devices or ["cpu"]
    flags.device = flags.devices[0]  # of other engines, too
    if len(set(flags.devices)) < len(flags.devices):
        raise UserError(f"--device must name each device once, got {', '.join(flags.devices)}")
    if flags.max_new_tokens < 2:
        raise UserError(f"max_new_tokens must be 2 or more to time decoding, got {flags.max_new_tokens}")
    for name, value in (("num_prompts", flags.num_prompts), ("repeats", flags.repeats)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    samples.check_sample_flags(flags, without="prompts")
    if unknown := set(flags.against) - set(peers.NEEDS):
        raise UserError(f"--against knows {', '.join(peers.NEEDS)}, got {', '.join(sorted(unknown))}")
    if min(flags.prompt_lengths, default=1) < 1:
        raise UserError(f"prompt_lengths must be 1 or more, got {min(flags.prompt_lengths)}")
    if flags.no_verify and flags.draft_vocab is not None:
        raise UserError("--no_verify does not go with --draft_vocab")
    if flags.no_verify and flags.verification == "rejection":
        raise UserError("--no_verify does not go with --verification rejection: there is nothing to accept or reject")
    policy_sets.check_sets(flags.policies)
    return flags


def memory(model: Transformer, device: str, loaded: dict, before: int) -> dict:
    """What this rank's model takes on a device. loaded: weight bytes by format; before: peak memory before loading."""
    return {
        "weight_bytes": loaded,
        "cache_bytes": 2 * model.args.n_layer * model.layers[0].attention.v_cache.nbytes,
        "peak_memory_bytes": {"before_loading": before, "after_loading": peak_memory_bytes(device)},
        "weight_bytes_per_pass": streamed_bytes(model, model.args.n_layer, 1),
    }


def load_all(
    sessions: list[cli.Session], formats: list[Format], config: GenerateConfig, length: int
) -> tuple[Models, list[Contender], dict[str, dict]]:
    """Load every format on every device -> the models, our rows of all of them, and what each device holds."""
    models, contenders, memories = {}, [], {}
    for session in sessions:
        device, loaded = session.flags.device, {}
        before = peak_memory_bytes(device)
        for session.format in formats:
            first = device == "cpu" and not loaded  # one number of threads for the whole process
            models[device, session.quantize] = session.load(length)
            contenders += our_contenders(session, config, length, first and session.flags.threads is None)
            loaded[session.quantize] = session.weight_bytes
            if session.draft_bytes:
                loaded[f"{session.quantize} (drafts {session.draft_format})"] = session.draft_bytes
        session.model = models[device, next(iter(loaded))]
        memories[device] = memory(session.model, device, loaded, before)
    for contender in contenders:
        contender.threads = torch.get_num_threads()  # chosen after some of them were made
    return models, contenders, memories


def run(
    sessions: list[cli.Session],
    formats: list[Format],
    policies: dict[str, DraftPolicy],
    prompts: list[list[int]],
    work: tuple[Ranks, Journal, Quality],
) -> dict:
    """Load, measure and return the JSON object. sessions: one a device.

    work: who shares it, what is finished, how texts are judged.
    """
    session, flags = sessions[0], sessions[0].flags
    args, config = session.args, GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
    lengths = [max(map(len, prompts)) + flags.max_new_tokens, check_lengths(flags.prompt_lengths, args.max_seq_len)]
    if any(policy.plans_to_time() for policy in policies.values()):
        lengths.append(min(CALIBRATION_TOKENS, args.max_seq_len))
    models, contenders, memories = load_all(sessions, formats, config, max(lengths))
    (first, model), own = next(iter(models.items())), memories[flags.device]
    bandwidths = {device: read_bandwidth(device) for device in memories}
    with contextlib.ExitStack() as cleanup:
        contenders += peer_contenders(session, policies, formats, max(lengths), cleanup)
        for device, bandwidth in bandwidths.items():
            full = memories[device]["weight_bytes_per_pass"]
            print(
                (f"{device}: " if len(memories) > 1 else "") + f"{full / 1e6:.1f} MB of weights a pass at "
                f"{bandwidth / 1e9:.1f} GB/s: {bandwidth / full:.0f} tokens/s from memory"
            )
        measure(contenders, prompts, flags, *work)
        plain = {(c.engine, c.device): c for c in reversed(contenders) if c.policy == "none"}
        by_length = measure_lengths(
            list(plain.values())[::-1],  # of ours, the first: compiled, exact
            flags.prompt_lengths,
            flags.repeats,
            model,
            own["weight_bytes_per_pass"],
        )
    rows = result_rows(contenders, models, flags, prompts, bandwidths)
    for row, contender in zip(rows, contenders, strict=True):
        row["quality"] = work[-1].of_all(contender.texts)
    return {
        "rows": rows,
        "grid": policy_sets.best_of_grid(
            [row for row, c in zip(rows, contenders, strict=True) if c.place == first], args.n_layer
        )
        if "grid" in flags.policies
        else None,
        "skip_set": policy_sets.default_skips(args.n_layer),
        "head_cost_layers": head_cost_layers(model),
        "lengths": by_length,
        "bandwidth_bytes_per_s": bandwidths[flags.device],
        **own,
        "devices": {device: memories[device] | {"bandwidth_bytes_per_s": bandwidths[device]} for device in memories},
        "ranks": session.group.everyones(own) if session.group else [own],
        "config": vars(flags),
        **cli.environment(),
    }


def checked_formats(session: cli.Session, flags: argparse.Namespace) -> tuple[list[Format], dict[str, str]]:
    """The formats to measure, and the peers that are left out -> why. Raises UserError for what cannot be."""
    formats = list(dict.fromkeys(map(Format.parse, flags.formats or ["none"])))
    for format in formats:
        session.quantises(format)
    if flags.against and session.source.format:
        raise UserError(
            f"against {', '.join(flags.against)}: {flags.checkpoint_path} is quantised; name the plain "
            f"checkpoint, and --quantize {session.source.format}"
        )
    skipped = peers.missing(flags.against, flags.device)
    if "transformers" in flags.against and PLAIN not in formats:
        skipped["transformers"] = "it is measured with plain weights only: add --quantize none"
    return formats, skipped


def make_journal(
    session: cli.Session, prompts: list[list[int]], policies: dict[str, DraftPolicy], quality: Quality, ranks: Ranks
) -> Journal:
    """What is measured already, in --output_dir. Raises UserError if that was with other settings."""
    flags = session.flags
    apart = ("output_dir", "json", "picture", "repeats", "split")
    settings = {name: value for name, value in vars(flags).items() if name not in apart}
    responses = [sample.responses for sample in quality.samples]
    settings |= {"rows": list(policies)} | digest(prompts, responses, policies.values(), session.source, ranks.size)
    path = Path(flags.output_dir) / "samples.jsonl" if flags.output_dir else None
    return Journal(path, settings, ("row", "sample", "repeat"))


def choose_prompts(flags: argparse.Namespace, session: cli.Session) -> tuple[list[list[int]], Quality]:
    """The prompts that the flags name, checked, and what judges the texts that follow them."""
    config, most = GenerateConfig(flags.max_new_tokens), session.args.max_seq_len
    if flags.dataset is not None:
        dataset = samples.read_dataset(flags)
        chosen = samples.encoded(dataset, flags, session, config)
        quality = Quality(session, [sample for sample, _ in chosen], dataset.stops)
        if not quality.judges and any(sample.responses for sample, _ in chosen):
            cli.notice("not every sample has a response: no quality is measured")
        return [ids for _, ids in chosen], quality
    prompts = read_prompts(flags.prompts, session)[: flags.num_prompts]
    for prompt in prompts:
        check_prompt(prompt, config, session.args.vocab_size, most)
    return prompts, Quality(session, (), ())


def main() -> None:
    with tp.joined() as group:
        flags = parse_flags()
        ranks = Ranks(group, flags.split == "samples")
        for path in (flags.json, flags.picture) if ranks.leads else ():
            check_writable(path)
        path_of_picture = picture.wanted_picture(flags.picture, flags.output_dir)
        others = (argparse.Namespace(**vars(flags) | {"device": device}) for device in flags.devices[1:])
        sessions = [ranks.open_session(each) for each in (flags, *others)]
        session, args = sessions[0], sessions[0].args
        policies = make_policies(session)
        check_draft_vocab(flags.draft_vocab, args.vocab_size)
        check_lengths(flags.prompt_lengths, args.max_seq_len)
        formats, skipped = checked_formats(session, flags)
        for peer, reason in skipped.items():
            cli.notice(f"{peer} skipped: {reason}")
        flags.against = [peer for peer in flags.against if peer not in skipped]
        prompts, quality = choose_prompts(flags, session)
        journal = make_journal(session, prompts, policies, quality, ranks)
        if flags.output_dir and ranks.leads:
            make_folder(flags.output_dir)
            journal.start()
        result = run(sessions, formats, policies, prompts, (ranks, journal, quality)) | {"skipped": skipped}
        rows = result["rows"]
        name = f"{Path(flags.checkpoint_path).name}" + (f", {flags.dataset}" if flags.dataset else "")
        title = (
            f"{name}: {len(prompts)} prompts × {flags.max_new_tokens} tokens, {rows[0]['precision']}, "
            f"median of {flags.repeats}"
        )
        print_results(result, title)
        if not ranks.leads:
            return
        for path in filter(None, (flags.json, flags.output_dir and Path(flags.output_dir) / "benchmark.json")):
            write_json(path, result)
        if path_of_picture:
            picture.draw_policies(rows, args.n_layer, path_of_picture, title)


if __name__ == "__main__":
    cli.run(main)
