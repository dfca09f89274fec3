"""Load the Triton kernels, and tell what they take.

The kernel files need Triton, which is optional. So only `load()` imports them, when a model goes to a GPU, and their
tests.
"""

import importlib
import subprocess

import torch

ROWS = 16  # rows of every tile: the smallest a tensor core takes, and the most a decoding call has
HEAD_DIM = 256  # width of the widest head that an attention tile holds
FEATURES = 16  # the input features of a linear are a multiple of this
OLDEST = (8, 0)  # compute capability that has bf16 on tensor cores
MODULES = ("linear", "exit_head", "attention")

_loaded = False


def load() -> str | None:
    """Register the ops `torch.ops.skipfast.*`. Return None on success, else the reason in one line."""
    global _loaded
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        return f"the GPU kernels need compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        for name in MODULES:
            importlib.import_module(f"kernels.gpu.{name}")
    except (ImportError, AttributeError) as error:  # an old Triton raises the latter
        return f"the GPU kernels need Triton 3.6 or newer ({error})"
    if torch.cuda.is_available():
        try:
            importlib.import_module("triton").runtime.driver.active.get_current_target()  # builds the launcher
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            return f"the GPU kernels need a C compiler and Python's headers ({error})"
    _loaded = True
    return None


def uncovered(args, dtype: torch.dtype) -> str | None:
    """Return in one line why the kernels cannot take a model, so that torch's operators serve it; None if they can.

    args: model.ModelArgs, of this rank's part of the model.
    """
    if dtype is not torch.bfloat16:
        return f"the GPU kernels take bf16, not {str(dtype)[6:]}"
    if args.head_dim > HEAD_DIM or args.n_head > ROWS * args.n_kv_head:
        return (
            f"the GPU attention kernel takes heads of up to {HEAD_DIM} and {ROWS} query heads per key-value head, "
            f"not {args.head_dim} and {args.n_head // args.n_kv_head}"
        )
    inputs = {"hidden_size": args.dim, "intermediate_size": args.ffn_dim, "heads' width": args.n_head * args.head_dim}
    for name, features in inputs.items():
        if features % FEATURES:
            return f"the GPU kernels take a {name} that is a multiple of {FEATURES}, not {features}"
    return None


def supports(rows: torch.Tensor) -> bool:
    """Tell whether the kernels take these rows [..., D] of hidden states: 1 to 16 of them, bf16, on a GPU."""
    return _loaded and rows.is_cuda and rows.dtype == torch.bfloat16 and 0 < rows.shape[:-1].numel() <= ROWS
