"""Convert a Hugging Face Llama, a folder or a hub id, into a folder (or one file) in our format.

Weights are streamed through `writing.convert`, so a model larger than memory converts, too. The output folder gets
the tokenizer, chat template and configs beside the weights, everything that `checkpoint.load` and the tokenizer need.
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from errors import UserError
from kernels.formats import PLAIN, Format
from loading import checkpoint, writing
from loading.files import check_writable, write_json

COPIED = (
    "tokenizer*",
    "*.model",
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
    """A folder "skipfast" inside a local checkpoint; checkpoints/org/name for a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return (path if path.is_dir() else path.parent) / "skipfast"
    return Path("checkpoints") / source


def copied_files(source: checkpoint.Source) -> dict[str, Path]:
    """The files that a converted checkpoint takes over as they are: name -> path."""
    return {file.name: file for pattern in COPIED for file in source.folder.glob(pattern) if file.is_file()}


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

    format, read: see `writing.convert`. All files are complete in a temporary folder before the first is moved into
    place. Raises UserError for a user's mistake.
    """
    output = Path(output).expanduser()
    opened = checkpoint.open_source(source)
    target = check_output(opened, output, force)
    folder, as_file, copied = target.parent, target == output, copied_files(opened)
    dtype = checkpoint.resolve_dtype(opened.args, checkpoint.DTYPES.get(precision))

    started = time.perf_counter()
    beside = folder if folder.exists() else folder.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".convert-", suffix=".tmp", dir=beside))
    except OSError as error:
        raise UserError(f"cannot write output_path {output}: {error.strerror}") from None
    try:
        with tqdm(unit="tensor", file=sys.stderr, disable=None) as bar:  # None: only on a terminal

            def progress(done: int, total: int, name: str) -> None:
                bar.total = total
                bar.set_postfix_str(name, refresh=False)
                bar.update(1)

            size = writing.convert(opened, staging / target.name, dtype, progress, format, read)
        written = checkpoint.open_source(staging / target.name)
        for name, file in copied.items():
            shutil.copyfile(file, staging / name)
        if not as_file:
            write_json(staging / "config.json", written.hf_config)
            write_json(staging / "generation_config.json", written.generation_config)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == target.name):  # the weights last
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "source": source,
        "output": str(output),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": size,
        "tensors": len(written.files),
        "copied": sorted(copied),
        "seconds": round(time.perf_counter() - started, 3),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face Llama into skipfast's format.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint_path", required=True, metavar="FOLDER_OR_HUB_ID", help="what to convert")
    parser.add_argument(
        "--output_path",
        type=Path,
        help="a folder, or a file ending in .safetensors "
        "(default: FOLDER/skipfast, or checkpoints/org/name for a hub id)",
    )
    parser.add_argument("--precision", choices=checkpoint.DTYPES, help="dtype of the weights (default: as they are)")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--json", type=Path, help="write a record of the conversion to this file")
    options = parser.parse_args(argv)
    try:
        check_writable(options.json)
        output = options.output_path or default_output(options.checkpoint_path)
        record = convert(options.checkpoint_path, output, options.precision, options.force)
        if options.json:
            write_json(options.json, record)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {record['output']}: {record['tensors']} tensors, {record['bytes'] / 1e9:.3f} GB {record['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
