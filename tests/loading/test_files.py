"""Small files: written whole or not at all, and one line that names the file for whatever goes wrong."""

import json
import os
from pathlib import Path

import pytest

from loading import files


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("old")
    return file


def test_a_file_takes_its_place_when_it_is_complete(file, monkeypatch):
    renames, rename = [], os.replace

    def watched(source, target):
        renames.append((Path(target), json.loads(Path(source).read_text()), Path(target).read_text()))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    files.write_json(file, {"a": Path("x"), "b": "ü"})
    assert renames == [(file, {"a": "x", "b": "ü"}, "old")]
    assert files.read_json(file) == {"a": "x", "b": "ü"} and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TypeError, OSError(28, "No space left on device")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, stop):
    with pytest.raises((KeyboardInterrupt, TypeError, ValueError)) as caught, files.replacing(file) as unfinished:
        unfinished.write(b"half")
        raise stop
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]
    if isinstance(stop, OSError):
        assert str(caught.value) == f"cannot write {file}: No space left on device"


def test_a_place_that_cannot_be_written_is_named(file, tmp_path):
    for path in (tmp_path / "no" / "folder", file / "below", tmp_path):
        with pytest.raises(ValueError, match=f"cannot write {path}: "):
            files.write_text(path, "text")
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match=f"cannot make the folder {file}/below: "):
        files.make_folder(file / "below")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read {}: No such file"),
        (b"{", "{} is not valid JSON"),
        (b"[" * 99999, "{} is not valid JSON"),
        (b'{"a": "\xff"}', "{} is not valid JSON"),
        (b"[1]", "{} must hold a JSON object, got a list"),
    ],
)
def test_json_that_cannot_be_read_names_the_file(file, content, message):
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        files.read_json(file)
    assert str(caught.value).startswith(message.format(file)) and "\n" not in str(caught.value)


def test_text_that_is_not_utf8_names_the_file_and_the_byte(file):
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"{file} is not UTF-8 text: .* at byte 3"):
        files.read_text(file)
