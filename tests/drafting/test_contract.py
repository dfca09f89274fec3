"""The contract between policies and decoding: a policy of one's own, and combinations that pass on every part of it."""

import dataclasses
import inspect
import textwrap
from dataclasses import dataclass, field

import pytest
import torch

import drafting.policy
from decoding import calibrate
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import POLICIES, Combined, make_policy
from drafting.plan import DraftPlan, Round, RoundContext
from drafting.policy import DraftPolicy
from errors import UserError
from tests.helpers.models import N_LAYER, PROMPT, SAMPLING, random_model, tokens_of


def policy_in_the_docstring() -> type[DraftPolicy]:
    """Run the indented part of the contract's docstring, as a reader would who copies it into a file."""
    lines = inspect.getdoc(drafting.policy).splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    names = {"__name__": "own_policy"}
    exec(code, names)
    (kind,) = (value for value in names.values() if getattr(value, "__module__", "") == "own_policy")
    return kind


@pytest.mark.parametrize("pack", [True, False], ids=["kernels", "padded"])
def test_the_policy_in_the_docstring_is_complete_and_lossless(pack, monkeypatch):
    kind = policy_in_the_docstring()
    monkeypatch.setitem(POLICIES, kind.name, kind)
    runner = Runner(random_model(torch.float32, pack, sharpness=4.0), 80, max_rows=6, compile=pack)
    for sampling in SAMPLING.values():
        expected = tokens_of(runner, PROMPT, "none", sampling, new=48).tokens
        found = tokens_of(runner, PROMPT, f"{kind.name}:0.5,num_draft_tokens=5", sampling, new=48)
        assert found.tokens == expected
        assert {depth for step in found.rounds for depth in step.exit_layers} == {1, 2}, "it decides"
        assert sum(step.accepted for step in found.rounds) > 0


# ---- combinations ----


@dataclass
class Loud(DraftPolicy):
    """Sets every attribute of the contract to something unusual and notes every call."""

    depth: int = 2
    adapters: object = None
    calls: list = field(default_factory=list)

    name = "loud"
    num_draft_tokens = 5
    skips_sublayers = verifiable_only = reads_hidden = True
    file_hashes = ("a hash",)

    @property
    def watched_depths(self):
        return (self.depth,)

    def __getattribute__(self, name):
        if name in METHODS:
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def start_round(self, context):
        return DraftPlan((self.depth,), 5, ask_to_stop=True)

    def plans_to_time(self):
        return [DraftPlan((self.depth,), 3)]

    def calibrate(self, seconds, agreement):
        self.told = seconds, agreement

    def see_prompt(self, agreement):
        self.seen = agreement

    def explain(self):
        return [f"depth {self.depth}"]

    def __str__(self):
        return f"loud:{self.depth}"


CONTRACT = {name: value for name, value in vars(DraftPolicy).items() if not name.startswith("_")}
METHODS = {name for name, value in CONTRACT.items() if callable(value)}
EXIT = object()
ARGUMENTS = {
    "fit": (4,),
    "check_model": (4, 64),
    "draft_depth": (4,),
    "start_prompt": ([1],),
    "start_round": (RoundContext([1], 9),),
    "should_exit": (2, EXIT),
    "should_stop": (EXIT,),
    "end_round": (Round((1,)),),
    "plans_to_time": (),
    "calibrate": ({DraftPlan((depth,), 3): 0.5 for depth in (2, 3)}, {depth: [True] for depth in (2, 3, 4)}),
    "see_prompt": ({depth: [True] for depth in (2, 3, 4)},),
    "explain": (),
}


def test_a_combination_passes_on_every_method_of_the_contract():
    assert list(ARGUMENTS) == [name for name in CONTRACT if name in METHODS], "a new method: does Combined pass it on?"
    first, last = Loud(2), Loud(3)
    both = Combined([first, last])
    for name, arguments in ARGUMENTS.items():
        first.calls.clear(), last.calls.clear()
        getattr(both, name)(*arguments)
        assert name in last.calls, name
        assert name in first.calls or name == "should_exit", f"{name}: only the last policy with exits decides that"


def test_a_combination_has_every_attribute_of_its_parts():
    quiet, loud = DraftPolicy(), Loud(2, adapters="adapters")
    for parts in ([quiet, loud], [loud, quiet]):
        both = Combined(parts)
        both.fit(4)
        for name in CONTRACT.keys() - METHODS - {"name", "example"}:
            assert getattr(both, name) != getattr(DraftPolicy, name), name
            assert list(as_list(getattr(both, name))) == list(as_list(getattr(loud, name))), name
    assert Combined([Loud(2), Loud(3)]).name == "loud+loud"


def as_list(value):
    return value if isinstance(value, list | tuple) else [value]


def test_each_part_of_a_combination_is_told_its_own_measurements():
    first, last = Loud(2), Loud(3)
    both = Combined([first, make_policy("prompt_lookup", 4), last])
    both.fit(4)
    assert both.plans_to_time() == [DraftPlan((2,), 3), DraftPlan((3,), 3)] and both.watched_depths == [2, 3]
    both.calibrate({DraftPlan((2,), 3): 0.2, DraftPlan((3,), 3): 0.3}, {2: [True], 3: [False], 4: [True]})
    assert first.told == ({DraftPlan((2,), 3): 0.2}, {2: [True]})
    assert last.told == ({DraftPlan((3,), 3): 0.3}, {3: [False]})
    both.see_prompt({2: [True], 3: [False], 4: [True]})
    assert first.seen == {2: [True]} and last.seen == {3: [False]}
    assert both.explain() == ["depth 2", "depth 3"]


def test_parts_that_measure_exits_with_different_adapters_are_refused():
    with pytest.raises(UserError, match="loud:2 and loud:3 measure exits with different adapters"):
        Combined([Loud(2, adapters="one"), Loud(3, adapters="other")]).fit(4)
    with pytest.raises(UserError, match="different adapters"):
        Combined([Loud(2, adapters="one"), Loud(3)]).fit(4)


@dataclass
class Measuring(POLICIES["static"]):
    """Wants to be timed and to see how its exit does at the end of the prompt."""

    name = "measuring"
    exit_layer: int = 2

    def fit(self, n_layer):
        super().fit(n_layer)
        self.watched_depths = (self.exit_layer,)

    def plans_to_time(self):
        return [dataclasses.replace(self.only_plan, num_draft_tokens=1)]

    def calibrate(self, seconds, agreement):
        (self.round_s,) = seconds.values()
        self.agreement = agreement[self.exit_layer]

    def see_prompt(self, agreement):
        self.at_the_end = agreement[self.exit_layer]


def test_a_policy_that_measures_is_calibrated_and_shown_the_prompt_also_in_a_combination(monkeypatch):
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setitem(POLICIES, "measuring", Measuring)
    runner = Runner(random_model(torch.float32, pack=False, sharpness=4.0), 60, max_rows=8)
    measured = []
    for text in ("measuring", "prompt_lookup+measuring"):
        policy = make_policy(text, N_LAYER)
        calibrate.calibrate(runner, policy, list(range(3, 40)), SamplingConfig())
        tokens_of(runner, PROMPT, policy, SamplingConfig(), new=8)
        told = policy.parts[1] if isinstance(policy, Combined) else policy
        assert told.round_s > 0 and len(told.agreement) == 37 and len(told.at_the_end) == len(PROMPT)
        measured.append((told.agreement, told.at_the_end))
    assert measured[0] == measured[1]
