"""Samples: what is chosen and how prompts look, from bundled files, JSON lines and (a stand-in for) the hub."""

import argparse
import json

import pytest

from decoding.engine import Engine
from decoding.generation import GenerateConfig
from scripts.common import samples

ARTICLE = " ".join(f"word{i}" for i in range(150))
ROWS = {  # a row of each dataset as the hub has it -> the prompt, the responses
    "cnn_dm_summarization": (
        {"article": "A ship sank.", "highlights": "Ship sinks ."},
        "Article: A ship sank.\nSummary:",
        (" Ship sinks .",),
    ),
    "cnn_dm_lm": (
        {"article": ARTICLE, "highlights": ""},
        " ".join(ARTICLE.split()[:100]),
        (" " + " ".join(ARTICLE.split()[100:]),),
    ),
    "xsum_summarization": (
        {"document": "A ship sank.", "summary": "Ship sinks."},
        "Article: A ship sank.\nSummary:",
        (" Ship sinks.",),
    ),
    "human_eval": (
        {"prompt": "def f():\n", "canonical_solution": "    return {1}\n"},
        "def f():\n",
        ("    return {1}\n",),
    ),
    "mbpp": (
        {"text": "Write one.", "code": "def one():\n    return 1", "test_list": ["assert one() == 1"]},
        '"""\nWrite one.\nassert one() == 1\n"""',
        ("\ndef one():\n    return 1",),
    ),
    "top_v2": (
        {"utterance": "Call Ann", "semantic_parse": "[IN:CREATE_CALL ]"},
        "Utterance: Call Ann\nParse:",
        (" [IN:CREATE_CALL ]",),
    ),
    "gsm8k": ({"question": "1 + 1?", "answer": "It is #### 2"}, "Question: 1 + 1?\nAnswer:", (" It is #### 2",)),
    "mmlu": (
        {"question": "Which?", "choices": ["a", "b"], "answer": 1},
        "Question: Which?\nA. a\nB. b\nAnswer:",
        (" B",),
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
        "Passage: Ice is cold.\nQuestion: is ice cold?\nAnswer:",
        (" yes",),
    ),
    "nq_open": (
        {"question": "who was first", "answer": ["Ann", "Bob"]},
        "Question: who was first?\nAnswer:",
        (" Ann", " Bob"),
    ),
    "race": (
        {"article": "Ice is cold.", "question": "Ice is _ .", "options": ["hot", "cold"], "answer": "B"},
        "Article: Ice is cold.\nQuestion: Ice is _ .\nA. hot\nB. cold\nAnswer:",
        (" B",),
    ),
    "arc_challenge": (
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Which?\nA. x\nB. y\nAnswer:",
        (" B",),
    ),
}


def flags_of(*words, dataset="code"):
    parser = argparse.ArgumentParser()
    samples.add_sample_flags(parser, dataset)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(list(map(str, words)))


def read(*words):
    return samples.read_dataset(flags_of(*words))


@pytest.fixture(scope="module")
def demo():
    return Engine.open()


def test_bundled_samples_have_responses_and_fit_the_demo_with_room_for_an_answer(demo):
    assert samples.bundled_names() == ["code", "questions", "summarisation"]
    for name in samples.bundled_names():
        dataset = read("--dataset", name)
        assert 20 <= len(dataset.samples) <= 50 and len({s.prompt for s in dataset.samples}) == len(dataset.samples)
        assert all(s.responses and s.responses[0].strip() and s.prompt == s.prompt.rstrip() for s in dataset.samples)
        flags = flags_of("--dataset", name, "--num_samples", 50)
        assert len(samples.encoded(dataset, flags, demo, GenerateConfig(256))) == len(dataset.samples)
        for sample in dataset.samples:  # an answer is not cut off by the dataset's own stop strings
            text = sample.responses[0]
            assert not any(stop in text.strip() for stop in dataset.stops)


def test_the_seed_chooses_and_fewer_samples_are_the_beginning_of_more(demo):
    def chosen(count, seed):
        flags = flags_of("--num_samples", count, "--seed", seed)
        found = samples.encoded(samples.read_dataset(flags), flags, demo, GenerateConfig(8))
        return {sample.number for sample, _ in found}

    assert chosen(5, 1) == chosen(5, 1) < chosen(9, 1) and chosen(5, 1) != chosen(5, 2)
    assert len(chosen(9, 1)) == 9


