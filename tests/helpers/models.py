"""Tiny random models, the texts that they write, and a tokenizer of any size."""

import dataclasses
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import sentencepiece
import torch

from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from generate import decode
from kernels import cpu
from model import ModelArgs, Transformer
from quantize import quantise

N_LAYER = 4  # of random_model
VOCAB_SIZE = 130
PROMPT = [1, 5, 9, 40, 77]  # of which no text of random_model is constant
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLING = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.8, seed=7),
    "top_k_top_p": SamplingConfig(temperature=1.2, top_k=40, top_p=0.9, seed=3),
}


def random_model(
    dtype: torch.dtype,
    pack: bool,
    tie: bool = False,
    seed: int = 0,
    late_scale: float = 0.3,
    sharpness: float = 1.0,
    ffn_dim: int = 96,
) -> Transformer:
    """Make a random Llama of N_LAYER layers. Skips the test if it is to be packed and the C++ kernels are missing.

    Its late layers write little (`late_scale`), so that early exits are sometimes right. The higher `sharpness`, the
    surer is the LM head.
    """
    args = ModelArgs(
        dim=64,
        n_layer=N_LAYER,
        n_head=4,
        n_kv_head=2,
        head_dim=16,
        ffn_dim=ffn_dim,
        vocab_size=VOCAB_SIZE,
        max_seq_len=256,
        norm_eps=1e-5,
        rope_base=10000.0,
        tie_embeddings=tie,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(args)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                late = ("wo" in name or "w2" in name) and int(name.split(".")[1]) >= 2
                own = late_scale if late else sharpness if "lm_head" in name else 1.0
                scale = 1.0 if "embedding" in name else weight.shape[1] ** -0.5 * own
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model = model.to(dtype).eval().requires_grad_(False)
    if pack:
        if reason := cpu.load():
            pytest.skip(f"C++ kernels not available: {reason}")
        model.pack_weights()
    return model


def low_bit_copies(model: Transformer, mode: str, n_layer: int, pack: bool) -> Transformer:
    """Make what checkpoint.load_draft_model makes, of a model in memory with plain weights."""
    copy = Transformer(dataclasses.replace(model.args, n_layer=n_layer)).to(model.norm.weight.dtype)
    copy.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in copy.state_dict()})
    copy.embedding = model.embedding
    quantise(copy, mode)
    if pack:
        copy.pack_weights()
    return copy


def tokens_of(
    runner: Runner, prompt: list[int], policy: str | DraftPolicy, sampling: SamplingConfig, new: int = 32, **config
) -> Generation:
    """Decode `new` tokens after the prompt. `config`: more keys of GenerateConfig."""
    config = GenerateConfig(max_new_tokens=new, sampling=sampling, **config)
    policy = make_policy(policy, runner.n_layer) if isinstance(policy, str) else policy
    return Generation.collect(decode(runner, prompt, config, policy))


def train_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a sentencepiece tokenizer of `vocab_size` ids to the folder, with bytes for what no piece covers."""
    lines = [line for module in (textwrap, inspect, json) for line in inspect.getsource(module).splitlines() if line]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            num_threads=1,
        )


def largest_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest error relative to the largest value of the reference, which is in fp64."""
    assert result.shape == reference.shape
    return ((result.double() - reference).abs().max() / reference.abs().max()).item()
