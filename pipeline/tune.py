"""Searches for better settings and refits the winner: one question, experiments/<study>.yaml.

Reads   params.yaml (the searched keys aside), experiments/<study>.yaml, data/cohort/, the Optuna storage
Writes  experiments/<study>/: best.yaml, trials.csv, importance.csv, figures/, and a model directory of the winner
Run     python -m pipeline.tune --study latent_kl     (a second call goes on to the budget, tune.trials)
"""

import argparse
import math
import time
from pathlib import Path

from pipeline.gem import figures, tracking, yamlfile
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import Params, read_params, set_dotted
from pipeline.gem.errors import exit_with
from pipeline.gem.experiment import COHORT, log_context, train_into
from pipeline.gem.progress import duration
from pipeline.gem.question import FOLDER, Question, read_question
from pipeline.gem.search import Asked, Pruned, Search
from pipeline.gem.storage import write_atomically
from pipeline.gem.training import Epoch, TrainingData, choose_device, fit


def main() -> None:
    study = arguments().study
    params = read_params()
    question = read_question(study, params)
    # Searched keys come from the question alone: promoting a winner does not ask anew.
    params = params.override(question.baseline_values)
    device = choose_device(params.train)
    cohort = Cohort(COHORT)
    data = TrainingData.load(cohort, device, params.model.counted)
    search = Search(study, question, params, cohort.visible_sha256)
    announce(study, search, params.tune.trials)
    tracking.connect(params.tracking.experiment)
    resume = search.run_id if search.run_id and tracking.exists(search.run_id) else None
    with tracking.run(study, "tune", resume=resume) as parent:
        search.run_id = parent.id
        if not resume:
            parent.dataset("cohort", tracking.data_digest(str(COHORT), cohort.visible_sha256), "training")
            parent.params({f"search.{name}": str(space.model_dump(exclude={'type'})) for name, space in question.space.items()})
        if data.validation is None:
            print(f"{study}: this cohort has no validation split to judge a trial by: nothing is searched, the baseline is the answer")
        else:
            search.run(params.tune.trials, trial_evaluator(study, question, data, params, cohort, parent), Teller(params.tune.trials))
        output = FOLDER / study
        write_answers(output, question, search)
        summarise(parent, output, search)
        winner = params.override(search.best_values())
        with tracking.run(f"{study} winner", "tune", parent=parent.id) as run:
            log_context(run, winner, cohort)
            run.params(log10_twins(question, search.best_values()))
            train_into(output, data, winner, cohort, f"{study} winner", run)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="name of a file in experiments/, without .yaml")
    return parser.parse_args()


def announce(study: str, search: Search, budget: int) -> None:
    done = len(search.finished)
    if search.is_new and search.others:
        print(f"{study}: the question or the cohort changed: a new study, {search.name} (earlier ones stay in the storage)")
    print(f"{study}: {search.question.question} {done} of {budget} trials are there", flush=True)


def trial_evaluator(study: str, question: Question, data: TrainingData, params: Params, cohort: Cohort, parent: tracking.Run):
    """One trial: the same fit as train, at the question's epochs, in a child run."""
    sign = 1 if question.objective.direction == "maximize" else -1

    def value_of(epoch: Epoch) -> float:
        return getattr(epoch, f"validation_{question.objective.metric}")

    def evaluate(asked: Asked) -> float:
        tried = params.override(asked.values | {"train.epochs": question.epochs})
        with tracking.run(f"{study} trial {asked.number}", "tune", parent=parent.id, killed_by=(Pruned,)) as run:
            asked.note_run(run.id)
            log_context(run, tried, cohort)
            run.params(log10_twins(question, asked.values) | {"trial": asked.number})

            def on_epoch(epoch: Epoch) -> None:
                run.metrics(epoch.metrics(), step=epoch.epoch)
                asked.report(value_of(epoch), epoch.epoch)

            finished = fit(data, tried, params.train.seeds[0], on_epoch)
            value = sign * max(sign * value_of(epoch) for epoch in finished.history)
            run.metrics({f"best/{question.objective.metric}": value})
            return value

    return evaluate


def log10_twins(question: Question, values: dict[str, object]) -> dict[str, float]:
    """MLflow's axes are linear: a log-scaled parameter is recorded a second time as its logarithm."""
    return {f"log10.{name}": math.log10(values[name]) for name, space in question.space.items() if getattr(space, "log", False)}


class Teller:
    """One line per finished trial: its value, the best so far, time left."""

    def __init__(self, budget: int):
        self.budget, self.started, self.told = budget, time.monotonic(), 0

    def __call__(self, search: Search, trial) -> None:
        self.told += 1
        done = len(search.finished)
        left = (time.monotonic() - self.started) / self.told * max(self.budget - done, 0)
        best = f"best {search.study.best_value:.4f} (trial {search.study.best_trial.number})" if search.complete else "none complete"
        ended = f"{trial.state.name.lower()} after {len(trial.intermediate_values)} epochs"
        value = "" if trial.value is None else f", {trial.value:.4f}"
        print(f"tune: trial {trial.number} {ended}{value}; {best}; {done} of {self.budget}, {duration(left)} left", flush=True)


def write_answers(output: Path, question: Question, search: Search) -> None:
    """best.yaml in the shape of params.yaml, and the tables and figures behind it."""
    best = set_dotted({}, {name: search.best_values()[name] for name in question.space})
    write_atomically(output / "best.yaml", yamlfile.dump(best).encode())
    trials, importance = search.trials_table(), search.importance_table()
    trials.to_csv(output / "trials.csv", index=False)
    importance.to_csv(output / "importance.csv", index=False)
    objective = question.objective.metric
    figures.search_history(trials, objective, output / "figures" / "history.png")
    logarithmic = {name: getattr(space, "log", False) for name, space in question.space.items()}
    figures.search_slices(trials, logarithmic, objective, output / "figures" / "slices.png")
    figures.search_importance(importance, output / "figures" / "importance.png")


def summarise(parent: tracking.Run, output: Path, search: Search) -> None:
    """What a reader of the parent run wants to know without opening a child."""
    counts = search.trials_table()["state"].value_counts().to_dict()
    parent.metrics({f"trials/{state}": counts.get(state, 0) for state in ("complete", "pruned", "failed")})
    parent.tags({f"best.{name}": value for name, value in search.best_values().items()} | {"study": search.name})
    if search.complete:
        parent.metrics({f"best/{search.question.objective.metric}": search.study.best_value})
        parent.tags({"best.trial": search.study.best_trial.number})
    parent.artifacts([output / name for name in ("best.yaml", "trials.csv", "importance.csv")])
    parent.artifacts(sorted((output / "figures").glob("*.png")), "figures")


if __name__ == "__main__":
    exit_with(main)
