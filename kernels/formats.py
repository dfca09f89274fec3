"""Formats of weights: plain, int8 with a scale per output feature, int4 with a scale per group of features.

One string is a whole Format, as with policies: `int8`, `int4:group=64,lm_head=no`. It is the value of a flag, an entry
in a checkpoint, and a label in tables. This file holds the arithmetic; `loading/` reads and writes such weights.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UserError

MODES = ("none", "int8", "int4")
GROUPS = (32, 64, 128)
ROWS = 256  # of a weight are quantised at once: bounds the fp32 copies
SWITCHES = {"yes": True, "no": False}


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weight [N, K] -> int8 [N, K] and fp32 scale [N]. The largest magnitude of a row becomes 127."""
    weight = weight.float()
    scale = scale_int8(weight)
    return levels_int8(weight, scale).to(torch.int8), scale


def scale_int8(weight: Tensor) -> Tensor:
    """Return the scales [N] of fp32 weight [N, K]."""
    return weight.abs().amax(1).clamp(min=1e-12) / 127


def levels_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Round weight [N, K] / scale [N] to whole numbers -127..127, still fp32."""
    return (weight / scale[:, None]).round_().clamp_(-127, 127)


def dequantise_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Return weight * scale, fp32 [N, K], of an int8 weight [N, K] and the fp32 scale [N] of its output features."""
    return weight.float() * scale[:, None]


def quantise_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Quantise weight [N, K] -> uint8 [N, K/2], laid out as in `dequantise_int4`, and bf16 scale [N, K/group].

    Raises UserError if the group does not divide K.
    """
    n, k = weight.shape
    check_group(group, k)
    weight = weight.float().view(n, k // group, group)
    scale = scale_int4(weight)
    return pack_int4(levels_int4(weight, scale)), scale


def scale_int4(weight: Tensor) -> Tensor:
    """Return the scales, bf16 [N, groups], of fp32 weight [N, groups, group].

    The value of largest magnitude becomes -8, the one level without a positive twin. So a scale can be negative.
    """
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    return (largest[..., 0] / -8).to(torch.bfloat16)


def levels_int4(weight: Tensor, scale: Tensor) -> Tensor:
    """Round weight [N, groups, group] / scale [N, groups] to whole numbers -8..7, still fp32."""
    return (weight / torch.where(scale == 0, 1, scale.float())[..., None]).round_().clamp_(-8, 7)


def pack_int4(levels: Tensor) -> Tensor:
    """Pack whole numbers -8..7 [N, groups, group] -> uint8 [N, groups * group / 2], as `dequantise_int4` reads them."""
    low, high = (levels + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | high << 4).flatten(1)


def dequantise_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """Return value * scale, fp32 [N, K], of packed uint8 [N, K/2] and scale bf16 [N, K/group].

    Byte j of a group's group/2 bytes holds element j in its low and element j + group/2 in its high nibble, each as
    value + 8 for a value in -8..7.
    """
    n, groups = scale.shape
    packed = packed.view(n, groups, -1)
    values = torch.cat((packed & 15, packed >> 4), -1).float() - 8
    return (values * scale.float()[..., None]).view(n, -1)


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight [N, K] of an int8 weight or a packed int4 one (uint8), and its scale."""
    return dequantise_int8(weight, scale) if weight.dtype == torch.int8 else dequantise_int4(weight, scale)


def check_group(group: int, features: int, of: str = "the weight") -> None:
    """Raise UserError for a group size that is not allowed, or does not divide the features of `of`."""
    if group not in GROUPS or features % group:
        raise UserError(
            f"group must be one of {', '.join(map(str, GROUPS))} and divide the {features} input features "
            f"of {of}, got {group}"
        )


@dataclass(frozen=True)
class Format:
    """Say how a model's linears are stored.

    mode: none, int8 or int4. group: features that share a scale (int4). lm_head, embedding: quantise these like the
    layers. Norms never are.
    """

    mode: str = "none"
    group: int = 32
    lm_head: bool = True
    embedding: bool = False

    @classmethod
    def parse(cls, text: str, name: str = "quantize") -> "Format":
        """Read `int8`, `int4:group=64,lm_head=no,embedding=yes`. Raises UserError listing what is allowed."""
        mode, _, settings = text.partition(":")
        if mode not in MODES:
            raise UserError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")
        given: dict = {}
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            keys = {"int8": ("lm_head", "embedding"), "int4": ("group", "lm_head", "embedding")}.get(mode, ())
            if key not in keys:
                raise UserError(f"{name} {mode} has the keys {', '.join(keys) or '(none)'}, got {key!r}")
            allowed = SWITCHES if key != "group" else {str(group): group for group in GROUPS}
            if value not in allowed:
                raise UserError(f"{name} {mode}: {key} must be one of {', '.join(allowed)}, got {value!r}")
            given[key] = allowed[value]
        return cls(mode, **given)

    def __bool__(self) -> bool:
        return self.mode != "none"

    def __str__(self) -> str:
        words = {value: word for word, value in SWITCHES.items()}
        changed = [
            (key.name, getattr(self, key.name))
            for key in dataclasses.fields(self)[1:]
            if getattr(self, key.name) != key.default
        ]
        settings = ",".join(f"{key}={words[value] if isinstance(value, bool) else value}" for key, value in changed)
        return self.mode + (":" + settings if settings else "")

    def covers(self, name: str) -> bool:
        """Tell whether a parameter of a Transformer, such as "layers.0.mlp.w2.weight", is quantised."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        return bool(self) and {"lm_head": self.lm_head, "embedding": self.embedding}.get(module, "norm" not in module)

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise weight [N, K] -> the stored weight and its scale, rounded to nearest."""
        quantise_rows = quantise_int8 if self.mode == "int8" else functools.partial(quantise_int4, group=self.group)
        weights, scales = zip(*map(quantise_rows, weight.split(ROWS)), strict=True)
        return torch.cat(weights), torch.cat(scales)

    def shapes(self, rows: int, features: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Return (shape, dtype) of the stored weight and of its scale, for a weight [rows, features]."""
        if self.mode == "int8":
            return ((rows, features), torch.int8), ((rows,), torch.float32)
        return ((rows, features // 2), torch.uint8), ((rows, features // self.group), torch.bfloat16)

    def windows(self, rows: slice, features: slice) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the slices of the stored weight and of its scale that hold these rows and features of a weight."""
        if self.mode == "int8":
            return (rows, features), (rows,)
        return tuple((rows, slice(features.start // part, features.stop // part)) for part in (2, self.group))


PLAIN = Format()
