"""`python -m brt_dist` is `brt`."""

from __future__ import annotations

import sys

from brt_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
