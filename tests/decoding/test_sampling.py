"""Sampling: drafts leave the distribution as it is, candidates are those of transformers, noise is Gumbel noise."""

import itertools
import statistics
from dataclasses import dataclass

import pytest
import torch
from scipy import stats

from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import (
    CoupledSampler,
    RejectionSampler,
    SamplingConfig,
    choose,
    kept_tokens,
    make_sampler,
    probabilities,
)
from drafting.catalogue import DraftPlan, DraftPolicy, make_policy
from drafting.policy import Autoregressive
from generate import decode
from kernels import cpu
from kernels.exit_head import Exit, Head
from kernels.linear import pack
from kernels.noise import gumbel_noise
from model import ModelArgs, Transformer

PROMPT = [1, 4, 2]
VOCAB = 5
NEW = 4  # one token of the prefill, and then a whole round of 2 drafts fits
TEMPERATURE = 0.9
DRAFTS = "static:1,num_draft_tokens=2"


@pytest.fixture(scope="module")
def runner():
    """A Llama over five words whose first layer guesses the second one's words about half of the time."""
    args = ModelArgs(
        dim=16,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        head_dim=8,
        ffn_dim=16,
        vocab_size=VOCAB,
        max_seq_len=32,
        norm_eps=1e-5,
        rope_base=1e4,
    )
    generator = torch.Generator().manual_seed(3)
    model = Transformer(args).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 1.0 if "embedding" in name else weight.shape[1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    if packed := cpu.load() is None:
        model.pack_weights()
    return Runner(model, len(PROMPT) + NEW, max_rows=3, compile=packed)  # else torch would compile for a minute


@pytest.fixture(scope="module")
def exact(runner):
    """Probabilities of the last three of NEW tokens, those that rounds decide; the first is summed over."""
    joint = dict.fromkeys(itertools.product(range(VOCAB), repeat=NEW - 1), 0.0)
    for first, second, third in itertools.product(range(VOCAB), repeat=3):
        text = torch.tensor([*PROMPT, first, second, third])
        with torch.no_grad():
            logits = runner.model(text, torch.arange(len(text)))[len(PROMPT) - 1 :]
        probs = (logits.double() / TEMPERATURE).softmax(-1)
        prefix = probs[0, first] * probs[1, second] * probs[2, third]
        for last in range(VOCAB):
            joint[second, third, last] += float(prefix * probs[3, last])
    assert abs(sum(joint.values()) - 1) < 1e-6
    return joint


def sample(runner, policy, count, verification="rejection", first_seed=10_000):
    """`count` texts from seeds first_seed, first_seed + 1, … -> (token tuples after the first, acceptance rate)."""
    texts, drafted, accepted = [], 0, 0
    for seed in range(first_seed, first_seed + count):
        sampling = SamplingConfig(temperature=TEMPERATURE, seed=seed, verification=verification)
        generation = Generation.collect(decode(runner, PROMPT, GenerateConfig(NEW, sampling), policy))
        texts.append(tuple(generation.tokens[1:]))
        drafted += sum(len(step.drafted) for step in generation.rounds)
        accepted += sum(step.accepted for step in generation.rounds)
    return texts, accepted / drafted if drafted else None


def p_value(texts, exact):
    """Chi-square test of texts against their exact probabilities; cells with few expected counts are taken together."""
    observed, expected, rare = [], [], [0.0, 0.0]
    for text, probability in exact.items():
        count = texts.count(text)
        if probability * len(texts) < 5:
            rare = [rare[0] + count, rare[1] + probability * len(texts)]
        else:
            observed.append(count)
            expected.append(probability * len(texts))
    observed, expected = [*observed, rare[0]], [*expected, rare[1]]
    assert len(observed) > 20
    return stats.chisquare(observed, expected, sum_check=False).pvalue


@dataclass
class Proposes(DraftPolicy):
    """Proposes the same two tokens in every round, as an n-gram policy may."""

    def start_round(self, context):
        return DraftPlan(proposed=(3, 0))


# ---- the distribution of texts ----


def test_rejection_verification_leaves_the_joint_distribution_of_the_target(runner, exact):
    texts, acceptance = sample(runner, make_policy(DRAFTS, 2), 3000)
    assert 0.2 < acceptance < 0.9, "nothing is at stake if all drafts meet the same end"
    assert p_value(texts, exact) > 1e-3


def test_rejection_verification_of_proposed_tokens_leaves_the_joint_distribution(runner, exact):
    texts, acceptance = sample(runner, Proposes(), 2000)
    assert 0.05 < acceptance < 0.9
    assert p_value(texts, exact) > 1e-3


def test_coupled_sampling_over_seeds_has_the_joint_distribution_with_and_without_drafts(runner, exact):
    policy = make_policy(DRAFTS, 2)
    texts, acceptance = sample(runner, policy, 2000, "coupled")
    assert 0.2 < acceptance < 0.95
    assert p_value(texts, exact) > 1e-3
    assert sample(runner, Autoregressive(), 200, "coupled")[0] == texts[:200]


class AcceptsAll(RejectionSampler):
    def verify(self, drafted, exit, position):
        self.draft_probs, logits = {}, exit.logits()
        return len(drafted), self._draw(probabilities(logits[len(drafted)], self.config))


class ForgetsResidual(RejectionSampler):
    """A popular mistake: after a rejection, draws from the target instead of from what the draft left of it."""

    def verify(self, drafted, exit, position):
        logits = exit.logits()
        for accepted, token in enumerate(drafted):
            target = probabilities(logits[accepted], self.config)
            if torch.rand((), generator=self.random) >= target[token]:
                return accepted, self._draw(target)
        return len(drafted), self._draw(probabilities(logits[len(drafted)], self.config))


@pytest.mark.parametrize(("wrong", "policy"), [(AcceptsAll, make_policy(DRAFTS, 2)), (ForgetsResidual, Proposes())])
def test_a_wrong_acceptance_rule_does_not_pass_the_test_of_distributions(runner, exact, monkeypatch, wrong, policy):
    monkeypatch.setattr(runner, "sampler", wrong)
    texts, _ = sample(runner, policy, 800)
    assert p_value(texts, exact) < 1e-6


def test_the_seed_decides_the_text_and_other_seeds_give_other_texts(runner):
    policy = make_policy(DRAFTS, 2)
    for verification in ("coupled", "rejection"):
        first, again = (sample(runner, policy, 30, verification)[0] for _ in range(2))
        assert first == again
        assert len(set(first)) > 10


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_all_63_bits_of_the_seed_count(runner, verification):
    policy = make_policy(DRAFTS, 2)
    low, high = (sample(runner, policy, 20, verification, first_seed)[0] for first_seed in (5, 5 + 2**32))
    assert low != high


# ---- candidates ----


@pytest.mark.parametrize("top_p", [None, 1e-9, 0.2, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 64, 1000])
def test_candidates_and_probabilities_are_those_of_transformers(top_k, top_p):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed, temperature in itertools.product(range(4), (0.3, 1.0, 1.7)):
        logits = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3
        scores = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k is not None:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p is not None and top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        config = SamplingConfig(temperature, top_k, top_p)
        ids, kept = kept_tokens(logits, config)
        assert sorted(ids.tolist()) == scores[0].isfinite().nonzero().flatten().tolist()
        torch.testing.assert_close(kept, scores[0][ids])
        torch.testing.assert_close(probabilities(logits, config), scores[0].softmax(-1))


@pytest.mark.parametrize("config", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.9}])
def test_chosen_tokens_have_the_filtered_probabilities(config):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(5))
    config = SamplingConfig(temperature=0.8, seed=11, **config)
    chosen = [choose(logits, position, config) for position in range(2000)]
    expected = probabilities(logits, config)
    possible = expected.nonzero().flatten().tolist()
    assert 1 < len(possible) <= 8
    assert set(chosen) <= set(possible)
    counts = [chosen.count(token) for token in possible]
    expected = (expected[possible].double() * len(chosen)).tolist()
    assert stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_a_draft_by_the_target_itself_is_always_accepted_up_to_the_last_row(verification):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for seed in range(50):
        sampler = make_sampler(SamplingConfig(1.1, top_k=20, top_p=0.9, seed=seed, verification=verification))
        drafted = [sampler.draft(Exit.of_logits(row[None]), 7 + i) for i, row in enumerate(logits[:4])]
        assert sampler.verify(drafted, Exit.of_logits(logits), 7)[0] == 4


