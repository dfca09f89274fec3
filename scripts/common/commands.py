"""The flags that decide what is decoded, and the generate.py command that decodes so again."""

import argparse
import shlex
from collections.abc import Iterable

import cli

WITHOUT_EFFECT = {"json", "max_new_tokens", "ignore_eos"}  # on how a token is decoded


def decode_defaults() -> dict:
    """Return the flags of a model and of decoding, by name, with their defaults."""
    parser = argparse.ArgumentParser()
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    return vars(parser.parse_args([]))


def generate_command(flags: argparse.Namespace, policy: str, names: Iterable[str] | None = None) -> str:
    """Return the generate.py command that decodes by a policy, with those flags of a program that differ from defaults.

    names: the flags that may stand in it (default: all that say how to decode).
    """
    defaults, words = decode_defaults(), ["python", "generate.py"]
    for name in names or [name for name in defaults if name not in WITHOUT_EFFECT]:
        value = getattr(flags, name)
        if value != defaults[name] and f"{name}=" not in policy:  # the policy may say it itself
            words += [f"--{name}", str(value)]
    if not flags.compile:
        words.append("--no-compile")
    return shlex.join([*words, "--policy", policy])
