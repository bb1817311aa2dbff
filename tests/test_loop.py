"""Leaps in a loop of one's own, and the code that the page on leaps inside a training shows."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from farcast_cli.errors import SnapshotError, UsageError
from farcast_cli.forecast.ledger import read_leaps
from farcast_cli.live.weights import LiveModel
from farcast_cli.loop import Landed, leap_in_place
from farcast_cli.run.trajectory import open_snapshot

PAGE = Path(__file__).resolve().parent.parent / "docs" / "loop.md"
EVERY = 10


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARCAST_STATE_DIR", "")
    (tmp_path / "run").mkdir()


class Loop:
    """A loop over its own data, that saves all that it needs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        self.step = 0

    def train(self, step: int) -> None:
        self.optimizer.zero_grad()
        rows = self.inputs[step % 4 :: 4]
        torch.nn.functional.mse_loss(self.model(rows), rows[:, :1] * 2).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def save(self, step: int) -> Path:
        path = Path(f"run/step_{step}.pt")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}, path)
        return path

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def until(self, end: int, **options: Any) -> list[Landed | None]:
        """Train, save and leap at every tenth step."""
        found = []
        for step in range(self.step + 1, end + 1):
            self.train(step)
            if step % EVERY == 0:
                self.save(step)
                found.append(leap_in_place(self.model, "run", step, **options))
        return found

    @property
    def weights(self) -> list[torch.Tensor]:
        return [one.detach().clone() for one in self.model.parameters()]


def horizons(found: list[Landed | None]) -> list[int]:
    return [one.horizon if one else -1 for one in found]


def test_a_loop_leaps_and_its_disk_is_bounded(tmp_path: Path) -> None:
    loop = Loop()
    found = loop.until(100, num_steps=100)
    assert [bool(horizon) for horizon in horizons(found)] == [False, False, *[True] * 7, False]
    (forecast,) = (tmp_path / "forecasts" / "run").glob("*.pt")
    assert torch.load(forecast, weights_only=True).keys() == {"model", "step"}  # and no optimizer
    size = sum(one.numel() * one.element_size() for one in loop.model.parameters())
    assert sum(path.stat().st_size for path in (tmp_path / "forecasts" / "run").iterdir()) < 1.5 * size + 15_000
    assert {path.name.partition(".")[2] for path in (tmp_path / "forecasts" / "run").iterdir()} == {
        *("pt", "pt.farcast.json", "memory.safetensors")
    }


def test_a_loop_that_crashed_after_a_leap_makes_it_again_when_it_has_loaded_its_checkpoint(tmp_path: Path) -> None:
    whole = Loop()
    whole.until(55)
    for folder in ("run", "forecasts"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "run").mkdir()
    Loop().until(52)
    resumed = Loop()
    resumed.load(tmp_path / "run" / "step_50.pt")
    again = leap_in_place(resumed.model, "run", 50)
    assert again is not None
    assert again.horizon > 0
    resumed.until(55)
    assert all(map(torch.equal, resumed.weights, whole.weights))


def test_one_network_of_several_leaps_at_the_steps_of_the_chosen_evidence() -> None:
    class Two(Loop):
        def save(self, step: int) -> Path:
            path = Path(f"run/save_{step}.pt")
            torch.save({"g": self.model.state_dict(), "d": {"w": torch.zeros(3, 3)}, "step": 7 * step}, path)
            return path

    found = Two().until(50, weights="g", step_from="name", strict=True)
    assert [bool(horizon) for horizon in horizons(found)] == [False, False, True, True, True]


def test_only_the_chosen_tensors_leap() -> None:
    loop = Loop()
    for step in range(1, 31):
        loop.train(step)
        if step % EVERY == 0:
            loop.save(step)
            before = loop.weights
            landed = leap_in_place(loop.model, "run", step, exclude=("0.*",))
    assert landed is not None
    assert landed.horizon > 0
    assert [torch.equal(one, other) for one, other in zip(before, loop.weights, strict=True)] == [True, True, False, False]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_give_the_same_bits() -> None:
    found = []
    for threads in (1, 2):
        loop = Loop()
        loop.until(30, threads=threads, output=f"by{threads}")
        found.append(loop.weights)
        shutil.rmtree("run")
        Path("run").mkdir()
    assert all(map(torch.equal, *found))


