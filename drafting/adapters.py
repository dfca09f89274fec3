"""Exit adapters: a small correction of the state that leaves the model early, so that early layers guess better.

The adapter of an exit adds a low-rank map to the hidden state before the final norm and the LM head: h + up·(down·h), a
tuned lens (arXiv 2303.08112) of rank r with 2·r·D weights. `scripts.train --adapter_exits` learns it, the model frozen.
Only drafts go through it, so it can change how many are accepted and never the text.
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
    """down [r, D] and up [D, r], plain or packed for the CPU kernel; rank: r."""

    down: Tensor
    up: Tensor
    rank: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> the corrected [T, D]."""
        return hidden + linear(linear(hidden, self.down, self.rank), self.up, hidden.shape[-1])


class Adapters:
    """The adapters of a file by exit layer. Compared by identity, so that a plan that has them stays hashable."""

    def __init__(self, path: str):
        """Read a file of `scripts.train`: fp32 tensors exit.E.down [r, D] and exit.E.up [D, r].

        Raises UserError for a file that cannot be read or holds something else.
        """
        metadata, tensors = read_tensors(path, FORMAT, "adapter")
        self.path, self.content = path, file_hash(path)
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
        """Raise UserError if they are of a model of another shape, or have nothing for these exits."""
        check_shape(f"adapter: {self.path}", (self.n_layer, self.dim), n_layer, dim)
        if not set(exits) & set(self.by_exit):
            known, wanted = (", ".join(map(str, depths)) for depths in (self.by_exit, exits))
            raise UserError(f"adapter: {self.path} has adapters for exit {known}, none for {wanted}")

    def ready(self, like: Tensor) -> dict[int, Adapter]:
        """The adapters in the dtype and on the device of `like`, packed where its kernels are used; made once."""
        key = like.dtype, like.device
        if key not in self._ready:
            move = lambda weight: pack(weight.to(like.device, like.dtype).contiguous())
            self._ready[key] = {
                depth: Adapter(move(each.down), move(each.up), each.rank) for depth, each in self.by_exit.items()
            }
        return self._ready[key]


def file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_shape(name: str, found: tuple[int, int], n_layer: int, dim: int | None) -> None:
    """Raise UserError if a file for models of `found` (layers, width) meets another one. dim None: not known."""
    if found[0] != n_layer or dim not in (None, found[1]):
        own = f"{n_layer}" if dim is None else f"{n_layer} of width {dim}"
        raise UserError(f"{name} is for a model of {found[0]} layers of width {found[1]}, this one has {own}")


def read_tensors(path: str, format: str, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a small safetensors file. Raises UserError for any other file, naming `name`."""
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
