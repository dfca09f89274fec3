"""scripts.eval: the harness gets transformers' likelihoods, those of any exit layer, and decoding's own texts."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding.engine import Engine, EngineConfig
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from generate import decode
from scripts.common.ranks import Ranks
from scripts.eval import __main__ as eval
from scripts.eval import harness
from tests.helpers.models import train_tokenizer
from tests.helpers.processes import ROOT

LAYERS, VOCAB = 4, 380


@pytest.fixture(scope="module")
def lm_eval():
    """The harness, or a reason to skip."""
    return pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[eval]"')


@pytest.fixture(scope="module")
def original(make_hf, tmp_path_factory):
    """(folder, transformers' model) of a tiny checkpoint with a tokenizer, whose drafts are sometimes right."""
    folder = tmp_path_factory.mktemp("tiny")
    train_tokenizer(folder, VOCAB)
    model = make_hf(folder, vocab_size=VOCAB, num_key_value_heads=2, num_hidden_layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if any(f"layers.{i}." in name for i in (2, 3)) and ("o_proj" in name or "down_proj" in name):
            tensor *= 0.3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict(tensors)
    return folder, model


@pytest.fixture
def make(lm_eval, original):
    """make(exit_layer=LAYERS, policy="none", length=128, **settings) -> the harness's model."""
    engine = Engine.open(EngineConfig(str(original[0]), device="cpu"))
    weights = engine.load()

    def make(exit_layer=LAYERS, policy="none", length=128, **settings):
        policy = make_policy(policy, LAYERS)
        runner = Runner(weights, length, 1 + policy.num_draft_tokens)
        return harness.make_model(
            runner, engine.tokenizer, policy, SamplingConfig(), Ranks(None), exit_layer=exit_layer, **settings
        )

    return make


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def reference(model, tokens, count, exit_layer):
    """transformers' log-probability of the last `count` tokens, by its norm and head after `exit_layer` layers."""
    states = []
    hook = model.model.layers[exit_layer - 1].register_forward_hook(lambda *found: states.append(found[2]))
    with torch.inference_mode():
        model(torch.tensor([tokens[:-1]]))
    hook.remove()
    hidden = states[0][0] if isinstance(states[0], tuple) else states[0]
    with torch.inference_mode():
        logits = model.lm_head(model.model.norm(hidden.reshape(len(tokens) - 1, -1)))[-count:]
    wanted = torch.tensor(tokens[-count:])
    return logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


PAIRS = [
    ("def read(", "self):"),
    ("def read(", "path, mode):"),
    ("def read(", "x"),
    ("", "import os"),
    ("return a ", "and b"),
    ("x = 1\n" * 9 + "y", " = 2\nz = 3"),
]


@pytest.mark.parametrize("exit_layer", [1, 3, LAYERS])
def test_likelihoods_are_transformers_at_every_exit_layer(make, original, exit_layer):
    model, oracle = make(exit_layer), original[1]
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    encode, full = model.tok_encode, []
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        tokens = encode(context + continuation)
        count = len(tokens) - len(encode(context.rstrip(" ")))
        expected = reference(oracle, tokens, count, exit_layer)
        assert (value, greedy) == (pytest.approx(expected[0], rel=1e-4), expected[1])
        full.append(reference(oracle, tokens, count, LAYERS)[0])
    values = [value for value, _ in found]
    assert (values == pytest.approx(full, rel=1e-4)) == (exit_layer == LAYERS), "early layers say something else"


def written(runner, prompt, count):
    return Generation.collect(decode(runner, prompt, GenerateConfig(count), make_policy("none", LAYERS))).tokens


def test_greedy_continuations_are_told_from_others(make):
    model, count = make(), harness.HEAD_ROWS + 9
    context = model.tok_encode("import os")
    text = written(model.runner, context, count)
    other = [*text[:3], (text[3] + 1) % VOCAB]
    other += written(model.runner, context + other, count - 4)  # one token is not the greedy one
    asked = [(None, context, text), (None, context, other), (None, context, text[:1])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False, True]


@pytest.mark.parametrize("exit_layer", [2, LAYERS])
def test_whole_texts_are_scored_in_windows_each_token_once(make, original, exit_layer):
    model, oracle = make(exit_layer, length=16), original[1]
    texts = ["def read(self, path):\n    return self.files[path]\n" * 2, "x"]
    found = model.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    for text, value in zip(texts, found, strict=True):
        tokens = [model.prefix_token_id, *model.tok_encode(text, add_special_tokens=False)]
        expected = 0.0
        for end in range(17, len(tokens) + 16, 16):  # windows of 16 inputs; the last one looks further back
            count = min(16, len(tokens) - 1 - (end - 17))
            end = min(end, len(tokens))
            expected += reference(oracle, tokens[max(0, end - 17) : end], count, exit_layer)[0]
        assert value == pytest.approx(expected, rel=1e-4)


def test_what_two_texts_begin_with_runs_once(make, monkeypatch):
    model, rows = make(), []
    run = model.runner.prefill_states
    counted = lambda tokens, *rest, **more: rows.append(len(tokens)) or run(tokens, *rest, **more)
    monkeypatch.setattr(model.runner, "prefill_states", counted)
    long = "def read(self, path, mode):\n" * 3
    pairs = [(long, ending) for ending in ("return 1", "pass", "import os")]
    together = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    shared, rows[:] = sum(rows), []
    alone = [model.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert shared < 0.5 * sum(rows)
    assert together == alone


@pytest.mark.parametrize(
    "policy", ["none", "static:1,num_draft_tokens=4", "confidence:0.1,candidates=1-2", "prompt_lookup"]
)
def test_texts_are_decodings_cut_at_the_first_stop_whatever_the_policy(make, policy):
    plain, model = make(), make(policy=policy)
    prompt, count = "def read(self", 40
    config = GenerateConfig(count, eos_ids=tuple(plain.own_tokenizer.eos_ids))
    generation = Generation.collect(decode(plain.runner, plain.tok_encode(prompt), config, make_policy("none", LAYERS)))
    text = plain.own_tokenizer.decode(generation.tokens, continues=True)
    assert len(text) > 20
    stop, early = text[11:15], text[6:8]
    asked = requests(
        (prompt, {"until": [], "max_gen_toks": count}),
        (prompt, {"until": [stop], "max_gen_toks": count, "do_sample": False}),
        (prompt, {"until": [stop, early, "never"], "max_gen_toks": count}),
        (prompt, {"until": stop, "max_gen_toks": count}),
    )
    expected = [text, text[: text.find(stop)], text[: min(text.find(stop), text.find(early))], text[: text.find(stop)]]
    assert model.generate_until(asked, disable_tqdm=True) == expected
    assert model.summaries[0]["tokens"] == generation.tokens
    assert len(model.summaries[2]["tokens"]) < len(generation.tokens), "decoding ends at the stop"
    shorter = make(policy=policy, max_new_tokens=3)
    shorter.generate_until(requests((prompt, {"until": []})), disable_tqdm=True)
    assert len(shorter.summaries[0]["tokens"]) == 3, "max_new_tokens goes over a task's own"


def test_sampled_texts_follow_the_seed_differ_between_repeats_and_not_between_policies(make):
    asked = requests(("def read(self", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16, "until": []})) * 3
    first = make().generate_until(asked, disable_tqdm=True)
    assert len(set(first)) == 3
    assert first == make(policy="static:2").generate_until(asked, disable_tqdm=True)


def test_a_sampled_text_does_not_depend_on_what_else_is_asked(make):
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16, "until": []}
    asked = requests(("def read(self", how), ("import os", how), ("return a", how))
    texts = make().generate_until(asked, disable_tqdm=True)
    assert make().generate_until(asked[1:] + asked[:1], disable_tqdm=True) == texts[1:] + texts[:1]


def test_a_prompt_too_long_for_the_cache_loses_its_beginning(make):
    model = make(length=24)
    long = "x = 1\n" * 40
    [text] = model.generate_until(requests((long, {"max_gen_toks": 8, "until": []})), disable_tqdm=True)
    assert len(model.summaries[0]["tokens"]) == 8 and text
    [(value, _)] = model.loglikelihood(requests((long, "y")), disable_tqdm=True)
    assert -50 < value < 0


@pytest.fixture
def run(original, tmp_path, monkeypatch, run_program):
    """run(*flags, code=0) runs the program in this process -> (results.json or None, folder, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def run(*flags, code=0):
        out = tmp_path / "out"
        defaults = [
            "--checkpoint_path",
            original[0],
            "--no-compile",
            "--policy",
            "static:2",
            "--limit",
            8,
            "--bootstrap_iters",
            10,
            "--output_dir",
            out,
        ]
        exit_code, printed, err = run_program(eval.main, *defaults, *flags)
        assert exit_code == code, err
        return json.loads((out / "results.json").read_text()) if code == 0 else None, out, printed, err

    return run


def test_the_bundled_tasks_run_offline_and_write_what_the_table_says(lm_eval, run):
    results, out, printed, _ = run("--log_samples", "--exit_layer", 2)
    rows = {
        task: [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
        for task in ("python_choice", "python_completion", "python_perplexity")
    }
    assert {len(each) for each in rows.values()} == {8}
    right = 0
    for row in rows["python_choice"]:
        values = [float(response[0][0]) for response in row["resps"]]
        right += values.index(max(values)) == row["target"]
    found = results["results"]
    assert found["python_choice"]["acc,none"] == right / 8
    assert (
        found["python_completion"]["exact_match,none"]
        == sum(row["resps"][0][0] == row["doc"]["target"] for row in rows["python_completion"]) / 8
    )
    assert not any("\n" in row["resps"][0][0] for row in rows["python_completion"]), "the stop sequence is honoured"
    bits = found["python_perplexity"]["bits_per_byte,none"]
    assert 2**bits == pytest.approx(found["python_perplexity"]["byte_perplexity,none"])
    for task, value in (("python_choice", right / 8), ("python_perplexity", bits)):
        assert task in printed and f"{value:.4f}" in printed
    ours = results["skipfast"]
    assert ours["exit_layer"] == 2 and ours["decoding"]["texts"] == 8 and 0 <= ours["decoding"]["acceptance_rate"] <= 1
    again, *_ = run("--exit_layer", 2)
    assert again["results"] == found, "two runs give the same metrics"
    full, *_ = run("--policy", "none")
    assert full["results"]["python_completion"] == found["python_completion"], "no policy changes a text"
    assert full["results"]["python_perplexity"] != found["python_perplexity"], "an exit layer changes likelihoods"


def test_a_half_filled_cache_gives_the_sampled_texts_of_an_empty_one(lm_eval, run, tmp_path):
    flags = ["--tasks", "python_completion", "--temperature", 1.0, "--log_samples"]
    texts = lambda out: [
        json.loads(line)["resps"] for line in (out / "samples_python_completion.jsonl").read_text().splitlines()
    ]
    _, out, *_ = run(*flags)
    expected = texts(out)
    assert len({text for [[text]] in expected}) > 4
    run(*flags, "--limit", 3, "--use_cache", tmp_path / "answers")
    results, out, *_ = run(*flags, "--use_cache", tmp_path / "answers")
    assert texts(out) == expected and results["skipfast"]["decoding"]["texts"] == 5, "three came from the cache"


def test_answers_of_another_sampler_setting_are_kept_in_another_file():
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 4, "verification": "rejection"}
    assert set(values) == {field.name for field in dataclasses.fields(SamplingConfig)}
    given = [[], *([f"--{name}", str(value)] for name, value in values.items())]
    flags = [eval.parse_flags(["--use_cache", "answers", *words]) for words in given]
    assert len({eval.cache_path(each, make_policy("none", LAYERS), "cpu") for each in flags}) == len(given)


def test_the_bundled_tasks_run_from_any_folder(lm_eval, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, *_ = run("--limit", 1, "--num_fewshot", 2)
    assert results["results"].keys() >= {"python_choice", "python_completion", "python_perplexity"}


def test_the_number_of_tokens_may_have_any_of_its_names(lm_eval, run):
    results, *_ = run("--tasks", "python_completion", "--limit", 2, "--gen_kwargs", "max_new_tokens=1")
    assert results["skipfast"]["decoding"]["new_tokens"] == 2


def test_several_processes_give_the_totals_of_one(lm_eval, run, original, tmp_path):
    flags = ["--tasks", "python_choice,python_completion", "--limit", "7"]
    single, *_ = run(*flags)
    out = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *launch,
        "-m",
        "scripts.eval",
        "--checkpoint_path",
        original[0],
        "--no-compile",
        "--policy",
        "static:2",
        "--bootstrap_iters",
        "10",
        "--output_dir",
        out,
        *flags,
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    both = json.loads((out / "results.json").read_text())
    assert both["results"] == single["results"] and both["skipfast"]["ranks"] == 2
    for key in ("texts", "new_tokens", "acceptance_rate", "tokens_per_round"):
        assert both["skipfast"]["decoding"][key] == single["skipfast"]["decoding"][key]
    assert done.stdout.count("wrote ") == 1, "one process prints"


def test_mistakes_are_one_line_before_the_weights_are_read(lm_eval, run, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("")
    own = tmp_path / "own"
    own.mkdir()
    task = (harness.BUNDLED / "python_completion.yaml").read_text()
    for name, line, other in (
        ("beams", "do_sample: false", "num_beams: 4"),
        ("lost", "python_lines", "no_such_file"),
        ("again", "do_sample: false", "do_sample: false\nrepeats: 3"),
    ):
        (own / f"{name}.yaml").write_text(task.replace("python_completion", name).replace(line, other))
    with_own = ["--include_path", own]
    for flags, message in (
        (["--exit_layer", 5], "exit_layer must be in 1..4"),
        (["--exit_layer", 0], "exit_layer must be in 1..4"),
        (["--policy", "static:9"], "exit_layer must be in 1..4"),
        (["--output_dir", tmp_path / "file"], "cannot make the folder"),
        (["--include_path", tmp_path / "nowhere"], "there is no such folder"),
        (["--num_fewshot", -1], "num_fewshot must be 0 or more"),
        (["--limit", -1], "limit must be"),
        (["--max_length", 9999], "max_length must be in 2..256"),
        (["--samples", "[1]"], "samples must be a JSON object"),
        (["--gen_kwargs", "num_beams=4"], "num_beams=4 is not supported"),
        (["--gen_kwargs", "num_beams=two"], "gen_kwargs: generation argument num_beams='two' is not supported"),
        (["--gen_kwargs", "max_gen_toks=abc"], "gen_kwargs: max_gen_toks must be a whole number, got 'abc'"),
        (["--gen_kwargs", "max_new_tokens=0"], "gen_kwargs: max_new_tokens must be 1 or more, got 0"),
        (["--gen_kwargs", "max_gen_toks=2.5"], "gen_kwargs: max_gen_toks must be a whole number, got 2.5"),
        (["--gen_kwargs", "top_p=7"], "gen_kwargs: top_p must be in (0, 1], got 7"),
        (["--gen_kwargs", "top_k=few"], "gen_kwargs: top_k must be a whole number, got 'few'"),
        (["--gen_kwargs", "temperature=-1"], "gen_kwargs: temperature must be 0 (greedy) or in 1e-6..1e6, got -1"),
        (["--gen_kwargs", "do_sample=maybe"], "gen_kwargs: do_sample must be true or false, got 'maybe'"),
        (["--gen_kwargs", "until=5"], "gen_kwargs: until must be a text or a list of texts, got 5"),
        (["--num_fewshot", 24], "num_fewshot must be at most 23 for the task python_choice, got 24"),
        (["--tasks", ""], "tasks must name at least one task, got ''"),
        (["--tasks", " ,"], "tasks must name at least one task, got ' ,'"),
        (
            [*with_own, "--tasks", "again", "--temperature", 1, "--use_cache", own / "answers"],
            "use_cache keeps one answer of a request, and again asks for 3 different ones at temperature 1",
        ),
        ([*with_own, "--tasks", "beams"], "beams: generation argument num_beams=4 is not supported"),
        ([*with_own, "--tasks", "lost"], "cannot load lost"),
    ):
        *_, err = run(*flags, code=2)
        assert message in err and err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err, err
        assert err.count("error: ") == 1


def test_an_unknown_task_is_refused_with_near_names(lm_eval, tmp_path, monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager  # reading the harness's own list takes seconds
    without_defaults = lambda include_defaults, **rest: manager(include_defaults=False, **rest)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)
    with pytest.raises(ValueError, match="there is no task 'python_choise' .near: python_choice"):
        harness.find_tasks(["python_choise"], [], None)
    assert harness.find_tasks(["python_*"], [], None)[1] == ["python_choice", "python_completion", "python_perplexity"]


def test_without_the_harness_there_is_one_line_that_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    *_, err = run(code=2)
    assert err == 'error: scripts.eval needs the package lm_eval: pip install -e ".[eval]"\n'
