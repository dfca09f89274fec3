"""Rounds: one call or many, the same record; rows that wait and are taken along are the full model's, bit for bit."""

import dataclasses
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from decoding.generation import GenerateConfig
from decoding.packed import TENSORS, PackedLayers
from decoding.rounds import RoundPlayer
from decoding.runner import Runner
from drafting.adapters import Adapters
from drafting.plan import STATISTICS, DraftPlan, Measure, Round, Rule
from drafting.policy import DraftPolicy
from generate import decode, until_text_ends
from kernels import cpu
from kernels.exit_head import ExitStats
from tests.helpers.gpu import AsOnGPU, CallByCall
from tests.helpers.models import (
    N_LAYER,
    PRECISION,
    PROMPT,
    SAMPLING,
    VOCAB_SIZE,
    low_bit_copies,
    random_model,
    tokens_of,
)
from tests.helpers.policies import PLAYED_IN_ONE_CALL, example

ROUND_H = Path(__file__).parents[2] / "kernels" / "cpu" / "round.h"


def without_seconds(round: Round) -> Round:
    """A record that can be compared: sums of shares are added in one order or another."""
    visits = {name: round_off(getattr(round, name)) for name in ("layer_visits", "head_visits")}
    return dataclasses.replace(round, seconds=0.0, **visits)


def round_off(number: float) -> float:
    return float(f"{number:.9g}")


@pytest.mark.parametrize("vocabulary", [None, 100], ids=["whole", "trimmed"])
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("precision", PRECISION)
def test_a_round_played_in_one_call_leaves_the_record_of_the_same_round_call_by_call(
    precision, sampling, vocabulary, skip_file
):
    model = random_model(PRECISION[precision], pack=True)
    config = GenerateConfig(48, SAMPLING[sampling])
    seen = set()
    for text in PLAYED_IN_ONE_CALL:
        records = []
        for kind in (Runner, CallByCall):
            runner = kind(model, 80, max_rows=8, compile=True, draft_vocab=vocabulary)
            policy = example(text, skip_file, N_LAYER)
            steps = list(decode(runner, [1, 5, 9, 5, 9, 40, 5, 9], config, policy))
            records.append(list(map(without_seconds, steps)))
        for one, other in zip(*records, strict=True):
            assert one == other, text
        seen |= {(len(step.drafted), step.exit_layers[:1], step.resume_layer) for step in records[0]}
    assert len(seen) > 12, "too few different rounds: this test compared little"


class Players:
    """One round, three ways: C++ in one call, the loop call by call, and the loop by graphs as on a GPU."""

    def __init__(self, dtype: torch.dtype, copies: bool, monkeypatch):
        if reason := cpu.load():
            pytest.skip(f"C++ kernels not available: {reason}")
        model = random_model(dtype, pack=False, late_scale=0.15)  # so that candidates often choose the same token
        draft_model = low_bit_copies(model, "int4", N_LAYER, pack=False) if copies else None
        for each in (model, draft_model):
            if each:
                each.pack_weights()
        settings = dict(max_rows=9, draft_model=draft_model, draft_vocab=100 if copies else None)
        self.runners = [Runner(model, 64, compile=True, **settings), CallByCall(model, 64, compile=True, **settings)]
        with monkeypatch.context() as patch:
            patch.setattr("decoding.runner.Graphs", AsOnGPU)
            self.runners.append(Runner(model, 64, **settings))  # all share one cache
        for runner in self.runners:
            runner.prefill(PROMPT)
        assert self.runners[0].packed

    def play(self, plan: DraftPlan, token: int, config: GenerateConfig, reads_hidden: bool):
        """Play a round after the prompt and `token` each way -> records and hidden states."""
        policy = DraftPolicy()
        policy.reads_hidden = reads_hidden
        for runner in self.runners:
            player = RoundPlayer(runner, policy, runner.sampler(config.sampling), config.eos_ids)
            played = player.play(plan, token, len(PROMPT), config.max_new_tokens, since=0.0)
            yield until_text_ends(played, config, None)[0], player.hidden


def random_rule(draw: random.Random, measures) -> Rule:
    """A rule that holds sometimes, on a random model."""
    measure = draw.choice(list(measures))
    low, high = {
        Measure.TOP1: (0.0, 0.2),
        Measure.MARGIN: (0.0, 0.1),
        Measure.ENTROPY: (3.7, 4.8),
        Measure.COSINE: (0.3, 1.0),
        Measure.REPEATS: (0.6, 2.4),
    }[measure]
    return Rule(measure, draw.uniform(low, high))


def random_plan(draw: random.Random, adapters: Adapters) -> DraftPlan:
    """Anything a plan can say that no policy is asked for."""
    if draw.random() < 0.15:
        return DraftPlan(proposed=tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 8))))
    if draw.random() < 0.1:
        return DraftPlan((N_LAYER,), draw.randint(1, 8), repeats=draw.random() < 0.5, plain=True)
    exits = tuple(sorted(draw.sample(range(1, N_LAYER + 1), draw.choice([0, 1, 2, 3, 3, 4]))))
    some = lambda: frozenset(layer for layer in range(N_LAYER) if draw.random() < 0.3)
    skips = (some(), some()) if draw.random() < 0.4 else (frozenset(), frozenset())
    return DraftPlan(
        exits,
        draw.randint(0, 8),
        *skips,
        exit_if=random_rule(draw, Measure) if len(exits) > 1 or draw.random() < 0.2 else None,
        stop_unless=random_rule(draw, STATISTICS) if draw.random() < 0.3 else None,
        adapters=adapters if draw.random() < 0.2 else None,
        repeats=draw.random() < 0.5,
    )


