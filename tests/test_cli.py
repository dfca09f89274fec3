"""The command line: what generate.py prints and writes, and what it says to a user's mistake."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import cli
import generate
from decoding import calibrate, compare
from decoding.engine import Engine
from decoding.generation import ideal_speedup
from decoding.runner import Runner
from decoding.sampling import CoupledSampler
from drafting.catalogue import POLICIES
from drafting.plan import Round
from errors import UserError
from kernels import cpu
from kernels.exit_head import Exit
from loading import checkpoint
from loading.tokenizer import load_tokenizer
from tests.helpers.models import train_tokenizer
from tests.helpers.processes import ROOT

VOCAB = 400
PROMPT = "def read(path):\n"
TOOLS = re.compile(r"building CPU kernels|C\+\+ kernels not available")  # notices of machines without a built kernel


@pytest.fixture(scope="session")
def original(make_hf, tmp_path_factory):
    """A tiny checkpoint with a tokenizer. Its drafts are sometimes right and it prefers pieces of text to bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_hf(folder, vocab_size=VOCAB, num_key_value_heads=2)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"][:260] = 0
    for name, tensor in tensors.items():
        if re.search(r"layers\.[12].*(o_proj|down_proj)", name):
            tensor *= 0.3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def call(original, tmp_path, monkeypatch, run_program):
    """call(*flags, stdin="", code=0) runs generate.py in this process -> (JSON object or None, stdout, stderr)."""
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)  # what auto measures takes as short as can be

    def call(*flags, stdin="", code=0, source=original, compile="--no-compile"):
        file = tmp_path / "out.json"
        file.unlink(missing_ok=True)
        flags = ["--checkpoint_path", source, "--json", file, *([compile] if compile else []), *flags]
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        exit_code, out, err = run_program(generate.main, *flags)
        assert exit_code == code, err
        return json.loads(file.read_text()) if file.exists() else None, out, err

    return call


@pytest.fixture
def error_of(call, tmp_path):
    """error_of(*flags) -> the message of a run that must fail: one line, exit code 2, and nothing written."""

    def error_of(*flags, **options):
        result, out, err = call(*flags, code=2, **options)
        lines = [line for line in err.splitlines() if line.strip() and not TOOLS.match(line)]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert result is None and not list(tmp_path.glob("*.json*")) and not list(tmp_path.glob(".*"))
        assert "Traceback" not in out + err
        return lines[0].removeprefix("error: ")

    return error_of


def without_table(out: str) -> str:
    """Standard output up to the table of numbers, which begins with the policy's string."""
    return re.split(rf"\n(?:{'|'.join(POLICIES)})[^┏]*\n┏", out)[0]


# ---- what a run writes ----


def test_the_json_of_a_run_holds_everything_one_needs_to_know(call, original):
    result, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 20, "--draft_exit", 1, "--num_draft_tokens", 2)
    assert {
        "prompt_ids",
        "tokens",
        "text",
        "drafted",
        "accepted",
        "acceptance_rate",
        "rounds",
        "tokens_per_round",
        "mean_exit_layer",
        "exit_layers",
        "layer_visits_per_token",
        "head_visits_per_token",
        "prefill_s",
        "decode_s",
        "tokens_per_s",
        "compile_s",
        "ideal_speedup",
        "verified",
        "config",
        "versions",
        "hardware",
    } <= set(result)
    tokenizer = load_tokenizer(original)
    assert result["prompt_ids"] == tokenizer.encode(PROMPT)
    assert len(result["tokens"]) == 20
    assert result["text"] == tokenizer.decode(result["tokens"], continues=True)
    assert 0 < result["accepted"] < result["drafted"], "a run in which no draft or every draft is right shows little"
    assert result["acceptance_rate"] == result["accepted"] / result["drafted"]
    assert result["rounds"] == 19 - result["accepted"]
    assert result["tokens_per_round"] == 19 / result["rounds"]
    assert result["tokens_per_s"] == pytest.approx(19 / result["decode_s"])
    assert result["mean_exit_layer"] == 1 and result["exit_layers"] == {"1": result["drafted"]}
    assert result["layer_visits_per_token"] == pytest.approx((result["drafted"] + 3 * result["rounds"]) / 19)
    assert result["head_visits_per_token"] == pytest.approx((result["drafted"] + result["rounds"]) / 19)
    assert result["compile_s"] >= 0 and result["verified"] is True
    assert 0 < result["ideal_speedup"] < 3
    assert result["prefill_s"] > 0
    config = result["config"]
    assert config["policy"] == "static:exit_layer=1,num_draft_tokens=2"
    assert (config["max_new_tokens"], config["temperature"], config["seed"]) == (20, 0, 0)
    assert (config["precision"], config["backend"]) == ("float32", "eager")
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["python"]
    assert result["hardware"]["threads"] == torch.get_num_threads() and result["hardware"]["cpu"]
    assert without_table(out).startswith(PROMPT + result["text"])
    for shown in ("tokens/s", "acceptance rate", "speedup by bytes alone"):
        assert shown in out


def test_the_ideal_speedup_is_one_without_drafts_and_counts_bytes_with_them(original):
    model = checkpoint.load(original, pack=False).model
    head = model.lm_head.weight.nbytes / sum(p.nbytes for p in model.layers[0].parameters())
    ideal = lambda *visits: ideal_speedup(*visits, model)
    assert ideal(7, 7 * 3, 7) == pytest.approx(1)
    # a round of three drafts at exit 1 of 3 layers, all right; and one of which nothing is right
    assert ideal(4, 3 * 1 + 3, 3 + 1) == pytest.approx(4 * (3 + head) / (3 * (1 + head) + 3 + head))
    assert ideal(1, 3 * 1 + 3, 3 + 1) < 1


def test_prompt_prompt_file_and_prompt_ids_mean_the_same(call, tmp_path):
    text = "  päth = 'ü'\n\tx\r\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    by_text, _, _ = call("--prompt", text, "--max_new_tokens", 8)
    by_file, _, _ = call("--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 8)
    by_ids, _, _ = call("--prompt_ids", ",".join(map(str, by_text["prompt_ids"])), "--max_new_tokens", 8)
    assert by_text["prompt_ids"] == by_file["prompt_ids"] == by_ids["prompt_ids"]
    assert by_text["tokens"] == by_file["tokens"] == by_ids["tokens"]


def test_prompt_ids_need_no_tokenizer(call, folder):
    (folder / "tokenizer.model").unlink()
    result, out, _ = call("--prompt_ids", "1, 5,9", "--max_new_tokens", 6, source=folder)
    assert result["prompt_ids"] == [1, 5, 9] and result["text"] is None
    assert " ".join(map(str, result["tokens"])) in out


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8, "--top_k", 50, "--top_p", 0.95, "--seed", 3)])
def test_every_policy_and_draft_length_writes_the_same_tokens(call, sampling):
    common = ("--prompt", PROMPT, "--max_new_tokens", 30, *sampling)
    plain, _, _ = call(*common, "--policy", "none")
    assert plain["drafted"] == plain["accepted"] == 0 and plain["acceptance_rate"] is None
    assert plain["tokens_per_round"] == 1 and plain["rounds"] == 29
    assert plain["ideal_speedup"] == pytest.approx(1)
    assert plain["mean_exit_layer"] is None
    for flags in (
        (),
        ("--policy", "static:2,num_draft_tokens=6"),
        ("--policy", "static:1", "--num_draft_tokens", 0),
        ("--draft_exit", 3),
        ("--draft_exit", 1, "--draft_vocab", 300),
        ("--policy", "prompt_lookup+confidence:0.3", "--stop", "never there"),
    ):
        result, _, _ = call(*common, *flags)
        assert result["tokens"] == plain["tokens"] and result["text"] == plain["text"], flags


def test_no_drafts_at_k_zero_and_no_rounds_for_one_token(call):
    result, _, _ = call("--prompt", PROMPT, "--draft_exit", 1, "--num_draft_tokens", 0, "--max_new_tokens", 5)
    assert result["drafted"] == 0 and result["acceptance_rate"] is None and result["rounds"] == 4
    result, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 1)
    assert len(result["tokens"]) == 1 and result["rounds"] == 0 and result["decode_s"] == 0
    assert result["tokens_per_s"] is None and result["tokens_per_round"] is None
    assert "–" in out


def test_an_empty_prompt_is_bos_alone(call):
    result, _, _ = call("--prompt", "", "--max_new_tokens", 4)
    assert result["prompt_ids"] == [1] and len(result["tokens"]) == 4
    assert "comparison" not in result


class Unloaded(Engine):
    """An engine of which flags need to know nothing but the number of layers."""

    def __init__(self, n_layer: int):
        self.args = SimpleNamespace(n_layer=n_layer, dim=64)


