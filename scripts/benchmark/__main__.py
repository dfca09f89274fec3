"""Measure decoding speed: policies against our own fastest plain decoding, and against other engines, in turns.

Every turn runs every row on every prompt, row after row in a new order for each prompt. A row's tokens/s is the median
over turns, a speedup the median of the ratios inside a turn. The ceiling (memory bandwidth, measured in the same
process) is printed before anything is timed. `scripts/common/policy_sets.py` has the sets of policies, `table.py` makes
the numbers and tables, `picture.py` draws the picture.
"""

import argparse
import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import cli
import tp
from decoding.compare import fastest_plain
from decoding.engine import Engine
from decoding.generation import GenerateConfig, head_cost_layers
from drafting.exits import Static
from drafting.policy import DraftPolicy
from errors import UserError
from kernels.formats import PLAIN, Format
from loading.files import check_writable, make_folder, write_json
from scripts.benchmark import flags as command_line
from scripts.benchmark import hardware, peers, picture
from scripts.benchmark.llama_cpp_peer import LlamaCpp
from scripts.benchmark.prompt_lengths import check_lengths, measure_lengths
from scripts.benchmark.prompts import choose_prompts
from scripts.benchmark.table import Place, print_results, result_rows
from scripts.benchmark.transformers_peer import transformers_contenders
from scripts.common import policy_sets
from scripts.common.contender import Contender, skipfast_contender
from scripts.common.journal import Journal, digest
from scripts.common.ranks import Ranks
from scripts.common.turns import Quality, measure


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return command_line.parse_flags(argv, __doc__.split("\n")[0])


def open_engines(flags: argparse.Namespace, ranks: Ranks) -> dict[Place, Engine]:
    """Open an engine for every device and format that the flags name. Raises UserError for what cannot be measured."""
    formats = dict.fromkeys(str(Format.parse(text)) for text in flags.formats or ["none"])
    engines = [
        ranks.open_engine(flags, device=device, quantize=format) for device in flags.devices for format in formats
    ]
    source = engines[0].source
    if flags.against and source.format:
        raise UserError(
            f"against {', '.join(flags.against)}: {flags.checkpoint_path} is quantised; name the plain "
            f"checkpoint, and --quantize {source.format}"
        )
    return {(engine.device, engine.format_name): engine for engine in engines}


def make_policies(flags: argparse.Namespace, engine: Engine) -> dict[str, DraftPolicy]:
    """Make the policies that the flags name, but for plain decoding. Raises UserError for what the model refuses."""
    return policy_sets.make_policies(flags.policies, flags.policy, engine.args, flags.num_draft_tokens)


# ---------------------------------------------------------------- who is measured


def our_contenders(
    engine: Engine, flags: argparse.Namespace, config: GenerateConfig, length: int, choose_threads: bool
) -> list[Contender]:
    """Load an engine and make its rows; plain decoding, eager and compiled, is always among them.

    length: positions of the cache. choose_threads: of the CPU, for all rows still to run.
    """
    policies, with_copies = make_policies(flags, engine), make_policies(flags, engine)  # each keeps what it measures
    draft_depth = engine.draft_depth(list(policies.values()))
    engine.load(length)
    engine.load_draft_model(draft_depth)
    contender = functools.partial(skipfast_contender, config=config, quantize=engine.format_name, device=engine.device)
    contenders = []
    for compile in (True, False) if flags.compile else (False,):
        contenders += plain_contenders(engine, compile, contender)
    if choose_threads and flags.compile:
        engine.choose_threads()
    for name, policy in policies.items():
        runner = engine.runner(policy, copies=False)
        contenders.append(contender(runner, policy, name))
        if flags.no_verify and not policy.verifiable_only:
            contenders.append(contender(runner, policy, name, verified=False))
        if engine.draft_model and policy.draft_depth(engine.n_layer):
            runner, name_with_copies = engine.runner(with_copies[name]), f"{name} (drafts {engine.draft_format})"
            contenders.append(contender(runner, with_copies[name], name_with_copies))
    engine.warm_up()
    for name, policy in policies.items():
        engine.calibrate(policy, config.sampling, copies=False)
        if engine.draft_model and policy.draft_depth(engine.n_layer):
            engine.calibrate(with_copies[name], config.sampling)
    return contenders


