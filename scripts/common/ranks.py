"""Data parallelism of the experiment programs: under torchrun each rank has a whole model and a share of the samples.

Not the tensor parallelism of generate.py, where ranks share one model: only how ranks meet and end is taken from
`tp.py`. Rank 0 alone prints (the others' stdout and stderr go nowhere) and writes files.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import distributed

import cli
import tp
from decoding.engine import Engine, chosen_device, take_gpu


class Ranks:
    """The ranks that share the samples, seen from one of them; a single process is rank 0 of 1, at no cost."""

    def __init__(self, group: tp.Group | None, shares: bool = True):
        """shares False: the ranks run one model together (tp.py), so each sees all samples."""
        self.group, self.shares = group, shares
        self.rank, self.size = (group.rank, group.size) if group and shares else (0, 1)
        self.leads = group is None or group.leads

    def open_engine(self, flags: argparse.Namespace, needs_tokenizer: bool = True, **changes) -> Engine:
        """As `cli.open_engine`; where ranks share samples, each has a whole model, with cuda on a GPU of its own."""
        if not self.shares:
            return cli.open_engine(flags, needs_tokenizer, self.group, **changes)
        self.take_gpu(changes.get("device", flags.device))
        return cli.open_engine(flags, needs_tokenizer, **changes)

    def take_gpu(self, device: str) -> None:
        """Let "cuda" mean a GPU of its own on each rank. device: as in EngineConfig."""
        if self.group:
            take_gpu(self.group, chosen_device(device))

    def share(self, items: Sequence) -> list:
        """Return the items of this rank: every size-th, so that equal parts of a sorted list are equally long."""
        return list(items[self.rank :: self.size])

    def gathered(self, values: Sequence) -> list:
        """Return what all ranks have found for their shares, in the order of the shared items; on every rank.

        Waits for the slowest rank however long it takes; raises RuntimeError if a rank has failed.
        """
        if self.size == 1:
            return list(values)
        self.group.meet(math.inf)  # a message itself may take tp.TIMEOUT_SECONDS only
        shares: list = [None] * self.size
        distributed.all_gather_object(shares, list(values))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def each(self, items: Sequence, work: Callable) -> Iterator:
        """Yield work(item) of every item in order, on all ranks. Each rank works on one item at a time.

        Whatever was yielded is complete, so rank 0 can write it down and a killed run can go on from there.
        """
        for first in range(0, len(items), self.size):
            yield from self.gathered([work(item) for item in self.share(items[first : first + self.size])])

    def agreed(self, value):
        """Return rank 0's value, anything that can be pickled: what it has measured, or read from its files."""
        if self.group is None:
            return value
        self.group.meet(math.inf)
        return self.group.agreed(value)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Give the ranks that torchrun started, which end together, or this one process. See `tp.joined`.

    With several ranks the process ends with the block: put everything into it. `sys.exit(code)` inside sets the code.
    """
    with tp.joined() as group:
        yield Ranks(group)
