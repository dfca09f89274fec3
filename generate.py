"""Decode: prefill, then rounds of draft, verify and accept. The loop, its statistics and the command line.

`decode` is the whole algorithm (LayerSkip, arXiv 2404.16710, section 4.3, for any policy). It yields Rounds, and
everything downstream (the printing below, the programs under scripts/) reads that stream. Plain autoregressive
decoding is the policy that drafts nothing.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import cli
from kernels.exit_head import Exit
from model import Transformer
from policies import DraftPlan, DraftPolicy, Round, RoundContext, make_policy
from runner import Runner, check_num_draft_tokens
from sampling import SamplingConfig, accept, make_sampler

DEFAULT_PROMPT = 'def copy_file(source, target):\n    """Copy a file'
COMPARE_REPEATS = 9
CONVERSATION_TOKENS = 4096  # cache of --interactive, unless the model's context is shorter


@dataclass(frozen=True)
class GenerateConfig:
    """What decoding should produce: at most max_new_tokens ids, ending early after any of eos_ids."""

    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")


@dataclass
class Draft:
    """What a round proposes. hidden[i] maps depths to the hidden state [1, D] of the row that drafted tokens[i]."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    hidden: list[dict[int, Tensor]] = field(default_factory=list)
    resume_layer: int = 0


def decode(
    runner: Runner, prompt: Sequence[int], config: GenerateConfig, policy: DraftPolicy,
    cached: int = 0, finished: Callable[[int], bool] | None = None,
) -> Iterator[Round]:  # fmt: skip
    """Generate from `prompt` (token ids), one Round at a time; the first is the prefill with its one token.

    cached: how many leading tokens already have their K/V in the runner's cache (a conversation going on).
    finished: called with each emitted token in order; True ends the text after that token.
    Raises ValueError for a prompt that is empty, has unknown ids, or does not fit the cache with max_new_tokens.
    """
    check_prompt(prompt, config, runner.model.args.vocab_size, runner.cache_length)
    sampler = make_sampler(config.sampling)
    policy.start_prompt(prompt)
    tokens = list(prompt)
    start = time.perf_counter()
    hidden = runner.prefill(tokens[cached:], cached)
    _, first = sampler.verify((), runner.exit(hidden), len(tokens))
    new, ended = until_end([first], config.eos_ids, finished)
    tokens += new
    yield Round(tuple(new), seconds=time.perf_counter() - start)

    while not ended and (remaining := config.max_new_tokens - (len(tokens) - len(prompt))) > 0:
        start = time.perf_counter()
        position = len(tokens) - 1  # of the last token, the only one whose K/V is not in the cache yet
        plan = policy.start_round(RoundContext(tokens, remaining))
        played = runner.play(plan, config.sampling, tokens[-1], position, remaining - 1)
        if played:
            draft = whole_draft(plan, played[0], config.eos_ids)
            accepted, target = accept(draft.tokens, played[1])
        else:
            draft = draft_tokens(runner, plan, policy, sampler, tokens[-1], position, remaining - 1, config.eos_ids)
            rows = verify(runner, draft, tokens[-1], position)
            accepted, target = sampler.verify(draft.tokens, rows, position + 1)
        new, ended = until_end([*draft.tokens[:accepted], target], config.eos_ids, finished)
        tokens += new  # rolling back rejected drafts needs nothing: the next round writes over their cache slots
        step = Round(
            tuple(new), tuple(draft.tokens), min(accepted, len(new)), tuple(draft.exit_layers),
            draft.resume_layer, time.perf_counter() - start,
        )  # fmt: skip
        policy.end_round(step)
        yield step


def draft_tokens(
    runner: Runner, plan: DraftPlan, policy: DraftPolicy, sampler, token: int, position: int,
    limit: int, eos_ids: Sequence[int],
) -> Draft:  # fmt: skip
    """Draft at most `limit` tokens after `token`, which stands at `position`, as `plan` and `policy` say."""
    if plan.proposed:
        return Draft(tokens=list(plan.proposed[:limit]))
    draft = Draft()
    depths = sorted({*plan.exits, plan.first_skip} - {0, None})  # where a hidden state may be wanted by verify
    for index in range(min(plan.num_draft_tokens, limit)):
        hidden, states, depth = runner.embed([token]), {}, 0
        for stop in depths:
            hidden = runner.run_layers(hidden, position + index, depth, stop, plan.skip_attention, plan.skip_mlp)
            depth, states[stop] = stop, hidden
            if depth == plan.exits[-1] or (depth in plan.exits and policy.should_exit(depth, hidden)):
                break
        token = sampler.draft(runner.exit(hidden), position + index + 1)
        draft.tokens.append(token)
        draft.exit_layers.append(depth)
        draft.hidden.append(states)
        if token in eos_ids:  # nothing after it can be emitted
            break
    if draft.tokens:
        # Hidden states and K/V are the full model's only up to here, so here verification restarts, for every row.
        first_skip = runner.n_layer if plan.first_skip is None else plan.first_skip
        draft.resume_layer = min(first_skip, *draft.exit_layers)
    return draft


def whole_draft(plan: DraftPlan, tokens: list[int], eos_ids: Sequence[int]) -> Draft:
    """The Draft of a round that the runner played in one call, without what it drafted after an end of text."""
    tokens, _ = until_end(tokens, eos_ids, None)
    return Draft(tokens, [plan.exits[0]] * len(tokens) if tokens else [], resume_layer=plan.exits[0] if tokens else 0)


def verify(runner: Runner, draft: Draft, token: int, position: int) -> Exit:
    """Run the round's rows (the last token and the drafts after it) through the rest of the model -> K+1 rows' exit.

    Rows that drafted resume from their hidden state; the last draft was never fed in, so it starts from its embedding.
    """
    rows = [token, *draft.tokens]
    if draft.resume_layer == 0:
        hidden = runner.embed(rows)
    else:
        last = runner.run_layers(runner.embed(rows[-1:]), position + len(rows) - 1, 0, draft.resume_layer)
        hidden = torch.cat([*(states[draft.resume_layer] for states in draft.hidden), last])
    return runner.exit(runner.run_layers(hidden, position, draft.resume_layer, runner.n_layer))


def until_end(
    tokens: list[int], eos_ids: Sequence[int], finished: Callable[[int], bool] | None
) -> tuple[list[int], bool]:
    """The tokens up to and including the one that ends the text, and whether one did."""
    for index, token in enumerate(tokens):
        stop = finished(token) if finished else False
        if stop or token in eos_ids:
            return tokens[: index + 1], True
    return tokens, False


def check_prompt(prompt: Sequence[int], config: GenerateConfig, vocab_size: int, length: int) -> None:
    """Raise ValueError unless `prompt` holds known ids and fits `length` positions with config.max_new_tokens."""
    if not prompt:
        raise ValueError("prompt is empty and this tokenizer has no BOS token: give at least one token")
    if (worst := max(prompt, key=lambda t: max(t, -1 - t + vocab_size))) not in range(vocab_size):
        raise ValueError(f"prompt ids must be in 0..{vocab_size - 1}, got {worst}")
    if len(prompt) + config.max_new_tokens > length:
        raise ValueError(
            f"prompt of {len(prompt)} tokens + max_new_tokens {config.max_new_tokens} does not fit the "
            f"{length} positions available: shorten the prompt or lower --max_new_tokens"
        )


@dataclass
class Generation:
    """The Rounds of one text and the numbers defined on them. The prefill counts as no round and as no decoding."""

    prefill: Round
    rounds: list[Round]

    @classmethod
    def collect(cls, stream: Iterator[Round]) -> "Generation":
        prefill, *rounds = stream
        return cls(prefill, rounds)

    @property
    def tokens(self) -> list[int]:
        return [token for step in (self.prefill, *self.rounds) for token in step.tokens]

    @property
    def decode_s(self) -> float:
        return sum(step.seconds for step in self.rounds)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second: those after the first, which the prefill makes."""
        return (len(self.tokens) - 1) / self.decode_s if self.rounds else None

    def summary(self, model: Transformer) -> dict:
        """Every number of this generation, as it stands in JSON files."""
        drafted = sum(len(step.drafted) for step in self.rounds)
        accepted = sum(step.accepted for step in self.rounds)
        exits = [depth for step in self.rounds for depth in step.exit_layers]
        acceptance_rate = accepted / drafted if drafted else None
        return {
            "tokens": self.tokens,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": acceptance_rate,
            "rounds": len(self.rounds),
            "tokens_per_round": (len(self.tokens) - 1) / len(self.rounds) if self.rounds else None,
            "mean_exit_layer": statistics.mean(exits) if exits else None,
            "prefill_s": self.prefill.seconds,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "ideal_speedup": ideal_speedup(
                acceptance_rate, drafted / len(self.rounds), statistics.mean(exits), model.args.n_layer,
                head_cost_layers(model),
            ) if exits else 1.0,
        }  # fmt: skip


