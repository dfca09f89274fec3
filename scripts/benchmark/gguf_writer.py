"""Write a checkpoint as a GGUF file that llama.cpp reads. Needs the optional package gguf."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from loading.checkpoint import Source, our_names
from model import rope_table


def write_gguf(source: Source, path: Path, dtype: torch.dtype, mode: str = "none") -> None:
    """Write a checkpoint as a GGUF file without a tokenizer (prompts are ids), tensor by tensor, in `dtype`.

    mode: of a kernels.formats.Format, for which llama.cpp's simplest format of so many bits stands: every matrix in it.
    """
    import gguf

    args, scaling = source.args, dict(source.args.rope_scaling)
    plain = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    kind = {"none": plain, "int8": "Q8_0", "int4": "Q4_0"}[mode]
    kind = gguf.GGMLQuantizationType[kind]
    out = gguf.GGUFWriter(str(path), "llama", use_temp_file=True)
    fields = {
        "context_length": args.max_seq_len,
        "embedding_length": args.dim,
        "block_count": args.n_layer,
        "feed_forward_length": args.ffn_dim,
        "head_count": args.n_head,
        "head_count_kv": args.n_kv_head,
        "key_length": args.head_dim,
        "value_length": args.head_dim,
        "layer_norm_rms_eps": args.norm_eps,
        "rope_dimension_count": args.head_dim,
        "rope_freq_base": args.rope_base,
        "vocab_size": args.vocab_size,
        "tokenizer_model": "no_vocab",
    }
    if args.rope_type == "linear":
        fields |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": scaling["factor"]}
    for field_name, value in fields.items():
        getattr(out, f"add_{field_name}")(value)
    for name, tensor in gguf_tensors(source, dtype):
        array = tensor.float().contiguous().numpy()
        if tensor.dim() == 1:
            out.add_tensor(name, array)
        else:
            out.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors under llama.cpp's names, in its layout."""
    args = source.args
    if args.rope_type == "llama3":  # how much slower each pair of features turns: the ratio of angles at position 1
        plain = replace(args, rope_type="default", rope_scaling=())
        angle = [torch.atan2(sin[1, 0], cos[1, 0]) for cos, sin in (rope_table(a, 2) for a in (plain, args))]
        yield "rope_freqs.weight", (angle[0] / angle[1])[: args.head_dim // 2]

    def rotary(weight):  # llama.cpp pairs neighbours where Hugging Face pairs halves
        return weight.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    heads, groups = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    whole = {"embedding.weight": "token_embd", "norm.weight": "output_norm", "lm_head.weight": "output"}
    names = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention.wo": "attn_output", "mlp.w2": "ffn_down"}
    for name in our_names(args):
        if args.tie_embeddings and name == "lm_head.weight":
            continue
        tensor = source.read(name, dtype)
        if name in whole:
            yield whole[name] + ".weight", tensor
            continue
        _, layer, key = name.removesuffix(".weight").split(".", 2)
        if key == "attention.wqkv":
            q, k, v = tensor.split([heads, groups, groups])
            parts = {"attn_q": rotary(q), "attn_k": rotary(k), "attn_v": v}
        elif key == "mlp.w13":
            parts = dict(zip(("ffn_gate", "ffn_up"), tensor.chunk(2), strict=True))
        else:
            parts = {names[key]: tensor}
        for theirs, values in parts.items():
            yield f"blk.{layer}.{theirs}.weight", values
