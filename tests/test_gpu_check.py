"""The check of the GPU path, as far as a machine without a GPU can run it: every section on the CPU in tiny shapes."""

import json
import sys

import pytest
import torch

import cli
from scripts import gpu_check

pytest.importorskip("triton")


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(*flags) runs the program on the CPU -> (exit code, JSON object or None, stdout, stderr)."""
    def run(*flags, device="cpu"):
        given = ["--device", device, "--shapes", "tiny", "--output_dir", tmp_path, *flags]
        monkeypatch.setattr(sys, "argv", ["gpu_check", *map(str, given)])
        before, code = set(tmp_path.glob("*")), 0
        capsys.readouterr()
        try:
            cli.run(gpu_check.main)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        files = set(tmp_path.glob("*")) - before
        assert len(files) <= 1, "one file, and nothing half-written beside it"
        return code, json.loads(files.pop().read_text()) if files else None, out, err

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_command_ends_with_one_line_and_writes_nothing(check):
    code, result, out, err = check(device="cuda")
    assert code == 2 and result is None and not out
    assert err.startswith("error: device cuda: ") and err.count("\n") == 1


def test_every_section_runs_and_what_it_measured_and_checked_is_in_the_file(check):
    code, result, out, err = check()
    sections = result["sections"]
    assert code == 0, err
    assert tuple(sections) == gpu_check.TINY.sections
    assert {section["status"] for section in sections.values()} == {"done"}
    checks = [entry for section in sections.values() for entry in section["checks"]]
    assert all(entry["ok"] is True for entry in checks) and f"{len(checks)} of {len(checks)} checks passed" in out
    exact = [entry["name"] for entry in checks if entry["name"].startswith("exact: ")]
    assert len(exact) == 3 * 2 + 2, "two drafting policies in three precisions, and both sampled in one"
    for op in gpu_check.OPS:
        rows = sections[f"kernels {op}"]["rows"]
        assert rows and all(row["us"] > 0 and row["share_of_bandwidth"] > 0 for row in rows)
        assert all((row["torch_us"] is not None) == (op == "linear_bf16") for row in rows)
    for mode in ("bf16", "int8", "int4"):
        section = sections[f"engine tiny {mode}"]
        plain, *drafting = section["rows"]
        assert plain["policy"] == "none" and plain["speedup"] == 1 and len(drafting) == len(gpu_check.DRAFTS)
        assert all(row["tokens_per_s"] > 0 and row["acceptance_rate"] > 0 for row in drafting)
        assert all(row["kernels_per_round"] > 0 and row["device_us_per_round"] > 0 for row in section["rows"])
        assert 0.5 < section["dial"]["agreement"] < 1 and section["memory"]["weights_bytes"] > 0
    sizes = [sections[f"engine tiny {mode}"]["rows"][0]["weight_bytes_per_token"] for mode in ("bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert sections["baselines tiny"]["rows"][0]["tokens_per_s"] > 0


def test_a_section_that_raises_is_recorded_and_the_run_goes_on(check, monkeypatch):
    def fail(report, *what):
        report.row(op="measured before", us=1.0)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", fail)
    code, result, out, err = check("--sections", "environment,kernels linear_int8,kernels attention")
    assert code == 1 and "kernels linear_int8 failed: RuntimeError: out of memory\n" in err
    assert "sections failed: kernels linear_int8, kernels attention" in out
    for name in ("kernels linear_int8", "kernels attention"):
        section = result["sections"][name]
        assert section["status"] == "failed" and section["message"] == "RuntimeError: out of memory"
        assert section["rows"] == [{"op": "measured before", "us": 1.0}]
    assert result["sections"]["environment"]["status"] == "done"


def test_a_wrong_kernel_and_a_text_that_differs_give_exit_code_1(check, monkeypatch):
    error = gpu_check.relative_error
    monkeypatch.setattr(gpu_check, "relative_error", lambda found, expected: error(1.1 * found, expected))
    decode = gpu_check.decode

    def longer_or_shorter(runner, prompt, config, policy):  # the text of a drafting policy misses its last round
        rounds = list(decode(runner, prompt, config, policy))
        return iter(rounds[:-1] if policy.num_draft_tokens else rounds)

    monkeypatch.setattr(gpu_check, "decode", longer_or_shorter)
    code, result, out, _ = check("--sections", "kernels linear_bf16,engine tiny bf16")
    wrong = [e["name"] for s in result["sections"].values() for e in s["checks"] if not e["ok"]]
    assert code == 1 and "linear_bf16 96x64: error" in wrong
    assert sum(name.startswith("exact: ") for name in wrong) == 4
    assert all(name in out.split("checks failed: ")[1] for name in wrong)


def test_what_the_minutes_do_not_reach_is_listed_as_not_reached(check, monkeypatch):
    def slow(report, *what):
        report.deadline = 0.0  # the time is over when this section ends

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", slow)
    code, result, out, _ = check("--sections", "environment,kernels linear_bf16,engine")
    later = ["engine tiny bf16", "engine tiny int8", "engine tiny int4"]
    assert code == 0 and f"not reached: {', '.join(later)}" in out
    assert [name for name, section in result["sections"].items() if section["status"] == "not reached"] == later


def test_the_file_is_complete_after_every_section_and_no_earlier_file_is_replaced(check, monkeypatch, tmp_path):
    seen = []

    def look(report, *what):
        seen.append(json.loads(report.path.read_text())["sections"])

    monkeypatch.setitem(gpu_check.SECTIONS, "kernels", look)
    monkeypatch.setitem(gpu_check.SECTIONS, "baselines", lambda report, *what: None)
    for _ in range(2):
        assert check("--sections", "environment,kernels linear_bf16,baselines")[1]
    for sections in seen:
        assert [section["status"] for section in sections.values()] == ["done", "running", "not reached"]
        assert sections["environment"]["rows"][0]["copy_GB_per_s"] > 0
    assert len(list(tmp_path.glob("gpu_cpu_*.json"))) == 2


@pytest.mark.parametrize(("flags", "parts"), [
    (("--minutes", 0), ["minutes must be more than 0", "0"]),
    (("--sections", "kernels,magic"), ["sections are environment", "magic"]),
    (("--output_dir", "/dev/null/x"), ["/dev/null/x"]),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(check, flags, parts):
    code, result, _, err = check(*flags)
    assert code == 2 and result is None and err.count("\n") == 1 and [p for p in parts if p not in err] == []
