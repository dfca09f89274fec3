"""Tensor parallelism: with several ranks the text is that configuration's own plain text, and one rank's in fp32.

The ranks are processes of their own on gloo: this file is also the program that they run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import convert_hf_checkpoint
import tp
from decoding.generation import GenerateConfig, Generation
from decoding.runner import Runner
from decoding.sampling import SamplingConfig, choose
from drafting.catalogue import make_policy
from generate import decode
from kernels import cpu, gpu
from kernels.exit_head import Draw, Exit, Head, Shard, exit_stats_reference, merge, partials_of
from kernels.formats import Format
from loading import checkpoint, writing
from tests.helpers.models import random_model
from tests.helpers.policies import example
from tests.helpers.processes import DEMO, ROOT, outputs_of, start_ranks

PROMPT = [2, 3, 50, 60, 2, 3]
NEW = 12
PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16, "int4": torch.bfloat16}
GREEDY = SamplingConfig()
SAMPLING = {"greedy": GREEDY, "coupled": SamplingConfig(temperature=0.8, seed=7)}
ALL_SAMPLING = SAMPLING | {"top_k": SamplingConfig(temperature=1.2, top_k=40, top_p=0.9, seed=3)}
REJECTION = SamplingConfig(temperature=0.8, seed=7, verification="rejection")
POLICIES = (
    "static:2",
    "confidence:0.5,candidates=1-2-3",
    "skip_set:FILE",
    "prompt_lookup:min_ngram=1",
    "learned:LEARNED,every=1",
    "static:1,adapter=ADAPTER",
)
MORE_POLICIES = ("saturation:0.9,candidates=1-2-3", "static:2,stop=0.5", "logits_future", "prompt_lookup+static:1")
SAME_AS_ONE_RANK = ("random", "demo", "int8", "int4")  # int8 and int4: files; all computed in fp32
LOW = Format("int8")
RANK = ("-m", "tests.test_tp")  # this file as the program that a rank runs
SECONDS = 90  # a group of ranks may take in a test, on a busy machine; a tenth is usual


# ---- what a rank runs ----


def text(runner, policy, sampling, skips="skips.json"):
    config = GenerateConfig(NEW, sampling)
    return Generation.collect(decode(runner, PROMPT, config, example(policy, skips, runner.n_layer)))


def settings(size, precision):
    """(pack, sampling, policies): fewer for 4 ranks, whose messages take milliseconds on two cores."""
    if size == 4 and precision == "int4":
        return  # 16 inputs of a rank's wo are half a group
    samplings = SAMPLING if size == 2 or precision == "bf16" else ["coupled" if precision == "fp32" else "greedy"]
    yield from ((True, name, POLICIES) for name in samplings)
    if size == 2 and precision in ("bf16", "int8"):
        yield True, "greedy", ("draft_quantize",)
    if size == 2 and not precision.startswith("int"):
        yield True, "greedy", (*POLICIES, *MORE_POLICIES, "draft_vocab")
        yield True, "top_k", ("static:2", "saturation:0.9,candidates=1-2-3")
        yield from ((False, name, ("static:2", POLICIES[1], "draft_vocab")) for name in SAMPLING)


def write_texts(group, source: str, skips: str, out: str) -> None:
    """Decode everything with this rank's part of the model; each rank writes what it has found."""
    found, folder = {"texts": {}}, Path(skips).parent
    for precision, dtype in PRECISION.items():
        format = Format.parse(precision if precision.startswith("int") else "none")
        for pack, sampling, policies in settings(group.size, precision):
            loaded = checkpoint.load(source, dtype, pack=pack, group=group, format=format)
            runner = Runner(loaded.model, 80, max_rows=8, compile=pack)
            cheap = Runner(loaded.model, 80, max_rows=8, compile=pack, draft_vocab=20)  # on the first rank alone
            found |= {f"{precision} bytes": loaded.bytes, f"backend {pack}": runner.backend}
            texts = found["texts"].setdefault(f"{precision} {pack} {sampling}", {})
            for policy in ("none", *policies):
                which = (cheap, "static:2,stop=0.2") if policy == "draft_vocab" else (runner, policy)
                if policy == "draft_quantize":
                    low = checkpoint.load_draft_model(checkpoint.open_source(source), loaded.model, 2, LOW, group=group)
                    which = Runner(loaded.model, 80, max_rows=8, compile=pack, draft_model=low.model), "static:2"
                each = text(*which, ALL_SAMPLING[sampling], skips)
                texts[policy] = each.tokens, sum(step.accepted for step in each.rounds)
    found["rejection"] = text(runner, "static:2", REJECTION).tokens
    for name in SAME_AS_ONE_RANK:
        if name == "int4" and group.size == 4:
            continue
        path = {"random": source, "demo": DEMO}.get(name, folder / name)
        runner = Runner(checkpoint.load(path, torch.float32, group=group).model, 80, max_rows=1, compile=True)
        exit = runner.exit(runner.prefill(PROMPT))
        stats = [part.tolist() for part in exit.stats()]
        found[name] = exit.logits().tolist(), stats, text(runner, "none", GREEDY).tokens
    Path(f"{out}.{group.rank}").write_text(json.dumps(found))


