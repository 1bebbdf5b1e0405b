"""`python -m moe_engine`: the command line, for launchers that start a module, as torchrun does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
