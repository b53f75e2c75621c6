"""Processes that need not import first what takes seconds: they are forked from one that has.

A command that begins with `warm.python("torch")` or `warm.python("command")`, instead of `sys.executable`, is a process
of its own like any other, with its own working directory, environment, arguments and standard streams. Only signals do
not reach it: what ends it, or looks at how Python starts, begins with `sys.executable`.

This file is also the program that such a command runs: it hands everything to the process that was warmed up, which is
started by whoever needs it first, and passes on how the fork ended.
"""

import array
import json
import os
import socket
import sys

_FOLDER = "TESTS_WARM_FOLDER"  # the variable that names it
_IMPORTED = {"torch": ["torch", "torchvision", "hookx.cli", "hookx.pictures.models"], "command": ["hookx.cli"]}


def python(what: str) -> list[str]:
    """Return how to start Python, with torch or with just the command imported already."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), begin(), what]


def path(what: str = "torch") -> str:
    """Return a PATH on which `hookx` is such a process, beside whatever belongs to this Python."""
    import shlex
    import tempfile

    folder = os.path.join(begin(), f"bin-{what}")
    os.makedirs(folder, exist_ok=True)
    installed = os.path.join(os.path.dirname(sys.executable), "hookx")
    descriptor, aside = tempfile.mkstemp(dir=begin())
    os.write(descriptor, f'#!/bin/sh\nexec {shlex.join([*python(what), installed])} "$@"\n'.encode())
    os.fchmod(descriptor, 0o755)
    os.close(descriptor)
    os.replace(aside, os.path.join(folder, "hookx"))
    return os.pathsep.join([folder, os.path.dirname(sys.executable), os.environ["PATH"]])


def begin() -> str:
    """Return the folder that all processes of these tests share from now on."""
    if _FOLDER not in os.environ:
        import tempfile

        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="hookx-warm-")
    return os.environ[_FOLDER]


def end() -> None:
    """End what was started since `begin`."""
    import shutil
    import signal

    if _FOLDER in os.environ:
        folder = os.environ.pop(_FOLDER)
        for name in os.listdir(folder):
            if name.endswith(".pid"):
                with open(os.path.join(folder, name)) as file:
                    os.killpg(int(file.read()), signal.SIGKILL)
        shutil.rmtree(folder)


# --- the process that is started -----------------------------------------------------------------------------------


def _ask(folder: str, what: str, arguments: list[str]) -> int:
    """Have a fork do what this process was started for; return how it ended, as `os.waitpid` tells."""
    asked = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode("utf-8", "surrogateescape")
    with _connected(folder, what) as connection:
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(asked)
        return int(connection.makefile().read() or 1 << 8)


def _connected(folder: str, what: str) -> socket.socket:
    import fcntl
    import subprocess

    name = os.path.join(folder, what)
    with open(f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{name}.pid"):
            command = [sys.executable, os.path.abspath(__file__), "--serve", name, *_IMPORTED[what]]
            nothing = subprocess.DEVNULL  # None of this process's streams: they would stay open.
            server = subprocess.Popen(
                command, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, start_new_session=True, cwd="/"
            )
            with open(f"{name}.pid", "w") as file:
                file.write(str(server.pid))
            assert server.stdout is not None and server.stdout.read() == b"ready"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(name)
    return connection


# --- the process that was warmed up --------------------------------------------------------------------------------


def _serve(name: str, modules: list[str]) -> None:
    import importlib
    import threading

    sys.path.pop(0)  # Where this file is; a fork has its own.
    for module in modules:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen(100)
        os.write(1, b"ready")
        os.dup2(0, 1)
        while True:
            connection, _ = listening.accept()
            size, streams, _, _ = socket.recv_fds(connection, 8, 3)
            asked = connection.makefile("rb").read(int.from_bytes(size, "big"))
            if (fork := os.fork()) == 0:
                listening.close()
                connection.close()
                _become(streams, *json.loads(asked))
            for stream in streams:
                os.close(stream)
            threading.Thread(target=_tell_how_it_ended, args=(fork, connection)).start()


def _tell_how_it_ended(fork: int, connection: socket.socket) -> None:
    _, status = os.waitpid(fork, 0)
    with connection:
        connection.sendall(str(status).encode())


def _become(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Go on as `python ARGUMENTS...` would, and never return."""
    import atexit
    import io
    import runpy
    import threading
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    written = [io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2)]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(written[0], line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(written[1], errors="backslashreplace", line_buffering=True)
    code: object = 0
    try:
        if arguments[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *arguments[2:]], [""]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv, sys.path[:0] = arguments[1:], [folder]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = arguments, [os.path.dirname(os.path.abspath(arguments[0]))]
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # As Python ends where nobody reads what it printed.
    os._exit(int(code or 0))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2], sys.argv[3:])
    else:
        status = _ask(sys.argv[1], sys.argv[2], sys.argv[3:])
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        sys.exit(os.waitstatus_to_exitcode(status))