def test_names_of_flags_in_gpt_fast_and_layerskip_are_accepted():
    ours = generate.parse_flags(
        ["--prompt", "x", "--draft_exit", "3", "--num_draft_tokens", "5", "--max_new_tokens", "9"]
    )
    for k, exit_layer, length in (
        ("--speculate_k", "--exit_layer", "--max_steps"),
        ("--num_speculations", "--exit_layer", "--max_new_tokens"),
    ):
        assert generate.parse_flags(["--prompt", "x", exit_layer, "3", k, "5", length, "9"]) == ours
    assert generate.policy_text(ours, n_layer=8) == "static:3" and ours.num_draft_tokens == 5


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ((), "auto"),
        (("--draft_exit", 5), "static:exit_layer=5"),
        (("--exit_layer", 5, "--num_speculations", 2), "static:exit_layer=5,num_draft_tokens=2"),
        (
            ("--policy", "static:5,num_draft_tokens=1", "--num_draft_tokens", 2),
            "static:exit_layer=5,num_draft_tokens=1",
        ),
        (("--num_draft_tokens", 4), "auto:num_draft_tokens=4"),
        (("--no_verify",), "static:exit_layer=3"),
        (("--dynamic_early_exit_mode", "logits_future"), "logits_future"),
        (("--dynamic_early_exit_mode", "consistent_tokens:checks=4"), "consistent_tokens:checks=4"),
        (("--dynamic_early_exit_mode", "confidence", "--conf_threshold", 0.4), "confidence:threshold=0.4"),
        (
            ("--dynamic_early_exit_mode", "margin:candidates=2-5", "--conf_threshold", 0.25),
            "margin:threshold=0.25,candidates=2-5",
        ),
        (("--layer_skip_proportion", 0.25), "layer_skip_proportion:proportion=0.25"),
        (("--layer_skip_proportion", 0), "layer_skip_proportion:proportion=0.0"),
        (("--conf_method", "softmax"), "margin"),
        (("--conf_method", "state", "--conf_threshold", 0.8), "saturation:threshold=0.8"),
        (("--conf_method", "top1", "--conf_threshold", 0.8), "confidence:threshold=0.8"),
        (("--conf_method", "entropy", "--conf_threshold", 2), "entropy:threshold=2.0"),
        (("--conf_threshold", 0.3, "--num_draft_tokens", 6), "confidence:threshold=0.3,num_draft_tokens=6"),
    ],
)
def test_flags_name_policies_also_in_the_words_of_layerskip_and_its_kin(flags, policy):
    flags = generate.parse_flags([*map(str, flags)])
    assert str(generate.policy_from_flags(flags, Unloaded(n_layer=12))) == policy


def test_without_flags_all_is_compiled():
    for prompt in ([], ["--prompt", ""], ["--prompt_ids", "1"], ["--prompt_file", "x"], ["--interactive"]):
        assert generate.parse_flags(prompt).compile is True
        assert generate.parse_flags([*prompt, "--no-compile"]).compile is False


def test_verbose_says_what_auto_chose_and_why(call):
    quiet, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 20)
    assert quiet["config"]["policy"] == "auto" and "auto: " not in out
    loud, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 20, "--verbose")
    assert loud["tokens"] == quiet["tokens"]
    assert re.search(r"^auto: exit layers.* agrees 0\.\d\d", out, re.MULTILINE) and "auto: rounds: " in out


@pytest.mark.parametrize("policy", [(), ("--policy", "confidence:0.2,candidates=1-2"), ("--policy", "none")])
def test_early_exit_says_that_its_text_is_not_the_models(call, monkeypatch, policy):
    monkeypatch.setattr(compare, "COMPARE_REPEATS", 2)
    result, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 30, "--no_verify", "--compare", *policy)
    plain, _, _ = call("--prompt", PROMPT, "--max_new_tokens", 30, "--policy", "none")
    assert result["verified"] is False and "unverified: not the full model's text" in " ".join(out.split())
    assert result["drafted"] == 0 and result["acceptance_rate"] is None and len(result["tokens"]) == 30
    assert sum(result["exit_layers"].values()) == 29 and 1 <= result["mean_exit_layer"] <= 3
    comparison = result["comparison"]
    assert comparison["identical"] is None and "not meant to be" in out
    assert (comparison["equal_to_full_model"] == 1) == (result["tokens"] == plain["tokens"]) == ("none" in policy)
    assert f"{100 * comparison['equal_to_full_model']:.1f}%" in out


