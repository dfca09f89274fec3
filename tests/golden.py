"""Check that a repository still does what an earlier commit did: real commands on the bundled demo, number by number.

    python golden.py record --repo DIR --output golden.json
    python golden.py check --repo DIR [--record golden.json] [--only SUBSTRING] [--jobs 2]

Each command below runs as a user would type it, and of the JSON it writes the deterministic numbers are kept: tokens,
drafts, rounds, visits, losses; never a time. Bits differ between instruction sets and versions of torch, so a record
serves one kind of machine; on another kind, record anew from the old commit. Nothing of the repository is imported.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# ---------------------------------------------------------------- what is run

# The first word of a command may be one of these; {names} are files and folders that `write_files` makes.
SHORT = {
    "write": "python generate.py --threads 1 --ignore_eos --max_new_tokens 48",
    "decode": "write --prompt_file {parse}",
    "end": "python generate.py --threads 1 --max_new_tokens 64",  # texts in which an end of text falls
    "ranks": "torchrun --standalone --nproc_per_node=2",
    "share": "ranks generate.py --threads 1 --ignore_eos --max_new_tokens 40 --prompt_file {parse}",
}

# A command a line; && runs a second one in the same folder {out}; "# whole" keeps every token, not their hash alone.
COMMANDS = """
SKIPFAST_NO_CPP=1 decode --policy static:3
SKIPFAST_NO_CPP=1 decode --policy skip_set:{skips} --temperature 0.8 --seed 3
SKIPFAST_NO_CPP=1 decode --policy confidence:0.5 --precision fp32 --quantize int8

decode --policy none  # whole
decode --policy none:steps=8
decode --policy static:3
decode --policy static:6,num_draft_tokens=15
decode --policy static:3,num_draft_tokens=7,stop=0.4
decode --policy static:3,num_draft_tokens=7,stop=adaptive
decode --policy static:3,num_draft_tokens=7,stop=svip
decode --policy static:3,adapter={adapter}
decode --policy confidence:0.5
decode --policy confidence:0.6,candidates=3-6-9,stop=0.4,num_draft_tokens=5
decode --policy confidence:0.7,decay=4
decode --policy confidence:0.4,adapter={adapter}
decode --policy margin:0.3
decode --policy entropy:1.5,decay=4
decode --policy saturation:0.8
decode --policy consistent_tokens:3,candidates=2-4-6-8
decode --policy random:5,num_draft_tokens=4
decode --policy logits_current:0.6
decode --policy logits_future:0.5,candidates=3-6-9
decode --policy layer_skip_proportion:0.2
decode --policy skip_set:{skips}
decode --policy learned:{learned},every=2
decode --policy prompt_lookup
decode --policy prompt_lookup:5,max_ngram=4,min_ngram=1+confidence:0.6
decode --policy skip_set:{skips}+confidence:0.9
decode --policy auto
write --policy prompt_lookup+static:3 --prompt_file {repeat}
decode --draft_exit 4 --speculate_k 5
decode --conf_method softmax --conf_threshold 0.4

decode --precision fp32 --policy none  # whole
decode --precision fp32 --policy confidence:0.5,stop=0.4
decode --precision fp32 --policy skip_set:{skips} --temperature 0.8 --seed 2
decode --quantize int8 --policy none  # whole
decode --quantize int8 --policy entropy:1.5
decode --quantize int4 --policy none  # whole
decode --quantize int4 --policy static:3
decode --quantize int4:group=64,lm_head=no --policy skip_set:{skips}
decode --quantize int8:embedding=yes --precision fp32 --policy prompt_lookup+static:3

decode --draft_quantize int8 --policy static:3
decode --draft_quantize int4 --policy confidence:0.5 --precision fp32
decode --draft_quantize int4 --policy skip_set:{skips}
decode --draft_vocab 512 --policy static:3
decode --draft_vocab 1024 --draft_quantize int8 --policy confidence:0.5 --temperature 0.7

