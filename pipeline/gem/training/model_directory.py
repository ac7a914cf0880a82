"""A model directory: model.safetensors, seeds/, history.csv, report.json, figures/learning.png."""

from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import GROUPS, Params
from pipeline.gem.common.files import folder_replacement, write_json, write_table
from pipeline.gem.model.model_file import MODEL_FILE, Seeds
from pipeline.gem.training.learning_curves import learning_curves
from pipeline.gem.training.trainer import FitResult


def best_metrics(fit: FitResult) -> dict[str, float]:
    """The validation metrics of the best epoch as best/...: a table of runs can sort by them."""
    return {
        f"best/{name.removeprefix('validation/')}": value
        for name, value in fit.best.metrics().items()
        if name.startswith("validation/")
    }


def write_model_directory(
    directory: Path, fits: list[FitResult], params: Params, data_sha256: str
) -> None:
    """Writes the fits of `train.seeds`, in this order. Equal fits give equal bytes."""
    first, *others = params.train.seeds
    with folder_replacement(directory / "seeds") as seeds:
        listing = Seeds(first=first, others=tuple(others)).model_dump(mode="json")
        write_json(seeds / "seeds.json", listing)
        for seed, fit in zip(others, fits[1:], strict=True):
            fit.gem.save(seeds / f"{seed}.safetensors")
        fits[0].gem.save(directory / MODEL_FILE)
    history = _history(params.train.seeds, fits)
    write_table(directory / "history.csv", history)
    write_json(directory / "report.json", _report(fits, params, data_sha256))
    learning_curves(history, directory / "figures" / "learning.png")


def _history(seeds: tuple[int, ...], fits: list[FitResult]) -> pd.DataFrame:
    """A row per seed and epoch; without times, which would differ between equal fits."""
    rows = []
    for seed, fit in zip(seeds, fits, strict=True):
        for epoch in fit.history:
            rows.append({"seed": seed, "epoch": epoch.epoch} | epoch.metrics())
    return pd.DataFrame(rows).drop(columns="train/seconds")


def _report(fits: list[FitResult], params: Params, data_sha256: str) -> dict:
    """The first seed's best epoch, what its scores depend on, and their range over seeds."""
    fit = fits[0]
    report = {
        "selection_split": fit.selection_split,
        "data_sha256": data_sha256,
        "observation": params.model.observation,
        "network_weight": fit.gem.network_weight,
        "predictive_draws": params.train.predictive_draws,
        "best_epoch": fit.best.epoch,
        "epochs": len(fit.history),
        "refit_epochs": len(fit.refit.history) if fit.refit else 0,
        "validation": {
            name.removeprefix("best/"): value for name, value in best_metrics(fit).items()
        },
        "mixed_model": fit.gem.mixed.mean_variances() if fit.gem.mixed else None,
        "kl": {group: getattr(fit.best, f"kl_{group}") for group in GROUPS},
    }
    scores = [fit.best.validation_predictive_log_likelihood for fit in fits]
    if len(fits) > 1 and None not in scores:
        mean = sum(scores) / len(scores)
        summary = {"lowest": min(scores), "mean": mean, "highest": max(scores)}
        report["seeds"] = {"predictive_log_likelihood": summary}
    return report
