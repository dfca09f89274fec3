"""The benchmark: which rows it has, what stands in them, and that its claim "identical" is really compared."""

import importlib.util
import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from decoding.engine import Engine
from decoding.runner import Runner
from decoding.sampling import CoupledSampler
from drafting.catalogue import POLICIES
from kernels import cpu
from kernels.exit_head import Exit
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import hardware, peers, picture, prompts
from scripts.common import contender, policy_sets

COLUMNS = {
    "engine",
    "policy",
    "precision",
    "quantize",
    "compiled",
    "tokens_per_s",
    "speedup_over_fastest_ar",
    "acceptance_rate",
    "tokens_per_round",
    "mean_exit_layer",
    "layer_visits_per_token",
    "head_visits_per_token",
    "cost_per_token_layers",
    "ideal_speedup",
    "share_of_ideal",
    "share_of_bandwidth",
    "identical",
}


@pytest.fixture
def bench(folder, tmp_path, monkeypatch, run_program):
    """bench(*flags, code=0) runs the benchmark in this process -> (JSON object or None, stdout, stderr)."""
    small, file = hardware.read_bandwidth, tmp_path / "out.json"
    monkeypatch.setattr(hardware, "read_bandwidth", lambda device: small(gib=0.01, repeats=2))

    def bench(*flags, code=0):
        file.unlink(missing_ok=True)
        defaults = [
            "--checkpoint_path",
            folder,
            "--no-compile",
            "--repeats",
            2,
            "--max_new_tokens",
            6,
            "--num_prompts",
            2,
            "--json",
            file,
        ]
        exit_code, out, err = run_program(benchmark.main, *defaults, *flags)
        assert exit_code == code, err
        return json.loads(file.read_text()) if file.exists() else None, out, err

    return bench


def row_of(result, policy, **wanted):
    """The exact row of `policy`: where the C++ kernels are missing, plain decoding has an inexact one as well."""
    wanted = {"policy": policy, "engine": "skipfast", "exact_width": True} | wanted
    [row] = [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]
    return row


def test_every_row_has_every_column_and_plain_decoding_is_always_among_them(bench):
    result, out, _ = bench("--policy", "static:1", "--policy", "static:2,num_draft_tokens=5")
    assert {row["policy"] for row in result["rows"]} == {"none", "static:1", "static:2,num_draft_tokens=5"}
    for row in result["rows"]:
        assert set(row) >= COLUMNS
        assert row["engine"] == "skipfast" and row["precision"] == "float32" and row["quantize"] == "none"
        assert not row["compiled"] and row["tokens_per_s"] > 0
        assert row["tokens_per_s"] == statistics.median(row["tokens_per_s_rounds"])
        assert len(row["tokens_per_s_rounds"]) == 2, "the round that warms up is not counted"
        assert row["identical"] is True or not row["exact_width"]
        assert row["policy"] in out
    plain = row_of(result, "none")
    assert plain["acceptance_rate"] is None and plain["tokens_per_round"] == 1
    assert plain["layer_visits_per_token"] == 3 and plain["head_visits_per_token"] == 1
    assert plain["ideal_speedup"] == pytest.approx(1)
    for exit_layer, policy in ((1, "static:1"), (2, "static:2,num_draft_tokens=5")):
        row = row_of(result, policy)
        assert 0 <= row["acceptance_rate"] <= 1 and row["tokens_per_round"] >= 1
        assert row["mean_exit_layer"] == exit_layer and 0 < row["ideal_speedup"] < 3
    assert {"versions", "hardware", "config", "bandwidth_bytes_per_s"} <= set(result)
    assert result["config"]["seed"] == 0 and result["versions"]["torch"] == torch.__version__


def test_speedups_are_over_the_fastest_plain_row_and_bandwidth_is_that_of_the_bytes_read(bench):
    result, _, _ = bench("--policy", "none", "--policy", "static:2")
    plain = [row for row in result["rows"] if row["policy"] == "none"]
    fastest = max(plain, key=lambda row: row["tokens_per_s"])
    assert fastest["speedup_over_fastest_ar"] == 1
    row = row_of(result, "static:2")
    ratios = [a / b for a, b in zip(row["tokens_per_s_rounds"], fastest["tokens_per_s_rounds"], strict=True)]
    assert row["speedup_over_fastest_ar"] == pytest.approx(statistics.median(ratios))
    rate = fastest["tokens_per_s"] * result["weight_bytes_per_pass"] / result["bandwidth_bytes_per_s"]
    assert fastest["share_of_bandwidth"] == pytest.approx(rate)
    assert row["share_of_ideal"] == pytest.approx(row["speedup_over_fastest_ar"] / row["ideal_speedup"])
    read = row["share_of_bandwidth"] * result["bandwidth_bytes_per_s"] / row["tokens_per_s"]
    assert read * row["ideal_speedup"] == pytest.approx(result["weight_bytes_per_pass"]), "one account of the bytes"


