"""Options of a training run: one typed dataclass, read from the command line, a TOML file or a checkpoint.

The field `n_layer` is the option `--n-layer` and the TOML key `n_layer`; a later source overrides an earlier
one: defaults, the checkpoint being resumed, the TOML file, the command line.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from fastgpt.backends import BACKENDS
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.data.files import STANDARD_INPUT, open_text
from fastgpt.data.packing import PACKINGS
from fastgpt.device import DTYPE_NAMES, DTYPES
from fastgpt.evaluation.tasks.template import TASKS
from fastgpt.gpt_config import ACTIVATIONS, NORMS, POSITIONS, PRESET_FIELDS, PRESETS, GPTConfig, preset_fields
from fastgpt.json_io import loads_toml, shown
from fastgpt.options import TEXT_KEY, kind_of, option

BACKEND_CHOICES = ("auto", *BACKENDS)
OPTIMIZERS = ("adamw", "adam", "muon")
SCHEDULES = ("cosine", "linear", "wsd")
PARALLEL = ("auto", "ddp", "fsdp")

# The fields that say which model it is: resuming cannot change them, and `init_from` brings its own.
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "n_inner", "layer_norm_eps", *PRESET_FIELDS)
MODEL_FIELDS = ("tokenizer", "vocab_size", "block_size", *ARCHITECTURE)

# Defaults of `fastgpt finetune`, which starts from trained weights.
FINETUNE = {"max_steps": 500, "lr": 1e-4, "min_lr": 1e-5}
# Titles of the options' groups in --help, by the first field of each.
GROUPS = {
    "data": "data and directories",
    "preset": "model",
    "packing": "batches and length of the run",
    "optimizer": "optimizer and schedule",
    "label_smoothing": "loss",
    "eval_every": "validation, checkpoints and output",
    "threads": "machine",
}

_LONGEST_TOML = 1 << 20  # characters
_AT_LEAST_1 = (
    *("vocab_size", "batch_size", "grad_accum", "max_steps"),
    *("eval_every", "eval_batches", "save_every", "log_every", "threads"),
)
_AT_MOST = {
    "sample_tokens": 1 << 24,
    "threads": 1 << 16,
    **dict.fromkeys(("batch_size", "grad_accum", "eval_batches"), 1 << 20),
}
_NOT_NEGATIVE = (
    *("lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "grad_clip", "z_loss"),
    *("sample_tokens", "seed"),
)


@dataclass(frozen=True)
class TrainConfig:
    """All options of `fastgpt train`. Raises ValueError for values that make no run."""

    data: str = option(
        "stdlib",
        "training data: a text, JSON Lines, JSON, CSV, TSV or Parquet file, - (standard input), a directory, or "
        "the output of `fastgpt data`; stdlib: the source of Python's standard library; repeats: repeated random words",
    )
    task: str | None = option(
        None,
        "task of the data, a JSON Lines file of inputs and outputs, or embedded; the loss is on the outputs alone",
        TASKS,
    )
    text_key: str = option("text", TEXT_KEY)
    skip_broken: bool = option(False, "skip records without a text, with --task those that are not examples")
    out: str = option("out", "directory for checkpoints, log.jsonl and loss.png")
    resume: bool = option(False, "continue the newest checkpoint in --out; its options are the defaults")
    init_from: str | None = option(
        None,
        "model to start from, with its weights, tokenizer and architecture: a checkpoint, or a Hugging Face GPT-2, "
        "Llama or Mistral (a directory, or NAME[@REVISION] on the Hub)",
    )
    tokenizer: str = option(
        "auto",
        "tokenizer: bytes, bpe (trained on the data), a tokenizer.json, or the name of a model on the Hub; auto: "
        "that of the model to start from or of a prepared dataset, else bytes",
    )
    vocab_size: int = option(4096, "vocabulary size of bpe; other tokenizers have their own")

    preset: str = option("gpt2", "architecture: defaults of the options below but for the sizes", PRESETS)
    n_layer: int = option(6, "Transformer blocks")
    n_head: int = option(6, "attention heads per block")
    n_kv_head: int | None = option(
        None, "heads of keys and values", described="n_head, with llama a fourth, third or half of it"
    )
    n_embd: int = option(384, "embedding width (channels)")
    n_inner: int | None = option(
        None, "width of the MLP", described="4 n_embd, with a gate 8/3 n_embd in multiples of 64"
    )
    block_size: int = option(256, "context length in tokens")
    position: str = option("learned", "positional encoding", POSITIONS)
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    activation: str = option(
        "gelu_tanh", "activation of the MLP; relu2: squared; swiglu, geglu: gated", ACTIVATIONS
    )
    norm: str = option("layer", "normalization: LayerNorm or RMSNorm", NORMS)
    norm_weight: bool = option(True, "learned parameters in norms")
    layer_norm_eps: float = option(1e-5, "term added to the variance or mean square in norms")
    qk_norm: bool = option(False, "RMSNorm of queries and keys")
    softcap: float | None = option(None, "bound c of the logits, c tanh(logits / c)")
    window: tuple[int, ...] | None = option(
        None,
        "tokens that a token attends to, 0: all; several numbers are for the layers in turn",
        described="all",
    )
    dropout: float = option(0.0, "dropout rate in training")
    bias: bool = option(True, "biases in linear layers and LayerNorms")
    tie_head: bool = option(True, "output projection tied to the token embedding")

    packing: str = option(
        "auto",
        "documents: packed into full blocks, attention within a document; stream: windows of the concatenated text; "
        "auto: documents for a prepared dataset or records, stream for a text",
        PACKINGS,
    )
    batch_size: int = option(16, "sequences per forward pass, of all processes together")
    grad_accum: int = option(1, "forward passes per optimizer step")
    max_steps: int = option(2000, "number of optimizer steps, and length of the learning-rate schedule")
    max_minutes: float | None = option(None, "time limit in minutes")
    optimizer: str = option(
        "adamw", "optimizer: AdamW, Adam (with L2 decay), or Muon for matrices", OPTIMIZERS
    )
    lr: float = option(1e-3, "highest learning rate")
    min_lr: float = option(1e-4, "learning rate at the end of the schedule")
    warmup_steps: int | None = option(
        None, "steps of linear warm-up", described="a twentieth of max_steps, at most 100"
    )
    schedule: str = option("cosine", "learning-rate schedule; wsd: warm-up, stable, decay", SCHEDULES)
    decay_steps: int = option(200, "steps of the decay of wsd")
    weight_decay: float = option(0.1, "weight decay of matrices")
    beta1: float = option(0.9, "Adam's first-moment decay")
    beta2: float = option(0.99, "Adam's second-moment decay")
    grad_clip: float = option(1.0, "maximum gradient norm; 0: no clipping")

    label_smoothing: float = option(0.0, "probability spread over all tokens, in training")
    z_loss: float = option(0.0, "weight of the squared log of the softmax denominator, in training")

    eval_every: int | None = option(
        None, "steps between validation losses", described="a tenth of max_steps, at most 250"
    )
    eval_batches: int = option(20, "batches per validation loss, spread evenly over the held-out text")
    patience: int | None = option(None, "number of validations without improvement after which to stop")
    save_every: int = option(250, "steps between checkpoints")
    log_every: int = option(10, "steps between log lines")
    sample_tokens: int = option(400, "length of the sample at the end, in tokens; 0: none")
    tensorboard: bool = option(False, "TensorBoard logs in OUT/tensorboard")

    threads: int | None = option(None, "threads of a CPU", described="as PyTorch chooses")
    seed: int = option(1337, "random seed (initialization, batches, dropout, sampling)")
    device: str = option(
        "auto", "device: auto (a GPU if there is one), or a name of torch, such as cpu or cuda:0"
    )
    dtype: str = option(
        "auto",
        "dtype of matrix products; auto: bfloat16 if the hardware has it; float16 uses loss scaling",
        DTYPES,
        synonyms=DTYPE_NAMES,
    )
    backend: str = option("auto", "backend of the kernels", BACKEND_CHOICES)
    compile: bool = option(False, "torch.compile of the model")
    checkpoint_activations: bool = option(
        False, "activation checkpointing: recomputation of blocks in the backward"
    )
    parallel: str = option(
        "auto",
        "parallelism under torchrun: ddp, or fsdp, which shards the model; auto: ddp",
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
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {shown(getattr(self, name))}")
        for name in _NOT_NEGATIVE:
            if (value := getattr(self, name)) is not None and not value >= 0:
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

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up; by default a twentieth of the run, at most 100."""
        return min(100, self.max_steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def eval_interval(self) -> int:
        """Steps between validation losses; by default a tenth of the run, at most 250."""
        return max(1, min(250, self.max_steps // 10)) if self.eval_every is None else self.eval_every

    def model(self, vocab_size: int) -> GPTConfig:
        """The model's configuration, for a tokenizer's vocabulary. Raises ValueError as GPTConfig does."""
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            dropout=self.dropout,
            **{name: getattr(self, name) for name in ARCHITECTURE},
        )

    def override(self, values: dict[str, Any]) -> TrainConfig:
        """A copy with other values of the fields' types, a preset's fields included. Raises ValueError for others."""
        hints = get_type_hints(TrainConfig)
        if "preset" in values:
            values = preset_fields(values["preset"], values.get("n_head", self.n_head)) | values
        for name, value in values.items():
            if name not in hints:
                raise ValueError(f"there is no option {shown(name)}; did you mean {_nearest(name, hints)!r}?")
            typed = _typed(name, value, hints[name])
            values = values | {name: DTYPE_NAMES.get(typed, typed) if name == "dtype" else typed}
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
    """Read the options in a TOML file, "-" for standard input.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML.
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
    if get_origin(kind) is tuple:
        many = value if isinstance(value, (list, tuple)) else [value]
        if not all(type(one) is int for one in many):
            raise ValueError(f"{name} must be one or more whole numbers, not {shown(value)}")
        return tuple(many)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, not {shown(value)}")
    return value


def _nearest(name: str, known: dict[str, Any]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
