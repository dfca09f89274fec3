"""Quantise a checkpoint's weights to int8 or int4, write them to a new checkpoint, and report what that changes.

By default every weight is rounded to the nearest level. With `--calibrate TEXT`, weights are rounded one feature after
the other, and those not yet rounded make up for the error so far, measured on the inputs that the text gives to each
linear (GPTQ, arXiv 2210.17323). Other programs quantise while loading, without a second file: `--quantize`. The
arithmetic of both is in kernels/formats.py.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cli
import convert_hf_checkpoint
from decoding.calibrate import SAMPLE_TEXT
from decoding.engine import Engine
from decoding.runner import Runner
from errors import UserError
from kernels.formats import PLAIN, Format, levels_int4, levels_int8, pack_int4, scale_int4, scale_int8
from kernels.linear import is_packed
from loading import checkpoint, writing
from loading.files import check_writable, read_text, write_json
from loading.progress import LoadBar, Progress
from model import Linear, ModelArgs, Transformer, rope_table

WINDOW = 512  # tokens of a text that the model sees together
CALIBRATION_WINDOWS = 32
DAMPING = 0.01  # share of the mean curvature that is added to every feature's
COLUMNS = 128  # features whose errors are passed on together; a multiple of every group
WINDOWS_AT_ONCE, ROWS_AT_ONCE = 4, 64  # bound the memory of a step


def quantise(model: Transformer, format: Format | str) -> Transformer:
    """Quantise the weights of a model that `format` covers, in place. Raises UserError for an unknown format."""
    format = Format.parse(format) if isinstance(format, str) else format
    for name, module in model.named_modules():
        if isinstance(module, Linear | nn.Embedding) and format.covers(name):
            check_plain(module)
            store(module, *format.quantise(module.weight.data))
    return model


def check_plain(module: nn.Module) -> None:
    """Raise UserError if a module's weight is quantised or packed."""
    if module.scale is not None:
        raise UserError("the model is quantised already")
    if is_packed(module.weight):
        raise UserError("the weights are packed for the CPU kernels: quantise before packing")


def store(module: nn.Module, weight: Tensor, scale: Tensor) -> None:
    """Give a module a quantised weight; an embedding that was tied to it keeps the old one."""
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.scale = scale


# ---- calibrated rounding ----


@torch.no_grad()
def calibrate_weights(model: Transformer, format: Format, tokens: Tensor, progress: Progress | None = None) -> None:
    """Quantise a model with plain weights, in place, so that each linear's outputs change least on a text (see gptq).

    tokens: the text's ids [windows, T]. The inputs of a layer come from the layers below as they are after quantising.
    """
    states = model.embed(tokens)  # [windows, T, D]
    cos, sin = rope_table(model.args, tokens.shape[1], states.device)
    parts = len(model.layers) + 1
    for index, layer in enumerate(model.layers):
        run = lambda state, layer=layer: layer(state, cos, sin, None)
        linears = [module for module in layer.modules() if isinstance(module, Linear)]
        for linear, curvature in curvatures(linears, run, states).items():
            store(linear, *gptq(linear.weight.data, curvature, format))
        states = torch.cat([run(part) for part in states.split(WINDOWS_AT_ONCE)])
        if progress:
            progress(index + 1, parts, f"layer {index}")
    if format.covers("lm_head"):
        curvature = sum(gram(model.norm(part)) for part in states.split(WINDOWS_AT_ONCE))
        store(model.lm_head, *gptq(model.lm_head.weight.data, curvature, format))
    if format.covers("embedding"):  # its rows are looked up, not summed, so no error can make up for another
        store(model.embedding, *format.quantise(model.embedding.weight.data))
    if progress:
        progress(parts, parts, "lm_head")


def gram(x: Tensor) -> Tensor:
    """Sum x·xᵀ over the rows of x [..., K] -> fp32 [K, K]."""
    x = x.flatten(0, -2).float()
    return x.T @ x


def curvatures(linears: Sequence[Linear], run: Callable[[Tensor], Tensor], states: Tensor) -> dict[Linear, Tensor]:
    """Sum x·xᵀ over the inputs x that each linear gets while `run` takes states [windows, T, D] -> fp32 [K, K] each."""
    sums: dict[Linear, Tensor] = {}

    def add(linear, inputs):
        sums[linear] = sums.get(linear, 0) + gram(inputs[0])

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    for part in states.split(WINDOWS_AT_ONCE):
        run(part)
    for hook in hooks:
        hook.remove()
    return sums


