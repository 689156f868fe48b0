"""HFDistillationTrainer: the Trainer of transformers with a teacher."""

from transformers import Trainer

from minillm.integrations.trainer_mixin import DistillationMixin


class HFDistillationTrainer(DistillationMixin, Trainer):
    """transformers.Trainer(model, args, ...) with `teacher`, and any `divergence` or `objective` of minillm.losses.

    HFDistillationTrainer(model=student, args=TrainingArguments(...), train_dataset=..., data_collator=...,
    teacher=teacher, divergence="forward_kl", loss_options={"temperature": 2.0}).train(). `DistillationMixin` says what each
    argument means and what is refused.
    """
