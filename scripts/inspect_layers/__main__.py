"""Look into the layers: what each would say at every position of a text, and where the text's tokens left the model.

A prompt is continued by any policy, then prompt and text are read once more with every layer in view (`lens.py`). Out
come a page for a browser, tables for LaTeX and plain text (`page.py`), and all numbers as JSON. A second
checkpoint can read the same texts beside the first.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import cli
from decoding.generation import GenerateConfig, Generation, check_prompt
from decoding.runner import check_num_draft_tokens
from drafting.catalogue import make_policy
from errors import UserError
from generate import DEFAULT_PROMPT, check_unverified, check_unverified_flags, decode, make_runner
from loading.files import check_writable, make_folder, write_json, write_text
from scripts.common import samples
from scripts.inspect_layers import lens, page
from scripts.inspect_layers.page import Model

WRITERS = {"html": "layers.html", "latex": "layers.tex", "text": "layers.txt"}


def formats_of(text: str) -> list[str]:
    formats = [part.strip() for part in text.split(",") if part.strip()]
    for each in formats:
        if each not in WRITERS:
            raise UserError(f"format must be among {', '.join(WRITERS)}, got {each!r}")
    return formats


def open_other(flags: argparse.Namespace, session: cli.Session) -> cli.Session | None:
    """The checkpoint to compare with, unread. Raises UserError unless its tokens are those of `session`."""
    if flags.compare_with is None:
        return None
    other = cli.open_session(argparse.Namespace(**{**vars(flags), "checkpoint_path": flags.compare_with}))
    if other.tokenizer.vocabulary.token_bytes != session.tokenizer.vocabulary.token_bytes:
        raise UserError(
            f"compare_with {flags.compare_with}: its vocabulary is not that of {flags.checkpoint_path}, "
            f"and both must read the same tokens"
        )
    return other


def model_names(flags: argparse.Namespace) -> list[str]:
    """What to call the checkpoints: the names of their folders, or the whole paths if these are the same."""
    paths = [path for path in (flags.checkpoint_path, flags.compare_with) if path is not None]
    names = [Path(path).name or path for path in paths]
    return paths if len(set(names)) < len(names) else names


@torch.inference_mode()
def look_at(
    session: cli.Session, flags: argparse.Namespace, prompts: Sequence[list[int]], config: GenerateConfig
) -> tuple[list[lens.Lens], list[dict]]:
    """Continue each prompt with the policy of `flags` and look at all layers -> lenses, and the texts' summaries."""
    args = session.args
    policy = make_policy(flags.policy, args.n_layer, args.dim, num_draft_tokens=flags.num_draft_tokens)
    length = max(map(len, prompts)) + config.max_new_tokens
    runner = make_runner(session, length, policy, config.sampling, prompts[0])
    lenses, summaries = [], []
    for prompt in prompts:
        generation = Generation.collect(decode(runner, prompt, config, policy, verified=not flags.no_verify))
        left = lens.departures(generation, runner.n_layer)
        lenses.append(lens.read(runner, [*prompt, *generation.tokens], len(prompt), left))
        summaries.append(generation.summary(session.model))
    return lenses, summaries


@torch.inference_mode()
def read_again(other: cli.Session, config: GenerateConfig, lenses: Sequence[lens.Lens]) -> list[lens.Lens]:
    """What another checkpoint would say about the same texts. They left no layer of it: it did not write them."""
    length = max(len(each.tokens) for each in lenses)
    plain = make_policy("none", other.args.n_layer)
    runner = make_runner(other, length, plain, config.sampling, lenses[0].tokens)
    return [lens.read(runner, each.tokens, each.prompt_length, ()) for each in lenses]


def print_layers(models: Sequence[Model]) -> None:
    """The table at the end: a row a layer, for each model its own columns."""
    columns, depths = ["layer"], max(len(model.summary["agreement"]) for model in models)
    for model in models:
        mark = f" {model.name}" if len(models) > 1 else ""
        columns += [f"final choice{mark}", "top-1", "final from here", "left here", "cosine to before"]
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


