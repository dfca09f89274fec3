"""Search the sublayers a draft leaves out (Draft & Verify, arXiv 2309.08168): Bayesian, on texts of the model itself.

Static exits are tried first: they are such sets, too. Each trial is judged by one parallel pass over the texts
(`trials.py`), the promising ones also by decoding; search.db has all of them (`study.py`), and a search started again
in the same folder goes on. At the end the best sets, the best static exit and plain decoding are timed in
turns. skips.json is what `--policy skip_set:FILE` reads; search.json and search.png have the whole search.
"""

import argparse
import functools
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

import cli
from decoding.calibrate import SAMPLE_TEXT
from decoding.runner import Runner, check_num_draft_tokens
from drafting.policy import check_range
from errors import UserError
from loading.files import write_json
from scripts.common import policy_sets, round_costs
from scripts.common.commands import generate_command
from scripts.common.contender import skipfast_contender
from scripts.common.experiment import Experiment, add_flags
from scripts.common.journal import Journal, claimed
from scripts.common.ranks import joined
from scripts.common.round_costs import RoundCosts, skips_of
from scripts.common.turns import Quality, measure, ratios
from scripts.search_skips import charts
from scripts.search_skips.study import SAMPLERS, Store, Trial, check_installed, propose
from scripts.search_skips.trials import Judge, drafting_policy, exit_set

STARTS = 10  # trials at random, from almost nothing left out to more than half, before a sampler is asked
BAD_FIT = 0.05  # relative error of costs that are better measured again
FINALISTS = 3  # sets that are timed at the end
UNFIT = "+,=?%#{}"  # for the name of a folder in a policy string or in the address of a database


