"""Who may import whom: the floors of the house, read from the source of every file with ast.

A unit is a root file, a folder, or a program under scripts.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.helpers.processes import ROOT

# Every edge between two units. A new one is a decision about the architecture: make it here, knowingly. One that is no
# longer used has to go.
ALLOWED = {
    "errors": "",
    "kernels": "errors",
    "model": "errors kernels",
    "drafting": "errors kernels",
    "tp": "errors kernels model",
    "loading": "errors kernels model tp",
    "decoding": "drafting errors kernels loading model tp",
    "cli": "decoding drafting errors kernels loading tp",
    "generate": "cli decoding drafting errors loading tp",
    "skipfast": "decoding drafting errors generate",
    "convert_hf_checkpoint": "cli errors kernels loading",
    "quantize": "cli convert_hf_checkpoint decoding errors kernels loading model",
    "scripts.common": "cli decoding drafting errors generate kernels loading model tp",
    "scripts.benchmark": "cli decoding drafting errors kernels loading model scripts.common tp",
    "scripts.correctness": "cli decoding drafting errors scripts.common",
    "scripts.eval": "cli decoding drafting errors generate loading scripts.common",
    "scripts.gpu_check": "cli decoding drafting errors generate kernels loading model quantize",
    "scripts.inspect_layers": "cli decoding drafting errors generate loading scripts.common",
    "scripts.search_skips": "cli decoding drafting errors generate loading scripts.common",
    "scripts.sweep": "cli decoding drafting errors loading scripts.common",
    "scripts.train": "cli decoding errors loading model scripts.common",
    "scripts.train_policy": "cli decoding drafting errors generate kernels loading model scripts.common",
}
ALLOWED = {unit: set(others.split()) for unit, others in ALLOWED.items()}
PROGRAMS = {"cli", "convert_hf_checkpoint", "generate", "quantize", "skipfast"}
FLOORS = {"decoding", "drafting", "errors", "kernels", "loading", "model", "tp"}  # below every program
# Packages a program runs without: whoever needs one imports it where it is used and says how to install it.
OPTIONAL = {
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llama_cpp",
    "lm_eval",
    "matplotlib",
    "optuna",
    "rouge_score",
    "sacrebleu",
    "tiktoken",
    "tokenizers",
    "transformers",
    "triton",
}
REQUIRED = {"numpy", "rich", "safetensors", "sentencepiece", "torch", "tqdm"}
MAY_COMPILE = ("decoding/runner.py", "scripts/gpu_check/", "scripts/train/trainer.py")

NAMES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*.py"))
NAMES += sorted(
    str(path.relative_to(ROOT))
    for folder in ("decoding", "drafting", "kernels", "loading", "scripts")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py"))
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in (*NAMES, *TESTS)}
OURS = {module.split(".")[0] for module in MODULES} | {"tests"}


class Import(NamedTuple):
    """One name that a file imports."""

    module: str  # where the name is from, or the module itself: "loading.checkpoint", "torch"
    line: int
    inside: bool  # a function

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def imports(name: str) -> Iterator[Import]:
    """Yield what a file imports, in order."""

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: relative import"
                for alias in child.names:  # from package import module, or from module import name
                    whole = f"{child.module}.{alias.name}"
                    yield Import(whole if whole in MODULES else child.module, child.lineno, inside)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, inside or function)

    yield from visit(ast.parse((ROOT / name).read_text(encoding="utf-8")), False)


def unit_of(module: str) -> str:
    """ "scripts.train.loop" -> "scripts.train", "kernels.cpu.build" -> "kernels", "model" -> "model"."""
    return ".".join(module.split(".")[: 2 if module.startswith("scripts.") else 1])


def edges() -> dict[tuple[str, str], list[str]]:
    """Return where each edge between two units is used: {(unit, what it imports): ["file:line", ...]}."""
    found = {}
    for module, name in MODULES.items():
        for used in imports(name) if name in NAMES else ():
            edge = unit_of(module), unit_of(used.module)
            if used.package in OURS and edge[0] != edge[1]:
                found.setdefault(edge, []).append(f"{name}:{used.line}")
    return found


def test_every_edge_is_allowed_and_every_allowed_edge_is_used():
    found, allowed = edges(), {(unit, other) for unit, others in ALLOWED.items() for other in others}
    assert {edge: lines for edge, lines in found.items() if edge not in allowed} == {}, "not listed"
    assert allowed - set(found) == set(), "listed, and no longer used"
    assert {unit_of(module) for module in MODULES} - {"tests", "scripts"} == set(ALLOWED), "units without a row"


def test_no_unit_is_above_and_below_another():
    tuple(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises CycleError, which names the cycle


def test_no_file_imports_itself_through_others():
    graph = {}
    for module, name in MODULES.items():
        used = {one.module for one in imports(name) if one.package in OURS and not one.inside}
        assert used <= set(MODULES), f"{name} imports what is not there"
        graph[module] = used
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_floors_know_no_program_and_programs_under_scripts_not_one_another():
    """Apart from ALLOWED, which somebody may edit: these hold whatever else changes."""

    def wrong(unit: str, other: str) -> bool:
        return (
            (unit in FLOORS and (other in PROGRAMS or other.startswith("scripts")))
            or (unit in PROGRAMS and other.startswith("scripts"))
            or (unit.startswith("scripts") and other.startswith("scripts") and other != "scripts.common")
            or (unit == "drafting" and other in ("model", "decoding", "loading", "tp"))
            or (unit == "model" and other in ("drafting", "decoding", "loading", "tp"))
            or other == "tests"
        )

    found = edges()
    assert {edge: lines for edge, lines in found.items() if wrong(*edge)} == {}


def test_tests_take_what_they_share_from_the_helpers_alone():
    """A test file that another one imports is loaded twice, under two names."""
    for name in TESTS:
        for used in imports(name):
            if used.package == "tests":
                assert used.module.startswith("tests.helpers."), f"{name}:{used.line} imports {used.module}"


@pytest.mark.parametrize("name", NAMES)
def test_only_optional_packages_are_imported_inside_functions_and_they_only_there(name):
    for used in imports(name):
        package, where = used.package, f"{name}:{used.line}"
        if used.inside:
            assert package in OPTIONAL, f"{where} imports {package} inside a function"
        elif package == "triton" and name.startswith("kernels/gpu/"):
            continue  # these files are themselves imported only where a tensor lies on a GPU
        else:
            assert package not in OPTIONAL, f"{where} cannot be loaded without the optional {package}"
            known = package in OURS or package in REQUIRED or package in sys.stdlib_module_names
            assert known, f"{where} needs {package}, which requirements.txt does not have"


def test_required_packages_are_those_of_the_requirements_file():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.split("#")[0].strip() for line in lines} - {""}
    names = {line.split(";")[0].split("[")[0].rstrip("0123456789.,<>=!~* ").replace("-", "_") for line in listed}
    assert REQUIRED <= names


def test_only_the_runner_and_training_speak_of_torch_compile():
    """Decoding is compiled in one place; docstrings and comments elsewhere may name it."""
    culprits = []
    for name in NAMES:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
            if is_torch and node.attr in ("compile", "compiler", "_dynamo", "_inductor"):
                culprits.append(f"{name}:{node.lineno}")
    assert [c for c in culprits if not c.startswith(MAY_COMPILE)] == []


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_module_only_defines_things(name):
    """No file is read, no thread set and nothing printed at import: at top level stand definitions alone."""
    defines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        assert isinstance(node, defines) or docstring or main, f"{name}:{node.lineno}: {ast.unparse(node)[:60]}"
