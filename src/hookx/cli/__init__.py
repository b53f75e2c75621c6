"""The command line."""

from hookx.cli.app import app, main

__all__ = ["app", "main"]
