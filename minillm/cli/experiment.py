"""`minillm experiment`: all arms of an experiment, their evaluation, and one table of the results."""

import argparse
import sys
from pathlib import Path

from minillm import UserError
from minillm.cli.failures import STOPPED
from minillm.cli.outputs import require_folder
from minillm.distributed.launcher import launched_size

# Options and the one beside which each does nothing.
WITHOUT_EFFECT = {"list": ("report", "seed"), "report": ("seed", "arms")}


def run(arguments: argparse.Namespace) -> int:
    """Do what is left of an experiment and write its report; without a name, list the experiments that have one.

    Raises ConfigErrors with every problem of the experiment's file, and UserError for options that do not go together,
    and for seeds and arms that it does not have.
    """
    _check_options(arguments)
    from minillm.experiment.experiment_file import chosen_arms, chosen_seeds, load_experiment, titles

    if not arguments.words:
        lines = [f"{name:20} {title}" for name, title in titles().items()]
        print("\n".join(lines) or "there are no experiments in configs/experiments here; name a .yaml file")
        return 0
    from minillm.config.paths import expand
    from minillm.experiment.experiment_report import write_experiment_report
    from minillm.experiment.jobs import commands
    from minillm.experiment.runner import run_experiment, train_together

    require_folder("--output", arguments.output)
    experiment = load_experiment(arguments.words[0], arguments.words[1:])
    seeds = chosen_seeds(experiment, arguments.seeds)
    arms = chosen_arms(experiment, arguments.arms)
    output = arguments.output or Path(expand(experiment.config.output_dir))
    if arguments.seed is not None and arguments.seed not in seeds:
        has = ", ".join(map(str, seeds))
        raise UserError(f"--seed {arguments.seed}: the report is about the seeds {has}; name one of them")
    own = seeds if arguments.seed is None else [arguments.seed]
    if arguments.list:
        print("\n".join(commands(experiment, output, seeds, arms)))
        return 0
    if launched_size() > 1:
        train_together(experiment, output, seeds=own, arms=arms)
        return 0
    failures = []
    if arguments.report and not output.is_dir():
        raise UserError(f"{output}: no such folder; nothing of this experiment has been run there")
    if not arguments.report:
        failures = run_experiment(experiment, output, seeds=own, arms=arms, report_seeds=seeds)
    print(write_experiment_report(experiment, output, seeds))
    for failure in failures:
        print(f"minillm: {failure}", file=sys.stderr)
    return STOPPED if failures else 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that would do nothing beside the others."""
    given = {name for name in ("list", "report") if getattr(arguments, name)}
    given |= {name for name in ("seeds", "seed", "arms", "output") if getattr(arguments, name) is not None}
    if not arguments.words and given - {"list"}:
        names = ", ".join(f"--{name}" for name in sorted(given - {"list"}))
        raise UserError(f"{names}: name the experiment as well; `minillm experiment` lists them")
    for name, others in WITHOUT_EFFECT.items():
        idle = [other for other in others if other in given]
        if name in given and idle:
            raise UserError(f"--{idle[0]} has no effect beside --{name}; leave one of them out")
