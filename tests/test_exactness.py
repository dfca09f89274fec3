"""Lossless, compared by tokens: whatever drafts, the text is that of plain autoregressive decoding."""

import random
from dataclasses import dataclass

import pytest
import torch

from generate import GenerateConfig, Generation, decode
from kernels import cpu
from kernels.attention import plain_keys
from model import ModelArgs, Transformer
from policies import DraftPlan, DraftPolicy, make_policy
from quantize import quantise
from runner import Runner
from sampling import SamplingConfig

SAMPLING = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.8, seed=7),
    "top_k_top_p": SamplingConfig(temperature=1.2, top_k=40, top_p=0.9, seed=3),
}
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
N_LAYER = 4


def random_model(dtype: torch.dtype, pack: bool, tie: bool = False, seed: int = 0) -> Transformer:
    """A random Llama whose late layers write little, so that early exits are sometimes right."""
    args = ModelArgs(
        dim=64, n_layer=N_LAYER, n_head=4, n_kv_head=2, head_dim=16, ffn_dim=96, vocab_size=130, max_seq_len=256,
        norm_eps=1e-5, rope_base=10000.0, tie_embeddings=tie,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(args)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                late = ("wo" in name or "w2" in name) and int(name.split(".")[1]) >= 2
                scale = 1.0 if "embedding" in name else weight.shape[1] ** -0.5 * (0.3 if late else 1.0)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model = model.to(dtype).eval().requires_grad_(False)
    if pack:
        if reason := cpu.load():
            pytest.skip(f"C++ kernels not available: {reason}")
        model.pack_weights()
    return model


def tokens_of(runner, prompt, policy, sampling, new=32, **keywords):
    config = GenerateConfig(max_new_tokens=new, sampling=sampling, **keywords)
    policy = make_policy(policy, runner.n_layer) if isinstance(policy, str) else policy
    return Generation.collect(decode(runner, prompt, config, policy))


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
@pytest.mark.parametrize("precision", PRECISION)
def test_static_drafting_changes_no_token_at_any_exit_and_draft_length(precision, pack, sampling):
    model = random_model(PRECISION[precision], pack)
    prompt = [1, 5, 9, 40, 77]
    expected = tokens_of(Runner(model, 80, max_rows=1), prompt, "none", SAMPLING[sampling]).tokens
    accepted = 0
    for k in range(8):
        runner = Runner(model, 80, max_rows=k + 1)
        for exit_layer in range(1, N_LAYER):
            policy = f"static:{exit_layer},num_draft_tokens={k}"
            generation = tokens_of(runner, prompt, policy, SAMPLING[sampling])
            assert generation.tokens == expected, policy
            accepted += sum(step.accepted for step in generation.rounds)
    assert accepted > 0, "no draft was ever accepted: this test compared nothing"


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_drafting_with_quantised_weights_changes_no_token(mode, sampling):
    model = quantise(random_model(torch.bfloat16, pack=False), mode)
    expected = tokens_of(Runner(model, 80, max_rows=1), [1, 5, 9], "none", SAMPLING[sampling]).tokens
    for policy in ("static:2", "static:1,num_draft_tokens=7", Chaos(2)):
        found = tokens_of(Runner(model, 80, max_rows=8), [1, 5, 9], policy, SAMPLING[sampling])
        assert found.tokens == expected, policy


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
        expected = tokens_of(runner, [1, 5, 9], "none", sampling, new=120).tokens
        assert tokens_of(eager, [1, 5, 9], "none", sampling, new=120).tokens == expected
        for policy in ("static:2,num_draft_tokens=5", "static:1,num_draft_tokens=2", "static:3"):
            assert tokens_of(runner, [1, 5, 9], policy, sampling, new=120).tokens == expected, policy


@pytest.mark.parametrize("precision", PRECISION)
def test_torch_compiled_padded_decoding_is_exact_and_never_recompiles(precision):
    """Without the C++ kernels exactness rests on one fixed width and one compiled block."""
    runner = Runner(random_model(PRECISION[precision], pack=False), 100, max_rows=4, compile=True)
    assert runner.backend == "inductor"
    runner.warm_up()
    for sampling in SAMPLING.values():
        expected = tokens_of(runner, [1, 5, 9], "none", sampling).tokens
        for exit_layer in range(1, N_LAYER):
            assert tokens_of(runner, [1, 5, 9], f"static:{exit_layer}", sampling).tokens == expected
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


@dataclass
class Chaos(DraftPolicy):
    """Leaves at a random depth, skips random sublayers, or proposes random tokens: everything a plan can say."""

    seed: int = 0

    def start_prompt(self, prompt):
        self.random = random.Random(self.seed)

    def start_round(self, context):
        draw = self.random
        kind = draw.choice(["exits", "skips", "both", "proposed", "nothing"])
        if kind == "nothing":
            return DraftPlan()
        if kind == "proposed":
            return DraftPlan(proposed=tuple(draw.randrange(130) for _ in range(draw.randint(1, 5))))
        exits = tuple(sorted(draw.sample(range(1, N_LAYER + 1), draw.randint(1, 3))))
        subset = lambda: frozenset(i for i in range(N_LAYER) if draw.random() < 0.3) if kind != "exits" else frozenset()
        return DraftPlan(exits, draw.randint(1, 5), subset(), subset())

    def should_exit(self, depth, hidden):
        return self.random.random() < 0.4


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("precision", [*PRECISION, "fp16"])
@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_a_policy_that_does_everything_at_random_changes_no_token(precision, pack, sampling):
    dtype = PRECISION.get(precision, torch.float16)
    runner = Runner(random_model(dtype, pack), 200, max_rows=6, compile=pack and dtype is not torch.float16)
    expected = tokens_of(runner, [1, 5, 9], "none", SAMPLING[sampling], new=100).tokens
    for seed in range(6):
        chaotic = tokens_of(runner, [1, 5, 9], Chaos(seed), SAMPLING[sampling], new=100)
        assert chaotic.tokens == expected, seed
        assert len({step.resume_layer for step in chaotic.rounds}) > 2


def test_a_policy_forgets_the_last_prompt_and_a_runner_can_be_used_again():
    runner = Runner(random_model(torch.float32, pack=False), 100, max_rows=6)
    policy = Chaos(1)
    first = tokens_of(runner, [1, 5, 9], policy, SAMPLING["sampled"]).rounds
    tokens_of(runner, [7, 8], policy, SAMPLING["sampled"])
    again = tokens_of(runner, [1, 5, 9], policy, SAMPLING["sampled"]).rounds
    strip = lambda steps: [(s.tokens, s.drafted, s.accepted, s.exit_layers, s.resume_layer) for s in steps]
    assert strip(first) == strip(again)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_short_generations_have_exactly_the_length_asked_for(new, k):
    runner = Runner(random_model(torch.float32, pack=False), 3 + new, max_rows=k + 1)
    expected = tokens_of(runner, [1, 5, 9], "none", SAMPLING["greedy"], new=new).tokens
    assert len(expected) == new
    got = tokens_of(runner, [1, 5, 9], f"static:2,num_draft_tokens={k}", SAMPLING["greedy"], new=new)
    assert got.tokens == expected
    assert sum(len(step.tokens) for step in got.rounds) == new - 1


def test_text_ends_at_the_first_of_several_eos_ids_wherever_it_falls_in_a_draft():
    runner = Runner(random_model(torch.float32, pack=False), 100, max_rows=6)
    whole = tokens_of(runner, [1, 5, 9], "none", SAMPLING["sampled"]).tokens
    for index in range(1, 20):
        eos_ids = (129, whole[index])
        expected = whole[: whole.index(whole[index]) + 1]
        for policy in ("none", "static:2,num_draft_tokens=5", f"static:{N_LAYER},num_draft_tokens=5"):
            assert tokens_of(runner, [1, 5, 9], policy, SAMPLING["sampled"], eos_ids=eos_ids).tokens == expected


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_a_conversation_that_keeps_its_cache_says_the_same_as_one_read_anew(pack):
    keeps, anew = (Runner(random_model(torch.float32, pack), 120, max_rows=4) for _ in range(2))
    config, policy = GenerateConfig(max_new_tokens=20), make_policy("static:2", N_LAYER)
    prompt, cached = [1, 5, 9], 0
    for _ in range(3):
        kept = Generation.collect(decode(keeps, prompt, config, policy, cached=cached)).tokens
        fresh = Generation.collect(decode(anew, prompt, config, policy)).tokens
        assert kept == fresh
        cached = len(prompt) + len(fresh) - 1  # the last token was never fed in
        prompt = [*prompt, *fresh, 11, 12]