def test_a_trimmed_draft_vocabulary_costs_less_and_its_coverage_is_told(call):
    flags = ("--prompt", PROMPT, "--max_new_tokens", 20, "--draft_exit", 1)
    whole, _, _ = call(*flags)
    half, out, _ = call(*flags, "--draft_vocab", VOCAB // 2)
    assert half["tokens"] == whole["tokens"] and "draft_vocab_coverage" not in whole
    assert half["draft_vocab_coverage"] == sum(token < VOCAB // 2 for token in half["tokens"]) / 20
    assert half["head_visits_per_token"] == pytest.approx((half["drafted"] / 2 + half["rounds"]) / 19)
    assert "text within the draft's vocabulary" in out


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_compiled_and_eager_runs_write_the_same_tokens(call, prompt):
    if reason := cpu.load():
        pytest.skip(f"C++ kernels not available, so torch would compile for a minute: {reason}")
    flags = ("--prompt", prompt, "--max_new_tokens", 20, "--temperature", 0.6)
    eager, _, _ = call(*flags)
    compiled, _, _ = call(*flags, compile=None)
    assert compiled["tokens"] == eager["tokens"]
    assert (compiled["config"]["backend"], eager["config"]["backend"]) == ("c++", "eager")


def test_text_ends_at_eos_unless_told_to_ignore_it(call, folder):
    whole, _, _ = call("--prompt", PROMPT, "--max_new_tokens", 24)
    eos = whole["tokens"][10]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text()) | {"eos_token_id": [2, eos]}
        (folder / name).write_text(json.dumps(content))
    expected = whole["tokens"][: whole["tokens"].index(eos) + 1]
    for flags in ((), ("--policy", "none")):
        ended, _, _ = call("--prompt", PROMPT, "--max_new_tokens", 24, *flags, source=folder)
        assert ended["tokens"] == expected
    ignoring, _, _ = call("--prompt", PROMPT, "--max_new_tokens", 24, "--ignore_eos", source=folder)
    assert ignoring["tokens"] == whole["tokens"]


SAMPLED = ("--prompt", PROMPT, "--max_new_tokens", 40, "--temperature", 0.7, "--seed", 5)


@pytest.fixture
def stop_string(call, original):
    """(stop, index of the token that completes it, the whole run): two letters of different tokens."""
    tokenizer = load_tokenizer(original)
    whole, _, _ = call(*SAMPLED, "--policy", "none")
    for index in range(6, len(whole["tokens"])):
        before = tokenizer.decode(whole["tokens"][:index], continues=True)
        after = tokenizer.decode(whole["tokens"][: index + 1], continues=True)
        stop = before[-2:] + after[len(before) :][:1]
        if len(stop) == 3 and stop.isprintable() and stop not in before and after.find(stop) == len(before) - 2:
            return stop, index, whole
    raise AssertionError("no stop string in this text: choose another seed")


@pytest.mark.parametrize("policy", ["none", "static:1,num_draft_tokens=5", "static:3,num_draft_tokens=5"])
def test_a_stop_string_over_several_tokens_cuts_the_text_before_it(call, stop_string, policy):
    stop, index, whole = stop_string
    for shown in ((), ("--show_drafts",)):
        result, out, _ = call(*SAMPLED, "--policy", policy, "--stop", stop, "--stop", "never there", *shown)
        assert result["text"] == whole["text"][: whole["text"].find(stop)]
        assert result["tokens"] == whole["tokens"][: index + 1]
        printed = without_table(out).removeprefix(PROMPT)
        assert printed.rstrip("\n") == result["text"].rstrip("\n")
        assert stop not in out


def test_a_text_that_ends_in_the_beginning_of_a_stop_string_is_printed_whole(call, stop_string):
    stop, index, whole = stop_string
    result, out, _ = call(*SAMPLED, "--max_new_tokens", index, "--stop", stop)
    assert result["tokens"] == whole["tokens"][:index]
    assert result["text"].endswith(stop[:2]) and result["text"] in out


def test_shown_drafts_are_plain_text_in_a_pipe(call):
    plain, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 20, "--draft_exit", 1)
    shown, coloured, _ = call("--prompt", PROMPT, "--max_new_tokens", 20, "--draft_exit", 1, "--show_drafts")
    assert "\x1b" not in coloured
    assert without_table(coloured) == without_table(out)
    assert shown["text"] == plain["text"] and 0 < plain["accepted"] < plain["drafted"]


def test_comparing_reports_both_speeds_and_that_the_tokens_agree(call, monkeypatch):
    monkeypatch.setattr(compare, "COMPARE_REPEATS", 2)
    result, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 6, "--compare")
    comparison = result["comparison"]
    assert comparison["identical"] is True and comparison["repeats"] == 2
    assert comparison["speedup"] == comparison["tokens_per_s"] / comparison["autoregressive_tokens_per_s"]
    assert "identical tokens" in out and "speedup" in out


