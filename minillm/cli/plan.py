"""`minillm plan`: memory and time of every stage, and changes where they do not fit."""

import argparse
import sys

from minillm.cli.arguments import split


def run(arguments: argparse.Namespace) -> int:
    """Plan what the files and overrides say, and print a table, or JSON with --json.

    Raises ConfigErrors with every problem of the configuration, and UserError as plan_run does.
    """
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.advice import advise
    from minillm.planning.planner import plan_run
    from minillm.planning.table import assumptions, render, to_json

    files, overrides = split(arguments.words)
    plan = load_run(files, overrides)
    planned = plan_run(plan, gpu=arguments.gpu, world_size=arguments.world_size)
    advice = advise(plan, planned, overrides)
    if arguments.json:
        print(to_json(planned, advice))
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(render(planned, advice), highlight=False)
    for line in assumptions():
        console.print(f"[dim]{line}[/dim]", highlight=False)
    return 0
