"""Rounds as programs on device tensors: what a GPU replays as CUDA graphs, so that Python is not what it waits for.

Calls here are padded to one number of rows, so rows cost nothing: verification runs all of a round's tokens through all
layers, which reads no more weights than taking the last one to where the others wait, and is the same for every plan.
What the host has to know to go on cuts a round into parts:
  * a plan that decides nothing (one exit or none, any sublayers left out) and repeats is one graph. Token, position and
    number of accepted drafts stay on the device, so the next round is started before the host has read this one.
  * otherwise each draft is a graph, and verification another, which plans of any K share: plans may change every round.
  * with a rule to stop, the next draft is started before the statistics of this one are read.
  * with several candidate exits, each climb to the next candidate is a graph, and what was seen there chooses.
  * proposed tokens are verified like drafts of parts; rows behind the last one are masked.
Policies that decide in Python, and samplers that need all logits, go call by call; runs of layers are graphs for them.
A round started ahead, which nobody wants after the end of a text, costs its time and nothing else. Without a GPU the
same programs run as they stand.
"""

from collections.abc import Callable, Collection, Hashable
from functools import partial

import torch
from torch import Tensor

from decoding.packed import PlayedRound
from decoding.sampling import SamplingConfig, accept
from drafting.plan import DraftPlan, Rule
from kernels.exit_head import Draw, Exit, ExitStats


class Arrival:
    """A copy of a device tensor on the host, and what says that it has arrived."""

    def __init__(self, source: Tensor):
        self.source, self.copy = source, torch.zeros_like(source, device="cpu", pin_memory=source.is_cuda)
        self.event = torch.cuda.Event() if source.is_cuda else None

    def send(self) -> "Arrival":
        """Start copying what the device will have computed by then."""
        self.copy.copy_(self.source, non_blocking=True)
        if self.event:
            self.event.record()
        return self

    def read(self) -> list:
        """Wait for the copy."""
        if self.event:
            self.event.synchronize()
        return self.copy.tolist()


