"""The rows of `scripts.benchmark`: the numbers that follow from what contenders did, and the tables of them.

A row is compared with plain decoding of its own device and weights, and with that of the first ones named.
"""

import argparse
import statistics
from collections.abc import Sequence

import cli
from decoding.engine import Engine
from decoding.generation import head_cost_layers, ideal_speedup
from model import Transformer
from scripts.benchmark.hardware import streamed_bytes
from scripts.benchmark.prompt_lengths import print_lengths
from scripts.common import policy_sets
from scripts.common.contender import Contender
from scripts.common.turns import print_quality, print_speeds, ratios, row_names, sample_numbers

Place = tuple[str, str]  # the device of weights, and their format


def result_rows(
    contenders: list[Contender],
    engines: dict[Place, Engine],
    flags: argparse.Namespace,
    prompts: list[list[int]],
    bandwidths: dict[str, float],
) -> list[dict]:
    """Make the `rows` of the JSON file, one a contender, compared with those of its own device and format.

    bandwidths: in bytes/s, by device.
    """
    places = {place: [c for c in contenders if c.place == place] for place in engines}
    fastest = {place: max((c for c in here if c.is_plain), key=median_rate) for place, here in places.items()}
    first = next(iter(engines))
    rows = []
    for c in contenders:
        model, here = engines[c.place].model, places[c.place]
        others = {other.engine: other for other in here if other.policy == "none" and other.engine != "skipfast"}
        if len(engines) > 1:
            others[f"plain, {name_of_first(list(engines))}"] = fastest[first]
        rows.append(
            identity(c, model)
            | speeds(c, fastest[c.place], others, prompts)
            | costs(c, model, fastest[c.place], bandwidths[c.device])
            | text_numbers(c, here, flags, prompts)
        )
    return rows


def median_rate(c: Contender) -> float:
    return statistics.median(c.rates)


def name_of_first(places: Sequence[Place]) -> str:
    """Name the first place by what tells it from the others: its device, its format, or both."""
    apart = [len(set(names)) > 1 for names in zip(*places, strict=True)]
    return ", ".join(name for name, differs in zip(places[0], apart, strict=True) if differs)


def identity(c: Contender, model: Transformer) -> dict:
    """Say what a row has decoded with."""
    return {
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
    }


def speeds(c: Contender, fastest: Contender, others: dict[str, Contender], prompts: list[list[int]]) -> dict:
    """Return the numbers of a row that were timed. fastest: plain decoding of ours; others: to be compared with, too.

    Every ratio is the median of the ratios inside a turn.
    """
    return {
        "tokens_per_s": median_rate(c),
        "tokens_per_s_rounds": c.rates,
        "speedup_over_fastest_ar": statistics.median(ratios(c.rates, fastest.rates)),
        **sample_numbers(c, fastest, prompts),
        "ratio_to": {name: statistics.median(ratios(c.rates, other.rates)) for name, other in others.items()},
    }


def costs(c: Contender, model: Transformer, fastest: Contender, bandwidth: float) -> dict:
    """Return the numbers of a row that follow from its rounds; None where nothing was drafted or an engine is silent.

    bandwidth: of the device's memory, in bytes/s.
    """
    sums = c.totals()
    layers, heads = (model.args.n_layer, 1) if c.policy == "none" else (None, None)
    if c.counts_rounds:
        layers, heads = sums.layer_visits_per_token, sums.head_visits_per_token
    known = layers is not None
    ideal = ideal_speedup(1, layers, heads, model) if known else None
    read = streamed_bytes(model, layers, heads) if known else None
    return {
        "acceptance_rate": sums.acceptance_rate,
        "tokens_per_round": sums.tokens_per_round,
        "mean_exit_layer": sums.mean_exit_layer,
        "layer_visits_per_token": layers,
        "head_visits_per_token": heads,
        "cost_per_token_layers": layers + heads * head_cost_layers(model) if known else None,
        "ideal_speedup": ideal,
        "share_of_ideal": statistics.median(ratios(c.rates, fastest.rates)) / ideal if known else None,
        "bytes_per_token": read,
        "share_of_bandwidth": read * median_rate(c) / bandwidth if known else None,
    }


