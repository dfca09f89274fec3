"""The search of skip sets: what it finds, that a kill changes nothing, that it does not praise what does not pay."""

import importlib.util
import json
import shlex
import shutil
import signal
from dataclasses import asdict

import pytest

pytest.importorskip("optuna", reason='pip install -e ".[search]"')
pytest.importorskip("scipy", reason='pip install -e ".[search]"')

import torch  # noqa: E402

import generate  # noqa: E402
from decoding.engine import Engine  # noqa: E402
from drafting.catalogue import make_policy  # noqa: E402
from scripts import correctness  # noqa: E402
from scripts.common import round_costs  # noqa: E402
from scripts.common.round_costs import RoundCosts  # noqa: E402
from scripts.search_skips import __main__ as search_skips  # noqa: E402
from scripts.search_skips import finish, study  # noqa: E402
from scripts.search_skips.study import Trial, propose  # noqa: E402
from tests.helpers.processes import run_python  # noqa: E402

COSTS = RoundCosts(1.0, [1.0, 0.02, 0.05, 0.05, 0.0, 0.0], 0.0)  # of a model whose time is that of its layers
SMALL = ("--num_samples", 2, "--max_new_tokens", 24, "--repeats", 1, "--ignore_eos", "--threads", 1)
KILLED = f"""
import os, signal
import cli
from scripts.common import round_costs
from scripts.common.round_costs import RoundCosts
from scripts.search_skips import __main__ as search_skips
from scripts.search_skips import trials

calls, agreement = [], trials.Judge.agreement
def killed(judge, keep):
    calls.append(keep)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return agreement(judge, keep)

trials.Judge.agreement = killed
round_costs.measure = lambda *_: {COSTS}
cli.run(search_skips.main)
"""


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    monkeypatch.setattr(round_costs, "measure", lambda *_: COSTS)


def result(folder):
    return json.loads((folder / "search.json").read_text()), json.loads((folder / "skips.json").read_text())


def history(folder):
    """All trials, but for the seconds that they took."""
    return [{**trial, "seconds": None} for trial in result(folder)[0]["trials"]]


def test_the_search_leaves_out_what_writes_nothing_and_its_file_is_a_policy(play, make_hf, folder, tmp_path):
    """Sublayers here and there are free to leave out; no static exit can do that."""
    free = {"skip_attention": {0, 2, 3}, "skip_mlp": {1, 3}}
    model = make_hf(tmp_path / "planted", vocab_size=380, num_key_value_heads=2, num_hidden_layers=5)
    for i in free["skip_attention"]:
        model.model.layers[i].self_attn.o_proj.weight.data.zero_()
    for i in free["skip_mlp"]:
        model.model.layers[i].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "planted")
    shutil.copy(folder / "tokenizer.model", tmp_path / "planted")

    out, _ = play(search_skips, "--checkpoint_path", tmp_path / "planted", *SMALL, "--trials", 50)
    search, skips = result(tmp_path / "out")
    trials = search["trials"]
    best = max((trial for trial in trials if trial["state"] == "decoded"), key=lambda trial: trial["value"])
    assert best["acceptance_rate"] > 0.9
    kept = dict(zip(study.sublayer_names(10), best["keep"], strict=True))
    assert not any(kept[f"attention_{i}"] for i in free["skip_attention"])
    assert not any(kept[f"mlp_{i}"] for i in free["skip_mlp"])
    assert best["value"] > 1.2 * max(trial["value"] for trial in trials if trial["exit_layer"])
    assert {"screened", "decoded"} == {trial["state"] for trial in trials}
    assert len({tuple(trial["keep"]) for trial in trials}) == len(trials) == 52, "no set is tried twice"
    assert all(row["identical"] for row in search["timed"])
    assert {"versions", "hardware", "config", "costs"} <= set(search)
    assert search["command"] in out.splitlines()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "search.png").read_bytes().startswith(b"\x89PNG")

    policy = f"skip_set:{tmp_path / 'out' / 'skips.json'},num_draft_tokens={skips['num_draft_tokens']}"
    plan = make_policy(policy, 5).only_plan
    assert [sorted(plan.skip_attention), sorted(plan.skip_mlp)] == [skips["skip_attention"], skips["skip_mlp"]]
    play(
        correctness,
        "--checkpoint_path",
        tmp_path / "planted",
        "--num_samples",
        1,
        "--max_new_tokens",
        24,
        "--output_dir",
        tmp_path / "correct",
        "--policy",
        policy,
    )
    flags = generate.parse_flags(shlex.split(search["command"])[2:])
    assert generate.policy_text(flags, 5) == skips["recommended"]


