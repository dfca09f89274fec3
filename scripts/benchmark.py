"""Measure decoding speed: policies against our own fastest plain decoding, and against transformers, in one process.

Every round runs every row on every prompt, row after row in a new order for each prompt; a row's tokens/s is the median
over rounds, a speedup the median of the ratios inside a round. The ceiling (memory bandwidth, measured in the same
process) is printed before anything is timed.
"""

import argparse
import importlib.util
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from generate import GenerateConfig, Generation, check_prompt, decode, head_cost_layers, ideal_speedup
from policies import DraftPolicy, make_policy
from runner import MAX_ROWS, Runner

PROMPTS = (  # none ends in white space: a tokenizer may join it with what follows
    'def read_config(path):\n    """',
    "import os\nimport sys\n\ndef main():",
    "class Node:\n    def __init__(self, value",
    "    def test_empty(self):",
    '"""This module provides access to',
    "for line in lines:\n    if line.startswith(",
    "    try:\n        import json\n    except ImportError:",
    "def parse_args(argv=None):\n    parser =",
)


@dataclass
class Contender:
    """One row: something that continues a prompt. `run(prompt)` returns (tokens, decode seconds, summary)."""

    engine: str
    policy: str
    compiled: bool
    run: Callable[[list[int]], tuple[list[int], float, dict]]
    backend: str = "eager"
    exact: bool = True
    rates: list[float] = field(default_factory=list)  # tokens/s of each round
    texts: list[list[int]] = field(default_factory=list)  # of the last round, by prompt
    summaries: list[dict] = field(default_factory=list)

    @property
    def is_ar(self) -> bool:
        return self.engine == "skipfast" and self.policy == "none"


def read_bandwidth(gib: float = 1.0, repeats: int = 5) -> float:
    """Bytes/s at which torch sums a buffer far larger than the caches: a floor of the memory's read bandwidth."""
    buffer = torch.ones(int(gib * 2**28), dtype=torch.float32)
    buffer.sum()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def skipfast_contender(
    session: cli.Session, runner: Runner, policy: DraftPolicy, name: str, config: GenerateConfig, exact: bool = True
) -> Contender:
    def run(prompt):
        generation = Generation.collect(decode(runner, prompt, config, policy))
        return generation.tokens, generation.decode_s, generation.summary(session.model)

    return Contender("skipfast", name, runner.compiled, run, runner.backend, exact)


def check_peers(peers: list[str], session: cli.Session) -> None:
    """Raise ValueError now for a peer that could not run later."""
    if "transformers" in peers and importlib.util.find_spec("transformers") is None:
        raise ValueError("--against transformers needs the optional package: pip install transformers")
    if "transformers" in peers and session.source.fused:
        raise ValueError("--against transformers needs a Hugging Face folder; this checkpoint is in our own format")


def transformers_contender(session: cli.Session, new_tokens: int, most_threads: int) -> Contender:
    """transformers' generate on the same folder and precision, greedy; its prefill is timed and taken off.

    It runs with 1 thread or with all, whichever is faster for it.
    """
    import transformers  # optional: check_peers has seen that it is there

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weight = session.model.norm.weight
    model = transformers.AutoModelForCausalLM.from_pretrained(session.source.folder, dtype=weight.dtype)
    model = model.eval().to(weight.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(ids, count):
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count
        )
        return out[0, ids.shape[1] :].tolist(), time.perf_counter() - start

    @torch.inference_mode()
    def run(prompt, count=new_tokens):
        ours = torch.get_num_threads()
        torch.set_num_threads(threads)
        ids = torch.tensor([prompt], device=weight.device)
        _, first = generate(ids, 1)
        tokens, whole = generate(ids, count)
        torch.set_num_threads(ours)
        return tokens, whole - first, {}

    took = {}
    for threads in (1, most_threads):
        run([1, 2, 3], 4)
        took[threads] = min(run([1, 2, 3], 8)[1] for _ in range(3))
    threads = min(took, key=took.get)
    return Contender("transformers", "none", False, run, exact=False)


