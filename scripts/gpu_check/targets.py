"""The targets of the GPU path, in one table, and the judgement of a run of `gpu_check`. A missed target is no error."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cli

STATIC = r"static:\d+,num_draft_tokens=\d+"
ONE_PLAN = f"none|{STATIC}"  # policies whose rounds are all alike


@dataclass(frozen=True)
class Target:
    """A bound for numbers of some sections.

    sections: a regular expression for their names. figures: takes a section's result and returns numbers, all of which
    should be at least (or, if not at_least, at most) `bound`.
    """

    name: str
    sections: str
    bound: float
    figures: Callable[[dict], Iterable[float | None]]
    at_least: bool = True

    def judge(self, sections: dict[str, dict]) -> dict:
        """Return the worst figure of each section, the worst of all, and if that will do (None: not measured)."""
        worst = min if self.at_least else max
        by_section = {}
        for name, section in sections.items():
            if re.fullmatch(self.sections, name) and "rows" in section:
                figures = [figure for figure in self.figures(section) if figure is not None]
                by_section |= {name: worst(figures)} if figures else {}
        where = worst(by_section, key=by_section.get) if by_section else None
        measured = by_section.get(where)
        met = None if measured is None else (measured >= self.bound if self.at_least else measured <= self.bound)
        return {
            "target": self.name,
            "wanted": f"{'≥' if self.at_least else '≤'} {self.bound:g}",
            "measured": measured,
            "worst_in": where,
            "met": met,
            "by_section": by_section,
        }


def of_rows(key: str, policies: str) -> Callable[[dict], Iterable[float | None]]:
    """Return a function for the values of `key` in rows of policies that match a regular expression."""
    return lambda section: [row[key] for row in section["rows"] if re.fullmatch(policies, row["policy"])]


def of_heads(mode: str) -> Callable[[dict], Iterable[float | None]]:
    return lambda section: [row["share_of_bandwidth"] for row in section["rows"] if row["shape"].endswith(mode)]


def head_over_matmul(section: dict) -> Iterable[float]:
    return [row["us"] / row["matmul_us"] for row in section["rows"]]


def other_graphs(section: dict) -> Iterable[float]:
    """Count how many graphs more or less than one a round starts; the last ones of a text start no follower."""
    return [abs(graphs - 1) for graphs in of_rows("graph_launches", ONE_PLAN)(section) if graphs is not None]


def peak_over_needed(section: dict) -> Iterable[float | None]:
    return [section["memory"]["peak_over_needed"]] if "memory" in section else []


def different_texts(section: dict) -> Iterable[int]:
    exact = [check["ok"] for check in section["checks"] if check["name"].startswith("exact: ")]
    return [exact.count(False)] if exact else []


TARGETS = (
    Target("texts that differ from plain decoding's", "engine .*", 0, different_texts, at_least=False),
    *(
        Target(
            f"plain decoding, share of copy bandwidth, {mode}",
            f"engine (?!1B).* {mode}",  # a model of 1B is mostly a head
            bound,
            of_rows("share_of_bandwidth", "none"),
        )
        for mode, bound in (("bf16", 0.90), ("int8", 0.85), ("int4", 0.75))
    ),
    Target("static drafts, share of the ideal speedup", "engine .*", 0.95, of_rows("share_of_ideal", STATIC)),
    *(
        Target(f"exit head, share of copy bandwidth, {mode}", "kernels exit_head", bound, of_heads(mode))
        for mode, bound in (("bf16", 0.90), ("int8", 0.85))
    ),
    Target("exit head, time ÷ that of the fastest matmul alone", "kernels exit_head", 1.03, head_over_matmul, False),
    Target("plain and static: graphs started a round, off one", "profile .*", 0.15, other_graphs, at_least=False),
    Target("plain and static: blocking waits within a round", "profile .*", 0, of_rows("syncs", ONE_PLAN), False),
    Target("peak memory ÷ (weights + cache)", "engine .*", 1.10, peak_over_needed, at_least=False),
)


def judge_all(sections: dict[str, dict]) -> list[dict]:
    return [target.judge(sections) for target in TARGETS]


def print_targets(judged: list[dict]) -> None:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [
        [
            target["target"],
            target["wanted"],
            cli.shown(target["measured"], ".3f"),
            target["worst_in"] or "–",
            words[target["met"]],
        ]
        for target in judged
    ]
    cli.print_table("targets", ["target", "wanted", "worst", "in", ""], rows)
