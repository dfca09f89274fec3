"""Make skipfast a model of the lm-evaluation-harness, which asks it for texts and for log-likelihoods.

A text is decoded by `generate.decode` with any policy. A likelihood comes from the LM head after any layer. Under
torchrun every rank prepares the same requests, answers its share and gets the answers of all, so that each computes
what a single process would. The harness's own way of sharing does not: it splits documents, pads them with repeated
requests, and adds up numbers in another order.

`lm_eval` is optional: it is imported inside functions.
"""

import difflib
import hashlib
import importlib.util
import itertools
import json
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from decoding.generation import GenerateConfig, Generation, check_prompt
from decoding.runner import PREFILL_CHUNK, Runner
from decoding.sampling import SamplingConfig
from decoding.text import TextStream
from drafting.policy import DraftPolicy
from errors import UserError
from generate import decode
from scripts.common.metrics import INSTALL
from scripts.common.ranks import Ranks

BUNDLED = Path(__file__).with_name("tasks")
HEAD_ROWS = 64  # whose logits are in memory together
COUNT_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first wins
GENERATION_KEYS = {*COUNT_KEYS, "until", "do_sample", "temperature", "top_p", "top_k"}
IGNORED = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # with these values


def check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"scripts.eval needs the package lm_eval: {INSTALL}")


# ---- tasks ----


def find_tasks(names: Sequence[str], include_path: Sequence[str], metadata: dict | None) -> tuple:
    """Return the harness's task manager, and the tasks that `names` (patterns, groups, YAML files) mean.

    Looks among the bundled tasks and those of include_path first: reading the harness's own list takes seconds.
    Raises UserError for a name that means nothing.
    """
    from lm_eval.tasks import TaskManager

    for path in include_path:
        if not Path(path).is_dir():
            raise UserError(f"include_path {path}: there is no such folder")
    manager, missing = None, names
    for defaults in (False, True):
        manager = TaskManager(include_path=[BUNDLED, *include_path], include_defaults=defaults, metadata=metadata)
        locate_bundled(manager)
        matching = {
            name: [name] if Path(name).suffix == ".yaml" and Path(name).is_file() else manager.match_tasks([name])
            for name in names
        }
        missing = [name for name, matches in matching.items() if not matches]
        if not missing:
            return manager, list(dict.fromkeys(itertools.chain.from_iterable(matching.values())))
    near = difflib.get_close_matches(missing[0], manager.all_tasks, 3)
    raise UserError(
        f"tasks: there is no task {missing[0]!r}"
        + (f" (near: {', '.join(near)})" if near else "")
        + "; `lm_eval ls tasks` lists the harness's, --include_path FOLDER adds your own"
    )


def locate_bundled(manager) -> None:
    """Let the bundled tasks find their data from any folder; their files say where it is in the repository."""
    for entry in manager.task_index.values():
        if entry.yaml_path and entry.yaml_path.parent == BUNDLED:
            files = entry.cfg["dataset_kwargs"]["data_files"]
            files.update({split: str(BUNDLED.parents[2] / path) for split, path in files.items()})
            entry.yaml_path = None  # so that the harness takes entry.cfg and does not read the file again


def load_tasks(manager, names: Sequence[str]) -> list:
    """Load the tasks and their data -> what the harness takes as `tasks`. Raises UserError if that fails."""
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of the hub, of files, of YAML: whatever the harness and its libraries raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"tasks: cannot load {', '.join(names)} ({type(error).__name__}: {reason}); without a network "
            "only tasks whose data are local files can be loaded"
        ) from error
    inner = {name for names in loaded["group_map"].values() for name in names}
    top = loaded["groups"] | loaded["tasks"]
    in_groups = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    return [item for name, item in top.items() if name not in inner | in_groups]


def check_fewshot(task, wanted: int | None) -> None:
    """Raise UserError if a task has fewer solved examples than `wanted`; None: than its own settings want."""
    own, shots = task.get_config("num_fewshot"), getattr(task, "fewshot_cfg", None)
    count = own if wanted is None or own == 0 else wanted  # the harness never overrules a task's own 0
    if not count or shots is None:  # a task written in Python chooses its examples itself
        return
    sampler = getattr(task, "sampler", None)
    known = len(sampler.fewshot_docs()) if sampler else 0
    most = max(0, known - (shots.split == task.config.test_split))  # a question is no example for itself
    if count > most:
        raise UserError(f"num_fewshot must be at most {most} for the task {task.config.task}, got {count}")


