"""Measure and check the whole GPU path with one command and no checkpoint: kernels, engine, exactness, baselines.

Sections run in the order of `shapes.py` until --minutes are over. On a GPU they run in a process of their own: one that
dies, hangs or loses the GPU takes only its section along, and another goes on. Every number is in the JSON file as soon
as it is measured. Models have random weights and an acceptance dial (`models.py`). Exit code 1: a check or a section
failed; a missed target (`targets.py`) is a result.
"""

import argparse
import datetime
import faulthandler
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

import cli
from errors import UserError
from loading.files import check_writable, make_folder, write_json
from scripts.gpu_check.baselines import check_baselines
from scripts.gpu_check.engine import check_engine
from scripts.gpu_check.kernels import check_environment, check_kernels
from scripts.gpu_check.profile import check_profile
from scripts.gpu_check.report import Report
from scripts.gpu_check.shapes import FULL, TINY
from scripts.gpu_check.targets import judge_all, print_targets

SECTIONS = {
    "environment": check_environment,
    "kernels": check_kernels,
    "engine": check_engine,
    "profile": check_profile,
    "baselines": check_baselines,
}
SHAPES = {"full": FULL, "tiny": TINY}
WORN = 75  # exit code of a process that asks for a fresh one to go on


def work(report: Report) -> bool:
    """Run the sections that are left, as long as there is time -> True if a fresh process should go on."""
    torch.manual_seed(0)
    for name in sections_with(report.result, "not reached"):
        kind, *what = name.split()
        report.run(name, SECTIONS[kind], *what)
        if report.worn:
            return True
    return False


def supervise(path: Path, minutes: float, command: list[str]) -> None:
    """Let processes run the sections, one after the other, until all are done or the time is over.

    command: starts one, given the minutes that are left.
    """
    end = time.perf_counter() + 60 * minutes
    while (left := sections_with(read(path), "not reached")) and (seconds := end - time.perf_counter()) > 0:
        code = subprocess.run([*command, "--minutes", f"{seconds / 60:.3f}"]).returncode
        result = read(path)
        for name in sections_with(result, "running"):
            message = f"its process ended with code {code}: a crash, or the limit of time (see its traceback)"
            section = result["sections"][name]
            section["failures"][name] = message
            section["status"] = "failed"
            cli.notice(f"{name} failed: {message}")
        write_json(path, result)
        if code != WORN and sections_with(result, "not reached") == left:
            break  # it ends like this each time
        if code == 0:
            break  # nothing else fits into the time


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"resume: cannot read {path} ({error})") from None


def sections_with(result: dict, status: str) -> list[str]:
    return [name for name, section in result["sections"].items() if section["status"] == status]


def print_summary(path: Path) -> bool:
    """Judge the targets, print them and all that went wrong -> True if nothing did."""
    result = read(path)
    result["targets"] = judge_all(result["sections"])
    write_json(path, result)
    print_targets(result["targets"])
    sections = result["sections"].values()
    checks = [check for section in sections for check in section.get("checks", ())]
    wrong = [check["name"] for check in checks if not check["ok"]]
    failed = [
        f"{name} ({', '.join(failure for failure in section['failures'] if failure != name)})".replace(" ()", "")
        for name, section in result["sections"].items()
        if section["status"] == "failed"
    ]
    missed = [target["target"] for target in result["targets"] if target["met"] is False]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed; written to {path}")
    listed = ("not reached", sections_with(result, "not reached")), ("targets missed", missed)
    for title, names in (*listed, ("sections failed", failed), ("checks failed", wrong)):
        if names:
            print(f"{title}: {'; '.join(names)}")
    return not (failed or wrong)


def free_path(folder: str, device: str) -> Path:
    """Return a file name that no earlier run has."""
    name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if device == "cuda" else "cpu"
    stem = f"gpu_{name}_{datetime.date.today().isoformat()}"
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := Path(folder) / f"{stem}{ending}.json").exists())


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the program itself")
    parser.add_argument("--shapes", default="full", choices=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=8.0, help="no section starts that would end later")
    parser.add_argument("--sections", metavar="NAME,…", help='only those that begin so, as in "kernels,engine 8B"')
    parser.add_argument("--output_dir", default="benchmarks", metavar="DIR")
    parser.add_argument("--resume", metavar="FILE", help="go on with a run that was cut off, on the same GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device here; --device cpu --shapes tiny tries the program")
    if not flags.minutes > 0:
        raise UserError(f"minutes must be more than 0, got {flags.minutes}")
    known = SHAPES[flags.shapes].sections
    wanted = tuple(flags.sections.split(",")) if flags.sections else tuple(known)
    for start in wanted:
        if not any(name.startswith(start) for name in known):
            raise UserError(f"sections are {', '.join(known)}; got {start!r}")
    flags.sections = [name for name in known if name.startswith(("environment", *wanted))]  # it has the ceiling
    return flags


def new_file(flags: argparse.Namespace) -> Path:
    make_folder(flags.output_dir)
    path = free_path(flags.output_dir, flags.device)
    check_writable(str(path))
    sections = {name: {"status": "not reached"} for name in flags.sections}
    write_json(path, cli.environment() | {"config": vars(flags), "sections": sections})
    return path


def old_file(flags: argparse.Namespace) -> Path:
    """Read the file to go on with. Sections that were running when it was cut off are measured anew."""
    path = Path(flags.resume)
    result = read(path)
    if "environment" not in result.get("sections", {}):
        raise UserError(f"resume: {path} is no result of this program")
    before = [result.get("hardware", {}).get("gpu"), *(result.get("config", {}).get(k) for k in ("device", "shapes"))]
    now = [cli.environment()["hardware"]["gpu"], flags.device, flags.shapes]
    if before != now:
        raise UserError(f"resume: {path} is of GPU, device, shapes {before}, not {now}")
    for name in sections_with(result, "running"):
        result["sections"][name] = {"status": "not reached"}
    write_json(path, result)
    return path


def main() -> None:
    flags = parse_flags()
    path = old_file(flags) if flags.resume else new_file(flags)
    if flags.worker:
        faulthandler.enable()  # a crash says where
    if flags.worker or flags.device == "cpu":
        worn = work(Report(path, SHAPES[flags.shapes], flags.device, flags.minutes))
        if flags.worker:
            sys.exit(WORN if worn else 0)
    else:
        command = [sys.executable, "-m", "scripts.gpu_check", *sys.argv[1:], "--resume", str(path), "--worker"]
        supervise(path, flags.minutes, command)
    if not print_summary(path):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
