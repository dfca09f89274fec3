"""The flags of `scripts.benchmark`, and what no run can have."""

import argparse
from collections.abc import Sequence

import cli
from decoding.engine import DEVICES, chosen_device
from errors import UserError
from scripts.benchmark import peers
from scripts.benchmark.prompts import set_names
from scripts.common import policy_sets, samples


def parse_flags(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Parse and check the command line. Afterwards `devices` names each device, "auto" resolved, `device` the first."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=description,
        epilog="example: python -m scripts.benchmark --policies all --prompts code --output_dir out",
    )
    cli.add_model_flags(parser, device=False, quantize=False)
    cli.add_decode_flags(parser)
    add_contender_flags(parser)
    add_text_flags(parser)
    samples.add_sample_flags(parser, dataset=None)
    add_output_flags(parser)
    flags = parser.parse_args(argv)
    check_flags(flags)
    flags.ignore_eos = True  # every row must decode the same number of tokens
    flags.devices = [chosen_device(device, cli.notice) for device in flags.devices or ["auto"]]
    if len(set(flags.devices)) < len(flags.devices):
        raise UserError(f"--device must name each device once, got {', '.join(flags.devices)}")
    flags.device = flags.devices[0]  # of other engines, too
    return flags


def add_contender_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is measured."""
    comma = lambda text: text.split(",")
    add = parser.add_argument
    add(
        "--device",
        dest="devices",
        action="append",
        choices=DEVICES,
        help="measure on this device (repeatable; default: cuda where torch sees a GPU)",
    )
    add(
        "--quantize",
        dest="formats",
        action="append",
        metavar="FORMAT",
        help="measure with weights of this format: none, int8, int4, … (repeatable; default: none)",
    )
    add(
        "--policy",
        action="append",
        default=[],
        metavar="NAME:key=value,…",
        help="repeatable; default: auto and static:L/4",
    )
    add(
        "--policies",
        default=[],
        type=comma,
        metavar="SET,…",
        help="all: every policy with its default settings, and some combinations; "
        "grid: static exits and numbers of drafts, and how near auto comes to the best of them",
    )
    add(
        "--no_verify",
        action="store_true",
        help="also a row of early exit for each policy that can: another text than the full model's",
    )
    add(
        "--against",
        default=[],
        type=comma,
        metavar="ENGINE,…",
        help="other engines to measure: " + ", ".join(peers.NEEDS),
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=True)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is decoded, how often, and who shares the work."""
    add = parser.add_argument
    add(
        "--prompts",
        metavar="FILE",
        help=".txt (a line each), .jsonl (`prompt`) or .json (`ids`), or one of benchmarks/prompts: "
        + ", ".join(set_names()),
    )
    add("--num_prompts", type=int, metavar="N", help="only the first N")
    add(
        "--split",
        choices=["model", "samples"],
        default="model",
        help="what torchrun's processes share: one model (tensor parallelism), or the samples, with a whole model each",
    )
    add("--repeats", type=int, default=5, help="timed rounds")
    add(
        "--prompt_lengths",
        default=[],
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="N,…",
        help="also time prefill and plain decoding after prompts of these lengths, as in 100,512,2000",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is written."""
    parser.add_argument("--picture", metavar="PATH", help="draw the rows of drafting policies as a PNG")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="also write DIR/benchmark.json, samples.jsonl and policies.png, and go on with a run of "
        "the same settings that was killed",
    )


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for the first flag that no run can have."""
    if flags.max_new_tokens < 2:
        raise UserError(f"max_new_tokens must be 2 or more to time decoding, got {flags.max_new_tokens}")
    for name, value in (("num_prompts", flags.num_prompts), ("repeats", flags.repeats)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    samples.check_sample_flags(flags, without="prompts")
    if unknown := set(flags.against) - set(peers.NEEDS):
        raise UserError(f"--against knows {', '.join(peers.NEEDS)}, got {', '.join(sorted(unknown))}")
    if min(flags.prompt_lengths, default=1) < 1:
        raise UserError(f"prompt_lengths must be 1 or more, got {min(flags.prompt_lengths)}")
    if flags.no_verify and flags.draft_vocab is not None:
        raise UserError("--no_verify does not go with --draft_vocab")
    if flags.no_verify and flags.verification == "rejection":
        raise UserError("--no_verify does not go with --verification rejection: there is nothing to accept or reject")
    policy_sets.check_sets(flags.policies)
