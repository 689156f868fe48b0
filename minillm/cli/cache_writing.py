"""`minillm cache`: what a teacher says of a configuration's data, written to disk, where it may grow."""

import argparse

from minillm import UserError
from minillm.cli.arguments import split
from minillm.config.loader.run_plan import load_run
from minillm.distributed.launcher import launched_size


def run(arguments: argparse.Namespace) -> int:
    """Write the caches that the stages of method cache say; a file without stages is taken for one, whatever its method.

    What is there stays, and what is new since is added. Raises ConfigErrors with every problem of the configuration, and
    UserError for several stages of which none writes a cache.
    """
    files, overrides = split(arguments.words)
    first = load_run(files, [word for word in overrides if not word.startswith("method.")])
    stages = [stage for stage in first.stages if stage.config.method.needs().result == "rows"]
    if not stages and len(first.stages) > 1:
        names = ", ".join(stage.name for stage in first.stages)
        raise UserError(
            f"none of the stages {names} writes a cache; add one with `method: {{name: cache}}` and the teacher and data that "
            "are meant"
        )
    plan = load_run(files, overrides if stages else ["method.name=cache", *overrides])
    if launched_size() > 1 and any(stage.config.engine.type == "torch" for stage in plan.stages):
        raise UserError(
            "engine.type torch is one process; start it without a launcher of several, or set engine.type=deepspeed"
        )
    from minillm.reporting.console import Console
    from minillm.train.caching import write_caches

    with Console() as console:
        for folder in write_caches(plan, console=console):
            console.note(f"the cached teacher is in {folder}: teacher: {{type: cached, path: {folder}}}")
    return 0