def head_cost_layers(model: Transformer) -> float:
    """Bytes of the LM head ÷ bytes of one layer: what a head costs where streaming weights is what costs."""
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    return model.lm_head.weight.nbytes / layer


def ideal_speedup(acceptance_rate: float, k: float, exit_layer: float, n_layer: int, head: float) -> float:
    """Speedup over autoregressive decoding if time were weight bytes alone: k drafts at exit_layer, then one full pass.

    `head` is the LM head's cost in layers. A round of (k(E + h) + L + h) layers emits acceptance·k + 1 tokens.
    """
    return (acceptance_rate * k + 1) * (n_layer + head) / (k * (exit_layer + head) + n_layer + head)


def policy_from_flags(flags: argparse.Namespace, n_layer: int) -> DraftPolicy:
    """The policy of --policy, --draft_exit and --num_draft_tokens; without them, static drafting at L/4."""
    if flags.policy is not None and flags.draft_exit is not None:
        raise ValueError(f"--draft_exit {flags.draft_exit} is short for --policy static:{flags.draft_exit}: give one")
    text = flags.policy or f"static:{max(1, n_layer // 4) if flags.draft_exit is None else flags.draft_exit}"
    return make_policy(text, n_layer, num_draft_tokens=flags.num_draft_tokens)


