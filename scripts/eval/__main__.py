"""Run tasks of the lm-evaluation-harness: texts by any policy, likelihoods by the LM head after any layer.

The harness loads tasks, makes prompts and computes metrics; `harness.py` answers its requests. Without a flag the tiny
tasks of `scripts/eval/tasks` run, which need no network. Under torchrun the ranks share the requests.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
from decoding.engine import Engine
from decoding.generation import ideal_speedup, rate, summed
from drafting.catalogue import policy_names
from drafting.policy import DraftPolicy, check_exit_layer
from errors import UserError
from generate import check_unverified, check_unverified_flags
from loading.files import check_writable, make_folder, write_json, write_text
from scripts.common import ranks
from scripts.eval import harness

LONGEST = 4096  # positions of the cache, unless the model has fewer or --max_length says otherwise


def policy_from_flags(flags: argparse.Namespace, engine: Engine) -> DraftPolicy:
    """Make the policy that writes texts: that of --policy, or static at --exit_layer, or auto."""
    static = flags.exit_layer is not None or flags.no_verify
    default = f"static:{flags.exit_layer or max(1, engine.n_layer // 4)}" if static else "auto"
    policy = engine.policy(flags.policy or default, num_draft_tokens=flags.num_draft_tokens)
    if flags.no_verify:
        check_unverified_flags(flags)
        check_unverified(policy, cli.sampling_config(flags))
    return policy


def json_object(text: str | None, flag: str) -> dict | None:
    """Parse the value of a flag that takes JSON."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{flag} must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag} must be a JSON object, got {text!r}")
    return value


def generation_arguments(text: str | None) -> dict:
    """Parse --gen_kwargs, as JSON or as the harness's key=value,key=value."""
    from lm_eval.utils import simple_parse_args_string

    if text is None or text.lstrip().startswith("{"):
        return json_object(text, "gen_kwargs") or {}
    try:
        return simple_parse_args_string(text)
    except (ValueError, IndexError):
        raise UserError(f"gen_kwargs must be key=value,key=value or a JSON object, got {text!r}") from None


def check_limits(flags: argparse.Namespace, max_seq_len: int) -> None:
    """Raise UserError for numbers out of range; fill in the length of the cache."""
    if flags.limit is not None and (flags.limit <= 0 or (flags.limit > 1 and flags.limit != int(flags.limit))):
        raise UserError(f"limit must be a number of samples or a share below 1, got {flags.limit:g}")
    if flags.limit is not None and flags.limit >= 1:
        flags.limit = int(flags.limit)
    if flags.num_fewshot is not None and flags.num_fewshot < 0:
        raise UserError(f"num_fewshot must be 0 or more, got {flags.num_fewshot}")
    if flags.max_new_tokens is not None and flags.max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {flags.max_new_tokens}")
    if flags.max_length is not None and not 2 <= flags.max_length <= max_seq_len:
        raise UserError(f"max_length must be in 2..{max_seq_len} for this model, got {flags.max_length}")
    flags.max_length = flags.max_length or min(max_seq_len, LONGEST)
    if flags.bootstrap_iters < 0:
        raise UserError(f"bootstrap_iters must be 0 or more, got {flags.bootstrap_iters}")


def check_tasks(tasks: dict, flags: argparse.Namespace) -> None:
    """Raise UserError for what the loaded tasks, by name, do not have, or ask for and cannot get."""
    for name, wanted in (flags.samples or {}).items():
        if name not in tasks:
            raise UserError(f"samples: {name!r} is none of the tasks {', '.join(tasks)}")
        count = len(tasks[name].eval_docs)
        if wrong := [i for i in wanted if not 0 <= i < count]:
            raise UserError(f"samples: {name} has the samples 0..{count - 1}, got {wrong[0]}")
    for name, task in tasks.items():
        harness.check_fewshot(task, flags.num_fewshot)
        if task.get_config("output_type") == "generate_until":
            kwargs = (task.get_config("generation_kwargs") or {}) | flags.gen_kwargs
            harness.check_generation(kwargs, name)
            sampled = flags.temperature and not kwargs.get("do_sample")  # the cache leaves out what samples by itself
            if flags.use_cache and sampled and (task.get_config("repeats") or 1) > 1:
                raise UserError(
                    f"use_cache keeps one answer of a request, and {name} asks for "
                    f"{task.get_config('repeats')} different ones at temperature {flags.temperature:g}: "
                    f"leave out one of the flags"
                )


def cache_path(flags: argparse.Namespace, policy: DraftPolicy, device: str) -> str | None:
    """Name the file that keeps answers.

    The harness knows only requests, so all else that decides an answer goes into the name.
    """
    if not flags.use_cache:
        return None
    keys = (
        "checkpoint_path",
        "precision",
        "quantize",
        "exit_layer",
        "no_verify",
        "max_length",
        "max_new_tokens",
        "apply_chat_template",
        "draft_vocab",
        "draft_quantize",
    )
    sampling = dataclasses.asdict(cli.sampling_config(flags))
    decisive = [str(policy) if flags.no_verify else "", device, *(str(getattr(flags, key)) for key in keys), sampling]
    return f"{flags.use_cache}_{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]}"


