"""One round of decoding: draft, verify, accept.

  draft    a token enters the model and climbs from candidate exit to candidate exit until it exits as a drafted token;
           and so on with that one, up to K times
  verify   the last token climbs to the top, and the rows of the others join it on its way
  accept   the drafts up to the first that the full model would not choose, and one token of the full model

A drafted token is a row that waits at the depth where it exited. When a row climbs past a depth where others wait, they
join the same call: the weights are read once for all of them, and keys and values are never missing. Verification
continues each row from the depth where it waits: up to there it is bit for bit the full model's.

What a round runs is behind `Steps`: calls of a Runner (CallSteps), or programs of graphs.py, on a GPU as CUDA graphs.
The loop has two twins, which give the same rounds:
  * in C++, for a round in which nothing is asked of Python: it is one call (packed.py)
  * `Graphs.whole_round`, for a plan in which nothing is decided: it is one program
"""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from decoding.generation import until_end
from decoding.graphs import GraphSteps, WholeSteps
from decoding.runner import Runner
from decoding.sampling import Sampler, accept
from drafting.exits import ExitJudge
from drafting.plan import DraftPlan, Round
from drafting.policy import DraftPolicy
from kernels.exit_head import Exit, ExitStats


class Judged(Protocol):
    """Name what the loop reads of an exit: an `Exit`, or a `GraphExit` whose numbers come from the device.

    Rules that compare candidates, and policies that decide in Python, are given an `Exit`.
    """

    def stats(self) -> ExitStats:
        """Return the statistics of the exit's one row."""


class Steps(Protocol):
    """Name what the loop does to the rows of one round, in this order: enter, climb …, choose, enter, climb …, verify.

    A token that stays on the device until the round is over is None to the loop.
    Attributes: layer_visits, head_visits: what was read so far, see Round; resume_layer, after verify.
    """

    layer_visits: float
    head_visits: float
    resume_layer: int

    def enter(self, token: int | None) -> None:
        """Let the row of `token`, the next one, wait at depth 0."""

    def climb(self, depth: int) -> Judged | None:
        """Run the last row up to `depth` -> its exit there; None where nothing is decided."""

    def choose(self, exit: Judged | None) -> int | None:
        """Choose the drafted token at the exit of the last row."""

    def verify(self, drafted: list[int | None]) -> tuple[list[int], int, int, Tensor]:
        """Run all rows through all layers -> the drafted tokens, how many of them are accepted, the full model's token
        after those, and the states after the last layer [> accepted, D], which the next round may overwrite."""


