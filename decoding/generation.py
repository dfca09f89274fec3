"""Define the settings of a text, the rounds it took, and the numbers computed from them, each once."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from decoding.sampling import SamplingConfig
from decoding.visits import head_bytes, module_bytes
from drafting.plan import Round
from errors import UserError
from model import Transformer


@dataclass(frozen=True)
class GenerateConfig:
    """Say what decoding should produce: at most max_new_tokens ids, ending early after any of eos_ids."""

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
    tokens: Sequence[int], eos_ids: Sequence[int], finished: Callable[[int], bool] | None = None
) -> tuple[Sequence[int], bool]:
    """Cut tokens behind the one that ends the text -> the tokens, and whether one did."""
    for index, token in enumerate(tokens):
        stop = finished(token) if finished else False
        if stop or token in eos_ids:
            return tokens[: index + 1], True
    return tokens, False


@dataclass(frozen=True)
class Totals:
    """Hold the sums over some rounds of decoding; return the rates defined on them.

    tokens: emitted. exit_layers: how many drafted tokens exited at each depth. layer_visits, head_visits: how often
    the weights of a layer, and of the LM head, were read.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    exit_layers: Counter[int] = field(default_factory=Counter)
    layer_visits: float = 0.0
    head_visits: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Return accepted ÷ drafted tokens, 0..1; None if nothing was drafted."""
        return rate(self.accepted, self.drafted)

    @property
    def tokens_per_round(self) -> float | None:
        return rate(self.tokens, self.rounds)

    @property
    def mean_exit_layer(self) -> float | None:
        return rate(sum(depth * count for depth, count in self.exit_layers.items()), self.exit_layers.total())

    @property
    def layer_visits_per_token(self) -> float | None:
        return rate(self.layer_visits, self.tokens)

    @property
    def head_visits_per_token(self) -> float | None:
        return rate(self.head_visits, self.tokens)


def rate(count: float, base: float) -> float | None:
    """Return count ÷ base; None where there is nothing to divide by."""
    return count / base if base else None


def totals(rounds: Iterable[Round]) -> Totals:
    """Sum up rounds of decoding."""
    rounds = list(rounds)
    return Totals(
        rounds=len(rounds),
        tokens=sum(len(round.tokens) for round in rounds),
        drafted=sum(len(round.drafted) for round in rounds),
        accepted=sum(round.accepted for round in rounds),
        exit_layers=Counter(depth for round in rounds for depth in round.exit_layers),
        layer_visits=sum(round.layer_visits for round in rounds),
        head_visits=sum(round.head_visits for round in rounds),
        seconds=sum(round.seconds for round in rounds),
    )


def summed(summaries: Iterable[dict]) -> Totals:
    """Sum up the rounds of several texts from their summaries, as `Generation.summary` makes them and files keep them.

    Another engine's summary may lack what it does not tell, which then counts as 0.
    """
    summaries = list(summaries)
    decoded = [len(summary["tokens"]) - 1 for summary in summaries]  # the prefill makes the first token
    add = lambda name: sum(summary.get(name, 0) for summary in summaries)
    weighted = lambda name: sum((s.get(name) or 0) * count for s, count in zip(summaries, decoded, strict=True))
    exits = Counter()
    for summary in summaries:
        exits.update({int(depth): count for depth, count in summary.get("exit_layers", {}).items()})
    return Totals(
        rounds=add("rounds"),
        tokens=sum(decoded),
        drafted=add("drafted"),
        accepted=add("accepted"),
        exit_layers=exits,
        layer_visits=weighted("layer_visits_per_token"),
        head_visits=weighted("head_visits_per_token"),
        seconds=add("decode_s"),
    )


@dataclass
class Generation:
    """Hold the rounds of one text. The prefill, which makes the first token, counts as no round and as no decoding."""

    prefill: Round
    rounds: list[Round]

    @classmethod
    def collect(cls, stream: Iterable[Round]) -> "Generation":
        """Run a stream of `decode` to its end."""
        prefill, *rounds = stream
        return cls(prefill, rounds)

    @property
    def tokens(self) -> list[int]:
        return [token for round in (self.prefill, *self.rounds) for token in round.tokens]

    @property
    def decode_s(self) -> float:
        return sum(round.seconds for round in self.rounds)

    @property
    def tokens_per_s(self) -> float | None:
        """Return decoded tokens per second: those after the first, which the prefill makes."""
        return (len(self.tokens) - 1) / self.decode_s if self.rounds else None

    def summary(self, model: Transformer) -> dict:
        """Return every number of this text, as it stands in JSON files."""
        sums, rounds = totals(self.rounds), self.rounds
        return {
            "tokens": self.tokens,
            "drafted": sums.drafted,
            "accepted": sums.accepted,
            "acceptance_rate": sums.acceptance_rate,
            "rounds": sums.rounds,
            "tokens_per_round": sums.tokens_per_round,
            "mean_exit_layer": sums.mean_exit_layer,
            "exit_layers": {str(depth): sums.exit_layers[depth] for depth in sorted(sums.exit_layers)},
            "layer_visits_per_token": sums.layer_visits_per_token,
            "head_visits_per_token": sums.head_visits_per_token,
            "prefill_s": self.prefill.seconds,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "ideal_speedup": ideal_speedup(sums.tokens, sums.layer_visits, sums.head_visits, model) if rounds else 1.0,
        }


def head_cost_layers(model: Transformer) -> float:
    """Return bytes of the LM head ÷ bytes of one layer: what a head costs where streaming weights is what costs."""
    return head_bytes(model.exit_head()) / module_bytes(model.layers[0])


def ideal_speedup(emitted: int, layer_visits: float, head_visits: float, model: Transformer) -> float:
    """Return the speedup over autoregressive decoding if time were weight bytes alone.

    emitted: the tokens that these visits produced.

    For a round of K drafts at exit layer E that emits n tokens: n·(L + h) ÷ (K·(E + h) + L + h), h = head_cost_layers.
    """
    head, n_layer = head_cost_layers(model), model.args.n_layer
    return emitted * (n_layer + head) / (layer_visits + head * head_visits)
