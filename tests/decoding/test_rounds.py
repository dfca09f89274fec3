"""Rounds: one call or many, the same record; rows that wait and are taken along are the full model's, bit for bit."""

import dataclasses

import pytest

from decoding.generation import GenerateConfig
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from generate import decode
from tests.decoding.test_exactness import N_LAYER, PRECISION, random_model
from tests.drafting.test_policies import example

SAMPLING = {"greedy": SamplingConfig(), "sampled": SamplingConfig(temperature=0.8, seed=7)}
POLICIES = (
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


class CallByCall(Runner):
    def play(self, *_):
        return None


@pytest.mark.parametrize("vocabulary", [None, 100], ids=["whole", "trimmed"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("precision", PRECISION)
def test_a_round_played_in_one_call_leaves_the_record_of_the_same_round_call_by_call(
    precision, sampling, vocabulary, skip_file
):
    model = random_model(PRECISION[precision], pack=True)
    config = GenerateConfig(48, SAMPLING[sampling])
    seen = set()
    for text in POLICIES:
        records = []
        for kind in (Runner, CallByCall):
            runner = kind(model, 80, max_rows=8, compile=True, draft_vocab=vocabulary)
            policy = example(text, skip_file, N_LAYER)
            steps = list(decode(runner, [1, 5, 9, 5, 9, 40, 5, 9], config, policy))
            records.append(
                [
                    dataclasses.replace(
                        step,
                        seconds=0.0,
                        layer_visits=round(step.layer_visits, 9),
                        head_visits=round(step.head_visits, 9),
                    )
                    for step in steps
                ]
            )
        for one, other in zip(*records, strict=True):
            assert one == other, text
        seen |= {(len(step.drafted), step.exit_layers[:1], step.resume_layer) for step in records[0]}
    assert len(seen) > 12, "too few different rounds: this test compared little"