decode --temperature 0.8 --seed 1 --policy none  # whole
decode --temperature 0.8 --seed 1 --policy static:3
decode --temperature 0.8 --seed 1 --policy confidence:0.4,stop=adaptive --quantize int8
decode --temperature 1 --top_k 20 --policy static:3
decode --temperature 1 --top_p 0.9 --seed 4 --policy entropy:2
decode --temperature 1 --top_k 50 --top_p 0.9 --policy auto
decode --temperature 1 --verification rejection --policy static:3
decode --temperature 0.9 --top_p 0.9 --verification rejection --seed 5 --policy prompt_lookup+skip_set:{skips}

decode --no-compile --policy static:3
decode --no-compile --precision fp32 --policy logits_future --temperature 0.8
decode --no-compile --quantize int8 --policy skip_set:{skips}
SKIPFAST_NO_CPP=1 decode --no-compile --policy random:1
SKIPFAST_NO_CPP=1 decode --no-compile --quantize int4 --policy static:3,num_draft_tokens=7
decode --no-compile --precision fp16 --policy static:3
decode --no-compile --precision fp16 --policy saturation:0.8

decode --no_verify
decode --no_verify --policy confidence:0.5,candidates=3-6-9
decode --no_verify --policy consistent_tokens:2 --precision fp32
decode --no_verify --policy layer_skip_proportion:0.2 --temperature 0.7 --compare
decode --no_verify --policy skip_set:{skips} --quantize int8

share --policy static:3
share --policy confidence:0.5 --precision fp32
share --policy none --quantize int8
share --policy skip_set:{skips}
share --policy static:3 --temperature 0.8 --top_k 20
ranks -m scripts.correctness --threads 1 --num_samples 2 --max_new_tokens 24 --policy static:3 --output_dir {out}

python generate.py --threads 1 --ignore_eos --max_new_tokens 32
write --prompt "    def test_empty(self):" --policy static:3
write --prompt "" --policy prompt_lookup+static:3 --show_drafts
write --prompt_ids 1,319,1920,780,45,1000 --policy margin:0.4 --verbose
write --prompt_file {long} --policy confidence:0.6
write --prompt "for line in lines:" --policy static:3 --stop "line[1]" --stop zebra
write --interactive --policy prompt_lookup+static:3 < {turns}
write --checkpoint_path {variant} --chat --prompt "Close the file" --policy static:3

end --prompt_file {main} --policy static:3
end --prompt_file {main} --policy confidence:0.5,num_draft_tokens=7,stop=0.4 --precision fp32
end --prompt_file {test} --policy static:3,num_draft_tokens=5 --temperature 0.7
end --checkpoint_path {variant} --prompt_file {parse} --policy static:3,num_draft_tokens=7
end --checkpoint_path {variant} --prompt_file {parse} --policy prompt_lookup+random:1 --no-compile
end --checkpoint_path {variant} --prompt_file {parse} --policy skip_set:{skips} --draft_quantize int8
end --checkpoint_path {variant} --prompt_file {parse} --policy confidence:0.5 --no_verify

