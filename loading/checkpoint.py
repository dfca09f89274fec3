"""Loading checkpoints: from files on disk to a `Transformer` in memory.

`load` takes a folder or hub id in Hugging Face format, or a file in our own format (see loading/writing.py). It builds
the model on the meta device, without memory, and then fills it one tensor at a time: read, cast, fuse, check, pack,
assign. So a model loads in little more memory than its own size.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from kernels import cpu
from kernels.formats import PLAIN, Format, check_group
from kernels.linear import is_packed
from loading import hub
from loading.files import parse_json, read_json
from loading.progress import Progress
from model import Linear, ModelArgs, Transformer
from tp import Group

VERSION = "1"
WEIGHTS = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # that kernels compute in

# The one table of names: ours, Hugging Face's, shape in keys of config.json. Rows that share our name are stacked.
# Big tensors come first, so that their spare copies are made while little else is in memory.
NAMES = (
    ("embedding", "model.embed_tokens", "vocab_size, hidden_size"),
    ("lm_head", "lm_head", "vocab_size, hidden_size"),
    ("norm", "model.norm", "hidden_size"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "hidden_size"),
    ("layers.{}.attention.wqkv", "model.layers.{}.self_attn.q_proj", "num_attention_heads*head_dim, hidden_size"),
    ("layers.{}.attention.wqkv", "model.layers.{}.self_attn.k_proj", "num_key_value_heads*head_dim, hidden_size"),
    ("layers.{}.attention.wqkv", "model.layers.{}.self_attn.v_proj", "num_key_value_heads*head_dim, hidden_size"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "hidden_size, num_attention_heads*head_dim"),
    ("layers.{}.mlp_norm", "model.layers.{}.post_attention_layernorm", "hidden_size"),
    ("layers.{}.mlp.w13", "model.layers.{}.mlp.gate_proj", "intermediate_size, hidden_size"),
    ("layers.{}.mlp.w13", "model.layers.{}.mlp.up_proj", "intermediate_size, hidden_size"),
    ("layers.{}.mlp.w2", "model.layers.{}.mlp.down_proj", "hidden_size, intermediate_size"),
)


@dataclass
class Checkpoint:
    """Holds a loaded model and what its files say about it."""

    model: Transformer
    args: ModelArgs
    folder: Path  # where tokenizer and config files live
    hf_config: dict  # content of config.json
    generation_config: dict
    bytes: int  # of the weights; a tied embedding counts once, the padding of packed weights not at all


class Stored(NamedTuple):
    """Describes a tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    keys: str  # of config.json, that the shape follows from


