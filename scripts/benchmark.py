"""Measure decoding speed: policies against our own fastest plain decoding, and against other engines, in turns.

Every round runs every row on every prompt, row after row in a new order for each prompt; a row's tokens/s is the median
over rounds, a speedup the median of the ratios inside a round. The ceiling (memory bandwidth, measured in the same
process) is printed before anything is timed.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import resource
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from generate import GenerateConfig, Generation, check_prompt, decode, head_cost_layers, ideal_speedup
from policies import DraftPolicy, Static, make_policy
from runner import MAX_ROWS, Runner
from scripts import peers
from scripts.peers import Contender

LENGTH_TOKENS = 32  # decoded after each of --prompt_lengths
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
    def run(prompt, count):
        wanted = dataclasses.replace(config, max_new_tokens=count)
        generation = Generation.collect(decode(runner, prompt, wanted, policy))
        return generation.tokens, generation.decode_s, generation.summary(session.model)

    return Contender("skipfast", name, runner.compiled, run, runner.backend, exact, torch.get_num_threads())


def make_contenders(
    session: cli.Session, flags: argparse.Namespace, config: GenerateConfig, length: int, cleanup: contextlib.ExitStack
) -> list[Contender]:
    """Every row that the flags ask for; plain decoding, eager and compiled, is always among them.

    length: positions that a prompt and its text may take. cleanup: ends what other processes the peers need.
    """
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

    counts = peers.thread_counts(flags)
    if flags.compile and runner(1, True).rows_independent and flags.threads is None:
        runner(1, True).choose_threads()
    found = []
    for compile in (True, False) if flags.compile else (False,):
        found.append(skipfast_contender(session, runner(1, compile), make_policy("none", n_layer), "none", config))
        if not runner(1, compile).rows_independent:  # padding costs time: plain decoding is faster without
            unpadded = runner(1, compile, exact=False)
            plain = make_policy("none", n_layer)
            found.append(skipfast_contender(session, unpadded, plain, "none", config, exact=False))
    for name, policy in policies.items():
        wide = runner(1 + policy.num_draft_tokens, flags.compile)
        found.append(skipfast_contender(session, wide, policy, name, config))
    if "transformers" in flags.against:
        drafting = next((policy for policy in policies.values() if isinstance(policy, Static)), None)
        found += peers.transformers_contenders(session, drafting, counts)
    if "llama.cpp" in flags.against:
        found.append(cleanup.enter_context(contextlib.closing(peers.LlamaCpp(session, length, counts))).contender())
    for each in runners.values():
        each.warm_up()
    return found


def measure(contenders: list[Contender], prompts: list[list[int]], new_tokens: int, repeats: int, seed: int) -> None:
    """One warm-up round, then `repeats` timed ones. Fills rates, texts and summaries of each contender.

    Contenders take turns prompt by prompt, so that a slow second of the machine hits all of them.
    """
    order, shuffled = list(contenders), random.Random(seed)
    for turn in tqdm(range(repeats + 1), desc="rounds", leave=False):
        results = {id(contender): [] for contender in contenders}
        for prompt in prompts:
            shuffled.shuffle(order)
            for contender in order:
                results[id(contender)].append(contender.run(prompt, new_tokens))
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
    own = {c.engine: c.texts for c in contenders if c.policy == "none" and c.engine != "skipfast"}
    own["skipfast"] = reference
    plain = {c.engine: c for c in contenders if c.policy == "none" and c.engine != "skipfast"}
    rows = []
    for c in contenders:
        counted = [summary for summary in c.summaries if "rounds" in summary]  # other engines do not tell
        totals = {key: sum(s[key] for s in counted) for key in ("drafted", "accepted", "rounds")}
        unknown = c.policy != "none" and not counted  # what a drafting peer read, and what it could have gained
        drafted, rounds = totals["drafted"], totals["rounds"]
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
            "threads": c.threads,
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
            ) if drafted else None if unknown else 1.0,
            "share_of_bandwidth": None if unknown else
                streamed_bytes(c, session, drafted, rounds, exit_layer, emitted) * rate / bandwidth,
            "ratio_to": {name: statistics.median(a / b for a, b in zip(c.rates, peer.rates, strict=True))
                         for name, peer in plain.items()},
            "identical": c.texts == reference,
            "differs_from_own_plain": sum(a != b for a, b in zip(c.texts, own[c.engine], strict=True)),
            "prompts": len(c.texts),
        })  # fmt: skip
    return rows


def full_pass_bytes(session: cli.Session) -> int:
    """Weight bytes that one pass through all layers and the LM head reads."""
    model = session.model
    return model.args.n_layer * sum(p.nbytes for p in model.layers[0].parameters()) + model.lm_head.weight.nbytes


def streamed_bytes(c: Contender, session: cli.Session, drafted: int, rounds: int, exit_layer, emitted: int) -> float:
    """Weight bytes read per emitted token: k drafts of E layers and the head, the last draft's E layers, one pass."""
    model = session.model
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    head = model.lm_head.weight.nbytes
    full = full_pass_bytes(session)
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


