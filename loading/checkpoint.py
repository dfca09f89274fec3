"""Checkpoints: everything between files on disk and a `Transformer` in memory, in both directions.

`load` takes a folder or hub id in Hugging Face format, or a file of our own, and streams it tensor by tensor into a
model built on the meta device: read, cast, fuse, check, pack, assign. No step holds more than one spare tensor, so a
model loads in little more than its own size. `convert` streams the same tensors into our format: one safetensors file
under the model's own names (q, k, v and gate, up already fused), with config and format in its metadata.
"""

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import UserError
from kernels import cpu
from kernels.formats import PLAIN, Format, check_group
from kernels.linear import is_packed
from model import Linear, ModelArgs, Transformer
from tp import Group

Progress = Callable[[int, int, str], None]  # (tensors done, tensors in total, name of the last one)
ReadWeights = Callable[[str], tuple[Tensor, Tensor | None]]  # our parameter -> its weight and, if quantised, its scale

VERSION = "1"
WEIGHTS = "model.safetensors"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.jinja", "LICENSE*"]
HUB_LEFT_OUT = ["*/*.json", "*/*.safetensors", "*/*.bin"]  # other formats of the same weights in subfolders

# The one table of names: ours, Hugging Face's, shape in keys of config.json. Rows that share our name are stacked.
# Big tensors come first: their spare copies are then made while little else is in memory.
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
    """A loaded model and what its files say of it."""

    model: Transformer
    args: ModelArgs
    folder: Path  # where tokenizer and config files live
    hf_config: dict  # content of config.json
    generation_config: dict
    bytes: int  # weight bytes; a tied embedding counts once, padding of packed weights not at all


class Stored(NamedTuple):
    """A tensor of a file: its shape and dtype, and the config keys behind the shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    keys: str


@dataclass
class Source:
    """An opened checkpoint: every tensor is known to be there in the right shape, none is read yet."""

    folder: Path
    files: dict[str, Path]  # tensor name -> the file it is in
    args: ModelArgs
    hf_config: dict
    generation_config: dict
    fused: bool  # our format: tensors under our names
    format: Format = PLAIN

    def weights(
        self, name: str, dtype: torch.dtype, format: Format = PLAIN, device: str = "cpu", group: Group | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Our parameter `name`, and its scale if it is quantised: in the file already, or now to `format`.

        group: only what this rank has of it.
        """
        if self.format.covers(name):
            return self._read_quantised(name, device, group)
        weight = self.read(name, dtype, device, group)
        return format.quantise(weight) if format.covers(name) else (weight, None)

    def read(self, name: str, dtype: torch.dtype, device: str = "cpu", group: Group | None = None) -> Tensor:
        """Read our parameter `name`, fused if need be, in `dtype`. Raises UserError for NaN and inf.

        group: read only what this rank has of it.
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
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for piece, (rows, columns) in self.windows(name, group):
            for part, tensor, window in zip(
                found, (piece, scale_name(piece)), self.format.windows(rows, columns), strict=True
            ):
                part.append(_read_stored(self.files[tensor], tensor, window).to(device))
        weight, scale = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in found)
        return weight, scale

    def windows(self, name: str, group: Group | None) -> list[tuple[str, tuple[slice, ...]]]:
        """What is to be read for our parameter `name`: tensors of the file, and the slices of them, top to bottom."""
        origin = name
        if name == "lm_head.weight" and name not in self.files:
            origin = "embedding.weight"  # a tied head has no tensor of its own
        if not group:
            shapes = pieces(origin, self.args, self.fused).items()
            return [(piece, tuple(slice(0, size) for size in shape)) for piece, (shape, _) in shapes]
        found, above = [], 0
        for piece, (shape, keys) in pieces(origin, self.args, fused=False).items():
            rows, *columns = group.window(name, self.args, shape, keys)
            if self.fused:  # the pieces lie in one tensor, one below the other
                piece, rows = origin, slice(above + rows.start, above + rows.stop)
                above += shape[0]
            found.append((piece, (rows, *columns)))
        return found


def scale_name(name: str) -> str:
    """The tensor that holds the scale of the quantised weight `name`."""
    return name.removesuffix("weight") + "scale"


def head_is_shared(args: ModelArgs, format: Format) -> bool:
    """Whether the LM head is the embedding, in one format, and so has no tensor of its own."""
    return args.tie_embeddings and format.covers("lm_head.weight") == format.covers("embedding.weight")


def our_names(args: ModelArgs, format: Format = PLAIN) -> Iterator[str]:
    """Yield the model's parameter names in loading order; without the LM head where it is the embedding."""
    names = [f"{name}.weight" for name in dict.fromkeys(row[0] for row in NAMES)]
    shared = head_is_shared(args, format)
    yield from (name for name in names if "{}" not in name and not (shared and name == "lm_head.weight"))
    for layer in range(args.n_layer):
        yield from (name.format(layer) for name in names if "{}" in name)