python -m scripts.benchmark --threads 1 --policies all --num_prompts 2 --max_new_tokens 24 --repeats 1 --no_verify
python -m scripts.benchmark --threads 1 --dataset questions --num_samples 2 --max_new_tokens 16 --repeats 1 \
--quantize int8 --policy static:3
python -m scripts.sweep --threads 1 --dataset code --num_samples 2 --max_new_tokens 24 --ignore_eos --repeats 1 \
--y exit_layer=2-4 --x num_draft_tokens=2,5 --output_dir {out}
python -m scripts.correctness --threads 1 --num_samples 3 --max_new_tokens 32 --ignore_eos --policy auto \
--policy static:3 --policy skip_set:{skips} --output_dir {out}
python -m scripts.inspect_layers --threads 1 --prompt_file {parse} --policy confidence:0.6 --output_dir {out}
python -m scripts.search_skips --threads 1 --num_samples 2 --max_new_tokens 24 --ignore_eos --trials 3 --repeats 1 \
--output_dir {out}
python -m scripts.eval --threads 1 --ignore_eos --limit 4 --exit_layer 6 --bootstrap_iters 0 --output_dir {out}
OMP_NUM_THREADS=1 python -m scripts.train_policy --threads 1 --data {corpus} --alpha 0.5 --steps 8 --learning_rate 0.1 \
--context 48 --windows 1 --samples 2 --num_draft_tokens 3 --eval_windows 2 --num_prompts 2 --max_new_tokens 16 \
--repeats 1 --output_dir {out}
OMP_NUM_THREADS=1 python -m scripts.train --data {corpus} --n_layer 4 --dim 32 --n_head 2 --n_kv_head 1 --ffn_dim 64 \
--vocab_size 360 --context 32 --batch_size 4 --max_steps 6 --eval_every 3 --output_dir {out}
OMP_NUM_THREADS=1 python -m scripts.train --checkpoint_path {demo} --data {corpus} --adapter_exits 3 \
--adapter_rank 4 --context 32 --batch_size 2 --max_steps 3 --output_dir {out}
python quantize.py --threads 1 --mode int8 --windows 1 --output_path {out}/int8
python quantize.py --threads 1 --mode int4 --windows 1 --calibrate {long} --output_path {out}/int4 && \
decode --checkpoint_path {out}/int4 --policy static:3
python convert_hf_checkpoint.py --checkpoint_path {demo} --output_path {out}/demo --precision fp32 && \
decode --checkpoint_path {out}/demo --policy static:3
"""

PROMPTS = {
    "parse": "def parse_args(argv=None):\n    parser =",
    "main": "    return parser\n\n\nif __name__ == '__main__':",
    "test": "    def test_pop(self):\n        self.assertEqual(1, 2)\n\n\nif __name__ == '__main__':",
    "repeat": "names = []\n" + "".join(f"names.append('number {word}')\n" for word in ("one", "two", "three", "four")),
    "long": "".join(f"def get_value_{i}(self, key):\n    return self.values[key] + {i}\n\n" for i in range(30)),
    "turns": "import os\nand the next line\n",
}
NEEDS = {"scripts.eval": "lm_eval", "scripts.search_skips": "optuna", "--chat": "jinja2"}  # optional packages
SECOND_END = 1972  # of the checkpoint {variant}: the id of a full stop, which its texts reach
SKIPS = {"skip_attention": [3, 5, 8], "skip_mlp": [4, 9, 10]}
TENSORS = {  # kind and, by name, shapes, spreads and means of random numbers
    "learned": (
        "learned policy",
        {"w1": ((16, 256), 0.25, 0.0), "b1": ((16,), 1.0, 0.0), "w2": ((24, 16), 1.0, 0.0), "b2": ((24,), 1.0, 0.9)},
    ),
    "adapter": (
        "exit adapter",
        {
            f"exit.{depth}.{name}": (shape, 0.3, 0.0)
            for depth in (3, 6)
            for name, shape in (("down", (6, 256)), ("up", (256, 6)))
        },
    ),
}
PYTHON = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
ASSIGNMENT = re.compile("([A-Z_]+)=")  # of the environment, before a command
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TIMEOUT_S = 600

# Names of numbers that no clock decides, wherever they stand in a program's JSON.
EXACT = set(
    "tokens text prompt_ids identical errors samples_that_differ backend weight_bytes draft_weight_bytes".split()
)
VISITS = {"layer_visits_per_token", "head_visits_per_token", "ideal_speedup"}
COUNTED = EXACT | VISITS
COUNTED |= set("drafted accepted rounds exit_layers mean_exit_layer acceptance_rate tokens_per_round".split())
COUNTED |= set("equal_to_full_model draft_vocab_coverage quality new_tokens scored_tokens".split())
COUNTED |= set("positions agreement top1_median stable_from departures rejected_drafts cosine_median".split())
COUNTED |= set("top_ids next_ranks skipped reward kl ce distinct_sets".split())  # inspect_layers, train_policy
COUNTED |= set("parameters training_tokens heldout_tokens heldout_loss_by_exit greedy_agreement".split())  # train
COUNTED |= set("loss quantised_loss equal_greedy_tokens tensors bytes copied dtype".split())  # quantize, convert
SEARCHED = {"keep", "exit_layer", "agreement", "identical"}  # the number of drafts follows from measured times
DRAFTS = {"drafted", "accepted", "acceptance_rate", "mean_exit_layer", "exit_layers"}  # of plain decoding: now nothing
ADDED = {"backend", "weight_bytes", "draft_weight_bytes"}  # to the JSON of a conversation, which once lacked them
FOLLOWING = {"acceptance_rate", "tokens_per_round"}  # from the numbers beside them, where these are told
METRIC = re.compile(r"\w+,\w+")  # of the evaluation harness, as in acc,none
LONG = 60  # characters of JSON above which a value is kept as a hash

# ---------------------------------------------------------------- the files that commands read


def write_tensors(path: Path, kind: str, shapes: dict[str, tuple[tuple[int, ...], float, float]]) -> None:
    """Write random fp32 safetensors of skipfast's `kind` for the demo; shapes: name -> (shape, spread, mean)."""
    draw, header, data = random.Random(kind), {}, b""
    for name, (shape, spread, mean) in shapes.items():
        values = [(draw.random() - 0.5) * spread + mean for _ in range(math.prod(shape))]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * len(values)]}
        data += struct.pack(f"<{len(values)}f", *values)
    header["__metadata__"] = {"format": f"skipfast {kind}", "n_layer": "12", "dim": "256"}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_variant(folder: Path, demo: Path) -> None:
    """Write the demo checkpoint with a second end of text and a chat template; its weights are linked to."""
    ends, template = [2, SECOND_END], "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}def close"
    changed = {
        "config.json": {"eos_token_id": ends},
        "generation_config.json": {"eos_token_id": ends},
        "tokenizer_config.json": {"chat_template": template},
    }
    folder.mkdir()
    for file in demo.iterdir():
        if file.name in changed:
            content = json.loads(file.read_text(encoding="utf-8")) | changed[file.name]
            (folder / file.name).write_text(json.dumps(content), encoding="utf-8")
        else:
            (folder / file.name).symlink_to(file)


