"""The address of the Optuna database: what is accepted, and errors without the password."""

import pytest
from support.processes import free_port

from pipeline.gem.common.errors import InputError
from pipeline.gem.search.study_db import StudyStorage, storage_url


@pytest.mark.parametrize("driver", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_gets_the_driver(monkeypatch, driver):
    monkeypatch.setenv("OPTUNA_STORAGE", f"{driver}://a:secret@h/d")
    url = storage_url().render_as_string(hide_password=False)
    assert url == "postgresql+psycopg://a:secret@h/d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mysql://a:secret@h/d", r"is mysql://\*\*\*@h/d: expected sqlite:///FILE \(one machine"),
        ("sqlite://", "a database in memory cannot be shared"),
        ("nonsense", "OPTUNA_STORAGE is not a database URL; expected sqlite:///FILE or postgresql"),
    ],
)
def test_a_database_that_cannot_be_shared_is_refused(monkeypatch, text, expected):
    monkeypatch.setenv("OPTUNA_STORAGE", text)
    with pytest.raises(InputError, match=expected) as caught:
        storage_url()
    assert "secret" not in str(caught.value)


def test_an_unreachable_server_is_one_line(monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", f"postgresql://a:secret@127.0.0.1:{free_port()}/d")
    expected = r"\*\*\*@127.* cannot be opened \(.*refused.*start the server"
    with pytest.raises(InputError, match=expected) as caught:
        StudyStorage()
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
