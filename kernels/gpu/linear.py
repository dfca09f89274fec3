"""The linear layer of decoding on a GPU: y = x @ W^T for 1..16 rows, W plain [N, K] in bf16, int8 or group-wise int4.

A row's bits are the same at every number of rows: there is one tile shape, and the number of partial sums along K
depends only on the weight's shape and the GPU.

Bandwidth is all that counts. Each weight byte is read once, by a 16-byte asynchronous copy; x comes from the L2 cache.
A weight with few rows cannot occupy the GPU, so K is then split over programs. A ticket tells which program is the
last; it adds the partial sums in the order of the splits. A second kernel instead would take longer to start than the
addition takes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import dequantise_int4, dequantise_int8
from kernels.gpu.build import FEATURES, ROWS
from kernels.gpu.tiles import INTERPRETED, TILES, CompileCase, Tile, processors, rounded_to_bf16, tickets_of

GROUPS = (32, 64, 128)  # sizes of an int4 group
FORMATS = {torch.bfloat16: "linear_bf16", torch.int8: "linear_int8", torch.uint8: "linear_int4"}

# Nibbles to bf16, two at a time. 0x4300 is 128, and its last mantissa bit counts 1. So a nibble in its last bits makes
# 128 + nibble, from which 136 is subtracted exactly. Of two pairs of bytes, a register already holds two neighbours of
# each kind of nibble in the right places. Four single bytes must first be spread over two registers, which makes a
# third more instructions in all.
PAIRS_ASSEMBLY = tl.constexpr("""{
    .reg .b32 one, bias, next;
    mov.b32 one, 0x3f803f80;
    mov.b32 bias, 0xc308c308;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 8;
    lop3.b32 $1, next, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 4;
    lop3.b32 $2, next, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 12;
    lop3.b32 $3, next, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, bias;
    fma.rn.bf16x2 $1, $1, one, bias;
    fma.rn.bf16x2 $2, $2, one, bias;
    fma.rn.bf16x2 $3, $3, one, bias;
}""")
BYTES_ASSEMBLY = tl.constexpr("""{
    .reg .b32 one, bias, left, right;
    mov.b32 one, 0x3f803f80;
    mov.b32 bias, 0xc308c308;
    prmt.b32 left, $4, 0, 0x4140;
    prmt.b32 right, $4, 0, 0x4342;
    lop3.b32 $0, left, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, right, 0x000f000f, 0x43004300, 0xea;
    shr.u32 left, left, 4;
    shr.u32 right, right, 4;
    lop3.b32 $2, left, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, right, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, $0, one, bias;
    fma.rn.bf16x2 $1, $1, one, bias;
    fma.rn.bf16x2 $2, $2, one, bias;
    fma.rn.bf16x2 $3, $3, one, bias;
}""")

# ---- kernels ----


@triton.jit
def products(x, w, total, UPCAST: tl.constexpr):
    """Return total + x @ w^T for x [ROWS, k], w [N, k]."""
    if UPCAST:
        total = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(w.to(tl.bfloat16)), total)
    return total


@triton.jit
def columns(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Cut x [HEIGHT, WIDTH] into PARTS = 1, 2, 4, … along its width -> part PART. Picks registers and moves nothing."""
    if PARTS == 1:
        return x
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [HEIGHT, 2, WIDTH // 2]), [0, 2, 1]))
        if PART < PARTS // 2:
            return columns(left, HEIGHT, WIDTH // 2, PARTS // 2, PART)
        else:
            return columns(right, HEIGHT, WIDTH // 2, PARTS // 2, PART - PARTS // 2)


@triton.jit
def nibble(word, SHIFT: tl.constexpr):
    """Return the nibble that starts at bit SHIFT, less 8, in fp32."""
    return ((word >> SHIFT) & 15).to(tl.float32) - 8.0


@triton.jit
def from_pairs(pairs, UPCAST: tl.constexpr):
    """Return the nibbles, less 8, of int16 pairs of bytes: low of the first and of the second byte, then high."""
    if UPCAST:
        return nibble(pairs, 0), nibble(pairs, 8), nibble(pairs, 4), nibble(pairs, 12)
    else:
        return tl.inline_asm_elementwise(
            PAIRS_ASSEMBLY, "=&r,=&r,=&r,=&r,r", [pairs], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )


@triton.jit
def from_bytes(packed, UPCAST: tl.constexpr):
    """Return the nibbles, less 8, of bytes: low, then high."""
    if UPCAST:
        return nibble(packed, 0), nibble(packed, 4)
    else:
        return tl.inline_asm_elementwise(
            BYTES_ASSEMBLY, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=4
        )


@triton.jit
def group_products(x, w, HEIGHT: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply x [HEIGHT, GROUP] by the integers [N, GROUP] of a group, held as bytes (group 32) or pairs of bytes."""
    total = tl.zeros([HEIGHT, N], tl.float32)
    if GROUP == 32:  # a tensor core takes 16 features at a time: there are too few pairs
        low, high = from_bytes(w, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 2, 0), low, total, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 2, 1), high, total, UPCAST)
    else:
        x = tl.reshape(tl.permute(tl.reshape(x, [HEIGHT, 2, GROUP // 4, 2]), [0, 1, 3, 2]), [HEIGHT, GROUP])
        low_even, low_odd, high_even, high_odd = from_pairs(w, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 4, 0), low_even, total, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 4, 1), low_odd, total, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 4, 2), high_even, total, UPCAST)
        total = products(columns(x, HEIGHT, GROUP, 4, 3), high_odd, total, UPCAST)
    return total


@triton.jit
def split_of_k(k, K: tl.constexpr, SPLITS: tl.constexpr):
    """Return where this program's features start and stop: whole steps of K, equally many but for the last program."""
    span = tl.cdiv(tl.cdiv(k, K), SPLITS) * K
    start = tl.program_id(1) * span
    return start, tl.minimum(start + span, k)


@triton.jit
def store_rows(y, total, scale, m, n, rows, features, UPCAST: tl.constexpr):
    """Scale the sums of a tile, if there is a scale, and store them in bf16."""
    if scale is not None:
        total = total * tl.load(scale + features, mask=features < n, other=0.0)[None, :]
    if UPCAST:
        total = rounded_to_bf16(total)
    mask = (rows[:, None] < m) & (features[None, :] < n)
    tl.store(y + rows[:, None] * n + features[None, :], total.to(tl.bfloat16), mask=mask)


@triton.jit
def finish(
    y,
    total,
    scale,
    partials,
    tickets,
    m,
    n,
    HEIGHT: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store the tile; if K is split, leave a partial sum, and the last program adds all of them in order."""
    tile = tl.program_id(0)
    rows, features = tl.arange(0, HEIGHT), tile * N + tl.arange(0, N)
    if SPLITS == 1:
        store_rows(y, total, scale, m, n, rows, features, UPCAST)
    else:
        mask = (rows[:, None] < m) & (features[None, :] < n)
        partials += rows[:, None] * n + features[None, :]
        tl.store(partials + tl.program_id(1) * m * n, total, mask=mask)
        tl.debug_barrier()  # every thread has stored before one takes the ticket, which makes the stores visible
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.load(partials, mask=mask, other=0.0, cache_modifier=".cg")
            for split in tl.static_range(1, SPLITS):
                total += tl.load(partials + split * m * n, mask=mask, other=0.0, cache_modifier=".cg")
            store_rows(y, total, scale, m, n, rows, features, UPCAST)
            tl.store(tickets + tile, 0)  # ready for the next call, and for the next replay of a graph


@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x,
    weight,
    scale,
    y,
    partials,
    tickets,
    m,
    n,
    k,
    x_stride,
    HEIGHT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply by bf16 or int8 weights. EVEN: k is a multiple of K.

    Rows after n read the last row again, so that loads of weights need no mask.
    """
    first = tl.program_id(0) * N
    start, stop = split_of_k(k, K, SPLITS)
    rows, lanes = tl.arange(0, HEIGHT), tl.arange(0, K)
    weight_rows = tl.minimum(tl.arange(0, N), n - 1 - first)
    weights = weight + first.to(tl.int64) * k + start + (weight_rows[:, None] * k + lanes[None, :])
    inputs = x + start + (rows[:, None] * x_stride + lanes[None, :])
    live = rows[:, None] < m
    total = tl.zeros([HEIGHT, N], tl.float32)
    for position in range(start, stop, K):
        if EVEN:
            w = tl.load(weights, eviction_policy="evict_first")
            rows_of_x = tl.load(inputs, mask=live, other=0.0)
        else:
            inside = lanes[None, :] < k - position
            w = tl.load(weights, mask=inside, other=0, eviction_policy="evict_first")
            rows_of_x = tl.load(inputs, mask=live & inside, other=0.0)
        total = products(rows_of_x, w, total, UPCAST)
        weights += K
        inputs += K
    finish(y, total, scale, partials, tickets, m, n, HEIGHT, N, SPLITS, UPCAST)


@triton.jit(do_not_specialize=["m"])
def linear_int4_kernel(
    x,
    packed,
    scale,
    y,
    partials,
    tickets,
    m,
    n,
    k,
    x_stride,
    HEIGHT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply by int4 weights, held as bytes (group 32) or pairs of bytes.

    Products are of exact integers; the scale of a group multiplies its fp32 sum.
    """
    NIBBLES: tl.constexpr = 2 if GROUP == 32 else 4  # in an element of packed
    WORDS: tl.constexpr = K // NIBBLES
    PARTS: tl.constexpr = K // GROUP
    first = tl.program_id(0) * N
    start, stop = split_of_k(k, K, SPLITS)
    words, parts = tl.arange(0, WORDS), tl.arange(0, PARTS)
    pieces, lanes = tl.arange(0, HEIGHT * K // 16), tl.arange(0, 16)
    weight_rows = tl.minimum(tl.arange(0, N), n - 1 - first)
    pitch = k // 32 * (32 // NIBBLES)  # k is a multiple of 32; written so, Triton sees that 16-byte copies are aligned
    scale_pitch = k // K * PARTS if EVEN else k // GROUP
    weights = packed + first.to(tl.int64) * pitch + start // NIBBLES + (weight_rows[:, None] * pitch + words[None, :])
    scales = scale + first.to(tl.int64) * scale_pitch + start // GROUP
    scales += weight_rows[:, None] * scale_pitch + parts[None, :]
    # 16 features of every row, then the next 16: a warp reads 8 rows at once, and whole rows would share memory banks
    row, place = (pieces % HEIGHT)[:, None], (pieces // HEIGHT * 16)[:, None]
    inputs = x + start + (row * x_stride + place + lanes[None, :])
    live = row < m
    total = tl.zeros([HEIGHT, N], tl.float32)
    next_scale = tl.load(scales, mask=parts[None, :] < (k - start) // GROUP, other=0.0)
    for position in range(start, stop, K):
        step_scale = next_scale  # loaded a step ahead by hand, because it is too narrow for an asynchronous copy
        scales += PARTS
        if EVEN:
            next_scale = tl.load(scales, mask=parts[None, :] < k - position - K, other=0.0)  # all or none
            w = tl.load(weights, eviction_policy="evict_first")
            rows_of_x = tl.load(inputs, mask=live, other=0.0)
        else:
            next_scale = tl.load(scales, mask=parts[None, :] < (k - position - K) // GROUP, other=0.0)
            inside = words[None, :] < (k - position) // 32 * (32 // NIBBLES)
            w = tl.load(weights, mask=inside, other=0, eviction_policy="evict_first")
            rows_of_x = tl.load(inputs, mask=live & (place < k - position), other=0.0)
        rows_of_x = tl.permute(tl.reshape(rows_of_x, [K // 16, HEIGHT, 16]), [1, 0, 2])
        rows_of_x = tl.reshape(rows_of_x, [HEIGHT, K])
        weights += WORDS
        inputs += K
        for part in tl.static_range(PARTS):
            sums = group_products(
                columns(rows_of_x, HEIGHT, K, PARTS, part), columns(w, N, WORDS, PARTS, part), HEIGHT, N, GROUP, UPCAST
            )
            part_scale = tl.reshape(columns(step_scale, N, PARTS, PARTS, part), [N]).to(tl.float32)
            total = tl.fma(sums, tl.broadcast_to(part_scale[None, :], [HEIGHT, N]), total)
    finish(y, total, None, partials, tickets, m, n, HEIGHT, N, SPLITS, UPCAST)


# ---- launching ----


def splits_of(n: int, k: int, tile: Tile, n_processors: int) -> int:
    """Return how many programs share the features of a tile of a weight [n, k], to have two programs per processor."""
    tiles, steps = -(-n // tile.n), -(-k // tile.k)
    wanted = min(-(-2 * n_processors // tiles), steps)
    return -(-steps // -(-steps // wanted))  # equal shares, of which none is empty


def constants_of(tile: Tile, n: int, k: int, n_processors: int, group: int | None) -> dict[str, object]:
    """Return the constants of the kernel for a weight [n, k]. group: of int4, else None."""
    return {
        "HEIGHT": ROWS,
        "N": tile.n,
        "K": tile.k,
        "SPLITS": splits_of(n, k, tile, n_processors),
        "EVEN": k % tile.k == 0,
        "UPCAST": INTERPRETED,
    } | ({} if group is None else {"GROUP": group})


def launch(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Run the kernel on a GPU, or on a CPU under Triton's interpreter. Arguments and errors are those of the ops."""
    group = check(x, weight, scale)
    (m, k), n, device = x.shape, weight.shape[0], x.device
    tile = TILES[FORMATS[weight.dtype]]
    constants = constants_of(tile, n, k, processors(device), group)
    splits = constants["SPLITS"]
    y = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    partials = torch.empty(splits, m, n, dtype=torch.float32, device=device) if splits > 1 else None
    tickets = tickets_of(device) if splits > 1 else None
    if group is not None and group > 32:
        weight = weight.view(torch.int16)
    kernel = linear_kernel if group is None else linear_int4_kernel
    kernel[(-(-n // tile.n), splits)](
        x, weight, scale, y, partials, tickets, m, n, k, x.stride(0), **constants, **tile.options
    )
    return y


def check(x: Tensor, weight: Tensor, scale: Tensor | None) -> int | None:
    """Raise ValueError for what the kernels cannot take; return the int4 group, else None."""
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= ROWS or x.stride(1) != 1:
        raise ValueError(f"x must be bf16 [1..{ROWS}, K], each row contiguous, not {x.dtype} {list(x.shape)}")
    if weight.dtype not in FORMATS or (scale is None) != (weight.dtype == torch.bfloat16):
        raise ValueError(f"no linear layer takes {weight.dtype} {'without' if scale is None else 'with'} a scale")
    k, n, int4 = x.shape[1], weight.shape[0], weight.dtype == torch.uint8
    if weight.shape[1:] != (k // 2 if int4 else k,) or not weight.is_contiguous():
        raise ValueError(f"the weight does not fit x {list(x.shape)}: it is {weight.dtype} {list(weight.shape)}")
    group = k // max(scale.shape[-1], 1) if int4 else None
    if k % (group or FEATURES) or (int4 and group not in GROUPS):
        raise ValueError(f"{k} features are not a multiple of {f'a group in {GROUPS}' if int4 else FEATURES}")
    dtype, shape = (torch.bfloat16, (n, k // group)) if int4 else (torch.float32, (n,))
    if scale is not None and (scale.dtype != dtype or scale.shape != shape or not scale.is_contiguous()):
        raise ValueError(f"the scale must be contiguous {dtype} {list(shape)}, not {scale.dtype} {list(scale.shape)}")
    return group


# ---- operators and their references in pure torch ----


@torch.library.custom_op("skipfast::linear_bf16", mutates_args=(), device_types="cuda")
def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, bf16 [m, N], for x bf16 [m, K], m in 1..16, and weight bf16 [N, K].

    Rows of x are contiguous, but may lie further than K apart. K is a multiple of 16. Sums are fp32. Raises ValueError
    for anything else.
    """
    return launch(x, weight)


@linear_bf16.register_kernel("cpu")
def linear_bf16_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Do what `linear_bf16` does in pure torch."""
    return F.linear(x.float(), weight.float()).to(x.dtype)


@torch.library.custom_op("skipfast::linear_int8", mutates_args=(), device_types="cuda")
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return (x @ weight.T) * scale, bf16 [m, N], for weight int8 [N, K] and scale fp32 [N]; else as `linear_bf16`."""
    return launch(x, weight, scale)


@linear_int8.register_kernel("cpu")
def linear_int8_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Do what `linear_int8` does in pure torch."""
    return F.linear(x.float(), dequantise_int8(weight, scale)).to(x.dtype)


@torch.library.custom_op("skipfast::linear_int4", mutates_args=(), device_types="cuda")
def linear_int4(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return x @ dequantise_int4(packed, scale).T, bf16 [m, N]: see there, and `linear_bf16` for x.

    The group, K / scale.shape[1], is 32, 64 or 128 and divides K.
    """
    return launch(x, packed, scale)


@linear_int4.register_kernel("cpu")
def linear_int4_reference(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Do what `linear_int4` does in pure torch."""
    return F.linear(x.float(), dequantise_int4(packed, scale)).to(x.dtype)


@linear_bf16.register_fake
@linear_int8.register_fake
@linear_int4.register_fake
def linear_fake(x, weight, scale=None):
    return x.new_empty(x.shape[0], weight.shape[0])


# ---- compiling without a GPU ----


def compile_cases() -> list[CompileCase]:
    """List the kernels as they are launched on 132 processors: real shapes, and features that do not fill a tile."""
    return [
        compile_case(*shape)
        for shape in (
            (torch.bfloat16, 128256, 4096),
            (torch.bfloat16, 4096, 14336),
            (torch.bfloat16, 2048, 2064),
            (torch.int8, 32000, 2048),
            (torch.int8, 4096, 11008),
            (torch.uint8, 128256, 4096, 128),
            (torch.uint8, 4096, 4096, 64),
            (torch.uint8, 4096, 4096, 32),
            (torch.uint8, 4096, 2080, 32),
        )
    ]


def compile_case(dtype: torch.dtype, n: int, k: int, group: int | None = None) -> CompileCase:
    """Describe the kernel for a weight [n, k], as `launch` would start it."""
    tile, kernel = TILES[FORMATS[dtype]], linear_kernel if group is None else linear_int4_kernel
    constants = constants_of(tile, n, k, processors(torch.device("cpu")), group) | {"UPCAST": False}
    element = {torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8" if group == 32 else "*i16"}[dtype]
    optional = {"scale": {torch.bfloat16: None, torch.int8: "*fp32", torch.uint8: "*bf16"}[dtype]}
    optional |= (
        dict.fromkeys(("partials", "tickets")) if constants["SPLITS"] == 1 else {"partials": "*fp32", "tickets": "*i32"}
    )
    types = {"x": "*bf16", "weight" if group is None else "packed": element, "y": "*bf16"}
    types |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    name = f"{FORMATS[dtype]} N {n} K {k}{f' group {group}' if group else ''} splits {constants['SPLITS']}"
    return CompileCase(
        name,
        kernel,
        types | dict.fromkeys(("m", "n", "k", "x_stride"), "i32"),
        constants,
        (*types, "n", "k", "x_stride"),
        tile,
    )
