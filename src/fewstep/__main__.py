"""``python -m fewstep``: the same as ``fewstep``."""

from __future__ import annotations

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