def test_comparing_notices_a_text_that_is_not_the_plain_one(call, monkeypatch):
    monkeypatch.setattr(compare, "COMPARE_REPEATS", 1)
    monkeypatch.setattr(Runner, "call_by_call", True)  # so that there is a call to falsify
    verify = CoupledSampler.verify
    monkeypatch.setattr(
        CoupledSampler,
        "verify",
        lambda self, drafted, exit, position: verify(
            self, drafted, Exit.of_logits(exit.logits() * (-1 if drafted else 1)), position
        ),
    )
    result, out, _ = call("--prompt", PROMPT, "--max_new_tokens", 6, "--compare", "--draft_exit", 1)
    assert result["comparison"]["identical"] is False
    assert re.search(r"identical tokens.*NO", out)


# ---- a conversation ----


def test_a_conversation_keeps_its_cache_and_says_what_a_single_run_says(call, monkeypatch):
    lengths, prefill = [], Runner.prefill_states
    monkeypatch.setattr(
        Runner,
        "prefill_states",
        lambda self, tokens, start=0, depths=(): (
            lengths.append((len(tokens), start)) or prefill(self, tokens, start, depths)
        ),
    )
    result, out, err = call("--interactive", "--max_new_tokens", 12, stdin="import os\nclass A\nx = 1\n\nnot read\n")
    config = result["config"]
    assert (config["precision"], config["quantize"], bool(config["backend"])) == ("float32", "none", True)
    turns, lengths = result["turns"], lengths[-3:]  # before them, the runner may have measured its own speed
    assert len(turns) == 3
    assert lengths[0] == (len(turns[0]["prompt_ids"]), 0)
    for before, turn, (length, start) in zip(turns, turns[1:], lengths[1:], strict=False):
        known = before["prompt_ids"] + before["tokens"]
        assert turn["prompt_ids"][: len(known)] == known, "a turn reads all turns before it"
        assert start == len(known) - 1 and length == len(turn["prompt_ids"]) - start
        assert f"{start} tokens from the cache" in err
    for turn in turns:
        ids = ",".join(map(str, turn["prompt_ids"]))
        alone, _, _ = call("--prompt_ids", ids, "--max_new_tokens", 12)
        assert alone["tokens"] == turn["tokens"] and alone["text"] == turn["text"]
        assert turn["text"] in out


def test_a_conversation_starts_anew_when_the_context_is_full(call):
    result, _, err = call("--interactive", "--max_new_tokens", 100, stdin="a\nb\nc\nd\n")
    assert "starting a new conversation" in err
    assert all(len(turn["prompt_ids"]) + 100 <= 256 for turn in result["turns"])
    assert len(result["turns"]) == 3 and len(result["turns"][-1]["prompt_ids"]) < 10


# ---- streamed text ----


HARD = "naïve 🙂👩‍👩‍👧 [bold]x[/bold] :smile: \\[ " + "long " * 40 + "\n\n  indented   \n{'a': 1}"


def stream(tokenizer, ids, stops=(), size=3, **options):
    """Push ids in rounds of `size` through a TerminalText; returns it, not closed yet."""
    output = cli.TerminalText(tokenizer, stops, **options)
    for first in range(0, len(ids), size):
        new = []
        for token in ids[first : first + size]:
            new.append(token)
            if output.take(token):
                break
        output.show(Round(tuple(new)))
        if output.stream.cut is not None:
            break
    return output


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("stops", [(), ("\n\n\n", "🙂🙂", "{'b")])
def test_what_is_streamed_is_the_text_whatever_its_characters(original, capsys, size, stops):
    tokenizer = load_tokenizer(original)
    ids = tokenizer.encode(HARD, bos=False)
    output = stream(tokenizer, ids, stops, size)
    text = output.close()
    assert text == tokenizer.decode(ids, continues=True) and text.strip() == HARD.strip()
    assert capsys.readouterr().out == text + "\n"


def test_half_a_character_at_the_end_is_shown_as_unreadable_and_one_between_tokens_waits(original, capsys):
    tokenizer = load_tokenizer(original)
    ids = tokenizer.encode("a🙂", bos=False)
    output = stream(tokenizer, ids[:-1], size=1)
    assert "\ufffd" not in capsys.readouterr().out
    assert output.close() == tokenizer.decode(ids[:-1], continues=True) and output.stream.text.endswith("a\ufffd")
    assert capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize("text", ["if x:\n\treturn\t1\n", "a\r\nb\r\n", "page\x0cbreak"])