def evaluate(model, tasks: list, manager, flags: argparse.Namespace) -> dict | None:
    """Run the harness -> its results; None where another process of this machine has them."""
    from lm_eval.evaluator import simple_evaluate

    return simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        samples=flags.samples,
        gen_kwargs=flags.gen_kwargs or None,
        use_cache=cache_path(flags, model.policy, model.runner.positions.device.type),
        cache_requests=flags.cache_requests,
        bootstrap_iters=flags.bootstrap_iters,
        write_out=flags.write_out,
        check_integrity=flags.check_integrity,
        log_samples=True,
        system_instruction=flags.system_instruction,
        apply_chat_template=flags.apply_chat_template,
        fewshot_as_multiturn=flags.fewshot_as_multiturn,
        predict_only=flags.predict_only,
        fewshot_random_seed=flags.fewshot_seed,
        confirm_run_unsafe_code=flags.confirm_run_unsafe_code,
        metadata=flags.metadata,
    )


def decoding_numbers(model: harness.HarnessModel) -> dict | None:
    """Return the numbers of decoding, over all texts; None if there were none."""
    if not (texts := len(model.summaries)):
        return None
    sums = summed(model.summaries)
    visits = sums.layer_visits, sums.head_visits
    return {
        "texts": texts,
        "new_tokens": sums.tokens + texts,
        "tokens_per_s": rate(sums.tokens, sums.seconds),
        "acceptance_rate": sums.acceptance_rate,
        "tokens_per_round": sums.tokens_per_round,
        "layer_visits_per_token": sums.layer_visits_per_token,
        "ideal_speedup": ideal_speedup(sums.tokens, *visits, model.runner.model) if sums.tokens else None,
    }


def metric_rows(results: dict) -> list[list[str]]:
    """Make the rows of the table: task, metric, value, standard error, few-shot examples, samples."""
    rows = []
    for table in ("groups", "results"):
        for task, measures in results.get(table, {}).items():
            if table == "results" and task in results.get("groups", {}):
                continue
            samples = results.get("n-samples", {}).get(task, {}).get("effective")
            for key, value in measures.items():
                metric, comma, kind = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = measures.get(f"{metric}_stderr,{kind}")
                error = f"± {error:.4f}" if isinstance(error, float) else ""
                label = metric if kind == "none" else f"{metric} ({kind})"
                shots = str(results.get("n-shot", {}).get(task, ""))
                rows.append([measures.get("alias", task), label, f"{value:.4f}", error, shots, cli.shown(samples, "d")])
    return rows


def print_results(results: dict, decoding: dict | None, title: str) -> None:
    cli.print_table(title, ["task", "metric", "value", "standard error", "few-shot", "samples"], metric_rows(results))
    if decoding:
        print(
            f"{decoding['texts']} texts, {decoding['new_tokens']} tokens: {cli.shown(decoding['tokens_per_s'])} "
            f"tokens/s, acceptance rate {cli.shown(decoding['acceptance_rate'], '.2f')}, "
            f"{cli.shown(decoding['tokens_per_round'], '.2f')} tokens per round, by bytes alone "
            f"{cli.shown(decoding['ideal_speedup'], '.2f')}× plain decoding"
        )