class DeviceRounds:
    """The rounds of one runner.Runner. Its tensors are what programs get and leave, so a graph may hold them."""

    def __init__(self, runner):
        self.runner, self.rows = runner, runner.width
        norm = runner.model.norm.weight
        self.on_gpu = norm.is_cuda
        integers = partial(torch.zeros, dtype=torch.int64, device=norm.device)
        self.ids = integers(2 * self.rows)
        self.tokens = self.ids[: self.rows]  # the last token of the text, the drafts after it
        self.chosen = self.ids[self.rows :]  # the full model's token after each of them
        self.position, self.last_row, self.seed = integers(1), integers(1), integers(1)
        self.temperature = torch.ones(1, device=norm.device)
        self.offsets = torch.arange(self.rows, device=norm.device)
        self.stats = torch.zeros(3, device=norm.device)  # top-1, margin and entropy of the last draft
        self.hidden = norm.new_zeros(self.rows, len(norm))  # after the last layer
        self.waiting: dict[int, Tensor] = {}  # depth -> hidden [rows, D] of the rows that have been there
        self.inputs, self.input_positions = torch.zeros_like(self.hidden), torch.zeros_like(self.offsets)
        self.found = [Arrival(self.ids) for _ in range(2)]  # one is written while one is read
        self.seen = [Arrival(self.stats) for _ in range(2)]
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.met: set[Hashable] = set()
        self.pool = None
        self.ahead: tuple | None = None  # of a round started unasked: what it starts from, and its arrival

    # ---- programs: nothing in them waits for the device ----

    def draft(self, plan: DraftPlan, sampled: bool, row: int, exit: int = 0, wants_stats: bool = False) -> None:
        """Take row `row` from the candidate below to the plan's candidate `exit`; write its token behind it."""
        runner, depths = self.runner, plan.exits or (self.runner.n_layer,)
        start, stop = depths[exit - 1] if exit else 0, depths[exit]
        first = 0 if exit else row  # the rows before go along: they may lack keys and values here, or get the same
        hidden = self.waiting_at(start)[first : row + 1] if exit else runner.model.embed(self.tokens[row : row + 1])
        positions = self.position + self.offsets[first : row + 1]
        hidden = runner.run_blocks(hidden, positions, start, stop, plan.skip_attention, plan.skip_mlp, draft=True)
        if exit + 1 < len(depths):
            self.waiting_at(stop)[first : row + 1].copy_(hidden)
        leaving = runner.adapted(hidden[-1:], plan.adapters, stop)
        seen = runner.exit(leaving, self.draw(positions[-1:], sampled), draft=True)
        seen.wants_stats = wants_stats
        self.tokens[row + 1 : row + 2].copy_(chosen(seen, sampled))
        if wants_stats:
            stats = seen.stats()
            self.stats.copy_(torch.cat((stats.top1, stats.margin, stats.entropy)))

    def verify(self, sampled: bool, rows: int, masked: bool) -> None:
        """The full model's token after each of the first `rows` tokens. masked: rows behind last_row are padding."""
        positions = self.position + self.offsets[:rows]
        if masked:
            positions = torch.where(self.offsets[:rows] <= self.last_row, positions, -1)
        hidden = self.runner.run_blocks(self.runner.model.embed(self.tokens[:rows]), positions, 0, self.runner.n_layer)
        self.hidden[:rows].copy_(hidden)
        self.chosen[:rows].copy_(chosen(self.runner.exit(hidden, self.draw(positions, sampled)), sampled))

    def whole_round(self, plan: DraftPlan, sampled: bool) -> None:
        """Draft, verify and accept; leave token and position where the next round finds them."""
        drafts = plan.num_draft_tokens
        for row in range(drafts):
            self.draft(plan, sampled, row)
        self.verify(sampled, drafts + 1, masked=False)
        right = self.tokens[1 : drafts + 1] == self.chosen[:drafts]
        accepted = right.long().cumprod(0).sum(0, keepdim=True)
        self.tokens[:1].copy_(self.chosen[accepted])
        self.position += accepted + 1

    def layers(
        self, start: int, stop: int, skip_attention: frozenset[int], skip_mlp: frozenset[int], draft: bool
    ) -> None:
        """Layers start..stop-1 on `inputs` at `input_positions`, in place."""
        hidden = self.runner.run_blocks(self.inputs, self.input_positions, start, stop, skip_attention, skip_mlp, draft)
        self.inputs.copy_(hidden)

    def waiting_at(self, depth: int) -> Tensor:
        if depth not in self.waiting:
            self.waiting[depth] = torch.zeros_like(self.hidden)
        return self.waiting[depth]

    def draw(self, positions: Tensor, sampled: bool) -> Draw | None:
        return Draw(positions + 1, self.seed, self.temperature) if sampled else None

    # ---- running them ----

    def run(self, program: Callable, *arguments) -> None:
        """Run a program of this object, on a GPU from the second time on as a CUDA graph.

        The first time compiles and allocates what a capture must not, and what comes only once is never captured.
        """
        if not self.on_gpu:
            return program(*arguments)
        key = program.__name__, *arguments
        if key in self.met and key not in self.graphs:
            self.graphs[key] = self.capture(partial(program, *arguments))
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            program(*arguments)
            self.met.add(key)  # only now: a run that failed may have left something to compile

    def capture(self, program: Callable) -> torch.cuda.CUDAGraph:
        """The graph of a program. All share one memory pool: what outlives a program is in this object's tensors."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            program()
        return graph

    def send(self, arrivals: list[Arrival]) -> Arrival:
        """Start copying to the place that was not used last."""
        arrivals.reverse()
        return arrivals[0].send()

    def set(self, token: int, position: int, sampling: SamplingConfig) -> None:
        self.tokens[:1].fill_(token)
        self.position.fill_(position)
        self.seed.fill_(sampling.seed)
        self.temperature.fill_(sampling.temperature)

    def forget(self) -> None:
        """No round started ahead will be asked for: it is of another text, or was started from another place."""
        self.ahead = None

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        start: int,
        stop: int,
        skip_attention: Collection[int],
        skip_mlp: Collection[int],
        draft: bool,
    ) -> Tensor:
        """Runner.run_blocks by a graph, for at most `rows` rows."""
        rows = len(hidden)
        self.inputs[:rows].copy_(hidden)
        self.inputs[rows:].zero_()  # padding that went through the layers call after call would grow, in fp16 to NaN
        self.input_positions.fill_(-1)
        self.input_positions[:rows].copy_(positions)
        self.run(self.layers, start, stop, frozenset(skip_attention), frozenset(skip_mlp), draft)
        return self.inputs[:rows].clone()

    # ---- rounds ----

    def play(
        self, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int, limit: int, want_hidden: bool
    ) -> PlayedRound:
        """Play a round, as Runner.play. The plan asks no policy and drafts fewer than `rows` tokens."""
        if plan.is_fixed and plan.repeats:
            may_go_on = limit > plan.num_draft_tokens and not want_hidden
            drafted, found = self.play_whole(plan, sampling, token, position, may_go_on)
            drafted = drafted[:limit]
            exit_layers = [plan.exits[0] if plan.exits else self.runner.n_layer] * len(drafted)
            runs = [(0, depth) for depth in exit_layers]
        else:
            self.forget()
            self.set(token, position, sampling)
            drafted, found, exit_layers, runs = self.play_parts(plan, sampling.temperature > 0, limit)
        left_out = [
            sum(start <= i < stop for start, stop in runs for i in skips)
            for skips in (plan.skip_attention, plan.skip_mlp)
        ]
        rows, visits = len(drafted) + 1, sum(stop - start for start, stop in runs)
        return PlayedRound(
            drafted,
            exit_layers,
            found[:rows],
            0,
            self.runner.n_layer,
            visits,
            tuple(left_out),
            len(runs),
            self.hidden[:rows].clone() if want_hidden else None,
        )

    def play_whole(
        self, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int, may_go_on: bool
    ) -> tuple[list[int], list[int]]:
        """A round of a fixed plan -> (drafted [K], the model's choices [K + 1]).

        may_go_on: more tokens are wanted than this round can give, so a GPU starts the next one, too.
        """
        program = self.whole_round, plan, sampling.temperature > 0
        of_text = sampling.seed, sampling.temperature
        started, self.ahead = self.ahead, None
        if started and started[0] == (plan, token, position, *of_text):
            arrival = started[1]
        else:
            self.set(token, position, sampling)
            self.run(*program)
            arrival = self.send(self.found)
        drafts = plan.num_draft_tokens
        following = None
        if self.on_gpu and may_go_on:
            self.run(*program)
            following = self.send(self.found)
        ids = arrival.read()
        drafted, found = ids[1 : drafts + 1], ids[self.rows : self.rows + drafts + 1]
        if following:
            accepted, target = accept(drafted, found)
            self.ahead = (plan, target, position + accepted + 1, *of_text), following
        return drafted, found

    def play_parts(
        self, plan: DraftPlan, sampled: bool, limit: int
    ) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
        """Draft part by part or take what is proposed, and verify -> drafted, the model's choices, and of the drafts
        the exit layers and the runs of layers (start, stop)."""
        if plan.proposed:
            proposed, exit_layers, runs = plan.proposed[:limit], [], []
            self.tokens[1 : len(proposed) + 1].copy_(torch.tensor(proposed, dtype=torch.int64))
            count = len(proposed)
        else:
            exit_layers, runs = self.play_drafts(plan, sampled, min(plan.num_draft_tokens, limit))
            count = len(exit_layers)
        self.last_row.fill_(count)
        self.run(self.verify, sampled, self.rows if self.on_gpu else count + 1, self.on_gpu)
        ids = self.send(self.found).read()
        return ids[1 : count + 1], ids[self.rows :], exit_layers, runs

    def play_drafts(self, plan: DraftPlan, sampled: bool, most: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Draft until a rule ends it, or `most` tokens -> their exit layers, and all runs of layers (start, stop)."""
        depths, exit_layers, runs, started = plan.exits or (self.runner.n_layer,), [], [], None
        judged = bool(plan.stop_unless or len(depths) > 1)
        shape = DraftPlan(depths, 1, plan.skip_attention, plan.skip_mlp, adapters=plan.adapters)  # no thresholds: a key

        def run(row: int, exit: int) -> Arrival | None:
            self.run(self.draft, shape, sampled, row, exit, judged)
            runs.append((depths[exit - 1] if exit else 0, depths[exit]))
            return self.send(self.seen) if judged else None

        for row in range(most):
            arrival, started, exit = started or run(row, 0), None, 0
            while exit + 1 < len(depths) and not self.holds(plan.leave_if, arrival):
                exit += 1
                arrival = run(row, exit)
            exit_layers.append(depths[exit])
            if plan.stop_unless and row + 1 < most:
                if self.on_gpu and exit + 1 == len(depths):  # not read yet: the GPU goes on meanwhile
                    started = run(row + 1, 0)
                if not self.holds(plan.stop_unless, arrival):
                    break
        return exit_layers, runs

    def holds(self, rule: Rule, arrival: Arrival) -> bool:
        return self.runner.agreed(rule.holds(ExitStats(None, *arrival.read(), None)))


def chosen(exit: Exit, sampled: bool) -> Tensor:
    """The token after each row, int64 [T]."""
    return exit.samples() if sampled else exit.token_ids()
