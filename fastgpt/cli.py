"""The command `fastgpt`: data, train, generate, eval, export, info."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import fastgpt
from fastgpt import config as train_config
from fastgpt.data.prepare import PrepareConfig
from fastgpt.distributed import ProcessLostError
from fastgpt.options import add_options

_ERRORS = (
    *(ValueError, OSError, ImportError, FloatingPointError),
    *(fastgpt.BackendUnavailable, ProcessLostError),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        command(arguments)
    except _ERRORS as error:
        print(f"fastgpt: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _data(arguments: dict[str, Any]) -> None:
    from fastgpt.data.prepare import prepare

    inputs, as_json = arguments.pop("inputs"), arguments.pop("json")
    report = prepare(inputs, PrepareConfig(**arguments))
    print(json.dumps(report.as_dict()) if as_json else report.table())


def _train(arguments: dict[str, Any]) -> None:
    from fastgpt.start import config_from
    from fastgpt.train import train

    file = arguments.pop("config", None)
    options = train_config.read_toml(file) if file is not None else {}
    train(config_from(options | arguments))


def _generate(arguments: dict[str, Any]) -> None:
    from fastgpt.generate import generate_texts, read_prompts
    from fastgpt.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    sampling = Sampling(*(arguments.pop(name) for name in names))
    prompt, file, as_json = (arguments.pop(name) for name in ("prompt", "prompts", "json"))
    prompts = [prompt] if file is None else read_prompts(file)
    if not as_json and len(prompts) == arguments["num_samples"] == 1:
        arguments["on_text"] = lambda row, piece: print(piece, end="", flush=True)
    for number, result in enumerate(generate_texts(prompts=prompts, sampling=sampling, **arguments)):
        if as_json:
            print(json.dumps(asdict(result), ensure_ascii=False), flush=True)
        elif "on_text" in arguments:
            print()
        else:
            place = number // arguments["num_samples"] + 1
            print(f"--- prompt {place}, sample {result.sample} ---\n{result.text}", flush=True)


def _evaluate(arguments: dict[str, Any]) -> None:
    from fastgpt.evaluate import evaluate
    from fastgpt.in_context import in_context
    from fastgpt.plot import in_context_panels, loss_by_position

    as_json, picture = arguments.pop("json"), arguments.pop("plot")
    if arguments.pop("in_context"):
        found = in_context(**arguments)
        print(json.dumps(found.as_dict()) if as_json else found.table())
        if picture is not None:
            in_context_panels(picture, found)
        return
    if arguments["source"] is None:
        raise ValueError("eval needs --data, a text to measure the model on, or --in-context")
    result = evaluate(**arguments)
    print(json.dumps(result.as_dict()) if as_json else result.table())
    if picture is not None:
        loss_by_position(picture, [(b.first, b.last, b.loss) for b in result.positions], result.loss)


def _export(arguments: dict[str, Any]) -> None:
    from fastgpt.pretrained import open_model

    model, tokenizer = open_model(arguments["checkpoint"])
    model.save_pretrained(arguments["out"], tokenizer)


def _info(arguments: dict[str, Any]) -> None:
    from fastgpt import info

    info.main()


def _sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


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
        help="a text file, a .jsonl file, a directory, stdlib, or hf:NAME[:SPLIT] of Hugging Face",
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
    train.set_defaults(command=_train)

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    _checkpoint_options(generate)
    given = generate.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="what to continue (default: a line break)"
    )
    given.add_argument("--prompts", metavar="FILE", help="a text file of prompts, one a line")
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
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token"
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
        help="a text file, a directory of them, one that `fastgpt data` made, or stdlib",
    )
    evaluate.add_argument(
        "--in-context",
        action="store_true",
        help="measure induction and k-shot accuracy; with --data the loss by position",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--plot", metavar="PNG", help="draw the loss over the position in the context")
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
    info.set_defaults(command=_info)
    return parser


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="what train --out was given, or a Hugging Face GPT-2",
    )
    parser.add_argument("--device", default="auto", help="where the model runs (default: auto)")
    parser.add_argument(
        "--backend", default="auto", choices=train_config.BACKEND_CHOICES, help="which kernels run"
    )
