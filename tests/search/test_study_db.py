"""The address of the Optuna database: what is accepted, and errors without the password."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from support.processes import free_port
from support.searches import open_search, run

from pipeline.gem.common.errors import InputError
from pipeline.gem.search import study_db
from pipeline.gem.search.study_db import StudyStorage, storage_url


@pytest.mark.parametrize("driver", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_gets_the_driver(monkeypatch, driver):
    monkeypatch.setenv("OPTUNA_STORAGE", f"{driver}://a:secret@h/d")
    url = storage_url().render_as_string(hide_password=False)
    assert url == "postgresql+psycopg://a:secret@h/d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mysql://a:secret@h/d", r"is mysql://\S*@h/d: expected sqlite:///FILE without options"),
        ("sqlite:///x.db?mode=ro", r"is sqlite:///x.db\?mode=ro: expected sqlite:///FILE without"),
        ("sqlite://", "expected a file after three slashes"),
        ("./journal.log", "not the address of a database; expected sqlite:///FILE or postgresql"),
        ("JournalStorage(JournalFileBackend('x'))", "not the address of a database"),
        ("redis://:secret@h/0", "expected sqlite:///FILE without options"),
    ],
)
def test_a_database_that_cannot_be_shared_is_refused(monkeypatch, text, expected):
    monkeypatch.setenv("OPTUNA_STORAGE", text)
    with pytest.raises(InputError, match=expected) as caught:
        storage_url()
    assert "secret" not in str(caught.value)


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def release(version: str, name: str) -> Callable[[Path], None]:
    statements = (
        f"UPDATE alembic_version SET version_num = '{version}'",
        f"UPDATE version_info SET library_version = '{name}'",
    )
    return lambda path: execute(path, *statements)


def replace_by(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 : 4096 + 64] = bytes(64)
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE experiments (id)", "CREATE TABLE alembic_version (version_num)")


UPGRADE = "was made by Optuna 2.6.0, and this is 5.*; run: optuna storage upgrade --storage 'sqlite"


DAMAGES = {
    "older": (release("v2.6.0.a", "2.6.0"), UPGRADE),
    "newer": (release("v9.0.0.a", "9.0.0"), "was made by Optuna 9.0.0, .*; use that release"),
    "foreign": (foreign, r"belongs to another program \(tables alembic_version, experiments"),
    "text": (replace_by(b"trial,value\n" * 99), "is not a database.*move it aside"),
    "cut": (lambda path: os.truncate(path, 20_000), "malformed.*restore a copy, or move it"),
    "damaged": (overwrite, "is damaged.*restore a copy, or move it"),
    "folder": (make_folder, "is not a file; move it aside"),
    "no table": (
        lambda path: execute(path, "DROP TABLE trials"),
        "lacks the tables trials; restore",
    ),
    "no column": (
        lambda path: execute(path, "ALTER TABLE version_info DROP COLUMN library_version"),
        "no such column",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_database_that_cannot_be_used_is_one_line(monkeypatch, tmp_path, damage, expected):
    path = tmp_path / "x.db"
    monkeypatch.setenv("OPTUNA_STORAGE", f"sqlite:///{path}")
    StudyStorage().close()
    execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(InputError, match=expected) as caught:
        StudyStorage()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"OPTUNA_STORAGE: sqlite:///{path} ")
    assert path.is_dir() or path.read_bytes() == before


def test_an_empty_file_becomes_a_database(monkeypatch, tmp_path):
    (tmp_path / "x.db").touch()
    monkeypatch.setenv("OPTUNA_STORAGE", f"sqlite:///{tmp_path}/x.db")
    StudyStorage().close()
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path}/x.db") == []


def test_a_file_that_another_program_locks_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(study_db, "_OPEN_TIMEOUT_S", 0.1)
    monkeypatch.setenv("OPTUNA_STORAGE", f"sqlite:///{tmp_path}/x.db")
    StudyStorage().close()
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=r"database is locked.*another program holds it"):
            StudyStorage()


def test_an_error_during_a_search_is_one_line(params):
    search = open_search(params)

    def evaluate(trial):
        search.storage.close()
        execute(Path(".gem/optuna.db"), "DROP TABLE trials")
        trial.report(1.0, 1)

    expected = r"sqlite:///.gem/optuna.db cannot be used \(no such table"
    with pytest.raises(InputError, match=expected), search.storage.errors():
        run(search, 2, evaluate)


def test_an_unreachable_server_is_one_line(monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", f"postgresql://a:secret@127.0.0.1:{free_port()}/d")
    with pytest.raises(InputError, match=r"cannot be used \(.*refused.*start the server") as caught:
        StudyStorage()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
