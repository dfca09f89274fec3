"""Rounds as programs on device tensors: a GPU replays them as CUDA graphs, so that it never waits for Python.

Every call is padded to one number of rows. So rows cost nothing: verification runs all of a round's tokens through all
layers. It reads no more weights than taking the last token to where the others wait, and is the same for every plan.
A round is split wherever Python must read a result:
  * a plan in which nothing is decided (one exit or none, with any skips) and which repeats is one graph. Token,
    position and number of accepted drafts stay on the device, so the next round is started before this one is read.
  * otherwise each draft is a graph, and verification is another one, which plans of any K share. Plans may change every
    round.
  * with a rule to stop, the next draft is started before the statistics of this one are read.
  * with several candidate exits, each climb to the next candidate is a graph, and the host judges the statistics
    copied from there.
  * proposed tokens are verified like drafts; rows behind the last one are masked.
Some rounds are played call by call, and runs of layers are their graphs: where a policy decides in Python, a sampler
needs all logits, a rule compares candidates (saturation, consistent_tokens), or nothing is verified (--no_verify).
A round started ahead of the end of a text costs its time and nothing else. Without a GPU the same programs run as they
stand.
"""

from collections.abc import Callable, Collection
from functools import lru_cache, partial

import torch
from torch import Tensor

from decoding.sampling import SamplingConfig, accept
from drafting.plan import STATISTICS, DraftPlan
from kernels.exit_head import Draw, Exit, ExitStats

PROGRAMS = 128  # programs that are remembered, most of them as graphs; a policy may make new skips every round


class Arrival:
    """Copies a device tensor to the host without making the host wait before it reads."""

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


class Program:
    """Remembers of a program with its arguments whether it has run, and its graph once it is captured."""

    has_run, graph = False, None


