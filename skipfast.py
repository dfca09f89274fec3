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
    """Hold what was generated.

    text: up to the first stop string. tokens: the ids. rounds: the record of every round, the prefill first.
    numbers: acceptance rate, tokens per second and all else that `Generation.summary` makes of the rounds.
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
    """Generate with a loaded checkpoint, one text at a time.

    Its texts share one cache. So once a new text is started, an older one that is still being streamed cannot go on:
    its next piece raises UserError.
    """

    def __init__(self, engine: Engine, policy: str = "auto"):
        """engine: opened. policy: of calls that name no other."""
        self.engine, self.default_policy = engine, policy
        self._policies: dict[tuple[str, bool], DraftPolicy] = {}
        self._newest: TextStream | None = None  # the text that has the cache
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

        settings: max_new_tokens (128); stop: strings before which the text ends; ignore_eos: go on after an end-of-text
        token; policy: other than the model's; and those of SamplingConfig: temperature (0: greedy), top_k, top_p, seed,
        verification. Raises UserError for a mistake before the first piece, and instead of the next piece if another
        text was started.
        """
        text, stream = self._decode(prompt, **settings)
        return self._pieces(text, stream)

    def _pieces(self, text: TextStream, stream: Iterator[Round]) -> Iterator[str]:
        shown = 0
        self._check_newest(text)
        for _ in stream:
            if text.safe_end > shown:
                yield text.text[shown : text.safe_end]
                shown = text.safe_end
                self._check_newest(text)
        if rest := text.close()[shown:]:
            yield rest

    def _check_newest(self, text: TextStream) -> None:
        """Raise UserError if another text has overwritten the cache."""
        if self._newest is not text:
            raise UserError(
                "another text was started, which overwrote the cache of this one: read a stream to its end first, "
                "or load a second model"
            )

    def _decode(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        policy: str | None = None,
        **sampling_settings,
    ) -> tuple[TextStream, Iterator[Round]]:
        """Check everything -> the text to come, and the stream that decodes it."""
        engine, sampling = self.engine, SamplingConfig(**sampling_settings)
        config = GenerateConfig(max_new_tokens, sampling, () if ignore_eos else engine.eos_ids)
        ids = self._encode(prompt)
        check_prompt(ids, config, engine.args.vocab_size, engine.length)
        text = self._newest = TextStream(engine.tokenizer, [stop] if isinstance(stop, str) else stop)
        chosen = self._policy(policy or self.default_policy, sampling)  # may measure, which overwrites the cache
        return text, decode(engine.runner(chosen), ids, config, chosen, finished=text.take)

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
