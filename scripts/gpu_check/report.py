"""Measure time for `gpu_check`, and write its results to the JSON file.

Every result goes into the file at once: a crash, or a machine that is taken away, loses only the measurement that was
running. An error is recorded where it happened, and the next thing is tried.
"""

import faulthandler
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cli
from loading.files import write_json
from scripts.gpu_check.shapes import Shapes
from scripts.gpu_check.targets import judge_all

REPEATS = 7  # of every timing of a kernel
WARM_S = 0.03  # of work before a timing: an idle GPU has turned its clocks down
GRACE_S = 45  # after the time is over, for the section that is running
SHORT = {
    "tokens_per_s": "tokens/s",
    "acceptance_rate": "accepted",
    "tokens_per_round": "a round",
    "ideal_speedup": "ideal",
    "share_of_ideal": "of ideal",
    "share_of_bandwidth": "of copy",
    "prefill_ms": "prefill ms",
    "round_us": "round µs",
    "graph_launches": "graphs",
    "device_us": "device µs",
    "host_us": "host µs",
    "us": "µs",
    "matmul_us": "matmul µs",
    "ours_over_it": "ours ÷ it",
}
HIDDEN = {"bytes", "weight_bytes_per_token", "tokens_per_s_runs", "proposed_rounds"}


class DeviceLostError(RuntimeError):
    """The GPU answers nothing to this process any more, as after an illegal access: only a new process can go on."""


