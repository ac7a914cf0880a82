"""Searches for better settings, confirms the best with fresh seeds and refits the winner: one question, experiments/<study>.yaml.

Reads   params.yaml (the searched keys aside), experiments/<study>.yaml, data/cohort/, the Optuna storage
Writes  experiments/<study>/: best.yaml, trials.csv, importance.csv, confirmed.csv, figures/, and a model directory of the winner
Run     python -m pipeline.tune --search latent_kl [--workers 2]     (a second call, here or elsewhere, goes on to the budget)
"""

import argparse
import os
import time
from pathlib import Path

import torch

from pipeline.gem.common import provenance
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import InputError, StoppedError, exit_with
from pipeline.gem.common.exclusive import alone
from pipeline.gem.common.files import sha256_of
from pipeline.gem.common.processes import StopSignal, end_with_parent
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.search.confirmation import Confirmation, Decision
from pipeline.gem.search.objective import Trials, log10_twins
from pipeline.gem.search.results import summarise, write_answers
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import EXPERIMENTS, SearchConfig, read_search_config
from pipeline.gem.search.trial_queue import reason_of
from pipeline.gem.search.workers import Workers
from pipeline.gem.tracking import mlflow_client, runs
from pipeline.gem.tracking.training_run import COHORT, MODEL_PARAMETERS, log_context, train_into
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import choose_device

WORKERS_VARIABLE = "GEM_WORKERS"


def main() -> None:
    chosen = arguments()
    params = read_params()
    question = read_search_config(chosen.search, params)
    # Searched keys come from the question alone: promoting a winner does not ask anew.
    params = params.override(question.baseline_values)
    if chosen.workers > 1:
        # Threads that run before a fork would be missing after it.
        torch.set_num_threads(1)
        # The first optimiser imports for a second: once, before the workers are forked.
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    busy = f"{chosen.search} is being searched here by process {{process}}; wait for it, or stop it and run `make tune WORKERS=2`"
    with alone(f"tune-{chosen.search}", busy), StopSignal() as interruption:
        if "DVC_STAGE" in os.environ:
            end_with_parent()
        call = SearchSession(chosen.search, question, params, chosen.workers)
        try:
            call.search(interruption) if chosen.workers == 1 else call.search_by_workers(
                interruption
            )
        except StoppedError as stopped:
            raise StoppedError(
                f"{chosen.search}: {stopped}; go on with: make tune SEARCH={chosen.search}"
            ) from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--search", required=True, help="name of a file in experiments/, without .yaml"
    )
    several = f"processes of this machine, one thread each (default: {WORKERS_VARIABLE}, else one with train.threads)"
    parser.add_argument("--workers", default=os.environ.get(WORKERS_VARIABLE, "1"), help=several)
    chosen = parser.parse_args()
    if not chosen.workers.isdecimal() or int(chosen.workers) < 1:
        raise InputError(
            f"workers (--workers, WORKERS of make) is {chosen.workers!r}; expected a whole number, 1 or more"
        )
    chosen.workers = int(chosen.workers)
    return chosen


