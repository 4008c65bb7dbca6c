"""Metrics of answers, in percent, with 95% bootstrap confidence intervals.

rouge1, rouge2, rougeL  F1 of shared words, word pairs, longest common subsequence (Lin 2004), by `rouge_score`; its
                        words are ASCII letters and digits, so that it ignores other scripts
bleu                    corpus BLEU (Papineni et al. 2002), by `sacrebleu` with its defaults
exact_match, f1         of SQuAD (Rajpurkar et al. 2016): without case, punctuation, articles; F1 of shared words
identical               equality except for leading and trailing white space
parses                  for code: the example with the answer is a valid Python program, and the answer is not empty
"""

from __future__ import annotations

import ast
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgpt.evaluation.bootstrap import Estimate, Floats, estimates, resampled_sums
from fastgpt.evaluation.tasks.examples import Example
from fastgpt.evaluation.tasks.template import Template

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answered:
    """An example and the answer of a model.

    Attributes:
        input: the input.
        expected: the expected output.
        got: the model's output.
    """

    input: str
    expected: str
    got: str

    def __str__(self) -> str:
        rows = (("input", self.input), ("expected", self.expected), ("got", self.got))
        return "\n".join(f"{name:<10}{_indented(text)}" for name, text in rows)


def _indented(text: str) -> str:
    return text.strip("\n").replace("\n", "\n" + " " * 10)


@dataclass(frozen=True)
class Metric:
    """A score that is a function of statistics summed over all answers.

    Attributes:
        statistics: computes the statistics of each answer, (answers, k).
        combine: computes the score of their sum (k,) over n answers.
    """

    statistics: Callable[[Template, Sequence[Answered]], Floats]
    combine: Callable[[Floats, int], float]


def score(metric: Metric, template: Template, *answered: Sequence[Answered]) -> list[Estimate]:
    """Score each list of answers to the same examples; for two lists, also the first minus the second.

    The interval is the middle 95% of 1,000 reproducible resamples of the examples (Efron 1979); a difference is taken
    within each resample. Raises ValueError if there are no answers.
    """
    n = len(answered[0])
    if not n:
        raise ValueError("there are no answers to score")
    statistics = [metric.statistics(template, answers) for answers in answered]
    parts = np.split(resampled_sums(np.hstack(statistics)), len(answered), axis=1)
    scores = np.array([[metric.combine(total, n) for total in part] for part in parts]).T
    if len(answered) == 2:
        scores = np.column_stack((scores, scores[:, 0] - scores[:, 1]))
    return estimates(scores)


def normalized(text: str) -> str:
    """Normalize a text like SQuAD: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def token_f1(expected: str, got: str) -> float:
    """Compute the F1 score of the words of `got`, in [0, 1]; 1 if both texts have no words."""
    expected_words, words = (normalized(text).split() for text in (expected, got))
    if not expected_words or not words:
        return float(expected_words == words)
    shared = (Counter(expected_words) & Counter(words)).total()
    return 2 * shared / (len(expected_words) + len(words))


def is_python(source: str) -> bool:
    """Return True if a text is a syntactically valid Python program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # deep nesting raises the last two
        return False
    return True


def _mean(share: Callable[[Template, Answered], float]) -> Metric:
    """Make a metric from a number in [0, 1] per answer: 100 times its mean."""

    def statistics(template: Template, answered: Sequence[Answered]) -> Floats:
        return np.array([[100.0 * share(template, one)] for one in answered])

    return Metric(statistics, lambda total, n: float(total[0]) / n)


def _parses(template: Template, one: Answered) -> float:
    program = template.example(Example(one.input, one.got))
    return bool(one.got.strip()) and is_python(program)


def _rouge(name: str) -> Metric:
    def statistics(template: Template, answered: Sequence[Answered]) -> Floats:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise ImportError("ROUGE needs the package rouge-score: pip install rouge-score") from None
        scorer = RougeScorer([name])
        return np.array([[100.0 * scorer.score(one.expected, one.got)[name].fmeasure] for one in answered])

    return Metric(statistics, lambda total, n: float(total[0]) / n)


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ImportError("BLEU needs the package sacrebleu: pip install sacrebleu") from None
    return BLEU


def _bleu_statistics(template: Template, answered: Sequence[Answered]) -> Floats:
    """Count matches and n-grams for n from 1 to 4, and the lengths of answer and reference: (answers, 10)."""
    bleu = _sacrebleu()(effective_order=True)  # affects sentence scores only, which are not used
    scores = [bleu.sentence_score(one.got, [one.expected]) for one in answered]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], np.float64)


def _bleu(total: Floats, n: int) -> float:
    sums = [int(number) for number in total]
    return float(_sacrebleu().compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method="exp").score)


METRICS = {
    **{name: _rouge(name) for name in ("rouge1", "rouge2", "rougeL")},
    "bleu": Metric(_bleu_statistics, _bleu),
    "exact_match": _mean(lambda _, one: normalized(one.expected) == normalized(one.got)),
    "f1": _mean(lambda _, one: token_f1(one.expected, one.got)),
    "identical": _mean(lambda _, one: one.expected.strip() == one.got.strip()),
    "parses": _mean(_parses),
}