def text_numbers(c: Contender, here: list[Contender], flags: argparse.Namespace, prompts: list[list[int]]) -> dict:
    """Compare a row's texts with those of plain decoding, ours and its own engine's. here: contenders of its place."""
    reference = next(other for other in here if other.is_plain and other.exact).texts
    own_plain = {other.engine: other.texts for other in here if other.policy == "none"} | {"skipfast": reference}
    exact_text = flags.temperature == 0 or flags.verification == "coupled"
    comparable = exact_text and c.judge is None
    tokens = [token for text in c.texts for token in text]
    differing = sum(a != b for a, b in zip(c.texts, own_plain[c.engine], strict=True))
    judged = c.judge and sum(c.judge(prompt, text) * len(text) for prompt, text in zip(prompts, c.texts, strict=True))
    covered = flags.draft_vocab is not None and sum(token < flags.draft_vocab for token in tokens)
    return {
        "identical": c.texts == reference if comparable else None,
        "differs_from_own_plain": differing if comparable else None,
        "equal_to_full_model": None if c.judge is None else judged / len(tokens),
        "draft_vocab_coverage": None if flags.draft_vocab is None else covered / len(tokens),
        "prompts": len(c.texts),
    }


COLUMNS = {  # of the table, by what is shown of a row -> heading
    "acceptance_rate": ("accep-\ntance", ".2f"),
    "tokens_per_round": ("tokens\n/round", ".2f"),
    "mean_exit_layer": ("mean\nexit", ".1f"),
    "layer_visits_per_token": ("layers\n/token", ".2f"),
    "head_visits_per_token": ("heads\n/token", ".2f"),
    "megabytes_per_token": ("MB\n/token", ".1f"),
    "ideal_speedup": ("ideal", ".2f"),
    "share_of_ideal": ("share\nof it", ".0%"),
    "share_of_bandwidth": ("of band-\nwidth", ".0%"),
}


def print_rows(rows: list[dict], title: str) -> None:
    """Print the table of rows."""
    form = cli.shown
    compared = list(dict.fromkeys(name for row in rows for name in row["ratio_to"]))
    body = []
    for name, row in zip(row_names(rows), rows, strict=True):
        rates = row["tokens_per_s_rounds"]
        numbers = row | {"megabytes_per_token": row["bytes_per_token"] and row["bytes_per_token"] / 1e6}
        body.append(
            [
                name + ("" if row["exact_width"] else " (inexact)"),
                f"{row['backend']} ×{row['threads']}",
                form(row["tokens_per_s"]),
                f"{min(rates):.0f}–{max(rates):.0f}",
                form(row["speedup_over_fastest_ar"], ".2f") + "×",
                *(form(row["ratio_to"].get(other), ".2f") + "×" for other in compared),
                *(form(numbers[key], digits) for key, (_, digits) in COLUMNS.items()),
                texts_differ(row),
            ]
        )
    columns = (
        "policy",
        "backend\n×threads",
        "tokens/s",
        "min–max",
        "× fastest\nAR",
        *(f"× {name}" for name in compared),
        *(heading for heading, _ in COLUMNS.values()),
        "texts differ",
    )
    cli.print_table(title, columns, body)


def texts_differ(row: dict) -> str:
    """Say in a few words how a row's texts stand to the full model's."""
    if row["equal_to_full_model"] is not None:
        return f"{row['equal_to_full_model']:.1%} right"
    differing = row["differs_from_own_plain"]
    return "–" if differing is None else f"{differing} of {row['prompts']}"


def print_memory(memories: dict[str, dict], holder: str) -> None:
    """Print what each device, or each process of a tensor-parallel run, holds and reads."""
    megabytes = lambda value: cli.shown(value / 1e6)
    body = [
        [
            name,
            " + ".join(map(megabytes, memory["weight_bytes"].values())),
            megabytes(memory["weight_bytes_per_pass"]),
            megabytes(memory["cache_bytes"]),
            megabytes(memory["peak_memory_bytes"]["after_loading"]),
        ]
        for name, memory in memories.items()
    ]
    columns = (holder, "MB of weights", "MB a plain token reads of the first", "MB of cache", "MB at most")
    cli.print_table(f"each {holder}", columns, body)


def print_results(result: dict, title: str) -> None:
    """Print all tables of a result."""
    print_rows(result["rows"], title)
    if result["config"]["dataset"]:
        print_speeds(result["rows"])
    if any(row["quality"] for row in result["rows"]):
        print_quality(result["rows"])
    if len(result["ranks"]) > 1:
        print_memory({str(rank): memory for rank, memory in enumerate(result["ranks"])}, "rank")
    if len(result["devices"]) > 1:
        print_memory(result["devices"], "device")
    for peer, reason in result["skipped"].items():
        print(f"{peer} skipped: {reason}")
    if result["lengths"]:
        print_lengths(result["lengths"])
    if result["grid"]:
        policy_sets.print_grid(result["grid"])
