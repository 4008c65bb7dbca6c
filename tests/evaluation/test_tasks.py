"""Tasks: templates, examples, the embedded sets, metrics."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.evaluation.tasks.embedded import embedded
from fastgpt.evaluation.tasks.examples import HELD_OUT, Example, load_examples, read_examples
from fastgpt.evaluation.tasks.metrics import METRICS, Answered, is_python, normalized, score, token_f1
from fastgpt.evaluation.tasks.template import TASKS, load_template, parse_template

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(
    str.strip
)


def write(path: Path, *lines: object) -> Path:
    """Write a JSON Lines file; a string is a line."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


def value(metric: str, expected: str, got: str, given: str = "?", task: str = "answer") -> float:
    return score(METRICS[metric], load_template(task), [Answered(given, expected, got)])[0].value


# ---- templates ----


def test_there_are_the_four_applications():
    assert TASKS == ("answer", "code", "summarize", "translate")
    assert all(metric in METRICS for task in TASKS for metric in load_template(task).metrics)


@given(st.sampled_from(TASKS), TEXT, TEXT, st.lists(st.builds(Example, TEXT, TEXT), max_size=3))
def test_prompt_and_answer_are_the_training_text_and_split_again(
    task: str, text: str, output: str, shots: list[Example]
):
    template = load_template(task)
    prompt, answer = template.prompt(text, shots), template.answer(output)
    examples = map(template.example, [*shots, Example(text, output)])
    assert prompt + answer == template.instruction + template.separator.join(examples)
    if template.separator not in output:
        assert template.output(answer) == output
        assert template.output(f"{answer}{template.separator}{prompt}") == output


def test_a_prompt_with_two_shots_is_this_text():
    template = parse_template(
        "t",
        'instruction = "Add.\\n"\nexample = "Q: {input}\\nA: {output}"\nseparator = "\\n--\\n"\nmetrics = []',
    )
    shots = [Example("1+1", "2"), Example("{input}", "{output}")]
    assert template.prompt("2+3", shots) == "Add.\nQ: 1+1\nA: 2\n--\nQ: {input}\nA: {output}\n--\nQ: 2+3\nA:"
    assert template.answer("5") == " 5"
    assert template.output(" 5\n--\nQ: 7") == "5"


def test_a_template_that_is_none_is_refused():
    good = {"instruction": "", "example": "{input}: {output}", "separator": "\n", "metrics": []}

    def toml(**others: object) -> str:
        return "\n".join(f"{name} = {json.dumps(value)}" for name, value in (good | others).items())

    assert parse_template("t", toml()).prompt("x") == "x:"
    for example in ("{output}", "{input}", "{output} {input}", "{input} {output}."):
        with pytest.raises(ValueError, match=r"must contain \{input\} and end in \{output\}"):
            parse_template("t", toml(example=example))
    with pytest.raises(ValueError, match="separator of the template t must not be empty"):
        parse_template("t", toml(separator=""))
    with pytest.raises(ValueError, match="unknown task 'sing'; the tasks are answer, code"):
        load_template("sing")
    with pytest.raises(ValueError, match="input of code is empty"):
        load_template("code").prompt(" \n")


# ---- examples ----


@given(examples=st.lists(st.builds(Example, TEXT, TEXT), min_size=1, max_size=5))
def test_json_lines_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, examples: list[Example]
):
    path = tmp_path_factory.mktemp("examples") / "e.jsonl"
    write(path, "\ufeff" + json.dumps(vars(examples[0]) | {"id": 7}), "", *map(vars, examples[1:]))
    assert read_examples(path) == (examples, 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "a", "output"', r"not JSON \("),
        ('{"input": "a"}', "it lacks 'output'"),
        ('{"output": "a"}', "it lacks 'input'"),
        ('["a", "b"]', "not a JSON object"),
        ('{"input": "a", "output": 3}', "'output' is not a string"),
        ('{"input": null, "output": "b"}', "'input' is not a string"),
        ('{"input": " \\n", "output": "b"}', "'input' is empty"),
        ('{"input": "a", "output": ""}', "'output' is empty"),
        ('{"input": "a\\u0000", "output": "b"}', "'input' contains a NUL"),
        ('{"input": "a", "output": "\\ud800"}', r"'output' contains '\\ud800', which is not a character"),
        ("[" * 100_000, r"not JSON \("),
    ],
)
def test_a_line_that_is_no_example_is_named_and_left_out_on_request(tmp_path: Path, line: str, said: str):
    good = {"input": "a", "output": "b"}
    path = write(tmp_path / "e.jsonl", good, "", line, good)
    with pytest.raises(ValueError, match=rf"e\.jsonl, line 3: {said}.*; give --skip-broken"):
        read_examples(path)
    assert read_examples(path, skip_broken=True) == ([Example("a", "b")] * 2, 1)