def fail_on_the_last_rank(group, source: str, bug: str) -> None:
    """Decode for ever, but one rank runs into a bug, a statement of Python, in the middle of it."""
    runner = Runner(checkpoint.load(source, group=group).model, 200, max_rows=4)
    for number, _ in enumerate(decode(runner, PROMPT, GenerateConfig(150), make_policy("static:2", runner.n_layer))):
        if number == 5 and group.rank == group.size - 1:
            exec(bug)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu.load()
    with tp.joined() as joined:
        globals()[sys.argv[1]](joined, *sys.argv[2:])
    sys.exit()


# ---- the tests ----


def run_ranks(size: int, command: list, input: str | None = None) -> tuple[list[int], str, str]:
    """Run a program on `size` ranks -> (exit codes, stdout of all, stderr of all)."""
    ranks = start_ranks(size, command, stdin=subprocess.PIPE)
    out, err = ("".join(parts) for parts in zip(*outputs_of(ranks, input, SECONDS), strict=True))
    return [rank.returncode for rank in ranks], out, err


@pytest.fixture(scope="module")
def model_files(tmp_path_factory, skip_file):
    """A random model of 4 heads and 2 kv heads in both formats: 2 ranks read a folder, 4 ranks one file of ours."""
    folder = tmp_path_factory.mktemp("tp")
    model = random_model(torch.float32, pack=False, sharpness=4.0, ffn_dim=128, seed=2)
    config = writing.hf_config_from_args(model.args)
    writing.export_hf(model.state_dict(), model.args, folder / "hf", config, torch.float32)
    writing.save(model, folder / "ours.safetensors", config)
    for mode in ("int8", "int4"):
        convert_hf_checkpoint.convert(str(folder / "hf"), folder / mode, None, False, Format.parse(mode))
    for name in ("skips.json", "learned4.safetensors", "adapter4.safetensors"):
        shutil.copy(Path(skip_file).with_name(name), folder)
    return {1: folder / "hf", 2: folder / "hf", 4: folder / "ours.safetensors", "skips": folder / "skips.json"}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, model_files, tmp_path_factory):
    """(number of ranks, what each of them found)."""
    size, out = request.param, tmp_path_factory.mktemp("ranks") / "found"
    codes, _, err = run_ranks(size, [*RANK, "write_texts", model_files[size], model_files["skips"], out])
    assert codes == [0] * size, err
    return size, [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(size)]


def test_no_policy_changes_a_token_whatever_the_number_of_ranks(ranks):
    _, (first, *_) = ranks
    for setting, texts in first["texts"].items():
        for policy, (tokens, _) in texts.items():
            assert tokens == texts["none"][0], (setting, policy)
            assert len(tokens) == NEW, (setting, policy)
    for policy in POLICIES:
        accepted = sum(texts[policy][1] for texts in first["texts"].values() if policy in texts)
        assert accepted > 0, f"no draft of {policy} was ever accepted: this test compared nothing"
    assert len({tuple(texts["none"][0]) for texts in first["texts"].values()}) > 2, "all settings wrote the same text"


