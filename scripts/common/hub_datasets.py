"""Datasets of the Hugging Face hub by short names: how a row of each becomes a prompt and the texts that may follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LETTERS = "ABCDEFGHIJ"
FIRST_WORDS = 100  # of an article, to be continued
PARAGRAPH, LINE = ("\n\n",), ("\n",)  # where an answer is over, if the model goes on
PYTHON = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # HumanEval's own


class Texts(NamedTuple):
    """What a row of a dataset becomes."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub. make: its row -> Texts; shots: its split for examples, num_shots: how many by default."""

    hub_id: str
    config: str | None
    split: str
    shots: str
    make: Callable[[dict], Texts]
    num_shots: int = 0
    stops: tuple[str, ...] = PARAGRAPH


def _template(prompt: str, response: str) -> Callable[[dict], Texts]:
    return lambda row: Texts(prompt.format_map(row), (response.format_map(row),))


def _first_words(row: dict) -> Texts:
    words = row["article"].split()
    return Texts(" ".join(words[:FIRST_WORDS]), (" " + " ".join(words[FIRST_WORDS:]),))


def _choices(question: str, choices: Sequence[str], right: int, before: str = "") -> Texts:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return Texts("\n".join([f"{before}Question: {question}", *lines, "Answer:"]), (f" {LETTERS[right]}",))


def _mmlu(row: dict) -> Texts:
    return _choices(row["question"], row["choices"], row["answer"])


def _race(row: dict) -> Texts:
    before = f"Article: {row['article']}\n"
    return _choices(row["question"], row["options"], LETTERS.index(row["answer"]), before)


def _arc(row: dict) -> Texts:
    choices = row["choices"]
    return _choices(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def _boolq(row: dict) -> Texts:
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return Texts(prompt, (" yes" if row["answer"] else " no",))


def _nq_open(row: dict) -> Texts:
    return Texts(f"Question: {row['question']}?\nAnswer:", tuple(f" {answer}" for answer in row["answer"]))


def _mbpp(row: dict) -> Texts:
    return Texts("\n".join(['"""', row["text"], *row["test_list"], '"""']), ("\n" + row["code"],))


SUMMARY = "Article: {article}\nSummary:"
HUB = {
    "cnn_dm_summarization": HubDataset(
        "abisee/cnn_dailymail", "3.0.0", "test", "train", _template(SUMMARY, " {highlights}"), 1
    ),
    "cnn_dm_lm": HubDataset("abisee/cnn_dailymail", "3.0.0", "test", "train", _first_words, stops=()),
    "xsum_summarization": HubDataset(
        "EdinburghNLP/xsum", None, "test", "train", _template("Article: {document}\nSummary:", " {summary}")
    ),
    "human_eval": HubDataset(
        "openai/openai_humaneval", None, "test", "test", _template("{prompt}", "{canonical_solution}"), stops=PYTHON
    ),
    "mbpp": HubDataset("google-research-datasets/mbpp", "full", "test", "prompt", _mbpp, 3),
    "top_v2": HubDataset(
        "WillHeld/top_v2",
        None,
        "test",
        "train",
        _template("Utterance: {utterance}\nParse:", " {semantic_parse}"),
        3,
        LINE,
    ),
    "gsm8k": HubDataset(
        "openai/gsm8k", "main", "test", "train", _template("Question: {question}\nAnswer:", " {answer}"), 5
    ),
    "mmlu": HubDataset("cais/mmlu", "all", "test", "dev", _mmlu, 5, LINE),
    "boolq": HubDataset("google/boolq", None, "validation", "train", _boolq, 0, LINE),
    "nq_open": HubDataset("google-research-datasets/nq_open", None, "validation", "train", _nq_open, 5, LINE),
    "race": HubDataset("ehovy/race", "all", "test", "train", _race, 0, LINE),
    "arc_challenge": HubDataset("allenai/ai2_arc", "ARC-Challenge", "test", "train", _arc, 5, LINE),
}
