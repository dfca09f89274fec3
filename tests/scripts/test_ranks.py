"""Under torchrun the experiment programs share samples: totals, texts and counts are those of one process."""

import json

import pytest

from scripts.common import metrics
from scripts.common.ranks import Ranks
from tests.helpers.processes import outputs_of, start_ranks

FLAGS = ("--num_samples", 3, "--max_new_tokens", 6, "--no-compile", "--threads", 1, "--policy", "static")
PROGRAMS = {
    "sweep": (*FLAGS, "--repeats", 1, "--ignore_eos", "--y", "exit_layer=1-2", "--x", "num_draft_tokens=2"),
    "correctness": (*FLAGS[:-1], "static:2"),
    "benchmark": (*FLAGS[:-1], "static:2", "--dataset", "questions", "--repeats", 1, "--split", "samples"),
}


def result_of(program, folder, tmp_path, size):
    output = tmp_path / str(size)
    flags = ["--checkpoint_path", folder, "--output_dir", output, *PROGRAMS[program]]
    ranks = start_ranks(size, ["-m", f"scripts.{program}", *flags])
    said = outputs_of(ranks)
    assert [rank.returncode for rank in ranks] == [0] * size, said
    spoken = [line for text in said[1:] for line in "".join(text).splitlines() if not line.startswith("[Gloo]")]
    assert spoken == [], "only rank 0 speaks"
    journal = next(iter(output.glob("*s.jsonl")), None)
    return json.loads((output / f"{program}.json").read_text()), journal and journal.read_text().splitlines()


COUNTS = (
    "policy",
    "tokens",
    "drafted",
    "accepted",
    "rounds",
    "errors",
    "acceptance_rate",
    "tokens_per_round",
    "layer_visits_per_token",
    "mean_exit_layer",
    "identical",
    "quality",
    "ideal_speedup",
    "samples",
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_ranks_have_the_totals_of_one(program, folder, tmp_path):
    for package in metrics.NEEDS if program == "benchmark" else ():
        pytest.importorskip(package, reason='pip install -e ".[eval]"')
    (one, one_lines), (two, two_lines) = (result_of(program, folder, tmp_path, size) for size in (1, 2))
    rows = "cells" if program == "sweep" else "rows"
    facts = lambda result: [{key: row[key] for key in COUNTS if key in row} for row in result[rows]]
    assert facts(one) == facts(two) and len(facts(one)) >= 1
    if program == "benchmark":
        tokens = lambda lines: [(r["row"], r["sample"], r["tokens"]) for r in map(json.loads, lines[1:])]
        assert tokens(one_lines) == tokens(two_lines), "in the order of the samples"


def test_what_ranks_share_comes_back_in_order():
    class Rank(Ranks):
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    items = list(range(7))
    shares = [Rank(rank, 3).share(items) for rank in range(3)]
    assert sorted(sum(shares, [])) == items and shares[0] == [0, 3, 6]
    assert list(Ranks(None).each(items, lambda item: -item)) == [-item for item in items]
    assert Ranks(None).gathered([1, 2]) == [1, 2] and Ranks(None).agreed("x") == "x"
