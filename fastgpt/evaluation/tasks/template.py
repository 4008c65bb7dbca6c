"""Templates that turn the examples of a task into text: TOML files of `templates/`, named like their tasks.

instruction  text at the beginning of a prompt
example      one example: {input}, then {output} at its end
separator    text after each example in a prompt; an answer ends before it, or at the end of text
metrics      names of `metrics.METRICS`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.evaluation.tasks.examples import Example
from fastgpt.json_io import loads_toml, shown

_FOLDER = Path(__file__).parent / "templates"
TASKS = tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@dataclass(frozen=True)
class Template:
    """The parts of a template.

    Attributes:
        task: name of the task.
        instruction: text at the beginning of a prompt.
        before: text before an input.
        between: text between an input and its output, without trailing spaces.
        lead: those spaces. They belong to the answer, because tokenizers make " Paris" one token.
        separator: text after each example.
        metrics: names of the metrics.
    """

    task: str
    instruction: str
    before: str
    between: str
    lead: str
    separator: str
    metrics: tuple[str, ...]

    def example(self, example: Example) -> str:
        """Format a complete example."""
        return f"{self._question(example.input)}{self.answer(example.output)}"

    def prompt(self, text: str, shots: Sequence[Example] = ()) -> str:
        """Format the prompt for an input, with examples before it.

        Raises ValueError if the input is empty.
        """
        if not text.strip():
            raise ValueError(f"the input of {self.task} is empty; give it at least one character")
        examples = "".join(f"{self.example(shot)}{self.separator}" for shot in shots)
        return f"{self.instruction}{examples}{self._question(text)}"

    def answer(self, output: str) -> str:
        """Format an output as it follows its prompt."""
        return f"{self.lead}{output}"

    def output(self, continuation: str) -> str:
        """Extract the output from a continuation of a prompt: the inverse of `answer`."""
        return continuation.partition(self.separator)[0].removeprefix(self.lead)

    def _question(self, text: str) -> str:
        return f"{self.before}{text}{self.between}"


def load_template(task: str) -> Template:
    """Load the template of a task. Raises ValueError if the task does not exist, or its template is invalid."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    file = _FOLDER / f"{task}.toml"
    return parse_template(task, file.read_text("utf-8"))


def parse_template(task: str, toml: str) -> Template:
    """Parse the text of a template's file. Raises ValueError if it is invalid."""
    parts = loads_toml(toml)
    metrics = parts.get("metrics")
    texts = [parts.get(name) for name in ("instruction", "example", "separator")]
    texts += metrics if isinstance(metrics, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"the template {task} needs the texts instruction, example and separator, and a list of metrics"
        )
    example, separator = parts["example"], parts["separator"]
    before, found, rest = example.partition("{input}")
    if not found or not rest.endswith("{output}"):
        raise ValueError(
            f"the example of the template {task} must contain {{input}} and end in {{output}}, not {shown(example)}"
        )
    if not separator:
        raise ValueError(f"the separator of the template {task} must not be empty")
    between = rest.removesuffix("{output}")
    return Template(
        task=task,
        instruction=parts["instruction"],
        before=before,
        between=between.rstrip(" "),
        lead=between[len(between.rstrip(" ")) :],
        separator=separator,
        metrics=tuple(parts["metrics"]),
    )
