"""Lossless, compared by tokens: whatever drafts, the text is that of plain autoregressive decoding."""

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from decoding.generation import GenerateConfig, Generation
from decoding.rounds import CallSteps, RoundPlayer, WaitingRows
from decoding.runner import Runner
from decoding.sampling import SamplingConfig, make_sampler
from drafting.catalogue import make_policy
from drafting.plan import DraftPlan, RoundContext
from drafting.policy import DraftPolicy
from generate import decode
from kernels import cpu
from kernels.attention import plain_keys
from model import Transformer
from quantize import quantise
from tests.helpers.models import N_LAYER, PRECISION, PROMPT, SAMPLING, low_bit_copies, random_model, tokens_of
from tests.helpers.policies import COMBINATIONS, EXAMPLES, Chaos, example


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize("precision", PRECISION)
def test_static_drafting_changes_no_token_at_any_exit_and_draft_length(precision, pack, sampling):
    model = random_model(PRECISION[precision], pack)
    expected = tokens_of(Runner(model, 80, max_rows=1), PROMPT, "none", SAMPLING[sampling]).tokens
    accepted = 0
    for k in (0, 1, 2, 3, 5, 7):
        runner = Runner(model, 80, max_rows=k + 1)
        for exit_layer in range(1, N_LAYER):
            policy = f"static:{exit_layer},num_draft_tokens={k}"
            generation = tokens_of(runner, PROMPT, policy, SAMPLING[sampling])
            assert generation.tokens == expected, policy
            accepted += sum(step.accepted for step in generation.rounds)
    assert accepted > 0, "no draft was ever accepted: this test compared nothing"


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_drafting_with_quantised_weights_changes_no_token(mode, sampling):
    model = quantise(random_model(torch.bfloat16, pack=False), mode)
    expected = tokens_of(Runner(model, 80, max_rows=1), PROMPT, "none", SAMPLING[sampling]).tokens
    for policy in ("static:2", "static:1,num_draft_tokens=7", Chaos(2)):
        found = tokens_of(Runner(model, 80, max_rows=8), PROMPT, policy, SAMPLING[sampling])
        assert found.tokens == expected, policy