def check_generation(kwargs: dict, where: str) -> None:
    """Raise UserError for generation arguments that decoding here does not know, or that have impossible values."""
    for key, value in kwargs.items():
        if key not in GENERATION_KEYS and not (key in IGNORED and value == IGNORED[key]):
            raise UserError(
                f"{where}: generation argument {key}={value!r} is not supported; known are "
                f"{', '.join(sorted(GENERATION_KEYS))}"
            )
    try:
        for key in COUNT_KEYS:
            if number_of(kwargs, key, int, 1) < 1:
                raise UserError(f"{key} must be 1 or more, got {kwargs[key]}")
        task_sampling(kwargs, SamplingConfig())
        until = kwargs.get("until") or []
        if not all(isinstance(stop, str) for stop in (until if isinstance(until, list) else [until])):
            raise UserError(f"until must be a text or a list of texts, got {until!r}")
        if not isinstance(kwargs.get("do_sample"), bool | None):
            raise UserError(f"do_sample must be true or false, got {kwargs['do_sample']!r}")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def number_of(kwargs: dict, key: str, kind: type, default=None):
    """Return a generation argument that is a number; `default` without it. Raises UserError naming it."""
    value = kwargs.get(key)
    if value is None:
        return default
    try:
        number = kind(value)
        if isinstance(value, bool) or number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} must be a {'whole ' * (kind is int)}number, got {value!r}") from None
    return number


def task_sampling(kwargs: dict, own: SamplingConfig) -> SamplingConfig:
    """Return how to sample a request with these generation arguments: as they say if they sample, else by `own`."""
    temperature = number_of(kwargs, "temperature", float, 0.0)
    top_k, top_p = number_of(kwargs, "top_k", int) or None, number_of(kwargs, "top_p", float)
    asked = replace(own, temperature=temperature, top_k=top_k, top_p=top_p)
    return asked if kwargs.get("do_sample") and temperature else own


def noise_numbers(requests: Sequence) -> list[int]:
    """Return a number for each request, to be added to its seed: made of its question, and of how often it came before.

    So a sampled text does not depend on what else is asked, or answered by a cache. The harness asks for repeats by one
    object.
    """
    numbers, seen = [], Counter()
    for request in requests:
        text = json.dumps([request.args, seen[id(request)]], sort_keys=True, default=str)
        numbers.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
        seen[id(request)] += 1
    return numbers


# ---- the model ----