def stored_tensors(args: ModelArgs, format: Format, dtype: torch.dtype, fused: bool) -> Iterator[tuple[str, Stored]]:
    """Yield every tensor that a file of a model has, in the order of the file: its name and what it is."""
    for name in our_names(args, format):
        for piece, (shape, keys) in pieces(name, args, fused).items():
            if not format.covers(name):
                yield piece, Stored(shape, dtype, keys)
                continue
            weight, scale = format.shapes(*shape)
            yield piece, Stored(*weight, keys)
            yield scale_name(piece), Stored(*scale, keys)


def check_format(format: Format, args: ModelArgs, ranks: int = 1) -> None:
    """Raise UserError unless a model of this shape, or its part on each of several ranks, can have this format."""
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


def pieces(name: str, args: ModelArgs, fused: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors a file has for our parameter `name`, top to bottom: name -> (shape, config keys behind it).

    Our format (`fused`) has one, of the same name; the Hugging Face format has one per row of NAMES.
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
    rows = [(theirs, keys) for ours, theirs, keys in NAMES if ours == pattern]
    found = {f"{hf}.weight".format(layer): (tuple(sizes[key] for key in keys.split(", ")), keys) for hf, keys in rows}
    if not fused:
        return found
    shapes = [shape for shape, _ in found.values()]
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

    `dtype` None keeps the checkpoint's own. `pack` lays linears out for the CPU kernels if these are loaded. Parameters
    do not require gradients. group: load this rank's part of the model only. format: quantise while loading. Raises
    UserError in one line naming the file, tensor or config key at fault.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    dtype = resolve_dtype(opened.args, dtype)
    args = replace(opened.args, dtype=_dtype_name(dtype))
    with torch.device("meta"):
        model = group.parallelize(Transformer(group.local_args(args))) if group else Transformer(args)
    names = list(our_names(args, opened.format or format))
    if group and args.tie_embeddings and "lm_head.weight" not in names:
        names.insert(1, "lm_head.weight")  # a rank has all of the embedding and a part of the head
    size = _fill(model, names, opened, dtype, format, device, pack, progress, group)
    return Checkpoint(model, args, opened.folder, opened.hf_config, opened.generation_config, size)


def load_drafter(
    source: Source,
    model: Transformer,
    n_layer: int,
    format: Format,
    progress: Progress | None = None,
    group: Group | None = None,
) -> Checkpoint:
    """Load low-bit copies of the LM head and of the first n_layer layers of `model`, which is the same checkpoint.

    They share its embedding, and its head if the format leaves that out. Raises UserError as `load` does.
    """
    norm = model.norm.weight
    args = replace(source.args, n_layer=n_layer, tie_embeddings=False, dtype=_dtype_name(norm.dtype))
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
    """Give a model on the meta device the weights of our parameters `names` -> their bytes."""
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
    """`dtype`, or the checkpoint's own; UserError for one that no kernel computes in."""
    if dtype is None:
        dtype = getattr(torch, args.dtype, args.dtype)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not supported, only float32, float16, bfloat16: ask for one of these")
    return dtype


def open_source(source: str | Path) -> Source:
    """Find a checkpoint's files and check names and shapes; reads headers only. Raises UserError as `load` does."""
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(str(source))
    folder, weights = (path, _weight_files(path)) if path.is_dir() else (path.parent, [path])
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in weights:
        with _opened(file) as (names, read, metadata):  # mapped: a tensor costs no memory until it is touched
            shapes |= {name: tuple(read(name).shape) for name in names}
            files |= {name: file for name in names}
    # The format is decided here and nowhere else, by what the file says of itself.
    fused, format = metadata.get("format") == "skipfast", PLAIN
    config_file = weights[0] if fused else folder / "config.json"
    if fused:
        if (version := metadata.get("version")) != VERSION:
            raise UserError(f"{config_file}: version {version!r} is not supported, only {VERSION!r}")
        format = Format.parse(metadata.get("quantize", ""), f"{config_file}: quantize")
        hf_config = _parse_json(config_file, metadata.get("config", ""))
        generation_config = _parse_json(config_file, metadata.get("generation_config", "{}"))
    elif path.is_dir():
        hf_config = _parse_json(config_file)
        generation_file = folder / "generation_config.json"
        generation_config = _parse_json(generation_file) if generation_file.exists() else {}
    else:
        raise UserError(f"{path} was not written by convert_hf_checkpoint.py; pass its folder instead")
    try:
        args = ModelArgs.from_hf_config(hf_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from error
    _check_tensors(weights[0] if len(weights) == 1 else folder, args, fused, format, shapes)
    return Source(folder, files, args, hf_config, generation_config, fused, format)


def _check_tensors(
    path: Path, args: ModelArgs, fused: bool, format: Format, shapes: dict[str, tuple[int, ...]]
) -> None:
    known = set()
    for name, stored in stored_tensors(args, format, torch.float32, fused):  # a config may claim billions of layers
        if name not in shapes:
            why = "tie_word_embeddings is false" if name == "lm_head.weight" else f"there are {args.n_layer} layers"
            raise UserError(f"{path}: tensor {name!r} is missing (by its config {why})")
        _check_shape(path, name, shapes[name], stored.shape, stored.keys)
        known.add(name)
    for name, shape in shapes.items():
        if name in known:
            continue
        if name == "lm_head.weight" and args.tie_embeddings:  # some tools write the tied head a second time
            _check_shape(path, name, shape, *pieces(name, args, fused)[name])
        elif not name.endswith("rotary_emb.inv_freq"):  # old files: rope_table computes it
            raise UserError(f"{path}: tensor {name!r} is not part of a Llama with {args.n_layer} layers")


def _check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...], keys: str) -> None:
    if found != wanted:
        raise UserError(f"{path}: tensor {name!r} has shape {list(found)}, its config wants {list(wanted)} ({keys})")


