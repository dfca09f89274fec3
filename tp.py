"""Tensor parallelism: every rank runs the same program with a part of each layer's heads and features.

`torchrun --nproc_per_node=N generate.py …` starts N ranks; `joined` makes them one Group. TABLE says which linears are
cut, and how. loading/checkpoint.py reads each rank's part of the file, and `parallelize` gives the model linears that
fit it. A rank's model is a smaller Llama of the same width and depth, so everything above it, from the runner to the
policies, is the same for any number of ranks.

The sums are exact: a row's bits must not depend on how many rows a call has. An all-reduce would break this, because a
ring adds in an order that depends on the size of the message. So partial sums are gathered and added in rank order.

The ranks stay in step: all run one decoding loop on the same tokens. They make the same greedy and coupled choices,
because these compare numbers that were gathered. They make the same static plans, because these are Python's arithmetic
on tokens and counts. But statistics, hidden states and other samplers come from vector units and may differ between
unlike machines, and measured times always differ: there `Group.agreed` lets rank 0 decide.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor, distributed

from errors import UserError
from kernels.exit_head import Shard
from model import Linear, ModelArgs, Transformer

# How a linear is cut.
#   colwise: by outputs, in whole heads
#   rowwise: by inputs, and the ranks' outputs are summed
#   vocab: by outputs, of which the ranks exchange only what `kernels.exit_head.merge` needs
# Every rank has the norms and the embedding whole: cutting the embedding saves memory but costs a message per token.
TABLE = (
    ("attention.wqkv", "colwise"),
    ("attention.wo", "rowwise"),
    ("mlp.w13", "colwise"),
    ("mlp.w2", "rowwise"),
    ("lm_head", "vocab"),
)
TIMEOUT_SECONDS = 60  # a rank that keeps the others waiting longer has failed
MEETING_SECONDS = 1800  # the same while weights are read
PARTING_SECONDS = 10  # the same at the end of the program
# The messages of the errors that a rank gets when another one has gone.
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|read error|timed out", re.IGNORECASE)
POLL_SECONDS = 0.02
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # before torch 2.13


def check(args: ModelArgs, size: int) -> None:
    """Raise UserError unless a model of this shape can be cut for `size` ranks."""
    sizes = {"num_attention_heads": args.n_head, "hidden_size": args.dim, "intermediate_size": args.ffn_dim}
    for key, value in sizes.items():
        if value % size:
            raise UserError(f"{size} ranks do not divide {key} {value} of this model: start a number that does")
    if args.n_kv_head % size and size % args.n_kv_head:
        raise UserError(
            f"{size} ranks neither divide num_key_value_heads {args.n_kv_head} of this model nor are a "
            f"multiple of it: start a number that does"
        )
    if args.vocab_size < 2 * size:
        raise UserError(f"{size} ranks are too many for vocab_size {args.vocab_size}: start {args.vocab_size // 2}")


def span(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return which of `count` heads, features or tokens a rank has, as first and end.

    Where there are more ranks than things, neighbouring ranks have the same one.
    """
    first = count * rank // size
    return first, max(first + 1, count * (rank + 1) // size)


class Group:
    """Connects the ranks that run one model; each holds one Group, with its own rank."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.leads = rank, size, rank == 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.store = distributed.PrefixStore("skipfast", distributed.distributed_c10d._get_default_store())
        self.meetings = 0

    # ---- numbers ----

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, which have one shape, in rank order: [...] -> [ranks, ...]."""
        gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        all_gather(gathered, tensor.contiguous())
        return gathered.view(self.size, *tensor.shape)

    def summed(self, partial: Tensor) -> Tensor:
        """Add the tensors of all ranks, in fp32 and in rank order, and round the sum to their dtype."""
        first, *others = self.gather(partial)
        total = first.float()
        for other in others:
            total = total + other
        return total.to(partial.dtype)

    def everyones(self, value) -> list:
        """Return the values that all ranks pass here, in rank order; anything that can be pickled."""
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def agreed(self, value):
        """Return rank 0's value. A bool or an int takes one small message, anything else that can be pickled two."""
        if isinstance(value, bool | int):
            number = torch.tensor([value])
            distributed.broadcast(number, 0)
            return type(value)(number.item())
        values = [value]
        distributed.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    # ---- the model ----

    def local_args(self, args: ModelArgs) -> ModelArgs:
        """Return the shape of this rank's model: fewer heads and features; width, depth and vocabulary are whole."""
        check(args, self.size)
        share = lambda count: max(1, count // self.size)
        return replace(args, n_head=share(args.n_head), n_kv_head=share(args.n_kv_head), ffn_dim=share(args.ffn_dim))

    def parallelize(self, model: Transformer) -> Transformer:
        """Give a model of `local_args` linears that sum over ranks, and a part of the LM head, without weights."""
        model.group, args = self, model.args
        bounds = tuple(args.vocab_size * rank // self.size for rank in range(self.size + 1))
        model.shard = Shard(bounds, self.rank, self.gather)
        for owner in (model, *model.layers):
            for name, kind in TABLE:
                parent, _, child = name.rpartition(".")
                if owner is model and kind == "vocab":
                    setattr(owner, child, Linear(args.dim, bounds[self.rank + 1] - bounds[self.rank]))
                elif owner is not model and kind == "rowwise":
                    parent = owner.get_submodule(parent)
                    setattr(parent, child, SummedLinear(getattr(parent, child), self))
        return model

    def window(self, name: str, args: ModelArgs, shape: tuple[int, ...], keys: str) -> tuple[slice, ...]:
        """Return the part of a file's tensor that this rank needs, as a slice of each dimension.

        name: our parameter that the tensor belongs to. shape, keys: of the tensor, see `checkpoint.pieces`.
        """
        kind = next((kind for module, kind in TABLE if name.endswith(module + ".weight")), None)
        window = [slice(0, count) for count in shape]
        if kind:
            dim = 1 if kind == "rowwise" else 0
            unit = args.head_dim if "head_dim" in keys.split(", ")[dim] else 1
            first, end = span(shape[dim] // unit, self.rank, self.size)
            window[dim] = slice(first * unit, end * unit)
        return tuple(window)

    # ---- waiting without a limit of seconds, and failing ----

    def meet(self, seconds: float = MEETING_SECONDS) -> None:
        """Wait until every rank is here. This may take longer than a message, as one rank may have slow files."""
        self.meetings += 1
        name, end = f"meeting {self.meetings}", time.monotonic() + seconds
        self.store.add(name, 1)
        self._wait(lambda: self.store.add(name, 0) == self.size or time.monotonic() > end)

    def led(self, make: Callable[[], str]) -> str:
        """Call `make` on rank 0 alone and return its result on every rank; the others wait as long as a human types."""
        self.meetings += 1
        name = f"line {self.meetings}"
        if self.leads:
            self.store.set(name, make())
        self._wait(lambda: self.store.check([name]))
        return self.store.get(name).decode()

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.store.check(["failed"]):
                raise RuntimeError("another rank failed")
            time.sleep(POLL_SECONDS)

    def failed_first(self) -> bool:
        """Tell the other ranks that this one failed. Returns True if it is the first, whose error is to be printed."""
        try:
            return self.store.compare_set("failed", "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # distributed.DistError: the store went with the rank that failed
            return False


class SummedLinear(Linear):
    """Computes a linear of which each rank has some inputs; the outputs are summed over the ranks."""

    def __init__(self, whole: Linear, group: Group):
        super().__init__(whole.weight.shape[1], whole.out_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.summed(super().forward(x))


@contextmanager
def joined() -> Iterator[Group | None]:
    """Join the ranks that torchrun started in a group, of which only rank 0 prints; None, at no cost, for one process.

    With several ranks the process ends with the block. A rank that fails prints its error and ends at once. The others
    notice that it has gone, by a closed connection, torchrun's signal, or at the latest TIMEOUT_SECONDS of silence, and
    end without a word. The exit code is 2 for a user's mistake, else 1.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "WORLD_SIZE" in os.environ and not all(os.environ.get(name) for name in names):
        raise UserError(f"WORLD_SIZE is set, but not all of {', '.join(names)}: start several processes with torchrun")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield None
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    group = Group(distributed.get_rank(), size)
    if not group.leads:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield group
        _leave(group, 0)
    except SystemExit as error:  # from argparse, on every rank
        _leave(group, error.code)
    except BaseException as error:
        _fail(group, error)


def _leave(group: Group, code: int) -> None:
    """End the process once all ranks are done. Destroying the process group is left out: it may crash or wait."""
    with suppress(RuntimeError):  # the store may live in rank 0, which may have ended already
        group.meet(PARTING_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(group: Group, error: BaseException) -> None:
    """Print the error of the rank that failed first, and end the process at once."""
    mistake = isinstance(error, UserError)
    lost = isinstance(error, RuntimeError) and LOST.search(str(error))
    if group.failed_first() and not isinstance(error, KeyboardInterrupt):
        if lost:
            error = RuntimeError("another rank has gone or is silent: " + str(error).split("]")[-1].strip())
        elif not mistake:
            traceback.print_exception(error, file=sys.__stderr__)
        where = "" if mistake else f"rank {group.rank} of {group.size} failed: {type(error).__name__}: "
        print(f"error: {where}" + " ".join(str(error).split()), file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(2 if mistake else 130 if isinstance(error, KeyboardInterrupt) else 1)
