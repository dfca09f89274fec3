"""The Triton linear layers under Triton's interpreter: against fp64, row by row, and byte by byte of the weight.

The interpreter cannot run the assembly that turns nibbles into bf16; a few lines of Python here can, for every byte.
"""

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels import gpu  # noqa: E402
from kernels.gpu import linear, tiles  # noqa: E402
from kernels.gpu.linear import dequantise_int4, dequantise_int8, launch  # noqa: E402
from tests.helpers.gpu import run_backwards  # noqa: E402

pytestmark = pytest.mark.skipif(not tiles.INTERPRETED, reason="triton was imported without TRITON_INTERPRET=1")
FORMATS = ("bf16", "int8", "int4-32", "int4-64", "int4-128")
EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed_and_poison(monkeypatch):
    """Fresh memory holds garbage, and no call may leave a ticket behind."""
    torch.manual_seed(0)
    tickets, empty = tiles.tickets_of(CPU), torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    assert not tickets.any()


def make_weight(kind: str, n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a random weight, its scale and the matrix they stand for in fp64. The scale's rows and groups differ."""
    if kind == "bf16":
        weight = torch.randn(n, k).bfloat16()
        return weight, None, weight.double()
    if kind == "int8":
        weight, scale = torch.randint(-128, 128, (n, k)).to(torch.int8), torch.rand(n) + 0.01
        return weight, scale, weight.double() * scale.double()[:, None]
    group = int(kind.removeprefix("int4-"))
    values, scale = torch.randint(-8, 8, (n, k)), (torch.rand(n, k // group) + 0.01).bfloat16()
    return pack(values, group), scale, values.double() * scale.double().repeat_interleave(group, 1)


def pack(values: Tensor, group: int) -> Tensor:
    """Values -8..7 [n, k] -> uint8 [n, k / 2], element by element as the format is written down."""
    packed = torch.zeros(values.shape[0], values.shape[1] // 2, dtype=torch.int64)
    for element in range(values.shape[1]):
        start, place = element // group * group, element % group
        high = place >= group // 2
        packed[:, start // 2 + place % (group // 2)] += (values[:, element] + 8) << (4 if high else 0)
    return packed.to(torch.uint8)


def make_rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k).bfloat16()


def width(kind: str, k: int) -> int:
    """The next number of features that the format can have."""
    step = int(kind.removeprefix("int4-")) if kind.startswith("int4") else 16
    return -(-k // step) * step


def assert_close(result: Tensor, exact: Tensor):
    """One rounding to bf16, at most half a unit in the last of 8 bits, and fp32 sums."""
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    allowed = exact.abs() * 2**-8 * 1.01 + exact.abs().max() * 1e-5
    assert ((result.double() - exact).abs() <= allowed).all()


@EVERY_FORMAT
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 16),
        (2, 63, 128),
        (3, 130, 384),
        (5, 200, 272),
        (7, 129, 96),
        (8, 256, 256),
        (15, 77, 400),
        (16, 300, 144),
    ],
)
def test_results_are_the_rounded_exact_sums(kind, m, n, k):
    k = width(kind, k)
    weight, scale, exact = make_weight(kind, n, k)
    x = make_rows(m, k)
    assert_close(launch(x, weight, scale), x.double() @ exact.T)


@EVERY_FORMAT
@pytest.mark.parametrize("processors", [132, 1], ids=["split", "whole"])
def test_a_row_has_the_same_bits_alone_and_among_fifteen_others(kind, processors, monkeypatch):
    monkeypatch.setattr(linear, "processors", lambda device: processors)
    n, k = 150, 384
    tile = linear.TILES[f"linear_{kind[:4]}"]
    assert linear.splits_of(n, k, tile, processors) == (3 if processors == 132 else 1)
    weight, scale, _ = make_weight(kind, n, k)
    x = make_rows(16, k)
    whole = launch(x, weight, scale)
    for count in (1, 2, 7, 15):
        assert torch.equal(launch(x[:count], weight, scale), whole[:count]), f"{count} first rows"
        assert torch.equal(launch(x[-count:], weight, scale), whole[-count:]), f"{count} last rows"
    assert torch.equal(launch(x, weight, scale), whole), "a second call"


@EVERY_FORMAT
def test_the_order_in_which_programs_come_changes_no_bit(kind, monkeypatch):
    weight, scale, _ = make_weight(kind, 150, 384)
    x = make_rows(3, 384)
    expected = launch(x, weight, scale)
    run_backwards(monkeypatch)
    assert torch.equal(launch(x, weight, scale), expected)


@pytest.mark.parametrize("n, k", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (64, 64)])
@pytest.mark.parametrize("tile", [linear.TILES[name] for name in linear.FORMATS.values()], ids=linear.FORMATS.values())
def test_a_weight_is_split_where_its_tiles_cannot_occupy_two_programs_per_processor(n, k, tile):
    tiles, steps, splits = -(-n // tile.n), -(-k // tile.k), linear.splits_of(n, k, tile, 132)
    assert (splits > 1) == (tiles < 264 and steps > 1)
    each = -(-steps // splits)
    assert (splits - 1) * each < steps, "the last split is empty"
    assert splits == 1 or tiles * splits >= 264 * 0.8 or each == 1, "more programs were to be had"


@pytest.fixture
def loads(monkeypatch):
    """The addresses of everything the interpreter loads, in a list of tensors."""
    addresses = []
    original = interpreter.InterpreterBuilder.create_masked_load

    def record(self, pointers, mask, *rest):
        live = pointers.data if mask is None else pointers.data[mask.data]
        addresses.append(torch.from_numpy(live.astype("int64").reshape(-1)))
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", record)
    return addresses


@EVERY_FORMAT
def test_every_weight_byte_is_loaded_exactly_once(kind, loads):
    n, k = 256, width(kind, 400)
    weight, scale, _ = make_weight(kind, n, k)
    launch(make_rows(2, k), weight, scale)
    offsets = torch.cat(loads) - weight.data_ptr()
    offsets = offsets[(offsets >= 0) & (offsets < weight.nbytes)]
    size = 2 if kind in ("bf16", "int4-64", "int4-128") else 1  # of the elements that are loaded
    assert torch.equal(offsets.sort().values, torch.arange(0, weight.nbytes, size))


@EVERY_FORMAT
def test_nothing_outside_the_arguments_is_read(kind, loads):
    n, k, gap = 130, width(kind, 144), 1 << 16
    weight, scale, exact = make_weight(kind, n, k)
    arguments = [make_rows(3, k), weight, *([] if scale is None else [scale])]
    arena = torch.full((4 * gap + sum(tensor.nbytes for tensor in arguments),), 255, dtype=torch.uint8)  # NaN as bf16
    inside, start = torch.zeros(arena.nbytes, dtype=torch.bool), gap
    for index, tensor in enumerate(arguments):
        place = slice(start, start + tensor.nbytes)
        arguments[index] = arena[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        inside[place] = True
        start += tensor.nbytes // 16 * 16 + gap
    assert_close(launch(*arguments), arguments[0].double() @ exact.T)
    offsets = torch.cat(loads) - arena.data_ptr()
    assert inside[offsets[(offsets >= 0) & (offsets < arena.nbytes)]].all()


@EVERY_FORMAT
def test_rows_may_lie_apart_and_what_lies_between_them_is_not_read(kind):
    k = width(kind, 144)
    weight, scale, exact = make_weight(kind, 70, k)
    wide = torch.full((5, k + 33), float("nan"), dtype=torch.bfloat16)
    x = wide[:, 7 : 7 + k]
    x.copy_(make_rows(5, k))
    assert_close(launch(x, weight, scale), x.double() @ exact.T)


@EVERY_FORMAT
def test_operators_on_a_cpu_are_the_references_and_agree_with_the_kernels(kind):
    n, k = 100, width(kind, 272)
    weight, scale, exact = make_weight(kind, n, k)
    x = make_rows(4, k)
    operator = getattr(torch.ops.skipfast, f"linear_{kind[:4]}").default
    arguments = (x, weight) if scale is None else (x, weight, scale)
    assert_close(operator(*arguments), x.double() @ exact.T)
    assert_close(launch(x, weight, scale), operator(*arguments).double())
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("group", linear.GROUPS)
def test_dequantised_int4_weights_are_the_values_times_their_scale(group):
    packed, scale, exact = make_weight(f"int4-{group}", 5, 2 * group)
    assert torch.equal(dequantise_int4(packed, scale).double(), exact)
    byte = torch.full((1, group // 2), 0x2F, dtype=torch.uint8)  # 15 - 8 in the first half, 2 - 8 in the second
    weight = dequantise_int4(byte, torch.tensor([[0.5]]).bfloat16())
    assert torch.equal(weight, torch.tensor([3.5, -3.0]).repeat_interleave(group // 2)[None])


def test_dequantised_int8_weights_are_the_values_times_the_scale_of_their_row():
    weight, scale, exact = make_weight("int8", 5, 32)
    assert torch.equal(dequantise_int8(weight, scale), (weight.double() * scale.double()[:, None]).float())


def bf16(halves: Tensor) -> Tensor:
    """The bf16 numbers whose bits are these int64 numbers below 2^16, in fp64."""
    return (halves - ((halves & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16).double()


def execute(assembly: str, word: Tensor) -> list[Tensor]:
    """Run the few PTX instructions of linear.py on int64 tensors of 32-bit words: $4 is the input, $0..$3 come out."""
    registers = {"$4": word}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(word, int(name, 0))

    for line in re.findall(r"^\s*([^.{}\s].*);$", assembly, re.MULTILINE):
        name, target, *operands = re.split(r"[\s,]+", line)
        operands = [value(operand) for operand in operands]
        if name == "mov.b32":
            result = operands[0]
        elif name == "shr.u32":
            result = operands[0] >> operands[1]
        elif name == "prmt.b32":
            both, chosen = operands[0] | operands[1] << 32, operands[2]
            result = sum((both >> 8 * (chosen >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        elif name == "lop3.b32":
            assert int(operands[3][0]) == 0xEA, "(a & b) | c"
            result = operands[0] & operands[1] | operands[2]
        elif name == "fma.rn.bf16x2":
            sums = [
                bf16(operands[0] >> shift & 0xFFFF) * bf16(operands[1] >> shift & 0xFFFF)
                + bf16(operands[2] >> shift & 0xFFFF)
                for shift in (0, 16)
            ]
            assert all(torch.equal(total.bfloat16().double(), total) for total in sums), "rounded"
            low, high = (total.bfloat16().view(torch.int16).long() & 0xFFFF for total in sums)
            result = low | high << 16
        else:
            raise NotImplementedError(name)
        registers[target] = result
    return [registers[f"${i}"] for i in range(4)]


def test_the_assembly_turns_every_byte_into_its_nibbles_less_eight():
    values = torch.stack([torch.arange(256).roll(step) for step in (0, 85, 170, 40)])  # four bytes of 256 words
    word = sum(values[i] << 8 * i for i in range(4))
    low, high = (values & 15).double() - 8, (values >> 4).double() - 8
    for assembly, expected in (
        (linear.BYTES_ASSEMBLY, [low[:2], low[2:], high[:2], high[2:]]),
        (linear.PAIRS_ASSEMBLY, [low[0::2], low[1::2], high[0::2], high[1::2]]),
    ):
        for register, pair in zip(execute(assembly.value, word), expected, strict=True):
            assert torch.equal(torch.stack([bf16(register & 0xFFFF), bf16(register >> 16)]), pair)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("bf16", {"x": torch.zeros(2, 64)}, "x must be"),
        ("bf16", {"x": torch.zeros(17, 64, dtype=torch.bfloat16)}, "x must be"),
        ("bf16", {"x": torch.zeros(64, 2, dtype=torch.bfloat16).T}, "each row contiguous"),
        ("bf16", {"x": torch.zeros(0, 64, dtype=torch.bfloat16)}, "x must be"),
        ("bf16", {"x": torch.zeros(2, 48, dtype=torch.bfloat16)}, "the weight does not fit x"),
        ("bf16", {"weight": torch.zeros(64, 20, dtype=torch.bfloat16).T}, "the weight does not fit x"),
        ("bf16", {"weight": torch.zeros(20, 64)}, "no linear layer takes torch.float32"),
        ("bf16", {"scale": torch.ones(20)}, "bfloat16 with a scale"),
        ("int8", {"scale": None}, "int8 without a scale"),
        ("int8", {"scale": torch.ones(19)}, r"the scale must be contiguous torch.float32 \[20\]"),
        ("int8", {"scale": torch.ones(20).bfloat16()}, "the scale must be contiguous torch.float32"),
        ("int4-32", {"scale": torch.ones(20, 2)}, r"the scale must be contiguous torch.bfloat16 \[20, 2\]"),
        ("int4-32", {"scale": torch.ones(20, 4).bfloat16()}, "64 features are not a multiple of a group in"),
        ("int4-32", {"scale": torch.ones(20, 0).bfloat16()}, "the scale must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_named(kind, change, message):
    weight, scale, _ = make_weight(kind, 20, 64)
    with pytest.raises(ValueError, match=message):
        launch(**({"x": make_rows(2, 64), "weight": weight, "scale": scale} | change))


def test_features_must_be_a_multiple_of_sixteen():
    with pytest.raises(ValueError, match="24 features are not a multiple of 16"):
        launch(make_rows(1, 24), torch.zeros(8, 24, dtype=torch.bfloat16))


def test_a_gpu_machine_where_nothing_can_be_launched_is_told_why(monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(gpu.build, "_loaded", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    assert gpu.load() == "the GPU kernels need a C compiler and Python's headers (Failed to find C compiler.)"
    assert not gpu.build._loaded


def test_tickets_are_not_made_while_a_graph_is_captured(monkeypatch):
    """The zeros would be written when the graph runs, not before."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        tiles.tickets_of(torch.device("cuda", 0))


def test_compile_cases_name_every_argument_once_and_cover_every_way_to_launch():
    cases = linear.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.types, *case.constants]) == sorted(case.kernel.arg_names)
        assert set(case.aligned) <= set(case.types)
    ways = [(case.constants["SPLITS"] > 1, case.constants["EVEN"]) for case in cases]
    assert {(False, True), (True, True), (True, False)} == set(ways)
    assert {case.constants["GROUP"] for case in cases if "GROUP" in case.constants} == set(linear.GROUPS)
