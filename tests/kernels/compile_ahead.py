"""Compile the Triton kernels for GPUs that are not there and hold them to their gates.

`python -m tests.kernels.compile_ahead` compiles all of them.

Reads from the machine code what decides the speed of a kernel that waits for memory: registers, stack and shared memory
(how much is in flight), the tensor-core instruction, and how wide the asynchronous copies are; and from the PTX what
keeps programs that share memory in order, which the interpreter, running one after the other, cannot show. Prints one
line per case and target; exits with 1, naming the gates, where one fails. Arguments: other modules with a
`compile_cases()`.
"""

import importlib
import importlib.util
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.tiles import INTERPRETED, CompileCase

MODULES = ("kernels.gpu.linear", "kernels.gpu.exit_head", "kernels.gpu.attention")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one program, by target
MOST_REGISTERS, MOST_STACK = 200, 16
# What PTX must not hold, where one thread's ticket says that all programs' stores can be read, or a program copies into
# shared memory what its other threads have stored.
DISORDER = {
    "loads past the cache's coherence": r"ld\.global\.nc",
    "a ticket that neither releases nor acquires": r"atom\.global\.(?!gpu\.acq_rel)",
    "stores that no barrier puts before the ticket": r"st\.global(?:(?!bar\.sync|st\.global).)*atom\.global",
    "stores that no barrier puts before the copies": r"st\.global(?:(?!bar\.sync|st\.global).)*cp\.async\.c[ag]",
    "loads that no barrier puts behind the ticket": r"atom\.global(?:(?!bar\.sync).)*ld\.global",
}
WEIGHT_BYTES = {"*u8": 0.5, "*i16": 0.5, "*i8": 1, "*bf16": 2}  # of one weight; u8 and i16 hold nibbles


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. instructions: how often each opcode occurs, such as "HMMA.16816.F32.BF16".

    disorder: which of DISORDER its PTX holds.
    """

    registers: int
    stack: int
    shared: int
    instructions: Counter
    disorder: list[str]

    def products(self, mma: str) -> int:
        return sum(count for opcode, count in self.instructions.items() if opcode.split(".")[0] == mma)

    def copies(self) -> Counter:
        """How many asynchronous copies there are of each width in bytes."""
        copies = Counter()
        for opcode, count in self.instructions.items():
            if opcode.startswith("LDGSTS"):
                copies[16 if opcode.endswith(".128") else 8 if opcode.endswith(".64") else 4] += count
        return copies


def resources(case: CompileCase, target: int) -> Resources:
    """Compile the case for sm_`target` and read the result."""
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.tile.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))
    disorder = [name for name, pattern in DISORDER.items() if re.search(pattern, compiled.asm["ptx"], re.DOTALL)]
    return Resources(registers, stack, compiled.metadata.shared, instructions, disorder)


def failures(case: CompileCase, target: int, found: Resources) -> list[str]:
    """Return the gates that the case does not pass."""
    failed = [*found.disorder]
    for name, value, most in (
        ("registers", found.registers, MOST_REGISTERS),
        ("stack", found.stack, MOST_STACK),
        ("shared memory", found.shared, SHARED_BYTES[target]),
    ):
        if value > most:
            failed.append(f"{name} {value} > {most}")
    if case.mma and not found.products(case.mma):
        failed.append(f"no {case.mma}")
    if case.wide_copies:
        copies, tile = found.copies(), case.tile
        weight = min(WEIGHT_BYTES[kind] for kind in case.types.values() if kind in WEIGHT_BYTES)
        expected = tile.stages * tile.n * tile.k * weight / (16 * 32 * tile.warps)  # a tile per stage, by all threads
        if copies[16] < expected:
            failed.append(f"16-byte copies {copies[16]} < {expected:.0f}")
        if copies[8] + copies[4]:
            failed.append(f"narrow copies {copies[8]} of 8 bytes, {copies[4]} of 4")
    return failed


def check(job: tuple[str, int, int]) -> tuple[str, bool]:
    """Compile one case, given as module name, number of the case and target; return its line and whether it passed."""
    module, number, target = job
    case = importlib.import_module(module).compile_cases()[number]
    title = f"{case.name:<46} sm_{target}"
    try:
        found = resources(case, target)
    except Exception as error:  # whatever Triton or ptxas raises is a failed gate of this case, not the end of the run
        reason = str(error).strip().splitlines() or [""]
        return f"{title}  FAILED: does not compile: {type(error).__name__}: {reason[-1]}", False
    copies = " + ".join(f"{count} x {width}" for width, count in sorted(found.copies().items(), reverse=True)) or "no"
    failed = failures(case, target, found)
    numbers = (
        f"registers {found.registers:3}  stack {found.stack:2}  shared {found.shared / 1024:5.1f} KB  "
        f"HMMA {found.products('HMMA'):3}  HGMMA {found.products('HGMMA'):2}  copies {copies} B"
    )
    return f"{title}  {numbers}{'  FAILED: ' + '; '.join(failed) if failed else ''}", not failed


def main(modules: list[str]) -> int:
    """Check every case of the modules; return the exit code."""
    if INTERPRETED or not CUOBJDUMP.exists():
        print("unset TRITON_INTERPRET" if INTERPRETED else f"no {CUOBJDUMP}")
        return 1
    modules = modules or [name for name in MODULES if importlib.util.find_spec(name)]
    jobs = [
        (name, number, target)
        for name in modules
        for number in range(len(importlib.import_module(name).compile_cases()))
        for target in SHARED_BYTES
    ]
    passed = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:  # torch is imported once
        for line, ok in pool.map(check, jobs):
            print(line, flush=True)
            passed.append(ok)
    print(f"triton {triton.__version__}: {sum(passed)} of {len(passed)} passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