def compare_with_autoregressive(runner: Runner, prompt: list[int], config: GenerateConfig, policy: DraftPolicy) -> dict:
    """Time `policy` and plain decoding in turns on one prompt -> medians of tokens/s and whether all tokens agree.

    Where exactness needs padding, plain decoding is also timed without it: the speedup is over the faster of the two.
    """
    plain = make_policy("none", runner.n_layer)
    contenders = {"policy": (runner, policy), "plain": (runner, plain)}
    if not runner.rows_independent:
        unpadded = Runner(runner.model, runner.cache_length, 1, runner.compiled, exact=False)
        unpadded.warm_up()
        contenders["unpadded"] = (unpadded, plain)
    rates, texts = {name: [] for name in contenders}, {name: [] for name in contenders}
    for _ in range(COMPARE_REPEATS):
        for name, (chosen, how) in contenders.items():
            generation = Generation.collect(decode(chosen, prompt, config, how))
            rates[name].append(generation.tokens_per_s or 0.0)
            texts[name].append(generation.tokens)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    speculative = medians.pop("policy")
    comparable = config.sampling.temperature == 0 or config.sampling.verification == "coupled"
    return {
        "tokens_per_s": speculative,
        "autoregressive_tokens_per_s": max(medians.values()),
        "speedup": speculative / max(medians.values()) if max(medians.values()) else None,
        "repeats": COMPARE_REPEATS,
        "identical": all(t == texts["plain"][0] for t in texts["policy"] + texts["plain"]) if comparable else None,
    }


def run_once(session: cli.Session, flags: argparse.Namespace, config: GenerateConfig, policy: DraftPolicy) -> dict:
    """Decode one prompt to the terminal; return the JSON object of the run."""
    demonstration = flags.prompt is None and flags.prompt_file is None and flags.prompt_ids is None
    prompt = cli.read_prompt(flags, session.tokenizer, DEFAULT_PROMPT)
    check_prompt(prompt, config, session.args.vocab_size, session.args.max_seq_len)
    runner = make_runner(session, len(prompt) + config.max_new_tokens, policy)
    output = cli.StreamedText(session.tokenizer, flags.stop, flags.show_drafts)
    if session.tokenizer and not flags.chat:
        output.write(session.tokenizer.decode(prompt), "dim")
    stream = decode(runner, prompt, config, policy, finished=output.ends_at)
    generation = Generation.collect(output.show(step) for step in stream)
    text = output.close()
    result = {"prompt_ids": prompt, "text": text if session.tokenizer else None}
    result |= generation.summary(session.model)
    if demonstration or flags.compare:
        result["comparison"] = compare_with_autoregressive(runner, prompt, config, policy)
    result |= {"compile_s": session.compile_s + runner.compile_s, "config": {**vars(flags), "policy": repr(policy)}}
    result["config"] |= {"backend": runner.backend, "precision": str(session.model.norm.weight.dtype)[6:]}
    print_result(result, repr(policy), session.args.n_layer)
    return result | cli.environment()


