"""Policies: what a policy string may say, what is refused in which words, and what a plan promises."""

import dataclasses

import pytest

from policies import (
    POLICIES,
    Autoregressive,
    DraftPlan,
    DraftPolicy,
    Round,
    RoundContext,
    Static,
    make_policy,
)

CONTEXT = RoundContext([1, 2, 3], remaining=10)


@pytest.mark.parametrize(("text", "exit_layer", "num_draft_tokens"), [
    ("static:3", 3, 3),
    ("static:exit_layer=3", 3, 3),
    ("static:3,num_draft_tokens=5", 3, 5),
    ("static:exit_layer=3,num_draft_tokens=5", 3, 5),
    ("static:num_draft_tokens=5,exit_layer=3", 3, 5),
    ("static:1,num_draft_tokens=0", 1, 0),
    ("static:8", 8, 3),
])  # fmt: skip
def test_a_policy_string_sets_the_keys_it_names(text, exit_layer, num_draft_tokens):
    policy = make_policy(text, n_layer=8)
    assert policy == Static(exit_layer, num_draft_tokens)
    plan = policy.start_round(CONTEXT)
    assert (plan.exits, plan.num_draft_tokens) == ((exit_layer,), num_draft_tokens)
    assert plan.first_skip is None and not plan.proposed


def test_defaults_fill_what_the_string_leaves_out_and_nothing_else():
    assert make_policy("static:2", 8, num_draft_tokens=7).num_draft_tokens == 7
    assert make_policy("static:2,num_draft_tokens=1", 8, num_draft_tokens=7).num_draft_tokens == 1
    assert make_policy("static:2", 8, num_draft_tokens=None).num_draft_tokens == 3
    assert make_policy("static:2", 8, num_draft_tokens=0).num_draft_tokens == 0
    assert make_policy("static", 8, exit_layer=5).exit_layer == 5
    assert make_policy("static:2", 8, no_such_key=1) == Static(2)
    assert make_policy("none", 8, num_draft_tokens=7) == Autoregressive()


def test_the_policy_none_drafts_nothing():
    assert make_policy("none", 8).start_round(CONTEXT) == DraftPlan()


@pytest.mark.parametrize(("text", "parts"), [
    ("fast:3", ["policy must be one of", *POLICIES, "'fast'"]),
    ("", ["policy must be one of", "static", "''"]),
    ("Static:3", ["policy must be one of", "'Static'"]),
    ("static:exit=3", ["policy static has the keys", "exit_layer", "num_draft_tokens", "'exit=3'"]),
    ("static:3,5", ["policy static has the keys", "'5'"]),
    ("static:num_draft_tokens=5,3", ["policy static has the keys", "'3'"]),
    ("static:plan=3", ["policy static has the keys", "'plan=3'"]),
    ("none:3", ["policy none has the keys (none)", "'3'"]),
    ("static:three", ["exit_layer must be of type int", "'three'"]),
    ("static:2.5", ["exit_layer must be of type int", "'2.5'"]),
    ("static:exit_layer=", ["exit_layer must be of type int", "''"]),
    ("static:3,num_draft_tokens=many", ["num_draft_tokens must be of type int", "'many'"]),
    ("static", ["policy static needs exit_layer", "for example static:exit_layer=2"]),
    ("static:", ["policy static needs exit_layer"]),
    ("static:num_draft_tokens=2", ["policy static needs exit_layer"]),
    ("static:3,num_draft_tokens=-1", ["num_draft_tokens must be 0 or more", "-1"]),
    ("static:0", ["exit_layer must be in 1..8", "got 0"]),
    ("static:-1", ["exit_layer must be in 1..8", "got -1"]),
    ("static:9", ["exit_layer must be in 1..8", "got 9"]),
])  # fmt: skip
def test_a_bad_policy_string_is_refused_in_one_line_with_the_way_out(text, parts):
    with pytest.raises(ValueError) as caught:
        make_policy(text, n_layer=8)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name):
    kind = POLICIES[name]
    assert issubclass(kind, DraftPolicy) and dataclasses.is_dataclass(kind) and kind.__doc__
    for key in dataclasses.fields(kind):
        assert callable(key.type), f"{name}: the type of {key.name} must turn text into a value"
        assert key.default_factory is dataclasses.MISSING, f"{name}: {key.name} must have a plain default or none"
    required = [key.name for key in dataclasses.fields(kind) if key.default is dataclasses.MISSING]
    policy = make_policy(name + ":" + ",".join(f"{key}=2" for key in required), n_layer=8)
    policy.start_prompt([1, 2, 3])
    plan = policy.start_round(CONTEXT)
    hash(plan)
    assert max(plan.num_draft_tokens, len(plan.proposed)) <= policy.num_draft_tokens, "the runner makes room for these"
    assert list(plan.exits) == sorted(set(plan.exits)) and all(1 <= depth <= 8 for depth in plan.exits)
    assert plan.exits or plan.proposed or not plan.num_draft_tokens
    policy.end_round(Round((4, 5), drafted=(4, 6, 7), accepted=1, exit_layers=(2, 2, 2), resume_layer=2))
    assert name in make_policy_error(f"{name}:no_such_key=1")


def make_policy_error(text):
    with pytest.raises(ValueError) as caught:
        make_policy(text, n_layer=8)
    return str(caught.value)


def test_equal_plans_are_one_key_and_different_plans_are_several():
    make = lambda **keys: DraftPlan(**{"exits": (2, 4), "num_draft_tokens": 3, "skip_attention": frozenset({1})} | keys)
    assert make() == make() and hash(make()) == hash(make())
    different = [make(), make(exits=(2,)), make(num_draft_tokens=2), make(skip_attention=frozenset({2})),
                 make(skip_mlp=frozenset({1})), make(proposed=(1,))]  # fmt: skip
    assert len(set(different)) == len(different)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().exits = ()


@pytest.mark.parametrize(("attention", "mlp", "first"), [
    ((), (), None), ((3, 5), (), 3), ((), (2,), 2), ((3, 5), (4,), 3), ((6,), (1, 6), 1), ((0,), (), 0),
])  # fmt: skip
def test_first_skip_is_the_lowest_layer_with_any_sublayer_left_out(attention, mlp, first):
    assert DraftPlan(skip_attention=frozenset(attention), skip_mlp=frozenset(mlp)).first_skip == first
