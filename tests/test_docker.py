"""The Dockerfile does what the README says. No container engine is needed: it is read, and its commands are run."""

import json
import re

import pytest

from tests.helpers.environments import fresh_environment, run_in
from tests.helpers.processes import ROOT


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions -> (word, rest) each, with the defaults of its build arguments filled in."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found, arguments = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        rest = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest)
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        found.append((word, rest))
    return found


def pip_commands() -> list[str]:
    runs = [rest for word, rest in steps() if word == "RUN"]
    return [command for run in runs for command in run.split(" && ") if command.startswith("pip ")]


def smoke_command() -> str:
    (command,) = (rest for word, rest in steps() if word == "CMD")
    return " ".join(json.loads(command))


def test_the_dockerfile_knows_its_words_and_copies_only_what_is_there():
    assert {word for word, _ in steps()} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    assert steps()[0][0] == "ARG" and steps()[1][0] == "FROM"
    for word, rest in steps():
        if word == "COPY":
            *sources, target = rest.split()
            assert target == "./" and all((ROOT / source).exists() for source in sources), rest


def test_the_requirements_are_copied_before_they_are_installed_and_a_compiler_is_there():
    order = [rest for word, rest in steps() if word in ("RUN", "COPY")]
    assert order.index("requirements.txt ./") < order.index("pip install -r requirements.txt") < order.index(". ./")
    assert any("apt-get install" in rest and "g++" in rest for rest in order)


def test_its_pip_and_smoke_commands_are_the_readmes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(pip_commands()) == 2
    for command in [*pip_commands(), smoke_command()]:
        assert command in readme, command
    assert f"{pip_commands()[-1]} && {smoke_command()}" in readme


def test_the_page_on_docker_builds_with_arguments_that_the_dockerfile_has():
    page = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    known = {rest.partition("=")[0] for word, rest in steps() if word == "ARG"}
    named = set(re.findall(r"--build-arg (\w+)=", page + (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert named and named <= known


@pytest.mark.slow
def test_its_pip_and_smoke_commands_run_in_a_fresh_environment(tmp_path):
    python = fresh_environment(tmp_path / "venv")
    for command in pip_commands():
        run_in(python, command, ROOT)
    printed = run_in(python, smoke_command(), ROOT)
    assert re.search(r"identical tokens\s*│\s*yes", printed)
