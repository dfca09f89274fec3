"""skipfast as a library: what it generates is what generate.py generates, streamed or whole, and mistakes are told."""

import json
import sys
import textwrap

import pytest

import cli
import generate
import skipfast
from skipfast import UserError, load

SETTINGS = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, policy="static:1", dtype="fp32", threads=1, length=200)


def test_the_text_is_that_of_the_command_line(model, folder, tmp_path, monkeypatch):
    flags = [
        "--checkpoint_path",
        folder,
        "--precision",
        "fp32",
        "--threads",
        "1",
        "--policy",
        "static:1",
        "--ignore_eos",
    ]
    flags += ["--max_new_tokens", "24", "--prompt", "def main", "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    cli.run(generate.main)
    expected = json.loads((tmp_path / "out.json").read_text())
    result = model.generate("def main", **SETTINGS)
    assert (result.text, result.tokens) == (expected["text"], expected["tokens"])
    assert result.numbers["exit_layers"] == expected["exit_layers"] and result.numbers["drafted"] > 0
    assert sum(len(round.tokens) for round in result.rounds) == 24


def test_pieces_of_a_stream_make_the_whole_text_up_to_a_stop_string(model):
    whole = model.generate("def main", **SETTINGS).text
    pieces = list(model.stream("def main", **SETTINGS))
    assert len(pieces) > 3 and "".join(pieces) == whole
    stop = whole[len(whole) // 2 :][:3]
    cut = whole[: whole.find(stop)]
    assert model.generate("def main", stop=stop, **SETTINGS).text == cut
    assert "".join(model.stream("def main", stop=[stop], **SETTINGS)) == cut


@pytest.mark.parametrize("policy", ["none", "prompt_lookup+static:2", "auto"])
def test_another_policy_writes_the_same_text_greedy_and_sampled(model, policy):
    for sampling in ({}, {"temperature": 0.8, "seed": 3}):
        expected = model.generate("import sys", **SETTINGS, **sampling)
        assert model.generate("import sys", policy=policy, **SETTINGS, **sampling).tokens == expected.tokens


def test_a_stream_cannot_go_on_once_another_text_has_the_cache(model):
    expected = model.generate("import sys", **SETTINGS).text
    begun, waiting = model.stream("def main", **SETTINGS), model.stream("class", **SETTINGS)
    with pytest.raises(UserError, match="another text was started"):
        next(begun)
    next(waiting)
    assert model.generate("import sys", **SETTINGS).text == expected
    with pytest.raises(UserError, match="another text was started"):
        next(waiting)
    pieces = model.stream("import sys", **SETTINGS)
    first = next(pieces)
    with pytest.raises(UserError, match="does not fit"):  # a prompt that was refused has touched nothing
        model.stream("def main", max_new_tokens=500)
    assert first + "".join(pieces) == expected


@pytest.mark.parametrize("setting", ["top_k", "top_p", "verification"])
def test_each_setting_of_the_sampler_is_one_of_the_library(model, setting):
    value = {"top_k": 3, "top_p": 0.2, "verification": "rejection"}[setting]
    settings = {"temperature": 1.5, "seed": 3} | SETTINGS
    found = model.generate("import sys", **settings, **{setting: value}).tokens
    assert found != model.generate("import sys", **settings).tokens


def test_token_ids_are_a_prompt_and_messages_take_the_chat_template(model, monkeypatch):
    ids = model.engine.tokenizer.encode("def main")
    assert model.generate(ids, **SETTINGS).tokens == model.generate("def main", **SETTINGS).tokens
    messages = [{"role": "user", "content": "def main"}]
    monkeypatch.setattr(model.engine.tokenizer, "apply_chat", lambda given: ids if given == messages else None)
    assert model.chat(messages, **SETTINGS).tokens == model.generate(ids, **SETTINGS).tokens


def test_mistakes_are_told_before_the_first_piece(model, folder):
    with pytest.raises(UserError, match="does not fit"):
        model.stream("def main", max_new_tokens=500)
    with pytest.raises(UserError, match="policy must be one of"):
        model.generate("def main", policy="statics")
    with pytest.raises(UserError, match="temperature"):
        model.stream("def main", temperature=-1)
    with pytest.raises(UserError, match="device must be one of"):
        load(folder, device="tpu")
    with pytest.raises(UserError, match="neither an existing file"):
        load(str(folder) + "-not-there")


def test_the_example_at_the_head_of_the_file_runs(capsys):
    example = textwrap.dedent("\n".join(line for line in skipfast.__doc__.split("\n")[1:] if line.startswith("    ")))
    assert example.startswith("from skipfast import load\n")
    exec(compile(example.replace("max_new_tokens=64", "max_new_tokens=8"), "example", "exec"), {})
    assert capsys.readouterr().out.strip()
