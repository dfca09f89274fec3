"""The rows of `scripts.benchmark`: the numbers that follow from what contenders did, and the tables of them.

A row is compared with plain decoding of its own device and weights, and with that of the first ones named.
"""

import argparse
import statistics
from collections import Counter

import cli
from decoding.generation import head_cost_layers, ideal_speedup
from decoding.runner import head_bytes, module_bytes
from model import Transformer
from scripts.benchmark.peers import Contender
from scripts.benchmark.prompt_lengths import print_lengths
from scripts.common import policy_sets
from scripts.common.turns import print_quality, print_speeds, row_names, sample_numbers

Models = dict[tuple[str, str], Transformer]  # by device and format


def decoding_numbers(c: Contender, model: Transformer) -> dict:
    """The numbers of a row that follow from its rounds; None where nothing was drafted or an engine does not tell."""
    emitted = sum(len(text) - 1 for text in c.texts)
    told = all("rounds" in summary for summary in c.summaries)
    drafted, accepted, rounds = (sum(s.get(key, 0) for s in c.summaries) for key in ("drafted", "accepted", "rounds"))
    exits = sum((Counter(summary.get("exit_layers", {})) for summary in c.summaries), Counter())
    layers, heads = (model.args.n_layer, 1) if c.policy == "none" else (None, None)
    if told:
        layers, heads = (
            sum(summary[key] * (len(text) - 1) for summary, text in zip(c.summaries, c.texts, strict=True)) / emitted
            for key in ("layer_visits_per_token", "head_visits_per_token")
        )
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_round": emitted / rounds if rounds else None,
        "mean_exit_layer": sum(int(depth) * n for depth, n in exits.items()) / exits.total() if exits else None,
        "layer_visits_per_token": layers,
        "head_visits_per_token": heads,
        "cost_per_token_layers": None if layers is None else layers + heads * head_cost_layers(model),
        "ideal_speedup": None if layers is None else ideal_speedup(1, layers, heads, model),
    }


def result_rows(
    contenders: list[Contender],
    models: Models,
    flags: argparse.Namespace,
    prompts: list[list[int]],
    bandwidths: dict[str, float],
) -> list[dict]:
    """The `rows` of the JSON file, one a contender; it is compared with those of its own device and format.

    bandwidths: by device.
    """
    rate_of = lambda c: statistics.median(c.rates)
    fastest_of = {place: max((c for c in contenders if c.is_ar and c.place == place), key=rate_of) for place in models}
    first = next(iter(models))
    first_name = ", ".join(
        name for name, names in zip(first, map(set, zip(*models, strict=True)), strict=True) if len(names) > 1
    )
    exact_text = flags.temperature == 0 or flags.verification == "coupled"
    rows = []
    for c in contenders:
        model, fastest = models[c.place], fastest_of[c.place]
        alike = [other for other in contenders if other.place == c.place]
        reference = next(other for other in alike if other.is_ar and other.exact).texts
        plain = {other.engine: other for other in alike if other.policy == "none" and other.engine != "skipfast"}
        own = {name: other.texts for name, other in plain.items()} | {"skipfast": reference}
        if len(models) > 1:
            plain[f"plain, {first_name}"] = fastest_of[first]
        numbers, rate = decoding_numbers(c, model), statistics.median(c.rates)
        layers, heads = numbers["layer_visits_per_token"], numbers["head_visits_per_token"]
        read = None if layers is None else streamed_bytes(model, layers, heads)
        ideal, comparable = numbers["ideal_speedup"], exact_text and c.judge is None
        speedup = statistics.median(a / b for a, b in zip(c.rates, fastest.rates, strict=True))
        tokens = [token for text in c.texts for token in text]
        rows.append(
            {
                "engine": c.engine,
                "policy": c.policy,
                "precision": str(model.norm.weight.dtype).removeprefix("torch."),
                "quantize": c.quantize,
                "device": c.device,
                "compiled": c.compiled,
                "backend": c.backend,
                "threads": c.threads,
                "exact_width": c.exact,
                "verified": c.judge is None,
                "tokens_per_s": rate,
                "tokens_per_s_rounds": c.rates,
                "speedup_over_fastest_ar": speedup,
                **sample_numbers(c, fastest, prompts),
                **numbers,
                "share_of_ideal": speedup / ideal if ideal else None,
                "bytes_per_token": read,
                "share_of_bandwidth": read * rate / bandwidths[c.device] if read else None,
                "ratio_to": {
                    name: statistics.median(a / b for a, b in zip(c.rates, peer.rates, strict=True))
                    for name, peer in plain.items()
                },
                "identical": c.texts == reference if comparable else None,
                "differs_from_own_plain": sum(a != b for a, b in zip(c.texts, own[c.engine], strict=True))
                if comparable
                else None,
                "equal_to_full_model": None
                if c.judge is None
                else sum(c.judge(prompt, text) * len(text) for prompt, text in zip(prompts, c.texts, strict=True))
                / len(tokens),
                "draft_vocab_coverage": None
                if flags.draft_vocab is None
                else sum(token < flags.draft_vocab for token in tokens) / len(tokens),
                "prompts": len(c.texts),
            }
        )
    return rows