def _weight_files(folder: Path) -> list[Path]:
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index_file = folder / f"{name}.index.json"
        if index_file.exists():
            shards = _parse_json(index_file).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
                raise UserError(f"{index_file}: key 'weight_map' (tensor name -> file name) is missing or broken")
            return [folder / file for file in sorted(set(shards.values()))]
    raise UserError(f"{folder} holds no {WEIGHTS}, no pytorch_model.bin and no index of either")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Iterable[str], Callable[..., Tensor], dict[str, str]]]:
    """Open one weight file, memory-mapped, as (tensor names, read a tensor by name or slices of it, metadata)."""
    if not file.exists():
        raise UserError(f"{file} is missing, though the index of its folder names it")
    try:
        if file.suffix == ".bin":
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield state.keys(), lambda name, window=None: state[name][window] if window else state[name], {}
        else:
            with safe_open(file, framework="pt") as opened:
                slices = lambda name, window=None: opened.get_slice(name)[window] if window else opened.get_tensor(name)
                yield opened.keys(), slices, opened.metadata() or {}
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError, EOFError, OSError) as error:
        raise UserError(f"{file} is truncated, corrupt or no weight file ({_first_line(error)})") from error


def _read_into(target: Tensor, file: Path, name: str, window: tuple[slice, ...] | None = None) -> None:
    """Copy one tensor of a file, or a window of it, into `target`, casting; UserError naming it unless all is finite.

    The file is opened for this tensor alone: pages of it count as memory for as long as they stay mapped.
    """
    with _opened(file) as (_, read, _):
        stored = read(name, window)
        if stored.dtype not in (*DTYPES, torch.float64):
            raise UserError(f"{file}: tensor {name!r} has dtype {stored.dtype}, only plain floats can be loaded")
        target.copy_(stored)
        if not _is_finite(target):
            problem = f"a value too large for {_dtype_name(target.dtype)}" if _is_finite(stored) else "NaN or inf"
            raise UserError(f"{file}: tensor {name!r} holds {problem}")


