"""Trains the default GEM under MLflow.

Reads   params.yaml: model, train, tracking; data/cohort/
Writes  experiments/default/: model.safetensors, seeds/, history.csv, report.json,
        figures/learning.png
Run     python -m pipeline.train     (about a minute on the default cohort)
"""

import logging
from pathlib import Path

from pipeline.gem.common.capacity import require, training_needs
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import StoppedError, exit_with
from pipeline.gem.common.processes import StopSignal, exclusive
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.runs import COHORT, Run, log_settings
from pipeline.gem.tracking.training_run import TrainingJob
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.expression import memory_for_counts
from pipeline.gem.training.multi_seed import processes
from pipeline.gem.training.trainer import choose_device

log = logging.getLogger(__name__)

OUTPUT = Path("experiments/default")


def main() -> None:
    params = read_params()
    busy = f"{OUTPUT} is being trained by {{process}}; wait for it, or stop it"
    with exclusive("train", busy), StopSignal() as stop_signal:
        try:
            train(params, stop_signal)
        except StoppedError as stopped:
            raise StoppedError(
                f"train: {stopped}; the finished epochs are saved; resume with: make"
            ) from None


def train(params: Params, stop_signal: StopSignal) -> None:
    device = choose_device(params.train)
    mlflow_client.connect(params.tracking.experiment)
    cohort = Cohort(COHORT)
    require(training_needs(cohort.manifest), params)
    memory = memory_for_counts(params.train.memory_share, device, processes(params.train))
    data = TrainingData.load(cohort, device, params.model.uses_counts, memory)
    params = data.resolve_latent_sizes(params)
    samples, genes = len(data.train), len(data.genes)
    sizes = params.model.latent.model_dump().items()
    latents = ", ".join(f"{size} {group}" for group, size in sizes)
    log.info("train: %d samples x %d genes on %s; latents: %s", samples, genes, device, latents)
    log.info("train: selection split %s", data.selection_split or "none")
    job = TrainingJob(OUTPUT, "train", cohort, data, params)
    with Run.open("default", "train", identity=job.identity, killed_by=(StoppedError,)) as run:
        log_settings(run, params, cohort)
        job.train(run, stop_signal)


if __name__ == "__main__":
    exit_with(main)
