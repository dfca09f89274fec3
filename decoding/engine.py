"""Open a checkpoint and its tokenizer, load it, and make it ready to decode. So begins every program that decodes one.

`Engine.open` reads headers and the tokenizer only, so that every setting is checked before the weights are read.
`prepare` reads the weights, makes what runs the layers, and lets policies measure what they want to know. The engine
prints nothing: notices and progress go to callbacks.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import tp
from decoding.calibrate import SAMPLE_TEXT, calibrate
from decoding.compare import fastest_plain
from decoding.runner import MAX_ROWS, Runner, check_draft_vocab, check_num_draft_tokens
from decoding.sampling import SamplingConfig
from drafting.catalogue import make_policy
from drafting.policy import DraftPolicy
from errors import UserError
from kernels import cpu, gpu
from kernels.formats import PLAIN, Format
from loading import checkpoint, memory
from loading.progress import Progress
from loading.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from model import ModelArgs, Transformer

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
DEVICES = ("auto", "cpu", "cuda")
CALIBRATION_TOKENS = 320  # positions that a policy which measures before it decodes needs
DEFAULT_LENGTH = 4096  # positions of a cache whose length nobody gave, unless the model's context is shorter
GREEDY = SamplingConfig()

Notice = Callable[[str], None]


@dataclass(frozen=True)
class EngineConfig:
    """Say what an engine is made of.

    checkpoint: a converted file or folder, a Hugging Face folder, or a hub id (default: the bundled demo).
    device: cpu, cuda, or auto: cuda where torch sees a GPU.
    dtype: fp32, bf16 or fp16; None: the checkpoint's own. quantize: a format for the weights, such as "int8".
    threads: of the CPU; None: measured. compile: C++ calls or torch.compile instead of eager torch operators.
    draft_vocab: drafts choose among the first so many tokens only. draft_quantize: the format of low-bit copies that
    draft in the model's place. length: positions of the cache, prompt and text together; None: up to DEFAULT_LENGTH.
    """

    checkpoint: str = str(DEMO)
    device: str = "auto"
    dtype: str | None = None
    quantize: str | None = None
    threads: int | None = None
    compile: bool = True
    draft_vocab: int | None = None
    draft_quantize: str | None = None
    length: int | None = None

    def __post_init__(self):
        if self.device not in DEVICES:
            raise UserError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.dtype is not None and self.dtype not in checkpoint.DTYPES:
            raise UserError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {self.dtype!r}")
        most = 4 * (os.cpu_count() or 1)
        if self.threads is not None and not 1 <= self.threads <= most:
            raise UserError(f"threads must be in 1..{most}, got {self.threads}")
        if self.length is not None and self.length < 2:
            raise UserError(f"length must be 2 or more, got {self.length}")


def silent(line: str) -> None:
    """Drop a notice."""


def chosen_device(device: str, notice: Notice = silent) -> str:
    """Return "cpu" or "cuda" for a setting that may be "auto". Raises UserError for a GPU that is not there."""
    seen = torch.cuda.is_available()
    if device == "cuda" and not seen:
        raise UserError("device cuda: torch sees no CUDA device here; use --device cpu")
    if device == "auto" and seen:
        notice(f"device: cuda ({torch.cuda.get_device_name()}); --device cpu runs on the CPU instead")
    return "cuda" if seen and device != "cpu" else "cpu"


class Engine:
    """Hold an opened checkpoint; after `load` or `prepare` one that decodes.

    Attributes: config; device, "cpu" or "cuda"; source, the checkpoint's files; args, the model's shape; tokenizer,
    None where the checkpoint has none; group, the ranks that share the model, if there are several; model and
    draft_model (low-bit copies), once loaded; weight_bytes and draft_bytes, of this rank; compile_s, spent on building
    kernels.
    """

    def __init__(
        self,
        config: EngineConfig,
        source: checkpoint.Source,
        tokenizer: Tokenizer | None,
        device: str,
        group: tp.Group | None = None,
        notice: Notice = silent,
        progress: Progress | None = None,
    ):
        self.config, self.source, self.tokenizer, self.device = config, source, tokenizer, device
        self.group, self.notice, self.progress = group, notice, progress
        self.args: ModelArgs = source.args
        self.format = self.checked_format(config.quantize, "quantize")
        self.draft_format = self.checked_format(config.draft_quantize, "draft_quantize")
        if self.draft_format.embedding:
            raise UserError(
                f"draft_quantize {self.draft_format}: copies share the model's embedding, leave out embedding=yes"
            )
        check_draft_vocab(config.draft_vocab, source.args.vocab_size)
        self.dtype = checkpoint.resolve_dtype(source.args, checkpoint.DTYPES.get(config.dtype))
        self.length = 0
        self.model: Transformer | None = None
        self.draft_model: Transformer | None = None
        self.weight_bytes = self.draft_bytes = 0
        self.compile_s = 0.0
        self._chose_threads = False
        self._runners: dict[tuple, Runner] = {}
        self._skipping: set[tuple] = set()  # keys of runners that must be ready to skip sublayers

    @classmethod
    def open(
        cls,
        config: EngineConfig = EngineConfig(),
        needs_tokenizer: bool = True,
        group: tp.Group | None = None,
        notice: Notice = silent,
        progress: Progress | None = None,
    ) -> "Engine":
        """Open a checkpoint: headers and tokenizer, no weights. Raises UserError for any setting that cannot be obeyed.

        group: the ranks that share the model. notice: called with one line for the user. progress: called after every
        tensor read, see `loading.checkpoint.load`.
        """
        device = chosen_device(config.device, notice)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        source, tokenizer = checkpoint.open_source(config.checkpoint), None
        if group:
            take_gpu(group, device)
            tp.check(source.args, group.size)
        try:
            tokenizer = load_tokenizer(source.folder)
        except UserError:
            if needs_tokenizer:
                raise
        if tokenizer is not None:
            check_vocabulary(tokenizer, source.args.vocab_size)
        return cls(config, source, tokenizer, device, group, notice, progress)

    def checked_format(self, text: str | None, flag: str) -> Format:
        """Parse a format and check that the weights can be brought to it; PLAIN for None."""
        ranks = self.group.size if self.group else 1
        if text is None:
            checkpoint.check_format(self.source.format, self.args, ranks)
            return PLAIN
        format = Format.parse(text, flag)
        if format and self.source.format:
            raise UserError(
                f"{flag} {format}: {self.config.checkpoint} is quantised already "
                f"({self.source.format}); give the plain checkpoint"
            )
        checkpoint.check_format(format, self.args, ranks)
        return format

    @property
    def n_layer(self) -> int:
        return self.args.n_layer

    @property
    def format_name(self) -> str:
        """Name the format of the weights: the file's or the one asked for."""
        return str(self.source.format or self.format)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a text."""
        return () if self.tokenizer is None else tuple(self.tokenizer.eos_ids)

    def policy(self, text: str, **defaults) -> DraftPolicy:
        """Make the policy that a policy string names, for this model. defaults: see `make_policy`."""
        policy = make_policy(text, self.args.n_layer, self.args.dim, **defaults)
        check_num_draft_tokens(policy.num_draft_tokens)
        return policy

    def prepare(
        self,
        policies: Sequence[DraftPolicy],
        length: int | None = None,
        sampling: SamplingConfig = GREEDY,
        sample: Sequence[int] = (),
    ) -> "Engine":
        """Read the weights if need be, and make ready all that `policies` decode with. May be called again.

        length: positions that a prompt and its text may take; None: the config's. sampling: how tokens will be chosen.
        sample: token ids to measure on where there is no tokenizer. Raises UserError for what does not fit.
        """
        draft_depth = self.draft_depth(policies)
        if self.model is None:
            self.load(self.length_for(policies, length))
        self.load_draft_model(draft_depth)
        for policy in policies:
            self.runner(policy)
        self.warm_up()
        self.choose_threads()
        for policy in policies:
            self.calibrate(policy, sampling, sample)
        return self

    def length_for(self, policies: Iterable[DraftPolicy], length: int | None = None) -> int:
        """Return how many positions the cache needs: for `length` of a text, and for what policies measure first."""
        most = self.args.max_seq_len
        length = length or self.config.length or min(DEFAULT_LENGTH, most)
        if any(policy.plans_to_time() for policy in policies):
            return max(length, min(CALIBRATION_TOKENS, most))
        return length

    def load(self, length: int = 0) -> Transformer:
        """Read the weights, and allocate a cache of `length` positions; on a CPU, build the kernels on first use.

        Raises UserError if a GPU has no room for it.
        """
        start = time.perf_counter()
        if self.device == "cpu" and (reason := cpu.load(self.notice)):
            self.notice(f"C++ kernels not available ({reason}): using torch's matmuls, which are slower")
        if self.device == "cuda":
            free = torch.cuda.mem_get_info()[0]
            format = self.source.format or self.format
            memory.check_fits(self.args, self.dtype, format, length, free, self.group, bool(self.source.format))
            own = self.group.local_args(self.args) if self.group else self.args
            if reason := gpu.load() or gpu.uncovered(own, self.dtype):
                self.notice(f"{reason}: using torch's own operators, which are slower")
        self.compile_s = time.perf_counter() - start
        loaded = checkpoint.load(
            self.source, self.dtype, self.device, progress=self.progress, group=self.group, format=self.format
        )
        if self.group:
            self.group.meet()
        self.model, self.weight_bytes = loaded.model, loaded.bytes
        self.length = length
        if length:
            self.model.setup_cache(length + MAX_ROWS)
        return self.model

    def draft_depth(self, policies: Sequence[DraftPolicy]) -> int:
        """Return how many of the first layers the policies draft with.

        Raises UserError if that is none of them and the config asks for copies to draft with.
        """
        depth = max((policy.draft_depth(self.n_layer) for policy in policies), default=0)
        if self.draft_format and not depth:
            names = ", ".join(map(str, policies))
            raise UserError(f"draft_quantize {self.draft_format}: policy {names} drafts with no layers: leave it out")
        return depth

    def load_draft_model(self, depth: int) -> Transformer | None:
        """Read low-bit copies of the first `depth` layers, if the config asks for them. After `load`."""
        if not self.draft_format or (self.draft_model and len(self.draft_model.layers) >= depth):
            return self.draft_model
        loaded = checkpoint.load_draft_model(
            self.source, self.model, depth, self.draft_format, self.progress, self.group
        )
        if self.group:
            self.group.meet()
        self.draft_model, self.draft_bytes = loaded.model, loaded.bytes
        for key in [key for key in self._runners if key[-1]]:  # they have the copies of fewer layers
            del self._runners[key]
        return self.draft_model

    def runner(
        self, policy: DraftPolicy | None = None, compile: bool | None = None, exact: bool = True, copies: bool = True
    ) -> Runner:
        """Return what runs the layers for a policy (None: plain decoding); made once, and all share one cache.

        compile: other than the config's. exact: with the padding that equal bits need where rows are not independent.
        copies: draft with the low-bit copies, if there are any.
        """
        rows = 1 + policy.num_draft_tokens if policy else 1
        compile = self.config.compile if compile is None else compile
        copies = bool(copies and self.draft_model and policy and policy.draft_depth(self.n_layer))
        key = rows, compile, exact, copies
        if key not in self._runners:
            draft_model = self.draft_model if copies else None
            self._runners[key] = Runner(
                self.model, self.length, rows, compile, exact, self.notice, self.config.draft_vocab, draft_model
            )
        if policy and policy.skips_sublayers:
            self._skipping.add(key)
        return self._runners[key]

    def fastest_plain(self) -> tuple[Runner, DraftPolicy]:
        """Return plain decoding as it is fastest: several tokens a call in C++, elsewhere without padding."""
        runner = self.runner()
        if not runner.rows_independent:
            runner = self.runner(exact=False)
        return runner, fastest_plain(runner)

    def warm_up(self) -> None:
        """Compile what the runners made so far will use; those that are warm already cost nothing."""
        for key, runner in self._runners.items():
            if runner.backend == "inductor" and not runner.is_warm:
                self.notice("compiling one transformer block (seconds when cached, up to a minute the first time) …")
                runner.warm_up(key in self._skipping)
                self.notice(f"compiled in {runner.compile_s:.1f} s")

    def choose_threads(self) -> None:
        """Set the number of CPU threads that decode fastest, unless the config gives it."""
        runner = next(iter(self._runners.values()), None)
        if runner and runner.rows_independent and self.config.threads is None and not self._chose_threads:
            runner.choose_threads()
            self._chose_threads = True

    def calibrate(
        self, policy: DraftPolicy, sampling: SamplingConfig = GREEDY, sample: Sequence[int] = (), copies: bool = True
    ) -> None:
        """Let a policy measure what it wants to know before decoding, on a sample text. See `prepare` and `runner`."""
        if self.tokenizer:
            sample = self.tokenizer.encode(SAMPLE_TEXT)
        calibrate(self.runner(policy, copies=copies), policy, sample, sampling)

    def facts(self, policy: DraftPolicy) -> dict:
        """Return what a run of `policy` was made with, as it stands in JSON files."""
        return {
            "policy": str(policy),
            "device": self.device,
            "backend": self.runner(policy).backend,
            "precision": str(self.dtype).removeprefix("torch."),
            "quantize": self.format_name,
            "draft_quantize": str(self.draft_format),
            "ranks": self.group.size if self.group else 1,
        }


def take_gpu(group: tp.Group, device: str) -> None:
    """Give this rank a GPU of its own. Raises UserError where there are too few."""
    if device != "cuda":
        return
    if group.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"nproc_per_node: torch sees {torch.cuda.device_count()} CUDA devices here, one is needed for each rank"
        )
    torch.cuda.set_device(group.local_rank)
