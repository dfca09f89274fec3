"""The sweep: every cell on the same samples, a killed one goes on to the same table, and what it concludes."""

import csv
import json
import shlex

import pytest

import generate
from decoding.engine import Engine
from drafting.catalogue import make_policy
from scripts.sweep import __main__ as sweep
from scripts.sweep import report
from scripts.sweep.axes import Axis

SMALL = (
    "--num_samples",
    2,
    "--max_new_tokens",
    8,
    "--repeats",
    1,
    "--ignore_eos",
    "--y",
    "exit_layer=1-2",
    "--x",
    "num_draft_tokens=1,3",
)
CELLS = [f"static:exit_layer={e},num_draft_tokens={k}" for e in (1, 2) for k in (1, 3)]


def table(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def counts(folder):
    return [{key: row[key] for key in ("policy", *report.COUNTS)} for row in table(folder)]


def test_a_sweep_leaves_a_table_an_object_a_picture_and_a_command_that_runs(play, tmp_path):
    out, _ = play(sweep, *SMALL)
    rows, result = table(tmp_path / "out"), json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["policy"] for row in rows] == [row["policy"] for row in result["cells"]] == CELLS
    for row in rows:
        assert row["tokens"] == "16" and row["identical"] == "True" and float(row["speedup"]) > 0
        assert row["mean_exit_layer"] == f"{row['exit_layer']}.0" and float(row["round_cost"]) > 0
        tokens = float(row["acceptance_rate"]) * int(row["drafted"]) + int(row["rounds"])
        assert float(row["tokens_per_round"]) == pytest.approx(14 / int(row["rounds"])) and tokens <= 16 + 1
    best = max(result["cells"], key=lambda row: row["speedup"])
    assert result["best"]["measured"] == best["policy"]
    assert {"versions", "hardware", "config"} <= set(result)
    assert result["command"] in out.splitlines()
    flags = generate.parse_flags(shlex.split(result["command"])[2:])
    assert str(make_policy(generate.policy_text(flags, 3), 3)) == str(make_policy(best["policy"], 3))
    if (tmp_path / "out" / "sweep.png").exists():
        assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_sweep_goes_on_to_the_same_table_and_keeps_the_times_it_has(play, tmp_path, monkeypatch):
    play(sweep, *SMALL, "--output_dir", tmp_path / "whole")
    measured, measure = [], sweep.measure_cell

    def killed(experiment, policy, repeats):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(str(policy))
        return measure(experiment, policy, repeats)

    monkeypatch.setattr(sweep, "measure_cell", killed)
    play(sweep, *SMALL, code=130)
    journal = tmp_path / "out" / "cells.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 3 and not (tmp_path / "out" / "sweep.csv").exists()
    journal.write_text("\n".join(lines) + '\n{"exit_layer": "2", "num_dr')  # killed while it wrote
    monkeypatch.setattr(sweep, "measure_cell", lambda *rest: measured.append(str(rest[1])) or measure(*rest))
    _, err = play(sweep, *SMALL)
    assert "2 of 4 cells were finished before" in err and len(measured) == 4 and len(set(measured)) == 4
    assert counts(tmp_path / "out") == counts(tmp_path / "whole")
    for line, row in zip(lines[1:], table(tmp_path / "out"), strict=False):
        assert row["seconds"] == str(json.loads(line)["seconds"])
    _, err = play(sweep, *SMALL)
    assert f"4 of 4 cells were finished before: their times are of the earlier run; delete {journal} to" in err


def test_a_folder_of_another_sweep_is_refused_before_the_weights_are_read(play, monkeypatch):
    play(sweep, *SMALL, "--y", "exit_layer=1")
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(sweep, *SMALL, "--max_new_tokens", 9, code=2)
    assert "another max_new_tokens (8, now 9): give another --output_dir" in err.splitlines()[-1]