@dataclass
class Source:
    """Holds an opened checkpoint: every tensor is known to be there in the right shape, none is read yet."""

    folder: Path
    files: dict[str, Path]  # tensor name -> its file
    args: ModelArgs
    hf_config: dict
    generation_config: dict
    is_ours: bool  # in our own format, whose tensors have our names
    format: Format = PLAIN

    def weights(
        self, name: str, dtype: torch.dtype, format: Format = PLAIN, device: str = "cpu", group: Group | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return our parameter `name` and its scale, None for a plain one.

        A weight that is quantised in the file stays so; others that `format` covers are quantised now. group: return
        only this rank's part.
        """
        if self.format.covers(name):
            return self._read_quantised(name, device, group)
        weight = self.read(name, dtype, device, group)
        return format.quantise(weight) if format.covers(name) else (weight, None)

    def read(self, name: str, dtype: torch.dtype, device: str = "cpu", group: Group | None = None) -> Tensor:
        """Read our parameter `name` in `dtype`, fusing its pieces. Raises UserError for NaN and inf.

        group: read only this rank's part.
        """
        windows = self.windows(name, group)
        rows = sum(window[0].stop - window[0].start for _, window in windows)
        shape = [rows, *(columns.stop - columns.start for columns in windows[0][1][1:])]
        tensor, row = torch.empty(shape, dtype=dtype, device=device), 0
        for piece, window in windows:
            count = window[0].stop - window[0].start
            _read_into(tensor[row : row + count], self.files[piece], piece, window if group else None)
            row += count
        return tensor

    def _read_quantised(self, name: str, device: str, group: Group | None) -> tuple[Tensor, Tensor]:
        weights, scales = [], []
        for piece, (rows, columns) in self.windows(name, group):
            weight_window, scale_window = self.format.windows(rows, columns)
            weights.append(self._read_stored(piece, weight_window, device))
            scales.append(self._read_stored(scale_name(piece), scale_window, device))
        fuse = lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts)
        return fuse(weights), fuse(scales)

    def _read_stored(self, name: str, window: tuple[slice, ...], device: str) -> Tensor:
        """Read a window of a tensor of the file, in the dtype it has there. Raises UserError for NaN and inf."""
        file = self.files[name]
        with _opened(file) as (_, read, _):
            tensor = read(name, window).clone()
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(f"{file}: tensor {name!r} holds NaN or inf")
        return tensor.to(device)

    def windows(self, name: str, group: Group | None) -> list[tuple[str, tuple[slice, ...]]]:
        """List the tensors of the file that make our parameter `name`, top to bottom, and the slices to read of each.

        group: the slices that this rank needs; None: whole tensors.
        """
        origin = name
        if name == "lm_head.weight" and name not in self.files:
            origin = "embedding.weight"  # a tied head has no tensor of its own
        if not group:
            shapes = pieces(origin, self.args, self.is_ours).items()
            return [(piece, tuple(slice(0, size) for size in shape)) for piece, (shape, _) in shapes]
        windows, above = [], 0
        for piece, (shape, keys) in pieces(origin, self.args, is_ours=False).items():
            rows, *columns = group.window(name, self.args, shape, keys)
            if self.is_ours:  # all pieces lie in one tensor, one below the other
                piece, rows = origin, slice(above + rows.start, above + rows.stop)
                above += shape[0]
            windows.append((piece, (rows, *columns)))
        return windows


def scale_name(name: str) -> str:
    """Name the tensor that holds the scale of the quantised weight `name`."""
    return name.removesuffix("weight") + "scale"


def head_is_shared(args: ModelArgs, format: Format) -> bool:
    """Return True if the LM head has no tensor of its own: it is tied to the embedding, and both have one format."""
    return args.tie_embeddings and format.covers("lm_head.weight") == format.covers("embedding.weight")


def our_names(args: ModelArgs, format: Format = PLAIN) -> Iterator[str]:
    """Yield the model's parameter names in loading order, without an LM head that has no tensor of its own."""
    names = [f"{name}.weight" for name in dict.fromkeys(row[0] for row in NAMES)]
    shared = head_is_shared(args, format)
    yield from (name for name in names if "{}" not in name and not (shared and name == "lm_head.weight"))
    for layer in range(args.n_layer):
        yield from (name.format(layer) for name in names if "{}" in name)


def stored_tensors(args: ModelArgs, format: Format, dtype: torch.dtype, is_ours: bool) -> Iterator[tuple[str, Stored]]:
    """Yield the name and description of every tensor in a file of a model, in the order that they are written in."""
    for name in our_names(args, format):
        for piece, (shape, keys) in pieces(name, args, is_ours).items():
            if not format.covers(name):
                yield piece, Stored(shape, dtype, keys)
                continue
            weight, scale = format.shapes(*shape)
            yield piece, Stored(*weight, keys)
            yield scale_name(piece), Stored(*scale, keys)


def check_format(format: Format, args: ModelArgs, ranks: int = 1) -> None:
    """Raise UserError unless a model of this shape can have this format; of several ranks, each its part."""
    if args.tie_embeddings and format.embedding and not format.lm_head:
        raise UserError(
            f"quantize {format}: the embedding of this model is its LM head, so lm_head=no,embedding=yes cannot be"
        )
    if format.mode == "int4":
        sizes = {
            "hidden_size": args.dim,
            "num_attention_heads*head_dim": args.n_head * args.head_dim // ranks,
            "intermediate_size": args.ffn_dim // ranks,
        }
        for key, features in sizes.items():
            check_group(format.group, features, key + (f" on each of {ranks} ranks" if ranks > 1 else ""))


def pieces(name: str, args: ModelArgs, is_ours: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """List the tensors of a file that make our parameter `name`, top to bottom: name -> (shape, its config keys).

    Our format (`is_ours`) has one tensor, of the same name; the Hugging Face format has one per row of NAMES.
    """
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_attention_heads*head_dim": args.n_head * args.head_dim,
        "num_key_value_heads*head_dim": args.n_kv_head * args.head_dim,
    }
    layer = re.search(r"\d+|$", name)[0]
    pattern = re.sub(r"\d+", "{}", name.removesuffix(".weight"), count=1)
    rows = [(hf, keys) for ours, hf, keys in NAMES if ours == pattern]
    theirs = {f"{hf}.weight".format(layer): (tuple(sizes[key] for key in keys.split(", ")), keys) for hf, keys in rows}
    if not is_ours:
        return theirs
    shapes = [shape for shape, _ in theirs.values()]
    keys = " + ".join(dict.fromkeys(keys for _, keys in rows))
    return {name: ((sum(shape[0] for shape in shapes), *shapes[0][1:]), keys)}


def load(
    source: str | Path | Source,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    pack: bool = True,
    progress: Progress | None = None,
    group: Group | None = None,
    format: Format = PLAIN,
) -> Checkpoint:
    """Load a Llama from a converted file or folder, a Hugging Face folder, a hub id "org/name", or an opened Source.

    dtype: of the weights; None keeps the checkpoint's own. format: quantise to it while loading.
    pack: lay linears out for the CPU kernels, if these are loaded.
    group: load only this rank's part of the model.
    Parameters do not require gradients. Raises UserError in one line naming the file, tensor or config key at fault.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    dtype = resolve_dtype(opened.args, dtype)
    args = replace(opened.args, dtype=dtype_name(dtype))
    with torch.device("meta"):
        model = group.parallelize(Transformer(group.local_args(args))) if group else Transformer(args)
    names = list(our_names(args, opened.format or format))
    if group and args.tie_embeddings and "lm_head.weight" not in names:
        names.insert(1, "lm_head.weight")  # a rank has all of the embedding and a part of the head
    size = _fill(model, names, opened, dtype, format, device, pack, progress, group)
    return Checkpoint(model, args, opened.folder, opened.hf_config, opened.generation_config, size)


def load_draft_model(
    source: Source,
    model: Transformer,
    n_layer: int,
    format: Format,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Checkpoint:
    """Load low-bit copies of the LM head and of the first n_layer layers of `model`, which was loaded from `source`.

    The copies share the model's embedding, and its head if the format leaves that out. Raises UserError as `load` does.
    """
    norm = model.norm.weight
    args = replace(source.args, n_layer=n_layer, tie_embeddings=False, dtype=dtype_name(norm.dtype))
    with torch.device("meta"):
        draft = group.parallelize(Transformer(group.local_args(args))) if group else Transformer(args)
    draft.embedding, shared = model.embedding, ["embedding.weight"]
    if not format.covers("lm_head.weight"):
        draft.lm_head, shared = model.lm_head, [*shared, "lm_head.weight"]
    names = [name for name in our_names(args) if name not in shared]
    pack = any(is_packed(linear.weight) for linear in model.modules() if isinstance(linear, Linear))
    size = _fill(draft, names, source, norm.dtype, format, norm.device.type, pack, progress, group)
    return Checkpoint(draft, args, source.folder, source.hf_config, source.generation_config, size)


def _fill(
    model: Transformer,
    names: list[str],
    source: Source,
    dtype: torch.dtype,
    format: Format,
    device: str,
    pack: bool,
    progress: Progress | None,
    group: Group | None,
) -> int:
    """Read our parameters `names` into a model on the meta device; returns their bytes."""
    size, pack = 0, pack and device == "cpu" and dtype in cpu.DTYPES
    for done, name in enumerate(names, start=1):
        module = model.get_submodule(name.removesuffix(".weight"))
        weight, scale = source.weights(name, dtype, format, device, group)
        module.weight = nn.Parameter(weight, requires_grad=False)
        size += weight.nbytes
        if scale is not None:
            module.scale = scale
            size += scale.nbytes
        shared = module is model.embedding and "lm_head.weight" not in names
        if shared:
            module = model.lm_head
            module.weight, module.scale = model.embedding.weight, scale
        if pack and isinstance(module, Linear):
            module.pack_weight()
            if shared and scale is None and is_packed(module.weight):
                model.embedding.weight = module.weight
        if progress:
            progress(done, len(names), name)
    return size


def resolve_dtype(args: ModelArgs, dtype: torch.dtype | None) -> torch.dtype:
    """Return `dtype`, or for None the checkpoint's own. Raises UserError for one that no kernel computes in."""
    if dtype is None:
        dtype = getattr(torch, args.dtype, args.dtype)
    if dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype} is not supported, only float32, float16, bfloat16: ask for one of these")
    return dtype


