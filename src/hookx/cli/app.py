"""The command line: read the options, call one function, print one report, return one exit code.

Commands import torch when they need it, so that `hookx --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from typing import Annotated, NoReturn

import typer

from hookx.cli.commands import (
    cat,
    export,
    extract,
    finish,
    inspect,
    list_layers,
    list_models,
    plan,
    status,
    verify,
    visualize,
)
from hookx.cli.options import EXIT_CODES
from hookx.cli.streams import flush_output, interrupt, keep_streams, printable, raise_again
from hookx.errors import DeviceError, HookxError, Interrupted, system_failure
from hookx.signals import STOPPING

app = typer.Typer(
    help="Exact per-layer activations of vision models: a folder of images in, safetensors shards out.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,  # Plain help is the same in a pipe and on a terminal, and needs no rich.
    pretty_exceptions_enable=False,  # A user's mistake is one line; a bug is an ordinary traceback.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
COMMANDS = (extract, list_layers, list_models, verify, inspect, export, cat, visualize, plan, status, finish)
for command in COMMANDS:
    command.add_to(app)


def main() -> NoReturn:
    """Run the command line; print a user's mistake as one error: what is wrong, which value, what to do next."""
    if "_HOOKX_COMPLETE" in os.environ:
        from hookx.cli import completion

        completion.answer(app)
    # Importing torch creates hundreds of thousands of objects that stay; looking through them for garbage again and
    # again takes a seventh of that time.
    gc.set_threshold(100_000, 50, 50)
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as for `command &` in a script, or under nohup
            signal.signal(number, interrupt)
    sys.unraisablehook = _report_unraisable
    keep_streams()
    try:
        try:
            _check_working_directory()
            app()
        except SystemExit as ended:
            sys.exit(flush_output(ended.code))
        except HookxError:
            raise
        except Exception as error:
            raise_again()  # A signal during an import leaves a half-made module, and any error may follow.
            if (failure := system_failure(error)) is None:
                raise
            raise failure from None
    except HookxError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        if isinstance(error, DeviceError):
            print(f"  {shlex.join(['hookx', *sys.argv[1:]])}", file=sys.stderr, flush=True)
            flush_output()
            sys.stderr.flush()
            os._exit(error.exit_code)  # PyTorch aborts a process that frees memory on a device that has failed.
        sys.exit(flush_output(error.exit_code))
    except Interrupted as interrupted:
        print(f"interrupted; finish it with the same command:\n{shlex.join(['hookx', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(flush_output(interrupted.exit_code))
    sys.exit(0)


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:  # A library that torch loads would end the process.
        raise HookxError(f"the working directory is gone: {error.strerror}", "change to one that exists") from None


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    is_second_signal = "ignored due to race condition" in str(unraisable.exc_value)  # It came with the first.
    if not isinstance(unraisable.exc_value, Interrupted) and not is_second_signal:
        sys.__unraisablehook__(unraisable)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from hookx.cli.reports import print_rows, versions

        print_rows(list(versions().items()))
        raise typer.Exit


@app.callback()
def _hookx(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass
