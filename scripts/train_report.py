"""What a finished run leaves behind: losses, the acceptance of drafting with its early layers, a picture, a folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import cli
from scripts.trainer import Trainer, heldout_losses, plain_states
from tokenizer import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 64, 96, 24  # of the acceptance measured at the end


def choose_prompts(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(file, prompt) pairs of about PROMPT_TOKENS tokens: beginnings of held-out texts, classes and functions."""
    found = []
    for name, text in texts:
        starts = [0] + [text.find(word) + 1 for word in ("\nclass ", "\ndef ", "\n    def ") if word in text]
        for start in sorted(set(starts)):
            ids = tokenizer.encode(text[start : start + 40 * PROMPT_TOKENS])
            if len(ids) > PROMPT_TOKENS:
                found.append((name, tokenizer.decode(ids[:PROMPT_TOKENS], continues=True)))
    wanted = min(NUM_PROMPTS, len(found))
    return [found[index * len(found) // wanted] for index in range(wanted)]


@torch.no_grad()
def continue_greedily(trainer: Trainer, prompt: list[int], exit_layer: int) -> tuple[list[int], list[bool]]:
    """NEW_TOKENS greedy tokens of the full model, and whether `exit_layer` layers would have said the same."""
    head, ids = trainer.model.head, list(prompt)
    with trainer.autocast():
        for _ in range(NEW_TOKENS):
            hidden = plain_states(trainer, torch.tensor([ids], device=trainer.config.device))[-1]
            ids.append(int(head(hidden[0, -1]).argmax()))
        hidden = plain_states(trainer, torch.tensor([ids[:-1]], device=trainer.config.device))[exit_layer - 1]
        drafts = head(hidden[0, len(prompt) - 1 :]).argmax(-1).tolist()
    continuation = ids[len(prompt) :]
    return continuation, [draft == token for draft, token in zip(drafts, continuation, strict=True)]


def simulate_rounds(agree: list[bool], num_draft_tokens: int) -> tuple[int, int]:
    """Accepted and drafted tokens of greedy self-speculation, given where draft and target agree.

    Exact without drafting: up to the first disagreement the draft sees the very prefix that the target wrote.
    """
    position = accepted = drafted = 0
    while position < len(agree):
        count = min(num_draft_tokens, len(agree) - position - 1)
        prefix = (agree[position : position + count] + [False]).index(False)
        accepted, drafted, position = accepted + prefix, drafted + count, position + prefix + 1
    return accepted, drafted


def report(trainer: Trainer, tokenizer: Tokenizer, texts: list[tuple[str, str]], heldout: Tensor) -> dict:
    """Held-out loss of every exit and by position, greedy acceptance of drafting with L/4 layers, and a sample."""
    n_layer = trainer.model.args.n_layer
    by_position = heldout_losses(trainer, heldout, 64)
    exit_layer, num_draft_tokens = max(n_layer // 4, 1), 3
    prompts = choose_prompts(tokenizer, texts)
    accepted = drafted = agreed = total = 0
    samples = []
    for name, prompt in prompts:
        tokens, agree = continue_greedily(trainer, tokenizer.encode(prompt), exit_layer)
        counts = simulate_rounds(agree, num_draft_tokens)
        accepted, drafted = accepted + counts[0], drafted + counts[1]
        agreed, total = agreed + sum(agree), total + len(agree)
        samples.append({"file": name, "prompt": prompt, "continuation": tokenizer.decode(tokens, continues=True)})
    parts = by_position[-1].chunk(4)
    return {
        "heldout_tokens": len(heldout),
        "heldout_loss_by_exit": by_position.mean(-1).tolist(),
        "heldout_loss_by_quarter_of_context": [part.mean().item() for part in parts],
        "exit_layer": exit_layer, "num_draft_tokens": num_draft_tokens, "prompts": len(prompts),
        "acceptance_rate": accepted / drafted if drafted else None,
        "agreement": agreed / total if total else None,
        "samples": samples,
    }  # fmt: skip


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the training loss of the last exit and the held-out loss of some exits over tokens."""
    try:
        import matplotlib
    except ImportError:
        cli.notice("no loss_curve.png: drawing it needs `pip install matplotlib`")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = max((int(depth) for row in rows for depth in row["loss_by_exit"]), default=0)
    smooth, curve = None, []
    for row in rows:
        loss = row["loss_by_exit"][str(last)]
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        curve.append(smooth)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([row["tokens"] / 1e6 for row in rows], curve, color="0.7", label=f"training, exit {last} (smoothed)")
    marked = [row for row in rows if "heldout_by_exit" in row]
    for depth in sorted({max(last // 12, 1), max(last // 4, 1), max(last // 2, 1), last}):
        losses = [row["heldout_by_exit"][depth - 1] for row in marked]
        axes.plot([row["tokens"] / 1e6 for row in marked], losses, marker=".", label=f"held out, exit {depth}")
    axes.set(xlabel="million training tokens", ylabel="nats per token", ylim=(None, min(8, max(curve, default=8))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def export(trainer: Trainer, tokenizer: Tokenizer, hf_config: dict, files: list[str], samples: list[dict]) -> None:
    """Write the Hugging Face folder: weights and configs, data listing, held-out prompts, loss curve."""
    config, out = trainer.config, Path(trainer.config.output_dir)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    checkpoint.export_hf(trainer.model.state_dict(), trainer.model.args, out, hf_config, dtype)
    (out / "files.txt").write_text("\n".join(files) + "\n", encoding="utf-8")
    prompts = [json.dumps({"file": sample["file"], "prompt": sample["prompt"]}) for sample in samples]
    (out / "heldout_prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    plot_losses(out / "log.jsonl", out / "loss_curve.png")