def streamed_bytes(model: Transformer, layers: float, heads: float) -> float:
    """Weight bytes that so many visits of layers and of the LM head read."""
    return layers * module_bytes(model.layers[0]) + heads * head_bytes(model.ends())


def print_rows(rows: list[dict], title: str) -> None:
    form = cli.shown
    compared = list(dict.fromkeys(name for row in rows for name in row["ratio_to"]))
    body = []
    for name, row in zip(row_names(rows), rows, strict=True):
        rates, equal = row["tokens_per_s_rounds"], row["equal_to_full_model"]
        differ = row["differs_from_own_plain"]
        body.append(
            [
                name + ("" if row["exact_width"] else " (inexact)"),
                f"{row['backend']} ×{row['threads']}",
                form(row["tokens_per_s"]),
                f"{min(rates):.0f}–{max(rates):.0f}",
                form(row["speedup_over_fastest_ar"], ".2f") + "×",
                *(form(row["ratio_to"].get(other), ".2f") + "×" for other in compared),
                form(row["acceptance_rate"], ".2f"),
                form(row["tokens_per_round"], ".2f"),
                form(row["mean_exit_layer"]),
                form(row["layer_visits_per_token"], ".2f"),
                form(row["head_visits_per_token"], ".2f"),
                form(row["bytes_per_token"] and row["bytes_per_token"] / 1e6),
                form(row["ideal_speedup"], ".2f"),
                form(row["share_of_ideal"], ".0%"),
                form(row["share_of_bandwidth"], ".0%"),
                f"{equal:.1%} right"
                if equal is not None
                else "–"
                if differ is None
                else f"{differ} of {row['prompts']}",
            ]
        )
    columns = (
        "policy",
        "backend\n×threads",
        "tokens/s",
        "min–max",
        "× fastest\nAR",
        *(f"× {name}" for name in compared),
        "accep-\ntance",
        "tokens\n/round",
        "mean\nexit",
        "layers\n/token",
        "heads\n/token",
        "MB\n/token",
        "ideal",
        "share\nof it",
        "of band-\nwidth",
        "texts differ",
    )
    cli.print_table(title, columns, body)


def print_memory(memories: dict[str, dict], what: str) -> None:
    """What each device, or each process of a tensor-parallel run, holds and reads."""
    megabytes = lambda value: cli.shown(value / 1e6)
    body = [
        [
            name,
            " + ".join(map(megabytes, own["weight_bytes"].values())),
            megabytes(own["weight_bytes_per_pass"]),
            megabytes(own["cache_bytes"]),
            megabytes(own["peak_memory_bytes"]["after_loading"]),
        ]
        for name, own in memories.items()
    ]
    columns = (what, "MB of weights", "MB a plain token reads of the first", "MB of cache", "MB at most")
    cli.print_table(f"each {what}", columns, body)


def print_results(result: dict, title: str) -> None:
    print_rows(result["rows"], title)
    if result["config"]["dataset"]:
        print_speeds(result["rows"])
    if any(row["quality"] for row in result["rows"]):
        print_quality(result["rows"])
    if len(result["ranks"]) > 1:
        print_memory({str(rank): own for rank, own in enumerate(result["ranks"])}, "rank")
    if len(result["devices"]) > 1:
        print_memory(result["devices"], "device")
    for peer, reason in result["skipped"].items():
        print(f"{peer} skipped: {reason}")
    if result["lengths"]:
        print_lengths(result["lengths"])
    if result["grid"]:
        policy_sets.print_grid(result["grid"])
