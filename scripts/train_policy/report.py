"""What a learned policy is worth: first drafts on held-out text, beside two controls, and decoding with it.

At random: each action left out with one chance for all, that of the same mean number of layers. One set: the policy
with its mean logits on the held-out text instead of those of the state, which says what looking at the state brings.
"""

import argparse
import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
from decoding.compare import fastest_plain
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from drafting.auto import expected_tokens
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from generate import CALIBRATION_TOKENS, decode
from loading.files import replacing
from model import Transformer
from scripts.common.round_costs import RoundCosts
from scripts.train_policy.network import SkipNetwork
from scripts.train_policy.rewards import Reward, Window, layers_skipped, mean, numbers

DRAFTS = range(1, 8)  # of a round
PROMPT_TOKENS = 64
CONTROLS = {"random": "at random", "one_set": "one set for all"}


def pieces(heldout: Tensor, flags: argparse.Namespace) -> list[list[int]]:
    """Windows at equal distances, of context + 1 tokens each, that do not overlap."""
    count = min(flags.eval_windows, (len(heldout) - 1) // flags.context)
    last = len(heldout) - flags.context - 1
    starts = [round(index * last / max(count - 1, 1)) for index in range(count)]
    return [heldout[start : start + flags.context + 1].tolist() for start in starts]


@torch.no_grad()
def choices(network: SkipNetwork, states: Tensor, model: Transformer, seed: int) -> dict[str, Tensor]:
    """Which sublayers the policy and its controls keep after each of states [N, D]: each bool [N, 2L]."""
    logits = network(states)
    learned, generator = network.sublayers(logits > 0), torch.Generator().manual_seed(seed)
    share = layers_skipped(learned, model).mean() / model.args.n_layer
    random = torch.rand(logits.shape, generator=generator).to(logits.device) >= share
    one_set = network.sublayers(logits.mean(0) > 0).expand_as(learned)
    return {"learned": learned, "random": network.sublayers(random), "one_set": one_set}


@torch.no_grad()
def evaluate(
    model: Transformer,
    texts: Sequence[list[int]],
    networks: dict[str, SkipNetwork],
    rewards: dict[str, Reward],
    seed: int,
) -> list[dict]:
    """Judge policies and controls on the same windows -> a row for each policy.

    A row's `learned`, `random` and `one_set` hold means; `over_random` and `over_one_set` how much more the policy's
    windows have than theirs: mean and standard error.
    """
    states = torch.cat([Window(model, text).states for text in texts])
    chosen = {name: choices(network, states, model, seed) for name, network in networks.items()}
    found: dict[tuple[str, str], list[dict]] = {(name, who): [] for name in chosen for who in chosen[name]}
    for index, text in enumerate(tqdm(texts, desc="held-out windows", leave=False)):
        window = Window(model, text)
        part = slice(index * len(window.rows), (index + 1) * len(window.rows))
        for name, who in found:
            keep = chosen[name][who][part]
            outcome = window.judge(keep)
            found[name, who].append(numbers(outcome, keep, rewards[name](outcome, keep), model))
    rows = []
    for name, sets in chosen.items():
        row = {"alpha": name, **{who: mean(found[name, who]) for who in sets}}
        row |= {f"over_{who}": _difference(found[name, "learned"], found[name, who]) for who in CONTROLS}
        rows.append(row | {"distinct_sets": len(sets["learned"].unique(dim=0))})
    return rows


def _difference(rows: Sequence[dict], others: Sequence[dict]) -> dict[str, list[float | None]]:
    """Of each number the mean of row - other, and its standard error (None of a single window)."""
    found = {}
    for key in rows[0]:
        values = [row[key] - other[key] for row, other in zip(rows, others, strict=True)]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[key] = [statistics.fmean(values), error]
    return found


def choose_drafts(
    model: Transformer, texts: Sequence[list[int]], network: SkipNetwork, costs: RoundCosts, given: int | None
) -> dict:
    """How many tokens a round should draft by the measured costs, and the speedup that promises.

    texts: prompts of PROMPT_TOKENS that the model itself has continued: its drafts are more often right there than in
    text written by people. Rounds that leave nothing out draft nothing.
    """
    sets, agrees = [], []
    for text in texts:
        window = Window(model, text)
        keep = network.choose(window.states)
        sets.append(keep[PROMPT_TOKENS - 1 :])
        agrees.append(window.judge(keep).agrees[PROMPT_TOKENS - 1 :])
    keep, agrees = torch.cat(sets), torch.cat(agrees)
    drafting = ~keep.all(-1)
    rounds = list(zip(*(each.tolist() for each in keep[drafting].unique(dim=0, return_counts=True)), strict=True))
    drafted, idle = int(drafting.sum()), int((~drafting).sum())
    agreement = agrees[drafting].float().mean().item() if drafted else None

    def speedup(k: int) -> float:
        seconds = idle * costs.seconds([True] * keep.shape[1], 0)
        seconds += sum(count * costs.seconds(one, k) for one, count in rounds)
        return (idle + drafted * expected_tokens(agreement or 0.0, k)) * costs.plain / seconds

    best = given or max(DRAFTS, key=speedup)
    return {"num_draft_tokens": best, "expected_speedup": speedup(best), "own_text_agreement": agreement}


def run(runner: Runner, policy: DraftPolicy, prompt: Sequence[int], new_tokens: int) -> Generation:
    """Continue a prompt greedily, past any end of text."""
    return Generation.collect(decode(runner, prompt, GenerateConfig(new_tokens), policy))


class Engine:
    """The runners that decode: for plain decoding at its fastest, and for policies."""

    def __init__(self, session: cli.Session, flags: argparse.Namespace):
        """After session.load."""
        self.session, self.flags = session, flags
        length = max(PROMPT_TOKENS + flags.max_new_tokens, min(CALIBRATION_TOKENS, session.args.max_seq_len))
        make = lambda rows, exact: Runner(session.model, length, rows, flags.compile, exact, cli.notice)
        self.drafting = make(1 + DRAFTS[-1], True)
        self.plain = self.drafting if self.drafting.rows_independent else make(1, False)
        self.drafting.warm_up(skips_sublayers=True)
        self.plain.warm_up()

    def choose_threads(self) -> None:
        """Set the CPU threads that decode fastest, unless a flag says how many."""
        if self.drafting.rows_independent and self.flags.threads is None:
            self.drafting.choose_threads()

    def prompts(self, text: Tensor) -> list[list[int]]:
        """Pieces of PROMPT_TOKENS at equal distances."""
        count, most = self.flags.num_prompts, len(text) - PROMPT_TOKENS
        return [text[start : start + PROMPT_TOKENS].tolist() for start in (i * most // count for i in range(count))]

    def continued(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Each prompt with what plain decoding says after it."""
        none, new = make_policy("none", self.session.args.n_layer), self.flags.max_new_tokens
        return [[*prompt, *run(self.drafting, none, prompt, new).tokens] for prompt in prompts]

    def compare(self, policies: Sequence[str], prompts: Sequence[list[int]]) -> list[dict]:
        """Continue every prompt with plain decoding and each policy in turns -> the numbers of each policy."""
        args, new = self.session.args, self.flags.max_new_tokens
        expected = [text[len(prompt) :] for text, prompt in zip(self.continued(prompts), prompts, strict=True)]
        contenders = [(self.plain, fastest_plain(self.plain))]
        contenders += [(self.drafting, make_policy(text, args.n_layer, args.dim)) for text in policies]
        seconds = [[0.0] * self.flags.repeats for _ in contenders]
        found: list[list[Generation]] = [[] for _ in contenders]
        for turn in tqdm(range(self.flags.repeats), desc="decoding", leave=False):
            found = [[] for _ in contenders]
            for prompt in prompts:
                order = range(len(contenders))
                for i in order if turn % 2 else reversed(order):
                    found[i].append(run(*contenders[i], prompt, new))
                    seconds[i][turn] += found[i][-1].decode_s
        return [
            self.numbers(made, times, seconds[0], [one.tokens for one in made] == expected)
            for made, times in zip(found[1:], seconds[1:], strict=True)
        ]

    def numbers(self, made: list[Generation], times: list[float], plain: list[float], identical: bool) -> dict:
        """Of one policy: counts of its last turn, speeds as medians over turns."""
        rounds = [step for one in made for step in one.rounds]
        drafted, accepted = sum(len(step.drafted) for step in rounds), sum(step.accepted for step in rounds)
        emitted = sum(len(step.tokens) for step in rounds)
        return {
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "tokens_per_round": emitted / len(rounds),
            "tokens_per_s": emitted / statistics.median(times),
            "speedup": statistics.median(a / b for a, b in zip(plain, times, strict=True)),
            "identical": identical,
        }


def print_rows(rows: Sequence[dict], title: str, n_layer: int) -> None:
    """Two tables: first drafts on held-out text, and decoding."""
    shown, body = cli.shown, []
    for row in rows:
        for who, label in ({"learned": "learned"} | CONTROLS).items():
            one = row[who]
            body.append(
                [
                    f"{row['alpha']} {label}",
                    shown(one["skipped"], ".2f"),
                    shown(one["reward"], ".3f"),
                    shown(one["kl"], ".3f"),
                    shown(one["ce"], ".3f"),
                    shown(one["agreement"], ".3f"),
                    str(row["distinct_sets"]) if who == "learned" else "–",
                ]
            )
    columns = (
        "alpha, policy",
        f"layers left out\n(mean, of {n_layer})",
        "reward",
        "KL to the\nfull model",
        "cross-\nentropy",
        "first draft\nagrees",
        "distinct\nsets",
    )
    cli.print_table(f"{title}: held-out text", columns, body)
    body = [
        [
            row["alpha"],
            str(row["num_draft_tokens"]),
            shown(row["expected_speedup"], ".2f") + "×",
            shown(row["acceptance_rate"], ".2f"),
            shown(row["tokens_per_round"], ".2f"),
            shown(row["tokens_per_s"]),
            shown(row["speedup"], ".2f") + "×",
            "yes" if row["identical"] else "NO",
        ]
        for row in rows
    ]
    columns = (
        "alpha",
        "K",
        "speedup expected\nfrom costs",
        "acceptance\nrate",
        "tokens per\nround",
        "tokens/s",
        "speedup over\nplain",
        "identical\ntokens",
    )
    cli.print_table(f"{title}: decoding held-out prompts", columns, body)


def draw(rows: Sequence[dict], n_layer: int, picture: Path, title: str) -> None:
    """Write a PNG: what leaving out layers costs in loss, and in drafts that are right. matplotlib is optional."""
    if importlib.util.find_spec("matplotlib") is None:
        cli.notice(f"no {picture.name}: drawing it needs `pip install matplotlib`")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    styles = {
        "learned": ("o-", "tab:blue", "learned: chosen anew by the state"),
        "random": ("x--", "tab:red", "at random, as many layers"),
        "one_set": ("^:", "tab:green", "learned, but one set for all"),
    }
    for plot, key in zip(plots, ("kl", "agreement"), strict=True):
        for who, (style, colour, label) in styles.items():
            points = sorted((row[who]["skipped"], row[who][key]) for row in rows)
            plot.plot(*zip(*points, strict=True), style, color=colour, label=label)
        for row in rows:
            plot.annotate(
                f"α {row['alpha']}",
                (row["learned"]["skipped"], row["learned"][key]),
                (6, 6),
                textcoords="offset points",
                fontsize=9,
            )
    accepted = [(row["learned"]["skipped"], row["acceptance_rate"]) for row in rows if row["drafted"]]
    plots[1].plot(
        *zip(*accepted, strict=True) if accepted else ((), ()),
        "*",
        markersize=12,
        color="tab:orange",
        label="learned: acceptance rate in decoding",
    )
    plots[0].set(ylabel="KL of the first draft to the full model (nats)", title=title)
    plots[1].set(ylabel="share of first drafts that are right", ylim=(0, 1.05), title="held-out text")
    for plot in plots:
        plot.set(xlabel=f"layers left out (mean, of {n_layer})", xlim=(-0.3, n_layer + 0.3))
        plot.grid(alpha=0.25)
    plots[1].legend(loc="lower left", fontsize=9)
    with replacing(picture) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