def write_files(models: Sequence[Model], session: cli.Session, flags: argparse.Namespace, result: dict) -> list[Path]:
    """Write every format asked for and the JSON into the output folder -> the files."""
    folder, name = Path(flags.output_dir), page.names_of(session.tokenizer)
    shown = [Model(model.name, model.lenses[: flags.num_tables], model.summary) for model in models]
    summary, files = models[0].summary, []
    facts = {
        "policy": result["policy"],
        "positions": str(summary["positions"]),
        "mean layer from which the choice is final": f"{summary['stable_from_mean']:.1f} of {session.args.n_layer}",
        "mean layers run for a token of the text": cli.shown(summary["departure_mean"]),
        "acceptance rate": cli.shown(result["acceptance_rate"], ".0%"),
    }
    title = f"{' and '.join(model.name for model in models)}: what each layer would say"
    for each in flags.formats:
        path = folder / WRITERS[each]
        if each == "html":
            write_text(path, page.write_html(shown, name, title, facts))
        else:
            write_text(path, (page.write_latex if each == "latex" else page.write_text)(shown, name))
        files.append(path)
    for path in filter(None, (folder / "layers.json", flags.json)):
        write_json(path, result)
        files.append(Path(path))
    return files


def read_prompts(flags: argparse.Namespace, session: cli.Session, config: GenerateConfig) -> list[list[int]]:
    """The prompt, or those of the dataset, as token ids. Raises UserError if there is none that fits the model."""
    if flags.dataset is None:
        prompt = cli.read_prompt(flags, session.tokenizer, DEFAULT_PROMPT)
        check_prompt(prompt, config, session.args.vocab_size, session.args.max_seq_len)
        return [prompt]
    if given := [key for key in ("prompt", "prompt_file", "prompt_ids") if getattr(flags, key) is not None]:
        raise UserError(f"--dataset and --{given[0]} each choose the prompts: give one")
    dataset = samples.read_dataset(flags)
    return [ids for _, ids in samples.encoded(dataset, flags, session, config)]


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_layers",
        description="What every layer would say at every position: a page, tables, numbers.",
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
        help="writes the text and says where its tokens leave the model (default: confidence)",
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
    session = cli.open_session(flags)
    other = open_other(flags, session)
    config = dataclasses.replace(config, eos_ids=session.eos_ids(flags))
    args = session.args
    policy = make_policy(flags.policy, args.n_layer, args.dim, num_draft_tokens=flags.num_draft_tokens)
    check_num_draft_tokens(policy.num_draft_tokens)
    if flags.no_verify:
        check_unverified_flags(flags)
        check_unverified(policy, config.sampling)
    prompts = read_prompts(flags, session, config)
    if other:
        longest = max(map(len, prompts)) + config.max_new_tokens
        if longest > other.args.max_seq_len:
            raise UserError(
                f"compare_with {flags.compare_with}: it has {other.args.max_seq_len} positions, {longest} are needed"
            )
    make_folder(flags.output_dir)

    lenses, summaries = look_at(session, flags, prompts, config)
    names = model_names(flags)
    models = [Model(names[0], lenses, lens.summarise(lenses))]
    if other:
        session.model = None  # one model in memory at a time
        again = read_again(other, config, lenses)
        models.append(Model(names[1], again, lens.summarise(again)))
    drafted, accepted = (sum(summary[key] for summary in summaries) for key in ("drafted", "accepted"))
    result = {
        "policy": str(policy),
        "verified": not flags.no_verify,
        "acceptance_rate": accepted / drafted if drafted else None,
        "models": [
            {
                "name": model.name,
                **model.summary,
                "texts": [
                    dataclasses.asdict(each) | {"stable_from": [each.stable_from(t) for t in range(each.positions)]}
                    for each in model.lenses
                ],
            }
            for model in models
        ],
        "generations": summaries,
        "config": vars(flags),
        **cli.environment(),
    }
    files = write_files(models, session, flags, result)
    print_layers(models)
    print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    cli.run(main)
