"""auto: what it chooses, why, and that it stops drafting where drafts do not pay."""

from collections import Counter

import pytest
import torch

from decoding import calibrate
from decoding.calibrate import agreement
from decoding.runner import Runner
from decoding.sampling import SamplingConfig, choose, make_sampler
from drafting.auto import RETRY, expected_tokens
from drafting.catalogue import make_policy
from drafting.plan import DraftPlan, Round, RoundContext
from tests.helpers.models import N_LAYER, PROMPT, SAMPLING, random_model, tokens_of

HEAD, LAUNCH = 1.5, 0.05  # made-up costs, in layers: of a head, and of another row in a verification
EXITS = (2, 4, 6)
VARIED = list(range(3, 40))  # no token twice: nothing to look up


def told_costs(policy, agreement, n_layer, head=HEAD, launch=LAUNCH):
    """Calibrate `policy` with rounds that cost their layers and heads: {depth: agreement}."""
    verify = lambda rows: n_layer + head + launch * (rows - 1)
    cost = lambda plan: (
        verify(len(plan.proposed) + 1)
        if not plan.exits
        else (plan.num_draft_tokens * (plan.exits[0] + head) + verify(plan.num_draft_tokens + 1))
    )
    agreement = {depth: agreed(found) if isinstance(found, float) else found for depth, found in agreement.items()}
    policy.calibrate({plan: cost(plan) for plan in policy.plans_to_time()}, agreement)
    return policy


def agreed(share, count=1000):
    return [index < round(share * count) for index in range(count)]


def best_by_brute_force(agreement, most, n_layer):
    """(tokens per layer's time, exit, K) of every choice, tried one by one."""
    choices = [(1 / (n_layer + HEAD), None, 0)]
    for depth, right in agreement.items():
        for k in range(1, most + 1):
            # a round of k drafts of which the first n are right emits n + 1 tokens
            tokens = sum((n + 1) * right**n * (1 - right if n < k else 1) for n in range(k + 1))
            choices.append((tokens / (k * (depth + HEAD) + n_layer + HEAD + LAUNCH * k), depth, k))
    return max(choices)


@pytest.mark.parametrize(
    "agreement",
    [
        (0.2, 0.5, 0.6),
        (0.7, 0.8, 0.9),
        (0.6, 0.9, 0.91),
        (0.1, 0.1, 0.95),
        (0.95, 0.97, 0.99),
        (0.0, 0.0, 0.0),
        (0.3, 0.3, 0.3),
        (0.5, 0.8, 0.8),
    ],
)
@pytest.mark.parametrize("most", [1, 3, 7, 12])
def test_it_takes_the_exit_and_draft_length_of_most_expected_tokens_per_second(agreement, most):
    agreement = dict(zip(EXITS, agreement, strict=True))
    policy = told_costs(make_policy(f"auto:{most},candidates=2-4-6", 12), agreement, 12)
    _, depth, k = best_by_brute_force(agreement, most, 12)
    policy.start_prompt(VARIED)
    plan = policy.start_round(RoundContext(VARIED, 50))
    assert plan == (DraftPlan((depth,), k) if depth else DraftPlan())


def test_expected_tokens_are_one_and_the_accepted_drafts():
    assert expected_tokens(0.5, 3) == 1.875
    assert expected_tokens(torch.tensor([0.0, 1.0]), 4).tolist() == [1, 5]


def kind(plan):
    return "lookup" if plan.proposed else f"E={plan.exits[0]} K={plan.num_draft_tokens}" if plan.exits else "plain"


def play(policy, count, accept, tokens=VARIED):
    """Let `policy` plan `count` rounds in which accept(plan) drafts are right -> how often it chose what, in halves."""
    policy.start_prompt(tokens)
    chosen = []
    for _ in range(count):
        plan = policy.start_round(RoundContext(tokens, 99))
        chosen.append(kind(plan))
        drafted = plan.proposed or (1,) * plan.num_draft_tokens
        right = min(accept(plan), len(drafted))
        exits = plan.exits * len(drafted) if plan.exits else ()
        policy.end_round(Round((*drafted[:right], 1), drafted, right, exits))
    return chosen


def test_it_gives_up_where_drafts_fail_more_often_than_foreseen_and_tries_again_now_and_then():
    policy = told_costs(make_policy("auto:7,candidates=2-4-6", 12), dict.fromkeys(EXITS, 0.7), 12)
    chosen = play(policy, 200, lambda plan: 0)
    assert chosen[0] != "plain" and set(chosen[100:]) == {"plain", f"{chosen[0].split()[0]} K=1"}
    drafts = [index for index, name in enumerate(chosen) if name != "plain" and index >= 100]
    assert len(drafts) >= 2 and {b - a for a, b in zip(drafts, drafts[1:], strict=False)} == {RETRY + 1}


def test_the_end_of_the_prompt_counts_beside_the_sample_text_and_is_forgotten_with_the_prompt():
    policy = told_costs(make_policy("auto:7,candidates=2-4-6", 12), dict.fromkeys(EXITS, 0.1), 12)
    plan = lambda: policy.start_round(RoundContext(VARIED, 50))
    assert policy.watched_depths == EXITS
    for share in (None, 0.0, 1.0, 0.0, None):
        policy.start_prompt(VARIED)
        if share is not None:
            policy.see_prompt(dict.fromkeys(EXITS, agreed(share, 60)))
        assert bool(plan().exits) == (share == 1.0)