def test_rejection_never_lets_a_token_through_that_the_target_excludes():
    target = torch.tensor([[5.0, 4.0, 0.0, -9.0]] * 2)
    draft = torch.tensor([-9.0, 0.0, 4.0, 5.0])
    for seed in range(200):
        sampler = RejectionSampler(SamplingConfig(1.0, top_k=2, seed=seed))
        token = sampler.draft(Exit.of_logits(draft[None]), 3)
        assert token in (2, 3)
        accepted, emitted = sampler.verify([token], Exit.of_logits(target), 3)
        assert accepted == 0 and emitted in (0, 1)


def test_rejection_judges_drafts_over_a_trimmed_vocabulary_and_leaves_the_distribution_of_the_target():
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(2, 6, generator=generator)
    draft = target[0, :4] + torch.randn(4, generator=generator) / 2
    config, chosen, accepted = SamplingConfig(0.9, seed=8), [], 0
    sampler = RejectionSampler(config)
    for _ in range(3000):
        token = sampler.draft(Exit.of_logits(draft[None]), 3)
        kept, other = sampler.verify([token], Exit.of_logits(target), 3)
        accepted += kept
        chosen.append(token if kept else other)
    expected = probabilities(target[0], config).double() * len(chosen)
    assert 0.3 < accepted / len(chosen) < 0.95 and max(chosen) == 5
    counts = [chosen.count(token) for token in range(6)]
    assert stats.chisquare(counts, expected.tolist(), sum_check=False).pvalue > 1e-3


