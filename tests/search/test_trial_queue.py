"""Interrupted trials: none is lost, none counts twice. The workers are real processes."""

import os
import signal

import optuna
import pytest
from support.searches import open_search, points, run, score

from pipeline.gem.common.errors import StoppedError

KILLED = -signal.SIGKILL


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_returned_trial_is_run_again_with_the_same_parameters_and_counts_once(params):
    attempts = []

    def evaluate(trial):
        attempts.append((trial.number, trial.values))
        if trial.number == 2:
            raise StoppedError("by SIGTERM")
        return score(trial.values)

    with pytest.raises(StoppedError):
        run(open_search(params), 5, evaluate)
    assert len(open_search(params).finished) == 2
    search = run(open_search(params), 5, evaluate)
    assert search.counts() == {"complete": 5, "pruned": 0, "failed": 0}
    assert attempts[3] == (3, attempts[2][1]), "the returned trial comes first"
    assert [trial.number for trial in search.finished] == [0, 1, 3, 4, 5]
    assert len(set(points(search))) == 5


def test_the_trial_of_a_killed_worker_is_run_again_and_its_mlflow_run_is_closed(params, tmp_path):
    if (child := os.fork()) == 0:

        def evaluate(trial):
            if trial.number == 1:
                trial.set_attributes(mlflow_run="run-of-the-killed-worker")
                (tmp_path / "values").write_text(str(sorted(trial.values.items())))
                os.kill(os.getpid(), signal.SIGKILL)
            return score(trial.values)

        run(open_search(params), 4, evaluate)
    assert exit_code(child) == KILLED
    lost = []
    search = open_search(params, on_lost=lost.append)
    states = [trial.state for trial in search.queue.active_trials]
    assert states == [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING]
    run(search, 4)
    assert lost == ["run-of-the-killed-worker"]
    assert len(search.finished) == 4 and search.counts()["complete"] == 4
    assert str(sorted(search.finished[1].params.items())) == (tmp_path / "values").read_text()
    assert list((tmp_path / ".gem" / "workers").iterdir()) == []


def test_a_point_whose_suggestion_was_interrupted_is_suggested_anew(params):
    search = run(open_search(params), 1)
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = search.queue.study.ask()
    trial.suggest_float("train.kl_weight.technical", 0.01, 4.0, log=True)
    run(search, 2)
    assert len(search.finished) == 2 and len(search.finished[1].params) == 2


def test_an_interrupted_baseline_is_still_the_baseline(params):
    search = open_search(params)
    with pytest.warns(UserWarning, match="Heartbeat"):
        search.queue.study.ask()
    (trial,) = run(open_search(params), 1).finished
    assert trial.number == 1 and trial.params == search.baseline


def test_a_worker_of_another_machine_counts_as_dead_without_a_heartbeat(params, monkeypatch):
    monkeypatch.setenv("GEM_HEARTBEAT_SECONDS", "1")
    search = open_search(params)
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = search.queue.study.ask()
    trial.set_user_attr("worker", "on-another-machine")
    search.storage.storage.record_heartbeat(trial._trial_id)
    run(search, 2)
    assert len(search.finished) == 2 and search.finished[0].number > 0


def test_a_point_on_which_four_workers_died_has_failed(params):
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                run(open_search(params), 1, lambda trial: os.kill(os.getpid(), signal.SIGKILL))
            finally:
                os._exit(1)
        assert exit_code(child) == KILLED
    search = run(open_search(params), 1)
    assert search.counts() == {"complete": 0, "pruned": 0, "failed": 1}
    assert search.queue.failure_reasons() == ["its worker died 4 times"]


def test_no_trial_starts_after_the_deadline(params):
    assert run(open_search(params), 5, deadline=0.0).finished == []
