"""The baseline sections of `gpu_check`: plain decoding by others, of the same shape in bf16."""

import importlib.util
import inspect
import statistics
from unittest import mock

import torch

import cli
from kernels import gpu
from model import ModelArgs, Transformer
from scripts.gpu_check.models import make_model, random_prompt
from scripts.gpu_check.report import Report, elapsed, free_memory
from scripts.gpu_check.shapes import Shapes

RUNS = 3
TRANSFORMERS_PROMPT = 8


def check_baselines(report: Report, name: str) -> None:
    """Measure torch.compile alone, and transformers, whose prefill of a few tokens is counted."""
    args = report.shapes.models[name].args
    add(report, name, "torch.compile reduce-overhead", compiled_rate, args, report.shapes, report.device)
    if importlib.util.find_spec("transformers") is None:
        report.section["skipped"]["transformers"] = "not installed: pip install transformers"
        cli.notice(f"transformers skipped: {report.section['skipped']['transformers']}")
        return
    add(report, name, "transformers, static cache", transformers_rate, args, report.shapes, report.device)


def add(report: Report, name: str, engine: str, measure, *arguments) -> None:
    """Add a row of what `measure` returns, beside our own plain decoding, if that has been measured."""
    numbers = report.attempt(engine, measure, *arguments)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]  # above 0: it was not at its best
    torch._dynamo.utils.counters.clear()
    free_memory(report.device)
    if numbers is None:
        return
    ours = report.result["sections"].get(f"engine {name} bf16", {}).get("rows") or [{}]
    rate = ours[0].get("tokens_per_s")
    over = rate / numbers["tokens_per_s"] if rate else None
    report.row(engine=engine, model=name, **numbers, cudagraph_skips=skipped, ours_over_it=over)


def compiled_rate(args: ModelArgs, shapes: Shapes, device: str) -> dict:
    """Measure tokens/s of one compiled decoding step, with torch's own operators, at one position."""
    model = make_model(args, device)
    model.setup_cache(shapes.prompt + shapes.tokens)
    for layer in model.layers:  # else the graph would copy, or refuse, what it changes
        torch._dynamo.mark_static_address(layer.attention.k_cache)
        torch._dynamo.mark_static_address(layer.attention.v_cache)
    with mock.patch.object(gpu, "supports", lambda rows: False):
        return {"tokens_per_s": step_rate(model, shapes, device), "compiled": True}


def step_rate(model: Transformer, shapes: Shapes, device: str) -> float:
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    step = torch.compile(lambda token, position: model(token, position).argmax(-1), fullgraph=True, **how)
    token, position = torch.tensor([1], device=device), torch.tensor([shapes.prompt], device=device)

    def run():
        nonlocal token
        for _ in range(shapes.tokens):
            token = step(token, position).clone()  # the graph writes the next one to the same place
        return token.tolist()

    run()
    run()
    return shapes.tokens / statistics.median(elapsed(run, device) for _ in range(RUNS))


def transformers_rate(args: ModelArgs, shapes: Shapes, device: str) -> dict:
    """Measure tokens/s of generate() with one static cache, for which it compiles its model on a GPU.

    The cache is kept between calls: with a new one, some versions of torch would compile each time.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        head_dim=args.head_dim,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_kv_head,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.tensor([random_prompt(args.vocab_size, TRANSFORMERS_PROMPT)], device=device)
    cache = transformers.StaticCache(config=config, max_cache_len=TRANSFORMERS_PROMPT + shapes.tokens)
    known = inspect.signature(model.forward).parameters
    caches = {"cache" if "cache" in known else "past_key_values": cache}  # renamed within version 5

    def run():
        if cache.get_seq_length():
            cache.reset()
        count = shapes.tokens
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            **caches,
        )
        return out.tolist()

    if len(run()[0]) != TRANSFORMERS_PROMPT + shapes.tokens:
        raise RuntimeError("transformers ended the text early")
    rate = shapes.tokens / statistics.median(elapsed(run, device) for _ in range(RUNS))
    return {"tokens_per_s": rate, "compiled": hasattr(model, "_compiled_call")}