def make_contenders(
    session: cli.Session, flags: argparse.Namespace, config: GenerateConfig, length: int
) -> list[Contender]:
    """Every row that the flags ask for; plain decoding, eager and compiled, is always among them."""
    n_layer = session.args.n_layer
    names = [name for name in flags.policy or [f"static:{max(1, n_layer // 4)}"] if name != "none"]
    policies = {name: make_policy(name, n_layer, num_draft_tokens=flags.num_draft_tokens) for name in names}
    model = session.model
    model.setup_cache(length + MAX_ROWS)  # one cache for all runners
    runners: dict[tuple, Runner] = {}

    def runner(width, compile, exact=True):
        key = (width, compile, exact)
        if key not in runners:
            runners[key] = Runner(model, length, width, compile, exact, cli.notice)
        return runners[key]

    found = []
    for compile in (True, False) if flags.compile else (False,):
        found.append(skipfast_contender(session, runner(1, compile), make_policy("none", n_layer), "none", config))
        if not runner(1, compile).rows_independent:  # padding costs time: plain decoding is faster without
            unpadded = runner(1, compile, exact=False)
            plain = make_policy("none", n_layer)
            found.append(skipfast_contender(session, unpadded, plain, "none", config, exact=False))
    most_threads = torch.get_num_threads()
    if found[0].backend == "c++" and flags.threads is None:
        runner(1, True).choose_threads()
    for name, policy in policies.items():
        wide = runner(1 + policy.num_draft_tokens, flags.compile)
        found.append(skipfast_contender(session, wide, policy, name, config))
    for peer in flags.against:
        found.append({"transformers": transformers_contender}[peer](session, flags.max_new_tokens, most_threads))
    for each in runners.values():
        each.warm_up()
    return found


def measure(contenders: list[Contender], prompts: list[list[int]], repeats: int, seed: int) -> None:
    """One warm-up round, then `repeats` timed ones. Fills rates, texts and summaries of each contender.

    Contenders take turns prompt by prompt, so that a slow second of the machine hits all of them.
    """
    order, shuffled = list(contenders), random.Random(seed)
    for turn in tqdm(range(repeats + 1), desc="rounds", leave=False):
        results = {id(contender): [] for contender in contenders}
        for prompt in prompts:
            shuffled.shuffle(order)
            for contender in order:
                results[id(contender)].append(contender.run(prompt))
        for contender in contenders:
            texts, seconds, contender.summaries = map(list, zip(*results[id(contender)], strict=True))
            contender.texts = texts
            if turn:
                contender.rates.append(sum(len(text) - 1 for text in texts) / sum(seconds))


def result_rows(contenders: list[Contender], session: cli.Session, bandwidth: float) -> list[dict]:
    """The `rows` of the JSON file, one a contender."""
    model = session.model
    fastest = max((c for c in contenders if c.is_ar), key=lambda c: statistics.median(c.rates))
    reference = next(c for c in contenders if c.is_ar and c.exact).texts
    rows = []
    for c in contenders:
        totals = {key: sum(s[key] for s in c.summaries) for key in ("drafted", "accepted", "rounds")} if c.summaries[
            0] else {}  # fmt: skip
        drafted, rounds = totals.get("drafted", 0), totals.get("rounds", 0)
        acceptance = totals["accepted"] / drafted if drafted else None
        exit_layer = statistics.mean(s["mean_exit_layer"] for s in c.summaries) if drafted else None
        emitted = sum(len(text) - 1 for text in c.texts)
        rate = statistics.median(c.rates)
        rows.append({
            "engine": c.engine,
            "policy": c.policy,
            "precision": str(model.norm.weight.dtype).removeprefix("torch."),
            "quantize": "none",
            "compiled": c.compiled,
            "backend": c.backend,
            "exact_width": c.exact,
            "tokens_per_s": rate,
            "tokens_per_s_rounds": c.rates,
            "speedup_over_fastest_ar": statistics.median(
                a / b for a, b in zip(c.rates, fastest.rates, strict=True)),
            "acceptance_rate": acceptance,
            "tokens_per_round": emitted / rounds if rounds else None,
            "mean_exit_layer": exit_layer,
            "ideal_speedup": ideal_speedup(
                acceptance, drafted / rounds, exit_layer, model.args.n_layer, head_cost_layers(model),
            ) if drafted else 1.0,
            "share_of_bandwidth": streamed_bytes(c, session, drafted, rounds, exit_layer, emitted) * rate / bandwidth,
            "identical": c.texts == reference,
        })  # fmt: skip
    return rows


def streamed_bytes(c: Contender, session: cli.Session, drafted: int, rounds: int, exit_layer, emitted: int) -> float:
    """Weight bytes read per emitted token: k drafts of E layers and the head, the last draft's E layers, one pass."""
    model = session.model
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    head = model.lm_head.weight.nbytes
    full = model.args.n_layer * layer + head
    if not drafted:
        return full
    return (drafted * (exit_layer * layer + head) + rounds * full) / emitted


