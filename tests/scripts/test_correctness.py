"""The correctness program: no errors where there are none, and a planted fault is found, placed and measured."""

import json

import pytest
import torch

from decoding.engine import Engine, EngineConfig
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import CoupledSampler
from drafting.catalogue import make_policy
from generate import decode
from kernels.exit_head import Exit
from scripts import correctness
from scripts.common.samples import read_dataset

FLAGS = ("--num_samples", 2, "--max_new_tokens", 12, "--policy", "static:2,num_draft_tokens=2", "--policy", "auto")


def result_in(folder):
    return json.loads((folder / "correctness.json").read_text())


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8, "--seed", 3)])
def test_policies_that_are_exact_have_no_errors_and_exit_code_0(play, tmp_path, sampling):
    out, _ = play(correctness, *FLAGS, *sampling)
    result = result_in(tmp_path / "out")
    assert result["identical"] and [row["policy"] for row in result["rows"]] == ["static:2,num_draft_tokens=2", "auto"]
    for row in result["rows"]:
        assert row["errors"] == 0 == row["error_share"] and row["tokens"] > 0 and row["samples"] == 2
        assert row["first_differences"] == [] and "0.000%" in out


def plant(monkeypatch, sample=1, round=2):
    """Falsify the verification of one round of one text: its tokens are those after them in the vocabulary."""
    monkeypatch.setattr(Runner, "call_by_call", True)  # so that there is a call to falsify
    verify, texts = CoupledSampler.verify, []

    def wrong(sampler, drafted, exit, position):
        if drafted and (not texts or texts[-1][0] is not sampler):  # each text has its own
            texts.append([sampler, 0])
        if drafted:
            texts[-1][1] += 1
        if drafted and (len(texts), texts[-1][1]) == (sample, round):
            exit = Exit.of_logits(exit.logits().roll(1, -1))
        return verify(sampler, drafted, exit, position)

    monkeypatch.setattr(CoupledSampler, "verify", wrong)


def test_a_planted_fault_is_found_with_its_place_and_margin_and_exit_code_1(play, tmp_path, monkeypatch, folder):
    plant(monkeypatch)
    out, _ = play(correctness, *FLAGS[:-2], code=1)
    [row] = result_in(tmp_path / "out")["rows"]
    assert not result_in(tmp_path / "out")["identical"] and row["samples_that_differ"] == 1
    [first] = row["first_differences"]
    assert 2 <= first["position"] <= 6, "after the prefill's token and one round of at most three"
    assert (first["expected"] + 1) % 380 == first["got"] and first["margin"] > 0
    assert row["error_share"] == row["errors"] / row["tokens"] > 0
    assert f"first difference in sample {first['sample']}, token {first['position']}" in out
    monkeypatch.undo()  # the margin is the full model's, computed here in one pass over prompt and text
    flags = correctness.parse_flags(["--checkpoint_path", str(folder), *map(str, FLAGS[:-2])])
    engine = Engine.open(EngineConfig(str(folder)))
    engine.load(100)
    prompt = next(s.prompt for s in read_dataset(flags).samples if s.number == first["sample"])
    ids, config = engine.tokenizer.encode(prompt), GenerateConfig(first["position"])
    runner = Runner(engine.model, len(ids) + 20, 1)
    before = Generation.collect(decode(runner, ids, config, make_policy("none", 3))).tokens
    logits = runner.exit(runner.prefill([*ids, *before])).logits()[0]
    assert logits.argmax() == first["expected"]
    assert first["margin"] == pytest.approx((logits[first["expected"]] - logits[first["got"]]).item(), abs=1e-3)


def test_a_perturbed_runner_is_found(play, tmp_path, monkeypatch):
    run_layers, wide = Runner.run_layers, []

    def perturbed(runner, hidden, position, start, stop, *skips, **drafting):
        out = run_layers(runner, hidden, position, start, stop, *skips, **drafting)
        if len(hidden) > 1 and stop == runner.n_layer:  # only calls that verify several rows, as a wrong kernel would
            wide.append(position)
            out = out + torch.randn(out.shape, generator=torch.Generator().manual_seed(len(wide)))
        return out

    monkeypatch.setattr(Runner, "call_by_call", True)  # so that a call of the runner verifies
    monkeypatch.setattr(Runner, "run_layers", perturbed)
    play(correctness, *FLAGS[:-2], code=1)
    [row] = result_in(tmp_path / "out")["rows"]
    assert wide and row["errors"] > 0 and row["first_differences"]


def test_errors_are_counted_place_by_place_and_lengths_count():
    assert correctness.count_errors([1, 2, 3], [1, 2, 3]) == 0 and correctness.first_difference([1], [1]) is None
    assert correctness.count_errors([1, 2, 3], [1, 9, 3]) == 1 and correctness.first_difference([1, 2], [1, 9]) == 1
    assert correctness.count_errors([1, 2, 3], [1, 2]) == 1 and correctness.first_difference([1, 2, 3], [1, 2]) == 2
    assert correctness.count_errors([1], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", 1, "--verification", "rejection"), "compare with --verification coupled"),
        (("--policy", "static:7"), "exit_layer must be in 1..3 for this model, got 7"),
        (("--dataset", "xsum_summarization"), "dataset xsum_summarization"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(play, monkeypatch, flags, message):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(correctness, *FLAGS, *flags, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
