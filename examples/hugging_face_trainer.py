"""The Trainer of transformers with a teacher.

    python examples/hugging_face_trainer.py STUDENT TEACHER TEXT OUTPUT

STUDENT and TEACHER are folders or hub names of models with one tokenizer, TEXT is a file whose lines are learnt, OUTPUT
a folder for checkpoints. Several GPUs: put `accelerate launch` in the place of `python`.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, TrainingArguments

from minillm.integrations import HFDistillationTrainer


def main(student: str, teacher: str, text: str, output: str, **arguments: Any) -> HFDistillationTrainer:
    """Trains; `arguments` are further ones of TrainingArguments."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
    rows = [{"input_ids": tokenizer(line, truncation=True, max_length=1024)["input_ids"]} for line in lines]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "num_train_epochs": 1,
        "logging_steps": 1,
    }
    trainer = HFDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        divergence="reverse_kl",  # forward_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd
        loss_options={"temperature": 1.0},  # where the heads are padded differently: {"vocab_size": len(tokenizer)}
        args=TrainingArguments(output, **settings | arguments),
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening(),  # one row of all texts of a batch, without padding
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:5])
