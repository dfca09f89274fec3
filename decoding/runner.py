"""What runs the layers and the LM head, compiled or not, and with how many rows a call.

Decoding runs layers only through a Runner. No other file of the engine compiles anything with torch.compile. One of
these backends runs a layer:
  * "c++"      compiled, on a CPU whose weights are packed: a run of layers is one call into `kernels/cpu/layers.h`
  * "inductor" compiled, anywhere else: one torch.compile graph of the block, shared by all layers
  * "eager"    operation by operation; named "c++ ops" where several ranks, which talk in between, use compiled ones

Exactness: a row's bits must not depend on which path computed it, or a speculative text could leave the plain one.
  * With the CPU kernels every reduction (linear, norm, attention) gives a row the same bits at every number of rows. So
    a call has as many rows as there are.
  * Without them bits depend on the number of rows. So every decoding call is padded to one `width`; padding rows have
    the position -1. And all layers run through one compiled block, whatever the exit, the skips or the policy: two
    differently cut graphs would keep different intermediates in fp32.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from decoding.graphs import Graphs
from decoding.packed import PackedLayers, PackedModel
from decoding.sampling import Sampler, SamplingConfig, make_sampler
from decoding.visits import Visits
from drafting.adapters import Adapters
from errors import UserError
from kernels.exit_head import Draw, Exit
from kernels.linear import is_packed
from model import Linear, Transformer

PREFILL_CHUNK = 512  # rows per prefill call: bounds activation memory
MAX_ROWS = 16  # rows a decoding call may have: num_draft_tokens + 1


def missing_compiler(device: str = "cpu") -> str | None:
    """Say in one line why torch.compile cannot work here for a kind of device; None if it can."""
    language, names = ("C++", ("g++", "clang++", "c++")) if device == "cpu" else ("C", ("gcc", "clang", "cc"))
    if any(map(shutil.which, names)):
        return None
    return (
        f"no {language} compiler ({names[0]} or {names[1]}) on this machine: running eagerly, which is slower; "
        "the text is exact too"
    )


def check_num_draft_tokens(num_draft_tokens: int) -> None:
    """Raise UserError for more drafts than a call has rows."""
    if not 0 <= num_draft_tokens < MAX_ROWS:
        raise UserError(f"num_draft_tokens must be in 0..{MAX_ROWS - 1}, got {num_draft_tokens}")


def check_draft_vocab(draft_vocab: int | None, vocab_size: int) -> None:
    """Raise UserError for a number of tokens that the vocabulary does not have."""
    if draft_vocab is not None and not 2 <= draft_vocab <= vocab_size:
        raise UserError(f"draft_vocab must be in 2..{vocab_size} for this model, got {draft_vocab}")


def _run_block(layer, hidden, cos, sin, positions, run_attention, run_mlp):
    # A plain function of the layer: Dynamo lifts its parameters and caches to inputs, so all layers share one graph.
    return layer(hidden, cos, sin, positions, run_attention, run_mlp)


def packed_layers(model: Transformer) -> PackedLayers:
    """Make the layers of a model ready to be run in one call."""
    tensors = [layer.tensors() for layer in model.layers]
    return PackedLayers(tensors, model.cos, model.sin, model.args.n_head, model.args.norm_eps)


class Runner:
    """Runs a model for decoding with at most `max_rows` rows a call, `cache_length` tokens of prompt and text.

    compile: use a compiled backend. exact=False gives up bit-equal rows for speed where padding costs time (a baseline
    to be measured against, named as such). notice: called with one line about anything slower than asked for.

    Attributes: backend; width, the rows of a padded call; own_drafts, whether drafts use the model's layers and all of
    its LM head; visits, what reading weights counts; packed, the model for rounds in C++, where that is the backend;
    call_by_call, set it to play every round by single calls, for comparisons.
    """

    call_by_call = False

    def __init__(
        self,
        model: Transformer,
        cache_length: int,
        max_rows: int = 4,
        compile: bool = False,
        exact: bool = True,
        notice: Callable[[str], None] = print,
        draft_vocab: int | None = None,
        draft_model: Transformer | None = None,
    ):
        """draft_vocab: drafts choose among the first so many tokens only, which makes their LM head cheaper.

        draft_model: low-bit copies of the first layers and of the LM head, for drafts and nothing else.
        """
        check_num_draft_tokens(max_rows - 1)
        self.model = model.requires_grad_(False)
        self.draft_model = draft_model and draft_model.requires_grad_(False)
        self.n_layer, self.cache_length, self.group = model.args.n_layer, cache_length, model.group
        linears = [m for each in (model, draft_model) if each for m in each.modules() if isinstance(m, Linear)]
        self.rows_independent = all(is_packed(linear.weight) for linear in linears)
        self._head = model.exit_head()  # module attributes cost microseconds
        self._draft_head = draft_model.exit_head() if draft_model else self._head
        if draft_vocab is not None:
            self._draft_head = self._draft_head.trimmed(draft_vocab)
        self.own_drafts = self._draft_head is self._head
        self.visits = Visits(model, draft_model, draft_vocab)
        self.backend = self._choose_backend(notice) if compile else "eager"
        # Padded rows cost time, so only calls that need them are padded; but then always to the same width, whatever
        # the number of drafts, so that two settings, and two processes, compute the same bits.
        self.width = max_rows if self.rows_independent or not exact else (8 if max_rows <= 8 else MAX_ROWS)
        slots = cache_length + self.width
        if model.cache_length < slots:
            model.setup_cache(slots)  # else: share the cache that another runner of this model uses
        if draft_model:
            draft_model.share_cache(model)
        self.positions = torch.arange(slots, device=model.cos.device)
        self._padding = torch.full((self.width,), -1, device=model.cos.device)  # a padding row's position
        self.packed: PackedModel | None = None  # from the first prefill on
        self._compiled_block, self._warm, self.compile_s = None, False, 0.0
        if self.backend == "inductor":
            self._compiled_block = torch.compile(_run_block, dynamic=False, fullgraph=True)
        self._graphs, self._captured_cos = Graphs(self), model.cos  # cos is made anew with every cache

    def _choose_backend(self, notice: Callable[[str], None]) -> str:
        """Return the fastest backend that works here."""
        if self.group:  # ranks talk within a layer: neither a C++ call nor a compiled block can
            return "c++ ops" if self.rows_independent else "eager"
        if self.rows_independent:
            return "c++"
        if reason := missing_compiler(self.model.norm.weight.device.type):
            notice(reason)
            return "eager"
        return "inductor"

    def agreed(self, value):
        """Return `value`, or with several ranks that of rank 0.

        For whatever time or vector arithmetic decides, see tp.py.
        """
        return self.group.agreed(value) if self.group else value

    def sampler(self, config: SamplingConfig) -> Sampler:
        """Make the sampler for `config`."""
        return make_sampler(config, self.group.agreed if self.group else None)

    @property
    def unsteady_rounds(self) -> int:
        """Return how many rounds of a plan take longer than all after them: they are captured as CUDA graphs."""
        return 2 if self._graphs.on_gpu else 0

    @property
    def compiled(self) -> bool:
        """Say whether a compiled backend runs the layers."""
        return self.backend != "eager"

    @property
    def is_warm(self) -> bool:
        """Say whether `warm_up` has compiled all that decoding will use."""
        return self._warm

    @cached_property
    def can_sample(self) -> bool:
        """Say whether both heads draw a coupled sample without all logits, see Exit.has_fused_head."""
        return all(self.exit(self._head.norm[None], draft=draft).has_fused_head() for draft in (False, True))

    def warm_up(self, skips_sublayers: bool = False) -> None:
        """Compile every graph that decoding will use, then make any further compilation an error.

        skips_sublayers: also the variants of a layer that leave out its attention, its MLP or both.
        """
        if self.backend != "inductor":
            return
        start = time.perf_counter()
        torch._dynamo.config.recompile_limit = 64  # beyond the limit Dynamo runs eagerly, without a word: other bits
        torch._inductor.config.size_asserts = False  # 20 checks per layer call; the guards above hold the same facts
        hidden = self.embed([0] * self.width)
        for skips in ((), ((0,), ()), ((), (0,)), ((0,), (0,))) if skips_sublayers else ((),):
            self.run_layers(hidden, 0, 0, self.n_layer, *skips)
            if self.draft_model:
                self.run_layers(hidden, 0, 0, len(self.draft_model.layers), *skips, draft=True)
        self._warm = True
        self.compile_s += time.perf_counter() - start

    def choose_threads(self, repeats: int = 15, budget_s: float = 0.5) -> int:
        """Time plain decoding steps with 1, 2, 4, … CPU threads in turns; set and return the count that serves best.

        More threads must be a twentieth faster to be taken: on a busy machine threads that wait for each other can be
        many times slower than one. The bits of the "c++" backend do not depend on it.
        """
        counts, most = [1], torch.get_num_threads()
        while counts[-1] < most:
            counts.append(min(2 * counts[-1], most))
        self.prefill([0])
        times: dict[int, list[float]] = {count: [] for count in counts}
        end = time.perf_counter() + budget_s
        for turn in range(repeats if len(counts) > 1 else 0):
            if turn >= 3 and self.agreed(time.perf_counter() > end):
                break
            for count, taken in times.items():
                torch.set_num_threads(count)
                for _ in range(2):  # the first step with another count wakes its threads
                    start = time.perf_counter()
                    self.exit(self.run_layers(self.embed([0]), 0, 0, self.n_layer)).tokens()
                taken.append(time.perf_counter() - start)
        best = 1
        for count in counts[1:]:
            if statistics.median(times[count]) < 0.95 * statistics.median(times[best]):
                best = count
        best = self.agreed(best)
        torch.set_num_threads(best)
        return best

    def prefill(self, tokens: Sequence[int], start: int = 0) -> Tensor:
        """Run `tokens` at positions start, start+1, … through all layers -> hidden [1, D] of the last one."""
        return self.prefill_states(tokens, start)[self.n_layer][-1:]

    def prefill_states(
        self, tokens: Sequence[int], start: int = 0, depths: Sequence[int] = (), top: int | None = None
    ) -> dict[int, Tensor]:
        """Do what `prefill` does -> hidden [T, D] of the last chunk of tokens at each of `depths` and at the top.

        top: go only so far up; nothing is in the cache of the layers above. Raises UserError if the cache that is to
        hold the tokens before `start` is not there any more.
        """
        self._graphs.forget()
        if self.model.cos is not self._captured_cos:  # another runner has replaced the cache: graphs know the old one
            if start:
                raise UserError(f"cached: another runner has replaced the cache that held {start} tokens: start anew")
            self._graphs, self._captured_cos = Graphs(self), self.model.cos
        if self.draft_model:
            self.draft_model.share_cache(self.model)
        if self.backend == "c++":  # once a prompt: the cache may have been replaced by another runner's
            self.packed = self._packed_model()
        chunk = math.ceil(len(tokens) / math.ceil(len(tokens) / PREFILL_CHUNK))  # equal ones: the last is no remnant
        for first in range(0, len(tokens), chunk):
            hidden, below, states = self.embed(tokens[first : first + chunk]), 0, {}
            positions = self.positions[start + first : start + first + len(hidden)]
            for depth in sorted({*depths, top or self.n_layer}):
                if self.packed:
                    hidden = self.packed.layers.run(hidden, start + first, below, depth)
                else:
                    hidden = self.model.run_layers(hidden, positions, below, depth)
                below, states[depth] = depth, hidden
        return states

    def _packed_model(self) -> PackedModel:
        """Gather what a round in C++ reads."""
        model, copies = self.model, self.draft_model
        draft_layers = packed_layers(copies) if copies else None
        embedding = model.embedding
        return PackedModel(
            packed_layers(model), embedding.weight, self._head, embedding.scale, draft_layers, self._draft_head
        )

    def current_graphs(self) -> Graphs:
        """Return the programs that read and write the model's cache. Raises RuntimeError if that is another one now."""
        if self.model.cos is not self._captured_cos:  # captured graphs would write to freed memory
            raise RuntimeError("another runner of this model has replaced the cache in the middle of a text")
        return self._graphs

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Look up token ids -> hidden [T, D]."""
        weight = self.model.embedding.weight
        if len(tokens) == 1 and not is_packed(weight) and weight.is_floating_point():
            return weight[tokens[0] : tokens[0] + 1]  # a view: the lookup would cost as much as a layer's arithmetic
        return self.model.embed(torch.tensor(tokens, device=self.positions.device))

    def run_layers(
        self,
        hidden: Tensor,
        position: int,
        start: int,
        stop: int,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
        draft: bool = False,
    ) -> Tensor:
        """Run layers start..stop-1 on hidden [T, D], whose first row is at `position`.

        draft: the layers of the draft model, if there is one.
        """
        if packed := self.packed:
            layers = (draft and packed.draft_layers) or packed.layers
            return layers.run(hidden, position, start, stop, skip_attention, skip_mlp)
        positions = self.positions[position : position + len(hidden)]
        run = self._graphs.run_layers if self._graphs.on_gpu else self.run_blocks
        parts = [
            run(rows, at, start, stop, skip_attention, skip_mlp, draft)
            for rows, at in zip(hidden.split(self.width), positions.split(self.width), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run_blocks(
        self,
        hidden: Tensor,
        positions: Tensor,
        start: int,
        stop: int,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
        draft: bool = False,
    ) -> Tensor:
        """Run layer by layer, padded. positions [T] lie on the device, where a captured graph finds them."""
        layers = (draft and self.draft_model or self.model).layers
        rows, hidden = hidden.shape[0], self._pad(hidden)
        positions = torch.cat((positions, self._padding[: len(hidden) - rows]))
        cos, sin = self.model.cos[positions], self.model.sin[positions]
        run = self._compiled_block or _run_block
        with self._no_recompiling():
            for index in range(start, stop):
                run_attention, run_mlp = index not in skip_attention, index not in skip_mlp
                hidden = run(layers[index], hidden, cos, sin, positions, run_attention, run_mlp)
        return hidden[:rows]

    def _no_recompiling(self):
        """Make compiling an error only while our blocks run: other code of the process may want to compile."""
        if not self._warm:
            return nullcontext()
        return torch.compiler.set_stance("fail_on_recompile", skip_guard_eval_unsafe=True)

    def adapted(self, hidden: Tensor, adapters: Adapters | None, depth: int) -> Tensor:
        """Correct hidden [T, D] that exits at `depth` by the adapter of that exit, if there is one."""
        adapter = adapters and adapters.ready(hidden).get(depth)
        return adapter(hidden) if adapter else hidden

    def exit(self, hidden: Tensor, draw: Draw | None = None, draft: bool = False) -> Exit:
        """Ask the final norm and the LM head about hidden [T, D]; padded, where decoding is, up to its width.

        draw: how `Exit.samples` will choose. draft: with the draft's LM head, which may know fewer tokens.
        """
        return Exit(self._pad(hidden), self._draft_head if draft else self._head, len(hidden), draw)

    def _pad(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if self.rows_independent or rows >= self.width:
            return hidden
        return torch.cat((hidden, hidden[-1:].expand(self.width - rows, -1)))