def print_result(result: dict, policy: str, n_layer: int) -> None:
    """The table at the end of a run."""
    comparison = result.get("comparison")
    shown = cli.shown
    rows = [
        ["new tokens", str(len(result["tokens"]))],
        ["prefill", f"{result['prefill_s'] * 1e3:.1f} ms"],
        ["tokens/s", shown(result["tokens_per_s"])],
        ["acceptance rate", shown(result["acceptance_rate"], ".2f")],
        ["tokens per round", shown(result["tokens_per_round"], ".2f")],
        ["mean exit layer", f"{shown(result['mean_exit_layer'])} of {n_layer}"],
        ["ideal speedup for this acceptance", shown(result["ideal_speedup"], ".2f") + "×"],
    ]
    if comparison:
        times = f"(median of {comparison['repeats']})"
        rows[2] = [f"tokens/s {times}", shown(comparison["tokens_per_s"])]
        rows[3:3] = [
            [f"tokens/s autoregressive {times}", shown(comparison["autoregressive_tokens_per_s"])],
            ["speedup", shown(comparison["speedup"], ".2f") + "×"],
        ]
        identical = {True: "yes", False: "NO", None: "not meant to be"}[comparison["identical"]]
        rows.append(["identical tokens", identical])
    if result["compile_s"] > 1:
        rows.append(["compiling", f"{result['compile_s']:.1f} s"])
    cli.print_table(policy, ["", "this run"], rows)


def make_runner(session: cli.Session, length: int, policy: DraftPolicy) -> Runner:
    """Load the weights and make a runner for `policy`, compiled if the flags want it, with progress on stderr."""
    check_num_draft_tokens(policy.num_draft_tokens)
    runner = Runner(session.load(), length, 1 + policy.num_draft_tokens, session.flags.compile, notice=cli.notice)
    if runner.backend == "inductor":
        cli.notice("compiling one transformer block (seconds when cached, up to a minute the first time) …")
        runner.warm_up()
        cli.notice(f"compiled in {runner.compile_s:.1f} s")
    if runner.rows_independent and session.flags.threads is None:
        runner.choose_threads()
    return runner


def run_interactive(
    session: cli.Session, flags: argparse.Namespace, config: GenerateConfig, policy: DraftPolicy
) -> dict:
    """A conversation at the terminal. The cache is kept: each turn prefills only what is new."""
    if flags.chat:
        session.tokenizer.render_chat([{"role": "user", "content": ""}])  # no template: say so before loading
    runner = make_runner(session, min(session.args.max_seq_len, CONVERSATION_TOKENS), policy)
    tokens: list[int] = []
    messages: list[dict] = []
    turns: list[dict] = []
    cli.notice("type a prompt and press Enter; an empty line or Ctrl-D ends")
    while line := read_line():
        said = [*messages, {"role": "user", "content": line}]
        try:
            if flags.chat:
                prompt = session.tokenizer.apply_chat(said)
            else:
                prompt = tokens + session.tokenizer.encode(line, bos=not tokens)
        except ValueError as error:
            cli.notice(str(error))
            continue
        messages = said
        known = tokens[:-1]  # the last token was emitted but never fed in: it has no K/V yet
        cached = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        output = cli.StreamedText(session.tokenizer, flags.stop, flags.show_drafts)
        try:
            check_prompt(prompt, config, session.args.vocab_size, runner.cache_length)
        except ValueError as error:
            cli.notice(f"{error}; starting a new conversation")
            tokens, messages = [], []
            continue
        stream = decode(runner, prompt, config, policy, min(cached, len(prompt) - 1), output.ends_at)
        generation = Generation.collect(output.show(step) for step in stream)
        text = output.close()
        messages.append({"role": "assistant", "content": text})
        tokens = prompt + generation.tokens
        turns.append({"prompt_ids": prompt, "text": text, **generation.summary(session.model)})
        cli.notice(f"[{cli.shown(turns[-1]['tokens_per_s'])} tokens/s, {cached} tokens from the cache]")
    compile_s = session.compile_s + runner.compile_s
    return {"turns": turns, "compile_s": compile_s, "config": vars(flags), **cli.environment()}


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
    parser.add_argument("--policy", metavar="NAME:key=value,…", help="none: plain decoding; static:E (default: L/4)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument("--compare", action="store_true", help="also time plain decoding and compare the tokens")
    parser.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--show_drafts", action="store_true", help="colour accepted drafts, strike out rejected ones")
    return parser.parse_args(argv)


def main() -> None:
    flags = parse_flags()
    config = GenerateConfig(flags.max_new_tokens, cli.sampling_config(flags))  # bad values end here, before any loading
    cli.check_writable(flags.json)
    session = cli.open_session(flags, needs_tokenizer=flags.prompt_ids is None)
    config = dataclasses.replace(config, eos_ids=session.eos_ids(flags))
    policy = policy_from_flags(flags, session.args.n_layer)
    run = run_interactive if flags.interactive else run_once
    result = run(session, flags, config, policy)
    if flags.json:
        cli.write_json(flags.json, result)


if __name__ == "__main__":
    cli.run(main)