# ---- greedy ----


def test_greedy_is_argmax_under_either_rule_of_verification():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    best = logits.argmax(-1).tolist()
    for verification in ("coupled", "rejection"):
        sampler = make_sampler(SamplingConfig(verification=verification, top_k=5, top_p=0.5, seed=9))
        assert [sampler.draft(Exit.of_logits(row[None]), 3 + i) for i, row in enumerate(logits)] == best
        assert sampler.verify(best[:3], Exit.of_logits(logits), 3) == (3, best[3])
        wrong = [best[0], (best[1] + 1) % 50, best[2]]
        assert sampler.verify(wrong, Exit.of_logits(logits), 3) == (1, best[1])
        assert sampler.verify((), Exit.of_logits(logits[:1]), 3) == (0, best[0])
    one_hot = probabilities(logits[0], SamplingConfig())
    assert one_hot.argmax() == best[0] and one_hot.sum() == 1 and one_hot.max() == 1


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.5, "top_k": 1}, {"temperature": 2.0, "top_p": 1e-6}, {"temperature": 1e-5}]
)
def test_keeping_one_token_or_hardly_any_temperature_equals_greedy(settings):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    for seed in range(5):
        coupled = CoupledSampler(SamplingConfig(seed=seed, **settings))
        rejecting = RejectionSampler(SamplingConfig(seed=seed, **settings))
        for position, row in enumerate(logits):
            exit = Exit.of_logits(row[None])
            assert coupled.draft(exit, position) == rejecting.draft(exit, position) == row.argmax()


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-50])
def test_a_temperature_that_overflows_the_scores_is_greedy_or_refused(temperature):
    """Never a crash in the middle of a text, and never a token that is not the best."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 30
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}):
        try:
            config = SamplingConfig(temperature, **settings)
        except ValueError as error:
            assert "temperature must be" in str(error)
            continue
        for sampler in (CoupledSampler(config), RejectionSampler(config)):
            assert sampler.draft(Exit.of_logits(logits[None]), 3) == logits.argmax()


def test_a_row_is_judged_the_same_in_any_company():
    """A verdict on several rows at once equals the drafts made one row at a time, bit for bit."""
    logits = torch.randn(8, 333, generator=torch.Generator().manual_seed(4)) * 2
    for settings in ({}, {"top_k": 40, "top_p": 0.9}):
        sampler = CoupledSampler(SamplingConfig(temperature=0.7, seed=3, **settings))
        alone = [sampler.draft(Exit.of_logits(row.clone()[None]), 100 + i) for i, row in enumerate(logits)]
        assert sampler.verify(alone[:7], Exit.of_logits(logits), 100) == (7, alone[7])


def test_a_fused_exit_chooses_for_a_plain_sampler_what_its_logits_would_choose():
    if reason := cpu.load():
        pytest.skip(f"C++ kernels not available: {reason}")
    weight, hidden = torch.randn(300, 32), torch.randn(8, 32)
    head = Head(torch.ones(32), 1e-5, pack(weight), None, 300)
    sampler = CoupledSampler(SamplingConfig(temperature=0.8, seed=2**45 + 1))
    by_logits = list(sampler.choices(Exit.of_logits(head.logits(hidden)), 30))
    exit = Exit(hidden, head, 8, sampler.draw(30))
    assert sampler.verify(by_logits[:7], exit, 30) == (7, by_logits[7])
    assert exit._logits is None, "the logits were written"
    assert sampler.choices(Exit(hidden, head, 8), 30) == by_logits  # without a draw the sampler gives its own
    for row, token in enumerate(by_logits):
        assert sampler.draft(Exit(hidden[row : row + 1], head, 1, sampler.draw(30 + row)), 30 + row) == token


def test_only_a_plain_coupled_sampler_has_a_draw_and_the_rejecting_one_stands_in_with_the_best_tokens():
    assert CoupledSampler(SamplingConfig(0.8, seed=3)).draw(7) == (7, 3, 0.8)
    for settings in ({"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.5}):
        assert CoupledSampler(SamplingConfig(**{"temperature": 0.8} | settings)).draw(7) is None
    sampler = RejectionSampler(SamplingConfig(1.0, verification="rejection"))
    logits = torch.randn(3, 20)
    assert sampler.draw(7) is None and sampler.guesses(Exit.of_logits(logits), 7) == logits.argmax(-1).tolist()


# ---- noise ----


def test_noise_has_mean_variance_and_shape_of_the_standard_gumbel_distribution():
    noise = torch.cat([gumbel_noise(seed, 17 * seed, torch.arange(20_000)) for seed in range(10)]).double()
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.57722) < 0.015  # 5 standard errors
    assert abs(noise.var().item() - 1.64493) < 0.04
    assert stats.kstest(noise[::10].numpy(), "gumbel_r").pvalue > 1e-3


def test_noise_of_neighbouring_ids_positions_and_seeds_is_independent():
    ids = torch.arange(4000)
    uniform = lambda seed, position, shift=0: torch.exp(-torch.exp(-gumbel_noise(seed, position, ids + shift)))
    base = [uniform(5, position) for position in range(40)]
    pairs = {
        "id": [(u, uniform(5, position, shift=1)) for position, u in enumerate(base)],
        "position": list(itertools.pairwise(base)),
        "seed": [(u, uniform(6, position)) for position, u in enumerate(base)],
        "high half of seed": [(u, uniform(5 + 2**32, position)) for position, u in enumerate(base)],
        "seed against position": [(u, uniform(4, position + 1)) for position, u in enumerate(base)],
    }
    for name, couples in pairs.items():
        correlations = [torch.corrcoef(torch.stack(couple))[0, 1].item() * len(ids) ** 0.5 for couple in couples]
        assert max(map(abs, correlations)) < 4.5, name  # standard normal if independent
        assert abs(statistics.mean(correlations)) * len(correlations) ** 0.5 < 4, name
        assert 0.6 < statistics.stdev(correlations) < 1.5, name
    of_one_id = torch.stack(base)[:, 123]  # over positions, as decoding reads it
    assert stats.kstest(of_one_id.numpy(), "uniform").pvalue > 1e-3


GOLDEN = {  # (seed, position, id): noise. By Python's whole numbers and math.log; kernels and other devices must agree.
    (0, 0, 0): 0.7699388,
    (0, 0, 1): 3.8140002,
    (0, 1, 0): -0.4755514,
    (1, 0, 0): 2.1749904,
    (7, 12, 31999): 1.9442360,
    (1234, 2047, 128255): 1.2316522,
    (2**63 - 1, 131071, 5): -0.9741846,
    (2**32, 3, 9): 0.5008103,
}


@pytest.mark.parametrize(("where", "value"), GOLDEN.items())
def test_noise_has_its_golden_values(where, value):
    seed, position, token = where
    assert gumbel_noise(seed, position, torch.tensor([token])).item() == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_noise_of_an_id_does_not_depend_on_the_shape_or_order_of_the_ids():
    """fp32 logarithms may differ in the last bit between a vector's body and its tail: no more than that."""
    whole = gumbel_noise(42, 1000, torch.arange(32_000))
    assert whole.dtype == torch.float32
    shuffled = torch.randperm(32_000, generator=torch.Generator().manual_seed(0))
    for ids in (torch.arange(31_990, 32_000), torch.tensor([7]), shuffled, shuffled.view(8, -1), torch.tensor(9)):
        part = gumbel_noise(42, 1000, ids)
        assert part.shape == ids.shape
        torch.testing.assert_close(part, whole[ids], rtol=1e-6, atol=1e-6)


# ---- settings ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
        ("verification", "hope"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{value}"):
        SamplingConfig(**{name: value})


def test_the_rule_of_verification_is_the_one_asked_for():
    assert isinstance(make_sampler(SamplingConfig(1.0)), CoupledSampler)
    assert isinstance(make_sampler(SamplingConfig(1.0, verification="rejection")), RejectionSampler)
