"""The results of a search: best.yaml, tables and figures, and the summary in MLflow."""

from pathlib import Path

import pandas as pd

from pipeline.gem.common import yaml_file
from pipeline.gem.common.files import write_atomically, write_table
from pipeline.gem.common.yaml_file import set_dotted
from pipeline.gem.search import figures
from pipeline.gem.search.confirmation import Confirmation, Decision
from pipeline.gem.search.search import Search
from pipeline.gem.tracking.runs import Run

TABLES = ("trials", "importance", "confirmed")


def write_results(
    folder: Path, search: Search, confirmation: Confirmation | None, decision: Decision | None
) -> None:
    """Writes the winner in the shape of params.yaml, the tables and the figures. Without a
    decision (no validation split) the winner is the baseline."""
    config = search.config
    values, summary = config.baseline_values, "the baseline: the cohort has no validation split"
    confirmed = pd.DataFrame(columns=["trial", "seed", *config.metrics])
    if decision:
        values, summary, confirmed = decision.values, decision.summary, confirmation.table()
    best = yaml_file.dump(set_dotted({}, {name: values[name] for name in config.space}))
    write_atomically(folder / "best.yaml", f"# {summary}\n{best}".encode())
    tables = (search.trials_table(), search.importance_table(), confirmed)
    for name, table in zip(TABLES, tables, strict=True):
        write_table(folder / f"{name}.csv", table)
    figures.draw(folder / "figures", search, *tables)


def log_results(run: Run, folder: Path, search: Search, decision: Decision | None) -> None:
    """Logs a summary of the search, and the files of `folder`, to the parent run."""
    trained, pruned = search.epochs()
    metrics = {f"trials/{state}": number for state, number in search.counts().items()}
    metrics |= {"epochs/trained": trained, "epochs/pruned": pruned}
    importance = search.importance_table()
    if "objective" in importance:
        importance = importance[importance["objective"] == search.config.primary.metric]
    for method in ("ped_anova", "fanova"):
        for name, value in zip(importance["parameter"], importance[method], strict=True):
            metrics[f"importance_{method}/{name}"] = value
    for index, objective in enumerate(search.config.objective):
        values = [trial.values[index] for trial in search.complete]
        if values:
            best = max(values) if objective.maximize else min(values)
            metrics[f"best/{objective.metric}"] = best
    tags = {"search": search.name}
    if decision:
        tags |= {"best.trial": decision.trial, "result": decision.summary}
        tags |= {f"best.{name}": value for name, value in decision.values.items()}
        metrics |= {
            "confirmed/mean": decision.mean,
            "confirmed/deviation": decision.deviation,
            "confirmed/difference": decision.difference,
        }
    run.log_metrics(metrics)
    run.set_tags(tags)
    run.log_artifacts([folder / "best.yaml", *(folder / f"{name}.csv" for name in TABLES)])
    run.log_artifacts(sorted((folder / "figures").glob("*.png")), "figures")
