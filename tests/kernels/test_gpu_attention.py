"""Decode attention under Triton's interpreter: against fp64, row by row to the bit, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.helpers.gpu import run_backwards

attention = pytest.importorskip("kernels.gpu.attention", reason="needs triton")

# Contexts 1, 2, 63..65, 127..129, 255..257, 513 and 700 in no order, with padding in between.
POSITIONS = [255, -1, 0, 699, 63, 128, 1, 254, -9, 256, 62, 512, 126, 64, -1, 127]
SLOTS = 704
SHAPES = {"grouped": (4, 2, 64), "one head per kv head": (2, 2, 128), "odd group and head dim": (3, 1, 96)}  # H, G, E


@pytest.fixture(autouse=True)
def allocated(monkeypatch):
    """Poison what launches allocate; the list holds these tensors, newest last."""
    tensors, empty = [], torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            tensors.append(tensor.fill_(torch.nan))
        return tensor

    monkeypatch.setattr(attention.torch, "empty", poisoned)
    return tensors


class Call:
    """Random arguments of one call. q, k, v are slices of a fused projection; stale slots may hold anything."""

    def __init__(self, shape, positions, slots=SLOTS, seed=0, stale=0.0):
        heads, groups, head_dim = shape
        generator = torch.Generator().manual_seed(seed)
        fused = torch.randn(len(positions), heads + 2 * groups, head_dim, generator=generator).bfloat16()
        fused[:, :heads] *= 3  # so that a few slots dominate
        self.q, self.k, self.v = fused.split([heads, groups, groups], 1)
        self.positions = torch.tensor(positions)
        self.caches = torch.full((2, groups, slots, head_dim), stale, dtype=torch.bfloat16)
        for slot in range(max(positions) + 1):  # a slot's numbers depend on neither the length nor the other slots
            generator.manual_seed(1000 + slot)
            self.caches[:, :, slot] = torch.randn(2, groups, head_dim, generator=generator).bfloat16()

    def launch(self, rows=slice(None)):
        q, k, v, positions = (tensor[rows] for tensor in (self.q, self.k, self.v, self.positions))
        return attention.launch(q, k, v, *self.caches, positions)

    def written(self):
        """What the caches must hold afterwards."""
        caches = self.caches.clone()
        for row, position in enumerate(self.positions.tolist()):
            if position >= 0:
                caches[0, :, position], caches[1, :, position] = self.k[row], self.v[row]
        return caches

    def oracle(self):
        """Attention in fp64, row by row and head by head."""
        (keys, values), out = self.written().double(), torch.zeros(self.q.shape, dtype=torch.float64)
        for row, position in enumerate(self.positions.tolist()):
            for head in range(self.q.shape[1] if position >= 0 else 0):
                group = head // (self.q.shape[1] // len(keys))
                scores = keys[group, : position + 1] @ self.q[row, head].double() / self.q.shape[2] ** 0.5
                out[row, head] = scores.softmax(0) @ values[group, : position + 1]
        return out


def assert_close(out, oracle):
    """Within the rounding to bf16 of the weights and of the result."""
    assert out.dtype == torch.bfloat16 and out.shape == oracle.shape
    torch.testing.assert_close(out.double(), oracle, atol=4e-3, rtol=2**-6)


@pytest.mark.parametrize("name", SHAPES)
def test_matches_fp64_at_every_context_and_writes_its_rows_only(name):
    call = Call(SHAPES[name], POSITIONS)
    expected, oracle = call.written(), call.oracle()
    out = call.launch()
    assert_close(out, oracle)
    assert out[call.positions < 0].eq(0).all()
    assert torch.equal(call.caches, expected)


@pytest.mark.parametrize("shape", [(16, 1, 16), (5, 5, 40), (1, 1, 256), (4, 1, 80)], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_matches_fp64_for_other_groups_and_head_dims(shape, rows):
    call = Call(shape, list(range(126, 126 + rows)), slots=160, seed=rows)
    expected, oracle = call.written(), call.oracle()
    assert_close(call.launch(), oracle)
    assert torch.equal(call.caches, expected)


def test_segments_merge_over_several_steps(monkeypatch):
    monkeypatch.setattr(attention, "MERGE", replace(attention.MERGE, n=2))
    call = Call((2, 1, 64), [699, 383, 384], seed=5)
    oracle = call.oracle()
    assert_close(call.launch(), oracle)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_alone_has_the_bits_it_has_among_others(name):
    call = Call(SHAPES[name], [position for position in POSITIONS if position < 300], seed=1)
    together = call.launch()
    for row in (0, 2, 8, 13):  # contexts 256, 1, 257, 128
        assert torch.equal(call.launch([row]), together[[row]])


@pytest.mark.parametrize("rows", [2, 3, 5, 7, 8, 15])
def test_a_row_has_the_same_bits_first_and_last_among_any_number_of_rows(rows):
    call = Call((2, 1, 32), [*range(120, 120 + 14), 3, 200], slots=256, seed=rows)
    together = call.launch()
    for chosen in (15, 10):
        others = torch.randperm(15, generator=torch.Generator().manual_seed(rows))
        others = others[others != chosen].tolist()[: rows - 1]
        for order in ([chosen, *others], [*others, chosen]):
            assert torch.equal(call.launch(order), together[order])


def test_bits_do_not_depend_on_the_length_of_the_cache_nor_on_the_number_of_programs(monkeypatch):
    short, long = (Call((4, 2, 64), [5, 300, 256], slots=slots, seed=2) for slots in (301, 1100))
    expected = short.launch()
    assert torch.equal(long.launch(), expected)
    monkeypatch.setattr(attention, "PROGRAMS", 4)  # each takes every second segment
    assert torch.equal(long.launch(), expected)


def test_the_order_in_which_programs_come_changes_no_bit(monkeypatch):
    forwards, backwards = (Call((16, 2, 64), [5, 300, 256, 299], slots=301, seed=7, stale=torch.nan) for _ in range(2))
    expected = forwards.launch()  # two blocks for each kv head, which write the same slots
    run_backwards(monkeypatch)
    assert torch.equal(backwards.launch(), expected)
    assert torch.equal(backwards.caches, forwards.caches)


@pytest.mark.parametrize("stale", [torch.nan, torch.inf, -3e38])
def test_stale_slots_behind_the_positions_do_not_leak(stale):
    positions = [130, -1, 129, 40]
    clean, dirty = (Call((4, 2, 64), positions, slots=400, seed=3, stale=value) for value in (0.0, stale))
    assert torch.equal(dirty.launch(), clean.launch())
    assert torch.equal(dirty.caches[:, :, :131], clean.caches[:, :, :131])
    untouched = torch.full((2, 2, 269, 64), stale, dtype=torch.bfloat16)
    torch.testing.assert_close(dirty.caches[:, :, 131:], untouched, rtol=0, atol=0, equal_nan=True)


def test_a_call_of_padding_reads_and_writes_nothing(allocated):
    call = Call((4, 2, 64), [-1, -(2**62), -300], stale=torch.nan)
    assert call.launch().eq(0).all()
    assert call.caches.isnan().all()
    outs, stats, _ = allocated
    assert outs.isnan().all() and stats.isnan().all()


@pytest.mark.parametrize("heads", [2, 16])  # all rows in one block, a block for each row
def test_segments_behind_a_row_leave_no_partial_results(heads, allocated):
    Call((heads, 1, 16), [127, 128, -1], slots=1000).launch()
    visited = allocated[0].isfinite().all(-1).all(1).sum(1)  # outs: [T, H, segments, E]
    assert visited.tolist() == [1, 2, 0]


def test_the_op_runs_the_reference_on_the_cpu():
    call = Call((4, 2, 64), [7, 0, 130, -1], slots=160, seed=4, stale=torch.nan)
    expected, oracle = call.written(), call.oracle()
    out = torch.ops.skipfast.decode_attention(call.q, call.k, call.v, *call.caches, call.positions)
    assert_close(out, oracle)
    assert torch.equal(call.caches[:, :, :131], expected[:, :, :131]) and call.caches[:, :, 131:].isnan().all()
    padding = torch.ops.skipfast.decode_attention(call.q, call.k, call.v, *call.caches, torch.full((4,), -1))
    assert padding.eq(0).all()


def test_the_op_keeps_the_contract_of_custom_ops():
    call = Call((4, 2, 64), [3, -1, 5], slots=32)
    torch.library.opcheck(attention.decode_attention, (call.q, call.k, call.v, *call.caches, call.positions))


def test_compiled_code_writes_to_the_caches_without_copying_them(monkeypatch):
    monkeypatch.undo()  # the compiler allocates, too
    call = Call((4, 2, 64), [3, -1, 5], slots=32)
    expected, caches = call.written(), [cache.clone() for cache in call.caches]
    step = torch.compile(torch.ops.skipfast.decode_attention.default, fullgraph=True)
    _, (code,) = run_and_get_code(step, call.q, call.k, call.v, *caches, call.positions)
    assert "empty_strided_cpu(" not in code.partition("def call")[2].partition("def get_args")[0], code
    assert torch.equal(torch.stack(caches), expected)


def test_the_stride_of_a_dimension_of_one_head_means_nothing():
    call = Call((2, 1, 64), [3, 70], seed=6)
    oracle, call.k = call.oracle(), call.k.as_strided(call.k.shape, (call.k.stride(0), 7, 1))
    assert_close(call.launch(), oracle)


def test_misfits_are_refused():
    def refused(match, **changes):
        call = Call((4, 2, 64), [0, 1], slots=32)
        arguments = {
            "q": call.q,
            "k": call.k,
            "v": call.v,
            "k_cache": call.caches[0],
            "v_cache": call.caches[1],
            "positions": call.positions,
        }
        with pytest.raises(ValueError, match=match):
            attention.launch(**arguments | changes)

    refused("1 to 16 rows", q=torch.zeros(17, 4, 64))
    refused("query heads per kv head", q=torch.zeros(2, 5, 64))
    refused("fit together", positions=torch.zeros(3, dtype=torch.int64))
    refused("int64", positions=torch.zeros(2, dtype=torch.int32))
    refused("bf16", q=torch.zeros(2, 4, 64))
    refused("contiguous", k_cache=torch.zeros(2, 64, 32, dtype=torch.bfloat16).mT)
    refused("contiguous", q=torch.zeros(4, 2, 64, dtype=torch.bfloat16).transpose(0, 1))
