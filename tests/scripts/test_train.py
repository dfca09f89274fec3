"""Training: the recipe's formulas, runs that survive a kill, and folders that transformers reads."""

import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from loading.tokenizer import load_tokenizer
from model import ModelArgs, Transformer
from scripts.common import journal
from scripts.common.first_drafts import simulate_rounds
from scripts.common.texts import find_files, split_texts
from scripts.train import __main__ as train
from scripts.train import config, recipe, report, trainer
from tests.helpers.processes import ROOT

MODULES = ("textwrap.py", "heapq.py", "bisect.py", "contextlib.py", "keyword.py", "string.py")
TINY = (
    "--n_layer 4 --dim 32 --n_head 4 --n_kv_head 2 --ffn_dim 48 --vocab_size 512 --context 32 --batch_size 4 "
    "--curriculum rotational:2 --precision fp32 --save_every 5 --eval_every 50 --learning_rate 0.01 --heldout 0.2"
).split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs in this process and in a child of its own have the same bits only with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in MODULES:
        (folder / name).write_bytes((Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes())
    return folder


@pytest.fixture
def run(monkeypatch, texts):
    """run(output_dir, *flags) trains in this process; the final report is cut short."""
    monkeypatch.setattr(report, "NUM_PROMPTS", 2)
    monkeypatch.setattr(report, "NEW_TOKENS", 6)

    def run(output_dir, *flags):
        argv = ["train", "--data", str(texts), *TINY, "--output_dir", str(output_dir), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        train.main()
        return torch.load(output_dir / "state.pt", weights_only=True)

    return run


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, texts, tmp_path):
    flags = ["--max_steps", "120", "--focus_exits", "1:0.5", "--distill", "0.5"]
    whole = run(tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "scripts.train", "--data", str(texts), *TINY, *flags, "--output_dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    log = out / "log.jsonl"
    while child.poll() is None and not ((out / "state.pt").exists() and log.read_text().count("\n") > 12):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it was killed"
    step = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 0 < step < 120 and step % 5 == 0
    resumed = run(out, *flags)
    assert resumed["step"] == whole["step"] == 120
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    losses = [
        [json.loads(row)["loss_by_exit"] for row in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1], "the log of a resumed run has every step once"


def test_a_tiny_run_lowers_the_loss_and_its_folder_says_the_same_in_transformers(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    state = run(out, "--max_steps", "60", "--json", str(tmp_path / "result.json"), "--tie_embeddings")
    rows = [json.loads(row)["loss_by_exit"]["4"] for row in (out / "log.jsonl").read_text().splitlines()]
    assert sum(rows[-5:]) / 5 < rows[0] - 0.5
    for name in ("config.json", "generation_config.json", "files.txt", "heldout_prompts.jsonl", "loss_curve.png"):
        assert (out / name).stat().st_size > 10, name
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert len(results["heldout_loss_by_exit"]) == 4 and results["step"] == 60

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = Transformer(ModelArgs(**state["args"]))
    ours.load_state_dict(state["model"])
    settings = config.TrainConfig(precision="fp32", context=32, device="cpu")
    tokenizer = load_tokenizer(out)
    stream = torch.tensor(tokenizer.encode("def merge(a, b):\n    return sorted(a + b)\n\n\nclass Heap:\n    pass\n"))
    with torch.no_grad():
        expected = theirs(stream[None, :-1], labels=None).logits[0]
        expected = torch.nn.functional.cross_entropy(expected, stream[1:]).item()
    settings.context = len(stream) - 1
    loss = trainer.heldout_losses(trainer.Trainer(ours, settings), stream, 1)[-1].mean().item()
    assert loss == pytest.approx(expected, abs=1e-4)


def test_training_goes_on_from_a_hugging_face_folder(run, tmp_path, capsys):
    first = run(tmp_path / "first", "--max_steps", "2")
    result = tmp_path / "result.json"
    continual = ["--checkpoint_path", str(tmp_path / "first"), "--json", str(result)]
    second = run(tmp_path / "second", *continual, "--max_steps", "3", "--learning_rate", "0.0")
    assert second["step"] == 3 and (second["config"]["optimizer"], second["config"]["dropout_schedule"]) == (
        "adamw",
        "constant",
    )
    said = capsys.readouterr()
    assert "before" in said.out and said.err.count("dropout_schedule constant") == 1, "the choice is told once"
    results = json.loads(result.read_text())["results"]
    assert results["heldout_before"] == results["heldout_loss_by_exit"], "nothing was learnt"
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), f"{name} moved at learning rate 0"


def test_threads_that_share_a_batch_drop_the_layers_that_one_thread_drops(run, tmp_path):
    rows = []
    for workers in ("1", "2"):
        run(
            tmp_path / workers,
            "--max_steps",
            "6",
            "--p_max",
            "0.5",
            "--dropout_schedule",
            "constant",
            "--optimizer",
            "adamw",
            "--workers",
            workers,
        )
        log = (tmp_path / workers / "log.jsonl").read_text().splitlines()
        rows.append([{"norm": row["grad_norm"], **row["loss_by_exit"]} for row in map(json.loads, log)])
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, abs=1e-3)


def test_the_own_tokenizer_brings_back_every_character_and_agrees_with_transformers(run, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(tmp_path, "--max_steps", "1")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    odd = "  \n\n\n\tif x:\n          y = 'é漢\U0001f600' \r\n \n" + "\n" * 5 + "# 12345   end  "
    for text in [odd, " ", "a", *(path.read_text() for path in texts.iterdir())]:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert theirs(text)["input_ids"] == ids


def test_layers_are_dropped_as_in_the_paper():
    n_layer, p_max, steps = 8, 0.2, 50
    for step in (0, 7, steps - 1):
        over_time = math.exp(step * math.log(2) / (steps - 1)) - 1
        expected = torch.tensor([math.exp(layer * math.log(2) / (n_layer - 1)) - 1 for layer in range(n_layer)]) * p_max
        constant = recipe.dropout_probabilities(n_layer, p_max, "constant", step / (steps - 1))
        torch.testing.assert_close(constant, expected)
        growing = recipe.dropout_probabilities(n_layer, p_max, "exp", step / (steps - 1))
        torch.testing.assert_close(growing, expected * over_time)


def test_a_dropped_layer_leaves_its_samples_untouched():
    args = ModelArgs(
        dim=32,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        head_dim=16,
        ffn_dim=32,
        vocab_size=50,
        max_seq_len=16,
        norm_eps=1e-5,
        rope_base=10000.0,
    )
    model = Transformer(args)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    training = trainer.Trainer(model, config.TrainConfig(context=16, precision="fp32", device="cpu"))
    dropped = torch.tensor([[False, False], [True, False]])
    first, second = training.exits.hidden_states(torch.randint(50, (2, 16)), dropped)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_curricula_and_weights_follow_the_paper():
    n_layer, period, steps = 12, 8, 240
    for step in range(0, steps, 5):
        rotational = recipe.active_exits(f"rotational:{period}", n_layer, step, 0.5)
        layers = [layer for layer in range(n_layer) if layer % period == step % period or layer == n_layer - 1]
        assert rotational == [layer + 1 for layer in layers]
        gradual = recipe.active_exits("gradual", n_layer, step, step / steps)
        assert gradual == list(range(max(n_layer - step // (steps // (2 * n_layer)), 1), n_layer + 1))
    e_scale = 0.4
    weights = recipe.exit_weights(list(range(1, n_layer + 1)), n_layer, e_scale, "paper")
    raw = [e_scale * sum(range(layer + 1)) for layer in range(n_layer - 1)]
    raw.append(n_layer - 1 + e_scale * sum(range(n_layer - 1)))
    assert [weights.get(depth, 0.0) for depth in range(1, 13)] == pytest.approx([each / sum(raw) for each in raw])


def test_simulated_rounds_count_what_drafting_would_accept():
    # K = 3: [yes yes no] + correction, [yes yes yes] + bonus, then one draft before the last token
    agree = [True, True, False, True, True, True, False, True, True]
    assert simulate_rounds(agree, 3) == (2 + 3 + 1, 3 + 3 + 1)
    assert simulate_rounds([True], 3) == (0, 0)


def test_heldout_files_are_never_trained_on_and_copies_are_dropped(texts, tmp_path):
    for index in range(40):
        lines = "\n".join(f"value_{index}_{line} = compute_something({line})" for line in range(5))
        (tmp_path / f"file{index}.py").write_text(lines)
    files = find_files([str(tmp_path)], "*.py")
    training, heldout = split_texts(files * 2, 0.25)
    assert {name for name, _ in training} | {name for name, _ in heldout} == {name for name, _ in files}
    assert not {name for name, _ in training} & {name for name, _ in heldout}
    assert 0 < len(heldout) < 20 and len(training) == 2 * (40 - len(heldout)), "named twice, counted twice"
    text = files[0][1].read_text()
    for index in range(20):
        (tmp_path / f"copy{index}.py").write_text(text)
    again = split_texts(find_files([str(tmp_path)], "*.py"), 0.25)
    assert sum(other == text for part in again for _, other in part) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "no_such_folder", "--max_steps", "1"], "no_such_folder"),
        (["--data", str(ROOT / "tests"), "--glob", "*.nothing", "--max_steps", "1"], "*.nothing"),
        (["--data", "stdlib", "--max_steps", "1", "--curriculum", "spiral:3"], "curriculum"),
        (["--data", "stdlib", "--max_steps", "1", "--dim", "250"], "dim"),
        (["--data", "stdlib", "--max_steps", "1", "--focus_exits", "40:1"], "focus_exits"),
        (["--data", "stdlib"], "max_steps"),
        (["--data", "stdlib", "--max_steps", "-5", "--max_minutes", "1"], "max_steps must be above 0, got -5"),
        (["--data", "stdlib", "--max_steps", "5", "--max_minutes", "nan"], "max_minutes must be above 0, got nan"),
        (["--data", "stdlib", "--max_steps", "1", "--e_scale", "-1"], "e_scale must be 0 or more, got -1.0"),
        (["--data", "stdlib", "--max_steps", "1", "--focus_exits", "1:nan"], "focus_exits must have weights of 0"),
        (["--data", "stdlib", "--max_steps", "1", "--seed", "4294967296"], "seed must be in 0..4294967295"),
        (["--data", str(ROOT / "tests"), "--glob", "/x", "--max_steps", "1"], "glob must be a pattern for names"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, words, run_program, tmp_path):
    code, _, err = run_program(train.main, *flags, "--output_dir", tmp_path / "out")
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and words in lines[0]


def test_what_else_is_in_the_folder_is_refused_and_other_settings_are_told(run, tmp_path, capsys):
    out = tmp_path / "out"
    run(out, "--max_steps", "2")
    with pytest.raises(ValueError, match="another shape"):
        run(out, "--max_steps", "2", "--n_layer", "3")
    run(out, "--max_steps", "2", "--seed", "7", "--focus_exits", "2:0.5")
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("goes on with")] == [
        "goes on with another seed: 7, 0 before",
        "goes on with another focus_exits: '2:0.5', '' before",
    ]
    with journal.claimed(out), pytest.raises(ValueError, match="another run writes into"):
        run(out, "--max_steps", "2")
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="folder of the checkpoint, whose weights it would replace"):
        run(out, "--max_steps", "3", "--checkpoint_path", str(out), "--optimizer", "muon")
    assert (out / "model.safetensors").read_bytes() == weights
    (out / "log.jsonl").write_text("{mine}\n")
    with pytest.raises(ValueError, match="log.jsonl is not what this program writes"):
        run(out, "--max_steps", "3")
    whole = (out / "state.pt").read_bytes()
    renamed = whole.replace(b"vocab_size", b"vocab_shze")
    for content in (b"", b"mine", whole[: len(whole) // 2], renamed, {"settings": {}}, {"model": 3}):
        (out / "state.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, out / "state.pt")
        with pytest.raises(ValueError, match="state.pt is not what this program writes"):
            run(out, "--max_steps", "2")
    (out / "state.pt").unlink()
    with pytest.raises(ValueError, match="holds a tokenizer of 512 tokens, got 400"):
        run(out, "--max_steps", "2", "--vocab_size", "400")
    (out / "tokenizer.model").write_bytes(b"half")
    with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
        run(out, "--max_steps", "2")
    run(tmp_path / "other", "--max_steps", "1", "--vocab_size", "400")
    with pytest.raises(ValueError, match="holds another tokenizer than the checkpoint"):
        run(out, "--max_steps", "2", "--checkpoint_path", str(tmp_path / "other"))
    assert not list(tmp_path.glob("*/*.tmp"))
