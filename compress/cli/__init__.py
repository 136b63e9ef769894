"""The command line; nothing heavy is imported before a command needs it."""

from compress.cli.app import main

__all__ = ["main"]