@pytest.mark.parametrize("backend", ["c++", "eager", "inductor"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("precision", PRECISION)
def test_drafting_with_low_bit_copies_changes_no_token(precision, mode, backend, skip_file):
    if backend == "inductor" and (mode, precision) != ("int4", "bf16"):
        pytest.skip("compiling takes seconds: one of each is enough")
    pack, accepted = backend == "c++", Counter()
    if pack and (reason := cpu.load()):
        pytest.skip(f"C++ kernels not available: {reason}")
    model = random_model(PRECISION[precision], pack=False)
    drafter = low_bit_copies(model, mode, N_LAYER, pack)
    if pack:
        model.pack_weights()
    runner = Runner(model, 80, max_rows=8, compile=backend != "eager", draft_model=drafter)
    assert runner.backend == backend
    runner.warm_up(skips_sublayers=True)
    policies = (
        "static:2",
        "static:1,num_draft_tokens=7",
        "confidence:0.3,candidates=1-2-3",
        "skip_set:FILE",
        "saturation",
        "learned:LEARNED",
        "static:2,adapter=ADAPTER",
        "skip_set:FILE+confidence:0.1,candidates=1-2-3",
        "prompt_lookup+static:2",
        "static:2,stop=0.3",
    )
    for name, sampling in SAMPLING.items():
        expected = tokens_of(runner, PROMPT, "none", sampling).tokens
        texts = policies if name != "top_k_top_p" else policies[:1]  # which sorts all logits, in Python
        for policy in [*(example(text, skip_file, N_LAYER) for text in texts), Chaos(5)]:
            found = tokens_of(runner, PROMPT, policy, sampling)
            assert found.tokens == expected, str(policy)
            accepted[str(policy)] += sum(step.accepted for step in found.rounds)
            assert all(step.resume_layer == 0 for step in found.rounds)
    assert all(accepted.values()), "no draft was ever accepted: this test compared nothing"


def test_low_bit_copies_are_what_drafts_read():
    """Their layers and head count what their bytes are of the model's, and the model's own run once a round."""
    model = random_model(torch.bfloat16, pack=False)
    drafter = low_bit_copies(model, "int8", 2, pack=False)
    whole, cheap = Runner(model, 80, max_rows=4), Runner(model, 80, max_rows=4, draft_model=drafter)
    head = (drafter.lm_head.weight.nbytes + drafter.lm_head.scale.nbytes) / model.lm_head.weight.nbytes
    assert 0.5 < head < 0.6
    step = tokens_of(cheap, PROMPT, "static:2,num_draft_tokens=3", SamplingConfig()).rounds[0]
    assert N_LAYER + 3 * 2 * 0.5 < step.layer_visits < N_LAYER + 3 * 2 * 0.6
    assert abs(step.head_visits - 1 - 3 * head) < 1e-6
    assert tokens_of(whole, PROMPT, "static:2", SamplingConfig()).rounds[0].layer_visits == N_LAYER + 3 * 2


def test_drafting_with_all_layers_accepts_everything():
    runner = Runner(random_model(torch.float32, pack=False), 80, max_rows=4)
    steps = tokens_of(runner, [1, 2, 3], f"static:{N_LAYER}", SAMPLING["sampled"]).rounds
    assert all(step.accepted == len(step.drafted) for step in steps)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", PRECISION)
def test_compiled_speculation_equals_plain_decoding_compiled_or_eager(precision, tie):
    model = random_model(PRECISION[precision], pack=True, tie=tie)
    eager, runner = Runner(model, 200, max_rows=6), Runner(model, 200, max_rows=6, compile=True)
    assert (eager.backend, runner.backend) == ("eager", "c++")
    for sampling in SAMPLING.values():
        expected = tokens_of(runner, PROMPT, "none", sampling, new=120).tokens
        assert tokens_of(eager, PROMPT, "none", sampling, new=120).tokens == expected
        for policy in ("static:2,num_draft_tokens=5", "static:1,num_draft_tokens=2", "static:3"):
            assert tokens_of(runner, PROMPT, policy, sampling, new=120).tokens == expected, policy


@pytest.mark.parametrize("precision", PRECISION)
def test_torch_compiled_padded_decoding_is_exact_and_never_recompiles(precision, skip_file):
    """Without the C++ kernels exactness rests on one fixed width and one compiled block, with and without sublayers."""
    runner = Runner(random_model(PRECISION[precision], pack=False), 100, max_rows=6, compile=True)
    assert runner.backend == "inductor"
    runner.warm_up(skips_sublayers=True)
    policies = [
        *(f"static:{exit_layer}" for exit_layer in range(1, N_LAYER)),
        "layer_skip_proportion",
        "learned:LEARNED",
        "static:1,adapter=ADAPTER",
        "skip_set:FILE+confidence:0.1,candidates=1-2-3",
    ]
    for sampling in SAMPLING.values():
        expected = tokens_of(runner, PROMPT, "none", sampling).tokens
        for policy in [*(example(text, skip_file, N_LAYER) for text in policies), Chaos(3)]:
            assert tokens_of(runner, PROMPT, policy, sampling).tokens == expected, str(policy)
    with pytest.raises(RuntimeError, match="ecompil"), runner._no_recompiling():
        runner._compiled_block(runner.model.layers[0], *(torch.zeros(3, 64),) * 4, True, True)


@pytest.mark.parametrize("skip", [(), (1, 2)], ids=["whole", "skipping"])
@pytest.mark.parametrize("precision", PRECISION)
def test_the_layer_in_one_cpp_call_has_the_bits_of_the_layer_run_operation_by_operation(precision, skip):
    model = random_model(PRECISION[precision], pack=True)
    eager, fused = Runner(model, 64, max_rows=16), Runner(model, 64, max_rows=16, compile=True)
    for rows in (1, 2, 5, 16):
        results = []
        for runner in (eager, fused):
            runner.prefill(list(range(3, 40)))
            hidden = runner.embed(list(range(50, 50 + rows)))
            results.append(runner.run_layers(hidden, 37, 0, N_LAYER, skip_attention=skip, skip_mlp=skip[1:]))
            results.append(plain_keys(model.layers[-1].attention.k_cache)[:, : 37 + rows].clone())
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]), rows


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("precision", [*PRECISION, "fp16"])
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_a_policy_that_does_everything_at_random_changes_no_token(precision, pack, sampling):
    dtype = PRECISION.get(precision, torch.float16)
    runner = Runner(random_model(dtype, pack), 200, max_rows=6, compile=pack and dtype is not torch.float16)
    expected = tokens_of(runner, PROMPT, "none", SAMPLING[sampling], new=80).tokens
    for seed in range(4):
        chaotic = tokens_of(runner, PROMPT, Chaos(seed), SAMPLING[sampling], new=80)
        assert chaotic.tokens == expected, seed
        assert len({step.resume_layer for step in chaotic.rounds}) > 2


