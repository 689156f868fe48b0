"""Lightning's Trainer with a module of student and teacher.

    python examples/lightning_fit.py STUDENT TEACHER TEXT

STUDENT and TEACHER are folders or hub names of models with one tokenizer, TEXT is a file whose lines are learnt.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from minillm.integrations import DistillationModule


def main(
    student: str, teacher: str, text: str, *, batch_size: int = 8, learning_rate: float = 1e-5, **arguments: Any
) -> DistillationModule:
    """Trains; `arguments` are further ones of lightning.Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
    loader = DataLoader(
        [tokenizer(line, truncation=True, max_length=1024) for line in lines],
        batch_size=batch_size,
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # padding gets the label -100
    )
    module = DistillationModule(
        AutoModelForCausalLM.from_pretrained(student),
        AutoModelForCausalLM.from_pretrained(teacher),
        optimizer=functools.partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0),
        divergence="jsd",
        beta=0.5,
    )
    lightning.Trainer(**{"max_epochs": 1} | arguments).fit(module, loader)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:4])
