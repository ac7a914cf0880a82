"""GEM and every simple predictor on real cohorts, one held-out condition at a time.

Reads   FOLDER: .h5ad files, each with a YAML of the same name (docs/real_cohorts.md); params.yaml
Writes  experiments/cohorts/NAME/: folds.csv, scores.csv, comparisons.csv, table.md, figure.png;
        finished folds to .gem/cohorts/; runs to MLflow
Run     python -m benchmarks.cohorts FOLDER [COHORT ...] [--set KEY=VALUE ...] [--name NAME]
"""

import logging
from pathlib import Path

from benchmarks.cohorts.command_line import check_options, cohort_parser, read_tasks
from benchmarks.cohorts.declarations import FOLDS, parse_settings, with_settings
from benchmarks.cohorts.figure import draw
from benchmarks.cohorts.run import run_cohorts
from benchmarks.cohorts.table import Comparison, markdown
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.common.files import write_atomically, write_table
from pipeline.gem.tracking import mlflow_client

log = logging.getLogger(__name__)

OUTPUT = Path("experiments/cohorts")


def main() -> None:
    parser = cohort_parser(__doc__, "default", f"of a cohort at most (its YAML, else {FOLDS})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    check_options(options)
    params = with_settings(read_params(), parse_settings(options.set))
    tasks = read_tasks(options, params)
    mlflow_client.connect(params.tracking.experiment)
    scores = run_cohorts(tasks, options.workers, options.name)
    scales = {task.name: task.scale for task in tasks}
    comparison = Comparison.of(scores, scales, params.evaluate.seed)
    folder = OUTPUT / options.name
    write_table(folder / "folds.csv", scores)
    write_table(folder / "scores.csv", comparison.scores)
    write_table(folder / "comparisons.csv", comparison.differences)
    text = markdown(comparison)
    write_atomically(folder / "table.md", text.encode("utf-8"))
    draw(comparison, folder / "figure.png")
    print(text)
    log.info("cohorts: tables and figure in %s", folder)


if __name__ == "__main__":
    exit_with(main)
