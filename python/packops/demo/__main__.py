"""``python -m packops.demo``: the demo without the rest of the command line."""

import argparse
import sys

from . import DESCRIPTION, add_arguments, main

parser = argparse.ArgumentParser(
    prog="python -m packops.demo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
)
add_arguments(parser)
sys.exit(main(parser.parse_args()))
