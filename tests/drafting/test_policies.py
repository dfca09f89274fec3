"""Policies: what a policy string may say, what is refused in which words, and what a plan promises."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drafting.catalogue import ALIASES, POLICIES, make_policy
from drafting.exits import Static
from drafting.plan import DraftPlan, Measure, Round, RoundContext, Rule
from drafting.policy import Autoregressive, DraftPolicy
from tests.helpers.policies import EXAMPLES, SETTINGS, example

CONTEXT = RoundContext([1, 2, 3], remaining=10)
STATE = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "exit_layer", "num_draft_tokens"),
    [
        ("static:3", 3, 3),
        ("static:exit_layer=3", 3, 3),
        ("static:3,num_draft_tokens=5", 3, 5),
        ("static:exit_layer=3,num_draft_tokens=5", 3, 5),
        ("static:num_draft_tokens=5,exit_layer=3", 3, 5),
        ("static:1,num_draft_tokens=0", 1, 0),
        ("static:8", 8, 3),
    ],
)
def test_a_policy_string_sets_the_keys_it_names(text, exit_layer, num_draft_tokens):
    policy = make_policy(text, n_layer=8)
    assert policy == Static(exit_layer, num_draft_tokens=num_draft_tokens)
    assert policy.start_round(CONTEXT) == DraftPlan((exit_layer,), num_draft_tokens)


def test_defaults_fill_what_the_string_leaves_out_and_nothing_else():
    assert make_policy("static:2", 8, num_draft_tokens=7).num_draft_tokens == 7
    assert make_policy("static:2,num_draft_tokens=1", 8, num_draft_tokens=7).num_draft_tokens == 1
    assert make_policy("static:2", 8, num_draft_tokens=None).num_draft_tokens == 3
    assert make_policy("static:2", 8, num_draft_tokens=0).num_draft_tokens == 0
    assert make_policy("static", 8, exit_layer=5).exit_layer == 5
    assert make_policy("static:2", 8, no_such_key=1) == Static(2)
    assert make_policy("none", 8, num_draft_tokens=7) == Autoregressive()
    both = make_policy("prompt_lookup:2+confidence", 8, num_draft_tokens=5, threshold=0.25)
    assert [part.num_draft_tokens for part in both.parts] == [2, 5] and both.parts[1].threshold == 0.25


@pytest.mark.parametrize(
    "text",
    [
        *EXAMPLES.values(),
        "confidence",
        "auto:9",
        "static:2,stop=adaptive",
        "static:2,adapter=ADAPTER",
        "learned:LEARNED,every=2",
        "prompt_lookup+static:2",
        "skip_set:FILE+entropy:0.25,decay=4,stop=0.5",
    ],
)
def test_a_policy_is_written_as_the_string_that_makes_it(text, skip_file):
    policy = example(text, skip_file, 8)
    again = make_policy(str(policy), 8)
    assert str(again) == str(policy) and type(again) is type(policy)
    parts, same = ([each] if dataclasses.is_dataclass(each) else list(each.parts) for each in (policy, again))
    assert parts == same


@pytest.mark.parametrize(
    ("alias", "meant"),
    [
        ("logits_current", "confidence:threshold=0.9"),
        ("logits_current:0.6", "confidence:threshold=0.6"),
        ("logits_current:threshold=0.6", "confidence:threshold=0.6"),
        ("logits_current:candidates=1-2,stop=svip", "confidence:threshold=0.9,stop=svip,candidates=1-2"),
        ("prompt_lookup+logits_current:decay=4", "prompt_lookup+confidence:threshold=0.9,decay=4.0"),
    ],
)
def test_an_alias_is_the_policy_it_stands_for_and_takes_its_keys(alias, meant):
    assert str(make_policy(alias, 8)) == str(make_policy(meant, 8)) == meant


def test_settings_that_are_the_default_are_not_written():
    assert str(make_policy("none", 8)) == "none" and str(make_policy("confidence:0.7", 8)) == "confidence"
    wanted = "confidence:threshold=0.5,num_draft_tokens=4,stop=svip,candidates=2-6"
    assert str(make_policy("confidence:0.5,candidates=6-2-6,stop=svip,num_draft_tokens=4", 8)) == wanted


def test_the_policy_none_drafts_nothing():
    assert make_policy("none", 8).start_round(CONTEXT) == DraftPlan()
    assert make_policy("none:steps=4", 8).start_round(CONTEXT) == DraftPlan((8,), 3), "nothing is left to verify"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fast:3", ["policy must be one of", *POLICIES, *ALIASES, "'fast'"]),
        ("", ["policy must be one of", "static", "''"]),
        ("Static:3", ["policy must be one of", "'Static'"]),
        ("static:exit=3", ["policy static has the keys", "exit_layer", "num_draft_tokens", "'exit=3'"]),
        ("static:3,5", ["policy static has the keys", "'5'"]),
        ("static:num_draft_tokens=5,3", ["policy static has the keys", "'3'"]),
        ("static:plan=3", ["policy static has the keys", "'plan=3'"]),
        ("static:3,exit_layer=4", ["exit_layer is given twice"]),
        ("none:0", ["steps must be 1 or more", "got 0"]),
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
        ("static:3,stop=often", ["stop must be never, adaptive, svip or a number in 0..1", "'often'"]),
        ("static:3,stop=1.5", ["stop must be in 0..1", "1.5"]),
        ("confidence:1.01", ["policy confidence", "threshold must be in 0..1", "1.01"]),
        ("confidence:nan", ["threshold must be in 0..1", "nan"]),
        ("margin:-0.1", ["threshold must be in 0..1", "-0.1"]),
        ("entropy:-1", ["threshold must be in 0..inf", "-1"]),
        ("saturation:-1.5", ["threshold must be in -1..1", "-1.5"]),
        ("confidence:decay=-1", ["decay must be in 0..inf", "-1"]),
        ("confidence:candidates=3-9", ["candidates must be in 1..8", "got 9"]),
        ("logits_future:candidates=0-3", ["candidates must be in 1..8", "got 0"]),
        ("consistent_tokens:candidates=12", ["candidates must be in 1..8", "got 12"]),
        ("auto:candidates=3-40", ["candidates must be in 1..8", "got 40"]),
        ("confidence:candidates=3-x", ["policy confidence: candidates must be", "'3-x'"]),
        ("consistent_tokens:1", ["checks must be 2 or more", "got 1"]),
        ("logits_future:2", ["smoothing must be in 0..1", "got 2"]),
        ("layer_skip_proportion:1.5", ["proportion must be in 0..1", "1.5"]),
        ("prompt_lookup:min_ngram=0", ["min_ngram must be in 1..max_ngram (3)", "got 0"]),
        ("prompt_lookup:min_ngram=5", ["min_ngram must be in 1..max_ngram (3)", "got 5"]),
        ("auto:0", ["num_draft_tokens must be 1 or more", "got 0"]),
        ("prompt_lookup+fast:3", ["policy must be one of", *POLICIES, "'fast'"]),
        ("prompt_lookup+", ["policy must be one of", "''"]),
        ("prompt_lookup+static:9", ["exit_layer must be in 1..8", "got 9"]),
        ("skip_set", ["policy skip_set needs file"]),
    ],
)
def test_a_bad_policy_string_is_refused_in_one_line_with_the_way_out(text, parts):
    message = error_of(text)
    assert [part for part in parts if part not in message] == [], message


def error_of(text: str, n_layer: int = 8, dim: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        make_policy(text, n_layer, dim)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot read", "No such file"]),
        (b"{", ['"skip_attention": [layers], "skip_mlp": [layers]']),
        (b"\xff\xfe", ['"skip_attention": [layers]']),
        ([1, 2], ['"skip_attention": [layers]']),
        ({"skip_attention": [1]}, ['"skip_mlp": [layers]']),
        ({"skip_attention": [1], "skip_mlp": 3}, ['"skip_mlp": [layers]']),
        ({"skip_attention": [1], "skip_mlp": [[3]]}, ['"skip_mlp": [layers]']),
        ({"skip_attention": [8], "skip_mlp": []}, ["skip_attention must be in 0..7", "got 8"]),
        ({"skip_attention": [], "skip_mlp": [2, -1]}, ["skip_mlp must be in 0..7", "got -1"]),
        ({"skip_attention": [], "skip_mlp": ["2"]}, ["skip_mlp must be in 0..7", "got '2'"]),
        ({"skip_attention": [True], "skip_mlp": []}, ["skip_attention must be in 0..7", "got True"]),
        ({"skip_attention": [], "skip_mlp": [1], "n_layer": 9}, ["for a model of 9 layers, this one has 8"]),
        ({"skip_attention": [], "skip_mlp": [1], "num_draft_tokens": "4"}, ["num_draft_tokens", "'4'"]),
    ],
)
def test_a_bad_skip_set_file_is_named_with_what_it_must_hold(tmp_path, content, parts):
    file = tmp_path / "skips.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    message = error_of(f"skip_set:{file}")
    assert [part for part in [str(file), *parts] if part not in message] == [], message


def test_a_skip_set_file_may_say_how_many_tokens_to_draft(tmp_path):
    file = tmp_path / "skips.json"
    file.write_text(json.dumps({"skip_attention": [1], "skip_mlp": [], "num_draft_tokens": 6, "n_layer": 8}))
    assert make_policy(f"skip_set:{file}", 8).num_draft_tokens == 6
    assert make_policy(f"skip_set:{file}", 8, num_draft_tokens=2).num_draft_tokens == 2
    assert make_policy(f"skip_set:{file}+static:3,num_draft_tokens=1", 8).num_draft_tokens == 6


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learned:{0}/none.safetensors", ["cannot read", "No such file"]),
        ("learned:{0}", ["is a folder"]),
        ("learned:{0}/text.safetensors", ["cannot read"]),
        ("learned:{0}/adapter8.safetensors", ["not of the format 'skipfast learned policy'"]),
        ("learned:{0}/learned4.safetensors", ["for a model of 4 layers of width 64, this one has 8 of width 64"]),
        ("learned:{0}/torn.safetensors", ["is broken", "b2"]),
        ("learned:{0}/learned8.safetensors,every=0", ["every must be 1 or more"]),
        ("static:2,adapter={0}/learned8.safetensors", ["not of the format 'skipfast exit adapter'"]),
        ("static:2,adapter={0}/adapter4.safetensors", ["for a model of 4 layers"]),
        ("static:8,adapter={0}/adapter8.safetensors", ["has adapters for exit 1, 2, 3, 4, 5, 6, 7, none for 8"]),
        ("skip_set:{0}/skips.json,adapter={0}/adapter8.safetensors", ["none for 8"]),
        ("confidence:candidates=3-4,adapter={0}/odd.safetensors", ["is broken: exit 3 needs down [r, 64]", "[64, 6]"]),
        ("static:2,adapter={0}/none.safetensors", ["cannot read", "No such file"]),
        ("static:2,adapter={0}", ["is a folder"]),
        ("static:2,adapter={0}/bare.safetensors", ["is broken", "n_layer"]),
        ("learned:{0}/flat.safetensors", ["is broken"]),
    ],
)
def test_a_learned_file_or_adapter_of_another_model_or_kind_is_named(text, parts, skip_file):
    folder = Path(skip_file).parent
    (folder / "text.safetensors").write_text("no tensors")
    shape = {"n_layer": "8", "dim": "64"}
    save_file(
        {"w1": torch.zeros(3, 64), "b1": torch.zeros(3), "w2": torch.zeros(16, 3)},
        folder / "torn.safetensors",
        {"format": "skipfast learned policy", **shape},
    )
    save_file(
        {"exit.3.down": torch.zeros(4, 64), "exit.3.up": torch.zeros(64, 6)},
        folder / "odd.safetensors",
        {"format": "skipfast exit adapter", **shape},
    )
    save_file({"exit.2.down": torch.zeros(2, 64)}, folder / "bare.safetensors", {"format": "skipfast exit adapter"})
    save_file(
        {name: torch.tensor(1.0) for name in ("w1", "b1", "w2", "b2")},
        folder / "flat.safetensors",
        {"format": "skipfast learned policy", **shape},
    )
    message = error_of(text.format(folder), dim=64)
    assert [part for part in parts if part not in message] == [] and "\n" not in message, message
    if "learned4" in text:
        assert "of width 64, this one has 8 of width 32" in error_of(text.replace("4.s", "8.s").format(folder), dim=32)


def test_a_learned_policy_leaves_out_what_its_network_says_of_the_state_and_keeps_that_for_some_rounds(tmp_path):
    file, n_layer = tmp_path / "policy.safetensors", 2
    network = {
        "w1": torch.eye(2, 4),
        "b1": torch.tensor([0.0, -0.5]),
        "w2": torch.tensor([[0.0, 0], [-1, 0], [0, -1], [-1, 1]]),
        "b2": torch.tensor([1.0, 0.5, 0.5, 0.5]),
    }
    save_file(network, file, {"format": "skipfast learned policy", "n_layer": "2", "dim": "4"})
    seen = lambda *state: RoundContext([1], 9, hidden=torch.tensor([state]))
    plan = lambda attention, mlp: DraftPlan((), 3, frozenset(attention), frozenset(mlp))
    policy = make_policy(f"learned:{file},every=1", n_layer)
    policy.start_prompt([1])
    first = seen(9.0, 0.0, 0.0, 0.0)  # over its rms: 2, 0, 0, 0; layer one: 2, 0
    second = seen(0.0, 9.0, 0.0, 0.0)  # layer one: 0, 1.5
    neither = seen(0.0, 0.0, 9.0, 0.0)
    assert policy.start_round(first) == plan((), (0, 1))
    assert policy.start_round(second) == plan((1,), ())
    assert policy.start_round(neither) == DraftPlan(), "nothing to leave out: nothing to draft"
    slow = make_policy(f"learned:{file},every=2", n_layer)
    for _ in range(2):
        slow.start_prompt([1])
        assert [slow.start_round(each) for each in (first, second, second)] == [
            plan((), (0, 1)),
            plan((), (0, 1)),
            plan((1,), ()),
        ]


def test_a_policy_with_a_required_key_shows_it_in_an_example_of_its_own():
    assert set(SETTINGS) <= set(POLICIES), "no settings of policies that are gone"
    for name, kind in POLICIES.items():
        required = [key.name for key in dataclasses.fields(kind) if key.default is dataclasses.MISSING]
        for key in required:
            assert kind.example.startswith(f"{name}:") and f"{key}=" in kind.example
            assert f"needs {key}, for example {kind.example}" in error_of(name)


def test_the_default_of_every_key_is_of_the_type_that_the_key_says():
    for name, kind in POLICIES.items():
        for key in dataclasses.fields(kind):
            assert key.default is dataclasses.MISSING or isinstance(key.default, key.type), f"{name}: {key.name}"


def test_a_key_that_may_be_left_to_a_file_is_still_read_as_a_number(skip_file):
    assert make_policy(f"skip_set:{skip_file},num_draft_tokens=6", 8).num_draft_tokens == 6
    assert "num_draft_tokens must be of type int, got 'x'" in error_of(f"skip_set:{skip_file},num_draft_tokens=x")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_contract(name, skip_file):
    kind = POLICIES[name]
    assert issubclass(kind, DraftPolicy) and dataclasses.is_dataclass(kind) and kind.__doc__
    for key in dataclasses.fields(kind):
        assert key.default_factory is dataclasses.MISSING, f"{name}: {key.name} must have a plain default or none"
    policy = example(EXAMPLES[name], skip_file, 8)
    policy.start_prompt([1, 2, 1, 2])
    plan = policy.start_round(RoundContext([1, 2, 1, 2], remaining=10, hidden=STATE))
    hash(plan)
    assert max(plan.num_draft_tokens, len(plan.proposed)) <= policy.num_draft_tokens, "the runner makes room for these"
    assert list(plan.exits) == sorted(set(plan.exits)) and all(1 <= depth <= 8 for depth in plan.exits)
    assert policy.skips_sublayers == (plan.exact_depth(8) < 8)
    policy.end_round(Round((4, 5), drafted=(4, 6, 7), accepted=1, exit_layers=(2, 2, 2), resume_layer=2))
    assert name in error_of(f"{name}:no_such_key=1")
    assert all(isinstance(line, str) for line in policy.explain())


# ---- what single policies do ----


def test_thresholds_ease_with_the_text_as_calm_has_it():
    policy = make_policy("confidence:0.8,decay=4", 8)
    policy.start_prompt([1, 2, 3])
    thresholds = [policy.start_round(RoundContext(range(3 + t), 10 - t)).exit_if.threshold for t in (0, 5, 9)]
    assert thresholds == pytest.approx([0.8 * (0.9 + 0.1 * math.exp(-4 * share)) for share in (0, 0.5, 0.9)])
    easier = make_policy("entropy:0.8,decay=4", 8)
    easier.start_prompt([1, 2, 3])
    assert easier.start_round(RoundContext(range(12), 1)).exit_if.threshold > 0.8


def test_a_random_exit_lies_between_a_quarter_and_three_quarters_and_anywhere_there():
    policy = make_policy("random:num_draft_tokens=9", 12)
    policy.start_prompt([1])
    found = {depth for _ in range(30) for depth in policy.start_round(CONTEXT).exits}
    assert found == set(range(3, 10))


def test_layers_are_skipped_as_often_as_asked_for_and_never_the_first():
    for proportion in (0.0, 0.25, 1.0):
        policy = make_policy(f"layer_skip_proportion:{proportion}", 41)
        policy.start_prompt([1])
        plans = [policy.start_round(CONTEXT) for _ in range(100)]
        assert all(plan.skip_attention == plan.skip_mlp and 0 not in plan.skip_mlp for plan in plans)
        assert abs(sum(len(plan.skip_mlp) for plan in plans) / 4000 - proportion) < 0.03
        assert len(set(plans)) == 1 if proportion in (0, 1) else len(set(plans)) > 50


def test_a_lookup_proposes_what_followed_the_longest_match_where_it_stood_last():
    policy = make_policy("prompt_lookup:3,max_ngram=3,min_ngram=2", 8)
    for tokens, proposed in (
        ([5, 6, 7, 8, 9, 5, 6, 7], (8, 9, 5)),
        ([1, 5, 6, 2, 9, 5, 6, 3, 4, 5, 6], (3, 4, 5)),  # twice before: the later one
        ([4, 5, 6, 2, 9, 5, 6, 3, 4, 5, 6], (2, 9, 5)),  # but three tokens match better than two
        ([1, 1, 1, 1], (1, 1, 1)),  # goes round
        ([8, 4, 5, 4, 5], (4, 5, 4)),
        ([5, 6, 7, 6], ()),
        ([7], ()),
    ):
        policy.start_prompt(tokens[:1])
        for end in range(1, len(tokens) + 1):  # token by token, as decoding does
            plan = policy.start_round(RoundContext(tokens[:end], 9))
        assert plan == DraftPlan(proposed=proposed), tokens


def test_an_adaptive_stop_follows_acceptance_as_draft_and_verify_has_it():
    policy = make_policy("static:2,num_draft_tokens=4,stop=adaptive", 8)
    policy.start_prompt([1])
    threshold, wanted, acceptance = lambda: policy.start_round(CONTEXT).stop_unless.threshold, 0.8, 0.9
    assert threshold() == wanted
    for drafted, accepted in ((4, 0), (2, 2), (2, 2), (1, 1), (1, 1), (4, 4)):
        policy.end_round(Round((1,), drafted=(1,) * drafted, accepted=accepted))
        acceptance = 0.5 * acceptance + 0.5 * accepted / drafted
        wanted += 0.1 * (0.01 if acceptance < 0.9 else -0.01 if drafted < 4 else 0.0)
        assert threshold() == pytest.approx(wanted)
    policy.start_prompt([1])
    assert policy.start_round(RoundContext([1], 9, sampled=True)).stop_unless.threshold == 0.5


def test_in_a_combination_proposals_come_first_and_only_their_policy_hears_of_them():
    both = make_policy("prompt_lookup+static:2,stop=adaptive", 8)
    told = both.parts[1]
    both.start_prompt([5, 6, 7, 5, 6])
    plan = both.start_round(RoundContext([5, 6, 7, 5, 6], 9))
    assert plan.proposed == (7, 5, 6, 7, 5, 6, 7) and not plan.exits
    both.end_round(Round((7, 5, 1), drafted=plan.proposed, accepted=2))
    assert told.stop_rule.acceptance == 0.9, "a proposal says nothing about exits"
    plan = both.start_round(RoundContext([5, 6, 7, 5, 6, 7, 5, 1], 6))
    assert plan == DraftPlan((2,), 3, stop_unless=Rule(Measure.TOP1, 0.8))
    both.end_round(Round((1,), drafted=(2, 3), exit_layers=(2, 2), resume_layer=2))
    assert told.stop_rule.acceptance == 0.45


def test_a_combination_leaves_by_its_last_exits_skips_all_sets_and_stops_by_its_last_rule(skip_file):
    parts = f"skip_set:{skip_file},num_draft_tokens=6,stop=0.25+static:5+confidence:0.6,candidates=2-4+none"
    policy = make_policy(parts, 8)
    policy.start_prompt([1])
    assert policy.start_round(CONTEXT) == DraftPlan(
        (2, 4),
        3,
        frozenset({2}),
        frozenset({1, 3}),
        exit_if=Rule(Measure.TOP1, 0.6),
        stop_unless=Rule(Measure.TOP1, 0.25),
    )
    assert policy.num_draft_tokens == 6 and policy.skips_sublayers and not policy.verifiable_only
    assert make_policy("static:2+prompt_lookup", 8).verifiable_only


# ---- plans ----


def test_equal_plans_are_one_key_and_different_plans_are_several():
    make = lambda **keys: DraftPlan(**{"exits": (2, 4), "num_draft_tokens": 3, "skip_attention": frozenset({1})} | keys)
    assert make() == make() and hash(make()) == hash(make())
    different = [
        make(),
        make(exits=(2,)),
        make(num_draft_tokens=2),
        make(skip_attention=frozenset({2})),
        make(skip_mlp=frozenset({1})),
        make(proposed=(1,)),
        make(exit_if=Rule(Measure.TOP1, 0.5)),
        make(exit_if=Rule(Measure.MARGIN, 0.5)),
        make(stop_unless=Rule(Measure.TOP1, 0.5)),
        make(ask_to_stop=True),
    ]
    assert len(set(different)) == len(different)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().exits = ()


@pytest.mark.parametrize(
    ("attention", "mlp", "depth"),
    [((), (), 8), ((3, 5), (), 3), ((), (2,), 2), ((3, 5), (4,), 3), ((6,), (1, 6), 1), ((0,), (), 0)],
)
def test_a_draft_is_the_full_models_up_to_the_lowest_layer_with_any_sublayer_left_out(attention, mlp, depth):
    assert DraftPlan(skip_attention=frozenset(attention), skip_mlp=frozenset(mlp)).exact_depth(8) == depth