def gptq(weight: Tensor, curvature: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] feature by feature, adjusting those to come so that outputs change least (GPTQ, algorithm 1).

    curvature: Σ x·xᵀ over the linear's inputs, [K, K]. Returns the stored weight and its scale. Scales are chosen as in
    rounding to nearest: for int8 from the whole row; for int4 from each group, after the adjustments made so far.
    """
    weight, k = weight.float().clone(), weight.shape[1]
    inverse = inverse_root(curvature)
    levels, scale, scales = torch.empty_like(weight), scale_int8(weight), []
    for first in range(0, k, COLUMNS):
        part = weight[:, first : first + COLUMNS]
        errors, block = torch.empty_like(part), inverse[first : first + COLUMNS, first : first + COLUMNS]
        for i in range(part.shape[1]):
            if format.mode == "int4" and i % format.group == 0:
                scales.append(scale_int4(part[:, None, i : i + format.group]))
                scale = scales[-1][:, 0].float()
            column, level = part[:, i : i + 1], levels[:, first + i]
            if format.mode == "int8":
                level.copy_(levels_int8(column, scale)[:, 0])
            else:
                level.copy_(levels_int4(column[..., None], scale[:, None])[:, 0, 0])
            errors[:, i] = (column[:, 0] - level * scale) / block[i, i]
            part[:, i + 1 :] -= errors[:, i, None] * block[i, i + 1 :]
        weight[:, first + COLUMNS :] -= errors @ inverse[first : first + COLUMNS, first + COLUMNS :]
    if format.mode == "int8":
        return levels.to(torch.int8), scale
    return pack_int4(levels.view(len(levels), -1, format.group)), torch.cat(scales, 1)


def inverse_root(curvature: Tensor) -> Tensor:
    """Compute the upper triangular U with UᵀU = curvature⁻¹, damped; features that never occurred affect no others."""
    diagonal = curvature.diagonal().clone()
    damped = curvature + torch.diag(torch.where(diagonal == 0, 1.0, DAMPING * diagonal.mean()))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


# ---- what it changes ----


def windows_of(tokens: Sequence[int], length: int, most: int) -> Tensor:
    """Cut up to `most` windows of `length` tokens, spread evenly over a text -> [windows, length].

    A text shorter than `length` is one window.
    """
    length = min(length, len(tokens))
    count = min(most, len(tokens) // length)
    starts = [index * (len(tokens) - length) // max(count - 1, 1) for index in range(count)]
    return torch.tensor([tokens[start : start + length] for start in starts])


@torch.no_grad()
def losses_and_choices(model: Transformer, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute, for each token after the first of windows [n, T], its loss and the model's greedy choice in its place.

    Returns losses in nats, fp32 [n, T - 1], and token ids [n, T - 1], as decoding computes them.
    """
    runner = Runner(model, windows.shape[1], max_rows=1, compile=True, notice=lambda line: None)
    losses, choices = [], []
    for window in tqdm(windows.tolist(), desc="measuring", unit="window", leave=False, delay=1.0):
        hidden = runner.prefill_states(window)[runner.n_layer][:-1]
        targets = torch.tensor(window[1:], device=hidden.device)
        for states, next_tokens in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
            logits = model.head(states)
            losses.append(F.cross_entropy(logits, next_tokens, reduction="none").cpu())
            choices.append(logits.argmax(-1).cpu())
    shape = len(windows), -1
    return torch.cat(losses).view(shape), torch.cat(choices).view(shape)


def weight_sizes(args: ModelArgs, format: Format, dtype: torch.dtype) -> dict[str, int]:
    """Count the bytes of the quantised weights, of the same in bf16, and of all weights before and after."""
    size = lambda tensors: sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    before, after = (dict(checkpoint.stored_tensors(args, kind, dtype, is_ours=True)) for kind in (PLAIN, format))
    low = {name: tensor for name, tensor in after.items() if format.covers(name.replace(".scale", ".weight"))}
    elements = sum(math.prod(checkpoint.pieces(name, args, is_ours=True)[name][0]) for name in low if "weight" in name)
    return {"quantised": size(low), "the_same_in_bf16": 2 * elements, "before": size(before), "after": size(after)}


