"""A GPU's way of working, without one: rounds by graphs and ahead of time, programs of a grid in any order."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from decoding.graphs import Graphs
from decoding.runner import Runner
from decoding.sampling import SamplingConfig, choose


class CallByCall(Runner):
    """Plays no round in one call: the reference for everything that does."""

    call_by_call = True


class AsOnGPU(Graphs):
    """Rounds in parts and ahead of being asked for, as on a GPU; the graph of a program is the program itself."""

    captures, replays = Counter(), Counter()  # by the program's name

    def __init__(self, runner):
        super().__init__(runner)
        self.on_gpu = True

    def capture(self, program):
        AsOnGPU.captures[program.func.__name__] += 1
        return Replay(program)


class Replay(NamedTuple):
    """What a captured graph is called for."""

    program: Callable

    def replay(self):
        AsOnGPU.replays[self.program.func.__name__] += 1
        self.program()


def samples_from_logits(exit) -> torch.Tensor:
    """Exit.samples without a fused kernel, for tests of what surrounds it."""
    if exit.draw is None:
        raise ValueError("no draw")
    draw = exit.draw.on(exit.hidden.device, exit.rows)
    config = SamplingConfig(temperature=float(draw.temperature), seed=int(draw.seed))
    rows = zip(exit.logits(), draw.positions.tolist(), strict=True)
    return torch.tensor([choose(row, position, config) for row, position in rows])


def run_backwards(monkeypatch) -> None:
    """From now on let Triton's interpreter run the last program of a grid first: a GPU runs them in any order."""
    from triton.runtime import interpreter

    forwards = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(self, *index):
        forwards(self, *(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)
