"""The picture of `scripts.sweep`: speedup over two policy keys, with every measured cell as a point."""

from collections.abc import Sequence
from pathlib import Path

import cli
from scripts.common import pictures
from scripts.common.pictures import columns

MARKS = {
    "measured": ("*", 320, "tab:red", "fastest as measured"),
    "ideal_bound": ("D", 150, "tab:orange", "best by weight bytes alone (ideal bound)"),
    "cost_bound": ("s", 230, "tab:purple", "best by the measured cost of a round"),
}


def draw(cells: Sequence[dict], axes: Sequence[tuple[str, list[str]]], best: dict, picture: Path, title: str) -> None:
    """Write a PNG. axes: key and values of y and of x, with a cell for each pair; best: policies to be marked.

    Values stand at equal distances.
    """
    pyplot = pictures.pyplot(picture)
    if pyplot is None:
        return
    (y_key, ys), (x_key, xs) = axes
    places = {cell["policy"]: (xs.index(cell[x_key]), ys.index(cell[y_key])) for cell in cells}
    grid = [[0.0] * len(xs) for _ in ys]
    for cell in cells:
        x, y = places[cell["policy"]]
        grid[y][x] = cell["speedup"] or 0.0
    figure, plot = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    if len(xs) > 1 and len(ys) > 1:
        shades = plot.contourf(range(len(xs)), range(len(ys)), grid, levels=15, cmap="viridis")
        figure.colorbar(shades, label="speedup over plain decoding (×, measured in turns)")
    plot.scatter(*columns(places.values()), c="white", s=14, edgecolors="0.2", linewidths=0.6, zorder=3)
    for cell in cells:
        write_number(plot, cli.shown(cell["speedup"], ".2f"), places[cell["policy"]])
    for name, (marker, size, colour, label) in MARKS.items():
        if best.get(name):
            plot.scatter(
                *places[best[name]],
                marker=marker,
                s=size,
                facecolors="none",
                edgecolors=colour,
                linewidths=2,
                zorder=4,
                label=f"{label}: {best[name]}",
            )
    plot.set(xlabel=x_key, ylabel=y_key, title=title, xlim=(-0.5, len(xs) - 0.5), ylim=(-0.5, len(ys) - 0.5))
    plot.set_xticks(range(len(xs)), xs)
    plot.set_yticks(range(len(ys)), ys)
    figure.legend(loc="outside lower center", fontsize=9)
    pictures.save(figure, picture)


def write_number(plot, number: str, place: tuple[int, int]) -> None:
    """Write a number below a cell's point, with a light edge: it stands on every shade, and beyond the shades."""
    from matplotlib import patheffects

    plot.annotate(
        number,
        place,
        (0, -19),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color="black",
        zorder=5,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
    )