def compare(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Compare the plain and the quantised model, each as losses_and_choices measured it -> the numbers of a report."""
    (loss, choices), (new_loss, new_choices) = before, after
    return {
        "tokens": loss.numel(),
        "loss": loss.mean().item(),
        "quantised_loss": new_loss.mean().item(),
        "loss_change": (new_loss.mean() / loss.mean() - 1).item(),
        "equal_greedy_tokens": (choices == new_choices).float().mean().item(),
    }


# ---- the program ----


def read_tokens(engine: Engine, path: str | None) -> list[int]:
    """Read and encode a text: the file, else the checkpoint's own held-out prompts, else a sample of this project."""
    own = engine.source.folder / "heldout_prompts.jsonl"
    if path:
        text = read_text(path)
    elif own.exists():
        try:
            text = "\n".join(json.loads(line)["prompt"] for line in read_text(own).splitlines() if line.strip())
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{own} must hold lines of JSON with a "prompt"; or give --text') from None
    else:
        text = SAMPLE_TEXT
    tokens = engine.tokenizer.encode(text)
    if len(tokens) < 2:
        raise UserError(f"{path or own} holds {len(tokens)} tokens: give a text")
    return tokens


def run(engine: Engine, flags: argparse.Namespace, format: Format, output: Path) -> dict:
    """Quantise, write, and measure both models on one text -> the report."""
    args = engine.args
    length = min(WINDOW, args.max_seq_len)
    seen = read_tokens(engine, flags.calibrate) if flags.calibrate else None
    windows = windows_of(read_tokens(engine, flags.text), length, flags.windows) if engine.tokenizer else None
    before = None if windows is None else losses_and_choices(engine.load(), windows)
    engine.model = whole = read = None  # one model in memory at a time
    if seen:
        whole = checkpoint.load(engine.source, engine.dtype, pack=False).model
        calibrate_weights(whole, format, windows_of(seen, length, CALIBRATION_WINDOWS), LoadBar("calibrating"))
        read = writing.weights_of(whole)
    record = convert_hf_checkpoint.convert(flags.checkpoint_path, output, flags.precision, flags.force, format, read)
    whole = read = None
    report = {"quantize": str(format), "calibrated": bool(seen)} | record
    report["weight_bytes"] = weight_sizes(args, format, engine.dtype)
    if windows is not None:
        after = losses_and_choices(checkpoint.load(output).model, windows)
        report |= compare(before, after)
    return report | cli.environment()


def print_report(report: dict) -> None:
    size = report["weight_bytes"]
    share = size["quantised"] / size["the_same_in_bf16"]
    rows = [
        ["quantised weights", f"{size['quantised'] / 1e6:.1f} MB, {share:.3f} of bf16"],
        ["all weights", f"{size['before'] / 1e6:.1f} MB → {size['after'] / 1e6:.1f} MB"],
    ]
    if "loss" in report:
        rows += [
            ["loss before, nats per token", f"{report['loss']:.4f}"],
            ["loss after", f"{report['quantised_loss']:.4f} ({report['loss_change']:+.2%})"],
            ["same greedy token", f"{report['equal_greedy_tokens']:.1%} of {report['tokens']}"],
        ]
    cli.print_table(f"{report['quantize']}: {report['output']}", ["", "this run"], rows)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python quantize.py --checkpoint_path checkpoints/demo --mode int4 --output_path demo-int4",
    )
    cli.add_model_flags(parser, quantize=False)
    parser.add_argument(
        "--mode",
        required=True,
        metavar="FORMAT",
        help="int8 or int4, with settings as in int4:group=64,lm_head=no,embedding=yes "
        "(group: features that share a scale, 32, 64 or 128; by default the LM head is quantised and "
        "the embedding is not)",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        help="a folder, or a file ending in .safetensors (default: skipfast-MODE inside the checkpoint's folder)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="a UTF-8 text like those to come: do not round to nearest, but so that the outputs "
        "of linears change least on this text (GPTQ)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="measure the loss on this UTF-8 text; the model should not have been trained or calibrated on it "
        "(default: the checkpoint's held-out prompts, else a short sample)",
    )
    parser.add_argument("--windows", type=int, default=16, metavar="N", help=f"windows of up to {WINDOW} tokens")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main() -> None:
    flags = parse_flags()
    format = Format.parse(flags.mode, "mode")
    if not format:
        raise UserError("mode must be int8 or int4, got 'none': nothing to do")
    if flags.windows < 1:
        raise UserError(f"windows must be 1 or more, got {flags.windows}")
    if flags.device == "cuda":
        raise UserError("device must be cpu to write a checkpoint, got cuda")
    check_writable(flags.json)
    engine = cli.open_engine(flags, needs_tokenizer=bool(flags.calibrate or flags.text), device="cpu")
    engine.checked_format(flags.mode, "mode")
    output = flags.output_path or default_output(flags.checkpoint_path, format)
    convert_hf_checkpoint.check_output(engine.source, output, flags.force)
    report = run(engine, flags, format, output)
    print_report(report)
    if flags.json:
        write_json(flags.json, report)


def default_output(source: str, format: Format) -> Path:
    """Choose the output folder: beside that of convert_hf_checkpoint.py, named skipfast-int4-group-64 and the like."""
    path = convert_hf_checkpoint.default_output(source)
    return path.with_name(f"{path.name}-" + re.sub(r"\W+", "-", str(format)))


if __name__ == "__main__":
    cli.run(main)