class RoundPlayer:
    """Plays the rounds of one text.

    verified=False: nothing is verified, the drafts are the text (lossy early exit).
    Attributes: hidden, for a policy that reads it, see RoundContext.
    """

    def __init__(
        self, runner: Runner, policy: DraftPolicy, sampler: Sampler, eos_ids: Sequence[int] = (), verified: bool = True
    ):
        self.runner, self.policy, self.sampler, self.verified = runner, policy, sampler, verified
        self.eos_ids = tuple(eos_ids)
        self.hidden: Tensor | None = None
        self.rows: WaitingRows | None = None  # of a text that is not verified: they wait from round to round
        self.skip_attention: frozenset[int] | None = None  # of such a text

    def play(self, plan: DraftPlan, token: int, position: int, remaining: int, since: float) -> Round:
        """Play a round after `token`, which stands at `position` -> its record.

        remaining: how many tokens are still wanted. since: time.perf_counter() when the round began.
        """
        if not self.verified:
            return self._play_unverified(plan, token, position, remaining, since)
        limit = remaining - 1  # the last token of a round is the full model's own
        in_one_call = self.runner.packed and not self._needs_python(plan)
        play = self._play_in_one_call if in_one_call else self._play_by_steps
        round = play(plan, token, position, limit, since)
        if plan.plain and round.drafted and self.runner.own_drafts:
            round = dataclasses.replace(round, drafted=(), accepted=0, exit_layers=())
        return round

    # ---- the loop ----

    def _play_by_steps(self, plan: DraftPlan, token: int, position: int, limit: int, since: float) -> Round:
        """Play a round of at most `limit` drafts step by step."""
        steps = self._steps(plan, token, position, limit)
        drafted, exit_layers = self.draft(steps, plan, token, limit)
        drafted, accepted, target, states = steps.verify(drafted)
        if self.policy.reads_hidden:
            self.remember(states[accepted : accepted + 1])
        tokens = *drafted[:accepted], target
        drafted, _ = until_end(drafted, self.eos_ids)  # tokens that stayed on the device may go on behind an end
        return Round(
            tokens=tokens,
            drafted=tuple(drafted),
            accepted=min(accepted, len(drafted)),
            exit_layers=tuple(exit_layers[: len(drafted)]),
            resume_layer=steps.resume_layer,
            seconds=time.perf_counter() - since,
            layer_visits=steps.layer_visits,
            head_visits=steps.head_visits,
        )

    def draft(self, steps: Steps, plan: DraftPlan, token: int, limit: int) -> tuple[list[int | None], list[int]]:
        """Draft at most `limit` tokens after `token` -> the tokens, and where each of them exited."""
        drafted, exit_layers = self._proposed(plan, limit), []
        candidates, most = plan.candidates(self.runner.n_layer), min(plan.num_draft_tokens, limit)
        while candidates and len(drafted) < most:
            steps.enter(token)
            exit, depth = self._climb_to_exit(steps, plan, candidates)
            token = steps.choose(exit)
            drafted.append(token)
            exit_layers.append(depth)
            if self._stops(plan, exit, more=len(drafted) < most) or token in self.eos_ids:
                break  # nothing can be emitted after an end of text
        return drafted, exit_layers

    def _climb_to_exit(self, steps: Steps, plan: DraftPlan, candidates: Sequence[int]) -> tuple[Judged | None, int]:
        """Let the last row climb from candidate to candidate -> where it exits, and the depth there."""
        judge = ExitJudge(plan.exit_if) if plan.exit_if else None
        for depth in candidates:
            exit = steps.climb(depth)
            if depth == candidates[-1]:
                break
            exits = judge.exits_at(exit) if judge else self.policy.should_exit(depth, exit)
            if self.runner.agreed(bool(exits)):
                break
        return exit, depth

    def _stops(self, plan: DraftPlan, exit: Judged | None, more: bool) -> bool:
        """Say whether the draft ends after a token. more: it might go on otherwise; only then is the rule judged."""
        stops = plan.ask_to_stop and self.policy.should_stop(exit)  # the policy hears of the last token, too
        if more and plan.stop_unless and not plan.stop_unless.holds(exit.stats()):
            stops = True
        return self.runner.agreed(bool(stops)) if plan.ask_to_stop or plan.stop_unless else False

    def _proposed(self, plan: DraftPlan, limit: int) -> list[int]:
        """Return the tokens that the plan proposes, up to an end of text."""
        return list(until_end(plan.proposed[:limit], self.eos_ids)[0]) if plan.proposed else []

    def remember(self, hidden: Tensor) -> None:
        """Keep a state [1, D] after the last layer for the policy; the same on all ranks."""
        self.hidden = self.runner.agreed(hidden.clone())

    # ---- what a round is played with ----

    def _needs_python(self, plan: DraftPlan) -> bool:
        """Say whether Python decides anything within the round, or a choice needs more than the kernels have."""
        config, runner = self.sampler.config, self.runner
        by_kernel = config.temperature == 0 or (config.is_plain and runner.can_sample)
        return plan.asks_policy or not by_kernel or runner.call_by_call

    def _steps(self, plan: DraftPlan, token: int, position: int, limit: int) -> Steps:
        """Return the steps that play a round of at most `limit` drafts."""
        runner, sampling = self.runner, self.sampler.config
        graphs = runner.current_graphs()
        compares = plan.exit_if is not None and plan.exit_if.measure.compares
        if self._needs_python(plan) or compares or plan.most_drafts >= runner.width:
            return CallSteps(runner, self.sampler, plan, WaitingRows(runner, position), token)
        if plan.is_fixed and plan.repeats:
            may_go_on = limit > plan.num_draft_tokens and not self.policy.reads_hidden
            return WholeSteps(graphs, plan, sampling, token, position, may_go_on)
        return GraphSteps(graphs, plan, sampling, token, position)

    def _play_in_one_call(self, plan: DraftPlan, token: int, position: int, limit: int, since: float) -> Round:
        """Let C++ play the round."""
        runner, sampling, reads_hidden = self.runner, self.sampler.config, self.policy.reads_hidden
        played = runner.packed.play_round(
            plan,
            token,
            position,
            min(plan.num_draft_tokens, limit),
            self._proposed(plan, limit),
            sampling.temperature,
            sampling.seed,
            self.eos_ids,
            reads_hidden,
        )
        visits = runner.visits
        accepted, target = accept(played.drafted, played.chosen)
        if reads_hidden:
            self.remember(played.states[accepted : accepted + 1])
        return Round(
            tokens=(*played.drafted[:accepted], target),
            drafted=tuple(played.drafted),
            accepted=accepted,
            exit_layers=tuple(played.exit_layers),
            resume_layer=played.resume_layer,
            seconds=time.perf_counter() - since,
            layer_visits=visits.layers(played.layers) + visits.layers(played.draft_layers, played.skipped, draft=True),
            head_visits=played.heads * visits.draft_head + 1,
        )

    def _play_unverified(self, plan: DraftPlan, token: int, position: int, remaining: int, since: float) -> Round:
        """Draft only. A token that exits at no candidate runs through all layers.

        Keys and values that an early exit saved are made when a later token goes deeper, as in any round.
        """
        runner = self.runner
        runner.current_graphs()
        if self.rows is None:
            self.rows, self.skip_attention = WaitingRows(runner, position), plan.skip_attention
        plan = dataclasses.replace(
            plan,
            exits=tuple(sorted({*plan.exits, runner.n_layer})) if plan.num_draft_tokens else (),
            num_draft_tokens=max(1, plan.num_draft_tokens),
            skip_attention=self.skip_attention,  # no keys and values there: a text keeps its set
        )
        steps = CallSteps(runner, self.sampler, plan, self.rows, token, exact_depth=runner.n_layer)
        drafted, exit_layers = self.draft(steps, plan, token, remaining)
        top = self.rows.at.pop(runner.n_layer, None)
        if top and self.policy.reads_hidden:
            self.remember(top[-1][-1:])
        return Round(
            tokens=tuple(drafted),
            exit_layers=tuple(exit_layers),
            seconds=time.perf_counter() - since,
            layer_visits=steps.layer_visits,
            head_visits=steps.head_visits,
        )


