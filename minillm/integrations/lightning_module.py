"""DistillationModule: a LightningModule that trains a student beside its teacher."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from minillm.integrations.batch_loss import distillation_loss


class DistillationModule(lightning.LightningModule):
    """Trains `student` on batches as distillation_loss takes them, with Lightning's Trainer in any precision and strategy.

    Args:
        optimizer: makes the optimiser of the student's parameters: functools.partial(torch.optim.AdamW, lr=1e-5).
        teacher: is no part of the module: neither in its parameters nor in its checkpoints. Moved to the module's device.
        loss_options: the keyword arguments of distillation_loss: divergence or objective, temperature, vocab_size, ...

    Logs train_loss and val_loss in nats per token. accumulate_grad_batches averages over batches, whatever number of
    tokens each has.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        **loss_options: Any,
    ):
        super().__init__()
        self.student, self.loss_options = student.train(), loss_options  # Lightning leaves the mode as it is
        self._make_optimizer = optimizer
        self._outside = [teacher.eval()]  # in a list, where Module does not look for modules

    @property
    def teacher(self) -> nn.Module:
        return self._outside[0]

    def setup(self, stage: str) -> None:
        if not hasattr(self.teacher, "hf_device_map"):  # which says where its layers have to stay
            self.teacher.to(self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._logged_loss("train_loss", batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._logged_loss("val_loss", batch)

    def _logged_loss(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        loss = distillation_loss(self.student, self.teacher, batch, **self.loss_options)
        self.log(name, loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.student.parameters())
