"""Text to learn from: files, the held-out part of them, one stream of tokens."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from loading.tokenizer import Tokenizer

SEEDS = 2**32  # seeds of a run: those of its steps follow by a factor and stay below 2**63
# Folders of the standard library that hold tests, and those left out as tables, generated text or other people's code.
STDLIB_TESTS = {"test", "tests", "idle_test"}
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
NEAR_DUPLICATE = 0.5  # a held-out file with more than this share of its long lines in training files is left out


def find_files(sources: Iterable[str], pattern: str) -> list[tuple[str, Path]]:
    """List (relative name, path) of every text file; a source given twice counts twice in training."""
    files = []
    for source in sources:
        if source in ("stdlib", "stdlib_tests"):
            root = Path(sysconfig.get_paths()["stdlib"])
            wanted = source == "stdlib_tests"
            for path in sorted(root.rglob("*.py")):
                folders = set(path.relative_to(root).parts[:-1])
                if not folders & STDLIB_LEFT_OUT and bool(folders & STDLIB_TESTS) == wanted:
                    files.append((path.relative_to(root).as_posix(), path))
            continue
        root = Path(source)
        if not root.exists():
            raise UserError(f"data: {source} does not exist")
        try:
            paths = [root] if root.is_file() else sorted(path for path in root.rglob(pattern) if path.is_file())
        except NotImplementedError:
            raise UserError(f"glob must be a pattern for names inside a folder, got {pattern!r}") from None
        files += [(path.name if root.is_file() else path.relative_to(root).as_posix(), path) for path in paths]
    if not files:
        raise UserError(f"data: no file matches {pattern!r} in {', '.join(sources) or 'nothing: give --data'}")
    return files


def split_texts(files: list[tuple[str, Path]], share: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read the files into (name, text) lists for training and held-out, by a hash of the name.

    Exact copies under another name are dropped; a held-out file most of whose longer lines also occur in training
    files is left out of both.
    """
    seen, train, heldout = {}, [], []
    for name, path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip() or seen.setdefault(digest, name) != name:
            continue
        is_heldout = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 < share
        if not is_heldout:
            train.append((name, text))
        elif all(name != other for other, _ in heldout):
            heldout.append((name, text))
    if not train:
        raise UserError(f"data: all {len(files)} files fell into the held-out part; lower --heldout or add files")
    lines = {line for _, text in train for line in _long_lines(text)}
    heldout = [
        (name, text)
        for name, text in heldout
        if sum(line in lines for line in _long_lines(text)) <= NEAR_DUPLICATE * len(_long_lines(text))
    ]
    if not heldout:  # tiny data sets: the last tenth of the last file
        name, text = train[-1]
        cut = len(text) * 9 // 10
        train[-1], heldout = (name, text[:cut]), [(name, text[cut:])]
    return train, heldout


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= 24]


def encode_texts(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> Tensor:
    """Encode every text into one int32 stream [tokens], each between BOS and EOS where the tokenizer has them."""
    cache = {}
    for name, text in texts:
        if name not in cache:
            cache[name] = torch.tensor([*tokenizer.encode(text), *tokenizer.eos_ids[:1]], dtype=torch.int32)
    return torch.cat([cache[name] for name, _ in texts])