class Graphs:
    """Holds the programs of one Runner, and the tensors on the device that they read and write: a graph knows those."""

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
        self.stats = torch.zeros(len(STATISTICS), device=norm.device)  # of the last draft
        self.hidden = norm.new_zeros(self.rows, len(norm))  # after the last layer
        self.waiting: dict[int, Tensor] = {}  # depth -> hidden [rows, D] of the rows that have been there
        self.inputs, self.input_positions = torch.zeros_like(self.hidden), torch.zeros_like(self.offsets)
        self.found = [Arrival(self.ids) for _ in range(2)]  # one is written while one is read
        self.seen = [Arrival(self.stats) for _ in range(2)]
        self.programs = lru_cache(PROGRAMS)(lambda *key: Program())  # those not used for longest go, with their graphs
        self.pool = None
        self.ahead: tuple | None = None  # of a round started unasked: what it starts from, and its arrival

    # ---- programs: nothing in them waits for the device ----

    def draft(self, plan: DraftPlan, sampled: bool, row: int, candidate: int = 0, wants_stats: bool = False) -> None:
        """Take row `row` from the candidate below to the plan's candidate number `candidate`; write its token behind
        it."""
        runner, depths = self.runner, plan.candidates(self.runner.n_layer)
        start, stop = depths[candidate - 1] if candidate else 0, depths[candidate]
        first = 0 if candidate else row  # the rows before join: they may lack keys and values here, or get the same
        if candidate:
            hidden = self.waiting_at(start)[first : row + 1]
        else:
            hidden = runner.model.embed(self.tokens[row : row + 1])
        positions = self.position + self.offsets[first : row + 1]
        hidden = runner.run_blocks(hidden, positions, start, stop, plan.skip_attention, plan.skip_mlp, draft=True)
        if candidate + 1 < len(depths):
            self.waiting_at(stop)[first : row + 1].copy_(hidden)
        state = runner.adapted(hidden[-1:], plan.adapters, stop)
        exit = runner.exit(state, self.draw(positions[-1:], sampled), draft=True)
        exit.wants_stats = wants_stats
        self.tokens[row + 1 : row + 2].copy_(chosen(exit, sampled))
        if wants_stats:
            stats = exit.stats()
            self.stats.copy_(torch.cat([measure.of(stats) for measure in STATISTICS]))

    def verify(self, sampled: bool, rows: int, masked: bool) -> None:
        """Choose the full model's token after each of the first `rows` tokens. masked: those behind last_row are
        padding."""
        positions = self.position + self.offsets[:rows]
        if masked:
            positions = torch.where(self.offsets[:rows] <= self.last_row, positions, -1)
        hidden = self.runner.run_blocks(self.runner.model.embed(self.tokens[:rows]), positions, 0, self.runner.n_layer)
        self.hidden[:rows].copy_(hidden)
        self.chosen[:rows].copy_(chosen(self.runner.exit(hidden, self.draw(positions, sampled)), sampled))

    def whole_round(self, plan: DraftPlan, sampled: bool) -> None:
        """Draft, verify and accept; write token and position where the next round finds them."""
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
        """Run layers start..stop-1 on `inputs` at `input_positions`, in place."""
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
        known = self.programs(program.__name__, *arguments)
        if known.has_run and known.graph is None:
            known.graph = self.capture(partial(program, *arguments))
        if known.graph is not None:
            known.graph.replay()
        else:
            program(*arguments)
            known.has_run = True  # only now: a run that failed may have left something to compile

    def capture(self, program: Callable) -> torch.cuda.CUDAGraph:
        """Capture a program. All graphs share one memory pool: what outlives a program is in this object's tensors."""
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
        """Say where the next round starts and how it samples."""
        self.tokens[:1].fill_(token)
        self.position.fill_(position)
        self.seed.fill_(sampling.seed)
        self.temperature.fill_(sampling.temperature)

    def forget(self) -> None:
        """Drop a round started ahead: it is of another text, or was started from another place."""
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
        """Do what Runner.run_blocks does, by a graph, for at most `rows` rows."""
        rows = len(hidden)
        self.inputs[:rows].copy_(hidden)
        self.inputs[rows:].zero_()  # padding that went through the layers call after call would grow, in fp16 to NaN
        self.input_positions.fill_(-1)
        self.input_positions[:rows].copy_(positions)
        self.run(self.layers, start, stop, frozenset(skip_attention), frozenset(skip_mlp), draft)
        return self.inputs[:rows].clone()

    # ---- rounds ----

    def play_whole(
        self, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int, may_go_on: bool
    ) -> tuple[list[int], list[int]]:
        """Play a round of a fixed plan as one graph -> (drafted [K], the full model's choices [K + 1]).

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
        following = None
        if self.on_gpu and may_go_on:
            self.run(*program)
            following = self.send(self.found)
        drafted, chosen = self.read(arrival, plan.num_draft_tokens)
        if following:
            accepted, target = accept(drafted, chosen)
            self.ahead = (plan, target, position + accepted + 1, *of_text), following
        return drafted, chosen

    def read(self, arrival: Arrival, count: int) -> tuple[list[int], list[int]]:
        """Wait for a verified round of `count` drafts -> (drafted [count], the full model's choices [count + 1])."""
        ids = arrival.read()
        return ids[1 : count + 1], ids[self.rows : self.rows + count + 1]


class GraphSteps:
    """Plays the steps of a round (rounds.Steps) as programs of Graphs. Tokens stay on the device until it is verified.

    layer_visits, head_visits: all that is read, also for drafts started ahead that nobody wants in the end.
    """

    resume_layer = 0  # verification runs all layers

    def __init__(self, graphs: Graphs, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int):
        self.graphs, self.plan, self.sampled = graphs, plan, sampling.temperature > 0
        self.depths = plan.candidates(graphs.runner.n_layer)
        self.judged = bool(plan.stop_unless or len(self.depths) > 1)
        # The key of programs: thresholds and K are not part of them.
        self.shape = DraftPlan(self.depths, 1, plan.skip_attention, plan.skip_mlp, adapters=plan.adapters)
        self.row, self.candidate = -1, -1  # of the last draft
        self.started: GraphExit | None = None  # of the next row, at its first candidate
        self.layer_visits = self.head_visits = 0.0
        graphs.forget()
        graphs.set(token, position, sampling)

    def enter(self, token: int | None) -> None:
        """Begin with the next row, whose token is on the device already."""
        self.row, self.candidate = self.row + 1, -1

    def climb(self, depth: int) -> "GraphExit":
        """Start the climb to the next candidate."""
        self.candidate += 1
        exit, self.started = self.started or self.start(self.row, self.candidate), None
        return exit

    def start(self, row: int, candidate: int) -> "GraphExit":
        """Start the climb of a row to a candidate -> what will be known there."""
        graphs, plan, depths = self.graphs, self.plan, self.depths
        graphs.run(graphs.draft, self.shape, self.sampled, row, candidate, self.judged)
        start, stop = depths[candidate - 1] if candidate else 0, depths[candidate]
        self.layer_visits += graphs.runner.visits.run(start, stop, plan.skip_attention, plan.skip_mlp, draft=True)
        self.head_visits += graphs.runner.visits.draft_head
        return GraphExit(self, graphs.send(graphs.seen) if self.judged else None, row, is_last=stop == depths[-1])

    def start_next(self, row: int) -> None:
        """Start the row after `row` while its statistics are on their way, so that the GPU has something to do."""
        if self.graphs.on_gpu and self.started is None:
            self.started = self.start(row + 1, 0)

    def choose(self, exit: "GraphExit") -> None:
        """Return nothing: the program has written the token behind its row."""

    def verify(self, drafted: list[int | None]) -> tuple[list[int], int, int, Tensor]:
        """Verify the drafts, see rounds.Steps."""
        graphs, count = self.graphs, len(drafted)
        if self.plan.proposed:
            graphs.tokens[1 : count + 1].copy_(torch.tensor(drafted, dtype=torch.int64))
        graphs.last_row.fill_(count)
        rows = graphs.rows if graphs.on_gpu else count + 1  # one graph for all numbers of drafts
        graphs.run(graphs.verify, self.sampled, rows, graphs.on_gpu)
        self.layer_visits += graphs.runner.n_layer
        self.head_visits += 1
        tokens, chosen = graphs.read(graphs.send(graphs.found), count)
        return tokens, *accept(tokens, chosen), graphs.hidden


class GraphExit:
    """Waits for the statistics of a drafted token, which itself stays on the device."""

    def __init__(self, steps: GraphSteps, arrival: Arrival | None, row: int, is_last: bool):
        """is_last: at the last candidate, where the statistics are read only to decide whether to go on drafting."""
        self.steps, self.arrival, self.row, self.is_last = steps, arrival, row, is_last
        self.known: ExitStats | None = None

    def stats(self) -> ExitStats:
        """Wait for the statistics of the row, numbers instead of tensors."""
        if self.known is None:
            if self.is_last:
                self.steps.start_next(self.row)
            self.known = ExitStats(None, *self.arrival.read(), None)
        return self.known


class WholeSteps:
    """Plays a round in which nothing is decided as one graph, which `verify` runs. The other steps only count."""

    resume_layer = 0

    def __init__(
        self, graphs: Graphs, plan: DraftPlan, sampling: SamplingConfig, token: int, position: int, may_go_on: bool
    ):
        self.graphs, self.plan = graphs, plan
        self.round = plan, sampling, token, position, may_go_on
        self.layer_visits = self.head_visits = 0.0

    def enter(self, token: int | None) -> None:
        """Do nothing."""

    def climb(self, depth: int) -> None:
        """Count what the graph reads for a draft."""
        runner, plan = self.graphs.runner, self.plan
        self.layer_visits += runner.visits.run(0, depth, plan.skip_attention, plan.skip_mlp, draft=True)
        self.head_visits += runner.visits.draft_head

    def choose(self, exit: None) -> None:
        """Return nothing: the token stays on the device."""

    def verify(self, drafted: list[int | None]) -> tuple[list[int], int, int, Tensor]:
        """Run the round, see rounds.Steps."""
        tokens, chosen = self.graphs.play_whole(*self.round)
        self.layer_visits += self.graphs.runner.n_layer
        self.head_visits += 1
        tokens = tokens[: len(drafted)]  # the graph drafts K, however many are wanted
        return tokens, *accept(tokens, chosen), self.graphs.hidden


def chosen(exit: Exit, sampled: bool) -> Tensor:
    """Return the token after each row, int64 [T], on the device."""
    return exit.samples() if sampled else exit.token_ids()
