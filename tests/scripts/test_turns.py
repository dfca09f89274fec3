"""The benchmark on a dataset: a line for each text, quality and speeds of each row, and going on after a kill."""

import json

import pytest

from decoding.engine import Engine
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import hardware
from scripts.common import metrics, turns

for package in metrics.NEEDS:
    pytest.importorskip(package, reason='pip install -e ".[eval]"')

FLAGS = ("--dataset", "questions", "--num_samples", 2, "--max_new_tokens", 6, "--repeats", 2, "--policy", "static:1")


@pytest.fixture(autouse=True)
def small_bandwidth(monkeypatch):
    small = hardware.read_bandwidth
    monkeypatch.setattr(hardware, "read_bandwidth", lambda device: small(gib=0.01, repeats=2))


def lines(folder):
    settings, *records = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return settings, records


def test_each_text_is_a_line_and_each_row_has_the_quality_and_speeds_of_its_lines(play, tmp_path):
    out, _ = play(benchmark, *FLAGS)
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    _, records = lines(tmp_path / "out")
    assert sorted((r["row"], r["sample"], r["repeat"]) for r in records) == [
        (row, sample, repeat) for row in range(len(rows)) for sample in (0, 1) for repeat in (1, 2)
    ]
    for number, row in enumerate(rows):
        own = [r for r in records if r["row"] == number]
        assert all(len(r["tokens"]) == 6 and r["decode_s"] > 0 and r["prefill_s"] > 0 for r in own)
        last = [r for r in own if r["repeat"] == 2]
        for name in ("rouge1", "exact_match", "edit_distance", "edit_distance_normalised"):
            assert row["quality"][name] == pytest.approx(sum(r[name] for r in last) / 2)
        totals = [
            sum(5 for r in own if r["repeat"] == t) / sum(r["decode_s"] for r in own if r["repeat"] == t)
            for t in (1, 2)
        ]
        assert row["tokens_per_s_rounds"] == pytest.approx(totals)
        each = [sum(5 / r["decode_s"] for r in own if r["sample"] == s) / 2 for s in (0, 1)]  # of two, the median
        assert row["mean_sample_tokens_per_s"] == pytest.approx(sum(each) / 2)
        assert row["quality"] == rows[0]["quality"], "lossless rows have the same texts"
    assert "quality against the responses" in out and "mean of samples'" in out


def test_a_killed_benchmark_goes_on_without_measuring_anything_twice(play, tmp_path, monkeypatch):
    _, judged = play(benchmark, *FLAGS, "--output_dir", tmp_path / "whole"), []
    take = turns._turn

    def killed(contenders, prompt, new_tokens, seed):
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append(seed)
        return take(contenders, prompt, new_tokens, seed)

    monkeypatch.setattr(turns, "_turn", killed)
    play(benchmark, *FLAGS, code=130)  # two samples to warm up, and one turn
    before = lines(tmp_path / "out")[1]
    judged.clear()
    monkeypatch.setattr(turns, "_turn", lambda *rest: judged.append(rest[-1]) or take(*rest))
    _, err = play(benchmark, *FLAGS)
    journal = tmp_path / "out" / "samples.jsonl"
    assert f"1 of 4 turns of samples were finished before: their times are of the earlier run; delete {journal}" in err
    assert judged == ["0/0/0", "0/0/1", "0/1/1", "0/2/0", "0/2/1"]
    settings, records = lines(tmp_path / "out")
    assert records[: len(before)] == before
    facts = lambda records: [(r["row"], r["sample"], r["repeat"], r["tokens"], r.get("accepted")) for r in records]
    assert sorted(facts(records)) == sorted(facts(lines(tmp_path / "whole")[1]))
    judged.clear()
    _, err = play(benchmark, *FLAGS, "--repeats", 1)  # nothing is left to do
    assert judged == [] and "2 of 2 turns of samples were finished before" in err
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(benchmark, *FLAGS, "--temperature", 0.5, code=2)
    assert "another temperature (0.0, now 0.5)" in err


def test_equal_texts_are_judged_once(play, monkeypatch):
    judged, quality = [], metrics.quality
    monkeypatch.setattr(metrics, "quality", lambda text, responses: judged.append(text) or quality(text, responses))
    play(benchmark, *FLAGS)
    assert len(judged) == 2


def test_a_dataset_without_responses_is_timed_without_quality(play, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "import os"}\n')
    out, _ = play(benchmark, *FLAGS, "--dataset", tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"][0]["quality"] is None
    assert "quality" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompts", "code"), "--dataset and --prompts both say what to continue"),
        (("--dataset", "no_such"), "dataset must be a JSON-lines file or one of"),
        (("--prompt_field", "x", "--dataset", "{file}"), "line 1: no field 'x'"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(play, tmp_path, monkeypatch, flags, message):
    (tmp_path / "x.jsonl").write_text('{"prompt": "import os"}\n')
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    flags = [tmp_path / "x.jsonl" if flag == "{file}" else flag for flag in flags]
    _, err = play(benchmark, *FLAGS, *flags, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
