"""transformers as a contender, in this process, whose threads it shares. Needs the optional package transformers."""

import tempfile
import time

import torch

import cli
from decoding.engine import Engine
from drafting.exits import Static
from loading.checkpoint import Source
from loading.writing import export_hf
from scripts.common.contender import Contender

WARM_UP = [1, 2, 3]  # a prompt


class Tensors:
    """A checkpoint's tensors by our names, read when asked for: large models do not fit twice."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self.source, self.dtype = source, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source.read(name, self.dtype)


def load_model(engine: Engine):
    """Load transformers' model of the engine's checkpoint, in its precision and on its device."""
    import transformers  # optional: `peers.missing` has seen that it is there

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, dtype = engine.source, engine.dtype
    with tempfile.TemporaryDirectory() as folder:
        if source.is_ours:  # our own format: write it as a folder that transformers reads
            export_hf(Tensors(source, dtype), source.args, folder, source.hf_config, dtype)
        path = folder if source.is_ours else source.folder
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.eval().to(engine.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class TransformersPeer:
    """transformers' generate, on the number of threads that suits it. Its prefill is timed and taken off."""

    def __init__(self, engine: Engine, counts: list[int]):
        """counts: numbers of threads to choose from."""
        self.model = load_model(engine)
        seconds = {}
        for self.threads in counts:
            self.run(WARM_UP, 4)
            seconds[self.threads] = min(self.run(WARM_UP, 8)[1] for _ in range(3))
        self.threads = min(seconds, key=seconds.get)

    def generate(self, prompt: list[int], count: int, **settings) -> tuple[list[int], float]:
        """Continue a prompt greedily by `count` tokens -> these, and the seconds it took."""
        ids = torch.tensor([prompt], device=self.model.device)
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            **settings,
        )
        return out[0, ids.shape[1] :].tolist(), time.perf_counter() - start

    @torch.inference_mode()
    def run(self, prompt: list[int], count: int, **settings) -> tuple[list[int], float, dict]:
        """Continue a prompt, see `contender.Continue`."""
        ours = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            _, first = self.generate(prompt, 1)
            tokens, whole = self.generate(prompt, count, **settings)
        finally:
            torch.set_num_threads(ours)
        return tokens, whole - first, {"prefill_s": first}

    def set_drafts(self, count: int) -> None:
        """Draft always so many tokens, as our static policy does."""
        config = self.model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = count, "constant"
        config.assistant_confidence_threshold = 0.0


def transformers_contenders(engine: Engine, drafting: Static | None, counts: list[int]) -> list[Contender]:
    """Make the rows of transformers: greedy decoding, and drafting as the policy `drafting` does, if one is given."""
    peer = TransformersPeer(engine, counts)
    contenders = [Contender("transformers", "none", False, peer.run, threads=peer.threads)]
    if drafting:
        peer.set_drafts(drafting.num_draft_tokens)
        name = f"static:{drafting.exit_layer},num_draft_tokens={drafting.num_draft_tokens}"
        run = lambda prompt, count: peer.run(prompt, count, assistant_early_exit=drafting.exit_layer)
        try:
            run(WARM_UP, 8)
            contenders.append(Contender("transformers", name, False, run, threads=peer.threads))
        except Exception as error:  # a release without early-exit drafting: plain decoding is still worth a row
            cli.notice(f"transformers cannot draft with early exits here ({type(error).__name__}): skipped")
    return contenders
