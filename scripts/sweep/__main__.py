"""Sweep two policy keys (exit layer × drafted tokens): the same samples in every cell, in turns with plain decoding.

Each finished cell is a line of cells.jsonl; a sweep started again in the same folder goes on after the last one. At the
end: sweep.csv, sweep.json, a contour picture with the best cell and the one that costs alone would choose, and the
generate.py command of the best.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

import cli
from decoding.calibrate import SAMPLE_TEXT, time_rounds
from decoding.generation import Generation, ideal_speedup, totals
from drafting.plan import RoundContext
from drafting.policy import DraftPolicy
from errors import UserError
from scripts.common.experiment import Experiment, add_flags
from scripts.common.journal import Journal
from scripts.common.ranks import joined
from scripts.common.turns import ratios
from scripts.sweep.axes import Axis, cell_text, check_different, default_exits
from scripts.sweep.report import write_sweep


def measure_cell(experiment: Experiment, policy: DraftPolicy, repeats: int) -> dict:
    """Decode this rank's samples in turns with plain decoding -> the numbers of the cell, over all ranks.

    Counts are sums over samples, `seconds` too (the median turn); a rate is tokens after the first ÷ those seconds.
    """
    own = experiment.ranks.share(experiment.samples)
    for _, ids in own[:1]:  # warm-up
        experiment.decode(policy, ids), experiment.decode_plain(ids)
    measured = [measure_sample(experiment, policy, ids, repeats) for _, ids in own]
    samples: list[MeasuredSample] = experiment.ranks.gathered(measured)
    cost = experiment.ranks.agreed(round_cost(experiment, policy))
    sums = totals(round for sample in samples for round in sample.text.rounds)
    if not sums.tokens:
        raise UserError("every text ends with its first token, so there is nothing to time: add --ignore_eos")
    seconds, plain_s = (
        [sum(turn) for turn in zip(*of_samples, strict=True)]
        for of_samples in ([sample.seconds for sample in samples], [sample.plain_seconds for sample in samples])
    )
    speedups = [statistics.median(ratios(s.plain_seconds, s.seconds)) for s in samples if s.text.rounds]
    identical = all(sample.identical for sample in samples)
    return {
        "tokens": sum(len(sample.text.tokens) for sample in samples),
        "drafted": sums.drafted,
        "accepted": sums.accepted,
        "rounds": sums.rounds,
        "acceptance_rate": sums.acceptance_rate,
        "tokens_per_round": sums.tokens_per_round,
        "mean_exit_layer": sums.mean_exit_layer,
        "layer_visits_per_token": sums.layer_visits_per_token,
        "head_visits_per_token": sums.head_visits_per_token,
        "ideal_speedup": ideal_speedup(sums.tokens, sums.layer_visits, sums.head_visits, experiment.engine.model),
        "identical": identical if experiment.must_equal_plain(policy) else None,
        "seconds": statistics.median(seconds),
        "plain_seconds": statistics.median(plain_s),
        "tokens_per_s": sums.tokens / statistics.median(seconds),
        "plain_tokens_per_s": sums.tokens / statistics.median(plain_s),
        "speedup": statistics.median(ratios(plain_s, seconds)),
        "mean_sample_speedup": statistics.fmean(speedups),
        "round_cost": cost,
        "bound": sums.tokens_per_round / cost if cost else None,
    }


class MeasuredSample(NamedTuple):
    """One sample in a cell: the policy's last text, whether plain decoding's is the same, the seconds of each turn."""

    text: Generation
    identical: bool
    seconds: list[float]
    plain_seconds: list[float]


def measure_sample(experiment: Experiment, policy: DraftPolicy, ids: Sequence[int], repeats: int) -> MeasuredSample:
    """Decode one sample by the policy and plainly, in turns; who begins changes from turn to turn."""
    seconds, plain_seconds = [], []
    for turn in range(repeats):
        text = experiment.decode(policy, ids) if turn % 2 else None
        plain = experiment.decode_plain(ids)
        text = text or experiment.decode(policy, ids)
        seconds.append(text.decode_s)
        plain_seconds.append(plain.decode_s)
    return MeasuredSample(text, text.tokens == plain.tokens, seconds, plain_seconds)


def round_cost(experiment: Experiment, policy: DraftPolicy) -> float | None:
    """Time a round of the policy ÷ a token of plain decoding, apart from the samples, whatever is accepted.

    None for policies that do not draft by one plan that is fixed beforehand.
    """
    runner, tokens = experiment.engine.runner(policy), experiment.engine.tokenizer.encode(SAMPLE_TEXT)
    tokens = tokens[: max(1, runner.cache_length - policy.num_draft_tokens - 2)]
    policy.start_prompt(tokens)
    plan = policy.start_round(RoundContext(tokens, policy.num_draft_tokens + 2))
    if not plan.is_fixed or plan.skip_attention or plan.skip_mlp:
        return None
    runner.prefill(tokens)
    plain_runner, plain = experiment.plain
    seconds = lambda *which, plan: time_rounds(*which, [plan], tokens, experiment.config.sampling)[plan]
    costs = []
    for _ in range(3):
        token_s = seconds(plain_runner, plain, plan=plain.only_plan) / plain.steps
        costs.append(seconds(runner, policy, plan=plan) / token_s)
    return statistics.median(costs)


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


def make_cells(experiment: Experiment, axes: list[Axis]) -> tuple[dict[str, DraftPolicy], dict[str, dict[str, str]]]:
    """Make the policy of each cell, and its place as {key: value}, both by the cell's policy string."""
    policies, places = {}, {}
    for y, x in itertools.product(*(axis.values for axis in axes)):
        text = cell_text(experiment.flags.policy, f"{axes[0].key}={y}", f"{axes[1].key}={x}")
        policies[text], places[text] = experiment.policy(text), {axes[0].key: y, axes[1].key: x}
    check_different({text: str(policy) for text, policy in policies.items()})
    return policies, places


def main() -> None:
    with joined() as ranks:
        flags = parse_flags()
        experiment = Experiment(flags, ranks)
        axes = [Axis(flags.y or default_exits(experiment.n_layer)), Axis(flags.x)]
        if axes[0].key == axes[1].key:
            raise UserError(f"--y and --x must name different keys, got {axes[0].key} twice")
        policies, places = make_cells(experiment, axes)
        settings = experiment.settings(list(policies.values())) | {"repeats": flags.repeats}
        journal = Journal(experiment.folder / "cells.jsonl", settings, ("policy",))
        finished = set(ranks.agreed(sorted(key for (key,) in journal.done)))
        if ranks.leads:
            journal.start()
        left = {text: policy for text, policy in policies.items() if text not in finished}
        if len(left) < len(policies):
            cli.notice(
                f"{len(policies) - len(left)} of {len(policies)} cells were finished before: their times are of the "
                f"earlier run; delete {journal.path} to measure them anew"
            )
        if left:
            experiment.load(list(left.values()))
            for text, policy in tqdm(left.items(), desc="cells", leave=False):
                cell = measure_cell(experiment, policy, flags.repeats)
                if ranks.leads:
                    journal.add({**places[text], "policy": text, **cell})
        if ranks.leads:
            write_sweep(experiment, [journal.get(text) for text in policies], axes)


if __name__ == "__main__":
    cli.run(main)
