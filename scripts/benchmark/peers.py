"""Other engines on the same checkpoint, precision and prompts, for `scripts.benchmark --against`.

Each peer is optional. transformers runs in this process and shares torch's threads; llama.cpp brings an OpenMP runtime
of its own, and two in one process ruin each other's speed, so it runs in a process of its own that sleeps between
turns: `python -m scripts.benchmark.peers GGUF N_CTX FP32_CACHE` answers JSON lines on stdin with JSON lines on stdout.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import cli
from errors import UserError
from kernels.formats import PLAIN, Format
from loading.checkpoint import our_names
from loading.writing import export_hf
from model import rope_table

ROOT = Path(__file__).parents[2]
NEEDS = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp", "gguf")}
INSTALL = {"transformers": "pip install transformers", "llama.cpp": "pip install llama-cpp-python gguf"}


@dataclass
class Contender:
    """One row: something that continues a prompt.

    run(prompt, new_tokens) returns (tokens, seconds of decoding those after the first, {"prefill_s": …, …}).
    """

    engine: str
    policy: str
    compiled: bool
    run: Callable[[list[int], int], tuple[list[int], float, dict]]
    backend: str = "eager"
    exact: bool = True
    threads: int = 1
    quantize: str = "none"
    judge: Callable[[list[int], list[int]], float] | None = None  # (prompt, unverified text) -> share of right tokens
    device: str = "cpu"
    rates: list[float] = field(default_factory=list)  # tokens/s of each round
    texts: list[list[int]] = field(default_factory=list)  # of the last round, by prompt
    summaries: list[dict] = field(default_factory=list)
    records: list[list[dict]] = field(default_factory=list)  # by round and prompt: tokens, seconds, all of the summary

    @property
    def place(self) -> tuple[str, str]:
        """Where its weights lie, and in which format: rows of one place share a model."""
        return self.device, self.quantize

    @property
    def is_ar(self) -> bool:
        return self.engine == "skipfast" and self.policy.split(":")[0] == "none"


def missing(peers: list[str], device: str) -> dict[str, str]:
    """Of the peers asked for, those that cannot run -> why, and what to install."""
    absent = {peer: [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None] for peer in peers}
    found = {peer: f"needs {INSTALL[peer]}" for peer, names in absent.items() if names}
    if "llama.cpp" in peers and device != "cpu":
        found["llama.cpp"] = "it is measured on the CPU only"
    return found


def thread_counts(flags) -> list[int]:
    """The thread counts a peer may try: --threads, or one and all."""
    return [flags.threads] if flags.threads else sorted({1, torch.get_num_threads()})


class _Tensors:
    """A checkpoint's tensors by our names, read when asked for: large models do not fit twice."""

    def __init__(self, source, dtype):
        self.source, self.dtype = source, dtype

    def __getitem__(self, name):
        return self.source.read(name, self.dtype)


def transformers_contenders(session: cli.Session, drafting, counts: list[int]) -> list[Contender]:
    """transformers' generate on the same weights and precision: greedy, and drafting like the policy `drafting`
    (exit_layer, num_draft_tokens) if one is given. Its prefill is timed and taken off."""
    import transformers  # optional: `missing` has seen that it is there

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weight = session.model.norm.weight
    with tempfile.TemporaryDirectory() as folder:
        if session.source.fused:  # our own format: write it as a folder that transformers reads
            tensors = _Tensors(session.source, weight.dtype)
            export_hf(tensors, session.args, folder, session.source.hf_config, weight.dtype)
        path = folder if session.source.fused else session.source.folder
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=weight.dtype)
    model = model.eval().to(weight.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompt, count, extra):
        ids = torch.tensor([prompt], device=weight.device)
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            **extra,
        )
        return out[0, ids.shape[1] :].tolist(), time.perf_counter() - start

    @torch.inference_mode()
    def run(prompt, count, extra):
        ours = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            _, first = generate(prompt, 1, {})
            tokens, whole = generate(prompt, count, extra)
        finally:
            torch.set_num_threads(ours)
        return tokens, whole - first, {"prefill_s": first}

    took = {}
    for threads in counts:
        run([1, 2, 3], 4, {})
        took[threads] = min(run([1, 2, 3], 8, {})[1] for _ in range(3))
    threads = min(took, key=took.get)
    found = [Contender("transformers", "none", False, lambda p, n: run(p, n, {}), threads=threads)]
    if drafting:
        extra = {"assistant_early_exit": drafting.exit_layer}
        config = model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafting.num_draft_tokens, "constant"
        config.assistant_confidence_threshold = 0.0
        name = f"static:{drafting.exit_layer},num_draft_tokens={drafting.num_draft_tokens}"
        try:
            run([1, 2, 3], 8, extra)
            found.append(Contender("transformers", name, False, lambda p, n: run(p, n, extra), threads=threads))
        except Exception as error:  # a release without early-exit drafting: plain decoding is still worth a row
            cli.notice(f"transformers cannot draft with early exits here ({type(error).__name__}): skipped")
    return found


