"""int8 and int4 weights in the CPU kernels: right, and with the promise of all others that a row's bits are its own."""

import pytest
import torch

from decoding.runner import Runner
from kernels import cpu
from kernels.exit_head import Draw, Exit, Head, exit_head
from kernels.formats import dequantised, quantise_int4, quantise_int8
from kernels.linear import is_packed, linear, pack_quantised
from quantize import quantise
from tests.helpers.models import PROMPT, SAMPLING, largest_error, random_model, tokens_of
from tests.helpers.policies import Chaos, example
from tests.helpers.processes import OTHER_MACHINES, run_python

FORMATS = {"int8": quantise_int8, "int4": quantise_int4, "int4 g128": lambda weight: quantise_int4(weight, 128)}
DTYPES = {"bf16": (torch.bfloat16, 5e-3), "fp32": (torch.float32, 1e-5)}
SHAPES = [
    ("int8", 1, 2),
    ("int8", 33, 38),
    ("int8", 300, 1100),
    ("int4", 5, 32),
    ("int4", 100, 96),
    ("int4", 257, 1088),
    ("int4 g128", 70, 384),
]


@pytest.fixture(scope="module", autouse=True)
def cpp_ops():
    if reason := cpu.load():
        pytest.skip(f"C++ ops unavailable: {reason}")


@pytest.mark.parametrize("dtype, tolerance", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name, n, k", SHAPES)
def test_a_quantised_linear_matches_fp64_and_rows_stand_alone(name, n, k, dtype, tolerance):
    torch.manual_seed(0)
    weight, scale = FORMATS[name](torch.randn(n, k))
    x, packed = torch.randn(100, k).to(dtype), pack_quantised(weight, scale)
    x[3:40:7] *= 1e-37  # products among denormal numbers
    assert is_packed(packed) and packed.nbytes < 1.3 * (-n % 32 + n) * (k + 4) * (1 if name == "int8" else 0.5)
    whole = linear(x, packed, n)
    assert largest_error(whole, x.double() @ dequantised(weight, scale).double().T) < tolerance
    threads = torch.get_num_threads()
    for rows in (1, 2, 3, 4, 5, 7, 16, 17, 64):
        torch.set_num_threads(1 + rows % 2)
        for first in range(0, 100 - rows, max(rows, 9)):
            assert torch.equal(linear(x[first : first + rows], packed, n), whole[first : first + rows]), (rows, first)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exit_over_a_quantised_head_says_what_its_logits_say_also_when_trimmed(name):
    torch.manual_seed(0)
    norm, hidden = torch.ones(128).bfloat16(), torch.randn(16, 128).bfloat16()
    head = Head(norm, 1e-5, pack_quantised(*FORMATS[name](torch.randn(300, 128) / 5)), None, 300)
    draw = Draw(70, 5, 0.7)
    for n in (300, 150, 33, 2):
        small, logits = head.trimmed(n), head.logits(hidden)[:, :n]
        assert torch.equal(small.logits(hidden), logits) and torch.equal(
            Exit(hidden, small, 16).token_ids(), logits.argmax(-1)
        )
        tokens, stats, samples = exit_head(hidden, small, True, draw)
        for first in range(16):
            for rows in (1, 2, 4, 5):
                part = exit_head(hidden[first : first + rows], small, True, draw._replace(positions=70 + first))
                for one, other in zip(part, (tokens, stats, samples), strict=True):
                    assert torch.equal(one, other[first : first + rows])


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("parts", ["", "lm_head=no", "embedding=yes"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_speculation_with_packed_quantised_weights_equals_plain_decoding_compiled_or_eager(mode, parts, tie, skip_file):
    model = quantise(random_model(torch.bfloat16, pack=False, tie=tie), f"{mode}:{parts}")
    fallback = model(torch.tensor(PROMPT), torch.arange(5)) if model.setup_cache(32) is None else None
    model.pack_weights()
    assert model.embed(torch.tensor(PROMPT)).dtype == torch.bfloat16
    assert all(is_packed(layer.mlp.w2.weight) and layer.mlp.w2.scale is None for layer in model.layers)
    assert model.lm_head.weight.is_floating_point() == (parts == "lm_head=no")
    assert model.embedding.weight.is_floating_point() == (parts != "embedding=yes")
    assert largest_error(model(torch.tensor(PROMPT), torch.arange(5)), fallback.double()) < 0.05
    eager, runner = Runner(model, 120, max_rows=8), Runner(model, 120, max_rows=8, compile=True)
    assert (eager.backend, runner.backend) == ("eager", "c++") and eager.rows_independent
    accepted = 0
    for sampling in SAMPLING.values():
        expected = tokens_of(runner, PROMPT, "none", sampling, new=40).tokens
        assert tokens_of(eager, PROMPT, "none", sampling, new=40).tokens == expected
        texts = (
            "static:2,num_draft_tokens=5",
            "static:1,num_draft_tokens=1",
            "confidence:0.3,candidates=1-2-3",
            "skip_set:FILE",
            "prompt_lookup:min_ngram=1",
            "learned:LEARNED,every=1",
            "static:1,adapter=ADAPTER",
        )
        for policy in (*(example(text, skip_file, 4) for text in texts), Chaos(1)):
            for each in (runner, eager) if isinstance(policy, Chaos) or "static" in str(policy) else (runner,):
                found = tokens_of(each, PROMPT, policy, sampling, new=40)
                assert found.tokens == expected, policy
                accepted += sum(step.accepted for step in found.rounds)
    assert accepted > 0, "no draft was ever accepted: this test compared nothing"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_layers_in_one_call_have_the_bits_of_operation_by_operation(mode):
    model = quantise(random_model(torch.bfloat16, pack=False), mode)
    model.pack_weights()
    runner = Runner(model, 64, max_rows=8, compile=True)
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    runner.prefill([0])
    for first, rows in ((0, 17), (17, 1), (18, 2), (20, 4)):
        part, positions = hidden[first : first + rows], torch.arange(first, first + rows)
        assert torch.equal(runner.run_layers(part, first, 0, 4), model.run_layers(part, positions, 0, 4))


def test_fp16_models_stay_as_they_are():
    model = quantise(random_model(torch.float16, pack=False), "int8")
    model.pack_weights()
    assert not is_packed(model.lm_head.weight) and model.lm_head.scale is not None


OTHER_INSTRUCTIONS = """
import torch
from kernels import cpu
from kernels.formats import dequantised, quantise_int4, quantise_int8
from kernels.linear import linear, pack_quantised
assert cpu.load() is None, cpu.load()
for dtype, tolerance in ((torch.bfloat16, 5e-3), (torch.float32, 1e-5)):
    for quantise in (quantise_int8, quantise_int4):
        weight, scale = quantise(torch.randn(100, 160))
        x, packed = torch.randn(70, 160).to(dtype), pack_quantised(weight, scale)
        whole, exact = linear(x, packed, 100), x.double() @ dequantised(weight, scale).double().T
        assert ((whole - exact).abs().max() / exact.abs().max()) < tolerance
        assert all(torch.equal(linear(x[:n], packed, 100), whole[:n]) for n in range(1, 70))
"""


@pytest.mark.parametrize("needs, march", [*OTHER_MACHINES.values(), ("sse2", "x86-64")], ids=[*OTHER_MACHINES, "plain"])
def test_quantised_rows_stand_alone_with_older_instructions_too(needs, march):
    if needs not in cpu.build._cpu_flags():
        pytest.skip(f"this processor has no {needs}")
    result = run_python(OTHER_INSTRUCTIONS, SKIPFAST_MARCH=march)
    assert result.returncode == 0, result.stderr
