"""Every example runs with the real library, and its loss falls along the curve of full logits in float64."""

from pathlib import Path

import pytest
import torch

from tests.integrations.conftest import ACCUMULATION, BATCH, EPOCHS, LEARNING_RATE, reverse_kl

HUGGING_FACE = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "num_train_epochs": EPOCHS,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def equal(curve: list[float], expected: list[float]) -> None:
    """Within the rounding of fp32, and long enough that a wrong gradient would show."""
    assert len(expected) == EPOCHS and expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(torch.tensor(curve).double(), torch.tensor(expected).double(), rtol=2e-5, atol=0)


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def half_of_both_curve(setting, eager_curve) -> list[float]:
    def half_of_both(log_q, log_p, labels):
        return 0.5 * reverse_kl(log_q, log_p, labels) - 0.5 * log_q.gather(-1, labels[:, None])[:, 0]

    return eager_curve(half_of_both, setting.completions)


def test_hugging_face_trainer(setting, example, reverse_kl_curve, tmp_path):
    """Texts of a micro-batch in one row without padding, counts that differ between micro-batches."""
    main = example("hugging_face_trainer").main
    trainer = main(setting.student, setting.teacher, setting.text, str(tmp_path), **HUGGING_FACE)
    equal(logged(trainer), reverse_kl_curve)


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        ("padded", {}),
        # rows of several documents: positions start again, and none is predicted from the one before it
        ("packed", {"packing": True, "max_length": 64, "gradient_accumulation_steps": 2}),
    ],
)
def test_trl_sft_trainer(setting, example, half_of_both_curve, tmp_path, rows, changed):
    """Prompts and completions through TRL's own preparation of data."""
    arguments = HUGGING_FACE | {"activation_checkpointing": False} | changed
    trainer = example("trl_sft_trainer").main(
        setting.student, setting.teacher, setting.pairs, str(tmp_path), **arguments
    )
    first = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in first and (first["position_ids"] == 0).sum() > 2) == (rows == "packed")
    equal(logged(trainer), half_of_both_curve)


def test_lightning_fit(setting, example, eager_curve, tmp_path):
    import lightning

    class Recorder(lightning.Callback):
        losses: list[float] = []

        def on_train_batch_end(self, trainer, module, *rest):
            self.losses.append(trainer.callback_metrics["train_loss"].item())
            assert set(trainer.optimizers[0].param_groups[0]["params"]) == set(module.student.parameters())

    def jsd(log_q, log_p, labels):
        log_m = (log_p.exp() + log_q.exp()).log() - torch.log(torch.tensor(2.0))
        return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)

    module = example("lightning_fit").main(
        setting.student, setting.teacher, setting.text, batch_size=BATCH * ACCUMULATION, learning_rate=LEARNING_RATE,
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Recorder()],
    )  # fmt: skip
    equal(Recorder.losses, eager_curve(jsd, setting.lines))
    assert not any(name.startswith("teacher") or "_outside" in name for name in module.state_dict())


def test_accelerate_loop(setting, example, reverse_kl_curve, tmp_path):
    main = example("accelerate_loop").main
    curve = main(
        setting.student, setting.teacher, setting.text, str(tmp_path), epochs=EPOCHS, batch_size=BATCH,
        accumulation=ACCUMULATION, learning_rate=LEARNING_RATE,
    )  # fmt: skip
    equal(curve, reverse_kl_curve)
    assert (tmp_path / "model.safetensors").exists()


def test_fsdp2_loop_on_two_ranks(setting, example, reverse_kl_curve, on_two_ranks):
    """The texts of a step lie on two ranks, four each with other counts of tokens: sums and gradients go over both."""
    main = example("fsdp2_loop").main

    def train(rank: int) -> list[float]:
        return main(
            setting.student, setting.teacher, setting.text, epochs=EPOCHS, batch_size=BATCH * ACCUMULATION // 2,
            learning_rate=LEARNING_RATE, param_dtype=torch.float32,
        )  # fmt: skip

    for curve in on_two_ranks(train):
        equal(curve, reverse_kl_curve)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_an_example_is_short_enough_to_paste_and_has_a_test_of_its_name(path):
    assert len(path.read_text().splitlines()) < 80
    assert any(name.startswith(f"test_{path.stem}") for name in globals())
