"""The exit head on a GPU: LM head, token, confidence and a sampled token in one launch. Logits are never in memory.

Rows come in after the final norm. Each program owns a run of vocabulary tiles. For every row and every lane of a tile
it keeps what `Partials` says. At its end it reduces its lanes, stores its partials in its own slot and takes a ticket.
The program with the last ticket reduces all slots in order and writes the answer. So there is one launch, there are no
float atomics, and the bits are the same every time. The last program also resets the ticket, so a CUDA graph can replay
the launch. The streams of a device must order its calls.

A row's bits depend neither on the other rows nor on their number. Tokens, samples and the two largest logits do not
depend on the number of programs either; sums may, in the last bit. Logits round to bf16 before they are compared,
as those of a plain head do; ties go to the lowest id. A plain head may add up in another order, so its logits may
differ in the last bit.

The public functions are `exit_head_rows` and, for tensor parallelism, `exit_head_partials` and `merge`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.exit_head import Draw, Partials, merge, partials_of
from kernels.gpu.build import ROWS
from kernels.gpu.tiles import INTERPRETED, TILES, CompileCase, Tile, processors, rounded_to_bf16, tickets_of
from kernels.linear import linear_reference

PROGRAMS = 2  # per multiprocessor: more do not fit into its shared memory with the tiles in the table
SLOTS = 64  # partials that the last program reads per step
LOWEST = tl.constexpr(-1.0e30)  # below every logit, and exp(LOWEST - anything) is 0 where that of -inf - -inf is NaN
NO_ID = tl.constexpr(2**31 - 1)  # above every token id


# ---- noise: kernels.noise.gumbel_noise in unsigned 32-bit arithmetic, the same bits up to the logarithm ----


@triton.jit
def mixed(x):
    """Hash uint32 as kernels.noise.mix32 does."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed, positions):
    """Make the two uint32 keys [rows] of each row's noise, from int64 seed and positions [rows]."""
    key = mixed(mixed(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    first = mixed(key + positions.to(tl.uint32) * 0x9E3779B9)
    return first, mixed(first ^ 0x85EBCA6B)


@triton.jit
def uniform(first, second, ids):
    """Make uniform numbers, fp32 [rows, n], from keys [rows, 1] and ids [1, n]: midpoints of 2^23 parts of (0, 1)."""
    bits = mixed(mixed(ids.to(tl.uint32) ^ first) + second)
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23; exact in fp32


# ---- partials ----


@triton.jit
def joined(top, ids, second, total, weighted, top_b, ids_b, second_b, total_b, weighted_b):
    """Join two partials of every lane. At a tie the id of the first stays, so its ids must be the lower ones.

    A NaN among the logits is never the largest, and makes the sums NaN.
    """
    higher = top_b > top
    best = tl.where(higher, top_b, top)
    down, down_b = top - best, top_b - best
    scale, scale_b = tl.exp(down), tl.exp(down_b)
    ids = tl.where(higher, ids_b, ids)
    second = tl.maximum(tl.where(higher, top, top_b), tl.maximum(second, second_b))
    weighted = scale * (weighted + total * down) + scale_b * (weighted_b + total_b * down_b)
    return best, ids, second, scale * total + scale_b * total_b, weighted


@triton.jit
def highest(scores, ids):
    """Return the largest score of each row of [rows, lanes], and its id, the lowest at a tie."""
    best = tl.max(scores, axis=1)
    return best, tl.min(tl.where(scores == best[:, None], ids, NO_ID), axis=1)


@triton.jit
def across_lanes(top, ids, second, total, weighted):
    """Reduce partials [rows, lanes] to partials [rows]."""
    best, token = highest(top, ids)
    second = tl.max(tl.where(ids == token[:, None], second, top), axis=1)
    down = top - best[:, None]
    scale = tl.exp(down)
    weighted = tl.sum(scale * (weighted + total * down), axis=1)
    return best, token, second, tl.sum(scale * total, axis=1), weighted


@triton.jit
def store_partials(values, ids, slot, plane, live, best, token, second, total, weighted):
    """Store partials. slot: the offset of each row's slot. plane: elements from one kind of partial to the next."""
    tl.store(values + slot, best, mask=live)
    tl.store(values + plane + slot, second, mask=live)
    tl.store(values + 2 * plane + slot, total, mask=live)
    tl.store(values + 3 * plane + slot, weighted, mask=live)
    tl.store(ids + slot, token, mask=live)


@triton.jit
def store_noisy(values, ids, slot, plane, live, noisy, drawn):
    """Store the partials of samples, as `store_partials` does the others."""
    tl.store(values + 4 * plane + slot, noisy, mask=live)
    tl.store(ids + plane + slot, drawn, mask=live)


@triton.jit
def tile_logits(
    x,
    weight,
    scale,
    token_ids,
    m,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return logits [ROWS, N] of the weight rows `token_ids` [N], rounded to bf16, as fp32."""
    rows, features = tl.arange(0, ROWS)[:, None], tl.arange(0, K)[None, :]
    x_rows = x + rows * D
    weight_rows = weight + token_ids.to(tl.int64)[:, None] * D
    logits = tl.zeros([ROWS, N], tl.float32)
    for start in range(0, D, K):
        k = start + features
        if D % K == 0:
            a = tl.load(x_rows + k, mask=rows < m, other=0.0)
            w = tl.load(weight_rows + k, eviction_policy="evict_first")
        else:
            a = tl.load(x_rows + k, mask=(rows < m) & (k < D), other=0.0)
            w = tl.load(weight_rows + k, mask=k < D, other=0, eviction_policy="evict_first")
        if UPCAST:
            logits = tl.dot(a.to(tl.float32), tl.trans(w.to(tl.float32)), logits, input_precision="ieee")
        else:
            logits = tl.dot(a, tl.trans(w.to(tl.bfloat16)), logits)
    if scale is not None:
        logits = logits * tl.load(scale + token_ids)[None, :]
    if UPCAST:
        return rounded_to_bf16(logits)
    return logits.to(tl.bfloat16).to(tl.float32)


@triton.jit
def finish(
    values, ids, tokens, stats, samples, m, programs, ROWS: tl.constexpr, SLOTS: tl.constexpr, SAMPLE: tl.constexpr
):
    """Reduce the slots of all programs; store the result in the slot after them, and the answer."""
    rows = tl.arange(0, ROWS)
    live = rows < m
    plane = m * (programs + 1)
    top = tl.full([ROWS, SLOTS], 2 * LOWEST, tl.float32)  # below any slot, so that even a slot of NaN leaves its id
    best_ids = tl.full([ROWS, SLOTS], NO_ID, tl.int32)
    second, noisy, drawn = top, top, best_ids
    total = tl.zeros([ROWS, SLOTS], tl.float32)
    weighted = total
    for start in range(0, programs, SLOTS):
        slots = start + tl.arange(0, SLOTS)[None, :]
        there = live[:, None] & (slots < programs)
        at = rows[:, None] * (programs + 1) + slots  # .cg: from L2, where the other programs' stores are
        top_b = tl.load(values + at, mask=there, other=LOWEST, cache_modifier=".cg")
        second_b = tl.load(values + plane + at, mask=there, other=LOWEST, cache_modifier=".cg")
        total_b = tl.load(values + 2 * plane + at, mask=there, other=0.0, cache_modifier=".cg")
        weighted_b = tl.load(values + 3 * plane + at, mask=there, other=0.0, cache_modifier=".cg")
        ids_b = tl.load(ids + at, mask=there, other=NO_ID, cache_modifier=".cg")
        top, best_ids, second, total, weighted = joined(
            top, best_ids, second, total, weighted, top_b, ids_b, second_b, total_b, weighted_b
        )
        if SAMPLE:
            noisy_b = tl.load(values + 4 * plane + at, mask=there, other=LOWEST, cache_modifier=".cg")
            drawn_b = tl.load(ids + plane + at, mask=there, other=NO_ID, cache_modifier=".cg")
            drawn = tl.where(noisy_b > noisy, drawn_b, drawn)
            noisy = tl.where(noisy_b > noisy, noisy_b, noisy)
    best, token, runner_up, mass, moment = across_lanes(top, best_ids, second, total, weighted)
    slot = rows * (programs + 1) + programs
    store_partials(values, ids, slot, plane, live, best, token, runner_up, mass, moment)
    tl.store(tokens + rows, token.to(tl.int64), mask=live)
    tl.store(stats + rows * 4, tl.div_rn(1.0, mass), mask=live)
    tl.store(stats + rows * 4 + 1, tl.div_rn(1.0 - tl.exp(runner_up - best), mass), mask=live)
    tl.store(stats + rows * 4 + 2, tl.log(mass) - tl.div_rn(moment, mass), mask=live)
    tl.store(stats + rows * 4 + 3, best + tl.log(mass), mask=live)
    if SAMPLE:
        best_noisy, sample = highest(noisy, drawn)
        store_noisy(values, ids, slot, plane, live, best_noisy, sample)
        tl.store(samples + rows, sample.to(tl.int64), mask=live)


@triton.jit(
    do_not_specialize=["m", "n_vocab", "v_offset"],  # one binary, whatever the number of rows
    do_not_specialize_on_alignment=["positions", "seed", "temperature", "ticket"],
)
def exit_head_kernel(
    x,
    weight,
    scale,
    positions,
    seed,
    temperature,
    values,
    ids,
    ticket,
    tokens,
    stats,
    samples,
    m,
    n_vocab,
    v_offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Reduce the tiles of this program; the last program also makes the answer.

    values, ids: Partials with a slot for each program and one for all of them. The rest as in `launch`.
    """
    SAMPLE: tl.constexpr = positions is not None
    program, programs = tl.program_id(0), tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    live = rows < m
    tiles = tl.cdiv(n_vocab, N)
    first_tile, end_tile = program * tiles // programs, (program + 1) * tiles // programs
    top = tl.full([ROWS, N], LOWEST, tl.float32)
    best_ids = tl.zeros([ROWS, N], tl.int32) + (v_offset + first_tile * N)  # a token even if all logits are NaN
    second, noisy, drawn = top, top, best_ids
    total = tl.zeros([ROWS, N], tl.float32)
    weighted = total
    if SAMPLE:
        heat = tl.load(temperature)
        first_key, second_key = row_keys(tl.load(seed), tl.load(positions + rows, mask=live, other=0))
    for tile in range(first_tile, end_tile):
        token_ids = tile * N + tl.arange(0, N)
        inside = (token_ids < n_vocab)[None, :]
        # token_ids after the vocabulary read its last row again, so that loads of the weight need no mask
        logits = tile_logits(x, weight, scale, tl.minimum(token_ids, n_vocab - 1), m, D, ROWS, N, K, UPCAST)
        logits = tl.where(inside, logits, LOWEST)  # adds 0 to a sum, since every program has at least one true logit
        token_ids = (v_offset + token_ids)[None, :]
        top, best_ids, second, total, weighted = joined(
            top, best_ids, second, total, weighted, logits, token_ids, LOWEST, 1.0, 0.0
        )
        if SAMPLE:
            noise = -tl.log(-tl.log(uniform(first_key[:, None], second_key[:, None], token_ids)))
            score = tl.where(inside, tl.div_rn(logits, heat) + noise, LOWEST)
            drawn = tl.where(score > noisy, token_ids, drawn)
            noisy = tl.where(score > noisy, score, noisy)
    best, token, runner_up, mass, moment = across_lanes(top, best_ids, second, total, weighted)
    slot = rows * (programs + 1) + program
    plane = m * (programs + 1)
    store_partials(values, ids, slot, plane, live, best, token, runner_up, mass, moment)
    if SAMPLE:
        best_noisy, sample = highest(noisy, drawn)
        store_noisy(values, ids, slot, plane, live, best_noisy, sample)
    tl.debug_barrier()  # every warp's stores come before the ticket
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        finish(values, ids, tokens, stats, samples, m, programs, ROWS, SLOTS, SAMPLE)
        tl.store(ticket, 0)


# ---- launching ----


def tile_of(weight_dtype: torch.dtype) -> Tile:
    """Return the tile for a weight of this dtype."""
    return TILES["exit_head_int8" if weight_dtype == torch.int8 else "exit_head_bf16"]


def check(x: Tensor, weight: Tensor, scale: Tensor | None, n_vocab: int, draw: Draw | None):
    """Raise ValueError for what the kernel would misread."""
    if x.dtype != torch.bfloat16 or x.dim() != 2 or not 1 <= len(x) <= ROWS:
        raise ValueError(f"x must be bf16 [1..{ROWS}, D], got {x.dtype} {list(x.shape)}")
    if weight.dim() != 2 or not 2 <= n_vocab <= len(weight):
        raise ValueError(f"n_vocab must be in 2..V, the rows of weight {list(weight.shape)}, got {n_vocab}")
    (m, d), v = x.shape, len(weight)
    expected = [("weight", weight, torch.bfloat16 if scale is None else torch.int8, [v, d])]
    if scale is not None:
        expected.append(("scale", scale, torch.float32, [v]))
    if draw is not None:
        expected += [
            ("positions", draw.positions, torch.int64, [m]),
            ("seed", draw.seed, torch.int64, [1]),
            ("temperature", draw.temperature, torch.float32, [1]),
        ]
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}")


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    n_vocab: int,
    v_offset: int,
    draw: Draw | None,
    programs: int | None = None,
) -> tuple[Partials, tuple[Tensor, Tensor, Tensor]]:
    """Run the kernel. The other arguments are those of `exit_head_rows`.

    programs: how many (default: as many as run at once, at most one per tile). Returns the partials, a slot for each
    program and a last one for all of them; and what `exit_head_rows` returns.
    """
    check(x, weight, scale, n_vocab, draw)
    x, m, tile = x.contiguous(), len(x), tile_of(weight.dtype)
    programs = min(triton.cdiv(n_vocab, tile.n), programs or PROGRAMS * processors(x.device))
    values = torch.empty(4 + (draw is not None), m, programs + 1, dtype=torch.float32, device=x.device)
    ids = torch.empty(len(values) - 3, m, programs + 1, dtype=torch.int32, device=x.device)
    tokens = torch.empty(m, dtype=torch.int64, device=x.device)
    samples = torch.empty(m if draw else 0, dtype=torch.int64, device=x.device)
    stats = torch.empty(m, 4, dtype=torch.float32, device=x.device)
    exit_head_kernel[(programs,)](
        x,
        weight,
        scale,
        *(draw or (None, None, None)),
        values,
        ids,
        tickets_of(x.device),
        tokens,
        stats,
        samples,
        m,
        n_vocab,
        v_offset,
        D=x.shape[1],
        ROWS=ROWS,
        N=tile.n,
        K=tile.k,
        SLOTS=SLOTS,
        UPCAST=INTERPRETED,
        **tile.options,
    )
    return Partials(values, ids), (tokens, stats, samples)


# ---- reference ----


def partials_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, n_vocab: int, v_offset: int, draw: Draw | None
) -> Partials:
    """Reduce a shard of the vocabulary in pure torch."""
    check(x, weight, scale, n_vocab, draw)
    weight = weight[:n_vocab]
    if scale is None:
        logits = linear_reference(x, weight).float()
    else:
        logits = (linear_reference(x.float(), weight.float()) * scale[:n_vocab]).bfloat16().float()
    return partials_of(logits, v_offset, draw)


