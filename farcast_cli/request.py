"""One prediction, start to end, as data: what was asked, what was planned, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farcast_cli.engine.ranks import Team
from farcast_cli.engine.reader import Resources
from farcast_cli.forecast.forecaster import Options
from farcast_cli.run.pace import STEPS, Pace
from farcast_cli.run.trust import BY_EVIDENCE, StepRule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from farcast_cli.checkpoint.convert import Container
    from farcast_cli.checkpoint.pieces import OutputFile
    from farcast_cli.choices import ClockName, CountersMode, OptimizerMode, OutputDType, OutputLayout, Purpose
    from farcast_cli.engine.write import Engine
    from farcast_cli.evaluation.judge import Scorer, Trial
    from farcast_cli.forecast.backtest import Decision
    from farcast_cli.forecast.state_ledger import Ledgers
    from farcast_cli.run.alignment import Copied
    from farcast_cli.state.advance import Advanced
    from farcast_cli.trainers.base import Snapshot


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked `predict` for. `horizons` are steps after the origin; none leaves it to the evidence."""

    horizons: tuple[int, ...] = ()
    purpose: Purpose = "resume"
    method: str | None = None
    options: Options = field(default_factory=Options)
    origin_step: int | None = None
    to_step: int | None = None
    """The step to forecast, in place of a horizon."""
    optimizer: OptimizerMode = "copy"
    counters: CountersMode = "advance"
    dtype: OutputDType = "source"
    layout: OutputLayout = "same"
    max_shard_bytes: int | None = None
    output: str | None = None
    place: str = ""
    """The name of the checkpoint's file in a folder of its own; "" for a forecast that lies as the snapshots do."""
    even_if_worse: bool = False
    overwrite: bool = False
    dry_run: bool = False
    resources: Resources = field(default_factory=Resources)
    team: Team = field(default_factory=Team)
    """The processes that do this together."""
    evaluator: Scorer | None = None
    ledgers: Ledgers | None = None
    clock: ClockName | None = None
    """None: learning rates where they are known."""
    source: str = ""
    """What a command to paste needs after `farcast predict` to read the same run, with a blank before it."""
    narrowed: str = ""
    """The options that chose what is read of the run, likewise."""
    logs: tuple[Path, ...] = ()
    """Where the answer will be logged: in no output."""

    @property
    def origin_option(self) -> str:
        """The same of the origin."""
        return "" if self.origin_step is None else f" --origin {self.origin_step}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One horizon's forecast: where it is (None where none was written), what it is and what was done."""

    horizon: int
    origin_step: int
    method: str
    decision: Decision
    pace: Pace = STEPS
    """The clock that its length is in."""
    pace_ahead: float = 1.0
    """The mean rate over the horizon against that of the stretch that the drift is measured on."""
    length_factor: float = 1.0
    """What the step's length was multiplied by: `pace_ahead`, or 1 where it keeps its full length."""
    chosen: tuple[str, ...] = ()
    """What was chosen for the user, and why."""
    rule: StepRule = BY_EVIDENCE
    """How the user had the steps of the run told."""
    path: Path | None = None
    existed: bool = False
    """The same request wrote it before, and nothing was written now."""
    num_forecast: int = 0
    copied: tuple[Copied, ...] = ()
    unchanged_share: float | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    """Of memory, foretold by a dry run; `seconds` is then foretold too."""
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def num_copied(self) -> int:
        return sum(one.num_tensors for one in self.copied)

    @property
    def valid_step(self) -> int:
        return self.origin_step + self.horizon


@dataclass(frozen=True, slots=True)
class Start:
    """Where forecasts begin, found once for a request: the run's folder, the origin, and what its trainer's state says."""

    run: Path
    origin: Snapshot
    index: int
    """Of the origin in the history."""
    end: tuple[str, int] | None = None
    """What ends the run, and at which step, if the trainer's state tells and training is to go on."""
    averages: Mapping[str, str] | None = None
    """Marks of the run's averages at an earlier snapshot, where those that are read may lack them."""

    @property
    def steps_left(self) -> int | None:
        """To the end of the run."""
        return None if self.end is None else self.end[1] - self.origin.step

    @property
    def limit(self) -> str:
        """How the end of the run limits a leap, in words; "" if no end is known."""
        if self.end is None:
            return ""
        unit, end = self.origin.unit, self.end[1]
        if end <= self.origin.step:
            return f"the run ended at {unit} {end}: there is no training to skip"
        return f"the run ends at {unit} {end}: a leap must end before that"

    def ends_before(self, horizon: int) -> bool:
        """Whether the run ends so many steps later, or before that."""
        return self.steps_left is not None and self.steps_left <= horizon


@dataclass(frozen=True, slots=True)
class Prepared:
    """All horizons planned and nothing written yet."""

    engine: Engine
    plans: tuple[tuple[OutputFile, ...], ...]
    advanced: tuple[Advanced, ...]
    container: Container
    paths: tuple[Path, ...]
    snapshots: tuple[Snapshot, ...]
    origin: Snapshot
    run: Path
    """The run's folder."""
