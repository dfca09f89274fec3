"""The engine sections of `gpu_check`: exactness, speed and memory of decoding.

A policy that fails is recorded and left out; the others go on. Everything is exact before anything is timed.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from decoding.calibrate import calibrate
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.plan import Round
from drafting.policy import DraftPolicy
from generate import decode
from loading.files import write_json
from model import Transformer
from scripts.gpu_check.kernels import load_kernels, nbytes
from scripts.gpu_check.models import make_model, quantise_model, random_prompt, set_dial, weight_bytes
from scripts.gpu_check.report import Report, free_memory
from scripts.gpu_check.shapes import DRAFTS

MAX_ROWS = 8  # of a call: prompt lookup and auto draft up to 7
SETTINGS = {"greedy": SamplingConfig(), "sampled": SamplingConfig(temperature=0.8, seed=1)}


def static_texts(exit_layer: int) -> list[str]:
    return [f"static:{exit_layer},num_draft_tokens={k}" for k in DRAFTS]


def dynamic_texts(exit_layer: int) -> list[str]:
    """List policies that stop, exit, skip, propose or choose while decoding. FILE: see `SyntheticModel.policy`."""
    return [
        f"static:{exit_layer},num_draft_tokens=5,stop=0.5",
        f"confidence:0.5,candidates={exit_layer}-{2 * exit_layer},num_draft_tokens=5",
        "skip_set:FILE,num_draft_tokens=3",
        f"prompt_lookup+static:{exit_layer}",
        "auto",
    ]


class SyntheticModel:
    """A model with random weights, of one shape and precision; its runner, and the policies that decoded with it."""

    def __init__(self, report: Report, name: str, mode: str):
        load_kernels()
        self.report, self.shape, self.title = report, report.shapes.models[name], f"{name} {mode}"
        self.thorough = self.title == report.shapes.thorough
        self.model = make_model(self.shape.args, report.device)
        report.section["dial"] = set_dial(self.model, self.shape.exit_layer)
        quantise_model(self.model, mode)
        free_memory(report.device)
        if report.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.prompt = random_prompt(self.shape.args.vocab_size, report.shapes.prompt)
        self.policies: dict[str, DraftPolicy] = {}
        self.plain: dict[str, list[int]] = {}  # the text of plain decoding by setting
        compiled = report.attempt("torch.compile of the block", self.make_runner, True)
        self.runner = compiled or self.make_runner(compile=False)
        report.section["backend"] = self.runner.backend

    def make_runner(self, compile: bool) -> Runner:
        shapes, section, start = self.report.shapes, self.report.section, time.perf_counter()
        runner = Runner(
            self.model,
            shapes.prompt + shapes.exact_tokens,
            MAX_ROWS,
            compile=compile and self.report.device == "cuda",
            notice=section["notices"].append,
        )
        runner.warm_up(skips_sublayers=self.thorough)
        section["warm_up_s"] = time.perf_counter() - start
        return runner

    def policy(self, text: str) -> DraftPolicy:
        """Make the policy that `text` names, once. FILE in it: a skip set of three in four layers behind the exit."""
        if text not in self.policies:
            args, exit_layer = self.shape.args, self.shape.exit_layer
            skips = [layer for layer in range(exit_layer, args.n_layer) if (layer - exit_layer) % 4 < 3]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "skips.json"
                write_json(file, {"skip_attention": skips, "skip_mlp": skips})
                policy = make_policy(text.replace("FILE", str(file)), args.n_layer, args.dim)
            calibrate(self.runner, policy, self.prompt, SamplingConfig())
            self.policies[text] = policy
        return self.policies[text]

    def rounds(self, text: str, count: int, setting: str = "greedy") -> Iterator[Round]:
        return decode(self.runner, self.prompt, GenerateConfig(count, SETTINGS[setting]), self.policy(text))

    def continued(self, text: str, count: int, setting: str = "greedy") -> Generation:
        return Generation.collect(self.rounds(text, count, setting))

    def plain_tokens(self, setting: str) -> list[int]:
        """Return the text of plain decoding. If even that cannot be captured, rounds go call by call from then on."""
        if setting not in self.plain:
            arguments = "none", self.report.shapes.exact_tokens, setting
            generation = self.report.attempt(f"plain decoding, {setting}", self.continued, *arguments)
            if generation is None:
                self.runner.call_by_call = True
                self.report.section["notices"].append("rounds call by call: playing them in one failed")
                generation = self.continued(*arguments)
            self.plain[setting] = generation.tokens
        return self.plain[setting]


def check_engine(report: Report, name: str, mode: str) -> None:
    """Check plain and static decoding; for one model also sampled, and then with the dynamic policies."""
    synthetic = SyntheticModel(report, name, mode)
    exit_layer, settings = synthetic.shape.exit_layer, ("greedy", "sampled") if synthetic.thorough else ("greedy",)
    texts = check_exactness(synthetic, static_texts(exit_layer), settings)
    plain = synthetic.plain["greedy"]
    report.section["distinct_share"] = len(set(plain)) / len(plain)  # small: the text is a loop
    time_in_turns(synthetic, texts, show_plain=True)
    report.section["memory"] = memory(synthetic.model, report.device)
    if synthetic.thorough:
        time_in_turns(synthetic, check_exactness(synthetic, dynamic_texts(exit_layer), ("greedy",)))


def check_exactness(synthetic: SyntheticModel, texts: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Compare the tokens of each policy with plain decoding's -> the policies that have run to the end."""
    report, count, ran = synthetic.report, synthetic.report.shapes.exact_tokens, list(texts)
    for setting in settings:
        plain = synthetic.plain_tokens(setting)
        for text in texts:
            name = f"exact: {synthetic.title} {text} {setting}"
            generation = report.attempt(name, synthetic.continued, text, count, setting)
            if generation is None:
                ran = [other for other in ran if other != text]
                continue
            different = [i for i, (a, b) in enumerate(itertools.zip_longest(generation.tokens, plain)) if a != b]
            numbers = {"different": len(different), "first_at": different[0]} if different else {}
            report.check(name, not different, **numbers)
            report.save()
    return ran


