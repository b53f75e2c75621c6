"""Commands that start fast, because they are forked from a process that has already imported torch.

The suite starts some 200 Python processes, and importing torch and torchvision takes each about 3 seconds of CPU time.
A command line that begins with `warm.python("torch")` or `warm.python("command")` instead of `sys.executable` still
runs as a process with its own working directory, environment, arguments and standard streams. Signals do not reach it,
so tests about signals or about how Python starts use `sys.executable`.

This file is also the program that such a command runs. It passes its arguments, environment and streams to a server,
which the first caller starts, and exits as the server's fork exited.
"""

import array
import json
import os
import socket
import sys

_FOLDER = "TESTS_WARM_FOLDER"  # the environment variable with the folder of the servers
_IMPORTED = {"torch": ["torch", "torchvision", "hookx.cli", "hookx.pictures.models"], "command": ["hookx.cli"]}


def python(what: str) -> list[str]:
    """Return the beginning of a command line: Python with either torch or only the command line already imported."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), begin(), what]


def path(what: str = "torch") -> str:
    """Return a PATH on which `hookx` starts fast; the other programs of this environment are on it too."""
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
    """Create the folder that all processes of this test session share, unless it exists; return it."""
    if _FOLDER not in os.environ:
        import tempfile

        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="hookx-warm-")
    return os.environ[_FOLDER]


def end() -> None:
    """Kill the servers and remove their folder."""
    import shutil
    import signal

    if _FOLDER in os.environ:
        folder = os.environ.pop(_FOLDER)
        for name in os.listdir(folder):
            if name.endswith(".pid"):
                with open(os.path.join(folder, name)) as file:
                    os.killpg(int(file.read()), signal.SIGKILL)
        shutil.rmtree(folder)


# --- the client ----------------------------------------------------------------------------------------------------


def _request(folder: str, what: str, arguments: list[str]) -> int:
    """Run the arguments in a fork of the server; return its status, as `os.waitpid` does."""
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode("utf-8", "surrogateescape")
    with _connect(folder, what) as connection:
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(request)
        # Read a line, not to the end: a later fork, such as the next process of a pipe, also holds the connection open.
        return int(connection.makefile().readline() or 1 << 8)


def _connect(folder: str, what: str) -> socket.socket:
    import fcntl
    import subprocess

    name = os.path.join(folder, what)
    with open(f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{name}.pid"):
            command = [sys.executable, os.path.abspath(__file__), "--serve", name, *_IMPORTED[what]]
            nothing = subprocess.DEVNULL  # A server that inherits a pipe keeps it open for its readers.
            server = subprocess.Popen(
                command, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, start_new_session=True, cwd="/"
            )
            with open(f"{name}.pid", "w") as file:
                file.write(str(server.pid))
            assert server.stdout is not None and server.stdout.read() == b"ready"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(name)
    return connection


# --- the server ----------------------------------------------------------------------------------------------------


def _serve(name: str, modules: list[str]) -> None:
    import importlib
    import threading

    sys.path.pop(0)  # The folder of this file; each fork adds its own.
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
            request = connection.makefile("rb").read(int.from_bytes(size, "big"))
            if (child := os.fork()) == 0:
                listening.close()
                connection.close()
                _become(streams, *json.loads(request))
            for stream in streams:
                os.close(stream)
            threading.Thread(target=_send_status, args=(child, connection)).start()


def _send_status(child: int, connection: socket.socket) -> None:
    _, status = os.waitpid(child, 0)
    with connection:
        connection.sendall(f"{status}\n".encode())


def _become(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Continue as `python ARGUMENTS...` would, and never return."""
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
    outputs = [io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2)]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(outputs[0], line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(outputs[1], errors="backslashreplace", line_buffering=True)
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
        code = 120  # Python's exit code when standard output is a closed pipe.
    os._exit(int(code or 0))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2], sys.argv[3:])
    else:
        status = _request(sys.argv[1], sys.argv[2], sys.argv[3:])
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        sys.exit(os.waitstatus_to_exitcode(status))