class SearchSession:
    """One call of the stage: a cohort loaded once, a search to take part in, answers to write."""

    def __init__(self, study: str, question: SearchConfig, params: Params, workers: int):
        device = choose_device(params.train)
        if workers > 1 and device.type != "cpu":
            raise InputError(
                "params.yaml: train.device: several workers share one machine's processor cores; set cpu, or run without WORKERS"
            )
        self.study, self.question, self.number = study, question, workers
        self.cohort = Cohort(COHORT)
        self.data = TrainingData.load(self.cohort, device, counted(question, params))
        self.params = self.data.resolve_latent_sizes(params)
        self.visible = self.cohort.train_validation_sha256
        self.digest = provenance.data_digest(str(COHORT), self.visible)
        self.trials = question.trials or params.tune.trials

    def open(self) -> Search:
        """The study, and the tracker that records it."""
        mlflow_client.connect(self.params.tracking.experiment)
        return Search(self.study, self.question, self.params, self.visible)

    def search(self, interruption: StopSignal) -> None:
        search = self.open()
        self.print_status(search)
        with runs.run(
            self.study, "tune", resume=self.parent(search), killed_by=(StoppedError,)
        ) as parent:
            self.run_trials(search, parent.id, interruption)
            self.finish(search, parent, interruption)

    def search_by_workers(self, interruption: StopSignal) -> None:
        """Nothing is opened before the workers have been forked."""
        with Workers(self.number, self.work) as workers:
            search = self.open()
            self.print_status(search)
            with runs.run(
                self.study, "tune", resume=self.parent(search), killed_by=(StoppedError,)
            ) as parent:
                workers.wait(interruption)
                self.finish(search, parent, interruption)

    def work(self, interruption: StopSignal) -> None:
        search = self.open()
        self.run_trials(search, self.parent(search), interruption)

    def parent(self, search: Search) -> str:
        def create() -> str:
            with runs.run(self.study, "tune") as run:
                run.dataset("cohort", self.digest, "training")
                run.params(
                    {
                        f"search.{name}": str(space.model_dump(exclude={"type"}))
                        for name, space in self.question.space.items()
                    }
                )
            return run.id

        return search.parent_run(runs.exists, create)

    def print_status(self, search: Search) -> None:
        if search.is_new and search.others:
            print(
                f"{self.study}: the question or the cohort changed: a new study, {search.name} (earlier ones stay in the storage)"
            )
        budget = search.budget(self.trials)
        if budget < self.trials:
            print(
                f"{self.study}: the space has {budget} points: no more than {budget} trials are run"
            )
        print(
            f"{self.study}: {self.question.question} {len(search.finished)} of {budget} trials are there, in {search.storage.address}",
            flush=True,
        )

    def run_trials(self, search: Search, parent: str, interruption: StopSignal) -> None:
        if self.data.validation is None:
            print(
                f"{self.study}: this cohort has no validation split to judge a trial by: nothing is searched, the baseline is the answer"
            )
            return
        # Workers have one thread each; the winner, which is fitted when they have ended, those of params.yaml.
        params = self.params.override({"train.threads": 1}) if self.number > 1 else self.params
        trials = Trials(
            self.study, self.question, params, self.data, self.digest, parent, interruption
        )
        # Loading and opening are no part of it: a slow machine has its trials too.
        deadline = (
            None
            if self.question.time_limit is None
            else time.monotonic() + 60 * self.question.time_limit
        )
        search.run(
            self.trials,
            trials.search,
            interruption,
            TrialPrinter(search.budget(self.trials), search),
            runs.close,
            deadline,
        )
        if not search.finished:
            return
        search.require_usable()
        confirmation = self.confirmation(search)
        candidates = confirmation.candidates()
        confirmation.run(
            lambda asked: trials.confirm(asked, candidates, confirmation.epochs),
            interruption,
            tell_confirmed,
            runs.close,
        )

    def confirmation(self, search: Search) -> Confirmation:
        return Confirmation(
            search, self.question.confirmation(search.budget(self.trials)), self.params.train.epochs
        )

    def finish(self, search: Search, parent: runs.Run, interruption: StopSignal) -> None:
        """Writes the answers and the winner's model, and completes the study's run."""
        output, decision, confirmed = EXPERIMENTS / self.study, None, None
        if self.data.validation is not None:
            if not search.finished:
                raise StoppedError(
                    f"the time limit of {self.question.time_limit:g} minutes came before the first trial had ended"
                )
            if len(search.finished) < (budget := search.budget(self.trials)):
                reached = f"the time limit of {self.question.time_limit:g} minutes was reached with {len(search.finished)} of {budget} trials"
                print(
                    f"{self.study}: {reached}; these answer for now, and python -m pipeline.tune --search {self.study} goes on",
                    flush=True,
                )
            search.require_usable()
            confirmation = self.confirmation(search)
            decision, confirmed = confirmation.decide(), confirmation.table()
            print(f"{self.study}: {decision.verdict}")
        write_answers(output, search, decision, confirmed)
        summarise(parent, output, search, decision)
        self.refit(output, search, decision, parent, interruption)

    def refit(
        self,
        output: Path,
        search: Search,
        decision: Decision | None,
        parent: runs.Run,
        interruption: StopSignal,
    ) -> None:
        values = decision.values if decision else self.question.baseline_values
        winner = self.params.override(values)
        name = f"{self.study} winner"

        def create() -> str:
            with runs.run(name, "tune", parent=parent.id) as run:
                log_context(run, winner, self.cohort)
                run.params(log10_twins(self.question, values))
            return run.id

        # Every machine fits the winner for its folder, and the tracker has it once.
        same = sha256_of(winner.flat(*MODEL_PARAMETERS), len(search.finished))[:12]
        once = search.run_once(f"winner_{same}", runs.exists, create)
        with runs.run(name, "tune", resume=once, killed_by=(StoppedError,)) as run:
            train_into(output, self.data, winner, self.cohort, name, run, interruption, anew=False)


def counted(question: SearchConfig, params: Params) -> bool:
    """Whether any trial observes counts."""
    asked = question.space.get("model.observation")
    return any(
        params.override({"model.observation": name}).model.counted
        for name in (asked.choices if asked else [params.model.observation])
    )


class TrialPrinter:
    """One line per finished trial: its value, the best so far, time left."""

    def __init__(self, budget: int, search: Search):
        self.budget, self.started, self.before = budget, time.monotonic(), len(search.finished)

    def __call__(self, search: Search, trial) -> None:
        done = len(search.finished)
        left = (
            (time.monotonic() - self.started)
            / max(1, done - self.before)
            * max(self.budget - done, 0)
        )
        ranked = search.ranked()
        best = (
            f"best {shown(ranked[0].values)} (trial {ranked[0].number})"
            if ranked
            else "none complete"
        )
        ended = f"{trial.state.name.lower()} after {search.epochs_of(trial)} epochs"
        value = (
            f", {shown(trial.values)}"
            if trial.values
            else f" ({reason_of(trial)})"
            if reason_of(trial)
            else ""
        )
        print(
            f"tune: trial {trial.number} {ended}{value}; {best}; {done} of {self.budget}, {duration(left)} left",
            flush=True,
        )


def tell_confirmed(trial) -> None:
    ended = shown(trial.values) if trial.values else reason_of(trial)
    print(
        f"tune: trial {trial.params['trial']} confirmed with seed {trial.params['seed']}: {ended}",
        flush=True,
    )


def shown(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    exit_with(main)
