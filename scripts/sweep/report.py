"""What a sweep leaves behind: tables, CSV, JSON, and a picture with the best cells."""

import csv
import io
from collections.abc import Sequence

import cli
from loading.files import write_text
from scripts.common.commands import generate_command
from scripts.common.experiment import Experiment
from scripts.sweep import contour
from scripts.sweep.axes import Axis

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


def best_cells(cells: Sequence[dict]) -> dict:
    """Name the fastest cell as measured, and the best by two bounds: weight bytes, and the measured cost of a round."""
    best = {}
    for name in ("speedup", "ideal_speedup", "bound"):
        known = [cell for cell in cells if cell[name] is not None]
        best[name] = max(known, key=lambda cell: cell[name])["policy"] if len(known) == len(cells) else None
    return {"measured": best["speedup"], "ideal_bound": best["ideal_speedup"], "cost_bound": best["bound"]}


def distance(cells: Sequence[dict], axes: Sequence[Axis], first: str | None, second: str | None) -> list[int] | None:
    """Count how many cells apart two cells are, along y and x."""
    places = {cell["policy"]: [axis.values.index(cell[axis.key]) for axis in axes] for cell in cells}
    if first is None or second is None:
        return None
    return [abs(a - b) for a, b in zip(places[first], places[second], strict=True)]


def csv_text(cells: Sequence[dict], axes: Sequence[Axis]) -> str:
    """Write the cells as CSV, in the order of the grid: counts, which a seed decides, before times."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(axis.key for axis in axes), "policy", *COUNTS, *TIMES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return out.getvalue()


def print_sweep(cells: Sequence[dict], axes: Sequence[Axis], title: str, best: dict) -> None:
    """Print two grids of cells: speedup, the fastest with a mark, and acceptance."""
    y, x = axes
    by_place = {(cell[y.key], cell[x.key]): cell for cell in cells}
    for name, label in (("speedup", "speedup over plain decoding"), ("acceptance_rate", "acceptance rate")):
        body = []
        for value in y.values:
            line = [by_place[value, other] for other in x.values]
            marks = ["*" if cell["policy"] == best["measured"] and name == "speedup" else "" for cell in line]
            body.append([value, *(mark + cli.shown(cell[name], ".2f") for mark, cell in zip(marks, line, strict=True))])
        cli.print_table(f"{title}: {label}", [f"{y.key} \\ {x.key}", *x.values], body)


def write_sweep(experiment: Experiment, cells: list[dict], axes: list[Axis]) -> None:
    """Write CSV, JSON and the picture, and print the tables."""
    best, folder, title = best_cells(cells), experiment.folder, experiment.title
    apart = {name: distance(cells, axes, best["measured"], best[name]) for name in ("ideal_bound", "cost_bound")}
    command = generate_command(experiment.flags, best["measured"])
    print_sweep(cells, axes, title, best)
    for name, bound in (("ideal_bound", "weight bytes alone"), ("cost_bound", "the measured cost of a round")):
        if best[name]:
            print(f"best by {bound}: {best[name]} ({' and '.join(map(str, apart[name]))} cells from the measured best)")
    speedup = max(cell["speedup"] for cell in cells)
    print(f"best measured: {best['measured']}, {speedup:.2f}× plain decoding\n{command}")
    write_text(folder / "sweep.csv", csv_text(cells, axes))
    values = {axis.key: axis.values for axis in axes}
    result = {"axes": values, "cells": cells, "best": best, "cells_apart": apart, "command": command}
    experiment.write_result("sweep.json", result)
    contour.draw(cells, list(values.items()), best, folder / "sweep.png", title)
    print(f"written: {folder}/sweep.csv, sweep.json, sweep.png")