def test_tabs_and_carriage_returns_are_streamed_as_they_are(original, capsys, text):
    """A Makefile with spaces for tabs does not run: what is printed into a pipe must be the text."""
    tokenizer = load_tokenizer(original)
    whole = stream(tokenizer, tokenizer.encode(text, bos=False)).close()
    assert capsys.readouterr().out == whole + "\n"


def test_a_prompt_with_tabs_is_repeated_as_it_is(call):
    _, out, _ = call("--prompt", "all:\n\techo\n", "--max_new_tokens", 2)
    assert out.startswith("all:\n\techo\n")


def test_the_end_of_the_text_is_held_back_only_while_it_may_begin_a_stop_string(original, capsys):
    tokenizer = load_tokenizer(original)
    ids = tokenizer.encode("one two STOP three", bos=False)
    text = tokenizer.decode(ids, continues=True)
    for length in range(1, len(ids) + 1):
        capsys.readouterr()
        output = stream(tokenizer, ids[:length], ["STOP"])
        shown, known = capsys.readouterr().out, tokenizer.decode(ids[:length], continues=True)
        if "STOP" in known:
            assert shown == text[: text.find("STOP")] == output.close()
        else:
            held = max(n for n in range(4) if known.endswith("STOP"[:n]))
            assert shown == known[: len(known) - held]


def plain_of(terminal: str) -> str:
    """What a terminal shows, less what is struck out."""
    return re.sub(r"\x1b\[[\d;]*m", "", re.sub(r"\x1b\[9;31m.*?\x1b\[0m", "", terminal, flags=re.DOTALL))


def on_terminal(tokenizer, steps, stops=()):
    """Show drafted Rounds on a terminal -> (what it got, the text)."""
    output = cli.TerminalText(tokenizer, stops, show_drafts=True)
    output.console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    for step in steps:
        for token in step.tokens:
            if output.take(token):
                break
        output.show(step)
    text = output.close()
    return output.console.file.getvalue(), text


def test_a_terminal_shows_accepted_and_rejected_drafts_apart(original):
    tokenizer = load_tokenizer(original)
    ids = tokenizer.encode("return value", bos=False)
    wrong = tokenizer.encode("zzz", bos=False)
    steps = [
        Round(tuple(ids[:1])),
        Round(tuple(ids[1:4]), drafted=(*ids[1:3], *wrong), accepted=2),
        Round(tuple(ids[4:])),
    ]
    shown, text = on_terminal(tokenizer, steps)
    assert text == tokenizer.decode(ids, continues=True)
    assert plain_of(shown) == text + "\n"
    assert tokenizer.decode(wrong, continues=True) in "".join(re.findall(r"\x1b\[9;31m(.*?)\x1b\[0m", shown))
    assert "\x1b[32m" in shown and "\x1b[34m" in shown


def test_no_part_of_a_stop_string_is_shown_when_a_draft_is_struck_out_amid_it(original):
    """The beginning of a stop string is held back, also while a rejected draft is being printed."""
    tokenizer = load_tokenizer(original)
    one, stop, wrong = (tokenizer.encode(text, bos=False) for text in ("one ", "\x01\x02", "q"))
    stop_bytes = [token for token in stop if tokenizer.decode([token]) in "\x01\x02" and tokenizer.decode([token])]
    assert len(stop_bytes) == 2
    steps = [Round(tuple(one)), Round(tuple(stop_bytes), drafted=(stop_bytes[0], *wrong), accepted=1)]
    shown, text = on_terminal(tokenizer, steps, ["\x01\x02"])
    assert text == tokenizer.decode(one, continues=True)
    assert "\x01" not in shown


# ---- mistakes ----


