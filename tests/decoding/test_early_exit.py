"""Early exit without verification: another text than the full model's, but a well-defined one.

The oracle recomputes every token from scratch: whatever depth a token leaves at, each layer it passes must see the
keys and values that the full model would have made of the same text.
"""

import pytest
import torch

from decoding.compare import share_equal
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig, make_sampler
from drafting.catalogue import POLICIES, make_policy
from drafting.plan import DraftPlan
from drafting.policy import DraftPolicy
from generate import decode
from tests.helpers.models import N_LAYER, PRECISION, PROMPT, SAMPLING, random_model, tokens_of
from tests.helpers.policies import EXAMPLES, example

NEW = 40
LOSSY = [text for name, text in EXAMPLES.items() if not POLICIES[name].verifiable_only]


def make_runner(precision="fp32", pack=True):
    return Runner(random_model(PRECISION[precision], pack, sharpness=4.0), 80, max_rows=8, compile=pack)


def exited(runner, policy, sampling="greedy", new=NEW, **config):
    policy = make_policy(policy, N_LAYER) if isinstance(policy, str) else policy
    config = GenerateConfig(new, SAMPLING[sampling], **config)
    return Generation.collect(decode(runner, PROMPT, config, policy, verified=False))


def depths_of(generation):
    return [depth for step in generation.rounds for depth in step.exit_layers]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize("precision", PRECISION)
def test_a_static_exit_is_the_model_of_the_first_layers(precision, pack, sampling):
    sampler = make_sampler(SAMPLING[sampling])
    for exit_layer in range(1, N_LAYER + 1):
        runner, text = make_runner(precision, pack), []
        hidden = runner.prefill(PROMPT)
        for position in range(len(PROMPT), len(PROMPT) + NEW):
            text += [sampler.draft(runner.exit(hidden, sampler.draw(position)), position)]
            hidden = runner.run_layers(runner.embed(text[-1:]), position, 0, exit_layer)
        found = exited(make_runner(precision, pack), f"static:{exit_layer}", sampling)
        assert found.tokens == text and len(set(text)) > 1
        assert {(step.layer_visits, step.head_visits) for step in found.rounds if len(step.tokens) == 3} == {
            (3 * exit_layer, 3)
        }
        assert set(depths_of(found)) == {exit_layer} and not any(step.drafted for step in found.rounds)


def from_scratch(runner, text, depth):
    """What the layers below `depth` say after `text`, every row of which has run through them -> (token, top-1)."""
    runner.prefill(PROMPT)
    hidden = runner.run_layers(runner.embed(text), len(PROMPT), 0, depth)
    exit = runner.exit(hidden[-1:])
    return exit.tokens()[0], exit.stats().top1.item()


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize(
    "policy",
    [
        "confidence:0.5,candidates=1-2-3",
        "confidence:0.6,candidates=1-3,stop=0.5,num_draft_tokens=5",
        "random:3",
        "random:1,num_draft_tokens=1",
        "consistent_tokens:candidates=1-2-3",
        "logits_future:0.3,candidates=1-2-3",
    ],
)
def test_a_token_sees_the_keys_and_values_of_all_before_it_whatever_their_depths(policy, pack):
    found, oracle = exited(make_runner("fp32", pack), policy), make_runner("fp32", pack)
    depths = depths_of(found)
    assert len(depths) == NEW - 1 and len({*depths}) > 1 and depths != sorted(depths)
    for index, depth in enumerate(depths):
        text = found.tokens[: index + 1]
        assert from_scratch(oracle, text, depth)[0] == found.tokens[index + 1], (index, depth)
        if policy.startswith("confidence:0.5"):
            asked = [d for d in (1, 2, 3) if d < depth]
            assert all(from_scratch(oracle, text, d)[1] < 0.5 for d in asked)
            assert depth == N_LAYER or from_scratch(oracle, text, depth)[1] >= 0.5


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("precision", PRECISION)
def test_where_nothing_is_ever_sure_enough_the_text_is_the_full_models(precision, sampling):
    for pack in (True, False):
        runner = make_runner(precision, pack)
        plain = tokens_of(runner, PROMPT, "none", SAMPLING[sampling], new=NEW).tokens
        for policy in ("confidence:1.0,candidates=1-2-3", "entropy:0.0,candidates=2", "none"):
            found = exited(runner, policy, sampling)
            assert found.tokens == plain and set(depths_of(found)) == {N_LAYER}


