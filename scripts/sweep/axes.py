"""The two axes of a sweep, and the policies of its cells."""

from errors import UserError
from scripts.common import policy_sets


class Axis:
    """A key of the policy and its values, from `KEY=v1,v2,…` or `KEY=first-last` (whole numbers)."""

    def __init__(self, text: str):
        self.key, equals, values = text.partition("=")
        first, dash, last = values.partition("-")
        if dash and first.isdigit() and last.isdigit():
            self.values = [str(value) for value in range(int(first), int(last) + 1)]
        else:
            self.values = [value for value in values.split(",") if value]
        if not (self.key and equals and self.values):
            raise UserError(f"an axis must be KEY=v1,v2,… or KEY=first-last, got {text!r}")
        if len(set(self.values)) < len(self.values):
            raise UserError(f"an axis must have each value once, got {text!r}")

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


def default_exits(n_layer: int) -> str:
    """Return the axis of exit layers up to half of the model."""
    return "exit_layer=" + ",".join(map(str, policy_sets.exit_layers(n_layer)))


def cell_text(policy: str, y: str, x: str) -> str:
    """Make the policy string of a cell from the base and two `key=value` settings."""
    return policy + (":" if ":" not in policy.rpartition("+")[2] else ",") + f"{y},{x}"


def check_different(policies: dict[str, str]) -> None:
    """Raise UserError if two cells are one policy. policies: of each cell, by the text that made it."""
    first: dict[str, str] = {}
    for text, policy in policies.items():
        if (other := first.setdefault(policy, text)) != text:
            raise UserError(f"--y and --x must make another policy of each cell, but {other} and {text} are the same")
