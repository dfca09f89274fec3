"""Peers: llama.cpp gets the same model, and its end is one line. The rest of them is in test_benchmark.py."""

import importlib.util

import pytest

from decoding.engine import Engine, EngineConfig
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from drafting.catalogue import make_policy
from generate import decode
from scripts.benchmark import peers
from scripts.benchmark.llama_cpp_peer import LlamaCpp

needs_llama_cpp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in peers.NEEDS["llama.cpp"]),
    reason=peers.INSTALL["llama.cpp"] + " to run this test",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}


@pytest.fixture
def engine(make_hf, tmp_path):
    def engine(**config):
        make_hf(tmp_path, **config)
        opened = Engine.open(EngineConfig(str(tmp_path), dtype="fp32", threads=1), needs_tokenizer=False)
        opened.load(100)
        return opened

    return engine


@needs_llama_cpp
@pytest.mark.parametrize(
    "config",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}],
    ids=["plain", "gqa", "tied", "llama3"],
)
def test_llama_cpp_gets_the_same_model(engine, config):
    opened = engine(**config)
    runner, prompt = Runner(opened.model, 100, 1), [3, 77, 5, 9, 60, 61, 14] * 6
    ours = Generation.collect(decode(runner, prompt, GenerateConfig(24), make_policy("none", runner.n_layer)))
    peer = LlamaCpp(opened, 100, [1])
    try:
        tokens, seconds, summary = peer.run(prompt, 24)
    finally:
        peer.close()
    assert tokens == ours.tokens and seconds > 0 and summary["prefill_s"] > 0
    assert peer.process.poll() is not None, "its process has ended"


@needs_llama_cpp
def test_the_end_of_the_peers_process_is_one_line(engine):
    peer = LlamaCpp(engine(), 100, [1])
    try:
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(ValueError, match=r"^llama.cpp ended with code -9: [^\n]*$"):
            peer.run([1, 2, 3], 4)
    finally:
        peer.close()
