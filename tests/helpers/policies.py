"""Policy strings that together say everything a policy can say, and a policy that does everything at random."""

import random
from dataclasses import dataclass
from pathlib import Path

from drafting.catalogue import POLICIES, make_policy
from drafting.plan import DraftPlan, Measure, Rule
from drafting.policy import DraftPolicy
from tests.helpers.models import N_LAYER, VOCAB_SIZE

# Settings that give a model of four layers something to decide; a policy that is not here is played by its example.
# FILE, LEARNED and ADAPTER stand for paths (`example`).
SETTINGS = {
    "static": "static:2,num_draft_tokens=5",
    "confidence": "confidence:0.5,candidates=1-2-3,num_draft_tokens=5",
    "margin": "margin:0.3,candidates=1-2-3",
    "entropy": "entropy:1.5,candidates=1-2-3",
    "saturation": "saturation:0.7,candidates=1-2-3",
    "consistent_tokens": "consistent_tokens:2,candidates=1-2-3-4",
    "random": "random:1,num_draft_tokens=5",
    "logits_future": "logits_future:0.5,candidates=1-2-3",
    "layer_skip_proportion": "layer_skip_proportion:0.4,seed=2",
    "skip_set": "skip_set:FILE",
    "learned": "learned:LEARNED,num_draft_tokens=5,every=1",
    "prompt_lookup": "prompt_lookup:5,min_ngram=1",
    "auto": "auto:5,candidates=1-2-3",
}
EXAMPLES = {name: SETTINGS.get(name, kind.example or name) for name, kind in POLICIES.items()}
COMBINATIONS = (
    "prompt_lookup+static:2",
    "skip_set:FILE+confidence:0.6",
    "confidence:0.5,stop=0.6,num_draft_tokens=7",
    "static:2,stop=adaptive",
    "static:2,stop=svip",
    "entropy:1.5,decay=4,candidates=1-2-3",
    "static:1,adapter=ADAPTER",
    "confidence:0.5,candidates=1-2-3,adapter=ADAPTER,stop=0.2",
    "learned:LEARNED+static:3",
    "auto:adapter=ADAPTER",
    "none:steps=8",
    "random:num_draft_tokens=1+static:2,num_draft_tokens=5",
    "layer_skip_proportion+margin:0.3,stop=0.2",
)
# Policies whose rounds one call can play: every measure, every way to stop, every source of a draft.
PLAYED_IN_ONE_CALL = (
    "none",
    "static:2",
    "static:1,stop=0.05",
    "static:3,stop=svip",
    "static:2,stop=adaptive,num_draft_tokens=5",
    "confidence:0.05,candidates=1-2-4",
    "margin:0.02,candidates=1-3,stop=0.03",
    "entropy:4.5,candidates=1-2-3",
    "confidence:0.05,candidates=1-2-3,decay=4",
    "layer_skip_proportion:0.5",
    "skip_set:FILE",
    "consistent_tokens:2,candidates=1-2-3,stop=0.03",
    "consistent_tokens:2,num_draft_tokens=0",
    "saturation:0.2,stop=0.03",
    "saturation:0.86,candidates=1-2-3-4",
    "consistent_tokens:3,candidates=1-2-3-4",
    "learned:LEARNED,every=1",
    "learned:LEARNED,every=3+static:3",
    "static:1,adapter=ADAPTER",
    "skip_set:FILE+confidence:0.05,candidates=1-2-4",
    "confidence:0.05,candidates=1-2-4,adapter=ADAPTER,stop=0.03",
    "prompt_lookup",
    "prompt_lookup:min_ngram=1+static:2",
)


def example(text: str, skip_file: str, n_layer: int) -> DraftPolicy:
    """Make the policy that a string names. FILE stands for skip_file, LEARNED and ADAPTER for the files beside it."""
    text = text.replace("FILE", skip_file)
    for name in ("learned", "adapter"):
        text = text.replace(name.upper(), str(Path(skip_file).with_name(f"{name}{n_layer}.safetensors")))
    return make_policy(text, n_layer, 64)


@dataclass
class Chaos(DraftPolicy):
    """Draws everything that a plan can say: exits, skipped sublayers, proposals, rules; exits and stops at random."""

    seed: int = 0

    def start_prompt(self, prompt):
        self.random = random.Random(self.seed)

    def start_round(self, context):
        draw = self.random
        kind = draw.choice(["exits", "skips", "both", "proposed", "nothing"])
        if kind == "nothing":
            return DraftPlan()
        if kind == "proposed":
            return DraftPlan(proposed=tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 5))))
        depths = draw.sample(range(1, N_LAYER + 1), draw.randint(1, 3)) if kind != "skips" else []
        subset = lambda: frozenset(i for i in range(N_LAYER) if draw.random() < 0.3) if kind != "exits" else frozenset()
        rules = [
            None,
            Rule(Measure.TOP1, draw.random() ** 2),
            Rule(Measure.MARGIN, draw.random() ** 2),
            Rule(Measure.ENTROPY, 4.5),
        ]
        return DraftPlan(
            tuple(sorted(depths)),
            draw.randint(1, 5),
            subset(),
            subset(),
            exit_if=draw.choice(rules),
            stop_unless=draw.choice([None, *rules]),
            ask_to_stop=draw.random() < 0.5,
        )

    def should_exit(self, depth, exit):
        return self.random.random() < 0.4

    def should_stop(self, exit):
        return self.random.random() < 0.2
