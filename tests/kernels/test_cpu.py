"""The CPU kernels against fp64 references, and the promise they exist for: a row's bits depend on that row alone.

Tolerances are relative to the largest reference value: fp32 1e-5 (rounding of long sums), bf16 1e-2 (one rounding of
the result to 8 bits of mantissa, two where Llama rounds in between).
"""

import pytest
import torch

from decoding.packed import PackedLayers, PackedModel
from drafting.plan import DraftPlan
from kernels import cpu
from kernels.attention import attention, attention_reference, new_cache, plain_keys
from kernels.exit_head import Draw, Exit, Head, exit_head, exit_stats_reference
from kernels.formats import quantise_int4, quantise_int8
from kernels.linear import is_packed, linear, pack, unpack_rows
from kernels.noise import gumbel_noise, uniform
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.swiglu import swiglu, swiglu_reference
from tests.helpers.models import largest_error
from tests.helpers.processes import OTHER_MACHINES, run_python

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 64)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture(scope="module", autouse=True)
def cpp_ops():
    reason = cpu.load()
    assert not reason or "build failed" not in reason, reason  # a compiler that is there must not be skipped over
    if reason:
        pytest.skip(f"C++ ops unavailable: {reason}")


@pytest.fixture(autouse=True)
def keep_threads_and_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def assert_rows_stand_alone(function, rows: torch.Tensor):
    """Every number of leading or trailing rows, on one or two threads, gives the bits of the whole call."""
    whole = function(rows)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for count in ROW_COUNTS:
            assert torch.equal(function(rows[:count]), whole[:count]), f"{count} first rows, {threads} threads"
            assert torch.equal(function(rows[-count:]), whole[-count:]), f"{count} last rows, {threads} threads"


@DTYPES
@pytest.mark.parametrize("n, k", [(1, 2), (32, 32), (100, 66), (257, 130), (768, 1024), (300, 1100)])
def test_linear_matches_fp64_and_rows_stand_alone(dtype, n, k):
    weight, x = torch.randn(n, k).to(dtype), torch.randn(70, k).to(dtype)
    packed = pack(weight)
    assert is_packed(packed) and not is_packed(weight)
    assert largest_error(linear(x, packed, n), x.double() @ weight.double().T) < TOLERANCE[dtype]
    assert_rows_stand_alone(lambda rows: linear(rows, packed, n), x)


