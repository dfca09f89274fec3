"""Train a Llama with the LayerSkip recipe, so that its early layers can draft for the rest.

Three things differ from ordinary training: whole layers are dropped per sample, more often the deeper they lie; the
loss is also taken after early layers, through the one final norm and head that every exit shares; and a curriculum
says which exits are on in a step. The result is a Hugging Face folder that `generate.py --draft_exit` reads like any
other Llama. Every random choice is a function of (seed, step), so the state of a run is weights, optimiser and step,
and a run that was killed goes on as if nothing had happened.
"""

import argparse
import filecmp
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import cli
from model import ModelArgs, Transformer, rope_table
from tokenizer import TOKENIZER_FILES, Tokenizer, check_vocabulary, load_tokenizer

# Folders of the standard library that hold tests, and those left out as tables, generated text or other people's code.
STDLIB_TESTS = {"test", "tests", "idle_test"}
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
NEAR_DUPLICATE = 0.5  # a held-out file with more than this share of its long lines in training files is left out
# A line break is one token with the indentation after it ("▁" is sentencepiece's space).
BREAKS = ["\n" * count + "▁" * indent for count in (1, 2) for indent in range(0, 25, 4)]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Muon (Jordan et al. 2024)
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 64, 96, 24  # of the acceptance measured at the end
EXAMPLE = """example, a few minutes on a laptop:
  python -m scripts.train --data stdlib --n_layer 8 --dim 128 --ffn_dim 384 --max_minutes 5 --output_dir my_model
  python generate.py --checkpoint_path my_model --prompt "def main():" --draft_exit 2"""


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """The settings of a run; each is a flag of the same name."""

    data: tuple[str, ...] = setting((), "text files or folders; stdlib, stdlib_tests: sources of the running Python; "
                                        "what is named twice counts twice")  # fmt: skip
    glob: str = setting("*.py", "which files of a folder")
    heldout: float = setting(0.03, "share of files never trained on, chosen by a hash of their names")
    tokenizer: str | None = setting(None, "sentencepiece model to use instead of training one")
    checkpoint_path: str | None = setting(None, "Hugging Face Llama folder to go on from; sets shape and tokenizer")
    n_layer: int = setting(12, "layers")
    dim: int = setting(256, "model width")
    n_head: int = setting(4, "query heads")
    n_kv_head: int = setting(2, "key/value heads")
    ffn_dim: int = setting(768, "feed-forward width")
    vocab_size: int = setting(2048, "tokens; a small vocabulary keeps the draft head cheap")
    tie_embeddings: bool = setting(False, "one matrix for embedding and LM head")
    context: int = setting(512, "tokens per training window")
    short_context: int | None = setting(None, "cut the windows of most steps to this length: attention gets cheaper")
    long_every: int = setting(8, "with short_context: every so many steps see whole windows")
    batch_size: int = setting(16, "windows of `context` tokens per step")
    p_max: float = setting(0.1, "chance of dropping the last layer at the end")
    dropout_schedule: str = setting("exp", "exp: from 0 up (from scratch); constant (continual)")
    curriculum: str = setting("rotational:8", "rotational:R, gradual, or none: every exit on every step")
    e_scale: float = setting(0.2, "scale of the early exits' loss")
    exit_weight: str = setting("paper", "paper: e(l) grows with depth; uniform: e_scale for each early exit")
    focus_exits: str = setting("", "such as 3:0.5,6:0.2: exits on in every step, with a weight of their own on top")
    distill: float = setting(0.0, "share of the early exits' loss taken as KL from the last layer's distribution")
    optimizer: str = setting("muon", "muon for matrices inside layers and adamw for the rest, or adamw for all")
    learning_rate: float = setting(3e-3, "peak")
    weight_decay: float = setting(0.1, "of matrices")
    schedule: str = setting("linear", "decay to 0: linear, cosine, or wsd (over the last third)")
    warmup: float = setting(0.02, "share of the run")
    precision: str = setting("bf16", "bf16 (weights stay fp32, matmuls in bf16) or fp32")
    max_steps: int | None = setting(None, "end of the run in steps")
    max_minutes: float | None = setting(None, "end of the run in minutes of training; schedules follow")
    save_every: int = setting(100, "steps between saved states")
    eval_every: int = setting(200, "steps between held-out losses")
    output_dir: str = setting("train_out", "Hugging Face folder to write; a run found here is resumed")
    seed: int = setting(0, "of weights, order of data and layer dropout")
    device: str = setting("cpu", "cpu or cuda")
    compile: bool = setting(False, "torch.compile layers and losses")
    workers: int = setting(1, "threads that each take a part of the batch; set OMP_NUM_THREADS=1 beside it")
    json: str | None = setting(None, "write config and results here as one JSON object")

    def validate(self) -> None:
        """Raise ValueError for the first setting that no run can have."""
        choices = {"dropout_schedule": ("exp", "constant"), "exit_weight": ("paper", "uniform"),
                   "optimizer": ("muon", "adamw"), "schedule": ("linear", "cosine", "wsd"),
                   "precision": ("bf16", "fp32"), "device": ("cpu", "cuda")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        name, _, period = self.curriculum.partition(":")
        if not (self.curriculum in ("gradual", "none") or name == "rotational" and period.isdigit() and int(period)):
            raise ValueError(f"curriculum must be rotational:R (R from 1), gradual or none, got {self.curriculum!r}")
        for name in ("n_layer", "dim", "n_head", "n_kv_head", "ffn_dim", "vocab_size", "context", "batch_size",
                     "long_every", "save_every", "eval_every", "workers"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("p_max", "distill", "warmup", "heldout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be 0 or more, got {self.learning_rate}")
        if self.dim % self.n_head:
            raise ValueError(f"dim must be a multiple of n_head ({self.n_head}), got {self.dim}")
        if self.short_context is not None and (self.short_context < 1 or self.context % self.short_context):
            raise ValueError(f"short_context must divide context ({self.context}), got {self.short_context}")
        if max(self.max_steps or 0, self.max_minutes or 0) <= 0:
            raise ValueError("max_steps or max_minutes must be given: the schedules need to know the end of the run")
        if self.checkpoint_path is None:
            parse_focus(self.focus_exits, self.n_layer)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device here; use --device cpu")


# ---------------------------------------------------------------- the recipe: which layers drop, which exits count


def dropout_probabilities(n_layer: int, p_max: float, schedule: str, progress: float) -> Tensor:
    """Chance of dropping each layer at `progress` (0..1) of the run -> fp32 [L]; 0 for the first, at most p_max."""
    depth = torch.arange(n_layer) / max(n_layer - 1, 1)
    over_time = 1.0 if schedule == "constant" else math.exp(progress * math.log(2)) - 1
    return over_time * (torch.exp(depth * math.log(2)) - 1) * p_max


def active_exits(curriculum: str, n_layer: int, step: int, progress: float) -> list[int]:
    """Exits (1..L layers run) whose loss counts in this step; the last is always among them."""
    name, _, period = curriculum.partition(":")
    if name == "none":
        return list(range(1, n_layer + 1))
    if name == "gradual":  # from the last layer down, one more every T / 2L steps
        return list(range(max(n_layer - int(progress * 2 * n_layer), 1), n_layer + 1))
    rolled = {layer + 1 for layer in range(n_layer) if layer % int(period) == step % int(period)}
    return sorted(rolled | {n_layer})


def exit_weights(exits: list[int], n_layer: int, e_scale: float, kind: str) -> dict[int, float]:
    """Weight of each active exit's loss, summing to 1: the paper's e(l), growing with depth, or one for all early."""
    if kind == "uniform":
        raw = {depth: 1.0 if depth == n_layer else e_scale for depth in exits}
    else:
        raw = {depth: e_scale * depth * (depth - 1) / 2 for depth in exits}  # e_scale · Σ_{i ≤ l} i with l = depth - 1
        raw[n_layer] = (n_layer - 1) + e_scale * (n_layer - 1) * (n_layer - 2) / 2
    total = sum(raw.values())
    return {depth: weight / total for depth, weight in raw.items() if weight}


def parse_focus(text: str, n_layer: int) -> dict[int, float]:
    """Read "3:0.5,6:0.2": exits trained on every step, with a weight added on top of the curriculum's."""
    focus = {}
    for part in filter(None, text.split(",")):
        depth, _, weight = part.partition(":")
        try:
            focus[int(depth)] = float(weight or 1)
        except ValueError:
            raise ValueError(f"focus_exits must look like 3:0.5,6:0.2, got {text!r}") from None
        if not 1 <= int(depth) < n_layer:
            raise ValueError(f"focus_exits must name exits in 1..{n_layer - 1}, got {depth}")
    return focus


def learning_rate_factor(schedule: str, warmup: float, progress: float) -> float:
    """Multiplier of the peak learning rate at `progress` (0..1): linear warm-up, then down to 0."""
    if progress < warmup:
        return progress / warmup + 1e-3
    rest = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "wsd":  # stable, then a linear decay over the last third
        return min(1.0, (1 - rest) * 3)
    return 1 - rest


# ---------------------------------------------------------------- text


def find_files(sources: Iterable[str], pattern: str) -> list[tuple[str, Path]]:
    """List (relative name, path) of every text file; a source given twice counts twice in training."""
    found = []
    for source in sources:
        if source in ("stdlib", "stdlib_tests"):
            root = Path(sysconfig.get_paths()["stdlib"])
            wanted = source == "stdlib_tests"
            for path in sorted(root.rglob("*.py")):
                folders = set(path.relative_to(root).parts[:-1])
                if not folders & STDLIB_LEFT_OUT and bool(folders & STDLIB_TESTS) == wanted:
                    found.append((path.relative_to(root).as_posix(), path))
            continue
        root = Path(source)
        if not root.exists():
            raise ValueError(f"data: {source} does not exist")
        paths = [root] if root.is_file() else sorted(path for path in root.rglob(pattern) if path.is_file())
        found += [(path.name if root.is_file() else path.relative_to(root).as_posix(), path) for path in paths]
    if not found:
        raise ValueError(f"data: no file matches {pattern!r} in {', '.join(sources) or 'nothing: give --data'}")
    return found


def split_texts(files: list[tuple[str, Path]], share: float) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read the files into (name, text) lists for training and held-out, by a hash of the name.

    Exact copies under another name are dropped; a held-out file most of whose longer lines also occur in training
    files is left out of both.
    """
    seen, train, heldout = {}, [], []
    for name, path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not text.strip() or seen.setdefault(digest, name) != name:
            continue
        is_heldout = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 < share
        if not is_heldout:
            train.append((name, text))
        elif all(name != other for other, _ in heldout):
            heldout.append((name, text))
    if not train:
        raise ValueError(f"data: all {len(files)} files fell into the held-out part; lower --heldout or add files")
    lines = {line for _, text in train for line in _long_lines(text)}
    heldout = [
        (name, text) for name, text in heldout
        if sum(line in lines for line in _long_lines(text)) <= NEAR_DUPLICATE * len(_long_lines(text))
    ]  # fmt: skip
    if not heldout:  # tiny data sets: the last tenth of the last file
        name, text = train[-1]
        cut = len(text) * 9 // 10
        train[-1], heldout = (name, text[:cut]), [(name, text[cut:])]
    return train, heldout


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= 24]


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE on the lines of `texts` and write it to `path`; decoding what it encodes is exact."""
    lines = (line.strip(" ") for text in texts for line in text.split("\n"))
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line), model_writer=buffer, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9999, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, user_defined_symbols=BREAKS, input_sentence_size=400_000,
            shuffle_input_sentence=False, num_threads=os.cpu_count(), minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} does not suit this text: {str(error).splitlines()[-1]}") from None
    path.write_bytes(buffer.getvalue())


