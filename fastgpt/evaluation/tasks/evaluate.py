"""Evaluation of a task (`fastgpt eval --task`), and answers to inputs (`fastgpt generate --task`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoints.load import open_model
from fastgpt.data import name_of
from fastgpt.device import resolve_device
from fastgpt.evaluation.bootstrap import Estimate
from fastgpt.evaluation.tasks.examples import EMBEDDED, Example, load_examples, read_examples
from fastgpt.evaluation.tasks.metrics import METRICS, Answered, score
from fastgpt.evaluation.tasks.template import Template, load_template
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.text import Generated, continue_texts, generate_texts
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

_SHOWN = 5  # examples in the table
_BATCH = 64


@dataclass(frozen=True)
class TaskEvaluation:
    """Results of a model on a task, in percent.

    Attributes:
        task: name of the task.
        source: origin of the examples.
        examples: number of answered examples.
        num_shots: number of examples in each prompt.
        cut: number of examples that exceed the context; the model did not see their beginning.
        scores: estimates by metric.
        untrained: estimates of a model with new weights; None without a baseline.
        margin: `scores` minus `untrained`; None without a baseline.
        answered: all examples with their answers.
    """

    task: str
    source: str
    examples: int
    num_shots: int
    cut: int
    scores: dict[str, Estimate]
    untrained: dict[str, Estimate] | None
    margin: dict[str, Estimate] | None
    answered: list[Answered]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Format the scores and some of the answers."""
        shots = f", {self.num_shots} shots each" if self.num_shots else ""
        lines = [f"{self.task}: {self.examples:,} examples, {self.source}{shots}"]
        if self.cut:
            lines.append(f"{self.cut:,} exceed the context; the model did not see their beginning")
        columns = {"model": self.scores}
        if self.untrained is not None and self.margin is not None:
            columns |= {"untrained": self.untrained, "margin": self.margin}
        lines += ["", "metric, % (95% interval)" + "".join(f"{name:>22}" for name in columns)]
        for metric in self.scores:
            cells = (scores[metric] for scores in columns.values())
            lines.append(f"{metric:<24}" + "".join(f"{_cell(cell):>22}" for cell in cells))
        for one in self.answered[:_SHOWN]:
            lines += ["", str(one)]
        return "\n".join(lines)


