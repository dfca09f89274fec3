"""The kernel sections of `gpu_check`: how fast the GPU copies; each op against fp64, its own rows and its floor.

Timings run on weights that take turns, so that the L2 cache does not hold the next one.
"""

import functools
import itertools
import math
import subprocess

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.sampling import gumbel_noise
from kernels import gpu
from kernels.attention import attention_reference
from kernels.exit_head import exit_stats_reference
from kernels.formats import GROUPS, dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from scripts.gpu_check.report import Report, median_seconds
from scripts.gpu_check.shapes import ROWS

BOUND = 2.0**-8  # of |y - reference| / (|reference| + its root mean square): one rounding to bf16 is half of it
COPY_WARM_S = 0.5


def load_kernels() -> None:
    if reason := gpu.load():
        raise RuntimeError(reason)


def driver() -> dict[str, str]:
    """Ask the driver for its version and the clocks of the GPU, which was busy just now; nothing if it cannot tell."""
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(names, line.split(", "), strict=False))


def check_environment(report: Report) -> None:
    """Name the GPU and measure how fast it copies: the ceiling of everything below."""
    source = torch.empty(report.shapes.copy_bytes, dtype=torch.uint8, device=report.device).fill_(1)
    target = torch.empty_like(source)
    seconds = median_seconds(functools.partial(target.copy_, source), report.device, COPY_WARM_S)
    values = {"gpu": None, "cuda": torch.version.cuda, "copy_GB_per_s": 2 * source.nbytes / seconds / 1e9}
    if report.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_GB": properties.total_memory / 1e9,
        } | driver()
    versions = report.result["versions"]
    report.row(**values, **{name: versions[name] for name in ("python", "torch", "triton", "transformers")})


def check_kernels(report: Report, op: str) -> None:
    """Check one op against fp64 and its rows against each other, and time it; a shape that fails stops no other."""
    load_kernels()
    if op == "exit_head":
        for vocabulary, mode in itertools.product(report.shapes.vocabularies, ("bf16", "int8")):
            report.attempt(f"{op} {vocabulary} {mode}", check_exit_head, report, vocabulary, mode)
    elif op == "attention":
        shapes = report.shapes
        _, groups, width = shapes.attention
        copies = math.ceil(shapes.cold_bytes / (groups * shapes.slots * width))
        caches = [tuple(report.random(groups, shapes.slots, width) for _ in range(2)) for _ in range(copies)]
        for context, m in itertools.product(shapes.contexts, (1, 8)):
            report.attempt(f"{op} context {context} rows {m}", check_attention, report, caches, context, m)
    else:
        for n, k in report.shapes.linears:
            report.attempt(f"{op} {n}x{k}", check_linear, report, op, n, k)


def relative_error(result: Tensor, expected: Tensor) -> float:
    scale = expected.abs() + expected.square().mean().sqrt()
    return ((result.double() - expected).abs() / scale).max().item()


def make_weights(report: Report, n: int, k: int, mode: str, spread: float) -> tuple[list[tuple], Tensor]:
    """Make copies of a random weight and its scale (None in bf16) that outgrow the L2; also the weight in fp64."""
    plain = report.random(n, k) * spread
    if mode == "bf16":
        weight, exact = (plain, None), plain.double()
    elif mode == "int8":
        weight = quantise_int8(plain)
        exact = dequantise_int8(*weight).double()
    else:
        weight = quantise_int4(plain, int4_group(k))
        exact = dequantise_int4(*weight).double()
    copies = math.ceil(report.shapes.cold_bytes / nbytes(weight))
    return [weight, *(tuple(t if t is None else t.clone() for t in weight) for _ in range(copies - 1))], exact


def int4_group(features: int) -> int:
    return max(group for group in GROUPS if features % group == 0)


