"""`minillm train`: every stage of a configuration, with nothing lost in a folder that holds a run."""

import argparse
from pathlib import Path

from minillm import UserError
from minillm.cli.arguments import split
from minillm.distributed.launcher import launched_rank, launched_size


def run(arguments: argparse.Namespace) -> int:
    """Train what the files and overrides say.

    Raises ConfigErrors with every problem of the configuration, and UserError for a launcher of several processes
    without engine.type deepspeed, and for a folder that holds another run.
    """
    from minillm.config.loader.run_plan import load_run

    plan = load_run(*split(arguments.words))
    if launched_size() > 1 and any(stage.config.engine.type == "torch" for stage in plan.stages):
        raise UserError(
            "engine.type torch is one process; start it without a launcher of several, or set engine.type=deepspeed"
        )
    folder = plan.output_dir
    first = launched_rank() == 0  # the others come to a folder that it may have begun to fill
    if first and not arguments.resume and folder.is_dir() and not _nothing_trained(folder):
        raise UserError(
            f"output_dir {folder} is not empty: add --resume to go on from its newest checkpoint, or choose another "
            "folder with output_dir=..."
        )
    from minillm.reporting.console import Console
    from minillm.train.run import run as train

    with Console() as console:
        train(plan, resume=arguments.resume, console=console)
    return 0


def _nothing_trained(output_dir: Path) -> bool:
    """True for a folder that is empty, or holds only the files of a run that stopped before its first step or evaluation."""
    from minillm.storage.folder_lock import LOCK
    from minillm.storage.metrics_log import METRICS, SAMPLES

    names = {path.name for path in output_dir.iterdir()} - {LOCK}
    begun = {"config.yaml", "env.json", METRICS, SAMPLES}
    return not names or names == begun and (output_dir / METRICS).stat().st_size == 0
