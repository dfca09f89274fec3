"""What a search leaves behind: a table, skips.json, which `--policy skip_set:FILE` reads, search.json and a picture."""

from collections.abc import Sequence
from dataclasses import asdict

import cli
from loading.files import write_json
from scripts.common.commands import generate_command
from scripts.common.experiment import Experiment
from scripts.common.round_costs import skips_of
from scripts.search_skips import charts
from scripts.search_skips.finish import conclusion, finalists
from scripts.search_skips.study import Store, Trial


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
