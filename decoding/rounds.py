"""One round of decoding: rows climb through the layers, leave as drafts, and are taken on when they are verified.

`generate.decode` gets a plan from the policy and has `Drafter.round` play it. A drafted token is a row that waits at
the depth where it left the model. Whoever goes deeper takes the rows waiting there along in the same call: their
weights are read once for all of them, and keys and values are never missing. Verification is nothing else: the last
token climbs to the top and takes every waiting row along. So each row resumes at the depth up to which it is the full
model's, bit for bit, and no deeper.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.packed import PlayedRound
from decoding.runner import Runner
from decoding.sampling import accept
from drafting.adapters import Adapters
from drafting.plan import DraftPlan, Leaving
from drafting.policy import DraftPolicy
from kernels.exit_head import Exit


class Rows:
    """Rows at consecutive positions, each waiting at the depth it has reached: later ones never deeper than earlier.

    Attributes: end, the position after the last row; layer_visits, how often a layer's weights were read.
    """

    def __init__(self, runner: Runner, position: int, only_draft: bool = False):
        """position: of the first row. only_draft: these are copies, so low-bit layers will do."""
        self.runner, self.start, self.end, self.layer_visits = runner, position, position, 0.0
        self.only_draft = only_draft
        self.waiting: dict[int, list[Tensor]] = {}  # depth -> hidden states in order of position
        self.copies: Rows | None = None  # of these rows, on their way above where drafts are the full model's

    def enter(self, tokens: Sequence[int]) -> Tensor:
        """Let `tokens` wait at depth 0 -> the last one's hidden [1, D]."""
        hidden = self.runner.embed(tokens)
        self.waiting.setdefault(0, []).append(hidden)
        self.end += len(tokens)
        return hidden[-1:]

    def climb(self, start: int, stop: int, *skips: Collection[int]) -> Tensor:
        """Run the rows waiting at `start`, the shallowest, through layers start..stop-1 -> the last one's hidden."""
        hidden = joined(self.waiting.pop(start))
        hidden = self.runner.run_layers(hidden, self.end - len(hidden), start, stop, *skips, draft=self.only_draft)
        self.layer_visits += self.runner.layer_visits(start, stop, *skips, draft=self.only_draft)
        self.waiting.setdefault(stop, []).append(hidden)
        return hidden[-1:]

    def climb_copy(self, own: int, start: int, stop: int, *skips: Collection[int]) -> Tensor:
        """The same above `own`, from where on a draft is not the full model's: copies climb, the rows wait at `own`."""
        if self.copies is None:
            self.copies = Rows(self.runner, self.start, only_draft=True)
        if start <= own:  # rows that have come to `own` since the last copy was made
            new = joined(self.waiting[own])[self.copies.end - self.start :]
            self.copies.waiting.setdefault(own, []).append(new)
            self.copies.end += len(new)
        before = self.copies.layer_visits
        hidden = self.copies.climb(max(start, own), stop, *skips)
        self.layer_visits += self.copies.layer_visits - before
        return hidden


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Draft:
    """What a round proposes. exit_layers: where each token left the model (none for n-gram proposals).

    resume_layer: the shallowest depth from which verification has to go on. layer_visits: layers read in the whole
    round; head_visits: LM heads read while drafting (a trimmed one counts its share).
    """

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    resume_layer: int = 0
    layer_visits: float = 0.0
    head_visits: float = 0.0


