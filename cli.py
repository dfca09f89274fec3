"""Serve programs at the terminal: flags, loading with progress, one-line errors, streamed text, tables.

Nothing here decides anything about decoding. Every program calls `run(main)`, which turns a user's
mistake (UserError) into one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table

import tp
from decoding.engine import DEMO, DEVICES, Engine, EngineConfig
from decoding.sampling import VERIFICATIONS, SamplingConfig
from decoding.text import TextStream
from drafting.plan import Round
from errors import UserError
from kernels import cpu
from loading import checkpoint
from loading.files import read_text
from loading.progress import LoadBar
from loading.tokenizer import Tokenizer

STYLES = {"accepted": "green", "target": "blue", "rejected": "red strike"}


def run(main: Callable[[], None]) -> None:
    """Call a program's main; a user's mistake, also memory asked for that is not there, becomes `error: …` and exit
    code 2, Ctrl-C exit code 130."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[0]
        print(
            f"error: device cuda: {what}. Fewer tokens, --quantize int8 or int4, or no --draft_quantize need less",
            file=sys.stderr,
        )
        sys.exit(2)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def notice(line: str) -> None:
    """Tell the user one line that is not a result (stderr: stdout may be piped)."""
    print(line, file=sys.stderr, flush=True)


def add_model_flags(parser: argparse.ArgumentParser, device: bool = True, quantize: bool = True) -> None:
    """Add --checkpoint_path --precision --threads --json; --device and --quantize unless the program has its own."""
    parser.add_argument(
        "--checkpoint_path",
        default=str(DEMO),
        metavar="PATH",
        help="converted file or folder, Hugging Face folder, or hub id (default: the bundled demo)",
    )
    if device:
        parser.add_argument("--device", default="auto", choices=DEVICES, help="default: cuda where torch sees a GPU")
    parser.add_argument("--precision", choices=list(checkpoint.DTYPES), help="default: the checkpoint's own")
    if quantize:
        parser.add_argument(
            "--quantize",
            metavar="FORMAT",
            help="weights while loading: int8, int4, or as in int4:group=64,lm_head=no,embedding=yes",
        )
    parser.add_argument("--threads", type=int, help="CPU threads (default: measured at start)")
    parser.add_argument("--json", metavar="PATH", help="write the results here as one JSON object")


