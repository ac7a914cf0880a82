"""Fits models under an MLflow run and writes their model directory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.gem.common.config import Params
from pipeline.gem.common.files import sha256, sha256_of
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.model.model_file import MODEL_FILE
from pipeline.gem.tracking.runs import MODEL_TAG, Run
from pipeline.gem.training.blend import blend_with_mixed_model
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.model_directory import best_metrics, write_model_directory
from pipeline.gem.training.multi_seed import fit_seeds
from pipeline.gem.training.trainer import EpochMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """A model directory to be trained: one model per seed of `params`.

    `reuse_finished`: a fit that was finished before with the same settings, data and code is
    loaded instead of trained.
    """

    directory: Path
    label: str  # of log messages
    cohort: Cohort
    data: TrainingData
    params: Params
    reuse_finished: bool = False

    @property
    def identity(self) -> str:
        """Of the fits: a killed training is continued in its MLflow run."""
        checkpoints = self._checkpoints_by_seed().values()
        return sha256_of(self.label, [checkpoint.path.name for checkpoint in checkpoints])

    def train(self, run: Run, stop_signal: StopSignal) -> None:
        """Fits the models, writes the model directory and logs it to `run`.

        StoppedError if the process receives a stop signal during a fit; the next call resumes.
        """
        if self.data.selection_split is None:
            log.info("%s: no validation split: training all epochs, using the last", self.label)
        checkpoints = self._checkpoints()
        cached = self._report_checkpoints(list(checkpoints.values()))
        on_epoch = self._epoch_logger(run, logging.DEBUG if cached else logging.INFO)
        cohort, check = self.cohort, stop_signal.check
        fits = fit_seeds(self.data, self.params, cohort, on_epoch, checkpoints, check)
        fits = blend_with_mixed_model(fits, self.data, self.cohort)
        write_model_directory(
            self.directory, fits, self.params, self.cohort.train_validation_sha256
        )
        for checkpoint in checkpoints.values():
            checkpoint.finish()
        best, model = fits[0].best, self.directory / MODEL_FILE
        split = self.data.selection_split or "none"
        run.set_tags({MODEL_TAG: sha256(model), "selection_split": split})
        run.log_metrics(best_metrics(fits[0]))
        run.log_artifacts([self.directory / "history.csv", self.directory / "report.json"])
        run.log_artifacts([self.directory / "figures" / "learning.png"], "figures")
        epochs = len(fits[0].history)
        log.info("%s: best epoch %d of %d, model in %s", self.label, best.epoch, epochs, model)

    def help_to_train(self, stop_signal: StopSignal) -> None:
        """`train` of a rank other than 0: takes part in the fits and writes nothing."""
        cohort, check = self.cohort, stop_signal.check
        fit_seeds(
            self.data, self.params, cohort, lambda *_: None, self._checkpoints_by_seed(), check
        )

    def _checkpoints_by_seed(self) -> dict[int, Checkpoint]:
        data_sha256 = self.cohort.train_validation_sha256
        return {
            seed: Checkpoint.of(self.params, data_sha256, seed) for seed in self.params.train.seeds
        }

    def _checkpoints(self) -> dict[int, Checkpoint]:
        checkpoints = self._checkpoints_by_seed()
        if not self.reuse_finished:
            for checkpoint in checkpoints.values():
                checkpoint.discard_finished()
        return checkpoints

    def _report_checkpoints(self, checkpoints: list[Checkpoint]) -> bool:
        """Logs what the checkpoints hold; True if there is nothing left to train."""
        if any(checkpoint.path.exists() for checkpoint in checkpoints):
            epochs = ", ".join(str(checkpoint.epochs()) for checkpoint in checkpoints)
            message = "%s: resuming from epoch %s; earlier metrics are logged again"
            log.info(message, self.label, epochs)
            return False
        if not all(checkpoint.finished_path.exists() for checkpoint in checkpoints):
            return False
        log.info("%s: cached: identical settings, data and code; skipping training", self.label)
        return True

    def _epoch_logger(self, run: Run, level: int) -> Callable[[int, EpochMetrics], None]:
        """Logs every epoch of every seed at `level`, and the first seed's metrics to `run`."""
        seeds = self.params.train.seeds

        def on_epoch(seed: int, epoch: EpochMetrics) -> None:
            if seed == seeds[0]:
                run.log_metrics(epoch.metrics(), step=epoch.epoch)
            label = f"{self.label}, seed {seed}" if len(seeds) > 1 else self.label
            log.log(level, "%s: %s", label, _progress(epoch))

        return on_epoch


def _progress(epoch: EpochMetrics) -> str:
    score = epoch.validation_predictive_log_likelihood
    validation = "no validation split" if epoch.stage == "train" else "with validation samples"
    if score is not None:
        mse = epoch.validation_mse
        validation = f"validation log-likelihood {score:9.1f} nats, mse {mse:.4f}"
    left = duration((epoch.epochs - epoch.epoch) * epoch.seconds)
    name = "epoch" if epoch.stage == "train" else "refit"
    counter = f"{name} {epoch.epoch:3d}/{epoch.epochs}"
    return f"{counter}  loss {epoch.loss:9.1f}  {validation}  {left} left"