class WaitingRows:
    """Holds rows at consecutive positions, each waiting at the depth it has reached: later ones never deeper.

    Attributes: at, depth -> hidden states [T, D] in order of position; end, the position after the last row.
    """

    def __init__(self, runner: Runner, position: int, draft: bool = False):
        """position: of the first row. draft: the rows are draft rows, so low-bit layers will do."""
        self.runner, self.end, self.draft = runner, position, draft
        self.at: dict[int, list[Tensor]] = {}

    def add(self, depth: int, hidden: Tensor) -> None:
        """Let rows [T, D] wait at `depth`, behind all others."""
        self.at.setdefault(depth, []).append(hidden)
        self.end += len(hidden)

    def climb(self, start: int, stop: int, *skips: Collection[int]) -> Tensor:
        """Run the rows that wait at `start`, the last ones, through layers start..stop-1 -> the last one's [1, D]."""
        hidden = joined(self.at.pop(start))
        hidden = self.runner.run_layers(hidden, self.end - len(hidden), start, stop, *skips, draft=self.draft)
        self.at.setdefault(stop, []).append(hidden)
        return hidden[-1:]


class CallSteps:
    """Plays the steps of a round by calls of a Runner.

    Above `exact_depth` a drafted row is not the full model's any more: it skips sublayers or runs low-bit layers. There
    the row waits, and a copy climbs on in its place, a draft row.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        plan: DraftPlan,
        rows: WaitingRows,
        token: int,
        exact_depth: int | None = None,
    ):
        """rows: some may wait from earlier rounds. token: of the next row. exact_depth: by default that of the plan."""
        self.runner, self.sampler, self.plan, self.rows, self.token = runner, sampler, plan, rows, token
        self.skips = plan.skip_attention, plan.skip_mlp
        self.first = rows.end  # the position of the round's first row
        if exact_depth is None:  # low-bit layers are the full model's nowhere
            exact_depth = 0 if runner.draft_model else plan.exact_depth(runner.n_layer)
        self.exact_depth = exact_depth
        self.draft_rows: WaitingRows | None = None
        self.exits: list[Exit] = []  # of all candidates climbed to
        self.layer_visits, self.resume_layer, self.full_heads = 0.0, 0, 0

    def enter(self, token: int) -> None:
        """Let the next row wait at depth 0."""
        self.rows.add(0, self.runner.embed([token]))
        self.depth = 0

    def climb(self, depth: int) -> Exit:
        """Run the last row up to `depth`; the rows that wait on its way join it."""
        runner, rows = self.runner, self.rows
        between = {stop for stop in (self.exact_depth, *rows.at) if self.depth < stop < depth}
        for stop in (*sorted(between), depth):
            hidden = self._run(self.depth, stop)
            self.depth = stop
        exit = runner.exit(runner.adapted(hidden, self.plan.adapters, depth), self.sampler.draw(rows.end), draft=True)
        exit.wants_stats = self.plan.stop_unless is not None  # with whatever is asked first: one pass through the head
        self.exits.append(exit)
        return exit

    def _run(self, start: int, stop: int) -> Tensor:
        """Run the last row, or above `exact_depth` its draft row, through layers start..stop-1 -> its hidden [1, D]."""
        rows, exact = self.rows, self.exact_depth
        if stop > exact:
            if self.draft_rows is None:
                self.draft_rows = WaitingRows(self.runner, self.first, draft=True)
            if start == exact:  # copy the rows that have come here since the last copy was made
                self.draft_rows.add(exact, joined(rows.at[exact])[self.draft_rows.end - self.first :])
            rows = self.draft_rows
        self.layer_visits += self.runner.visits.run(start, stop, *self.skips, draft=rows.draft)
        return rows.climb(start, stop, *self.skips)

    def choose(self, exit: Exit) -> int:
        """Let the sampler choose the drafted token."""
        return self.sampler.draft(exit, self.rows.end)

    def verify(self, drafted: list[int]) -> tuple[list[int], int, int, Tensor]:
        """Take all rows to the top, from the depth at which each of them waits."""
        runner, rows, n_layer = self.runner, self.rows, self.runner.n_layer
        self.resume_layer = min(rows.at, default=0)
        rows.add(0, runner.embed([self.token, *drafted][rows.end - self.first :]))  # the last draft never entered
        for stop in sorted({*rows.at, n_layer}):
            if (start := min(rows.at)) < stop:
                self.layer_visits += runner.visits.run(start, stop)
                rows.climb(start, stop)
        exit = runner.exit(joined(rows.at[n_layer]), self.sampler.draw(self.first + 1))
        self.full_heads = 1
        return drafted, *self.sampler.verify(drafted, exit, self.first + 1), exit.hidden

    @property
    def head_visits(self) -> float:
        """Count the LM heads that were asked: some rules look at hidden states only."""
        return sum(exit.asked for exit in self.exits) * self.runner.visits.draft_head + self.full_heads


def joined(parts: list[Tensor]) -> Tensor:
    """Return parts [T, D] as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
