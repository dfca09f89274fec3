"""Decode attention on a GPU: 1..16 rows over a static KV cache addressed by position, with grouped queries.

The cache is cut into segments at multiples of SEGMENT slots. A program takes 16 of the rows x heads that share a kv
head, and every n-th segment. For each segment it

1. writes the call's keys and values that belong there,
2. reduces the segment with an online softmax,
3. leaves (maximum, sum, weighted values) of each row in a workspace.

A second kernel merges the segments of each row in order. Grid and workspace depend on the length of the cache only, so
a CUDA graph can record them. How much work is done depends on the positions, which are read on the device.

A row's bits depend neither on the other rows and their positions nor on the length of the cache: segments and tiles are
cut at absolute slots, and a tile of which a row sees nothing multiplies its state by exactly 1 and adds exactly 0.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.build import HEAD_DIM, ROWS
from kernels.gpu.tiles import INTERPRETED, TILES, CompileCase, Tile, rounded_to_bf16

SEGMENT = 128  # slots: so few that a short context occupies many multiprocessors, too
PROGRAMS = 528  # about, for a long cache: 4 per multiprocessor of an H100; those without a live segment cost little
MERGE = Tile(n=64, k=32, warps=2, stages=1)  # segments and features per step of a merging program
LOWEST = tl.constexpr(-1.0e30)  # below every score; exp2(LOWEST - LOWEST) is 1 where that of -inf - -inf is NaN


@triton.jit
def load_positions(positions, row, live):
    """Load int32 positions: -1 for padding and for rows that are not live."""
    return tl.maximum(tl.load(positions + row, mask=live, other=-1), -1).to(tl.int32)


@triton.jit
def write_slots(source, row_stride, cache, positions, chosen, features, E: tl.constexpr):
    """Copy the chosen rows of `source`, which starts at a kv head, to their slots in the cache of that head."""
    cells = chosen[:, None] & (features < E)[None, :]
    rows = tl.load(source + tl.arange(0, chosen.shape[0])[:, None] * row_stride + features[None, :], mask=cells)
    tl.store(cache + positions[:, None] * E + features[None, :], rows, mask=cells)


@triton.jit
def product(a, b, sums, UPCAST: tl.constexpr):
    """Return sums + a @ b: on tensor cores, or in fp32 under the interpreter, which cannot do bf16."""
    if UPCAST:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


# Not specialised: one binary serves all numbers of rows, cache lengths and slices of the positions.
@triton.jit(do_not_specialize=["positions", "rows", "slots"])
def attend_segments(
    q,
    k,
    v,
    k_cache,
    v_cache,
    positions,
    outs,
    stats,
    rows,
    slots,
    q_stride,
    k_stride,
    v_stride,
    SCALE: tl.constexpr,
    RATIO: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    N: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Reduce the segments of this program. Grid: (blocks of ROWS rows x heads, kv heads, programs).

    outs: [T, H, segments, E], weighted values. stats: [2, T, H, segments], maximum and sum.
    """
    group = tl.program_id(1)
    features = tl.arange(0, BLOCK_E)
    call_row = tl.arange(0, ROWS)
    new = load_positions(positions, call_row, call_row < rows)  # of all rows of the call
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of this block: RATIO heads for each row of the call
    live = row < rows * RATIO
    position = load_positions(positions, row // RATIO, live)
    last = tl.max(position, axis=0)
    head = group * RATIO + row % RATIO
    query = tl.load(
        q + (row // RATIO)[:, None] * q_stride + head[:, None] * E + features[None, :],
        mask=live[:, None] & (features < E)[None, :],
        other=0.0,
    )
    k_head = k_cache + group.to(tl.int64) * slots * E
    v_head = v_cache + group.to(tl.int64) * slots * E
    segments = tl.cdiv(slots, SEGMENT)
    heads = tl.num_programs(1) * RATIO
    for segment in range(tl.program_id(2), (last + SEGMENT) // SEGMENT, tl.num_programs(2)):
        first = segment * SEGMENT
        # Every block that shares the segment writes its new slots, the same bytes, so each waits only for itself.
        fresh = (new >= first) & (new < first + SEGMENT)
        if tl.max(fresh.to(tl.int32), axis=0) > 0:
            write_slots(k + group * E, k_stride, k_head, new, fresh, features, E)
            write_slots(v + group * E, v_stride, v_head, new, fresh, features, E)
            tl.debug_barrier()
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for start in range(first, tl.minimum(last + 1, first + SEGMENT), N):
            slot = start + tl.arange(0, N)
            # No row sees a slot after `last`. It may hold a NaN, which a weight of 0 would not silence.
            cells = (slot <= last)[:, None] & (features < E)[None, :]
            offsets = slot[:, None] * E + features[None, :]
            keys = tl.load(k_head + offsets, mask=cells, other=0.0)
            scores = product(query, tl.trans(keys), tl.zeros([ROWS, N], tl.float32), UPCAST) * SCALE
            seen = slot[None, :] <= position[:, None]
            scores = tl.where(seen, scores, LOWEST)
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            decay = tl.exp2(top - higher)
            top = higher
            total = total * decay + tl.sum(weights, axis=1)
            if UPCAST:
                weights = rounded_to_bf16(weights)
            cached = tl.load(v_head + offsets, mask=cells, other=0.0)
            values = product(weights.to(cached.dtype), cached, values * decay[:, None], UPCAST)
        used = live & (position >= first)
        place = ((row // RATIO) * heads + head) * segments + segment
        tl.store(stats + place, top, mask=used)
        tl.store(stats + rows * heads * segments + place, total, mask=used)
        tl.store(
            outs + place.to(tl.int64)[:, None] * E + features[None, :],
            values,
            mask=used[:, None] & (features < E)[None, :],
        )


@triton.jit(do_not_specialize=["positions", "rows", "slots"])
def merge_segments(
    outs,
    stats,
    positions,
    out,
    rows,
    slots,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    SEGMENT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Merge the segments that a row sees, N at a time; none gives zeros. Grid: (T x H, parts of K features)."""
    row = tl.program_id(0)
    features = tl.program_id(1) * K + tl.arange(0, K)
    position = load_positions(positions, row // HEADS, True)
    segments = tl.cdiv(slots, SEGMENT)
    used = (position + SEGMENT) // SEGMENT
    top = LOWEST
    total = 0.0
    values = tl.zeros([K], tl.float32)
    for start in range(0, used, N):
        segment = start + tl.arange(0, N)
        live = segment < used
        place = row * segments + segment
        tops = tl.load(stats + place, mask=live, other=LOWEST)
        totals = tl.load(stats + rows * HEADS * segments + place, mask=live, other=0.0)
        parts = tl.load(
            outs + place.to(tl.int64)[:, None] * E + features[None, :],
            mask=live[:, None] & (features < E)[None, :],
            other=0.0,
        )
        higher = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - higher)
        decay = tl.exp2(top - higher)
        top = higher
        total = total * decay + tl.sum(weights * totals, axis=0)
        values = values * decay + tl.sum(weights[:, None] * parts, axis=0)
    result = values / tl.where(used > 0, total, 1.0)
    if UPCAST:
        result = rounded_to_bf16(result)
    tl.store(out + row.to(tl.int64) * E + features, result.to(out.dtype.element_ty), mask=features < E)


def attend_constants(ratio: int, head_dim: int) -> dict[str, object]:
    """Return the constants of `attend_segments`. A tile holds equally many elements for every head dim."""
    tile = TILES["attention"]
    block = max(16, triton.next_power_of_2(head_dim))
    return {
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "RATIO": ratio,
        "E": head_dim,
        "BLOCK_E": block,
        "N": min(SEGMENT, tile.n * tile.k // block),
        "SEGMENT": SEGMENT,
        "ROWS": ROWS,
        "UPCAST": INTERPRETED,
    }


def merge_constants(heads: int, head_dim: int) -> dict[str, object]:
    """Return the constants of `merge_segments`."""
    return {"HEADS": heads, "E": head_dim, "SEGMENT": SEGMENT, "N": MERGE.n, "K": MERGE.k, "UPCAST": INTERPRETED}


def check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> None:
    """Raise ValueError for arguments that the kernels would misread."""
    rows, heads, head_dim = q.shape
    groups, slots = k_cache.shape[:2]
    if not 1 <= rows <= ROWS or not 1 <= head_dim <= HEAD_DIM or heads % groups or heads > ROWS * groups:
        raise ValueError(
            f"decode attention takes 1 to {ROWS} rows, heads of up to {HEAD_DIM} and 1 to {ROWS} query "
            f"heads per kv head, not q {list(q.shape)} with {groups} kv heads"
        )
    if (
        k.shape != (rows, groups, head_dim)
        or v.shape != k.shape
        or positions.shape != (rows,)
        or k_cache.shape != (groups, slots, head_dim)
        or v_cache.shape != k_cache.shape
    ):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, positions {list(positions.shape)} "
            f"and caches {list(k_cache.shape)}, {list(v_cache.shape)} do not fit together"
        )
    tensors = (q, k, v, k_cache, v_cache)
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors) or positions.dtype != torch.int64:
        raise ValueError("decode attention takes bf16 tensors and int64 positions")
    if (
        not all(tensor[0].is_contiguous() for tensor in tensors[:3])
        or not positions.is_contiguous()
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
    ):
        raise ValueError("decode attention takes contiguous caches and positions, and q, k, v contiguous in each row")


def launch(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Check the arguments of `decode_attention` and launch the two kernels."""
    check(q, k, v, k_cache, v_cache, positions)
    rows, heads, head_dim = q.shape
    groups, slots = k_cache.shape[:2]
    ratio, segments = heads // groups, triton.cdiv(slots, SEGMENT)
    outs = torch.empty(rows, heads, segments, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, rows, heads, segments, dtype=torch.float32, device=q.device)
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    blocks = triton.cdiv(rows * ratio, ROWS)
    programs = min(segments, max(1, PROGRAMS // (blocks * groups)))
    tile = TILES["attention"]
    attend_segments[(blocks, groups, programs)](
        q,
        k,
        v,
        k_cache,
        v_cache,
        positions,
        outs,
        stats,
        rows,
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        **attend_constants(ratio, head_dim),
        **tile.options,
    )
    merge_segments[(rows * heads, triton.cdiv(head_dim, MERGE.k))](
        outs, stats, positions, out, rows, slots, **merge_constants(heads, head_dim), **MERGE.options
    )
    return out


@torch.library.custom_op("skipfast::decode_attention", mutates_args=("k_cache", "v_cache"), device_types="cuda")
def decode_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Write k, v into the caches at `positions`, in place, and attend with q; return bf16 [T, H, E].

    q: bf16 [T, H, E], T in 1..16, E up to 256. k, v: bf16 [T, G, E]. The row stride of all three is free, so they may
    be slices of a fused projection. k_cache, v_cache: bf16 [G, S, E]. positions: int64 [T], below S; those that are not
    negative must differ. Neither is checked.

    Row t attends to slots 0..positions[t], the call's own keys included. Slots up to the largest position must hold
    finite numbers; those after it are not read. A negative position is padding: nothing is written, and the row's
    output is zeros. Query head h uses kv head h // (H / G), H / G in 1..16; scores are scaled by 1/sqrt(E); softmax is
    in fp32. Raises ValueError for other shapes, dtypes and strides.
    """
    return launch(q, k, v, k_cache, v_cache, positions)


@decode_attention.register_kernel("cpu")
def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor
) -> Tensor:
    """Do what `decode_attention` does in pure torch, for any dtype, number of rows and strides."""
    live = positions >= 0
    k_cache.index_copy_(1, positions[live], k[live].transpose(0, 1))
    v_cache.index_copy_(1, positions[live], v[live].transpose(0, 1))
    end = max(int(positions.max()) + 1, 0)
    ratio = q.shape[1] // k.shape[1]
    keys = k_cache[:, :end].float().repeat_interleave(ratio, 0)  # [H, end, E]
    values = v_cache[:, :end].float().repeat_interleave(ratio, 0)
    scores = q.transpose(0, 1).float() @ keys.mT / math.sqrt(q.shape[2])  # [H, T, end]
    unseen = torch.arange(end, device=q.device) > positions[:, None]
    out = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values
    return out.masked_fill(~live[:, None], 0.0).transpose(0, 1).to(q.dtype).contiguous()


@decode_attention.register_fake
def decode_attention_fake(q, k, v, k_cache, v_cache, positions):
    return q.new_empty(q.shape)


# ---- compiling without a GPU ----


def compile_cases() -> list[CompileCase]:
    """List the kernels as they are launched. Rows, kv heads and cache length are arguments at run time."""
    attend = [attend_case(ratio, head_dim) for head_dim in (64, 96, 128) for ratio in (1, 4, 8)]
    return attend + [merge_case(heads, head_dim) for heads, head_dim in ((32, 64), (32, 96), (32, 128))]


def attend_case(ratio: int, head_dim: int) -> CompileCase:
    tensors = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), "*bf16")
    integers = dict.fromkeys(("rows", "slots", "q_stride", "k_stride", "v_stride"), "i32")
    return CompileCase(
        name=f"attend_segments head_dim={head_dim} ratio={ratio}",
        kernel=attend_segments,
        types=tensors | {"positions": "*i64", "outs": "*fp32", "stats": "*fp32"} | integers,
        constants=attend_constants(ratio, head_dim) | {"UPCAST": False},
        aligned=(*tensors, "outs", "stats", "q_stride", "k_stride", "v_stride"),
        tile=TILES["attention"],
    )


def merge_case(heads: int, head_dim: int) -> CompileCase:
    return CompileCase(
        name=f"merge_segments head_dim={head_dim}",
        kernel=merge_segments,
        types={"outs": "*fp32", "stats": "*fp32", "positions": "*i64", "out": "*bf16", "rows": "i32", "slots": "i32"},
        constants=merge_constants(heads, head_dim) | {"UPCAST": False},
        aligned=("outs", "stats", "out"),
        tile=MERGE,
        mma=None,
        wide_copies=False,
    )
