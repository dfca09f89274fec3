"""Build `ops.cpp` for this machine on first use, and load it.

`load()` compiles with -march=native into ~/.cache/skipfast, once per machine and torch version, in 8 to 20 s. It
registers the namespace `torch.ops.skipfast_cpu`. Without a compiler it returns the reason in one line, and every public
function of kernels/ keeps to its pure-torch reference.

Environment: SKIPFAST_NO_CPP=1 never builds or loads; SKIPFAST_MARCH replaces "native" (tests: other instruction sets);
CXX names the compiler; XDG_CACHE_HOME moves the cache.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCES = Path(__file__).parent  # of ops.cpp, the only translation unit, and its headers
BUILD_SECONDS = 15  # that a user is told to expect
BUILD_TIMEOUT_SECONDS = 600
OLDEST_TORCH = (2, 10)  # ops.cpp is written against torch's stable ABI of this version
DTYPES = (torch.bfloat16, torch.float32)

_loaded = False
_reason: str | None = None  # why loading failed; remembered, so that a failing build is tried once per process


def loaded() -> bool:
    """Tell whether the C++ ops are loaded in this process."""
    return _loaded


def supports(tensor: torch.Tensor) -> bool:
    """Tell whether the C++ ops are loaded and take this tensor's device and dtype."""
    return _loaded and tensor.device.type == "cpu" and tensor.dtype in DTYPES


def load(progress: Callable[[str], None] | None = None) -> str | None:
    """Build the C++ ops if needed, and load them. Return None on success, else the reason in one line.

    Never raises for a machine that cannot build. progress: called with one line before a compilation starts.
    """
    global _loaded, _reason
    if _loaded or _reason is not None:
        return _reason
    try:
        torch.ops.load_library(_built_library(progress))
        _register_fakes()
        _loaded = True
    except (_Unavailable, OSError) as error:
        _reason = " ".join(str(error).split()) or type(error).__name__
    return _reason


class _Unavailable(Exception):
    """Say, in one line for the user, why the C++ ops cannot be had here."""


def _built_library(progress: Callable[[str], None] | None) -> Path:
    """Return the path of a library built for this source, machine, compiler and torch; build it if there is none."""
    if os.environ.get("SKIPFAST_NO_CPP", "0") not in ("", "0"):
        return _fail("switched off by SKIPFAST_NO_CPP")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return _fail(f"torch {torch.__version__} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    compiler = _find_compiler()
    compile_flags, link_flags = _flags()
    command = compiler + compile_flags + [str(SOURCES / "ops.cpp")] + link_flags
    try:
        version = subprocess.run(compiler + ["--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return _fail(f"compiler {compiler[0]} does not run: {error}")
    key = hashlib.sha256(
        "\0".join(
            [
                *(path.read_text() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])),
                " ".join(command),
                version,
                torch.__version__,
                _cpu_flags(),
            ]
        ).encode()
    ).hexdigest()[:20]
    name = f"cpu_ops-{key}.so"
    for folder in (_user_folder, _private_folder):  # the second only if the first is not writable
        try:
            target = folder() / name
            if target.is_file():
                return target
            handle, temporary = tempfile.mkstemp(prefix=name, suffix=".tmp", dir=target.parent)
        except OSError:
            continue
        os.close(handle)
        return _compile(command, Path(temporary), target, progress)
    return _fail("no writable folder for the compiled ops; set XDG_CACHE_HOME to one")


def _compile(command: list[str], temporary: Path, target: Path, progress: Callable[[str], None] | None) -> Path:
    """Compile to a temporary name, then rename: of processes that race, each puts a complete file in place."""
    if progress:
        progress(f"building CPU kernels ({Path(command[0]).name}, about {BUILD_SECONDS} s, once)")
    started = time.monotonic()
    try:
        result = subprocess.run(
            command + ["-o", str(temporary)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_SECONDS
        )
        if result.returncode:
            lines = result.stderr.splitlines() or [f"exit status {result.returncode}"]
            return _fail("build failed: " + next((line for line in lines if "error" in line), lines[0]).strip())
        os.replace(temporary, target)
    except subprocess.TimeoutExpired:
        return _fail(f"build failed: no result after {time.monotonic() - started:.0f} s")
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _find_compiler() -> list[str]:
    """Return the compiler as a command; $CXX may hold arguments ("ccache g++")."""
    for name in [os.environ.get("CXX", ""), "g++", "clang++", "c++"]:
        words = shlex.split(name)
        path = shutil.which(words[0]) if words else None
        if path:
            return [path] + words[1:]
    return _fail("no C++ compiler found (install g++ or set CXX)")


def _flags() -> tuple[list[str], list[str]]:
    """Return compile and link flags. OpenMP is not among them: threads come from torch's pool, by its stable ABI."""
    root = Path(torch.__file__).parent
    march = os.environ.get("SKIPFAST_MARCH", "native")
    tuning = f"-march={march}" if platform.machine().lower() in ("x86_64", "amd64") else f"-mcpu={march}"
    # contraction is off so that only explicit fused multiply-adds fuse, in every instantiation alike
    compile_flags = [
        "-O3",
        *tuning.split(),
        "-std=c++17",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-w",
        f"-I{root / 'include'}",
    ]
    return compile_flags, [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def _cpu_flags() -> str:
    """Return what -march=native depends on, so that a cache in a shared home does not serve another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("flags", "Features", "model name", "cpu family", "model", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def _user_folder() -> Path:
    """Return the user's cache folder for the library; create it if needed. Raises OSError if that fails."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "skipfast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _private_folder() -> Path:
    """Return a folder in the shared /tmp that only this user can write to, because code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"skipfast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is not private")
    return folder


def _fail(reason: str):
    raise _Unavailable(reason)


def _register_fakes() -> None:
    """Tell torch.compile the shapes of results. All are new contiguous tensors; only the caches are changed."""

    @torch.library.register_fake("skipfast_cpu::linear")
    def _(x, packed, out_features):
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("skipfast_cpu::rms_norm")
    def _(x, weight, eps):
        return x.new_empty(x.shape)

    @torch.library.register_fake("skipfast_cpu::attention")
    def _(q, k, v, k_cache, v_cache, positions):
        return q.new_empty(q.shape)

    @torch.library.register_fake("skipfast_cpu::swiglu")
    def _(gate_up):
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @torch.library.register_fake("skipfast_cpu::exit_head")
    def _(hidden, norm, packed, n_vocab, eps, want_stats, temperature, seed, position):
        rows = hidden.shape[0]
        return (
            hidden.new_empty(rows, dtype=torch.int64),
            hidden.new_empty(rows if want_stats else 0, 4, dtype=torch.float32),
            hidden.new_empty(rows if temperature > 0 else 0, dtype=torch.int64),
        )
