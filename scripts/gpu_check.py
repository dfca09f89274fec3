"""Measure and check the whole GPU path with one command and no checkpoint: kernels, engine, exactness, baselines.

Sections run in the order of `Shapes.sections` until --minutes are over. Each ends with its tables and with the JSON
file written anew, so that what was measured survives a crash; what was not reached stands there as such. Models have
random weights and an acceptance dial: `set_dial` weakens the layers behind the exit until it mostly agrees with the
full model. Exit code 1: a check or a section failed.
"""

import argparse
import datetime
import functools
import gc
import importlib.util
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
from generate import GenerateConfig, Generation, decode
from kernels import gpu
from kernels.attention import attention_reference
from kernels.exit_head import exit_stats_reference
from kernels.formats import GROUPS, dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from model import ModelArgs, Transformer
from policies import make_policy
from quantize import quantise
from runner import PREFILL_CHUNK, Runner
from sampling import SamplingConfig, gumbel_noise

OPS = ("linear_bf16", "linear_int8", "linear_int4", "exit_head", "attention")
ROWS = (1, 8, 16)
DRAFTS = (3, 5)  # K of the speculative runs
AGREEMENT = 0.8  # of the exit with the full model, aimed at by the dial
REPEATS = 7  # of every timing of a kernel
LAUNCHES = 20  # at least, in the graph that is timed
GAP_US = 5  # the GPU idle for longer between two kernels was waiting for Python, not for a kernel to start
BOUND = 2.0**-8  # of |y - reference| / (|reference| + its root mean square): one rounding to bf16 is half of it


@dataclass(frozen=True)
class Shape:
    """A model: its sizes in the order of ModelArgs, the exit layer of its drafts, seconds that its sections need."""

    sizes: tuple[int, ...]
    exit_layer: int
    seconds: float

    @property
    def args(self) -> ModelArgs:
        return ModelArgs(*self.sizes, max_seq_len=8192, norm_eps=1e-5, rope_base=500000.0, dtype="bfloat16")


@dataclass(frozen=True)
class Shapes:
    """What is measured, and in which order. attention: query heads, kv heads, head width. Lengths are in tokens."""

    sections: tuple[str, ...]
    models: dict[str, Shape]
    linears: tuple[tuple[int, int], ...]
    vocabularies: tuple[int, ...]
    head_width: int
    attention: tuple[int, int, int]
    contexts: tuple[int, ...]
    slots: int
    sampled: str  # the model and precision that is also compared with sampling
    prompt: int
    tokens: int  # a timed run
    exact_tokens: int  # a run compared with plain decoding
    repeats: int
    cold_bytes: int  # weights that take turns: a multiple of the L2 cache
    copy_bytes: int
    kernel_seconds: float  # that one section of kernels needs


KERNELS = tuple(f"kernels {op}" for op in OPS)
FULL = Shapes(
    sections=(
        "environment", *KERNELS, "engine 1B bf16", "engine 8B bf16", "engine 8B int8", "engine 8B int4",
        "engine 1B int8", "engine 1B int4", "engine 7B bf16", "baselines 1B", "baselines 8B", "engine 7B int8",
        "engine 7B int4",
    ),
    models={
        "1B": Shape((2048, 16, 32, 8, 64, 8192, 128256), 4, 25),
        "8B": Shape((4096, 32, 32, 8, 128, 14336, 128256), 4, 60),
        "7B": Shape((4096, 32, 32, 32, 128, 11008, 32000), 4, 50),
    },
    linears=((4096, 4096), (28672, 4096), (4096, 14336), (2048, 2048), (16384, 2048), (128256, 4096)),
    vocabularies=(128256, 32000), head_width=4096, attention=(32, 8, 128), contexts=(100, 2000, 16000), slots=32768,
    sampled="1B bf16", prompt=512, tokens=256, exact_tokens=2000, repeats=5, cold_bytes=2**29, copy_bytes=2**31,
    kernel_seconds=15,
)  # fmt: skip
TINY = Shapes(
    sections=("environment", *KERNELS, "engine tiny bf16", "engine tiny int8", "engine tiny int4", "baselines tiny"),
    models={"tiny": Shape((64, 4, 4, 2, 16, 128, 256), 1, 0)},
    linears=((96, 64),), vocabularies=(250,), head_width=64, attention=(4, 2, 16), contexts=(20,), slots=64,
    sampled="tiny bf16", prompt=12, tokens=8, exact_tokens=24, repeats=1, cold_bytes=2**14, copy_bytes=2**20,
    kernel_seconds=0,
)  # fmt: skip


