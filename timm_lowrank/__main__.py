"""`python -m timm_lowrank COMMAND`: the same as `timm-lowrank COMMAND`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
