"""The engine: settings are checked before weights are read, devices are chosen with a word, runners are shared."""

import pytest
import torch

from decoding.engine import CALIBRATION_TOKENS, Engine, EngineConfig, chosen_device
from decoding.generation import GenerateConfig, Generation
from errors import UserError
from generate import decode


def open_engine(folder, **settings):
    return Engine.open(EngineConfig(str(folder), **{"dtype": "fp32", "threads": 1, "device": "cpu"} | settings))


@pytest.mark.parametrize("seen, asked, device", [(True, "auto", "cuda"), (False, "auto", "cpu"), (True, "cpu", "cpu")])
def test_auto_takes_a_gpu_where_there_is_one_and_says_so_in_one_line(monkeypatch, seen, asked, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    lines = []
    assert chosen_device(asked, lines.append) == device
    assert len(lines) == (device == "cuda") and all("a GPU" in line and "--device cpu" in line for line in lines)


def test_a_gpu_that_is_not_there_is_a_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device cuda: torch sees no CUDA device"):
        chosen_device("cuda")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threads": 0}, "threads must be in 1"),
        ({"dtype": "fp8"}, "dtype must be one of"),
        ({"draft_vocab": 1}, "draft_vocab must be in 2"),
        ({"draft_vocab": 10**6}, "draft_vocab must be in 2"),
        ({"quantize": "int3"}, "int3"),
        ({"draft_quantize": "int8:embedding=yes"}, "leave out embedding=yes"),
        ({"length": 1}, "length must be 2 or more"),
    ],
)
def test_settings_are_checked_before_weights_are_read(folder, settings, message):
    with pytest.raises(UserError, match=message):
        open_engine(folder, **settings)


def test_copies_that_nobody_would_draft_with_are_refused_before_weights_are_read(folder):
    engine = open_engine(folder, draft_quantize="int8")
    for text in ("none", "prompt_lookup"):
        with pytest.raises(UserError, match=f"draft_quantize int8: policy {text} drafts with no layers"):
            engine.prepare([engine.policy(text)], 100)
    assert engine.model is None


def test_the_cache_has_room_for_what_policies_measure(folder):
    engine = open_engine(folder)
    most = engine.args.max_seq_len
    assert engine.length_for([engine.policy("static:1")], 50) == 50
    assert engine.length_for([engine.policy("auto")], 50) == min(CALIBRATION_TOKENS, most)
    assert engine.length_for([], None) == most


def test_runners_are_made_once_and_a_deeper_policy_gets_deeper_copies(folder):
    engine = open_engine(folder, draft_quantize="int8")
    shallow, deep, plain = engine.policy("static:1"), engine.policy("static:2"), engine.policy("none")
    engine.prepare([shallow], 100)
    runner = engine.runner(shallow)
    assert engine.runner(shallow) is runner and len(engine.draft_model.layers) == 1
    engine.prepare([deep], 100)
    assert len(engine.draft_model.layers) == 2
    config, prompt = GenerateConfig(20), [1, 7, 9]
    texts = [Generation.collect(decode(engine.runner(p), prompt, config, p)).tokens for p in (shallow, deep, plain)]
    assert texts[0] == texts[1] == texts[2]
    assert engine.facts(deep)["draft_quantize"] == "int8" and engine.facts(deep)["policy"] == str(deep)
