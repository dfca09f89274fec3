"""Sweep two policy keys (exit layer × drafted tokens): the same samples in every cell, in turns with plain decoding.

Each finished cell is a line of cells.jsonl; a sweep started again in the same folder goes on after the last one. At the
end: sweep.csv, sweep.json, a contour picture with the best cell and the one that costs alone would choose, and the
generate.py command of the best.
"""

import argparse
import csv
import io
import itertools
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

import cli
from decoding.calibrate import SAMPLE_TEXT, time_rounds
from decoding.compare import fastest_plain
from decoding.generation import Generation, ideal_speedup
from drafting.plan import RoundContext
from drafting.policy import DraftPolicy
from errors import UserError
from loading.files import write_json, write_text
from scripts.common import policy_sets, ranks
from scripts.common.experiment import Experiment, add_flags
from scripts.common.journal import Journal
from scripts.sweep import contour

COUNTS = (
    "tokens",
    "drafted",
    "accepted",
    "acceptance_rate",
    "rounds",
    "tokens_per_round",
    "mean_exit_layer",
    "layer_visits_per_token",
    "head_visits_per_token",
    "ideal_speedup",
    "identical",
)
TIMES = (
    "seconds",
    "plain_seconds",
    "tokens_per_s",
    "plain_tokens_per_s",
    "speedup",
    "mean_sample_speedup",
    "round_cost",
    "bound",
)


class Axis:
    """A key of the policy and its values, from `KEY=v1,v2,…` or `KEY=first-last` (whole numbers)."""

    def __init__(self, text: str):
        self.key, equals, values = text.partition("=")
        first, dash, last = values.partition("-")
        if dash and first.isdigit() and last.isdigit():
            self.values = [str(value) for value in range(int(first), int(last) + 1)]
        else:
            self.values = [value for value in values.split(",") if value]
        if not (self.key and equals and self.values):
            raise UserError(f"an axis must be KEY=v1,v2,… or KEY=first-last, got {text!r}")
        if len(set(self.values)) < len(self.values):
            raise UserError(f"an axis must have each value once, got {text!r}")

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


def cell_text(policy: str, y: str, x: str) -> str:
    """The policy string of a cell: the base and two `key=value` settings."""
    return policy + (":" if ":" not in policy.rpartition("+")[2] else ",") + f"{y},{x}"


def check_different(policies: dict[str, str]) -> None:
    """Raise UserError if two cells are one policy. policies: of each cell, by the text that made it."""
    first: dict[str, str] = {}
    for text, policy in policies.items():
        if (other := first.setdefault(policy, text)) != text:
            raise UserError(f"--y and --x must make another policy of each cell, but {other} and {text} are the same")


