"""The models of `gpu_check`: random weights of published shapes, made on the device, with an acceptance dial.

The dial weakens what the layers behind the exit write until the exit mostly agrees with the full model, as on a
checkpoint that was trained to exit early.
"""

import math

import torch
from torch import nn

from decoding.runner import PREFILL_CHUNK
from kernels.formats import quantise_int8
from model import ModelArgs, Transformer
from quantize import quantise
from scripts.gpu_check.kernels import int4_group, nbytes

AGREEMENT = 0.8  # of the exit with the full model, aimed at by the dial


def make_model(args: ModelArgs, device: str) -> Transformer:
    """Make a bf16 model with random weights on the device: residual updates of unit scale, peaked attention."""
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    queries_and_keys = (args.n_head + args.n_kv_head) * args.head_dim
    model.embedding.weight.normal_(generator=random)
    for layer in model.layers:
        layer.attention_norm.weight.fill_(1)
        layer.mlp_norm.weight.fill_(1)
        layer.attention.wqkv.weight.normal_(0, args.dim**-0.5, generator=random)
        layer.attention.wqkv.weight[:queries_and_keys] *= math.sqrt(2.0)
        layer.mlp.w13.weight.normal_(0, args.dim**-0.5, generator=random)
    model.norm.weight.fill_(1)
    model.lm_head.weight.normal_(0, 4 * args.dim**-0.5, generator=random)
    fill_outputs(model, args.n_layer, 1.0)
    return model


def fill_outputs(model: Transformer, exit_layer: int, eps: float) -> None:
    """Fill what layers write into the residual stream: the same noise every time, times eps behind exit_layer."""
    random = torch.Generator(model.norm.weight.device)
    for index, layer in enumerate(model.layers):
        random.manual_seed(1 + index)
        for weight in (layer.attention.wo.weight, layer.mlp.w2.weight):
            gain = eps if index >= exit_layer else 1.0
            weight.normal_(0, gain * weight.shape[1] ** -0.5, generator=random)


def set_dial(model: Transformer, exit_layer: int, steps: int = 6, positions: int = 256) -> dict:
    """Weaken the layers behind the exit until its argmax is the model's at about AGREEMENT of random positions."""
    device, n_layer = model.norm.weight.device, model.args.n_layer
    random = torch.Generator(device).manual_seed(2)
    tokens = torch.randint(model.args.vocab_size, (positions,), device=device, generator=random)
    model.setup_cache(positions)

    def agreement(eps: float) -> float:
        fill_outputs(model, exit_layer, eps)
        same = []
        for slots in torch.arange(positions, device=device).split(PREFILL_CHUNK):
            early = model.run_layers(model.embed(tokens[slots]), slots, 0, exit_layer)
            late = model.run_layers(early, slots, exit_layer, n_layer)
            same.append(model.head(early).argmax(-1) == model.head(late).argmax(-1))
        return torch.cat(same).float().mean().item()

    low, high, eps = 0.0, 1.0, 0.15
    for step in range(steps):
        share = agreement(eps)
        if abs(share - AGREEMENT) <= 0.02 or step == steps - 1:
            break
        low, high = (eps, high) if share > AGREEMENT else (low, eps)
        eps = (low + high) / 2 if high < 1 else min(1.0, 2 * eps)
    return {"eps": eps, "agreement": share}


def quantise_model(model: Transformer, mode: str) -> None:
    """Quantise to int8, or to int4 with an int8 head: the exit head kernel takes bf16 and int8."""
    if mode == "bf16":
        return
    group = int4_group(math.gcd(model.args.dim, model.args.ffn_dim))
    quantise(model, {"int8": "int8", "int4": f"int4:group={group},lm_head=no"}[mode])
    if mode == "int4":
        weight, scale = quantise_int8(model.lm_head.weight.data)
        model.lm_head.weight, model.lm_head.scale = nn.Parameter(weight, requires_grad=False), scale


def weight_bytes(*modules: nn.Module) -> int:
    return sum(nbytes((*module.parameters(), *module.buffers())) for module in modules)


def random_prompt(vocab_size: int, length: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(3)).tolist()