def time_in_turns(synthetic: SyntheticModel, texts: Sequence[str], show_plain: bool = False) -> None:
    """Time plain decoding and each policy in turns, so that what slows the machine slows all; add their rows."""
    report, shapes = synthetic.report, synthetic.report.shapes
    runs: dict[str, list[Generation]] = {text: [] for text in ("none", *texts)}
    for turn in range(shapes.repeats + 1):  # the first is not timed: rounds are captured, as far as they are known
        for text in list(runs):
            generation = report.attempt(f"timing: {synthetic.title} {text}", synthetic.continued, text, shapes.tokens)
            if generation is None:
                del runs[text]
            elif turn:
                runs[text].append(generation)
        if "none" not in runs:
            return
    for text, generations in runs.items():
        if text == "none" and not show_plain:
            continue
        same = all(generation.tokens == synthetic.plain["greedy"][: shapes.tokens] for generation in generations)
        report.check(f"repeatable: {synthetic.title} {text}", same)
        report.row(**speed_row(report, synthetic.model, text, generations, runs["none"]))


def speed_row(report: Report, model: Transformer, text: str, runs: list[Generation], plain: list[Generation]) -> dict:
    """Return the speedup over plain decoding in the same turn, beside the one by weight bytes alone."""
    rates = [generation.tokens_per_s for generation in runs]
    summaries = [generation.summary(model) for generation in runs]
    summary = sorted(zip(rates, range(len(runs)), summaries, strict=True))[len(runs) // 2][2]  # auto's differ
    speedup = statistics.median(a / b.tokens_per_s for a, b in zip(rates, plain, strict=True))
    layer, head = weight_bytes(model.layers) / model.args.n_layer, weight_bytes(model.lm_head)
    read = summary["layer_visits_per_token"] * layer + summary["head_visits_per_token"] * head
    return {
        "policy": text,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_runs": rates,
        "speedup": speedup,
        "acceptance_rate": summary["acceptance_rate"],
        "tokens_per_round": summary["tokens_per_round"],
        "ideal_speedup": summary["ideal_speedup"],
        "share_of_ideal": speedup / summary["ideal_speedup"],
        "weight_bytes_per_token": read,
        "share_of_bandwidth": report.share(read * statistics.median(rates)),
        "prefill_ms": 1e3 * statistics.median(generation.prefill.seconds for generation in runs),
        "round_us": 1e6 * statistics.median(g.decode_s / len(g.rounds) for g in runs),
        "proposed_rounds": sum(bool(step.drafted and not step.exit_layers) for step in runs[0].rounds),
    }


def memory(model: Transformer, device: str) -> dict:
    cache = sum(nbytes((layer.attention.k_cache, layer.attention.v_cache)) for layer in model.layers)
    weights = weight_bytes(model)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "weights_bytes": weights,
        "cache_bytes": cache,
        "peak_bytes": peak,
        "peak_over_needed": peak / (weights + cache) if peak else None,
    }
