"""The other engines of `scripts.benchmark --against`. Each is optional."""

import argparse
import importlib.util
from collections.abc import Iterable

import torch

NEEDS = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp", "gguf")}
INSTALL = {"transformers": "pip install transformers", "llama.cpp": "pip install llama-cpp-python gguf"}


def missing(peers: Iterable[str], device: str) -> dict[str, str]:
    """Return those of the peers asked for that cannot run -> why, and what to install."""
    absent = {peer: [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None] for peer in peers}
    reasons = {peer: f"needs {INSTALL[peer]}" for peer, names in absent.items() if names}
    if "llama.cpp" in absent and device != "cpu":
        reasons["llama.cpp"] = "it is measured on the CPU only"
    return reasons


def thread_counts(flags: argparse.Namespace) -> list[int]:
    """List the thread counts a peer may try: --threads, or one and all."""
    return [flags.threads] if flags.threads else sorted({1, torch.get_num_threads()})
