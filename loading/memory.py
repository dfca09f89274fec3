"""Counting the memory that a model and its cache take on a GPU, before they are loaded, and finding what would fit."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from errors import UserError
from kernels.formats import Format
from loading.checkpoint import check_format, head_is_shared
from model import ModelArgs, Transformer
from tp import Group

SPARE = 2**29  # bytes left for the hidden states of a prefill chunk, captured graphs and the kernels' workspaces


def weight_bytes(args: ModelArgs, dtype: torch.dtype, format: Format, group: Group | None = None) -> int:
    """Count the bytes of a model's weights in a format, or of this rank's part of them."""
    args = replace(args, tie_embeddings=head_is_shared(args, format))
    with torch.device("meta"):
        model = group.parallelize(Transformer(group.local_args(args))) if group else Transformer(args)
    stored = lambda name, shape: format.shapes(*shape) if format.covers(name) else ((shape, dtype),)
    return sum(
        math.prod(shape) * stored_dtype.itemsize
        for name, weight in model.named_parameters()
        for shape, stored_dtype in stored(name, weight.shape)
    )


def token_bytes(args: ModelArgs, dtype: torch.dtype, group: Group | None = None) -> int:
    """Count the bytes of a token's keys and values in all layers' caches; with ranks, those of this rank's heads."""
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
    """Raise UserError, saying what would fit, unless weights and a cache of `length` tokens fit into `free` bytes.

    format: of the weights. quantised: the file has this format already, so that no other can be proposed.
    """
    weights, token = weight_bytes(args, dtype, format, group), token_bytes(args, dtype, group)
    if weights + length * token + SPARE <= free:
        return
    fits = [
        f"{flags} for {min(tokens, args.max_seq_len)} tokens"
        for flags, tokens in alternatives(args, dtype, format, free - SPARE, group, quantised)
        if tokens >= 1
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
    """Yield flags that make weights smaller, and how many tokens then fit beside them in `room` bytes.

    "this" stands for the weights as they are; then come half precision, int8 and int4, where the model can have them.
    """
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    tries = [("this", dtype, format), *([("--precision bf16", half, format)] if half is not dtype else [])]
    tries += [(f"--quantize {mode}", half, Format(mode)) for mode in ("int8", "int4") if not quantised]
    for flags, tried_dtype, tried_format in tries:
        if tried_format and tried_format != format:
            try:
                check_format(tried_format, args, group.size if group else 1)
            except UserError:
                continue
            flags = flags if half is dtype else f"--precision bf16 {flags}"
        tokens = (room - weight_bytes(args, tried_dtype, tried_format, group)) // token_bytes(args, tried_dtype, group)
        yield flags, tokens
