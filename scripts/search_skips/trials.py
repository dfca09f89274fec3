"""What leaving out a set of sublayers is worth: by one parallel pass over texts of the full model, and by decoding.

A trial's value is tokens per round × the seconds of a plain round ÷ the seconds of its round, the latter from a cost
table that is measured once. Nothing in it is timed, so that the same set has the same value whenever it is tried.
"""

from collections.abc import Sequence

import torch

from decoding.generation import Generation
from decoding.runner import Runner
from drafting.policy import SelfDrafting
from errors import UserError
from scripts.common.experiment import Experiment
from scripts.common.first_drafts import FirstDrafts
from scripts.common.round_costs import RoundCosts, skips_of
from scripts.search_skips.study import Trial
from scripts.train.report import simulate_rounds


def drafting_policy(keep: Sequence[bool], num_draft_tokens: int) -> SelfDrafting:
    """A policy that drafts with the sublayers that keep [2L] marks, as `skip_set` does from a file."""
    policy = SelfDrafting(num_draft_tokens=num_draft_tokens)
    attention, mlp = skips_of(keep)
    policy.only_plan = policy.new_plan(skip_attention=frozenset(attention), skip_mlp=frozenset(mlp))
    policy.skips_sublayers = True
    return policy


def exit_set(exit_layer: int, n_layer: int) -> tuple[bool, ...]:
    """The set [2L] of a static exit: everything above is left out."""
    return (True,) * (2 * exit_layer) + (False,) * (2 * (n_layer - exit_layer))


class Judge:
    """Tries sets on the texts that plain decoding makes of an experiment's samples."""

    def __init__(self, run: Experiment, runner: Runner, costs: RoundCosts, most_drafts: int):
        """runner: for drafts of up to most_drafts tokens. Raises UserError if the texts have nothing to draft."""
        self.run, self.runner, self.costs, self.most_drafts = run, runner, costs, most_drafts
        self.prompts = [ids for _, ids in run.samples]
        self.texts = [run.decode(run.policy("none"), ids, runner).tokens for ids in self.prompts]
        if not any(len(text) > 1 for text in self.texts):
            raise UserError("every text ends with its first token, so there is nothing to draft: add --ignore_eos")
        whole = [[*prompt, *text] for prompt, text in zip(self.prompts, self.texts, strict=True)]
        self.drafts = [FirstDrafts(run.session.model, tokens) for tokens in whole]

    def agreement(self, keep: Sequence[bool]) -> list[list[bool]]:
        """Of each text, whether first drafts say what it goes on with, from its second token on."""
        found, sampler, kept = [], self.runner.sampler(self.run.config.sampling), torch.tensor(keep)
        for prompt, text, drafts in zip(self.prompts, self.texts, self.drafts, strict=True):
            rows = torch.arange(len(prompt), len(prompt) + len(text) - 1, device=drafts.cos.device)
            if not len(rows):
                continue
            hidden, position = drafts.draft_states(kept.to(rows.device), rows), len(prompt) + 1
            exit = self.runner.exit(hidden, sampler.draw(position), draft=True)
            guesses = sampler.guesses(exit, position)
            found.append([guess == token for guess, token in zip(guesses, text[1:], strict=True)])
        return found

    def tried(self, keep: tuple[bool, ...], threshold: float, exit_layer: int | None = None) -> Trial:
        """Try a set: decode with it if the parallel pass promises at least `threshold`, or if it is a static exit."""
        agrees = self.agreement(keep)
        emitted = sum(map(len, agrees))
        promises = {}
        for k in range(1, self.most_drafts + 1):  # one pass tells the rounds of every K
            rounds = emitted - sum(simulate_rounds(text, k)[0] for text in agrees)
            promises[k] = self.costs.speedup(emitted / rounds, keep, k)
        k = max(promises, key=promises.get)
        found = {
            "num_draft_tokens": k,
            "agreement": sum(map(sum, agrees)) / emitted,
            "proxy": promises[k],
            "value": promises[k],
            "exit_layer": exit_layer,
        }
        if promises[k] >= threshold or exit_layer is not None:
            found |= self.decoded(keep, k)
            found["value"] = self.costs.speedup(found["tokens_per_round"], keep, k)
        return Trial(keep, **found)

    def decoded(self, keep: Sequence[bool], num_draft_tokens: int) -> dict:
        """Decode all samples with a set -> what it counted."""
        policy = drafting_policy(keep, num_draft_tokens)
        made: list[Generation] = [self.run.decode(policy, ids, self.runner) for ids in self.prompts]
        if [one.tokens for one in made] != self.texts:
            raise RuntimeError("drafts have changed a text: please report this, with what scripts.correctness says")
        rounds = [step for one in made for step in one.rounds]
        drafted = sum(len(step.drafted) for step in rounds)
        return {
            "tokens_per_round": sum(len(step.tokens) for step in rounds) / len(rounds),
            "acceptance_rate": sum(step.accepted for step in rounds) / drafted if drafted else None,
            "seconds": sum(one.decode_s for one in made),
        }
