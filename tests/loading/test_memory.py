"""What a model takes of a GPU's memory, and what is said when there is less, or when the kernels do not take it."""

import dataclasses
import re

import pytest
import torch

import cli
from kernels import gpu
from kernels.formats import Format
from loading import checkpoint, memory
from model import ModelArgs

EIGHT_B = ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 131072, 1e-5, 500000.0, dtype="bfloat16")


@pytest.mark.parametrize("format", ["none", "int8", "int4", "int4:group=64,lm_head=no", "int8:embedding=yes"])
def test_the_bytes_are_those_of_a_loaded_model(format):
    source = checkpoint.open_source(cli.DEMO)
    loaded = checkpoint.load(source, torch.bfloat16, pack=False, format=Format.parse(format))
    assert memory.weight_bytes(source.args, torch.bfloat16, Format.parse(format)) == loaded.bytes
    loaded.model.setup_cache(320)
    caches = [cache for layer in loaded.model.layers for cache in (layer.attention.k_cache, layer.attention.v_cache)]
    assert 320 * memory.token_bytes(source.args, torch.bfloat16) == sum(cache.nbytes for cache in caches)


def test_a_model_of_8_billion_parameters_fits_with_its_cache_or_the_error_says_what_would():
    check = lambda free, length=8192, dtype=torch.bfloat16, format="none", **more: memory.check_fits(
        EIGHT_B, dtype, Format.parse(format), length, int(free * 1e9), **more
    )
    check(24)
    check(10.5, 4096, format="int8")
    with pytest.raises(ValueError, match=r"16.1 GB of weights \(bfloat16\) and 1.07 GB of cache for 8192 t") as error:
        check(17)
    rooms = dict(re.findall(r"(this|--quantize int[48]) for (\d+) tokens", str(error.value)))
    assert set(rooms) == {"this", "--quantize int8", "--quantize int4"} and 1 < int(rooms["this"]) < 8192
    assert int(rooms["this"]) < int(rooms["--quantize int8"]) < int(rooms["--quantize int4"]) < 131072
    for name, room in rooms.items():
        format = name.removeprefix("--quantize ").replace("this", "none")
        check(17, int(room), format=format)
        with pytest.raises(ValueError, match=f"{int(room) + 1} tokens"):
            check(17, int(room) + 1, format=format)
    with pytest.raises(ValueError, match="what fits: --precision bf16 for [0-9]+ tokens, --precision bf16 --quantize"):
        check(20, dtype=torch.float32)
    with pytest.raises(ValueError, match="no precision or format fits: more processes"):
        check(2)
    with pytest.raises(ValueError, match="bfloat16, int8.*no precision or format fits"):
        check(8, format="int8", quantised=True)


def test_a_format_that_the_model_cannot_have_is_not_proposed():
    args = dataclasses.replace(EIGHT_B, ffn_dim=14352)
    with pytest.raises(ValueError) as error:
        memory.check_fits(args, torch.bfloat16, Format(), 8192, int(17e9))
    assert "int8" in str(error.value) and "int4" not in str(error.value)


def test_memory_that_runs_out_later_is_one_line_and_exit_code_2(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and err.startswith("error: device cuda: CUDA out of memory")


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, "bf16, not float16"),
        ({"head_dim": 288}, torch.bfloat16, "heads of up to 256"),
        ({"n_kv_head": 1}, torch.bfloat16, "16 query heads per key-value head"),
        ({"head_dim": 36, "n_head": 1, "n_kv_head": 1}, torch.bfloat16, "heads' width.*36"),
        ({"ffn_dim": 1000}, torch.bfloat16, "intermediate_size.*1000"),
    ],
)
def test_what_the_kernels_do_not_cover_is_said(changes, dtype, words):
    reason = gpu.uncovered(dataclasses.replace(EIGHT_B, **changes), dtype)
    assert reason is None if words is None else re.search(words, reason)
