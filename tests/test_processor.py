"""What does not depend on the type of the processor, by which OpenBLAS chooses how it sums products."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.forecast.forecaster_file import load_fitted
from tests.conftest import make_loose_run, run_cli

if TYPE_CHECKING:
    from pathlib import Path

KERNELS = ("Prescott", "Nehalem")  # any x86 processor has what these need; numpy without OpenBLAS does not hear of them


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="the kernels are those of x86")
def test_a_forecast_and_its_sidecar_have_the_same_bytes_whatever_kernels_sum_the_products(tmp_path: Path) -> None:
    shapes = {"a.weight": (70, 61), "b.weight": (33, 40), "c.bias": (70,)}
    make_loose_run(tmp_path / "run", range(100, 1700, 100), shapes=shapes)
    written, grams = [], []
    for kernel in KERNELS:
        home = tmp_path / kernel
        home.mkdir()
        env = {"OPENBLAS_CORETYPE": kernel, "OMP_NUM_THREADS": "1"}
        assert run_cli("fit", "../run", "-q", cwd=home, env=env).returncode == 0
        done = run_cli("predict", "--horizon", 200, "-o", "out.safetensors", "--even-if-worse", "-q", cwd=home, env=env)
        assert done.returncode == 0, done
        written.append({path.name: path.read_bytes() for path in home.glob("out*")})
        grams.append(load_fitted(home / "forecaster.safetensors").gram.matrix)
    assert len(written[0]) == 2
    assert written[0] == written[1]
    norms = np.sqrt(np.diagonal(grams[0], axis1=1, axis2=2))
    assert (np.abs(grams[0] - grams[1]) <= 1e-13 * norms[:, :, None] * norms[:, None, :]).all()


def test_a_sidecar_gives_its_figures_to_ten_digits(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    assert run_cli("fit", "run", "-q", cwd=tmp_path).returncode == 0
    assert run_cli("predict", "--horizon", 100, "-o", "out.safetensors", "-q", cwd=tmp_path).returncode == 0
    content = json.loads(next(tmp_path.glob("out*.json")).read_text())
    figures = [content[key] for key in ("ratio", "expected_ratio", "coherence")]
    figures += [one["mean_weight"] for one in content["inputs"]]
    assert all(figure == float(f"{figure:.10g}") for figure in figures)
    assert any(figure != float(f"{figure:.9g}") for figure in figures)
