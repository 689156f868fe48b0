"""A loop in the manner of torchtitan: fully_shard on every layer and on the model, a mesh, and a mixed-precision policy.

    torchrun --nproc-per-node 8 examples/fsdp2_loop.py STUDENT TEACHER TEXT

STUDENT and TEACHER are folders or hub names of models with one tokenizer, TEXT is a file whose lines are learnt. The loss
is computed inside the student's forward pass, where FSDP2 has gathered the head: no DTensor reaches it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from minillm.integrations import distillation_loss, next_token_labels


def main(
    student: str,
    teacher: str,
    text: str,
    *,
    epochs: int = 1,
    batch_size: int = 8,
    learning_rate: float = 1e-5,
    param_dtype: torch.dtype = torch.bfloat16,
) -> list[float]:
    """Trains, and returns the loss of every step in nats per token. Started by torchrun, or in a process group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("dp_shard",))

    tokenizer = AutoTokenizer.from_pretrained(student)
    lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
    rows = [tokenizer(line, truncation=True, max_length=1024) for line in lines]
    sampler = DistributedSampler(rows, world, rank)
    loader = DataLoader(
        rows, batch_size, sampler=sampler, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
    )

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device).train()
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    judge = AutoModelForCausalLM.from_pretrained(teacher, dtype=param_dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            batch = {name: value.to(device) for name, value in batch.items()}
            num_items = (next_token_labels(batch["labels"]) != -100).sum()
            dist.all_reduce(num_items)
            loss = distillation_loss(model, judge, batch, divergence="reverse_kl", num_items=num_items)
            (loss * world).backward()  # FSDP averages over ranks
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item())
            if rank == 0:
                print(f"step {len(losses)}: {losses[-1]:.4f} nats per token")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
    dist.destroy_process_group()
