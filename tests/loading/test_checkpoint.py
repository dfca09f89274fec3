"""Checkpoints: every way in gives the same bits, every broken file gives one line that names the culprit."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cli
import convert_hf_checkpoint
from kernels import cpu
from kernels.linear import is_packed, pack, unpack_rows
from loading import checkpoint, hub, writing
from loading.tokenizer import load_tokenizer
from model import ModelArgs
from tests.helpers.processes import ROOT, run_python

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def original(make_hf, tmp_path_factory):
    """A tiny Llama's folder; tests break copies of it."""
    folder = tmp_path_factory.mktemp("original")
    make_hf(folder, num_key_value_heads=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "hf"))


def logits(loaded):
    loaded.model.setup_cache(16)
    tokens = torch.arange(12) * 5 % loaded.args.vocab_size
    with torch.inference_mode():
        return loaded.model(tokens, torch.arange(12))


def edit_weights(folder, change):
    """Load the tensors of a folder, let `change(tensors)` alter the dictionary, write them back."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def error_of(source, **options):
    """The message that loading `source` fails with; always a single line."""
    with pytest.raises(ValueError) as caught:
        checkpoint.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def convert(monkeypatch):
    """convert(*arguments) runs the program in this process -> exit code."""

    def convert(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
        try:
            cli.run(convert_hf_checkpoint.main)
        except SystemExit as error:
            return error.code
        return 0

    return convert


def run_converter(*arguments):
    command = [sys.executable, "convert_hf_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# ---- the same bits by every road ----


@pytest.mark.parametrize("config", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_converted_file_and_folder_load_to_the_same_bits(make_hf, tmp_path, config):
    make_hf(tmp_path / "hf", **config)
    convert_hf_checkpoint.convert(str(tmp_path / "hf"), tmp_path / "folder", None, force=False)
    convert_hf_checkpoint.convert(str(tmp_path / "hf"), tmp_path / "one.safetensors", None, force=False)
    raw = checkpoint.load(tmp_path / "hf")
    for source in ("folder", "folder/model.safetensors", "one.safetensors"):
        loaded = checkpoint.load(tmp_path / source)
        assert torch.equal(logits(loaded), logits(raw))
        assert loaded.args == raw.args and loaded.bytes == raw.bytes
        assert loaded.generation_config == raw.generation_config
        assert loaded.hf_config["eos_token_id"] == raw.hf_config["eos_token_id"]


def test_saved_model_loads_to_the_same_bits(folder, tmp_path):
    raw = checkpoint.load(folder, dtype=torch.bfloat16, pack=False)
    writing.save(raw.model, tmp_path / "saved.safetensors", raw.hf_config, {"temperature": 0.5})
    loaded = checkpoint.load(tmp_path / "saved.safetensors")
    assert torch.equal(logits(loaded), logits(raw))
    assert loaded.args == raw.args and loaded.args.dtype == "bfloat16"
    assert loaded.generation_config == {"temperature": 0.5}
    assert loaded.folder == tmp_path
    with safe_open(tmp_path / "saved.safetensors", "pt") as file:
        assert set(file.keys()) == set(raw.model.state_dict())
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["quantize"]) == ("skipfast", "1", "none")


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}, {"head_dim": 32}])
def test_exported_folder_is_read_by_transformers(make_hf, tmp_path, config):
    import transformers

    hf_model = make_hf(tmp_path / "hf", num_key_value_heads=2, **config)
    raw = checkpoint.load(tmp_path / "hf", pack=False)
    writing.export_hf(raw.model.state_dict(), raw.args, tmp_path / "out", raw.hf_config, torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(exported(tokens).logits, hf_model(tokens).logits)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 2
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert ModelArgs.from_hf_config(old) == ModelArgs.from_hf_config(new) == raw.args
    assert torch.equal(logits(checkpoint.load(tmp_path / "out", pack=False)), logits(raw))


def test_config_from_args_reads_back_as_the_same_args(folder):
    args = checkpoint.open_source(folder).args
    config = writing.hf_config_from_args(args, eos_token_id=7)
    assert ModelArgs.from_hf_config(config) == args
    assert config["eos_token_id"] == 7


def test_every_parameter_of_the_model_has_its_row_in_the_table(folder):
    loaded = checkpoint.load(folder, pack=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.model.state_dict().items()}
    assert shapes == {n: checkpoint.pieces(n, loaded.args, True)[n][0] for n in checkpoint.our_names(loaded.args)}
    hf_names = [piece for name in shapes for piece in checkpoint.pieces(name, loaded.args, is_ours=False)]
    assert sorted(hf_names) == sorted(load_file(folder / "model.safetensors"))


def test_loading_casts_counts_bytes_and_reports_progress(folder):
    steps = []
    loaded = checkpoint.load(folder, torch.bfloat16, pack=False, progress=lambda *step: steps.append(step))
    names = list(loaded.model.state_dict())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in loaded.model.parameters())
    assert loaded.args.dtype == "bfloat16"
    assert loaded.bytes == sum(p.numel() * 2 for p in loaded.model.parameters())
    assert [done for done, _, _ in steps] == list(range(1, len(names) + 1))
    assert {total for _, total, _ in steps} == {len(names)} and {name for _, _, name in steps} == set(names)
    assert checkpoint.load(folder).args.dtype == "float32"  # the config's own


def test_tied_head_is_packed_once_and_read_by_the_embedding(make_hf, tmp_path):
    if reason := cpu.load():
        pytest.skip(f"C++ ops: {reason}")
    make_hf(tmp_path, tie_word_embeddings=True)
    plain, packed = checkpoint.load(tmp_path, pack=False).model, checkpoint.load(tmp_path).model
    assert packed.embedding.weight is packed.lm_head.weight and is_packed(packed.lm_head.weight)
    assert plain.embedding.weight is plain.lm_head.weight
    tokens = torch.tensor([0, 31, 32, 95])
    assert torch.equal(packed.embed(tokens), plain.embed(tokens))
    assert torch.equal(unpack_rows(pack(plain.lm_head.weight), tokens), plain.embed(tokens))
    with pytest.raises(ValueError, match="pack=False"):
        writing.save(packed, tmp_path / "x.safetensors", {})


def test_tied_config_may_come_with_a_second_head_of_the_right_shape(make_hf, tmp_path):
    make_hf(tmp_path, tie_word_embeddings=True)
    expected = logits(checkpoint.load(tmp_path))
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(checkpoint.load(tmp_path)), expected)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}))
    message = error_of(tmp_path)
    assert "'lm_head.weight'" in message and "[3, 64]" in message and "[96, 64]" in message


def test_rotary_buffers_of_old_files_are_ignored(folder):
    expected = logits(checkpoint.load(folder))
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(checkpoint.load(folder)), expected)


# ---- broken files ----


def test_missing_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.pop(Q_PROJ))
    assert repr(Q_PROJ) in error_of(folder)


def test_missing_untied_head_is_named(folder):
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    message = error_of(folder)
    assert "'lm_head.weight' is missing" in message and "tie_word_embeddings" in message


def test_unknown_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "'model.layers.0.self_attn.q_proj.bias' is not part" in error_of(folder)


@pytest.mark.parametrize(("layers", "culprit"), [(2, "model.layers.2."), (10**9, "model.layers.3.")])
def test_wrong_layer_count_names_the_first_tensor_out_of_place(folder, layers, culprit):
    edit_config(folder, num_hidden_layers=layers)
    message = error_of(folder)
    assert culprit in message and f"{layers} layers" in message


def test_wrong_shape_names_tensor_both_shapes_and_config_keys(folder):
    edit_weights(folder, lambda t: t.update({Q_PROJ: torch.zeros(48, 64)}))
    message = error_of(folder)
    for part in (Q_PROJ, "[48, 64]", "[64, 64]", "num_attention_heads*head_dim", "hidden_size"):
        assert part in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_name_the_tensor(folder, value):
    edit_weights(folder, lambda t: t[Q_PROJ][5].__setitem__(7, value))
    message = error_of(folder)
    assert repr(Q_PROJ) in message and "NaN or inf" in message


def test_value_that_overflows_the_asked_dtype_names_the_tensor(folder):
    edit_weights(folder, lambda t: t[Q_PROJ][5].__setitem__(7, 1e30))
    checkpoint.load(folder)
    message = error_of(folder, dtype=torch.float16)
    assert repr(Q_PROJ) in message and "too large for float16" in message


def test_integer_weights_name_tensor_and_dtype(folder):
    edit_weights(folder, lambda t: t.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}))
    message = error_of(folder)
    assert repr(Q_PROJ) in message and "torch.int8" in message


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_corrupt_safetensors_file_is_named(folder, damage):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"truncated": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b"", "text": b"x" * 99}[damage]
    )
    assert f"{file} is truncated, corrupt or no weight file" in error_of(folder)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 half a zip"])
def test_corrupt_bin_file_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert str(folder / "pytorch_model.bin") in error_of(folder)


def test_truncated_bin_file_and_one_with_code_in_it_are_named(folder):
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:5000])
    assert str(file) in error_of(folder)
    torch.save({"x": torch.ones(1)}, file)
    file.write_bytes(file.read_bytes().replace(b"ctorch\nFloatStorage", b"ccollections\nOrdere"))  # no storage
    assert str(file) in error_of(folder)
    torch.save({"x": subprocess.Popen}, file)
    assert str(file) in error_of(folder)
    torch.save({"x": 1}, file)
    assert str(file) in error_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", "", "\udcff"])
def test_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert str(folder / "config.json") in error_of(folder)


def test_missing_config_and_missing_weights_are_named(folder):
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in error_of(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("attention_bias", True),
        ("hidden_size", None),
        ("hidden_act", "gelu"),
        ("num_key_value_heads", 3),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "yarn"}),
    ],
)
def test_unsupported_config_names_file_and_key(folder, key, value):
    edit_config(folder, head_dim=None, **{key: value})
    message = error_of(folder)
    assert str(folder / "config.json") in message
    assert key in message or "yarn" in message


def test_unsupported_dtype_is_named(folder):
    assert "torch.int8" in error_of(folder, dtype=torch.int8)
    edit_config(folder, dtype="float64", torch_dtype="float64")
    assert "float64" in error_of(folder)
    assert checkpoint.load(folder, dtype=torch.float32).args.dtype == "float32"


def test_absent_shard_is_named(make_hf, tmp_path):
    make_hf(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in error_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}'])
def test_broken_index_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in error_of(folder)


def test_a_file_that_is_not_ours_points_to_its_folder(folder):
    assert "pass its folder" in error_of(folder / "model.safetensors")


@pytest.mark.parametrize(("key", "value"), [("version", "2"), ("quantize", "int3"), ("config", "{"), ("config", "{}")])
def test_unknown_format_of_our_own_file_is_refused(folder, tmp_path, key, value):
    file = tmp_path / "ours.safetensors"
    raw = checkpoint.load(folder, pack=False)
    writing.save(raw.model, file, raw.hf_config)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | {key: value})
    message = error_of(file)
    assert str(file) in message
    assert key == "config" or (key in message and value in message)


# ---- the hub ----


def test_neither_path_nor_hub_id_is_one_line():
    for source in ("no-such-folder", "/no/such/folder", "./a/b", "a/b/c", "https://huggingface.co/a/b"):
        assert f"{source} is neither an existing file or folder nor a hub id" in error_of(source)


def test_hub_id_is_downloaded_without_bin_files(folder, monkeypatch):
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(logits(checkpoint.load("org/name")), logits(checkpoint.load(folder)))
    [(repo, options)] = calls
    assert repo == "org/name"
    assert not any("bin" in pattern for pattern in options["allow_patterns"])


def test_hub_files_of_a_llama_3_are_those_that_loading_reads():
    wanted = [
        *("config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        *("original/tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
    ]
    others = ["original/consolidated.00.pth", "original/params.json", "README.md", "onnx/model.onnx", ".gitattributes"]
    patterns = {"allow_patterns": hub.WANTED, "ignore_patterns": hub.LEFT_OUT}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


def test_hub_id_without_safetensors_falls_back_to_bin(folder, monkeypatch):
    file = folder / "pytorch_model.bin"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def download(repo, allow_patterns, ignore_patterns):
        if any("bin" in pattern for pattern in allow_patterns):
            torch.save(tensors, file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint.load("org/name")
    assert file.exists()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, "open https://huggingface.co/org/name, accept the licence, then run `hf auth login`"),
        (errors.RepositoryNotFoundError, "no such public repository"),
        (errors.LocalEntryNotFoundError, "cannot be downloaded"),
        (errors.OfflineModeIsEnabled, "cannot be downloaded"),
        (ConnectionError, "cannot be downloaded"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, kind, expected):
    def download(*_, **__):
        error = kind.__new__(kind)
        Exception.__init__(error, "first line\nsecond line")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = error_of("org/name")
    assert expected in message and "org/name" in message


def test_offline_machine_is_one_line():
    assert "cannot be downloaded" in error_of("skipfast-no-such-org/no-such-model")


# ---- the converter ----


def test_converter_writes_a_complete_folder(folder, tmp_path):
    result = run_converter(
        "--checkpoint_path",
        folder,
        "--output_path",
        tmp_path / "deep/out",
        "--precision",
        "bf16",
        "--json",
        tmp_path / "record.json",
    )
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in (tmp_path / "deep/out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    record = json.loads((tmp_path / "record.json").read_text())
    loaded = checkpoint.load(tmp_path / "deep/out")
    assert loaded.args.dtype == record["dtype"] == loaded.hf_config["torch_dtype"] == "bfloat16"
    assert loaded.bytes == record["bytes"]
    assert torch.equal(logits(loaded), logits(checkpoint.load(folder, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--checkpoint_path", "no-such-folder"], "no-such-folder"),
        (["--checkpoint_path", "{hf}", "--output_path", "{hf}"], "{hf} exists already"),
        (["--checkpoint_path", "{hf}", "--output_path", "{hf}", "--force"], "is the source itself"),
        (["--checkpoint_path", "{hf}", "--output_path", "{hf}/model.safetensors", "--force"], "is the source itself"),
        (["--checkpoint_path", "{hf}", "--output_path", "{hf}/config.json", "--force"], "is a file"),
        (["--checkpoint_path", "{hf}", "--output_path", "{hf}/config.json/deep"], "{hf}/config.json"),
        (["--checkpoint_path", "{hf}/config.json"], "{hf}/config.json"),
    ],
)
def test_converter_mistakes_are_one_line(folder, capsys, convert, arguments, culprit):
    before = sorted(folder.rglob("*"))
    assert convert(*(word.format(hf=folder) for word in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert culprit.format(hf=folder) in captured.err
    assert captured.out == "" and sorted(folder.rglob("*")) == before


def test_converter_exits_with_2_in_a_process_of_its_own(folder):
    edit_weights(folder, lambda t: t.pop(Q_PROJ))
    result = run_converter("--checkpoint_path", folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and Q_PROJ in result.stderr
    assert not (folder / "skipfast").exists()


def test_converter_shows_the_traceback_of_what_is_no_users_mistake(folder, convert, monkeypatch):
    monkeypatch.setattr(writing, "convert", lambda *_: [*zip([1], [], strict=True)])
    with pytest.raises(ValueError, match="zip"):
        convert("--checkpoint_path", folder)
    assert not (folder / "skipfast").exists()


def test_converter_reports_a_full_disk_in_one_line(folder, convert, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(convert_hf_checkpoint.shutil, "copyfile", full)
    assert convert("--checkpoint_path", folder) == 2
    assert (
        capsys.readouterr().err == f"error: cannot write output_path {folder / 'skipfast'}: No space left on device\n"
    )
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("output", ["out", "out/one.safetensors"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_converter_takes_metas_tokenizer_along(folder, tmp_path, convert, output, again):
    """Llama 3 folders have it in a subfolder, beside weights in another format."""
    (folder / "tokenizer.json").unlink()
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "original/tokenizer.model").write_text("".join(lines))
    expected = load_tokenizer(folder).encode("any text", bos=False)
    assert convert("--checkpoint_path", folder, "--output_path", tmp_path / "first" / output) == 0
    source = checkpoint.open_source(tmp_path / "first" / output)
    if again:  # what was converted can be a source, too
        arguments = ("--checkpoint_path", tmp_path / "first" / output, "--output_path", tmp_path / "second")
        assert convert(*arguments) == 0
        source = checkpoint.open_source(tmp_path / "second")
    assert load_tokenizer(source.folder).encode("any text", bos=False) == expected
    assert [file.name for file in (source.folder / "original").iterdir()] == ["tokenizer.model"]


def test_converter_help_ends_with_an_example(capsys, convert):
    assert convert("--help") == 0
    assert capsys.readouterr().out.strip().split("\n")[-1].strip().startswith("python convert_hf_checkpoint.py --")


def test_converter_default_outputs(folder, capsys, convert):
    assert convert_hf_checkpoint.default_output("org/name") == Path("checkpoints/org/name")
    assert convert("--checkpoint_path", folder) == 0
    assert torch.equal(logits(checkpoint.load(folder / "skipfast")), logits(checkpoint.load(folder)))
    assert convert("--checkpoint_path", folder) == 2
    assert "--force" in capsys.readouterr().err
    assert convert("--checkpoint_path", folder, "--force", "--precision", "fp16") == 0
    assert checkpoint.load(folder / "skipfast").args.dtype == "float16"


def test_converter_does_not_mix_tokenizers(folder, tmp_path, capsys, convert):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.json").write_text('{"another": 1}')
    assert convert("--checkpoint_path", folder, "--output_path", tmp_path / "out/x.safetensors") == 2
    assert str(tmp_path / "out/tokenizer.json") in capsys.readouterr().err


@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_interrupted_conversion_leaves_nothing(folder, tmp_path, monkeypatch, convert, output):
    edit_weights(folder, lambda t: t[Q_PROJ][0].__setitem__(0, float("nan")))  # found when half is written
    before = sorted(tmp_path.rglob("*"))
    assert convert("--checkpoint_path", folder, "--output_path", tmp_path / output) == 2
    assert sorted(tmp_path.rglob("*")) == before

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_read_into", interrupted)
    assert convert("--checkpoint_path", folder, "--output_path", tmp_path / output) == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_save_keeps_the_old_file(folder, tmp_path, monkeypatch):
    raw = checkpoint.load(folder, pack=False)
    file = tmp_path / "ours.safetensors"
    file.write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.delattr(raw.model.layers[2].mlp, "w2")
    with pytest.raises(AttributeError):
        writing.save(raw.model, file, raw.hf_config)
    assert sorted(tmp_path.rglob("*")) == before and file.read_bytes() == b"old"


# ---- memory ----

MEASURE = """
import resource, sys, torch
from loading import checkpoint
from kernels import cpu

cpu.load()
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = checkpoint.load(sys.argv[1]).bytes
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) * 1024, size)
"""


def test_loading_peaks_little_above_the_weights(tmp_path):
    args = ModelArgs(
        dim=512,
        n_layer=40,
        n_head=8,
        n_kv_head=8,
        head_dim=64,
        ffn_dim=1408,
        vocab_size=8000,
        max_seq_len=64,
        norm_eps=1e-5,
        rope_base=1e4,
        dtype="bfloat16",
    )
    names = checkpoint.our_names(args)
    state = {name: torch.ones(checkpoint.pieces(name, args, True)[name][0], dtype=torch.bfloat16) for name in names}
    writing.export_hf(state, args, tmp_path, writing.hf_config_from_args(args), torch.bfloat16)
    result = run_python(MEASURE, tmp_path)
    assert result.returncode == 0, result.stderr
    peak, size = map(int, result.stdout.split())
    assert size > 250e6
    assert peak < 1.3 * size, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
