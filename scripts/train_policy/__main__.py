"""Learn which sublayers a draft should leave out: a small network over the frozen model, by policy gradient (skipr).

A window of text passes the full model once. At each of its positions the network sees the state that chose the token
there, and draws several sets of sublayers. Drafts without them are judged in parallel (`rewards.py`), and the network
learns from the rewards (`network.py`, `training.py`). Alpha says what a layer left out is worth: each alpha gives a
policy of its own, for `generate.py --policy learned:FILE`. Every random choice is a function of (seed, step), so a run
that was killed goes on as if nothing had happened.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import cli
from decoding.calibrate import SAMPLE_TEXT
from decoding.engine import CALIBRATION_TOKENS, Engine
from errors import UserError
from loading.files import check_writable, make_folder, write_json
from model import Transformer
from scripts.common.commands import generate_command
from scripts.common.journal import claimed, digest
from scripts.common.round_costs import RoundCosts, measure
from scripts.common.texts import SEEDS, encode_texts, find_files, split_texts
from scripts.train_policy import report
from scripts.train_policy.rewards import Reward, SkipReward, SpeedReward
from scripts.train_policy.training import PolicyTrainer, TrainingState

ALPHAS = "0.02,0.03,0.1,0.5"  # on the demo model: from a fifth to most of the layers left out
SPEED_DRAFTS = 4  # drafts of a round that the speed reward imagines
UNSURE = 0.25  # median error of round costs from which their conclusions are doubtful
# Flags that the weights of a policy follow from; a folder is continued only with the same.
DECIDING = (
    "checkpoint_path",
    "precision",
    "quantize",
    "threads",
    "context",
    "windows",
    "samples",
    "hidden",
    "actions",
    "reward",
    "loss",
    "steps",
    "learning_rate",
    "seed",
    "num_draft_tokens",
)


def parse_alphas(text: str) -> list[str]:
    """Read "0.01,0.1" -> the numbers as they stand in file names, ascending. Raises UserError."""
    try:
        alphas = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"alpha must be numbers with commas, such as {ALPHAS}, got {text!r}") from None
    if not all(0 <= alpha < math.inf for alpha in alphas):
        raise UserError(f"alpha must be 0 or more, got {text!r}")
    return [f"{alpha:g}" for alpha in alphas]


def make_rewards(flags: argparse.Namespace, model: Transformer, costs: RoundCosts) -> dict[str, Reward]:
    """Return the reward of each policy of the run, by the name in its file's name."""
    if flags.reward == "speed":
        return {"speed": SpeedReward(costs, flags.num_draft_tokens or SPEED_DRAFTS)}
    return {name: SkipReward(model, flags.loss, float(name)) for name in parse_alphas(flags.alpha or ALPHAS)}


