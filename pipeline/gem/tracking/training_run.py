"""Fits models under an MLflow run and writes their model directory."""

from collections.abc import Callable
from pathlib import Path

from pipeline.gem.common import provenance
from pipeline.gem.common.config import Params
from pipeline.gem.common.files import sha256
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.tracking import runs
from pipeline.gem.tracking.model_registry import register
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.model_directory import best_metrics, write_model_directory
from pipeline.gem.training.multi_seed import fit_seeds
from pipeline.gem.training.trainer import EpochMetrics

COHORT = Path("data/cohort")
MODEL_PARAMETERS = (
    "model",
    "train",
)  # the sections that describe a fit, with the same names in every run


def log_context(run: runs.Run, params: Params, cohort: Cohort) -> None:
    """What every fit's run carries: flat parameters and the data's hash."""
    run.params(params.flat(*MODEL_PARAMETERS))
    run.dataset(
        "cohort", provenance.data_digest(str(COHORT), cohort.train_validation_sha256), "training"
    )


def reporter(
    run: runs.Run, params: Params, label: str, interruption: StopSignal, quiet: bool
) -> Callable[[int, EpochMetrics], None]:
    """Says every epoch of every seed (losses, the choice score, time left) unless `quiet`, and records those of the first."""
    several = len(params.train.seeds) > 1

    def report(seed: int, epoch: EpochMetrics) -> None:
        if seed == params.train.seeds[0]:
            with interruption.deferred():
                run.metrics(epoch.metrics(), step=epoch.epoch)
        if quiet:
            return
        score = epoch.validation_predictive_log_likelihood
        shown = (
            "no validation split"
            if score is None
            else f"validation log-likelihood {score:9.1f} nats, mse {epoch.validation_mse:.4f}"
        )
        left = duration((epoch.epochs - epoch.epoch) * epoch.seconds)
        who = f"{label}, seed {seed}" if several else label
        print(
            f"{who}: epoch {epoch.epoch:3d}/{epoch.epochs}  loss {epoch.loss:9.1f}  {shown}  {left} left",
            flush=True,
        )

    return report


def train_into(
    directory: Path,
    data: TrainingData,
    params: Params,
    cohort: Cohort,
    label: str,
    run: runs.Run,
    interruption: StopSignal,
    anew: bool = True,
) -> None:
    """Fits one model per seed, writes the model directory, completes its run, and registers the model.

    StoppedError where the process is told to stop while it fits: called again it goes on. What has been fitted is written, and told
    the tracker after that. Unless `anew`, a fit that has come to its end before is taken as it is.
    """
    if data.selection_split is None:
        print(
            f"{label}: this cohort has no validation split: all epochs are trained, none is chosen"
        )
    checkpoints = {
        seed: Checkpoint.of(params, cohort.train_validation_sha256, seed)
        for seed in params.train.seeds
    }
    if anew:
        for checkpoint in checkpoints.values():
            checkpoint.forget()
    trained_before = _trained_before(label, list(checkpoints.values()))
    with interruption.allowed():
        fits = fit_seeds(
            data,
            params,
            cohort.folder,
            reporter(run, params, label, interruption, trained_before),
            checkpoints,
        )
    write_model_directory(directory, fits, params)
    for checkpoint in checkpoints.values():
        checkpoint.end()
    run.tags(
        {
            runs.MODEL_TAG: sha256(directory / "model.pt"),
            "selection_split": data.selection_split or "none",
        }
    )
    run.metrics(best_metrics(fits[0]))
    run.artifacts([directory / "history.csv", directory / "report.json"])
    run.artifacts([directory / "figures" / "learning.png"], "figures")
    best = fits[0].best
    print(
        f"{label}: best epoch {best.epoch} of {len(fits[0].history)}, model in {directory / 'model.pt'}",
        flush=True,
    )
    register(directory, fits[0], params, cohort, label, run.id)


def _trained_before(label: str, checkpoints: list[Checkpoint]) -> bool:
    """Whether there is nothing left to train; says what is there."""
    if any(checkpoint.path.exists() for checkpoint in checkpoints):
        print(
            f"{label}: goes on after the last epoch of a training that was stopped; what it had told is told again"
        )
        return False
    if not all(checkpoint.ended.exists() for checkpoint in checkpoints):
        return False
    print(
        f"{label}: trained before, with the same settings, data and code: not trained again ({checkpoints[0].ended})"
    )
    return True
