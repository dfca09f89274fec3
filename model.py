"""The Llama: any range of its layers can be run, with any sublayer left out, over a static KV cache.

A token id becomes a hidden state in `embed`, passes `run_layers(start, stop)` as often as the decoding loop wants, and
becomes logits in `head`. The model knows nothing of drafting or acceptance. Positions are arguments: to roll back,
pass smaller positions next time.

Shape legend: B batch (training only: decoding has no batch dimension), T tokens in this call, S cache slots,
L layers, D model width, H query heads, G key/value heads, E head width, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from kernels import cpu
from kernels.attention import attention, new_cache
from kernels.exit_head import Head, Shard
from kernels.formats import dequantised
from kernels.linear import is_packed, linear, pack, pack_quantised, unpack_rows
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu

# Keys of a Hugging Face config that change the arithmetic: any value but these is refused rather than ignored.
SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama. Sizes are counts; `rope_scaling` holds (key, value) pairs of the checkpoint's config."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_type: str = "default"
    rope_scaling: tuple[tuple[str, float], ...] = ()
    tie_embeddings: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"config: {name} must be a positive whole number, got {value!r}")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"config: num_attention_heads ({self.n_head}) must be a multiple of "
                f"num_key_value_heads ({self.n_kv_head})"
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_hf_config(cls, config: dict) -> "ModelArgs":
        """Read a Hugging Face config.json, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes it.

        Raises UserError naming the key and value for anything missing or unsupported.
        """
        for key, allowed in SUPPORTED.items():
            default = None if key in ("model_type", "hidden_act") else allowed[0]
            if config.get(key, default) not in allowed:
                raise UserError(f"config: {key} = {config.get(key)!r} is not supported, only {allowed[0]!r}")

        def need(key):
            if config.get(key) is None:
                raise UserError(f"config: key {key!r} is missing")
            return config[key]

        rope_type, rope_base, scaling = _rope_config(config)
        n_head, dim = need("num_attention_heads"), need("hidden_size")
        head_dim = config.get("head_dim")
        if head_dim is None:
            if not (isinstance(n_head, int) and isinstance(dim, int) and n_head > 0 and dim % n_head == 0):
                raise UserError(f"config: hidden_size {dim!r} is not a multiple of num_attention_heads {n_head!r}")
            head_dim = dim // n_head
        return cls(
            dim=dim,
            n_layer=need("num_hidden_layers"),
            n_head=n_head,
            n_kv_head=n_head if config.get("num_key_value_heads") is None else config["num_key_value_heads"],
            head_dim=head_dim,
            ffn_dim=need("intermediate_size"),
            vocab_size=need("vocab_size"),
            max_seq_len=need("max_position_embeddings"),
            norm_eps=float(need("rms_norm_eps")),
            rope_base=rope_base,
            rope_type=rope_type,
            rope_scaling=scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )


def _rope_config(config: dict) -> tuple[str, float, tuple[tuple[str, float], ...]]:
    """Read the rotary part of a Hugging Face config, in either spelling -> (type, base, scaling pairs)."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UserError(f"config: rope type {rope_type!r} is not supported, only {', '.join(ROPE_TYPES)}")
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0  # Llama 1 and 2 configs may leave it out
    pairs = []
    for key in ROPE_KEYS[rope_type]:
        if not isinstance(rope.get(key), int | float):
            raise UserError(f"config: rope scaling {rope_type!r} needs a number {key!r}, got {rope.get(key)!r}")
        pairs.append((key, float(rope[key])))
    return rope_type, float(base), tuple(pairs)


def rope_table(args: ModelArgs, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return cosines and sines for positions 0..length-1, each fp32 [length, 1, E] (the 1 broadcasts over heads).

    Always fp32: a bf16 table loses whole positions past a few hundred. Scaling "llama3" is that of Llama 3.1: it
    divides long wavelengths by `factor`, keeps short ones, and blends linearly in between.
    """
    inv_freq = args.rope_base ** -(torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim)
    scaling = dict(args.rope_scaling)
    if args.rope_type == "linear":
        inv_freq = inv_freq / scaling["factor"]
    elif args.rope_type == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, untouched; 0: fully stretched
        inv_freq = inv_freq * keep + inv_freq / scaling["factor"] * (1 - keep)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq).to(device)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., T, heads, E] by cos, sin [T, 1, E] in fp32 (halves paired, as in Hugging Face checkpoints)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Linear(nn.Module):
    """Map x [..., in] -> [..., out], without a bias. `weight` is [out, in], or packed for the CPU by `pack_weight`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)  # of a quantised weight, see kernels/formats.py

    def pack_weight(self) -> None:
        """Lay the weight out for the CPU kernel, if that takes it. A packed quantised weight holds its own scales."""
        if self.scale is None:
            packed = pack(self.weight.data)
        elif (packed := pack_quantised(self.weight.data, self.scale)) is not None:
            self.scale = None
        if packed is not None:
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.out_features, self.scale)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention. Without a cache it is causal over its own tokens (training)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.n_kv_head, args.head_dim
        self.wqkv = Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim)
        self.wo = Linear(args.n_head * args.head_dim, args.dim)
        self.k_cache: Tensor | None = None  # in the layout of kernels.attention.new_cache
        self.v_cache: Tensor | None = None  # [G, S, E]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [..., T, H + 2G, E]
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=-2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.k_cache is None:
            q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
            y = y.transpose(-2, -3)
        else:
            y = attention(q, k, v, self.k_cache, self.v_cache, positions)
        return self.wo(y.flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward; gate and up projections are one matrix so that the weights stream in one pass."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.ffn_dim)
        self.w2 = Linear(args.ffn_dim, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x)))