def write_files(results: dict, folder: Path, log_samples: bool) -> dict:
    """Write results.json, and a line of JSON for each sample if wanted -> results as plain JSON."""
    from lm_eval.utils import handle_non_serializable

    samples = results.pop("samples", None) or {}
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    if log_samples:
        for task, rows in samples.items():
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            write_text(folder / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines))
    write_json(folder / "results.json", plain)
    return plain


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.eval",
        description="Run tasks of the lm-evaluation-harness, with any draft policy and any exit layer.",
        epilog="example: python -m scripts.eval --tasks skipfast_demo --exit_layer 6 --output_dir eval_out",
    )
    cli.add_model_flags(parser)
    cli.add_decode_flags(parser)
    parser.set_defaults(max_new_tokens=None)  # tasks have their own
    parser.add_argument(
        "--policy",
        metavar="NAME:key=value,…",
        help="writes the texts (default: auto, or static at --exit_layer): " + ", ".join(policy_names()),
    )
    parser.add_argument(
        "--exit_layer", type=int, metavar="E", help="likelihoods by the LM head after E layers (default: all)"
    )
    parser.add_argument("--no_verify", action="store_true", help="texts by early exit: the drafts as they are")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: yes")
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help=f"positions; longer prompts lose their beginning (default: at most {LONGEST})",
    )
    parser.add_argument("--output_dir", default="eval_out", metavar="FOLDER")
    group = parser.add_argument_group("passed on to the harness")
    group.add_argument(
        "--tasks",
        "--dataset",
        default="skipfast_demo",
        metavar="NAME,…",
        help="tasks, groups, patterns, YAML files (default: skipfast_demo, which needs no network)",
    )
    group.add_argument("--include_path", action="append", default=[], metavar="FOLDER", help="more tasks (repeatable)")
    group.add_argument("--num_fewshot", type=int, metavar="N")
    group.add_argument("--limit", "--num_samples", type=float, metavar="N", help="samples a task; below 1: a share")
    group.add_argument("--samples", metavar="JSON", help='which ones: {"task": [0, 3, 6]}')
    group.add_argument("--gen_kwargs", metavar="KEY=VALUE,…", help="over the tasks' own generation arguments")
    group.add_argument("--system_instruction", metavar="TEXT")
    group.add_argument("--apply_chat_template", action="store_true")
    group.add_argument("--fewshot_as_multiturn", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--fewshot_seed", type=int, default=1234, metavar="N")
    group.add_argument("--bootstrap_iters", type=int, default=100_000, metavar="N", help="of standard errors; 0: none")
    group.add_argument("--use_cache", metavar="PATH", help="keep answers in PATH_…_rank0.db, and take them from there")
    group.add_argument("--metadata", metavar="JSON")
    for flag in (
        "cache_requests",
        "write_out",
        "check_integrity",
        "predict_only",
        "log_samples",
        "confirm_run_unsafe_code",
    ):
        group.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    with ranks.joined() as everyone:
        flags = parse_flags()
        run_tasks(flags, everyone)


def run_tasks(flags: argparse.Namespace, everyone: ranks.Ranks) -> None:
    """Check everything, run the tasks, write and print the results; the same call on every rank."""
    harness.check_installed()
    logging.getLogger("lm_eval").setLevel(logging.WARNING if everyone.leads else logging.ERROR)
    flags.samples, flags.metadata = (json_object(getattr(flags, key), key) for key in ("samples", "metadata"))
    if flags.samples is not None and flags.limit is not None:
        raise UserError("samples and limit each choose samples: give one")
    if flags.use_cache and everyone.size > 1:
        raise UserError("use_cache does not go with several processes: each would miss other answers")
    given = generation_arguments(flags.gen_kwargs)
    harness.check_generation(given, "gen_kwargs")
    flags.gen_kwargs = {
        harness.COUNT_KEYS[0] if key in harness.COUNT_KEYS else key: value for key, value in given.items()
    }  # a task's own max_gen_toks would win over other names
    wanted = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"tasks must name at least one task, got {flags.tasks!r}")
    sampling = cli.sampling_config(flags)
    engine = everyone.open_engine(flags)
    n_layer = engine.n_layer
    check_exit_layer(n_layer if flags.exit_layer is None else flags.exit_layer, n_layer)
    policy = policy_from_flags(flags, engine)
    check_limits(flags, engine.args.max_seq_len)
    check_writable(flags.json)
    folder = make_folder(flags.output_dir)
    manager, names = harness.find_tasks(wanted, flags.include_path, flags.metadata)
    tasks = harness.load_tasks(manager, names)
    loaded = manager.load(tasks)["tasks"]
    check_tasks(loaded, flags)
    if flags.apply_chat_template:
        engine.tokenizer.render_chat([{"role": "user", "content": ""}])  # no template: say so before loading

    runner = engine.prepare([policy], flags.max_length, sampling).runner(policy)
    runner.cache_length = flags.max_length  # a policy that measures first may have made it longer
    model = harness.make_model(
        runner,
        engine.tokenizer,
        policy,
        sampling,
        everyone,
        exit_layer=flags.exit_layer or n_layer,
        max_new_tokens=flags.max_new_tokens,
        verified=not flags.no_verify,
        chat=flags.apply_chat_template,
        name=flags.checkpoint_path,
    )
    results = evaluate(model, tasks, manager, flags)
    decoding = decoding_numbers(model)
    if not everyone.leads:
        return
    results["skipfast"] = {
        "policy": str(policy),
        "verified": not flags.no_verify,
        "exit_layer": model.likelihoods.exit_layer,
        "decoding": decoding,
        "scored_tokens": model.scored_tokens,
        "ranks": everyone.size,
        "flags": vars(flags),
        **cli.environment(),
    }
    plain = write_files(results, folder, flags.log_samples)
    if flags.json:
        write_json(flags.json, plain)
    how = f"likelihoods after {model.likelihoods.exit_layer} of {n_layer} layers, texts by {policy}"
    how += " (unverified)" if flags.no_verify else ""
    print_results(plain, decoding, f"{Path(flags.checkpoint_path).name}: {how}")
    print(f"wrote {folder / 'results.json'}")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
