"""Tiny trajectories in memory and on disk, and slow oracles, shared by the tests of the forecast itself."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.engine import native
from farcast_cli.engine.reader import Resources
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster import Options, Task, forecast
from farcast_cli.forecast.gram import Gram, Sample
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.prediction import predict
from farcast_cli.progress import silent
from farcast_cli.request import Outcome, Request
from farcast_cli.run.trajectory import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import Io
    from farcast_cli.forecast.forecaster_file import Fitted

    Arrays = Mapping[str, NDArray[np.float64]]  # a tensor's name -> its values (T, N)

SAMPLES = Path(__file__).resolve().parent.parent / "sample_checkpoints"


@functools.cache
def sample_maker() -> Any:
    """The module that made the sample runs, and resumes and evaluates them."""
    spec = importlib.util.spec_from_file_location("sample_checkpoints_make", SAMPLES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """One thread, as the command has it. The sample runs also make torch deterministic; both are put back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=deterministic)


# --- trajectories in memory ------------------------------------------------------------------------------------------


def basis(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vectors that coefficients refer to, (R, N): increments, first snapshot, ones."""
    return np.concatenate([np.diff(values, axis=0), values[:1], np.ones_like(values[:1])])


def statistic(arrays: Arrays, steps: Sequence[int]) -> tuple[Gram, Sample]:
    """The Gram matrices and the whole tensors as the sample, by plain numpy."""
    matrix = np.stack([basis(values) @ basis(values).T for values in arrays.values()])
    sizes = np.array([values.shape[1] for values in arrays.values()], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = np.concatenate([values.T for values in arrays.values()]).astype(np.float32)
    return Gram(np.array(steps, dtype=np.int64), matrix), Sample(rows, bounds, sizes)


def make_task(
    arrays: Arrays, steps: Sequence[int], horizon: float, *, origin: float | None = None, options: Options | None = None
) -> Task:
    gram, sample = statistic(arrays, steps)
    timeline = Timeline(gram.steps, float(steps[-1] if origin is None else origin))
    return Task(gram, sample, timeline, float(horizon), options or Options())


def applied(coefficients: NDArray[np.float64], arrays: Arrays) -> dict[str, NDArray[np.float64]]:
    """What coefficients (K, R) amount to, per tensor (N,)."""
    return {name: row @ basis(values) for row, (name, values) in zip(coefficients, arrays.items(), strict=True)}


def step_of(name: str, arrays: Arrays, steps: Sequence[int], horizon: float, **options: Any) -> dict[str, NDArray[np.float64]]:
    """A method's step from the last snapshot, per tensor (N,)."""
    task = make_task(arrays, steps, horizon, options=replace(Options(), **options))
    return applied(forecast(METHODS[name], task), arrays)


def assert_same_steps(found: Arrays, expected: Arrays, tolerance: float) -> None:
    """Equal to a share of the largest expected step."""
    size = max(np.abs(step).max() for step in expected.values())
    for name, step in expected.items():
        np.testing.assert_allclose(found[name], step, rtol=0, atol=tolerance * size, err_msg=name)


def weights_at(values: NDArray[np.float64], steps: Sequence[int], step: float) -> NDArray[np.float64]:
    """Weights (N,) at any step, element by element."""
    return np.array([np.interp(step, steps, column) for column in values.T])


def wander(
    seed: int, *, num_snapshots: int, sizes: Mapping[str, int], roughness: float = 0.3
) -> dict[str, NDArray[np.float64]]:
    """Smooth curved paths with some noise: what training looks like, from a seed."""
    random = np.random.default_rng(seed)
    times = np.linspace(0, 1, num_snapshots)[:, None]
    return {
        name: random.normal(size=size)
        + random.normal(size=size) * times
        + random.normal(size=size) * np.exp(-3 * times)
        + roughness * np.cumsum(random.normal(size=(num_snapshots, size)), axis=0) / num_snapshots
        for name, size in sizes.items()
    }


def straight(steps: Sequence[int], sizes: Mapping[str, int]) -> tuple[dict[str, NDArray[np.float64]], Arrays]:
    """Straight paths and their velocities per step."""
    random = np.random.default_rng(8)
    starts, speeds = ({key: random.normal(size=size) / scale for key, size in sizes.items()} for scale in (1, 1000))
    return {key: starts[key] + np.array(steps)[:, None] * speeds[key] for key in sizes}, speeds


# --- runs on disk ----------------------------------------------------------------------------------------------------


def save_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def write_run(
    folder: Path,
    arrays: Arrays,
    steps: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    extra: Callable[[int], Mapping[str, torch.Tensor]] = lambda _: {},
) -> Path:
    """One safetensors file per snapshot: `step_<step>.safetensors`; `extra` adds tensors to a step's file."""
    for index, step in enumerate(steps):
        tensors = {name: torch.from_numpy(values[index]).to(dtype) for name, values in arrays.items()}
        save_safetensors(folder / f"step_{step}.safetensors", {**tensors, **extra(step)})
    return folder


def stored(folder: Path, steps: Sequence[int], name: str) -> NDArray[np.float64]:
    """A tensor as the files of `write_run` hold it, (T, N)."""
    return np.stack([load_file(folder / f"step_{step}.safetensors")[name].double().flatten().numpy() for step in steps])


def fit_run(folder: Path, *, num_samples: int | None = DEFAULT_SAMPLE, exclude: Sequence[str] = ()) -> Fitted:
    return fit(discover(folder), num_samples=num_samples, exclude=exclude)


def predict_run(
    fitted: Fitted,
    output: Path | str,
    *,
    horizons: Sequence[int],
    device: str = "cpu",
    io: Io = "auto",
    num_threads: int = 1,
    kernel: bool = True,
    **request: Any,
) -> list[Outcome]:
    """Forecast whatever the verdict, unless the request says otherwise; in numpy where `kernel` is False."""
    asked = {"even_if_worse": True, "output": str(output), "resources": Resources(device, io, num_threads), **request}
    with nullcontext() if kernel else without_kernel():
        return predict(fitted, Request(tuple(horizons), **asked), silent)


def forecast_run(run: Path, output: Path | str, horizon: int, **request: Any) -> tuple[Path, Outcome]:
    """The path of a run's forecast, which is written, and what is said of it."""
    (outcome,) = predict_run(fit_run(run), output, horizons=[horizon], **request)
    assert outcome.path is not None
    return outcome.path, outcome


@contextmanager
def without_kernel() -> Iterator[None]:
    """As in an installation that has no compiled kernel."""
    held, native.KERNEL = native.KERNEL, None
    try:
        yield
    finally:
        native.KERNEL = held
