"""Decode: prefill, then rounds of draft, verify and accept. The loop over rounds, and the command line.

`decode` is self-speculative decoding (LayerSkip, arXiv 2404.16710, section 4.3) for any policy. It yields a Round for
the prefill and for each round after it; `decoding/rounds.py` plays one. The command line below and the programs under
scripts/ read those Rounds. Plain autoregressive decoding is the policy that drafts nothing.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import cli
import tp
from decoding.calibrate import agreement
from decoding.compare import compare_with_plain, share_equal
from decoding.engine import Engine
from decoding.generation import GenerateConfig, Generation, check_prompt, until_end
from decoding.rounds import RoundPlayer
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import policy_names
from drafting.plan import Round, RoundContext
from drafting.policy import DraftPolicy
from errors import UserError
from loading.files import check_writable, write_json

DEFAULT_PROMPT = 'def copy_file(source, target):\n    """Copy a file'
WATCHED_TOKENS = 64  # at the end of a prompt, see DraftPolicy.see_prompt
# Words of other projects -> policies. CALM's "softmax" is the difference between the two best.
CONFIDENCE_METHODS = {name: name for name in ("confidence", "margin", "entropy", "saturation")} | {
    "top1": "confidence",
    "softmax": "margin",
    "state": "saturation",
}
CONVERSATION_TOKENS = 4096  # cache of --interactive, unless the model's context is shorter


def decode(
    runner: Runner,
    prompt: Sequence[int],
    config: GenerateConfig,
    policy: DraftPolicy,
    cached: int = 0,
    finished: Callable[[int], bool] | None = None,
    verified: bool = True,
) -> Iterator[Round]:
    """Generate from `prompt` (token ids), one Round at a time; the first is the prefill with its one token.

    cached: how many leading tokens already have their K/V in the runner's cache (a conversation going on).
    finished: called with each emitted token in order; True ends the text after that token.
    verified=False: emit tokens as they are drafted. Lossy: the text differs from the full model's (LayerSkip's early
    exit; CALM). A token that exits nowhere runs through all layers.
    Raises UserError for a prompt that is empty, has unknown ids, or does not fit the cache with max_new_tokens, and for
    a policy whose drafts need verification if there is none.
    """
    if not verified:
        check_unverified(policy, config.sampling)
    tokens = list(prompt)
    player = RoundPlayer(runner, policy, runner.sampler(config.sampling), config.eos_ids, verified)
    first, ended = until_text_ends(prefill(player, tokens, config, cached), config, finished)
    tokens += first.tokens
    yield first

    while not ended and (remaining := config.max_new_tokens - (len(tokens) - len(prompt))) > 0:
        start = time.perf_counter()
        plan = policy.start_round(RoundContext(tokens, remaining, config.sampling.temperature > 0, player.hidden))
        # Draft, verify, accept. The last token is the only one whose K/V is not in the cache yet.
        round = player.play(plan, tokens[-1], len(tokens) - 1, remaining, start)
        round, ended = until_text_ends(round, config, finished)
        tokens += round.tokens  # rejected drafts are rolled back for free: the next round writes over their cache slots
        policy.end_round(round)
        yield round


def prefill(player: RoundPlayer, tokens: list[int], config: GenerateConfig, cached: int) -> Round:
    """Run the prompt `tokens` through all layers and choose the full model's token after it."""
    runner, policy, sampler = player.runner, player.policy, player.sampler
    check_prompt(tokens, config, runner.model.args.vocab_size, runner.cache_length)
    policy.start_prompt(tokens)
    start = time.perf_counter()
    states = runner.prefill_states(tokens[cached:], cached, policy.watched_depths)
    last = states[runner.n_layer][-1:]
    if policy.reads_hidden:
        player.remember(last)
    first = sampler.first(runner.exit(last, sampler.draw(len(tokens))), len(tokens))
    if policy.watched_depths:
        tail = {depth: hidden[-WATCHED_TOKENS:] for depth, hidden in states.items()}
        position = len(tokens) + 1 - len(tail[runner.n_layer])
        policy.see_prompt(agreement(runner, sampler, tail, position, policy.adapters))
    return Round((first,), seconds=time.perf_counter() - start)