# ---- operators ----


def draw_of(positions: Tensor | None, seed: Tensor | None, temperature: Tensor | None) -> Draw | None:
    """Return the Draw of an op's arguments, None without them. Raises ValueError if only some are given."""
    given = [tensor is not None for tensor in (positions, seed, temperature)]
    if any(given) and not all(given):
        raise ValueError("positions, seed and temperature go together: give all three to sample, none otherwise")
    return Draw(positions, seed, temperature) if all(given) else None


@torch.library.custom_op("skipfast::exit_head_rows", mutates_args=(), device_types="cuda")
def exit_head_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    n_vocab: int,
    v_offset: int = 0,
    positions: Tensor | None = None,
    seed: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the token of each row, its statistics and, if there is a draw, a sample. Rows come after the final norm.

    x: bf16 [m, D], m in 1..16. weight: bf16 [V, D], or int8 [V, D] with scale fp32 [V] of its rows; only the first
    n_vocab rows count. v_offset: the global id of row 0 (a shard of the vocabulary). positions, seed, temperature: see
    `Draw`; all or none.

    Returns global ids. Tokens int64 [m]: the argmax of the bf16 logits, ties to the lowest id. Stats fp32 [m, 4]: the
    fields of `kernels.exit_head.ExitStats` but `tokens`, in order. Samples int64 [m]: the argmax of logit /
    temperature + kernels.noise.gumbel_noise; empty without a draw. Raises ValueError naming a shape or dtype that does
    not fit.
    """
    return launch(x, weight, scale, n_vocab, v_offset, draw_of(positions, seed, temperature))[1]


@exit_head_rows.register_kernel("cpu")
def exit_head_rows_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    n_vocab: int,
    v_offset: int = 0,
    positions: Tensor | None = None,
    seed: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `exit_head_rows` does in pure torch."""
    return merge(*partials_reference(x, weight, scale, n_vocab, v_offset, draw_of(positions, seed, temperature)))


