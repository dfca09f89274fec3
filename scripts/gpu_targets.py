"""The targets of the GPU path: one table, and what a run of `gpu_check` says about each. A missed one is no error."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cli

PLAIN, STATIC = "none", r"static:\d+,num_draft_tokens=\d+"  # policies whose rounds all have one plan


def of_policies(policies: str, key: str) -> Callable[[dict], Iterator[float | None]]:
    """The values of `key` in the rows of policies that match a regular expression."""
    return lambda section: (row[key] for row in section["rows"] if re.fullmatch(policies, row["policy"]))


def plain_share(mode: str, bound: float) -> "Target":
    """Of the models whose layers are large: those of 1B are mostly a head."""
    figures = of_policies(PLAIN, "share_of_bandwidth")
    return Target(f"plain decoding, share of copy bandwidth, {mode}", f"engine (?!1B).* {mode}", bound, figures)


def head_share(mode: str, bound: float) -> "Target":
    name, sections = f"exit head, share of copy bandwidth, {mode}", "kernels exit_head"
    return Target(name, sections, bound, head_shares(mode))


def other_graphs(section: dict) -> Iterator[float]:
    """How many graphs more or less than one a round of one plan starts."""
    launches = of_policies(f"{PLAIN}|{STATIC}", "graph_launches")(section)
    return (abs(launched - 1) for launched in launches if launched is not None)


def head_shares(mode: str) -> Callable[[dict], Iterator[float | None]]:
    return lambda section: (row["share_of_bandwidth"] for row in section["rows"] if row["shape"].endswith(mode))


def head_over_matmul(section: dict) -> Iterator[float]:
    return (row["us"] / row["matmul_us"] for row in section["rows"])


def memory_over_needed(section: dict) -> list[float | None]:
    return [section["memory"]["peak_over_needed"]] if "memory" in section else []


def differing_texts(section: dict) -> list[int]:
    exact = [check["ok"] for check in section["checks"] if check["name"].startswith("exact: ")]
    return [exact.count(False)] if exact else []


@dataclass(frozen=True)
class Target:
    """figures: of one section's result, all of which should be at least (or, if not at_least, at most) `bound`.

    sections: a regular expression for the names of the sections that it is about.
    """

    name: str
    sections: str
    bound: float
    figures: Callable[[dict], Iterator[float | None] | list]
    at_least: bool = True

    def judge(self, sections: dict[str, dict]) -> dict:
        """The worst figure of each section, the worst of all, and whether it will do (None: not measured)."""
        worst = min if self.at_least else max
        found = {}
        for name, section in sections.items():
            if re.fullmatch(self.sections, name) and "rows" in section:
                figures = [figure for figure in self.figures(section) if figure is not None]
                found |= {name: worst(figures)} if figures else {}
        where = worst(found, key=found.get) if found else None
        measured = found.get(where)
        met = None if measured is None else (measured >= self.bound if self.at_least else measured <= self.bound)
        return {"target": self.name, "wanted": f"{'≥' if self.at_least else '≤'} {self.bound:g}", "measured": measured,
                "worst_in": where, "met": met, "by_section": found}  # fmt: skip


TARGETS = (
    Target("texts that differ from plain decoding's", "engine .*", 0, differing_texts, at_least=False),
    plain_share("bf16", 0.90),
    plain_share("int8", 0.85),
    plain_share("int4", 0.75),
    Target("static drafts, share of the ideal speedup", "engine .*", 0.95, of_policies(STATIC, "share_of_ideal")),
    head_share("bf16", 0.90),
    head_share("int8", 0.85),
    Target("exit head, time ÷ that of the fastest matmul alone", "kernels exit_head", 1.03, head_over_matmul, False),
    Target("one plan: graphs started a round, but for one", "profile .*", 0, other_graphs, at_least=False),
    Target("one plan: blocking waits within a round", "profile .*", 0, of_policies(f"{PLAIN}|{STATIC}", "syncs"), False),
    Target("peak memory ÷ (weights + cache)", "engine .*", 1.10, memory_over_needed, at_least=False),
)


def judge_all(sections: dict[str, dict]) -> list[dict]:
    return [target.judge(sections) for target in TARGETS]


def print_targets(judged: list[dict]) -> None:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = [[each["target"], each["wanted"], cli.shown(each["measured"], ".3f"), each["worst_in"] or "–",
             words[each["met"]]] for each in judged]  # fmt: skip
    cli.print_table("targets", ["target", "wanted", "worst", "in", ""], rows)
