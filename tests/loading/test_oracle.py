"""The oracle: random tiny Llamas must compute what transformers computes, whatever their shape and files."""

import json

import pytest
import torch

from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from drafting.catalogue import make_policy
from generate import decode
from kernels import cpu
from kernels.linear import is_packed
from loading import checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "multi_head": {},
    "grouped_query": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied_head": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "tied_head_odd_vocabulary": {"tie_word_embeddings": True, "vocab_size": 77},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "wide_heads": {"head_dim": 32},
    "narrow_heads": {"head_dim": 8, "num_key_value_heads": 2},
}
PROMPT_TOKENS, NEW_TOKENS = 24, 64


@pytest.fixture(params=["cpp_ops", "reference"])
def pack(request, monkeypatch):
    """Whether to pack: once with the C++ ops and packed weights, once in pure torch."""
    if request.param == "reference":
        monkeypatch.setattr(cpu.build, "_loaded", False)
        return False
    reason = cpu.load()
    if reason:
        pytest.skip(f"C++ ops: {reason}")
    return True


def assert_same_as_transformers(hf_model, folder, pack):
    """Logits of a prompt and of 64 tokens decoded one by one within 1e-4, and the same greedy choice at each.

    transformers sees the whole text at once: by induction its own greedy text is ours if it agrees at every position.
    """
    loaded = checkpoint.load(folder, dtype=torch.float32, pack=pack)
    model, vocab_size = loaded.model, loaded.args.vocab_size
    assert is_packed(model.lm_head.weight) == pack
    text = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # not inference_mode: the runner below writes into this cache
        model.setup_cache(PROMPT_TOKENS + NEW_TOKENS)
        logits = model(text, torch.arange(PROMPT_TOKENS))
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS):
            text = torch.cat((text, logits[-1:].argmax(-1)))
            logits = torch.cat((logits, model(text[-1:], torch.tensor([position]))))
        expected = hf_model(text[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert text[PROMPT_TOKENS:].tolist() == expected[PROMPT_TOKENS - 1 : -1].argmax(-1).tolist()
    assert len(set(text[PROMPT_TOKENS:].tolist())) > 4, "a constant text would prove little"
    prompt, greedy = text[:PROMPT_TOKENS].tolist(), text[PROMPT_TOKENS:].tolist()
    runner = Runner(model, PROMPT_TOKENS + NEW_TOKENS, max_rows=4, compile=pack)
    for policy in ("none", *(f"static:{exit_layer}" for exit_layer in range(1, loaded.args.n_layer + 1))):
        steps = decode(runner, prompt, GenerateConfig(NEW_TOKENS), make_policy(policy, loaded.args.n_layer))
        assert Generation.collect(steps).tokens == greedy, policy


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_text_equal_transformers(make_hf, tmp_path, shape, pack):
    hf_model = make_hf(tmp_path, **SHAPES[shape])
    assert_same_as_transformers(hf_model, tmp_path, pack)


def test_sharded_files_equal_transformers(make_hf, tmp_path, pack):
    hf_model = make_hf(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_as_transformers(hf_model, tmp_path, pack)


def test_pytorch_bin_equals_transformers(make_hf, tmp_path, pack):
    hf_model = make_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = hf_model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as of old
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_as_transformers(hf_model, tmp_path, pack)


def test_sharded_pytorch_bin_equals_transformers(make_hf, tmp_path):
    hf_model = make_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map, state = {}, hf_model.state_dict()
    for part in range(2):
        name = f"pytorch_model-{part + 1:05}-of-00002.bin"
        shard = {key: state[key].clone() for key in list(state)[part::2]}
        torch.save(shard, tmp_path / name)
        weight_map |= dict.fromkeys(shard, name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_as_transformers(hf_model, tmp_path, pack=False)


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["plain_rope", "llama3_rope"])
@pytest.mark.parametrize("generation", [4, 5])
def test_configs_of_transformers_4_and_5_equal_transformers(make_hf, tmp_path, generation, rope):
    rope = rope or {"rope_type": "default", "rope_theta": 300.0}
    hf_model = make_hf(tmp_path, rope_parameters=rope)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype"):
        config.pop(key, None)
    if generation == 5:
        config |= {"rope_parameters": rope, "dtype": "float32"}
    else:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
        config["rope_scaling"] = scaling if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_as_transformers(hf_model, tmp_path, pack=False)
    assert checkpoint.load(tmp_path).args.rope_base == rope["rope_theta"]
