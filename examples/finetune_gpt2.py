"""transformers' GPT-2 and Trainer on fastgpt's kernels: the one line more is `fastgpt.accelerate(model)`.

    python examples/finetune_gpt2.py

A tiny GPT-2 with random weights, so that nothing is downloaded, learns the source of the Python standard library,
byte by byte, with gradient accumulation; with `GPT2LMHeadModel.from_pretrained("gpt2")` and its tokenizer the rest
stays as it is. The loss is of held-out files. Then it is saved, and loads as the same model without fastgpt.
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import fastgpt
from fastgpt.data import load_corpus
from fastgpt.tokenizer import ByteTokenizer

LENGTH = 64


def windows(documents):
    """What the Trainer takes: stretches of LENGTH bytes. The model itself shifts the labels by one."""
    tokens = ByteTokenizer().encode("".join(documents)).long()
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
steps = parser.parse_args().steps

set_seed(0)
corpus = load_corpus("stdlib")
config = GPT2Config(
    vocab_size=256,
    n_positions=LENGTH,
    n_embd=96,
    n_layer=2,
    n_head=3,
    initializer_range=0.1,  # GPT-2's 0.02 is for widths of 768 and more
    bos_token_id=None,  # bytes have no ids to spare
    eos_token_id=None,
)
model = GPT2LMHeadModel(config)

report = fastgpt.accelerate(model)
print(report)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=32,
        learning_rate=5e-3,
        warmup_steps=steps // 10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    train, held_out = windows(corpus.train), windows(corpus.val)[:256]
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
    print(f"before: loss {trainer.evaluate()['eval_loss']:.3f}")
    trainer.train()
    print(f"after {steps} steps: loss {trainer.evaluate()['eval_loss']:.3f}")

    model.save_pretrained(folder)
    plain = GPT2LMHeadModel.from_pretrained(folder)  # nothing of fastgpt is in the files

tokens = held_out[0]["input_ids"][None]
with torch.no_grad():
    difference = (plain(tokens).logits - model.eval()(tokens).logits).abs().max()
print(f"saved and loaded: {type(plain).__module__}, logits differ by at most {difference:.1e}")
