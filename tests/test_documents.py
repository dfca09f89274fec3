"""What the pages say exists: links, files, programs, flags; and the README stays short enough to be read."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

import skipfast
from drafting import policy
from generate import parse_flags
from tests.helpers.processes import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*/README.md")]
PAGES = sorted([*PAGES, ROOT / "benchmarks" / "README.md"])
LOG = ROOT / "docs" / "log.md"  # its names are those of the day
FOLDERS = "decoding|drafting|loading|kernels|scripts|tests|docs|benchmarks|checkpoints"
STARTS = ("python ", "pip ", "torchrun ", "OMP_NUM_THREADS=1 ")  # of command lines that are checked
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> list[list[str]]:
    """The command lines in a page's code blocks, and in code within its lines, as words without comments."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]+)`", text)
    parts = (part for line in lines if line.startswith(STARTS) for part in line.split(" && "))
    return [shlex.split(part.rstrip("\\"), comments=True) for part in parts]


def test_the_readme_is_one_page_and_its_two_commands_stand_at_the_top():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 150 and len(text.encode()) <= 9 * 1024
    assert {"pip install -r requirements.txt && python generate.py"} <= set(lines[:25])
    assert {"pip install -r requirements-dev.txt && python -m pytest"} <= set(lines[:25])
    assert "Nothing has been run on a GPU yet" in text


def test_the_readmes_code_is_that_of_the_modules_whose_tests_run_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    library, example = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert textwrap.indent(library, "    ") in skipfast.__doc__
    assert textwrap.indent(example, "    ") in policy.__doc__


@pages
def test_every_link_within_the_repository_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pages
def test_every_file_that_is_named_exists(page):
    if page == LOG:
        return
    text = page.read_text(encoding="utf-8")
    names = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    if page.parent.parent.name != "checkpoints":  # there files of Python's library are named
        names += re.findall(r"`(?!test_)(\w+\.(?:py|toml))`", text)
    for name in names:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w[\w.-]*_\d{4}-\d\d-\d\d\.(?:json|png))`", text):
        assert (ROOT / "benchmarks" / "results" / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list(ROOT.glob(f"tests/**/{name}")), name


def test_every_folder_and_root_file_stands_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [path.name for path in ROOT.glob("*.py")]
    folders = [f"{path.parent.name}/" for path in ROOT.glob("*/*") if re.fullmatch(FOLDERS, path.parent.name)]
    for name in {*modules, *folders}:
        assert re.search(rf"^{re.escape(name)} ", text, re.M), name


@pages
def test_every_command_names_programs_files_and_flags_of_generate_that_exist(page, capsys):
    if page == LOG:
        return
    for words in commands(page):
        where = shlex.join(words)
        if "generate.py" in words and "…" not in words:
            try:
                parse_flags(words[words.index("generate.py") + 1 :])
            except SystemExit:
                pytest.fail(f"{where}\n{capsys.readouterr().err}")
        for word in words:
            if re.fullmatch(r"\w+\.py|tests/[\w/]+\.py", word):
                assert (ROOT / word).exists(), where
            if re.fullmatch(r"(scripts|tests)\.[a-z_.]+", word):
                path = ROOT / word.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), where
