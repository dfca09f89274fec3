"""Time decoding against plain decoding, in turns, and compare the tokens."""

import operator
import statistics
from collections.abc import Sequence

from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy

COMPARE_REPEATS = 9
PLAIN_STEPS = 8  # tokens a call of plain decoding at its fastest


def compare_with_autoregressive(
    decoding,
    decode,
    runner: Runner,
    prompt: list[int],
    config: GenerateConfig,
    policy: DraftPolicy,
    verified: bool = True,
) -> dict:
    """Time `policy` and plain decoding in turns on one prompt -> medians of tokens/s and whether all tokens agree.

    Plain decoding is also timed without the padding that exactness may need, or with several tokens a call: the speedup
    is over the fastest of them.
    verified=False: early exit instead, and the share of its tokens that the full model would have chosen there.
    """
    plain = make_policy("none", runner.n_layer)
    contenders = {"policy": (runner, policy), "plain": (runner, plain)}
    if not runner.rows_independent:
        unpadded = Runner(runner.model, runner.cache_length, 1, runner.compiled, exact=False)
        unpadded.warm_up()
        contenders["unpadded"] = (unpadded, plain)
    elif runner.backend == "c++":
        full = Runner(runner.model, runner.cache_length, 1, compile=True) if runner.drafter else runner
        contenders["several a call"] = (full, fastest_plain(full))
    rates, texts = {name: [] for name in contenders}, {name: [] for name in contenders}
    for _ in range(COMPARE_REPEATS):
        for name, (chosen, how) in contenders.items():
            play = decoding if how is policy else decode
            generation = Generation.collect(play(chosen, prompt, config, how))
            rates[name].append(generation.tokens_per_s or 0.0)
            texts[name].append(generation.tokens)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    speculative = medians.pop("policy")
    comparable = verified and (config.sampling.temperature == 0 or config.sampling.verification == "coupled")
    return {
        "tokens_per_s": speculative,
        "autoregressive_tokens_per_s": max(medians.values()),
        "speedup": speculative / max(medians.values()) if max(medians.values()) else None,
        "repeats": COMPARE_REPEATS,
        "identical": all(t == texts["plain"][0] for t in texts["policy"] + texts["plain"]) if comparable else None,
        "equal_to_full_model": None if verified else share_equal(runner, prompt, texts["policy"][0], config.sampling),
    }


def fastest_plain(runner: Runner) -> DraftPolicy:
    """Plain decoding as it is fastest with this runner."""
    steps = PLAIN_STEPS if runner.backend == "c++" else 1
    return make_policy(f"none:steps={steps}", runner.n_layer)


def share_equal(runner: Runner, prompt: Sequence[int], text: Sequence[int], sampling: SamplingConfig) -> float:
    """The share of `text` that the full model would have chosen after the same tokens. Overwrites the cache."""
    sampler, tokens = runner.sampler(sampling), [*prompt, *text]
    runner.prefill(prompt[:-1] or prompt)
    equal, first = 0, len(prompt)
    while first < len(tokens):
        rows = tokens[first - 1 : first - 1 + min(runner.width, len(tokens) - first)]  # each chooses its successor
        hidden = runner.run_layers(runner.embed(rows), first - 1, 0, runner.n_layer)
        choices = sampler.choices(runner.exit(hidden, sampler.draw(first)), first)
        equal += sum(map(operator.eq, choices, tokens[first:]))
        first += len(rows)
    return equal / len(text)
