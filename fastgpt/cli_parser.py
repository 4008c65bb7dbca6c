"""Options of the command line `fastgpt`, and its messages about mistakes in them."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

import fastgpt
from fastgpt.data.packing import PACKINGS
from fastgpt.data.prepare import PrepareConfig
from fastgpt.evaluation.tasks.template import TASKS
from fastgpt.integrations.benchmark import BenchConfig
from fastgpt.options import TEXT_KEY, add_options
from fastgpt.training.config import BACKEND_CHOICES, FINETUNE, GROUPS, TrainConfig

_ABSENT = argparse.SUPPRESS  # leaves an option that is not given out of the namespace

_TRAIN_EXAMPLES = """examples:
  fastgpt train --data my.txt --out out/mine
  fastgpt train --config examples/demo.toml --max-minutes 5
  fastgpt train --resume --out out/mine --max-steps 4000
"""


class _Parser(argparse.ArgumentParser):
    """Parser that answers a mistake with one line, and an unknown option with the nearest known one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastgpt: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        parser: _Parser = found.__dict__.pop("parser", self)
        if unknown:
            parser.error(f"there is no option {unknown[0]}{parser._hint(unknown[0])}")
        return found

    def _hint(self, given: str) -> str:
        if not given.startswith("-"):
            return (
                ": options have names, such as --checkpoint DIR"
                if self.prog.endswith(("generate", "eval"))
                else ""
            )
        near = difflib.get_close_matches(given.partition("=")[0], self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; the namespace has the name of the command, None without one, and its options."""
    parser = _Parser(prog="fastgpt", description="Train small GPTs fast.")
    parser.add_argument("--version", action="version", version=f"fastgpt {fastgpt.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    data = commands.add_parser(
        "data",
        usage="%(prog)s INPUT [INPUT ...] [options]",
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
    data.set_defaults(parser=data)

    train = commands.add_parser(
        "train",
        usage="%(prog)s [options]",
        help="training of a model on a text",
        description="Train a model on a text. Every option can also be a key of the TOML file.",
        epilog=_TRAIN_EXAMPLES,
    )
    train.add_argument(
        "--config", metavar="FILE", default=None, help="TOML file of options; the command line overrides it"
    )
    add_options(train, TrainConfig, GROUPS)
    train.set_defaults(parser=train)

    finetune = commands.add_parser(
        "finetune",
        usage="%(prog)s [options]",
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
    add_options(finetune, TrainConfig, GROUPS, {"data": "required", "task": "required"} | FINETUNE)
    finetune.set_defaults(parser=finetune)

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
        help="divisor of the logits; 0 selects the most likely token (default: 0.8; with --task, 0)",
    )
    generate.add_argument(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="number of the most likely tokens to sample from; 0: all (default: 50)",
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
    generate.set_defaults(parser=generate)

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
    evaluate.set_defaults(parser=evaluate)

    bench = commands.add_parser(
        "bench",
        help="speed of a model, unmodified, compiled and accelerated, on this machine",
        description="Time training steps of a model of transformers, unmodified, compiled and accelerated.",
    )
    bench.add_argument(
        "model",
        nargs="?",
        default="gpt2",
        metavar="MODEL",
        help="gpt2 (default), bert, llama, or a directory with the config.json of a language model",
    )
    bench.add_argument("--json", action="store_true", help="results as one JSON object")
    add_options(bench, BenchConfig)
    bench.set_defaults(parser=bench)

    export = commands.add_parser(
        "export",
        help="export of a model for transformers",
        description="Write a model and its tokenizer as a Hugging Face GPT-2, Llama or Mistral.",
    )
    export.add_argument("--checkpoint", required=True, metavar="DIR", help="directory of a run (train --out)")
    export.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    export.set_defaults(parser=export)

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
    info.set_defaults(parser=info)
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
        help="directory of a run (train --out), or a Hugging Face GPT-2, Llama or Mistral: a directory or "
        "NAME[@REVISION] on the Hub",
    )
    parser.add_argument("--device", default="auto", help="device of the model (default: auto)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of a CPU (default: as PyTorch chooses)"
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=BACKEND_CHOICES,
        help="backend of the kernels (default: auto)",
    )