def test_a_call_without_a_checkpoint_of_this_step_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.until(10)
    assert leap_in_place(loop.model, "run", 15) is None
    assert "run: expected a checkpoint of step 15, found none" in caplog.text
    with pytest.raises(SnapshotError):
        leap_in_place(loop.model, "run", 15, strict=True)


class Fault(TorchFunctionMode):
    """The third weight that is copied into the model meets a fault."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.num_copies = error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self.num_copies += 1
            if self.num_copies == 3:
                raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_landing_that_stops_half_way_leaves_no_trace(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FARCAST_STATE_DIR", str(tmp_path / "state"))
    loop = Loop()
    assert horizons(loop.until(40))[-1] > 0
    for step in range(41, 51):
        loop.train(step)
    loop.save(50)
    before, forecasts = loop.weights, tmp_path / "forecasts"
    with Fault(error) as fault, suppress(KeyboardInterrupt):
        assert leap_in_place(loop.model, "run", 50) is None
        assert not isinstance(error, KeyboardInterrupt)
        assert f"step 50: no leap, and training goes on: {forecasts.name}" in caplog.text
        assert type(error).__name__ in caplog.text
    assert fault.num_copies == 7
    assert all(map(torch.equal, before, loop.weights))
    assert list((forecasts / "run").iterdir()) == []
    (second,) = (tmp_path / "state" / "ledgers").iterdir()
    for ledger in (forecasts / "ledger.jsonl", second):
        assert [leap.origin_step for leap in read_leaps(ledger, Path("run"))] == [30, 40]


def test_a_model_leaps_though_a_buffer_that_is_excluded_holds_nan() -> None:
    loop = Loop()
    loop.model.register_buffer("unset", torch.full((2,), torch.nan))
    assert horizons(loop.until(30, exclude=("unset",)))[-1] > 0


def test_between_two_leaps_there_is_no_call() -> None:
    assert leap_in_place(Loop().model, "nowhere", 15, every=10) is None


def test_a_leap_that_somebody_changed_stays_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.until(30)
    (forecast,) = (tmp_path / "forecasts" / "run").glob("*.pt")
    mine = Path(f"{forecast}.farcast.json")
    forecast.with_suffix(".pt").write_bytes(forecast.read_bytes() + b"mine")
    for step in range(31, 41):
        loop.train(step)
    loop.save(40)
    leap_in_place(loop.model, "run", 40)
    assert "stays on disk" in caplog.text
    assert forecast.exists()
    assert mine.exists()


def test_a_leap_that_the_command_wrote_stays_on_disk(tmp_path: Path) -> None:
    """With its optimizer it is a checkpoint of the user's."""
    from farcast_cli.leaps.ask import Ask
    from farcast_cli.leaps.call import leap
    from farcast_cli.progress import silent
    from farcast_cli.request import Request
    from farcast_cli.run.selection import Selection

    loop = Loop()
    for step in range(1, 31):
        loop.train(step)
        if step % EVERY == 0:
            loop.save(step)
    path = leap(Ask(Request(counters="keep"), Selection(Path("run"))), silent).outcome.path
    assert path is not None
    landed = leap_in_place(loop.model, "run", 30)
    assert landed is not None
    assert landed.reason == "made again after an interruption"
    loop.step = 30
    assert horizons(loop.until(50))[-1] > 0
    assert (tmp_path / path).exists()
    assert len(list((tmp_path / "forecasts" / "run").glob("*.pt"))) == 2


