"""Exit adapters: small corrections of the hidden state at early exits, so that early layers guess better.

The adapter of an exit maps the hidden state h to h + up·(down·h) before the final norm and the LM head. It is a tuned
lens (arXiv 2303.08112) of rank r, with 2·r·D weights. `scripts.train --adapter_exits` learns it for a frozen model.
Only drafts go through it: it changes how many are accepted, never the text.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError
from kernels.linear import linear, pack

FORMAT = "skipfast exit adapter"


class Adapter(NamedTuple):
    """Hold down [r, D] and up [D, r], plain or packed for the CPU kernel. rank: r."""

    down: Tensor
    up: Tensor
    rank: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Correct hidden states: [T, D] -> [T, D]."""
        return hidden + linear(linear(hidden, self.down, self.rank), self.up, hidden.shape[-1])


class Adapters:
    """Hold the adapters of a file, by exit layer. Compared by identity, so that a plan that has them stays hashable."""

    def __init__(self, path: str):
        """Read a file that `scripts.train` wrote: fp32 tensors exit.E.down [r, D] and exit.E.up [D, r].

        Raises UserError for a file that cannot be read or holds something else.
        """
        metadata, tensors = read_tensors(path, FORMAT, "adapter")
        self.path, self.file_hash = path, hash_of(path)
        self.by_exit: dict[int, Adapter] = {}
        try:
            self.n_layer, self.dim = int(metadata["n_layer"]), int(metadata["dim"])
            for exit_layer in sorted({int(name.split(".")[1]) for name in tensors}):
                down, up = (tensors[f"exit.{exit_layer}.{name}"] for name in ("down", "up"))
                rank = len(down)
                if rank < 2 or rank % 2 or down.shape != (rank, self.dim) or up.shape != (self.dim, rank):
                    raise UserError(
                        f"exit {exit_layer} needs down [r, {self.dim}] and up [{self.dim}, r], r even: "
                        f"got {[*down.shape]} and {[*up.shape]}"
                    )
                self.by_exit[exit_layer] = Adapter(down, up, rank)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"adapter: {path} is broken: {error}") from None
        self._ready: dict[tuple[torch.dtype, torch.device], dict[int, Adapter]] = {}

    def check(self, n_layer: int, dim: int | None, exits: tuple[int, ...]) -> None:
        """Raise UserError if the file is for a model of another shape, or has no adapter for any of `exits`."""
        check_shape(f"adapter: {self.path}", (self.n_layer, self.dim), n_layer, dim)
        if not set(exits) & set(self.by_exit):
            known, wanted = (", ".join(map(str, depths)) for depths in (self.by_exit, exits))
            raise UserError(f"adapter: {self.path} has adapters for exit {known}, none for {wanted}")

    def ready(self, like: Tensor) -> dict[int, Adapter]:
        """Return the adapters in the dtype and on the device of `like`, packed if the CPU kernels run; made once."""
        key = like.dtype, like.device
        if key not in self._ready:
            move = lambda weight: pack(weight.to(like.device, like.dtype).contiguous())
            self._ready[key] = {
                depth: Adapter(move(adapter.down), move(adapter.up), adapter.rank)
                for depth, adapter in self.by_exit.items()
            }
        return self._ready[key]


def hash_of(path: str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_shape(name: str, shape: tuple[int, int], n_layer: int, dim: int | None) -> None:
    """Raise UserError if a file for models of `shape` (layers, width) meets another model. dim None: not known."""
    if shape[0] != n_layer or dim not in (None, shape[1]):
        own = f"{n_layer}" if dim is None else f"{n_layer} of width {dim}"
        raise UserError(f"{name} is for a model of {shape[0]} layers of width {shape[1]}, this one has {own}")


def read_tensors(path: str, format: str, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a small safetensors file -> its metadata and its tensors in fp32.

    format: the value its metadata must have under "format". Raises UserError, beginning with `name`, for a file that
    cannot be read or is of another format.
    """
    try:
        if Path(path).is_dir():
            raise UserError(f"{name}: {path} is a folder")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise UserError(f"{name}: {path} is not of the format {format!r}")
            return metadata, {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name}: cannot read {path}: {reason}") from None
