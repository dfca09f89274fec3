"""The settings of a training run, each of them a flag of `scripts.train`, and the checks of their values."""

import argparse
import math
from dataclasses import dataclass, field, fields

from decoding.engine import DEVICES, chosen_device
from errors import UserError
from scripts.common.texts import SEEDS
from scripts.train.recipe import parse_focus

EXAMPLE = """example, a few minutes on a laptop:
  python -m scripts.train --data stdlib --n_layer 8 --dim 128 --ffn_dim 384 --max_minutes 5 --output_dir my_model
  python generate.py --checkpoint_path my_model --prompt "def main():" --draft_exit 2"""


# Flags whose best value depends on what is trained: a new model, a checkpoint, adapters of a checkpoint.
DEFAULTS = {
    "dropout_schedule": ("exp", "constant", "constant"),
    "optimizer": ("muon", "adamw", "adamw"),
    "learning_rate": (3e-3, 3e-5, 1e-2),
}
RECIPE = (  # settings that adapters do not have
    "p_max",
    "dropout_schedule",
    "curriculum",
    "e_scale",
    "exit_weight",
    "focus_exits",
    "distill",
    "optimizer",
    "workers",
    "compile",
)


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """The settings of a run. Each is a flag of the same name."""

    data: tuple[str, ...] = setting(
        (),
        "text files or folders; stdlib, stdlib_tests: sources of the running Python; what is named twice counts twice",
    )
    glob: str = setting("*.py", "which files of a folder")
    heldout: float = setting(0.03, "share of files never trained on, chosen by a hash of their names")
    tokenizer: str | None = setting(None, "sentencepiece model to use instead of training one")
    checkpoint_path: str | None = setting(None, "Llama to go on from: folder or hub id; sets shape and tokenizer")
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
    dropout_schedule: str | None = setting(
        None, "exp: from 0 up (default from scratch); constant (default with checkpoint_path)"
    )
    curriculum: str = setting("rotational:8", "rotational:R, gradual, or none: every exit on every step")
    e_scale: float = setting(0.2, "scale of the early exits' loss")
    exit_weight: str = setting("paper", "paper: e(l) grows with depth; uniform: e_scale for each early exit")
    focus_exits: str = setting("", "such as 3:0.5,6:0.2: exits on in every step, with a weight of their own on top")
    distill: float = setting(0.0, "share of the early exits' loss taken as KL from the last layer's distribution")
    optimizer: str | None = setting(
        None,
        "muon for matrices inside layers and adamw for the rest (default from "
        "scratch), or adamw for all (default with checkpoint_path)",
    )
    learning_rate: float | None = setting(
        None, "peak (default: 0.003 from scratch, 3e-05 with checkpoint_path, 0.01 with adapter_exits)"
    )
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
    device: str = setting("auto", "cpu, cuda, or auto: cuda where torch sees a GPU")
    compile: bool = setting(False, "torch.compile layers and losses")
    workers: int = setting(1, "threads that each take a part of the batch; set OMP_NUM_THREADS=1 beside it")
    parallel: str = setting(
        "ddp",
        "with several processes (torchrun): ddp, each has the whole model; fsdp, each has a "
        "part of every weight, for models that do not fit",
    )
    adapter_exits: str = setting(
        "",
        "such as 3,6: leave the checkpoint as it is and train an adapter for each of "
        "these exits, so that it says what the last layer says",
    )
    adapter_rank: int = setting(64, "width of an adapter")
    json: str | None = setting(None, "write config and results here as one JSON object")

    def __post_init__(self):
        purpose = 0 if self.checkpoint_path is None else 2 if self.adapter_exits else 1
        for name, values in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, values[purpose])

    def validate(self, n_process: int = 1) -> None:
        """Raise UserError for the first setting that no run can have."""
        choices = {
            "dropout_schedule": ("exp", "constant"),
            "exit_weight": ("paper", "uniform"),
            "optimizer": ("muon", "adamw"),
            "schedule": ("linear", "cosine", "wsd"),
            "precision": ("bf16", "fp32"),
            "device": DEVICES,
            "parallel": ("ddp", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        name, _, period = self.curriculum.partition(":")
        if not (self.curriculum in ("gradual", "none") or name == "rotational" and period.isdecimal() and int(period)):
            raise UserError(f"curriculum must be rotational:R (R from 1), gradual or none, got {self.curriculum!r}")
        for name in (
            "n_layer",
            "dim",
            "n_head",
            "n_kv_head",
            "ffn_dim",
            "vocab_size",
            "context",
            "batch_size",
            "long_every",
            "save_every",
            "eval_every",
            "workers",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("p_max", "distill", "warmup", "heldout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "e_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed must be in 0..{SEEDS - 1}, got {self.seed}")
        if self.dim % self.n_head:
            raise UserError(f"dim must be a multiple of n_head ({self.n_head}), got {self.dim}")
        if self.short_context is not None and (self.short_context < 1 or self.context % self.short_context):
            raise UserError(f"short_context must divide context ({self.context}), got {self.short_context}")
        if self.max_steps is self.max_minutes is None:
            raise UserError("max_steps or max_minutes must be given: the schedules need to know the end of the run")
        for name in ("max_steps", "max_minutes"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.checkpoint_path is None:
            parse_focus(self.focus_exits, self.n_layer)
        chosen_device(self.device)
        if self.adapter_exits:
            self._validate_adapters(n_process)
        elif self.adapter_rank != 64:
            raise UserError("adapter_rank is of exit adapters: give --adapter_exits, too")
        self._validate_processes(n_process)

    def _validate_adapters(self, n_process: int) -> None:
        if self.checkpoint_path is None:
            raise UserError("adapter_exits needs --checkpoint_path: the model that the adapters are for")
        if n_process > 1:
            raise UserError(f"adapter_exits: adapters are trained by one process, got {n_process}")
        default = TrainConfig(checkpoint_path=self.checkpoint_path, adapter_exits=self.adapter_exits)
        for name in RECIPE:
            if getattr(self, name) != getattr(default, name):
                raise UserError(f"{name} is of training the model itself: leave it out with --adapter_exits")
        if self.adapter_rank < 2 or self.adapter_rank % 2:
            raise UserError(f"adapter_rank must be even and 2 or more, got {self.adapter_rank}")

    def _validate_processes(self, n_process: int) -> None:
        if n_process == 1:
            if self.parallel == "fsdp":
                raise UserError("parallel fsdp needs several processes: start them with torchrun")
            return
        if self.batch_size % n_process:
            raise UserError(f"batch_size must be a multiple of the {n_process} processes, got {self.batch_size}")
        if self.workers > 1:
            raise UserError(f"workers must be 1 with several processes, got {self.workers}")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise UserError("optimizer muon needs whole matrices, fsdp has parts of them: use adamw")
        if self.parallel == "fsdp" and self.compile:
            raise UserError("compile is not supported with --parallel fsdp: leave it out")


def parse_args(description: str) -> TrainConfig:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train",
        description=description,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
