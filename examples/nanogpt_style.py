"""A GPT as people write it, on `torch.nn.functional as F`: with one import line changed it runs on fastgpt's kernels.

    python examples/nanogpt_style.py

It learns the source of the Python standard library, byte by byte, and then writes some. Code that cannot be edited
runs the same way within `with fastgpt.patch_functional():`.
"""

import argparse

import torch
from torch import nn

import fastgpt
from fastgpt import functional as F  # was: import torch.nn.functional as F
from fastgpt.data import batch, load_corpus
from fastgpt.tokenizer import ByteTokenizer

VOCAB, LENGTH, WIDTH, HEADS, LAYERS = 256, 64, 96, 3, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = F.layer_norm(x, (WIDTH,), self.norm1.weight, self.norm1.bias)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(h).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (WIDTH,), self.norm2.weight, self.norm2.bias)
        return x + self.down(F.gelu(self.up(h), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens, targets=None):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(F.layer_norm(self.blocks(x), (WIDTH,)))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
steps = parser.parse_args().steps

torch.manual_seed(0)
tokenizer = ByteTokenizer()
text = tokenizer.encode("".join(load_corpus("stdlib").train))
model = GPT()
inputs, targets = batch(text, 0, batch_size=8, block_size=LENGTH, seed=0)
called = fastgpt.explain(model, inputs, targets).decisions
print("fastgpt's ops, and what runs them:", *sorted({f"{call.op} ({call.backend})" for call in called}))

optimizer = torch.optim.AdamW(model.parameters(), lr=7e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=7e-3, total_steps=steps, pct_start=0.1)
for step in range(steps):
    inputs, targets = batch(text, step, batch_size=8, block_size=LENGTH, seed=0)
    loss = model(inputs, targets)
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f}")

written = tokenizer.encode("def ").long()[None]
with torch.no_grad():
    for _ in range(160):
        probabilities = F.softmax(
            model(written[:, -LENGTH:])[:, -1] / 0.7, dim=-1
        )  # PyTorch's own, passed through
        written = torch.cat([written, torch.multinomial(probabilities, 1)], dim=1)
print("it writes:", tokenizer.decode(written[0]), sep="\n")