FLAG_MISTAKES = {
    "exit layer 0": (("--draft_exit", 0), ["exit_layer must be in 1..3", "got 0"]),
    "exit layer beyond the model": (("--exit_layer", 4), ["exit_layer must be in 1..3", "got 4"]),
    "negative exit layer": (("--policy", "static:-1"), ["exit_layer must be in 1..3", "got -1"]),
    "unknown policy": (("--policy", "magic"), ["policy must be one of", "static", "magic"]),
    "policy and draft_exit": (("--policy", "static:1", "--draft_exit", 2), ["--draft_exit", "--policy"]),
    "two aliases": (
        ("--conf_method", "top1", "--layer_skip_proportion", 0.5),
        ["--layer_skip_proportion and --conf_method each name a policy"],
    ),
    "three policies": (
        ("--dynamic_early_exit_mode", "random", "--draft_exit", 1, "--policy", "none"),
        ["--policy", "--draft_exit", "--dynamic_early_exit_mode", "each name a policy"],
    ),
    "unknown mode": (("--dynamic_early_exit_mode", "magic"), ["policy must be one of", "logits_future", "'magic'"]),
    "unknown key": (("--policy", "confidence:sure=1"), ["confidence has the keys threshold", "candidates", "'sure=1'"]),
    "a threshold for a policy without": (
        ("--draft_exit", 1, "--conf_threshold", 0.5),
        ["static has the keys exit_layer", "'threshold=0.5'"],
    ),
    "threshold above 1": (("--conf_threshold", 1.5), ["threshold must be in 0..1", "1.5"]),
    "threshold that is no number": (("--conf_method", "top1", "--conf_threshold", "nan"), ["threshold must be", "nan"]),
    "proportion above 1": (("--layer_skip_proportion", 2), ["proportion must be in 0..1", "got 2"]),
    "candidate beyond the model": (("--policy", "margin:candidates=1-4"), ["candidates must be in 1..3", "got 4"]),
    "bad stop rule": (("--policy", "static:1,stop=soon"), ["stop must be never, adaptive, svip or a number", "'soon'"]),
    "unknown part of a combination": (("--policy", "prompt_lookup+magic"), ["policy must be one of", "'magic'"]),
    "skip set that is not there": (("--policy", "skip_set:nowhere.json"), ["cannot read nowhere.json", "No such file"]),
    "draft vocabulary of one token": (("--draft_vocab", 1), ["draft_vocab must be in 2..400", "got 1"]),
    "draft vocabulary beyond the model's": (("--draft_vocab", 401), ["draft_vocab must be in 2..400", "got 401"]),
    "unverified lookups": (("--no_verify", "--policy", "prompt_lookup"), ["prompt_lookup", "--no_verify"]),
    "unverified auto": (("--no_verify", "--policy", "auto"), ["auto", "--no_verify"]),
    "unverified combination": (("--no_verify", "--policy", "static:1+prompt_lookup"), ["prompt_lookup", "--no_verify"]),
    "unverified trimmed drafts": (("--no_verify", "--draft_vocab", 99), ["--no_verify", "--draft_vocab"]),
    "too many drafts": (("--num_draft_tokens", 16), ["num_draft_tokens must be in 0..15", "got 16"]),
    "negative drafts": (("--num_draft_tokens", -1), ["num_draft_tokens must be", "-1"]),
    "no new tokens": (("--max_new_tokens", 0), ["max_new_tokens must be 1 or more", "got 0"]),
    "more than the context": (("--max_new_tokens", 256), ["max_new_tokens 256", "256 positions", "shorten"]),
    "negative temperature": (("--temperature", -1), ["temperature must be", "-1"]),
    "temperature that is no number": (("--temperature", "nan"), ["temperature must be", "nan"]),
    "top_k 0": (("--top_k", 0), ["top_k must be 1 or more", "got 0"]),
    "top_p 0": (("--top_p", 0), ["top_p must be in (0, 1]", "got 0"]),
    "top_p above 1": (("--top_p", 1.5), ["top_p must be in (0, 1]", "got 1.5"]),
    "negative seed": (("--seed", -3), ["seed must be in 0..", "-3"]),
    "seed of too many bits": (("--seed", 2**63), ["seed must be in 0..", str(2**63)]),
    "chat without a template": (("--chat",), ["no chat template"]),
    "no threads": (("--threads", 0), ["threads must be in 1..", "got 0"]),
    "threads without end": (("--threads", 100000), ["threads must be in 1..", "got 100000"]),
}


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_a_bad_flag_is_one_line_that_names_it_before_any_weight_is_read(error_of, monkeypatch, name):
    flags, parts = FLAG_MISTAKES[name]
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("read the weights before it looked"))
    message = error_of("--prompt", PROMPT, *flags)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "flags, parts",
    [
        (("--prompt_ids", "1,5", "--chat"), ["--chat", "--prompt_ids"]),
        (("--prompt", PROMPT, "--policy", "none", "--draft_quantize", "int8"), ["draft_quantize int8", "policy none"]),
        (
            ("--prompt", PROMPT, "--policy", "prompt_lookup", "--draft_quantize", "int8"),
            ["prompt_lookup drafts with no"],
        ),
    ],
)
def test_an_option_that_could_only_be_ignored_is_refused(error_of, monkeypatch, flags, parts):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("read the weights before it looked"))
    message = error_of(*flags)
    assert [part for part in parts if part not in message] == [], message


