"""What decoding should produce, what it produced, and every number defined on it, once."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from decoding.runner import head_bytes, module_bytes
from decoding.sampling import SamplingConfig
from drafting.plan import Round
from errors import UserError
from model import Transformer


@dataclass(frozen=True)
class GenerateConfig:
    """What decoding should produce: at most max_new_tokens ids, ending early after any of eos_ids."""

    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")


def check_prompt(prompt: Sequence[int], config: GenerateConfig, vocab_size: int, length: int) -> None:
    """Raise UserError unless `prompt` holds known ids and fits `length` positions with config.max_new_tokens."""
    if not prompt:
        raise UserError("prompt is empty and this tokenizer has no BOS token: give at least one token")
    if (worst := max(prompt, key=lambda t: max(t, -1 - t + vocab_size))) not in range(vocab_size):
        raise UserError(f"prompt ids must be in 0..{vocab_size - 1}, got {worst}")
    if len(prompt) + config.max_new_tokens > length:
        raise UserError(
            f"prompt of {len(prompt)} tokens + max_new_tokens {config.max_new_tokens} does not fit the "
            f"{length} positions available: shorten the prompt or lower --max_new_tokens"
        )


def until_end(
    tokens: list[int], eos_ids: Sequence[int], finished: Callable[[int], bool] | None
) -> tuple[list[int], bool]:
    """The tokens up to and including the one that ends the text, and whether one did."""
    for index, token in enumerate(tokens):
        stop = finished(token) if finished else False
        if stop or token in eos_ids:
            return tokens[: index + 1], True
    return tokens, False


@dataclass
class Generation:
    """The Rounds of one text and the numbers defined on them. The prefill counts as no round and as no decoding."""

    prefill: Round
    rounds: list[Round]

    @classmethod
    def collect(cls, stream: Iterator[Round]) -> "Generation":
        prefill, *rounds = stream
        return cls(prefill, rounds)

    @property
    def tokens(self) -> list[int]:
        return [token for step in (self.prefill, *self.rounds) for token in step.tokens]

    @property
    def decode_s(self) -> float:
        return sum(step.seconds for step in self.rounds)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second: those after the first, which the prefill makes."""
        return (len(self.tokens) - 1) / self.decode_s if self.rounds else None

    def summary(self, model: Transformer) -> dict:
        """Every number of this generation, as it stands in JSON files."""
        rounds, emitted = self.rounds, len(self.tokens) - 1
        drafted = sum(len(step.drafted) for step in rounds)
        accepted = sum(step.accepted for step in rounds)
        exits = Counter(depth for step in rounds for depth in step.exit_layers)
        layers = sum(step.layer_visits for step in rounds)
        heads = sum(step.head_visits for step in rounds)
        return {
            "tokens": self.tokens,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "rounds": len(rounds),
            "tokens_per_round": emitted / len(rounds) if rounds else None,
            "mean_exit_layer": sum(depth * count for depth, count in exits.items()) / exits.total() if exits else None,
            "exit_layers": {str(depth): exits[depth] for depth in sorted(exits)},
            "layer_visits_per_token": layers / emitted if rounds else None,
            "head_visits_per_token": heads / emitted if rounds else None,
            "prefill_s": self.prefill.seconds,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "ideal_speedup": ideal_speedup(emitted, layers, heads, model) if rounds else 1.0,
        }


def head_cost_layers(model: Transformer) -> float:
    """Bytes of the LM head ÷ bytes of one layer: what a head costs where streaming weights is what costs."""
    return head_bytes(model.ends()) / module_bytes(model.layers[0])


def ideal_speedup(emitted: int, layer_visits: float, head_visits: float, model: Transformer) -> float:
    """Speedup over autoregressive decoding if time were weight bytes alone: `emitted` tokens for these visits.

    For a round of K drafts at exit layer E that emits n tokens: n·(L + h) ÷ (K·(E + h) + L + h), h = head_cost_layers.
    """
    head, n_layer = head_cost_layers(model), model.args.n_layer
    return emitted * (n_layer + head) / (layer_visits + head * head_visits)
