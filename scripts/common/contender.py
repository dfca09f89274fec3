"""A contender: something that continues prompts and is timed in turns with others. Ours decode with a Runner."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from decoding.compare import share_equal
from decoding.generation import GenerateConfig, Generation, Totals, summed
from decoding.runner import Runner
from drafting.policy import DraftPolicy
from generate import decode

# (prompt, new tokens) -> tokens, seconds of decoding those after the first, {"prefill_s": …, …}
Continue = Callable[[list[int], int], tuple[list[int], float, dict]]
# (prompt, unverified text) -> the share of its tokens that the full model would have chosen
Judge = Callable[[list[int], list[int]], float]


@dataclass
class Contender:
    """One row of a benchmark. What it has done so far is filled in by `turns.measure`."""

    engine: str
    policy: str
    compiled: bool
    run: Continue
    backend: str = "eager"
    exact: bool = True
    threads: int = 1
    quantize: str = "none"
    judge: Judge | None = None
    device: str = "cpu"
    rates: list[float] = field(default_factory=list)  # tokens/s of each repeat
    texts: list[list[int]] = field(default_factory=list)  # of the last repeat, by prompt
    summaries: list[dict] = field(default_factory=list)  # of the last repeat, by prompt: see Generation.summary
    records: list[list[dict]] = field(default_factory=list)  # by repeat and prompt: tokens, seconds, the summary

    @property
    def place(self) -> tuple[str, str]:
        """The device of its weights and their format: contenders of one place share a model."""
        return self.device, self.quantize

    @property
    def is_plain(self) -> bool:
        """Tell whether this is plain decoding of ours, in one of its settings."""
        return self.engine == "skipfast" and is_plain(self.policy)

    @property
    def counts_rounds(self) -> bool:
        """Tell whether it says how many rounds its texts took: other engines do not."""
        return all("rounds" in summary for summary in self.summaries)

    def totals(self) -> Totals:
        """Sum up the rounds of its texts."""
        return summed(self.summaries)


def is_plain(policy: str) -> bool:
    """Tell whether a policy string names plain decoding: none, or none:steps=8."""
    return policy.split(":")[0] == "none"


def skipfast_contender(
    runner: Runner,
    policy: DraftPolicy,
    name: str,
    config: GenerateConfig,
    exact: bool = True,
    verified: bool = True,
    quantize: str = "none",
    device: str = "cpu",
) -> Contender:
    """Make a contender of ours.

    exact: False names a baseline without the padding that equal bits need. verified: False decodes with unverified
    early exits, is named so and has a judge of its text. quantize: the format of the model.
    """

    def run(prompt: list[int], count: int) -> tuple[list[int], float, dict]:
        wanted = dataclasses.replace(config, max_new_tokens=count)
        generation = Generation.collect(decode(runner, prompt, wanted, policy, verified=verified))
        return generation.tokens, generation.decode_s, generation.summary(runner.model)

    def judge(prompt: list[int], text: Sequence[int]) -> float:
        return share_equal(runner, prompt, text, config.sampling)

    return Contender(
        "skipfast",
        name if verified else f"{name} (unverified)",
        runner.compiled,
        run,
        runner.backend,
        exact,
        torch.get_num_threads(),
        quantize,
        None if verified else judge,
        device,
    )