class Drafter:
    """Drafts and verifies the rounds of one text.

    verified=False: the drafts are the text (lossy early exit); hidden states that skipped sublayers are then the
    model's own.
    """

    def __init__(self, runner: Runner, policy: DraftPolicy, sampler, eos_ids: Sequence[int], verified: bool = True):
        self.runner, self.policy, self.sampler, self.eos_ids = runner, policy, sampler, eos_ids
        self.verified = verified
        self.hidden: Tensor | None = None  # [1, D], the full model's that chose the last token, if the policy reads it

    def round(self, plan: DraftPlan, token: int, position: int, limit: int) -> tuple[Draft, int, int]:
        """Draft at most `limit` tokens after `token`, which stands at `position`, and verify them.

        Returns the draft, how many of its tokens are accepted, and the full model's own token after those.
        """
        wants_hidden = self.policy.reads_hidden
        played = self.runner.play(plan, self.sampler.config, token, position, limit, wants_hidden)
        if played:
            draft, states = self.played(played), played.hidden
            accepted, target = accept(draft.tokens, played.chosen)
        else:
            rows = Rows(self.runner, position)
            draft = self.draft(rows, plan, token, limit)
            exit = self.verify(rows, draft, token, position)
            draft.layer_visits, states = rows.layer_visits, exit.hidden
            accepted, target = self.sampler.verify(draft.tokens, exit, position + 1)
        if wants_hidden:
            self.remember(states[accepted : accepted + 1])
        return draft, accepted, target

    def remember(self, hidden: Tensor) -> None:
        """Keep the state that chose the last token for the policy; the same on all ranks."""
        self.hidden = self.runner.agreed(hidden)

    def played(self, round: PlayedRound) -> Draft:
        """The Draft of a round that the runner played in one call, without what it drafted after an end of text."""
        tokens, runner = until_eos(round.drafted, self.eos_ids), self.runner
        return Draft(
            tokens,
            round.exit_layers[: len(tokens)],
            round.resume_layer,
            runner.counted(round.layers) + runner.counted(round.draft_layers, round.left_out, draft=True),
            round.draft_heads * runner.draft_head_share,
        )

    def draft(self, rows: Rows, plan: DraftPlan, token: int, limit: int) -> Draft:
        """Draft at most `limit` tokens after `token`, whose row comes next in `rows`."""
        if plan.proposed:
            return Draft(until_eos(plan.proposed[:limit], self.eos_ids))
        draft = Draft()
        for _ in range(min(plan.num_draft_tokens, limit)):
            exit, depth, asked = self.leave(rows, plan, token)
            token = self.sampler.draft(exit, rows.end)
            draft.tokens.append(token)
            draft.exit_layers.append(depth)
            draft.head_visits += (asked + 1) * self.runner.draft_head_share
            stop = plan.ask_to_stop and self.policy.should_stop(exit)
            if plan.ask_to_stop or plan.stop_unless:
                unsure = plan.stop_unless and not plan.stop_unless.holds(exit.stats())
                stop = self.runner.agreed(bool(stop or unsure))
            if stop or token in self.eos_ids:
                break  # nothing can be emitted after an end of text
        draft.resume_layer = min(rows.waiting, default=0)
        return draft

    def leave(self, rows: Rows, plan: DraftPlan, token: int) -> tuple[Exit, int, int]:
        """Let `token` climb until it leaves the model -> its exit, the depth, and heads asked before the last one."""
        runner, skips = self.runner, (plan.skip_attention, plan.skip_mlp)
        exits = plan.exits or (runner.n_layer,)
        own = plan.first_skip if self.verified else None
        own = 0 if runner.drafter else runner.n_layer if own is None else own
        hidden, depth, asked = rows.enter([token]), 0, 0
        leaving = plan.leave_if and Leaving(plan.leave_if)
        for stop in sorted({*exits, own, *rows.waiting}):  # rows of an earlier round may wait between exits
            if stop > depth:  # up to `own` the row is the full model's and waits there
                hidden = rows.climb(depth, stop, *skips) if stop <= own else rows.climb_copy(own, depth, stop, *skips)
            depth = stop
            if stop not in exits:
                continue
            exit = runner.exit(runner.adapted(hidden, plan.adapters, stop), self.sampler.draw(rows.end), draft=True)
            exit.wants_stats = plan.stop_unless is not None  # with whatever is asked first: one pass through the head
            if stop == exits[-1] or runner.agreed(
                bool(leaving.asks(exit) if leaving else self.policy.should_exit(stop, exit))
            ):
                break
            asked += exit.asked
        return exit, depth, asked

    def verify(self, rows: Rows, draft: Draft, token: int, position: int) -> Exit:
        """Take the round's rows (`token` at `position` and the drafts after it) to the top -> the exit of all K+1."""
        rows.enter([token, *draft.tokens][rows.end - position :])  # the last draft was never fed in
        n_layer = self.runner.n_layer
        for stop in sorted({*rows.waiting, n_layer}):
            if (start := min(rows.waiting)) < stop:
                rows.climb(start, stop)
        return self.runner.exit(joined(rows.waiting[n_layer]), self.sampler.draw(position + 1))


def agreement(
    runner: Runner, sampler, states: dict[int, Tensor], position: int, adapters: Adapters | None = None
) -> dict[int, list[bool]]:
    """For each depth, row by row: does an exit there choose the token that the full model chooses?

    states: hidden [T, D] at each depth and at the top, of rows that choose the tokens for `position`, position + 1, …
    """
    guesses = {}
    for depth, hidden in states.items():
        hidden, guesses[depth] = runner.adapted(hidden, adapters, depth), []
        for rows in hidden.split(runner.width if hidden.is_cuda else len(hidden)):  # what the fused head of a GPU takes
            at = position + len(guesses[depth])
            exit = runner.exit(rows, sampler.draw(at), draft=depth < runner.n_layer)
            guesses[depth] += sampler.guesses(exit, at)
    full = guesses[runner.n_layer]
    return {depth: list(map(operator.eq, found, full)) for depth, found in guesses.items()}


def until_eos(tokens: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end of text."""
    for index, token in enumerate(tokens):
        if token in eos_ids:
            return list(tokens[: index + 1])
    return list(tokens)
