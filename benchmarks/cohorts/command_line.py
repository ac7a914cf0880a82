"""What the commands over cohorts share: their arguments and checks, and the cohorts they name."""

import argparse
from pathlib import Path

from benchmarks.cohorts.declarations import CohortTask, cohort_names, read_task
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import GemError, InputError


def cohort_parser(description: str, name: str, folds: str) -> argparse.ArgumentParser:
    """FOLDER, COHORT ..., --name (`name` by default), --folds (`folds` is its help) and
    --workers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument(
        "cohorts", metavar="COHORT", nargs="*", help="default: all, and the simulated ones"
    )
    parser.add_argument("--name", default=name, help="of the run and its output folder")
    parser.add_argument("--folds", type=int, help=folds)
    parser.add_argument("--workers", type=int, default=2, help="folds at a time (%(default)s)")
    return parser


def check_options(options: argparse.Namespace, **least: int) -> None:
    """InputError lists every option below its `least` value, and a name that is no folder's."""
    problems = [
        f"--{key} {number}: expected {value} or more"
        for key, value in ({"folds": 1, "workers": 1} | least).items()
        if (number := getattr(options, key)) is not None and number < value
    ]
    if Path(options.name).name != options.name:
        problems.append(f"--name {options.name}: expected the name of a folder, without /")
    if problems:
        raise InputError(*problems)


def read_tasks(options: argparse.Namespace, params: Params) -> list[CohortTask]:
    """The cohorts of the command. InputError lists the problems of all."""
    tasks, problems = [], []
    for name in options.cohorts or cohort_names(options.folder):
        try:
            tasks.append(read_task(name, options.folder, params, options.folds))
        except GemError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return tasks
