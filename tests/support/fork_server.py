"""The stages that a shell calls, forked from this process, which has imported them.

A program `python` before the real one hands over `python -m pipeline.STAGE`, with its arguments,
folder, environment and streams. It runs everything else itself.
"""

import importlib
import json
import multiprocessing
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.repository import prepare_to_fork, run_main

PYTHON = """#!/bin/sh
exec "{python}" -ISE "{caller}" "$@"
"""
CALLER = """
import json, os, socket, sys
arguments = sys.argv[1:]
if arguments[:1] == ["-m"] and arguments[1] in {modules}:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect({address!r})
        program = json.dumps([os.getcwd(), dict(os.environ), *arguments[1:]]).encode()
        socket.send_fds(server, [len(program).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(program)
        code = int(server.recv(8) or b"1")
    sys.exit(code if code >= 0 else 128 - code)
os.execv({python!r}, [{python!r}, *arguments])
"""


@contextmanager
def forked_stages(environment: Path, *modules: str) -> Iterator[None]:
    """Makes `environment` a copy of this Python environment whose `python` forks `modules`."""
    programs, caller = environment / "bin", environment / "caller.py"
    address = f"\0{secrets.token_hex(8)}"  # no file: the length of its path is limited
    programs.mkdir(parents=True)
    for program in (Path(sys.prefix) / "bin").iterdir():
        if program.name != "python":
            (programs / program.name).symlink_to(program)
    (programs / "python").write_text(PYTHON.format(python=sys.executable, caller=caller))
    caller.write_text(CALLER.format(python=sys.executable, modules=modules, address=address))
    (programs / "python").chmod(0o755)
    for module in modules:
        importlib.import_module(module)
    prepare_to_fork()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,))
        server.start()
    try:
        yield
    finally:
        server.terminate()
        server.join()


def _serve(listener: socket.socket) -> None:
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            with caller:
                caller.sendall(str(_exit_code(caller)).encode())
            os._exit(0)
        caller.close()
        with suppress(ChildProcessError):  # there are none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _exit_code(caller: socket.socket) -> int:
    """Runs the program of a caller in its folder, with its environment and streams."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += caller.recv(2**16)
    folder, environment, module, *arguments = json.loads(content)
    main = importlib.import_module(module).main
    options = (main, Path(folder), module, tuple(arguments), environment, streams)
    stage = multiprocessing.get_context("fork").Process(target=run_main, args=options)
    stage.start()
    stage.join()
    return stage.exitcode