def write_tokenizer_json(processor: sentencepiece.SentencePieceProcessor, folder: Path) -> None:
    """Write the trained tokenizer a second time in the format of the `tokenizers` library, for transformers.

    A merge of two pieces ranks by the id of its result: sentencepiece numbers BPE pieces in the order it learned them.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    learned = [
        piece for i, piece in enumerate(pieces)
        if len(piece) > 1 and piece not in BREAKS and not (processor.is_byte(i) or i < 3)
    ]  # fmt: skip
    merges = [
        (piece[:cut], piece[cut:]) for piece in learned
        for cut in sorted(range(1, len(piece)), key=lambda cut: (ids.get(piece[:cut], 0), ids.get(piece[cut:], 0)))
        if piece[:cut] in ids and piece[cut:] in ids
    ]  # fmt: skip
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    written = {i: piece.replace("▁", " ") for i, piece in enumerate(pieces[: 3 + len(BREAKS)])}  # found before all else
    added = [{"id": i, "content": piece, "special": i < 3, **special} for i, piece in written.items()]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    bos = {"id": "<s>", "ids": [processor.bos_id()], "tokens": ["<s>"]}
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    checkpoint.write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, second],
                           "special_tokens": {"<s>": bos}},
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "dropout": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
                  "vocab": {written.get(i, piece): i for piece, i in ids.items()}, "merges": merges},
    })  # fmt: skip


def prepare_tokenizer(config: TrainConfig, texts: list[tuple[str, str]], out: Path) -> Tokenizer:
    """Put tokenizer files into `out` (the checkpoint's, the given one, or a trained one) unless they are there."""
    if config.checkpoint_path is not None:
        source = Path(config.checkpoint_path)
        for name in TOKENIZER_FILES:
            if (source / name).is_file() and not (out / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, out / name)
        return load_tokenizer(out)
    if config.tokenizer is not None:
        if not Path(config.tokenizer).is_file():
            raise ValueError(f"tokenizer: {config.tokenizer} is not a file")
        try:
            sentencepiece.SentencePieceProcessor(model_file=config.tokenizer)
        except RuntimeError:
            raise ValueError(f"tokenizer: {config.tokenizer} is not a sentencepiece model") from None
        there = out / "tokenizer.model"
        if there.exists() and not filecmp.cmp(config.tokenizer, there, shallow=False):
            raise ValueError(f"tokenizer: {there} is another one than {config.tokenizer}; give another --output_dir")
    if not (out / "tokenizer.model").exists():
        if config.tokenizer is None:
            train_tokenizer(dict(texts).values(), config.vocab_size, out / "tokenizer.model")
        else:
            shutil.copyfile(config.tokenizer, out / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    own = {"tokenizer_class": "LlamaTokenizer" if config.tokenizer else "PreTrainedTokenizerFast"}
    checkpoint.write_json(out / "tokenizer_config.json", own | names | flags | {"model_max_length": config.context})
    if config.tokenizer is None:
        write_tokenizer_json(sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model")), out)
    return load_tokenizer(out)


def encode_texts(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> Tensor:
    """Encode every text into one int32 stream [tokens], each between BOS and EOS where the tokenizer has them."""
    cache = {}
    for name, text in texts:
        if name not in cache:
            cache[name] = torch.tensor([*tokenizer.encode(text), *tokenizer.eos_ids[:1]], dtype=torch.int32)
    return torch.cat([cache[name] for name, _ in texts])


def batch_at(tokens: Tensor, step: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] of a step: windows of `context` in an order shuffled anew for each epoch.

    With `short_context`, only every `long_every`-th step sees whole windows; the others see them cut into shorter ones.
    """
    n_window = (len(tokens) - 1) // config.context
    picked = []
    for index in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(index, n_window)
        if not picked or place == 0:
            order = torch.randperm(n_window, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
            shift = (epoch * 7919) % ((len(tokens) - 1) - n_window * config.context + 1)
        picked.append(int(order[place]) * config.context + shift)
    rows = torch.stack([tokens[start : start + config.context + 1] for start in picked]).long()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if config.short_context and step % config.long_every:
        inputs, targets = (part.reshape(-1, config.short_context) for part in (inputs, targets))
    return inputs, targets


# ---------------------------------------------------------------- optimiser


def orthogonalize(update: Tensor) -> Tensor:
    """Replace each matrix of a stack [N, rows, columns] by about its nearest orthogonal one, in five bf16 steps."""
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[-2] > update.shape[-1]
    x = (update.mT if tall else update).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised per matrix (Jordan et al. 2024), scaled to the size of an AdamW step
    (Moonlight, arXiv 2502.16982), so that both optimisers share one learning rate."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
                buffer = self.state[param]["momentum"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                by_shape.setdefault(param.shape, []).append((param, param.grad.lerp(buffer, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = 0.2 * math.sqrt(max(shape))
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and AdamW for the rest, or AdamW for all."""
    hidden = [p for p in model.layers.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, config.learning_rate, config.weight_decay))
    return optimizers


# ---------------------------------------------------------------- forward passes


def init_weights(model: Transformer, seed: int) -> None:
    """Start every layer as the identity (its two output matrices are 0): an exit then begins level with the last."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if param.ndim == 2:
            param.data.normal_(0, 0.02 if "layers" not in name else param.shape[1] ** -0.5, generator=generator)
            if name.endswith(("wo.weight", "w2.weight")):
                param.data.zero_()


class Trainer:
    """A model with what a training step needs around it: rotary tables, compiled layers, the loss of all exits."""

    def __init__(self, model: Transformer, config: TrainConfig):
        self.model, self.config = model, config
        self.focus = parse_focus(config.focus_exits, model.args.n_layer)
        length = max(config.context, PROMPT_TOKENS + NEW_TOKENS)
        self.cos, self.sin = rope_table(model.args, length, config.device)
        self.pool = ThreadPoolExecutor(config.workers) if config.workers > 1 else None
        self.shapes: set[torch.Size] = set()  # of batches already seen
        self.layer, self.exit_loss = _layer, _exit_loss
        if config.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.layer = torch.compile(_layer, dynamic=False)
            self.exit_loss = torch.compile(_exit_loss, dynamic=False)

    def hidden_states(self, tokens: Tensor, dropped: Tensor | None = None) -> list[Tensor]:
        """Token ids [B, T] -> hidden [B, T, D] after each layer; `dropped` [L, B] marks samples that skip a layer."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden, states = self.model.embed(tokens), []
        for index, layer in enumerate(self.model.layers):
            keep = None if dropped is None else ~dropped[index, :, None, None]
            hidden = self.layer(layer, hidden, cos, sin, positions, keep)
            states.append(hidden)
        return states

    def losses(self, step: int, progress: float, inputs: Tensor, targets: Tensor, part: int = 0):
        """The weighted loss of a step and the cross-entropy (nats per token) of each exit that counted."""
        args, config = self.model.args, self.config
        chance = dropout_probabilities(args.n_layer, config.p_max, config.dropout_schedule, progress)
        generator = torch.Generator().manual_seed((config.seed * 64 + part) * 1_000_003 + step)
        dropped = torch.rand(args.n_layer, len(inputs), generator=generator) < chance[:, None]
        states = self.hidden_states(inputs, dropped.to(inputs.device) if config.p_max else None)
        exits = active_exits(config.curriculum, args.n_layer, step, progress)
        weights = exit_weights(exits, args.n_layer, config.e_scale, config.exit_weight)
        for depth, weight in self.focus.items():
            weights[depth] = weights.get(depth, 0.0) + weight
        total, by_exit, teacher = 0.0, {}, None
        for depth in sorted(weights, reverse=True):
            ce, divergence, log_probs = self.exit_loss(self.model, states[depth - 1], targets, teacher)
            if depth == args.n_layer and config.distill:
                teacher = log_probs.detach()
            by_exit[depth] = ce
            early = depth < args.n_layer and config.distill
            total = total + weights[depth] * ((1 - early) * ce + early * divergence)
        return total, by_exit

    def step(self, step: int, progress: float, inputs: Tensor, targets: Tensor) -> dict[int, float]:
        """Leave the gradients of a step in the parameters; return the cross-entropy of each exit that counted.

        With `workers` above 1, as many threads each take a part of the batch: coarser than threads inside every
        matmul, and faster on a CPU that other programs use too.
        """
        n_worker = min(self.config.workers, len(inputs))

        def part(index):
            picked = slice(index, None, n_worker)
            with self.autocast():
                loss, by_exit = self.losses(step, progress, inputs[picked], targets[picked], index)
            (loss / n_worker).backward()
            return {depth: ce.item() for depth, ce in by_exit.items()}

        if self.pool is None or inputs.shape not in self.shapes:  # one thread compiles for all
            parts = [part(index) for index in range(n_worker)]
            self.shapes.add(inputs.shape)
        else:
            parts = list(self.pool.map(part, range(n_worker)))
        return {depth: sum(each[depth] for each in parts) / n_worker for depth in parts[0]}

    def autocast(self):
        bf16 = self.config.precision == "bf16"
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16) if bf16 else nullcontext()


def _layer(layer, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
    out = layer(hidden, cos, sin, positions)
    return out if keep is None else torch.where(keep, out, hidden)


def _exit_loss(model: Transformer, hidden: Tensor, targets: Tensor, teacher: Tensor | None):
    """Cross-entropy, KL(teacher || exit) (0 without teacher) and log-probabilities [B·T, V] of one exit."""
    log_probs = F.log_softmax(model.head(hidden).flatten(0, 1), dim=-1)
    ce = F.nll_loss(log_probs, targets.flatten())
    divergence = 0.0
    if teacher is not None:
        divergence = (teacher.exp() * (teacher - log_probs)).sum(-1).mean()
    return ce, divergence, log_probs


# ---------------------------------------------------------------- state on disk


def save_state(path: Path, model: Transformer, optimizers: list, config: TrainConfig, position: dict) -> None:
    """Write the whole run by rename: a kill at any moment leaves the last good state."""
    state = {
        "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "args": asdict(model.args), "config": asdict(config), **position,
    }  # fmt: skip
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path, model: Transformer, optimizers: list, data_hash: str) -> dict:
    """Put a saved run, if there is one, back into model and optimisers -> its position, or that of a new run."""
    if not path.exists():
        return {"step": 0, "minutes": 0.0, "tokens": 0, "data_hash": data_hash}
    state = torch.load(path, map_location=model.norm.weight.device, weights_only=True)
    if ModelArgs(**state["args"]) != model.args:
        raise ValueError(f"output_dir holds a run of another shape ({path}); give its flags or another --output_dir")
    if state["data_hash"] != data_hash:
        raise ValueError(f"output_dir holds a run on other data ({path}); give the same --data or another --output_dir")
    if len(state["optimizers"]) != len(optimizers):
        raise ValueError(f"output_dir holds a run with another --optimizer ({path}); give the same or another folder")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return {key: state[key] for key in ("step", "minutes", "tokens", "data_hash")}


# ---------------------------------------------------------------- the run


@torch.no_grad()
def heldout_losses(trainer: Trainer, tokens: Tensor, n_window: int) -> Tensor:
    """Mean cross-entropy in nats of each exit at each position of `n_window` windows -> [L, T]."""
    length = min(trainer.config.context, len(tokens) - 1)
    n_window = max(1, min(n_window, len(tokens) // length))
    total = torch.zeros(trainer.model.args.n_layer, length)
    for index in range(n_window):
        start = round(index * (len(tokens) - 1 - length) / max(n_window - 1, 1))
        row = tokens[start : start + length + 1].long().to(trainer.config.device)
        with trainer.autocast():
            for layer, hidden in enumerate(_plain_states(trainer, row[None, :-1])):
                total[layer] += F.cross_entropy(trainer.model.head(hidden)[0], row[1:], reduction="none").cpu()
    return total / n_window


def _plain_states(trainer: Trainer, tokens: Tensor) -> list[Tensor]:
    """Hidden states without compiled layers: evaluation has other shapes than training."""
    compiled, trainer.layer = trainer.layer, _layer
    try:
        return trainer.hidden_states(tokens)
    finally:
        trainer.layer = compiled


def choose_prompts(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(file, prompt) pairs of about PROMPT_TOKENS tokens: beginnings of held-out texts, classes and functions."""
    found = []
    for name, text in texts:
        starts = [0] + [text.find(word) + 1 for word in ("\nclass ", "\ndef ", "\n    def ") if word in text]
        for start in sorted(set(starts)):
            ids = tokenizer.encode(text[start : start + 40 * PROMPT_TOKENS])
            if len(ids) > PROMPT_TOKENS:
                found.append((name, tokenizer.decode(ids[:PROMPT_TOKENS], continues=True)))
    wanted = min(NUM_PROMPTS, len(found))
    return [found[index * len(found) // wanted] for index in range(wanted)]


@torch.no_grad()
def continue_greedily(trainer: Trainer, prompt: list[int], exit_layer: int) -> tuple[list[int], list[bool]]:
    """NEW_TOKENS greedy tokens of the full model, and whether `exit_layer` layers would have said the same."""
    head, ids = trainer.model.head, list(prompt)
    with trainer.autocast():
        for _ in range(NEW_TOKENS):
            hidden = _plain_states(trainer, torch.tensor([ids], device=trainer.config.device))[-1]
            ids.append(int(head(hidden[0, -1]).argmax()))
        hidden = _plain_states(trainer, torch.tensor([ids[:-1]], device=trainer.config.device))[exit_layer - 1]
        drafts = head(hidden[0, len(prompt) - 1 :]).argmax(-1).tolist()
    continuation = ids[len(prompt) :]
    return continuation, [draft == token for draft, token in zip(drafts, continuation, strict=True)]


def simulate_rounds(agree: list[bool], num_draft_tokens: int) -> tuple[int, int]:
    """Accepted and drafted tokens of greedy self-speculation, given where draft and target agree.

    Exact without drafting: up to the first disagreement the draft sees the very prefix that the target wrote.
    """
    position = accepted = drafted = 0
    while position < len(agree):
        count = min(num_draft_tokens, len(agree) - position - 1)
        prefix = (agree[position : position + count] + [False]).index(False)
        accepted, drafted, position = accepted + prefix, drafted + count, position + prefix + 1
    return accepted, drafted


def train(trainer: Trainer, optimizers: list, tokens: Tensor, heldout: Tensor, position: dict) -> None:
    """Run from `position` to the planned end, moving it along, saving every `save_every` steps and at the end."""
    config, out = trainer.config, Path(trainer.config.output_dir)
    started, spent = time.monotonic(), position["minutes"]
    with _open_log(out / "log.jsonl", position["step"]) as log, tqdm(
        total=config.max_steps, initial=position["step"], unit="step", mininterval=2
    ) as bar:
        while not _is_over(config, position):
            step, progress = position["step"], _progress(config, position)
            inputs, targets = (part.to(config.device) for part in batch_at(tokens, step, config))
            by_exit = trainer.step(step, progress, inputs, targets)
            norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item()
            if not math.isfinite(norm):
                raise ValueError(f"the loss diverged in step {step}: lower --learning_rate ({config.learning_rate})")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * learning_rate_factor(config.schedule, config.warmup, progress)
                optimizer.step()
                optimizer.zero_grad()
            position["step"], position["tokens"] = step + 1, position["tokens"] + inputs.numel()
            position["minutes"] = spent + (time.monotonic() - started) / 60
            row = {**position, "step": step, "grad_norm": norm, "loss_by_exit": by_exit}
            del row["data_hash"]
            over = _is_over(config, position)
            if over or position["step"] % config.eval_every == 0:
                row["heldout_by_exit"] = heldout_losses(trainer, heldout, 16).mean(-1).tolist()
            log.write(json.dumps(row) + "\n")
            log.flush()
            if over or position["step"] % config.save_every == 0:
                save_state(out / "state.pt", trainer.model, optimizers, config, position)
            bar.update()
            bar.set_postfix({f"exit {depth}": f"{loss:.2f}" for depth, loss in sorted(by_exit.items())}, refresh=False)


def _open_log(path: Path, step: int):
    """Open the log for appending, without what a killed run wrote after its last saved state."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(row for row in rows if row.endswith("}\n") and json.loads(row)["step"] < step))
    return path.open("a")


def _is_over(config: TrainConfig, position: dict) -> bool:
    steps, minutes = config.max_steps or math.inf, config.max_minutes or math.inf
    return position["step"] >= steps or position["minutes"] >= minutes


def _progress(config: TrainConfig, position: dict) -> float:
    """Where the schedules stand, 0..1 from first to last step, by whichever limit is nearer."""
    by_step = position["step"] / max(config.max_steps - 1, 1) if config.max_steps else 0.0
    by_time = position["minutes"] / config.max_minutes if config.max_minutes else 0.0
    return min(max(by_step, by_time), 1.0)


# ---------------------------------------------------------------- what a finished run leaves behind


def report(trainer: Trainer, tokenizer: Tokenizer, texts: list[tuple[str, str]], heldout: Tensor) -> dict:
    """Held-out loss of every exit and by position, greedy acceptance of drafting with L/4 layers, and a sample."""
    n_layer = trainer.model.args.n_layer
    by_position = heldout_losses(trainer, heldout, 64)
    exit_layer, num_draft_tokens = max(n_layer // 4, 1), 3
    prompts = choose_prompts(tokenizer, texts)
    accepted = drafted = agreed = total = 0
    samples = []
    for name, prompt in prompts:
        tokens, agree = continue_greedily(trainer, tokenizer.encode(prompt), exit_layer)
        counts = simulate_rounds(agree, num_draft_tokens)
        accepted, drafted = accepted + counts[0], drafted + counts[1]
        agreed, total = agreed + sum(agree), total + len(agree)
        samples.append({"file": name, "prompt": prompt, "continuation": tokenizer.decode(tokens, continues=True)})
    parts = by_position[-1].chunk(4)
    return {
        "heldout_tokens": len(heldout),
        "heldout_loss_by_exit": by_position.mean(-1).tolist(),
        "heldout_loss_by_quarter_of_context": [part.mean().item() for part in parts],
        "exit_layer": exit_layer, "num_draft_tokens": num_draft_tokens, "prompts": len(prompts),
        "acceptance_rate": accepted / drafted if drafted else None,
        "agreement": agreed / total if total else None,
        "samples": samples,
    }  # fmt: skip


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the training loss of the last exit and the held-out loss of some exits over tokens."""
    try:
        import matplotlib
    except ImportError:
        cli.notice("no loss_curve.png: drawing it needs `pip install matplotlib`")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = max((int(depth) for row in rows for depth in row["loss_by_exit"]), default=0)
    smooth, curve = None, []
    for row in rows:
        loss = row["loss_by_exit"][str(last)]
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        curve.append(smooth)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["tokens"] / 1e6 for row in rows], curve, color="0.7", label=f"training, exit {last} (smoothed)")
    marked = [row for row in rows if "heldout_by_exit" in row]
    for depth in sorted({max(last // 12, 1), max(last // 4, 1), max(last // 2, 1), last}):
        losses = [row["heldout_by_exit"][depth - 1] for row in marked]
        axes.plot([row["tokens"] / 1e6 for row in marked], losses, marker=".", label=f"held out, exit {depth}")
    axes.set(xlabel="million training tokens", ylabel="nats per token", ylim=(None, min(8, max(curve, default=8))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def export(trainer: Trainer, tokenizer: Tokenizer, hf_config: dict, files: list[str], samples: list[dict]) -> None:
    """Write the Hugging Face folder: weights and configs, data listing, held-out prompts, loss curve."""
    config, out = trainer.config, Path(trainer.config.output_dir)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    checkpoint.export_hf(trainer.model.state_dict(), trainer.model.args, out, hf_config, dtype)
    (out / "files.txt").write_text("\n".join(files) + "\n", encoding="utf-8")
    prompts = [json.dumps({"file": sample["file"], "prompt": sample["prompt"]}) for sample in samples]
    (out / "heldout_prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    plot_losses(out / "log.jsonl", out / "loss_curve.png")


def parse_args() -> TrainConfig:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train", description=__doc__, epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for entry in fields(TrainConfig):
        flag, text = f"--{entry.name}", entry.metadata["help"]
        if entry.name == "data":
            parser.add_argument(flag, nargs="+", default=(), metavar="PATH", help=text)
        elif entry.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = next(kind for kind in (int, float, str) if entry.type in (kind, kind | None))
            shown = text if entry.default in (None, "") else f"{text} (default: {entry.default})"
            parser.add_argument(flag, type=kind, default=entry.default, metavar=kind.__name__.upper(), help=shown)
    return TrainConfig(**vars(parser.parse_args()))


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Transformer, dict]:
    """A new model in fp32 and its Hugging Face config, or the checkpoint's."""
    if config.checkpoint_path is not None:
        loaded = checkpoint.load(config.checkpoint_path, torch.float32, config.device, pack=False)
        check_vocabulary(tokenizer, loaded.args.vocab_size)
        return loaded.model.requires_grad_(True), loaded.hf_config
    args = ModelArgs(
        dim=config.dim, n_layer=config.n_layer, n_head=config.n_head, n_kv_head=config.n_kv_head,
        head_dim=config.dim // config.n_head, ffn_dim=config.ffn_dim, vocab_size=tokenizer.vocab_size,
        max_seq_len=config.context, norm_eps=1e-5, rope_base=10000.0, tie_embeddings=config.tie_embeddings,
    )  # fmt: skip
    model = Transformer(args)
    init_weights(model, config.seed)
    hf_config = checkpoint.hf_config_from_args(args, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_ids[0])
    return model.to(config.device), hf_config


def main() -> None:
    """Train, or go on with the run found in output_dir, then report and export."""
    config = parse_args()
    config.validate()
    cli.check_writable(config.json)
    out = Path(config.output_dir)
    train_texts, heldout_texts = split_texts(find_files(config.data, config.glob), config.heldout)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(config, train_texts, out)
    tokens, heldout = encode_texts(tokenizer, train_texts), encode_texts(tokenizer, heldout_texts)
    if len(tokens) <= config.context:
        raise ValueError(f"data: {len(tokens)} tokens are too few for one window of {config.context} (--context)")
    model, hf_config = build_model(config, tokenizer)
    if model.args.n_layer < 2:
        raise ValueError("n_layer must be 2 or more: a single layer has no early exit")
    optimizers, trainer = make_optimizers(model, config), Trainer(model, config)
    data_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    position = load_state(out / "state.pt", model, optimizers, data_hash)
    size = sum(param.numel() for param in model.parameters())
    cli.notice(f"{size / 1e6:.1f} M parameters, {len(tokens)} training tokens, {len(heldout)} held out, "
               f"from step {position['step']}")  # fmt: skip
    train(trainer, optimizers, tokens, heldout, position)
    results = report(trainer, tokenizer, heldout_texts, heldout)
    results |= {"parameters": size, "training_tokens": len(tokens)} | position
    listing = [f"# Python {platform.python_version()}: split, bytes, name"]
    for split, texts in (("train", dict(train_texts)), ("heldout", dict(heldout_texts))):
        listing += [f"{split}\t{len(text.encode())}\t{name}" for name, text in texts.items()]
    export(trainer, tokenizer, hf_config, listing, results["samples"])
    rows = [[str(depth), f"{loss:.3f}"] for depth, loss in enumerate(results["heldout_loss_by_exit"], start=1)]
    cli.print_table("held-out loss", ["exit", "nats per token"], rows)
    print(f"drafting with {results['exit_layer']} layers, K = {results['num_draft_tokens']}: acceptance rate "
          f"{cli.shown(results['acceptance_rate'], '.3f')}, agreement {cli.shown(results['agreement'], '.3f')}; "
          f"written: {out}")  # fmt: skip
    if config.json is not None:
        cli.write_json(config.json, {"config": asdict(config), "results": results, **cli.environment()})


if __name__ == "__main__":
    cli.run(main)