@pytest.mark.parametrize(("pack", "sampling"), [(True, "greedy"), (True, "sampled"), (False, "top_k_top_p")])
def test_the_share_of_tokens_that_the_full_model_would_choose_is_counted(pack, sampling):
    runner, settings = make_runner("bf16", pack), SAMPLING[sampling]
    plain = tokens_of(runner, PROMPT, "none", settings, new=NEW).tokens
    assert share_equal(runner, PROMPT, plain, settings) == 1.0
    lossy = exited(runner, "static:1", sampling).tokens
    after = lambda index: tokens_of(runner, PROMPT + lossy[:index], "none", settings, new=1).tokens[0]
    equal = sum(after(index) == lossy[index] for index in range(NEW))
    assert share_equal(runner, PROMPT, lossy, settings) == equal / NEW < 1


@pytest.mark.parametrize("text", [*LOSSY, "layer_skip_proportion+static:3", "random:num_draft_tokens=0"])
def test_a_text_depends_on_nothing_but_prompt_policy_and_seed(text, skip_file):
    make = lambda: example(text, skip_file, N_LAYER)
    runner, policy = make_runner(), make()
    first = exited(runner, policy, "sampled").tokens
    tokens_of(runner, [7, 8, 9, 10, 11, 12], "none", SAMPLING["sampled"], new=NEW)  # leaves its traces in the cache
    assert exited(runner, policy, "sampled").tokens == exited(make_runner(), make(), "sampled").tokens == first


@pytest.mark.parametrize("policy", ["static:2", "confidence:0.5", "random", "none"])
def test_a_text_has_the_length_asked_for_or_ends_at_an_end_of_text(policy):
    runner = make_runner()
    whole = exited(runner, policy).tokens
    for new in (1, 2, 3, 5):
        assert exited(runner, policy, new=new).tokens == whole[:new]
    for index in range(12):
        ended = exited(runner, policy, eos_ids=(129, whole[index])).tokens
        assert ended == whole[: whole.index(whole[index]) + 1]


@pytest.mark.parametrize("policy", ["prompt_lookup", "auto", "prompt_lookup+static:2"])
def test_a_policy_that_proposes_is_refused(policy):
    with pytest.raises(ValueError, match="cannot run with --no_verify") as caught:
        exited(make_runner(pack=False), policy)
    assert policy.split("+")[0] in str(caught.value)


def test_rejection_sampling_is_refused_where_nothing_is_verified():
    config = GenerateConfig(NEW, SamplingConfig(0.8, seed=3, verification="rejection"))
    with pytest.raises(ValueError, match="does not go with --verification rejection"):
        Generation.collect(decode(make_runner(), PROMPT, config, make_policy("static:2", 4), verified=False))


class Reading(DraftPolicy):
    """Drafts nothing, and keeps the states that it is shown."""

    reads_hidden = True

    def start_prompt(self, prompt):
        self.states = []

    def start_round(self, context):
        self.states.append(context.hidden.clone())
        return DraftPlan()


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_a_policy_that_reads_the_last_state_is_shown_a_new_one_before_every_token(pack):
    """As with verification: where every token runs through all layers, text and states are the full model's."""
    unverified, verified = Reading(), Reading()
    tokens = exited(make_runner(pack=pack), unverified).tokens
    assert tokens == tokens_of(make_runner(pack=pack), PROMPT, verified, SAMPLING["greedy"], new=NEW).tokens
    assert len(unverified.states) == NEW - 1
    assert torch.equal(torch.cat(unverified.states), torch.cat(verified.states))
    assert len({state.sum().item() for state in unverified.states}) > NEW / 2
