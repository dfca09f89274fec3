"""skipfast as a library: load a model, generate text, stream it, chat.

    from skipfast import load

    model = load()  # the bundled demo; or a folder, a converted file, a hub id
    print(model.generate("import os", max_new_tokens=64).text)
    for piece in model.stream("def read(path):", temperature=0.8, seed=1, max_new_tokens=64):
        print(piece, end="", flush=True)

Speculation changes the speed, never the text: the same tokens come with `policy="none"`, which drafts nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decoding.engine import DEMO, Engine, EngineConfig, Notice, silent
from decoding.generation import GenerateConfig, Generation, check_prompt
from decoding.sampling import SamplingConfig
from decoding.text import TextStream
from drafting.plan import Round
from drafting.policy import DraftPolicy
from errors import UserError
from generate import decode

__all__ = ["EngineConfig", "Model", "Result", "UserError", "load"]

Prompt = str | Sequence[int] | Sequence[dict]  # text, token ids, or the messages of a chat


@dataclass(frozen=True)
class Result:
    """What was generated.

    text: up to the first stop string. tokens: the ids. rounds: the record of every round, the prefill first.
    numbers: acceptance rate, tokens per second and all else that a run of generate.py writes as JSON.
    """

    text: str
    tokens: list[int]
    rounds: list[Round]
    numbers: dict


def load(checkpoint: str = str(DEMO), policy: str = "auto", notice: Notice = silent, **settings) -> "Model":
    """Load a checkpoint (a folder, a converted file or a hub id; default: the bundled demo) and return a Model.

    policy: how drafts are made where a call names no other. settings: of EngineConfig: device, dtype, quantize, length
    (positions of prompt and text together), threads, … notice: called with one line for the user, such as a first
    build of the kernels. Raises UserError for whatever cannot be obeyed.
    """
    return Model(Engine.open(EngineConfig(str(checkpoint), **settings), notice=notice), policy)


class Model:
    """A loaded checkpoint. One text at a time: a new text ends one that is still being streamed."""

    def __init__(self, engine: Engine, policy: str = "auto"):
        """engine: opened. policy: of calls that name no other."""
        self.engine, self.default_policy = engine, policy
        self._policies: dict[tuple[str, bool], DraftPolicy] = {}
        self._policy(policy, SamplingConfig())

    def generate(self, prompt: Prompt, **settings) -> Result:
        """Continue a prompt (text, token ids, or chat messages) and return all of it. settings: as for `stream`."""
        text, stream = self._decode(prompt, **settings)
        generation = Generation.collect(stream)
        numbers = generation.summary(self.engine.model)
        return Result(text.close(), generation.tokens, [generation.prefill, *generation.rounds], numbers)

    def chat(self, messages: Sequence[dict], **settings) -> Result:
        """Answer messages, each {"role": …, "content": …}, by the checkpoint's chat template."""
        return self.generate(messages, **settings)

    def stream(self, prompt: Prompt, **settings) -> Iterator[str]:
        """Continue a prompt and yield the text piece by piece.

        max_new_tokens (128); temperature (0: greedy), top_k, top_p, seed; stop: strings before which the text ends;
        ignore_eos: go on after an end-of-text token; policy: other than the model's. Raises UserError before the first
        piece for a prompt that does not fit.
        """
        text, stream = self._decode(prompt, **settings)
        return self._pieces(text, stream)

    @staticmethod
    def _pieces(text: TextStream, stream: Iterator[Round]) -> Iterator[str]:
        shown = 0
        for _ in stream:
            if text.safe_end > shown:
                yield text.text[shown : text.safe_end]
                shown = text.safe_end
        if rest := text.close()[shown:]:
            yield rest

    def _decode(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        policy: str | None = None,
    ) -> tuple[TextStream, Iterator[Round]]:
        """Check everything -> the text to come, and the stream that decodes it."""
        engine, sampling = self.engine, SamplingConfig(temperature, top_k, top_p, seed)
        config = GenerateConfig(max_new_tokens, sampling, () if ignore_eos else engine.eos_ids)
        ids = self._encode(prompt)
        check_prompt(ids, config, engine.args.vocab_size, engine.length)
        chosen = self._policy(policy or self.default_policy, sampling)
        text = TextStream(engine.tokenizer, [stop] if isinstance(stop, str) else stop)
        return text, decode(engine.runner(chosen), ids, config, chosen, finished=text.ends_at)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.engine.tokenizer.apply_chat(list(prompt))
        return list(prompt)

    def _policy(self, text: str, sampling: SamplingConfig) -> DraftPolicy:
        """Make a policy ready, once for greedy and once for sampled decoding: that is what measurements depend on."""
        key = text, sampling.temperature > 0
        if key not in self._policies:
            policy = self.engine.policy(text)
            self.engine.prepare([policy], sampling=sampling)
            self._policies[key] = policy
        return self._policies[key]
