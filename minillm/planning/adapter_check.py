"""The check that adapters of every stage find the modules they are named for, before the first stage takes its hours."""

from torch._subclasses.fake_tensor import FakeTensorMode

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan
from minillm.models.adapter_targets import target_names
from minillm.planning.architectures import Architectures
from minillm.planning.sizes import build


def check_targets(plan: RunPlan) -> None:
    """Look for the names of student.lora.target_modules in the architectures that are known without loading weights.

    Raises UserError, which names the stage, as target_names does.
    """
    architectures = Architectures(plan)
    for stage in plan.stages:
        student = stage.config.student
        untrained = "student" not in stage.config.method.needs().trains
        if untrained or student.lora is None or isinstance(student.lora.target_modules, str):
            continue
        try:
            architecture = architectures.student(stage)
            with FakeTensorMode():
                model = build(architecture, student.dtype, student.attn_implementation)
        except UserError:  # such as a hub name that is not here: its stage will find out when it loads the model
            continue
        try:
            target_names(model, student.lora.target_modules)
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from None
