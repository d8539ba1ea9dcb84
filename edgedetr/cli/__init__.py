"""The command line, one file a command; nothing heavy is imported before a command runs."""

from edgedetr.cli.app import cli, main, run

__all__ = ["cli", "main", "run"]
