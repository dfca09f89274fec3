"""The kernels pass their gates on GPUs that are not there, and the gates catch what they are for.

In a process of its own: kernels that were decorated for the interpreter cannot be compiled.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [pytest.mark.skipif(not (TOOLS / name).exists(), reason=f"this Triton has no {TOOLS / name}")
              for name in ("ptxas", "cuobjdump")]

PLANTED = """
from dataclasses import replace
from kernels.gpu import linear

def compile_cases():
    good, int8 = linear.compile_cases()[0], linear.compile_cases()[3]
    return [replace(good, name="good"),
            replace(good, name="deep", tile=replace(good.tile, stages=16)),
            replace(good, name="unaligned", aligned=()),
            replace(int8, name="small", constants=int8.constants | {"N": 16, "K": 64}),
            replace(good, name="another instruction", mma="HGMMA"),
            replace(good, name="large", constants=good.constants | {"N": 1024}),
            replace(good, name="broken", constants=good.constants | {"K": 100})]
"""
CAUGHT = {"good": [], "deep": ["shared memory"], "unaligned": ["16-byte copies 0 <"], "small": ["narrow copies"],
          "another instruction": ["no HGMMA"], "large": ["registers", "stack", "shared memory"],
          "broken": ["does not compile"]}  # fmt: skip


def compile_ahead(*modules: str, folder: Path = ROOT) -> tuple[int, list[str], str]:
    """Return the exit code, the lines of the cases, and what went wrong. `folder` is where modules are looked for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    result = subprocess.run([sys.executable, "-m", "tests.compile_ahead", *modules], cwd=ROOT, capture_output=True,
                            text=True, env=environment, timeout=300)
    return result.returncode, [line for line in result.stdout.splitlines() if " sm_" in line], result.stderr


def test_every_kernel_passes_its_gates_on_sm_80_and_sm_90():
    code, lines, errors = compile_ahead()
    assert code == 0, "\n".join([errors, *(line for line in lines if "FAILED" in line)])
    for kernel in ("linear_bf16", "linear_int8", "linear_int4"):
        for target in ("sm_80", "sm_90"):
            assert any(line.startswith(kernel) and f" {target} " in line for line in lines)


def test_planted_faults_are_caught_and_named(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    code, lines, errors = compile_ahead("planted", folder=tmp_path)
    assert code == 1, errors
    assert len(lines) == 2 * len(CAUGHT)
    for line in lines:
        gates = CAUGHT[line.partition("  ")[0].strip()]
        assert ("FAILED" in line) == bool(gates), line
        assert all(gate in line.partition("FAILED")[2] for gate in gates), line


def test_kernels_of_the_interpreter_are_refused():
    result = subprocess.run([sys.executable, "-m", "tests.compile_ahead"], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300)
    assert result.returncode == 1 and "unset TRITON_INTERPRET" in result.stdout