@DTYPES
def test_linear_keeps_leading_dimensions_and_takes_plain_weights(dtype):
    weight, x = torch.randn(40, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    assert linear(x, pack(weight), 40).shape == (2, 3, 40)
    assert torch.equal(linear(x, weight, 40), torch.nn.functional.linear(x, weight))
    assert linear(x[:0], pack(weight), 40).shape == (0, 3, 40)


def test_odd_bf16_and_other_dtypes_stay_unpacked():
    for weight in (torch.randn(32, 7).bfloat16(), torch.randn(32, 8).double(), torch.ones(32, 8, dtype=torch.int8)):
        assert pack(weight) is weight
    assert is_packed(pack(torch.randn(32, 7)))


@DTYPES
def test_rows_of_a_packed_weight_are_the_embeddings(dtype):
    weight, ids = torch.randn(100, 24).to(dtype), torch.tensor([0, 31, 32, 99, 5, 5])
    assert torch.equal(unpack_rows(pack(weight), ids), weight[ids])


@DTYPES
@pytest.mark.parametrize("d", [1, 8, 100, 768])
def test_rms_norm_matches_fp64_and_rows_stand_alone(dtype, d):
    x, weight = torch.randn(70, d).to(dtype) * 3, torch.randn(d).to(dtype)
    x64 = x.double()
    reference = weight.double() * x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert largest_error(rms_norm(x, weight, 1e-5), reference) < TOLERANCE[dtype]
    assert_rows_stand_alone(lambda rows: rms_norm(rows, weight, 1e-5), x)


@DTYPES
@pytest.mark.parametrize("f", [1, 8, 100, 768])
def test_swiglu_matches_fp64_and_rows_stand_alone(dtype, f):
    gate_up = torch.randn(70, 2 * f).to(dtype) * 10
    gate, up = gate_up.double().chunk(2, -1)
    assert largest_error(swiglu(gate_up), torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]
    assert_rows_stand_alone(swiglu, gate_up)


def test_swiglu_stays_finite_at_extreme_gates():
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(swiglu(gate_up), torch.tensor([[0.0, 1e4, 0.0, 0.0]]))


def attention_inputs(dtype, heads, groups, e, rows, start, slots):
    q, k, v = (torch.randn(rows, n, e).to(dtype) for n in (heads, groups, groups))
    k_cache, v_cache = (cache.normal_() for cache in new_cache(groups, slots, e, dtype))
    return 2 * q, k, v, k_cache, v_cache, torch.arange(start, start + rows)


@DTYPES
@pytest.mark.parametrize("heads, groups, e", [(4, 4, 8), (6, 1, 48), (8, 2, 64), (4, 2, 128), (2, 1, 14)])
@pytest.mark.parametrize("rows, start", [(1, 0), (3, 62), (17, 500), (70, 0), (70, 490)])
def test_attention_matches_fp64(dtype, heads, groups, e, rows, start):
    q, k, v, k_cache, v_cache, positions = attention_inputs(dtype, heads, groups, e, rows, start, start + rows + 5)
    k64, v64 = plain_keys(k_cache).double(), v_cache.double()
    reference = attention_reference(q.double(), k.double(), v.double(), k64, v64, positions)
    assert largest_error(attention(q, k, v, k_cache, v_cache, positions), reference) < TOLERANCE[dtype]
    assert torch.equal(plain_keys(k_cache).double(), k64) and torch.equal(v_cache.double(), v64)


@DTYPES
@pytest.mark.parametrize("heads, groups, e", [(4, 4, 8), (6, 1, 48), (8, 2, 64), (4, 2, 128)])
@pytest.mark.parametrize("start", [0, 40, 480, 1000])
def test_attention_rows_do_not_see_row_count_threads_or_cache_length(dtype, heads, groups, e, start):
    rows = 66
    inputs = attention_inputs(dtype, heads, groups, e, rows, start, 1600)
    q, k, v, k_cache, v_cache, positions = inputs
    whole = attention(q, k, v, k_cache.clone(), v_cache.clone(), positions)
    for threads, step, slots in ((1, 1, 1600), (2, 1, 1088), (2, 2, 1120), (1, 5, 1600), (2, 9, 1600), (2, 17, 1216)):
        torch.set_num_threads(threads)
        caches = k_cache[:, : slots // 16].clone(), v_cache[:, :slots].clone()
        parts = [
            attention(q[i : i + step], k[i : i + step], v[i : i + step], *caches, positions[i : i + step])
            for i in range(0, rows, step)
        ]
        assert torch.equal(torch.cat(parts), whole), f"{threads} threads, {step} rows, {slots} slots"


@DTYPES
def test_padding_rows_write_nothing_and_change_no_other_row(dtype):
    q, k, v, k_cache, v_cache, positions = attention_inputs(dtype, 4, 2, 16, 3, 70, 224)
    caches = [k_cache.clone(), v_cache.clone()]
    expected = attention(q, k, v, k_cache, v_cache, positions)
    rows = torch.tensor([2, 0, 2, 1, 2, 2])  # rows 0, 2, 4 are padding
    padded = torch.tensor([-1, positions[0], -1, positions[1], -1, positions[2]])
    found = attention(q[rows], k[rows], v[rows], *caches, padded)
    assert torch.equal(found[1::2], expected) and not found[::2].any()
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


@DTYPES
def test_attention_never_reads_unused_slots_and_takes_slices_of_a_fused_projection(dtype):
    heads, groups, e, start = 4, 2, 16, 70
    q, k, v, k_cache, v_cache, positions = attention_inputs(dtype, heads, groups, e, 3, start, 224)
    clean = attention(q, k, v, k_cache.clone(), v_cache.clone(), positions)
    v_cache[:, start:] = float("nan")
    unused = torch.arange(224) >= start
    k_cache.masked_fill_(unused.view(14, 1, 16, *[1] * (k_cache.dim() == 5)), float("nan"))
    fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
    parts = fused.split([heads * e, groups * e, groups * e], dim=1)
    q, k, v = (part.view(3, -1, e) for part in parts)
    assert torch.equal(attention(q, k, v, k_cache, v_cache, positions), clean)


@DTYPES
@pytest.mark.parametrize("n_vocab, v, d", [(2, 2, 8), (33, 33, 16), (700, 1000, 48), (5000, 5000, 66)])
def test_exit_head_matches_fp64_and_its_token_is_the_argmax_of_the_logits(dtype, n_vocab, v, d):
    hidden, head = make_head(dtype, v, d)
    logits = head.logits(hidden)[:, :n_vocab]
    head = head._replace(n_vocab=n_vocab)  # the first n_vocab columns of a weight that has more
    tokens, stats, samples = exit_head(hidden, head)
    assert torch.equal(tokens, logits.argmax(-1)) and not len(samples)
    assert torch.allclose(stats.double(), torch.stack(exit_stats_reference(logits.double())[1:], -1), atol=2e-6)
    assert torch.equal(exit_head(hidden, head, want_stats=False)[0], tokens)


def make_head(dtype, v: int, d: int) -> tuple[torch.Tensor, Head]:
    """16 rows of hidden states and a packed head whose logits have a standard deviation of 2."""
    weight = (torch.randn(v, d) * 3.5 / d**0.5).to(dtype)
    return torch.randn(16, d).to(dtype), Head(torch.rand(d).to(dtype), 1e-5, pack(weight), None, v)


@DTYPES
@pytest.mark.parametrize("v, d", [(33, 16), (5000, 66)])
def test_every_answer_of_the_exit_head_is_the_same_alone_among_rows_on_threads_and_with_other_answers(dtype, v, d):
    hidden, head = make_head(dtype, v, d)
    draw = Draw(70, 2**40 + 5, 0.7)
    tokens, stats, samples = exit_head(hidden, head, draw=draw)
    assert not torch.equal(tokens, samples)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for first, rows in [(0, rows) for rows in ROW_COUNTS[:10]] + [(i, 1) for i in range(16)]:
            some, these = hidden[first : first + rows], slice(first, first + rows)
            part = exit_head(some, head, draw=draw._replace(positions=70 + first))
            for one, whole in zip(part, (tokens, stats, samples), strict=True):
                assert torch.equal(one, whole[these]), (threads, first, rows)
    for want_stats, given in ((False, None), (True, None), (False, draw)):
        found = exit_head(hidden, head, want_stats, given)
        assert torch.equal(found[0], tokens)
        assert torch.equal(found[1], stats[: 16 * want_stats]) and torch.equal(found[2], samples[: 16 * bool(given)])


@DTYPES
@pytest.mark.parametrize("temperature", [1e-6, 0.6, 1.0, 30.0])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
def test_samples_are_the_largest_of_logit_over_temperature_plus_the_noise_of_the_reference(dtype, temperature, seed):
    """In fp64, but for scores that rounding can swap; the hash must be the reference's to the bit for any of this."""
    hidden, head = make_head(dtype, 5000, 64)
    logits = head.logits(hidden).double()
    for position in (0, 131071, 2**31 - 3):
        samples = exit_head(hidden, head, False, Draw(position, seed, temperature))[2]
        uniforms = torch.stack([uniform(seed, position + i, torch.arange(5000)) for i in range(16)]).double()
        scores = logits / torch.tensor(temperature).double() - (-uniforms.log()).log()
        best, chosen = scores.amax(-1), scores.gather(1, samples[:, None])[:, 0]
        assert (best - chosen <= 3e-7 * best.abs().clamp(min=1)).all()
        if temperature > 1e-3:
            assert (samples == scores.argmax(-1)).sum() >= 15 and len(set(samples.tolist())) > 8


@DTYPES
def test_exit_head_gives_ties_to_the_lowest_token_and_survives_extreme_logits(dtype):
    weight, norm, row = torch.zeros(600, 8, dtype=dtype), torch.ones(8, dtype=dtype), torch.ones(1, 8, dtype=dtype)
    weight[[70, 300, 599]] = 1e4
    found = Exit(row, Head(norm, 1e-5, pack(weight), None, 600), 1, Draw(5, 1, 1e-6))  # of 8e10: noise is lost
    stats = found.stats()
    assert stats.tokens.tolist() == [70] and stats.margin.item() == 0 and found.samples().tolist() == [70]
    assert abs(stats.top1.item() - 1 / 3) < 1e-6 and abs(stats.entropy.item() - 1.0986123) < 1e-5
    plain = Exit(row, Head(norm, 1e-5, weight, None, 600), rows=1)
    assert plain.tokens() == [70] and abs(plain.stats().top1.item() - 1 / 3) < 1e-3


def test_an_exit_runs_the_head_once_for_all_that_is_asked_of_it(monkeypatch):
    passes = []

    def counted(*arguments):
        passes.append(arguments)
        return exit_head(*arguments)

    monkeypatch.setattr("kernels.exit_head.exit_head", counted)
    hidden, head = make_head(torch.bfloat16, 100, 16)
    for first in ("stats", "samples"):
        exit, passes[:] = Exit(hidden, head, 5, Draw(3, 1, 1.0)), []
        assert exit.has_fused_head() and not exit.asked
        assert getattr(exit, first)() is getattr(exit, first)() and exit.asked
        tokens, samples = exit.tokens(), exit.samples().tolist()
        assert len(tokens) == len(samples) == 5 and len(passes) == 1
    on_device = Draw(3, 1, 1.0).on(hidden.device, 5)
    assert on_device.positions.tolist() == [3, 4, 5, 6, 7]
    assert Exit(hidden, head, 5, on_device).samples().tolist() == samples
    exit = Exit(hidden, head, 5)
    assert exit.logits().shape == (5, 100) and exit.asked and exit.tokens() == tokens
    with pytest.raises(ValueError, match="got draw None"):
        exit.samples()
    exit.draw = Draw(3, 1, 1.0)  # given late: the choice is the same, whatever was asked before
    assert exit.samples().tolist() == samples


FORMATS = {
    "packed bf16": (torch.bfloat16, pack),
    "packed fp32": (torch.float32, pack),
    "plain": (torch.float32, lambda weight: weight),
}


@pytest.mark.parametrize("name", [*FORMATS, "int8", "int4"])
def test_a_trimmed_head_says_what_the_first_columns_of_the_whole_head_say(name):
    dtype, prepare = FORMATS.get(name, (torch.bfloat16, None))
    hidden, weight, norm, scale = torch.randn(4, 64).to(dtype), torch.randn(150, 64).to(dtype), torch.ones(64), None
    if prepare:
        weight = prepare(weight)
    else:
        weight, scale = quantise_int8(weight) if name == "int8" else quantise_int4(weight)
    head, draw = Head(norm.to(dtype), 1e-5, weight, scale, 150), Draw(9, 4, 1.3)
    for n in (2, 15, 16, 17, 32, 100, 149, 150):
        small, first = head.trimmed(n), head.logits(hidden)[:, :n]
        assert small.weight.data_ptr() == weight.data_ptr(), "a copy"
        logits = Exit(hidden, small, 4).logits()
        if not is_packed(weight):
            assert torch.allclose(logits, first, 1e-2, 1e-2)
        else:
            exit = Exit(hidden, small, 4, draw)
            assert torch.equal(logits, first)
            assert exit.tokens() == first.argmax(-1).tolist()
            expected = exit_stats_reference(first)
            assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(exit.stats()[1:], expected[1:], strict=True))
            noise = torch.stack([gumbel_noise(4, 9 + i, torch.arange(n)) for i in range(4)])
            assert exit.samples().tolist() == (first / 1.3 + noise).argmax(-1).tolist()
    for wrong in (1, 0, 151):
        with pytest.raises(ValueError, match=rf"n_vocab must be in 2\.\.150, got {wrong}"):
            head.trimmed(wrong)


def test_wrong_arguments_raise_a_clear_error():
    weight, x = pack(torch.randn(40, 16)), torch.randn(2, 16)
    with pytest.raises(RuntimeError, match="features"):
        linear(torch.randn(2, 8), weight, 40)
    with pytest.raises(RuntimeError, match="out_features must be in 33..64"):
        linear(x, weight, 65)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), weight, 40)
    with pytest.raises(RuntimeError, match="features"):
        rms_norm(x, torch.ones(8), 1e-5)
    q, k, v, k_cache, v_cache, positions = attention_inputs(torch.float32, 4, 2, 8, 3, 5, 10)
    for wrong in (positions + 25, positions - 7):
        with pytest.raises(RuntimeError, match=r"positions must be in 0\.\.31"):
            attention(q, k, v, k_cache, v_cache, wrong)