@functools.cache
def sharp_model(precision: str, pack: bool) -> Transformer:
    return random_model(PRECISION[precision], pack, sharpness=4.0)


@functools.cache
def sharp_text(precision: str, pack: bool, compile: bool, sampling: str) -> list[int]:
    """The text of plain decoding, which no policy may change."""
    runner = Runner(sharp_model(precision, pack), 100, max_rows=8, compile=compile)
    return tokens_of(runner, PROMPT, "none", SAMPLING[sampling], new=48).tokens


@pytest.mark.parametrize("text", [*EXAMPLES.values(), *COMBINATIONS])
@pytest.mark.parametrize("precision", PRECISION)
def test_no_policy_changes_a_token_with_the_kernels(precision, text, skip_file):
    accepted = 0
    for compile in (True, False):
        runner = Runner(sharp_model(precision, True), 100, max_rows=8, compile=compile)
        for sampling in ("greedy", "sampled"):
            found = tokens_of(runner, PROMPT, example(text, skip_file, N_LAYER), SAMPLING[sampling], new=48)
            assert found.tokens == sharp_text(precision, True, compile, sampling), (compile, sampling)
            assert sum(len(step.tokens) for step in found.rounds) == 47
            accepted += sum(step.accepted for step in found.rounds)
    assert accepted > 0 or text.startswith("none"), "no draft was ever accepted: this test compared nothing"


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLES["confidence"],
        EXAMPLES["random"],
        EXAMPLES["auto"],
        EXAMPLES["learned"],
        "static:2,adapter=ADAPTER",
        "prompt_lookup+static:2,stop=adaptive",
        "skip_set:FILE+confidence:0.6,candidates=1-2-3",
        "layer_skip_proportion+margin:0.3,stop=0.2",
    ],
)
@pytest.mark.parametrize("precision", PRECISION)
def test_no_policy_changes_a_token_with_padded_rows(precision, text, skip_file):
    runner = Runner(sharp_model(precision, False), 100, max_rows=8)
    for sampling in SAMPLING:
        found = tokens_of(runner, PROMPT, example(text, skip_file, N_LAYER), SAMPLING[sampling], new=48)
        assert found.tokens == sharp_text(precision, False, False, sampling), sampling


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_drafts_from_a_part_of_the_vocabulary_change_no_token(pack):
    for precision in PRECISION:
        model = sharp_model(precision, pack)
        runner = Runner(model, 100, max_rows=6, compile=pack, draft_vocab=70)
        for policy in ("static:2", "confidence:0.5,candidates=1-2-3", "static:2,stop=0.3", Chaos(1)):
            for sampling in SAMPLING:
                found = tokens_of(runner, PROMPT, policy, SAMPLING[sampling], new=48)
                assert found.tokens == sharp_text(precision, pack, pack, sampling), (policy, sampling)
                drafted = {token for step in found.rounds if step.exit_layers for token in step.drafted}
                assert drafted and max(drafted) < 70 <= max(found.tokens), "the text needs what drafts do not know"
        rejecting = SamplingConfig(temperature=0.8, seed=7, verification="rejection")
        for policy in ("static:2", "confidence:0.5,candidates=1-2-3"):
            found = tokens_of(runner, PROMPT, policy, rejecting, new=48)
            assert len(found.tokens) == 48 and sum(step.accepted for step in found.rounds)


def without_seconds(generation):
    """The Rounds, with what is summed in one order or another rounded."""
    return [
        dataclasses.replace(
            step, seconds=0.0, layer_visits=round(step.layer_visits, 6), head_visits=round(step.head_visits, 6)
        )
        for step in generation.rounds
    ]


