"""The learned skip policy: an unbiased gradient, what it learns on models whose answer is known, runs that go on."""

import argparse
import itertools
import json
import shlex
import sysconfig
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import generate
from decoding.engine import Engine
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from scripts.common.round_costs import RoundCosts
from scripts.train_policy import __main__ as train_policy
from scripts.train_policy import report, training
from scripts.train_policy.network import SkipNetwork, draw_actions, policy_loss
from scripts.train_policy.rewards import SkipReward, SpeedReward, Window, layers_skipped
from scripts.train_policy.training import PolicyTrainer, TrainingState
from tests.helpers.models import N_LAYER, PROMPT, random_model, tokens_of

COSTS = RoundCosts(1.0, [0.5, 0.1, 0.05, 0.05, 0.0, 0.0], 0.0)
SMALL = (
    "--steps",
    6,
    "--save_every",
    2,
    "--context",
    24,
    "--windows",
    1,
    "--samples",
    2,
    "--hidden",
    8,
    "--eval_windows",
    3,
    "--num_prompts",
    2,
    "--max_new_tokens",
    8,
    "--repeats",
    1,
)


@pytest.fixture
def learn(play, tmp_path, monkeypatch):
    """learn(*flags, code=0) runs the program for a few steps on two files -> (stdout, stderr)."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("textwrap.py", "keyword.py"):
        (texts / name).write_bytes((Path(sysconfig.get_paths()["stdlib"]) / name).read_bytes())
    monkeypatch.setattr(train_policy, "measure", lambda *_: COSTS)
    return lambda *flags, **code: play(train_policy, "--data", texts, *SMALL, *flags, **code)


# ---------------------------------------------------------------- the estimator


def own_sample_in_the_baseline(logits, actions, rewards):
    return policy_loss(logits, actions, rewards) * (len(actions) - 1) / len(actions)


def no_exploration(logits, actions, rewards):
    """The same, paying for what was drawn with the chance of the likeliest set."""
    return policy_loss(logits, (logits > 0).expand(actions.shape), rewards)


def standard_errors_off(loss, samples: int, batches: int = 600) -> float:
    """How far the mean gradient of a loss is from the exact one, enumerated over all sets: the worst component."""
    generator = torch.Generator().manual_seed(1)
    network = SkipNetwork(dim=3, n_layer=2, hidden=3)
    with torch.no_grad():
        network.b2.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0]))
    states = torch.randn(2, 3, generator=generator)
    sets = torch.tensor(list(itertools.product([False, True], repeat=4)))
    worth = torch.randn(2, len(sets), generator=generator) * 3 + 5  # of each set after each state
    place = torch.tensor([8, 4, 2, 1])

    chances = network(states).sigmoid()
    of_sets = torch.where(sets, chances[:, None], 1 - chances[:, None]).prod(-1)
    exact = torch.autograd.grad(-(of_sets * worth).sum(-1).mean(), network.parameters())

    found, rows = [], torch.arange(2).repeat(16)
    for _ in range(batches):
        logits = network(states[rows])
        actions = draw_actions(logits, samples, generator)
        rewards = worth[rows, (actions * place).sum(-1)]
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(logits, actions, rewards), network.parameters())])
        )
    found, exact = torch.stack(found), torch.cat([g.flatten() for g in exact])
    error = found.std(0) / batches**0.5
    assert (error > 0).sum() > 20, "most components must be alive"
    return ((found.mean(0) - exact).abs() / (error + 1e-7)).max().item()


@pytest.mark.parametrize("samples", [2, 4])
def test_the_mean_of_the_estimated_gradients_is_the_gradient_of_the_expected_reward(samples):
    assert standard_errors_off(policy_loss, samples) < 4


@pytest.mark.parametrize("loss", [own_sample_in_the_baseline, no_exploration])
def test_biased_estimators_are_caught_by_that_test(loss):
    assert standard_errors_off(loss, samples=2) > 8


def test_a_reward_that_all_draws_get_teaches_nothing():
    logits, rewards = torch.randn(5, 4, requires_grad=True), torch.randn(3, 5)
    actions = draw_actions(logits, 3, torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(policy_loss(logits, actions, more), logits)[0] for more in (rewards, rewards + 9)]
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- what is judged, and what is learned


def test_decoding_chooses_and_accepts_what_a_window_says(tmp_path):
    """The state, the position and the draft of training are those of the engine, round by round."""
    model = random_model(torch.float32, pack=False)
    network = SkipNetwork(64, N_LAYER, 16, seed=3)
    torch.nn.init.normal_(network.w2, std=0.5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(network.b2, 0.5)
    network.export(tmp_path / "p", {"n_layer": str(N_LAYER), "dim": "64", "num_draft_tokens": "1"})
    policy = make_policy(f"learned:{tmp_path / 'p'},every=1", N_LAYER, 64)
    plans, choose = [], policy.start_round
    policy.start_round = lambda context: plans.append(choose(context)) or plans[-1]
    found = tokens_of(Runner(model, 120, max_rows=8), PROMPT, policy, SamplingConfig(), new=80)
    window = Window(model, [*PROMPT, *found.tokens])
    keep = network.choose(window.states)
    agrees, position, seen = window.judge(keep).agrees, len(PROMPT), set()
    for step, plan in zip(found.rounds, plans, strict=True):
        if position > len(agrees):  # the last round may have no position left to draft for
            break
        kept = [i not in skips for i in range(N_LAYER) for skips in (plan.skip_attention, plan.skip_mlp)]
        assert kept == keep[position - 1].tolist()
        if step.drafted:
            assert bool(step.accepted) == bool(agrees[position - 1]), position
            seen.add((*kept, bool(step.accepted)))
        position += len(step.tokens)
    assert len(seen) > 4, "several sets, and drafts of both kinds"


def test_what_a_window_says_of_drafts_that_leave_out_nothing_and_all(tmp_path):
    model = random_model(torch.float32, pack=False)
    tokens = torch.randint(130, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    window = Window(model, tokens)
    everything, nothing = torch.ones(19, 2 * N_LAYER, dtype=torch.bool), torch.zeros(19, 2 * N_LAYER, dtype=torch.bool)
    same, other = window.judge(everything), window.judge(nothing)
    assert same.agrees.all() and same.kl.abs().max() < 1e-5 and not other.agrees.all() and other.kl.min() > 0.01
    ends = lambda hidden: model.head(hidden).log_softmax(-1)
    full, bare = ends(window.drafts.states[-1])[1:], ends(window.drafts.states[0])[1:]
    torch.testing.assert_close(other.kl, (full.exp() * (full - bare)).sum(-1))
    torch.testing.assert_close(other.ce, -bare[range(19), tokens[2:]])
    torch.testing.assert_close(other.chance, bare[range(19), full.argmax(-1)].exp())
    assert layers_skipped(nothing, model).tolist() == pytest.approx([N_LAYER] * 19)
    reward = SkipReward(model, "ce", 0.5)(other, nothing)
    torch.testing.assert_close(reward, 0.5 * N_LAYER - other.ce)
    speed = SpeedReward(COSTS, 2)(other, everything)
    torch.testing.assert_close(speed, (1 + other.chance + other.chance**2) / (0.5 + 2 * (0.1 + 0.4)))


def model_with_idle_layers(seed: int):
    """Layers 1 and 2 write nothing; 0 and 3 decide what is said."""
    model = random_model(torch.float32, pack=False, seed=seed, late_scale=1.0, sharpness=3.0)
    for index in (1, 2):
        for linear in (model.layers[index].attention.wo, model.layers[index].mlp.w2):
            torch.nn.init.zeros_(linear.weight)
    return model


def learned_policies(model, seed: int, alphas: str, folder: Path) -> tuple[dict, list[dict]]:
    flags = train_policy.parse_flags(
        [
            "--alpha",
            alphas,
            "--steps",
            "60",
            "--context",
            "32",
            "--learning_rate",
            "0.02",
            "--seed",
            str(seed),
            "--eval_windows",
            "12",
            "--hidden",
            "16",
        ]
    )
    text = torch.randint(130, (2000,), generator=torch.Generator().manual_seed(seed))
    rewards = train_policy.make_rewards(flags, model, COSTS)
    trainer, progress = PolicyTrainer(model, text[:1400], flags), TrainingState(folder / "state.pt", {})
    networks = {name: trainer.train(name, reward, progress) for name, reward in rewards.items()}
    pieces = report.pieces(text[1400:], flags)
    return networks, report.judge_policies(model, pieces, networks, rewards, seed)


@pytest.mark.parametrize("seed", range(3))
def test_it_leaves_out_layers_that_write_nothing_keeps_the_others_and_beats_chance(seed, tmp_path):
    model = model_with_idle_layers(seed)
    networks, [row] = learned_policies(model, seed, "0.1", tmp_path)
    kept = networks["0.1"].choose(Window(model, list(range(100))).states).float().mean(0)
    assert kept[2:6].max() < 0.1 and kept[[0, 1, 6, 7]].min() > 0.9, kept
    assert row["random"]["skipped"] == pytest.approx(row["learned"]["skipped"], abs=0.1)
    for key, sign in (("kl", -1), ("agreement", 1), ("reward", 1)):
        more, error = row["over_random"][key]
        assert sign * more > 4 * error, (key, more, error)
    assert row["learned"]["agreement"] > 0.95 and row["over_one_set"]["reward"][0] == pytest.approx(0, abs=0.02)


def test_the_more_a_layer_left_out_is_worth_the_more_are(tmp_path):
    _, rows = learned_policies(model_with_idle_layers(0), 0, "0.1,1,10", tmp_path)
    skipped = [row["learned"]["skipped"] for row in rows]
    assert [row["alpha"] for row in rows] == ["0.1", "1", "10"]
    assert skipped[0] == pytest.approx(2, abs=0.1) and skipped[0] < skipped[1] < skipped[2] and skipped[2] > 3.9
    assert rows[0]["learned"]["kl"] < rows[1]["learned"]["kl"] < rows[2]["learned"]["kl"]


def test_all_policies_see_the_same_windows_and_draws_and_every_step_others():
    model = random_model(torch.float32, pack=False)
    trainer = PolicyTrainer(model, torch.arange(2000) % 130, train_policy.parse_flags(["--context", "16"]))
    seen = [trainer.step(step, trainer.network(), SkipReward(model, "kl", 0.1)) for step in (3, 3, 4)]
    assert seen[0] == seen[1] and seen[0]["skipped"] != seen[2]["skipped"] and seen[0]["ce"] != seen[2]["ce"]


def test_a_policy_that_sees_the_state_beats_one_set_for_all_where_states_differ(tmp_path):
    """Rewarded for layer 0 after some tokens and for layer 3 after others."""
    model = random_model(torch.float32, pack=False)
    flags = argparse.Namespace(
        context=32,
        windows=2,
        samples=4,
        hidden=32,
        actions="layer",
        steps=80,
        seed=0,
        learning_rate=0.03,
        save_every=100,
    )
    text = torch.randint(130, (2000,), generator=torch.Generator().manual_seed(0))

    def reward(outcome, keep):
        first_rather_than_last = keep[:, 0].float() - keep[:, 6].float()
        return torch.where(outcome.wanted, first_rather_than_last, -first_rather_than_last)

    class Judged(Window):
        def judge(self, keep):
            outcome = super().judge(keep)
            outcome = argparse.Namespace(**outcome._asdict(), wanted=self.states[:, 0] > 0)
            return outcome

    with pytest.MonkeyPatch.context() as patch:
        for module in (training, report):
            patch.setattr(module, "Window", Judged)
        network = PolicyTrainer(model, text, flags).train("x", reward, TrainingState(tmp_path / "state.pt", {}))
        [row] = report.judge_policies(
            model, [text[i : i + 33].tolist() for i in (0, 500, 900)], {"x": network}, {"x": reward}, 0
        )
    assert row["learned"]["reward"] > 0.6 and row["over_one_set"]["reward"][0] > 0.4
    assert row["distinct_sets"] > 1


def test_the_number_of_drafts_follows_costs_and_agreement(monkeypatch):
    model = random_model(torch.float32, pack=False)
    network = SkipNetwork(64, N_LAYER, 8)
    text = torch.randint(130, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    choose = lambda kept, tenths, costs, given=None: (
        monkeypatch.setattr(SkipNetwork, "choose", lambda _, states: torch.full((len(states), 8), kept)),
        monkeypatch.setattr(
            Window,
            "judge",
            lambda self, keep: argparse.Namespace(
                agrees=(torch.arange(len(keep)) % 10 < tenths) & (torch.arange(len(keep)) >= 63)
            ),
        ),  # never in the prompt
        report.choose_drafts(model, [text], network, costs, given),
    )[-1]
    cheap, dear = RoundCosts(1.0, [1.0, 0.01, 0, 0, 0, 0], 0.0), RoundCosts(1.0, [1.0, 0.9, 0, 0, 0, 0], 0.0)
    assert choose(False, 10, cheap)["num_draft_tokens"] == 7
    assert choose(False, 10, cheap)["expected_speedup"] == pytest.approx(8 / 1.07)
    assert choose(False, 8, dear)["num_draft_tokens"] == 1 and choose(False, 8, dear, 3)["num_draft_tokens"] == 3
    idle = choose(True, 10, cheap)
    assert idle["expected_speedup"] == 1 and idle["own_text_agreement"] is None


# ---------------------------------------------------------------- the program


def exported(folder: Path) -> dict[str, tuple[dict, dict]]:
    found = {}
    for path in sorted(folder.glob("learned_*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_a_run_leaves_files_that_generate_reads_a_table_an_object_and_a_picture(learn, tmp_path, monkeypatch):
    out, _ = learn("--alpha", "0.1,3", "--json", tmp_path / "result.json")
    folder = tmp_path / "out"
    result = json.loads((folder / "policy.json").read_text())
    assert result == json.loads((tmp_path / "result.json").read_text()) and {"versions", "config"} <= set(result)
    files = exported(folder)
    assert list(files) == ["learned_0.1.safetensors", "learned_3.safetensors"]
    for row, (metadata, tensors) in zip(result["policies"], files.values(), strict=True):
        assert metadata == {
            "format": "skipfast learned policy",
            "n_layer": "3",
            "dim": "64",
            "alpha": row["alpha"],
            "num_draft_tokens": str(row["num_draft_tokens"]),
            "skipped_layers": f"{row['learned']['skipped']:.3f}",
        }
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        assert shapes == {"w1": [8, 64], "b1": [8], "w2": [6, 8], "b2": [6]}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        policy = make_policy(row["policy"], 3, 64)
        assert policy.num_draft_tokens == row["num_draft_tokens"] in range(1, 8)
        assert row["identical"] and row["tokens_per_round"] >= 1 and f"{row['alpha']} at random" in out
    assert [point["step"] for point in result["curves"]["3"]] == [2, 4, 6]
    if (folder / "policy.png").exists():
        assert (folder / "policy.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(PolicyTrainer, "step", lambda *_: pytest.fail("trained again"))
    row = result["policies"][0]
    for speed in (1.5, 0.9):  # going on with a finished run
        rows = [row | {"speedup": speed}, row | {"speedup": 0.8}]
        monkeypatch.setattr(
            report,
            "compare",
            lambda *_, rows=rows: [
                {
                    key: one[key]
                    for key in (
                        "drafted",
                        "acceptance_rate",
                        "tokens_per_round",
                        "tokens_per_s",
                        "speedup",
                        "identical",
                    )
                }
                for one in rows
            ],
        )
        out, _ = learn("--alpha", "0.1,3")
        command = json.loads((folder / "policy.json").read_text())["command"]
        if speed > 1:
            assert command in out.splitlines() and str(folder / "learned_0.1.safetensors") in command
            flags = generate.parse_flags(shlex.split(command)[2:])
            assert make_policy(generate.policy_text(flags, 3), 3, 64).name == "learned"
        else:
            assert command is None and "no policy is faster than plain decoding" in out


def test_one_action_a_layer_is_written_for_both_of_its_sublayers(learn, tmp_path):
    learn("--alpha", "0.1", "--actions", "layer")
    [(_, tensors)] = exported(tmp_path / "out").values()
    assert tensors["w2"].shape == (6, 8) and tensors["b2"].unique().numel() == 3
    for name in ("w2", "b2"):
        assert torch.equal(tensors[name][0::2], tensors[name][1::2])


@pytest.mark.parametrize("flags", [("--alpha", "0.1,2"), ("--reward", "speed")], ids=["skip", "speed"])
def test_a_killed_run_goes_on_bit_for_bit_and_by_the_costs_it_measured(learn, tmp_path, monkeypatch, flags):
    learn(*flags, "--output_dir", tmp_path / "whole")
    step, steps = PolicyTrainer.step, []

    def killed(self, number, *rest):
        steps.append(number)
        if len(steps) == (10 if "--alpha" in flags else 4):  # in the middle between two saved states
            raise KeyboardInterrupt
        return step(self, number, *rest)

    monkeypatch.setattr(PolicyTrainer, "step", killed)
    learn(*flags, code=130)
    assert steps[-1] == 3 and not list((tmp_path / "out").glob("learned_*"))
    monkeypatch.setattr(
        PolicyTrainer, "step", lambda self, number, *rest: steps.append(number) or step(self, number, *rest)
    )
    monkeypatch.setattr(train_policy, "measure", lambda *_: RoundCosts(1.0, [0.9, 9.0, 0.0, 0.0, 0.0, 0.0], 0.0))
    learn(*flags)
    assert steps[-4:] == [2, 3, 4, 5], "from the last saved state on"
    whole, resumed = exported(tmp_path / "whole"), exported(tmp_path / "out")
    assert list(whole) == list(resumed)
    for name, (metadata, tensors) in whole.items():
        assert metadata == resumed[name][0]
        assert all(torch.equal(tensor, resumed[name][1][key]) for key, tensor in tensors.items()), name
    curves = [json.loads((tmp_path / name / "policy.json").read_text())["curves"] for name in ("whole", "out")]
    assert curves[0] == curves[1]


def test_a_folder_of_another_run_is_refused_and_more_alphas_are_added(learn, tmp_path, monkeypatch):
    learn("--alpha", "0.1")
    before = exported(tmp_path / "out")["learned_0.1.safetensors"][1]
    learn("--alpha", "0.1,2", "--num_draft_tokens", 2)
    after = exported(tmp_path / "out")
    assert len(after) == 2 and after["learned_2.safetensors"][0]["num_draft_tokens"] == "2"
    assert all(torch.equal(before[name], tensor) for name, tensor in after["learned_0.1.safetensors"][1].items())
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, error = learn("--seed", 1, code=2)
    assert "is of a run with another seed (0, now 1): give another --output_dir" in error
    state = tmp_path / "out" / "state.pt"
    whole, found = state.read_bytes(), torch.load(state, weights_only=True)
    old = [{"plain": 1.0, "table": [1.0]}, asdict(COSTS) | {"fitted": [1.0, 2.0]}]
    for content, message in (
        (b"mine", "is not what"),
        (whole[: len(whole) // 2], "is not what"),
        ({"settings": 3}, "is not what"),
        *((found | {"costs": costs}, "has costs of rounds that this version does not understand") for costs in old),
    ):
        state.write_bytes(content) if isinstance(content, bytes) else torch.save(content, state)
        _, error = learn("--alpha", "0.1", code=2)
        assert f"state.pt {message}" in error.splitlines()[-1] and "give another --output_dir" in error


def test_a_policy_that_diverges_is_named_and_not_kept(learn, tmp_path):
    _, error = learn("--alpha", "0.1", "--learning_rate", "1e30", code=2)
    assert "the policy diverged in step" in error and not list((tmp_path / "out").glob("learned_*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--alpha", "much"), "alpha must be numbers with commas, such as 0.02,0.03,0.1,0.5, got 'much'"),
        (("--alpha", "0.1,-1"), "alpha must be 0 or more"),
        (("--alpha", "nan"), "alpha must be 0 or more"),
        (("--alpha", "0.1", "--reward", "speed"), "--alpha does not go with --reward speed"),
        (("--steps", 0), "steps must be 1 or more, got 0"),
        (("--samples", 1), "samples must be 2 or more, got 1"),
        (("--learning_rate", 0), "learning_rate must be above 0, got 0"),
        (("--num_draft_tokens", 8), "num_draft_tokens must be in 1..7, got 8"),
        (("--context", 999), "context must be at most 256, as this model's, got 999"),
        (("--max_new_tokens", 250), "max_new_tokens must be at most 192 for this model, got 250"),
        (("--data", "no_such"), "no_such does not exist"),
        (("--glob", "*.nothing"), "no file matches '*.nothing'"),
        (("--output_dir", "/proc/no"), "cannot make the folder /proc/no"),
        (("--output_dir", "a,b"), "output_dir must be without , + and ="),
        (("--output_dir", "a=b"), "output_dir must be without , + and ="),
        (("--seed", 2**62), "seed must be in 0..4294967295, got 4611686018427387904"),
        (("--json", "/no/such/file"), "cannot write /no/such/file"),
    ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(learn, monkeypatch, flags, message):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded"))
    _, error = learn(*flags, code=2)
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