class Report:
    """Holds the whole result. section: the part being filled. worn: this process should measure nothing more."""

    def __init__(self, path: Path, shapes: Shapes, device: str, minutes: float):
        """path: the file, which names the sections."""
        self.path, self.shapes, self.device = path, shapes, device
        self.deadline = time.perf_counter() + 60 * minutes
        self.result = json.loads(path.read_text(encoding="utf-8"))
        self.section: dict = {}
        self.worn = False

    @property
    def bandwidth(self) -> float | None:
        """Return the bytes/s of a copy, read and written; None before they are measured."""
        rows = self.result["sections"]["environment"].get("rows")
        return 1e9 * rows[0]["copy_GB_per_s"] if rows else None

    def save(self) -> None:
        self.result["targets"] = judge_all(self.result["sections"])
        write_json(self.path, self.result)

    def run(self, name: str, check: Callable, *what: str) -> None:
        """Run one section if there is time, whatever comes of it."""
        needed, start = self.shapes.sections[name], time.perf_counter()
        if start + needed >= self.deadline:
            return
        self.section = self.result["sections"][name]
        self.section |= {"status": "running", "checks": [], "rows": [], "failures": {}, "skipped": {}, "notices": []}
        self.save()
        if self.device == "cuda":  # ends the process, with a traceback, even where it waits for the GPU for ever
            faulthandler.dump_traceback_later(min(60 + 2 * needed, self.deadline + GRACE_S - start), exit=True)
        try:
            self.attempt(name, check, self, *what)
            free_memory(self.device)
        except DeviceLostError as error:
            cli.notice(f"{name}: {error}")
            self.worn = True
        if self.device == "cuda":
            faulthandler.cancel_dump_traceback_later()
        self.section["status"] = "failed" if self.section["failures"] else "done"
        self.section["seconds"] = time.perf_counter() - start
        self.save()
        print_section(name, self.section)

    def attempt(self, name: str, call: Callable, *arguments):
        """Return call(*arguments); None, with the error in the section, if it raises. Raises DeviceLostError."""
        try:
            return call(*arguments)
        except DeviceLostError:
            raise
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.section["failures"].setdefault(name, message[:2000])
            cli.notice(f"{name} failed: {message}")
            traceback.print_exc()
        if self.device == "cuda":  # only now: the exception holds the frames that hold the tensors
            try:
                torch.cuda.synchronize()
                torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves its own behind
                gc.collect()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLostError(f"the GPU is lost to this process: {error}") from None
        return None

    def check(self, name: str, ok: bool, **numbers) -> None:
        self.section["checks"].append({"name": name, "ok": bool(ok)} | numbers)

    def within(self, name: str, error: Tensor | float, bound: float) -> None:
        error = float(error)
        self.check(name, error <= bound, error=error, bound=bound)  # a NaN fails

    def same_rows(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Check that each pair has the same bits. torch's CPU operators promise none: there, that it is close."""
        same = torch.equal if self.device == "cuda" else functools.partial(torch.allclose, rtol=0.02, atol=0.02)
        unequal = [(a, b) for a, b in pairs if not same(a, b)]
        numbers = {"unequal": len(unequal), "of": len(pairs)} if unequal else {}
        if unequal:
            numbers["largest"] = max((a.double() - b.double()).abs().max().item() for a, b in unequal)
        self.check(name, not unequal, **numbers)

    def row(self, **values) -> None:
        self.section["rows"].append(values)
        self.save()

    def time(self, op: str, shape: str, rows: int, read: int, calls: list[Callable], matmuls=()) -> None:
        """Time a kernel that reads `read` bytes; matmuls: plain ones, the fastest of which stands beside it."""
        timed = functools.partial(seconds_per_call, launches=self.shapes.launches, device=self.device)
        took, beside = timed(calls), min(map(timed, matmuls), default=None)
        self.row(
            op=op,
            shape=shape,
            rows=rows,
            us=1e6 * took,
            bytes=read,
            share_of_bandwidth=self.share(read / took),
            matmul_us=None if beside is None else 1e6 * beside,
        )

    def share(self, bytes_per_s: float) -> float | None:
        return bytes_per_s / self.bandwidth if self.bandwidth else None

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def free_memory(device: str) -> None:
    torch._dynamo.reset()  # compiled functions keep the memory of their graphs
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def elapsed(run: Callable[[], object], device: str) -> float:
    """Measure the seconds that `run` takes on the GPU, by CUDA events; on a CPU, of wall time."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def median_seconds(run: Callable[[], object], device: str, warm_s: float = WARM_S) -> float:
    """Measure median seconds of `run`, after it has kept the GPU busy for warm_s."""
    end = time.perf_counter() + warm_s
    elapsed(run, device)
    while device == "cuda" and time.perf_counter() < end:
        elapsed(run, device)
    return statistics.median(elapsed(run, device) for _ in range(REPEATS))


def seconds_per_call(calls: list[Callable[[], object]], launches: int, device: str) -> float:
    """Measure median seconds of a call: all calls one after the other in a CUDA graph, at least `launches` in turns."""
    calls = list(itertools.islice(itertools.cycle(calls), max(launches, len(calls))))

    def run():
        for call in calls:
            call()

    if device == "cuda":
        calls[0]()  # compiles, and allocates what may not be allocated during capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return median_seconds(run, device) / len(calls)


def print_section(name: str, section: dict) -> None:
    """Print a table of the rows, and a line for each check that failed."""

    def text(value) -> str:
        if isinstance(value, float):
            return format(value, ".3g" if abs(value) < 100 or math.isnan(value) else ".0f")
        return "–" if value is None else str(value).replace("num_draft_tokens", "K")

    columns = [column for column in next(iter(section["rows"]), {}) if column not in HIDDEN]
    titles = [SHORT.get(column, column) for column in columns]
    passed, count = sum(check["ok"] for check in section["checks"]), len(section["checks"])
    title = f"{name}: {section['status']}, {passed} of {count} checks passed, {section['seconds']:.0f} s"
    cli.print_table(title, titles, [[text(row.get(column)) for column in columns] for row in section["rows"]])
    for check in section["checks"]:
        if not check["ok"]:
            print("FAILED", check["name"], *(f"{key} {text(check[key])}" for key in list(check)[2:]))
    sys.stdout.flush()  # another process may go on
