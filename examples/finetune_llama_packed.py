"""A Llama and transformers' Trainer on batches without padding: documents of all lengths in one row.

    python examples/finetune_llama_packed.py

`DataCollatorWithFlattening` lays the documents of a batch end to end, and position_ids say where each begins. That asks
for flash attention, which needs a GPU; an accelerated model runs `ops.attention_varlen` on a CPU too. A tiny Llama with
random weights, so that nothing is downloaded, learns paragraphs of the Python standard library, byte by byte. At the
end the packed loss is compared with that of the same documents, each run alone.
"""

import argparse
import tempfile

import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastgpt
from fastgpt.data import load_corpus
from fastgpt.tokenizer import ByteTokenizer


def paragraphs(documents):
    """Examples for the Trainer: paragraphs of 16 to 160 bytes. The model shifts the labels by one."""
    tokenizer = ByteTokenizer()
    found = (
        tokenizer.encode(text).long() for text in "".join(documents).split("\n\n") if 16 <= len(text) <= 160
    )
    return [{"input_ids": tokens, "labels": tokens} for tokens in found]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
steps = parser.parse_args().steps

set_seed(0)
corpus = load_corpus("stdlib")
train, held_out = paragraphs(corpus.train), paragraphs(corpus.val)[:128]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.1,  # Llama's 0.02 is for far larger widths
        bos_token_id=None,  # bytes have no ids to spare
        eos_token_id=None,
    )
)
print(fastgpt.accelerate(model))

pack = DataCollatorWithFlattening()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        learning_rate=5e-3,
        warmup_steps=steps // 10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=pack
    )
    print(f"before: loss {trainer.evaluate()['eval_loss']:.3f}")
    trainer.train()
    print(f"after {steps} steps: loss {trainer.evaluate()['eval_loss']:.3f}")

model.eval()
documents = held_out[:16]
with torch.no_grad():
    together = model(**pack(documents)).loss
    counts = torch.tensor([len(document["labels"]) - 1.0 for document in documents])
    alone = torch.stack(
        [model(**{name: row[None] for name, row in document.items()}).loss for document in documents]
    )
difference = abs(together - (alone * counts).sum() / counts.sum())
print(f"packed and alone: losses differ by at most {difference:.1e}")
