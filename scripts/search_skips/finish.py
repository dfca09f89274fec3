"""The end of a search: the best sets and the best static exit are timed in turns with plain decoding."""

import functools
import statistics
from collections.abc import Sequence

from scripts.common.contender import skipfast_contender
from scripts.common.experiment import Experiment
from scripts.common.journal import Journal
from scripts.common.turns import Quality, measure, ratios
from scripts.search_skips.study import Trial
from scripts.search_skips.trials import drafting_policy

FINALISTS = 3  # sets that are timed at the end


def finalists(trials: Sequence[Trial]) -> tuple[list[Trial], Trial]:
    """Return the sets to time, best first, and the best static exit."""
    order = sorted(trials, key=lambda trial: (trial.decoded, trial.value), reverse=True)
    return order[:FINALISTS], max((t for t in trials if t.exit_layer is not None), key=lambda trial: trial.value)


def static_text(trial: Trial) -> str:
    return f"static:{trial.exit_layer},num_draft_tokens={trial.num_draft_tokens}"


def timed(experiment: Experiment, sets: Sequence[Trial], static: Trial) -> list[dict]:
    """Time plain decoding, a static exit and sets in turns on all samples -> a row each, in this order.

    `rates`: tokens/s of each turn; `speedup`: the median over turns of the ratio to plain decoding.
    """
    engine, exit = experiment.engine, static_text(static)
    policies = {exit: experiment.policy(exit)}
    for i, trial in enumerate(sets, start=1):
        policies[f"set {i}"] = drafting_policy(trial.keep, trial.num_draft_tokens)
    contender = functools.partial(skipfast_contender, config=experiment.config)
    plain = contender(*experiment.plain, "none")
    contenders = [plain, *(contender(engine.runner(policy), policy, name) for name, policy in policies.items())]
    engine.warm_up()
    measure(
        contenders,
        [ids for _, ids in experiment.samples],
        experiment.flags,
        experiment.ranks,
        Journal(None, {}, ("row", "sample", "repeat")),
        Quality(engine, (), ()),
    )
    checked = [experiment.must_equal_plain(policy) for policy in (experiment.plain[1], *policies.values())]
    rows = []
    for c, trial, comparable in zip(contenders, [None, static, *sets], checked, strict=True):
        sums = c.totals()
        rows.append(
            {
                "policy": c.policy,
                "tokens_per_s": statistics.median(c.rates),
                "rates": c.rates,
                "speedup": statistics.median(ratios(c.rates, plain.rates)),
                "modelled_speedup": trial.value if trial else 1.0,
                "acceptance_rate": sums.acceptance_rate,
                "tokens_per_round": sums.tokens_per_round,
                "identical": c.texts == plain.texts if comparable else None,
            }
        )
    return rows


def conclusion(rows: Sequence[dict], sets: Sequence[Trial], static: Trial) -> tuple[int, int, list[str]]:
    """Conclude from the times -> the row of the fastest set, the row to decode by, and notes in words.

    rows: plain decoding, the static exit, the sets. A row whose text differs from plain decoding's cannot win, nor can
    one that is no faster.
    """
    speed = lambda i: 0.0 if rows[i]["identical"] is False else rows[i]["speedup"]
    best = max(range(2, len(rows)), key=speed)
    winner = max((best, 1), key=speed)
    exit, keep = rows[1]["policy"], sets[best - 2].keep
    gains = ratios(rows[best]["rates"], rows[1]["rates"])
    if speed(winner) <= 1:
        winner, note = 0, "nothing that was tried is faster than plain decoding: use --policy none"
    elif keep == static.keep:
        note = f"the best set is that of {exit}: nothing better was found"
    elif min(gains) < 1 < max(gains):
        note = f"a tie: the set was faster than {exit} in {sum(gain > 1 for gain in gains)} of {len(gains)} turns"
    else:
        note = f"the best set is {statistics.median(gains):.2f} times as fast as {exit}"
    differing = [row["policy"] for row in rows if row["identical"] is False]
    return best, winner, [note, *(f"{policy}: ITS TEXT DIFFERS from plain decoding's" for policy in differing)]
