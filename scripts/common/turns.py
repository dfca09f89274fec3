"""Let contenders take turns on samples; keep what each made of each sample, and judge its texts.

A sample's turn is one piece of work: all contenders, in an order of its own. So a slow second of the machine hits all
of them, and a run that was killed and goes on never compares times of two processes.
"""

import argparse
import random
import statistics
from collections.abc import Sequence

from tqdm import tqdm

import cli
from decoding.engine import Engine
from decoding.generation import summed
from scripts.common import metrics
from scripts.common.contender import Contender
from scripts.common.journal import Journal
from scripts.common.ranks import Ranks
from scripts.common.samples import Sample, answer

QUALITY = {
    "rouge1": ".3f",
    "rouge2": ".3f",
    "rougeL": ".3f",
    "corpus_bleu": ".1f",
    "exact_match": ".2f",
    "edit_distance": ".0f",
    "edit_distance_normalised": ".2f",
}


class Quality:
    """What texts are worth beside the responses of their samples. Equal texts are judged once."""

    def __init__(self, engine: Engine, samples: Sequence[Sample], stops: Sequence[str]):
        """samples: in the order of the texts to come. Raises UserError if a package is missing that judges them."""
        self.engine, self.samples, self.stops = engine, samples, stops
        self.known: dict[tuple[int, str], dict] = {}
        if self.judges:
            metrics.check_installed()

    @property
    def judges(self) -> bool:
        """Tell whether there is something to judge by."""
        return bool(self.samples) and all(sample.responses for sample in self.samples)

    def of(self, index: int, tokens: Sequence[int]) -> dict:
        """Return the text that `tokens` answer a sample with, and its metrics; nothing where there are no responses."""
        if not self.judges:
            return {}
        text = answer(tokens, self.engine, self.stops)
        if (index, text) not in self.known:
            self.known[index, text] = {"text": text, **metrics.quality(text, self.samples[index].responses)}
        return self.known[index, text]

    def of_all(self, texts: Sequence[Sequence[int]]) -> dict | None:
        """Return a row's metrics: means over its samples, and the BLEU of all of them together."""
        if not self.judges:
            return None
        judged = [dict(self.of(index, tokens)) for index, tokens in enumerate(texts)]
        answers = [metrics_of_text.pop("text") for metrics_of_text in judged]
        return metrics.corpus_quality(answers, [sample.responses for sample in self.samples], judged)


def measure(
    contenders: list[Contender],
    prompts: list[list[int]],
    flags: argparse.Namespace,
    ranks: Ranks,
    journal: Journal,
    quality: Quality,
) -> None:
    """Run one warm-up round, then flags.repeats timed ones of flags.max_new_tokens each, and fill in the contenders.

    journal: of records by row, sample and repeat; what is in it is not measured again.
    """
    done = ranks.agreed(_finished(contenders, journal))
    if ranks.leads:  # a turn that was cut short is measured again, whole
        journal.keep((r["row"], r["sample"], r["repeat"]) for records in done.values() for r in records)
    turns = len(prompts) * flags.repeats
    if before := sum(repeat <= flags.repeats for repeat, _ in done):
        cli.notice(
            f"{before} of {turns} turns of samples were finished before: their times are of the earlier run; "
            f"delete {journal.path} to measure them anew"
        )
    left = {turn: [i for i in range(len(prompts)) if (turn, i) not in done] for turn in range(1, flags.repeats + 1)}
    if any(left.values()):
        left = {0: list(range(len(prompts)))} | left  # the first round warms up
    bar = tqdm(total=sum(map(len, left.values())), desc="samples", leave=False)
    for turn, indices in left.items():
        work = lambda i, turn=turn: _turn(contenders, prompts[i], flags.max_new_tokens, f"{flags.seed}/{turn}/{i}")
        for i, records in zip(indices, ranks.each(indices, work), strict=True):
            bar.update()
            if not turn:
                continue
            done[turn, i] = [
                {**_name(c, row), "sample": i, "repeat": turn, **record, **quality.of(i, record["tokens"])}
                for row, (c, record) in enumerate(zip(contenders, records, strict=True))
            ]
            for record in done[turn, i] if ranks.leads else ():
                journal.add(record)
    bar.close()
    for row, c in enumerate(contenders):
        c.records = [[done[turn, i][row] for i in range(len(prompts))] for turn in range(1, flags.repeats + 1)]
        c.rates = [sums.tokens / sums.seconds for sums in map(summed, c.records)]
        c.summaries = c.records[-1]
        c.texts = [record["tokens"] for record in c.summaries]


