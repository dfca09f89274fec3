"""How decoding becomes fast: what runs a layer, and the number of rows a call is made with.

`generate.decode` speaks to the model only through a Runner. No other file of the engine mentions torch.compile. A layer
is run by one of three backends:
  * "c++"      compiled, on a CPU whose weights are packed: a run of layers is one call into `kernels/cpp/layers.h`
  * "inductor" compiled, anywhere else: one torch.compile graph of the block, shared by all layers
  * "eager"    operation by operation

Exactness: a row's bits must not depend on which path computed it, or a speculative text could leave the plain one.
  * With the CPU kernels every reduction (linear, norm, attention) gives a row the same bits at every number of rows, so
    calls are made with as many rows as there are.
  * Without them bits depend on the row count, so every decoding call is padded to one `width`; padding rows write their
    K/V into scratch slots behind the cache. And all layers run through one compiled block, whatever the exit, skip set
    or policy: two differently cut graphs would keep different intermediates in fp32.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.exit_head import Exit
from kernels.layers import PackedLayers
from kernels.linear import is_packed
from model import Linear, Transformer
from policies import DraftPlan
from sampling import SamplingConfig

PREFILL_CHUNK = 512  # rows per prefill call: bounds activation memory
MAX_ROWS = 16  # rows a decoding call may have: num_draft_tokens + 1


def missing_compiler() -> str | None:
    """Why torch.compile cannot work on the CPU here, in one line; None if it can."""
    if any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return None
    return "no C++ compiler (g++ or clang++) on this machine: running eagerly, which is slower; the text is exact too"


def check_num_draft_tokens(num_draft_tokens: int) -> None:
    if not 0 <= num_draft_tokens < MAX_ROWS:
        raise ValueError(f"num_draft_tokens must be in 0..{MAX_ROWS - 1}, got {num_draft_tokens}")


def _run_block(layer, hidden, cos, sin, positions, run_attention, run_mlp):
    # A plain function of the layer: Dynamo lifts its parameters and caches to inputs, so all layers share one graph.
    return layer(hidden, cos, sin, positions, run_attention, run_mlp)


class Runner:
    """Runs a model for decoding with at most `max_rows` rows per call, `cache_length` tokens of prompt and text.

    compile: use a compiled backend. exact=False gives up bit-equal rows for speed where padding costs time (a baseline
    to be measured against, named as such). notice: called with one line about anything slower than asked for.
    """

    def __init__(
        self, model: Transformer, cache_length: int, max_rows: int = 4, compile: bool = False,
        exact: bool = True, notice: Callable[[str], None] = print,
    ):  # fmt: skip
        check_num_draft_tokens(max_rows - 1)
        self.model = model.requires_grad_(False)
        self.n_layer = model.args.n_layer
        self.cache_length = cache_length
        self.rows_independent = all(is_packed(m.weight) for m in model.modules() if isinstance(m, Linear))
        self._norm, self._head = model.norm.weight, model.lm_head.weight  # module attributes cost microseconds
        self._ends = (model.embedding.weight, self._norm, self._head, model.args.vocab_size)
        self.backend = "eager"
        if compile and self.rows_independent:
            self.backend = "c++"
        elif compile and model.norm.weight.device.type == "cpu" and (reason := missing_compiler()):
            notice(reason)
        elif compile:
            self.backend = "inductor"
        # Padded rows cost time, so only calls that need them are padded; but then always to the same width, whatever
        # the number of drafts, so that two settings, and two processes, compute the same bits.
        self.width = max_rows if self.rows_independent or not exact else (8 if max_rows <= 8 else MAX_ROWS)
        slots = cache_length + self.width
        if model.cache_length < slots:
            model.setup_cache(slots)  # else: share the cache that another runner of this model uses
        self.positions = torch.arange(slots, device=model.cos.device)
        self.compile_s = 0.0
        self._layers: PackedLayers | None = None  # for the "c++" backend
        self._compiled_block, self._warm = None, False
        if self.backend == "inductor":
            self._compiled_block = torch.compile(_run_block, dynamic=False, fullgraph=True)

    @property
    def compiled(self) -> bool:
        return self.backend != "eager"

    def warm_up(self, skip_attention: Collection[int] = (), skip_mlp: Collection[int] = ()) -> None:
        """Compile every graph that decoding will use, then make any further compilation an error."""
        if self.backend != "inductor":
            return
        start = time.perf_counter()
        torch._dynamo.config.recompile_limit = 64  # beyond the limit Dynamo runs eagerly, without a word: other bits
        torch._inductor.config.size_asserts = False  # 20 checks per layer call; the guards above hold the same facts
        hidden = self.embed([0] * self.width)
        self.run_layers(hidden, 0, 0, self.n_layer)
        if skip_attention or skip_mlp:
            self.run_layers(hidden, 0, 0, self.n_layer, skip_attention, skip_mlp)
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
            if turn >= 3 and time.perf_counter() > end:
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
        torch.set_num_threads(best)
        return best

    def prefill(self, tokens: Sequence[int], start: int = 0) -> Tensor:
        """Run `tokens` at positions start, start+1, … through all layers -> hidden [1, D] of the last one."""
        if self.backend == "c++":  # once a prompt: the cache may have been replaced by another runner's
            args, model = self.model.args, self.model
            tensors = [layer.tensors() for layer in model.layers]
            self._layers = PackedLayers(tensors, model.cos, model.sin, args.n_head, args.norm_eps)
        for first in range(0, len(tokens), PREFILL_CHUNK):
            hidden = self.embed(tokens[first : first + PREFILL_CHUNK])
            if self._layers:
                hidden = self._layers.run(hidden, start + first, 0, self.n_layer)
            else:
                positions = self.positions[start + first : start + first + len(hidden)]
                hidden = self.model.run_layers(hidden, positions, 0, self.n_layer)
        return hidden[-1:]

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Token ids -> hidden [T, D]."""
        weight = self.model.embedding.weight
        if len(tokens) == 1 and not is_packed(weight):
            return weight[tokens[0] : tokens[0] + 1]  # a view: the lookup would cost as much as a layer's arithmetic
        return self.model.embed(torch.tensor(tokens, device=self.positions.device))

    def run_layers(
        self, hidden: Tensor, position: int, start: int, stop: int,
        skip_attention: Collection[int] = (), skip_mlp: Collection[int] = (),
    ) -> Tensor:  # fmt: skip
        """Layers start..stop-1 on hidden [T, D], T <= max_rows, whose first row is at `position`."""
        if self._layers:
            return self._layers.run(hidden, position, start, stop, skip_attention, skip_mlp)
        rows, hidden = hidden.shape[0], self._pad(hidden)
        end = position + rows
        positions, cos, sin = (t[position:end] for t in (self.positions, self.model.cos, self.model.sin))
        if hidden.shape[0] > rows:
            scratch = self.positions[self.cache_length : self.cache_length + hidden.shape[0] - rows]
            positions = torch.cat((positions, scratch))
            cos, sin = self.model.cos[positions], self.model.sin[positions]
        run = self._compiled_block or _run_block
        with self._no_recompiling():
            for index in range(start, stop):
                run_attention, run_mlp = index not in skip_attention, index not in skip_mlp
                hidden = run(self.model.layers[index], hidden, cos, sin, positions, run_attention, run_mlp)
        return hidden[:rows]

    def _no_recompiling(self):
        # Only while our blocks run: the stance is global, and other code of the process may want to compile.
        if not self._warm:
            return nullcontext()
        return torch.compiler.set_stance("fail_on_recompile", skip_guard_eval_unsafe=True)

    def play(
        self, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int, limit: int
    ) -> tuple[list[int], list[int]] | None:  # fmt: skip
        """Play a whole round in one call -> drafted tokens, and the model's own after each row. None: not possible.

        Between the calls of a round Python takes as long as a small model's layers do.
        """
        if not self._layers or not plan.is_static or sampling.temperature > 0:
            return None
        drafts = min(plan.num_draft_tokens, limit)
        exit_layer = plan.exits[0] if plan.exits else 0
        tokens = self._layers.static_round(self._ends, token, position, exit_layer, drafts)
        return tokens[:drafts], tokens[drafts:]

    def exit(self, hidden: Tensor) -> Exit:
        """What the final norm and LM head say about hidden [T, D], T <= max_rows."""
        norm, head = self._norm, self._head
        return Exit(self._pad(hidden), norm, head, self.model.args.vocab_size, self.model.args.norm_eps, len(hidden))

    def _pad(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if self.rows_independent or rows == self.width:
            return hidden
        return torch.cat((hidden, hidden[-1:].expand(self.width - rows, -1)))
