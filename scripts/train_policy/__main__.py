"""Learn which sublayers a draft should leave out: a small network over the frozen model, by policy gradient (skipr).

A window of text passes the full model once. At each of its positions the network, seeing the state that chose the token
there, draws several sets of sublayers; drafts without them are judged in parallel (`skip_rewards.py`), and the network
learns from the rewards (`skip_network.py`). Each alpha, what a layer left out is worth, gives a policy of its own:
`generate.py --policy learned:FILE`. Every random choice is a function of (seed, step), so a run that was killed goes on
as if nothing had happened.
"""

import argparse
import hashlib
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
from decoding.calibrate import SAMPLE_TEXT
from errors import UserError
from loading.files import check_writable, make_folder, replacing, write_json
from model import Transformer
from scripts.common.journal import claimed, digest, read_state, refuse_others
from scripts.common.round_costs import RoundCosts, measure, restored
from scripts.common.texts import SEEDS, encode_texts, find_files, split_texts
from scripts.train_policy import report
from scripts.train_policy.network import SkipNetwork, draw, policy_loss
from scripts.train_policy.rewards import Reward, SkipReward, SpeedReward, Window, mean, numbers

ALPHAS = "0.02,0.03,0.1,0.5"  # on the demo model: from a fifth to most of the layers left out
SPEED_DRAFTS = 4  # drafts of a round that the speed reward imagines
UNSURE = 0.25  # median error of round costs from which their conclusions are doubtful
# What the weights of a policy follow from; a folder is continued only with the same.
DECIDING = (
    "checkpoint_path",
    "device",
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


class Run:
    """What a run has learned so far, in state.pt: costs of rounds, and of each policy network, optimiser and steps."""

    def __init__(self, path: Path, settings: dict):
        """Read what is there. Raises UserError if it is of other settings or no such file."""
        self.path, self.state = path, {"settings": settings, "costs": None, "policies": {}}
        if not path.exists():
            return
        self.state = read_state(path, {"settings": dict, "costs": None, "policies": dict})
        refuse_others(path, self.state["settings"], settings)
        if (known := self.state["costs"]) is not None:
            restored(path, known)

    def save(self) -> None:
        """Write all of it; the file appears complete, by rename."""
        with replacing(self.path) as file:
            torch.save(self.state, file)

    def costs(self, measured: Callable[[], RoundCosts]) -> RoundCosts:
        """Of this run: measured once, so that a run that goes on is rewarded by the same numbers."""
        if self.state["costs"] is None:
            self.state["costs"] = asdict(measured())
            self.save()
        return restored(self.path, self.state["costs"])


@dataclass
class Trainer:
    """Trains policies of one model on one text; each from the same weights, on the same windows, by the same draws."""

    model: Transformer
    tokens: Tensor
    flags: argparse.Namespace

    def network(self) -> SkipNetwork:
        flags, args = self.flags, self.model.args
        network = SkipNetwork(args.dim, args.n_layer, flags.hidden, flags.actions == "layer", flags.seed)
        return network.to(self.model.norm.weight.device)

    def train(self, name: str, reward: Reward, run: Run) -> SkipNetwork:
        """Go on with the policy `name` of the run to its last step, saving on the way."""
        flags, network = self.flags, self.network()
        optimizer = torch.optim.Adam(network.parameters(), lr=flags.learning_rate)
        saved = run.state["policies"].setdefault(name, {"step": 0, "curve": []})
        if saved["step"]:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
        seen: list[dict] = []
        with tqdm(total=flags.steps, initial=saved["step"], desc=name, unit="step", leave=False) as bar:
            for step in range(saved["step"], flags.steps):
                optimizer.param_groups[0]["lr"] = flags.learning_rate * (1 - step / flags.steps)
                seen.append(self.step(step, network, reward))
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix({key: f"{seen[-1][key]:.2f}" for key in ("reward", "skipped")}, refresh=False)
                if (step + 1) % flags.save_every == 0 or step + 1 == flags.steps:
                    saved["curve"].append({"step": step + 1, **mean(seen)})
                    saved |= {"step": step + 1, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
                    run.save()
                    seen = []
        return network

    def step(self, step: int, network: SkipNetwork, reward: Reward) -> dict:
        """Add the gradient of a step's windows to the network's -> means of what the drawn sets gave."""
        flags, seen = self.flags, []
        generator = torch.Generator().manual_seed(flags.seed * 1_000_003 + step)
        starts = torch.randint(len(self.tokens) - flags.context, (flags.windows,), generator=generator)
        for start in starts.tolist():
            window = Window(self.model, self.tokens[start : start + flags.context + 1].tolist())
            logits = network(window.states)
            actions, rewards = draw(logits, flags.samples, generator), []
            for keep in network.sublayers(actions):  # one set a position at a time: memory of one window
                outcome = window.judge(keep)
                rewards.append(reward(outcome, keep))
                seen.append(numbers(outcome, keep, rewards[-1], self.model))
            loss = policy_loss(logits, actions, torch.stack(rewards)) / flags.windows
            if not loss.isfinite():
                raise UserError(
                    f"the policy diverged in step {step}: lower --learning_rate ({flags.learning_rate}) or --alpha"
                )
            loss.backward()
        return mean(seen)


def parse_alphas(text: str) -> list[str]:
    """ "0.01,0.1" -> the numbers as they stand in file names, ascending. Raises UserError."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"alpha must be numbers with commas, such as {ALPHAS}, got {text!r}") from None
    if not all(0 <= alpha < math.inf for alpha in found):
        raise UserError(f"alpha must be 0 or more, got {text!r}")
    return [f"{alpha:g}" for alpha in found]


def make_rewards(flags: argparse.Namespace, model: Transformer, costs: RoundCosts) -> dict[str, Reward]:
    """What each policy of the run is trained for, by the name in its file's name."""
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


def prepare(flags: argparse.Namespace) -> tuple[cli.Session, Tensor, Tensor, Run]:
    """All that can go wrong before the weights are read: texts, checkpoint, folder, the state found there."""
    check_writable(flags.json)
    files = find_files(flags.data, flags.glob)
    session = cli.open_session(flags)
    most = session.args.max_seq_len
    if flags.context > most:
        raise UserError(f"context must be at most {most}, as this model's, got {flags.context}")
    if report.PROMPT_TOKENS + flags.max_new_tokens > most:
        raise UserError(
            f"max_new_tokens must be at most {most - report.PROMPT_TOKENS} for this model, got {flags.max_new_tokens}"
        )
    folder = make_folder(flags.output_dir)
    tokens, heldout = (encode_texts(session.tokenizer, texts) for texts in split_texts(files, flags.heldout))
    for what, text in (("training", tokens), ("held-out", heldout)):
        if len(text) <= (least := max(flags.context, report.PROMPT_TOKENS)):
            raise UserError(f"data: {len(text)} {what} tokens are too few, more than {least} are needed (--context)")
    settings = {name: getattr(flags, name) for name in DECIDING} | {
        "text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "weight_files": digest((), (), (), session.source, 1)["weight_files"],
    }
    if flags.reward == "skip":
        del settings["num_draft_tokens"]  # it is only written into the file
    return session, tokens, heldout, Run(folder / "state.pt", settings)


def command_line(flags: argparse.Namespace, policy: str) -> str:
    """The generate.py command that decodes with a policy."""
    words, defaults = ["python", "generate.py"], {"checkpoint_path": str(cli.DEMO), "device": "cpu"}
    for name in ("checkpoint_path", "device", "precision", "quantize", "threads"):
        if (value := getattr(flags, name)) not in (None, defaults.get(name)):
            words += [f"--{name}", str(value)]
    return shlex.join([*words, *([] if flags.compile else ["--no-compile"]), "--policy", policy])


def finish(flags: argparse.Namespace, run: Run, rows: list[dict], costs: RoundCosts, model: Transformer) -> None:
    """Print the tables and the command, write JSON and picture."""
    folder, title = Path(flags.output_dir), f"{Path(flags.checkpoint_path).name}, {str(model.norm.weight.dtype)[6:]}"
    report.print_rows(rows, title, model.args.n_layer)
    fastest = max(rows, key=lambda row: row["speedup"])
    command = command_line(flags, fastest["policy"]) if fastest["speedup"] > 1 else None
    print(
        f"fastest: {fastest['policy']}, {fastest['speedup']:.2f}× plain decoding\n{command}"
        if command
        else "no policy is faster than plain decoding"
    )
    curves = {name: saved["curve"] for name, saved in run.state["policies"].items()}
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
    report.draw(rows, model.args.n_layer, folder / "policy.png", title)
    print(f"written: {', '.join(row['policy'].partition(':')[2] for row in rows)}, {folder}/policy.json, policy.png")


def main() -> None:
    flags = parse_flags()
    prepared = prepare(flags)
    with claimed(flags.output_dir):
        learn(flags, *prepared)


def learn(flags: argparse.Namespace, session: cli.Session, tokens: Tensor, heldout: Tensor, run: Run) -> None:
    """Train, or go on to the last step, then compare and report."""
    model, threads = session.load(), torch.get_num_threads()
    engine = report.Engine(session, flags)
    engine.choose_threads()
    costs = run.costs(
        lambda: measure(engine.drafting, session.tokenizer.encode(SAMPLE_TEXT), report.DRAFTS[-1], flags.seed)
    )
    if costs.error > UNSURE:
        cli.notice(f"rounds timed here fit no curve (median error {costs.error:.0%}): is the machine busy?")
    decoding_threads = torch.get_num_threads()
    torch.set_num_threads(threads)  # of training: the same in a run that goes on
    rewards, trainer = make_rewards(flags, model, costs), Trainer(model, tokens, flags)
    networks = {name: trainer.train(name, reward, run) for name, reward in rewards.items()}
    rows = report.evaluate(model, report.pieces(heldout, flags), networks, rewards, flags.seed)
    own_texts = engine.continued(engine.prompts(tokens))
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
    compared = engine.compare([row["policy"] for row in rows], engine.prompts(heldout))
    for row, found in zip(rows, compared, strict=True):
        row |= found
    finish(flags, run, rows, costs, model)


if __name__ == "__main__":
    cli.run(main)
