"""TRL's SFTTrainer with a teacher: one class of two bases, and everything else as SFTTrainer has it.

    python examples/trl_sft_trainer.py STUDENT TEACHER PAIRS OUTPUT

STUDENT and TEACHER are folders or hub names of models with one tokenizer, PAIRS is a file of JSON lines with `prompt` and
`completion`, OUTPUT a folder for checkpoints. Prompts are not learnt: SFTTrainer sets their labels to -100.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from minillm.integrations import DistillationMixin


class SFTDistillationTrainer(DistillationMixin, SFTTrainer):
    """SFTTrainer, with the mean of an objective of one's own over the tokens of completions in the place of its loss."""


def objective(stats):
    """Half of the reverse KL to the teacher, half of the cross-entropy on the data; stats is a TokenStats of some tokens."""
    return 0.5 * stats.reverse_kl - 0.5 * stats.student_logprob


def main(student: str, teacher: str, pairs: str, output: str, **arguments: Any) -> SFTDistillationTrainer:
    """Trains; `arguments` are further ones of SFTConfig."""
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "bf16": torch.cuda.is_available(),  # TRL's default is True
    }
    trainer = SFTDistillationTrainer(
        model=student,
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        objective=objective,
        loss_options={
            "fields": ("reverse_kl", "student_logprob")
        },  # what the objective reads: the rest is not computed
        args=SFTConfig(output, **settings | arguments),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:5])
