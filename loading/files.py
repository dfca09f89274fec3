"""Reading and writing small files. Every file that is written appears complete, by rename, or not at all.

A file that cannot be read or written is the user's affair: these functions raise UserError in one line that names it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes that place when the block ends and vanishes on any error.

    Let the block do nothing but write: every OSError in it is reported as one about `path`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # renamed already, or never made
            unfinished.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object; what JSON has no type for, such as a path, is written as a string."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: str | Path) -> dict:
    """Read the JSON object in a file."""
    return parse_json(read_bytes(path), path)


def parse_json(text: str | bytes, path: str | Path) -> dict:
    """Parse a JSON object, or raise UserError naming the file `path` that it comes from."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8; absurd nesting
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def make_folder(path: str | Path) -> Path:
    """Make a folder unless it is there already; UserError if no file can be made in it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write into the folder {path}")
    return Path(path)


def check_writable(path: str | Path | None) -> None:
    """Raise UserError now if writing `path` would fail later, after long work. None: nothing will be written."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if not str(path) or Path(path).is_dir():
        raise UserError(f"cannot write {str(path)!r}: it is not the name of a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: its folder does not exist or is not writable")
