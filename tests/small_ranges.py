"""The command with ranges and spans of a few thousand, so that small runs have many: `python -m tests.small_ranges predict ...`."""

from __future__ import annotations

import farcast_cli.engine.write as engine
from farcast_cli.cli import main
from farcast_cli.forecast import accumulate


def run() -> None:
    engine.RANGE_BYTES = engine.MIN_RANGE_BYTES = accumulate.SPAN = 4096
    main()


if __name__ == "__main__":
    run()