def open_source(source: str | Path) -> Source:
    """Find a checkpoint's files and check the names and shapes of their tensors, reading headers only.

    source: a converted file or folder, a Hugging Face folder, or a hub id. Raises UserError as `load` does.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = hub.download(str(source))
    folder, weights = (path, _weight_files(path)) if path.is_dir() else (path.parent, [path])
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in weights:
        with _opened(file) as (names, read, metadata):  # mapped: a tensor takes no memory until it is touched
            shapes |= {name: tuple(read(name).shape) for name in names}
            files |= {name: file for name in names}
    # The format is decided here and nowhere else, by what the file says about itself.
    is_ours, format = metadata.get("format") == "skipfast", PLAIN
    config_file = weights[0] if is_ours else folder / "config.json"
    if is_ours:
        if (version := metadata.get("version")) != VERSION:
            raise UserError(f"{config_file}: version {version!r} is not supported, only {VERSION!r}")
        format = Format.parse(metadata.get("quantize", ""), f"{config_file}: quantize")
        hf_config = parse_json(metadata.get("config", ""), config_file)
        generation_config = parse_json(metadata.get("generation_config", "{}"), config_file)
    elif path.is_dir():
        hf_config = read_json(config_file)
        generation_file = folder / "generation_config.json"
        generation_config = read_json(generation_file) if generation_file.exists() else {}
    else:
        raise UserError(f"{path} was not written by convert_hf_checkpoint.py; pass its folder instead")
    try:
        args = ModelArgs.from_hf_config(hf_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from error
    _check_tensors(weights[0] if len(weights) == 1 else folder, args, is_ours, format, shapes)
    return Source(folder, files, args, hf_config, generation_config, is_ours, format)


def _check_tensors(
    path: Path, args: ModelArgs, is_ours: bool, format: Format, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise UserError unless a file holds exactly the tensors that its config asks for, in their shapes."""
    known = set()
    for name, stored in stored_tensors(args, format, torch.float32, is_ours):  # a config may claim billions of layers
        if name not in shapes:
            why = "tie_word_embeddings is false" if name == "lm_head.weight" else f"there are {args.n_layer} layers"
            raise UserError(f"{path}: tensor {name!r} is missing (by its config {why})")
        check_shape(path, name, shapes[name], stored.shape, stored.keys)
        known.add(name)
    for name, shape in shapes.items():
        if name in known:
            continue
        if name == "lm_head.weight" and args.tie_embeddings:  # some tools write the tied head a second time
            check_shape(path, name, shape, *pieces(name, args, is_ours)[name])
        elif not name.endswith("rotary_emb.inv_freq"):  # old files: rope_table computes it
            raise UserError(f"{path}: tensor {name!r} is not part of a Llama with {args.n_layer} layers")


