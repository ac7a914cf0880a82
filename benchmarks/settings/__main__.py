"""Which settings predict held-out conditions better than the defaults, on real and simulated data?

Reads   FOLDER: .h5ad files, each with a YAML of the same name (docs/real_cohorts.md); params.yaml;
        a YAML of settings: name to changes of params.yaml
Writes  experiments/settings/NAME/: folds.csv, comparisons.csv, table.md, figure.png; finished folds
        to .gem/settings/; runs to MLflow
Run     python -m benchmarks.settings FOLDER [COHORT ...] [--settings FILE] [--only SETTING ...]
"""

import logging
from pathlib import Path

import pandas as pd

from benchmarks.cohorts.command_line import check_options, cohort_parser, read_tasks
from benchmarks.cohorts.declarations import with_settings
from benchmarks.settings.comparison import DEFAULT, cohort_scores, compare, markdown
from benchmarks.settings.figure import draw
from benchmarks.settings.inner_run import run_settings
from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import InputError, did_you_mean, exit_with
from pipeline.gem.common.files import write_atomically, write_table
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.runs import FIT_SECTIONS, Run

log = logging.getLogger(__name__)

OUTPUT = Path("experiments/settings")
SETTINGS = Path(__file__).parent / "one_at_a_time.yaml"
FOLDS, GENES = 2, 2000
STAGE = "settings"  # tag of the runs in MLflow


def main() -> None:
    parser = cohort_parser(__doc__, "one_at_a_time", "of a cohort at most (%(default)s)")
    parser.set_defaults(folds=FOLDS)
    parser.add_argument("--settings", type=Path, default=SETTINGS, metavar="FILE")
    parser.add_argument("--only", action="append", metavar="SETTING", help="of the file")
    parser.add_argument(
        "--genes", type=int, default=GENES, help="of a cohort, at random (%(default)s); 0: all"
    )
    options = parser.parse_args()
    check_options(options, genes=0)
    params = read_params()
    settings = read_settings(options.settings, options.only, params)
    tasks = read_tasks(options, params)
    folds = run_settings(tasks, settings, options.workers, options.genes or None)
    scales = {task.name: task.scale for task in tasks}
    comparisons = compare(folds, scales)
    folder = OUTPUT / options.name
    write_table(folder / "folds.csv", folds)
    write_table(folder / "comparisons.csv", comparisons)
    text = markdown(comparisons)
    write_atomically(folder / "table.md", text.encode("utf-8"))
    draw(comparisons, folder / "figure.png")
    mlflow_client.connect(params.tracking.experiment)
    track(cohort_scores(folds, scales), settings, params, options.name)
    print(text)
    log.info("settings: tables and figure in %s", folder)


def track(scores: pd.DataFrame, settings: dict[str, dict], params: Params, benchmark: str) -> None:
    """A run per setting, with the scores of each cohort. `scores`: of `cohort_scores`."""
    for setting, changes in settings.items():
        own = scores[scores["setting"] == setting]
        with Run.open(f"{benchmark}/{setting}", STAGE) as run:
            run.log_params(params.override(changes).flat(*FIT_SECTIONS))
            run.set_tags({"setting": setting, "benchmark": benchmark})
            run.log_metrics(
                {
                    f"{row.predictor}/{row.cohort}/{score}": getattr(row, score)
                    for row in own.itertuples()
                    for score in ("mse", "pearson")
                }
            )


def read_settings(path: Path, only: list[str] | None, params: Params) -> dict[str, dict]:
    """Name to changes of `params`, the defaults first. InputError names what is no setting of the
    file, and every change that `params` does not allow or that is not of a fit: other folds could
    not be paired."""
    found = yaml_file.read(path).values
    if not isinstance(found, dict) or not all(isinstance(item, dict) for item in found.values()):
        raise InputError(f"{path}: expected names of settings, each with KEY: VALUE")
    if DEFAULT in found:
        raise InputError(f"{path}: {DEFAULT} is what all settings are compared with; rename it")
    problems = [
        f"--only {name}: not in {path}{did_you_mean(name, found)}"
        for name in only or ()
        if name not in found
    ]
    settings = {name: found[name] for name in only or found if name in found}
    for name, changes in settings.items():
        problems += [
            f"{path}: {name}: {key}: expected a key of {' or '.join(FIT_SECTIONS)}"
            for key in changes
            if str(key).partition(".")[0] not in FIT_SECTIONS
        ]
        try:
            with_settings(params, changes, f"{path}: {name}")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return {DEFAULT: {}} | settings


if __name__ == "__main__":
    exit_with(main)
