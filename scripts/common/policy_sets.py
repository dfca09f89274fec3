"""The policies that `scripts.benchmark` compares: named sets, expanded for a model, and what the grid concludes."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from decoding.runner import check_num_draft_tokens
from drafting.catalogue import ALIASES, POLICIES, make_policy
from drafting.policy import DraftPolicy
from errors import UserError
from model import ModelArgs

GRID_DEPTHS, GRID_DRAFTS = 8, range(1, 8)


def quarter(n_layer: int) -> str:
    """Return static drafting at a quarter of the layers, which the makers of LayerSkip recommend to start with."""
    return f"static:{max(1, n_layer // 4)}"


def every_policy(n_layer: int) -> list[str]:
    """List each policy (by its example if it has one), the ways to stop early, and combinations."""
    static = quarter(n_layer)
    texts = {name: kind.example or name for name, kind in POLICIES.items()}
    texts |= {"static": static, "layer_skip_proportion": "layer_skip_proportion:0.3", "skip_set": "skip_set"}
    del texts["learned"]  # without a file it is nothing
    return [
        *texts.values(),
        *ALIASES,
        f"{static},num_draft_tokens=5",
        f"{static},stop=0.6",
        f"{static},num_draft_tokens=7,stop=adaptive",
        f"{static},num_draft_tokens=7,stop=svip",
        "confidence:num_draft_tokens=7,stop=0.6",
        f"skip_set+static:{max(1, n_layer // 2)}",
        f"prompt_lookup+{static}",
    ]


def exit_layers(n_layer: int) -> list[int]:
    """List exit layers at equal distances up to half of the model, at most GRID_DEPTHS of them."""
    half = max(1, n_layer // 2)
    count = min(GRID_DEPTHS, half)
    return sorted({round(half * i / count) for i in range(1, count + 1)})


def grid(n_layer: int) -> list[str]:
    """List static drafting at depths up to L/2 with 1 to 7 drafts, and what should do without such a search."""
    statics = [f"static:{depth},num_draft_tokens={k}" for depth in exit_layers(n_layer) for k in GRID_DRAFTS]
    return [*statics, "prompt_lookup", f"prompt_lookup+{quarter(n_layer)}", "auto"]


SETS = {"all": every_policy, "grid": grid}


def check_sets(sets: Sequence[str]) -> None:
    """Raise UserError for a name of no set."""
    if unknown := [name for name in sets if name not in SETS]:
        raise UserError(f"policies must be among {', '.join(SETS)} (a single policy: --policy), got {unknown[0]!r}")


def default_skips(n_layer: int) -> dict[str, list[int]]:
    """Return what `skip_set` leaves out without a file: every third layer between the first quarter and the last."""
    layers = list(range(max(1, n_layer // 4), n_layer - 1, 3))
    return {"skip_attention": layers, "skip_mlp": layers}


def make_policies(
    sets: Sequence[str], texts: Sequence[str], args: ModelArgs, num_draft_tokens: int | None
) -> dict[str, DraftPolicy]:
    """Make the policies of `texts` (policy strings) and of the named sets, each once; without any, auto and static:L/4.

    Raises UserError for what `make_policy` refuses, and for more drafts than a runner takes.
    """
    wanted = [*texts, *(text for name in sets for text in SETS[name](args.n_layer))] or ["auto", quarter(args.n_layer)]
    policies = {}
    with tempfile.TemporaryDirectory() as folder:
        skips = Path(folder) / "skips.json"
        skips.write_text(json.dumps(default_skips(args.n_layer)), encoding="utf-8")
        for text in wanted:
            if text != "none" and text not in policies:  # plain decoding is always measured
                file = None if "learned" in text else str(skips)
                policies[text] = make_policy(text, args.n_layer, args.dim, num_draft_tokens=num_draft_tokens, file=file)
                check_num_draft_tokens(policies[text].num_draft_tokens)
    return policies


def best_of_grid(rows: Sequence[dict], n_layer: int) -> dict:
    """Name the static row of the grid that was fastest, and how near auto came: medians of the ratios inside a turn."""
    by_policy = {row["policy"]: row for row in rows if row["engine"] == "skipfast" and row["policy"] != "none"}
    statics = [by_policy[text] for text in grid(n_layer) if text.startswith("static:")]
    best, auto = max(statics, key=lambda row: row["tokens_per_s"]), by_policy["auto"]
    pairs = zip(auto["tokens_per_s_rounds"], best["tokens_per_s_rounds"], strict=True)
    return {
        "best_static": best["policy"],
        "auto_over_best_static": statistics.median(a / b for a, b in pairs),
        "best_static_over_fastest_ar": best["speedup_over_fastest_ar"],
        "auto_over_fastest_ar": auto["speedup_over_fastest_ar"],
    }


def print_grid(conclusion: dict) -> None:
    """Print what `best_of_grid` says, in a line."""
    print(
        f"best static: {conclusion['best_static']} ({conclusion['best_static_over_fastest_ar']:.2f}× fastest AR); "
        f"auto ÷ best static {conclusion['auto_over_best_static']:.3f}; "
        f"auto ÷ fastest AR {conclusion['auto_over_fastest_ar']:.2f}"
    )