@pytest.mark.parametrize("text", [*EXAMPLES.values(), *COMBINATIONS, "chaos"])
def test_a_policy_is_deterministic_and_forgets_the_last_prompt(text, skip_file):
    pack = cpu.load() is None and text not in ("chaos", COMBINATIONS[-1])
    runner = Runner(sharp_model("fp32", pack), 100, max_rows=8, compile=pack)
    make = lambda: Chaos(1) if text == "chaos" else example(text, skip_file, N_LAYER)
    play = lambda policy, prompt: without_seconds(tokens_of(runner, prompt, policy, SAMPLING["sampled"], new=48))
    policy = make()
    first = play(policy, PROMPT)
    other = play(policy, [7, 8, 7, 8, 7])
    assert play(policy, PROMPT) == first == play(make(), PROMPT)
    assert play(make(), [7, 8, 7, 8, 7]) == other


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize("text", ["confidence:0.6,candidates=2-3-4", "random:0"])
def test_a_draft_that_skips_sublayers_sees_nothing_that_another_text_left_in_the_cache(pack, text, tmp_path):
    """Not either above the first skipped layer, where a deep draft follows one that left early."""
    (tmp_path / "skips.json").write_text('{"skip_attention": [], "skip_mlp": [1]}')
    runner = Runner(sharp_model("fp32", pack), 100, max_rows=8, compile=pack)
    policy, found = make_policy(f"skip_set:{tmp_path}/skips.json+{text},num_draft_tokens=7", N_LAYER), []
    for left_behind in (0.0, 3.0):
        for layer in runner.model.layers:
            for cache in (layer.attention.k_cache, layer.attention.v_cache):
                cache.normal_(std=left_behind, generator=torch.Generator().manual_seed(1))
        found.append(without_seconds(tokens_of(runner, PROMPT, policy, SAMPLING["sampled"], new=60)))
    assert found[0] == found[1]


# ---- what a round runs ----


@dataclass
class Script(DraftPolicy):
    """Leaves at given depths, token by token, without asking the head."""

    depths: tuple[int, ...] = ()

    def start_round(self, context):
        self.left = list(self.depths)
        exits = tuple(sorted({*self.depths}))
        return DraftPlan(exits, len(self.depths), ask_to_stop=True)

    def should_exit(self, depth, exit):
        return depth == self.left[0]

    def should_stop(self, exit):
        self.left.pop(0)
        return False


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize(
    ("depths", "reached"),
    [
        ((2, 1, 3, 1), {3: [0, 1, 2], 1: [3]}),
        ((3, 2, 1), {3: [0], 2: [1], 1: [2]}),
        ((1, 1, 1, 2), {2: [0, 1, 2, 3]}),
        ((1, 2, 1, 4), {4: [0, 1, 2, 3]}),
    ],
)
def test_a_drafted_row_is_the_full_models_up_to_the_depth_it_has_reached(precision, pack, depths, reached):
    """Whoever goes deeper takes the rows before it along, so that a deep draft sees the keys and values of all."""
    prompt = [1, 5, 9, 40]
    make = lambda: Runner(random_model(PRECISION[precision], pack), 64, max_rows=8, compile=pack)
    drafting, full = make(), make()
    drafting.prefill(prompt)
    policy, rows, sampler = Script(depths), WaitingRows(drafting, len(prompt)), make_sampler(SamplingConfig())
    plan = policy.start_round(RoundContext(prompt, 9))
    steps = CallSteps(drafting, sampler, plan, rows, 77)
    drafted, exit_layers = RoundPlayer(drafting, policy, sampler).draft(steps, plan, 77, 8)
    assert exit_layers == list(depths)
    full.prefill(prompt)
    hidden, states = full.embed([77, *drafted[:-1]]), {}
    for layer in range(N_LAYER):
        hidden = states[layer + 1] = full.run_layers(hidden, len(prompt), layer, layer + 1)
    assert {depth: sum(map(len, parts)) for depth, parts in rows.at.items()} == {
        depth: len(there) for depth, there in reached.items()
    }
    for depth, there in reached.items():
        assert torch.equal(torch.cat(rows.at[depth]), states[depth][there])
        slots = [len(prompt) + row for row in there]
        for found, wanted in zip(drafting.model.layers[:depth], full.model.layers[:depth], strict=True):
            found, wanted = found.attention, wanted.attention
            assert torch.equal(plain_keys(found.k_cache)[:, slots], plain_keys(wanted.k_cache)[:, slots])
            assert torch.equal(found.v_cache[:, slots], wanted.v_cache[:, slots])


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize(
    ("policy", "layers", "heads"),
    [
        ("none", N_LAYER, 1),
        ("static:2,num_draft_tokens=3", 3 * 2 + N_LAYER, 3 + 1),
        (Script((2, 2)), 2 * 2 + N_LAYER, 2 + 1),
        (Script((2, 1, 3)), 2 + 1 + 3 + N_LAYER, 3 + 1),
        ("confidence:1.0,candidates=1-2-4,num_draft_tokens=2", 2 * 4 + N_LAYER, 2 * 3 + 1),
        ("entropy:0.0,candidates=1-3,num_draft_tokens=2", 2 * 3 + N_LAYER, 2 * 2 + 1),
        ("saturation:1.0,candidates=1-2-3,num_draft_tokens=2", 2 * 3 + N_LAYER, 2 + 1),
        ("confidence:0.0,candidates=2-3,stop=1.0", 2 + N_LAYER, 1 + 1),
        ("consistent_tokens:2,candidates=1-2,num_draft_tokens=2", 2 * 2 + N_LAYER, 2 * 2 + 1),
    ],
)
def test_visits_of_layers_and_heads_are_counted_as_by_hand(pack, policy, layers, heads):
    runner = Runner(random_model(torch.float32, pack), 64, max_rows=8, compile=pack)
    first = tokens_of(runner, PROMPT, policy, SamplingConfig(), new=12).rounds[0]
    assert (first.layer_visits, first.head_visits) == (layers, heads)


