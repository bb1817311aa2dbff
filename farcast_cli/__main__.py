"""The `farcast` command, and `python -m farcast_cli`: an interrupt is one line from the first moment on."""

from __future__ import annotations

import sys
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Import the command, which takes a tenth of a second, and call it."""
    try:
        from farcast_cli.cli import main as call
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing has been done\n")
        sys.exit(INTERRUPTED)
    call()


if __name__ == "__main__":
    main()
