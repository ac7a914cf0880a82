"""Interrupted trials: none is lost, none counts twice. The workers are real processes."""

import itertools
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy
from support.searches import KL, LATENT, NO_PRUNER, open_search, points, run, score, search_config

from pipeline.gem.common.errors import StoppedError

KILLED = -signal.SIGKILL


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def search_in_child(params, trials: int, evaluate=None, config=None, death: int = 0) -> int:
    """Runs more trials in another process and returns its exit code. The process dies after its
    write number `death` to the database."""
    if (child := os.fork()) == 0:
        try:
            search, commit = open_search(params, config), sqlalchemy.orm.Session.commit
            writes = itertools.count(1)

            def commit_or_die(session) -> None:
                commit(session)
                if next(writes) == death:
                    os.kill(os.getpid(), signal.SIGKILL)

            sqlalchemy.orm.Session.commit = commit_or_die
            run(search, len(search.finished) + trials, *([evaluate] if evaluate else []))
        finally:
            os._exit(1)
    return exit_code(child)


def test_a_returned_trial_is_run_again_under_its_number_and_counts_once(params):
    attempts = []

    def evaluate(trial):
        attempts.append((trial.number, trial.values))
        if len(attempts) == 3:
            raise StoppedError("by SIGTERM")
        return score(trial.values)

    with pytest.raises(StoppedError):
        run(open_search(params), 5, evaluate)
    assert len(open_search(params).finished) == 2
    search = run(open_search(params), 5, evaluate)
    assert search.counts() == {"complete": 5, "pruned": 0, "failed": 0}
    assert attempts[3] == attempts[2], "the returned trial comes first"
    assert [trial.number for trial in search.finished] == [0, 1, 2, 3, 4]
    assert len(set(points(search))) == 5


def test_a_resumed_trial_keeps_its_run_and_is_pruned_as_if_it_had_not_been_killed(params):
    def evaluate(trial, dies: bool):
        trial.set_attributes(mlflow_run=trial.run or f"run of {trial.number}")
        for epoch in (1, 2, 3, 4):
            trial.record_epochs(epoch, 4)
            trial.report(-1000.0 if epoch < 3 else -100.0 * trial.number, epoch)
            if dies and trial.number == 2 and epoch == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return -100.0 * trial.number

    config = search_config(pruner={"name": "median", "startup_trials": 2, "warmup_epochs": 3})
    dies = partial(evaluate, dies=True)
    assert search_in_child(params, 3, dies, config) == KILLED
    search = run(open_search(params, config), 3, partial(evaluate, dies=False))
    assert search.trials_table()["state"].tolist() == ["complete", "complete", "pruned"]
    assert search.trials_table()["epochs"].tolist() == [4, 4, 3]
    assert search.finished[2].user_attrs["mlflow_run"] == "run of 2"
    assert list(search.finished[2].intermediate_values.values()) == [-1000.0, -1000.0, -200.0]


@pytest.mark.parametrize("name", ["tpe", "cmaes", "qmc"])
def test_the_points_do_not_depend_on_deaths_at_any_moment_of_a_start(
    params, name, tmp_path, monkeypatch
):
    """The worker dies after one of the writes to the database that start and end a trial."""
    startup = {} if name == "qmc" else {"startup_trials": 2}
    config = search_config(sampler={"name": name, "seed": 1} | startup, pruner=NO_PRUNER)
    expected = points(run(open_search(params, config), 6))
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    for moment in (1, 2, 3, 5, 7):
        assert search_in_child(params, 1, config=config, death=moment) in (KILLED, 1)
    assert points(run(open_search(params, config), 6)) == expected


def test_an_interrupted_baseline_is_still_the_baseline(params):
    open_search(params).queue.study.ask()
    (trial,) = run(open_search(params), 1).finished
    assert trial.number == 0 and trial.params == trial.user_attrs["point"] == {LATENT: 4, KL: 1.0}


def test_a_worker_that_was_taken_for_dead_does_not_count_twice(params):
    """The server lost the connection of a worker. Another one runs its trial."""
    search = open_search(params)

    def evaluate(trial):
        if trial.number == 1:
            trial.set_attributes(worker="of a connection that the server lost")
            assert len(run(open_search(params), 3).finished) == 3
        return score(trial.values)

    run(search, 3, evaluate)
    assert [trial.number for trial in search.finished] == [0, 1, 2]
    assert search.counts()["complete"] == 3


@pytest.mark.parametrize(("progress", "failed"), [(0, 1), (1, 0)])
def test_a_point_on_which_four_workers_died_without_progress_has_failed(params, progress, failed):
    for attempt in range(4):

        def evaluate(trial, epochs=attempt * progress):
            trial.record_epochs(epochs, 9)
            os.kill(os.getpid(), signal.SIGKILL)

        assert search_in_child(params, 1, evaluate) == KILLED
    search = run(open_search(params), 1)
    assert search.counts() == {"complete": 1 - failed, "pruned": 0, "failed": failed}
    assert search.queue.failure_reasons() == ["its worker died 4 times"] * failed
    assert list((Path(".gem") / "optuna.db.workers").iterdir()) == []


def test_no_trial_starts_after_the_deadline(params):
    assert run(open_search(params), 5, deadline=0.0).finished == []
