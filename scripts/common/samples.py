"""Samples of the experiment programs: prompts and what should follow them, from files, bundled ones, or the hub.

`--dataset` is the name of a bundled file (benchmarks/samples, offline), a JSON-lines file, or a name of HUB, which
the optional package `datasets` resolves. What is chosen depends on the dataset, the seed and the tokenizer alone.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cli
from decoding.engine import Engine
from decoding.generation import GenerateConfig, check_prompt
from errors import UserError
from loading.files import read_text
from scripts.common.hub_datasets import HUB, LINE, PYTHON, HubDataset, Texts
from scripts.common.metrics import INSTALL

BUNDLED = Path(__file__).parents[2] / "benchmarks" / "samples"
BUNDLED_STOPS = {"summarisation": LINE, "questions": LINE, "code": PYTHON}


class Sample(NamedTuple):
    """A prompt, and the texts that would be right after it (with their first space or newline; none if unknown)."""

    number: int  # of its row in the dataset, from 0
    prompt: str
    responses: tuple[str, ...] = ()


@dataclass
class Dataset:
    """Samples in the order they are chosen in, and where their answers end: at the first of `stops`."""

    name: str
    samples: Sequence[Sample]
    stops: tuple[str, ...] = ()


def bundled_names() -> list[str]:
    return sorted(path.stem for path in BUNDLED.glob("*.jsonl"))


def add_sample_flags(parser: argparse.ArgumentParser, dataset: str | None = "code", num_samples: int = 8) -> None:
    """Add --dataset and the flags that choose and shape its samples. dataset None: no samples unless asked for."""
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--dataset",
        default=dataset,
        metavar="NAME|FILE.jsonl",
        help=f"bundled: {', '.join(bundled_names())}; from the hub: {', '.join(HUB)}; or a file "
        f"with a JSON object a line (default: {dataset})",
    )
    group.add_argument(
        "--num_samples",
        type=int,
        default=num_samples,
        metavar="N",
        help=f"how many, chosen by --seed (default: {num_samples})",
    )
    group.add_argument(
        "--num_shots",
        "--n_shot",
        type=int,
        metavar="N",
        help="solved examples before each prompt (default: what the dataset's papers use, 0 for files)",
    )
    group.add_argument("--prompt_field", default="prompt", metavar="KEY", help="of FILE.jsonl")
    group.add_argument(
        "--response_field",
        metavar="KEY",
        help="of FILE.jsonl: what should follow, a text or a list of them (default: response, if there)",
    )
    group.add_argument(
        "--template", metavar="TEXT", help=r"the prompt of a row with keys in braces, as in 'Q: {question}\nA:'"
    )
    group.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template to each prompt")


def check_sample_flags(flags: argparse.Namespace, without: str) -> None:
    """Raise UserError for flags of samples without a --dataset, or with a flag `without` that replaces it."""
    given = {
        "num_shots": flags.num_shots,
        "response_field": flags.response_field,
        "template": flags.template,
        "chat": flags.chat or None,
    }
    if flags.dataset is None:
        if names := [name for name, value in given.items() if value is not None]:
            raise UserError(f"--{names[0]} goes with --dataset only")
    elif getattr(flags, without) is not None:
        raise UserError(f"--dataset and --{without} both say what to continue: give one")


def read_dataset(flags: argparse.Namespace) -> Dataset:
    """Read the dataset that the flags name, shuffled by --seed, with its examples in each prompt.

    Raises UserError for what is not there, is empty or malformed (naming the line), or cannot be downloaded.
    """
    for name, value, least in (("num_samples", flags.num_samples, 1), ("num_shots", flags.num_shots, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
    name, path = flags.dataset, Path(flags.dataset)
    if not path.is_file() and (flags.prompt_field != "prompt" or flags.response_field is not None):
        raise UserError(f"prompt_field and response_field name keys of a JSON-lines file, and {name!r} is none")
    if not path.is_file() and (bundled := BUNDLED / f"{name}.jsonl").exists():
        rows = read_rows(bundled, "prompt", "response", flags.template)
        return _shuffled(name, rows, None, flags.num_shots or 0, BUNDLED_STOPS.get(name, ()), flags.seed)
    if not path.is_file() and name in HUB:
        return _from_hub(name, HUB[name], flags)
    if not path.is_file():
        raise UserError(
            f"dataset must be a JSON-lines file or one of {', '.join([*bundled_names(), *HUB])}, got {name!r}"
        )
    rows = read_rows(path, flags.prompt_field, flags.response_field, flags.template)
    return _shuffled(name, rows, None, flags.num_shots or 0, (), flags.seed)


def read_rows(path: Path, prompt_field: str, response_field: str | None, template: str | None = None) -> list[Texts]:
    """Read a JSON-lines file. response_field None: `response`, where a line has it."""
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object, but {type(row).__name__}")
        prompt = _filled(template, row, where) if template else _text(row, prompt_field, where)
        responses = ()
        if response_field is not None or "response" in row:
            key = response_field or "response"
            several = isinstance(row.get(key), list)
            responses = (
                tuple(_text({key: text}, key, where) for text in row[key]) if several else (_text(row, key, where),)
            )
        texts.append(Texts(prompt, responses))
    if not texts:
        raise UserError(f"{path} holds no samples")
    return texts


def _text(row: dict, key: str, where: str) -> str:
    if key not in row:
        raise UserError(f"{where}: no field {key!r} (it has {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(row[key], str):
        raise UserError(f"{where}: field {key!r} must be a text, got {type(row[key]).__name__}")
    return row[key]


def _filled(template: str, row: dict, where: str) -> str:
    try:
        return template.replace(r"\n", "\n").format_map(row)
    except KeyError as error:
        raise UserError(f"{where}: no field {error} for --template (it has {', '.join(map(repr, row))})") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"template {template!r}: {error}") from None


class _Split(Sequence):
    """The rows of a split as Texts, made when asked for: a training split may have 300,000."""

    def __init__(self, name: str, source: HubDataset, split: str, template: str | None):
        self.name, self.split, self.make, self.template = name, split, source.make, template
        self.rows = load_split(name, source, split)
        if not len(self.rows):
            raise UserError(f"{name} holds no samples in its split {split}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Texts:
        row, where = self.rows[number], f"{self.name}, row {number} of {self.split}"
        try:
            made = self.make(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not as expected ({type(error).__name__}: {error})") from None
        return made._replace(prompt=_filled(self.template, row, where)) if self.template else made


def _from_hub(name: str, source: HubDataset, flags: argparse.Namespace) -> Dataset:
    num_shots = source.num_shots if flags.num_shots is None else flags.num_shots
    rows, examples = _Split(name, source, source.split, flags.template), None
    if num_shots and source.shots != source.split:
        examples = _Split(name, source, source.shots, flags.template)
    return _shuffled(name, rows, examples, num_shots, source.stops, flags.seed)


def load_split(name: str, source: HubDataset, split: str) -> Sequence[dict]:
    """Load a split's rows, downloaded or from the cache of `datasets`."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"dataset {name} needs the package datasets: {INSTALL}") from None
    datasets.utils.logging.set_verbosity_error()
    cli.notice(f"loading {source.hub_id} ({split}) …")
    try:
        return datasets.load_dataset(source.hub_id, source.config, split=split)
    except Exception as error:  # a network has many ways to fail; each means that the rows did not come
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"dataset {name}: cannot load {source.hub_id} ({type(error).__name__}: {reason}); offline, "
            f"give a file or one of {', '.join(bundled_names())}"
        ) from error