def plain_contenders(engine: Engine, compile: bool, contender: functools.partial) -> list[Contender]:
    """Make the rows of plain decoding: token by token, and in whatever way may be faster here."""
    exact, plain = engine.runner(compile=compile), engine.policy("none")
    contenders = [contender(exact, plain, "none")]
    if exact.backend == "c++":
        contenders.append(contender(exact, fast := fastest_plain(exact), str(fast)))
    if not exact.rows_independent:  # padding costs time: plain decoding is faster without
        contenders.append(contender(engine.runner(compile=compile, exact=False), plain, "none", exact=False))
    return contenders


def load_all(
    engines: dict[Place, Engine], flags: argparse.Namespace, config: GenerateConfig, length: int
) -> tuple[list[Contender], dict[str, dict]]:
    """Load every engine -> our rows of all of them, and what each device holds."""
    contenders, memories = [], {}
    for device in flags.devices:
        here = [engine for engine in engines.values() if engine.device == device]
        before, loaded = hardware.peak_memory_bytes(device), {}
        for engine in here:
            first = device == "cpu" and not loaded  # one number of threads for the whole process
            contenders += our_contenders(engine, flags, config, length, first)
            loaded[engine.format_name] = engine.weight_bytes
            if engine.draft_bytes:
                loaded[f"{engine.format_name} (drafts {engine.draft_format})"] = engine.draft_bytes
        memories[device] = hardware.memory(here[0].model, device, loaded, before)
    for contender in contenders:
        contender.threads = torch.get_num_threads()  # chosen after some of them were made
    return contenders, memories


def absent_peers(flags: argparse.Namespace, engines: dict[Place, Engine]) -> dict[str, str]:
    """Return the engines of --against that are left out -> why."""
    absent = peers.missing(flags.against, flags.device)
    if "transformers" in flags.against and all(format != str(PLAIN) for _, format in engines):
        absent["transformers"] = "it is measured with plain weights only: add --quantize none"
    return absent


def peer_contenders(
    engines: dict[Place, Engine],
    policies: dict[str, DraftPolicy],
    flags: argparse.Namespace,
    length: int,
    cleanup: contextlib.ExitStack,
) -> list[Contender]:
    """Make the rows of other engines, on the first device. cleanup: ends the processes that they need."""
    (device, _), engine = next(iter(engines.items()))
    contenders, counts = [], peers.thread_counts(flags)
    if "transformers" in flags.against:
        drafting = next((policy for policy in policies.values() if isinstance(policy, Static)), None)
        contenders += transformers_contenders(engine, drafting, counts)
    formats = [format for place, format in engines if place == device] if "llama.cpp" in flags.against else []
    for format in formats:
        peer = LlamaCpp(engine, length, counts, Format.parse(format))
        contenders.append(cleanup.enter_context(contextlib.closing(peer)).contender())
    for contender in contenders:
        contender.device = device
    return contenders


# ---------------------------------------------------------------- a run


@dataclass
class Benchmark:
    """All that a run needs, checked, before the weights are read.

    ranks: who shares the work. journal: what is finished. quality: how texts are judged.
    """

    flags: argparse.Namespace
    engines: dict[Place, Engine]
    policies: dict[str, DraftPolicy]
    prompts: list[list[int]]
    ranks: Ranks
    journal: Journal
    quality: Quality

    def run(self) -> dict:
        """Load, measure and return the JSON object."""
        flags, engine = self.flags, next(iter(self.engines.values()))
        config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
        longest = max(map(len, self.prompts)) + flags.max_new_tokens
        longest = max(longest, check_lengths(flags.prompt_lengths, engine.args.max_seq_len))
        length = engine.length_for(self.policies.values(), longest)
        contenders, memories = load_all(self.engines, flags, config, length)
        bandwidths = {device: hardware.read_bandwidth(device) for device in memories}
        memory = memories[flags.device]
        with contextlib.ExitStack() as cleanup:
            contenders += peer_contenders(self.engines, self.policies, flags, length, cleanup)
            print_ceilings(memories, bandwidths)
            measure(contenders, self.prompts, flags, self.ranks, self.journal, self.quality)
            plain = {(c.engine, c.device): c for c in reversed(contenders) if c.policy == "none"}
            by_length = measure_lengths(
                list(plain.values())[::-1],  # of ours, the first: compiled, exact
                flags.prompt_lengths,
                flags.repeats,
                engine.model,
                memory["weight_bytes_per_pass"],
            )
        rows = result_rows(contenders, self.engines, flags, self.prompts, bandwidths)
        for row, contender in zip(rows, contenders, strict=True):
            row["quality"] = self.quality.of_all(contender.texts)
        return {
            "rows": rows,
            "grid": self.conclusion_of_grid(rows),
            "skip_set": policy_sets.default_skips(engine.n_layer),
            "head_cost_layers": head_cost_layers(engine.model),
            "lengths": by_length,
            "bandwidth_bytes_per_s": bandwidths[flags.device],
            **memory,
            "devices": {name: own | {"bandwidth_bytes_per_s": bandwidths[name]} for name, own in memories.items()},
            "ranks": engine.group.everyones(memory) if engine.group else [memory],
            "config": vars(flags),
            **cli.environment(),
        }

    def conclusion_of_grid(self, rows: list[dict]) -> dict | None:
        """Say what --policies grid shows on the first device with the first format."""
        if "grid" not in self.flags.policies:
            return None
        place, engine = next(iter(self.engines.items()))
        here = [row for row in rows if (row["device"], row["quantize"]) == place]
        return policy_sets.best_of_grid(here, engine.n_layer)

    def title(self, rows: list[dict]) -> str:
        flags = self.flags
        name = Path(flags.checkpoint_path).name + (f", {flags.dataset}" if flags.dataset else "")
        return (
            f"{name}: {len(self.prompts)} prompts × {flags.max_new_tokens} tokens, {rows[0]['precision']}, "
            f"median of {flags.repeats}"
        )


