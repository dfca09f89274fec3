"""The parallel pass that says what first drafts would say, against decoding."""

import json

import pytest
import torch

from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from scripts.common.first_drafts import FirstDrafts
from tests.helpers.models import N_LAYER, PROMPT, random_model, tokens_of


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "plain"])
def test_the_parallel_pass_says_which_first_drafts_decoding_accepts(pack, tmp_path):
    runner = Runner(random_model(torch.float32, pack), 120, max_rows=8, compile=pack)
    compared = set()
    for index, (attention, mlp) in enumerate([([2], [2]), ([1, 2, 3], [3]), ([], [0, 2]), ([3], [1, 2, 3])]):
        path = tmp_path / f"{index}.json"
        path.write_text(json.dumps({"skip_attention": attention, "skip_mlp": mlp}))
        keep = torch.tensor([i not in skips for i in range(N_LAYER) for skips in (attention, mlp)])
        policy = make_policy(f"skip_set:{path},num_draft_tokens=1", N_LAYER)
        found = tokens_of(runner, PROMPT, policy, SamplingConfig(), new=80)
        drafts = FirstDrafts(runner.model, [*PROMPT, *found.tokens])
        agrees, position = drafts.agreement(keep).tolist(), len(PROMPT)
        for step in found.rounds:
            if step.drafted:
                assert bool(step.accepted) == agrees[position], (attention, mlp, position)
                compared.add(bool(step.accepted))
            position += len(step.tokens)
    assert compared == {True, False}, "the text needs drafts of both kinds"


def test_rows_have_sets_of_their_own_and_may_come_twice():
    drafts = FirstDrafts(random_model(torch.float32, pack=False), [1, 5, 9, 40, 77, 3, 8])
    keep = torch.rand(3, 2 * N_LAYER, generator=torch.Generator().manual_seed(0)) < 0.6
    rows = torch.tensor([2, 6, 2])
    together = drafts.draft_states(keep, rows)
    for i in range(3):
        alone = drafts.draft_states(keep[i], rows[i : i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-5), i
    full = drafts.draft_states(torch.ones(2 * N_LAYER, dtype=torch.bool))
    assert torch.equal(full, drafts.states[-1])