def default_exits(n_layer: int) -> str:
    """Exit layers up to half of the model, at most 8 of them."""
    half = max(1, n_layer // 2)
    count = min(policy_sets.GRID_DEPTHS, half)
    return "exit_layer=" + ",".join(str(e) for e in sorted({round(half * i / count) for i in range(1, count + 1)}))


def measure_cell(run: Experiment, policy: DraftPolicy, repeats: int) -> dict:
    """Decode this rank's samples in turns with plain decoding -> the numbers of the cell, over all ranks.

    Counts are sums over samples, `seconds` too (the median turn); a rate is tokens after the first ÷ those seconds.
    """
    plain = fastest_plain(run.runner(None))
    run.calibrate(policy)
    mine = run.ranks.share(run.samples)
    for _, ids in mine[:1]:  # warm-up
        run.decode(policy, ids), run.decode(plain, ids, run.runner(None))
    found = run.ranks.gathered([measure_sample(run, policy, plain, ids, repeats) for _, ids in mine])
    cost = run.ranks.agreed(round_cost(run, policy))
    total = {name: sum(one[name] for one in found) for name in ("tokens", "emitted", "drafted", "accepted", "rounds")}
    if not (emitted := total.pop("emitted")):
        raise UserError("every text ends with its first token, so there is nothing to time: add --ignore_eos")
    layers, heads = (sum(one[name] for one in found) for name in ("layer_visits", "head_visits"))
    exits = sum((Counter(one["exit_layers"]) for one in found), Counter())
    seconds, plain_s = (
        [sum(turn) for turn in zip(*(one[name] for one in found), strict=True)] for name in ("seconds", "plain_seconds")
    )
    return total | {
        "acceptance_rate": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "tokens_per_round": emitted / total["rounds"],
        "mean_exit_layer": sum(int(d) * n for d, n in exits.items()) / exits.total() if exits else None,
        "layer_visits_per_token": layers / emitted,
        "head_visits_per_token": heads / emitted,
        "ideal_speedup": ideal_speedup(emitted, layers, heads, run.session.model),
        "identical": all(one["identical"] for one in found) if comparable(run, policy) else None,
        "seconds": statistics.median(seconds),
        "plain_seconds": statistics.median(plain_s),
        "tokens_per_s": emitted / statistics.median(seconds),
        "plain_tokens_per_s": emitted / statistics.median(plain_s),
        "speedup": statistics.median(ratios(plain_s, seconds)),
        "mean_sample_speedup": statistics.fmean(
            statistics.median(ratios(one["plain_seconds"], one["seconds"])) for one in found if one["emitted"]
        ),
        "round_cost": cost,
        "bound": emitted / total["rounds"] / cost if cost else None,
    }


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def comparable(run: Experiment, policy: DraftPolicy) -> bool:
    """Whether the tokens must be those of plain decoding at its fastest (slower, padded decoding may be needed)."""
    sampling = run.config.sampling
    return run.runner(policy).rows_independent and (sampling.temperature == 0 or sampling.verification == "coupled")


def measure_sample(run: Experiment, policy: DraftPolicy, plain: DraftPolicy, ids: Sequence[int], repeats: int) -> dict:
    """Decode one sample in turns -> its counts, and the seconds of each turn."""
    seconds: dict[str, list[float]] = {"seconds": [], "plain_seconds": []}
    texts: dict[str, Generation] = {}
    for turn in range(repeats):
        pair = [("seconds", policy, None), ("plain_seconds", plain, run.runner(None))]
        for name, how, runner in pair if turn % 2 else reversed(pair):
            texts[name] = run.decode(how, ids, runner)
            seconds[name].append(texts[name].decode_s)
    ours = texts["seconds"]
    numbers = ours.summary(run.session.model)
    return (
        seconds
        | {name: numbers[name] for name in ("drafted", "accepted", "rounds", "exit_layers")}
        | {
            "tokens": len(ours.tokens),
            "emitted": len(ours.tokens) - 1,
            "layer_visits": sum(step.layer_visits for step in ours.rounds),
            "head_visits": sum(step.head_visits for step in ours.rounds),
            "identical": ours.tokens == texts["plain_seconds"].tokens,
        }
    )


def round_cost(run: Experiment, policy: DraftPolicy) -> float | None:
    """Seconds of a round of the policy ÷ of a plain token's, timed apart on a sample text, whatever is accepted.

    None for policies that do not draft by one plan that is fixed beforehand.
    """
    runner, tokens = run.runner(policy), run.session.tokenizer.encode(SAMPLE_TEXT)
    tokens = tokens[: max(1, runner.cache_length - policy.num_draft_tokens - 2)]
    policy.start_prompt(tokens)
    plan = policy.start_round(RoundContext(tokens, policy.num_draft_tokens + 2))
    if not plan.is_fixed or plan.first_skip is not None:
        return None
    runner.prefill(tokens)
    seconds = lambda where, how, wanted: time_rounds(where, how, [wanted], tokens, run.config.sampling)[wanted]
    plain, sides = fastest_plain(run.runner(None)), []
    for _ in range(3):
        token_s = seconds(run.runner(None), plain, plain.plan) / plain.steps
        sides.append(seconds(runner, policy, plan) / token_s)
    return statistics.median(sides)


# ---------------------------------------------------------------- what a sweep leaves behind


def best_cells(rows: Sequence[dict]) -> dict:
    """The fastest cell as measured, and the best by two bounds: weight bytes, and the measured cost of a round."""
    best = {}
    for name in ("speedup", "ideal_speedup", "bound"):
        known = [row for row in rows if row[name] is not None]
        best[name] = max(known, key=lambda row: row[name])["policy"] if len(known) == len(rows) else None
    return {"measured": best["speedup"], "ideal_bound": best["ideal_speedup"], "cost_bound": best["bound"]}


def distance(rows: Sequence[dict], axes: Sequence[Axis], first: str | None, second: str | None) -> list[int] | None:
    """How many cells apart two cells are, along y and x."""
    places = {row["policy"]: [axis.values.index(row[axis.key]) for axis in axes] for row in rows}
    if first is None or second is None:
        return None
    return [abs(a - b) for a, b in zip(places[first], places[second], strict=True)]


def csv_text(rows: Sequence[dict], axes: Sequence[Axis]) -> str:
    """The table of cells, in the order of the grid: counts, which a seed decides, before times."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(axis.key for axis in axes), "policy", *COUNTS, *TIMES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def command_line(flags: argparse.Namespace, policy: str) -> str:
    """The generate.py command that decodes as a cell did."""
    words = ["python", "generate.py"]
    defaults = {
        "checkpoint_path": str(cli.DEMO),
        "device": "cpu",
        "temperature": 0.0,
        "verification": "coupled",
        "seed": 0,
    }
    for name in (
        "checkpoint_path",
        "device",
        "precision",
        "quantize",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "verification",
        "draft_vocab",
        "draft_quantize",
        "num_draft_tokens",
        "threads",
    ):
        value = getattr(flags, name)
        if value is not None and value != defaults.get(name) and f"{name}=" not in policy:
            words += [f"--{name}", str(value)]
    if not flags.compile:
        words.append("--no-compile")
    return shlex.join([*words, "--policy", policy])


def print_sweep(rows: Sequence[dict], axes: Sequence[Axis], title: str, best: dict) -> None:
    y, x = axes
    shown = {(row[y.key], row[x.key]): row for row in rows}
    for name, form, what in (
        ("speedup", ".2f", "speedup over plain decoding"),
        ("acceptance_rate", ".2f", "acceptance rate"),
    ):
        body = []
        for value in y.values:
            cells = [shown[value, other] for other in x.values]
            marks = ["*" if row["policy"] == best["measured"] and name == "speedup" else "" for row in cells]
            body.append([value, *(mark + cli.shown(row[name], form) for mark, row in zip(marks, cells, strict=True))])
        cli.print_table(f"{title}: {what}", [f"{y.key} \\ {x.key}", *x.values], body)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep",
        description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.sweep --policy confidence --y threshold=0.3,0.6 --x num_draft_tokens=1-6",
    )
    add_flags(parser, "out/sweep")
    parser.add_argument(
        "--policy", default="static", metavar="NAME:key=value,…", help="what all cells share (default: static)"
    )
    parser.add_argument(
        "--y",
        metavar="KEY=v1,v2,…",
        help="a key of the policy and its values, or KEY=first-last (default: exit_layer up to half of the layers)",
    )
    parser.add_argument(
        "--x",
        default="num_draft_tokens=1-7",
        metavar="KEY=v1,v2,…",
        help="the other key (default: num_draft_tokens=1-7)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each sample in each cell (default: 3)")
    flags = parser.parse_args(argv)
    if flags.repeats < 1:
        raise UserError(f"repeats must be 1 or more, got {flags.repeats}")
    if flags.max_new_tokens < 2:
        raise UserError(f"max_new_tokens must be 2 or more to time decoding, got {flags.max_new_tokens}")
    return flags


def finish(run: Experiment, rows: list[dict], axes: list[Axis]) -> None:
    """Write CSV, JSON and the picture, and print the tables."""
    best = best_cells(rows)
    apart = {name: distance(rows, axes, best["measured"], best[name]) for name in ("ideal_bound", "cost_bound")}
    command = command_line(run.flags, best["measured"])
    print_sweep(rows, axes, run.title(), best)
    for name, what in (("ideal_bound", "weight bytes alone"), ("cost_bound", "the measured cost of a round")):
        if best[name]:
            print(f"best by {what}: {best[name]} ({' and '.join(map(str, apart[name]))} cells from the measured best)")
    speedup = max(row["speedup"] for row in rows)
    print(f"best measured: {best['measured']}, {speedup:.2f}× plain decoding\n{command}")
    write_text(run.folder / "sweep.csv", csv_text(rows, axes))
    result = {
        "title": run.title(),
        "axes": {axis.key: axis.values for axis in axes},
        "cells": rows,
        "best": best,
        "cells_apart": apart,
        "command": command,
        **run.config_json(),
    }
    for path in filter(None, (run.flags.json, run.folder / "sweep.json")):
        write_json(path, result)
    contour.draw(rows, [(axis.key, axis.values) for axis in axes], best, run.folder / "sweep.png", run.title())
    print(f"written: {run.folder}/sweep.csv, sweep.json, sweep.png")


def main() -> None:
    with ranks.joined() as group:
        flags = parse_flags()
        run = Experiment(flags, group)
        axes = [Axis(flags.y or default_exits(run.n_layer)), Axis(flags.x)]
        if axes[0].key == axes[1].key:
            raise UserError(f"--y and --x must name different keys, got {axes[0].key} twice")
        cells = {}
        for y, x in itertools.product(*(axis.values for axis in axes)):
            text = cell_text(flags.policy, f"{axes[0].key}={y}", f"{axes[1].key}={x}")
            cells[text] = run.policy(text), {axes[0].key: y, axes[1].key: x}
        check_different({text: str(policy) for text, (policy, _) in cells.items()})
        settings = run.settings([policy for policy, _ in cells.values()]) | {"repeats": flags.repeats}
        journal = Journal(run.folder / "cells.jsonl", settings, ("policy",))
        finished = set(group.agreed(sorted(key for (key,) in journal.done)))
        if group.leads:
            journal.start()
        left = {text: policy for text, (policy, _) in cells.items() if text not in finished}
        if len(left) < len(cells):
            cli.notice(
                f"{len(cells) - len(left)} of {len(cells)} cells were finished before: their times are of the "
                f"earlier run; delete {journal.path} to measure them anew"
            )
        if left:
            run.load(list(left.values()))
            for text, policy in tqdm(left.items(), desc="cells", leave=False):
                row = measure_cell(run, policy, flags.repeats)
                if group.leads:
                    journal.add({**cells[text][1], "policy": text, **row})
        if group.leads:
            finish(run, [journal.get(text) for text in cells], axes)


if __name__ == "__main__":
    cli.run(main)
