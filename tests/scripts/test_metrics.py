"""Metrics are what their names say: checked on fixed strings against values by hand and plain implementations here."""

import math
import random
from collections import Counter

import pytest

from scripts.common import metrics

pytest.importorskip("rouge_score", reason='pip install -e ".[eval]"')
pytest.importorskip("sacrebleu", reason='pip install -e ".[eval]"')

TEXT, REFERENCE = "the cat sat on the mat", "the cat is on the mat"


def table_distance(first, second):
    """Levenshtein's table, row by row."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        corner, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def plain_bleu(texts, references):
    """Corpus BLEU (Papineni 2002) of texts split at spaces, one reference each, every order with a match."""
    logs = []
    for n in range(1, 5):
        grams = lambda words, n=n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        pairs = [(grams(t.split()), grams(r.split())) for t, r in zip(texts, references, strict=True)]
        logs.append(math.log(sum((t & r).total() for t, r in pairs) / sum(t.total() for t, _ in pairs)))
    ours, theirs = (sum(len(text.split()) for text in some) for some in (texts, references))
    return 100 * math.exp(sum(logs) / 4 + min(0, 1 - theirs / ours))


def test_rouge_counts_words_pairs_and_the_longest_common_subsequence():
    found = metrics.quality(TEXT, [REFERENCE])
    assert found["rouge1"] == pytest.approx(5 / 6) and found["rougeL"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    found = metrics.quality("mat the on cat", [REFERENCE])  # all of them; two in order: the, on
    assert found["rouge1"] == pytest.approx(0.8) and found["rougeL"] == pytest.approx(0.4)


def test_bleu_is_the_corpus_bleu_of_the_paper_and_not_always_zero():
    texts = ["the quick brown fox jumps over the dog", "a small cat sleeps on the warm mat today"]
    references = ["the quick brown fox jumped over the dog", "a small cat sleeps on the mat every day"]
    each = [metrics.quality(t, [r]) for t, r in zip(texts, references, strict=True)]
    found = metrics.corpus_quality(texts, [[reference] for reference in references], each)
    assert found["corpus_bleu"] == pytest.approx(plain_bleu(texts, references)) and 20 < found["corpus_bleu"] < 80
    assert metrics.quality(TEXT, [TEXT])["sentence_bleu"] == pytest.approx(100)
    assert found["rouge1"] == pytest.approx(sum(one["rouge1"] for one in each) / 2)


def test_an_exact_match_is_an_equal_text_and_nothing_less():
    assert metrics.quality(" four\n", ["four"])["exact_match"] == 1
    for text in ("Four", "four.", "fou", ""):
        assert metrics.quality(text, ["four"])["exact_match"] == 0
    assert metrics.quality("two", ["one", "two"])["exact_match"] == 1


def test_an_edit_distance_is_levenshteins_raw_and_by_the_longer_text():
    found = metrics.quality("kitten", ["sitting"])
    assert found["edit_distance"] == 3 and found["edit_distance_normalised"] == pytest.approx(3 / 7)
    assert metrics.quality("", ["abc"])["edit_distance_normalised"] == 1
    assert metrics.quality("", [""])["edit_distance_normalised"] == 0
    draw = random.Random(0)
    for _ in range(300):
        first, second = ("".join(draw.choices("abé", k=draw.randrange(80))) for _ in range(2))
        assert metrics.edit_distance(first, second) == table_distance(first, second)


def test_of_several_references_the_best_counts_and_bleu_takes_all():
    found = metrics.quality(TEXT, ["nothing alike", TEXT])
    assert found["rougeL"] == 1 and found["edit_distance"] == 0 and found["exact_match"] == 1
    several = metrics.corpus_quality([TEXT, TEXT], [["nothing", TEXT], [TEXT]], [found, found])
    assert several["corpus_bleu"] == pytest.approx(100)


def test_missing_packages_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'rouge-score and sacrebleu: pip install -e "\.\[eval\]"'):
        metrics.check_installed()