def corpus() -> str:
    """Return a text to train on: functions of random words."""
    draw = random.Random(0)
    words = [f"{first}{last}" for first in ("get", "set", "read", "put", "size") for last in ("", "_in", "_all", "_x")]
    form = 'def {0}_{1}({2}, {3}):\n    """{0} the {1} of {2}."""\n    return {3} + {4}\n\n\n'
    return "".join(form.format(*draw.sample(words, 4), draw.randrange(99)) for _ in range(500))


def write_files(folder: Path, repo: Path) -> dict[str, str]:
    """Write everything that commands name in braces -> name -> path."""
    configs = sorted(repo.rglob("checkpoints/demo/config.json"))
    if not configs:
        sys.exit(f"{repo} has no checkpoints/demo")
    found = {"demo": configs[0].parent}
    texts = PROMPTS | {"corpus": corpus(), "skips": json.dumps(SKIPS)}
    for name, text in texts.items():
        found[name] = folder / f"{name}.txt"
        found[name].write_text(text, encoding="utf-8")
    for name, (kind, shapes) in TENSORS.items():
        found[name] = folder / f"{name}.safetensors"
        write_tensors(found[name], kind, shapes)
    found["variant"] = folder / "variant"
    write_variant(found["variant"], found["demo"])
    return {name: str(path) for name, path in found.items()}


# ---------------------------------------------------------------- running commands


class Command:
    """A line of COMMANDS. eos: an end of text may fall inside, so the visits of what lies behind it are left out."""

    def __init__(self, line: str):
        text, comment, _ = line.partition("# whole")
        self.text, self.whole = text.strip(), bool(comment)
        self.programs = [expanded(shlex.split(part)) for part in self.text.split("&&")]
        self.words = {word for words in self.programs for word in words}
        self.eos = any("generate.py" in words and "--ignore_eos" not in words for words in self.programs)

    @property
    def missing(self) -> str | None:
        """The optional package that the command needs and this machine lacks."""
        needed = (package for word, package in NEEDS.items() if word in self.words)
        return next((package for package in needed if importlib.util.find_spec(package) is None), None)

    @property
    def names(self) -> set[str]:
        """What is kept of its JSON."""
        return SEARCHED if "scripts.search_skips" in self.words else COUNTED - VISITS if self.eos else COUNTED


def expanded(words: list[str]) -> list[str]:
    """Put what the names of SHORT stand for in the place of a command's first word."""
    first = next(index for index, word in enumerate(words) if not ASSIGNMENT.match(word))
    while words[first] in SHORT:
        words = [*words[:first], *shlex.split(SHORT[words[first]]), *words[first + 1 :]]
    return words


