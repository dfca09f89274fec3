"""Processes of their own: a piece of Python, a group of ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "checkpoints" / "demo"
# Machines with older instructions: {name: (the flag of a processor that can stand for one, what to compile for)}.
OTHER_MACHINES = {
    "avx2": ("avx2", "haswell"),
    "avx512": ("avx512bw", "skylake-avx512"),
    "without_amx": ("amx_bf16", "native -mno-amx-tile -mno-amx-bf16"),
}


def run_python(code: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """Run a piece of Python from the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def start_ranks(size: int, command: list, stdin: int | None = subprocess.DEVNULL) -> list[subprocess.Popen]:
    """Start `python COMMAND` on `size` ranks, without torchrun, whose start takes as long as theirs.

    stdin: of rank 0; the others have none.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch's own words when the store has gone
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL if rank else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def outputs_of(ranks: list[subprocess.Popen], input: str | None = None, seconds: float = 120) -> list[tuple[str, str]]:
    """Wait for all ranks and return what each wrote to (stdout, stderr). input: what is typed at rank 0.

    No rank outlives the call. Raises subprocess.TimeoutExpired after `seconds`.
    """
    try:
        return [rank.communicate(None if number else input, seconds) for number, rank in enumerate(ranks)]
    finally:
        for rank in ranks:
            rank.kill()
