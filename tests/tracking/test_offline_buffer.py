"""Outages of the tracking server, simulated on a local store: nothing is lost, nothing is logged
twice."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
from support.processes import free_port

from pipeline.gem.tracking import connection, mlflow_client, offline_buffer, runs
from pipeline.gem.tracking.connection import ServerDownError
from pipeline.gem.tracking.offline_buffer import BufferedRun
from pipeline.gem.tracking.runs import Run


class Server:
    """Fails every request while it is down."""

    is_up = True

    @contextmanager
    def outages(self, first_request: bool = False):
        if not self.is_up:
            raise ServerDownError("down")
        yield

    def recover(self) -> None:
        """The server is up again, and the next stage connects."""
        self.is_up = True
        mlflow_client.connect("gem")


@pytest.fixture
def server(store, monkeypatch) -> Server:
    server = Server()
    for module in (connection, mlflow_client):
        monkeypatch.setattr(module, "outages", server.outages)
    return server


def unsent() -> int:
    return len(offline_buffer.unsent_runs(connection.address()))


def logged_runs() -> dict[str, mlflow.entities.Run]:
    """By name, which no two runs share."""
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def curve(run: mlflow.entities.Run, metric: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def fail_once(monkeypatch, owner, name: str, after: bool) -> Callable:
    """Makes a function fail before or after its first real call."""
    function, calls = getattr(owner, name), []

    def failing(*arguments):
        calls.append(arguments)
        result = function(*arguments) if after or len(calls) > 1 else None
        if len(calls) == 1:
            raise ServerDownError("down")
        return result

    monkeypatch.setattr(owner, name, failing)


def test_runs_during_an_outage_are_logged_after_it(server, tmp_path):
    server.is_up = False
    note = tmp_path / "note.txt"
    note.write_text("before")
    with Run.open("parent", "tune") as parent:
        parent.log_params({"a": 1})
        parent.log_dataset("cohort", "f" * 32, "training")
        with Run.open("child", "tune", parent=parent.id) as child:
            child.log_metrics({"loss": 2.0}, step=1)
            child.set_tags({"label": "x"})
            child.log_artifacts([note], "notes")
        killed_by = {"killed_by": (KeyError,)}
        with pytest.raises(KeyError), Run.open("killed", "tune", parent=parent.id, **killed_by):
            raise KeyError
    note.write_text("after")
    with Run.resume(parent.id) as resumed:
        resumed.log_metrics({"loss": 1.0}, step=2)
    runs.log_results(child.id, {"test/mse": 0.5}, {"predictor": "gem"})
    assert runs.exists(parent.id) and unsent() == 3
    for _ in range(2):
        server.recover()
        assert unsent() == 0
    logged = logged_runs()
    statuses = {name: run.info.status for name, run in logged.items()}
    assert statuses == {"parent": "FINISHED", "child": "FINISHED", "killed": "KILLED"}
    parent_id = logged["parent"].info.run_id
    for name in ("child", "killed"):
        assert logged[name].data.tags["mlflow.parentRunId"] == parent_id
    assert logged["parent"].data.params == {"a": "1"}
    assert logged["parent"].inputs.dataset_inputs[0].dataset.digest == "f" * 32
    assert curve(logged["parent"], "loss") == [(2, 1.0)]
    assert logged["child"].data.metrics == {"loss": 2.0, "test/mse": 0.5}
    assert {"label": "x", "predictor": "gem"}.items() <= logged["child"].data.tags.items()
    assert logged["child"].info.start_time >= logged["parent"].info.start_time
    assert logged["child"].info.end_time <= logged["parent"].info.end_time
    uri = f"runs:/{logged['child'].info.run_id}/notes/note.txt"
    assert mlflow.artifacts.load_text(uri) == "before"
    # The key of a run stays valid.
    assert runs.exists(parent.id)
    runs.log_results(parent.id, {"test/mse": 0.25}, {})
    assert mlflow.get_run(parent_id).data.metrics["test/mse"] == 0.25


def test_an_outage_in_the_middle_of_a_run_loses_no_point_of_its_curves(server):
    with Run.open("default", "train") as run:
        for step in range(6):
            server.is_up = step not in (2, 3)
            run.log_metrics({"loss": float(step)}, step=step)
    logged = logged_runs()["default"]
    assert (logged.info.run_id, logged.info.status) == (run.id, "FINISHED")
    assert curve(logged, "loss") == [(step, float(step)) for step in range(6)]


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (mlflow_client, "create_run", True),  # a request whose answer was lost
        (mlflow_client, "send", True),
        (mlflow_client, "send", False),
    ],
)
def test_a_failed_request_is_repeated_without_duplicates(server, monkeypatch, owner, name, after):
    fail_once(monkeypatch, owner, name, after)
    with Run.open("default", "train") as run:
        run.log_metrics({"loss": 1.0}, step=1)
    server.recover()
    logged = logged_runs()["default"]
    assert logged.info.status == "FINISHED" and curve(logged, "loss") == [(1, 1.0)]


def test_a_sender_that_was_killed_causes_no_duplicates(server, monkeypatch):
    server.is_up = False
    with Run.open("default", "train") as run:
        run.log_metrics({"loss": 1.0}, step=1)
    with monkeypatch.context() as killed:
        killed.setattr(BufferedRun, "clear", lambda self: None)
        server.recover()
    assert unsent() == 1
    server.recover()
    assert unsent() == 0
    assert curve(logged_runs()["default"], "loss") == [(1, 1.0)]


def test_a_run_that_is_still_open_is_not_sent(server):
    server.is_up = False
    with Run.open("default", "train"):
        server.recover()
        assert unsent() == 1 and not logged_runs()
    server.recover()
    assert logged_runs()["default"].info.status == "FINISHED"


@pytest.mark.parametrize("is_up", [True, False])
def test_a_run_whose_process_was_killed_is_ended_and_then_continued(server, is_up):
    server.is_up = is_up
    for step in (2, 3, 4):
        run = Run.open("default", "train", identity="fit")
        # A resumed fit logs its earlier epochs again, with another duration.
        for epoch in range(1, step + 1):
            run.log_metrics({"loss": epoch, "seconds": epoch + step / 10}, step=epoch)
        run.log_metrics({"best": 0.5})
        run._buffered.release()  # as the end of the process does
        server.recover()
        assert logged_runs()["default"].info.status == "KILLED"
        server.is_up = is_up
    with Run.open("default", "train", identity="fit") as continued:
        continued.log_metrics({"best": 0.5})
    server.recover()
    logged = logged_runs()["default"]
    assert logged.info.status == "FINISHED" and unsent() == 0
    assert curve(logged, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert curve(logged, "seconds") == [(1, 1.2), (2, 2.2), (3, 3.3), (4, 4.4)]
    assert curve(logged, "best") == [(0, 0.5)]
    assert not list(Path(".gem/untracked").glob("*/*"))
    with Run.open("next", "train", identity="fit"):
        pass
    assert len(logged_runs()) == 2


def test_a_run_that_another_machine_has_ended_stays_as_it_ended(server):
    killed = Run.open("default", "train")
    killed._buffered.release()  # as the end of the process does
    mlflow.MlflowClient().set_terminated(killed.id, "FINISHED")
    server.recover()
    assert logged_runs()["default"].info.status == "FINISHED"
    assert not list(Path(".gem/untracked").glob("*/*"))


def test_a_child_waits_for_a_parent_that_another_machine_has_not_sent(server, monkeypatch):
    parent_key = offline_buffer.new_run_key()
    with Run.open("child", "tune", parent=parent_key) as child:
        pass
    server.recover()
    assert unsent() == 1 and runs.exists(child.id)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(runs, "new_run_key", lambda: parent_key)
        with Run.open("parent", "tune") as parent:
            pass
    server.recover()
    assert logged_runs()["child"].data.tags["mlflow.parentRunId"] == parent.id


def test_a_run_that_the_server_rejects_is_set_aside_and_does_not_stop_others(server, caplog):
    with Run.open("deleted", "train") as deleted:
        server.is_up = False
        deleted.log_metrics({"loss": 1.0})
    with Run.open("default", "train"):
        pass
    server.is_up = True
    mlflow.delete_run(deleted.id)
    server.recover()
    assert f"MLflow cannot take the buffered part of run {deleted.id}" in caplog.text
    assert set(logged_runs()) == {"default"}
    (rejected,) = offline_buffer.unsent_runs(connection.address())
    assert rejected.suffix == ".rejected"


def test_a_run_of_a_deleted_experiment_is_sent_when_it_is_restored(store, monkeypatch):
    with monkeypatch.context() as down:
        down.setattr(mlflow_client, "flush", BufferedRun.set_failed)
        with Run.open("default", "train"):
            pass
    client, number = mlflow.MlflowClient(), connection.experiment_id()
    client.delete_experiment(number)
    mlflow_client.send_saved()
    (folder,) = offline_buffer.unsent_runs(connection.address())
    assert not folder.suffix
    client.restore_experiment(number)
    mlflow_client.send_saved()
    assert set(logged_runs()) == {"default"} and not unsent()


@pytest.mark.parametrize(
    "content",
    ["[]", "7", "{}", "{", '{"run": 1, "start": 2, "status": 3, "complete": false, "update": 5}'],
)
def test_a_damaged_run_is_set_aside_under_a_name_of_its_own(store, caplog, content):
    for _ in range(2):
        file = BufferedRun(connection.address(), "damaged").folder / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text(content)
        assert unsent() >= 1
        mlflow_client.send_saved()
    folders = offline_buffer.unsent_runs(connection.address())
    assert [folder.suffix for folder in folders] == [".rejected"] * 2
    assert caplog.text.count("damaged cannot be read") == 2


def test_an_error_of_the_sender_is_no_damage_of_a_run(server, monkeypatch):
    server.is_up = False
    with Run.open("default", "train"):
        pass
    server.is_up = True
    with monkeypatch.context() as broken, pytest.raises(KeyError):
        broken.setattr(mlflow_client, "flush", lambda _: {}["a bug"])
        mlflow_client.send_saved()
    mlflow_client.send_saved()
    assert set(logged_runs()) == {"default"} and not unsent()


def test_a_server_that_is_down_is_left_alone_for_a_while(store, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow_client.connect("gem")
    for number in range(3):
        with Run.open(f"trial={number}", "tune") as run:
            run.log_metrics({"loss": 1.0})
        assert runs.exists(run.id)
    assert caplog.text.count("does not answer") == 1 and unsent() == 3
