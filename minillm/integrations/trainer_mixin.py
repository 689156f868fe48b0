"""DistillationMixin: a Trainer of transformers, or a subclass such as TRL's SFTTrainer, learns from a teacher."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.integrations.batch_loss import IGNORED, distillation_loss, targets_of

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class DistillationMixin(Base):
    """Put before a Trainer: `class Distiller(DistillationMixin, SFTTrainer): pass`. Its arguments are the Trainer's, and

        teacher: a causal language model of the student's tokenizer; moved to the Trainer's device and into eval mode.
        divergence, objective: what is minimised, as distillation_loss has them.
        loss_options: the other keyword arguments of distillation_loss: temperature, vocab_size, beta, chunk_bytes, ...

    The loss is the sum over counted tokens divided by the Trainer's num_items_in_batch, so that gradient accumulation and
    several ranks give the mean over all tokens of an optimiser step. The first token of a packed document is not counted.

    Raises ValueError for arguments that ask for another loss: label smoothing, compute_loss_func, a router's balance loss,
    and for what would cut a batch along its text: sequence or context parallelism, torch.nn.DataParallel.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        divergence: str = "reverse_kl",
        objective: Callable[..., Any] | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        refused = self._refused()
        if refused:
            raise ValueError(f"{type(self).__name__}: {refused}")
        self.distillation: dict[str, Any] = {"divergence": divergence, "objective": objective, **(loss_options or {})}
        self.model_accepts_loss_kwargs = (
            True  # so that the Trainer counts num_items_in_batch, whatever the model's forward
        )
        self.teacher = teacher.eval()
        if not hasattr(teacher, "hf_device_map"):  # which says where its layers have to stay
            self.teacher.to(self.args.device)

    def _refused(self) -> str:
        """The reason for which the Trainer's arguments do not go together with this loss; empty where they do."""
        args = self.args
        if args.label_smoothing_factor:
            return (
                f"label_smoothing_factor={args.label_smoothing_factor} smooths labels, which a divergence from a teacher "
                "does not have; set it to 0"
            )
        if self.compute_loss_func is not None:
            return "compute_loss_func would be ignored; pass the loss as objective="
        if getattr(getattr(self.model, "config", None), "output_router_logits", False):
            return (
                "output_router_logits=True adds the router's balance loss to the model's own loss, which is not computed "
                "here; set it to False in the student's configuration"
            )
        if args.n_gpu > 1:
            return "torch.nn.DataParallel is not supported; start one process for each GPU with `accelerate launch`"
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled):
            return "sequence and context parallelism cut a text between a token and its label; use data parallelism"
        return ""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss; with `return_outputs` also the model's outputs without a loss, from a forward pass of their own."""
        loss = distillation_loss(model, self.teacher, inputs, num_items=num_items_in_batch, **self.distillation)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the count is that of all ranks, and their gradients are averaged
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(
                **{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, logits, labels): the mean over the batch's counted tokens; logits only where a metric wants them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs.get("labels")

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """The Trainer's count, of the labels that the loss reads: where documents are packed, without their first ones."""
        if batch_samples and "labels" in batch_samples[0]:
            # shifted back, since the Trainer leaves out the first position where the model's own loss would
            batch_samples = [{"labels": F.pad(targets_of(one), (1, 0), value=IGNORED)} for one in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)
