"""The engine as on a GPU, without one: its kernels in Triton's interpreter, its rounds started ahead of time."""

import itertools
import random
import weakref
from collections import Counter

import pytest
import torch

from decoding.calibrate import time_rounds
from decoding.generation import GenerateConfig
from decoding.graphs import Arrival
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.plan import DraftPlan
from drafting.policy import DraftPolicy
from generate import decode
from kernels import cpu, gpu
from kernels.exit_head import Exit
from kernels.formats import dequantised, quantise_int4, quantise_int8
from quantize import quantise
from tests.helpers.gpu import AsOnGPU, CallByCall, samples_from_logits
from tests.helpers.models import N_LAYER, PROMPT, SAMPLING, low_bit_copies, random_model, tokens_of
from tests.helpers.policies import COMBINATIONS, PLAYED_IN_ONE_CALL, Chaos, example

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
        runs += [(Chaos(1), SAMPLED)]
    for policy, sampling in runs:
        expected = tokens_of(Runner(model, 40, max_rows=1), prompt, "none", sampling, new=4)
        found = tokens_of(Runner(model, 40, max_rows=8), prompt, policy, sampling, new=4)
        assert found.tokens == expected.tokens, (policy, sampling)
    used = {"kernels.gpu.linear", "kernels.gpu.attention"} | ({__name__} if mode != "int4" else set())
    assert used <= set(gpu_kernels), "a kernel was never called"


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr("decoding.runner.Graphs", AsOnGPU)
    AsOnGPU.captures, AsOnGPU.replays = Counter(), Counter()
    return AsOnGPU


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounds_by_graphs_leave_the_record_of_the_same_rounds_call_by_call(
    dtype, sampling, as_on_gpu, monkeypatch, skip_file
):
    """But for what was read because a draft was started before it was known to be unwanted."""
    monkeypatch.setattr(Runner, "can_sample", True)  # by a fused kernel on a GPU, here from the logits
    monkeypatch.setattr(Exit, "has_fused_head", lambda self: False)
    monkeypatch.setattr(Exit, "samples", samples_from_logits)
    model = random_model(dtype, pack=False)
    ids, accepted = list(range(3, 12)) * 3, 0
    for text, eos_ids in itertools.product(PLAYED_IN_ONE_CALL, [(), (17,)]):
        records = []
        for kind in (Runner, CallByCall):
            runner = kind(model, 90, max_rows=8)
            found = tokens_of(runner, ids, example(text, skip_file, N_LAYER), sampling, new=32, eos_ids=eos_ids)
            records.append(found.rounds)
        for one, other in zip(*records, strict=True):
            for name in ("tokens", "drafted", "accepted", "exit_layers"):
                assert getattr(one, name) == getattr(other, name), (text, name)
            unwanted = "stop=" in text or set(eos_ids) & {*one.drafted}  # call by call nothing is drafted behind an end
            for name in ("layer_visits", "head_visits"):
                extra = getattr(one, name) - getattr(other, name)
                assert extra == pytest.approx(0) or (extra > 0 and unwanted), (text, name)
            accepted += one.accepted
    assert accepted > 100, "too little was accepted: this test compared little"
    assert set(AsOnGPU.replays) == {"whole_round", "draft", "verify", "layers"}


def test_low_bit_copies_draft_in_rounds_by_graphs_too(as_on_gpu):
    model = random_model(torch.bfloat16, pack=False)
    own, *drafted = [], [], []
    for found, kind, copies in zip((own, *drafted), (Runner, Runner, CallByCall), (False, True, True), strict=True):
        drafter = low_bit_copies(model, "int4", N_LAYER, pack=False) if copies else None
        for policy in ("static:3", "confidence:0.05,candidates=1-2-3", "static:3,stop=0.03"):
            rounds = tokens_of(
                kind(model, 80, max_rows=8, draft_model=drafter), PROMPT, policy, SamplingConfig()
            ).rounds
            found.append([step.drafted for step in rounds])
    assert drafted[0] == drafted[1] != own


