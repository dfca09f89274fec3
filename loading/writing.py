"""Writing checkpoints: our own format, one safetensors file under the model's names, and Hugging Face folders.

Tensors are written one at a time as they are read, so a model larger than memory can be converted. Every file appears
complete, by rename, or not at all.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from kernels.formats import PLAIN, Format
from kernels.linear import is_packed
from loading.checkpoint import VERSION, WEIGHTS, Source, check_shape, dtype_name, our_names, scale_name, stored_tensors
from loading.files import make_folder, replacing, write_json
from loading.progress import Progress
from model import ModelArgs, Transformer

ReadWeights = Callable[[str], tuple[Tensor, Tensor | None]]  # our parameter -> its weight and, if quantised, its scale

SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}


def save(
    model: Transformer, path: str | Path, hf_config: dict, generation_config: dict | None = None, format: Format = PLAIN
) -> None:
    """Write a model with unpacked weights to one file of our format, in the model's dtype.

    format: the one its weights have. Raises UserError if they are packed or have another format.
    """
    if is_packed(model.lm_head.weight):
        raise UserError("packed weights cannot be saved: load the model with pack=False")
    dtype = model.norm.weight.dtype
    metadata = _metadata(hf_config, generation_config or {}, dtype, format)
    _write_weights(Path(path), model.args, dtype, metadata, format, weights_of(model))


def weights_of(model: Transformer) -> ReadWeights:
    """Return a function that gives a model's weights and scales by our names."""

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
    """Stream an opened checkpoint into one file of our format, one tensor in memory at a time; returns weight bytes.

    format: quantise to it while writing; a source that is quantised already keeps its own format.
    read: take the weights, already in `format`, from this function instead of from the source.
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
    """Write tensors under our names as a Hugging Face folder.

    The shape in `args` overrides `hf_config`; by default generation_config.json holds the token ids of `hf_config`.
    """
    folder = make_folder(folder)
    if generation_config is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation_config = {key: hf_config[key] for key in ids if hf_config.get(key) is not None}
    _write_weights(folder / WEIGHTS, args, dtype, {"format": "pt"}, PLAIN, lambda name: (state[name], None))
    write_json(folder / "config.json", hf_config | hf_config_from_args(replace(args, dtype=dtype_name(dtype))))
    write_json(folder / "generation_config.json", generation_config)


def hf_config_from_args(args: ModelArgs, **extra) -> dict:
    """Make the content of a config.json; rope and dtype stand there twice, as transformers 4 and 5 spell them."""
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


def _metadata(hf_config: dict, generation_config: dict, dtype: torch.dtype, format: Format) -> dict[str, str]:
    """Make the metadata of a file of our format: everything that opening it needs besides the tensors."""
    config = json.dumps(hf_config | {"torch_dtype": dtype_name(dtype), "dtype": dtype_name(dtype)})
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
    """Write a safetensors file, asking `read` for one of our parameters at a time; returns the bytes of all tensors.

    The library's own save_file wants all tensors in memory. The pieces of a fused tensor follow each other in the file,
    as its rows do: so the bytes are the same under either names, and only the header differs.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    names, size = list(our_names(args, format)), 0
    for name, stored in stored_tensors(args, format, dtype, is_ours=metadata["format"] == "skipfast"):
        start, size = size, size + math.prod(stored.shape) * stored.dtype.itemsize
        header[name] = {"dtype": SAFETENSORS[stored.dtype], "shape": stored.shape, "data_offsets": [start, size]}
    expected = dict(stored_tensors(args, format, dtype, is_ours=True))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(names, start=1):
            for stored_name, tensor in zip((name, scale_name(name)), read(name), strict=True):
                if (tensor is None) != (stored_name not in expected):
                    raise UserError(f"{path}: {name} is not what the format {str(format)!r} has")
                if tensor is not None:
                    stored = expected[stored_name]
                    check_shape(path, stored_name, tuple(tensor.shape), stored.shape, stored.keys)
                    content = tensor.detach().to("cpu", stored.dtype).contiguous().flatten()
                    file.write(content.view(torch.uint8).numpy())
            tensor = content = None  # frees them before the next is read
            if progress:
                progress(done, len(names), name)
    return size
