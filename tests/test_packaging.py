"""The package: requirement files and extras agree, every file is packaged, and an installed skipfast runs anywhere."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.helpers.environments import fresh_environment, run_in
from tests.helpers.processes import ROOT

SKIPPED_FOLDERS = {".git", ".venv", "build"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(name: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line.replace('"', "'") for line in lines if line]


def text_files() -> list[Path]:
    files = (path for kind in ("*.py", "*.md", "*.toml", "Dockerfile", "Makefile") for path in ROOT.rglob(kind))
    return [path for path in files if not SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts)]


def test_the_requirement_files_say_what_the_package_says(pyproject):
    project = pyproject["project"]
    assert requirements("requirements.txt") == project["dependencies"]
    includes, *dev = requirements("requirements-dev.txt")
    assert includes == "-r requirements.txt"
    assert sorted(dev) == sorted(project["optional-dependencies"]["dev"])


def test_an_extra_and_the_development_packages_agree_on_versions(pyproject):
    versions = {}
    for extra, packages in pyproject["project"]["optional-dependencies"].items():
        for package in packages:
            name, version = re.match(r"([\w.-]+)(.*)", package).groups()
            assert not version or versions.setdefault(name, version) == version, f"{name} in {extra}"


def test_what_messages_and_pages_tell_to_install_exists(pyproject):
    extras = set(pyproject["project"]["optional-dependencies"])
    for path in text_files():
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\brequirements[\w-]*\.txt", text):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
        for group in re.findall(r'pip install -e "?\.\[([\w,]+)\]', text):
            assert set(group.split(",")) <= extras, f"{path.relative_to(ROOT)} names the extras {group}"


def test_every_module_and_folder_of_the_engine_is_in_the_package(pyproject):
    settings = pyproject["tool"]["setuptools"]
    assert settings["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    setuptools = pytest.importorskip("setuptools")
    packages = setuptools.find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {path.parent for path in ROOT.glob("*/**/*.py")} - {ROOT / "tests"}
    folders = {".".join(path.relative_to(ROOT).parts) for path in folders}
    wanted = {name for name in folders if name.split(".")[0] not in {"tests", "build", ".venv"}}
    assert wanted <= set(packages)
    kinds = {path.suffix for name in packages for path in (ROOT / name.replace(".", "/")).glob("*") if path.suffix}
    packaged = {Path(pattern).suffix for pattern in settings["package-data"]["*"]}
    assert kinds - {".py"} == packaged


@pytest.mark.slow
def test_an_editable_install_can_be_used_from_another_folder(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*SKIPPED_FOLDERS, "*.egg-info", "__pycache__"))
    elsewhere.mkdir()
    python = fresh_environment(tmp_path / "venv")
    run_in(python, "pip install --no-deps --no-build-isolation -e .", clone)
    program = (
        "import skipfast; print(skipfast.__file__); "
        "print(len(skipfast.load(threads=1).generate('def main():', max_new_tokens=8).tokens))"
    )
    file, tokens = run_in(python, f"python -c {shlex.quote(program)}", elsewhere).splitlines()[-2:]
    assert Path(file).parent == clone and tokens == "8"
