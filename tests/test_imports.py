"""Who may import whom: the layers of the project, read from its source with ast."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("decoding", "drafting", "kernels", "loading", "scripts")
MODULES = {path.stem for path in ROOT.glob("*.py")} | {*FOLDERS, "tests"}

# The whole graph of folders and root files. A new edge is a decision about the architecture: make it here, knowingly.
ALLOWED = {
    "errors": set(),
    "kernels": {"errors", "kernels"},
    "model": {"errors", "kernels"},
    "drafting": {"drafting", "errors", "kernels"},
    "tp": {"errors", "kernels", "model"},
    "loading": {"errors", "kernels", "loading", "model", "tp"},
    "decoding": {"cli", "decoding", "drafting", "errors", "kernels", "loading", "model", "tp"},
    "cli": {"decoding", "drafting", "errors", "kernels", "loading", "model", "tp"},
    "generate": {"cli", "decoding", "drafting", "errors", "loading", "model", "tp"},
    "quantize": {"cli", "convert_hf_checkpoint", "decoding", "errors", "kernels", "loading", "model"},
    "convert_hf_checkpoint": {"cli", "errors", "kernels", "loading"},
    "scripts": MODULES - {"tests"},
}
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
MAY_COMPILE = ("decoding/runner.py", "scripts/gpu_check/", "scripts/train/trainer.py", "tests/")

FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path: Path):
    """Yield (package, line, depth) for every import of a file; depth > 0 is inside a function."""

    def visit(node, depth):
        for child in ast.iter_child_nodes(node):
            inside = depth + isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, depth) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                yield child.module, child.lineno, depth
            yield from visit(child, inside)

    for name, line, depth in visit(ast.parse(path.read_text(encoding="utf-8")), 0):
        yield name.split(".")[0], line, depth


def module_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_what_its_place_in_the_architecture_allows(name):
    assert module_of(name) in ALLOWED, f"{name} is new: give it a row in ALLOWED"
    for package, line, _ in imports(ROOT / name):
        if package in MODULES:
            assert package in ALLOWED[module_of(name)], f"{name}:{line} imports {package}"


def test_the_graph_says_nothing_of_modules_that_are_not_there():
    assert set(ALLOWED) - {module_of(name) for name in NAMES} == set()


def test_the_graph_has_no_cycle():
    order, left = [], {name: edges - {name} for name, edges in ALLOWED.items()}
    while left:
        ready = [name for name, edges in left.items() if edges <= set(order)]
        assert ready, f"a cycle among {sorted(left)}"
        order += ready
        left = {name: edges for name, edges in left.items() if name not in order}


def test_model_and_policies_do_not_know_each_other_and_nothing_knows_scripts_or_tests():
    """Apart from ALLOWED, which somebody may edit: these hold whatever else changes."""
    found = {(module_of(name), package) for name in NAMES for package, _, _ in imports(ROOT / name)}
    assert not [edge for edge in found if edge[0] == "drafting" and edge[1] in ("model", "decoding", "generate")]
    assert not [edge for edge in found if edge[0] == "model" and edge[1] == "drafting"]
    assert not [edge for edge in found if edge[1] in ("tests", "scripts") and edge[0] not in ("tests", edge[1])]


@pytest.mark.parametrize("name", NAMES)
def test_only_optional_packages_are_imported_inside_functions_and_they_only_there(name):
    for package, line, depth in imports(ROOT / name):
        if depth:
            assert package in OPTIONAL, f"{name}:{line} imports {package} inside a function"
        else:
            if package == "triton" and name.startswith("kernels/gpu/"):
                continue  # these files are themselves imported only where a tensor lies on a GPU
            assert package not in OPTIONAL, f"{name}:{line} cannot be loaded without the optional {package}"
            known = package in MODULES or package in REQUIRED or package in sys.stdlib_module_names
            assert known, f"{name}:{line} needs {package}, which requirements.txt does not have"


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
