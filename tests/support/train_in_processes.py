"""Run by torchrun: a few steps of an accelerated GPT-2, in one process or in several, and their losses as JSON.

torchrun --nproc-per-node=2 train_in_processes.py one|ddp|fsdp|accelerate OUT [untied]
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fastgpt
from tests.support.client_models import VOCAB, build


def main(*arguments):
    dist.init_process_group("gloo")
    train(*arguments)  # lets go of DDP's reducer, which would wait for gloo's threads holding the GIL
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # for gloo's threads, which FSDP2 keeps beyond this: as in DistributedContext.meet


def train(how, out, untied=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = build("GPT2LMHeadModel")
    tokens = torch.randint(0, VOCAB, (4, 24))
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fastgpt.accelerate(model)
    ops = sorted({d.op for d in fastgpt.explain(model, input_ids=tokens, labels=tokens).decisions})
    if how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in model.transformer.h:
            fully_shard(block.mlp.c_fc, mesh=mesh)  # the layer that fuses is a shard group
            fully_shard(block, mesh=mesh)
        if untied:  # and so is the head, where it has a weight of its own
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    backward = torch.Tensor.backward
    if how == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    losses = []
    for _ in range(5):
        rows = tokens.chunk(world)[rank]
        loss = model(input_ids=rows, labels=rows).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
    if rank == 0:
        Path(out).write_text(json.dumps({"losses": losses, "ops": ops}))


main(*sys.argv[1:])