def evaluate_task(
    checkpoint: str | Path,
    task: str,
    source: str,
    *,
    held_out: bool = False,
    shots: str | None = None,
    num_shots: int = 0,
    limit: int | None = None,
    baseline: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = _BATCH,
    skip_broken: bool = False,
    device: str = "auto",
    backend: str = "auto",
) -> TaskEvaluation:
    """Answer examples of a task with the most likely tokens, and compute the task's metrics.

    Args:
        checkpoint: as in `open_model`.
        task: name of the task.
        source: a file of records, evaluated completely unless `held_out` is set, or "embedded", whose held-out part is
            evaluated.
        held_out: evaluate only the part of a file that training on it holds out.
        shots: a file of examples for the prompts; None takes examples that are not evaluated, of a file that is
            evaluated completely its first ones.
        num_shots: number of examples in each prompt.
        limit: maximum number of examples.
        baseline: also evaluate a model of the same configuration with new weights.
        max_new_tokens: maximum length of an answer; None uses that of the longest expected one.
        batch_size: examples per batch.
        skip_broken: skip records that are not examples.
        device: the device.
        backend: the backend of the kernels.

    Raises:
        ValueError: the checkpoint, the task, an option or an example is invalid.
        OSError: a file cannot be read.
        ImportError: a metric needs a package.
    """
    for name, value, least in (("num_shots", num_shots, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    template = load_template(task)
    model, tokenizer = open_model(checkpoint)
    if source == EMBEDDED or held_out:
        examples = load_examples(task, source, skip_broken=skip_broken)
        name, spare, evaluated = f"held out of {examples.name}", examples.train, examples.held_out
    else:
        all_examples, _ = read_examples(source, skip_broken=skip_broken)
        own = 0 if shots else num_shots
        name, spare, evaluated = name_of(source), all_examples[:own], all_examples[own:]
    shown = _first(read_examples(shots)[0] if shots else spare, num_shots)
    evaluated = evaluated[:limit]
    if not evaluated:
        raise ValueError(f"no example of {name} is left to evaluate; use fewer shots or more examples")
    prompts = [template.prompt(example.input, shown) for example in evaluated]
    sizes = [len(tokenizer.encode(template.answer(example.output))) for example in evaluated]
    longest = max(sizes) + 1 if max_new_tokens is None else max_new_tokens
    block = model.config.block_size
    cut = sum(
        len(tokenizer.encode(prompt)) + size > block for prompt, size in zip(prompts, sizes, strict=True)
    )
    models = [model]
    if baseline:
        torch.manual_seed(0)
        models.append(GPT(model.config))
    resolved_device = resolve_device(device)
    answers = []
    for one in models:
        got = _answers(one.to(resolved_device), tokenizer, template, prompts, longest, batch_size, backend)
        pairs = zip(evaluated, got, strict=True)
        answers.append([Answered(example.input, example.output, text) for example, text in pairs])
    scores = {metric: score(METRICS[metric], template, *answers) for metric in template.metrics}
    columns = [{metric: found[i] for metric, found in scores.items()} for i in range(3 if baseline else 1)]
    return TaskEvaluation(
        task=task,
        source=name,
        examples=len(evaluated),
        num_shots=num_shots,
        cut=cut,
        scores=columns[0],
        untrained=columns[1] if baseline else None,
        margin=columns[2] if baseline else None,
        answered=answers[0],
    )


def answer_inputs(
    checkpoint: str | Path,
    task: str,
    inputs: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    shots: str = EMBEDDED,
    num_shots: int = 0,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[Generated]:
    """Answer inputs: `generate_texts` with prompts from the task's template.

    Args:
        checkpoint: as in `generate_texts`.
        task: name of the task.
        inputs: the inputs.
        max_new_tokens: maximum length of an answer.
        sampling: options of sampling.
        shots: a file of examples for the prompts, or "embedded".
        num_shots: number of examples in each prompt, the first of `shots`.
        stop: further stop strings.
        **options: options of `generate_texts`.

    Yields:
        The answers, each with its input as the prompt.

    Raises:
        ValueError: as in `generate_texts` and `load_examples`.
        OSError: a file cannot be read.
    """
    template = load_template(task)
    if num_shots < 0:
        raise ValueError(f"num_shots must not be negative, not {num_shots}")
    shown: list[Example] = []
    if num_shots:
        spare = load_examples(task, shots).train if shots == EMBEDDED else read_examples(shots)[0]
        shown = _first(spare, num_shots)
    prompts = [template.prompt(text, shown) for text in inputs]
    ends = (*stop, template.separator)
    texts = generate_texts(checkpoint, prompts, max_new_tokens, sampling, stop=ends, **options)
    for number, text in enumerate(texts):
        own = inputs[number // options.get("num_samples", 1)]
        yield replace(text, prompt=own, continuation=template.output(text.continuation))


def answer_examples(
    model: GPT, tokenizer: Tokenizer, template: Template, examples: Sequence[Example], max_new_tokens: int
) -> list[Answered]:
    """Answer inputs with the most likely tokens, for a comparison with the expected outputs."""
    prompts = [template.prompt(example.input) for example in examples]
    got = _answers(model, tokenizer, template, prompts, max_new_tokens, _BATCH, "auto")
    return [
        Answered(example.input, example.output, text) for example, text in zip(examples, got, strict=True)
    ]


def _answers(
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int,
    backend: str,
) -> list[str]:
    """Return the most likely answer to each prompt; batches consist of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = continue_texts(
        *(model, tokenizer, [prompts[number] for number in order], max_new_tokens, Sampling(temperature=0.0)),
        batch_size=batch_size,
        backend=backend,
        stop=(template.separator,),
    )
    found = {number: template.output(text.continuation) for number, text in zip(order, texts, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _first(examples: Sequence[Example], count: int) -> list[Example]:
    if len(examples) < count:
        raise ValueError(
            f"{count} shots need as many examples, and there are {len(examples)}; use fewer shots"
        )
    return list(examples[:count])


def _cell(score: Estimate) -> str:
    return f"{score.value:.1f} ({score.low:.1f} to {score.high:.1f})"
