"""Exit adapters: the model stays as it is, its early exit comes nearer to its last layer, the file says what it is."""

import hashlib
import json
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loading import checkpoint, writing
from scripts.common.ranks import Ranks
from scripts.train import __main__ as train
from scripts.train import adapters, loop, report
from scripts.train.config import TrainConfig

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXT = TrainConfig(
    data=[str(STDLIB / name) for name in ("textwrap.py", "heapq.py", "bisect.py", "contextlib.py")],
    context=64,
    batch_size=8,
    precision="fp32",
    heldout=0.2,
    save_every=20,
    eval_every=20,
)


@pytest.fixture(scope="module", autouse=True)
def short_report():
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "NUM_PROMPTS", 3)
    patch.setattr(report, "NEW_TOKENS", 16)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose loss was taken after the last layer only."""
    folder = tmp_path_factory.mktemp("base")
    config = replace(
        TEXT,
        n_layer=4,
        dim=48,
        ffn_dim=96,
        vocab_size=512,
        max_steps=80,
        p_max=0.0,
        e_scale=0.0,
        learning_rate=0.02,
        output_dir=str(folder),
    )
    train.train_with(config, Ranks(None))
    return folder


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """(settings, results) of a finished run, and the checkpoint's digest before it."""
    out = tmp_path_factory.mktemp("adapted")
    before = digest(base)
    config = TrainConfig(
        data=TEXT.data,
        context=64,
        batch_size=8,
        precision="fp32",
        heldout=0.2,
        save_every=20,
        eval_every=20,
        checkpoint_path=str(base),
        adapter_exits="1,2",
        adapter_rank=16,
        max_steps=60,
        output_dir=str(out),
        json=str(out / "result.json"),
    )
    train.train_with(config, Ranks(None))
    return config, json.loads((out / "result.json").read_text())["results"], before


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_divergence_falls_and_agreement_rises_at_every_adapted_exit(adapted):
    config, results, _ = adapted
    assert [(row["exit_layer"], row["adapter"]) for row in results["exits"]] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]
    for plain, with_adapter in zip(results["exits"][::2], results["exits"][1::2], strict=True):
        assert with_adapter["kl"] < 0.7 * plain["kl"] and with_adapter["loss"] < plain["loss"]
        assert with_adapter["agreement"] > plain["agreement"] + 0.05
        assert 0 <= plain["acceptance_rate"] <= with_adapter["acceptance_rate"] <= 1
    rows = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and rows[-1]["kl_by_exit"]["1"] < 0.7 * rows[0]["kl_by_exit"]["1"]
    assert rows[-1]["heldout_kl_by_exit"].keys() == {"1", "2"}


def test_the_model_stays_as_it_is_bit_for_bit(adapted, base, monkeypatch):
    config, _, before = adapted
    assert digest(base) == before
    models = []
    load = checkpoint.load
    keep = lambda *args, **keywords: models.append(load(*args, **keywords)) or models[-1]
    monkeypatch.setattr(checkpoint, "load", keep)
    train.train_with(replace(config, max_steps=61), Ranks(None))
    fresh = load(base, torch.float32, pack=False).model.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in models[0].model.state_dict().items())


def test_the_file_holds_both_matrices_of_each_exit_in_fp32_and_says_for_which_shape(adapted):
    config, _, _ = adapted
    with safe_open(Path(config.output_dir) / adapters.ADAPTER, framework="pt") as file:
        assert file.metadata() == {"format": "skipfast exit adapter", "n_layer": "4", "dim": "48"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"exit.1.down": [16, 48], "exit.1.up": [48, 16], "exit.2.down": [16, 48], "exit.2.up": [48, 16]}
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in tensors.values())
    assert not list(Path(config.output_dir).glob("*.tmp"))


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(adapted, tmp_path, monkeypatch):
    def stop_in_the_middle(path, trainer, optimizers, position):
        save(path, trainer, optimizers, position)
        if position["step"] == 40 and stops:
            stops.clear()
            raise KeyboardInterrupt

    save, stops = loop.save_state, [True]
    monkeypatch.setattr(loop, "save_state", stop_in_the_middle)
    whole, parts = (replace(adapted[0], json=None, output_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    with pytest.raises(KeyboardInterrupt):
        train.train_with(parts, Ranks(None))
    for config in (parts, whole):
        train.train_with(config, Ranks(None))
    files = [load_file(tmp_path / name / adapters.ADAPTER) for name in ("whole", "parts")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_a_run_of_another_model_or_of_other_adapters_is_refused(adapted, base, tmp_path):
    config = adapted[0]
    with pytest.raises(ValueError, match="another shape"):
        train.train_with(replace(config, adapter_exits="1"), Ranks(None))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    loaded = checkpoint.load(base, torch.float32, pack=False)
    state = loaded.model.state_dict() | {"norm.weight": loaded.model.norm.weight * 2}
    writing.export_hf(state, loaded.args, other, loaded.hf_config, torch.float32)
    with pytest.raises(ValueError, match="another checkpoint"):
        train.train_with(replace(config, checkpoint_path=str(other)), Ranks(None))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter_exits", "4"], "adapter_exits must name exits in 1..3, got 4"),
        (["--adapter_exits", "0,2"], "1..3, got 0"),
        (["--adapter_exits", "two"], "adapter_exits"),
        (["--adapter_exits", "2", "--adapter_rank", "50"], "adapter_rank must be even and in 2..48"),
        (["--adapter_exits", "2", "--adapter_rank", "7"], "adapter_rank must be even"),
        (["--adapter_exits", "2", "--p_max", "0.3"], "p_max"),
        (["--adapter_exits", "2", "--optimizer", "muon"], "optimizer"),
        (["--adapter_rank", "8"], "--adapter_exits"),
    ],
)
def test_a_mistake_is_one_line(flags, words, base, run_program, tmp_path):
    given = ["--data", *TEXT.data, "--checkpoint_path", str(base), "--max_steps", "1", "--context", "64"]
    code, _, err = run_program(train.main, *given, *flags, "--output_dir", tmp_path)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and words in lines[0]
    assert not (tmp_path / "state.pt").exists()
