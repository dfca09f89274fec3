"""The check of the GPU path, as far as a machine without a GPU can run it: every section on the CPU in tiny shapes."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from decoding.graphs import Graphs
from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check import engine, kernels, profile
from scripts.gpu_check.report import DeviceLostError, Report
from scripts.gpu_check.shapes import DRAFTS, FULL, OPS, TINY
from scripts.gpu_check.targets import TARGETS

pytest.importorskip("triton")


@pytest.fixture
def check(tmp_path, run_program):
    """check(*flags) runs the program on the CPU -> (exit code, JSON object or None, stdout, stderr)."""

    def run(*flags, device="cpu"):
        given = ["--device", device, "--shapes", "tiny", "--output_dir", tmp_path, *flags]
        before = set(tmp_path.glob("*"))
        code, out, err = run_program(gpu_check.main, *given)
        files = set(tmp_path.glob("*")) - before
        assert len(files) <= 1, "one file, and nothing half-written beside it"
        return code, json.loads(files.pop().read_text()) if files else None, out, err

    return run


def checks_of(result):
    return [entry for section in result["sections"].values() for entry in section.get("checks", ())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_command_ends_with_one_line_and_writes_nothing(check):
    code, result, out, err = check(device="cuda")
    assert code == 2 and result is None and not out
    assert err.startswith("error: device cuda: ") and err.count("\n") == 1


def test_every_section_runs_and_what_it_measured_and_checked_is_in_the_file(check):
    code, result, out, err = check()
    sections = result["sections"]
    assert code == 0, err
    assert list(sections) == list(TINY.sections)
    assert {section["status"] for section in sections.values()} == {"done"}
    checks = checks_of(result)
    assert all(entry["ok"] is True for entry in checks) and f"{len(checks)} of {len(checks)} checks passed" in out
    exact = [entry["name"] for entry in checks if entry["name"].startswith("exact: ")]
    assert len(exact) == 3 * 2 + 2 + 5, "two static policies in three precisions; in one also sampled, and five dynamic"
    for op in OPS:
        rows = sections[f"kernels {op}"]["rows"]
        assert rows and all(row["us"] > 0 and row["share_of_bandwidth"] > 0 for row in rows)
        assert all((row["matmul_us"] is not None) == (op in ("linear_bf16", "exit_head")) for row in rows)
    for mode in ("bf16", "int8", "int4"):
        section = sections[f"engine tiny {mode}"]
        plain, *drafting = section["rows"]
        assert plain["policy"] == "none" and plain["speedup"] == 1
        assert len(drafting) == len(DRAFTS) + (5 if mode == "bf16" else 0)
        assert all(row["tokens_per_s"] > 0 for row in drafting)
        assert all(row["acceptance_rate"] > 0 for row in drafting[: len(DRAFTS)])  # others may have drafted nothing
        assert 0.5 < section["dial"]["agreement"] < 1 and section["memory"]["weights_bytes"] > 0
    sizes = [sections[f"engine tiny {mode}"]["rows"][0]["weight_bytes_per_token"] for mode in ("bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    profiled = sections["profile tiny bf16"]["rows"]
    assert [row["policy"] for row in profiled] == [row["policy"] for row in sections["engine tiny bf16"]["rows"]]
    assert all(row["kernels"] > 0 and row["device_us"] > 0 for row in profiled)
    assert all(row["tokens_per_s"] > 0 and row["ours_over_it"] > 0 for row in sections["baselines tiny"]["rows"])
    measured = {target["target"]: target["met"] for target in result["targets"]}
    assert len(measured) == len(TARGETS) and measured["texts that differ from plain decoding's"] is True
    assert all(name in out for name in measured), "the table of targets is printed"


def test_a_missed_target_is_a_result_and_no_error(check, monkeypatch):
    monkeypatch.setitem(
        gpu_check.SECTIONS,
        "engine",
        lambda report, name, mode: report.row(policy="none", share_of_bandwidth=0.5 if mode == "int8" else 0.99),
    )
    code, result, out, _ = check("--sections", "environment,engine")
    met = {target["target"]: (target["met"], target["measured"]) for target in result["targets"]}
    assert code == 0
    assert met["plain decoding, share of copy bandwidth, bf16"] == (True, 0.99)
    assert met["plain decoding, share of copy bandwidth, int8"] == (False, 0.5)
    assert met["static drafts, share of the ideal speedup"] == (None, None)
    assert "targets missed: plain decoding, share of copy bandwidth, int8\n" in out


@pytest.mark.parametrize(
    ("name", "sections", "measured", "met"),
    [
        (
            "plain decoding, share of copy bandwidth, bf16",
            {  # not of 1B; the worst of the others
                "engine 1B bf16": [("none", 0.1)],
                "engine 8B bf16": [("none", 0.95)],
                "engine 7B bf16": [("none", 0.89), ("static:4,num_draft_tokens=3", 0.2)],
            },
            0.89,
            False,
        ),
        ("plain decoding, share of copy bandwidth, int4", {"engine 8B int4": [("none", 0.75)]}, 0.75, True),
        (
            "static drafts, share of the ideal speedup",
            {  # dynamic policies have no target
                "engine 1B bf16": [("static:4,num_draft_tokens=5", 0.96), ("static:4,num_draft_tokens=5,stop=0.5", 0.5)]
            },
            0.96,
            True,
        ),
        ("plain and static: graphs started a round, off one", {"profile 1B bf16": [("none", 1), ("auto", 7)]}, 0, True),
        ("plain and static: graphs started a round, off one", {"profile 1B bf16": [("none", 0)]}, 1, False),
        ("plain and static: blocking waits within a round", {"profile 1B bf16": [("none", 0.5)]}, 0.5, False),
        ("plain and static: blocking waits within a round", {"profile 1B bf16": [("none", None)]}, None, None),
    ],
)
def test_a_target_takes_the_worst_figure_of_the_sections_that_it_is_about(name, sections, measured, met):
    target = next(target for target in TARGETS if target.name == name)
    keys = ("share_of_bandwidth", "share_of_ideal", "graph_launches", "syncs")
    found = {
        section: {"rows": [{"policy": policy} | dict.fromkeys(keys, value) for policy, value in rows]}
        for section, rows in sections.items()
    }
    judged = target.judge(found)
    assert (judged["measured"], judged["met"]) == (measured, met)


def test_the_sections_of_the_full_run_are_known_ones_and_what_matters_most_comes_first():
    kinds = [name.split()[0] for name in FULL.sections]
    assert set(kinds) == set(gpu_check.SECTIONS) and kinds[0] == "environment"
    assert list(FULL.sections).index(f"engine {FULL.thorough}") == kinds.index("engine") > kinds.index("kernels")
    wanted = {f"engine {model} {mode}" for model in ("1B", "7B", "8B") for mode in ("bf16", "int8", "int4")}
    assert wanted < set(FULL.sections)


def test_a_section_that_raises_is_recorded_and_the_run_goes_on(check, monkeypatch):
    def fail(report, *what):
        report.row(op="measured before", us=1.0)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", fail)
    code, result, out, err = check("--sections", "environment,kernels linear_int8,kernels attention")
    assert code == 1 and "kernels linear_int8 failed: RuntimeError: out of memory\n" in err
    assert "sections failed: kernels linear_int8; kernels attention" in out
    for name in ("kernels linear_int8", "kernels attention"):
        section = result["sections"][name]
        assert section["status"] == "failed" and section["failures"] == {name: "RuntimeError: out of memory"}
        assert section["rows"] == [{"op": "measured before", "us": 1.0}]
    assert result["sections"]["environment"]["status"] == "done"


def test_a_policy_or_a_shape_that_fails_takes_no_other_along(check, monkeypatch):
    decode, head = engine.decode, kernels.check_exit_head

    def broken_decode(runner, prompt, config, policy):
        if "stop=0.5" in str(policy) or (policy.num_draft_tokens == 5 and config.sampling.temperature):
            raise RuntimeError("no such kernel")
        return decode(runner, prompt, config, policy)

    def broken_head(report, vocabulary, mode):
        if mode == "bf16":
            raise RuntimeError("no such kernel")
        head(report, vocabulary, mode)

    monkeypatch.setattr(engine, "decode", broken_decode)
    monkeypatch.setattr(kernels, "check_exit_head", broken_head)
    code, result, out, _ = check("--sections", "kernels exit_head,engine tiny bf16")
    heads, tiny = result["sections"]["kernels exit_head"], result["sections"]["engine tiny bf16"]
    assert code == 1 and list(heads["failures"]) == ["exit_head 250 bf16"] and heads["rows"]
    stopping = "static:1,num_draft_tokens=5,stop=0.5"
    assert list(tiny["failures"]) == [
        "exact: tiny bf16 static:1,num_draft_tokens=5 sampled",
        f"exact: tiny bf16 {stopping} greedy",
    ]
    assert [row["policy"] for row in tiny["rows"]] == [
        "none",
        "static:1,num_draft_tokens=3",
        "confidence:0.5,candidates=1-2,num_draft_tokens=5",
        "skip_set:FILE,num_draft_tokens=3",
        "prompt_lookup+static:1",
        "auto",
    ]
    assert "kernels exit_head (exit_head 250 bf16)" in out.split("sections failed: ")[1]


def test_where_the_compiled_block_fails_the_engine_is_measured_without_it(check, monkeypatch):
    warm_up, calls = engine.Runner.warm_up, []

    def fail_first(self, *arguments, **keys):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no compiler")
        warm_up(self, *arguments, **keys)

    monkeypatch.setattr(engine.Runner, "warm_up", fail_first)
    code, result, _, _ = check("--sections", "engine tiny int8")
    section = result["sections"]["engine tiny int8"]
    assert code == 1 and section["failures"] == {"torch.compile of the block": "RuntimeError: no compiler"}
    assert len(section["rows"]) == 3 and all(entry["ok"] for entry in section["checks"])


def test_where_no_round_can_be_played_in_one_the_engine_is_measured_call_by_call(check, monkeypatch):
    def fail(self, *arguments, **keys):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "run", fail)
    code, result, _, _ = check("--sections", "engine tiny int8")
    section = result["sections"]["engine tiny int8"]
    assert code == 1 and list(section["failures"]) == ["plain decoding, greedy"]
    assert section["notices"] == ["rounds call by call: playing them in one failed"]
    assert len(section["rows"]) == 3 and all(entry["ok"] for entry in section["checks"]) and len(section["checks"]) == 5


def test_a_wrong_kernel_and_a_text_that_differs_give_exit_code_1(check, monkeypatch):
    error = kernels.relative_error
    monkeypatch.setattr(kernels, "relative_error", lambda found, expected: error(1.1 * found, expected))
    decode = engine.decode

    def shorter(runner, prompt, config, policy):  # the text of a drafting policy misses its last round
        rounds = list(decode(runner, prompt, config, policy))
        return iter(rounds[:-1] if policy.num_draft_tokens else rounds)

    monkeypatch.setattr(engine, "decode", shorter)
    code, result, out, _ = check("--sections", "kernels linear_bf16,engine tiny int8")
    wrong = [entry for entry in checks_of(result) if not entry["ok"]]
    assert code == 1 and "linear_bf16 96x64: error" in [entry["name"] for entry in wrong]
    different = [entry for entry in wrong if entry["name"].startswith("exact: ")]
    assert len(different) == 2
    assert all(entry["first_at"] + entry["different"] == TINY.exact_tokens for entry in different), "where, how many"
    assert all(entry["name"] in out.split("checks failed: ")[1] for entry in wrong)
    assert result["targets"][0]["met"] is False and result["targets"][0]["measured"] == 2


def test_what_the_minutes_do_not_reach_is_listed_as_not_reached(check, monkeypatch):
    def slow(report, *what):
        report.deadline = 0.0  # the time is over when this section ends

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", slow)
    code, result, out, _ = check("--sections", "environment,kernels linear_bf16,engine")
    later = ["engine tiny bf16", "engine tiny int8", "engine tiny int4"]
    assert code == 0 and f"not reached: {'; '.join(later)}" in out
    assert [name for name, section in result["sections"].items() if section["status"] == "not reached"] == later


def test_the_file_is_complete_at_every_moment_and_no_earlier_file_is_replaced(check, monkeypatch, tmp_path):
    seen = []

    def look(report, *what):
        report.row(op="found", us=1.0)
        seen.append(json.loads(report.path.read_text()))

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", look)
    monkeypatch.setitem(gpu_check.SECTIONS, "baselines", lambda report, *what: None)
    for _ in range(2):
        assert check("--sections", "environment,kernels linear_bf16,baselines")[1]
    for result in seen:
        sections = result["sections"]
        assert [section["status"] for section in sections.values()] == ["done", "running", "not reached"]
        assert sections["environment"]["rows"][0]["copy_GB_per_s"] > 0 and len(result["targets"]) == len(TARGETS)
        assert sections["kernels linear_bf16"]["rows"] == [{"op": "found", "us": 1.0}]
    assert len(list(tmp_path.glob("gpu_cpu_*.json"))) == 2


WORKER = """
import json, os, sys
path = sys.argv[1]
result = json.load(open(path))
for name, section in result["sections"].items():
    if section["status"] == "not reached":
        section |= {"status": "running", "rows": [1], "checks": [], "failures": {}}
        json.dump(result, open(path, "w"))
        if name == "dies":
            os._exit(134)
        section["status"] = "done"
        json.dump(result, open(path, "w"))
        if name == "wears":
            sys.exit(75)
