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
from drafting.policy import DraftPolicy
from errors import UserError
from loading.files import write_json
from scripts.common import ranks
from scripts.common.experiment import Experiment, add_flags


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first place where two texts differ, the end of the shorter included; None: nowhere."""
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(len(first), len(second)) if place is None and len(first) != len(second) else place


def count_errors(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many tokens differ, place by place; a missing or a superfluous one is an error, too."""
    return sum(a != b for a, b in zip(expected, got, strict=False)) + abs(len(expected) - len(got))


def margin(run: Experiment, tokens: Sequence[int], expected: int, got: int) -> dict:
    """What the full model says after `tokens` -> logits of both tokens and their difference, and of the best two.

    Logits as they are, before temperature and noise. Overwrites the cache.
    """
    runner = run.runner(run.policy("none"))
    logits = runner.exit(runner.prefill(tokens)).logits()[0].float()
    best = logits.topk(2).values.tolist()
    return {
        "expected_logit": logits[expected].item(),
        "got_logit": logits[got].item(),
        "margin": (logits[expected] - logits[got]).item(),
        "top2_margin": best[0] - best[1],
    }


def compare(run: Experiment, number: int, prompt: list[int], policies: dict[str, DraftPolicy]) -> dict[str, dict]:
    """Decode one sample plainly and with each policy -> by policy, how many of its tokens differ, and where first."""
    expected = run.decode(run.policy("none"), prompt).tokens
    found = {}
    for name, policy in policies.items():
        generation = run.decode(policy, prompt)
        got, summary = generation.tokens, generation.summary(run.session.model)
        one = {name: summary[name] for name in ("drafted", "accepted", "rounds")}
        one |= {"sample": number, "tokens": len(expected), "errors": count_errors(expected, got), "first": None}
        if (place := first_difference(expected, got)) is not None:
            a, b = (text[place] if place < len(text) else None for text in (expected, got))
            one["first"] = {
                "position": place,
                "expected": a,
                "got": b,
                "expected_text": shown_token(run, a),
                "got_text": shown_token(run, b),
            }
            if a is not None and b is not None:
                one["first"] |= margin(run, [*prompt, *expected[:place]], a, b)
        found[name] = one
    return found


def shown_token(run: Experiment, token: int | None) -> str | None:
    return None if token is None else run.session.tokenizer.decode([token], continues=True)


def summary(name: str, found: Sequence[dict]) -> dict:
    """The totals of a policy over its samples. error_share: of the tokens that plain decoding wrote."""
    total = {key: sum(one[key] for one in found) for key in ("tokens", "errors", "drafted", "accepted", "rounds")}
    return {
        "policy": name,
        **total,
        "error_share": total["errors"] / total["tokens"],
        "samples": len(found),
        "samples_that_differ": sum(one["errors"] > 0 for one in found),
        "acceptance_rate": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "first_differences": [{"sample": one["sample"], **one["first"]} for one in found if one["first"]],
    }


def print_rows(rows: Sequence[dict], title: str) -> None:
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
        for one in row["first_differences"][:1]:
            print(
                f"{row['policy']}: first difference in sample {one['sample']}, token {one['position']}: "
                f"{one['expected_text']!r} became {one['got_text']!r}, logit margin "
                f"{cli.shown(one.get('margin'), '.4f')}"
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
    with ranks.joined() as group:
        flags = parse_flags()
        run = Experiment(flags, group)
        names = dict.fromkeys(flags.policy or ["auto", f"static:{max(1, run.n_layer // 4)}"])
        policies = {name: run.policy(name) for name in names}
        run.load([run.policy("none"), *policies.values()])
        for policy in policies.values():
            run.calibrate(policy)
        work = lambda sample: compare(run, sample[0].number, sample[1], policies)
        found = list(tqdm(group.each(run.samples, work), total=len(run.samples), desc="samples", leave=False))
        rows = [summary(name, [one[name] for one in found]) for name in policies]
        if group.leads:
            print_rows(rows, run.title())
            result = {
                "title": run.title(),
                "rows": rows,
                "identical": not any(row["errors"] for row in rows),
                **run.config_json(),
            }
            for path in filter(None, (flags.json, run.folder / "correctness.json")):
                write_json(path, result)
        if any(row["errors"] for row in rows):
            sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
