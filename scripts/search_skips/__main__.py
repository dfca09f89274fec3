"""Search the sublayers a draft leaves out (Draft & Verify, arXiv 2309.08168): Bayesian, on texts of the model itself.

Static exits are tried first: they are such sets, too. Each trial is judged by one parallel pass over the texts
(`trials.py`), the promising ones also by decoding; search.db has all of them (`study.py`), and a search started again
in the same folder goes on. At the end the best sets, the best static exit and plain decoding are timed in
turns. skips.json is what `--policy skip_set:FILE` reads; search.json and search.png have the whole search.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

import cli
from decoding.calibrate import SAMPLE_TEXT
from decoding.runner import Runner, check_num_draft_tokens
from drafting.policy import check_range
from errors import UserError
from scripts.common import policy_sets, round_costs
from scripts.common.experiment import Experiment, add_flags
from scripts.common.journal import claimed
from scripts.common.ranks import joined
from scripts.common.round_costs import RoundCosts
from scripts.search_skips.finish import finalists, timed
from scripts.search_skips.report import write_search
from scripts.search_skips.study import SAMPLERS, Store, Trial, check_installed, propose
from scripts.search_skips.trials import Judge, drafting_policy, exit_set

STARTS = 10  # trials at random, from almost nothing left out to more than half, before a sampler is asked
BAD_FIT = 0.05  # relative error of costs that are better measured again
UNFIT = "+,=?%#{}"  # for the name of a folder in a policy string or in the address of a database


def static_exits(n_layer: int) -> list[int]:
    """List the exits that are tried: up to half of the layers, and LayerSkip's L/4."""
    return sorted({*policy_sets.exit_layers(n_layer), max(1, n_layer // 4)})


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
