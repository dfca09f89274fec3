"""What a device can do and what a model takes of it: memory bandwidth, and bytes of weights, caches and peaks."""

import resource
import time

import torch

from decoding.visits import head_bytes, module_bytes
from model import Transformer


def read_bandwidth(device: str = "cpu", gib: float = 1.0, repeats: int = 5) -> float:
    """Return the bytes/s at which torch sums a buffer far larger than the caches: a floor of the read bandwidth."""
    buffer = torch.ones(int(gib * 2**28), dtype=torch.float32, device=device)
    buffer.sum().item()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return buffer.nbytes / min(times)


def peak_memory_bytes(device: str) -> int:
    """Return the most that this process has taken: of a GPU what torch has given out, else of the machine's memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def streamed_bytes(model: Transformer, layers: float, heads: float) -> float:
    """Return the weight bytes that so many visits of layers and of the LM head read."""
    return layers * module_bytes(model.layers[0]) + heads * head_bytes(model.exit_head())


def memory(model: Transformer, device: str, loaded: dict[str, int], before: int) -> dict:
    """Say what this rank's model takes on a device, as it stands in JSON files.

    loaded: weight bytes by format. before: the peak before loading, in bytes.
    """
    return {
        "weight_bytes": loaded,
        "cache_bytes": 2 * model.args.n_layer * model.layers[0].attention.v_cache.nbytes,
        "peak_memory_bytes": {"before_loading": before, "after_loading": peak_memory_bytes(device)},
        "weight_bytes_per_pass": streamed_bytes(model, model.args.n_layer, 1),
    }
