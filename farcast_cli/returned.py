"""What the functions of the Python API return where that is more than the library's own result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.reports.story import Story
    from farcast_cli.request import Outcome, Request


@dataclass(frozen=True, slots=True)
class Report:
    """The evidence on a run: its `story` in numbers, and the file that tells it, if one was written."""

    story: Story
    path: Path | None

    def markdown(self) -> str:
        """The same for the summary of a CI job."""
        from farcast_cli.reports.text import markdown

        return markdown(self.story)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown()

    def text(self, *, is_plain: bool = False) -> str:
        """The same for a terminal of 44 columns; in ASCII if it is to be plain."""
        from farcast_cli.reports.text import terminal

        return terminal(self.story, is_plain=is_plain)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What came of a call of `predict`: one outcome for each horizon."""

    fitted: Fitted
    request: Request
    outcomes: tuple[Outcome, ...]
    unlogged: tuple[str, ...] = ()
    """Where the numbers could not be logged, and why."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The checkpoints that are there now."""
        return tuple(outcome.path for outcome in self.outcomes if outcome.path)

    @property
    def path(self) -> Path | None:
        """The first of them; None if the history does not support a forecast."""
        return next(iter(self.paths), None)

    @property
    def reason(self) -> str:
        """Why the first horizon's verdict is what it is."""
        return self.outcomes[0].decision.reason

    def notes(self) -> list[str]:
        """What a person should know before using the forecasts. Looks for newer snapshots."""
        from farcast_cli.prediction import default_notes

        return default_notes(self.fitted, self.request, self.outcomes)

    def advice(self) -> str:
        """What to do if nothing was written, in one line; empty otherwise. Reads headers at most."""
        from farcast_cli.advice import advice

        return "" if self.paths else advice(self.fitted, self.request, self.outcomes)
