"""The Trainers with a teacher: what counts where documents are packed, evaluation, and the arguments that are refused."""

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from minillm.integrations import HFDistillationTrainer, distillation_loss
from tests.integrations.conftest import LEARNING_RATE, packed


@pytest.fixture
def make_trainer(setting, tmp_path):
    """A function that makes a Trainer of the tiny models; arguments of TrainingArguments and of the Trainer."""

    def make(arguments: dict, **changed) -> HFDistillationTrainer:
        plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
        model = changed.pop("model", None) or AutoModelForCausalLM.from_pretrained(setting.student)
        return HFDistillationTrainer(
            model=model,
            teacher=AutoModelForCausalLM.from_pretrained(setting.teacher),
            args=TrainingArguments(str(tmp_path), **plain | arguments),
            **changed,
        )

    return make


def test_the_first_token_of_a_packed_document_is_not_counted_by_loss_or_divisor(
    make_trainer, setting, reverse_kl_curve
):
    """Three micro-batches of three, three and two documents: their means' mean would be another number."""
    trainer = make_trainer(
        {
            "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "num_train_epochs": 3, "logging_steps": 1,
            "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        },
        train_dataset=[{"input_ids": ids} for ids, _ in setting.lines],
        data_collator=packed,
    )  # fmt: skip
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(curve, reverse_kl_curve, rtol=2e-5, atol=0)


def test_an_evaluation_has_the_loss_and_logits_where_a_metric_wants_them(make_trainer, setting):
    rows = [{"input_ids": ids} for ids, _ in setting.lines]
    shapes = []

    def metrics(prediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"accuracy": 0.5}

    trainer = make_trainer({"per_device_eval_batch_size": 8}, eval_dataset=rows, data_collator=packed)
    expected = distillation_loss(trainer.model, trainer.teacher, packed(rows)).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trainer = make_trainer(
        {"per_device_eval_batch_size": 8}, eval_dataset=rows, data_collator=packed, compute_metrics=metrics
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6) and found["eval_accuracy"] == 0.5
    assert shapes == [(1, sum(len(ids) for ids, _ in setting.lines), trainer.model.config.vocab_size)]


def test_what_asks_for_another_loss_is_refused(make_trainer, setting):
    router = AutoModelForCausalLM.from_pretrained(setting.student)
    router.config.output_router_logits = True
    for arguments, changed, words in (
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1 smooths labels.*set it to 0"),
        (
            {},
            {"compute_loss_func": lambda *args, **kwargs: 0},
            "compute_loss_func would be ignored; pass .* objective=",
        ),
        ({}, {"model": router}, "output_router_logits=True.*set it to False"),
    ):
        with pytest.raises(ValueError, match=f"HFDistillationTrainer: {words}"):
            make_trainer(arguments, **changed)


def test_what_cuts_a_batch_along_its_text_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)  # what it counts where two GPUs belong to one process
    with pytest.raises(ValueError, match="torch.nn.DataParallel is not supported; start one process for each GPU"):
        make_trainer({})
    monkeypatch.undo()
    trainer = make_trainer({})
    for arguments in ({"sp_size": 2, "sp_backend": "deepspeed"}, {"cp_size": 2}):
        # accelerate wants its ranks before it takes such a configuration
        monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(**arguments))
        assert "cut a text between a token and its label; use data parallelism" in trainer._refused()


def test_several_ranks_divide_by_the_count_of_all(setting, make_trainer, reverse_kl_curve, on_two_ranks):
    """DistributedDataParallel averages gradients and the Trainer counts the tokens of all ranks."""

    def train(rank: int) -> list[float]:
        trainer = make_trainer(
            {
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3,
                "logging_steps": 1, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            },
            train_dataset=[{"input_ids": ids} for ids, _ in setting.lines],
            data_collator=packed,
        )  # fmt: skip
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    curve, _ = on_two_ranks(train)  # rank 0 logs
    torch.testing.assert_close(curve, reverse_kl_curve, rtol=2e-5, atol=0)
