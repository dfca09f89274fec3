"""The bundled checkpoint: what the README's first command promises of it."""

import itertools
import json
from collections import Counter

import pytest
import torch

from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from generate import DEFAULT_PROMPT, decode
from kernels import cpu
from loading import checkpoint
from loading.tokenizer import load_tokenizer
from tests.helpers.processes import DEMO

SAMPLING = (SamplingConfig(), SamplingConfig(temperature=0.8, seed=7), SamplingConfig(1.2, top_k=40, top_p=0.9, seed=3))


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(DEMO)
    lines = (DEMO / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def tokens_of(runner, prompt, policy, sampling=SAMPLING[0], new=96):
    config = GenerateConfig(max_new_tokens=new, sampling=sampling)
    return Generation.collect(decode(runner, prompt, config, make_policy(policy, runner.n_layer)))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_over_ten_thousand_tokens_of_the_demo_not_one_differs_from_plain_decoding(precision, prompts):
    if reason := cpu.load():
        pytest.skip(f"C++ kernels not available: {reason}")
    model, compared = checkpoint.load(DEMO, precision).model, 0
    for compile, number, policies in (
        (True, 8, ("static:5,num_draft_tokens=7", "prompt_lookup+confidence:0.5,candidates=2-4-6-9")),
        (False, 2, ("static:2",)),  # eagerly, which is slow
    ):
        runner = Runner(model, 256, max_rows=8, compile=compile)
        for sampling in SAMPLING:
            for prompt in prompts[:number]:
                expected = tokens_of(runner, prompt, "none", sampling).tokens
                for policy in policies:
                    assert tokens_of(runner, prompt, policy, sampling).tokens == expected
                    compared += len(expected)
    assert compared >= 5_000  # for each of two precisions


def test_drafts_of_a_quarter_of_the_layers_are_accepted_on_prompts_never_trained_on(prompts):
    cpu.load()
    loaded = checkpoint.load(DEMO)
    runner = Runner(loaded.model, 256, max_rows=4, compile=cpu.loaded())
    quarter = loaded.args.n_layer // 4
    steps = [step for prompt in prompts for step in tokens_of(runner, prompt, f"static:{quarter}").rounds]
    accepted, drafted = sum(step.accepted for step in steps), sum(len(step.drafted) for step in steps)
    assert accepted / drafted >= 0.65


CANDIDATES = "candidates=2-4-6-9"
THRESHOLDS = {  # of each method, from where it leaves at once to where it never leaves
    "confidence": (0.0, 0.1, 0.5, 0.9, 1.0),
    "margin": (0.0, 0.1, 0.5, 0.9, 1.0),
    "entropy": (100.0, 3.0, 1.0, 0.3, 0.0),
    "saturation": (-1.0, 0.8, 0.9, 0.95, 1.0),
}


@pytest.fixture(scope="module")
def exits(prompts):
    """exits(policy) -> how many drafts of a few prompts left at each depth."""
    cpu.load()
    runner = Runner(checkpoint.load(DEMO).model, 256, max_rows=8, compile=cpu.loaded())

    def exits(policy):
        steps = [step for prompt in prompts[:4] for step in tokens_of(runner, prompt, policy, new=48).rounds]
        return Counter(depth for step in steps for depth in step.exit_layers)

    return exits


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_surer_a_draft_must_be_the_deeper_it_goes(exits, name):
    found = [exits(f"{name}:{threshold},{CANDIDATES}") for threshold in THRESHOLDS[name]]
    means = [sum(depth * count for depth, count in depths.items()) / depths.total() for depths in found]
    assert all(a < b for a, b in itertools.pairwise(means)), means
    first = 4 if name == "saturation" else 2  # the first candidate has nothing to be compared with
    assert set(found[0]) == {first} and set(found[-1]) == {9}
    assert all(len(depths) > 1 for depths in found[1:-1])


def test_every_method_chooses_its_own_exits(exits):
    policies = [f"{name}:{thresholds[2]}" for name, thresholds in THRESHOLDS.items()]
    policies += ["consistent_tokens:2", "consistent_tokens:3", "logits_future"]
    found = [exits(f"{policy}{',' if ':' in policy else ':'}{CANDIDATES}") for policy in policies] + [exits("random")]
    assert all(len(depths) > 1 for depths in found)
    shares = [{depth: round(depths[depth] / depths.total(), 2) for depth in sorted(depths)} for depths in found]
    assert all(a != b for a, b in itertools.combinations(shares, 2)), shares


def test_the_demo_writes_the_text_it_has_always_written():
    """A golden text: changes of arithmetic that the other tests allow for show here (fp32, operation by operation)."""
    tokenizer = load_tokenizer(DEMO)
    runner = Runner(checkpoint.load(DEMO, torch.float32, pack=False).model, 128, max_rows=4)
    prompt = tokenizer.encode(DEFAULT_PROMPT)
    text = tokenizer.decode(tokens_of(runner, prompt, "static:3", new=24).tokens, continues=True)
    assert text == (DEMO / "golden.txt").read_text(encoding="utf-8")