def measure_lengths(contenders: list[Contender], lengths: list[int], repeats: int, session: cli.Session) -> list[dict]:
    """Prefill and decode LENGTH_TOKENS tokens after prompts of these lengths, engines in turns -> a row each.

    `floor` is what the bytes of weights and KV cache alone would make of a token's time, relative to the first length.
    """
    if not lengths:
        return []
    vocab, args = session.args.vocab_size, session.args
    prompts = {length: [(7919 * i + 3) % (vocab - 3) + 3 for i in range(length)] for length in lengths}
    weights = full_pass_bytes(session)
    kv = 2 * args.n_layer * args.n_kv_head * args.head_dim * session.model.norm.weight.element_size()
    took = {(c.engine, length): [] for c in contenders for length in lengths}
    for turn in tqdm(range(repeats + 1), desc="lengths", leave=False):
        for length, prompt in prompts.items():
            for c in contenders:
                _, seconds, summary = c.run(prompt, LENGTH_TOKENS)
                if turn:
                    took[c.engine, length].append((summary["prefill_s"], seconds / (LENGTH_TOKENS - 1)))
    rows = []
    for c in contenders:
        first = statistics.median(seconds for _, seconds in took[c.engine, lengths[0]])
        for length in lengths:
            prefill, token = (statistics.median(times) for times in zip(*took[c.engine, length], strict=True))
            rows.append({
                "engine": c.engine, "prompt_tokens": length, "prefill_s": prefill,
                "prefill_tokens_per_s": length / prefill, "ms_per_token": 1e3 * token, "over_first": token / first,
                "floor": (weights + kv * length) / (weights + kv * lengths[0]),
            })  # fmt: skip
    return rows


def print_lengths(rows: list[dict]) -> None:
    form = cli.shown
    body = [
        [row["engine"], str(row["prompt_tokens"]), form(row["prefill_tokens_per_s"], ".0f"),
         form(row["ms_per_token"], ".2f"),
         form(row["over_first"], ".2f") + "×", form(row["floor"], ".2f") + "×"]
        for row in rows
    ]  # fmt: skip
    columns = ("engine", "prompt tokens", "prefill tokens/s", "ms a token", "over the first length", "by bytes alone")
    cli.print_table("plain decoding by length of prompt", columns, body)


