"""PyTorch Lightning: a LightningModule around a GPT-2 that runs on fastgpt's kernels.

    python examples/lightning_module.py

`fastgpt.accelerate` belongs where the model is made: before Lightning moves, wraps or compiles it.
"""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import fastgpt
from fastgpt.data import load_corpus
from fastgpt.tokenizer import ByteTokenizer

LENGTH = 64


class LanguageModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
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
        self.model = GPT2LMHeadModel(config)
        print(fastgpt.accelerate(self.model))

    def training_step(self, tokens, step):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        if step % 25 == 0 or step == self.trainer.max_steps - 1:
            self.print(f"step {step:4}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=150)
steps = parser.parse_args().steps

lightning.seed_everything(0)
text = ByteTokenizer().encode("".join(load_corpus("stdlib").train)).long()
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
trainer = lightning.Trainer(
    max_steps=steps,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(LanguageModel(), DataLoader(rows, batch_size=16, shuffle=True))
