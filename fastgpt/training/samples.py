"""Output of a trained model, as a run prints it at its end."""

from __future__ import annotations

from fastgpt.evaluation.tasks.evaluate import answer_examples
from fastgpt.model import GPT
from fastgpt.training.config import TrainConfig
from fastgpt.training.datasets import TrainingData

_TEMPERATURE = 0.8
_TOP_K = 50


def sample(model: GPT, data: TrainingData, config: TrainConfig) -> str:
    """Generate text that follows a line break; of a task, answers to held-out inputs, beside the expected ones.

    Args:
        model: on the device to generate on.
        data: that the model was trained on.
        config: `sample_tokens` is the length of the text, and at most of each answer.
    """
    if data.shown is not None:
        template, examples = data.shown
        answered = answer_examples(model, data.tokenizer, template, examples, config.sample_tokens)
        return "\n".join(["", *(f"{one}\n" for one in answered)])
    device = next(model.parameters()).device
    prompt = data.tokenizer.encode("\n")[None].to(device)
    tokens = model.generate(
        prompt,
        config.sample_tokens,
        temperature=_TEMPERATURE,
        top_k=_TOP_K,
        seed=config.seed,
        num_tokens=data.tokenizer.vocab_size,
    )
    return data.tokenizer.decode(tokens[0])