def test_without_a_policy_there_are_auto_and_a_quarter_of_the_layers_and_without_no_compile_both_ways(bench):
    result, _, _ = bench()
    assert {row["policy"] for row in result["rows"]} == {"none", "auto", "static:1"}
    if cpu.load() is None:  # else torch would compile for a minute
        result, _, _ = bench("--compile")
        assert all(row_of(result, "none", compiled=compiled)["identical"] for compiled in (True, False))
        assert row_of(result, "static:1")["compiled"]
        by_call = row_of(result, "none:steps=8")
        assert by_call["tokens_per_round"] == 5 and by_call["layer_visits_per_token"] == 3
        assert by_call["acceptance_rate"] is None, "plain decoding drafts nothing, several tokens a call or not"


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8)])
def test_the_set_all_has_a_row_of_every_policy_and_all_write_the_same_texts(bench, tmp_path, sampling):
    picture = tmp_path / "rows.png"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    flags = ("--picture", picture) if has_matplotlib else ()
    result, out, _ = bench("--policies", "all", "--policy", "static:2", "--repeats", 1, *sampling, *flags)
    exact = [row for row in result["rows"] if row["exact_width"]]
    assert {row["policy"].split(":")[0] for row in exact} >= set(POLICIES) - {"learned"}, "which needs a file"
    assert [row["policy"] for row in exact if not row["identical"]] == []
    assert len({row["policy"] for row in exact}) == len(exact) > len(POLICIES) + 5 and row_of(result, "static:2")
    lookup = row_of(result, "prompt_lookup")
    assert lookup["mean_exit_layer"] is None and lookup["layer_visits_per_token"] <= 3
    if has_matplotlib:
        assert picture.read_bytes().startswith(b"\x89PNG") and [*tmp_path.glob("*.tmp")] == []


def test_the_grid_ends_with_how_near_auto_came_to_the_best_static_exit(bench):
    result, out, _ = bench("--policies", "grid", "--max_new_tokens", 4, "--num_prompts", 1)
    statics = [row for row in result["rows"] if row["policy"].startswith("static:")]
    assert [row["policy"] for row in statics] == [f"static:1,num_draft_tokens={k}" for k in range(1, 8)]
    best = max(statics, key=lambda row: row["tokens_per_s"])
    pairs = zip(row_of(result, "auto")["tokens_per_s_rounds"], best["tokens_per_s_rounds"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    assert result["grid"]["best_static"] == best["policy"]
    assert result["grid"]["auto_over_best_static"] == pytest.approx(ratio)
    assert out.splitlines()[-1].startswith(f"best static: {best['policy']} (")
    assert f"auto ÷ best static {ratio:.3f}; auto ÷ fastest AR" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("n_layer", "depths"),
    [(1, [1]), (2, [1]), (12, [1, 2, 3, 4, 5, 6]), (16, [1, 2, 3, 4, 5, 6, 7, 8]), (32, [2, 4, 6, 8, 10, 12, 14, 16])],
)
def test_the_sets_fit_models_of_every_depth(n_layer, depths):
    policies = policy_sets.make_policies(["all", "grid"], [], SimpleNamespace(n_layer=n_layer, dim=64), None)
    assert {policy.exit_layer for name, policy in policies.items() if name.endswith("_tokens=1")} == set(depths)
    assert len(policies) >= len(POLICIES) - 1 + 7 * len(depths)


def test_without_verification_the_text_is_judged_and_not_called_identical(bench):
    result, out, _ = bench("--policy", "static:1", "--policy", "prompt_lookup", "--no_verify")
    names = [row["policy"] for row in result["rows"] if row["exact_width"]]
    assert names == ["none", "static:1", "static:1 (unverified)", "prompt_lookup"], "only verification judges n-grams"
    row = row_of(result, "static:1 (unverified)")
    assert row["identical"] is None and row["differs_from_own_plain"] is None and row["acceptance_rate"] is None
    assert 0 <= row["equal_to_full_model"] <= 1 and f"{row['equal_to_full_model']:.1%} right" in out
    assert not row["verified"] and row["layer_visits_per_token"] < 3
    assert row_of(result, "static:1")["identical"] is True


def test_a_smaller_vocabulary_of_drafts_reads_less_of_the_head_and_is_reported(bench):
    result, _, _ = bench("--policy", "static:1", "--draft_vocab", 95)
    row, drafts = row_of(result, "static:1"), 3
    assert row["identical"] is True and 0 <= row["draft_vocab_coverage"] <= 1
    assert row["head_visits_per_token"] * row["tokens_per_round"] < 1 + drafts * 95 / 380 + 1e-6
    assert row_of(result, "none")["head_visits_per_token"] == 1


def test_the_front_of_a_picture_is_what_nothing_beats_in_both():
    assert picture.pareto_front([(5, 0.5), (4, 0.5), (6, 0.9), (7, 0.8), (4, 0.3), (3, 0.1)]) == [5, 1, 2]
    assert picture.pareto_front([]) == []


def test_a_picture_without_matplotlib_says_what_to_install(bench, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    result, _, err = bench("--picture", tmp_path / "x.png", code=2)
    assert result is None and "error: --picture needs matplotlib: pip install matplotlib" in err
    result, _, err = bench("--output_dir", tmp_path, "--policy", "static:1", "--num_prompts", 1)
    assert result and "no policies.png" in err and "pip install matplotlib" in err


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8)])
def test_a_policy_that_changes_one_token_is_not_called_identical(bench, monkeypatch, sampling):
    run, rounds = CoupledSampler.verify, []

    def sometimes_wrong(sampler, drafted, exit, position):
        if drafted and not rounds:
            rounds.append(position)
        if drafted and position == rounds[0]:  # a single round of a text
            exit = Exit.of_logits(exit.logits().roll(1, -1))
        return run(sampler, drafted, exit, position)

    monkeypatch.setattr(CoupledSampler, "verify", sometimes_wrong)
    monkeypatch.setattr(Runner, "call_by_call", True)  # so that there is a call to falsify
    result, out, _ = bench("--policy", "static:1", *sampling)
    assert row_of(result, "static:1")["identical"] is False
    assert row_of(result, "none")["identical"] is True
    [line] = [line for line in out.splitlines() if "static:1" in line]
    assert not line.rstrip(" │").endswith("0 of 2")
    assert row_of(result, "static:1")["differs_from_own_plain"] > 0


