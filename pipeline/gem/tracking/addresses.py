"""Addresses of databases and servers that a user writes into environment variables."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy
from sqlalchemy.engine import URL, make_url

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.logs import without_passwords

DVC_COPIES = ".dvc/tmp/exps"  # in the project; `dvc exp run --temp` and --queue run there
_ENCODE = "in a password write %23 for #, %2F for /, %3A for :, %3F for ?, %40 for @"


def project_root() -> Path:
    """The project's folder: the working directory, but for DVC's temporary copies of the project
    the project itself, because DVC removes the copies."""
    folder, copies = Path.cwd(), Path(DVC_COPIES).parts
    for index in range(1, len(folder.parts)):
        if folder.parts[index : index + len(copies)] == copies:
            return Path(*folder.parts[:index])
    return folder


def at_root(path: str) -> Path:
    """A path relative to the project; unchanged if that is the working directory."""
    root = project_root()
    return Path(path) if root == Path.cwd() else root / path


def environment_address(variable: str, default: str) -> str:
    """The value of a variable, without blanks around it; `default` if it is absent or empty."""
    return os.environ.get(variable, "").strip() or default


def database_url(text: str, variable: str) -> URL:
    """The address of a database. The file of SQLite has `~` expanded, and lies in the project if
    its path is relative.

    Raises:
        InputError: not an address of a database, or SQLite without a file. The message names
            `variable` and contains no password.
    """
    shown = without_passwords(text)
    try:
        url = make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError(
            f"{variable} is {shown!r}, not the address of a database; expected sqlite:///FILE or "
            f"postgresql://USER@HOST/DATABASE; {_ENCODE}"
        ) from None
    if url.get_backend_name() != "sqlite":
        return url
    if url.host or url.database in (None, "", ":memory:"):
        raise InputError(
            f"{variable} is {shown!r}: expected a file after three slashes, for example "
            "sqlite:///folder/file.db"
        )
    return url.set(database=str(_expanded(url.database, f"{variable} is {shown!r}")))


def server_address(text: str, variable: str) -> str:
    """An address of a server. InputError if its host or port cannot be read."""
    try:
        parts = urlsplit(text)
        readable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        readable = False
    if not readable:
        shown = without_passwords(text)
        raise InputError(f"{variable} is {shown!r}: expected http://HOST:PORT; {_ENCODE}")
    return text


def _expanded(path: str, problem: str) -> Path:
    """The path with `~` in first place as the home folder, relative to the project.

    InputError for `~` or `$NAME` in another place: a folder of that name would be created.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{problem}: {error}; write the whole path") from None
    unexpanded = [
        part for part in expanded.parts if part.startswith("~") or re.search(r"\$[A-Za-z_{]", part)
    ]
    if unexpanded:
        raise InputError(
            f"{problem}: {unexpanded[0]} is expanded by a shell only, and ~ only as the first "
            "part; write the whole path"
        )
    return at_root(str(expanded))
