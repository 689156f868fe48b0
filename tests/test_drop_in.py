"""The losses in somebody else's trainer: a plain PyTorch loop and a Hugging Face Trainer, beside eager ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import linear_divergence


def eager_reverse_kl(student_logits, teacher_logits, labels, num_items):
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (kl * (labels != -100)).sum() / num_items


def batches(models):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, models.vocab_size, (2, 9), generator=generator)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        labels[:, :3] = -100  # the prompt
        yield ids, labels


def plain_loop(models, loss_of) -> list[float]:
    optimizer = torch.optim.SGD(models.student.parameters(), lr=0.1)
    losses = []
    for ids, labels in batches(models):
        loss = loss_of(models, ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fused(models, ids, labels):
    student_hidden = models.student.model(ids).last_hidden_state
    with torch.no_grad():
        teacher_hidden = models.teacher.model.model(ids).last_hidden_state
    return linear_divergence(
        student_hidden,
        models.student.lm_head.weight,
        teacher_hidden,
        models.teacher.model.lm_head.weight,
        labels=labels,
    )


def eager(models, ids, labels):
    with torch.no_grad():
        teacher_logits = models.teacher.model(ids).logits
    return eager_reverse_kl(models.student(ids).logits, teacher_logits, labels, (labels != -100).sum())


def test_in_a_plain_loop_it_trains_as_the_eager_loss(make_models):
    torch.testing.assert_close(plain_loop(make_models(), fused), plain_loop(make_models(), eager), rtol=1e-4, atol=1e-6)


def test_in_a_hugging_face_trainer_it_honours_num_items_in_batch(make_models, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Distiller(Trainer):
        fused = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, labels = inputs["input_ids"], inputs["labels"]
            shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
            if self.fused:
                hidden = model.model(ids).last_hidden_state
                with torch.no_grad():
                    teacher_hidden = self.teacher.model(ids).last_hidden_state
                return linear_divergence(
                    hidden,
                    model.lm_head.weight,
                    teacher_hidden,
                    self.teacher.lm_head.weight,
                    labels=shifted,
                    num_items=num_items_in_batch,
                )
            with torch.no_grad():
                teacher_logits = self.teacher(ids).logits
            return eager_reverse_kl(model(ids).logits, teacher_logits, shifted, num_items_in_batch)

    def train(fused: bool):
        models = make_models()
        generator = torch.Generator().manual_seed(1)
        rows = []
        for index in range(8):
            ids = torch.randint(0, models.vocab_size, (9,), generator=generator)
            labels = ids.clone()
            labels[: 1 + index % 6] = -100  # micro-batches with unequal counts: their mean of means would be wrong
            rows.append({"input_ids": ids, "labels": labels})
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
            learning_rate=0.1, optim="sgd", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            logging_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Distiller(model=models.student, args=arguments, train_dataset=rows)
        trainer.teacher, trainer.fused = models.teacher.model, fused
        trainer.train()
        return models.student.state_dict()

    pytest.importorskip("accelerate")
    ours, theirs = train(fused=True), train(fused=False)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_losses_load_torch_and_triton_alone():
    code = (
        "import sys, minillm.losses; "
        "heavy = {'pydantic', 'transformers', 'datasets', 'deepspeed', 'rich', 'matplotlib', 'yaml'} & set(sys.modules); "
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_example_of_the_readme_takes_labels_as_a_hugging_face_loader_gives_them(make_models):
    """Unshifted: the example shifts them itself, since nothing in the losses does."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "linear_divergence(" in block]
    models = make_models()
    for ids, shifted in batches(models):
        labels = ids.clone()
        labels[:, :4] = -100  # the prompt: its last token predicts the first of the answer
        counted = int((shifted != -100).sum())
        assert counted == int((labels[:, 1:] != -100).sum())
        names = {"student": models.student, "teacher": models.teacher.model, "input_ids": ids, "labels": labels}
        names["num_items_in_batch"] = counted
        exec(example.replace("151_936", str(models.vocab_size)), names)
        torch.testing.assert_close(names["loss"], eager(models, ids, shifted), rtol=1e-4, atol=1e-6)
