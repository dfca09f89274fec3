"""The prompts of a benchmark: built-in ones, those of a file, or samples of a dataset, whose answers can be judged."""

import argparse
import json
from pathlib import Path

import cli
from decoding.engine import Engine
from decoding.generation import GenerateConfig, check_prompt
from errors import UserError
from loading.files import read_text
from scripts.common import samples
from scripts.common.turns import Quality

PROMPT_SETS = Path(__file__).parents[2] / "benchmarks" / "prompts"
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


def set_names() -> list[str]:
    """List the names of the prompt sets that come with the project."""
    return sorted(path.stem for path in PROMPT_SETS.glob("*.jsonl"))


def choose_prompts(flags: argparse.Namespace, engine: Engine) -> tuple[list[list[int]], Quality]:
    """Read the prompts that the flags name, and make the judge of the texts that follow them.

    Raises UserError for a prompt that does not fit the model's context.
    """
    config = GenerateConfig(flags.max_new_tokens)
    if flags.dataset is not None:
        dataset = samples.read_dataset(flags)
        chosen = samples.encoded(dataset, flags, engine, config)
        quality = Quality(engine, [sample for sample, _ in chosen], dataset.stops)
        if not quality.judges and any(sample.responses for sample, _ in chosen):
            cli.notice("not every sample has a response: no quality is measured")
        return [ids for _, ids in chosen], quality
    prompts = read_prompts(flags.prompts, engine)[: flags.num_prompts]
    for prompt in prompts:
        check_prompt(prompt, config, engine.args.vocab_size, engine.args.max_seq_len)
    return prompts, Quality(engine, (), ())


def read_prompts(path: str | None, engine: Engine) -> list[list[int]]:
    """Read prompts as token ids: lines of a .txt, `prompt` of a .jsonl, `ids` of a .json list, or built-in ones.

    path: a file, or the name of one in benchmarks/prompts.
    """
    encode = engine.tokenizer.encode
    if path is None:
        return list(map(encode, PROMPTS))
    if not Path(path).exists() and (known := PROMPT_SETS / f"{path}.jsonl").exists():
        path = str(known)
    text = read_text(path)
    try:
        if path.endswith(".json"):
            prompts = [[int(token) for token in entry["ids"]] for entry in json.loads(text)]
        elif path.endswith(".jsonl"):
            prompts = [encode(json.loads(line)["prompt"]) for line in text.splitlines() if line.strip()]
        else:
            prompts = [encode(line) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the prompts expected ({type(error).__name__}: {error})") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts
