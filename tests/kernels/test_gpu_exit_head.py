"""The Triton exit head under Triton's interpreter: against fp64, row by row, and against the sampler of the project.

Inputs are small multiples of powers of two, so every fp32 sum is exact whatever its order: the bf16 logits are known to
the bit, ties and all, and tokens can be compared without a tolerance.
"""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from decoding import sampling  # noqa: E402
from kernels.exit_head import exit_stats_reference  # noqa: E402
from kernels.gpu import exit_head, tiles  # noqa: E402
from kernels.gpu.exit_head import Draw, launch, merge  # noqa: E402
from tests.helpers.gpu import run_backwards  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not tiles.INTERPRETED, reason="triton was imported without TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on unused rows, whose results are not stored
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])


@pytest.fixture(autouse=True)
def seed_and_poison(monkeypatch):
    """Fresh memory holds garbage: an element nobody wrote cannot look right."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    assert not tiles.tickets_of(torch.device("cpu")).any(), "a call left its ticket behind"


def make_rows(m: int, d: int) -> Tensor:
    return (torch.randint(-3, 4, (m, d)) / 4).bfloat16()


def make_head(dtype: torch.dtype, v: int, d: int) -> tuple[Tensor, Tensor | None]:
    """A weight and its scale; logits have a standard deviation of about 2."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, (v, d), dtype=torch.int8), (torch.rand(v) + 0.5) * 0.05 / math.sqrt(d)
    return (torch.randint(-16, 17, (v, d)) * 2.0 ** round(math.log2(0.4 / math.sqrt(d)))).bfloat16(), None


def make_draw(m: int, temperature: float = 0.8, seed: int = 2**40 + 12345) -> Draw:
    positions = torch.randint(0, 2**17, (m,))
    return Draw(positions, torch.tensor([seed]), torch.tensor([temperature]))


def exact_logits(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """fp32 logits that are bf16 numbers: exact sums, one rounding by the scale, one to bf16."""
    sums = (x.double() @ weight.double().T).float()
    return (sums if scale is None else sums * scale).bfloat16().float()


def assert_close_to_fp64(stats: Tensor, logits: Tensor):
    expected = torch.stack(exit_stats_reference(logits.double())[1:], -1)
    assert torch.allclose(stats.double(), expected, rtol=2e-6, atol=2e-6), (stats - expected).abs().amax(0)


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)


def chosen(logits: Tensor, draw: Draw) -> list[int]:
    """What the sampler of the project draws, in full fp32 and with scores far enough apart to leave no doubt."""
    config = sampling.SamplingConfig(temperature=draw.temperature.item(), seed=draw.seed.item())
    ids = torch.arange(logits.shape[1])
    for row, position in zip(logits, draw.positions.tolist(), strict=True):
        best = (row / config.temperature + sampling.gumbel_noise(config.seed, position, ids)).topk(2).values
        assert best[0] - best[1] > 1e-5, "choose another seed: the test cannot tell these two scores apart"
    return [
        sampling.choose(row, position, config) for row, position in zip(logits, draw.positions.tolist(), strict=True)
    ]


# ---- right ----


@DTYPES
@pytest.mark.parametrize(
    "m, v, n_vocab, d, programs",
    [
        (1, 1000, 1000, 256, 5),
        (2, 333, 333, 64, None),
        (3, 1025, 1025, 200, 1),
        (5, 640, 640, 256, 3),
        (7, 1000, 517, 128, 100),
        (8, 200, 63, 256, 4),
        (15, 1500, 1499, 256, 7),
        (16, 70, 2, 512, 2),
        (16, 300, 65, 72, 2),
    ],
)
def test_tokens_and_statistics_match_fp64_at_odd_shapes(dtype, m, v, n_vocab, d, programs):
    x, (weight, scale) = make_rows(m, d), make_head(dtype, v, d)
    draw = make_draw(m)
    logits = exact_logits(x, weight, scale)[:, :n_vocab]
    tokens, stats, samples = launch(x, weight, scale, n_vocab, 0, draw, programs)[1]
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert_close_to_fp64(stats, logits)
    assert samples.tolist() == chosen(logits, draw)
    assert_same(launch(x, weight, scale, n_vocab, 0, None, programs)[1], (tokens, stats, samples[:0]))


@DTYPES
def test_arbitrary_inputs_match_fp64_up_to_the_rounding_of_logits(dtype):
    x, (weight, scale) = torch.randn(16, 384).bfloat16(), make_head(dtype, 1000, 384)
    if scale is None:
        weight = (torch.randn(1000, 384) * 0.1).bfloat16()
    logits = x.double() @ weight.double().T * (1 if scale is None else scale.double())
    tokens, stats, _ = launch(x, weight, scale, 1000, 0, None, 3)[1]
    top = logits.amax(-1)
    assert (top - logits.gather(1, tokens[:, None])[:, 0] <= top * 2**-7).all()
    rounded = torch.stack(exit_stats_reference(logits.bfloat16().double())[1:], -1)
    assert torch.allclose(stats.double(), rounded, rtol=0, atol=5e-3)  # some logits round the other way


def test_ties_go_to_the_lowest_id_inside_a_tile_across_tiles_and_across_programs():
    x, weight = make_rows(16, 64), make_head(torch.bfloat16, 700, 64)[0]
    for row, (first, again) in enumerate([(0, 699), (3, 4), (63, 64), (64, 65), (10, 74), (5, 133), (127, 640)]):
        x[row] = 0
        x[row, row] = 1
        weight[:, row] = 0
        weight[first, row] = weight[again, row] = 8
    logits = exact_logits(x, weight, None)
    for programs in (1, 3, 11):
        tokens, stats, _ = launch(x, weight, None, 700, 1000, None, programs)[1]
        assert tokens[:7].tolist() == [1000 + first for first in (0, 3, 63, 64, 10, 5, 127)]
        assert tokens.tolist() == (1000 + logits.argmax(-1)).tolist()
        assert (stats[:7, 1] == 0).all()


@DTYPES
def test_rows_of_equal_logits_and_peaked_rows_have_their_exact_statistics(dtype):
    x, (weight, scale) = make_rows(3, 64), make_head(dtype, 200, 64)
    x[:2], weight[:, :2] = 0, 0
    x[1, 0], weight[130, 0] = 4, 100  # one logit far above the others
    x[2] = 0
    x[2, 1], weight[:, 1] = -4, 100  # all equal and far below zero
    scale = None if scale is None else torch.full_like(scale, 0.5)
    logits = exact_logits(x, weight, scale)
    tokens, stats, _ = launch(x, weight, scale, 200, 7, None, 2)[1]
    assert tokens.tolist() == [7, 137, 7]
    assert_close_to_fp64(stats, logits)
    assert stats[1].tolist() == [1, 1, 0, logits[1].max()]
    assert stats[[0, 2], 1].tolist() == [0, 0]


@DTYPES
def test_rows_of_the_weight_behind_n_vocab_are_never_used(dtype):
    x, (weight, scale) = make_rows(4, 64), make_head(dtype, 300, 64)
    draw = make_draw(4)
    expected = launch(x, weight[:130].clone(), None if scale is None else scale[:130].clone(), 130, 0, draw, 2)[1]
    if scale is None:
        weight[130:] = float("nan")
    else:
        scale[130:] = float("nan")
    assert_same(launch(x, weight, scale, 130, 0, draw, 2)[1], expected)


def test_logits_that_are_not_numbers_still_give_a_token_and_show_in_the_statistics():
    x, weight = make_rows(3, 64), make_head(torch.bfloat16, 200, 64)[0]
    draw = make_draw(3, temperature=2.0)
    expected = launch(x, weight, None, 200, 50, draw, 2)[1]
    x[1] = float("nan")
    tokens, stats, samples = launch(x, weight, None, 200, 50, draw, 2)[1]
    assert 50 <= tokens[1] < 250 and 50 <= samples[1] < 250 and stats[1].isnan().all()
    for result, others in zip((tokens, stats, samples), expected, strict=True):
        assert torch.equal(result[[0, 2]], others[[0, 2]])


@triton.jit
def last_tile_kernel(x, weight, scale, first, out, D: tl.constexpr):
    logits = exit_head.tile_logits(x, weight, scale, first + tl.arange(0, 64), 1, D, 16, 64, 128, True)
    tl.store(out + tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :], logits)


def test_weights_of_more_than_two_to_the_31_elements_are_addressed(monkeypatch):
    monkeypatch.undo()  # never touched, most of these pages exist in name only
    v, d = 2**31 // 256 + 64, 256
    weight, scale = torch.empty(v, d, dtype=torch.int8), torch.empty(v)
    weight[-64:], scale[-64:] = make_head(torch.int8, 64, d)
    x, out = make_rows(1, d), torch.full((16, 64), float("nan"))
    last_tile_kernel[(1,)](x, weight, scale, v - 64, out, D=d)
    assert torch.equal(out[:1], exact_logits(x, weight[-64:], scale[-64:]))


# ---- the same bits ----


@DTYPES
def test_the_bits_of_a_row_do_not_depend_on_the_other_rows_or_their_number(dtype):
    x, (weight, scale) = torch.randn(16, 256).bfloat16(), make_head(dtype, 517, 256)
    draw = make_draw(16)

    def run(rows: slice):
        return launch(x[rows], weight, scale, 517, 0, draw._replace(positions=draw.positions[rows]), 4)[1]

    whole = run(slice(None))
    alone = [slice(row, row + 1) for row in (0, 7, 15)]
    for rows in [*alone, *(slice(count) for count in (2, 3, 8, 15)), *(slice(-count, None) for count in (2, 5, 7, 15))]:
        assert_same(run(rows), [result[rows] for result in whole])
    assert_same(run(slice(None)), whole)


def test_the_order_in_which_programs_come_changes_no_bit(monkeypatch):
    x, (weight, scale) = torch.randn(3, 64).bfloat16(), make_head(torch.int8, 700, 64)
    draw = make_draw(3)
    expected = launch(x, weight, scale, 700, 0, draw, 6)[1]
    run_backwards(monkeypatch)
    assert_same(launch(x, weight, scale, 700, 0, draw, 6)[1], expected)


def test_tokens_samples_and_largest_logits_do_not_depend_on_the_number_of_programs():
    x, (weight, scale) = torch.randn(5, 32).bfloat16(), make_head(torch.int8, 4200, 32)
    draw = make_draw(5)
    (values, ids), expected = launch(x, weight, scale, 4200, 0, draw, 1)
    for programs in (5, 1000):  # the second: one per tile, and more than one step of slots for the last program
        (other_values, other_ids), results = launch(x, weight, scale, 4200, 0, draw, programs)
        assert other_values.shape == (5, 5, min(programs, triton.cdiv(4200, exit_head.tile_of(torch.int8).n)) + 1)
        assert other_values.shape[2] > exit_head.SLOTS + 1 or programs == 5
        assert torch.equal(other_ids[..., -1], ids[..., -1])
        assert torch.equal(other_values[[0, 1, 4], :, -1], values[[0, 1, 4], :, -1])
        assert_same(results[::2], expected[::2])
        assert torch.allclose(results[1], expected[1], rtol=2e-6, atol=2e-6)


# ---- partials and ranks ----


@DTYPES
@pytest.mark.parametrize("sample", [False, True])
def test_merging_the_slots_in_torch_gives_what_the_last_program_gives(dtype, sample):
    x, (weight, scale) = make_rows(3, 64), make_head(dtype, 700, 64)
    draw = make_draw(3) if sample else None
    (values, ids), (tokens, stats, samples) = launch(x, weight, scale, 700, 20, draw, 6)
    assert not values.isnan().any() and (ids >= 20).all() and (ids < 720).all()
    for slots in (slice(-1), slice(-1, None)):  # those of the programs, and the one that holds their merge
        merged = merge(values[..., slots], ids[..., slots])
        assert_same(merged[::2], (tokens, samples))
        assert torch.allclose(merged[1], stats, rtol=1e-6, atol=1e-6)


@DTYPES
def test_shards_of_the_vocabulary_merge_to_the_whole_in_any_order(dtype):
    x, (weight, scale) = make_rows(4, 64), make_head(dtype, 500, 64)
    weight[450], weight[451] = weight[20], weight[21]  # ties across shards
    if scale is not None:
        scale[450], scale[451] = scale[20], scale[21]
    x[0], weight[:, 0] = 0, 0
    x[0, 0], weight[[21, 451], 0] = 2, 100
    draw = make_draw(4)
    whole = launch(x, weight, scale, 500, 0, draw, 5)[1]
    assert whole[0][0] == 21
    kernel, reference = [], []
    for start, end in ((300, 500), (0, 170), (170, 300)):
        shard = weight[start:end].clone(), None if scale is None else scale[start:end].clone(), end - start, start
        kernel.append([partial[..., -1:] for partial in launch(x, *shard, draw, 3)[0]])
        reference.append(torch.ops.skipfast.exit_head_partials(x, *shard, *draw))
        for left, right in zip(kernel[-1], reference[-1], strict=True):
            assert left.shape == right.shape and torch.allclose(left, right, rtol=1e-6, atol=1e-5)
    for ranks in (kernel, reference):
        tokens, stats, samples = merge(*(torch.cat(partials, -1) for partials in zip(*ranks, strict=True)))
        assert_same((tokens, samples), whole[::2])
        assert torch.allclose(stats, whole[1], rtol=2e-6, atol=2e-6)


# ---- noise ----


@triton.jit
def uniform_kernel(seed, positions, ids, out, n, N: tl.constexpr):
    first, second = exit_head.row_keys(tl.load(seed), tl.load(positions + tl.arange(0, 16)))
    lane = tl.arange(0, N)
    values = exit_head.uniform(first[:, None], second[:, None], tl.load(ids + lane, mask=lane < n)[None, :])
    tl.store(out + tl.arange(0, 16)[:, None] * n + lane[None, :], values, mask=(lane < n)[None, :])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x7FFF_FFFF_FFFF_FFFF, 0x1234_5678_9ABC_DEF0])
def test_uniforms_equal_those_of_the_sampler_to_the_bit(seed):
    positions = torch.tensor([0, 1, 2, 3, 127, 4096, 131071, 131072, *torch.randint(0, 2**31, (6,)), 2**31, 2**40 + 3])
    ids = torch.cat([torch.arange(300), torch.randint(0, 2**18, (200,)), torch.tensor([2**31 - 1])])
    out = torch.full((16, len(ids)), float("nan"))
    uniform_kernel[(1,)](torch.tensor([seed]), positions, ids.int(), out, len(ids), N=512)
    for position, row in zip(positions.tolist(), out, strict=True):
        noise = sampling.gumbel_noise(seed, position, ids)
        assert torch.equal(-torch.log(-torch.log(row)), noise)
        assert torch.equal(sampling.gumbel_noise(torch.tensor([seed]), torch.tensor(position), ids), noise)


def test_equal_noisy_scores_give_the_sample_with_the_lowest_id():
    x, weight = torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(4200, 16, dtype=torch.bfloat16)
    x[:, 0], weight[:, 0] = 1, 2**15
    x[1, 0] = 2**-8
    draw = make_draw(3, temperature=1e-6)  # scores of 3e10, where fp32 has steps of 2048, and of 1e8: steps of 8
    config = sampling.SamplingConfig(temperature=1e-6, seed=draw.seed.item())
    expected = [
        sampling.choose(logits, position, config)
        for logits, position in zip(exact_logits(x, weight, None), draw.positions.tolist(), strict=True)
    ]
    assert expected[0] == expected[2] == 0 < expected[1]
    for programs in (2, 1000):  # ties within a program's lanes, and between the steps of the last program
        tokens, _, samples = launch(x, weight, None, 4200, 0, draw, programs)[1]
        assert tokens.tolist() == [0, 0, 0] and samples.tolist() == expected


