"""Judge what leaving out a set of sublayers is worth: by one parallel pass over texts of the model, and by decoding.

A trial's value is tokens per round × the seconds of a plain round ÷ the seconds of its round, the latter from a cost
table that is measured once. Nothing in it is timed, so that the same set has the same value whenever it is tried.
"""

import dataclasses
from collections.abc import Sequence

import torch

from decoding.generation import Generation, totals
from decoding.runner import Runner
from drafting.policy import DraftPolicy, SelfDrafting
from errors import UserError
from generate import decode
from scripts.common.experiment import Experiment
from scripts.common.first_drafts import FirstDrafts, simulate_rounds
from scripts.common.round_costs import RoundCosts, skips_of
from scripts.search_skips.study import Trial


def drafting_policy(keep: Sequence[bool], num_draft_tokens: int) -> SelfDrafting:
    """Make a policy that drafts with the sublayers that keep [2L] marks, as `skip_set` does from a file."""
    policy = SelfDrafting(num_draft_tokens=num_draft_tokens)
    attention, mlp = skips_of(keep)
    policy.only_plan = policy.new_plan(skip_attention=frozenset(attention), skip_mlp=frozenset(mlp))
    policy.skips_sublayers = True
    return policy


def exit_set(exit_layer: int, n_layer: int) -> tuple[bool, ...]:
    """Return the set [2L] of a static exit: everything above is left out."""
    return (True,) * (2 * exit_layer) + (False,) * (2 * (n_layer - exit_layer))


class Judge:
    """Tries sets on the texts that plain decoding makes of an experiment's samples."""

    def __init__(self, experiment: Experiment, runner: Runner, costs: RoundCosts, most_drafts: int):
        """runner: for drafts of up to most_drafts tokens. Raises UserError if the texts have nothing to draft."""
        self.config, self.runner, self.costs, self.most_drafts = experiment.config, runner, costs, most_drafts
        self.prompts = [ids for _, ids in experiment.samples]
        plain = experiment.policy("none")
        self.texts = [self.continued(ids, plain).tokens for ids in self.prompts]
        if not any(len(text) > 1 for text in self.texts):
            raise UserError("every text ends with its first token, so there is nothing to draft: add --ignore_eos")
        whole = [[*prompt, *text] for prompt, text in zip(self.prompts, self.texts, strict=True)]
        self.drafts = [FirstDrafts(runner.model, tokens) for tokens in whole]

    def continued(self, prompt: Sequence[int], policy: DraftPolicy) -> Generation:
        return Generation.collect(decode(self.runner, prompt, self.config, policy))

    def agreement(self, keep: Sequence[bool]) -> list[list[bool]]:
        """Tell of each text, from its second token on, where first drafts say what it goes on with."""
        agreements, sampler, kept = [], self.runner.sampler(self.config.sampling), torch.tensor(keep)
        for prompt, text, drafts in zip(self.prompts, self.texts, self.drafts, strict=True):
            rows = torch.arange(len(prompt), len(prompt) + len(text) - 1, device=drafts.cos.device)
            if not len(rows):
                continue
            hidden, position = drafts.draft_states(kept.to(rows.device), rows), len(prompt) + 1
            exit = self.runner.exit(hidden, sampler.draw(position), draft=True)
            guesses = sampler.guesses(exit, position)
            agreements.append([guess == token for guess, token in zip(guesses, text[1:], strict=True)])
        return agreements

    def tried(self, keep: tuple[bool, ...], threshold: float, exit_layer: int | None = None) -> Trial:
        """Try a set: decode with it if the parallel pass promises at least `threshold`, or if it is a static exit."""
        agreements = self.agreement(keep)
        emitted = sum(map(len, agreements))
        promises = {}
        for k in range(1, self.most_drafts + 1):  # one pass tells the rounds of every K
            rounds = emitted - sum(simulate_rounds(agree, k)[0] for agree in agreements)
            promises[k] = self.costs.speedup(emitted / rounds, keep, k)
        k = max(promises, key=promises.get)
        agreement = sum(map(sum, agreements)) / emitted
        trial = Trial(keep, k, agreement, proxy=promises[k], value=promises[k], exit_layer=exit_layer)
        if promises[k] < threshold and exit_layer is None:
            return trial
        numbers = self.decoded(keep, k)
        value = self.costs.speedup(numbers["tokens_per_round"], keep, k)
        return dataclasses.replace(trial, value=value, **numbers)

    def decoded(self, keep: Sequence[bool], num_draft_tokens: int) -> dict:
        """Decode all samples with a set -> the numbers of a trial."""
        policy = drafting_policy(keep, num_draft_tokens)
        texts = [self.continued(ids, policy) for ids in self.prompts]
        if [text.tokens for text in texts] != self.texts:
            raise RuntimeError("drafts have changed a text: please report this, with what scripts.correctness says")
        sums = totals(round for text in texts for round in text.rounds)
        return {
            "tokens_per_round": sums.tokens_per_round,
            "acceptance_rate": sums.acceptance_rate,
            "seconds": sums.seconds,
        }
