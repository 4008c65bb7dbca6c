"""Command line `fastgpt`: data, train, finetune, generate, eval, export, info. Its options are in `cli_parser`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import fastgpt
from fastgpt import _interrupt, console
from fastgpt.cli_parser import make_parser
from fastgpt.data.prepare import PrepareConfig
from fastgpt.distributed import ProcessLostError
from fastgpt.evaluation.tasks.template import TASKS
from fastgpt.training.config import FINETUNE, read_toml

_ERRORS = (
    *(ValueError, OSError, ImportError, FloatingPointError),
    *(fastgpt.BackendUnavailable, ProcessLostError),
)

# Options of `eval` that require --task.
_TASK_EVALUATION = (*("held_out", "shots", "num_shots", "limit", "baseline", "max_new_tokens", "batch_size"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 after `info --check` if kernels are off, 2 for a user's error, 130 after an interrupt, 141
        if the reader has closed the output.
    """
    _interrupt.raise_again()
    return console.run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        parser = make_parser()
        arguments = vars(parser.parse_args(argv))
        command = arguments.pop("command")
        if command is None:
            parser.print_help()
            return 0
        return int(_COMMANDS[command](arguments) or 0)
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


def _set_threads(arguments: dict[str, Any]) -> None:
    """Apply --threads of a command whose function has no such option."""
    threads = arguments.pop("threads")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)


def _data(arguments: dict[str, Any]) -> None:
    from fastgpt.data.prepare import prepare

    inputs, as_json = arguments.pop("inputs"), arguments.pop("json")
    report = prepare(inputs, PrepareConfig(**arguments))
    _print(report, as_json)


def _train(arguments: dict[str, Any]) -> None:
    from fastgpt.training.initialize import config_from
    from fastgpt.training.trainer import train

    train(config_from(_with_file(arguments)))


def _finetune(arguments: dict[str, Any]) -> None:
    from fastgpt.training.initialize import config_from
    from fastgpt.training.trainer import train

    options = _with_file(arguments)
    if not options.get("resume"):
        for name, needs in (
            ("task", f"a --task: {', '.join(TASKS)}"),
            ("data", "--data, a file of examples"),
        ):
            if options.get(name) is None:
                raise ValueError(f"finetune needs {needs}")
        options = FINETUNE | options
    train(config_from(options))


def _with_file(arguments: dict[str, Any]) -> dict[str, Any]:
    """Add the options in the file of --config to those of the command line, which come first."""
    file = arguments.pop("config", None)
    return (read_toml(file) if file is not None else {}) | arguments


def _generate(arguments: dict[str, Any]) -> None:
    from fastgpt.evaluation.tasks.evaluate import answer_inputs
    from fastgpt.generation.sampling import Sampling
    from fastgpt.generation.text import generate_texts, read_prompts

    _set_threads(arguments)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    task = arguments.pop("task")
    _refuse_without_task(task, arguments, ("shots", "num_shots"))
    if arguments["temperature"] is None:
        arguments["temperature"] = 0.8 if task is None else 0.0
    arguments["top_k"] = arguments["top_k"] or None
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

    _set_threads(arguments)
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
    out, layout = arguments["out"], "Llama" if model.config.norm == "rms" else "GPT-2"
    console.show(
        f'wrote {out} in {layout}\'s layout: transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    )


def _bench(arguments: dict[str, Any]) -> None:
    from fastgpt.integrations.benchmark import BenchConfig, compare

    model, as_json = arguments.pop("model"), arguments.pop("json")
    _print(compare(model, BenchConfig(**arguments)), as_json)


def _info(arguments: dict[str, Any]) -> int:
    from fastgpt import env_report as info

    return info.main(**arguments)


_COMMANDS = {
    "data": _data,
    "train": _train,
    "finetune": _finetune,
    "generate": _generate,
    "eval": _evaluate,
    "bench": _bench,
    "export": _export,
    "info": _info,
}
