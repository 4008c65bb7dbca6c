"""ELECTRA's pre-training (Clark et al. 2020): a small generator fills in masked tokens, a discriminator finds them.

    python examples/electra_replaced_tokens.py

Both are transformers' models on fastgpt's kernels. They share the embeddings of tokens and positions, and learn
together from loss = generator's + 50 · discriminator's, as in the paper.
"""

import argparse

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

import fastgpt
from fastgpt import functional as F
from fastgpt.data import batch, load_corpus
from fastgpt.tokenizer import ByteTokenizer

MASK = 256  # the first id after the bytes
LENGTH = 32
WEIGHT = 50.0  # of the discriminator's loss


def config(width, layers):
    return ElectraConfig(
        vocab_size=257,
        embedding_size=64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,  # ELECTRA's 0.02 is for widths of 256 and more
        hidden_dropout_prob=0.0,  # so short a training overfits nothing
        attention_probs_dropout_prob=0.0,
    )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=700)
steps = parser.parse_args().steps

torch.manual_seed(0)
generator = ElectraForMaskedLM(config(width=16, layers=1))
discriminator = ElectraForPreTraining(config(width=64, layers=2))
shared, own = discriminator.electra.embeddings, generator.electra.embeddings
own.word_embeddings, own.position_embeddings = shared.word_embeddings, shared.position_embeddings
generator.tie_weights()  # its head is the shared embeddings, transposed

# A fused loss makes no logits, but the generator's are needed, to sample from: its loss is F.cross_entropy of them.
print("generator:", fastgpt.accelerate(generator, cross_entropy=False), sep="\n")
print("discriminator:", fastgpt.accelerate(discriminator), sep="\n")


def losses(tokens):
    """Of tokens (B, L): the generator's loss, the discriminator's loss and logits, and which tokens were replaced."""
    masked = torch.rand(tokens.shape) < 0.15
    logits = generator(input_ids=tokens.masked_fill(masked, MASK)).logits[masked]  # (number masked, V)
    sampled = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]  # no gradient goes through this
    filled = tokens.masked_scatter(masked, sampled)
    replaced = filled != tokens  # where the generator was right, the token is the original
    output = discriminator(input_ids=filled, labels=replaced.float())
    return F.cross_entropy(logits, tokens[masked]), output.loss, output.logits, replaced


corpus = load_corpus("stdlib")
train, held_out = (ByteTokenizer().encode("".join(texts)) for texts in (corpus.train, corpus.val))
parameters = dict.fromkeys([*generator.parameters(), *discriminator.parameters()])  # the shared ones once
optimizer = torch.optim.AdamW(parameters, lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
for step in range(steps):
    tokens, _ = batch(train, step, batch_size=32, block_size=LENGTH, seed=0)
    of_generator, of_discriminator, _, _ = losses(tokens)
    (of_generator + WEIGHT * of_discriminator).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step:4}  generator loss {of_generator:.3f}  discriminator loss {of_discriminator:.3f}")

with torch.no_grad():
    _, _, logits, replaced = losses(batch(held_out, 0, batch_size=2048, block_size=LENGTH, seed=0)[0])
right = ((logits > 0) == replaced).float().mean()
print(f"held-out files: accuracy {right:.2%}; always answering 'original': {1 - replaced.float().mean():.2%}")
