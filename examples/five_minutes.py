"""A GPT in nanochat's style, trained for a fixed time on a machine without a GPU, by FlashAttention's interface.

    python examples/five_minutes.py --seconds 20

Windows by layer, grouped queries and a KV cache, as code for FlashAttention 3 has them: only the import of `flash_attn`
is ours. Squared ReLU, norms without weights, normalized queries and keys, capped logits; Muon for the matrices. What
counts is bits a byte of held-out text when the time is over (`--seconds 300`: five minutes). At the end it writes.
"""

import argparse
import math
import time

import torch
from torch import nn

import fastgpt
from fastgpt import flash_attn_interface as flash_attn  # was: FlashAttention 3's
from fastgpt import functional as F
from fastgpt import ops
from fastgpt.data import batch, load_corpus
from fastgpt.tokenizer import ByteTokenizer

VOCAB, LENGTH, WIDTH, HEADS, KV_HEADS, CAP = 256, 128, 128, 4, 2, 15.0
WINDOWS = [
    (32, 0),
    (32, 0),
    (32, 0),
    (-1, 0),
]  # of each layer: tokens seen to the left; three short ones, a full one
SIZE = WIDTH // HEADS


def norm(x):
    return F.rms_norm(x, (x.shape[-1],))


def angles(first, length):
    """cos and sin of the rotation of tokens first, …, first + length - 1."""
    frequency = 10000 ** -(torch.arange(SIZE // 2) / (SIZE // 2))
    angle = torch.arange(first, first + length)[:, None] * frequency
    return angle.cos(), angle.sin()


class Block(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window = window
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * SIZE, bias=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, x, rotation, cache, first):
        h = norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, SIZE)) for layer in (self.q, self.k, self.v))
        q, k = (y.transpose(1, 2) for y in ops.rope(q.transpose(1, 2), k.transpose(1, 2), *rotation))
        q, k = norm(q), norm(k)
        if cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=self.window)
        else:
            y = flash_attn.flash_attn_with_kvcache(
                q, *cache, k=k, v=v, cache_seqlens=first, causal=True, window_size=self.window
            )
        x = x + self.out(y.flatten(2))
        return x + self.down(ops.relu_squared(self.up(norm(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(window) for window in WINDOWS)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.head.weight, std=0.001)

    def forward(self, tokens, targets=None, caches=None, first=0):
        """The mean loss of the targets in nats, or the logits of the last token."""
        x, rotation = norm(self.tokens(tokens)), angles(first, tokens.shape[1])
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, rotation, cache, first)
        x = norm(x)
        if targets is None:
            return CAP * torch.tanh(self.head(x[:, -1]) / CAP)
        return ops.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), softcap=CAP)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=300.0, help="time to train for")
seconds = parser.parse_args().seconds

torch.manual_seed(0)
fastgpt.keep_freed_memory()
tokenizer, corpus = ByteTokenizer(), load_corpus("stdlib")
train, held_out = (tokenizer.encode("".join(texts)) for texts in (corpus.train, corpus.val))
model = GPT()
inputs, targets = batch(train, 0, batch_size=16, block_size=LENGTH, seed=0)
called = fastgpt.explain(model, inputs, targets).decisions
print("fastgpt's ops, and what runs them:", *sorted({f"{call.op} ({call.backend})" for call in called}))

optimizers = [
    torch.optim.Muon(model.blocks.parameters(), lr=0.02, momentum=0.95, weight_decay=0.0),
    torch.optim.AdamW(
        [*model.tokens.parameters(), *model.head.parameters()], lr=5e-3, betas=(0.8, 0.95), weight_decay=0.0
    ),
]
rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def bits_per_byte():
    with torch.no_grad():
        losses = [model(*batch(held_out, i, batch_size=16, block_size=LENGTH, seed=1)) for i in range(8)]
    return float(torch.stack(losses).mean()) / math.log(2)


print(f"held out, before: loss {bits_per_byte():.3f} bits a byte")
began, step = time.perf_counter(), 0
while (share := (time.perf_counter() - began) / seconds) < 1:
    for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
        group["lr"] = rate * min(1.0, 2 * (1 - share))  # constant, then falling from half of the time on
    loss = model(*batch(train, step, batch_size=16, block_size=LENGTH, seed=0))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if step % 100 == 0:
        print(f"{share:4.0%} of the time, step {step:5}: {loss.item() / math.log(2):.3f} bits a byte")
    step += 1
print(f"held out, after {step} steps: loss {bits_per_byte():.3f} bits a byte")

written = tokenizer.encode("def ").long()[None]
with torch.no_grad():
    caches = [tuple(torch.zeros(1, 200, KV_HEADS, SIZE) for _ in range(2)) for _ in model.blocks]
    new, first = written, 0
    while written.shape[1] < 164:
        logits = model(new, caches=caches, first=first)
        first += new.shape[1]
        new = torch.multinomial(torch.softmax(logits / 0.7, dim=-1), 1)
        written = torch.cat([written, new], dim=1)
print("it writes:", tokenizer.decode(written[0]), sep="\n")