@exit_head_rows.register_fake
def exit_head_rows_fake(x, weight, scale, n_vocab, v_offset=0, positions=None, seed=None, temperature=None):
    m = x.shape[0]
    samples = x.new_empty(0 if positions is None else m, dtype=torch.int64)
    return x.new_empty(m, dtype=torch.int64), x.new_empty(m, 4, dtype=torch.float32), samples


@torch.library.custom_op("skipfast::exit_head_partials", mutates_args=(), device_types="cuda")
def exit_head_partials(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    n_vocab: int,
    v_offset: int = 0,
    positions: Tensor | None = None,
    seed: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce a shard of the vocabulary to the `Partials` of one run: values [4 or 5, m, 1], ids [1 or 2, m, 1].

    Arguments and errors are those of `exit_head_rows`. Every rank gathers these few numbers of all ranks, side by side
    in the last dimension, and `merge`s them.
    """
    values, ids = launch(x, weight, scale, n_vocab, v_offset, draw_of(positions, seed, temperature))[0]
    return values[..., -1:].contiguous(), ids[..., -1:].contiguous()


@exit_head_partials.register_kernel("cpu")
def exit_head_partials_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    n_vocab: int,
    v_offset: int = 0,
    positions: Tensor | None = None,
    seed: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `exit_head_partials` does in pure torch."""
    return tuple(partials_reference(x, weight, scale, n_vocab, v_offset, draw_of(positions, seed, temperature)))


@exit_head_partials.register_fake
def exit_head_partials_fake(x, weight, scale, n_vocab, v_offset=0, positions=None, seed=None, temperature=None):
    m, sampling = x.shape[0], positions is not None
    return x.new_empty(4 + sampling, m, 1, dtype=torch.float32), x.new_empty(1 + sampling, m, 1, dtype=torch.int32)


# ---- compiling without a GPU ----


def compile_cases() -> list[CompileCase]:
    """List the kernel as it is launched at real widths. Rows and vocabulary are arguments at run time."""
    return [
        compile_case(dtype, d, sampling)
        for dtype in (torch.bfloat16, torch.int8)
        for d in (2048, 4096)
        for sampling in (False, True)
    ]


def compile_case(dtype: torch.dtype, d: int, sampling: bool) -> CompileCase:
    tile, int8 = tile_of(dtype), dtype == torch.int8
    types = {
        "x": "*bf16",
        "weight": "*i8" if int8 else "*bf16",
        "values": "*fp32",
        "ids": "*i32",
        "ticket": "*i32",
        "tokens": "*i64",
        "stats": "*fp32",
        "samples": "*i64",
        "m": "i32",
        "n_vocab": "i32",
        "v_offset": "i32",
    }
    constants = {"D": d, "ROWS": ROWS, "N": tile.n, "K": tile.k, "SLOTS": SLOTS, "UPCAST": False}
    for given, optional in (
        (int8, {"scale": "*fp32"}),
        (sampling, {"positions": "*i64", "seed": "*i64", "temperature": "*fp32"}),
    ):
        types |= optional if given else {}
        constants |= {} if given else dict.fromkeys(optional)
    aligned = tuple(
        name for name in ("x", "weight", "scale", "values", "ids", "tokens", "stats", "samples") if name in types
    )
    name = f"exit_head {'int8' if int8 else 'bf16'} D {d}{' sampling' if sampling else ''}"
    return CompileCase(name, exit_head_kernel, types, constants, aligned, tile)
