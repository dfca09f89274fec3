"""Compare the tokens of policies with plain decoding's on a dataset: how many differ, where first, and by what margin.

Ends with exit code 1 if any token differs. Tokens are compared, not strings: one text may have two tokenisations. The
margin at a first difference says what kind of fault it is: near 0 the two tokens were nearly tied and rounding decided;
a wide one is a fault of the algorithm.
"""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

import cli
from decoding.generation import totals
from drafting.policy import DraftPolicy
from errors import UserError
from scripts.common import policy_sets
from scripts.common.experiment import Experiment, add_flags
from scripts.common.ranks import joined


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Return the first place where two texts differ, the end of the shorter included; None: nowhere."""
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(len(first), len(second)) if place is None and len(first) != len(second) else place


def count_errors(expected: Sequence[int], got: Sequence[int]) -> int:
    """Count how many tokens differ, place by place; a missing or a superfluous one is an error, too."""
    return sum(a != b for a, b in zip(expected, got, strict=False)) + abs(len(expected) - len(got))


def margin(experiment: Experiment, tokens: Sequence[int], expected: int, got: int) -> dict:
    """Ask the full model after `tokens` -> logits of both tokens and their difference, and of the best two.

    Logits as they are, before temperature and noise. Overwrites the cache.
    """
    runner = experiment.engine.runner(experiment.policy("none"))
    logits = runner.exit(runner.prefill(tokens)).logits()[0].float()
    best, second = logits.topk(2).values.tolist()
    return {
        "expected_logit": logits[expected].item(),
        "got_logit": logits[got].item(),
        "margin": (logits[expected] - logits[got]).item(),
        "top2_margin": best - second,
    }


def compare(
    experiment: Experiment, number: int, prompt: list[int], policies: dict[str, DraftPolicy]
) -> dict[str, dict]:
    """Decode one sample plainly and with each policy -> by policy, how many of its tokens differ, and where first."""
    expected = experiment.decode(experiment.policy("none"), prompt).tokens
    results = {}
    for name, policy in policies.items():
        generation = experiment.decode(policy, prompt)
        results[name] = {
            "sample": number,
            "tokens": len(expected),
            "errors": count_errors(expected, generation.tokens),
            "first": difference(experiment, prompt, expected, generation.tokens),
            "rounds": generation.rounds,
        }
    return results


def difference(experiment: Experiment, prompt: list[int], expected: Sequence[int], got: Sequence[int]) -> dict | None:
    """Describe the first token that differs, with its margin if both texts have one there; None if none differs."""
    place = first_difference(expected, got)
    if place is None:
        return None
    right, wrong = (text[place] if place < len(text) else None for text in (expected, got))
    described = {
        "position": place,
        "expected": right,
        "got": wrong,
        "expected_text": shown_token(experiment, right),
        "got_text": shown_token(experiment, wrong),
    }
    if right is None or wrong is None:
        return described
    return described | margin(experiment, [*prompt, *expected[:place]], right, wrong)


def shown_token(experiment: Experiment, token: int | None) -> str | None:
    return None if token is None else experiment.engine.tokenizer.decode([token], continues=True)


def summary(name: str, results: Sequence[dict]) -> dict:
    """Sum up a policy's results over its samples. error_share: of the tokens that plain decoding wrote."""
    tokens, errors = (sum(result[key] for result in results) for key in ("tokens", "errors"))
    sums = totals(round for result in results for round in result["rounds"])
    return {
        "policy": name,
        "tokens": tokens,
        "errors": errors,
        "drafted": sums.drafted,
        "accepted": sums.accepted,
        "rounds": sums.rounds,
        "error_share": errors / tokens,
        "samples": len(results),
        "samples_that_differ": sum(result["errors"] > 0 for result in results),
        "acceptance_rate": sums.acceptance_rate,
        "first_differences": [{"sample": r["sample"], **r["first"]} for r in results if r["first"]],
    }


def print_rows(rows: Sequence[dict], title: str) -> None:
    """Print the table of policies, and below it where each that errs does so first."""
    body = [
        [
            row["policy"],
            str(row["tokens"]),
            str(row["errors"]),
            cli.shown(row["error_share"], ".3%"),
            f"{row['samples_that_differ']} of {row['samples']}",
            cli.shown(row["acceptance_rate"], ".2f"),
        ]
        for row in rows
    ]
    columns = ("policy", "tokens", "errors", "share", "texts differ", "acceptance")
    cli.print_table(title, columns, body)
    for row in rows:
        for first in row["first_differences"][:1]:
            print(
                f"{row['policy']}: first difference in sample {first['sample']}, token {first['position']}: "
                f"{first['expected_text']!r} became {first['got_text']!r}, logit margin "
                f"{cli.shown(first.get('margin'), '.4f')}"
            )


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.correctness",
        description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.correctness --policy static:3 --policy auto --dataset code",
    )
    add_flags(parser, "out/correctness")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME:key=value,…",
        help="repeatable; default: auto and static:L/4",
    )
    flags = parser.parse_args(argv)
    if flags.temperature and flags.verification == "rejection":
        raise UserError(
            "verification rejection samples other tokens than plain decoding, of the same distribution: "
            "compare with --verification coupled"
        )
    return flags


def main() -> None:
    with joined() as ranks:
        flags = parse_flags()
        experiment = Experiment(flags, ranks)
        names = dict.fromkeys(flags.policy or ["auto", policy_sets.quarter(experiment.n_layer)])
        policies = {name: experiment.policy(name) for name in names}
        experiment.load([experiment.policy("none"), *policies.values()])
        work = lambda sample: compare(experiment, sample[0].number, sample[1], policies)
        samples = experiment.samples
        results = list(tqdm(ranks.each(samples, work), total=len(samples), desc="samples", leave=False))
        rows = [summary(name, [result[name] for result in results]) for name in policies]
        identical = not any(row["errors"] for row in rows)
        if ranks.leads:
            print_rows(rows, experiment.title)
            experiment.write_result("correctness.json", {"rows": rows, "identical": identical})
        if not identical:
            sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
