"""Which settings predict held-out conditions better than the defaults, on real and simulated data?

Reads   FOLDER: .h5ad files, each with a YAML of the same name (docs/real_cohorts.md); params.yaml;
        a YAML of settings: name to changes of params.yaml
Writes  experiments/settings/NAME/: folds.csv, comparisons.csv, table.md, figure.png; finished folds
        to .gem/settings/; runs to MLflow
Run     python -m benchmarks.settings FOLDER [COHORT ...] [--settings FILE] [--only SETTING ...]
"""

import argparse
import logging
from pathlib import Path

import pandas as pd

from benchmarks.cohorts.declarations import cohort_names, read_task, with_settings
from benchmarks.settings.comparison import DEFAULT, cohort_scores, compare, markdown
from benchmarks.settings.figure import draw
from benchmarks.settings.inner_run import run_settings
from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import GemError, InputError, did_you_mean, exit_with
from pipeline.gem.common.files import sha256_of, write_atomically, write_table
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.runs import Run

log = logging.getLogger(__name__)

OUTPUT = Path("experiments/settings")
SETTINGS = Path(__file__).parent / "one_at_a_time.yaml"
FOLDS, GENES = 2, 2000
STAGE = "settings"  # tag of the runs in MLflow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument(
        "cohorts", metavar="COHORT", nargs="*", help="default: all, and the simulated ones"
    )
    parser.add_argument("--settings", type=Path, default=SETTINGS, metavar="FILE")
    parser.add_argument("--only", action="append", metavar="SETTING", help="of the file")
    parser.add_argument("--name", default="one_at_a_time", help="of the output folder")
    parser.add_argument("--folds", type=int, default=FOLDS, help="of a cohort (%(default)s)")
    parser.add_argument(
        "--genes", type=int, default=GENES, help="of a cohort, at random (%(default)s); 0: all"
    )
    parser.add_argument("--workers", type=int, default=2, help="fits at a time (%(default)s)")
    options = parser.parse_args()
    check_numbers(options)
    params = read_params()
    settings = read_settings(options.settings, options.only)
    tasks, problems = {}, []
    for setting, changes in ({DEFAULT: {}} | settings).items():
        try:
            changed = with_settings(params, changes)
            tasks[setting] = [
                read_task(name, options.folder, changed, options.folds)
                for name in options.cohorts or cohort_names(options.folder)
            ]
        except GemError as error:
            problems += [f"{setting}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(*problems)
    folds = run_settings(tasks, options.workers, options.genes or None)
    scales = {task.name: task.scale for task in tasks[DEFAULT]}
    comparisons = compare(folds, scales)
    folder = OUTPUT / options.name
    write_table(folder / "folds.csv", folds)
    write_table(folder / "comparisons.csv", comparisons)
    text = markdown(comparisons)
    write_atomically(folder / "table.md", text.encode("utf-8"))
    draw(comparisons, folder / "figure.png")
    mlflow_client.connect(params.tracking.experiment)
    track(cohort_scores(folds, scales), {DEFAULT: {}} | settings, options.name)
    print(text)
    log.info("settings: tables and figure in %s", folder)


def check_numbers(options: argparse.Namespace) -> None:
    """InputError lists every option that no run can have."""
    problems = [
        f"--{key} {number}: expected {least} or more"
        for key, least in (("folds", 1), ("genes", 0), ("workers", 1))
        if (number := getattr(options, key)) < least
    ]
    if Path(options.name).name != options.name:
        problems.append(f"--name {options.name}: expected the name of a folder, without /")
    if problems:
        raise InputError(*problems)


def track(scores: pd.DataFrame, settings: dict[str, dict], name: str) -> None:
    """A run per setting, with the scores of each cohort. `scores`: of `cohort_scores`."""
    for setting, changes in settings.items():
        own = scores[scores["setting"] == setting]
        with Run.open(f"{name}/{setting}", STAGE, identity=sha256_of(name, setting)) as run:
            run.log_params(changes)
            run.set_tags({"setting": setting, "benchmark": name})
            run.log_metrics(
                {
                    f"{row.predictor}/{row.cohort}/{score}": getattr(row, score)
                    for row in own.itertuples()
                    for score in ("mse", "pearson")
                }
            )


def read_settings(path: Path, only: list[str] | None) -> dict[str, dict]:
    """Name to changes of params.yaml. InputError names what is no setting of the file."""
    found = yaml_file.read(path).values
    if not isinstance(found, dict) or not all(isinstance(item, dict) for item in found.values()):
        raise InputError(f"{path}: expected names of settings, each with KEY: VALUE")
    if DEFAULT in found:
        raise InputError(f"{path}: {DEFAULT} is what all settings are compared with; rename it")
    if unknown := [name for name in only or () if name not in found]:
        raise InputError(
            *(f"--only {name}: not in {path}{did_you_mean(name, found)}" for name in unknown)
        )
    return {name: found[name] for name in only or found}


if __name__ == "__main__":
    exit_with(main)