def test_examples_come_before_the_prompt_and_are_no_samples(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"q": f"Q{i}:", "a": f" A{i}"}) + "\n" for i in range(5)))
    dataset = read("--dataset", file, "--prompt_field", "q", "--response_field", "a", "--num_shots", 2)
    assert len(dataset.samples) == 3
    for sample in dataset.samples:
        before, prompt = sample.prompt[: -len("Q0:")], sample.prompt[-len("Q0:") :]
        examples = before.split("\n\n")[:-1]
        assert len(examples) == 2 and f"{prompt} A{prompt[1]}" not in examples
        assert all(example == f"Q{example[1]}: A{example[1]}" for example in examples)
        assert prompt == f"Q{sample.number}:" and sample.responses == (f" A{sample.number}",)


@pytest.mark.parametrize("name", samples.HUB)
def test_a_row_of_the_hub_becomes_a_prompt_and_its_responses(name, monkeypatch):
    row, prompt, responses = ROWS[name]
    monkeypatch.setattr(samples, "load_split", lambda name, source, split: [row])
    [sample] = read("--dataset", name, "--num_shots", 0).samples
    assert (sample.prompt, sample.responses) == (prompt, responses)
    if samples.HUB[name].num_shots and samples.HUB[name].shots != samples.HUB[name].split:
        monkeypatch.setattr(samples, "load_split", lambda name, source, split: [row] * 9)
        shots = read("--dataset", name).samples[0].prompt
        assert shots.count(prompt + responses[0]) == samples.HUB[name].num_shots and shots.endswith(prompt)


def test_rows_are_loaded_with_the_real_library_from_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason='pip install -e ".[eval]"')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = samples.HUB["gsm8k"]
    local = samples.HubDataset(str(tmp_path / "data"), None, "train", "train", source.make)
    monkeypatch.setitem(samples.HUB, "gsm8k", local)
    assert sorted(s.responses[0] for s in read("--dataset", "gsm8k").samples) == [" 1", " 2", " 3", " 4"]


def test_without_network_or_package_one_line_says_what_to_do(monkeypatch, capsys):
    pytest.importorskip("datasets", reason='pip install -e ".[eval]"')
    with pytest.raises(ValueError, match="gsm8k: cannot load openai/gsm8k .*give a file or one of code, questions"):
        read("--dataset", "gsm8k")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r'needs the package datasets: pip install -e "\.\[eval\]"'):
        read("--dataset", "gsm8k")


GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (GOOD + "{", (), "line 2: not JSON"),
        (GOOD + "\n[1]\n", (), "line 3: not a JSON object, but list"),
        (GOOD + '{"text": "a"}', (), "line 2: no field 'prompt' .it has 'text'"),
        (GOOD, ("--prompt_field", "q"), "line 1: no field 'q'"),
        (GOOD, ("--response_field", "r"), "line 1: no field 'r'"),
        ('{"prompt": 5}', (), "line 1: field 'prompt' must be a text, got int"),
        ('{"prompt": "a", "response": [1]}', (), "line 1: field 'response' must be a text, got int"),
        ("\n\n", (), "holds no samples"),
        (GOOD, ("--num_shots", 1), "num_shots must be below the 1 rows"),
        (GOOD, ("--num_shots", -1), "num_shots must be 0 or more, got -1"),
        (GOOD, ("--num_samples", 0), "num_samples must be 1 or more, got 0"),
        (GOOD, ("--template", "{x}"), "line 1: no field 'x' for --template"),
        ('{"prompt": "a"}\n' * 2, ("--num_shots", 1), "has no response to show"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path, content, words, message):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read("--dataset", file, *words)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="one of code, questions, summarisation, cnn_dm_summarization.*'no_such'"):
        read("--dataset", "no_such")


def test_samples_that_do_not_fit_are_passed_over_in_plain_sight(tmp_path, demo, capsys):
    file = tmp_path / "x.jsonl"
    rows = ["a " * 2000, "import os", "b " * 2000, "x = 1"]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
    flags = flags_of("--dataset", file, "--num_samples", 4)
    found = samples.encoded(samples.read_dataset(flags), flags, demo, GenerateConfig(8))
    assert [sample.number for sample, _ in found] == [1, 3]
    assert "2 samples do not fit the model's 1024 positions" in capsys.readouterr().err
    file.write_text(json.dumps({"prompt": rows[0]}))
    with pytest.raises(ValueError, match="no sample can be used: prompt of .* does not fit"):
        samples.encoded(samples.read_dataset(flags), flags, demo, GenerateConfig(8))


def test_an_answer_ends_at_the_end_of_text_or_the_first_stop_string(demo):
    encode = lambda text: demo.tokenizer.encode(text, bos=False)
    tokens = [*encode("\nfour\nand more"), demo.tokenizer.eos_ids[0], *encode("lost")]
    assert samples.answer(tokens, demo, ()).strip() == "four\nand more"
    assert samples.answer(tokens, demo, ("\n",)).strip() == "four", "an answer may begin on the next line"
    assert samples.answer(tokens, demo, ("more", "r")).strip() == "fou"
