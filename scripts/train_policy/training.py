"""Train policy networks by what drawn sets of sublayers are worth, and keep the state of a run on disk."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from errors import UserError
from loading.files import replacing
from model import Transformer
from scripts.common.journal import read_state, refuse_others
from scripts.common.round_costs import RoundCosts, restored
from scripts.train_policy.network import SkipNetwork, draw_actions, policy_loss
from scripts.train_policy.rewards import Reward, Window, mean, numbers


class TrainingState:
    """Keeps in state.pt what a run has learned: costs of rounds; of each policy its network, optimiser and steps."""

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
        """Return the costs of this run: `measured` once, so that a run that goes on is rewarded by the same numbers."""
        if self.state["costs"] is None:
            self.state["costs"] = asdict(measured())
            self.save()
        return restored(self.path, self.state["costs"])


@dataclass
class PolicyTrainer:
    """Trains policies of one model on one text; each from the same weights, on the same windows, by the same draws."""

    model: Transformer
    tokens: Tensor
    flags: argparse.Namespace

    def network(self) -> SkipNetwork:
        """Make the network that every policy starts from."""
        flags, args = self.flags, self.model.args
        network = SkipNetwork(args.dim, args.n_layer, flags.hidden, flags.actions == "layer", flags.seed)
        return network.to(self.model.norm.weight.device)

    def train(self, name: str, reward: Reward, progress: TrainingState) -> SkipNetwork:
        """Go on with the policy `name` to its last step, saving on the way."""
        flags, network = self.flags, self.network()
        optimizer = torch.optim.Adam(network.parameters(), lr=flags.learning_rate)
        saved = progress.state["policies"].setdefault(name, {"step": 0, "curve": []})
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
                    progress.save()
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
            actions, rewards = draw_actions(logits, flags.samples, generator), []
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
