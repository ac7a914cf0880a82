"""Searches hyperparameters, confirms the best trials with fresh seeds and refits the winner.

Reads   params.yaml, experiments/searches/NAME.yaml, data/cohort/, the Optuna database
Writes  experiments/NAME/: best.yaml, trials.csv, importance.csv, confirmed.csv, figures/, and the
        model directory of the winner
Run     python -m pipeline.tune --search latent_kl [--workers 2]    (default: one per core)
        (a second call, on this or another machine, continues to the budget)
"""

import argparse
import os

from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError, StoppedError, exit_with
from pipeline.gem.common.processes import StopSignal, exclusive
from pipeline.gem.search.run import SearchSession
from pipeline.gem.search.search_config import read_search_config

WORKERS_VARIABLE = "GEM_WORKERS"


def main() -> None:
    arguments = parse_arguments()
    name, params = arguments.search, read_params()
    config = read_search_config(name, params)
    busy = (
        f"search {name}: {{process}} runs it here; wait for it, or stop it and run "
        f"`make tune SEARCH={name} WORKERS=2`"
    )
    with exclusive(f"tune-{name}", busy), StopSignal() as stop:
        try:
            SearchSession(name, config, params, arguments.workers).run(stop)
        except StoppedError as error:
            raise StoppedError(
                f"search {name}: {error}; to continue: make tune SEARCH={name}"
            ) from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", required=True, help="name of a file in experiments/searches")
    parser.add_argument(
        "--workers",
        default=os.environ.get(WORKERS_VARIABLE, ""),
        help=f"processes, with one thread each (default: {WORKERS_VARIABLE}, or one per core)",
    )
    arguments = parser.parse_args()
    if not arguments.workers:
        arguments.workers = None
        return arguments
    if not arguments.workers.isdecimal() or int(arguments.workers) < 1:
        raise InputError(
            f"workers (--workers, WORKERS of make) is {arguments.workers!r}; "
            "expected an integer of at least 1"
        )
    arguments.workers = int(arguments.workers)
    return arguments


if __name__ == "__main__":
    exit_with(main)
