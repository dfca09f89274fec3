"""Draw the charts of the page of `scripts.inspect_layers`, as SVG: no library, and in the theme's colours."""

import html
from collections.abc import Sequence

from scripts.inspect_layers.lens import Lens

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 34  # around the area that is drawn in


def charts(summary: dict, lenses: Sequence[Lens]) -> str:
    """Draw the three charts of one model: cosines, earliest stable layers, and where the tokens exited."""
    parts = [
        figure(
            "Median cosine of hidden states, n layers apart",
            "near 1: these layers hardly turn the state",
            cosine_chart(summary),
        ),
        figure(
            "Earliest layer from which the choice stays final",
            "bars: share of positions; line: share with the final choice at this layer",
            stable_chart(summary),
        ),
    ]
    if any(lens.departures for lens in lenses):
        parts.append(
            figure(
                "Layers run for each token of the text",
                "green: drafts that were accepted; grey: the full model's own tokens",
                exit_chart(lenses),
            )
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def figure(title: str, subtitle: str, svg: str) -> str:
    caption = f"<figcaption>{html.escape(title)}<span>{html.escape(subtitle)}</span></figcaption>"
    return f"<figure>{caption}{svg}</figure>"


class Frame:
    """An SVG drawing with axes: x from x_low to x_high, y from y_low to y_high, in the data's own units."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], label: str, describe: str):
        self.x, self.y = x, y
        self.parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(describe)}">']
        for i in range(5):
            value = y[0] + (y[1] - y[0]) * i / 4
            self.add(
                f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.down(value):.1f}" '
                f'y2="{self.down(value):.1f}"/>'
            )
            self.text(LEFT - 5, self.down(value) + 3.5, f"{value:.2g}", "end")
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, label, "middle")

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def add(self, element: str) -> None:
        self.parts.append(element)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        kind = f' class="{kind}"' if kind else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>')

    def ticks(self, values: Sequence[int]) -> None:
        """Number the x axis, as densely as there is room."""
        every = max(1, -(-len(values) // 14))
        for value in values[::every]:
            self.text(self.across(value), HEIGHT - BOTTOM + 14, str(value), "middle")

    def line(self, points: Sequence[tuple[float, float]], kind: str, title: str) -> None:
        path = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)
        self.add(f'<polyline class="line {kind}" points="{path}"><title>{html.escape(title)}</title></polyline>')

    def bar(self, x: float, y: float, width: float, kind: str, title: str) -> None:
        """Add a bar from the bottom up to y, `width` units wide around x."""
        left, right = self.across(x - width / 2), self.across(x + width / 2)
        area = f'x="{left:.1f}" y="{self.down(y):.1f}" width="{max(0.5, right - left):.1f}"'
        height = self.down(self.y[0]) - self.down(y)
        self.add(f'<rect class="{kind}" {area} height="{height:.1f}"><title>{html.escape(title)}</title></rect>')

    def close(self) -> str:
        return "".join([*self.parts, "</svg>"])


def cosine_chart(summary: dict) -> str:
    n_layer = len(summary["stable_from"])
    lowest = min((value for values in summary["cosine_by_depth"].values() for value in values), default=0.0)
    frame = Frame(
        (0, n_layer), (min(0.0, lowest), 1.0), "depth of the later state (layers run)", "median cosine by depth"
    )
    frame.ticks(range(n_layer + 1))
    for number, (gap, values) in enumerate(summary["cosine_by_depth"].items(), 1):
        points = [(depth + gap, value) for depth, value in enumerate(values)]
        frame.line(points, f"s{number}", f"n = {gap}: median {summary['cosine_median'][gap]:.3f}")
        frame.text(LEFT + 8 + 62 * (number - 1), HEIGHT - BOTTOM - 8, f"n = {gap}", kind=f"t{number}")
    return frame.close()


def stable_chart(summary: dict) -> str:
    n_layer, positions = len(summary["stable_from"]), summary["positions"]
    frame = Frame((0.4, n_layer + 0.6), (0.0, 1.0), "layer", "earliest stable layer")
    frame.ticks(range(1, n_layer + 1))
    for depth, count in enumerate(summary["stable_from"], 1):
        frame.bar(depth, count / positions, 0.8, "bar", f"layer {depth}: {count} of {positions} positions")
    frame.line(list(enumerate(summary["agreement"], 1)), "s2", "share of positions with the final choice at this layer")
    return frame.close()


def exit_chart(lenses: Sequence[Lens]) -> str:
    n_layer, exits = lenses[0].n_layer, [exit for lens in lenses for exit in lens.departures]
    frame = Frame((0, len(exits)), (0, n_layer), "token of the text", "layers run for each token")
    for index, exit in enumerate(exits):
        kind = "draft" if exit.drafted else "own"
        frame.bar(index + 0.5, exit.depth, 0.9, kind, f"token {index + 1}: {exit.depth} layers")
    frame.ticks(range(0, len(exits) + 1, max(1, len(exits) // 8)))
    return frame.close()
