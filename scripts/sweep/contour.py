"""The picture of `scripts.sweep`: speedup over two policy keys, with every measured cell as a point.

matplotlib is optional: it is imported where it draws.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cli
from loading.files import replacing

MARKS = {
    "measured": ("*", 320, "tab:red", "fastest as measured"),
    "ideal_bound": ("D", 150, "tab:orange", "best by weight bytes alone (ideal bound)"),
    "cost_bound": ("s", 230, "tab:purple", "best by the measured cost of a round"),
}


def draw(rows: Sequence[dict], axes: Sequence[tuple[str, list[str]]], best: dict, picture: Path, title: str) -> None:
    """Write a PNG. axes: key and values of y and of x, one cell in `rows` for each pair; best: policies to be marked.

    Values stand at equal distances. Without matplotlib a notice says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        cli.notice(f"no {picture.name}: drawing it needs `pip install matplotlib`")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patheffects, pyplot

    (y_key, ys), (x_key, xs) = axes
    place = {row["policy"]: (xs.index(row[x_key]), ys.index(row[y_key])) for row in rows}
    grid = [[0.0] * len(xs) for _ in ys]
    for row in rows:
        x, y = place[row["policy"]]
        grid[y][x] = row["speedup"] or 0.0
    figure, plot = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    if len(xs) > 1 and len(ys) > 1:
        shades = plot.contourf(range(len(xs)), range(len(ys)), grid, levels=15, cmap="viridis")
        figure.colorbar(shades, label="speedup over plain decoding (×, measured in turns)")
    plot.scatter(*zip(*place.values(), strict=True), c="white", s=14, edgecolors="0.2", linewidths=0.6, zorder=3)
    for row in rows:  # with a light edge: numbers stand on every shade, and beyond the shades
        plot.annotate(
            cli.shown(row["speedup"], ".2f"),
            place[row["policy"]],
            (0, -19),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="black",
            zorder=5,
            path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
        )
    for name, (marker, size, colour, label) in MARKS.items():
        if best.get(name):
            plot.scatter(
                *place[best[name]],
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
    with replacing(picture) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