def test_transformers_is_a_row_with_the_same_greedy_tokens_and_one_that_drafts(bench):
    result, out, _ = bench("--against", "transformers", "--num_prompts", 1, "--policy", "static:1")
    peer, drafting = [row for row in result["rows"] if row["engine"] == "transformers"]
    assert set(peer) >= COLUMNS and peer["policy"] == "none" and peer["tokens_per_s"] > 0
    assert peer["acceptance_rate"] is None and peer["tokens_per_round"] is None and peer["ideal_speedup"] == 1
    assert peer["identical"] is True and peer["differs_from_own_plain"] == 0
    assert drafting["policy"] == "static:1,num_draft_tokens=3" and drafting["identical"] is True
    assert drafting["share_of_bandwidth"] is None and drafting["ideal_speedup"] is None, "nobody knows what it read"
    assert row_of(result, "none")["ratio_to"].keys() == {"transformers"} and "× transformers" in out


def test_absent_engines_are_skipped_in_plain_sight(bench, monkeypatch):
    monkeypatch.setitem(peers.NEEDS, "llama.cpp", ("surely_not_installed",))
    result, out, err = bench("--against", "llama.cpp", "--num_prompts", 1)
    assert result["skipped"].keys() == {"llama.cpp"} and {row["engine"] for row in result["rows"]} == {"skipfast"}
    for shown in (out, err):
        assert "llama.cpp skipped: needs pip install llama-cpp-python gguf" in shown


def test_lengths_of_prompts_are_rows_with_prefill_and_cost_of_a_token(bench):
    result, out, _ = bench("--prompt_lengths", "8,24", "--num_prompts", 1)
    assert [row["prompt_tokens"] for row in result["lengths"]] == [8, 24]
    for row in result["lengths"]:
        assert row["prefill_tokens_per_s"] > 0 and row["ms_per_token"] > 0 and row["floor"] >= 1
    assert result["lengths"][0]["over_first"] == 1 and "prefill tokens/s" in out


def test_prompts_come_from_lines_json_lines_or_ids(bench, tmp_path, monkeypatch):
    seen = []
    run = contender.decode
    monkeypatch.setattr(
        contender,
        "decode",
        lambda runner, prompt, *rest, **how: seen.append(prompt) or run(runner, prompt, *rest, **how),
    )
    files = {
        "a.txt": "import os\n\nx = 1\n",
        "b.jsonl": '{"prompt": "import os"}\n{"prompt": "x = 1"}\n',
        "c.json": '[{"ids": [1, 5, 9]}, {"ids": [1, 7]}]',
    }
    prompts = {}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        seen.clear()
        bench("--prompts", tmp_path / name, "--policy", "none")
        prompts[name] = sorted(set(map(tuple, seen)))
    assert prompts["a.txt"] == prompts["b.jsonl"] and len(prompts["a.txt"]) == 2
    assert prompts["c.json"] == [(1, 5, 9), (1, 7)]


