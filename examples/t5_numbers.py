"""transformers' T5, encoder and decoder with a learned bias of their attention, in a plain PyTorch loop.

    python examples/t5_numbers.py

A tiny T5 with random weights, so that nothing is downloaded, learns to write a number in words: "4 0 7" becomes
"four zero seven". T5 adds a learned bias to the scores of its attention. Kernels that skip tiles or store no scores
often give no gradient of it; `ops.attention` sums it on the way. In training the model returns a loss and no logits.
"""

import argparse

import torch
from transformers import T5Config, T5ForConditionalGeneration

import fastgpt

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAD, END, FIRST = 0, 1, 2  # then the ten digits, then the letters
LETTERS = sorted(set("".join(WORDS)) | {" "})
LETTER = {letter: FIRST + 10 + i for i, letter in enumerate(LETTERS)}


def numbers(count, generator):
    """Inputs, labels and the mask of padding for random numbers of one to six digits."""
    inputs = torch.full((count, 7), PAD)
    labels = torch.full((count, 36), -100)
    for row in range(count):
        size = int(torch.randint(1, 7, (1,), generator=generator))
        digits = torch.randint(10, (size,), generator=generator).tolist()
        text = " ".join(WORDS[digit] for digit in digits)
        inputs[row, : size + 1] = torch.tensor([*(FIRST + digit for digit in digits), END])
        labels[row, : len(text) + 1] = torch.tensor([*(LETTER[letter] for letter in text), END])
    return {"input_ids": inputs, "attention_mask": (inputs != PAD).long(), "labels": labels}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
steps = parser.parse_args().steps

torch.manual_seed(0)
draw = torch.Generator().manual_seed(0)
model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=FIRST + 10 + len(LETTERS),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
)
print(fastgpt.accelerate(model))

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.1)
model.train()
for step in range(steps):
    loss = model(**numbers(32, draw)).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f}")

model.eval()
unseen = numbers(64, draw)
labels = unseen.pop("labels")
written = model.generate(**unseen, max_new_tokens=labels.shape[1], do_sample=False)[:, 1:]
written = torch.nn.functional.pad(written, (0, labels.shape[1] - written.shape[1]), value=PAD)
right = (written == labels.masked_fill(labels == -100, PAD)).all(dim=1).float().mean()
print(f"{right:.0%} of the numbers are written without a mistake")