"""


def test_a_process_that_dies_takes_only_its_section_along(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    names = ("first", "dies", "wears", "last")
    path.write_text(json.dumps({"sections": {name: {"status": "not reached"} for name in names}}))
    gpu_check.supervise(path, 1.0, [sys.executable, "-c", WORKER, str(path)])
    sections = json.loads(path.read_text())["sections"]
    assert [section["status"] for section in sections.values()] == ["done", "failed", "done", "done"]
    assert "ended with code 134" in sections["dies"]["failures"]["dies"] and sections["dies"]["rows"] == [1]
    assert "dies failed: its process ended with code 134" in capsys.readouterr().err


def test_a_process_that_never_begins_is_not_started_again_and_again(tmp_path):
    path, started = tmp_path / "gpu.json", tmp_path / "started"
    path.write_text(json.dumps({"sections": {"first": {"status": "not reached"}}}))
    code = f"open({str(started)!r}, 'a').write('x'); raise SystemExit(1)"
    gpu_check.supervise(path, 1.0, [sys.executable, "-c", code])
    assert started.read_text() == "x"
    assert json.loads(path.read_text())["sections"] == {"first": {"status": "not reached"}}


def test_a_run_that_was_cut_off_goes_on_with_what_it_had_not_finished(check, tmp_path):
    assert check("--sections", "environment,kernels linear_int8,kernels linear_int4")[0] == 0
    path = next(tmp_path.glob("*.json"))
    cut = json.loads(path.read_text())
    cut["sections"]["kernels linear_int8"]["status"] = "running"
    cut["sections"]["kernels linear_int4"] = {"status": "not reached"}
    cut["sections"]["environment"]["rows"][0]["copy_GB_per_s"] = 12.0
    path.write_text(json.dumps(cut))
    code, new, out, _ = check("--resume", path)
    sections = json.loads(path.read_text())["sections"]
    assert code == 0 and new is None and f"written to {path}" in out
    assert [section["status"] for section in sections.values()] == ["done"] * 3
    assert sections["environment"]["rows"][0]["copy_GB_per_s"] == 12.0, "what was measured stays"
    row = sections["kernels linear_int4"]["rows"][0]
    assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / row["us"] / 12e3)


def test_a_gpu_that_answers_nothing_more_ends_the_process_not_the_run(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("illegal memory access")

    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"sections": {"environment": {}}}))
    report = Report(path, TINY, "cuda", 1.0)
    report.section = {"failures": {}}
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        report.attempt("whole", report.attempt, "part", lost)
    assert report.section["failures"] == {"part": "RuntimeError: illegal memory access"}


def test_graphs_and_waits_are_counted_from_the_second_round_on(monkeypatch):
    class Graph:
        def replay(self):
            pass

    def rounds():
        graph = Graph()
        yield "prefill"
        for index in range(5):
            graph.replay()
            if index == 0:
                graph.replay()  # the first round starts its follower, too
            if index == 3:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            if index:
                warnings.warn("something else", stacklevel=1)
            yield index

    modes = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(CUDAGraph=Graph, set_sync_debug_mode=modes.append))
    assert profile.count_launches(rounds(), "cuda") == {"graph_launches": 1.0, "syncs": 0.25}
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--minutes", 0), ["minutes must be more than 0", "0"]),
        (("--sections", "kernels,magic"), ["sections are environment", "magic"]),
        (("--output_dir", "/dev/null/x"), ["/dev/null/x"]),
        (("--resume", "/no/such.json"), ["resume: cannot read /no/such.json"]),
        (("--resume", "checkpoints/demo/config.json"), ["resume: checkpoints/demo/config.json is no result"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(check, flags, parts):
    code, result, _, err = check(*flags)
    assert code == 2 and result is None and err.count("\n") == 1 and [p for p in parts if p not in err] == []
