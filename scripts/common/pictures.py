"""Pictures as PNG files. matplotlib is optional: without it a notice says what to install, and no file is written."""

import importlib.util
from pathlib import Path
from typing import BinaryIO, Protocol

import cli
from loading.files import replacing

INSTALL = "pip install matplotlib"


class Figure(Protocol):
    """The part of a matplotlib figure that is needed here."""

    def savefig(self, file: BinaryIO, **settings) -> None: ...


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot(picture: Path):
    """Return matplotlib's pyplot, set to draw into files; None and a notice that there will be no `picture`."""
    if not can_draw():
        cli.notice(f"no {picture.name}: drawing it needs `{INSTALL}`")
        return None
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    return pyplot


def save(figure: Figure, picture: Path) -> None:
    """Write a figure as a PNG file, which appears complete, and close it."""
    from matplotlib import pyplot

    with replacing(picture) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def columns(points) -> tuple:
    """Turn points (x, y) into (all x, all y), as matplotlib wants them; no points into two empty columns."""
    return tuple(zip(*points, strict=True)) or ((), ())
