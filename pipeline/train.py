"""Trains the default GEM under MLflow.

Reads   params.yaml: model, train, tracking; data/cohort/
Writes  experiments/default/: model.safetensors, seeds/, history.csv, report.json,
        figures/learning.png
Run     python -m pipeline.train     (about a minute on the default cohort)
        torchrun --nproc-per-node 2 -m pipeline.train     (one model by two processes)
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
from pipeline.gem.training import distributed
from pipeline.gem.training.dataset import TrainingData, resolve_observation
from pipeline.gem.training.multi_seed import memory_of_each, processes_of

log = logging.getLogger(__name__)

OUTPUT = Path("experiments/default")


def main() -> None:
    if (number := distributed.ranks_to_start()) > 1:
        distributed.launch("pipeline.train", number)
        return
    with distributed.group(), StopSignal() as stop_signal:
        try:
            train(read_params(), stop_signal)
        except StoppedError as stopped:
            again = "make" if distributed.size() == 1 else "the same command"
            raise StoppedError(
                f"train: {stopped}; the finished epochs are saved; resume with: {again}"
            ) from None


def train(params: Params, stop_signal: StopSignal) -> None:
    if distributed.rank():
        prepare(params).help_to_train(stop_signal)
        return
    busy = f"{OUTPUT} is being trained by {{process}}; wait for it, or stop it"
    with exclusive("train", busy):
        mlflow_client.connect(params.tracking.experiment)
        job = prepare(params)
        killed_by = (StoppedError,)
        with Run.open("default", "train", identity=job.identity, killed_by=killed_by) as run:
            log_settings(run, job.params, job.cohort)
            job.train(run, stop_signal)


def prepare(params: Params) -> TrainingJob:
    """Loads the data; each rank does."""
    device = distributed.choose_device(params.train)
    cohort = Cohort(COHORT)
    processes = processes_of(params.train, device)
    require(training_needs(cohort.manifest, processes=processes), params)
    memory = memory_of_each(params.train, device)
    params = resolve_observation(params, cohort)
    data = TrainingData.load(cohort, device, params.model.uses_counts, memory)
    params = data.resolve(params)
    samples, genes = len(data.train), len(data.genes)
    sizes = params.model.latent.model_dump().items()
    latents = ", ".join(f"{size} {group}" for group, size in sizes)
    log.info("train: %d samples x %d genes on %s; latents: %s", samples, genes, device, latents)
    log.info("train: selection split %s", data.selection_split or "none")
    if distributed.size() > 1:
        log.info("train: by %d processes", distributed.size())
    return TrainingJob(OUTPUT, "train", cohort, data, params)


if __name__ == "__main__":
    exit_with(main)