def test_every_rank_has_the_same_text_and_a_part_of_the_weights(ranks, model_files):
    size, found = ranks
    assert all(other["texts"] == found[0]["texts"] and other["rejection"] == found[0]["rejection"] for other in found)
    whole = checkpoint.load(model_files[1], torch.float32)
    args, weight = whole.args, lambda *shape: 4 * torch.Size(shape).numel()
    shared = weight(args.vocab_size, args.dim) + weight(2 * args.n_layer + 1, args.dim)
    repeated = 2 * weight(args.dim, args.head_dim) * args.n_layer if size > args.n_kv_head else 0
    parts = [other["fp32 bytes"] for other in found]
    tokens = 1 - args.vocab_size % size / args.vocab_size  # shards of the vocabulary differ by one token
    assert (whole.bytes - shared) / size * tokens <= min(parts) - shared - repeated / 2
    assert sum(parts) == whole.bytes + (size - 1) * shared + (size - args.n_kv_head) * repeated
    backends = {"c++ ops", "eager"} if cpu.load() is None else {"eager"}
    assert {found[0]["backend True"], found[0].get("backend False", "eager")} == backends


@pytest.mark.parametrize("name", SAME_AS_ONE_RANK)
def test_several_ranks_compute_the_logits_the_statistics_and_the_greedy_text_of_one(ranks, name, model_files):
    """Also of a quantised file, of which each rank reads its part."""
    if name == "int4" and ranks[0] == 4:
        pytest.skip("16 inputs of a rank's wo are half a group")
    logits, stats, tokens = ranks[1][0][name]
    source = {"demo": DEMO, "random": model_files[1]}.get(name, model_files["skips"].parent / name)
    runner = Runner(checkpoint.load(source, torch.float32).model, 80, max_rows=8)
    exit = runner.exit(runner.prefill(PROMPT))
    assert torch.allclose(exit.logits(), torch.tensor(logits), rtol=0, atol=1e-4)
    for whole, merged in zip(exit.stats(), stats, strict=True):
        assert torch.allclose(whole.float(), torch.tensor(merged).float(), atol=1e-4)
    assert text(runner, "none", GREEDY).tokens == tokens


