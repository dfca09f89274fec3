"""The picture of `scripts.benchmark`: what drafting policies cost per token, and how many of their drafts are right."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from scripts.common import pictures
from scripts.common.contender import is_plain
from scripts.common.pictures import columns
from scripts.common.turns import row_names

DISTANCES = (9, 16, 26, 38, 54, 72, 95, 120)  # of a label from its point, in printer's points
ANGLES = (0, 180, 90, -90, 35, -35, 145, -145)


def wanted_picture(path: str | None, output_dir: str | None) -> Path | None:
    """Say where to draw, if at all. Raises UserError for --picture without matplotlib."""
    if path is not None and not pictures.can_draw():
        raise UserError(f"--picture needs matplotlib: {pictures.INSTALL}")
    if path is None and output_dir is None:
        return None
    return Path(path) if path is not None else Path(output_dir) / "policies.png"


def short(policy: str) -> str:
    """Shorten a policy string to a label."""
    return policy.replace(",num_draft_tokens=", " K=").replace(":num_draft_tokens=", " K=").replace(",", " ")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, acceptance) points that no other beats in both, cheapest first."""
    front, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def draw_policies(rows: Sequence[dict], n_layer: int, picture: Path, title: str) -> None:
    """Write a PNG: a point a drafting policy, acceptance over the cost of a token, coloured by speedup.

    rows: of the benchmark. Rows that drafted nothing to be accepted (unverified ones, other engines) have no point, and
    plain decoding is a line.
    """
    pyplot = pictures.pyplot(picture)
    if pyplot is None:
        return
    plain = next(row for row in rows if row["policy"] == "none")
    drafting = [
        (name, row)
        for name, row in zip(row_names(rows), rows, strict=True)
        if row["acceptance_rate"] is not None and not is_plain(row["policy"])
    ]
    points = [(row["cost_per_token_layers"], row["acceptance_rate"]) for _, row in drafting]
    figure, axes = pyplot.subplots(figsize=(12, 7.5) if len(points) < 25 else (16, 10), layout="constrained")
    speedups = [row["speedup_over_fastest_ar"] for _, row in drafting]
    dots = axes.scatter(*columns(points), c=speedups, cmap="viridis", s=45, zorder=3)
    axes.plot(
        *columns([points[i] for i in pareto_front(points)]),
        "o--",
        color="0.35",
        markersize=12,
        linewidth=1,
        markerfacecolor="none",
        zorder=2,
        label="Pareto front: no policy is both cheaper and more often right",
    )
    line = axes.axvline(
        plain["cost_per_token_layers"],
        color="tab:red",
        linestyle=":",
        label=f"plain decoding: {n_layer} layers and one LM head",
    )
    figure.colorbar(dots, label="speedup over the fastest plain decoding (×, measured)", pad=0.01)
    axes.set(
        xlabel="cost per token (layers of weights read; the LM head counted by its bytes)",
        ylabel="acceptance rate (accepted ÷ drafted tokens)",
        title=title,
    )
    axes.margins(0.1)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    label_points(axes, points, [short(name) for name, _ in drafting], [line])
    pictures.save(figure, picture)


def label_points(axes, points: Sequence[tuple[float, float]], labels: Sequence[str], upright: Sequence) -> None:
    """Write each label where it covers no point, other label, legend or upright line, as near as there is room."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # now the layout is known
    size = 6 * axes.figure.dpi / 72
    dots = axes.transData.transform(points) if points else []
    taken = [Bbox([(x - size, y - size), (x + size, y + size)]) for x, y in dots]
    taken += [axes.get_legend().get_window_extent(), *(line.get_window_extent().padded(1) for line in upright)]

    def covered(box) -> float:
        inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        return sum(box.overlaps(other) for other in taken) + (0 if inside else len(taken))

    for point, label in zip(points, labels, strict=True):
        text = axes.annotate(
            label,
            point,
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )
        boxes = {place: box_at(text, *place) for place in itertools.product(DISTANCES, ANGLES)}  # nearest first
        place = min(boxes, key=lambda place: covered(boxes[place]))
        taken.append(box_at(text, *place))


def box_at(text, distance: float, angle: float):
    """Move an annotation `distance` points away from its point, `angle` degrees up from the right -> its box."""
    from matplotlib.text import Text

    x, y = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
    text.set(position=(x, y), ha="left" if x > 1 else "right" if x < -1 else "center")
    text.update_positions(text.figure.canvas.get_renderer())
    return Text.get_window_extent(text)  # the annotation's own would include its line