def test_prompts_of_the_repository_have_short_names_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    names = {"code": 12, "repetitive": 8, "hard": 8}
    rows = {
        name: [
            json.loads(line)["prompt"]
            for line in (prompts.PROMPT_SETS / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        for name in names
    }
    assert {name: len(prompts) for name, prompts in rows.items()} == names
    assert [p for prompts in rows.values() for p in prompts if p != p.rstrip()] == [], "what follows would be unusual"
    engine = Engine.open()
    for name in names:
        ids = prompts.read_prompts(name, engine)
        assert len(ids) == names[name] and max(map(len, ids)) <= 512
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").write_text("import os\n")
    assert prompts.read_prompts("code", engine) == [engine.tokenizer.encode("import os")]


def test_an_output_directory_gets_the_same_json(bench, tmp_path):
    result, _, _ = bench("--output_dir", tmp_path / "new/folder", "--num_prompts", 1)
    assert json.loads((tmp_path / "new/folder/benchmark.json").read_text()) == result


MISTAKES = {
    "repeats": (("--repeats", 0), ["repeats must be 1 or more", "got 0"]),
    "peer": (("--against", "vllm"), ["--against", "transformers", "llama.cpp", "vllm"]),
    "length": (("--prompt_lengths", "5,999999"), ["prompt_lengths", "999999"]),
    "no length": (("--prompt_lengths", "0"), ["prompt_lengths", "1 or more"]),
    "exit layer": (("--policy", "static:9"), ["exit_layer must be in 1..3", "got 9"]),
    "policy": (("--policy", "magic"), ["policy must be one of", "magic"]),
    "set": (("--policies", "all,magic"), ["policies must be among all, grid", "--policy", "got 'magic'"]),
    "vocabulary": (("--draft_vocab", 381), ["draft_vocab must be in 2..380", "got 381"]),
    "unverified": (("--no_verify", "--draft_vocab", 90), ["--no_verify does not go with --draft_vocab"]),
    "picture": (("--picture", "/no/such/folder/x.png"), ["cannot write /no/such/folder/x.png"]),
    "drafts": (("--num_draft_tokens", 99), ["num_draft_tokens must be in 0..15", "got 99"]),
    "temperature": (("--temperature", -1), ["temperature must be", "-1"]),
    "length 0": (("--max_new_tokens", 0), ["max_new_tokens must be", "got 0"]),
    "checkpoint": (("--checkpoint_path", "no-such-folder"), ["no-such-folder is neither"]),
    "prompts": (("--prompts", "no-such-file.txt"), ["cannot read no-such-file.txt"]),
    "json": (("--json", "/no/such/folder/x.json"), ["cannot write /no/such/folder/x.json"]),
    # a text of one token has no decoding to measure
    "length 1": (("--max_new_tokens", 1), ["max_new_tokens must be 2 or more", "got 1"]),
    "no GPU": (("--device", "cpu", "--device", "cuda"), ["device cuda: torch sees no CUDA device here"]),
    "a device twice": (("--device", "cpu", "--device", "cpu"), ["--device must name each device once", "cpu, cpu"]),
    "no prompts": (("--num_prompts", 0), ["num_prompts must be 1 or more", "got 0"]),
    "fewer prompts than none": (("--num_prompts", -1), ["num_prompts must be 1 or more", "got -1"]),
    # beyond the context a model's speed may be measured, but its text means nothing: generate.py refuses, too
    "context": (("--max_new_tokens", 300), ["max_new_tokens 300", "256 positions"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_before_the_weights_are_read(bench, monkeypatch, name):
    flags, parts = MISTAKES[name]
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result, _, err = bench(*flags, code=2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err and result is None
    assert [part for part in parts if part not in errors[0]] == [], errors[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", "{"),
        ("x.json", '{"ids": [1]}'),
        ("x.json", "[[1, 2]]"),
        ("x.jsonl", '{"text": "a"}'),
        ("x.jsonl", "a"),
        ("x.json", '[{"ids": [1, 99999]}]'),
        ("x.json", "[]"),
        ("x.txt", "\n\n"),
        ("x.json", '[{"ids": "text"}]'),
    ],
)
def test_a_broken_file_of_prompts_is_one_line_that_names_it(bench, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    _, _, err = bench("--prompts", tmp_path / name, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert name in line or "99999" in line


def test_formats_and_low_bit_drafts_are_measured_side_by_side(bench):
    """Each row is compared with plain decoding of its own format, and reads the bytes of its own weights."""
    formats = ["--quantize", "none", "--quantize", "int8", "--draft_quantize", "int8"]
    result, out, _ = bench("--policy", "static:1", *formats)
    rows = {(row["quantize"], row["policy"], row["compiled"]): row for row in result["rows"]}
    names = {"none", "static:1", "static:1 (drafts int8)"}
    assert {key[:2] for key in rows} == {(format, name) for format in ("none", "int8") for name in names}
    plain, low = rows["none", "none", False], rows["int8", "none", False]
    assert plain["bytes_per_token"] == result["weight_bytes_per_pass"]
    assert all(row["identical"] for row in rows.values())
    assert 0.25 < low["bytes_per_token"] / plain["bytes_per_token"] < 0.3, "int8 of fp32"
    turns = zip(low["tokens_per_s_rounds"], plain["tokens_per_s_rounds"], strict=True)
    assert low["ratio_to"]["plain, none"] == pytest.approx(statistics.median(a / b for a, b in turns))
    visits = [rows["none", name, False]["layer_visits_per_token"] for name in ("static:1 (drafts int8)", "static:1")]
    assert visits[0] < visits[1]
    keys = ("weight_bytes", "cache_bytes", "peak_memory_bytes", "weight_bytes_per_pass")
    copies = {f"{format} (drafts int8)" for format in ("none", "int8")}
    assert result["weight_bytes"].keys() == {"none", "int8"} | copies
    assert result["ranks"] == [{key: result[key] for key in keys}]
    assert "static:1 (drafts int8), none" in out


def test_devices_are_measured_side_by_side_each_with_its_own_weights_and_policies(bench, monkeypatch):
    """A second device that is the CPU again: rows are compared with plain decoding of their own device."""
    load, models, measured = Engine.load, {}, []

    def load_here(engine, *length):
        asked, engine.device = engine.device, "cpu"
        try:
            models[asked] = load(engine, *length)
        finally:
            engine.device = asked
        return models[asked]

    calibrate = Engine.calibrate
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_300_000)
    monkeypatch.setattr(Engine, "load", load_here)
    monkeypatch.setattr(
        Engine,
        "calibrate",
        lambda engine, policy, *rest, **how: (
            measured.append((engine.model, policy)) or calibrate(engine, policy, *rest, **how)
        ),
    )
    result, out, _ = bench("--device", "cpu", "--device", "cuda", "--policy", "static:1", "--prompt_lengths", "8")
    assert models["cpu"] is not models["cuda"]
    assert [model for model, _ in measured] == [models["cpu"], models["cuda"]]
    assert measured[0][1] is not measured[1][1], "what a policy learns of a device stays there"
    plain, rows = {}, [row for row in result["rows"] if row["exact_width"]]
    for row in rows:
        plain.setdefault(row["device"], row)
    assert [(row["device"], row["policy"]) for row in rows] == [
        (device, name) for device in ("cpu", "cuda") for name in ("none", "static:1")
    ]
    for row in result["rows"]:
        own = max(
            (other for other in result["rows"] if (other["device"], other["policy"]) == (row["device"], "none")),
            key=lambda other: other["tokens_per_s"],
        )
        pairs = zip(row["tokens_per_s_rounds"], own["tokens_per_s_rounds"], strict=True)
        assert row["speedup_over_fastest_ar"] == pytest.approx(statistics.median(a / b for a, b in pairs))
        assert row["ratio_to"].keys() == {"plain, cpu"} and (row["identical"] or not row["exact_width"])
    assert "static:1, cuda" in out and "each device" in out and " 12.3 " in out
    lines = [line.split(":")[0] for line in out.splitlines() if "MB of weights a pass" in line]
    assert lines == ["cpu", "cuda"] == [row["device"] for row in result["lengths"]]
    cpu_memory, cuda_memory = result["devices"].values()
    assert cuda_memory["peak_memory_bytes"]["after_loading"] == 12_300_000
    assert cuda_memory["weight_bytes"] == cpu_memory["weight_bytes"] == result["weight_bytes"]


def test_one_device_is_not_named_in_the_table(bench):
    result, out, _ = bench("--policy", "static:1")
    assert {row["device"] for row in result["rows"]} == {"cpu"} == set(result["devices"])
    assert "cpu" not in out and "each device" not in out
