"""An accelerated model in DistributedDataParallel: two processes, gloo, the CPU.

    torchrun --standalone --nproc-per-node=2 examples/ddp.py

Accelerate first and wrap then. Each process trains on batches of its own; DDP averages the gradients. On GPUs: backend
"nccl", `device_ids=[local_rank]`, one process a GPU.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import fastgpt
from fastgpt.data import batch, load_corpus
from fastgpt.tokenizer import ByteTokenizer

LENGTH = 64


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps

    dist.init_process_group("gloo")
    # In a function of its own: what DistributedDataParallel made must be gone before the group is. If it held the group
    # last, it would wait for gloo's threads, and hold the GIL that they wait for.
    train(steps)
    dist.barrier()  # none leaves while another still listens to it
    dist.destroy_process_group()


def train(steps):
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(rank)  # other dropout in each process; DDP gives all of them the first one's weights
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
    if rank == 0:
        print(report)
    model = DistributedDataParallel(model)

    text = ByteTokenizer().encode("".join(load_corpus("stdlib").train))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        tokens, _ = batch(text, step * world + rank, batch_size=8, block_size=LENGTH, seed=0)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:4}  loss {mean.item():.3f}, the mean of {world} processes", flush=True)


main()
