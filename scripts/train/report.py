"""Report on a finished run: losses, the acceptance of drafting with its early layers, a picture, a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cli
from decoding.generation import rate
from loading import checkpoint, writing
from loading.files import write_text
from loading.tokenizer import Tokenizer
from scripts.common import pictures
from scripts.common.first_drafts import simulate_rounds
from scripts.train.parallel import shared_out, whole
from scripts.train.trainer import Trainer, heldout_losses

PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 64, 96, 24  # of the acceptance measured at the end
NUM_DRAFT_TOKENS, HELDOUT_WINDOWS = 3, 64
Drafts = Callable[[list[int], int], dict[str, list[int]]]  # (tokens, first position) -> tokens, by kind of draft


def choose_prompts(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Choose (file, prompt) pairs of about PROMPT_TOKENS tokens: beginnings of texts, classes and functions."""
    prompts = []
    for name, text in texts:
        starts = [0] + [text.find(word) + 1 for word in ("\nclass ", "\ndef ", "\n    def ") if word in text]
        for start in sorted(set(starts)):
            ids = tokenizer.encode(text[start : start + 40 * PROMPT_TOKENS])
            if len(ids) > PROMPT_TOKENS:
                prompts.append((name, tokenizer.decode(ids[:PROMPT_TOKENS], continues=True)))
    wanted = min(NUM_PROMPTS, len(prompts))
    return [prompts[index * len(prompts) // wanted] for index in range(wanted)]


def continue_greedily(trainer: Trainer, prompt: list[int], drafts: Drafts) -> tuple[list[int], dict[str, list[bool]]]:
    """Continue a prompt by NEW_TOKENS greedy tokens of the full model; tell where each kind of draft agrees."""
    ids = list(prompt)
    with trainer.autocast():
        for _ in range(NEW_TOKENS):
            ids.append(trainer.exits.choices(ids, len(ids) - 1, [trainer.args.n_layer])[0][0])
        drafted = drafts(ids[:-1], len(prompt) - 1)
    continuation = ids[len(prompt) :]
    return continuation, {
        name: [draft == token for draft, token in zip(tokens, continuation, strict=True)]
        for name, tokens in drafted.items()
    }


def greedy_acceptance(
    trainer: Trainer, tokenizer: Tokenizer, prompts: list[tuple[str, str]], drafts: Drafts
) -> tuple[dict[str, dict], list[dict]]:
    """Measure acceptance rate and agreement of each kind of draft along greedy texts; return these texts, too."""
    work = lambda prompt: continue_greedily(trainer, tokenizer.encode(prompt[1]), drafts)
    continued = shared_out(trainer.ranks, prompts, work, "greedy texts")
    results = {}
    for name in continued[0][1] if continued else ():
        agree = [where[name] for _, where in continued]
        rounds = [simulate_rounds(text, NUM_DRAFT_TOKENS) for text in agree]
        accepted, drafted = (sum(counts) for counts in zip(*rounds, strict=True))
        agreed, total = sum(map(sum, agree)), sum(map(len, agree))
        results[name] = {"acceptance_rate": rate(accepted, drafted), "agreement": rate(agreed, total)}
    samples = [
        {"file": file, "prompt": prompt, "continuation": tokenizer.decode(tokens, continues=True)}
        for (file, prompt), (tokens, _) in zip(prompts, continued, strict=True)
    ]
    return results, samples


def final_results(trainer: Trainer, tokenizer: Tokenizer, texts: list[tuple[str, str]], heldout: Tensor) -> dict:
    """Measure held-out loss by exit and by position, greedy acceptance of drafting with L/4 layers; add samples."""
    by_position = heldout_losses(trainer, heldout, HELDOUT_WINDOWS)
    exit_layer, prompts = max(trainer.args.n_layer // 4, 1), choose_prompts(tokenizer, texts)
    drafts = lambda ids, first: {"early": trainer.exits.choices(ids, first, [exit_layer])[0]}
    greedy, samples = greedy_acceptance(trainer, tokenizer, prompts, drafts)
    parts = by_position[-1].chunk(4)
    return {
        "heldout_tokens": len(heldout),
        "heldout_loss_by_exit": by_position.mean(-1).tolist(),
        "heldout_loss_by_quarter_of_context": [part.mean().item() for part in parts],
        "exit_layer": exit_layer,
        "num_draft_tokens": NUM_DRAFT_TOKENS,
        "prompts": len(prompts),
        **greedy.get("early", {"acceptance_rate": None, "agreement": None}),
        "samples": samples,
    }


def print_results(results: dict, out: Path) -> None:
    """Print the losses, beside those before the run where it went on from a checkpoint, and the acceptance."""
    losses = [results["heldout_loss_by_exit"]]
    if results["heldout_before"]:
        losses.insert(0, results["heldout_before"])
    columns = ["before", "after"] if len(losses) > 1 else ["nats per token"]
    rows = [
        [str(depth), *(f"{loss:.3f}" for loss in row)] for depth, row in enumerate(zip(*losses, strict=True), start=1)
    ]
    cli.print_table("held-out loss", ["exit", *columns], rows)
    print(
        f"drafting with {results['exit_layer']} layers, K = {results['num_draft_tokens']}: acceptance rate "
        f"{cli.shown(results['acceptance_rate'], '.3f')}, agreement {cli.shown(results['agreement'], '.3f')}; "
        f"written: {out}"
    )


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the training loss of the last exit and the held-out loss of some exits over tokens."""
    if (pyplot := pictures.pyplot(picture)) is None:
        return
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
    pictures.save(figure, picture)


def export(
    trainer: Trainer, source: checkpoint.Source | None, tokenizer: Tokenizer, files: list[str], samples: list[dict]
) -> None:
    """Write the Hugging Face folder: weights and configs, data listing, held-out prompts, loss curve.

    source: the checkpoint that was trained on. Called on all processes; the first one writes.
    """
    state = whole(trainer.trained.state_dict(), trainer.ranks.leads)
    if not trainer.ranks.leads:
        return
    config, out = trainer.config, Path(trainer.config.output_dir)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0] if tokenizer.eos_ids else None}
    hf_config = source.hf_config if source else writing.hf_config_from_args(trainer.args, **ids)
    writing.export_hf(state, trainer.args, out, hf_config, dtype, source and source.generation_config or None)
    write_text(out / "files.txt", "\n".join(files) + "\n")
    prompts = [json.dumps({"file": sample["file"], "prompt": sample["prompt"]}) for sample in samples]
    write_text(out / "heldout_prompts.jsonl", "\n".join(prompts) + "\n")
    plot_losses(out / "log.jsonl", out / "loss_curve.png")