def _read_stored(file: Path, name: str, window: tuple[slice, ...]) -> Tensor:
    """A window of a tensor that belongs to a quantised weight, as it is."""
    with _opened(file) as (_, read, _):
        stored = read(name, window).clone()
    if stored.is_floating_point() and not _is_finite(stored):
        raise UserError(f"{file}: tensor {name!r} holds NaN or inf")
    return stored


def _is_finite(tensor: Tensor) -> bool:
    # aminmax carries NaN and inf through, needs no temporary and is 50 times as fast as isfinite
    return all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())


def _download(source: str) -> Path:
    """Hub id -> folder with its files, downloaded or from the cache; .bin files only if there is no safetensors."""
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{source} is neither an existing file or folder nor a hub id of the form org/name")
    import huggingface_hub  # optional: only hub ids need it
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        for patterns in (HUB_FILES, [*HUB_FILES, "pytorch_model*.bin"]):
            wanted = {"allow_patterns": patterns, "ignore_patterns": HUB_LEFT_OUT}
            folder = Path(huggingface_hub.snapshot_download(source, **wanted))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except Exception as error:  # a network has many ways to fail; each means that the files did not come
        reason = f"it cannot be downloaded ({type(error).__name__}: {_first_line(error)})"
        if isinstance(error, RepositoryNotFoundError):
            reason = "there is no such public repository on the hub (if it is private: `hf auth login`)"
        if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, too
            reason = f"it is gated: open https://huggingface.co/{source}, accept the licence, then run `hf auth login`"
        raise UserError(f"{source} is not a local file or folder, and {reason}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parse_json(path: Path, text: str | bytes | None = None) -> dict:
    """The JSON object in a file, or in a piece of its metadata."""
    if text is None and not path.exists():
        raise UserError(f"{path} is missing")
    try:
        content = json.loads(path.read_bytes() if text is None else text)
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, absurd nesting
        raise UserError(f"{path} does not hold valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def save(
    model: Transformer, path: str | Path, hf_config: dict, generation_config: dict | None = None, format: Format = PLAIN
) -> None:
    """Write a model with unpacked weights to one file of our format, in the dtype it has.

    format: of the model's weights. Raises UserError if they are packed or have another.
    """
    if is_packed(model.lm_head.weight):
        raise UserError("packed weights cannot be saved: load the model with pack=False")
    dtype = model.norm.weight.dtype
    metadata = _metadata(hf_config, generation_config or {}, dtype, format)
    _write_weights(Path(path), model.args, dtype, metadata, format, weights_of(model))


def weights_of(model: Transformer) -> ReadWeights:
    """What reads a model's weights and scales by our names."""

    def read(name):
        module = model.get_submodule(name.removesuffix(".weight"))
        return module.weight, getattr(module, "scale", None)

    return read


def convert(
    source: Source,
    path: Path,
    dtype: torch.dtype,
    progress: Progress | None = None,
    format: Format = PLAIN,
    read: ReadWeights | None = None,
) -> int:
    """Stream an opened checkpoint into one file of our format, a tensor in memory at a time; returns weight bytes.

    format: of the file; what is quantised already stays so. read: where weights of this format come from instead.
    """
    format = source.format or format
    metadata = _metadata(source.hf_config, source.generation_config, dtype, format)
    read = read or (lambda name: source.weights(name, dtype, format))
    return _write_weights(path, source.args, dtype, metadata, format, read, progress)


def export_hf(
    state: dict[str, Tensor],
    args: ModelArgs,
    folder: str | Path,
    hf_config: dict,
    dtype: torch.dtype,
    generation_config: dict | None = None,
) -> None:
    """Write tensors under our names as a Hugging Face folder; each file is renamed into place once complete.

    The shape in `args` overrides `hf_config`; by default generation_config.json holds the token ids of `hf_config`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if generation_config is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation_config = {key: hf_config[key] for key in ids if hf_config.get(key) is not None}
    _write_weights(folder / WEIGHTS, args, dtype, {"format": "pt"}, PLAIN, lambda name: (state[name], None))
    write_json(folder / "config.json", hf_config | hf_config_from_args(replace(args, dtype=_dtype_name(dtype))))
    write_json(folder / "generation_config.json", generation_config)


def hf_config_from_args(args: ModelArgs, **extra) -> dict:
    """A config.json that transformers 4 and 5 both read: rope and dtype stand in it in either spelling."""
    scaling = {key: int(value) if key.startswith("original") else value for key, value in args.rope_scaling}
    rope = {"rope_type": args.rope_type, **scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layer,
        "num_attention_heads": args.n_head,
        "num_key_value_heads": args.n_kv_head,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": args.rope_base,
        "rope_scaling": None if args.rope_type == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": args.rope_base},
        "torch_dtype": args.dtype,
        "dtype": args.dtype,
        **extra,
    }


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file by rename."""
    with _replacing(path) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())