def _shuffled(
    name: str,
    rows: Sequence[Texts],
    examples: Sequence[Texts] | None,
    num_shots: int,
    stops: tuple[str, ...],
    seed: int,
) -> Dataset:
    """Put samples into an order of the seed: the first few stay the same, however many are asked for.

    examples: where solved examples come from; None: from `rows`, and those are then no samples any more.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    before = ""
    if num_shots:
        pool = rows if examples is None else examples
        if num_shots >= len(pool) + (examples is not None):
            raise UserError(f"num_shots must be below the {len(pool)} rows of {name}, got {num_shots}")
        chosen = order[-num_shots:] if examples is None else random.Random(seed).sample(range(len(pool)), num_shots)
        order = order[:-num_shots] if examples is None else order
        if silent := [number for number in chosen if not pool[number].responses]:
            raise UserError(f"num_shots {num_shots}: row {silent[0] + 1} of {name} has no response to show")
        before = "".join(f"{pool[number].prompt}{pool[number].responses[0]}\n\n" for number in chosen)
    made = ((number, rows[number]) for number in order)
    return Dataset(name, [Sample(number, before + row.prompt, row.responses) for number, row in made], stops)


def encoded(
    dataset: Dataset, flags: argparse.Namespace, engine: Engine, config: GenerateConfig
) -> list[tuple[Sample, list[int]]]:
    """Return the first --num_samples samples that fit the model's context, and their token ids, by number.

    A sample must leave room for config.max_new_tokens. Tells how many were too long; raises UserError if all are.
    """
    wanted = math.inf if flags.num_samples is None else flags.num_samples
    fitting, too_long, last_error = [], 0, None
    for sample in dataset.samples:
        if len(fitting) >= wanted:
            break
        ids = _token_ids(sample.prompt, flags.chat, engine)
        try:
            check_prompt(ids, config, engine.args.vocab_size, engine.args.max_seq_len)
        except UserError as error:
            too_long, last_error = too_long + 1, error
            continue
        fitting.append((sample, ids))
    if not fitting:
        raise UserError(f"dataset {dataset.name}: no sample can be used: {last_error}")
    if too_long:
        cli.notice(
            f"{dataset.name}: {too_long} samples do not fit the model's {engine.args.max_seq_len} positions "
            f"and were passed over"
        )
    if wanted != math.inf and len(fitting) < wanted:
        cli.notice(f"{dataset.name}: {len(fitting)} samples instead of {wanted}")
    return sorted(fitting)


def _token_ids(prompt: str, chat: bool, engine: Engine) -> list[int]:
    if chat:
        return engine.tokenizer.apply_chat([{"role": "user", "content": prompt}])
    return engine.tokenizer.encode(prompt)


def answer(tokens: Sequence[int], engine: Engine, stops: Sequence[str]) -> str:
    """Decode generated tokens up to an end-of-text token or the first of `stops`: the text that is judged.

    Tokens after the end change nothing before it, so a text that was decoded further, to be timed, is judged alike.
    """
    end = next((i for i, token in enumerate(tokens) if token in engine.tokenizer.eos_ids), len(tokens))
    text = engine.tokenizer.decode(tokens[:end], continues=True)
    body = text.lstrip()  # an answer may begin on the next line
    start = len(text) - len(body)
    return text[: min((place for stop in stops if (place := text.find(stop, start)) >= 0), default=len(text))]