def test_a_file_without_examples_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"file .*absent does not exist; give a JSON Lines file"):
        read_examples(tmp_path / "absent")
    with pytest.raises(OSError, match="directory"):
        read_examples(tmp_path)
    for lines in ([], ["", " "]):
        with pytest.raises(ValueError, match="contains no examples; give lines of"):
            read_examples(write(tmp_path / "e.jsonl", *lines))
    with pytest.raises(ValueError, match="contains no examples"):
        read_examples(write(tmp_path / "e.jsonl", "{"), skip_broken=True)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary, line 1: not JSON"):
        read_examples(tmp_path / "binary")
    with pytest.raises(ValueError, match="a single input"):
        load_examples("answer", str(write(tmp_path / "e.jsonl", *[{"input": "a", "output": "b"}] * 3)))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=30, unique_by=lambda pair: pair[0]))
def test_an_input_is_on_one_side_and_stays_there(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
):
    folder = tmp_path_factory.mktemp("examples")
    records = [{"input": a, "output": b} for a, b in pairs]
    split = load_examples("answer", str(write(folder / "e.jsonl", *records)))
    inputs = [{example.input for example in side} for side in (split.train, split.held_out)]
    assert inputs[0] and inputs[1] and not inputs[0] & inputs[1]
    assert inputs[0] | inputs[1] == {a for a, _ in pairs}
    more = [*reversed(records), *({"input": f"more {i}", "output": "x"} for i in range(200))]
    grown = load_examples("answer", str(write(folder / "grown.jsonl", *more)))
    moved = inputs[1] - {example.input for example in grown.held_out}
    assert len(moved) <= 1  # the item with the smallest hash, which is held out if no other is
    assert not inputs[0] & {example.input for example in grown.held_out}


# ---- the embedded sets ----


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=pytest.mark.slow if t in ("answer", "summarize") else ()) for t in TASKS],
)
def test_embedded_examples_are_many_and_none_is_on_both_sides(task: str):
    split = load_examples(task, "embedded")
    assert load_examples(task, "embedded") == split
    assert len(split.train) > 1000
    assert abs(len(split.held_out) / (len(split.train) + len(split.held_out)) - HELD_OUT) < 0.03
    assert not {e.input for e in split.train} & {e.input for e in split.held_out}
    sides = {item.input: item.key for item in embedded(task)}
    assert not {sides[e.input] for e in split.train} & {sides[e.input] for e in split.held_out}


def test_embedded_numbers_are_the_same_in_every_notation():
    units = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}

    def roman(text: str) -> int:
        values = [units[letter] for letter in text]
        return sum(-v if v < following else v for v, following in zip(values, [*values[1:], 0], strict=True))

    words: dict[str, str] = {}
    for item in embedded("translate"):
        source, _, target = item.input.rpartition(" in ")
        for text, notation in ((item.output, target), (source, None)):
            if notation == "Roman numerals":
                assert roman(text) == int(item.key)
            elif notation == "words":
                assert words.setdefault(text, item.key) == item.key
            elif notation is not None:
                assert int(text) == int(item.key)  # digits of any script
    by_number = {number: text for text, number in words.items()}
    assert len(by_number) == len(words) > 1000
    for text, number in words.items():
        if number == "1994":
            assert text == "one thousand nine hundred ninety four"
    assert [w for w in words if "eleven" in w and int(words[w]) % 100 != 11] == []


def test_embedded_answers_are_those_of_the_signature():
    for item in embedded("answer"):
        signature, question = item.input.split("\n")
        (node,) = ast.parse(f"{signature}: pass").body
        assert isinstance(node, ast.FunctionDef)
        word = question.rstrip("?").split()[-1]
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        if question.startswith("Which"):
            assert item.output == names[names.index(word) + 1]
        elif question == "What are its parameters?":
            assert item.output == ", ".join(names)
        elif question == "What is the function's name?":
            assert item.output == node.name
        else:
            taken = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            assert item.output == ("yes" if word in taken else "no")


def test_embedded_code_is_a_program_only_as_a_whole():
    items = embedded("code")
    assert all(is_python(item.input + item.output) for item in items)
    assert not any(is_python(item.input) for item in items)


def test_embedded_summaries_are_docstrings_that_the_source_lacks():
    for item in embedded("summarize"):
        (node,) = ast.parse(item.input).body
        assert ast.get_docstring(node) is None and f'""{item.output}' not in item.input


