"""The work of `gpu_check`: the shapes of models and kernels, and the sections in the order in which they run.

The most important come first, because a machine may be taken away. The seconds of a section are an estimate for an
H100; a section that would end after the time is over is not started.
"""

from dataclasses import dataclass

from model import ModelArgs

OPS = ("linear_bf16", "linear_int8", "linear_int4", "exit_head", "attention")
ROWS = (1, 8, 16)
DRAFTS = (3, 5)  # K of the speculative runs


@dataclass(frozen=True)
class Shape:
    """A model: its sizes in the order of ModelArgs, and the exit layer of its drafts."""

    sizes: tuple[int, ...]
    exit_layer: int

    @property
    def args(self) -> ModelArgs:
        return ModelArgs(*self.sizes, max_seq_len=8192, norm_eps=1e-5, rope_base=500000.0, dtype="bfloat16")


@dataclass(frozen=True)
class Shapes:
    """All sizes. sections: seconds by name. attention: query heads, kv heads, head width. Lengths: in tokens."""

    sections: dict[str, float]
    models: dict[str, Shape]
    linears: tuple[tuple[int, int], ...]
    vocabularies: tuple[int, ...]
    head_width: int
    attention: tuple[int, int, int]
    contexts: tuple[int, ...]
    slots: int
    thorough: str  # the model and precision that also decodes with sampling and with dynamic policies
    prompt: int
    tokens: int  # a timed run
    exact_tokens: int  # a run compared with plain decoding
    profiled_tokens: int
    repeats: int
    launches: int  # of a kernel, at least, in the graph that is timed
    cold_bytes: int  # weights that take turns: a multiple of the L2 cache
    copy_bytes: int


FULL = Shapes(
    sections={
        "environment": 5,
        "kernels linear_bf16": 16,
        "kernels linear_int8": 12,
        "kernels linear_int4": 12,
        "kernels exit_head": 18,
        "kernels attention": 10,
        "engine 1B bf16": 60,
        "engine 8B bf16": 45,
        "engine 8B int8": 35,
        "engine 8B int4": 30,
        "profile 1B bf16": 25,
        "engine 1B int8": 18,
        "engine 1B int4": 18,
        "engine 7B bf16": 40,
        "baselines 1B": 50,
        "engine 7B int8": 30,
        "engine 7B int4": 28,
        "baselines 8B": 80,
    },
    models={
        "1B": Shape((2048, 16, 32, 8, 64, 8192, 128256), 4),
        "8B": Shape((4096, 32, 32, 8, 128, 14336, 128256), 4),
        "7B": Shape((4096, 32, 32, 32, 128, 11008, 32000), 4),
    },
    linears=((4096, 4096), (28672, 4096), (4096, 14336), (2048, 2048), (16384, 2048), (128256, 4096)),
    vocabularies=(128256, 32000),
    head_width=4096,
    attention=(32, 8, 128),
    contexts=(100, 2000, 16000),
    slots=32768,
    thorough="1B bf16",
    prompt=512,
    tokens=128,
    exact_tokens=2000,
    profiled_tokens=64,
    repeats=5,
    launches=20,
    cold_bytes=2**29,
    copy_bytes=2**31,
)
TINY = Shapes(
    sections=dict.fromkeys(
        (
            "environment",
            *(f"kernels {op}" for op in OPS),
            "engine tiny bf16",
            "engine tiny int8",
            "engine tiny int4",
            "profile tiny bf16",
            "baselines tiny",
        ),
        0,
    ),
    models={"tiny": Shape((64, 4, 4, 2, 16, 128, 256), 1)},
    linears=((96, 64),),
    vocabularies=(250,),
    head_width=64,
    attention=(4, 2, 16),
    contexts=(20,),
    slots=64,
    thorough="tiny bf16",
    prompt=12,
    tokens=8,
    exact_tokens=24,
    profiled_tokens=4,
    repeats=1,
    launches=2,
    cold_bytes=2**14,
    copy_bytes=2**20,
)
