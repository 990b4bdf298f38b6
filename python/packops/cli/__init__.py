"""The command line: a module per command, and :mod:`program`, which reads the arguments.

Nothing is imported here that imports torch, so that ``--help`` and mistakes are answered at once.
"""

from .program import COMMANDS, main

__all__ = ["COMMANDS", "main"]
