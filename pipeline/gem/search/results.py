"""What a search found, as files and as the summary of its run: best.yaml, trials.csv, importance.csv, confirmed.csv, figures/."""

from pathlib import Path

import pandas as pd

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import GROUPS, set_dotted
from pipeline.gem.common.files import write_atomically
from pipeline.gem.search import figures
from pipeline.gem.search.confirmation import Decision
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import Choice, SearchConfig
from pipeline.gem.tracking import runs


def write_answers(
    output: Path, search: Search, decision: Decision | None, confirmed: pd.DataFrame | None
) -> None:
    """The winner in the shape of params.yaml, and the tables and figures behind it. Without a decision the baseline is the answer."""
    question = search.question
    values = decision.values if decision else question.baseline_values
    said = (
        decision.verdict
        if decision
        else "the baseline: this cohort has no validation split to judge a trial by"
    )
    best = yaml_file.dump(set_dotted({}, {name: values[name] for name in question.space}))
    write_atomically(output / "best.yaml", f"# {said}\n{best}".encode())
    trials, importance = search.trials_table(), search.importance_table()
    names = [objective.metric for objective in question.objectives]
    confirmed = pd.DataFrame(columns=["trial", "seed", *names]) if confirmed is None else confirmed
    for name, table in (("trials", trials), ("importance", importance), ("confirmed", confirmed)):
        write_atomically(output / f"{name}.csv", table.to_csv(index=False).encode())
    draw(output / "figures", question, trials, importance, confirmed)


def draw(
    folder: Path,
    question: SearchConfig,
    trials: pd.DataFrame,
    importance: pd.DataFrame,
    confirmed: pd.DataFrame,
) -> None:
    objective, several = question.objectives[0].metric, len(question.objectives) > 1
    if several:
        figures.pareto(trials, [one.metric for one in question.objectives], folder / "pareto.png")
        trials, importance = (
            trials.assign(value=trials[objective]),
            importance[importance["objective"] == objective],
        )
    logarithmic = {name: getattr(space, "log", False) for name, space in question.space.items()}
    upwards = question.objectives[0].direction == "maximize"
    figures.history(trials, objective, folder / "history.png", upwards)
    figures.slices(trials, logarithmic, objective, folder / "slices.png")
    figures.contours(
        trials, pairs_to_draw(question, importance), logarithmic, objective, folder / "contours.png"
    )
    figures.importance(importance, folder / "importance.png")
    figures.confirmed(confirmed, objective, folder / "confirmed.png")


def pairs_to_draw(question: SearchConfig, importance: pd.DataFrame) -> list[tuple[str, str]]:
    """Latent size against KL weight of each group where both are searched; else the two numeric keys that matter most."""
    pairs = [(f"model.latent.{group}", f"train.kl_weight.{group}") for group in GROUPS]
    searched = [pair for pair in pairs if set(pair) <= set(question.space)]
    numeric = [
        name for name in importance["parameter"] if not isinstance(question.space[name], Choice)
    ]
    return searched or [tuple(numeric[:2])] * (len(numeric) > 1)


def summarise(parent: runs.Run, output: Path, search: Search, decision: Decision | None) -> None:
    """What a reader of the parent run wants to know without opening a child."""
    question = search.question
    spent, spared = search.epochs()
    parent.metrics(
        {f"trials/{state}": number for state, number in search.counts().items()}
        | {"epochs/spent": spent, "epochs/spared": spared}
    )
    importance = search.importance_table()
    if len(question.objectives) > 1:
        importance = importance[importance["objective"] == question.objectives[0].metric]
    for method in ("ped_anova", "fanova"):
        parent.metrics(
            {
                f"importance_{method}/{name}": value
                for name, value in zip(importance["parameter"], importance[method], strict=True)
            }
        )
    for position, objective in enumerate(question.objectives):
        values = [trial.values[position] for trial in search.complete]
        if values:
            parent.metrics(
                {
                    f"best/{objective.metric}": max(values)
                    if objective.direction == "maximize"
                    else min(values)
                }
            )
    tags = {"study": search.name}
    if decision:
        tags |= {"best.trial": decision.trial, "verdict": decision.verdict} | {
            f"best.{name}": value for name, value in decision.values.items()
        }
        parent.metrics(
            {
                "confirmed/mean": decision.mean,
                "confirmed/deviation": decision.deviation,
                "confirmed/difference": decision.difference,
            }
        )
    parent.tags(tags)
    parent.artifacts(
        [
            output / f"{name}"
            for name in ("best.yaml", "trials.csv", "importance.csv", "confirmed.csv")
        ]
    )
    parent.artifacts(sorted((output / "figures").glob("*.png")), "figures")