def start(words: list[str], repo: Path, environment: dict[str, str]) -> str | None:
    """Run one program as a shell would: NAME=VALUE before it, < FILE behind -> how it failed, None if it did not."""
    environment, stdin = dict(environment), ""
    while ASSIGNMENT.match(words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if "<" in words:
        at = words.index("<")
        stdin = Path(words[at + 1]).read_text(encoding="utf-8")
        del words[at : at + 2]
    words[:1] = PYTHON[words[0]]
    try:
        done = subprocess.run(
            words, cwd=repo, env=environment, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT_S} s"
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    return f"exit code {done.returncode}: {last}" if done.returncode else None


def run(command: Command, repo: Path, paths: dict[str, str]) -> dict:
    """Run a command in the repository -> what is kept of the JSON that it writes, or how it failed."""
    environment = os.environ | ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": paths["inductor"]}
    result = {"eos": True} if command.eos else {}
    with tempfile.TemporaryDirectory() as out:
        for number, words in enumerate(command.programs):
            named = [re.sub(r"\{(\w+)\}", lambda name: (paths | {"out": out})[name[1]], word) for word in words]
            file = Path(out) / f"{number}.json"
            where = named.index("<") if "<" in named else len(named)
            named[where:where] = ["--json", str(file)]
            failure = start(named, repo, environment)
            if failure or not file.exists():
                return {"failed": failure or "no JSON was written"}
            found = kept(json.loads(file.read_text(encoding="utf-8")), command.names, command.whole)
            result |= {f"{number}.{key}": value for key, value in found.items()} if number else found
        if "--output_path" in command.words:
            files = Path(out).glob("*/*.safetensors")
            result["weights"] = {path.parent.name: digest(path.read_bytes()) for path in files}
    return result


def run_all(commands: list[Command], flags: argparse.Namespace) -> dict[str, dict]:
    """Run commands, some at a time -> their results by their text."""

    def timed(command: Command) -> dict:
        begin = time.monotonic()
        result = run(command, flags.repo, paths)
        if flags.verbose:
            print(f"{time.monotonic() - begin:5.1f} s  {command.text}", file=sys.stderr, flush=True)
        return result

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(flags.jobs) as pool:
        paths = write_files(Path(folder), flags.repo) | {"inductor": f"{folder}/inductor"}
        return dict(zip([command.text for command in commands], pool.map(timed, commands), strict=True))


# ---------------------------------------------------------------- what is kept of a result


def kept(value: object, names: set[str], whole: bool = False) -> dict:
    """Reduce a program's JSON to the values of `names`, flat; of what `auto` wrote to those that it cannot change."""
    items = value.items() if isinstance(value, dict) else numbered(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        policy = str(value.get("policy") or value.get("config", {}).get("policy"))
        names = names & EXACT if policy.startswith("auto") else names
        names = names - DRAFTS if policy.startswith("none") else names
        names = names - FOLLOWING if "rounds" in value else names
        names = names - ADDED if "turns" in value else names
    found = {}
    for key, inner in items:
        if (key in names or METRIC.fullmatch(str(key)) and "stderr" not in key) and inner is not None:
            found[str(key)] = inner if whole and key == "tokens" else shortened(inner)
        else:
            below = names & {"backend"} if key == "config" else names
            found |= {f"{key}.{name}": number for name, number in kept(inner, below, whole).items()}
    return found


def numbered(values: list) -> list[tuple[str, object]]:
    """Name the items of a list by their place, rows of a table by their policy: tables may be in another order."""
    named: dict[str, object] = {}
    for place, item in enumerate(values):
        name = str(place)
        if isinstance(item, dict) and "policy" in item and "rows" not in item:
            names = "/".join(str(item[key]) for key in ("policy", "backend", "exact", "sample") if key in item)
            name = re.sub("(?<=[:=])/[^,:]*/", "", names)  # of a file without its folder
        named[name if name not in named else f"{name}#{place}"] = item
    return list(named.items())


def shortened(value: object) -> object:
    """Round floats to five digits, and replace what is long by its length and a hash."""
    value = rounded(value)
    text = json.dumps(value, sort_keys=True)
    return f"{len(value)}: {digest(text.encode())}" if len(text) > LONG else value


def rounded(value: object) -> object:
    """Round every float inside to five digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def digest(data: bytes) -> str:
    """Hash in short."""
    return hashlib.sha256(data).hexdigest()[:12]


# ---------------------------------------------------------------- record and check


def machine() -> dict[str, str]:
    """Name what bits depend on: the instruction set that the CPU kernels use, and torch."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    known = {
        "amx": {"amx_bf16", "amx_tile", "avx512_bf16"},
        "avx512_bf16": {"avx512_bf16"},
        "avx512": {"avx512f", "avx512bw"},
        "avx2": {"avx2", "fma"},
    }
    instructions = next((name for name, needed in known.items() if needed <= words), platform.machine())
    return {"instructions": instructions, "torch": importlib.metadata.version("torch")}


def differences(recorded: dict, found: dict) -> list[str]:
    """Return a line for each key whose value is another: key, recorded, found; one line if the command failed."""
    if "failed" in found:
        return [f"failed: {found['failed']}"]
    shown = lambda values, key: json.dumps(values[key]) if key in values else "nothing"
    return [
        f"{key}: recorded {shown(recorded, key)}, found {shown(found, key)}"
        for key in sorted(recorded.keys() | found.keys())
        if recorded.get(key) != found.get(key)
    ]


def chosen(flags: argparse.Namespace) -> list[Command]:
    """Return the commands that were asked for and that this machine can run; say which it cannot."""
    commands = [Command(line) for line in COMMANDS.splitlines() if line.strip() and flags.only in line]
    for command in commands:
        if command.missing:
            print(f"left out, needs the package {command.missing}: {command.text}")
    return [command for command in commands if not command.missing]


def record(flags: argparse.Namespace) -> int:
    """Run every command and write what was found -> the exit code."""
    found = run_all(chosen(flags), flags)
    failed = {text: result["failed"] for text, result in found.items() if "failed" in result}
    for text, failure in failed.items():
        print(f"{text}: {failure}")
    if failed:
        print(f"{len(failed)} of {len(found)} commands failed: nothing is recorded")
        return 1
    lines = ",\n".join(f"{json.dumps(text)}: {json.dumps(result)}" for text, result in found.items())
    flags.output.write_text(f'{{"machine": {json.dumps(machine())}, "commands": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{len(found)} commands recorded")
    return 0


def check(flags: argparse.Namespace) -> int:
    """Run the commands again and print what differs from the record -> the exit code."""
    recorded = json.loads(flags.record.read_text(encoding="utf-8"))
    if recorded["machine"] != machine():
        print(
            f"{flags.record} is of a machine with {recorded['machine']}, this one has {machine()}: "
            f"record anew from the old commit"
        )
        return 2
    found = run_all(chosen(flags), flags)
    differing = 0
    for text, result in found.items():
        lines = differences(recorded["commands"].get(text, {}), result)
        differing += bool(lines)
        for line in lines:
            print(f"{text}: {line}")
    print(f"{len(found)} commands, {differing} differ")
    return 1 if differing or not found else 0


def main() -> int:
    """Read the flags and record or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).with_name("golden.json")
    modes = parser.add_subparsers(required=True, metavar="record|check")
    for mode, name, text in (record, "--output", "the file to write"), (check, "--record", "the file to compare with"):
        one = modes.add_parser(mode.__name__, help=mode.__doc__.partition(" ->")[0])
        one.set_defaults(mode=mode, only="")
        one.add_argument("--repo", type=lambda path: Path(path).resolve(), required=True, help="whose programs to run")
        one.add_argument(name, type=Path, default=here, help=f"{text} (default: beside this program)")
        one.add_argument("--jobs", type=int, default=2, help="commands at a time (default: 2)")
        one.add_argument("--verbose", action="store_true", help="say on stderr how long each command took")
    one.add_argument("--only", default="", metavar="SUBSTRING", help="the commands that contain this")
    flags = parser.parse_args()
    return flags.mode(flags)


if __name__ == "__main__":
    sys.exit(main())