def print_rows(rows: list[dict], title: str) -> None:
    form = cli.shown
    compared = list(rows[0]["ratio_to"])
    body = [
        [
            row["engine"], row["policy"] + ("" if row["exact_width"] or row["engine"] != "skipfast" else " (inexact)"),
            row["backend"], str(row["threads"]), form(row["tokens_per_s"]),
            f"{min(row['tokens_per_s_rounds']):.0f}–{max(row['tokens_per_s_rounds']):.0f}",
            form(row["speedup_over_fastest_ar"], ".2f") + "×",
            *(form(row["ratio_to"][name], ".2f") + "×" for name in compared), form(row["acceptance_rate"], ".2f"),
            form(row["tokens_per_round"], ".2f"), form(row["ideal_speedup"], ".2f"),
            form(row["share_of_bandwidth"], ".0%"), f"{row['differs_from_own_plain']} of {row['prompts']}",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("engine", "policy", "backend", "threads", "tokens/s", "min–max", "× fastest AR",
               *(f"× {name}" for name in compared), "accepted", "tokens/round", "ideal", "of bandwidth",
               "texts differ")  # fmt: skip
    cli.print_table(title, columns, body)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark", description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.benchmark --policy static:3 --against transformers,llama.cpp",
    )  # fmt: skip
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    parser.add_argument("--policy", action="append", metavar="NAME:key=value,…", help="repeatable; default static:L/4")
    parser.add_argument("--prompts", metavar="FILE", help=".txt (a line each), .jsonl (`prompt`) or .json (`ids`)")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="only the first N")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--against", default=[], type=lambda text: text.split(","), metavar="ENGINE,…",
                        help="other engines to measure: " + ", ".join(peers.NEEDS))
    parser.add_argument("--prompt_lengths", default=[], type=lambda text: [int(n) for n in text.split(",")],
                        metavar="N,…",
                        help="also time prefill and plain decoding after prompts of these lengths, as in 100,512,2000")
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
    if unknown := set(flags.against) - set(peers.NEEDS):
        raise ValueError(f"--against knows {', '.join(peers.NEEDS)}, got {', '.join(sorted(unknown))}")
    if min(flags.prompt_lengths, default=1) < 1:
        raise ValueError(f"prompt_lengths must be 1 or more, got {min(flags.prompt_lengths)}")
    return flags


def main() -> None:
    flags = parse_flags()
    if flags.output_dir:
        cli.make_folder(flags.output_dir)
    cli.check_writable(flags.json)
    session = cli.open_session(flags)
    skipped = peers.missing(flags.against, flags.device)
    for peer, reason in skipped.items():
        cli.notice(f"{peer} skipped: {reason}")
    flags.against = [peer for peer in flags.against if peer not in skipped]
    prompts = read_prompts(flags.prompts, session)[: flags.num_prompts]
    config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
    for prompt in prompts:
        check_prompt(prompt, config, session.args.vocab_size, session.args.max_seq_len)
    longest = max(map(len, prompts)) + flags.max_new_tokens
    if flags.prompt_lengths and max(flags.prompt_lengths) + LENGTH_TOKENS > session.args.max_seq_len:
        most = session.args.max_seq_len - LENGTH_TOKENS
        raise ValueError(f"prompt_lengths must be at most {most} for this checkpoint, "
                         f"got {max(flags.prompt_lengths)}")  # fmt: skip
    longest = max([longest, *(length + LENGTH_TOKENS for length in flags.prompt_lengths)])
    before = peak_memory_bytes()
    session.load()
    after = peak_memory_bytes()
    with contextlib.ExitStack() as cleanup:
        contenders = make_contenders(session, flags, config, longest, cleanup)
        full, bandwidth = full_pass_bytes(session), read_bandwidth()
        print(f"{full / 1e6:.1f} MB of weights a pass at {bandwidth / 1e9:.1f} GB/s: {bandwidth / full:.0f} tokens/s "
              "from memory")  # fmt: skip
        measure(contenders, prompts, flags.max_new_tokens, flags.repeats, flags.seed)
        plain = {c.engine: c for c in reversed(contenders) if c.policy == "none"}  # of ours, the first: compiled, exact
        lengths = measure_lengths(list(plain.values())[::-1], flags.prompt_lengths, flags.repeats, session)
    rows = result_rows(contenders, session, bandwidth)
    print_rows(rows, f"{Path(flags.checkpoint_path).name}: {len(prompts)} prompts × {flags.max_new_tokens} tokens, "
                     f"{rows[0]['precision']}, median of {flags.repeats}")  # fmt: skip
    for peer, reason in skipped.items():
        print(f"{peer} skipped: {reason}")
    if lengths:
        print_lengths(lengths)
    result = {
        "rows": rows,
        "lengths": lengths,
        "skipped": skipped,
        "bandwidth_bytes_per_s": bandwidth,
        "weight_bytes_per_pass": full,
        "weight_bytes": session.weight_bytes,
        "cache_bytes": 2 * session.args.n_layer * session.model.layers[0].attention.v_cache.nbytes,
        "peak_memory_bytes": {"before_loading": before, "after_loading": after},
        "config": vars(flags),
        **cli.environment(),
    }
    for path in filter(None, (flags.json, flags.output_dir and Path(flags.output_dir) / "benchmark.json")):
        cli.write_json(path, result)


if __name__ == "__main__":
    cli.run(main)