def _turn(contenders: Sequence[Contender], prompt: list[int], new_tokens: int, seed: str) -> list[dict]:
    """Let every contender continue one prompt, in an order of the seed -> a record of each, in their own order."""
    records: list[dict] = [{} for _ in contenders]
    for row in random.Random(seed).sample(range(len(contenders)), len(contenders)):
        tokens, seconds, summary = contenders[row].run(prompt, new_tokens)
        records[row] = {**summary, "tokens": tokens, "decode_s": seconds}
    return records


def _name(c: Contender, row: int) -> dict:
    """Name a contender as its records do."""
    return {
        "row": row,
        "engine": c.engine,
        "policy": c.policy,
        "backend": c.backend,
        "quantize": c.quantize,
        "device": c.device,
    }


def _finished(contenders: Sequence[Contender], journal: Journal) -> dict[tuple[int, int], list[dict]]:
    """Return the journal's records by (repeat, sample), only where all contenders have one."""
    turns: dict[tuple[int, int], list[dict]] = {}
    for record in journal.done.values():
        turns.setdefault((record["repeat"], record["sample"]), []).append(record)
    names = [_name(c, row) for row, c in enumerate(contenders)]
    whole = {}
    for key, records in turns.items():
        records.sort(key=lambda record: record["row"])
        if [{name: record[name] for name in names[0]} for record in records] == names:
            whole[key] = records
    return whole


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return first ÷ second, turn by turn."""
    return [a / b for a, b in zip(first, second, strict=True)]


def sample_numbers(c: Contender, fastest: Contender, prompts: Sequence[Sequence[int]]) -> dict:
    """Return a row's numbers by sample: means over samples, of medians over repeats.

    fastest: plain decoding to compare with. `tokens_per_s` of a row is Σ tokens ÷ Σ seconds instead, in which slow
    samples weigh more.
    """
    rate = lambda record: (len(record["tokens"]) - 1) / record["decode_s"]
    own, plain = ([list(map(rate, turn)) for turn in other.records] for other in (c, fastest))
    medians = lambda turns: [statistics.median(sample) for sample in zip(*turns, strict=True)]
    speedups = [ratios(*pair) for pair in zip(own, plain, strict=True)]
    known = all("prefill_s" in record for turn in c.records for record in turn)
    prefills = [sum(record["prefill_s"] for record in turn) for turn in c.records] if known else []
    return {
        "mean_sample_tokens_per_s": statistics.fmean(medians(own)),
        "mean_sample_speedup": statistics.fmean(medians(speedups)),
        "prefill_tokens_per_s": sum(map(len, prompts)) / statistics.median(prefills) if prefills else None,
    }


def row_names(rows: Sequence[dict]) -> list[str]:
    """Name each row of a table: engine and policy, with the format and the device where these differ."""
    apart = [key for key in ("quantize", "device") if len({row[key] for row in rows}) > 1]
    engines = ("" if row["engine"] == "skipfast" else f"{row['engine']}: " for row in rows)
    return [
        ", ".join([engine + row["policy"], *(row[key] for key in apart)])
        for engine, row in zip(engines, rows, strict=True)
    ]


def print_speeds(rows: Sequence[dict]) -> None:
    """Print the speeds that have two definitions, by all samples together and by each, and that of the prefill."""
    shown = cli.shown
    body = [
        [
            name,
            row["backend"],
            shown(row["tokens_per_s"]),
            shown(row["mean_sample_tokens_per_s"]),
            shown(row["speedup_over_fastest_ar"], ".2f") + "×",
            shown(row["mean_sample_speedup"], ".2f") + "×",
            shown(row["prefill_tokens_per_s"]),
        ]
        for name, row in zip(row_names(rows), rows, strict=True)
    ]
    columns = (
        "policy",
        "backend",
        "Σ tokens\n÷ Σ seconds",
        "mean of samples'\ntokens/s",
        "speedup",
        "mean of samples'\nspeedups",
        "prefill\ntokens/s",
    )
    cli.print_table("all samples together, and each by itself", columns, body)


def print_quality(rows: Sequence[dict]) -> None:
    """Print the quality of the rows; rows of equal texts have equal numbers and stand in one line."""
    groups: dict[tuple, list[str]] = {}
    for name, row in zip(row_names(rows), rows, strict=True):
        if row["quality"]:
            groups.setdefault(tuple(row["quality"][metric] for metric in QUALITY), []).append(name)
    body = [
        [
            ", ".join(dict.fromkeys(names)) if len(names) < 5 else f"{names[0]} and {len(names) - 1} rows like it",
            *(cli.shown(value, form) for value, form in zip(values, QUALITY.values(), strict=True)),
        ]
        for values, names in groups.items()
    ]
    cli.print_table("quality against the responses", ("rows", *QUALITY), body)
