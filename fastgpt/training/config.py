"""What a training run is told: one typed dataclass, read from the command line, a TOML file or a checkpoint.

The field `n_layer` is the option `--n-layer` and the TOML key `n_layer`; a later source overrides an earlier
one: defaults, the checkpoint being resumed, the TOML file, the command line.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fastgpt.backends import BACKENDS
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.data.files import STANDARD_INPUT, open_text
from fastgpt.data.packing import PACKINGS
from fastgpt.evaluation.tasks.template import TASKS
from fastgpt.json_io import loads_toml, shown
from fastgpt.model import ACTIVATIONS, POSITIONS, GPTConfig
from fastgpt.options import TEXT_KEY, kind_of, option

BACKEND_CHOICES = ("auto", *BACKENDS)
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "adam", "muon")
SCHEDULES = ("cosine", "linear", "wsd")
PARALLEL = ("auto", "ddp", "fsdp")

# The fields that say which model it is: resuming cannot change them, and `init_from` brings its own.
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "position", "activation", "bias", "tie_head")
MODEL_FIELDS = ("tokenizer", "vocab_size", "block_size", *ARCHITECTURE)

_LONGEST_TOML = 1 << 20  # characters
_AT_LEAST_1 = (
    *("vocab_size", "batch_size", "grad_accum", "max_steps"),
    *("eval_every", "eval_batches", "save_every", "log_every"),
)
_AT_MOST = {"sample_tokens": 1 << 24, **dict.fromkeys(("batch_size", "grad_accum", "eval_batches"), 1 << 20)}
_NOT_NEGATIVE = (
    *("lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "grad_clip", "z_loss"),
    *("sample_tokens", "seed"),
)


@dataclass(frozen=True)
class TrainConfig:
    """All options of `fastgpt train`. Raises ValueError for values that make no run."""

    data: str = option(
        "stdlib",
        "a text, JSON Lines, JSON, CSV, TSV or Parquet file, - (standard input), a directory of files, or one that "
        "`fastgpt data` made; stdlib: Python's own source; repeats: random words, repeated",
    )
    task: str | None = option(
        None,
        "data are a JSON Lines file of input and output, or embedded; the loss is on the outputs alone",
        TASKS,
    )
    text_key: str = option("text", TEXT_KEY)
    skip_broken: bool = option(
        False, "leave out records without a text, with --task those that are no example"
    )
    out: str = option("out", "directory for checkpoints, log.jsonl and loss.png")
    resume: bool = option(
        False, "go on from the newest checkpoint in --out, with its options where none are given"
    )
    init_from: str | None = option(
        None,
        "a checkpoint, or a Hugging Face GPT-2 (a directory, or NAME[@REVISION] on the Hub), to start from: its "
        "weights, its tokenizer, its architecture",
    )
    tokenizer: str = option(
        "auto",
        "bytes, bpe (learned from the data), a tokenizer.json, or the name of a model on the Hub; auto: that of the "
        "model to start from or of a prepared dataset, else bytes",
    )
    vocab_size: int = option(4096, "tokens that bpe learns; the other tokenizers bring their own number")

    n_layer: int = option(6, "Transformer blocks")
    n_head: int = option(6, "attention heads a block")
    n_embd: int = option(384, "channels")
    block_size: int = option(256, "tokens a sequence")
    position: str = option("learned", "how positions enter the model", POSITIONS)
    activation: str = option("gelu_tanh", "activation of the MLP", ACTIVATIONS)
    dropout: float = option(0.0, "dropout rate in training")
    bias: bool = option(True, "biases in linear layers and LayerNorms")
    tie_head: bool = option(True, "use the token embedding as output projection")

    packing: str = option(
        "auto",
        "documents: packed into full blocks, none sees its neighbour; stream: windows of all that follows one another; "
        "auto: documents of a prepared dataset or of records, the stream of a text",
        PACKINGS,
    )
    batch_size: int = option(16, "sequences a forward pass, of all processes together")
    grad_accum: int = option(1, "forward passes a step")
    max_steps: int = option(2000, "optimizer steps, and the length of the learning-rate schedule")
    max_minutes: float | None = option(None, "stop after so many minutes, wherever the schedule stands")
    optimizer: str = option("adamw", "AdamW, Adam (its decay is L2), or Muon for matrices", OPTIMIZERS)
    lr: float = option(1e-3, "highest learning rate")
    min_lr: float = option(1e-4, "learning rate at the end of the schedule")
    warmup_steps: int = option(100, "steps of linear warm-up")
    schedule: str = option("cosine", "how the rate falls; wsd: stays, and falls at the end", SCHEDULES)
    decay_steps: int = option(200, "steps of the fall of wsd")
    weight_decay: float = option(0.1, "the optimizer's decay of matrices")
    beta1: float = option(0.9, "Adam's first-moment decay")
    beta2: float = option(0.99, "Adam's second-moment decay")
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip")

    label_smoothing: float = option(0.0, "share of the target spread over all tokens, in training")
    z_loss: float = option(0.0, "weight of the squared log of the softmax's denominator, in training")

    eval_every: int = option(250, "steps between validation losses")
    eval_batches: int = option(20, "batches, spread evenly over the held-out text, for a validation loss")
    patience: int | None = option(None, "end after so many validation losses without a better one")
    save_every: int = option(250, "steps between checkpoints")
    log_every: int = option(10, "steps between lines about the training loss")
    sample_tokens: int = option(400, "tokens of sampled text at the end; 0 samples none")
    tensorboard: bool = option(False, "also write the losses for TensorBoard, to OUT/tensorboard")

    seed: int = option(1337, "of the weights, the batches, dropout and the sample")
    device: str = option(
        "auto", "auto (a GPU where there is one) or any name torch knows, such as cpu or cuda:0"
    )
    dtype: str = option(
        "auto", "of the products; auto is bfloat16 where the hardware has it; float16 scales the loss", DTYPES
    )
    backend: str = option("auto", "which kernels run", BACKEND_CHOICES)
    compile: bool = option(False, "run the model through torch.compile")
    checkpoint_activations: bool = option(
        False, "compute blocks again in the backward instead of keeping their activations"
    )
    parallel: str = option(
        "auto",
        "what processes started by torchrun do: ddp, or fsdp, which shards the model; auto is ddp",
        PARALLEL,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = item.metadata["choices"]
            value = getattr(self, item.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{item.name} must be one of {', '.join(choices)}, not {shown(value)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} must be a finite number, not {value}")
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {shown(getattr(self, name))}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {shown(getattr(self, name))}")
        for item in fields(self):
            value, most = getattr(self, item.name), _AT_MOST.get(item.name, (1 << 63) - 1)
            if type(value) is int and value > most:
                raise ValueError(f"{item.name} must be at most {most:,}, not {shown(value)}")
        for name in ("data", "out", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("beta1", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must not be above lr={self.lr}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, not {self.max_minutes}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self.patience}")
        self.model(self.vocab_size)

    def model(self, vocab_size: int) -> GPTConfig:
        """The model's configuration, for a tokenizer's vocabulary. Raises ValueError as GPTConfig does."""
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
            bias=self.bias,
            position=self.position,
            activation=self.activation,
            tie_head=self.tie_head,
        )

    def override(self, values: dict[str, Any]) -> TrainConfig:
        """A copy with other values of the fields' types. Raises ValueError for anything else."""
        hints = get_type_hints(TrainConfig)
        for name, value in values.items():
            if name not in hints:
                raise ValueError(f"there is no option {shown(name)}; did you mean {_nearest(name, hints)!r}?")
            values = values | {name: _typed(name, value, hints[name])}
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `TrainConfig().override(d)` is the way back."""
        return asdict(self)


def trained_with(opened: Checkpoint) -> TrainConfig:
    """Return the configuration of the run that saved a checkpoint.

    Raises:
        CheckpointError: it is not a configuration of this version.
    """
    try:
        return TrainConfig().override(opened.options)
    except ValueError as error:
        raise CheckpointError(
            f"{opened.path} was saved with options that cannot be used: {str(error)[:500]}"
        ) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file, "-" for standard input. Raises OSError if it cannot be read and ValueError if it is
    not TOML.
    """
    if str(path) != STANDARD_INPUT:
        Path(path).stat()  # raises FileNotFoundError
    try:
        with open_text(path) as file:
            text = file.read(_LONGEST_TOML + 1)
        if len(text) > _LONGEST_TOML:
            raise ValueError(f"it is longer than {_LONGEST_TOML >> 20} MiB")
        return loads_toml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    kind = kind_of(hint)
    if value is None and kind is not hint:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, not {shown(value)}")
    return value


def _nearest(name: str, known: dict[str, Any]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
