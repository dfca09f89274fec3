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

PLANTED = '''
from dataclasses import replace
from kernels.gpu import linear

def compile_cases():
    good = linear.compile_cases()[0]
    narrow = tuple(name for name in good.aligned if name != "k")
    return [replace(good, name="good"),
            replace(good, name="deep", tile=replace(good.tile, stages=16)),
            replace(good, name="narrow", aligned=narrow),
            replace(good, name="unaligned", aligned=()),
            replace(good, name="other instruction", mma="HGMMA"),
            replace(good, name="large", constants=good.constants | {"N": 1024}),
            replace(good, name="broken", constants=good.constants | {"K": 100})]
'''


def compile_ahead(*modules: str, path: Path = ROOT) -> tuple[int, dict[str, str], str]:
    """Return the exit code, the lines by "case sm_target", and all that was printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", "tests.compile_ahead", *modules], cwd=ROOT, capture_output=True,
                            text=True, env=environment | {"PYTHONPATH": str(path)}, timeout=300)
    lines = [line.partition("  ") for line in result.stdout.splitlines() if " sm_" in line]
    return result.returncode, lines, result.stdout + result.stderr


def test_every_kernel_passes_its_gates_on_sm_80_and_sm_90():
    code, _, output = compile_ahead()
    assert code == 0, output
    assert "linear_bf16" in output and "sm_80" in output and "sm_90" in output and "FAILED" not in output
