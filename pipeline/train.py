"""Trains the default GEM under MLflow.

Reads   params.yaml: model, train, tracking; data/cohort/
Writes  experiments/default/: model.pt, seeds/, history.csv, report.json, figures/learning.png
Run     python -m pipeline.train     (about a minute on the default cohort)
"""

from pathlib import Path

from pipeline.gem import tracking
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import read_params
from pipeline.gem.errors import exit_with
from pipeline.gem.experiment import COHORT, log_context, train_into
from pipeline.gem.training import choose_device
from pipeline.gem.training_data import TrainingData

OUTPUT = Path("experiments/default")


def main() -> None:
    params = read_params()
    device = choose_device(params.train)
    cohort = Cohort(COHORT)
    data = TrainingData.load(cohort, device, params.model.counted)
    print(f"train: {len(data.train.expression):,} samples x {len(data.genes):,} genes on {device}, judged on {data.choice_split or 'nothing'}")
    tracking.connect(params.tracking.experiment)
    with tracking.run("default", "train") as run:
        log_context(run, params, cohort)
        train_into(OUTPUT, data, params, cohort, "train", run)


if __name__ == "__main__":
    exit_with(main)
