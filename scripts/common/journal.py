"""A journal: the finished work of a long program, one JSON object a line, so that a killed run goes on where it was.

The first line holds the settings that the results depend on; a folder with other settings is refused, not mixed.
"""

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from drafting.policy import DraftPolicy
from errors import UserError
from loading import checkpoint
from loading.files import make_folder, read_text, write_text


def digest(
    prompts: Sequence[Sequence[int]],
    responses: Sequence,
    policies: Iterable[DraftPolicy],
    source: checkpoint.Source,
    ranks: int,
) -> dict:
    """Return what a journal remembers beside the flags: hashes of prompts, responses and the content of files."""
    sha = lambda value: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
    stats = {str(file): file.stat() for file in set(source.files.values())}
    return {
        "samples": len(prompts),
        "prompts": sha([list(prompt) for prompt in prompts]),
        "responses": sha(list(responses)),
        "weight_files": sha(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())),
        "policy_files": [policy.file_hashes for policy in policies if policy.file_hashes],
        "ranks": ranks,
    }


class Journal:
    """Finished pieces of work by key. Without a path it remembers and writes nothing."""

    def __init__(self, path: Path | None, settings: dict, key: tuple[str, ...]):
        """Read what is there. key: the fields of a record that name it.

        Raises UserError if the file is of other settings, is not such a file, or cannot be written.
        """
        self.path, self.key, self.settings = path, key, json.loads(json.dumps(settings))
        self.done: dict[Hashable, dict] = {}
        if path is not None and path.exists():
            self._read()

    def _read(self) -> None:
        try:
            first, *records = [json.loads(line) for line in self._complete_lines()] or [{"settings": self.settings}]
            settings = first["settings"]
            for record in records:
                self.done[self._key_of(record)] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not what this program writes ({type(error).__name__}: {error}): give "
                f"another --output_dir"
            ) from None
        refuse_others(self.path, settings, self.settings)

    def _complete_lines(self) -> list[str]:
        """Read the lines, without a last one that a killed run has not finished writing."""
        *lines, last = read_text(self.path).split("\n")
        if last and not lines:
            raise UserError("its first line has no end")
        return lines

    def _key_of(self, record: dict) -> tuple:
        return tuple(record[name] for name in self.key)

    def start(self) -> None:
        """Make the file ready for more records, before long work: the settings, and what was read from it."""
        if self.path is None:
            return
        records = [{"settings": self.settings}, *self.done.values()]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def keep(self, keys: Iterable[tuple]) -> None:
        """Forget all records but these, also on disk."""
        self.done = {key: self.done[key] for key in keys}
        self.start()

    def add(self, record: dict) -> None:
        """Remember a finished piece, also on disk."""
        self.done[self._key_of(record)] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def get(self, *key) -> dict | None:
        return self.done.get(key)


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Make a folder and keep it for this process. Raises UserError while another process keeps it.

    The lock is the system's: it ends with the process, however that ends.
    """
    handle = os.open(make_folder(path), os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run writes into {path}: wait for it, or give another --output_dir") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def read_state(path: Path, kinds: dict[str, type | None]) -> dict:
    """Read what a run has saved with torch.save; tensors take no memory until they are touched.

    kinds: the fields that must be there, and their types (None: any). Raises UserError for a file of another program
    and for one that is damaged: every part of a torch file has a checksum, which torch itself does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # the name of the first part that does not fit its checksum
        if wrong is None:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            wrong = next((name for name, kind in kinds.items() if not isinstance(state[name], kind or object)), None)
    except Exception as error:  # zip, pickle and torch have a dozen kinds of error for bytes that make no sense
        wrong = type(error).__name__
    if wrong is not None:
        raise UserError(
            f"{path} is not what this program writes, or is damaged ({wrong!r}): restore or delete it, or give another "
            "--output_dir"
        )
    return state


def refuse_others(path: Path, known: dict, wanted: dict) -> None:
    """Raise UserError if the settings in a file are not those that are wanted now."""
    if known != wanted:
        name = next(name for name in wanted | known if wanted.get(name) != known.get(name))
        then, now = _short(known.get(name)), _short(wanted.get(name))
        raise UserError(
            f"{path} is of a run with another {name} ({then}, now {now}): give another --output_dir, or delete the file"
        )


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
