"""The kernels pass their gates on GPUs that are not there, and the gates catch what they are for.

In a process of its own: kernels that were decorated for the interpreter cannot be compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(not (TOOLS / name).exists(), reason=f"this Triton has no {TOOLS / name}")
    for name in ("ptxas", "cuobjdump")
]

PLANTED = """
from dataclasses import replace
import triton
import triton.language as tl
from kernels.gpu import linear
from kernels.gpu.tiles import CompileCase

@triton.jit
def relaxed_kernel(partials, ticket):
    lanes = tl.arange(0, 128)
    tl.store(partials + lanes, 1.0)
    if tl.atomic_add(ticket, 1, sem="relaxed") == 3:
        tl.store(partials + lanes, tl.load(partials + 128 + lanes))

def compile_cases():
    good, int8 = linear.compile_cases()[0], linear.compile_cases()[3]
    return [replace(good, name="good"),
            replace(good, name="deep", tile=replace(good.tile, stages=16)),
            replace(good, name="unaligned", aligned=()),
            replace(int8, name="small", constants=int8.constants | {"N": 16, "K": 64}),
            replace(good, name="another instruction", mma="HGMMA"),
            replace(good, name="large", constants=good.constants | {"N": 1024}),
            replace(good, name="broken", constants=good.constants | {"K": 100}),
            CompileCase("relaxed", relaxed_kernel, {"partials": "*fp32", "ticket": "*i32"}, {}, (), good.tile, mma=None,
                        wide_copies=False)]
"""
CAUGHT = {
    "good": [],
    "deep": ["shared memory"],
    "unaligned": ["16-byte copies 0 <"],
    "small": ["narrow copies"],
    "another instruction": ["no HGMMA"],
    "large": ["registers", "stack", "shared memory"],
    "broken": ["does not compile"],
    "relaxed": ["neither releases nor acquires", "before the ticket"],
}

BINARIES = """
import collections
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit
from kernels.gpu import attention, exit_head, linear

found, backend = collections.defaultdict(set), make_backend(GPUTarget("cuda", 90, 32))

def record(kernel, *arguments, grid, warmup, **options):
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    found[kernel].add(str(bind(*arguments, **options)[1:]))

jit.JITFunction.run = record
weight, scale, cache = torch.zeros(4096, 2064).bfloat16(), torch.ones(4096), torch.zeros(2, 2, 96, 80).bfloat16()
for first in (0, 1, 5):
    for m in range(1, 17):
        x, positions = torch.zeros(32, 2064).bfloat16()[first : first + m], torch.arange(32)[first : first + m]
        linear.launch(x, weight)
        draw = exit_head.Draw(positions, torch.zeros(3, 1, dtype=torch.int64)[first % 3], torch.ones(1))
        exit_head.launch(x, weight[: 4096 - m], None, 4096 - m, 16 * first, draw)
        q, k, v = torch.zeros(m, 5 + 2 + 2, 80).bfloat16()[:, 1:].split([4, 2, 2], 1)
        attention.launch(q, k, v, *cache[:, :, : 96 - m].contiguous(), positions)
print(*sorted(len(binaries) for binaries in found.values()))
"""


def compile_ahead(*modules: str, folder: Path = ROOT) -> tuple[int, list[str], str]:
    """Return the exit code, the lines of the cases, and what went wrong. `folder` is where modules are looked for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ahead", *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
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


def test_a_kernel_has_one_binary_whatever_the_rows_their_place_and_the_length_of_cache_and_vocabulary():
    """What Triton specialises on, ones and multiples of 16, would otherwise change with these."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", BINARIES], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.stdout.split() == ["1"] * 4, result.stdout + result.stderr


def test_kernels_of_the_interpreter_are_refused():
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ahead"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert result.returncode == 1 and "unset TRITON_INTERPRET" in result.stdout
