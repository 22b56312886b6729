"""`python -m spectrum_peft` is the command `spectrum-peft`."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