class Block(nn.Module):
    """One transformer layer. It carries no index: layers that differ only in weights share one compiled graph."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.mlp_norm = RMSNorm(args.dim, args.norm_eps)
        self.mlp = MLP(args)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weights and caches, in the order of decoding.packed.TENSORS."""
        attention, mlp = self.attention, self.mlp
        return (
            self.attention_norm.weight,
            attention.wqkv.weight,
            attention.wo.weight,
            self.mlp_norm.weight,
            mlp.w13.weight,
            mlp.w2.weight,
            attention.k_cache,
            attention.v_cache,
        )

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        run_attention: bool = True,
        run_mlp: bool = True,
    ) -> Tensor:
        if run_attention:
            hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin, positions)
        if run_mlp:
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return hidden


class Transformer(nn.Module):
    """A Llama of shape `args`. Call `setup_cache` before decoding."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # from_pretrained skips nn.Embedding's own random fill, which on the meta device costs seconds of imports.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim), freeze=False)
        self.embedding.register_buffer("scale", None)  # of a quantised embedding
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.lm_head = Linear(args.dim, args.vocab_size)
        if args.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.cos: Tensor | None = None  # [S, 1, E] fp32
        self.sin: Tensor | None = None
        self.group = None  # of the ranks that have the other parts of this model, see tp.py
        self.shard: Shard | None = None  # of the vocabulary

    def setup_cache(self, length: int) -> None:
        """Allocate `length` KV slots per layer (2·L·G·E·length elements), or a few more, and the rotary table."""
        weight, args = self.norm.weight, self.args
        for layer in self.layers:
            layer.attention.k_cache, layer.attention.v_cache = new_cache(
                args.n_kv_head, length, args.head_dim, weight.dtype, weight.device
            )
        self.cos, self.sin = rope_table(args, layer.attention.v_cache.shape[1], weight.device)

    def share_cache(self, other: "Transformer") -> None:
        """Use the cache of another model of the same shape, which may have more layers."""
        for own, layer in zip(self.layers, other.layers, strict=False):
            own.attention.k_cache, own.attention.v_cache = layer.attention.k_cache, layer.attention.v_cache
        self.cos, self.sin = other.cos, other.sin

    @property
    def cache_length(self) -> int:
        return 0 if self.cos is None else self.cos.shape[0]

    def pack_weights(self) -> None:
        """Lay out every linear for the CPU kernels, quantised ones too. Does nothing for dtypes that they do not take.

        A tied embedding is then read from the packed LM head, unless that is quantised.
        """
        if not cpu.supports(self.norm.weight):
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack_weight()
        head = self.lm_head.weight
        if self.args.tie_embeddings and is_packed(head) and head.is_floating_point():
            self.embedding.weight = head

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids [..., T] -> hidden [..., T, D]."""
        weight, scale = self.embedding.weight, self.embedding.scale
        if scale is not None:
            return dequantised(weight[tokens], scale[tokens]).to(self.norm.weight.dtype)
        return unpack_rows(weight, tokens) if is_packed(weight) else self.embedding(tokens)

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        start: int,
        stop: int,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
    ) -> Tensor:
        """Run layers start..stop-1 on hidden [T, D] at `positions` [T], writing their K/V into the cache.

        Layers (0-based) in `skip_attention` or `skip_mlp` leave that sublayer out. Returns hidden [T, D].
        """
        cos, sin = self.cos[positions], self.sin[positions]
        for index in range(start, stop):
            hidden = self.layers[index](hidden, cos, sin, positions, index not in skip_attention, index not in skip_mlp)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the LM head: hidden [..., T, D] -> fp32 logits [..., T, V]. Pass few rows."""
        return self.exit_head().logits(hidden)

    def exit_head(self) -> Head:
        """Return the final norm and the LM head, as the exit kernels take them."""
        norm, head = self.norm, self.lm_head
        return Head(norm.weight, norm.eps, head.weight, head.scale, head.out_features, self.shard)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run token ids [T] at `positions` [T] through every layer -> logits [T, V]."""
        return self.head(self.run_layers(self.embed(tokens), positions, 0, self.args.n_layer))
