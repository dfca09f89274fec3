"""Compare a learned policy with two controls on held-out text, by its first drafts, and decode with it.

At random: each action is left out with one chance for all, that of the same mean number of layers. One set: the policy
with its mean logits on the held-out text instead of those of each state. The difference is what the state tells.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
from decoding.engine import Engine
from decoding.generation import GenerateConfig, Generation, totals
from decoding.runner import Runner
from drafting.auto import expected_tokens
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from generate import decode
from model import Transformer
from scripts.common import pictures
from scripts.common.round_costs import RoundCosts
from scripts.train_policy.network import SkipNetwork
from scripts.train_policy.rewards import Reward, Window, layers_skipped, mean, numbers

DRAFTS = range(1, 8)  # of a round
PROMPT_TOKENS = 64
CONTROLS = {"random": "at random", "one_set": "one set for all"}


def pieces(heldout: Tensor, flags: argparse.Namespace) -> list[list[int]]:
    """Cut windows of context + 1 tokens from a text, at equal distances; they do not overlap."""
    count = min(flags.eval_windows, (len(heldout) - 1) // flags.context)
    last = len(heldout) - flags.context - 1
    starts = [round(index * last / max(count - 1, 1)) for index in range(count)]
    return [heldout[start : start + flags.context + 1].tolist() for start in starts]


@torch.no_grad()
def choices(network: SkipNetwork, states: Tensor, model: Transformer, seed: int) -> dict[str, Tensor]:
    """Choose the sublayers that the policy and its controls keep after each of states [N, D]: each bool [N, 2L]."""
    logits = network(states)
    learned, generator = network.sublayers(logits > 0), torch.Generator().manual_seed(seed)
    share = layers_skipped(learned, model).mean() / model.args.n_layer
    random = torch.rand(logits.shape, generator=generator).to(logits.device) >= share
    one_set = network.sublayers(logits.mean(0) > 0).expand_as(learned)
    return {"learned": learned, "random": network.sublayers(random), "one_set": one_set}


@torch.no_grad()
def judge_policies(
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
    by_set: dict[tuple[str, str], list[dict]] = {(name, who): [] for name in chosen for who in chosen[name]}
    for index, text in enumerate(tqdm(texts, desc="held-out windows", leave=False)):
        window = Window(model, text)
        part = slice(index * len(window.rows), (index + 1) * len(window.rows))
        for name, who in by_set:
            keep = chosen[name][who][part]
            outcome = window.judge(keep)
            by_set[name, who].append(numbers(outcome, keep, rewards[name](outcome, keep), model))
    rows = []
    for name, sets in chosen.items():
        row = {"alpha": name, **{who: mean(by_set[name, who]) for who in sets}}
        row |= {f"over_{who}": _difference(by_set[name, "learned"], by_set[name, who]) for who in CONTROLS}
        rows.append(row | {"distinct_sets": len(sets["learned"].unique(dim=0))})
    return rows


def _difference(rows: Sequence[dict], others: Sequence[dict]) -> dict[str, list[float | None]]:
    """Return of each number the mean of row - other, and its standard error (None of a single window)."""
    differences = {}
    for key in rows[0]:
        values = [row[key] - other[key] for row, other in zip(rows, others, strict=True)]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        differences[key] = [statistics.fmean(values), error]
    return differences


def choose_drafts(
    model: Transformer, texts: Sequence[list[int]], network: SkipNetwork, costs: RoundCosts, given: int | None
) -> dict:
    """Choose how many tokens a round should draft by the measured costs -> that number, and the expected speedup.

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
    rounds = list(zip(*(part.tolist() for part in keep[drafting].unique(dim=0, return_counts=True)), strict=True))
    drafted, idle = int(drafting.sum()), int((~drafting).sum())
    agreement = agrees[drafting].float().mean().item() if drafted else None

    def speedup(k: int) -> float:
        seconds = idle * costs.seconds([True] * keep.shape[1], 0)
        seconds += sum(count * costs.seconds(kept, k) for kept, count in rounds)
        return (idle + drafted * expected_tokens(agreement or 0.0, k)) * costs.plain / seconds

    best = given or max(DRAFTS, key=speedup)
    return {"num_draft_tokens": best, "expected_speedup": speedup(best), "own_text_agreement": agreement}