# ---- metrics ----


def test_answers_are_compared_as_in_squad():
    assert normalized("The  Cat, an A-team!") == "cat ateam"
    assert value("exact_match", "the Eiffel Tower", "Eiffel tower.") == 100
    assert value("exact_match", "yes", "no") == 0
    # 2 of 3 words are right, and 2 of 4 were found: 2 · (2/3) · (2/4) / (2/3 + 2/4)
    assert token_f1("big red house door", "Red house roof") == pytest.approx(4 / 7)
    assert token_f1("b b c", "b") == pytest.approx(0.5)
    assert (token_f1("the", "a"), token_f1("the", "x"), token_f1("x", "")) == (1, 0, 0)
    assert value("f1", "big red house door", "Red house roof") == pytest.approx(400 / 7)


def test_rouge_is_the_f1_of_words_pairs_and_subsequence():
    expected, got = "return the name of the file", "return a file name"
    # Shared words: return, name, file; of 6 and 4. No pair is shared. Longest common subsequence: return name.
    assert value("rouge1", expected, got) == pytest.approx(100 * 2 * 3 / 10)
    assert value("rouge2", expected, got) == 0
    assert value("rougeL", expected, got) == pytest.approx(100 * 2 * 2 / 10)
    assert value("rouge2", "a b c d", "b c d") == pytest.approx(100 * 2 * 2 / 5)


def test_bleu_is_that_of_the_corpus():
    from sacrebleu.metrics import BLEU

    assert value("bleu", "the cat sat on a mat", "the cat sat on a mat") == pytest.approx(100)
    # Precisions 4/5, 3/4, 2/3, 1/2, and 5 words where 6 were expected.
    by_hand = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert value("bleu", "one two three four five six", "one two three four x") == pytest.approx(by_hand)
    pairs = [("one two three four five", "one two three five"), ("a b", "a b c d e"), ("nine", "")]
    pairs.append(("forty two, and more of it", "forty two and more, of it"))
    answered = [Answered("?", expected, got) for expected, got in pairs]
    whole = BLEU().corpus_score([got for _, got in pairs], [[expected for expected, _ in pairs]]).score
    (found,) = score(METRICS["bleu"], load_template("translate"), answered)
    assert found.value == pytest.approx(whole) and 0 < whole < 100
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("head", "body", "parses"),
    [
        ("def f(x):\n", "    return x\n", 100),
        ("def f(x):\n", "return x\n", 0),
        ("x = 1\n", "", 0),
        ("x = 1\n", " \n", 0),
        ("x = ", "\0", 0),
        ("x = ", "(" * 1000, 0),
        ("x = ", "-" * 200_000 + "1", 0),
        ("x = ", r"'\d'", 100),
    ],
)
def test_code_parses_with_its_beginning_and_is_not_empty(
    head: str, body: str, parses: float, recwarn: pytest.WarningsRecorder
):
    assert value("parses", "?", body, head, "code") == parses
    assert not recwarn.list


@given(st.sampled_from(["exact_match", "f1", "identical"]), TEXT, st.text())
def test_a_score_is_highest_for_the_expected_text(metric: str, expected: str, got: str):
    assert value(metric, expected, expected) == 100
    assert 0 <= value(metric, expected, got) <= 100


def test_intervals_are_those_of_a_share():
    """Of 400 answers 100 are right: the standard error of the fraction 0.25 is 2.2 percent."""
    answered = [Answered("?", "yes", "yes" if i % 4 == 0 else "no") for i in range(400)]
    template = load_template("answer")
    (found,) = score(METRICS["exact_match"], template, answered)
    error = 100 * math.sqrt(0.25 * 0.75 / 400)
    assert found.value == 25
    assert found.low == pytest.approx(25 - 1.96 * error, abs=0.6)
    assert found.high == pytest.approx(25 + 1.96 * error, abs=0.6)
    with pytest.raises(ValueError, match="no answers to score"):
        score(METRICS["f1"], template, [])


def test_a_margin_is_of_the_same_resamples():
    template = load_template("answer")
    good = [Answered("?", "yes", "yes" if i % 2 else "no") for i in range(100)]
    worse = [Answered("?", "yes", "yes" if i % 4 == 1 else "no") for i in range(100)]
    first, second, margin = score(METRICS["exact_match"], template, good, worse)
    assert margin.value == first.value - second.value == 25
    assert margin.high - margin.low < np.hypot(first.high - first.low, second.high - second.low)
    same = score(METRICS["exact_match"], template, good, good)[2]
    assert (same.value, same.low, same.high) == (0, 0, 0)
