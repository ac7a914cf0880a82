"""Trains the default GEM under MLflow.

Reads   params.yaml: model, train, tracking; data/cohort/
Writes  experiments/default/: model.pt, seeds/, history.csv, report.json, figures/learning.png
Run     python -m pipeline.train     (about a minute on the default cohort)
"""

import os
from pathlib import Path

from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import StoppedError, exit_with
from pipeline.gem.common.exclusive import alone
from pipeline.gem.common.processes import StopSignal, end_with_parent
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.tracking import mlflow_client, runs
from pipeline.gem.tracking.training_run import COHORT, log_context, train_into
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import choose_device

OUTPUT = Path("experiments/default")


def main() -> None:
    params = read_params()
    with (
        alone(
            "train",
            f"{OUTPUT} is being trained here by process {{process}}; wait for it, or stop it",
        ),
        StopSignal() as interruption,
    ):
        if "DVC_STAGE" in os.environ:
            end_with_parent()
        try:
            train(params, interruption)
        except StoppedError as stopped:
            raise StoppedError(
                f"train: {stopped}; what it has learnt is kept; go on with: make"
            ) from None


def train(params: Params, interruption: StopSignal) -> None:
    device = choose_device(params.train)
    cohort = Cohort(COHORT)
    data = TrainingData.load(cohort, device, params.model.counted)
    params = data.resolve_latent_sizes(params)
    sizes = " + ".join(
        f"{size} {group}" for group, size in params.model.latent.model_dump().items()
    )
    print(
        f"train: {len(data.train.expression):,} samples x {len(data.genes):,} genes on {device}, judged on {data.selection_split or 'nothing'}; {sizes} latents"
    )
    mlflow_client.connect(params.tracking.experiment)
    with runs.run("default", "train", killed_by=(StoppedError,)) as run:
        log_context(run, params, cohort)
        train_into(OUTPUT, data, params, cohort, "train", run, interruption)


if __name__ == "__main__":
    exit_with(main)
