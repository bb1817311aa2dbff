"""The command with ranges of a page, so that small outputs have many, as large ones do: `python -m tests.small_ranges predict ...`."""

from __future__ import annotations

import farcast_cli.engine.write as engine
from farcast_cli.cli import main


def run() -> None:
    engine.RANGE_BYTES = engine.MIN_RANGE_BYTES = 4096
    main()


if __name__ == "__main__":
    run()
