"""``python -m packops``."""

import sys

from .cli.program import run

if __name__ == "__main__":
    sys.exit(run())
