"""Policies whose drafts run to the top but leave out sublayers: drawn at random, read from a file, or learned."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from drafting.adapters import check_shape, hash_of, read_tensors
from drafting.plan import DraftPlan, RoundContext
from drafting.policy import SelfDrafting, check_range
from errors import UserError


@dataclass
class LayerSkipProportion(SelfDrafting):
    """Leave out each layer but the first with probability `proportion`, drawn anew each round."""

    name = "layer_skip_proportion"
    proportion: float = 0.5
    seed: int = field(default=0, kw_only=True)
    skips_sublayers = True

    def __post_init__(self):
        super().__post_init__()
        check_range("proportion", self.proportion, 0.0, 1.0)

    def fit(self, n_layer: int) -> None:
        self.n_layer = n_layer

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.random = random.Random(self.seed)

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        skipped = frozenset(i for i in range(1, self.n_layer) if self.random.random() < self.proportion)
        return self.new_plan(skip_attention=skipped, skip_mlp=skipped)


@dataclass
class SkipSet(SelfDrafting):
    """Leave out fixed sublayers (Draft & Verify, arXiv 2309.08168).

    file: JSON that lists the 0-based layers without attention and those without MLP, {"skip_attention": [3, 5],
    "skip_mlp": [4]}. It may also hold n_layer, of the model it is meant for, and num_draft_tokens (default: 3).
    `scripts.search_skips` writes such files.
    """

    name, example = "skip_set", "skip_set:file=skips.json"
    file: str
    num_draft_tokens: int | None = field(default=None, kw_only=True)
    skips_sublayers = True

    def __post_init__(self):
        try:
            self.file_hashes = [hash_of(self.file)]
            self.content = json.loads(Path(self.file).read_text(encoding="utf-8"))
            self.skips = {key: frozenset(self.content[key]) for key in ("skip_attention", "skip_mlp")}
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{self.file} must hold {{"skip_attention": [layers], "skip_mlp": [layers]}}') from None
        if self.num_draft_tokens is None:
            self.num_draft_tokens = self.content.get("num_draft_tokens", 3)
            if type(self.num_draft_tokens) is not int:
                raise UserError(f"{self.file}: num_draft_tokens must be a whole number, got {self.num_draft_tokens!r}")
        super().__post_init__()

    def fit(self, n_layer: int) -> None:
        if (meant := self.content.get("n_layer", n_layer)) != n_layer:
            raise UserError(f"skip_set: {self.file} is for a model of {meant} layers, this one has {n_layer}")
        for key, layers in self.skips.items():
            wrong = [i for i in layers if type(i) is not int or not 0 <= i < n_layer]
            if wrong:
                raise UserError(f"skip_set: {self.file}: {key} must be in 0..{n_layer - 1}, got {wrong[0]!r}")
        self.only_plan = self.new_plan(**self.skips, repeats=True)


@dataclass
class Learned(SelfDrafting):
    """Leave out the sublayers that a small network chooses every few rounds (trained by `scripts.train_policy`).

    The network reads the hidden state that chose the last token, which verification leaves behind anyway. skipr decides
    layer by layer instead, and pays for it in every layer. If the network keeps every sublayer, nothing is drafted.

    file: safetensors of fp32 w1 [H, D], b1 [H], w2 [2L, H], b2 [2L]. Attention and MLP of each layer in turn are kept
    where w2·relu(w1·h/rms(h) + b1) + b2 is above 0. every: rounds between choices. Choosing in each round, with its
    weights out of the caches, would cost 5 % of a model as small as the demo.
    """

    name, example = "learned", "learned:file=learned.safetensors"
    file: str
    num_draft_tokens: int | None = field(default=None, kw_only=True)
    every: int = field(default=8, kw_only=True)
    skips_sublayers = reads_hidden = True

    def __post_init__(self):
        metadata, tensors = read_tensors(self.file, "skipfast learned policy", "file")
        self.file_hashes = [hash_of(self.file)]
        if self.every < 1:
            raise UserError(f"every must be 1 or more, got {self.every}")
        try:
            self.shape = int(metadata["n_layer"]), int(metadata["dim"])
            if self.num_draft_tokens is None:
                self.num_draft_tokens = int(metadata.get("num_draft_tokens", 3))
            self.network = [tensors[name].numpy() for name in ("w1", "b1", "w2", "b2")]
            hidden = len(self.network[0])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.file} is broken: {error}") from None
        shapes = [(hidden, self.shape[1]), (hidden,), (2 * self.shape[0], hidden), (2 * self.shape[0],)]
        if [array.shape for array in self.network] != shapes:
            raise UserError(f"{self.file} is broken: arrays must be of shapes {shapes}")
        super().__post_init__()

    def fit(self, n_layer: int) -> None:
        self.plans: dict[bytes, DraftPlan] = {}

    def check_model(self, n_layer: int, dim: int | None) -> None:
        check_shape(f"learned: {self.file}", self.shape, n_layer, dim)
        super().check_model(n_layer, dim)

    def start_prompt(self, prompt: Sequence[int]) -> None:
        super().start_prompt(prompt)
        self.rounds, self.chosen = 0, DraftPlan()

    def choose_plan(self, context: RoundContext) -> DraftPlan:
        if self.rounds % self.every == 0 and context.hidden is not None:
            self.chosen = self.plan_for(context.hidden)
        self.rounds += 1
        return self.chosen

    def plan_for(self, hidden: Tensor) -> DraftPlan:
        """Ask the network: hidden [1, D] -> the plan. numpy, because its calls cost a third of torch's."""
        w1, b1, w2, b2 = self.network
        state = hidden.float().numpy(force=True).reshape(-1)
        scale = math.sqrt(len(state) / max(float(state @ state), 1e-12))
        keep = w2 @ np.maximum(w1 @ state * scale + b1, 0) + b2 > 0
        key = keep.tobytes()
        if key not in self.plans:
            attention, mlp = (frozenset(np.flatnonzero(~keep[first::2]).tolist()) for first in (0, 1))
            skipping = self.new_plan(skip_attention=attention, skip_mlp=mlp)
            self.plans[key] = DraftPlan() if keep.all() else skipping
        return self.plans[key]
