"""What a run imports and finds out about the machine, done once: the fork server of tests/forked.py imports this module.

The garbage collector passes over all of it from then on. DeepSpeed collects for every engine that it makes, which takes
longer than the steps of a small run.
"""

import gc
import importlib
import importlib.util

MODULES = [
    "minillm.cli.main",
    "minillm.cli.train",
    "minillm.methods.gkd",
    "minillm.methods.kd",
    "minillm.methods.minillm",
    "minillm.methods.seqkd",
    "minillm.methods.sft",
    "minillm.reporting.console",
    "minillm.train.run",
    "minillm.train.stage",
    "rich.progress",
    "transformers.models.llama.modeling_llama",
    "rouge_score.rouge_scorer",
    "datasets",
    "matplotlib.figure",
    "tests.undrawn",
    "tests.unsynced",
]
OF_DEEPSPEED = [
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "minillm.engine.deepspeed",
]


def preload() -> None:
    installed = importlib.util.find_spec("deepspeed") is not None
    for name in MODULES + OF_DEEPSPEED * installed:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # a package that is not installed: the tests that need it say so
            if error.name.startswith(("minillm", "tests")):
                raise
    if installed:
        import deepspeed.ops

        # which operations it could compile here: it asks a compiler
        deepspeed.ops.__compatible_ops__  # noqa: B018
    gc.freeze()


preload()
