"""Addresses that a user writes: what is read, what is refused, and that no password is printed."""

import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.logs import without_passwords
from pipeline.gem.tracking.addresses import database_url, project_root, server_address


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("sqlite:///x.db", "x.db"),
        ("sqlite:////a b/ü'/x.db", "/a b/ü'/x.db"),
        ("sqlite:///~/x.db", "/home/me/x.db"),
        ("sqlite:///./~/x.db", "/home/me/x.db"),
        ("sqlite:///a~/b~1/x.db", "a~/b~1/x.db"),
    ],
)
def test_a_file_of_sqlite(text, file):
    assert database_url(text, "X").database == file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqlite:///x/~/x.db", "~ is expanded by a shell only"),
        ("sqlite:////~/x.db", "~ is expanded by a shell only"),
        ("sqlite:///~nobody-here/x.db", "~nobody-here|home directory"),
        ("sqlite:///$HOME/x.db", r"\$HOME is expanded by a shell only"),
        ("sqlite:///", "after three slashes"),
        ("sqlite:///:memory:", "after three slashes"),
        ("sqlite://x.db", "after three slashes"),
        ("x.db", "not the address of a database"),
        ("postgresql://u:p#assword/1@host:x/db", "not the address of a database"),
    ],
)
def test_an_address_that_means_another_place_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        database_url(text, "OPTUNA_STORAGE")
    assert str(caught.value).startswith("OPTUNA_STORAGE is ") and len(str(caught.value)) <= 300
    assert "assword/1" not in str(caught.value)


@pytest.mark.parametrize("text", ["http://", "http:///x", "http://u:p#assword@host", "http://h:x"])
def test_a_server_without_a_host_is_refused(text):
    with pytest.raises(InputError, match=r"expected http://HOST:PORT") as caught:
        server_address(text, "MLFLOW_TRACKING_URI")
    assert "#assword" not in str(caught.value)


@pytest.mark.parametrize("copy", [".dvc/tmp/exps/standalone/tmpa", ".dvc/tmp/exps/tmpb/sub"])
def test_a_relative_file_of_a_copy_that_dvc_removes_lies_in_the_project(home, monkeypatch, copy):
    assert project_root() == home
    (home / copy).mkdir(parents=True)
    monkeypatch.chdir(home / copy)
    assert project_root() == home
    assert database_url("sqlite:///.gem/x.db", "X").database == f"{home}/.gem/x.db"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:pa/ss@w@host:5000/x", "at http://***@host:5000/x"),
        ("http://host/?password=hunter2&a=1", "http://host/?password=***&a=1"),
        ("postgresql://u:hunter2@h/d?sslpassword=x y", "postgresql://***@h/d?sslpassword=*** y"),
        ("failed for 'corr ect!' and 'corr%20ect!'", "failed for '***' and '***'"),
        ("https://host/path and me@example.org", "https://host/path and me@example.org"),
    ],
)
def test_passwords_are_not_printed(monkeypatch, text, shown):
    monkeypatch.setenv("OPTUNA_STORAGE", "postgresql://me:corr%20ect!@host/d")
    assert without_passwords(text) == shown