def prompts_of(text: Tensor, count: int) -> list[list[int]]:
    """Cut `count` prompts of PROMPT_TOKENS from a text, at equal distances."""
    most = len(text) - PROMPT_TOKENS
    return [text[start : start + PROMPT_TOKENS].tolist() for start in (i * most // count for i in range(count))]


def continue_prompt(runner: Runner, policy: DraftPolicy, prompt: Sequence[int], new_tokens: int) -> Generation:
    """Continue a prompt greedily, past any end of text."""
    return Generation.collect(decode(runner, prompt, GenerateConfig(new_tokens), policy))


def plain_texts(runner: Runner, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Return the tokens of plain decoding after each prompt."""
    plain = make_policy("none", runner.n_layer)
    return [continue_prompt(runner, plain, prompt, new_tokens).tokens for prompt in prompts]


def compare(
    engine: Engine,
    runner: Runner,
    policies: Sequence[DraftPolicy],
    prompts: Sequence[list[int]],
    new_tokens: int,
    repeats: int,
) -> list[dict]:
    """Continue every prompt with plain decoding and each policy in turns -> the numbers of each policy."""
    expected = plain_texts(runner, prompts, new_tokens)
    contenders = [engine.fastest_plain(), *((runner, policy) for policy in policies)]
    engine.warm_up()
    seconds = [[0.0] * repeats for _ in contenders]
    texts: list[list[Generation]] = [[] for _ in contenders]
    for turn in tqdm(range(repeats), desc="decoding", leave=False):
        texts = [[] for _ in contenders]
        for prompt in prompts:
            order = range(len(contenders))
            for i in order if turn % 2 else reversed(order):
                texts[i].append(continue_prompt(*contenders[i], prompt, new_tokens))
                seconds[i][turn] += texts[i][-1].decode_s
    return [decoding_numbers(texts[i], seconds[i], seconds[0], expected) for i in range(1, len(contenders))]


def decoding_numbers(
    texts: Sequence[Generation], seconds: Sequence[float], plain: Sequence[float], expected: Sequence[list[int]]
) -> dict:
    """Return the numbers of a policy: counts of its last turn, speeds as medians over turns.

    seconds, plain: of each turn, with the policy and with plain decoding. expected: the texts of plain decoding.
    """
    sums = totals(step for text in texts for step in text.rounds)
    return {
        "drafted": sums.drafted,
        "accepted": sums.accepted,
        "acceptance_rate": sums.acceptance_rate,
        "tokens_per_round": sums.tokens_per_round,
        "tokens_per_s": sums.tokens / statistics.median(seconds),
        "speedup": statistics.median(a / b for a, b in zip(plain, seconds, strict=True)),
        "identical": [text.tokens for text in texts] == expected,
    }


def print_rows(rows: Sequence[dict], title: str, n_layer: int) -> None:
    """Print two tables: first drafts on held-out text, and decoding."""
    shown, body = cli.shown, []
    for row in rows:
        for who, label in ({"learned": "learned"} | CONTROLS).items():
            means = row[who]
            body.append(
                [
                    f"{row['alpha']} {label}",
                    shown(means["skipped"], ".2f"),
                    shown(means["reward"], ".3f"),
                    shown(means["kl"], ".3f"),
                    shown(means["ce"], ".3f"),
                    shown(means["agreement"], ".3f"),
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


def draw_picture(rows: Sequence[dict], n_layer: int, picture: Path, title: str) -> None:
    """Draw what leaving out layers costs, in loss and in drafts that are right, as a PNG. See `pictures.pyplot`."""
    if (pyplot := pictures.pyplot(picture)) is None:
        return
    figure, plots = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    styles = {
        "learned": ("o-", "tab:blue", "learned: chosen anew by the state"),
        "random": ("x--", "tab:red", "at random, as many layers"),
        "one_set": ("^:", "tab:green", "learned, but one set for all"),
    }
    for plot, key in zip(plots, ("kl", "agreement"), strict=True):
        for who, (style, colour, label) in styles.items():
            points = sorted((row[who]["skipped"], row[who][key]) for row in rows)
            plot.plot(*pictures.columns(points), style, color=colour, label=label)
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
        *pictures.columns(accepted),
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
    pictures.save(figure, picture)
