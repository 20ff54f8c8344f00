"""The `slimfront` command: parses, calls, prints; no logic."""

from slimfront.search.cli.command import main

__all__ = ["main"]