def static_exits(n_layer: int) -> list[int]:
    """List the exits that are tried: up to half of the layers, and LayerSkip's L/4."""
    return sorted({*policy_sets.exit_layers(n_layer), max(1, n_layer // 4)})


# ---------------------------------------------------------------- the search


def next_set(tried: Sequence[Trial], started: int, sampler: str, seed: int) -> tuple[bool, ...]:
    """Choose a set that was not tried yet, by the trials so far and the seed. started: how many static exits were."""
    number, draw = len(tried) - started, random.Random(f"{seed}/{len(tried)}")
    if number < STARTS:
        share = 0.95 - 0.6 * number / (STARTS - 1)
        keep = tuple(draw.random() < share for _ in tried[0].keep)
    else:
        keep = propose(tried, sampler, f"{seed}/{len(tried)}")
    known = {trial.keep for trial in tried}
    while keep in known:  # a sampler that is sure of itself says the same again: look around there
        i = draw.randrange(len(keep))
        keep = (*keep[:i], not keep[i], *keep[i + 1 :])
    return keep


def search(judge: Judge, store: Store, flags: argparse.Namespace) -> None:
    """Try static exits and flags.trials sets, less those in the store."""
    n_layer = judge.runner.n_layer
    exits = static_exits(n_layer)
    total = planned(flags.trials, n_layer)
    bar = tqdm(total=total, initial=min(total, len(store.trials)), desc="trials", leave=False)
    while (number := len(store.trials)) < total:
        best = max((trial.value for trial in store.trials if trial.decoded), default=1.0)
        exit_layer = exits[number] if number < len(exits) else None
        keep = (
            next_set(store.trials, len(exits), flags.sampler, flags.seed)
            if exit_layer is None
            else exit_set(exit_layer, n_layer)
        )
        store.add(judge.tried(keep, flags.screen * max(best, 1.0), exit_layer))  # 1: plain decoding
        bar.set_postfix(best=f"{max(trial.value for trial in store.trials if trial.decoded):.2f}×", refresh=False)
        bar.update()
    bar.close()


def planned(trials: int, n_layer: int) -> int:
    """Count the trials in all: the static exits and as many sets, unless there are fewer sets."""
    return min(len(static_exits(n_layer)) + trials, 4**n_layer)


# ---------------------------------------------------------------- the end: what is faster by the clock


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


# ---------------------------------------------------------------- what a search leaves behind


def left_out(keep: Sequence[bool]) -> str:
    """Say in words what a set leaves out."""
    parts = zip(("attention", "mlp"), skips_of(keep), strict=True)
    return "; ".join(f"{name} {ranges(layers)}" for name, layers in parts if layers) or "nothing"


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers in short: 0 3-5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def print_search(rows: Sequence[dict], trials: Sequence[Trial | None], title: str) -> None:
    """Print the table of what was timed. trials: of the rows; None for plain decoding."""
    body = [
        [
            row["policy"],
            str(trial.num_draft_tokens) if trial else "–",
            left_out(trial.keep) if trial else "–",
            cli.shown(row["acceptance_rate"], ".2f"),
            cli.shown(row["tokens_per_round"], ".2f"),
            cli.shown(row["modelled_speedup"], ".2f") + "×",
            cli.shown(row["speedup"], ".2f") + "×",
            cli.shown(row["tokens_per_s"]),
            {True: "yes", False: "NO", None: "–"}[row["identical"]],
        ]
        for row, trial in zip(rows, trials, strict=True)
    ]
    columns = (
        "",
        "K",
        "left out of layers",
        "acceptance",
        "tokens\nper round",
        "modelled\nspeedup",
        "measured\nspeedup",
        "tokens/s",
        "identical",
    )
    cli.print_table(f"{title}, in turns", columns, body)


def write_search(experiment: Experiment, store: Store) -> None:
    """Write what was found, and print it."""
    trials, (sets, static), rows = store.trials, finalists(store.trials), store.get("timed")["rows"]
    best, winner, notes = conclusion(rows, sets, static)
    chosen, file, title = sets[best - 2], experiment.folder / "skips.json", experiment.title
    recommended = (
        f"skip_set:{file},num_draft_tokens={chosen.num_draft_tokens}" if winner == best else rows[winner]["policy"]
    )
    decoded, exits = sum(trial.decoded for trial in trials), sum(trial.exit_layer is not None for trial in trials)
    print(
        f"{exits} static exits and {len(trials) - exits} trials: {decoded} decoded, the others screened out; "
        f"error of modelled costs {store.get('costs')['error']:.1%}"
    )
    print_search(rows, [None, static, *sets], title)
    command = generate_command(experiment.flags, recommended)
    print(*notes, f"fastest: {recommended}, {rows[winner]['speedup']:.2f}× plain decoding", command, sep="\n")
    skips = skip_file(chosen, rows[best], rows[:2], recommended)
    write_json(file, skips)
    result = {
        "skips": skips,
        "notes": notes,
        "command": command,
        "timed": rows,
        "trials": [{"state": "decoded" if trial.decoded else "screened", **asdict(trial)} for trial in trials],
        "costs": store.get("costs"),
        "threads": store.get("threads"),
    }
    experiment.write_result("search.json", result)
    charts.draw(trials, static, chosen, experiment.folder / "search.png", title)
    print(f"written: {experiment.folder}/skips.json, search.json, search.png")


def skip_file(chosen: Trial, row: dict, references: Sequence[dict], recommended: str) -> dict:
    """Return the content of skips.json: what `--policy skip_set:FILE` reads, and what was measured of it."""
    attention, mlp = skips_of(chosen.keep)
    numbers = lambda measured: {name: measured[name] for name in ("speedup", "tokens_per_s", "acceptance_rate")}
    return {
        "skip_attention": attention,
        "skip_mlp": mlp,
        "num_draft_tokens": chosen.num_draft_tokens,
        "n_layer": len(chosen.keep) // 2,
        **numbers(row),
        "improvement": row["identical"] is not False and row["speedup"] > 1,
        "recommended": recommended,
        "reference": {reference["policy"]: numbers(reference) for reference in references},
    }


# ---------------------------------------------------------------- the program


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.search_skips",
        description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.search_skips --trials 100 --dataset code --output_dir out/search",
    )
    add_flags(parser, "out/search")
    parser.add_argument(
        "--trials",
        type=int,
        default=100,
        metavar="N",
        help="sets to try after the static exits; a finished search goes on with more (default: 100)",
    )
    parser.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        default="gp",
        help="gp: a Gaussian process, finds better sets; tpe: proposes in less time (default: gp)",
    )
    parser.add_argument(
        "--most_drafts",
        type=int,
        default=7,
        metavar="K",
        help="the most tokens a round may draft; each set has the number that suits it (default: 7)",
    )
    parser.add_argument(
        "--screen",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="decode only with sets that promise this share of the best so far (default: 0.9)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed turns at the end (default: 7)")
    flags = parser.parse_args(argv)
    check_flags(flags)
    return flags


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for the first flag that no search can have."""
    for name in ("trials", "most_drafts", "repeats"):
        if getattr(flags, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(flags, name)}")
    check_num_draft_tokens(flags.most_drafts)
    check_range("screen", flags.screen, 0.0, 1.0)
    if flags.max_new_tokens < 2:
        raise UserError(f"max_new_tokens must be 2 or more to draft, got {flags.max_new_tokens}")
    if flags.num_draft_tokens is not None:
        raise UserError("num_draft_tokens is what the search chooses: give --most_drafts instead")
    if flags.draft_quantize is not None:
        raise UserError("draft_quantize: the search drafts with the model's own weights only, leave it out")
    if flags.verification == "rejection" and flags.temperature > 0:
        raise UserError(
            "verification rejection: the search counts drafts that equal the text, which coupled sampling "
            "accepts; leave it out"
        )
    if unfit := sorted(set(flags.output_dir) & set(UNFIT)):
        raise UserError(
            f"output_dir must be without {unfit[0]!r}, so that a policy can name a file in it, got {flags.output_dir!r}"
        )
    check_installed(flags.sampler)


def load(experiment: Experiment, store: Store) -> tuple[Runner, RoundCosts]:
    """Read the weights; what a round costs, and on how many threads, is measured once for a whole search."""
    widest = drafting_policy((True,) * (2 * experiment.n_layer), experiment.flags.most_drafts)
    known = store.get("costs")
    costs = known and round_costs.restored(store.path, known)
    experiment.load([widest])
    runner = experiment.engine.runner(widest)
    if costs is None:
        costs = measured_costs(experiment, runner)
        store.set("threads", torch.get_num_threads())
        store.set("costs", asdict(costs))
    else:
        torch.set_num_threads(store.get("threads"))
    return runner, costs


def measured_costs(experiment: Experiment, runner: Runner) -> RoundCosts:
    """Measure until a curve fits, at most three times -> the best, with a notice if even that is bad."""
    flags, sample, tries = experiment.flags, experiment.engine.tokenizer.encode(SAMPLE_TEXT), []
    while len(tries) < 3 and not (tries and tries[-1].error <= BAD_FIT):
        tries.append(round_costs.measure(runner, sample, flags.most_drafts, flags.seed))
    best = min(tries, key=lambda costs: costs.error)
    if best.error > BAD_FIT:
        cli.notice(
            f"the cost of a round is known to {best.error:.0%} only (a busy machine?), and with it the modelled "
            f"speedups by which sets are chosen"
        )
    return best


def go_on(experiment: Experiment) -> None:
    """Search, time and report, or what is left of that."""
    flags = experiment.flags
    own = {name: getattr(flags, name) for name in ("sampler", "most_drafts", "screen")}
    store = Store(experiment.folder / "search.db", experiment.settings([]) | own)
    key = lambda: {"trials": len(store.trials), "repeats": flags.repeats}
    total = planned(flags.trials, experiment.n_layer)
    finished = len(store.trials) >= total and (store.get("timed") or {}).get("key") == key()
    if not finished:
        if store.trials:
            cli.notice(f"{len(store.trials)} of {total} trials were finished before")
        runner, costs = load(experiment, store)
        if len(store.trials) < total:
            search(Judge(experiment, runner, costs, flags.most_drafts), store, flags)
        store.set("timed", {"key": key(), "rows": timed(experiment, *finalists(store.trials))})
    write_search(experiment, store)


def main() -> None:
    with joined() as ranks:
        flags = parse_flags()
        if ranks.group is not None:
            raise UserError("scripts.search_skips runs in one process: start it without torchrun")
        experiment = Experiment(flags, ranks)
        with claimed(experiment.folder):
            go_on(experiment)


if __name__ == "__main__":
    cli.run(main)
