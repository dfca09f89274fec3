"""Plain decoding by length of prompt, for `scripts.benchmark --prompt_lengths`: prefill, and what a token costs."""

import statistics

from tqdm import tqdm

import cli
from errors import UserError
from model import Transformer
from scripts.common.contender import Contender

LENGTH_TOKENS = 32  # decoded after each prompt


def check_lengths(lengths: list[int], max_seq_len: int) -> int:
    """Return the positions that the longest takes. Raises UserError if they are more than the model's context."""
    most, longest = max_seq_len - LENGTH_TOKENS, max(lengths, default=0)
    if longest > most:
        raise UserError(f"prompt_lengths must be at most {most} for this checkpoint, got {longest}")
    return longest + LENGTH_TOKENS if lengths else 0


def measure_lengths(
    contenders: list[Contender], lengths: list[int], repeats: int, model: Transformer, pass_bytes: float
) -> list[dict]:
    """Prefill and decode LENGTH_TOKENS tokens after prompts of these lengths, contenders in turns -> a row each.

    contenders: one of an engine on a device. pass_bytes: of weights, read for a token. `floor` is what the bytes of
    weights and KV cache alone would make of a token's time, relative to the first length.
    """
    if not lengths:
        return []
    args = model.args
    prompts = {length: [(7919 * i + 3) % (args.vocab_size - 3) + 3 for i in range(length)] for length in lengths}
    kv = 2 * args.n_layer * args.n_kv_head * args.head_dim * model.norm.weight.element_size()
    took = {(c.engine, c.device, length): [] for c in contenders for length in lengths}
    for turn in tqdm(range(repeats + 1), desc="lengths", leave=False):
        for length, prompt in prompts.items():
            for c in contenders:
                _, seconds, summary = c.run(prompt, LENGTH_TOKENS)
                if turn:
                    took[c.engine, c.device, length].append((summary["prefill_s"], seconds / (LENGTH_TOKENS - 1)))
    rows = []
    for c in contenders:
        own = {length: took[c.engine, c.device, length] for length in lengths}
        first = statistics.median(seconds for _, seconds in own[lengths[0]])
        for length in lengths:
            prefill, token = (statistics.median(times) for times in zip(*own[length], strict=True))
            rows.append(
                {
                    "engine": c.engine,
                    "device": c.device,
                    "prompt_tokens": length,
                    "prefill_s": prefill,
                    "prefill_tokens_per_s": length / prefill,
                    "ms_per_token": 1e3 * token,
                    "over_first": token / first,
                    "floor": (pass_bytes + kv * length) / (pass_bytes + kv * lengths[0]),
                }
            )
    return rows


def print_lengths(rows: list[dict]) -> None:
    """Print a line for each engine, device and length."""
    form, several = cli.shown, len({row["device"] for row in rows}) > 1
    body = [
        [
            row["engine"] + (f", {row['device']}" if several else ""),
            str(row["prompt_tokens"]),
            form(row["prefill_tokens_per_s"], ".0f"),
            form(row["ms_per_token"], ".2f"),
            form(row["over_first"], ".2f") + "×",
            form(row["floor"], ".2f") + "×",
        ]
        for row in rows
    ]
    columns = ("engine", "prompt tokens", "prefill tokens/s", "ms a token", "over the first length", "by bytes alone")
    cli.print_table("plain decoding by length of prompt", columns, body)
