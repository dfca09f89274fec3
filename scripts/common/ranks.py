"""Data parallelism of the experiment programs: under torchrun each rank has a whole model and a share of the samples.

Not the tensor parallelism of generate.py, where ranks share one model: only how ranks meet and end is taken from
`tp.py`. Rank 0 alone prints (the others' stdout and stderr go nowhere) and writes files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import distributed

import cli
import tp
from errors import UserError


class Ranks:
    """The ranks that share the samples, seen from one of them; a single process is rank 0 of 1, at no cost."""

    def __init__(self, group: tp.Group | None, shares: bool = True):
        """shares False: the ranks run one model together (tp.py), so each sees all samples."""
        self.group, self.shares = group, shares
        self.rank, self.size = (group.rank, group.size) if group and shares else (0, 1)
        self.leads = group is None or group.leads

    def open_session(self, flags, needs_tokenizer: bool = True) -> cli.Session:
        """As `cli.open_session`; where ranks share samples, each has a whole model, with cuda on a GPU of its own."""
        if not self.shares:
            return cli.open_session(flags, needs_tokenizer, self.group)
        self.take_gpu(flags.device)
        return cli.open_session(flags, needs_tokenizer)

    def take_gpu(self, device: str) -> None:
        """Let "cuda" mean a GPU of its own on each rank."""
        if self.group and device == "cuda" and (count := torch.cuda.device_count()):
            if self.group.local_rank >= count:
                raise UserError(f"nproc_per_node: torch sees {count} CUDA devices here, one is needed for each rank")
            torch.cuda.set_device(self.group.local_rank)

    def share(self, items: Sequence) -> list:
        """The items of this rank: every size-th, so that equal parts of a sorted list are equally long."""
        return list(items[self.rank :: self.size])

    def gathered(self, values: Sequence) -> list:
        """What all ranks have found for their shares, in the order of the items that were shared; on every rank.

        Waits for the slowest rank however long it takes; raises RuntimeError if a rank has failed.
        """
        if self.size == 1:
            return list(values)
        self.group.meet(math.inf)  # a message itself may take tp.TIMEOUT_SECONDS only
        shares: list = [None] * self.size
        distributed.all_gather_object(shares, list(values))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def each(self, items: Sequence, work: Callable) -> Iterator:
        """Yield work(item) of every item in order, on all ranks, a round of one item a rank after the other.

        What was yielded is complete, so rank 0 can write it down and a killed run can go on from there.
        """
        for first in range(0, len(items), self.size):
            yield from self.gathered([work(item) for item in self.share(items[first : first + self.size])])

    def agreed(self, value):
        """Rank 0's value (anything that can be pickled): for what is measured or read from rank 0's files."""
        if self.group is None:
            return value
        self.group.meet(math.inf)
        return self.group.agreed(value)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, which end together, or this one process. See `tp.joined`.

    With several ranks the process ends with the block: put everything into it. `sys.exit(code)` inside sets the code.
    """
    with tp.joined() as group:
        yield Ranks(group)
