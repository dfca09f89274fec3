"""What a model and its cache take of a GPU's memory and, if that is too much, what would fit."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from errors import UserError
from kernels.formats import Format
from loading.checkpoint import check_format, head_is_shared
from model import ModelArgs, Transformer
from tp import Group

SPARE = 2**29  # bytes for the states of a prefill chunk, captured graphs and the kernels' workspaces


def weight_bytes(args: ModelArgs, dtype: torch.dtype, format: Format, group: Group | None = None) -> int:
    """Bytes of a model's weights, or of this rank's part of them, in a format."""
    args = replace(args, tie_embeddings=head_is_shared(args, format))
    with torch.device("meta"):
        model = group.parallelize(Transformer(group.local_args(args))) if group else Transformer(args)
    stored = lambda name, shape: format.shapes(*shape) if format.covers(name) else ((shape, dtype),)
    return sum(
        math.prod(shape) * kind.itemsize
        for name, weight in model.named_parameters()
        for shape, kind in stored(name, weight.shape)
    )


def token_bytes(args: ModelArgs, dtype: torch.dtype, group: Group | None = None) -> int:
    """Bytes of the keys and values of a token, or of this rank's heads of it."""
    args = group.local_args(args) if group else args
    return 2 * args.n_layer * args.n_kv_head * args.head_dim * dtype.itemsize


def check_fits(
    args: ModelArgs,
    dtype: torch.dtype,
    format: Format,
    length: int,
    free: int,
    group: Group | None = None,
    quantised: bool = False,
) -> None:
    """Raise UserError, saying what would fit, unless weights and a cache of `length` tokens fit `free` bytes.

    format: of the weights, a file's own if it is `quantised`.
    """
    weights, token = weight_bytes(args, dtype, format, group), token_bytes(args, dtype, group)
    if weights + length * token + SPARE <= free:
        return
    fits = [
        f"{name} for {min(room, args.max_seq_len)} tokens"
        for name, room in alternatives(args, dtype, format, free - SPARE, group, quantised)
        if room >= 1
    ]
    gigabytes = lambda count: f"{count / 1e9:.3g} GB"
    raise UserError(
        f"device cuda: {gigabytes(weights)} of weights ({str(dtype)[6:]}{f', {format}' if format else ''}) and "
        f"{gigabytes(length * token)} of cache for {length} tokens are more than the {gigabytes(free)} that are free; "
        + (f"what fits: {', '.join(fits)}" if fits else "no precision or format fits: more processes (torchrun) would")
    )


def alternatives(
    args: ModelArgs, dtype: torch.dtype, format: Format, room: int, group: Group | None, quantised: bool
) -> Iterator[tuple[str, int]]:
    """How many tokens fit in `room` bytes beside the weights as they are, in half precision, and quantised."""
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    tries = [("this", dtype, format), *([("--precision bf16", half, format)] if half is not dtype else [])]
    tries += [(f"--quantize {mode}", half, Format(mode)) for mode in ("int8", "int4") if not quantised]
    for name, kind, how in tries:
        if how and how != format:
            try:
                check_format(how, args, group.size if group else 1)
            except ValueError:
                continue
            name = name if half is dtype else f"--precision bf16 {name}"
        yield name, (room - weight_bytes(args, kind, how, group)) // token_bytes(args, kind, group)