def test_visits_count_shares_of_layers_and_heads_and_proposals_cost_one_pass(skip_file):
    model = random_model(torch.float32, pack=True)
    runner = Runner(model, 64, max_rows=8, compile=True, draft_vocab=65)
    once = lambda policy, prompt: tokens_of(runner, prompt, policy, SamplingConfig(), new=12).rounds[0]
    first = once("static:2,num_draft_tokens=3", PROMPT)
    assert (first.layer_visits, first.head_visits) == (3 * 2 + N_LAYER, 3 / 2 + 1)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.layers[0].attention, model.layers[0].mlp)]
    first = once(make_policy(f"skip_set:{skip_file},num_draft_tokens=2", N_LAYER), PROMPT)
    attention, mlp = (size / sum(sizes) for size in sizes)  # the draft leaves out attention 2 and MLPs 1 and 3
    assert first.layer_visits == pytest.approx(2 * (N_LAYER - attention - 2 * mlp) + N_LAYER)
    assert first.resume_layer == 1 and first.exit_layers == (N_LAYER, N_LAYER)
    prompt = [*PROMPT, *tokens_of(runner, PROMPT, "none", SamplingConfig(), new=1).tokens, 7, 7, *PROMPT]
    found = tokens_of(runner, prompt, "prompt_lookup:min_ngram=1", SamplingConfig(), new=30).rounds
    proposing = [step for step in found if step.drafted]
    assert proposing and {(step.layer_visits, step.head_visits, step.exit_layers) for step in proposing} == {
        (N_LAYER, 1, ())
    }


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_short_generations_have_exactly_the_length_asked_for(new, k):
    runner = Runner(random_model(torch.float32, pack=False), len(PROMPT) + new, max_rows=k + 1)
    expected = tokens_of(runner, PROMPT, "none", SAMPLING["greedy"], new=new).tokens
    assert len(expected) == new
    got = tokens_of(runner, PROMPT, f"static:2,num_draft_tokens={k}", SAMPLING["greedy"], new=new)
    assert got.tokens == expected
    assert sum(len(step.tokens) for step in got.rounds) == new - 1


def test_text_ends_at_the_first_of_several_eos_ids_wherever_it_falls_in_a_draft():
    runner = Runner(random_model(torch.float32, pack=False), 100, max_rows=6)
    whole = tokens_of(runner, PROMPT, "none", SAMPLING["sampled"]).tokens
    for index in range(1, 20):
        eos_ids = (129, whole[index])
        expected = whole[: whole.index(whole[index]) + 1]
        for policy in ("none", "static:2,num_draft_tokens=5", f"static:{N_LAYER},num_draft_tokens=5"):
            assert tokens_of(runner, PROMPT, policy, SAMPLING["sampled"], eos_ids=eos_ids).tokens == expected


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_a_conversation_that_keeps_its_cache_says_the_same_as_one_read_anew(pack):
    keeps, anew = (Runner(random_model(torch.float32, pack), 120, max_rows=4) for _ in range(2))
    config, policy = GenerateConfig(max_new_tokens=20), make_policy("static:2", N_LAYER)
    prompt, cached = PROMPT, 0
    for _ in range(3):
        kept = Generation.collect(decode(keeps, prompt, config, policy, cached=cached)).tokens
        fresh = Generation.collect(decode(anew, prompt, config, policy)).tokens
        assert kept == fresh
        cached = len(prompt) + len(fresh) - 1  # the last token was never fed in
        prompt = [*prompt, *fresh, 11, 12]
