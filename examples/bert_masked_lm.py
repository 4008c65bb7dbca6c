"""Masked language modelling with transformers' BERT in a plain PyTorch loop, under bfloat16 autocast.

    python examples/bert_masked_lm.py

`fastgpt.accelerate(model)` fuses the projection to the vocabulary with the loss, and on a CPU computes both for the
tokens that have a label alone, one in seven. In training the model then returns a loss and no logits; in evaluation
it returns both.
"""

import argparse

import torch
from transformers import BertConfig, BertForMaskedLM

import fastgpt
from fastgpt.data import batch, load_corpus
from fastgpt.tokenizer import ByteTokenizer

MASK = 256  # the first id after the bytes
LENGTH = 32


def masked(tokens):
    """Inputs and labels of tokens (B, L). 15 % of them have a label; of these 80 % are masked, 10 % replaced by a
    random byte and 10 % left. (transformers' DataCollatorForLanguageModeling does this with its tokenizers.)
    """
    chosen = torch.rand(tokens.shape) < 0.15
    fate = torch.rand(tokens.shape)
    inputs = tokens.masked_fill(chosen & (fate < 0.8), MASK)
    inputs = torch.where(chosen & (fate >= 0.9), torch.randint(0, 256, tokens.shape), inputs)
    return inputs, tokens.masked_fill(~chosen, -100)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
steps = parser.parse_args().steps

torch.manual_seed(0)
corpus = load_corpus("stdlib")
train, held_out = (ByteTokenizer().encode("".join(texts)) for texts in (corpus.train, corpus.val))
config = BertConfig(
    vocab_size=257,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    max_position_embeddings=LENGTH,
    initializer_range=0.1,  # BERT's 0.02 is for widths of 768 and more
    hidden_dropout_prob=0.0,  # so short a training overfits nothing
    attention_probs_dropout_prob=0.0,
)
model = BertForMaskedLM(config)
print(fastgpt.accelerate(model))

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.1)
model.train()
for step in range(steps):
    tokens, _ = batch(train, step, batch_size=32, block_size=LENGTH, seed=0)
    inputs, labels = masked(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f}")

model.eval()
tokens, _ = batch(held_out, 0, batch_size=256, block_size=LENGTH, seed=0)
inputs, _ = masked(tokens)
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    guesses = model(input_ids=inputs).logits.argmax(-1)
hidden = inputs == MASK
answers = tokens[hidden]
right = (guesses[hidden] == answers).float().mean()
commonest = (answers == answers.mode().values).float().mean()
print(
    f"held-out files: {right:.1%} of the masked bytes guessed; always guessing the commonest: {commonest:.1%}"
)
