"""Command line `fastgpt`: data, train, finetune, generate, eval, export, info."""

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

_ABSENT = argparse.SUPPRESS  # leaves an option that is not given out of the namespace

# Options of `eval` that require --task.
_TASK_EVALUATION = (*("held_out", "shots", "num_shots", "limit", "baseline", "max_new_tokens", "batch_size"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 after `info --check` if kernels are off, 2 for a user's error, 130 after an interrupt, 141
        if the reader has closed the output.
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
        message = "out of memory; use a smaller model, batch or context, or a machine with more memory"
        console.show(f"fastgpt: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _is_out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error of Python, NumPy or PyTorch, address space included."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    messages = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "numel: integer multiplication overflow",
    )
    return any(message in str(error) for message in messages)


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
    is_single = not as_json and len(prompts) == arguments["num_samples"] == 1
    if task is not None:
        results = answer_inputs(task=task, inputs=prompts, sampling=sampling, **arguments)
    else:
        if is_single:
            arguments["on_text"] = lambda row, piece: console.show(piece, end="")
        results = generate_texts(prompts=prompts, sampling=sampling, **arguments)
    for number, result in enumerate(results):
        text = result.text if task is None else result.continuation
        if as_json:
            console.print_json(asdict(result))
        elif is_single:
            console.show("" if task is None else text)
        else:
            prompt_number = number // arguments["num_samples"] + 1
            console.show(f"--- prompt {prompt_number}, sample {result.sample} ---\n{text}")


def _evaluate(arguments: dict[str, Any]) -> None:
    from fastgpt.evaluation.in_context import in_context
    from fastgpt.evaluation.perplexity import evaluate
    from fastgpt.evaluation.plots import in_context_panels, loss_by_position
    from fastgpt.evaluation.tasks.evaluate import evaluate_task

    as_json, plot = arguments.pop("json"), arguments.pop("plot")
    measure_in_context = arguments.pop("in_context")
    if arguments["task"] is not None:
        if plot is not None or measure_in_context or "packing" in arguments or "text_key" in arguments:
            raise ValueError(
                "--plot, --in-context, --packing and --text-key do not apply to a task; omit them, or drop --task"
            )
        if arguments["source"] is None:
            raise ValueError("eval --task needs examples; give --data, a JSON Lines file or embedded")
        answers = evaluate_task(**arguments)
        _print(answers, as_json)
        return
    _refuse_without_task(arguments.pop("task"), arguments, _TASK_EVALUATION)
    if measure_in_context:
        if "packing" in arguments:
            raise ValueError("--in-context reads a text as one stream; omit --packing")
        found = in_context(**arguments)
        _print(found, as_json)
        if plot is not None:
            in_context_panels(plot, found)
        return
    if arguments["source"] is None:
        raise ValueError("eval needs a text or a measurement; give --data or --in-context")
    result = evaluate(**arguments)
    _print(result, as_json)
    if plot is not None:
        loss_by_position(plot, [(b.first, b.last, b.loss) for b in result.positions], result.loss)


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
        help="preparation of token shards from raw text",
        description="Clean documents, remove duplicates, and write token shards for train --data.",
    )
    data.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text, JSON Lines, JSON, CSV, TSV or Parquet file (optionally compressed), directory, - (standard input), "
        "stdlib, or hf:NAME[@REVISION][:SPLIT] of Hugging Face",
    )
    data.add_argument("--json", action="store_true", help="report as one JSON object")
    add_options(data, PrepareConfig)
    data.set_defaults(command=_data)

    train = commands.add_parser(
        "train",
        help="training of a model on a text",
        description="Train a model on a text. Every option can also be a key of the TOML file.",
    )
    train.add_argument(
        "--config", metavar="FILE", default=None, help="TOML file of options; the command line overrides it"
    )
    add_options(train, train_config.TrainConfig)
    train.set_defaults(command=_train, finetune=False)

    finetune = commands.add_parser(
        "finetune",
        help="training of a model on the examples of a task",
        description="Train a model on inputs and outputs, from a checkpoint or from scratch: train with --task.",
    )
    finetune.add_argument(
        "--config", metavar="FILE", default=None, help="TOML file of options; the command line overrides it"
    )
    finetune.add_argument(
        "--from",
        dest="init_from",
        default=_ABSENT,
        metavar="CHECKPOINT",
        help="alias of --init-from",
    )
    add_options(finetune, train_config.TrainConfig)
    finetune.set_defaults(command=_train, finetune=True)

    generate = commands.add_parser(
        "generate", help="continuation of prompts", description="Continue a prompt."
    )
    _checkpoint_options(generate)
    given = generate.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="text to continue (default: a line break)"
    )
    given.add_argument(
        "--prompts", metavar="FILE", help="text file of prompts, one per line; - is standard input"
    )
    generate.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="continuations per prompt (default: 1)"
    )
    generate.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="texts per batch (default: 16)"
    )
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="maximum new tokens (default: 200)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="divisor of the logits; 0 selects the most likely token (default: 1; with --task, 0)",
    )
    generate.add_argument(
        "--top-k", type=int, metavar="K", help="number of the most likely tokens to sample from"
    )
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="probability of the smallest set of tokens to sample from"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="penalty of tokens that the text already contains, if above 1 (default: 1)",
    )
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="string before which a text ends (may be repeated)",
    )
    generate.add_argument("--seed", type=int, metavar="S", help="random seed; text i uses S + i")
    generate.add_argument("--json", action="store_true", help="one JSON object per text and line")
    generate.add_argument(
        "--task", choices=TASKS, help="task whose input is the prompt; only the answer is printed"
    )
    _shots_options(generate, "embedded")
    generate.set_defaults(command=_generate)

    evaluate = commands.add_parser(
        "eval",
        help="evaluation of a model on a text or a task",
        description="Measure loss and perplexity, in total and by position, in-context learning, or a task.",
    )
    _checkpoint_options(evaluate)
    evaluate.add_argument(
        "--data",
        dest="source",
        metavar="FILE",
        help="text, JSON Lines, JSON, CSV, TSV or Parquet file, - (standard input), directory, prepared data set, "
        "or stdlib; with --task a file of records, or embedded",
    )
    evaluate.add_argument(
        "--in-context",
        action="store_true",
        help="induction and k-shot accuracy; with --data also the loss by position",
    )
    evaluate.add_argument(
        "--packing",
        choices=PACKINGS,
        default=_ABSENT,
        help="documents: no attention between documents; stream: one long text (default: as in training)",
    )
    evaluate.add_argument("--text-key", default=_ABSENT, metavar="KEY", help=f"{TEXT_KEY} (default: text)")
    evaluate.add_argument("--json", action="store_true", help="results as one JSON object")
    evaluate.add_argument(
        "--plot", metavar="PNG", help="file for a plot of the loss by position, or of --in-context"
    )
    evaluate.add_argument("--task", choices=TASKS, help="task whose examples are answered and scored")
    _shots_options(evaluate, "examples of the data that are not evaluated")
    evaluate.add_argument(
        "--limit", type=int, default=_ABSENT, metavar="N", help="maximum number of examples"
    )
    for name, text in (
        ("--held-out", "only the examples of a file that training on it holds out"),
        ("--baseline", "scores of a model with new weights, and the margin above them"),
        ("--skip-broken", "skipping of records that are not a text or an example"),
    ):
        evaluate.add_argument(name, action="store_true", default=_ABSENT, help=text)
    evaluate.add_argument(
        "--max-new-tokens",
        type=int,
        default=_ABSENT,
        metavar="N",
        help="maximum length of an answer (default: that of the data)",
    )
    evaluate.add_argument(
        "--batch-size",
        type=int,
        default=_ABSENT,
        metavar="N",
        help="examples per batch (default: 64)",
    )
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser(
        "export",
        help="export of a model for transformers",
        description="Write a model and its tokenizer as a Hugging Face GPT-2 directory.",
    )
    export.add_argument("--checkpoint", required=True, metavar="DIR", help="directory of a run (train --out)")
    export.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    export.set_defaults(command=_export)

    info = commands.add_parser(
        "info",
        help="report on devices, packages and kernels",
        description="Report devices, packages and kernels.",
    )
    info.add_argument(
        "--check",
        action="store_true",
        dest="checked",
        help="exit status 1, and a reason, if a device has no compiled kernels",
    )
    info.set_defaults(command=_info)
    return parser


def _shots_options(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument(
        "--num-shots",
        type=int,
        default=_ABSENT,
        metavar="K",
        help="examples in each prompt, with --task (default: 0)",
    )
    parser.add_argument(
        "--shots",
        default=_ABSENT,
        metavar="FILE",
        help=f"JSON Lines file of these examples (default: {otherwise})",
    )


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="directory of a run (train --out), or a Hugging Face GPT-2: a directory, or NAME[@REVISION] on the Hub",
    )
    parser.add_argument("--device", default="auto", help="device of the model (default: auto)")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=train_config.BACKEND_CHOICES,
        help="backend of the kernels (default: auto)",
    )