def test_torchrun_writes_the_demo_text_of_one_process_and_only_rank_0_speaks(tmp_path):
    """Through the command line and with the policy that measures: time is rank 0's."""
    command = ["generate.py", "--prompt", "def copy_file(source", "--precision", "fp32", "--max_new_tokens", "24"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *torchrun, *command, "--json", str(tmp_path / "two.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    runner = Runner(checkpoint.load(DEMO, torch.float32).model, 80, max_rows=1)
    config = GenerateConfig(24)
    one = Generation.collect(decode(runner, found["prompt_ids"], config, make_policy("none", runner.n_layer)))
    assert found["tokens"] == one.tokens and found["config"]["ranks"] == 2
    assert run.stdout.count("new tokens") == 1


def test_a_conversation_is_typed_at_rank_0_alone(tmp_path):
    command = [
        "generate.py",
        "--interactive",
        "--policy",
        "static:3",
        "--precision",
        "fp32",
        "--max_new_tokens",
        "8",
        "--json",
        str(tmp_path / "turns.json"),
    ]
    codes, out, err = run_ranks(2, command, input="import os\ndef main\n")
    assert codes == [0, 0], err
    assert len(json.loads((tmp_path / "turns.json").read_text())["turns"]) == 2 and out.count("> ") == 3


@pytest.mark.parametrize(
    ("size", "flags", "line"),
    [
        (3, [], "error: 3 ranks do not divide num_attention_heads 4 of this model: start a number that does"),
        (2, ["--max_new_tokens", "0"], "error: max_new_tokens must be 1 or more, got 0"),
    ],
)
def test_a_mistake_is_one_line_from_all_ranks_together_and_exit_code_2(size, flags, line):
    codes, out, err = run_ranks(size, ["generate.py", "--prompt", "x", *flags])
    assert codes == [2] * size
    assert [said for said in err.splitlines() if "error" in said] == [line] and out == ""


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        ("raise RuntimeError('a cable came loose')", "RuntimeError: a cable came loose"),
        ("list(zip([1], [], strict=True))", "ValueError: zip() argument 2 is shorter than argument 1"),
    ],
    ids=["RuntimeError", "ValueError"],
)
def test_a_rank_that_fails_ends_all_with_its_error_and_traceback(model_files, bug, error):
    """A plain ValueError, too: only a UserError is the user's mistake."""
    start = time.perf_counter()
    codes, _, err = run_ranks(2, [*RANK, "fail_on_the_last_rank", model_files[2], bug])
    assert codes == [1, 1] and time.perf_counter() - start < tp.TIMEOUT_SECONDS / 2
    assert re.findall(r"^error: .*$", err, re.M) == [f"error: rank 1 of 2 failed: {error}"]
    assert err.count("Traceback") == 1


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"dim": 70}, 4, "4 ranks do not divide hidden_size 70"),
        ({"ffn_dim": 97}, 2, "2 ranks do not divide intermediate_size 97"),
        ({"n_head": 12, "n_kv_head": 6}, 4, "4 ranks neither divide num_key_value_heads 6"),
        ({"vocab_size": 7}, 4, "4 ranks are too many for vocab_size 7: start 3"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(change, size, message):
    args = checkpoint.open_source(DEMO).args
    tp.check(args, size)
    with pytest.raises(ValueError, match=message):
        tp.check(replace(args, **change), size)


@pytest.mark.parametrize("bounds", [(0, 130), (0, 65, 130), (0, 1, 1, 2, 130), (0, 20, 20, 20)])
def test_merged_partials_are_what_the_whole_row_says(bounds):
    """Whatever the cuts, empty shards and shards of one token included; ties go to the lowest id."""
    logits = torch.randn(3, bounds[-1], generator=torch.Generator().manual_seed(0)) * 3
    logits[1, [5, 11, 19]] = 9.0
    draw, config = Draw(40, 3, 0.7).on(logits.device, 3), SamplingConfig(0.7, seed=3)
    runs = [partials_of(logits[:, first:end], first, draw) for first, end in zip(bounds, bounds[1:], strict=False)]
    tokens, stats, samples = merge(*(torch.cat(parts, -1) for parts in zip(*runs, strict=True)))
    whole = exit_stats_reference(logits)
    assert tokens.tolist() == whole.tokens.tolist() and tokens[1] == 5
    assert torch.allclose(stats, torch.stack(whole[1:], -1), atol=1e-5)
    assert samples.tolist() == [choose(row, 40 + i, config) for i, row in enumerate(logits)]


@pytest.mark.parametrize("on_gpu", [True, False], ids=["gpu", "torch"])
@pytest.mark.parametrize("draft_vocab", [130, 66, 20])  # both shards; one token of the second; none of it
def test_an_exit_of_sharded_heads_says_what_the_exit_of_the_whole_head_says(on_gpu, draft_vocab, monkeypatch):
    """With the partials of the GPU's operator (its reference) and with those of torch."""
    if on_gpu:
        if reason := gpu.load():
            pytest.skip(reason)
        monkeypatch.setattr(gpu, "supports", lambda rows: True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (3, 130))
    norm, draw, bounds = torch.ones(64).bfloat16(), Draw(40, 3, 0.7), (0, 65, 130)
    whole = Head(norm, 1e-5, weight, None, 130).trimmed(draft_vocab)
    sent = []
    for rank in range(2):
        shard = Shard(bounds, rank, gather=None)
        head = Head(norm, 1e-5, weight[bounds[rank] : bounds[rank + 1]], None, 65, shard).trimmed(draft_vocab)
        sent.append(Exit(hidden, head, 3, draw)._own_partials(want_stats=True))
    tokens, stats, samples = merge(*(torch.cat(parts, -1) for parts in zip(*sent, strict=True)))
    logits, config = whole.logits(hidden), SamplingConfig(0.7, seed=3)
    expected = exit_stats_reference(logits)
    assert tokens.tolist() == expected.tokens.tolist()
    assert torch.allclose(stats, torch.stack(expected[1:], -1), atol=1e-5)
    assert samples.tolist() == [choose(row, 40 + i, config) for i, row in enumerate(logits)]
