"""A model directory: model.pt, seeds/, history.csv, report.json, figures/learning.png; and the run that fills it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from pipeline.gem import figures, provenance, tracking
from pipeline.gem.checkpoint import Checkpoint
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import GROUPS, Params
from pipeline.gem.interruption import Interruption
from pipeline.gem.progress import duration
from pipeline.gem.registration import register
from pipeline.gem.seeds import fit_seeds
from pipeline.gem.storage import sha256, write_atomically, write_json
from pipeline.gem.training import Epoch, Fit
from pipeline.gem.training_data import TrainingData

COHORT = Path("data/cohort")
MODEL_PARAMETERS = ("model", "train")  # the sections that describe a fit, with the same names in every run


def log_context(run: tracking.Run, params: Params, cohort: Cohort) -> None:
    """What every fit's run carries: flat parameters and the data's hash."""
    run.params(params.flat(*MODEL_PARAMETERS))
    run.dataset("cohort", provenance.data_digest(str(COHORT), cohort.visible_sha256), "training")


def reporter(run: tracking.Run, params: Params, label: str, interruption: Interruption, quiet: bool) -> Callable[[int, Epoch], None]:
    """Says every epoch of every seed (losses, the choice score, time left) unless `quiet`, and records those of the first."""
    several = len(params.train.seeds) > 1

    def report(seed: int, epoch: Epoch) -> None:
        if seed == params.train.seeds[0]:
            with interruption.deferred():
                run.metrics(epoch.metrics(), step=epoch.epoch)
        if quiet:
            return
        score = epoch.validation_predictive_log_likelihood
        shown = "no validation split" if score is None else f"validation log-likelihood {score:9.1f} nats, mse {epoch.validation_mse:.4f}"
        left = duration((epoch.epochs - epoch.epoch) * epoch.seconds)
        who = f"{label}, seed {seed}" if several else label
        print(f"{who}: epoch {epoch.epoch:3d}/{epoch.epochs}  loss {epoch.loss:9.1f}  {shown}  {left} left", flush=True)

    return report


def train_into(
    directory: Path,
    data: TrainingData,
    params: Params,
    cohort: Cohort,
    label: str,
    run: tracking.Run,
    interruption: Interruption,
    anew: bool = True,
) -> None:
    """Fits one model per seed, writes the model directory, completes its run, and registers the model.

    StoppedError where the process is told to stop while it fits: called again it goes on. What has been fitted is written, and told
    the tracker after that. Unless `anew`, a fit that has come to its end before is taken as it is.
    """
    if data.choice_split is None:
        print(f"{label}: this cohort has no validation split: all epochs are trained, none is chosen")
    checkpoints = {seed: Checkpoint.of(params, cohort.visible_sha256, seed) for seed in params.train.seeds}
    if anew:
        for checkpoint in checkpoints.values():
            checkpoint.forget()
    trained_before = _trained_before(label, list(checkpoints.values()))
    with interruption.allowed():
        fits = fit_seeds(data, params, cohort.folder, reporter(run, params, label, interruption, trained_before), checkpoints)
    write_model_directory(directory, fits, params)
    for checkpoint in checkpoints.values():
        checkpoint.end()
    run.tags({tracking.MODEL_TAG: sha256(directory / "model.pt"), "choice_split": data.choice_split or "none"})
    run.metrics(best_metrics(fits[0]))
    run.artifacts([directory / "history.csv", directory / "report.json"])
    run.artifacts([directory / "figures" / "learning.png"], "figures")
    best = fits[0].best
    print(f"{label}: best epoch {best.epoch} of {len(fits[0].history)}, model in {directory / 'model.pt'}", flush=True)
    register(directory, fits[0], params, cohort, label, run.id)


def _trained_before(label: str, checkpoints: list[Checkpoint]) -> bool:
    """Whether there is nothing left to train; says what is there."""
    if any(checkpoint.path.exists() for checkpoint in checkpoints):
        print(f"{label}: goes on after the last epoch of a training that was stopped; what it had told is told again")
        return False
    if not all(checkpoint.ended.exists() for checkpoint in checkpoints):
        return False
    print(f"{label}: trained before, with the same settings, data and code: not trained again ({checkpoints[0].ended})")
    return True


def best_metrics(finished: Fit) -> dict[str, float]:
    """The chosen epoch's figures under their own names, so that a table of runs can sort by them."""
    return {f"best/{name.split('/', 1)[1]}": value for name, value in finished.best.metrics().items() if name.startswith("validation/")}


def write_model_directory(directory: Path, fits: list[Fit], params: Params) -> None:
    """Nothing here depends on the clock: the same fit writes the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / "seeds", ignore_errors=True)
    (directory / "seeds").mkdir()
    fits[0].gem.save(directory / "model.pt")
    first, *others = params.train.seeds
    write_json(directory / "seeds" / "seeds.json", {"model.pt": first, "others": others})
    for seed, finished in zip(others, fits[1:], strict=True):
        finished.gem.save(directory / "seeds" / f"{seed}.pt")
    history = pd.DataFrame(
        {"seed": seed, "epoch": epoch.epoch, **{name: value for name, value in epoch.metrics().items() if name != "train/seconds"}}
        for seed, finished in zip(params.train.seeds, fits, strict=True)
        for epoch in finished.history
    )
    write_atomically(directory / "history.csv", history.to_csv(index=False).encode())
    write_json(directory / "report.json", _report(fits))
    figures.learning_curves(history, directory / "figures" / "learning.png")


def _report(fits: list[Fit]) -> dict:
    """The first seed's chosen epoch, and where several seeds were trained the spread of the choice score."""
    first = fits[0]
    report = {
        "choice_split": first.choice_split,
        "best_epoch": first.best.epoch,
        "epochs": len(first.history),
        "validation": {name.removeprefix("best/"): value for name, value in best_metrics(first).items()},
        "kl": {group: getattr(first.best, f"kl_{group}") for group in GROUPS},
    }
    scores = [finished.best.validation_predictive_log_likelihood for finished in fits]
    if len(fits) > 1 and None not in scores:
        report["seeds"] = {"predictive_log_likelihood": {"lowest": min(scores), "mean": sum(scores) / len(scores), "highest": max(scores)}}
    return report
