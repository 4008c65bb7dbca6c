"""Training and validation data of a run, as tokens and batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fastgpt import data
from fastgpt.evaluation import in_context
from fastgpt.evaluation.tasks.examples import Example, load_examples
from fastgpt.evaluation.tasks.template import Template, load_template
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, make_tokenizer, matches_option
from fastgpt.training.config import TrainConfig

_SHOWN = 3  # answered examples of a task


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out data of a run.

    name:    of the data and of how they become batches.
    size:    how many tokens there are, in words.
    entropy: the unigram entropy of the held-out text, of a task the answers', in nats a token.
    digest:  of the training data: whether a checkpoint was trained on the same.
    measure: what else is recorded of the model at each validation.
    left_out: a line for each file of a directory that was not read.
    shown:   of a task, its template and the held-out examples that are answered at the end.
    """

    name: str
    tokenizer: Tokenizer
    train: data.Source
    val: data.Source
    size: str
    entropy: float
    digest: str
    measure: Callable[[GPT], dict[str, float]] = lambda model: {}
    left_out: list[str] = field(default_factory=list)
    shown: tuple[Template, list[Example]] | None = None


def check_source(config: TrainConfig, processes: int) -> None:
    """Raise FileNotFoundError if the data do not exist, ValueError if several processes would share a stream."""
    if data.can_be_read_once(config.data) and processes > 1:
        raise ValueError(
            f"{data.name_of(config.data)} can be read by one process; write it to a file for {processes}"
        )
    if (
        config.task is None
        and config.data not in ("stdlib", "repeats", "-")
        and not Path(config.data).exists()
    ):
        raise FileNotFoundError(f"there is no file or directory {config.data}")


def open_training_data(config: TrainConfig, tokenizer: Tokenizer | None = None) -> TrainingData:
    """The data of a configuration, in a checkpoint's tokenizer if it goes on from one.

    Raises OSError for what cannot be read, ValueError for what cannot be trained on.
    """
    if config.task is not None:
        return _examples(config, load_template(config.task), tokenizer)
    if config.data == "repeats":
        return _repeats(config, tokenizer or _new_tokenizer(config, []))
    if data.is_dataset(config.data):
        return _prepared(config, tokenizer)
    corpus = data.load_corpus(config.data, config.text_key, config.skip_broken)
    if tokenizer is None:
        tokenizer = _new_tokenizer(config, corpus.train)
    packed = data.are_packed(config.packing, corpus.records, tokenizer)
    train, val = (
        data.encode_documents(texts, tokenizer, ended=packed) for texts in (corpus.train, corpus.val)
    )
    digest = hashlib.sha256(train.tokens[:].numpy().tobytes()).hexdigest()
    name = data.name_of(corpus.name)
    return replace(
        _training_data(config, name, packed, tokenizer, train, val, digest), left_out=corpus.left_out
    )


def _new_tokenizer(config: TrainConfig, texts: list[str]) -> Tokenizer:
    name = "bytes" if config.tokenizer == "auto" else config.tokenizer
    return make_tokenizer(name, texts, config.vocab_size)


def _repeats(config: TrainConfig, tokenizer: Tokenizer) -> TrainingData:
    """Random words, repeated; the induction score is recorded."""
    words = in_context.alphabet(tokenizer, tokenizer.vocab_size)
    source = data.Repeats(words, batch_size=config.batch_size, block_size=config.block_size, seed=config.seed)

    def measure(model: GPT) -> dict[str, float]:
        score = in_context.induction(model, words, source.longest, seed=config.seed).second
        return {"induction": score.value, "induction_low": score.low, "induction_high": score.high}

    return TrainingData(
        name="repeats",
        tokenizer=tokenizer,
        train=source,
        val=source,
        size=f"random words of {data.SHORTEST} to {source.longest} of {len(words)} tokens",
        entropy=math.log(len(words)),
        digest="repeats",
        measure=measure,
    )