@pytest.mark.parametrize("copies", [False, True], ids=["own", "low-bit"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_nothing_that_a_plan_can_say_changes_a_token_of_rounds_by_graphs(sampling, copies, as_on_gpu, skip_file):
    model = random_model(torch.bfloat16, pack=False)
    drafter = low_bit_copies(model, "int8", N_LAYER, pack=False) if copies else None
    expected = tokens_of(CallByCall(model, 80, max_rows=1), [1, 5, 9], "none", SAMPLING[sampling]).tokens
    runner = Runner(model, 80, max_rows=8, draft_model=drafter)
    for policy in [*(example(text, skip_file, N_LAYER) for text in COMBINATIONS), *map(Chaos, range(6))]:
        assert tokens_of(runner, [1, 5, 9], policy, SAMPLING[sampling]).tokens == expected, str(policy)


def test_a_draft_is_started_before_the_last_one_is_judged_and_a_round_before_the_last_one_is_read(as_on_gpu, skip_file):
    model = random_model(torch.float32, pack=False)
    order = []

    class Watched(Arrival):
        def send(self):
            order.append("start")
            return super().send()

        def read(self):
            order.append("read")
            return super().read()

    def events(policy):
        runner = Runner(model, 90, max_rows=8)
        runner._graphs.found = [Watched(runner._graphs.ids) for _ in range(2)]
        runner._graphs.seen = [Watched(runner._graphs.stats) for _ in range(2)]
        order.clear()
        found = tokens_of(runner, [1, 5, 9], example(policy, skip_file, N_LAYER), SamplingConfig(), new=40)
        return found.rounds, "".join(event[0] for event in order)

    rounds, seen = events("static:2,num_draft_tokens=3")
    assert seen.startswith("ss" + "rs" * (len(rounds) - 2)), "the next round is on its way when one is read"
    for unknown in ("prompt_lookup:min_ngram=1+static:2,num_draft_tokens=3", "learned:LEARNED", "auto"):
        rounds, seen = events(unknown)
        assert seen == "sr" * len(rounds), "nothing is started before it is known what the next round will be"
    rounds, seen = events("static:2,num_draft_tokens=3,stop=0.0001")
    assert {len(step.drafted) for step in rounds[:-1]} == {3}
    assert seen.startswith("ssrsr" + "sr"), "three drafts, two judged while the next runs; the verification"


@pytest.mark.parametrize("policy", ["none", "static:2,num_draft_tokens=3", "static:1,num_draft_tokens=7"])
def test_rounds_started_ahead_give_the_same_text_after_new_prompts_and_to_the_end_of_the_cache(policy, as_on_gpu):
    model = random_model(torch.float32, pack=False)
    prompts = [[1, 5, 9], [4, 4, 8, 20], [1, 5, 9]]
    expected = [
        tokens_of(CallByCall(model, 48, max_rows=8), prompt, "none", SamplingConfig(), new=48 - len(prompt))
        for prompt in prompts
    ]
    ahead = Runner(model, 48, max_rows=8)
    AsOnGPU.replays.clear()
    found = [tokens_of(ahead, prompt, policy, SamplingConfig(), new=48 - len(prompt)) for prompt in prompts]
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    rounds = sum(len(f.rounds) for f in found)
    assert rounds - 1 <= AsOnGPU.replays["whole_round"] < rounds + len(prompts), "one round too many per text at most"


def test_a_round_started_ahead_is_forgotten_when_another_text_begins(as_on_gpu):
    model = random_model(torch.float32, pack=False)
    runner, fresh = Runner(model, 60, max_rows=4), Runner(model, 60, max_rows=4)
    list(itertools.islice(decode(runner, [1, 5, 9], GenerateConfig(30), make_policy("static:2", 4)), 4))
    (_, token, position, *_), _ = runner._graphs.ahead
    draw = random.Random(0)
    found = None
    while found != [token]:  # another text that asks for a round after the same token at the same position
        prompt = [draw.randrange(3, 130) for _ in range(position)]
        found = tokens_of(fresh, prompt, "none", SamplingConfig(), new=1).tokens
    expected = tokens_of(fresh, prompt, "static:2", SamplingConfig(), new=8).tokens
    assert tokens_of(runner, prompt, "static:2", SamplingConfig(), new=8).tokens == expected


def test_what_comes_only_once_is_not_captured(as_on_gpu):
    runner = Runner(random_model(torch.float32, pack=False), 120, max_rows=4)
    found = tokens_of(runner, [1, 5, 9], "layer_skip_proportion:0.5", SamplingConfig(), new=80)
    drafted = sum(len(step.drafted) for step in found.rounds)
    assert len(found.rounds) > 20 and AsOnGPU.captures["draft"] < drafted / 2, "random sets seldom come twice"
    tokens_of(runner, [1, 5, 9], "static:2", SamplingConfig(), new=80)
    assert AsOnGPU.captures["whole_round"] == AsOnGPU.captures["verify"] == 1


def test_a_program_that_failed_is_run_again_before_it_is_captured(as_on_gpu, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupted(*_, **__):
        raise Interrupted

    runner = Runner(random_model(torch.float32, pack=False), 60, max_rows=4)
    expected = tokens_of(CallByCall(runner.model, 60, max_rows=4), [1, 5, 9], "none", SamplingConfig(), new=2).tokens
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(as_on_gpu, "verify", interrupted)
        tokens_of(runner, [1, 5, 9], "static:2", SamplingConfig(), new=2)
    assert tokens_of(runner, [1, 5, 9], "static:2", SamplingConfig(), new=2).tokens == expected
    assert not AsOnGPU.captures, "what the first run would have compiled is compiled within a capture"


def test_rows_that_pad_the_graphs_of_layers_stay_finite_over_long_texts(as_on_gpu):
    models = [random_model(torch.float16, pack=False) for _ in range(2)]
    for layer in (layer for model in models for layer in model.layers):
        layer.mlp.w2.weight.mul_(300)  # states of some hundreds, as Llamas have them
    by_graphs = SamplingConfig(temperature=0.8, top_k=40, seed=5)  # needs all logits: call by call
    runner = Runner(models[0], 250, max_rows=8)
    found = tokens_of(runner, [1, 5, 9], "static:2", by_graphs, new=150).tokens
    assert set(AsOnGPU.replays) == {"layers"}
    without_graphs = Runner(models[1], 250, max_rows=8)
    without_graphs._graphs.on_gpu = False
    assert found == tokens_of(without_graphs, [1, 5, 9], "none", by_graphs, new=150).tokens


def test_changing_the_number_of_drafts_captures_nothing_new(as_on_gpu):
    class Changing(type(make_policy("static:2", 4))):
        drafts = itertools.cycle((1, 2, 3))

        def start_round(self, context):
            return DraftPlan((2,), next(self.drafts))

    runner = Runner(random_model(torch.float32, pack=False), 120, max_rows=4)
    found = tokens_of(runner, [1, 5, 9], Changing(2), SamplingConfig(), new=80)
    assert {len(step.drafted) for step in found.rounds[:-2]} == {1, 2, 3}
    assert AsOnGPU.captures == {"draft": 3, "verify": 1}


def test_graphs_that_were_not_replayed_for_longest_go(as_on_gpu, monkeypatch):
    class Graph:
        def __init__(self, program):
            self.replay = program
            graphs.add(self)

    class Changing(DraftPolicy):
        """Skips other sublayers every third round, so that each set comes often enough to be captured."""

        num_draft_tokens, rounds = 2, itertools.count()

        def start_round(self, context):
            skips = next(self.rounds) // 3
            return DraftPlan((), 2, frozenset(layer for layer in range(1, N_LAYER) if skips >> layer & 1))

    graphs, most = weakref.WeakSet(), []
    monkeypatch.setattr("decoding.graphs.PROGRAMS", 6)
    monkeypatch.setattr(as_on_gpu, "capture", lambda self, program: most.append(len(graphs)) or Graph(program))
    runner = Runner(random_model(torch.float32, pack=False), 200, max_rows=4)
    found = tokens_of(runner, [1, 5, 9], Changing(), SamplingConfig(), new=100)
    plain = tokens_of(CallByCall(runner.model, 200, max_rows=4), [1, 5, 9], "none", SamplingConfig(), new=100)
    assert found.tokens == plain.tokens
    assert len(most) > 12 and max(most) <= 6, "what is captured is given up again"


def test_times_of_plans_are_of_single_rounds_after_their_capture(as_on_gpu, monkeypatch):
    runner = Runner(random_model(torch.float32, pack=False), 60, max_rows=4)
    plans = [DraftPlan((depth,), 3, repeats=True) for depth in (1, 2)]
    runner.prefill([1, 5, 9])
    monkeypatch.setattr("decoding.calibrate.TURNS", 2)
    time_rounds(runner, make_policy("static:2", 4), plans, [1, 5, 9], SamplingConfig())
    assert AsOnGPU.captures["whole_round"] == 2 and AsOnGPU.replays["whole_round"] == 2 * (1 + 3)


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


def test_a_cache_that_another_runner_made_longer_is_used_from_the_next_text_on(as_on_gpu):
    model = random_model(torch.float32, pack=False)
    short = Runner(model, 40, max_rows=4)
    expected = tokens_of(short, [1, 5, 9], "static:2", SamplingConfig(), new=12).tokens
    before = short._graphs
    Runner(model, 400, max_rows=4)
    assert tokens_of(short, [1, 5, 9], "static:2", SamplingConfig(), new=12).tokens == expected
    assert short._graphs is not before, "a graph would read the freed cache"


def test_a_text_or_conversation_whose_cache_another_runner_replaced_ends_with_an_error(as_on_gpu):
    model = random_model(torch.float32, pack=False)
    runner, policy, prompt = Runner(model, 40, max_rows=4), make_policy("static:2", N_LAYER), [1, 5, 9]
    rounds = decode(runner, prompt, GenerateConfig(30), policy)
    prompt += [token for step in itertools.islice(rounds, 4) for token in step.tokens]
    Runner(model, 400, max_rows=4)
    with pytest.raises(RuntimeError, match="in the middle of a text"):
        next(rounds)
    with pytest.raises(ValueError, match="replaced the cache that held 3 tokens"):
        next(decode(runner, prompt, GenerateConfig(9), policy, cached=3))


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