@pytest.mark.parametrize("copies", [False, True], ids=["own", "low-bit"])
@pytest.mark.parametrize("precision", PRECISION)
def test_a_random_plan_leaves_one_record_however_its_round_is_played(precision, copies, monkeypatch, skip_file):
    """Graphs count what they read: all rows are verified from the bottom, drafts behind an end of text are made, and a
    draft may have been started that nobody wants. So their visits and resume layers are not compared."""
    players, seen = Players(PRECISION[precision], copies, monkeypatch), Counter()
    adapters = Adapters(str(Path(skip_file).with_name(f"adapter{N_LAYER}.safetensors")))
    draw = random.Random(f"{precision} {copies}")
    for _ in range(150):
        plan, reads_hidden = random_plan(draw, adapters), draw.random() < 0.2
        eos_ids = tuple(draw.sample(range(VOCAB_SIZE), draw.choice([0, 0, 30])))
        config = GenerateConfig(draw.randint(1, 10), SAMPLING[draw.choice(["greedy", "sampled"])], eos_ids)
        records, states = zip(*players.play(plan, draw.randrange(VOCAB_SIZE), config, reads_hidden), strict=True)
        in_one_call, by_calls, by_graphs = map(without_seconds, records)
        assert in_one_call == by_calls, plan
        for name in ("tokens", "drafted", "accepted", "exit_layers"):
            assert getattr(by_graphs, name) == getattr(by_calls, name), (plan, name)
        ended = bool({*by_calls.tokens} & {*eos_ids})
        for hidden in states if reads_hidden and not ended else ():
            assert torch.equal(hidden, states[0])
        drafted = len(by_calls.drafted)
        if plan.plain and not copies:
            seen["plain"] += 1
            assert not (drafted or by_calls.accepted or by_calls.exit_layers), plan
            assert ended or len(by_calls.tokens) == min(plan.num_draft_tokens + 1, config.max_new_tokens)
        seen["accepted"] += by_calls.accepted
        seen["rejected"] += drafted - by_calls.accepted
        seen["exits", by_calls.exit_layers[:1]] += 1
        seen["resumes", by_calls.resume_layer] += 1
        seen["ended in a draft"] += bool({*by_calls.drafted} & {*eos_ids})
        seen["stopped"] += bool(plan.stop_unless) and 0 < drafted < min(
            plan.num_draft_tokens, config.max_new_tokens - 1
        )
        for depth in by_calls.exit_layers if plan.exit_if else ():
            seen["exit by", plan.exit_if.measure, depth == max(plan.exits, default=N_LAYER)] += 1
    for what in ("accepted", "rejected", "ended in a draft", "stopped"):
        assert seen[what] > 10, f"too few {what}: this test compared little"
    for measure, late in itertools.product(Measure, (False, True)):
        assert seen["exit by", measure, late] > 1, f"too few exits by {measure.name}: this test compared little"
    assert copies or seen["plain"] > 5
    assert copies or all(seen["resumes", depth] > 3 for depth in range(1, N_LAYER + 1))


def test_measures_have_the_names_and_values_that_the_compiled_round_and_the_exit_head_have():
    [listed] = re.findall(r"enum Measure : int64_t \{(.*?)\}", ROUND_H.read_text(encoding="utf-8"))
    compiled = {name: int(value) for name, value in re.findall(r"(\w+) = (-?\d+)", listed)}
    assert compiled.pop("NONE") == -1
    assert compiled == {measure.name: measure.value for measure in Measure}
    assert [measure.name.lower() for measure in STATISTICS] == list(ExitStats._fields[1:4])


def test_a_tensor_of_a_layer_that_the_compiled_layers_do_not_know_is_an_error_that_names_them():
    for count in (len(TENSORS) - 1, len(TENSORS) + 1):
        with pytest.raises(AssertionError, match=r"layers\.h and layer_table"):
            PackedLayers([(torch.zeros(1),) * count], torch.zeros(1), torch.zeros(1), n_head=1, eps=1e-5)


def test_tables_of_plans_that_were_not_used_for_longest_go(monkeypatch):
    monkeypatch.setattr("decoding.packed.PLANS", 4)
    runner = Runner(random_model(torch.float32, pack=True), 200, max_rows=4, compile=True)
    expected = Runner(runner.model, 200, max_rows=4)
    found, plain = (
        tokens_of(runner, [1, 5, 9], policy, SAMPLING["greedy"], new=80).tokens
        for runner, policy in ((runner, "layer_skip_proportion:0.5"), (expected, "none"))
    )
    info = runner.packed.plan_table.cache_info()
    assert found == plain and info.misses > 10 and info.currsize == 4
    tokens_of(runner, [1, 5, 9], "static:2", SAMPLING["greedy"], new=80)
    info = runner.packed.plan_table.cache_info()
    assert info.misses <= 2, "the last round may want fewer tokens; all others find their table"