def _prepared(config: TrainConfig, tokenizer: Tokenizer | None) -> TrainingData:
    dataset = data.open_dataset(config.data)
    own = dataset.tokenizer()
    if tokenizer is not None and tokenizer.serialized() != own.serialized():
        raise ValueError(f"{config.data} was prepared with another tokenizer than the model has")
    if tokenizer is None and config.tokenizer != own.name and not matches_option(own, config.tokenizer):
        raise ValueError(
            f"--tokenizer {config.tokenizer} is not the one that {config.data} was prepared with: "
            "omit --tokenizer, or prepare the text again"
        )
    train, val = (
        data.Documents(split, split.document_ends) for split in map(dataset.split, ("train", "val"))
    )
    digest = hashlib.sha256(json.dumps(dataset.facts["files"], sort_keys=True).encode()).hexdigest()
    return _training_data(config, config.data, config.packing != "stream", own, train, val, digest)


def _examples(config: TrainConfig, template: Template, tokenizer: Tokenizer | None) -> TrainingData:
    if config.packing == "stream":
        raise ValueError("packing='stream' would show a task's examples one another; omit --packing")
    examples = load_examples(template.task, config.data, skip_broken=config.skip_broken)
    if tokenizer is None:
        texts = [template.instruction + template.example(example) for example in examples.train]
        tokenizer = _new_tokenizer(config, texts)
    parts = []
    note = f", {examples.skipped:,} broken lines left out" if examples.skipped else ""
    for kind, some in (("for training", examples.train), ("held out", examples.held_out)):
        part = _encode_examples(some, template, tokenizer, config.block_size)
        if not len(part.ends):
            raise ValueError(
                f"none of the {len(some):,} examples of {examples.name} {kind} fits a block of {config.block_size}"
            )
        note += f", {len(part.ends):,} {kind}"
        if longer := len(some) - len(part.ends):
            note += f" ({longer:,} longer than a block left out)"
        parts.append(part)
    train, val = parts
    digest = hashlib.sha256(train.tokens[:].numpy().tobytes()).hexdigest()
    found = _training_data(config, examples.name + note, True, tokenizer, train, val, digest)
    return replace(found, shown=(template, examples.held_out[:_SHOWN]))


def _encode_examples(
    examples: list[Example], template: Template, tokenizer: Tokenizer, block_size: int
) -> data.Documents:
    """Encode the examples that fit a block, each followed by an end of text; answers and ends of text are targets."""
    if tokenizer.end_of_text is None:
        raise ValueError("a task needs a tokenizer with an end of text, such as <|endoftext|>")
    prompts = tokenizer.encode_batch([template.prompt(example.input) for example in examples])
    answers = tokenizer.encode_batch([template.answer(example.output) for example in examples])
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) + len(a) <= block_size]
    tokens, counted = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, dtype=torch.bool)]
    for prompt, answer in pairs:
        tokens += [prompt, answer, answer.new_tensor([tokenizer.end_of_text])]
        counted += [torch.zeros(len(prompt), dtype=torch.bool), torch.ones(len(answer) + 1, dtype=torch.bool)]
    ends = np.cumsum([len(prompt) + len(answer) + 1 for prompt, answer in pairs], dtype=np.int64)
    return data.Documents(torch.cat(tokens), ends, torch.cat(counted))


def _training_data(
    config: TrainConfig,
    name: str,
    packed: bool,
    tokenizer: Tokenizer,
    train: data.Documents,
    val: data.Documents,
    digest: str,
) -> TrainingData:
    sources = []
    sizes = {"batch_size": config.batch_size, "block_size": config.block_size, "seed": config.seed}
    for kind, documents in (("training", train), ("held-out", val)):
        try:
            sources.append(documents.source(packed, **sizes))
        except ValueError as error:
            raise ValueError(f"the {kind} text of {name} cannot be used: {error}") from None
    return TrainingData(
        name=f"{name}, {'packed documents' if packed else 'one stream'}",
        tokenizer=tokenizer,
        train=sources[0],
        val=sources[1],
        size=f"{len(train.tokens):,} tokens for training, {len(val.tokens):,} held out",
        entropy=val.entropy,
        digest=digest,
    )
