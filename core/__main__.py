"""`python -m moe_engine`: the command line, for launchers that start a module, as torchrun does."""

from .cli import script

if __name__ == "__main__":
    script()
