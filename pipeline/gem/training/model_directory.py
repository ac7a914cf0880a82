"""A model directory: model.pt, seeds/, history.csv, report.json, figures/learning.png."""

import shutil
from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import GROUPS, Params
from pipeline.gem.common.files import write_atomically, write_json
from pipeline.gem.training.learning_curves import learning_curves
from pipeline.gem.training.trainer import FitResult


def best_metrics(finished: FitResult) -> dict[str, float]:
    """The chosen epoch's figures under their own names, so that a table of runs can sort by them."""
    return {
        f"best/{name.split('/', 1)[1]}": value
        for name, value in finished.best.metrics().items()
        if name.startswith("validation/")
    }


def write_model_directory(directory: Path, fits: list[FitResult], params: Params) -> None:
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
        {
            "seed": seed,
            "epoch": epoch.epoch,
            **{name: value for name, value in epoch.metrics().items() if name != "train/seconds"},
        }
        for seed, finished in zip(params.train.seeds, fits, strict=True)
        for epoch in finished.history
    )
    write_atomically(directory / "history.csv", history.to_csv(index=False).encode())
    write_json(directory / "report.json", _report(fits))
    learning_curves(history, directory / "figures" / "learning.png")


def _report(fits: list[FitResult]) -> dict:
    """The first seed's chosen epoch, and where several seeds were trained the spread of the choice score."""
    first = fits[0]
    report = {
        "selection_split": first.selection_split,
        "best_epoch": first.best.epoch,
        "epochs": len(first.history),
        "validation": {
            name.removeprefix("best/"): value for name, value in best_metrics(first).items()
        },
        "kl": {group: getattr(first.best, f"kl_{group}") for group in GROUPS},
    }
    scores = [finished.best.validation_predictive_log_likelihood for finished in fits]
    if len(fits) > 1 and None not in scores:
        report["seeds"] = {
            "predictive_log_likelihood": {
                "lowest": min(scores),
                "mean": sum(scores) / len(scores),
                "highest": max(scores),
            }
        }
    return report
