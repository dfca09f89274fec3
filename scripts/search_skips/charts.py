"""The picture of `scripts.search_skips`: what each trial was worth, and which sublayers the chosen draft runs."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from scripts.common import pictures
from scripts.common.pictures import columns
from scripts.search_skips.study import Trial


def draw(trials: Sequence[Trial], static: Trial, chosen: Trial, picture: Path, title: str) -> None:
    """Write a PNG. static: the best static exit."""
    pyplot = pictures.pyplot(picture)
    if pyplot is None:
        return
    figure, (values, grid) = pyplot.subplots(1, 2, figsize=(11, 6), width_ratios=(5, 1), layout="constrained")
    draw_values(values, trials, static)
    draw_set(grid, chosen)
    figure.suptitle(title)
    pictures.save(figure, picture)


def draw_values(axes, trials: Sequence[Trial], static: Trial) -> None:
    """Draw a point a trial, and the lines to beat."""
    numbered = list(enumerate(trials))
    for label, colour, wanted in (
        ("static exit, decoded", "tab:red", lambda trial: trial.exit_layer is not None),
        ("decoded", "tab:blue", lambda trial: trial.decoded and trial.exit_layer is None),
    ):
        points = [(i, trial.value) for i, trial in numbered if wanted(trial)]
        axes.scatter(*columns(points), c=colour, s=26, label=label, zorder=3)
    screened = [(i, trial.proxy) for i, trial in numbered if not trial.decoded]
    axes.scatter(*columns(screened), c="0.6", s=20, marker="x", label="screened out by the parallel pass", zorder=2)
    decoded = [(i, trial.proxy) for i, trial in numbered if trial.decoded]
    axes.scatter(
        *columns(decoded),
        facecolors="none",
        edgecolors="tab:blue",
        s=40,
        linewidths=0.7,
        label="what the pass promised",
        zorder=2,
    )
    best = itertools.accumulate((trial.value if trial.decoded else 0.0 for trial in trials), max)
    axes.step(range(len(trials)), list(best), where="post", color="tab:green", label="best so far")
    axes.axhline(1.0, color="black", linestyle=":", label="plain decoding")
    axes.axhline(
        static.value,
        color="tab:red",
        linestyle="--",
        linewidth=1,
        label=f"best static exit: {static.exit_layer}, K = {static.num_draft_tokens}",
    )
    axes.set(xlabel="trial", ylabel="speedup over plain decoding (×, modelled)", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)


def draw_set(axes, chosen: Trial) -> None:
    """Draw the sublayers of a set as a grid, the first layer at the bottom."""
    from matplotlib.colors import ListedColormap

    layers = [list(map(int, chosen.keep[i : i + 2])) for i in range(0, len(chosen.keep), 2)]
    axes.pcolormesh(layers, cmap=ListedColormap(["0.92", "tab:green"]), vmin=0, vmax=1, edgecolors="white", linewidth=2)
    axes.set_xticks((0.5, 1.5), ("attention", "MLP"), rotation=30)
    step = max(1, len(layers) // 16)
    axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], range(0, len(layers), step))
    axes.set(ylabel="layer", title=f"the draft runs, K = {chosen.num_draft_tokens}")
    axes.title.set_fontsize(10)
