"""The engine as on a GPU, without one: its kernels in Triton's interpreter, its rounds started ahead of time."""

import random

import pytest
import torch
from test_exactness import Chaos, random_model, tokens_of

from kernels import cpu, gpu
from kernels.formats import dequantised, quantise_int4, quantise_int8
from policies import make_policy
from quantize import quantise
from runner import DeviceRound, Runner
from sampling import SamplingConfig

SAMPLED = SamplingConfig(temperature=0.8, seed=5)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """Every op runs its kernel on CPU tensors, and the dispatching functions take a CPU for a GPU."""
    if reason := gpu.load():
        pytest.skip(reason)
    from kernels.gpu import attention, exit_head, linear

    def exit_rows(x, weight, scale, n_vocab, v_offset=0, *draw):
        return exit_head.launch(x, weight, scale, n_vocab, v_offset, exit_head.draw_of(*draw or (None,) * 3))[1]

    ops = [
        (linear.linear_bf16, linear.launch, linear.linear_bf16_reference),
        (linear.linear_int8, linear.launch, linear.linear_int8_reference),
        (linear.linear_int4, linear.launch, linear.linear_int4_reference),
        (attention.decode_attention, attention.launch, attention.decode_attention_reference),
        (exit_head.exit_head_rows, exit_rows, exit_head.exit_head_rows_reference),
    ]
    calls = []

    def counted(launch):
        def run(*arguments):
            calls.append(launch.__module__)
            return launch(*arguments)
        return run

    for op, launch, _ in ops:
        op.register_kernel("cpu", counted(launch))
    monkeypatch.setattr(cpu, "supports", lambda tensor: False)
    monkeypatch.setattr(gpu, "supports", lambda rows: rows.dtype == torch.bfloat16 and rows.shape[:-1].numel() <= 16)
    yield calls
    for op, _, reference in ops:
        op.register_kernel("cpu", reference)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_drafting_with_the_gpu_kernels_changes_no_token(gpu_kernels, mode):
    model = random_model(torch.bfloat16, pack=False)
    if mode:
        quantise(model, {"int8": "int8", "int4": "int4:lm_head=no"}[mode])
    prompt = list(range(3, 22))
    runs = [("static:2,num_draft_tokens=2", SamplingConfig())]
    if mode is None:  # the interpreter takes seconds a round
        runs += [(Chaos(1), SAMPLED), ("static:1,num_draft_tokens=3", SAMPLED)]
    for policy, sampling in runs:
        expected = tokens_of(Runner(model, 40, max_rows=1), prompt, "none", sampling, new=4)
        found = tokens_of(Runner(model, 40, max_rows=8), prompt, policy, sampling, new=4)
        assert found.tokens == expected.tokens, (policy, sampling)
    used = {"kernels.gpu.linear", "kernels.gpu.attention"} | ({__name__} if mode != "int4" else set())
    assert used <= set(gpu_kernels), "a kernel was never called"


class Early(DeviceRound):
    """A round that is started ahead of being asked for, as on a GPU; its graph is the program itself."""

    started = 0

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.on_gpu = True

    def capture(self):
        class Event:
            def record(self): pass
            def synchronize(self): pass

        self.outputs = [torch.zeros_like(self.result) for _ in range(2)]
        self.events = [Event(), Event()]
        self.graph = self

    def replay(self):
        Early.started += 1
        self.program()


@pytest.mark.parametrize("policy", ["none", "static:2,num_draft_tokens=3", "static:1,num_draft_tokens=7"])
def test_rounds_started_ahead_give_the_same_text_after_new_prompts_and_to_the_end_of_the_cache(policy, monkeypatch):
    model = random_model(torch.float32, pack=False)
    plain = Runner(model, 48, max_rows=8)
    prompts = [[1, 5, 9], [4, 4, 8, 20], [1, 5, 9]]
    expected = [tokens_of(plain, prompt, "none", SamplingConfig(), new=48 - len(prompt)) for prompt in prompts]
    monkeypatch.setattr("runner.DeviceRound", Early)
    ahead = Runner(model, 48, max_rows=8)
    Early.started = 0
    found = [tokens_of(ahead, prompt, policy, SamplingConfig(), new=48 - len(prompt)) for prompt in prompts]
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    rounds = sum(len(f.rounds) for f in found)
    assert rounds < Early.started <= rounds + len(prompts), "one round too many per text, and no more"


