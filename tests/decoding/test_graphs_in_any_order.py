"""Texts in any order through rounds by graphs on one stream: nothing started, captured or waiting is ever stale."""

import dataclasses
import itertools
import random
from functools import partial

import pytest
import torch

from decoding.generation import GenerateConfig, Generation
from decoding.graphs import Arrival
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from generate import decode
from kernels.exit_head import Exit
from tests.helpers.gpu import AsOnGPU, CallByCall, samples_from_logits
from tests.helpers.models import N_LAYER, random_model
from tests.helpers.policies import example

FIXED = ("none", "none:steps=8", "static:2", "static:1,num_draft_tokens=7", "skip_set:FILE")  # rounds started ahead
POLICIES = (
    *FIXED,
    "static:2,num_draft_tokens=12",
    "saturation:0.2",
    "static:2,stop=0.05",
    "confidence:0.05,candidates=1-2-4",
    "confidence:0.05,candidates=1-3,adapter=ADAPTER,stop=0.03",
    "learned:LEARNED,every=2",
    "prompt_lookup:min_ngram=1+static:2",
)
SAMPLING = (
    SamplingConfig(),
    SamplingConfig(temperature=0.8, seed=5),
    SamplingConfig(temperature=0.8, seed=2**40 + 1),
    SamplingConfig(temperature=1.3, seed=5),
    SamplingConfig(temperature=0.8, top_k=20, seed=5),
)


class Interrupted(Exception):
    pass


class Stream(list):
    """Work in the order in which it was started. It is done when somebody waits for it, and not earlier."""

    done, waits_left = 0, None

    def start(self, work, *arguments) -> int:
        self.append(partial(work, *arguments))
        return self.done + len(self)

    def wait(self, until: int | None = None) -> None:
        while self and (until is None or self.done < until):
            self.pop(0)()
            self.done += 1

    def interrupt(self) -> None:
        """End the round that waits now, if it is the one that was chosen for that."""
        if self.waits_left is not None:
            self.waits_left -= 1
            if self.waits_left < 0:
                self.waits_left = None
                raise Interrupted


class Delayed(Arrival):
    """A copy that is made in its turn on the stream, and only when somebody waits for it."""

    def __init__(self, source, stream):
        super().__init__(source)
        self.stream, self.event = stream, None

    def send(self):
        self.turn = self.stream.start(self.copy.copy_, self.source)
        return self

    def read(self):
        self.stream.interrupt()
        self.stream.wait(self.turn)
        return self.copy.tolist()


class OnStream(AsOnGPU):
    """Programs wait on the stream that all runners share; what the host does to tensors waits for it."""

    stream = Stream()

    def __init__(self, runner):
        super().__init__(runner)
        self.found = [Delayed(self.ids, self.stream) for _ in range(2)]
        self.seen = [Delayed(self.stats, self.stream) for _ in range(2)]

    def run(self, program, *arguments):
        self.stream.start(super().run, program, *arguments)

    def set(self, *arguments):
        self.stream.start(super().set, *arguments)

    def forget(self):
        self.stream.wait()
        super().forget()

    def run_layers(self, hidden, *arguments):
        self.stream.wait()
        found = super().run_layers(hidden, *arguments)  # what was there before; the program still waits
        self.stream.wait()
        return found.copy_(self.inputs[: len(hidden)])


class Changing(DraftPolicy):
    """Plans of several policies in turn, which may wrongly say that they repeat."""

    num_draft_tokens = 7

    def __init__(self, draw: random.Random, skip_file: str):
        texts = [*draw.sample(FIXED, 2), draw.choice(POLICIES)]
        self.draw, self.parts = draw, [example(text, skip_file, N_LAYER) for text in texts]
        self.reads_hidden = any(part.reads_hidden for part in self.parts)

    def start_prompt(self, prompt):
        for part in self.parts:
            part.start_prompt(prompt)
        self.now = self.parts[0]

    def start_round(self, context):
        if self.draw.random() < 0.4:
            self.now = self.draw.choice(self.parts)
        plan = self.now.start_round(context)
        return dataclasses.replace(plan, repeats=True) if self.draw.random() < 0.3 else plan

    def should_exit(self, depth, exit):
        return self.now.should_exit(depth, exit)

    def end_round(self, round):
        self.now.end_round(round)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_texts_in_any_order_by_any_runner_of_a_model_are_those_of_plain_decoding(dtype, monkeypatch, skip_file):
    """New texts and conversations that go on; ended early, given up, interrupted within a round; to the cache's end."""
    monkeypatch.setattr("decoding.runner.Graphs", OnStream)
    monkeypatch.setattr(Runner, "can_sample", True)  # by a fused kernel on a GPU, here from the logits
    monkeypatch.setattr(Exit, "has_fused_head", lambda self: False)
    monkeypatch.setattr(Exit, "samples", samples_from_logits)
    plain, interrupted, ahead = make_policy("none", N_LAYER), 0, 0
    for seed in range(6):
        draw, stream = random.Random(seed), OnStream.stream
        stream.clear()
        model, twin = (random_model(dtype, pack=False, seed=seed % 3) for _ in range(2))
        runners = [Runner(model, 56, max_rows=rows) for rows in (2, 8)]  # 56 + 8 slots: nothing is left behind them
        expecting, tokens = CallByCall(twin, 56, max_rows=8), []
        for _ in range(8):
            runner, sampling = draw.choice(runners), draw.choice(SAMPLING)
            policy = example(draw.choice(POLICIES), skip_file, N_LAYER)
            if draw.random() < 0.5:
                policy = Changing(draw, skip_file)
            kept = tokens[: draw.randint(2, len(tokens))] if 2 < len(tokens) < 40 and draw.random() < 0.6 else []
            prompt = kept + [draw.randrange(3, 130) for _ in range(draw.randint(1, 5))]
            cached = max(0, len(kept) - 1)
            new = draw.choice([56 - len(prompt), draw.randint(1, 56 - len(prompt))])
            config = GenerateConfig(new, sampling, tuple(draw.sample(range(130), draw.choice([0, 5]))))
            expected = Generation.collect(decode(expecting, prompt, config, plain, cached)).tokens
            found, rounds = [], draw.choice([99, draw.randint(1, 6)])
            stream.waits_left = draw.choice([None, draw.randint(0, 20)])
            try:
                for step in itertools.islice(decode(runner, prompt, config, policy, cached), rounds):
                    found += step.tokens
                    ahead += bool(runner._graphs.ahead)
                assert rounds < 99 or len(found) == len(expected)
            except Interrupted:
                interrupted += 1
            stream.waits_left = None
            assert found == expected[: len(found)], (seed, str(policy), sampling)
            tokens = prompt + found
    assert interrupted > 5 and ahead > 50, "too little happened: this test compared little"