def write_gguf(session: cli.Session, path: Path, dtype: torch.dtype, mode: str = "none") -> None:
    """Write the checkpoint as a GGUF file without a tokenizer (prompts are ids), tensor by tensor, in `dtype`.

    mode: of a kernels.formats.Format, for which llama.cpp's simplest format of so many bits stands: every matrix in it.
    """
    import gguf

    args, scaling = session.args, dict(session.args.rope_scaling)
    plain = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    kind = {"none": plain, "int8": "Q8_0", "int4": "Q4_0"}[mode]
    kind = gguf.GGMLQuantizationType[kind]
    out = gguf.GGUFWriter(str(path), "llama", use_temp_file=True)
    fields = {
        "context_length": args.max_seq_len,
        "embedding_length": args.dim,
        "block_count": args.n_layer,
        "feed_forward_length": args.ffn_dim,
        "head_count": args.n_head,
        "head_count_kv": args.n_kv_head,
        "key_length": args.head_dim,
        "value_length": args.head_dim,
        "layer_norm_rms_eps": args.norm_eps,
        "rope_dimension_count": args.head_dim,
        "rope_freq_base": args.rope_base,
        "vocab_size": args.vocab_size,
        "tokenizer_model": "no_vocab",
    }
    if args.rope_type == "linear":
        fields |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": scaling["factor"]}
    for field_name, value in fields.items():
        getattr(out, f"add_{field_name}")(value)
    for name, tensor in gguf_tensors(session, dtype):
        array = tensor.float().contiguous().numpy()
        if tensor.dim() == 1:
            out.add_tensor(name, array)
        else:
            out.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_tensors(session: cli.Session, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors under llama.cpp's names, in its layout."""
    args = session.args
    if args.rope_type == "llama3":  # how much slower each pair of features turns: the ratio of angles at position 1
        plain = replace(args, rope_type="default", rope_scaling=())
        angle = [torch.atan2(sin[1, 0], cos[1, 0]) for cos, sin in (rope_table(a, 2) for a in (plain, args))]
        yield "rope_freqs.weight", (angle[0] / angle[1])[: args.head_dim // 2]

    def rotary(weight):  # llama.cpp pairs neighbours where Hugging Face pairs halves
        return weight.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    heads, groups = args.n_head * args.head_dim, args.n_kv_head * args.head_dim
    whole = {"embedding.weight": "token_embd", "norm.weight": "output_norm", "lm_head.weight": "output"}
    part = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention.wo": "attn_output", "mlp.w2": "ffn_down"}
    for name in our_names(args):
        if args.tie_embeddings and name == "lm_head.weight":
            continue
        tensor = session.source.read(name, dtype)
        if name in whole:
            yield whole[name] + ".weight", tensor
            continue
        _, layer, key = name.removesuffix(".weight").split(".", 2)
        if key == "attention.wqkv":
            q, k, v = tensor.split([heads, groups, groups])
            found = {"attn_q": rotary(q), "attn_k": rotary(k), "attn_v": v}
        elif key == "mlp.w13":
            found = dict(zip(("ffn_gate", "ffn_up"), tensor.chunk(2), strict=True))
        else:
            found = {part[key]: tensor}
        for theirs, one in found.items():
            yield f"blk.{layer}.{theirs}.weight", one


class LlamaCpp:
    """llama.cpp in a process of its own; `close` ends it and deletes its file."""

    def __init__(self, session: cli.Session, length: int, counts: list[int], format: Format = PLAIN):
        dtype, self.quantize = session.model.norm.weight.dtype, str(format)
        self.folder = tempfile.TemporaryDirectory()
        try:
            path = Path(self.folder.name) / "model.gguf"
            cli.notice("writing the checkpoint as GGUF for llama.cpp …")
            write_gguf(session, path, dtype, format.mode)
            self.errors = (Path(self.folder.name) / "stderr").open("w+")
            command = [
                sys.executable,
                "-m",
                "scripts.benchmark.peers",
                str(path),
                str(length),
                str(dtype == torch.float32),
            ]
            self.start([*command, "True"])
            try:
                self.ask(list(range(3, 11)), 2)
            except ValueError as error:  # a known crash of its AMX code (llama.cpp issue 20824)
                cli.notice(f"{error}: again, without its repacked weights")
                self.start([*command, "False"])
            took = {count: [] for count in counts}
            for _ in range(5):  # in turns: a slow second of the machine must not decide
                for count in counts:
                    took[count].append(self.ask(list(range(3, 11)), 17, count)["decode_s"])
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
        """One turn; without ids, waits until the model is loaded. Raises UserError if the process has ended."""
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
    """The worker: load a GGUF, then answer [ids, new tokens, threads] lines until stdin ends.

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
