"""The command `fastgpt`: data, train, finetune, generate, eval, export, info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import fastgpt
from fastgpt import console
from fastgpt.data.packing import PACKINGS
from fastgpt.data.prepare import PrepareConfig
from fastgpt.distributed import ProcessLostError
from fastgpt.evaluation.tasks.template import TASKS
from fastgpt.options import TEXT_KEY, add_options
from fastgpt.training import config as train_config

_ERRORS = (
    *(ValueError, OSError, ImportError, FloatingPointError),
    *(fastgpt.BackendUnavailable, ProcessLostError),
)

_ABSENT = argparse.SUPPRESS  # an option that is not given is not there either

# Options of `eval` that mean nothing without --task.
_TASK_EVALUATION = (*("held_out", "shots", "num_shots", "limit", "baseline", "max_new_tokens", "batch_size"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit status: 0, 1 after `info --check` where kernels are off, 2 for a user's error, 130 when
    interrupted, 141 when the reader of its output has gone.
    """
    return console.run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        return int(command(arguments) or 0)
    except _ERRORS as error:
        if console.reader_is_gone(error):
            raise
        console.show(f"fastgpt: error: {console.one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = "there is not enough memory; take a smaller model, batch or context, or a machine with more"
        console.show(f"fastgpt: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or PyTorch's for memory that there is not, the address space included."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "numel: integer multiplication overflow",
    )
    return any(sign in str(error) for sign in signs)


def _data(arguments: dict[str, Any]) -> None:
    from fastgpt.data.prepare import prepare

    inputs, as_json = arguments.pop("inputs"), arguments.pop("json")
    report = prepare(inputs, PrepareConfig(**arguments))
    _print(report, as_json)


def _train(arguments: dict[str, Any]) -> None:
    from fastgpt.training.initialize import config_from
    from fastgpt.training.trainer import train

    file, finetune = arguments.pop("config", None), arguments.pop("finetune")
    options = train_config.read_toml(file) if file is not None else {}
    config = config_from(options | arguments)
    if finetune and config.task is None:
        raise ValueError(f"finetune needs a --task: {', '.join(TASKS)}")
    train(config, same_data="data" not in options | arguments)


def _generate(arguments: dict[str, Any]) -> None:
    from fastgpt.evaluation.tasks.evaluate import answer_inputs
    from fastgpt.generation.sampling import Sampling
    from fastgpt.generation.text import generate_texts, read_prompts

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    task = arguments.pop("task")
    _refuse_without_task(task, arguments, ("shots", "num_shots"))
    if arguments["temperature"] is None:
        arguments["temperature"] = 1.0 if task is None else 0.0
    sampling = Sampling(*(arguments.pop(name) for name in names))
    prompt, file, as_json = (arguments.pop(name) for name in ("prompt", "prompts", "json"))
    prompts = [prompt] if file is None else read_prompts(file)
    alone = not as_json and len(prompts) == arguments["num_samples"] == 1
    if task is not None:
        results = answer_inputs(task=task, inputs=prompts, sampling=sampling, **arguments)
    else:
        if alone:
            arguments["on_text"] = lambda row, piece: console.show(piece, end="")
        results = generate_texts(prompts=prompts, sampling=sampling, **arguments)
    for number, result in enumerate(results):
        text = result.text if task is None else result.continuation
        if as_json:
            console.print_json(asdict(result))
        elif alone:
            console.show("" if task is None else text)
        else:
            place = number // arguments["num_samples"] + 1
            console.show(f"--- prompt {place}, sample {result.sample} ---\n{text}")


def _evaluate(arguments: dict[str, Any]) -> None:
    from fastgpt.evaluation.in_context import in_context
    from fastgpt.evaluation.perplexity import evaluate
    from fastgpt.evaluation.plots import in_context_panels, loss_by_position
    from fastgpt.evaluation.tasks.evaluate import evaluate_task

    as_json, picture = arguments.pop("json"), arguments.pop("plot")
    of_context = arguments.pop("in_context")
    if arguments["task"] is not None:
        if picture is not None or of_context or "packing" in arguments or "text_key" in arguments:
            raise ValueError(
                "--plot, --in-context, --packing and --text-key do not apply to a task; omit them, or drop --task"
            )
        if arguments["source"] is None:
            raise ValueError("eval --task needs --data, a JSON Lines file or embedded")
        answers = evaluate_task(**arguments)
        _print(answers, as_json)
        return
    _refuse_without_task(arguments.pop("task"), arguments, _TASK_EVALUATION)
    if of_context:
        if "packing" in arguments:
            raise ValueError("--in-context reads a text as one stream; omit --packing")
        found = in_context(**arguments)
        _print(found, as_json)
        if picture is not None:
            in_context_panels(picture, found)
        return
    if arguments["source"] is None:
        raise ValueError("eval needs --data, a text to measure the model on, or --in-context")
    result = evaluate(**arguments)
    _print(result, as_json)
    if picture is not None:
        loss_by_position(picture, [(b.first, b.last, b.loss) for b in result.positions], result.loss)


def _print(result: Any, as_json: bool) -> None:
    """Print a result that has `as_dict` and `table`."""
    if as_json:
        console.print_json(result.as_dict())
    else:
        console.show(result.table())


def _refuse_without_task(task: str | None, given: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if task is None and name in given:
            raise ValueError(f"--{name.replace('_', '-')} needs a --task: {', '.join(TASKS)}")


def _export(arguments: dict[str, Any]) -> None:
    from fastgpt.checkpoints.load import open_model

    model, tokenizer = open_model(arguments["checkpoint"])
    model.save_pretrained(arguments["out"], tokenizer)


def _info(arguments: dict[str, Any]) -> int:
    from fastgpt import env_report as info

    return info.main(**arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastgpt", description="Train small GPTs fast.")
    parser.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    data = commands.add_parser(
        "data",
        help="make token shards of raw text",
        description="Clean a text, drop duplicates, and write it as token shards for train --data.",
    )
    data.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a text, JSON Lines, JSON, CSV, TSV or Parquet file, also compressed, a directory, - (standard input), "
        "stdlib, or hf:NAME[@REVISION][:SPLIT] of Hugging Face",
    )
    data.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_options(data, PrepareConfig)
    data.set_defaults(command=_data)

    train = commands.add_parser(
        "train",
        help="train a model on a text",
        description="Train a model on a text; every option is a TOML key too.",
    )
    train.add_argument(
        "--config", metavar="FILE", default=None, help="a TOML file of options; the command line wins"
    )
    add_options(train, train_config.TrainConfig)
    train.set_defaults(command=_train, finetune=False)

    finetune = commands.add_parser(
        "finetune",
        help="train a model on the examples of a task",
        description="Train a model on inputs and outputs, from a checkpoint or from nothing: train with --task.",
    )
    finetune.add_argument(
        "--config", metavar="FILE", default=None, help="a TOML file of options; the command line wins"
    )
    finetune.add_argument(
        "--from",
        dest="init_from",
        default=_ABSENT,
        metavar="CHECKPOINT",
        help="another name of --init-from",
    )
    add_options(finetune, train_config.TrainConfig)
    finetune.set_defaults(command=_train, finetune=True)

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    _checkpoint_options(generate)
    given = generate.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="what to continue (default: a line break)"
    )
    given.add_argument(
        "--prompts", metavar="FILE", help="a text file of prompts, one a line; - is standard input"
    )
    generate.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)"
    )
    generate.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="texts computed at once (default: 16)"
    )
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="tokens to add (default: 200)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the likeliest token (default: 1; with --task, 0)",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up P"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="above 1 tokens that the text has already become less likely (default: 1)",
    )
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before this string (may be repeated)",
    )
    generate.add_argument(
        "--seed", type=int, metavar="S", help="makes the samples repeatable: text i has S + i"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object a text, one a line")
    generate.add_argument("--task", choices=TASKS, help="the prompt is an input: print the answer alone")
    _shots_options(generate, "embedded")
    generate.set_defaults(command=_generate)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model on a text",
        description="Loss and perplexity, also by position in the context, or what is learned from the context.",
    )
    _checkpoint_options(evaluate)
    evaluate.add_argument(
        "--data",
        dest="source",
        metavar="FILE",
        help="a text, JSON Lines, JSON, CSV, TSV or Parquet file, - (standard input), a directory of files, one that "
        "`fastgpt data` made, or stdlib; with --task a file of records, or embedded",
    )
    evaluate.add_argument(
        "--in-context",
        action="store_true",
        help="measure induction and k-shot accuracy; with --data the loss by position",
    )
    evaluate.add_argument(
        "--packing",
        choices=PACKINGS,
        default=_ABSENT,
        help="documents: none sees its neighbour; stream: all that follows one another (default: as in training)",
    )
    evaluate.add_argument("--text-key", default=_ABSENT, metavar="KEY", help=f"{TEXT_KEY} (default: text)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--plot", metavar="PNG", help="draw the loss over the position in the context")
    evaluate.add_argument("--task", choices=TASKS, help="measure the answers to a task's examples")
    _shots_options(evaluate, "of the data, what is not evaluated")
    evaluate.add_argument(
        "--limit", type=int, default=_ABSENT, metavar="N", help="evaluate no more than N examples"
    )
    for name, text in (
        ("--held-out", "of a JSON Lines file evaluate what training on it leaves out"),
        ("--baseline", "evaluate a model with new weights too, and the margin above it"),
        ("--skip-broken", "leave out records without a text, or lines that are no example"),
    ):
        evaluate.add_argument(name, action="store_true", default=_ABSENT, help=text)
    evaluate.add_argument(
        "--max-new-tokens",
        type=int,
        default=_ABSENT,
        metavar="N",
        help="the longest answer (default: that of the data)",
    )
    evaluate.add_argument(
        "--batch-size",
        type=int,
        default=_ABSENT,
        metavar="N",
        help="examples computed at once (default: 64)",
    )
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser(
        "export",
        help="write a model for transformers",
        description="Write a model and its tokenizer as a Hugging Face GPT-2 directory.",
    )
    export.add_argument("--checkpoint", required=True, metavar="DIR", help="what train --out was given")
    export.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
    export.set_defaults(command=_export)

    info = commands.add_parser(
        "info", help="say what this machine has", description="Say what this machine has."
    )
    info.add_argument(
        "--check",
        action="store_true",
        dest="checked",
        help="exit with status 1 where a device has no compiled kernels, and say why",
    )
    info.set_defaults(command=_info)
    return parser


def _shots_options(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument(
        "--num-shots",
        type=int,
        default=_ABSENT,
        metavar="K",
        help="with --task, show K examples first (default: 0)",
    )
    parser.add_argument(
        "--shots",
        default=_ABSENT,
        metavar="FILE",
        help=f"a JSON Lines file of those (default: {otherwise})",
    )


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="what train --out was given, or a Hugging Face GPT-2: a directory, or NAME[@REVISION] on the Hub",
    )
    parser.add_argument("--device", default="auto", help="where the model runs (default: auto)")
    parser.add_argument(
        "--backend", default="auto", choices=train_config.BACKEND_CHOICES, help="which kernels run"
    )