def test_other_keys_of_other_policies_span_the_grid_too(play, tmp_path):
    play(sweep, *SMALL, "--policy", "confidence:candidates=1-2", "--y", "threshold=0.1,0.9", "--x", "stop=never,0.2")
    rows = table(tmp_path / "out")
    assert [row["policy"] for row in rows][:2] == [
        "confidence:candidates=1-2,threshold=0.1,stop=never",
        "confidence:candidates=1-2,threshold=0.1,stop=0.2",
    ]
    assert all(row["identical"] == "True" and row["bound"] == "" for row in rows), "no fixed cost of a round"


def test_the_best_cells_and_their_distance():
    axes = [Axis("exit_layer=1-3"), Axis("num_draft_tokens=2,4")]
    assert axes[1].values == ["2", "4"] and Axis("candidates=1-2-3,2-3").values == ["1-2-3", "2-3"]
    speeds = {
        ("1", "2"): (1.0, 1.1),
        ("1", "4"): (1.2, 1.3),
        ("2", "2"): (1.5, 1.4),
        ("2", "4"): (1.4, 1.45),
        ("3", "2"): (1.1, 1.2),
        ("3", "4"): (1.0, 1.0),
    }
    rows = [
        {
            "exit_layer": e,
            "num_draft_tokens": k,
            "policy": f"{e}/{k}",
            "speedup": measured,
            "ideal_speedup": ideal,
            "bound": None,
        }
        for (e, k), (measured, ideal) in speeds.items()
    ]
    best = report.best_cells(rows)
    assert best == {"measured": "2/2", "ideal_bound": "2/4", "cost_bound": None}
    assert report.distance(rows, axes, "2/2", "2/4") == [0, 1] and report.distance(rows, axes, "2/2", None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--y", "exit_layer=1-9"), "exit_layer must be in 1..3 for this model, got 4"),
        (("--y", "exit_layer"), "an axis must be KEY=v1,v2,… or KEY=first-last, got 'exit_layer'"),
        (("--y", "depth=1"), "got 'depth=1'"),
        (("--x", "exit_layer=1"), "must name different keys, got exit_layer twice"),
        (("--x", "num_draft_tokens=1,1"), "each value once"),
        (
            ("--y", "exit_layer=2,02"),
            "static:exit_layer=2,num_draft_tokens=1 and static:exit_layer=02,num_draft_tokens=1 are the same",
        ),
        (("--x", "num_draft_tokens=20"), "num_draft_tokens must be in 0..15, got 20"),
        (("--repeats", 0), "repeats must be 1 or more, got 0"),
        (("--max_new_tokens", 1), "max_new_tokens must be 2 or more to time decoding, got 1"),
        (("--dataset", "no_such"), "dataset must be a JSON-lines file or one of"),
        (("--output_dir", "/proc/no"), "cannot make the folder /proc/no"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(play, monkeypatch, flags, message):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(sweep, *SMALL, *flags, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_sweep_is_not_continued_with_another_skip_set_under_the_same_name(play, tmp_path):
    """What files hold counts, not what they are called."""
    mask = tmp_path / "mask.json"
    flags = (*SMALL[:7], "--policy", f"skip_set:{mask}", "--y", "num_draft_tokens=1", "--x", "stop=0.1")
    mask.write_text('{"skip_attention": [1], "skip_mlp": []}')
    play(sweep, *flags)
    mask.write_text('{"skip_attention": [], "skip_mlp": [1]}')
    _, error = play(sweep, *flags, code=2)
    assert "is of a run with another policy_files" in error


def test_a_file_that_is_no_journal_is_left_alone(play, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"mine\r\n", b"mine", b'{"a": 1}\r\n'):
        (tmp_path / "out" / "cells.jsonl").write_bytes(content)
        _, error = play(sweep, *SMALL, code=2)
        assert "is not what this program writes" in error
        assert (tmp_path / "out" / "cells.jsonl").read_bytes() == content
