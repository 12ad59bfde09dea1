"""The command line, and the process that it runs in."""

from jfed.cli.commands import command, main

__all__ = ["command", "main"]