# --- a model and a checkpoint ----------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    loop = Loop()
    other = open_snapshot(loop.save(10))
    wider = torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.Tanh(), torch.nn.Linear(17, 1))
    with pytest.raises(SnapshotError, match=r"'0.weight': expected float32 \(16, 8\) in the model, found float32 \(17, 8\)"):
        LiveModel.of(wider, wider.state_dict()).check(other)
    longer = torch.nn.Sequential(*loop.model, torch.nn.Linear(1, 1))
    with pytest.raises(SnapshotError, match=r"expected the trained weight '3.weight', found none"):
        LiveModel.of(longer, longer.state_dict()).check(other)
    longer[3].requires_grad_(False)
    LiveModel.of(longer, longer.state_dict()).check(other)
    with pytest.raises(SnapshotError, match=r"'0.weight': .* found none"):  # copies are not the model
        LiveModel.of(longer, {name: one.clone() for name, one in longer.state_dict().items()}).check(other)
    half = torch.nn.Sequential(*loop.model).half()
    with pytest.raises(SnapshotError, match="expected float32"):
        LiveModel.of(half, half.state_dict()).check(other)


def test_names_of_wrappers_do_not_matter() -> None:
    loop = Loop()
    wrapped = torch.nn.Module()
    wrapped.module = loop.model
    live = LiveModel.of(wrapped, wrapped.state_dict())
    live.check(open_snapshot(loop.save(10)))
    assert live.tensors["0.weight"].data_ptr() == next(loop.model.parameters()).data_ptr()


def test_weights_that_are_a_shard_are_refused() -> None:
    class FlatParameter(torch.nn.Parameter):
        """As FSDP has it."""

    module = torch.nn.Module()
    module.weight = FlatParameter(torch.zeros(3))
    with pytest.raises(UsageError, match="FlatParameter: call `farcast leap RUN`"):
        leap_in_place(module, "run", 10)


# --- the page --------------------------------------------------------------------------------------------------------


def blocks() -> dict[str, list[str]]:
    """The Python of the page, by the heading that it stands under."""
    found: dict[str, list[str]] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        found[section.partition("\n")[0]] = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    return {heading: code for heading, code in found.items() if code}


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    return names


def leaps_of(log: list[dict[str, Any]]) -> int:
    return sum("farcast_leap_to" in entry for entry in log)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_page_shows_what_runs_in_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.test_in_trainer import language_model, texts

    (shown,), (measured,) = blocks()["In a Trainer"], blocks()["A loss"]
    ids = torch.stack([row["input_ids"] for row in texts()]).to("cuda" if torch.cuda.is_available() else "cpu")
    names: dict[str, Any] = {"model": language_model(), "rows": texts(), "batch": {"input_ids": ids, "labels": ids}}
    run(shown, names)
    assert leaps_of(names["trainer"].state.log_history) > 30
    shutil.rmtree("run")
    shutil.rmtree("forecasts")
    run(measured, names | {"model": language_model()})
    assert list(Path("forecasts/run").glob("checkpoint-*"))
    capsys.readouterr()


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_what_runs_in_lightning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.test_in_lightning import Tied, data, marks

        (shown,) = blocks()["In Lightning"]
        names = run(shown, {"module": Tied(), "loader": data()})
    assert len(marks(names["trainer"])) > 30


def test_the_page_shows_what_runs_in_a_loop() -> None:
    loop, (shown, resumed) = Loop(), blocks()["In a loop of your own"]
    names = {"model": loop.model, "optimizer": loop.optimizer, "train": loop.train, "torch": torch}
    run(shown, names)
    assert len(Path("forecasts/ledger.jsonl").read_text().splitlines()) > 30
    before = loop.weights
    run(resumed, names)
    assert not any(map(torch.equal, loop.weights, before))


def test_all_code_of_the_page_is_run_by_a_test() -> None:
    assert {heading: len(code) for heading, code in blocks().items()} == {
        "In a Trainer": 1,
        "In Lightning": 1,
        "In a loop of your own": 2,
        "A loss": 1,
    }
    assert "lightning" not in sys.modules["farcast_cli.loop"].__dict__
