"""Rounds: one call or many, the same record; rows that wait and are taken along are the full model's, bit for bit."""

import dataclasses

import pytest

from decoding.generation import GenerateConfig
from decoding.runner import Runner
from generate import decode
from tests.helpers.gpu import CallByCall
from tests.helpers.models import N_LAYER, PRECISION, SAMPLING, random_model
from tests.helpers.policies import PLAYED_IN_ONE_CALL, example


@pytest.mark.parametrize("vocabulary", [None, 100], ids=["whole", "trimmed"])
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("precision", PRECISION)
def test_a_round_played_in_one_call_leaves_the_record_of_the_same_round_call_by_call(
    precision, sampling, vocabulary, skip_file
):
    model = random_model(PRECISION[precision], pack=True)
    config = GenerateConfig(48, SAMPLING[sampling])
    seen = set()
    for text in PLAYED_IN_ONE_CALL:
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
