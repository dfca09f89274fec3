"""Sums over rounds, and the same sums from summaries as they stand in JSON files."""

import json

import pytest
import torch

from decoding.generation import rate, summed, totals
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from tests.helpers.models import N_LAYER, PROMPT, random_model, tokens_of


def test_summaries_have_the_totals_of_their_rounds():
    runner = Runner(random_model(torch.float32, pack=False), 100)
    policy = make_policy("confidence:threshold=0.1,candidates=1-2-3", N_LAYER)
    texts = [tokens_of(runner, PROMPT[:count], policy, SamplingConfig(), new=20) for count in (3, 5)]
    summaries = [json.loads(json.dumps(text.summary(runner.model))) for text in texts]
    expected, sums = totals(round for text in texts for round in text.rounds), summed(summaries)
    assert sums.exit_layers == expected.exit_layers and len(sums.exit_layers) > 1
    for name in ("rounds", "tokens", "drafted", "accepted", "layer_visits", "head_visits", "seconds"):
        assert getattr(sums, name) == pytest.approx(getattr(expected, name)) and getattr(sums, name) > 0
    assert sums.acceptance_rate == expected.acceptance_rate and sums.mean_exit_layer == expected.mean_exit_layer


def test_what_another_engine_does_not_tell_counts_nothing():
    sums = summed([{"tokens": [3, 4, 5], "decode_s": 0.5, "prefill_s": 0.1}])
    assert (sums.tokens, sums.seconds, sums.rounds, sums.acceptance_rate) == (2, 0.5, 0, None)
    assert rate(1, 0) is None and summed([]).tokens_per_round is None