def check_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for the first flag that no run can have."""
    if flags.reward == "speed" and flags.alpha is not None:
        raise UserError("--alpha does not go with --reward speed: seconds say what a layer left out is worth")
    parse_alphas(flags.alpha or ALPHAS)
    least = {
        "steps": 1,
        "windows": 1,
        "samples": 2,
        "hidden": 1,
        "context": 2,
        "save_every": 1,
        "eval_windows": 1,
        "num_prompts": 1,
        "max_new_tokens": 2,
        "repeats": 1,
    }
    for name, low in least.items():
        if getattr(flags, name) < low:
            raise UserError(f"{name} must be {low} or more, got {getattr(flags, name)}")
    if not 0 <= flags.seed < SEEDS:
        raise UserError(f"seed must be in 0..{SEEDS - 1}, got {flags.seed}")
    if not 0 < flags.learning_rate < math.inf:
        raise UserError(f"learning_rate must be above 0, got {flags.learning_rate}")
    if not 0 <= flags.heldout < 1:
        raise UserError(f"heldout must be in 0..1, got {flags.heldout}")
    if flags.num_draft_tokens is not None and flags.num_draft_tokens not in report.DRAFTS:
        raise UserError(f"num_draft_tokens must be in 1..{report.DRAFTS[-1]}, got {flags.num_draft_tokens}")
    if set(flags.output_dir) & set(",+="):  # of the policy string that names a file in it
        raise UserError(f"output_dir must be without , + and =, got {flags.output_dir}")


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy",
        description=__doc__.split("\n")[0],
        epilog="example: python -m scripts.train_policy --alpha 0.02,0.1 --steps 200 --output_dir out/policy",
    )
    cli.add_model_flags(parser)
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=["stdlib"],
        metavar="PATH",
        help="text files or folders; stdlib, stdlib_tests: sources of the running Python (default: stdlib)",
    )
    add("--glob", default="*.py", help="which files of a folder (default: *.py)")
    add("--heldout", type=float, default=0.05, help="share of files never trained on, chosen by a hash of their names")
    add("--alpha", metavar="A,B,…", help=f"what a layer left out is worth in nats: a policy for each ({ALPHAS})")
    add(
        "--reward",
        choices=["skip", "speed"],
        default="skip",
        help="skip: alpha · layers left out - loss; speed: expected speedup, from rounds timed here",
    )
    add("--loss", choices=["kl", "ce"], default="kl", help="kl: to the full model; ce: of the text's own tokens")
    add("--actions", choices=["sublayer", "layer"], default="sublayer", help="what is kept or left out as one")
    add("--hidden", type=int, default=64, help="hidden units of the network (default: 64)")
    add("--steps", type=int, default=250, help="of each policy (default: 250)")
    add("--context", type=int, default=128, help="tokens of a window (default: 128)")
    add("--windows", type=int, default=2, help="windows a step (default: 2)")
    add("--samples", type=int, default=4, help="sets drawn at each position (default: 4)")
    add("--learning_rate", type=float, default=3e-3, help="at the start, falling to 0 (default: 0.003)")
    add("--save_every", type=int, default=25, help="steps between saved states (default: 25)")
    add("--seed", type=int, default=0, help="of weights, windows and draws")
    add("--num_draft_tokens", type=int, metavar="K", help="drafts of a round (default: what the measured costs favour)")
    add("--eval_windows", type=int, default=32, help="held-out windows to compare on (default: 32)")
    add("--num_prompts", type=int, default=8, help="held-out prompts to decode (default: 8)")
    add("--max_new_tokens", type=int, default=64, help="tokens to decode after each (default: 64)")
    add("--repeats", type=int, default=5, help="timed turns of decoding (default: 5)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--output_dir", default="out/policy", metavar="DIR", help="default: out/policy; a run found here goes on")
    flags = parser.parse_args(argv)
    check_flags(flags)
    return flags


def prepare(flags: argparse.Namespace) -> tuple[Engine, Tensor, Tensor, TrainingState]:
    """Check everything before the weights are read -> the engine, training and held-out tokens, the state found."""
    check_writable(flags.json)
    files = find_files(flags.data, flags.glob)
    engine = cli.open_engine(flags)
    most = engine.args.max_seq_len
    if flags.context > most:
        raise UserError(f"context must be at most {most}, as this model's, got {flags.context}")
    if report.PROMPT_TOKENS + flags.max_new_tokens > most:
        raise UserError(
            f"max_new_tokens must be at most {most - report.PROMPT_TOKENS} for this model, got {flags.max_new_tokens}"
        )
    folder = make_folder(flags.output_dir)
    tokens, heldout = (encode_texts(engine.tokenizer, texts) for texts in split_texts(files, flags.heldout))
    for what, text in (("training", tokens), ("held-out", heldout)):
        if len(text) <= (least := max(flags.context, report.PROMPT_TOKENS)):
            raise UserError(f"data: {len(text)} {what} tokens are too few, more than {least} are needed (--context)")
    settings = {name: getattr(flags, name) for name in DECIDING} | {
        "device": engine.device,
        "text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "weight_files": digest((), (), (), engine.source, 1)["weight_files"],
    }
    if flags.reward == "skip":
        del settings["num_draft_tokens"]  # it is only written into the file
    return engine, tokens, heldout, TrainingState(folder / "state.pt", settings)


def write_results(
    flags: argparse.Namespace, progress: TrainingState, rows: list[dict], costs: RoundCosts, model: Transformer
) -> None:
    """Print the tables and the command, write JSON and picture."""
    folder, title = Path(flags.output_dir), f"{Path(flags.checkpoint_path).name}, {str(model.norm.weight.dtype)[6:]}"
    report.print_rows(rows, title, model.args.n_layer)
    fastest = max(rows, key=lambda row: row["speedup"])
    names = ("checkpoint_path", "device", "precision", "quantize", "threads")
    command = generate_command(flags, fastest["policy"], names) if fastest["speedup"] > 1 else None
    print(
        f"fastest: {fastest['policy']}, {fastest['speedup']:.2f}× plain decoding\n{command}"
        if command
        else "no policy is faster than plain decoding"
    )
    curves = {name: saved["curve"] for name, saved in progress.state["policies"].items()}
    result = {
        "title": title,
        "policies": rows,
        "fastest": fastest["policy"] if command else None,
        "command": command,
        "costs": asdict(costs),
        "curves": curves,
        "config": vars(flags),
        **cli.environment(),
    }
    for path in filter(None, (flags.json, folder / "policy.json")):
        write_json(path, result)
    report.draw_picture(rows, model.args.n_layer, folder / "policy.png", title)
    print(f"written: {', '.join(row['policy'].partition(':')[2] for row in rows)}, {folder}/policy.json, policy.png")


def main() -> None:
    flags = parse_flags()
    prepared = prepare(flags)
    with claimed(flags.output_dir):
        learn(flags, *prepared)


def learn(flags: argparse.Namespace, engine: Engine, tokens: Tensor, heldout: Tensor, progress: TrainingState) -> None:
    """Train, or go on to the last step, then compare and report."""
    threads = torch.get_num_threads()
    widest = engine.policy(f"layer_skip_proportion:0.5,num_draft_tokens={report.DRAFTS[-1]}")  # any learned one fits
    measured = min(CALIBRATION_TOKENS, engine.args.max_seq_len)
    engine.prepare([widest], max(report.PROMPT_TOKENS + flags.max_new_tokens, measured))
    model, runner = engine.model, engine.runner(widest)
    costs = progress.costs(lambda: measure(runner, engine.tokenizer.encode(SAMPLE_TEXT), report.DRAFTS[-1], flags.seed))
    if costs.error > UNSURE:
        cli.notice(f"rounds timed here fit no curve (median error {costs.error:.0%}): is the machine busy?")
    decoding_threads = torch.get_num_threads()
    torch.set_num_threads(threads)  # of training: the same in a run that goes on
    rewards, trainer = make_rewards(flags, model, costs), PolicyTrainer(model, tokens, flags)
    networks = {name: trainer.train(name, reward, progress) for name, reward in rewards.items()}
    rows = report.judge_policies(model, report.pieces(heldout, flags), networks, rewards, flags.seed)
    prompts = report.prompts_of(tokens, flags.num_prompts)
    own_texts = [
        [*prompt, *text]
        for prompt, text in zip(prompts, report.plain_texts(runner, prompts, flags.max_new_tokens), strict=True)
    ]
    for row in rows:
        row |= report.choose_drafts(model, own_texts, networks[row["alpha"]], costs, flags.num_draft_tokens)
        path = Path(flags.output_dir) / f"learned_{row['alpha']}.safetensors"
        networks[row["alpha"]].export(
            path,
            {
                "n_layer": str(model.args.n_layer),
                "dim": str(model.args.dim),
                "alpha": row["alpha"],
                "num_draft_tokens": str(row["num_draft_tokens"]),
                "skipped_layers": f"{row['learned']['skipped']:.3f}",
            },
        )
        row["policy"] = f"learned:{path}"
    torch.set_num_threads(decoding_threads)
    policies = [engine.policy(row["policy"]) for row in rows]
    prompts = report.prompts_of(heldout, flags.num_prompts)
    compared = report.compare(engine, runner, policies, prompts, flags.max_new_tokens, flags.repeats)
    for row, decoded in zip(rows, compared, strict=True):
        row |= decoded
    write_results(flags, progress, rows, costs, model)


if __name__ == "__main__":
    cli.run(main)
