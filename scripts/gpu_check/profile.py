"""The profile sections of `gpu_check`: how many launches and waits a round has, and where its time goes."""

import warnings
from collections.abc import Iterator
from unittest import mock

import torch

from drafting.plan import Round
from scripts.gpu_check.engine import SyntheticModel, dynamic_texts, static_texts
from scripts.gpu_check.report import Report

GAP_US = 5  # the GPU idle for longer between two kernels was waiting for Python, not for a kernel to start
LAUNCHING = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")  # calls that start GPU work


def check_profile(report: Report, name: str, mode: str) -> None:
    """Measure launches, waits, GPU time and Python's time of a round.

    Wears the process: the profiler slows all that follows, and where it was detached, captured graphs have crashed
    (pytorch issue 144455, pull request 112507).
    """
    synthetic = SyntheticModel(report, name, mode)
    report.worn = report.device == "cuda"
    exit_layer, count = synthetic.shape.exit_layer, report.shapes.profiled_tokens
    dynamic = dynamic_texts(exit_layer) if synthetic.thorough else []
    for text in ("none", *static_texts(exit_layer), *dynamic):
        row = report.attempt(text, profile_row, synthetic, text, count)
        if row:
            report.row(**row)


def profile_row(synthetic: SyntheticModel, text: str, count: int) -> dict:
    synthetic.continued(text, count)  # captures what is captured
    launches = count_launches(synthetic.rounds(text, count), synthetic.report.device)
    cuda, cpu = torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU
    for activities in ([cuda], [cpu, cuda]) if synthetic.report.device == "cuda" else ([cpu],):
        numbers = device_profile(synthetic.rounds(text, count), synthetic.report.device, activities)
        if numbers["kernels"]:  # with the GPU alone some versions see nothing; the CPU's events slow Python
            break
    return {"policy": text} | launches | numbers


def count_launches(stream: Iterator[Round], device: str) -> dict:
    """Count the graphs that a round starts, and its waits for the GPU other than to read its result; None on a CPU.

    The first round is not counted: it starts its follower, too, as each then does for the next.
    """
    if device == "cpu":
        return {"graph_launches": None, "syncs": None}
    next(stream), next(stream)
    counted = mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay)
    with warnings.catch_warnings(record=True) as caught, counted as replays:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rounds = len(list(stream))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return {"graph_launches": replays.call_count / max(rounds, 1), "syncs": waits / max(rounds, 1)}


def device_profile(stream: Iterator[Round], device: str, activities: list) -> dict:
    """Measure where a round's time goes: calls that start GPU work, kernels, and waits for Python between them.

    A round that the runner started ahead of the text's end is counted with the others.
    """
    next(stream)  # the prefill
    with torch.profiler.profile(activities=activities) as profile:
        rounds = len(list(stream))
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events if event.device_type == kind)
    starts = sum(event.name.startswith(LAUNCHING) for event in events if event.device_type != kind)
    if not spans or not rounds:
        return dict.fromkeys(("launches", "kernels", "device_us", "host_us"))
    waiting, end = 0.0, spans[0][0]
    for start, stop in spans:
        waiting += start - end if start - end > GAP_US else 0.0
        end = max(end, stop)
    busy = end - spans[0][0] - waiting
    return {
        "launches": starts / rounds if starts else None,
        "kernels": len(spans) / rounds,
        "device_us": busy / rounds,
        "host_us": waiting / rounds,
    }
