"""Training by two processes: the run of one, up to rounding; states that one or two go on from; errors in one line."""

import json
import shutil
import signal
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.common.ranks import Ranks
from scripts.train import __main__ as train
from scripts.train import loop, report
from scripts.train.config import TrainConfig
from tests.helpers.processes import outputs_of, start_ranks

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TINY = TrainConfig(
    data=[str(STDLIB / name) for name in ("textwrap.py", "heapq.py", "bisect.py")],
    n_layer=4,
    dim=32,
    ffn_dim=48,
    vocab_size=512,
    context=64,
    short_context=32,
    batch_size=4,
    precision="fp32",
    heldout=0.2,
    max_steps=20,
    save_every=10,
    eval_every=10,
    tie_embeddings=True,
)
# Every job in one pair of processes: most of a short run is the start of Python.
PROGRAM = """
import json, sys
from scripts.common import ranks
from scripts.train import __main__ as train
from scripts.train import report
from scripts.train.config import TrainConfig
report.NUM_PROMPTS, report.NEW_TOKENS = 2, 6
with ranks.joined() as group:
    for job in json.loads(sys.argv[1]):
        train.train_with(TrainConfig(**job), group)
"""


@pytest.fixture(scope="module")
def short_report():
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "NUM_PROMPTS", 2)
    patch.setattr(report, "NEW_TOKENS", 6)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def continual(tmp_path_factory, short_report):
    """The settings of a run that goes on from a checkpoint, in bf16 as most are, and drops many layers."""
    base = tmp_path_factory.mktemp("base")
    train.train_with(replace(TINY, max_steps=5, precision="bf16", output_dir=str(base)), Ranks(None))
    return replace(
        TINY,
        checkpoint_path=str(base),
        optimizer="adamw",
        learning_rate=0.01,
        p_max=0.4,
        curriculum="rotational:2",
        distill=0.3,
    )


def said_by(ranks, code=0):
    said = outputs_of(ranks)
    assert [rank.returncode for rank in ranks] == [code, code], said
    kept = ["\n".join(line for line in "".join(text).splitlines() if not line.startswith("[Gloo]")) for text in said]
    assert code or kept[1] == "", "only rank 0 speaks, unless another one fails first"
    return "".join(kept)


def as_flags(config):
    flags = []
    for name, value in vars(config).items():
        if value is True:
            flags.append(f"--{name}")
        elif value not in (None, False, ""):
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def losses(folder):
    return [json.loads(line)["loss_by_exit"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, other, steps, within=1e-4):
    first, second = losses(one), losses(other)
    assert len(first) == len(second) == steps
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, abs=within)
    states = [torch.load(Path(folder) / "state.pt", weights_only=True) for folder in (one, other)]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(tensor, states[1]["model"][name], atol=10 * within, rtol=0)


def test_two_processes_train_as_one_does_and_fsdp_goes_on_from_the_state_of_one(continual, tmp_path, monkeypatch):
    def keep_the_middle(path, trainer, optimizers, position):
        save(path, trainer, optimizers, position)
        if position["step"] == 10:
            shutil.copytree(path.parent, tmp_path / "resumed")

    save = loop.save_state
    monkeypatch.setattr(loop, "save_state", keep_the_middle)
    train.train_with(replace(continual, output_dir=str(tmp_path / "one"), json=str(tmp_path / "one.json")), Ranks(None))
    jobs = [
        vars(continual) | {"output_dir": str(tmp_path / name), "json": str(tmp_path / f"{name}.json"), "parallel": mode}
        for name, mode in (("ddp", "ddp"), ("fsdp", "fsdp"), ("resumed", "fsdp"))
    ]
    said = said_by(start_ranks(2, ["-c", PROGRAM, json.dumps(jobs)]))
    assert said.count("from step 10") == 1 and said.count("from step 0") == 2
    results = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["results"]
        for name in ("one", "ddp", "fsdp", "resumed")
    }
    for name in ("ddp", "fsdp", "resumed"):
        assert_same_run(tmp_path / "one", tmp_path / name, 20)
        for key in ("heldout_before", "heldout_loss_by_exit"):
            assert results[name][key] == pytest.approx(results["one"][key], abs=1e-3), (name, key)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 1000
    assert results["one"]["heldout_before"][0] > results["one"]["heldout_loss_by_exit"][0] + 0.2


def test_one_process_goes_on_where_two_with_sharded_weights_were_killed(continual, tmp_path):
    config = replace(continual, max_steps=60, save_every=5, learning_rate=0.002, output_dir=str(tmp_path / "killed"))
    ranks = start_ranks(2, ["-m", "scripts.train", *as_flags(replace(config, parallel="fsdp"))])
    log = tmp_path / "killed" / "log.jsonl"
    while ranks[0].poll() is None and not (log.exists() and log.read_text().count("\n") > 12):
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2, [rank.communicate() for rank in ranks]
    for rank in ranks:
        rank.communicate()
    assert 5 <= torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] < 60
    train.train_with(config, Ranks(None))
    train.train_with(replace(config, output_dir=str(tmp_path / "whole")), Ranks(None))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 60, within=1e-3)


def test_a_mistake_of_both_processes_is_one_line_and_exit_code_2(continual, tmp_path):
    config = replace(continual, batch_size=3, output_dir=str(tmp_path))
    said = said_by(start_ranks(2, ["-m", "scripts.train", *as_flags(config)]), code=2)
    assert said == "error: batch_size must be a multiple of the 2 processes, got 3"


@pytest.mark.parametrize(
    ("changes", "n_process", "words"),
    [
        ({"parallel": "fsdp"}, 1, "torchrun"),
        ({"parallel": "fsdp", "optimizer": "muon"}, 2, "optimizer muon"),
        ({"parallel": "fsdp", "optimizer": "adamw", "compile": True}, 2, "compile"),
        ({"workers": 2}, 2, "workers must be 1"),
        ({"checkpoint_path": "somewhere", "adapter_exits": "1"}, 2, "one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_by_name(changes, n_process, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **({"dropout_schedule": None, "optimizer": None} | changes)).validate(n_process)
