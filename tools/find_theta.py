"""What `megalong-find-theta` is, from a checkout: megalong/commands/find_theta.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout, whatever is installed
    from megalong.commands.find_theta import command

    sys.exit(command())
