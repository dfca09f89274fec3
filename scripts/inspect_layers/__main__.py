"""Look into the layers: the token that each would choose at every position, and where the text's tokens exited.

A policy continues a prompt. Then prompt and text are read once more with every layer in view (`lens.py`). The results
are a page for a browser, tables for LaTeX and plain text (`page.py`), and all numbers as JSON. A second checkpoint can
read the same texts beside the first.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import cli
from decoding.engine import Engine
from decoding.generation import GenerateConfig, Generation, check_prompt, totals
from drafting.policy import DraftPolicy
from errors import UserError
from generate import DEFAULT_PROMPT, check_unverified, check_unverified_flags, decode
from loading.files import check_writable, make_folder, write_json, write_text
from loading.tokenizer import Tokenizer
from scripts.common import samples
from scripts.inspect_layers import lens, page
from scripts.inspect_layers.page import Model

WRITERS = {"html": "layers.html", "latex": "layers.tex", "text": "layers.txt"}


def formats_of(text: str) -> list[str]:
    """Read --format: names of WRITERS, with commas. Raises UserError for another name."""
    formats = [part.strip() for part in text.split(",") if part.strip()]
    for format in formats:
        if format not in WRITERS:
            raise UserError(f"format must be among {', '.join(WRITERS)}, got {format!r}")
    return formats


def open_other(flags: argparse.Namespace, engine: Engine, longest: int) -> Engine | None:
    """Open the checkpoint to compare with, weights unread; None if none was asked for.

    longest: positions of the longest text. Raises UserError unless it fits, and tokens are those of `engine`.
    """
    if flags.compare_with is None:
        return None
    other = cli.open_engine(flags, checkpoint=flags.compare_with, draft_vocab=None, draft_quantize=None)
    if other.tokenizer.vocabulary.token_bytes != engine.tokenizer.vocabulary.token_bytes:
        raise UserError(
            f"compare_with {flags.compare_with}: its vocabulary is not that of {flags.checkpoint_path}, "
            f"and both must read the same tokens"
        )
    if longest > other.args.max_seq_len:
        raise UserError(
            f"compare_with {flags.compare_with}: it has {other.args.max_seq_len} positions, {longest} are needed"
        )
    return other


def model_names(flags: argparse.Namespace) -> list[str]:
    """Name the checkpoints: by their folders, or by the whole paths if the folders have the same name."""
    paths = [path for path in (flags.checkpoint_path, flags.compare_with) if path is not None]
    names = [Path(path).name or path for path in paths]
    return paths if len(set(names)) < len(names) else names


@torch.inference_mode()
def look_at(
    engine: Engine, policy: DraftPolicy, prompts: Sequence[list[int]], config: GenerateConfig, verified: bool
) -> tuple[list[lens.Lens], list[Generation]]:
    """Continue each prompt with `policy` and look at all layers -> a lens and a generation for each."""
    engine.prepare([policy], max(map(len, prompts)) + config.max_new_tokens, config.sampling, prompts[0])
    runner, lenses, generations = engine.runner(policy), [], []
    for prompt in prompts:
        generation = Generation.collect(decode(runner, prompt, config, policy, verified=verified))
        exits = lens.token_exits(generation, runner.n_layer)
        lenses.append(lens.read(runner, [*prompt, *generation.tokens], len(prompt), exits))
        generations.append(generation)
    return lenses, generations


@torch.inference_mode()
def read_again(other: Engine, lenses: Sequence[lens.Lens]) -> list[lens.Lens]:
    """Look at all layers of another checkpoint over the same texts. It did not write them, so no token has an exit."""
    plain = other.policy("none")
    other.prepare([plain], max(len(before.tokens) for before in lenses))
    return [lens.read(other.runner(plain), before.tokens, before.prompt_length, ()) for before in lenses]


def print_layers(models: Sequence[Model]) -> None:
    """Print the tables at the end: the layers, each model in columns of its own; then a row for each model."""
    columns, depths = ["layer"], max(len(model.summary["agreement"]) for model in models)
    for model in models:
        mark = f" {model.name}" if len(models) > 1 else ""
        columns += [f"final choice{mark}", "top-1", "final from here", "exited here", "cosine to before"]
    rows = []
    for depth in range(1, depths + 1):
        row = [str(depth)]
        for model in models:
            summary = model.summary
            if depth > len(summary["agreement"]):
                row += ["–"] * 5
                continue
            row += [
                f"{summary['agreement'][depth - 1]:.1%}",
                f"{summary['top1_median'][depth - 1]:.2f}",
                f"{summary['stable_from'][depth - 1] / summary['positions']:.1%}",
                str(summary["departures"][depth]) if summary["departure_mean"] is not None else "–",
                f"{summary['cosine_by_depth'][1][depth - 1]:.3f}",
            ]
        rows.append(row)
    title = f"{models[0].summary['positions']} positions, {len(models[0].lenses)} text(s)"
    cli.print_table(title, columns, rows)
    rows = []
    for model in models:
        summary = model.summary
        cosines = [
            f"{summary['cosine_median'][gap]:.3f}" if gap in summary["cosine_median"] else "–" for gap in lens.GAPS
        ]
        rows.append(
            [
                model.name,
                *cosines,
                f"{summary['stable_from_mean']:.1f} of {len(summary['agreement'])}",
                cli.shown(summary["departure_mean"]),
                cli.shown(summary["drafted_share"], ".1%"),
                str(summary["rejected_drafts"]),
            ]
        )
    cli.print_table(
        "median cosine of states n layers apart; mean depths",
        ["", *(f"n = {gap}" for gap in lens.GAPS), "final from", "layers run", "drafted", "rejected"],
        rows,
    )


def write_files(models: Sequence[Model], tokenizer: Tokenizer, flags: argparse.Namespace, result: dict) -> list[Path]:
    """Write every format asked for and the JSON into the output folder -> the files."""
    folder, name = Path(flags.output_dir), page.names_of(tokenizer)
    shown = [Model(model.name, model.lenses[: flags.num_tables], model.summary) for model in models]
    summary, files = models[0].summary, []
    n_layer = len(summary["agreement"])
    facts = {
        "policy": result["policy"],
        "positions": str(summary["positions"]),
        "mean layer from which the choice is final": f"{summary['stable_from_mean']:.1f} of {n_layer}",
        "mean layers run for a token of the text": cli.shown(summary["departure_mean"]),
        "acceptance rate": cli.shown(result["acceptance_rate"], ".0%"),
    }
    title = f"{' and '.join(model.name for model in models)}: what each layer would say"
    for format in flags.formats:
        path = folder / WRITERS[format]
        if format == "html":
            write_text(path, page.write_html(shown, name, title, facts))
        else:
            write_text(path, (page.write_latex if format == "latex" else page.write_text)(shown, name))
        files.append(path)
    for path in filter(None, (folder / "layers.json", flags.json)):
        write_json(path, result)
        files.append(Path(path))
    return files


def read_prompts(flags: argparse.Namespace, engine: Engine, config: GenerateConfig) -> list[list[int]]:
    """Read the prompt, or those of the dataset, as token ids. Raises UserError if none fits the model."""
    if flags.dataset is None:
        prompt = cli.read_prompt(flags, engine.tokenizer, DEFAULT_PROMPT)
        check_prompt(prompt, config, engine.args.vocab_size, engine.args.max_seq_len)
        return [prompt]
    if given := [key for key in ("prompt", "prompt_file", "prompt_ids") if getattr(flags, key) is not None]:
        raise UserError(f"--dataset and --{given[0]} each choose the prompts: give one")
    dataset = samples.read_dataset(flags)
    return [ids for _, ids in samples.encoded(dataset, flags, engine, config)]


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_layers",
        description="Show what every layer would say at every position: a page, tables, numbers.",
        epilog="example: python -m scripts.inspect_layers --prompt 'def main():' --policy confidence:0.6 "
        "--output_dir inspect_out",
    )
    cli.add_model_flags(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt_file", metavar="FILE", help="UTF-8 text")
    prompt.add_argument("--prompt_ids", metavar="1,5,9", help="token ids, exactly as given")
    cli.add_decode_flags(parser)
    parser.set_defaults(max_new_tokens=48)
    parser.add_argument(
        "--policy",
        default="confidence",
        metavar="NAME:key=value,…",
        help="writes the text and says where its tokens exit (default: confidence)",
    )
    parser.add_argument("--no_verify", action="store_true", help="early exit: the drafts are the text")
    samples.add_sample_flags(parser, dataset=None, num_samples=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument("--compare_with", metavar="PATH", help="a second checkpoint, to read the same texts")
    parser.add_argument(
        "--format",
        default="html,latex,text",
        metavar="NAME,…",
        help=f"tables to write, of {', '.join(WRITERS)} (default: all)",
    )
    parser.add_argument(
        "--num_tables",
        type=int,
        default=4,
        metavar="N",
        help="texts that get a table; the numbers are of all (default: 4)",
    )
    parser.add_argument("--output_dir", default="inspect_out", metavar="FOLDER")
    return parser.parse_args(argv)


def text_json(text: lens.Lens) -> dict:
    """Return all numbers of one text, as they stand in layers.json."""
    return dataclasses.asdict(text) | {"stable_from": [text.stable_from(t) for t in range(text.positions)]}


def main() -> None:
    flags = parse_flags()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("inspect_layers runs in one process: start it without torchrun")
    flags.formats = formats_of(flags.format)
    if flags.num_tables < 1:
        raise UserError(f"num_tables must be 1 or more, got {flags.num_tables}")
    samples.check_sample_flags(flags, without="prompt")
    config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))
    check_writable(flags.json)
    engine = cli.open_engine(flags)
    config = dataclasses.replace(config, eos_ids=cli.eos_ids(flags, engine))
    policy = engine.policy(flags.policy, num_draft_tokens=flags.num_draft_tokens)
    if flags.no_verify:
        check_unverified_flags(flags)
        check_unverified(policy, config.sampling)
    prompts = read_prompts(flags, engine, config)
    other = open_other(flags, engine, max(map(len, prompts)) + config.max_new_tokens)
    make_folder(flags.output_dir)

    lenses, generations = look_at(engine, policy, prompts, config, not flags.no_verify)
    summaries, tokenizer = [generation.summary(engine.model) for generation in generations], engine.tokenizer
    names = model_names(flags)
    models = [Model(names[0], lenses, lens.summarise(lenses))]
    if other:
        del engine  # one model in memory at a time
        lenses = read_again(other, lenses)
        models.append(Model(names[1], lenses, lens.summarise(lenses)))
    result = {
        "policy": str(policy),
        "verified": not flags.no_verify,
        "acceptance_rate": totals(step for text in generations for step in text.rounds).acceptance_rate,
        "models": [
            {"name": model.name, **model.summary, "texts": [text_json(text) for text in model.lenses]}
            for model in models
        ],
        "generations": summaries,
        "config": vars(flags),
        **cli.environment(),
    }
    files = write_files(models, tokenizer, flags, result)
    print_layers(models)
    print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    cli.run(main)