def add_decode_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every program that decodes: length, sampling, verification, drafts, end of text."""
    sampling = SamplingConfig()
    parser.add_argument("--max_new_tokens", "--max_steps", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=sampling.temperature, metavar="T", help="0: greedy")
    parser.add_argument("--top_k", type=int, metavar="N")
    parser.add_argument("--top_p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=sampling.seed)
    parser.add_argument(
        "--verification",
        choices=VERIFICATIONS,
        default=sampling.verification,
        help="coupled: the sampled text is that of plain decoding; rejection: its distribution is",
    )
    parser.add_argument(
        "--num_draft_tokens",
        "--speculate_k",
        "--num_speculations",
        type=int,
        metavar="K",
        help="tokens drafted per round (default: the policy's own)",
    )
    parser.add_argument("--draft_vocab", type=int, metavar="N", help="drafts choose among the first N tokens only")
    parser.add_argument(
        "--draft_quantize",
        metavar="FORMAT",
        help="draft with copies of the early layers and the LM head of this format (int8, int4, …); "
        "the text stays that of the full model",
    )
    parser.add_argument("--ignore_eos", action="store_true", help="do not end at an end-of-text token")


def sampling_config(flags: argparse.Namespace) -> SamplingConfig:
    """Return how tokens are chosen: each field of SamplingConfig has a flag of its name in `add_decode_flags`."""
    return SamplingConfig(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(SamplingConfig)})


def engine_config(flags: argparse.Namespace, **changes) -> EngineConfig:
    """Return the settings that the flags ask for; flags that a program does not have keep their defaults."""
    names = {"checkpoint": "checkpoint_path", "dtype": "precision"}
    fields = [field.name for field in dataclasses.fields(EngineConfig)]
    given = {
        field: getattr(flags, names.get(field, field)) for field in fields if hasattr(flags, names.get(field, field))
    }
    return EngineConfig(**given | changes)


def open_engine(
    flags: argparse.Namespace, needs_tokenizer: bool = True, group: tp.Group | None = None, **changes
) -> Engine:
    """Open the engine that the flags ask for, with notices and progress on stderr. changes: other settings for it."""
    return Engine.open(engine_config(flags, **changes), needs_tokenizer, group, notice, LoadBar())


def eos_ids(flags: argparse.Namespace, engine: Engine) -> tuple[int, ...]:
    """Return the tokens that end a text; none with --ignore_eos."""
    return () if flags.ignore_eos else engine.eos_ids


def read_prompt(flags: argparse.Namespace, tokenizer: Tokenizer | None, default: str) -> list[int]:
    """Return the token ids of --prompt, --prompt_file or --prompt_ids, or of `default` if none was given."""
    if flags.prompt_ids is not None:
        try:
            return [int(part) for part in flags.prompt_ids.split(",")] if flags.prompt_ids.strip() else []
        except ValueError:
            raise UserError(f"prompt_ids must be whole numbers with commas, got {flags.prompt_ids!r}") from None
    text = default if flags.prompt is None else flags.prompt
    if flags.prompt_file is not None:
        text = read_text(flags.prompt_file)
    return tokenizer.apply_chat([{"role": "user", "content": text}]) if flags.chat else tokenizer.encode(text)


class TerminalText:
    """Print text while it is decoded; a stop string is never shown.

    Pass `take` to decode() as `finished` and every Round through `show`.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str] = (), show_drafts: bool = False):
        self.tokenizer, self.show_drafts = tokenizer, show_drafts
        self.stream = TextStream(tokenizer, stops)
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.pieces: list[str] = []  # of the tokens not shown yet
        self.queue: list[tuple[str, str | None]] = []  # (text, style) not printed yet
        self.printed = 0

    def take(self, token: int) -> bool:
        """Take the next token of the text; return True if a stop string is complete."""
        before = len(self.stream.text)
        ends = self.stream.take(token)
        self.pieces.append(self.stream.text[before:])
        return ends

    def show(self, round: Round) -> Round:
        """Print what a Round emitted; return it, so that a stream can pass through."""
        pieces, self.pieces = self.pieces, []
        for index, piece in enumerate(pieces):
            style = None
            if self.show_drafts:
                if index == round.accepted and round.accepted < len(round.drafted) and self.console.is_terminal:
                    self._show_rejected(round)
                style = STYLES["accepted" if index < round.accepted else "target"]
            self.queue.append((piece, style))
        self._print(self.stream.safe_end)
        return round

    def _show_rejected(self, round: Round) -> None:
        rejected = round.drafted[round.accepted :]
        text = self.tokenizer.decode(rejected, continues=True) if self.tokenizer else " ".join(map(str, rejected))
        self._print(self.stream.safe_end)  # what may begin a stop string stays held back
        self.console.print(text.replace("\n", "⏎"), style=STYLES["rejected"], end="")

    def write(self, text: str, style: str | None = None) -> None:
        """Print `text` as it is: console.print alone would expand tabs and drop carriage returns and form feeds."""
        self.console.print(Segments([Segment(text, self.console.get_style(style) if style else None)]), end="")

    def _print(self, end: int) -> None:
        while self.queue and self.printed < end:
            piece, style = self.queue.pop(0)
            shown, rest = piece[: end - self.printed], piece[end - self.printed :]
            self.write(shown, style)
            self.printed += len(shown)
            if rest:
                self.queue.insert(0, (rest, style))
        sys.stdout.flush()

    def close(self) -> str:
        """Print the rest and return the whole text."""
        before = len(self.stream.text)
        text = self.stream.close()
        self.queue.append((self.stream.text[before:], None))
        self._print(len(text))
        self.console.print()
        return text


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: first column left, the others right."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200  # a pipe has no width: do not squeeze columns for it
    console = Console(highlight=False, emoji=False, width=width)
    console.print(title, style="bold", markup=False)  # a title of the table would be wrapped to its width
    console.print(table)


def shown(value, form: str = ".1f", none: str = "–") -> str:
    """Format a number for a table."""
    return none if value is None else format(value, form)


def environment() -> dict:
    """Return versions and hardware, as they stand in every JSON file."""
    packages = ("torch", "triton", "transformers", "sentencepiece", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu_kernels": cpu.loaded(),
        },
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
