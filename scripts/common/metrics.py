"""Metrics of generated texts against reference texts, each what its name says; texts are compared without outer space.

ROUGE is Google's rouge-score, BLEU is sacrebleu: optional packages, imported where they are used. Where a sample has
several references the best one counts (BLEU takes all of them together, as its definition says).
"""

import functools
import importlib.util
import statistics
from collections.abc import Sequence

from errors import UserError

INSTALL = 'pip install -e ".[eval]"'
ROUGE = ("rouge1", "rouge2", "rougeL")
NEEDS = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}


def check_installed() -> None:
    """Raise UserError unless the packages behind the metrics are there."""
    if absent := [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]:
        raise UserError(f"the quality metrics need {' and '.join(absent)}: {INSTALL}")


@functools.cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance: the fewest characters to insert, delete or replace that make one text the other.

    Column by column of the usual table, a column as the bits of two whole numbers: which of its steps go up and which
    go down (Myers 1999, in the form of Hyyrö 2003). A summary against an article takes milliseconds.
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}  # of each letter in `first`, as bits
    for i, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last, distance = (1 << len(first)) - 1, 1 << (len(first) - 1), len(first)
    up, down = every, 0
    for letter in second:
        same = places.get(letter, 0)
        level = (((same & up) + up) ^ up) | same
        rises, falls = (down | ~(level | up)) & every, up & level
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(same | down | rises)) & every, rises & (same | down) & every
    return distance


def quality(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return the metrics of one text: ROUGE (F1, stemmed, 0..1), sentence BLEU (0..100), exact match (0 or 1).

    The edit distance counts characters; normalised, it is divided by the length of the longer text (0: equal, 1:
    nothing in common). Empty texts are texts: equal to each other, and scored 0 by ROUGE and BLEU.
    references: at least one.
    """
    import sacrebleu

    text, references = text.strip(), [reference.strip() for reference in references]
    rouge = [_scorer().score(reference, text) for reference in references]
    distances = {reference: edit_distance(text, reference) for reference in references}
    shares = [distance / max(len(text), len(reference), 1) for reference, distance in distances.items()]
    return {
        **{name: max(scores[name].fmeasure for scores in rouge) for name in ROUGE},
        "sentence_bleu": sacrebleu.sentence_bleu(text, references).score,
        "exact_match": float(text in references),
        "edit_distance": min(distances.values()),
        "edit_distance_normalised": min(shares),
    }


def corpus_quality(
    texts: Sequence[str], references: Sequence[Sequence[str]], judged: Sequence[dict]
) -> dict[str, float]:
    """Return the metrics of a set of texts: corpus BLEU, and the means of `judged`, what `quality` said of each."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[several[i].strip() if i < len(several) else None for several in references] for i in range(most)]
    means = {name: statistics.fmean(text[name] for text in judged) for name in judged[0] if name != "sentence_bleu"}
    return means | {"corpus_bleu": sacrebleu.corpus_bleu([text.strip() for text in texts], streams).score}