def make_layers(dtype, n_layer: int, d: int, f: int, heads: int, groups: int, e: int, slots: int) -> PackedLayers:
    shapes = ((heads + 2 * groups) * e, d), (d, heads * e), (2 * f, d), (d, f)
    layers = []
    for _ in range(n_layer):
        wqkv, wo, w13, w2 = (pack((torch.randn(shape) / shape[1] ** 0.5).to(dtype)) for shape in shapes)
        norm = torch.ones(d, dtype=dtype)
        layers.append((norm, wqkv, wo, norm, w13, w2, *new_cache(groups, slots, e, dtype)))
    angles = torch.rand(slots, 1, e)
    return PackedLayers(layers, angles.cos(), angles.sin(), heads, 1e-5)


@DTYPES
def test_layers_have_the_same_bits_with_any_team_of_threads(dtype):
    """Large enough that every stage of a layer is shared out, and that long contexts are split into segments."""
    d, n_layer = 256, 3
    packed = make_layers(dtype, n_layer, d, f=512, heads=8, groups=2, e=32, slots=1312)
    hidden = torch.randn(1216, d).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parts = [packed.run(hidden[:1100], 0, 0, n_layer)]  # a prefill, then calls of 1, 4 and 16 rows
        for rows in (1, 4, 16):
            first = 1100 + rows
            parts.append(packed.run(hidden[first : first + rows], first, 0, 1))
            parts.append(packed.run(parts[-1], first, 1, n_layer))
        results.append(torch.cat(parts))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