def until_text_ends(round: Round, config: GenerateConfig, finished: Callable[[int], bool] | None) -> tuple[Round, bool]:
    """Cut a round behind the token that ends the text -> the round, and whether one did."""
    tokens, ended = until_end(round.tokens, config.eos_ids, finished)
    if len(tokens) < len(round.tokens):
        round = dataclasses.replace(round, tokens=tokens, accepted=min(round.accepted, len(tokens)))
    return round, ended


def check_unverified(policy: DraftPolicy, sampling: SamplingConfig) -> None:
    """Raise UserError for what early exit cannot do."""
    if policy.verifiable_only:
        raise UserError(f"policy {policy} drafts what only verification can judge: it cannot run with --no_verify")
    if sampling.verification == "rejection":
        raise UserError("--no_verify does not go with --verification rejection: there is nothing to accept or reject")


def check_unverified_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for flags of a program that do not go with its --no_verify."""
    for name in ("interactive", "draft_vocab", "draft_quantize"):
        if getattr(flags, name, None) not in (None, False):
            raise UserError(f"--no_verify does not go with --{name}")


def policy_text(flags: argparse.Namespace, n_layer: int) -> str:
    """Return the policy string of --policy or a shorter flag; without any, auto, or static at L/4 with --no_verify.

    Raises UserError if several name one.
    """
    given = {
        "--policy": flags.policy,
        "--draft_exit": f"static:{flags.draft_exit}",
        "--dynamic_early_exit_mode": flags.dynamic_early_exit_mode,
        "--layer_skip_proportion": f"layer_skip_proportion:{flags.layer_skip_proportion}",
        "--conf_method": CONFIDENCE_METHODS.get(flags.conf_method),
    }
    given = {flag: text for flag, text in given.items() if getattr(flags, flag[2:]) is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each name a policy: give one, as in --policy static:3")
    text = next(iter(given.values()), None)
    if flags.conf_threshold is not None:
        if flags.policy is not None:
            raise UserError(
                f"--conf_threshold {flags.conf_threshold} does not go with --policy: write it into the "
                f"policy, as in confidence:threshold={flags.conf_threshold}"
            )
        text = text or "confidence"
        text += ("," if ":" in text else ":") + f"threshold={flags.conf_threshold}"
    return text or (f"static:{max(1, n_layer // 4)}" if flags.no_verify else "auto")


def policy_from_flags(flags: argparse.Namespace, engine: Engine) -> DraftPolicy:
    """Make the policy that the flags ask for. Raises UserError if they cannot be obeyed together."""
    policy = engine.policy(policy_text(flags, engine.n_layer), num_draft_tokens=flags.num_draft_tokens)
    if flags.no_verify:
        check_unverified_flags(flags)
        check_unverified(policy, cli.sampling_config(flags))
    if flags.interactive and flags.compare:
        raise UserError("--compare does not go with --interactive: compare on one --prompt")
    return policy


def run_once(engine: Engine, flags: argparse.Namespace, config: GenerateConfig, policy: DraftPolicy) -> dict:
    """Decode one prompt to the terminal; return the JSON object of the run."""
    demonstration = flags.prompt is None and flags.prompt_file is None and flags.prompt_ids is None
    prompt = cli.read_prompt(flags, engine.tokenizer, DEFAULT_PROMPT)
    check_prompt(prompt, config, engine.args.vocab_size, engine.args.max_seq_len)
    engine.prepare([policy], len(prompt) + config.max_new_tokens, config.sampling, prompt)
    runner = engine.runner(policy)
    output = cli.TerminalText(engine.tokenizer, flags.stop, flags.show_drafts)
    if engine.tokenizer and not flags.chat:
        output.write(engine.tokenizer.decode(prompt), "dim")
    stream = decode(runner, prompt, config, policy, finished=output.take, verified=not flags.no_verify)
    generation = Generation.collect(output.show(round) for round in stream)
    text = output.close()
    explained = policy.explain() if flags.verbose else []
    result = {"prompt_ids": prompt, "text": text if engine.tokenizer else None}
    result |= generation.summary(engine.model)
    if demonstration or flags.compare:
        result["comparison"] = compare(engine, policy, prompt, config, verified=not flags.no_verify)
    if flags.draft_vocab is not None:
        result["draft_vocab_coverage"] = sum(t < flags.draft_vocab for t in generation.tokens) / len(generation.tokens)
    result |= run_facts(engine, flags, policy)
    print_result(result, engine.n_layer)
    for line in explained:
        print(line)
    return result


def run_facts(engine: Engine, flags: argparse.Namespace, policy: DraftPolicy) -> dict:
    """Return what a run was made with and what that took, as it stands in JSON files."""
    return {
        "compile_s": engine.compile_s + engine.runner(policy).compile_s,
        "weight_bytes": engine.weight_bytes,
        "draft_weight_bytes": engine.draft_bytes,
        "verified": not flags.no_verify,
        "config": vars(flags) | engine.facts(policy),
        **cli.environment(),
    }


def compare(
    engine: Engine, policy: DraftPolicy, prompt: list[int], config: GenerateConfig, verified: bool = True
) -> dict:
    """Time `policy` and plain decoding in turns on one prompt -> medians of tokens/s and whether all tokens agree.

    Plain decoding is also timed in its fastest setting; the speedup is over the faster one. verified=False: early exit
    instead, and the share of its tokens that the full model would have chosen there.
    """
    runner, plain = engine.runner(policy), engine.policy("none")
    fast_runner, fast_plain = engine.fastest_plain()
    engine.warm_up()
    texts: list[list[int]] = []

    def speculative() -> Generation:
        generation = Generation.collect(decode(runner, prompt, config, policy, verified=verified))
        texts.append(generation.tokens)
        return generation

    comparable = verified and (config.sampling.temperature == 0 or config.sampling.verification == "coupled")
    result = compare_with_plain(
        speculative,
        lambda: Generation.collect(decode(runner, prompt, config, plain)),
        lambda: Generation.collect(decode(fast_runner, prompt, config, fast_plain)),
        comparable,
    )
    share = None if verified else share_equal(runner, prompt, texts[0], config.sampling)
    return result | {"equal_to_full_model": share}


def print_result(result: dict, n_layer: int) -> None:
    """Print the table at the end of a run."""
    title = result["config"]["policy"] + ("" if result["verified"] else " (unverified: not the full model's text)")
    comparison = result.get("comparison")
    shown = cli.shown
    rows = [
        ["new tokens", str(len(result["tokens"]))],
        ["prefill", f"{result['prefill_s'] * 1e3:.1f} ms"],
        ["tokens/s", shown(result["tokens_per_s"])],
        ["acceptance rate", shown(result["acceptance_rate"], ".2f")],
        ["tokens per round", shown(result["tokens_per_round"], ".2f")],
        ["mean exit layer", f"{shown(result['mean_exit_layer'])} of {n_layer}"],
        ["layer visits per token", shown(result["layer_visits_per_token"])],
        ["speedup by bytes alone", shown(result["ideal_speedup"], ".2f") + "×"],
    ]
    if "draft_vocab_coverage" in result:
        rows.append(["text within the draft's vocabulary", shown(result["draft_vocab_coverage"], ".1%")])
    if comparison:
        times = f"(median of {comparison['repeats']})"
        rows[2] = [f"tokens/s {times}", shown(comparison["tokens_per_s"])]
        rows[3:3] = [
            [f"tokens/s autoregressive {times}", shown(comparison["autoregressive_tokens_per_s"])],
            ["speedup", shown(comparison["speedup"], ".2f") + "×"],
        ]
        identical = {True: "yes", False: "NO", None: "not meant to be"}[comparison["identical"]]
        rows.append(["identical tokens", identical])
        if comparison["equal_to_full_model"] is not None:
            rows.append(["tokens the full model would choose", shown(comparison["equal_to_full_model"], ".1%")])
    if result["compile_s"] > 1:
        rows.append(["compiling", f"{result['compile_s']:.1f} s"])
    cli.print_table(title, ["", "this run"], rows)


def run_interactive(engine: Engine, flags: argparse.Namespace, config: GenerateConfig, policy: DraftPolicy) -> dict:
    """Hold a conversation at the terminal. The cache is kept: each turn prefills only what is new."""
    if flags.chat:
        engine.tokenizer.render_chat([{"role": "user", "content": ""}])  # no template: say so before loading
    engine.prepare([policy], min(engine.args.max_seq_len, CONVERSATION_TOKENS), config.sampling)
    runner = engine.runner(policy)
    tokens: list[int] = []
    messages: list[dict] = []
    turns: list[dict] = []
    cli.notice("type a prompt and press Enter; an empty line or Ctrl-D ends")
    while line := engine.group.led(read_line) if engine.group else read_line():
        said = [*messages, {"role": "user", "content": line}]
        try:
            if flags.chat:
                prompt = engine.tokenizer.apply_chat(said)
            else:
                prompt = tokens + engine.tokenizer.encode(line, bos=not tokens)
        except UserError as error:
            cli.notice(str(error))
            continue
        messages = said
        known = tokens[:-1]  # the last token was emitted but never fed in: it has no K/V yet
        cached = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        output = cli.TerminalText(engine.tokenizer, flags.stop, flags.show_drafts)
        try:
            check_prompt(prompt, config, engine.args.vocab_size, runner.cache_length)
        except UserError as error:
            cli.notice(f"{error}; starting a new conversation")
            tokens, messages = [], []
            continue
        stream = decode(runner, prompt, config, policy, min(cached, len(prompt) - 1), output.take)
        generation = Generation.collect(output.show(round) for round in stream)
        text = output.close()
        messages.append({"role": "assistant", "content": text})
        tokens = prompt + generation.tokens
        turns.append({"prompt_ids": prompt, "text": text, **generation.summary(engine.model)})
        cli.notice(f"[{cli.shown(turns[-1]['tokens_per_s'])} tokens/s, {cached} tokens from the cache]")
        for line in policy.explain() if flags.verbose else ():
            cli.notice(line)
    return {"turns": turns} | run_facts(engine, flags, policy)


def read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate text by self-speculative decoding; without arguments, a demonstration.",
        epilog="example: python generate.py --prompt 'def main():' --draft_exit 3 --num_draft_tokens 4",
    )
    cli.add_model_flags(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt_file", metavar="FILE", help="UTF-8 text")
    prompt.add_argument("--prompt_ids", metavar="1,5,9", help="token ids, exactly as given")
    prompt.add_argument("--interactive", action="store_true", help="a conversation that keeps its cache")
    cli.add_decode_flags(parser)
    parser.add_argument("--draft_exit", "--exit_layer", type=int, metavar="E", help="short for --policy static:E")
    parser.add_argument(
        "--policy", metavar="NAME:key=value,…", help="where drafts exit (default: auto): " + ", ".join(policy_names())
    )
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="early exit: emit drafts unverified, another text than the full model's",
    )
    parser.add_argument("--verbose", action="store_true", help="say what the policy chose and why")
    alias = parser.add_argument_group("names of the LayerSkip family, for --policy")
    alias.add_argument("--dynamic_early_exit_mode", metavar="NAME", help="the policy NAME")
    alias.add_argument("--layer_skip_proportion", type=float, metavar="P", help="the policy layer_skip_proportion:P")
    alias.add_argument("--conf_method", choices=list(CONFIDENCE_METHODS), help="the policy that measures confidence so")
    alias.add_argument("--conf_threshold", type=float, metavar="T", help="its threshold")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument("--compare", action="store_true", help="also time plain decoding and compare the tokens")
    parser.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--show_drafts", action="store_true", help="colour accepted drafts, strike out rejected ones")
    flags = parser.parse_args(argv)
    if flags.chat and flags.prompt_ids is not None:
        raise UserError("--chat does not go with --prompt_ids: the template is applied to text")
    return flags


def main() -> None:
    with tp.joined() as group:
        flags, leads = parse_flags(), group is None or group.leads
        config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))  # bad values end before any loading
        if leads:
            check_writable(flags.json)
        engine = cli.open_engine(flags, needs_tokenizer=flags.prompt_ids is None, group=group)
        config = dataclasses.replace(config, eos_ids=cli.eos_ids(flags, engine))
        policy = policy_from_flags(flags, engine)
        run = run_interactive if flags.interactive else run_once
        result = run(engine, flags, config, policy)
        if flags.json and leads:
            write_json(flags.json, result)


if __name__ == "__main__":
    cli.run(main)
