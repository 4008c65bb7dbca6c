"""How the examples of a task become text. A template is a TOML file of `templates/`, named for its task:

instruction  stands at the beginning, once
example      one example: {input}, then {output} at its end
separator    stands behind each example that is shown; an answer ends where the model writes it, or the end of text
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

    before:  what stands before an input.
    between: what stands between an input and its output, without the spaces at its end.
    lead:    those spaces. They belong to the answer: tokenizers make " Paris" one token.
    """

    task: str
    instruction: str
    before: str
    between: str
    lead: str
    separator: str
    metrics: tuple[str, ...]

    def example(self, example: Example) -> str:
        """A whole example."""
        return f"{self._question(example.input)}{self.answer(example.output)}"

    def prompt(self, text: str, shots: Sequence[Example] = ()) -> str:
        """The text that an answer to the input `text` comes behind, with examples shown before it.

        Raises ValueError for an input that is empty.
        """
        if not text.strip():
            raise ValueError(f"the input of {self.task} is empty; give it at least one character")
        shown = "".join(f"{self.example(shot)}{self.separator}" for shot in shots)
        return f"{self.instruction}{shown}{self._question(text)}"

    def answer(self, output: str) -> str:
        """An output as it stands behind its prompt."""
        return f"{self.lead}{output}"

    def output(self, continuation: str) -> str:
        """The output in what a model wrote behind a prompt: the inverse of `answer`."""
        return continuation.partition(self.separator)[0].removeprefix(self.lead)

    def _question(self, text: str) -> str:
        return f"{self.before}{text}{self.between}"


def load_template(task: str) -> Template:
    """The template of a task. Raises ValueError for a task that there is not, or a template that is none."""
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    file = _FOLDER / f"{task}.toml"
    return parse_template(task, file.read_text("utf-8"))


def parse_template(task: str, toml: str) -> Template:
    """A template from the text of its file. Raises ValueError if it is none."""
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
            f"the example of the template {task} must hold {{input}} and end in {{output}}, not {shown(example)}"
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