def test_samples_have_the_frequencies_of_softmax():
    calls, temperature = 40, 1.3
    weight = torch.zeros(9, 16, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([0.0, 1, -1, 2, 0.5, -2, 1.5, -0.5, 0.25])
    x = torch.zeros(16, 16, dtype=torch.bfloat16)
    x[:, 0] = 1
    drawn = []
    for call in range(calls):
        draw = Draw(torch.arange(16) + 16 * call, torch.tensor([99]), torch.tensor([temperature]))
        drawn.append(launch(x, weight, None, 9, 0, draw)[1][2])
    expected = (weight[:, 0].float() / temperature).softmax(-1) * 16 * calls
    counts = torch.cat(drawn).bincount(minlength=9)
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom: 1 in 1000


# ---- the operators ----


@DTYPES
@pytest.mark.parametrize("sample", [False, True])
def test_the_operators_on_a_cpu_answer_as_the_kernel(dtype, sample):
    x, (weight, scale) = make_rows(4, 64), make_head(dtype, 300, 64)
    arguments = (x, weight, scale, 250, 30, *(make_draw(4) if sample else (None, None, None)))
    tokens, stats, samples = torch.ops.skipfast.exit_head_rows(*arguments)
    kernel = launch(*arguments[:5], Draw(*arguments[5:]) if sample else None, 3)[1]
    assert_same((tokens, samples), kernel[::2])
    assert torch.allclose(stats, kernel[1], rtol=2e-6, atol=2e-6)
    for operator in (torch.ops.skipfast.exit_head_rows.default, torch.ops.skipfast.exit_head_partials.default):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(17, 64, dtype=torch.bfloat16)}, r"x must be bf16 \[1..16, D\]"),
        ({"x": torch.zeros(2, 64)}, "x must be bf16"),
        ({"x": torch.zeros(64, dtype=torch.bfloat16)}, "x must be bf16"),
        ({"x": torch.zeros(2, 32, dtype=torch.bfloat16)}, r"weight must be contiguous torch.bfloat16 \[100, 32\]"),
        ({"weight": torch.zeros(64, 100, dtype=torch.bfloat16).T}, "weight must be contiguous"),
        ({"weight": torch.zeros(100, 64, dtype=torch.int8)}, "weight must be contiguous torch.bfloat16"),
        ({"weight": torch.zeros(100, 64, dtype=torch.int8), "scale": torch.ones(99)}, r"scale must be .*\[100\]"),
        ({"n_vocab": 101}, r"n_vocab must be in 2..V.*\[100, 64\]"),
        ({"n_vocab": 1}, r"n_vocab must be in 2..V"),
        ({"positions": None}, "give all three"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions must be"),
        ({"seed": torch.zeros(1, dtype=torch.int32)}, "seed must be"),
        ({"temperature": torch.ones(2)}, "temperature must"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = (
        {
            "x": make_rows(2, 64),
            "weight": make_head(torch.bfloat16, 100, 64)[0],
            "scale": None,
            "n_vocab": 100,
            "v_offset": 0,
        }
        | make_draw(2)._asdict()
        | change
    )
    for operator in (torch.ops.skipfast.exit_head_rows, torch.ops.skipfast.exit_head_partials):
        with pytest.raises(ValueError, match=message):
            operator(**arguments)


def test_compile_cases_name_every_argument_of_the_kernel_once():
    cases = exit_head.compile_cases()
    assert len({case.name for case in cases}) == len(cases) == 8
    for case in cases:
        assert sorted([*case.types, *case.constants]) == sorted(case.kernel.arg_names)
        assert set(case.aligned) <= set(case.types)