def read_prompts(path: str | None, session: cli.Session) -> list[list[int]]:
    """Prompts as token ids: lines of a .txt, `prompt` of a .jsonl, `ids` of a .json list, or built-in ones."""
    if path is None:
        return [session.tokenizer.encode(prompt) for prompt in PROMPTS]
    text = cli.read_text(path)
    encode = session.tokenizer.encode
    try:
        if path.endswith(".json"):
            prompts = [[int(token) for token in row["ids"]] for row in json.loads(text)]
        elif path.endswith(".jsonl"):
            prompts = [encode(json.loads(line)["prompt"]) for line in text.splitlines() if line.strip()]
        else:
            prompts = [encode(line) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the prompts expected ({type(error).__name__}: {error})") from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def print_rows(rows: list[dict], title: str) -> None:
    form = cli.shown
    body = [
        [
            row["engine"], row["policy"] + ("" if row["exact_width"] or row["engine"] != "skipfast" else " (inexact)"),
            "yes" if row["compiled"] else "no", form(row["tokens_per_s"]),
            form(row["speedup_over_fastest_ar"], ".2f") + "×", form(row["acceptance_rate"], ".2f"),
            form(row["tokens_per_round"], ".2f"), form(row["ideal_speedup"], ".2f") + "×",
            form(100 * row["share_of_bandwidth"], ".0f") + " %", "yes" if row["identical"] else "no",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("engine", "policy", "compiled", "tokens/s", "over fastest AR", "acceptance", "tokens/round", "ideal",
               "bandwidth", "identical")  # fmt: skip
    cli.print_table(title, columns, body)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark", description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.benchmark --policy static:3 --policy static:4 --against transformers",
    )  # fmt: skip
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    parser.add_argument("--policy", action="append", metavar="NAME:key=value,…", help="repeatable; default static:L/4")
    parser.add_argument("--prompts", metavar="FILE", help=".txt (a line each), .jsonl (`prompt`) or .json (`ids`)")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="only the first N")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--against", default=[], type=lambda text: text.split(","), help="transformers")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir", metavar="DIR", help="also write DIR/benchmark.json")
    flags = parser.parse_args(argv)
    flags.ignore_eos = True  # every row must decode the same number of tokens
    if flags.max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be 2 or more to time decoding, got {flags.max_new_tokens}")
    if flags.num_prompts is not None and flags.num_prompts < 1:
        raise ValueError(f"num_prompts must be 1 or more, got {flags.num_prompts}")
    if flags.repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {flags.repeats}")
    if unknown := set(flags.against) - {"transformers"}:
        raise ValueError(f"--against knows transformers, got {', '.join(sorted(unknown))}")
    return flags


def main() -> None:
    flags = parse_flags()
    if flags.output_dir:
        cli.make_folder(flags.output_dir)
    cli.check_writable(flags.json)
    session = cli.open_session(flags)
    check_peers(flags.against, session)
    prompts = read_prompts(flags.prompts, session)[: flags.num_prompts]
    config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
    for prompt in prompts:
        check_prompt(prompt, config, session.args.vocab_size, session.args.max_seq_len)
    before = peak_memory_bytes()
    session.load()
    after = peak_memory_bytes()
    contenders = make_contenders(session, flags, config, max(map(len, prompts)) + flags.max_new_tokens)
    model = session.model
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    full = model.args.n_layer * layer + model.lm_head.weight.nbytes
    bandwidth = read_bandwidth()
    ceiling = bandwidth / full
    print(f"{full / 1e6:.1f} MB of weights a pass at {bandwidth / 1e9:.1f} GB/s: {ceiling:.0f} tokens/s from memory")
    measure(contenders, prompts, flags.repeats, flags.seed)
    rows = result_rows(contenders, session, bandwidth)
    print_rows(rows, f"{Path(flags.checkpoint_path).name}: {len(prompts)} prompts × {flags.max_new_tokens} tokens, "
                     f"median of {flags.repeats}, {torch.get_num_threads()} threads")  # fmt: skip
    cache_bytes = 2 * model.args.n_layer * model.layers[0].attention.k_cache.nbytes
    result = {
        "rows": rows,
        "bandwidth_bytes_per_s": bandwidth,
        "weight_bytes_per_pass": full,
        "weight_bytes": session.weight_bytes,
        "cache_bytes": cache_bytes,
        "peak_memory_bytes": {"before_loading": before, "after_loading": after},
        "config": vars(flags),
        **cli.environment(),
    }
    for path in filter(None, (flags.json, flags.output_dir and Path(flags.output_dir) / "benchmark.json")):
        cli.write_json(path, result)


if __name__ == "__main__":
    cli.run(main)