class Likelihoods:
    """Computes log-likelihoods of continuations by the LM head after `exit_layer` layers.

    The cache keeps the last text: only the tokens by which the next one differs are run.
    """

    def __init__(self, runner: Runner, exit_layer: int):
        self.runner, self.exit_layer = runner, exit_layer
        self.cached: list[int] = []

    def forget(self) -> None:
        """Forget the last text: something else has used the cache."""
        self.cached = []

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-probability (nats) of `continuation` after `context`, and whether it is the greedy one.

        A text too long for the cache loses its beginning.
        """
        tokens = [*context, *continuation][-self.runner.cache_length - 1 :]
        inputs, wanted = tokens[:-1], tokens[1:][-len(continuation) :] if continuation else []
        if not wanted:
            return 0.0, True
        known = next(
            (i for i, (a, b) in enumerate(zip(self.cached, inputs, strict=False)) if a != b),
            min(len(self.cached), len(inputs)),
        )
        start = min(known, len(inputs) - len(wanted))  # the rows that predict are needed again
        self.cached = inputs
        first_wanted, total, greedy = len(inputs) - len(wanted), 0.0, True
        for at in range(start, len(inputs), PREFILL_CHUNK):
            rows = inputs[at : at + PREFILL_CHUNK]
            hidden = self.runner.prefill_states(rows, at, top=self.exit_layer)[self.exit_layer]
            skipped = max(0, first_wanted - at)
            for part in hidden[skipped:].split(HEAD_ROWS):
                targets, wanted = torch.tensor(wanted[: len(part)], device=hidden.device), wanted[len(part) :]
                logits = self.runner.exit(part).logits()
                chosen = logits.gather(-1, targets[:, None])[:, 0]
                total += (chosen.double() - logits.double().logsumexp(-1)).sum().item()
                greedy &= bool((logits.argmax(-1) == targets).all())
        return total, greedy


class HarnessModel:
    """The methods that the harness calls, apart from those it has itself; see `make_model`."""

    def __init__(
        self,
        runner: Runner,
        tokenizer,
        policy: DraftPolicy,
        sampling: SamplingConfig,
        ranks: Ranks,
        *,
        exit_layer: int,
        max_new_tokens: int | None = None,
        verified: bool = True,
        chat: bool = False,
        name: str = "",
    ):
        """sampling: where a task does not ask for a temperature. max_new_tokens: instead of every task's own.

        verified=False: texts by early exit, the policy's drafts as they are.
        """
        super().__init__()
        self.runner, self.own_tokenizer, self.policy, self.sampling = runner, tokenizer, policy, sampling
        self.ranks, self.max_new_tokens, self.verified, self.chat = ranks, max_new_tokens, verified, chat
        self.likelihoods = Likelihoods(runner, exit_layer)
        self.summaries: list[dict] = []  # of every text generated, on every rank
        self.scored_tokens, self.name = 0, name
        self._device = runner.positions.device

    # ---- tokens ----

    @property
    def max_length(self) -> int:
        return self.runner.cache_length

    @property
    def eot_token_id(self) -> int | None:
        return next(iter(self.own_tokenizer.eos_ids), None)

    @property
    def prefix_token_id(self) -> int:
        """Return the token to put before a text that has nothing before it."""
        token = self.eot_token_id if self.own_tokenizer.bos_id is None else self.own_tokenizer.bos_id
        return 0 if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.own_tokenizer.render_chat(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Encode a text; a chat template has written BOS and other special tokens itself."""
        return self.own_tokenizer.encode(
            string, bos=add_special_tokens is not False and not self.chat, allow_special=self.chat
        )

    # ---- requests ----

    def shared(self, items: Sequence, work: Callable, what: str, disable_tqdm: bool) -> list:
        """Return work(item) of every item, in order; each rank does its share and gets all of them."""
        bar = tqdm(self.ranks.share(items), desc=what, disable=disable_tqdm or not self.ranks.leads)
        return self.ranks.gathered([work(item) for item in bar])

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Answer requests of the harness's `loglikelihood`: (strings, context ids, continuation ids).

        Texts with one beginning follow one another, and short endings of one context stay on one rank.
        """
        order = sorted(range(len(requests)), key=lambda i: (*requests[i][1], -1, *requests[i][2]))
        joint = lambda i: requests[i][1] if len(requests[i][1]) > len(requests[i][2]) else i
        groups = [list(same) for _, same in itertools.groupby(order, key=joint)]
        self.likelihoods.forget()
        scores = self.shared(
            groups, lambda group: [self.likelihoods.score(*requests[i][1:]) for i in group], "likelihoods", disable_tqdm
        )
        answers = dict(zip(order, itertools.chain.from_iterable(scores), strict=True))
        self.scored_tokens += sum(len(request[2]) for request in requests)
        for i, (strings, *_) in enumerate(requests):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answers[i])
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts; each token is predicted once, with as much before it as fits."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        jobs = [(noise, *request.args) for noise, request in zip(noise_numbers(requests), requests, strict=True)]
        answers = self.shared(jobs, lambda job: self.generate_one(*job), "generating", disable_tqdm)
        for request, (text, summary) in zip(requests, answers, strict=True):
            self.summaries.append(summary)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return [text for text, _ in answers]

    @torch.inference_mode()
    def generate_one(self, noise: int, context: str, kwargs: dict) -> tuple[str, dict]:
        """Return the text after `context` up to the first stop sequence, and its numbers. noise: added to the seed."""
        from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs

        wanted = normalize_gen_kwargs({key: value for key, value in kwargs.items() if value is not None})
        sampling = task_sampling(wanted, self.sampling)
        sampling = replace(sampling, seed=(sampling.seed + noise) % 2**63)
        stops = [stop for stop in wanted["until"] if stop]
        special = [token for name, token in self.own_tokenizer.special_tokens.items() if name in stops]
        count = min(self.max_new_tokens or wanted["max_gen_toks"], self.max_length - 1)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        prompt, count = maybe_truncate(prompt, count, self.max_length)
        config = GenerateConfig(count, sampling, (*self.own_tokenizer.eos_ids, *special))
        check_prompt(prompt, config, self.runner.model.args.vocab_size, self.max_length)
        output = TextStream(self.own_tokenizer, stops)
        rounds = decode(self.runner, prompt, config, self.policy, finished=output.take, verified=self.verified)
        generation = Generation.collect(rounds)
        text = self.own_tokenizer.decode(generation.tokens, continues=True)
        return text[: output.cut], generation.summary(self.runner.model)


def make_model(*args, **settings):
    """Make a `HarnessModel` that is a model to the harness, too."""
    from lm_eval.api.model import TemplateLM

    return types.new_class("Skipfast", (HarnessModel, TemplateLM))(*args, **settings)
