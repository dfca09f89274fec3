"""llama.cpp as a contender, on the same checkpoint and precision. Needs the packages llama-cpp-python and gguf.

It brings an OpenMP runtime of its own, and two in one process ruin each other's speed. So it runs in a process of its
own that sleeps between turns: `python -m scripts.benchmark.llama_cpp_peer GGUF N_CTX FP32_CACHE REPACK` answers JSON
lines on stdin with JSON lines on stdout.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import cli
from decoding.engine import Engine
from errors import UserError
from kernels.formats import PLAIN, Format
from scripts.benchmark.gguf_writer import write_gguf
from scripts.common.contender import Contender

ROOT = Path(__file__).parents[2]
WARM_UP = list(range(3, 11))  # a prompt


class LlamaCpp:
    """llama.cpp in a process of its own; `close` ends it and deletes its file."""

    def __init__(self, engine: Engine, length: int, counts: list[int], format: Format = PLAIN):
        """length: positions of its cache. counts: numbers of threads to choose from. format: of the weights."""
        self.quantize, self.folder = str(format), tempfile.TemporaryDirectory()
        try:
            path = Path(self.folder.name) / "model.gguf"
            cli.notice("writing the checkpoint as GGUF for llama.cpp …")
            write_gguf(engine.source, path, engine.dtype, format.mode)
            self.errors = (Path(self.folder.name) / "stderr").open("w+")
            full_cache = engine.dtype == torch.float32
            command = [sys.executable, "-m", "scripts.benchmark.llama_cpp_peer", *map(str, (path, length, full_cache))]
            self.start([*command, "True"])
            try:
                self.ask(WARM_UP, 2)
            except UserError as error:  # a known crash of its AMX code (llama.cpp issue 20824)
                cli.notice(f"{error}: again, without its repacked weights")
                self.start([*command, "False"])
            took = {count: [] for count in counts}
            for _ in range(5):  # in turns: a slow second of the machine must not decide
                for count in counts:
                    took[count].append(self.ask(WARM_UP, 17, count)["decode_s"])
            self.threads = min(took, key=lambda count: statistics.median(took[count]))
        except BaseException:
            self.close()
            raise

    def start(self, command: list[str]) -> None:
        """Start the worker and wait until the model is loaded."""
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ask()

    def ask(self, ids: list[int] | None = None, count: int = 0, threads: int = 1) -> dict:
        """Take one turn; without ids, waits until the model is loaded. Raises UserError if the process has ended."""
        try:
            if ids is not None:
                self.process.stdin.write(json.dumps([ids, count, threads]) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            last = [text for text in self.errors.read().splitlines() if text.strip()][-1:]
            raise UserError(f"llama.cpp ended with code {self.process.wait()}: {''.join(last) or 'no message'}")
        return json.loads(line)

    def run(self, prompt: list[int], count: int) -> tuple[list[int], float, dict]:
        answer = self.ask(prompt, count, self.threads)
        time.sleep(0.02)  # its threads spin a little after their work; the next turn is another engine's
        return answer["tokens"], answer["decode_s"], {"prefill_s": answer["prefill_s"]}

    def contender(self) -> Contender:
        return Contender("llama.cpp", "none", True, self.run, "ggml", threads=self.threads, quantize=self.quantize)

    def close(self) -> None:
        if process := getattr(self, "process", None):
            process.kill()
            process.wait()
        self.folder.cleanup()


def serve(path: str, length: str, full_cache: str, repack: str) -> None:
    """Be the worker: load a GGUF, then answer [ids, new tokens, threads] lines until stdin ends.

    repack: whether weights may be laid out anew for the machine's instructions, as llama.cpp does by default.
    """
    import llama_cpp

    if repack == "False":  # an option that its Llama class does not pass on
        default = llama_cpp.llama_cpp.llama_model_default_params
        llama_cpp.llama_cpp.llama_model_default_params = lambda: plain_layout(default())
    cache = {"type_k": 0, "type_v": 0} if full_cache == "True" else {}  # GGML_TYPE_F32; its default is fp16
    llm = llama_cpp.Llama(model_path=path, n_ctx=int(length), n_batch=512, verbose=True, **cache)
    print(json.dumps({"ready": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        ids, count, threads = json.loads(line)
        llama_cpp.llama_set_n_threads(llm.ctx, threads, threads)
        llm.reset()
        start = time.perf_counter()
        llm.eval(ids)
        tokens, first = [], 0.0
        while True:
            logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            tokens.append(int(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).argmax()))
            first = first or time.perf_counter()
            if len(tokens) == count:
                break
            llm.eval(tokens[-1:])
        seconds = {"prefill_s": first - start, "decode_s": time.perf_counter() - first}
        print(json.dumps({"tokens": tokens, **seconds}), flush=True)


def plain_layout(params):
    params.use_extra_bufts = False
    return params


if __name__ == "__main__":
    serve(*sys.argv[1:])
