"""python -m slao.cli, which launchers such as torchrun take where they take no command."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