def test_a_conversation_is_not_held_unverified(error_of, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("read the weights before it looked"))
    message = error_of("--interactive", "--no_verify")
    assert "--no_verify" in message and "--interactive" in message


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        ("1,400", "prompt ids must be in 0..399, got 400"),
        ("1,-1", "got -1"),
        ("1,x", "'1,x'"),
        ("1.5", "'1.5'"),
        ("", "prompt is empty"),
    ],
)
def test_bad_prompt_ids_are_named(error_of, ids, part):
    assert part in error_of(f"--prompt_ids={ids}")


def test_bad_prompt_files_are_named(error_of, tmp_path):
    file = tmp_path / "prompt.txt"
    assert f"cannot read {file}: No such file" in error_of("--prompt_file", file)
    file.write_bytes(b"caf\xe9 au lait")
    message = error_of("--prompt_file", file)
    assert f"{file} is not UTF-8" in message and "byte 3" in message
    assert str(tmp_path) in error_of("--prompt_file", tmp_path)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def config_change(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def put_nan(folder):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_vocabulary(folder):
    tensors = load_file(folder / "model.safetensors")
    small = {name: (t[:390] if t.shape[0] == VOCAB else t).clone() for name, t in tensors.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    config_change(vocab_size=390)(folder)


BROKEN = {
    "truncated weights": (truncate, ["model.safetensors", "truncated"]),
    "a config without a needed key": (config_change(intermediate_size=None), ["config.json", "'intermediate_size'"]),
    "a config that lies about a shape": (config_change(intermediate_size=128), ["[112, 64]", "[128, 64]", "gate_proj"]),
    "a tokenizer with more ids than the model": (shrink_vocabulary, ["has 400 ids", "vocab_size is 390"]),
    "weights that are not numbers": (put_nan, ["model.layers.1.mlp.up_proj.weight", "NaN"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), ["no tokenizer", "tokenizer.model"]),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"x" * 99), ["cannot read", "tokenizer.mod"]),
    "no checkpoint": (shutil.rmtree, ["neither an existing file or folder nor a hub id"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line_that_names_the_culprit(error_of, folder, name):
    damage, parts = BROKEN[name]
    damage(folder)
    message = error_of("--prompt", PROMPT, source=folder)
    assert [part for part in [*parts, str(folder)] if part not in message] == [], message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_says_so(error_of):
    message = error_of("--prompt", PROMPT, "--device", "cuda")
    assert "cuda" in message and "--device cpu" in message


@pytest.mark.parametrize("where", ["no/such/folder/out.json", "file/out.json", "folder"])
def test_an_unwritable_json_path_is_refused_before_any_work(original, tmp_path, monkeypatch, run_program, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Engine, "open", lambda *_, **__: pytest.fail("opens the model before it looks"))
    code, _, err = run_program(generate.main, "--prompt", "x", "--json", tmp_path / where)
    assert code == 2 and err.startswith("error: cannot write") and where in err and err.count("\n") == 1


def test_a_mistake_of_the_users_is_one_line_and_every_other_exception_keeps_its_traceback(capsys):
    """Also a plain ValueError, which strict zips raise: that is a bug of ours."""

    def mistaken():
        raise UserError("first\n  second")

    def buggy():
        list(zip([1], [], strict=True))

    with pytest.raises(SystemExit) as caught:
        cli.run(mistaken)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: first second\n"
    with pytest.raises(ValueError, match="zip") as bug:
        cli.run(buggy)
    assert bug.traceback[-1].name == "buggy" and capsys.readouterr().err == ""


# ---- real processes ----


def process(*arguments, **options):
    command = [sys.executable, "generate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_the_program_itself_decodes_into_a_pipe_and_writes_json(original, tmp_path):
    done = process(
        "--checkpoint_path",
        original,
        "--prompt",
        PROMPT,
        "--max_new_tokens",
        5,
        "--json",
        tmp_path / "out.json",
        "--threads",
        1,
        "--compile" if cpu.load() is None else "--no-compile",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["hardware"]["threads"] == 1
    assert PROMPT + result["text"] in done.stdout and "\x1b" not in done.stdout


def test_the_program_itself_exits_with_2_and_one_line(tmp_path):
    done = process("--checkpoint_path", tmp_path / "nothing", "--prompt", "x", "--json", tmp_path / "out.json")
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not TOOLS.match(line)]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_help_ends_with_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as caught:
        generate.parse_flags(["--help"])
    assert caught.value.code == 0
    example = " ".join(capsys.readouterr().out.split("python generate.py ")[-1].split())
    flags = generate.parse_flags(re.findall(r"'[^']*'|\S+", example))
    assert flags.draft_exit is not None and flags.prompt is not None
