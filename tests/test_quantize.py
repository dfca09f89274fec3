"""Quantised checkpoints: a file holds what memory holds, sizes and losses are in bounds, mistakes are one line."""

import json

import pytest
import torch
from safetensors import safe_open

import cli
import convert_hf_checkpoint
import generate
import quantize
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from kernels import cpu
from kernels.formats import Format, dequantised
from loading import checkpoint, writing
from loading.tokenizer import load_tokenizer
from model import Linear
from quantize import calibrate_weights, gptq, losses_and_choices, quantise, weight_sizes, windows_of
from tests.helpers.models import PROMPT, tokens_of, train_tokenizer

FORMATS = ("int8", "int4", "int4:group=64", "int8:lm_head=no", "int4:embedding=yes")
LIMITS = {"int8": (0.55, 0.005), "int4": (0.36, 0.05)}  # of the linears' bytes in bf16, of the loss


@pytest.fixture(scope="module", autouse=True)
def kernels():
    cpu.load()


@pytest.fixture(scope="module")
def original(make_hf, tmp_path_factory):
    """A tiny checkpoint with a tokenizer, whose linears can be cut into groups."""
    folder = tmp_path_factory.mktemp("tiny")
    make_hf(folder, vocab_size=400, num_key_value_heads=2, intermediate_size=128)
    train_tokenizer(folder, 400)
    return folder


def text_of(model, policy="none"):
    return tokens_of(Runner(model, 64, max_rows=4, compile=True), PROMPT, policy, SamplingConfig(), new=24).tokens


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_file_and_quantising_while_loading_are_one_model(make_hf, tmp_path, format, tie):
    make_hf(tmp_path / "hf", hidden_size=64, intermediate_size=128, vocab_size=100, tie_word_embeddings=tie)
    wanted = Format.parse(format)
    convert_hf_checkpoint.convert(str(tmp_path / "hf"), tmp_path / "low", "bf16", False, wanted)
    written = checkpoint.open_source(tmp_path / "low")
    assert written.format == wanted
    assert (tmp_path / "low" / "model.safetensors").stat().st_size < 8192 + weight_sizes(
        written.args, wanted, torch.bfloat16
    )["after"]
    in_memory = quantise(checkpoint.load(tmp_path / "hf", torch.bfloat16, pack=False).model, wanted)
    plain = checkpoint.load(tmp_path / "low", pack=False)
    assert plain.model.state_dict().keys() == in_memory.state_dict().keys()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, in_memory.state_dict()[name]), name
    loaded = checkpoint.load(tmp_path / "hf", torch.bfloat16, format=wanted)
    assert loaded.bytes == plain.bytes == checkpoint.load(tmp_path / "low").bytes
    in_memory.pack_weights()
    expected = text_of(in_memory)
    assert text_of(loaded.model) == text_of(checkpoint.load(tmp_path / "low").model, "static:1") == expected
    writing.save(plain.model, tmp_path / "again.safetensors", plain.hf_config, format=wanted)
    again = checkpoint.load(tmp_path / "again.safetensors", pack=False).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.model.state_dict().items())


def test_a_model_is_not_saved_under_a_format_that_it_does_not_have(original, tmp_path):
    loaded = checkpoint.load(original, torch.bfloat16, pack=False)
    quantise(loaded.model, "int8")
    for format in (Format(), Format.parse("int4")):
        with pytest.raises(ValueError, match="is not what the format|has shape"):
            writing.save(loaded.model, tmp_path / "x.safetensors", loaded.hf_config, format=format)
    assert not list(tmp_path.glob("*x.safetensors*")), "half a file was left"