def _metadata(hf_config: dict, generation_config: dict, dtype: torch.dtype, format: Format) -> dict[str, str]:
    config = json.dumps(hf_config | {"torch_dtype": _dtype_name(dtype), "dtype": _dtype_name(dtype)})
    generation = {"generation_config": json.dumps(generation_config)}
    return {"format": "skipfast", "version": VERSION, "quantize": str(format), "config": config, **generation}


def _write_weights(
    path: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    metadata: dict[str, str],
    format: Format,
    read: ReadWeights,
    progress: Progress | None = None,
) -> int:
    """Write a safetensors file, asking `read` for one of our parameters at a time; returns their bytes.

    safetensors' own save_file wants them all in memory. Rows of a fused tensor follow each other in the file as its
    pieces do, so only the header knows whether the names are ours or Hugging Face's.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    names, size = list(our_names(args, format)), 0
    for name, stored in stored_tensors(args, format, dtype, fused=metadata["format"] == "skipfast"):
        start, size = size, size + math.prod(stored.shape) * stored.dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[stored.dtype], "shape": stored.shape, "data_offsets": [start, size]}
    expected = dict(stored_tensors(args, format, dtype, fused=True))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(names, start=1):
            for each, tensor in zip((name, scale_name(name)), read(name), strict=True):
                if (tensor is None) != (each not in expected):
                    raise UserError(f"{path}: {name} is not what the format {str(format)!r} has")
                if tensor is not None:
                    _check_shape(path, each, tuple(tensor.shape), expected[each].shape, expected[each].keys)
                    written = tensor.detach().to("cpu", expected[each].dtype).contiguous().flatten()
                    file.write(written.view(torch.uint8).numpy())
            tensor = written = None  # before the next one is read
            if progress:
                progress(done, len(names), name)
    return size


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when complete and vanishes on any error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
