"""A loop of one's own with accelerate: gradient accumulation, any number of processes, the mean over all of a step's tokens.

    accelerate launch examples/accelerate_loop.py STUDENT TEACHER TEXT OUTPUT

STUDENT and TEACHER are folders or hub names of models with one tokenizer, TEXT is a file whose lines are learnt, OUTPUT
the folder of the trained model.
"""

import contextlib
import itertools
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from minillm.integrations import distillation_loss, next_token_labels


def main(
    student: str,
    teacher: str,
    text: str,
    output: str,
    *,
    epochs: int = 1,
    batch_size: int = 8,
    accumulation: int = 4,
    learning_rate: float = 1e-5,
) -> list[float]:
    """Trains, writes the student to `output`, and returns the loss of every optimiser step, in nats per token."""
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(student)
    lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
    loader = DataLoader(
        [tokenizer(line, truncation=True, max_length=1024) for line in lines],
        batch_size=batch_size,
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    judge = AutoModelForCausalLM.from_pretrained(teacher).to(accelerator.device)
    model = AutoModelForCausalLM.from_pretrained(student).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(epochs):
        batches = iter(loader)
        while micro_batches := list(itertools.islice(batches, accumulation)):
            counted = sum((next_token_labels(batch["labels"]) != -100).sum() for batch in micro_batches)
            num_items = accelerator.reduce(counted, "sum")  # of all processes
            total = torch.zeros((), device=accelerator.device)
            for place, batch in enumerate(micro_batches, 1):
                last = place == len(micro_batches)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    loss = distillation_loss(model, judge, batch, divergence="reverse_kl", num_items=num_items)
                    accelerator.backward(loss * accelerator.num_processes)  # whose gradients are averaged
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(total, "sum").item())
            accelerator.print(f"step {len(losses)}: {losses[-1]:.4f} nats per token")
    accelerator.unwrap_model(model).save_pretrained(output, is_main_process=accelerator.is_main_process)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:5])