class Report:
    """The results on their way to the JSON file; `section` is the part that is being filled."""

    def __init__(self, flags: argparse.Namespace, shapes: Shapes, path: Path):
        self.device, self.shapes, self.path = flags.device, shapes, path
        self.deadline = time.perf_counter() + 60 * flags.minutes
        self.bandwidth: float | None = None  # bytes/s of a copy, read and written
        sections = {name: {"status": "not reached"} for name in flags.sections}
        self.result = cli.environment() | {"config": vars(flags), "sections": sections}
        self.section: dict = {}

    def run(self, name: str) -> None:
        """Run one section if there is time, whatever comes of it, and write the file."""
        kind, *what = name.split()
        model = self.shapes.models.get(what[0]) if what else None
        needed = model.seconds if model else self.shapes.kernel_seconds if kind == "kernels" else 0
        start = time.perf_counter()
        if start + needed >= self.deadline:
            return
        self.section = self.result["sections"][name]
        self.section |= {"status": "running", "checks": [], "rows": [], "skipped": {}, "notices": []}
        cli.write_json(self.path, self.result)
        try:
            SECTIONS[kind](self, *what)
            self.section["status"] = "done"
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.section |= {"status": "failed", "message": message}
            cli.notice(f"{name} failed: {message}")
        free_memory(self.device)  # only now: the exception holds the frames that hold the model
        self.section["seconds"] = time.perf_counter() - start
        cli.write_json(self.path, self.result)
        print_section(name, self.section)

    def check(self, name: str, ok: bool, **numbers) -> None:
        self.section["checks"].append({"name": name, "ok": bool(ok)} | numbers)

    def within(self, name: str, error: Tensor | float, bound: float) -> None:
        error = float(error)
        self.check(name, error <= bound, error=error, bound=bound)  # a NaN fails

    def same_rows(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Check that each pair has the same bits. torch's CPU operators promise none: there, that it is close."""
        same = torch.equal if self.device == "cuda" else functools.partial(torch.allclose, rtol=0.02, atol=0.02)
        self.check(name, all(same(a, b) for a, b in pairs))

    def row(self, **values) -> None:
        self.section["rows"].append(values)

    def time(self, op: str, shape: str, rows: int, read: int, calls: list[Callable], torch_calls=()) -> None:
        """Time a kernel that reads `read` bytes; torch_calls: what torch has for the same, to stand beside it."""
        took = seconds_per_call(calls, self.device)
        torch_us = 1e6 * seconds_per_call(torch_calls, self.device) if torch_calls else None
        self.row(op=op, shape=shape, rows=rows, us=1e6 * took, bytes=read, share_of_bandwidth=self.share(read / took),
                 torch_us=torch_us)  # fmt: skip

    def share(self, bytes_per_s: float) -> float | None:
        return bytes_per_s / self.bandwidth if self.bandwidth else None

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def free_memory(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()  # compiled functions keep the memory of their graphs
    if device == "cuda":
        torch.cuda.empty_cache()


def elapsed(run: Callable[[], object], device: str) -> float:
    """Seconds that `run` takes the GPU, by CUDA events; on a CPU, of wall time."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds_per_call(calls: list[Callable[[], object]], device: str) -> float:
    """Median seconds of a call, all of them one after the other in a CUDA graph, at least LAUNCHES in turns."""
    calls = list(itertools.islice(itertools.cycle(calls), max(LAUNCHES, len(calls))))

    def run():
        for call in calls:
            call()

    if device == "cuda":
        calls[0]()  # compiles, and allocates what may not be allocated during capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    run()
    return statistics.median(elapsed(run, device) for _ in range(REPEATS)) / len(calls)


def relative_error(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs() + expected.square().mean().sqrt()
    return ((found.double() - expected).abs() / scale).max().item()


def load_kernels() -> None:
    if reason := gpu.load():
        raise RuntimeError(reason)


# ---- environment and kernels ----


def check_environment(report: Report) -> None:
    """Name the GPU and measure how fast it copies: the ceiling of everything below."""
    source = torch.empty(report.shapes.copy_bytes, dtype=torch.uint8, device=report.device).fill_(1)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    report.bandwidth = 2 * source.nbytes / statistics.median(elapsed(copy, report.device) for _ in range(REPEATS))
    values = {"gpu": None, "cuda": torch.version.cuda, "copy_GB_per_s": report.bandwidth / 1e9}
    if report.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count,
                   "memory_GB": properties.total_memory / 1e9}  # fmt: skip
    versions = report.result["versions"]
    report.row(**values, **{name: versions[name] for name in ("python", "torch", "triton", "transformers")})


def check_kernels(report: Report, op: str) -> None:
    """Check one op against fp64 and its rows against each other, and time it on weights that the L2 does not hold."""
    load_kernels()
    if op == "exit_head":
        for vocabulary, mode in itertools.product(report.shapes.vocabularies, ("bf16", "int8")):
            check_exit_head(report, vocabulary, mode)
    elif op == "attention":
        check_attention(report)
    else:
        for n, k in report.shapes.linears:
            check_linear(report, op, n, k)


def make_weights(report: Report, n: int, k: int, mode: str, spread: float) -> tuple[list[tuple], Tensor]:
    """Copies of a random weight and its scale (None in bf16) that together outgrow the L2; and the weight in fp64."""
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
        calls = [functools.partial(kernel, x[:m], *each) for each in arguments]
        torch_calls = [functools.partial(F.linear, x[:m], *each) for each in arguments] if mode == "bf16" else ()
        report.time(op, shape, m, nbytes(weights[0]), calls, torch_calls)


def check_exit_head(report: Report, vocabulary: int, mode: str) -> None:
    """The exit head, greedy and sampling. Its logits are rounded to bf16: a token may be nearly the largest."""
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
    found = {m: call(0, m, weights[0]) for m in ROWS}
    tokens, stats, samples = found[16]
    for name, scores, chosen in (("tokens", logits, tokens), ("samples", logits / temperature + noise, samples)):
        gap = scores.max(-1).values - scores.gather(-1, chosen[:, None])[:, 0]
        report.within(f"exit_head {shape}: {name} below the largest", (gap / logits.abs().amax()).max(), 4 * BOUND)
    expected = exit_stats_reference(logits.bfloat16().float())
    report.within(f"exit_head {shape}: statistics", (stats - torch.stack(expected[1:], -1)).abs().max(), 0.02)
    alone = [(a, b[i : i + 1]) for m in ROWS for i in {0, m - 1}
             for a, b in zip(call(i, i + 1, weights[0]), found[m], strict=True)]  # fmt: skip
    report.same_rows(f"exit_head {shape}: a row alone has the bits of the row among 8 and 16", alone)
    del exact
    for sampling, m in itertools.product((False, True), ROWS):
        calls = [functools.partial(call, 0, m, each, sampling) for each in weights]
        report.time("exit_head" + " sampling" * sampling, shape, m, nbytes(weights[0]), calls)


def check_attention(report: Report) -> None:
    """Attention over a long cache that is partly filled. Short contexts fit the L2, whatever takes turns."""
    shapes, kernel = report.shapes, torch.ops.skipfast.decode_attention
    heads, groups, width = shapes.attention
    copies = math.ceil(4 * shapes.cold_bytes / (4 * groups * shapes.slots * width))
    caches = [tuple(report.random(groups, shapes.slots, width) for _ in range(2)) for _ in range(copies)]
    for context, m in itertools.product(shapes.contexts, (1, 8)):
        positions = torch.arange(context - m, context, device=report.device)
        q, k, v = report.random(m, heads, width), report.random(m, groups, width), report.random(m, groups, width)
        out = kernel(q, k, v, *caches[0], positions)
        used = [cache[:, :context].double() for cache in caches[0]]
        expected = attention_reference(q.double(), k.double(), v.double(), *used, positions)
        shape = f"{heads}/{groups}/{width} context {context} rows {m}"
        report.within(f"attention {shape}: error", relative_error(out, expected), 2 * BOUND)
        written = all(torch.equal(cache[:, positions], new.transpose(0, 1))
                      for cache, new in zip(caches[0], (k, v), strict=True))  # fmt: skip
        report.check(f"attention {shape}: keys and values are in the cache", written)
        alone = [(kernel(q[one], k[one], v[one], *caches[0], positions[one]), out[one])
                 for one in (slice(i, i + 1) for i in range(m))]  # fmt: skip
        report.same_rows(f"attention {shape}: a row alone has the same bits", alone)
        calls = [functools.partial(kernel, q, k, v, *cache, positions) for cache in caches]
        report.time("attention", shape, m, 4 * context * groups * width, calls)


# ---- models ----


def make_model(args: ModelArgs, device: str) -> Transformer:
    """A bf16 model with random weights, made on the device: residual updates of unit scale, peaked attention."""
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    queries_and_keys = (args.n_head + args.n_kv_head) * args.head_dim
    model.embedding.weight.normal_(generator=random)
    for layer in model.layers:
        layer.attention_norm.weight.fill_(1)
        layer.mlp_norm.weight.fill_(1)
        layer.attention.wqkv.weight.normal_(0, args.dim**-0.5, generator=random)
        layer.attention.wqkv.weight[:queries_and_keys] *= math.sqrt(2.0)
        layer.mlp.w13.weight.normal_(0, args.dim**-0.5, generator=random)
    model.norm.weight.fill_(1)
    model.lm_head.weight.normal_(0, 4 * args.dim**-0.5, generator=random)
    fill_outputs(model, args.n_layer, 1.0)
    return model


def fill_outputs(model: Transformer, exit_layer: int, eps: float) -> None:
    """Fill what layers write into the residual stream: the same noise every time, times eps behind exit_layer."""
    random = torch.Generator(model.norm.weight.device)
    for index, layer in enumerate(model.layers):
        random.manual_seed(1 + index)
        for weight in (layer.attention.wo.weight, layer.mlp.w2.weight):
            gain = eps if index >= exit_layer else 1.0
            weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=random)


def set_dial(model: Transformer, exit_layer: int, steps: int = 6, positions: int = 256) -> dict:
    """Weaken the layers behind the exit until its argmax is the model's at about AGREEMENT of random positions."""
    device, n_layer = model.norm.weight.device, model.args.n_layer
    random = torch.Generator(device).manual_seed(2)
    tokens = torch.randint(model.args.vocab_size, (positions,), device=device, generator=random)
    model.setup_cache(positions)

    def agreement(eps: float) -> float:
        fill_outputs(model, exit_layer, eps)
        same = []
        for slots in torch.arange(positions, device=device).split(PREFILL_CHUNK):
            early = model.run_layers(model.embed(tokens[slots]), slots, 0, exit_layer)
            late = model.run_layers(early, slots, exit_layer, n_layer)
            same.append(model.head(early).argmax(-1) == model.head(late).argmax(-1))
        return torch.cat(same).float().mean().item()

    low, high, eps = 0.0, 1.0, 0.15
    for step in range(steps):
        found = agreement(eps)
        if abs(found - AGREEMENT) <= 0.02 or step == steps - 1:
            break
        low, high = (eps, high) if found > AGREEMENT else (low, eps)
        eps = (low + high) / 2 if high < 1 else min(1.0, 2 * eps)
    return {"eps": eps, "agreement": found}


def quantise_model(model: Transformer, mode: str) -> None:
    """int8, or int4 with an int8 head: the exit head kernel takes bf16 and int8."""
    if mode == "bf16":
        return
    group = int4_group(math.gcd(model.args.dim, model.args.ffn_dim))
    quantise(model, {"int8": "int8", "int4": f"int4:group={group},lm_head=no"}[mode])
    if mode == "int4":
        weight, scale = quantise_int8(model.lm_head.weight.data)
        model.lm_head.weight, model.lm_head.scale = nn.Parameter(weight, requires_grad=False), scale


def weight_bytes(*modules: nn.Module) -> int:
    return sum(nbytes((*module.parameters(), *module.buffers())) for module in modules)


def random_prompt(vocab_size: int, length: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(3)).tolist()


# ---- the engine ----


def check_engine(report: Report, name: str, mode: str) -> None:
    """Speed and exactness of plain and speculative decoding, through one runner."""
    load_kernels()
    shapes, shape, device = report.shapes, report.shapes.models[name], report.device
    model = make_model(shape.args, device)
    report.section["dial"] = set_dial(model, shape.exit_layer)
    quantise_model(model, mode)
    free_memory(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    length = shapes.prompt + shapes.exact_tokens
    notice = report.section["notices"].append
    runner = Runner(model, length, 1 + max(DRAFTS), compile=device == "cuda", notice=notice)
    start = time.perf_counter()
    runner.warm_up()
    report.section |= {"backend": runner.backend, "warm_up_s": time.perf_counter() - start}
    prompt = random_prompt(shape.args.vocab_size, shapes.prompt)
    texts = ("none", *(f"static:{shape.exit_layer},num_draft_tokens={k}" for k in DRAFTS))

    def run(text: str, count: int, sampling: SamplingConfig = SamplingConfig()) -> Generation:  # noqa: B008
        policy = make_policy(text, shape.args.n_layer)
        return Generation.collect(decode(runner, prompt, GenerateConfig(count, sampling), policy))

    settings = {"greedy": SamplingConfig()}
    if f"{name} {mode}" == shapes.sampled:
        settings["sampled"] = SamplingConfig(temperature=0.8, seed=1)
    plain = {}
    for setting, sampling in settings.items():
        plain[setting] = run("none", shapes.exact_tokens, sampling).tokens
        for text in texts[1:]:
            found = run(text, shapes.exact_tokens, sampling).tokens
            report.check(f"exact: {name} {mode} {text} {setting}", found == plain[setting])
    report.section["distinct_share"] = len(set(plain["greedy"])) / len(plain["greedy"])  # small: the text is a loop
    runs = {text: [] for text in texts}
    for turn, text in itertools.product(range(shapes.repeats + 1), texts):
        generation = run(text, shapes.tokens)
        if turn:
            runs[text].append(generation)
    for text, generations in runs.items():
        same = all(generation.tokens == plain["greedy"][: shapes.tokens] for generation in generations)
        report.check(f"repeatable: {name} {mode} {text}", same)
        report.row(**speed_row(report, model, text, runs, shape.exit_layer))
    report.section["memory"] = memory(model, device)
    for row in report.section["rows"]:  # last: the profiler is not ours
        policy = make_policy(row["policy"], shape.args.n_layer)
        row |= device_profile(decode(runner, prompt, GenerateConfig(shapes.tokens // 4), policy), device)


def speed_row(
    report: Report, model: Transformer, text: str, runs: dict[str, list[Generation]], exit_layer: int
) -> dict:  # fmt: skip
    """Speed over plain decoding in the same turn, beside what the weight bytes alone would make of it."""
    rates = [generation.tokens_per_s for generation in runs[text]]
    summary = runs[text][-1].summary(model)  # the tokens, and so these numbers, are the same in each run
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[text], runs["none"], strict=True)]
    speedup, rate = statistics.median(ratios), statistics.median(rates)
    head, layers = weight_bytes(model.lm_head), weight_bytes(model.layers)
    draft = weight_bytes(*model.layers[:exit_layer]) + head
    read = (summary["drafted"] * draft + summary["rounds"] * (layers + head)) / (len(summary["tokens"]) - 1)
    return {
        "policy": text, "tokens_per_s": rate, "tokens_per_s_runs": rates, "speedup": speedup,
        "acceptance_rate": summary["acceptance_rate"], "tokens_per_round": summary["tokens_per_round"],
        "ideal_speedup": summary["ideal_speedup"], "share_of_ideal": speedup / summary["ideal_speedup"],
        "weight_bytes_per_token": read, "share_of_bandwidth": report.share(read * rate),
        "prefill_ms": 1e3 * statistics.median(generation.prefill.seconds for generation in runs[text]),
        "round_us": 1e6 * statistics.median(g.decode_s / len(g.rounds) for g in runs[text]),
    }  # fmt: skip


def device_profile(stream, device: str) -> dict:
    """Where a round's time goes: GPU kernels and their starts, and the GPU waiting for Python between them.

    A round that the runner started ahead of the text's end is counted with the others.
    """
    next(stream)  # the prefill
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        rounds = len(list(stream))
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    spans = sorted((event.time_range.start, event.time_range.end) for event in profile.events()
                   if event.device_type == kind and not event.is_user_annotation)  # fmt: skip
    if not spans or not rounds:
        return {"kernels_per_round": None, "device_us_per_round": None, "host_us_per_round": None}
    waiting, end = 0.0, spans[0][0]
    for start, stop in spans:
        waiting += start - end if start - end > GAP_US else 0.0
        end = max(end, stop)
    busy = end - spans[0][0] - waiting
    return {"kernels_per_round": len(spans) / rounds, "device_us_per_round": busy / rounds,
            "host_us_per_round": waiting / rounds}  # fmt: skip


def memory(model: Transformer, device: str) -> dict:
    cache = sum(nbytes((layer.attention.k_cache, layer.attention.v_cache)) for layer in model.layers)
    weights = weight_bytes(model)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"weights_bytes": weights, "cache_bytes": cache, "peak_bytes": peak,
            "peak_over_needed": peak / (weights + cache) if peak else None}  # fmt: skip


# ---- baselines ----


def check_baselines(report: Report, name: str) -> None:
    """What others do with the same shape in bf16, decoding plainly: torch.compile alone, and transformers."""
    args, shapes = report.shapes.models[name].args, report.shapes
    rate = compiled_rate(make_model(args, report.device), shapes)
    free_memory(report.device)
    report.row(engine="torch.compile reduce-overhead", model=name, tokens_per_s=rate)
    if importlib.util.find_spec("transformers") is None:
        report.section["skipped"]["transformers"] = "not installed: pip install transformers"
        cli.notice(f"transformers skipped: {report.section['skipped']['transformers']}")
        return
    rates = transformers_rates(args, shapes, report.device)
    report.row(engine="transformers, static cache", model=name, tokens_per_s=statistics.median(rates))


def compiled_rate(model: Transformer, shapes: Shapes) -> float:
    """Tokens/s of one compiled decoding step, with torch's own operators, the position staying where it is."""
    device = model.norm.weight.device
    model.setup_cache(shapes.prompt + shapes.tokens)
    for layer in model.layers:  # else the graph would copy, or refuse, what it changes
        torch._dynamo.mark_static_address(layer.attention.k_cache)
        torch._dynamo.mark_static_address(layer.attention.v_cache)
    how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "eager"}
    with mock.patch.object(gpu, "supports", lambda rows: False):
        step = torch.compile(lambda token, position: model(token, position).argmax(-1), fullgraph=True, **how)
        token, position = torch.tensor([1], device=device), torch.tensor([shapes.prompt], device=device)

        def run():
            nonlocal token
            for _ in range(shapes.tokens):
                token = step(token, position).clone()
            return token.tolist()

        run()
        run()
        return shapes.tokens / statistics.median(elapsed(run, device.type) for _ in range(3))


def transformers_rates(args: ModelArgs, shapes: Shapes, device: str) -> list[float]:
    """Tokens/s of generate() with its static cache, which it compiles on a GPU; a prefill of 8 tokens is counted."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, head_dim=args.head_dim,
        num_hidden_layers=args.n_layer, num_attention_heads=args.n_head, num_key_value_heads=args.n_kv_head,
        max_position_embeddings=args.max_seq_len, rms_norm_eps=args.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.tensor([random_prompt(args.vocab_size, 8)], device=device)

    def run():
        count = shapes.tokens
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                             min_new_tokens=count, cache_implementation="static")  # fmt: skip
        return out.tolist()

    run()
    return [shapes.tokens / elapsed(run, device) for _ in range(3)]


SHORT = {
    "tokens_per_s": "tokens/s", "acceptance_rate": "accepted", "tokens_per_round": "a round", "ideal_speedup": "ideal",
    "share_of_ideal": "of ideal", "share_of_bandwidth": "of copy", "prefill_ms": "prefill ms", "round_us": "round µs",
    "kernels_per_round": "kernels", "device_us_per_round": "device µs", "host_us_per_round": "host µs", "us": "µs",
    "torch_us": "torch µs",
}  # fmt: skip
SECTIONS = {
    "environment": check_environment, "kernels": check_kernels, "engine": check_engine, "baselines": check_baselines,
}  # fmt: skip

# ---- the program ----


def print_section(name: str, section: dict) -> None:
    """A table of the rows, numbers with as many digits as they deserve, and a line for each check that failed."""
    def text(value) -> str:
        if isinstance(value, float):
            return format(value, ".3g" if abs(value) < 100 else ".0f")
        return "–" if value is None else str(value).replace("num_draft_tokens", "K")

    hidden = {"bytes", "weight_bytes_per_token", "tokens_per_s_runs"}
    columns = [column for column in next(iter(section["rows"]), {}) if column not in hidden]
    titles = [SHORT.get(column, column) for column in columns]
    passed, count = sum(check["ok"] for check in section["checks"]), len(section["checks"])
    title = f"{name}: {section['status']}, {passed} of {count} checks passed, {section['seconds']:.0f} s"
    cli.print_table(title, titles, [[text(row.get(column)) for column in columns] for row in section["rows"]])
    for check in section["checks"]:
        if not check["ok"]:
            print(f"FAILED {check['name']}", *(f"{key} {check[key]:.2g}" for key in ("error", "bound") if key in check))


def free_path(folder: str, device: str) -> Path:
    """A file name that no earlier run has."""
    name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if device == "cuda" else "cpu"
    stem = f"gpu_{name}_{datetime.date.today().isoformat()}"
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := Path(folder) / f"{stem}{ending}.json").exists())


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the program itself")
    parser.add_argument("--shapes", default="full", choices=["full", "tiny"])
    parser.add_argument("--minutes", type=float, default=8.0, help="no section starts that would end later")
    parser.add_argument("--sections", metavar="NAME,…", help='only those that begin so, as in "kernels,engine 8B"')
    parser.add_argument("--output_dir", default="benchmarks", metavar="DIR")
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no CUDA device here; --device cpu --shapes tiny tries the program")
    if not flags.minutes > 0:
        raise ValueError(f"minutes must be more than 0, got {flags.minutes}")
    known = (FULL if flags.shapes == "full" else TINY).sections
    wanted = tuple(flags.sections.split(",")) if flags.sections else known
    for start in wanted:
        if not any(name.startswith(start) for name in known):
            raise ValueError(f"sections are {', '.join(known)}; got {start!r}")
    flags.sections = [name for name in known if name.startswith(("environment", *wanted))]  # it has the ceiling
    return flags


def main() -> None:
    flags = parse_flags()
    cli.make_folder(flags.output_dir)
    path = free_path(flags.output_dir, flags.device)
    cli.check_writable(str(path))
    report = Report(flags, FULL if flags.shapes == "full" else TINY, path)
    torch.manual_seed(0)
    for name in flags.sections:
        report.run(name)
    cli.write_json(path, report.result)
    sections = report.result["sections"]
    not_reached = [name for name, section in sections.items() if section["status"] == "not reached"]
    failed = [name for name, section in sections.items() if section["status"] == "failed"]
    checks = [check for section in sections.values() for check in section.get("checks", ())]
    wrong = [check["name"] for check in checks if not check["ok"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed; written to {path}")
    for title, names in (("not reached", not_reached), ("sections failed", failed), ("checks failed", wrong)):
        if names:
            print(f"{title}: {', '.join(names)}")
    if failed or wrong:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