ROUNDS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 2**33},
    "trimmed": {"draft_vocab": 40},
    "proposed": {"proposed": (7, 199, 0, 12)},
    "sampled, trimmed": {"temperature": 1.1, "seed": 3, "draft_vocab": 41},
    "sampled, proposed": {"temperature": 0.5, "seed": 1, "proposed": (7, 3)},
}


@DTYPES
@pytest.mark.parametrize("settings", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("drafts", [0, 4])
def test_a_round_in_one_call_says_what_it_says_call_by_call(dtype, drafts, settings):
    exit_layer, position, token = 1, 20, 5
    layers = make_layers(dtype, n_layer=3, d=64, f=96, heads=4, groups=2, e=16, slots=64)
    _, head = make_head(dtype, 200, 64)
    embedding = torch.randn(200, 64).to(dtype)
    layers.run(embedding[torch.arange(position)], 0, 0, 3)  # a prompt
    settings = dict(settings)
    draft_head = head.trimmed(settings.pop("draft_vocab", 200))
    plan = DraftPlan((exit_layer,), drafts)
    found, other = (
        PackedModel(layers, rows, head, draft_head=draft_head).play_round(plan, token, position, drafts, **settings)
        for rows in (embedding, pack(embedding))
    )
    assert other[:-1] == found[:-1]
    temperature, proposed = settings.get("temperature"), settings.get("proposed", ())

    def choose(hidden, which, position):
        exit = Exit(hidden, which, len(hidden), Draw(position, settings["seed"], temperature) if temperature else None)
        return (exit.samples() if temperature else exit.token_ids()).tolist()

    drafted, rows = list(proposed), [token]
    for i in range(0 if proposed else drafts):
        hidden = layers.run(embedding[rows[-1:]], position + i, 0, exit_layer)
        drafted += choose(hidden, draft_head, position + i + 1)
        rows.append(drafted[-1])
    hidden = layers.run(embedding[[token, *drafted]], position, 0, 3)
    assert found.drafted == drafted and found.chosen == choose(hidden, head, position + 1)
    made = 0 if proposed else len(drafted)
    assert (found.layers, found.heads, found.skipped) == (3 + made * exit_layer, made, (0, 0))


def test_a_round_of_tokens_or_numbers_that_do_not_exist_raises_a_clear_error():
    layers = make_layers(torch.float32, n_layer=1, d=64, f=96, heads=4, groups=2, e=16, slots=32)
    _, head = make_head(torch.float32, 50, 64)

    def play(exits=(1,), skip_mlp=(), draft_head=None, drafts=2, **settings):
        model = PackedModel(layers, torch.randn(50, 64), head, draft_head=draft_head)
        plan = DraftPlan(exits, drafts, skip_mlp=frozenset(skip_mlp), exit_if=settings.pop("exit_if", None))
        return model.play_round(plan, 1, 28, 2, **settings)

    assert len(play().chosen) == 3 and len(play(proposed=[4, 2, 0]).chosen) == 4
    for settings, message in (
        ({"proposed": (1, 50)}, "proposed token must be in 0..49, got 50"),
        ({"proposed": (1,) * 4}, "positions"),
        ({"proposed": (-1,)}, "got -1"),
        ({"draft_head": head._replace(n_vocab=51)}, "draft_vocab must be in 1..50"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1.0, "seed": -1}, "seed must be 0 or more"),
        ({"exits": (2,)}, "exits must ascend in 1..1"),
        ({"drafts": 0}, "drafts need an exit"),
        ({"exits": (1, 2)}, "several exits need a rule to exit"),
        ({"exit_if": (5, 0.0)}, "no rules to exit and to go on have the measures 5 and -1"),
        ({"skip_mlp": (1,)}, "skips must be in 0..1, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            play(**settings)


def test_layers_that_do_not_fit_and_positions_that_do_not_exist_raise_a_clear_error():
    def layer(d=64, f=96, slots=32):
        weights = [
            torch.ones(d),
            torch.randn(128, d),
            torch.randn(d, 64),
            torch.ones(d),
            torch.randn(2 * f, d),
            torch.randn(d, f),
        ]
        return tuple(pack(w) if w.dim() == 2 else w for w in weights) + new_cache(2, slots, 16, torch.float32)

    cos = torch.ones(32, 1, 16)
    layers, hidden = PackedLayers([layer(), layer()], cos, cos, 4, 1e-5), torch.randn(3, 64)
    assert layers.run(hidden, 29, 0, 2).shape == (3, 64)
    assert torch.equal(layers.run(hidden, 0, 0, 2, skip_attention=(0, 1), skip_mlp=(0, 1)), hidden)
    for wrong in (
        (hidden, 30, 0, 2),
        (hidden, -1, 0, 2),
        (hidden, 0, 0, 3),
        (hidden[:, :32].contiguous(), 0, 0, 2),
        (hidden.bfloat16(), 0, 0, 2),
    ):
        with pytest.raises(RuntimeError, match="layers: "):
            layers.run(*wrong)
    for other in (layer(d=32), layer(slots=64), layer()[:7] + (torch.zeros(2, 32, 8),)):
        with pytest.raises(RuntimeError, match="layer_table: "):
            PackedLayers([layer(), other], cos, cos, 4, 1e-5)
    with pytest.raises(RuntimeError, match="n_vocab must be in 1..64"):
        exit_head(hidden, Head(torch.ones(64), 1e-5, pack(torch.randn(50, 64)), None, 65))


def test_references_are_used_and_differentiable_where_gradients_are_needed():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    swiglu(rms_norm(x, weight, 1e-5)).sum().backward()
    assert x.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
    assert torch.allclose(rms_norm(x.detach(), weight.detach(), 1e-5), rms_norm_reference(x, weight, 1e-5), atol=1e-6)
    assert torch.allclose(swiglu(x.detach()), swiglu_reference(x), atol=1e-6)


def block(x, norm, qkv, gate_up, k_cache, v_cache, positions):
    """A little of everything, as a transformer block combines it."""
    q, k, v = linear(rms_norm(x, norm, 1e-5), qkv, 128).split([64, 32, 32], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in (q, k, v))
    x = x + attention(q, k, v, k_cache, v_cache, positions).flatten(1)
    return x + swiglu(linear(x, gate_up, 128))


@DTYPES
def test_compiled_equals_eager_bit_for_bit_and_the_caches_are_not_cloned(dtype):
    from torch._inductor.utils import run_and_get_code  # test only

    weights = [torch.rand(64).to(dtype)] + [pack(torch.randn(128, 64).to(dtype) / 8) for _ in range(2)]
    x, positions = torch.randn(3, 64).to(dtype), torch.tensor([4, 5, 6])
    caches = new_cache(2, 32, 16, dtype)
    compiled_caches = [cache.clone() for cache in caches]
    with torch.no_grad():
        expected = block(x, *weights, *caches, positions)
        compiled = torch.compile(block, fullgraph=True, dynamic=False)
        result, code = run_and_get_code(compiled, x, *weights, *compiled_caches, positions)
    assert torch.equal(result, expected)
    assert all(torch.equal(one, other) for one, other in zip(compiled_caches, caches, strict=True))
    for shape in ("(2, 32, 16)", "(2, 2, 8, 16, 2)", "(2, 2, 16, 16)"):
        assert f"empty_strided_cpu({shape}" not in "".join(code), "Inductor allocates a copy of a cache"


WITHOUT_CPP = """
import torch
from kernels import cpu
from kernels.attention import attention
from kernels.linear import linear, pack
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu
reason = cpu.load(print)
assert reason and "\\n" not in reason and not cpu.loaded() and cpu.load() == reason
weight, x, cache = torch.randn(64, 32), torch.randn(3, 32), torch.zeros(2, 8, 8)
assert pack(weight) is weight
y = rms_norm(swiglu(linear(x, pack(weight), 64)), torch.ones(32), 1e-5).view(3, 4, 8)
print(attention(y, y[:, :2], y[:, :2], cache, cache.clone(), torch.tensor([0, 1, 2])).shape, reason)
"""


def test_without_the_ops_load_says_why_and_everything_computes():
    result = run_python(WITHOUT_CPP, SKIPFAST_NO_CPP="1")
    assert result.returncode == 0, result.stderr
    assert "torch.Size([3, 4, 8])" in result.stdout and "SKIPFAST_NO_CPP" in result.stdout


def test_a_failed_build_is_one_line(tmp_path):
    compiler = tmp_path / "broken++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: no luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = run_python(WITHOUT_CPP, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "building CPU kernels" in result.stdout and "error: no luck" in result.stdout
    assert not list(tmp_path.glob("skipfast/*"))


OTHER_INSTRUCTIONS = """
import torch
from kernels import cpu
from kernels.attention import attention, new_cache
from kernels.exit_head import Draw, Head, exit_head
from kernels.linear import linear, pack
from kernels.noise import gumbel_noise
assert cpu.load() is None, cpu.load()
for dtype in (torch.bfloat16, torch.float32):
    x, weight = torch.randn(70, 130).to(dtype), torch.randn(100, 130).to(dtype)
    whole, caches = linear(x, pack(weight), 100), [cache.normal_() for cache in new_cache(2, 600, 24, dtype)]
    assert (whole - x.double() @ weight.double().T).abs().max() < (0.2 if dtype == torch.bfloat16 else 1e-3)
    assert all(torch.equal(linear(x[:n], pack(weight), 100), whole[:n]) for n in range(1, 70))
    q, k, positions = torch.randn(70, 4, 24).to(dtype), torch.randn(70, 2, 24).to(dtype), torch.arange(500, 570)
    whole = attention(q, k, k, *(cache.clone() for cache in caches), positions)
    rows = [attention(q[i:i + 1], k[i:i + 1], k[i:i + 1], *caches, positions[i:i + 1]) for i in range(70)]
    assert torch.equal(torch.cat(rows), whole)
    head, draw = Head(torch.ones(130, dtype=dtype), 1e-5, pack(weight / 4), None, 100), Draw(500, 7, 0.9)
    whole = exit_head(x, head, draw=draw)
    rows = [exit_head(x[i:i + 1], head, draw=Draw(500 + i, 7, 0.9)) for i in range(70)]
    assert all(torch.equal(torch.cat(parts), one) for parts, one in zip(zip(*rows), whole))
    noise = torch.stack([gumbel_noise(7, 500 + i, torch.arange(100)) for i in range(70)])
    logits = head.logits(x)
    assert torch.equal(whole[0], logits.argmax(-1)) and torch.equal(whole[2], (logits / 0.9 + noise).argmax(-1))
"""


@pytest.mark.parametrize("needs, march", OTHER_MACHINES.values(), ids=OTHER_MACHINES)
def test_rows_stand_alone_with_older_instructions_too(needs, march):
    if needs not in cpu.build._cpu_flags():
        pytest.skip(f"this processor has no {needs}")
    result = run_python(OTHER_INSTRUCTIONS, SKIPFAST_MARCH=march)
    assert result.returncode == 0, result.stderr