def test_weights_load_quantised_without_a_whole_plain_copy(make_hf, tmp_path, monkeypatch):
    """What is alive while a tensor is read: the tensors before it in low bits, never a second one in fp32."""
    make_hf(tmp_path / "hf", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    read, alive = checkpoint.Source.read, []

    def watched(source, name, *arguments):
        alive.append(name)
        return read(source, name, *arguments)

    monkeypatch.setattr(checkpoint.Source, "read", watched)
    model = checkpoint.load(tmp_path / "hf", torch.bfloat16, format=Format.parse("int8")).model
    assert len(alive) == len(set(alive)), "a tensor was read twice"
    weights = [module.weight for module in model.modules() if hasattr(module, "scale")]
    assert sum(weight.dtype == torch.int8 for weight in weights) == len(weights) - 1, "all but the embedding"


@pytest.mark.parametrize("mode", LIMITS)
def test_low_bits_change_little_of_the_demo(mode):
    """On its held-out prompts; the whole held-out text is measured in benchmarks/README.md."""
    size, change = LIMITS[mode]
    source = checkpoint.open_source(cli.DEMO)
    lines = (cli.DEMO / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["prompt"] for line in lines)
    windows = windows_of(load_tokenizer(cli.DEMO).encode(text), 256, 8)
    before, after = (
        losses_and_choices(checkpoint.load(source, format=Format.parse(format)).model, windows)
        for format in ("none", mode)
    )
    found = quantize.compare(before, after)
    assert abs(found["loss_change"]) < change and found["equal_greedy_tokens"] > 0.85
    sizes = weight_sizes(source.args, Format.parse(mode), torch.bfloat16)
    assert sizes["quantised"] < size * sizes["the_same_in_bf16"]


@pytest.mark.parametrize("format", ["int8", "int4", "int4:group=64"])
def test_calibrated_rounding_changes_outputs_less_than_rounding_to_nearest(format):
    """On inputs whose features go together, which is what there is to gain from."""
    torch.manual_seed(0)
    wanted, weight = Format.parse(format), torch.randn(96, 256)
    x = torch.randn(2000, 24) @ torch.randn(24, 256) + 0.1 * torch.randn(2000, 256)
    error = lambda low: ((x @ (dequantised(*low) - weight).T) ** 2).mean()
    assert error(gptq(weight, x.T @ x, wanted)) < 0.6 * error(wanted.quantise(weight))
    uncorrelated = gptq(weight, torch.eye(256), wanted)
    assert all(torch.equal(a, b) for a, b in zip(uncorrelated, wanted.quantise(weight), strict=True))


def test_a_calibrated_model_is_one_of_its_format(original):
    model = checkpoint.load(original, torch.float32, pack=False).model
    calibrate_weights(model, Format.parse("int8"), torch.arange(200).view(4, 50) % model.args.vocab_size)
    assert all(module.scale is not None for module in model.modules() if isinstance(module, Linear))
    model.pack_weights()
    assert text_of(model, "static:1") == text_of(model)


def test_the_program_writes_a_checkpoint_and_says_what_changed(original, tmp_path, run_program):
    (tmp_path / "text.txt").write_text("import os\nclass Reader:\n    def read(self):\n        return self.text\n" * 20)
    flags = [
        "--checkpoint_path",
        original,
        "--mode",
        "int8",
        "--output_path",
        tmp_path / "low",
        "--text",
        tmp_path / "text.txt",
        "--json",
        tmp_path / "report.json",
    ]
    for extra in ([], ["--force", "--calibrate", tmp_path / "text.txt"]):
        code, out, err = run_program(quantize.main, *flags, *extra)
        assert code == 0, err
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["calibrated"] == bool(extra) and abs(report["loss_change"]) < 0.05
        assert f"{report['loss']:.4f}" in out and report["quantize"] == "int8"
        with safe_open(tmp_path / "low" / "model.safetensors", "pt") as file:
            assert file.metadata()["quantize"] == "int8"
    flags = ["--prompt", "def f", "--max_new_tokens", 8, "--policy", "static:1", "--compare"]
    code, out, err = run_program(
        generate.main, "--checkpoint_path", tmp_path / "low", *flags, "--json", tmp_path / "x.json"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["comparison"]["identical"] and found["config"]["quantize"] == "int8"


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantize", "int4:lm_head=no"],
        ["--draft_quantize", "int8"],
        ["--draft_quantize", "int8:lm_head=no"],
        ["--quantize", "int8", "--draft_quantize", "int4", "--temperature", "1"],
        ["--quantize", "int8", "--draft_quantize", "int8", "--precision", "fp16"],
    ],
)
def test_low_bits_go_with_every_way_to_decode(original, flags, run_program):
    for policy in ("auto", "static:1", "prompt_lookup+static:1"):
        code, out, err = run_program(
            generate.main,
            "--checkpoint_path",
            original,
            "--prompt",
            "def read",
            "--max_new_tokens",
            12,
            "--policy",
            policy,
            "--compare",
            *flags,
        )
        assert code == 0, err
        assert "identical tokens" in out and "NO" not in out


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (generate, ["--quantize", "int3"], "quantize must be one of none, int8, int4, got 'int3'"),
        (generate, ["--quantize", "int8:group=32"], "quantize int8 has the keys lm_head, embedding, got 'group'"),
        (generate, ["--quantize", "int4:group=48"], "group must be one of 32, 64, 128, got '48'"),
        (generate, ["--draft_quantize", "int5"], "draft_quantize must be one of"),
        (generate, ["--draft_quantize", "int8", "--no_verify"], "--no_verify does not go with --draft_quantize"),
        (generate, ["--draft_quantize", "int8:embedding=yes"], "copies share the model's embedding"),
        (quantize, ["--mode", "none"], "mode must be int8 or int4"),
        (quantize, ["--mode", "int4:group=128"], "divide the 64 input features of hidden_size"),
        (quantize, ["--mode", "int8", "--text", "nowhere.txt"], "cannot read nowhere.txt"),
        (quantize, ["--mode", "int8", "--windows", "0"], "windows must be 1 or more"),
        (quantize, ["--mode", "int8", "--output_path", "SOURCE"], "exists already"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(original, program, flags, message, monkeypatch, run_program):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    flags = [str(original) if flag == "SOURCE" else flag for flag in flags]
    code, out, err = run_program(program.main, "--checkpoint_path", original, *flags)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_what_is_quantised_is_not_quantised_again(original, tmp_path, run_program):
    convert_hf_checkpoint.convert(str(original), tmp_path / "low", None, False, Format.parse("int8"))
    low = ["--checkpoint_path", tmp_path / "low"]
    for program, flags in (
        (generate, ["--quantize", "int4"]),
        (generate, ["--draft_quantize", "int4"]),
        (quantize, ["--mode", "int8", "--output_path", tmp_path / "x"]),
    ):
        code, _, err = run_program(program.main, *low, *flags)
        assert code == 2 and "is quantised already (int8)" in err
    file = tmp_path / "low" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"quantize": "int8"', b'"quantize": "int3"'))
    code, _, err = run_program(generate.main, *low)
    assert code == 2 and "quantize must be one of none, int8, int4, got 'int3'" in err
