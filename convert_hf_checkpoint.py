"""Convert a Hugging Face Llama, a folder or a hub id, into a folder (or one file) in our format.

Weights are streamed one tensor at a time, so a model larger than memory can be converted. The tokenizer, the chat
template and the configs are put beside them: the output is complete.
"""

import argparse
import filecmp
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import cli
from errors import UserError
from kernels.formats import PLAIN, Format
from loading import checkpoint, writing
from loading.files import check_writable, write_json
from loading.progress import LoadBar

COPIED = (
    "tokenizer*",
    "*.model",
    "original/tokenizer.model",  # where Hugging Face folders of Llama 3 have Meta's own file
    "*.jinja",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
)
EXAMPLE = """example:
  python convert_hf_checkpoint.py --checkpoint_path checkpoints/demo --output_path /tmp/demo --precision fp32"""


def default_output(source: str) -> Path:
    """Choose the output folder: "skipfast" inside a local checkpoint, checkpoints/org/name for a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return (path if path.is_dir() else path.parent) / "skipfast"
    return Path("checkpoints") / source


def copied_files(source: checkpoint.Source) -> dict[str, Path]:
    """List the files that a converted checkpoint takes over as they are: name inside its folder -> path."""
    files = (file for pattern in COPIED for file in source.folder.glob(pattern) if file.is_file())
    return {str(file.relative_to(source.folder)): file for file in files}


def check_output(source: checkpoint.Source, output: Path, force: bool) -> Path:
    """Return the file that will hold the weights. Raises UserError unless `output` may be written."""
    output = output.expanduser()
    as_file = output.suffix == ".safetensors"
    if not force and output.exists() and (as_file or not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_path {output} exists already: choose another or pass --force")
    if output.exists() and output.is_dir() == as_file:
        raise UserError(f"output_path {output} is a {'folder' if as_file else 'file'}, cannot be replaced")
    target = output if as_file else output / checkpoint.WEIGHTS
    if target.resolve() in {file.resolve() for file in source.files.values()} or (
        not as_file and output.resolve() == source.folder.resolve()
    ):
        raise UserError(f"output_path {output} is the source itself: choose another")
    if as_file and not force:
        for name, file in copied_files(source).items():
            there = target.parent / name
            if there.exists() and not filecmp.cmp(file, there, shallow=False):
                raise UserError(f"{there} belongs to another model: choose an output_path in another folder")
    return target


def convert(
    source: str,
    output: Path,
    precision: str | None,
    force: bool,
    format: Format = PLAIN,
    read: writing.ReadWeights | None = None,
) -> dict:
    """Convert `source` to the folder or .safetensors file `output`; returns what was done, for --json.

    format, read: see `writing.convert`. All files are complete in a temporary folder before the first one is moved into
    place. Raises UserError for a user's mistake.
    """
    output = Path(output).expanduser()
    opened = checkpoint.open_source(source)
    target = check_output(opened, output, force)
    copied = copied_files(opened)
    dtype = checkpoint.resolve_dtype(opened.args, checkpoint.DTYPES.get(precision))

    started, bar, staging = time.perf_counter(), LoadBar("converting"), None
    try:
        beside = target.parent if target.parent.exists() else target.parent.parent
        beside.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".convert-", suffix=".tmp", dir=beside))
        size = writing.convert(opened, staging / target.name, dtype, bar, format, read)
        written = checkpoint.open_source(staging / target.name)
        for name, file in copied.items():
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, staging / name)
        if target != output:
            write_json(staging / "config.json", written.hf_config)
            write_json(staging / "generation_config.json", written.generation_config)
        move_files(staging, target)
    except OSError as error:
        raise UserError(f"cannot write output_path {output}: {error.strerror}") from error
    finally:
        bar.close()
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
    return {
        "source": source,
        "output": str(output),
        "dtype": checkpoint.dtype_name(dtype),
        "bytes": size,
        "tensors": len(written.files),
        "copied": sorted(copied),
        "seconds": round(time.perf_counter() - started, 3),
        "torch": torch.__version__,
    }


def move_files(staging: Path, target: Path) -> None:
    """Move all files of a folder to the folder of `target`; that one, the weights, comes last."""
    names = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
    for name in sorted(names, key=lambda name: str(name) == target.name):
        (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(target.parent / name)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face Llama into skipfast's format.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint_path", required=True, metavar="FOLDER_OR_HUB_ID", help="what to convert")
    parser.add_argument(
        "--output_path",
        type=Path,
        metavar="PATH",
        help="a folder, or a file ending in .safetensors "
        "(default: FOLDER/skipfast, or checkpoints/org/name for a hub id)",
    )
    parser.add_argument(
        "--precision", choices=checkpoint.DTYPES, help="dtype of the weights (default: the checkpoint's own)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", metavar="PATH", help="write a record of the conversion here as one JSON object")
    return parser.parse_args(argv)


def main() -> None:
    flags = parse_flags()
    check_writable(flags.json)
    output = flags.output_path or default_output(flags.checkpoint_path)
    record = convert(flags.checkpoint_path, output, flags.precision, flags.force)
    if flags.json:
        write_json(flags.json, record)
    print(f"wrote {record['output']}: {record['tensors']} tensors, {record['bytes'] / 1e9:.3f} GB {record['dtype']}")


if __name__ == "__main__":
    cli.run(main)