def test_it_takes_up_drafting_again_where_retries_are_right():
    policy = told_costs(make_policy("auto:7,candidates=2-4-6", 12), dict.fromkeys(EXITS, 0.7), 12)
    rounds = iter(range(1500))
    chosen = play(policy, 1500, lambda plan: 9 if next(rounds) >= 300 else 0)
    assert Counter(chosen[200:300])["plain"] > 90 and set(chosen[1400:]) <= {
        f"{chosen[0].split()[0]} K={k}" for k in range(2, 8)
    }


def test_lookups_are_used_while_they_are_right_and_dropped_where_they_are_not():
    repeating = [5, 6, 7, 8, 9, 10] * 4
    for right, most in ((9, "lookup"), (0, "plain")):
        policy = told_costs(make_policy("auto:5,candidates=2-4-6", 12), dict.fromkeys(EXITS, 0.0), 12, launch=0.5)
        chosen = play(policy, 120, lambda plan, right=right: right if plan.proposed else 0, repeating)
        assert Counter(name.split()[0] for name in chosen[60:]).most_common(1)[0][0] == most


# ---- with a model ----


def text_of(runner, policy, prompt=PROMPT, new=150):
    return tokens_of(runner, prompt, policy, SAMPLING["sampled"], new=new)


def measured(model, sampling=SAMPLING["sampled"]):
    """auto with the model's own agreement on a text, and made-up costs."""
    runner = Runner(model, 200, max_rows=6, compile=True)
    policy = make_policy("auto:5,candidates=1-2", N_LAYER)
    sample = text_of(runner, "none").tokens
    found = agreement(runner, make_sampler(sampling), runner.prefill_states(sample, 0, {1, 2}), 1)
    return runner, told_costs(policy, found, N_LAYER, head=0.5)


def test_it_ends_up_plain_where_early_layers_never_agree():
    runner, policy = measured(random_model(torch.float32, pack=True, late_scale=3.0, sharpness=4.0))
    assert max(policy.agreement.values()) < 0.3
    rounds = text_of(runner, policy).rounds
    half = rounds[len(rounds) // 2 :]
    assert sum(not step.drafted for step in half) > 0.5 * len(half), "the others are lookups, most of them"
    assert sum(bool(step.exit_layers) for step in half) < 0.15 * len(half)


def test_it_drafts_where_early_layers_agree_and_reports_what_it_found():
    runner, policy = measured(random_model(torch.float32, pack=True, late_scale=0.1, sharpness=4.0))
    assert policy.agreement[2] > 0.8
    rounds = text_of(runner, policy).rounds
    assert sum(bool(step.drafted) for step in rounds) > 0.8 * len(rounds)
    assert sum(bool(step.exit_layers) for step in rounds) > 0.6 * len(rounds), "the others are lookups"
    lines = policy.explain()
    assert any(f"2: agrees {policy.agreement[2]:.2f}" in line for line in lines)
    assert any("rounds" in line and "E=2" in line for line in lines)


def test_it_looks_up_what_a_text_repeats():
    model = random_model(torch.float32, pack=True, late_scale=3.0)
    runner, policy = measured(model)
    greedy = SamplingConfig()
    plain = tokens_of(runner, PROMPT, "none", greedy, new=150).tokens  # a random model soon repeats itself
    assert len({*plain[75:]}) < 40
    found = tokens_of(runner, PROMPT, policy, greedy, new=150)
    looked_up = sum(step.accepted for step in found.rounds if not step.exit_layers)
    assert found.tokens == plain and looked_up > 50


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize(("length", "sample"), [(100, 80), (10, 80), (2, 80), (10, 0)])
def test_measuring_leaves_decoding_exact_and_fits_any_cache(monkeypatch, pack, verification, length, sample):
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    model = random_model(torch.float32, pack)
    runner, policy = Runner(model, length, max_rows=6, compile=pack), make_policy("auto:5", N_LAYER)
    sampling = SamplingConfig(0.8, seed=7, verification=verification)
    calibrate.calibrate(runner, policy, [index % 130 for index in range(sample)], sampling)
    assert all(0 <= share <= 1 for share in policy.agreement.values()) and set(policy.agreement) == {1, 2}
    assert min(policy.timed_verify_s.values()) > 0 and min(policy.draft_s.values()) >= 0
    prompt, new = [1], length - 1
    expected = tokens_of(Runner(model, length, max_rows=6, compile=pack), prompt, "none", SAMPLING["sampled"], new=new)
    assert tokens_of(runner, prompt, policy, SAMPLING["sampled"], new=new).tokens == expected.tokens


@pytest.mark.parametrize("sampling", SAMPLING)
def test_agreement_is_the_share_of_positions_at_which_an_exit_chooses_what_the_model_chooses(sampling):
    model, sample = random_model(torch.float32, pack=True), VARIED
    runner = Runner(model, 60, max_rows=4, compile=True)
    found = agreement(runner, make_sampler(SAMPLING[sampling]), runner.prefill_states(sample, 0, {1, 2}), 1)
    chosen, estimated = {}, SAMPLING[sampling] if SAMPLING[sampling].is_plain else SAMPLING["greedy"]
    for depth in (1, 2, N_LAYER):
        logits = model.head(model.run_layers(runner.embed(sample), torch.arange(len(sample)), 0, depth))
        chosen[depth] = [choose(row, index + 1, estimated) for index, row in enumerate(logits)]
    for depth in (1, 2):
        assert found[depth] == [a == b for a, b in zip(chosen[depth], chosen[N_LAYER], strict=True)]
    assert list(found) == [1, 2, N_LAYER] and all(found[N_LAYER]) and 0 < sum(found[2]) < len(sample)
