"""Time decoding against plain decoding in turns, and compare the tokens. What is timed comes in as callables."""

import operator
import statistics
from collections.abc import Callable, Sequence

from decoding.generation import Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy

COMPARE_REPEATS = 9
PLAIN_STEPS = 8  # tokens a call of plain decoding at its fastest

Decode = Callable[[], Generation]  # decodes one text


def take_turns(contenders: dict[str, Decode], repeats: int = COMPARE_REPEATS) -> dict[str, list[Generation]]:
    """Let every contender decode `repeats` times, one after the other, so that slow seconds hit all of them."""
    texts: dict[str, list[Generation]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, decode in contenders.items():
            texts[name].append(decode())
    return texts


def compare_with_plain(speculative: Decode, plain: Decode, fastest: Decode, comparable: bool = True) -> dict:
    """Time speculative and plain decoding in turns -> medians of tokens/s, and whether all tokens agree.

    fastest: plain decoding in another setting, which may be faster; the speedup is over the faster of the two.
    comparable: False where the texts are not meant to be equal.
    """
    texts = take_turns({"speculative": speculative, "plain": plain, "fastest": fastest})
    medians = {name: statistics.median(text.tokens_per_s or 0.0 for text in made) for name, made in texts.items()}
    autoregressive = max(medians["plain"], medians["fastest"])
    expected = texts["plain"][0].tokens
    return {
        "tokens_per_s": medians["speculative"],
        "autoregressive_tokens_per_s": autoregressive,
        "speedup": medians["speculative"] / autoregressive if autoregressive else None,
        "repeats": COMPARE_REPEATS,
        "identical": all(text.tokens == expected for text in texts["speculative"] + texts["plain"])
        if comparable
        else None,
    }


def fastest_plain(runner: Runner) -> DraftPolicy:
    """Return plain decoding as it is fastest with this runner: in C++ several tokens a call."""
    steps = PLAIN_STEPS if runner.backend == "c++" else 1
    return make_policy(f"none:steps={steps}", runner.n_layer)


def share_equal(runner: Runner, prompt: Sequence[int], text: Sequence[int], sampling: SamplingConfig) -> float:
    """Return the share of `text` that the full model would have chosen after the same tokens. Overwrites the cache."""
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