def test_a_round_started_ahead_is_forgotten_when_another_text_begins(monkeypatch):
    model = random_model(torch.float32, pack=False)
    monkeypatch.setattr("runner.DeviceRound", Early)
    runner, fresh = Runner(model, 60, max_rows=4), Runner(model, 60, max_rows=4)
    tokens_of(runner, [1, 5, 9], "static:2", SamplingConfig(), new=6)
    ((token, position, *_), _), = (each.ahead for each in runner._rounds.values())
    draw = random.Random(0)
    found = None
    while found != [token]:  # another text that asks for a round after the same token at the same position
        prompt = [draw.randrange(3, 130) for _ in range(position)]
        found = tokens_of(fresh, prompt, "none", SamplingConfig(), new=1).tokens
    expected = tokens_of(fresh, prompt, "static:2", SamplingConfig(), new=8).tokens
    assert tokens_of(runner, prompt, "static:2", SamplingConfig(), new=8).tokens == expected


def test_a_whole_round_says_what_the_same_round_says_call_by_call():
    class CallByCall(type(make_policy("static:2", 4))):
        def start_round(self, context):
            plan = super().start_round(context)
            return type(plan)((plan.exits[0], 4), plan.num_draft_tokens)  # two exits: no longer static

    calling = CallByCall(2)
    calling.fit(4)
    for pack in (True, False):
        runner = Runner(random_model(torch.bfloat16, pack), 80, max_rows=4, compile=pack)
        whole = tokens_of(runner, [1, 5, 9], "static:2", SamplingConfig(), new=40, eos_ids=(17,))
        parts = tokens_of(runner, [1, 5, 9], calling, SamplingConfig(), new=40, eos_ids=(17,))
        for one, other in zip(whole.rounds, parts.rounds, strict=True):
            for name in ("tokens", "drafted", "accepted", "exit_layers", "resume_layer", "layer_visits", "head_visits"):
                assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("k", [64, 256])
def test_quantised_weights_are_within_half_a_level_of_the_originals(k):
    weight = torch.randn(50, k, generator=torch.Generator().manual_seed(k))
    low, scale = quantise_int8(weight)
    assert ((dequantised(low, scale) - weight).abs() <= 0.501 * scale[:, None]).all()
    for group in (32, 64):
        low, scale = quantise_int4(weight, group)
        error = (dequantised(low, scale) - weight).abs().view(50, -1, group)
        # the far end, +8 levels, rounds down to 7; the scale itself is rounded to 8 bits
        level = scale.float().abs()[..., None]
        assert (error <= 1.05 * level).all() and error.mean() < 0.3 * level.mean()


def test_a_cache_that_another_runner_made_longer_is_used_from_the_next_text_on(monkeypatch):
    model = random_model(torch.float32, pack=False)
    monkeypatch.setattr("runner.DeviceRound", Early)
    short = Runner(model, 40, max_rows=4)
    expected = tokens_of(short, [1, 5, 9], "static:2", SamplingConfig(), new=12).tokens
    captured = dict(short._rounds)
    Runner(model, 400, max_rows=4)
    assert tokens_of(short, [1, 5, 9], "static:2", SamplingConfig(), new=12).tokens == expected
    assert all(short._rounds[key] is not old for key, old in captured.items()), "a graph would read the freed cache"


def test_quantising_twice_and_groups_that_do_not_divide_are_refused():
    model = random_model(torch.bfloat16, pack=False)
    with pytest.raises(ValueError, match="one of none, int8, int4"):
        quantise(model, "int3")
    with pytest.raises(ValueError, match="divide the 64 input features"):
        quantise(model, "int4:group=128")
    quantise(model, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantise(model, "int8")
    with pytest.raises(ValueError, match="before packing"):
        quantise(random_model(torch.bfloat16, pack=True), "int4")