@pytest.mark.parametrize("flags", [(), ("--temperature", 0.8), ("--draft_vocab", 200)], ids=str)
def test_the_parallel_pass_promises_what_decoding_keeps_where_each_round_is_one_draft(play, tmp_path, flags):
    play(search_skips, *SMALL, *flags, "--trials", 12, "--most_drafts", 1, "--screen", 0)
    trials = result(tmp_path / "out")[0]["trials"]
    assert all(trial["value"] == pytest.approx(trial["proxy"]) for trial in trials)
    assert len({trial["value"] for trial in trials}) > 3 and all(trial["state"] == "decoded" for trial in trials)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_a_search_killed_within_a_trial_goes_on_to_the_history_of_one_that_was_not(play, folder, tmp_path, sampler):
    flags = (*SMALL, "--trials", 20, "--sampler", sampler)
    play(search_skips, *flags, "--output_dir", tmp_path / "whole")
    child = run_python(KILLED, "--checkpoint_path", folder, "--no-compile", *flags, "--output_dir", tmp_path / "out")
    assert child.returncode == -signal.SIGKILL, child.stderr
    _, err = play(search_skips, *flags)
    assert "14 of 21 trials were finished before" in err
    assert history(tmp_path / "out") == history(tmp_path / "whole")


def test_a_finished_search_says_the_same_again_without_the_weights_and_takes_more_trials(play, tmp_path, monkeypatch):
    first, _ = play(search_skips, *SMALL, "--trials", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
        assert play(search_skips, *SMALL, "--trials", 3)[0] == first
    before = history(tmp_path / "out")
    play(search_skips, *SMALL, "--trials", 5)
    assert history(tmp_path / "out")[:4] == before and len(history(tmp_path / "out")) == 6


def row(policy, rates, identical=True):
    return {
        "policy": policy,
        "rates": rates,
        "tokens_per_s": rates[0],
        "identical": identical,
        "acceptance_rate": 0.5,
        "speedup": rates[0] / 100,
        "modelled_speedup": 2.0,
        "tokens_per_round": 2.0,
    }


def test_where_nothing_pays_nothing_is_recommended(play, tmp_path, monkeypatch):
    """However good the model of the costs thinks a set is: the clock decides."""
    monkeypatch.setattr(
        search_skips,
        "timed",
        lambda experiment, sets, static: [
            row("none", [100.0]),
            row("static:1", [90.0]),
            *(row(f"set {i + 1}", [99.0 - i]) for i in range(len(sets))),
        ],
    )
    out, _ = play(search_skips, *SMALL, "--trials", 2)
    search, skips = result(tmp_path / "out")
    assert skips["improvement"] is False and skips["recommended"] == "none" and skips["speedup"] == 0.99
    assert skips["reference"]["none"]["tokens_per_s"] == 100
    assert search["command"].endswith("--policy none") and search["command"] in out.splitlines()
    assert "nothing that was tried is faster than plain decoding: use --policy none" in out


@pytest.mark.parametrize(
    ("rows", "winner", "said"),
    [
        (
            [row("none", [100, 100]), row("static:1", [120, 120]), row("set 1", [130, 110])],
            2,
            "a tie: the set was faster",
        ),
        ([row("none", [100, 100]), row("static:1", [120, 120]), row("set 1", [150, 150])], 2, "1.25 times as fast as"),
        ([row("none", [100, 100]), row("static:1", [120, 120]), row("set 1", [110, 110])], 1, "0.92 times as fast as"),
        ([row("none", [100, 100]), row("static:1", [90, 90]), row("set 1", [100, 100])], 0, "use --policy none"),
        (
            [row("none", [100, 100]), row("static:1", [120, 120]), row("set 1", [150, 150], False)],
            1,
            "ITS TEXT DIFFERS",
        ),
    ],
)
def test_the_conclusion_follows_the_clock(rows, winner, said):
    sets, static = [Trial((True, False), 2, 0.5, 1.5, 1.5)], Trial((False, True), 2, 0.5, 1.5, 1.5, 1)
    best, found, notes = finish.conclusion(rows, sets, static)
    assert (best, found) == (2, winner) and said in " ".join(notes)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_what_is_tried_next_is_a_function_of_what_was_tried_and_a_seed(sampler):
    tried = [Trial(tuple(bool(i * i >> bit & 1) for bit in range(16)), 1, 0.5, i % 7, i % 7) for i in range(0, 240, 16)]
    proposals = {seed: propose(tried, sampler, seed) for seed in ("0", "1", "2", "3")}
    assert {seed: propose(tried, sampler, seed) for seed in proposals} == proposals


def test_the_study_in_the_file_is_one_that_optuna_reads(play, tmp_path):
    import optuna

    play(search_skips, *SMALL, "--trials", 6)
    study = optuna.load_study(study_name="skip_sets", storage=f"sqlite:///{tmp_path}/out/search.db")
    states = {"COMPLETE": "decoded", "PRUNED": "screened"}
    found = result(tmp_path / "out")[0]["trials"]
    assert [states[trial.state.name] for trial in study.trials] == [trial["state"] for trial in found]
    assert [list(trial.params.values()) for trial in study.trials] == [trial["keep"] for trial in found]
    assert study.user_attrs["costs"] == asdict(COSTS)


def test_costs_are_never_negative_and_a_slow_second_does_not_bend_them():
    features = torch.tensor([[1.0, k, k * a] for k in range(1, 8) for a in range(6)], dtype=torch.float64)
    seconds = features @ torch.tensor([2.0, 0.0, 0.3], dtype=torch.float64)
    seconds[::9] *= 4
    fitted, error = round_costs.fit(features, seconds)
    assert fitted == pytest.approx([2.0, 0.0, 0.3], abs=0.02) and min(fitted) >= 0 and error < 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trials", 0), "trials must be 1 or more, got 0"),
        (("--most_drafts", 0), "most_drafts must be 1 or more, got 0"),
        (("--most_drafts", 16), "num_draft_tokens must be in 0..15, got 16"),
        (("--screen", 1.5), "screen must be in 0..1, got 1.5"),
        (("--max_new_tokens", 1), "max_new_tokens must be 2 or more to draft, got 1"),
        (("--num_draft_tokens", 3), "give --most_drafts instead"),
        (("--draft_quantize", "int8"), "draft_quantize: the search drafts with the model's own weights only"),
        (("--verification", "rejection", "--temperature", 1), "verification rejection: the search counts drafts"),
        (("--output_dir", "/tmp/a,b"), "output_dir must be without ','"),
        (("--output_dir", "/proc/no"), "cannot make the folder /proc/no"),
        (("--dataset", "no_such"), "dataset must be a JSON-lines file or one of"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(play, monkeypatch, flags, message):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(search_skips, *SMALL, *flags, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_optuna_is_named_where_it_is_missing(play, monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None if name == "optuna" else name)
    _, err = play(search_skips, *SMALL, code=2)
    assert err.splitlines()[-1] == "error: the search needs optuna: pip install optuna"


def test_a_folder_of_another_search_and_other_files_are_left_alone(play, tmp_path, monkeypatch):
    play(search_skips, *SMALL, "--trials", 1)
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(search_skips, *SMALL, "--max_new_tokens", 9, code=2)
    assert "another max_new_tokens (24, now 9): give another --output_dir" in err.splitlines()[-1]
    file = tmp_path / "out" / "search.db"
    for content in (b"something of mine", file.read_bytes()[:9000], file.read_bytes()[:20]):
        file.write_bytes(content)
        _, err = play(search_skips, *SMALL, code=2)
        assert "search.db is not what this program writes" in err and "give another --output_dir" in err
        assert file.read_bytes() == content


@pytest.mark.parametrize("costs", [{"plain": 1.0, "table": [1.0]}, asdict(COSTS) | {"fitted": [1.0, 2.0]}])
def test_a_search_by_another_curve_of_costs_is_refused(play, tmp_path, monkeypatch, costs):
    play(search_skips, *SMALL, "--trials", 1)
    import optuna

    storage = f"sqlite:///{tmp_path}/out/search.db"
    optuna.load_study(study_name="skip_sets", storage=storage).set_user_attr("costs", costs)
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, err = play(search_skips, *SMALL, "--trials", 2, code=2)
    assert "search.db has costs of rounds that this version does not understand" in err.splitlines()[-1]