def nbytes(tensors: tuple[Tensor | None, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def check_linear(report: Report, op: str, n: int, k: int) -> None:
    mode, kernel = op.removeprefix("linear_"), getattr(torch.ops.skipfast, op)
    weights, exact = make_weights(report, n, k, mode, 1 / math.sqrt(k))
    arguments = [weight[:1] if mode == "bf16" else weight for weight in weights]
    x, shape = report.random(max(ROWS), k), f"{n}x{k}"
    rows = {m: kernel(x[:m], *arguments[0]) for m in ROWS}
    report.within(f"{op} {shape}: error", relative_error(rows[16], x.double() @ exact.T), BOUND)
    alone = [(kernel(x[i : i + 1], *arguments[0]), rows[m][i : i + 1]) for m in ROWS for i in {0, m // 2, m - 1}]
    report.same_rows(f"{op} {shape}: a row alone has the bits of the row among 8 and 16", alone)
    del exact
    for m in ROWS:
        calls = [functools.partial(kernel, x[:m], *tensors) for tensors in arguments]
        matmuls = [[functools.partial(F.linear, x[:m], *tensors) for tensors in arguments]] if mode == "bf16" else ()
        report.time(op, shape, m, nbytes(weights[0]), calls, matmuls)


def check_exit_head(report: Report, vocabulary: int, mode: str) -> None:
    """Check and time the exit head, greedy and sampling.

    Its logits are rounded to bf16, so a token of nearly the largest logit may be chosen.
    """
    width, seed, temperature = report.shapes.head_width, 1, 0.8
    weights, exact = make_weights(report, vocabulary, width, mode, 4 / math.sqrt(width))
    x, shape = report.random(max(ROWS), width), f"{vocabulary}x{width} {mode}"
    positions = torch.arange(100, 100 + max(ROWS), device=report.device)
    tensors = (torch.tensor([seed], device=report.device), torch.tensor([temperature], device=report.device))

    def call(first, last, weight, sampling=True):
        draw = (positions[first:last], *tensors) if sampling else ()
        return torch.ops.skipfast.exit_head_rows(x[first:last], *weight, vocabulary, 0, *draw)

    logits = x.double() @ exact.T
    ids = torch.arange(vocabulary, device=report.device)
    noise = torch.stack([gumbel_noise(seed, position, ids) for position in positions.tolist()])
    results = {m: call(0, m, weights[0]) for m in ROWS}
    tokens, stats, samples = results[16]
    for name, scores, chosen in (("tokens", logits, tokens), ("samples", logits / temperature + noise, samples)):
        gap = scores.max(-1).values - scores.gather(-1, chosen[:, None])[:, 0]
        report.within(f"exit_head {shape}: {name} below the largest", (gap / logits.abs().amax()).max(), 4 * BOUND)
    expected = exit_stats_reference(logits.bfloat16().float())
    report.within(f"exit_head {shape}: statistics", (stats - torch.stack(expected[1:], -1)).abs().max(), 0.02)
    alone = [
        (a, b[i : i + 1])
        for m in ROWS
        for i in {0, m - 1}
        for a, b in zip(call(i, i + 1, weights[0]), results[m], strict=True)
    ]
    report.same_rows(f"exit_head {shape}: a row alone has the bits of the row among 8 and 16", alone)
    del exact
    for sampling, m in itertools.product((False, True), ROWS):
        calls = [functools.partial(call, 0, m, weight, sampling) for weight in weights]
        report.time(
            "exit_head" + " sampling" * sampling, shape, m, nbytes(weights[0]), calls, head_matmuls(x[:m], weights)
        )


def head_matmuls(x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> list[list[functools.partial]]:
    """Return calls of the head's matmul alone: with our kernel, and in bf16 with torch's."""
    if weights[0][1] is not None:
        return [[functools.partial(torch.ops.skipfast.linear_int8, x, *tensors) for tensors in weights]]
    kernels = torch.ops.skipfast.linear_bf16, F.linear
    return [[functools.partial(kernel, x, weight) for weight, _ in weights] for kernel in kernels]


def check_attention(report: Report, caches: list[tuple[Tensor, Tensor]], context: int, m: int) -> None:
    """Check and time attention over partly filled long caches. Short contexts fit the L2, whatever takes turns."""
    (heads, groups, width), kernel = report.shapes.attention, torch.ops.skipfast.decode_attention
    positions = torch.arange(context - m, context, device=report.device)
    q, k, v = report.random(m, heads, width), report.random(m, groups, width), report.random(m, groups, width)
    out = kernel(q, k, v, *caches[0], positions)
    used = [cache[:, :context].double() for cache in caches[0]]
    expected = attention_reference(q.double(), k.double(), v.double(), *used, positions)
    shape = f"{heads}/{groups}/{width} context {context} rows {m}"
    report.within(f"attention {shape}: error", relative_error(out, expected), 2 * BOUND)
    written = all(
        torch.equal(cache[:, positions], new.transpose(0, 1)) for cache, new in zip(caches[0], (k, v), strict=True)
    )
    report.check(f"attention {shape}: keys and values are in the cache", written)
    alone = [
        (kernel(q[row], k[row], v[row], *caches[0], positions[row]), out[row])
        for row in (slice(i, i + 1) for i in range(m))
    ]
    report.same_rows(f"attention {shape}: a row alone has the same bits", alone)
    calls = [functools.partial(kernel, q, k, v, *cache, positions) for cache in caches]
    report.time("attention", shape, m, 4 * context * groups * width, calls)