def print_ceilings(memories: dict[str, dict], bandwidths: dict[str, float]) -> None:
    """Print how many tokens/s the memory of each device allows."""
    for device, bandwidth in bandwidths.items():
        full = memories[device]["weight_bytes_per_pass"]
        print(
            (f"{device}: " if len(memories) > 1 else "") + f"{full / 1e6:.1f} MB of weights a pass at "
            f"{bandwidth / 1e9:.1f} GB/s: {bandwidth / full:.0f} tokens/s from memory"
        )


def make_journal(
    flags: argparse.Namespace,
    engine: Engine,
    prompts: list[list[int]],
    policies: dict[str, DraftPolicy],
    quality: Quality,
    ranks: Ranks,
) -> Journal:
    """Read what is measured already in --output_dir. Raises UserError if that was with other settings."""
    apart = ("output_dir", "json", "picture", "repeats", "split")
    settings = {name: value for name, value in vars(flags).items() if name not in apart}
    responses = [sample.responses for sample in quality.samples]
    settings |= {"rows": list(policies)} | digest(prompts, responses, policies.values(), engine.source, ranks.size)
    path = Path(flags.output_dir) / "samples.jsonl" if flags.output_dir else None
    return Journal(path, settings, ("row", "sample", "repeat"))


def prepare(flags: argparse.Namespace, ranks: Ranks) -> tuple[Benchmark, dict[str, str]]:
    """Check all that can be checked before the weights are read -> the run, and the engines that are skipped -> why."""
    engines = open_engines(flags, ranks)
    engine = next(iter(engines.values()))
    policies = make_policies(flags, engine)
    check_lengths(flags.prompt_lengths, engine.args.max_seq_len)
    skipped = absent_peers(flags, engines)
    for peer, reason in skipped.items():
        cli.notice(f"{peer} skipped: {reason}")
    flags.against = [peer for peer in flags.against if peer not in skipped]
    prompts, quality = choose_prompts(flags, engine)
    journal = make_journal(flags, engine, prompts, policies, quality, ranks)
    if flags.output_dir and ranks.leads:
        make_folder(flags.output_dir)
        journal.start()
    return Benchmark(flags, engines, policies, prompts, ranks, journal, quality), skipped


def main() -> None:
    with tp.joined() as group:
        flags = parse_flags()
        ranks = Ranks(group, flags.split == "samples")
        for path in (flags.json, flags.picture) if ranks.leads else ():
            check_writable(path)
        path_of_picture = picture.wanted_picture(flags.picture, flags.output_dir)
        benchmark, skipped = prepare(flags, ranks)
        result = benchmark.run() | {"skipped": skipped}
        title = benchmark.title(result["rows"])
        print_results(result, title)
        if not ranks.leads:
            return
        for path in filter(None, (flags.json, flags.output_dir and Path(flags.output_dir) / "benchmark.json")):
            write_json(path, result)
        if path_of_picture:
            n_layer = next(iter(benchmark.engines.values())).n_layer
            picture.draw_policies(result["rows"], n_layer, path_of_picture, title)


if __name__ == "__main__":
    cli.run(main)