def check_shape(path: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...], keys: str) -> None:
    """Raise UserError, naming the config keys behind the wanted shape, unless a tensor has it."""
    if shape != wanted:
        raise UserError(f"{path}: tensor {name!r} has shape {list(shape)}, its config wants {list(wanted)} ({keys})")


def _weight_files(folder: Path) -> list[Path]:
    """List the files that hold a folder's weights: one, or those that its index names."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index_file = folder / f"{name}.index.json"
        if index_file.exists():
            shards = read_json(index_file).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
                raise UserError(f"{index_file}: key 'weight_map' (tensor name -> file name) is missing or broken")
            return [folder / file for file in sorted(set(shards.values()))]
    raise UserError(f"{folder} holds no {WEIGHTS}, no pytorch_model.bin and no index of either")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Iterable[str], Callable[..., Tensor], dict[str, str]]]:
    """Open a weight file, memory-mapped: (tensor names, read, metadata).

    read(name) gives a tensor, read(name, window) the slices `window` of it. Raises UserError for a damaged file.
    """
    if not file.exists():
        raise UserError(f"{file} is missing, though the index of its folder names it")
    try:
        if file.suffix == ".bin":
            state = _read_bin(file)
            yield state.keys(), lambda name, window=None: state[name][window] if window else state[name], {}
        else:
            with safe_open(file, framework="pt") as opened:
                slices = lambda name, window=None: opened.get_slice(name)[window] if window else opened.get_tensor(name)
                yield opened.keys(), slices, opened.metadata() or {}
    except (SafetensorError, RuntimeError, AttributeError, OSError) as error:
        raise _damaged(file, error) from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle and torch have a dozen kinds of error for bytes that make no sense
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    first_line = str(error).strip().split("\n")[0]
    return UserError(f"{file} is truncated, corrupt or no weight file ({first_line})")


def _read_into(target: Tensor, file: Path, name: str, window: tuple[slice, ...] | None = None) -> None:
    """Copy a tensor of a file, or a window of it, into `target`, casting. Raises UserError for NaN and inf.

    The file is opened for this tensor alone, because its pages count as memory while they stay mapped.
    """
    with _opened(file) as (_, read, _):
        stored = read(name, window)
        if stored.dtype not in (*DTYPES.values(), torch.float64):
            raise UserError(f"{file}: tensor {name!r} has dtype {stored.dtype}, only plain floats can be loaded")
        target.copy_(stored)
        if not _is_finite(target):
            problem = f"a value too large for {dtype_name(target.dtype)}" if _is_finite(stored) else "NaN or inf"
            raise UserError(f"{file}: tensor {name!r} holds {problem}")


def _is_finite(tensor: Tensor) -> bool:
    # aminmax passes NaN and inf on, needs no temporary and is 50 times as fast as isfinite
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
