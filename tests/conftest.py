"""What the whole suite shares: one thread, no network, and random tiny Llamas written by transformers."""

import json
import os
import sys

os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait are 20 times as slow on a busy machine
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels are interpreted; compiling them has its own process
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402  (the environment is read at import)
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import cli  # noqa: E402
from tests.helpers.models import train_tokenizer  # noqa: E402

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large enough that greedy text is not constant
}


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny models: a second thread only waits


@pytest.fixture(scope="session")
def make_hf():
    """make_hf(folder, seed=0, max_shard_size=None, **config) writes a tiny fp32 Llama to folder and returns it.

    `config` overrides the keys of TINY; the returned object is the transformers model, in eval mode.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def make(folder, seed=0, max_shard_size="1GB", **config):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | config)).eval()
        for name, parameter in model.named_parameters():  # norms of all ones would hide a forgotten norm weight
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return model

    return make


@pytest.fixture(scope="session")
def folder(make_hf, tmp_path_factory):
    """A tiny checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(folder, 380)
    make_hf(folder, vocab_size=380, num_key_value_heads=2)
    return folder


@pytest.fixture
def run_program(monkeypatch, capsys):
    """run_program(main, *flags) runs a program in this process -> (exit code, stdout, stderr)."""

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(main)
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def play(folder, tmp_path, run_program):
    """play(program, *flags, code=0) runs an experiment program on the tiny checkpoint -> (stdout, stderr)."""

    def play(program, *flags, code=0):
        defaults = ["--checkpoint_path", folder, "--no-compile", "--output_dir", tmp_path / "out"]
        exit_code, out, err = run_program(program.main, *defaults, *flags)
        assert exit_code == code, err
        return out, err

    return play


@pytest.fixture(scope="session")
def skip_file(tmp_path_factory):
    """A file for the policy skip_set that fits models of four layers and more; beside it random ones for `learned` and
    of exit adapters, for models of width 64 and so many layers: learned4.safetensors, adapter8.safetensors, …"""
    file = tmp_path_factory.mktemp("skips") / "skips.json"
    file.write_text(json.dumps({"skip_attention": [2], "skip_mlp": [1, 3]}))
    random, dim = torch.Generator().manual_seed(0), 64
    for n_layer in (4, 8):
        shapes = {"w1": (16, dim), "b1": (16,), "w2": (2 * n_layer, 16), "b2": (2 * n_layer,)}
        network = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        network["w1"] *= dim**-0.5
        network["w2"] *= 0.5
        network["b2"] += 0.5
        exits = {
            f"exit.{depth}.{name}": torch.randn(shape, generator=random) * 0.02
            for depth in range(1, n_layer)
            for name, shape in (("down", (6, dim)), ("up", (dim, 6)))
        }
        for kind, name, tensors in (("learned policy", "learned", network), ("exit adapter", "adapter", exits)):
            metadata = {"format": f"skipfast {kind}", "n_layer": str(n_layer), "dim": str(dim)}
            save_file(tensors, file.with_name(f"{name}{n_layer}.safetensors"), metadata)
    return str(file)
