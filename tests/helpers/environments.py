"""Fresh virtual environments for the tests that install something: what a stranger's first commands meet."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

HIDDEN = ("PYTHONPATH", "TRITON_INTERPRET")  # what the test process has and a stranger has not
LONGEST_SECONDS = 300


def fresh_environment(folder: Path) -> Path:
    """Make a fresh virtual environment that sees the packages of this one -> its Python.

    What it sees is a stand-in for downloading gigabytes. skipfast itself is not among it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(where, "seen.pth").write_text("\n".join(seen), encoding="utf-8")
    return python


def run_in(python: Path, command: str, cwd: Path) -> str:
    """Run a shell's command line, `python` and `pip` being those of the environment -> what it printed."""
    words = shlex.split(command)
    if words[0] == "pip":
        words = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *words[1:]]
    elif words[0] == "python":
        words[0] = str(python)
    clean = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
