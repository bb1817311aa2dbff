"""Runs on a remote store: the same answers as for the same run here, few bytes fetched, and nothing taken for zeros.

Most tests use fsspec's own store in memory. Those against an S3 server need s3fs and moto; `make stores` runs them.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import sys
import threading
import warnings
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

from farcast_cli import api
from farcast_cli.engine.reader import Reader
from farcast_cli.errors import FarcastError, OutputError, SnapshotError, UnreadableError, UsageError
from farcast_cli.files.reading import read_bytes
from farcast_cli.remote import mirror
from farcast_cli.remote.spans import JOINED_GAP, MAX_REQUEST, Spans, requests
from farcast_cli.remote.store import address_of
from farcast_cli.remote.upload import deciding
from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.settings import here
from tests.conftest import CallCli, make_loose_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

fsspec = pytest.importorskip("fsspec")
SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"
RUN = "memory://store/run"
STEPS = range(100, 700, 100)
FORCED = ("--horizon", 100, "--even-if-worse")
LARGE = {"wide": (1024, 2048)}  # 8 MiB


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own cache folder, and an empty store."""
    monkeypatch.setenv("FARCAST_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    mirror.release()
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def upload(folder: Path, address: str = RUN) -> Path:
    files, top = fsspec.core.url_to_fs(address)
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{top}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return folder


def fetched() -> mirror.Mirror:
    """What was fetched of the one run that is open."""
    (found,) = mirror._open.values()
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    """All files but those that say where the run was."""
    places = {"farcast.json", "ledger.jsonl"}
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if not p.name.endswith(tuple(places))}


@pytest.mark.parametrize("name", ["huggingface", "plain", "safetensors"])
def test_a_remote_run_gives_the_forecast_of_the_same_run_here(name: str, tmp_path: Path, call_cli: CallCli) -> None:
    shutil.copytree(SAMPLES / name, tmp_path / "here" / name)
    upload(SAMPLES / name, f"memory://store/{name}")
    (tmp_path / "there").mkdir()
    local = call_cli("predict", name, "-o", "out/", cwd=tmp_path / "here")
    there = call_cli("predict", f"memory://store/{name}", "-o", "out/", cwd=tmp_path / "there")
    assert (there.returncode, there.stdout) == (0, local.stdout)
    assert there.stderr.splitlines()[0] == local.stderr.splitlines()[0]
    assert "cache" not in there.stderr
    assert files_in(tmp_path / "there" / "out") == files_in(tmp_path / "here" / "out") != {}


@pytest.mark.parametrize("io", ["auto", "mmap"])
def test_fit_fetches_a_small_part_and_learns_the_same_numbers(io: Any, tmp_path: Path) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    local, there = api.fit(run, io=io), api.fit(RUN, io=io)
    assert np.array_equal(local.fitted.gram.matrix, there.fitted.gram.matrix)
    assert np.array_equal(local.fitted.sample.values, there.fitted.sample.values)
    whole = sum(path.stat().st_size for path in run.iterdir())
    assert whole > 40 << 20
    assert fetched().num_bytes < 0.04 * whole
    assert fetched().num_requests < 50 * len(STEPS)


def test_the_holes_that_a_killed_command_left_are_never_read_as_zeros(tmp_path: Path) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS[:1]))
    root, name = here(RUN), "step_000100.safetensors"
    mirror.release()
    root.mkdir(parents=True)
    with (root / name).open("wb") as left:
        left.truncate((run / name).stat().st_size)
    whole = (run / name).read_bytes()
    assert read_bytes(here(root) / name, 0, len(whole)) == whole


def test_a_name_that_begins_with_dots_is_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a whole part `..` of a path leads upwards."""
    run = make_loose_run(tmp_path / "run", STEPS, shapes=LARGE)
    upload(run)
    upload(run, "memory://store/..run")
    expected = api.fit(run).fitted.gram.matrix
    assert np.array_equal(api.fit("memory://store/..run").fitted.gram.matrix, expected)
    mirror.release()
    monkeypatch.setenv("FARCAST_CACHE_DIR", str(tmp_path / "..cache"))
    assert np.array_equal(api.fit(RUN).fitted.gram.matrix, expected)


@pytest.mark.parametrize("through", ["a folder of links", "a link to the folder", "the folder"])
def test_what_a_killed_command_left_is_fetched_or_refused(
    through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    left = here(RUN)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    mirror.release()
    monkeypatch.undo()
    monkeypatch.setenv("FARCAST_CACHE_DIR", str(tmp_path / "cache"))
    place = tmp_path / "links"
    if through == "a folder of links":
        place.mkdir()
        for file in left.iterdir():
            (place / file.name).symlink_to(file)
        with pytest.raises(UnreadableError, match="holds only parts of a file of memory://store/run"):
            api.fit(place)
    else:
        place.symlink_to(left)
        found = api.fit(left if through == "the folder" else place)
        assert np.array_equal(found.fitted.gram.matrix, api.fit(run).fitted.gram.matrix)


def test_no_file_of_a_store_is_mapped_or_read_past_it(tmp_path: Path) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS[:1], shapes=LARGE))
    name = "step_000100.safetensors"
    found = np.zeros(1000, np.uint8)
    Reader("mmap").fill(here(RUN) / name, 3_000_000, found)
    assert found.tobytes() == (run / name).read_bytes()[3_000_000:3_001_000]
    assert np.any(found)
    assert Reader().for_kernel([(here(RUN) / name, 0, 1000)]) is None


def test_predict_fetches_whole_files_and_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    monkeypatch.chdir(tmp_path)
    phases: dict[str, list[int]] = {}

    def progress(phase: str, total: int) -> Callable[[int], None]:
        phases[phase] = [total]
        return phases[phase].append

    done = api.predict(RUN, horizon=100, method="persistence", output="out.safetensors", even_if_worse=True, progress=progress)
    assert done.path is not None
    total, *told = phases["fetch"]
    assert total == (run / "step_000600.safetensors").stat().st_size
    assert 0.8 * total < sum(told) <= total


def test_all_values_are_those_of_the_run_here(tmp_path: Path) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    local, there = api.fit(run, full=True, io="mmap"), api.fit(RUN, full=True, io="mmap")
    assert np.array_equal(local.fitted.gram.matrix, there.fitted.gram.matrix)


def test_the_files_go_and_a_forecaster_leads_to_the_run_again(tmp_path: Path, cache: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    assert call_cli("fit", RUN, cwd=tmp_path).returncode == 0
    mirror.release()
    assert not [path for path in cache.rglob("*") if path.suffix == ".pt"]
    done = call_cli("predict", cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / done.stdout.strip()).is_file()
    mirror.release()
    left = call_cli("verify", done.stdout.strip(), "--against", SAMPLES / "truth" / "plain" / "step_2000.pt", cwd=tmp_path)
    assert "cannot be read" not in left.stderr


def test_messages_and_json_name_the_address(tmp_path: Path, call_cli: CallCli) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))
    done = call_cli("inspect", RUN, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert f'"{RUN}' in done.stdout
    assert "cache" not in done.stdout
    with fsspec.open(f"{RUN}/step_000400.safetensors", "wb") as file:
        file.write(b"no checkpoint at all, and not a header")
    done = call_cli("fit", RUN, cwd=tmp_path)
    assert done.returncode != 0
    assert f"{RUN}/step_000400.safetensors" in done.stderr
    assert "cache" not in done.stderr
    assert not (tmp_path / "forecaster.safetensors").exists()


def test_a_file_that_changes_on_the_store_is_an_error(tmp_path: Path) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))

    def change(_phase: str, _total: int) -> Callable[[int], None]:
        upload(make_loose_run(tmp_path / "other", [400], seed=1))
        return lambda _: None

    with pytest.raises(SnapshotError, match=r"memory://store/run/step_000400\.safetensors: changed while it was read"):
        api.fit(RUN, progress=change, output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_times_of_saving_are_those_of_the_store(tmp_path: Path) -> None:
    """In the order of saving, steps that fall once and rise again are two runs."""
    run = make_loose_run(tmp_path / "run", STEPS)
    store = fsspec.filesystem("memory")
    upload(run)
    for number, step in enumerate((400, 500, 600, 100, 200, 300)):
        saved = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number)
        store.store[f"/store/run/step_000{step}.safetensors"].created = saved
    with pytest.raises(SnapshotError, match="two runs, or one that began again"):
        api.fit(RUN)


def test_a_run_that_grew_is_seen_with_its_new_checkpoint(tmp_path: Path) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))
    assert api.fit(RUN).fitted.steps[-1] == 600
    upload(make_loose_run(tmp_path / "more", [700]), RUN)
    assert api.fit(RUN).fitted.steps[-1] == 700


def test_a_connection_that_breaks_publishes_nothing(tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    store, left = type(fsspec.filesystem("memory")), [40]
    whole = store.cat_file

    def breaks(self: Any, *args: Any, **options: Any) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        found: bytes = whole(self, *args, **options)
        return found

    monkeypatch.setattr(store, "cat_file", breaks)
    done = call_cli("predict", RUN, cwd=tmp_path)
    assert done.returncode == UnreadableError.exit_code
    (line,) = done.errors
    assert line.startswith(f"error: {RUN}/step_000")
    assert "Connection reset by peer" in line
    assert not (tmp_path / "forecasts").exists()


@pytest.mark.parametrize(("more", "told"), [(4, "more than the range"), (-4, "file ends early")])
def test_a_store_that_gives_other_than_the_range_is_an_error(
    more: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    store = type(fsspec.filesystem("memory"))
    whole = store.cat_file
    monkeypatch.setattr(
        store, "cat_file", lambda self, key, start, end, **options: whole(self, key, start=start, end=end + more, **options)
    )
    with pytest.raises(FarcastError, match=told):
        api.fit(RUN)


def test_the_evaluation_command_sees_whole_files(tmp_path: Path, call_cli: CallCli) -> None:
    run = upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    origin = run / "step_000600.safetensors"
    script = tmp_path / "score.py"
    script.write_text(
        f"import sys\nsame = open(sys.argv[1], 'rb').read() == open({str(origin)!r}, 'rb').read()\nprint(1.0 if same else 0.5)\n"
    )
    done = call_cli(
        "predict", RUN, "--horizon", 100, "--even-if-worse", "--eval-cmd", f"{sys.executable} {script} {{ckpt}}", cwd=tmp_path
    )
    assert done.returncode == 0
    assert "0.5" in done.stderr
    assert "1.0" in done.stderr or "1 " in done.stderr


@pytest.mark.parametrize("blocked", ["fsspec", "s3fs"])
def test_a_missing_package_is_one_line_with_the_command(
    blocked: str, tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, blocked, None)
    done = call_cli("fit", "s3://bucket/run", cwd=tmp_path)
    assert (done.returncode, len(done.errors)) == (2, 1)
    assert done.errors[0].startswith("error: s3://bucket/run: ")
    assert done.hints == ["hint: pip install 'farcast[remote]'"]


def test_an_address_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, call_cli: CallCli) -> None:
    for address in ("s3://key:hidden@bucket/run", "s3://bucket/run?token=hidden"):
        done = call_cli("fit", address, cwd=tmp_path)
        assert done.returncode == 2
        assert "hidden" not in done.stderr
        assert done.errors == ["error: s3://...: an address with a password or a query is refused"]


def test_no_message_repeats_a_secret(tmp_path: Path, call_cli: CallCli) -> None:
    for arguments in (
        ("inspect", "https://key:hidden@host/run?token=hidden"),
        ("keep", "s3://key:hidden@bucket/run"),
        ("fit", SAMPLES / "plain", "-o", "s3://key:hidden@bucket/run?token=hidden"),
        ("predict", "--forecaster", "s3://key:hidden@bucket/run"),
    ):
        done = call_cli(*arguments, cwd=tmp_path)
        assert (done.returncode, len(done.errors)) == (2, 1)
        assert "hidden" not in done.stderr


def test_what_the_client_says_of_the_endpoint_is_told_without_its_secrets(
    tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1/?token=hidden")
    done = call_cli("inspect", "s3://bucket/run", cwd=tmp_path)
    assert done.returncode == 4
    assert "http://127.0.0.1:1/?..." in done.stderr
    assert "hidden" not in done.stderr


@pytest.mark.parametrize("rest", ["bucket/a/../", "bucket/./a/", "bucket//a/", "bucket/a::file:///b", ""])
def test_an_address_that_leads_elsewhere_is_refused(rest: str, tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", SAMPLES / "plain", "-o", f"s3://{rest}", cwd=tmp_path)
    assert done.returncode == 2
    assert "is refused" in done.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_forecaster_file_may_lie_on_a_store(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    assert call_cli("fit", RUN, cwd=tmp_path).returncode == 0
    (tmp_path / "fc").mkdir()
    (tmp_path / "forecaster.safetensors").rename(tmp_path / "fc" / "forecaster.safetensors")
    upload(tmp_path / "fc", "memory://store/fc")
    for command in ("predict", "backtest", "report"):
        mirror.release()
        there = call_cli(command, "--forecaster", "memory://store/fc/forecaster.safetensors", cwd=tmp_path)
        mirror.release()
        local = call_cli(command, "--forecaster", tmp_path / "fc" / "forecaster.safetensors", cwd=tmp_path)
        assert (there.returncode, there.stdout) == (local.returncode, local.stdout)
        assert there.returncode == 0
        assert "memory:/store" not in there.stderr.replace("memory://", "")


@pytest.mark.parametrize("path", [r"C:\runs\a", "C:/runs/a", "c://runs/a", "runs/s3:/a", "./s3", "https://host/a"])
def test_a_path_is_no_address(path: str) -> None:
    assert address_of(path) is None


def test_an_empty_address_says_so(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "memory://store/nothing", cwd=tmp_path)
    assert (done.returncode, done.errors) == (
        3,
        ["error: memory://store/nothing: expected a folder of checkpoints, found no files"],
    )


def test_a_second_process_does_not_share_the_files(tmp_path: Path, cache: Path, call_cli: CallCli) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))
    api.fit(RUN)
    (home,) = mirror._open
    taken = mirror._open.pop(home)  # another process, for all that the second one knows
    done = call_cli("fit", RUN, cwd=tmp_path)
    mirror._open[home] = taken
    assert done.returncode == 5
    assert "another farcast command uses this address" in done.stderr
    assert cache.is_dir()


def test_a_name_that_leads_out_of_the_run_is_refused(tmp_path: Path, call_cli: CallCli) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))
    store = fsspec.filesystem("memory").store
    store["/store/run/../../../escaped.pt"] = store[min(store)]
    done = call_cli("fit", RUN, cwd=tmp_path)
    assert done.returncode == 4
    assert "a file is called 'run/../../../escaped.pt'" in done.stderr


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12), st.integers(0, 30), st.integers(0, 30))
def test_what_is_missing_is_what_was_not_added(added: list[tuple[int, int]], begin: int, count: int) -> None:
    spans, present = Spans(), set[int]()
    for first, size in added:
        spans.add(first, first + size)
        present |= set(range(first, first + size))
    missing = [byte for a, b in spans.missing(begin, begin + count) for byte in range(a, b)]
    assert missing == [byte for byte in range(begin, begin + count) if byte not in present]


def test_requests_are_joined_over_small_gaps_and_cut_where_they_are_large() -> None:
    far = 3 * JOINED_GAP
    assert list(requests([(0, 10), (JOINED_GAP, JOINED_GAP + 5), (far, far + 1)])) == [(0, JOINED_GAP + 5), (far, far + 1)]
    cut = list(requests([(0, 2 * MAX_REQUEST + 1)]))
    assert [end - begin for begin, end in cut] == [MAX_REQUEST, MAX_REQUEST, 1]


def test_zip_records_are_read_whatever_their_number(tmp_path: Path) -> None:
    weights = {f"layer.{i}": torch.randn(200, 200) for i in range(20)}
    for step in STEPS:
        (tmp_path / "run").mkdir(exist_ok=True)
        weights = {name: value + 0.01 for name, value in weights.items()}
        torch.save({"model": weights, "step": step}, tmp_path / "run" / f"step_{step}.pt")
    upload(tmp_path / "run")
    local, there = api.fit(tmp_path / "run"), api.fit(RUN)
    assert np.array_equal(local.fitted.gram.matrix, there.fitted.gram.matrix)
    assert fetched().num_requests < 30 * len(STEPS)
    root = fetched().place
    assert read_bytes(root / "step_600.pt", 0, 3_000_000) == (tmp_path / "run" / "step_600.pt").read_bytes()[:3_000_000]


# --- names of places, and the cache ----------------------------------------------------------------------------------


def test_forecaster_sidecar_and_ledger_name_the_address(
    tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(SAMPLES / "plain")
    assert call_cli("fit", RUN, cwd=tmp_path).returncode == 0
    mirror.release()
    monkeypatch.setenv("FARCAST_CACHE_DIR", str(tmp_path / "another machine"))
    done = call_cli("predict", "-o", "out/", cwd=tmp_path)
    assert done.returncode == 0
    (sidecar,) = (tmp_path / "out").glob("*.farcast.json")
    told = json.loads(sidecar.read_text())
    assert told["run"] == RUN
    assert told["origin"].startswith(f"{RUN}/")
    (line,) = (tmp_path / "forecasts" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["run"] == RUN
    assert json.loads(line)["forecast"] == f"../out/{told['name']}"
    assert b"cache" not in (tmp_path / "forecaster.safetensors").read_bytes()


def test_the_same_prediction_of_a_remote_run_is_there_already(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    first = call_cli("predict", RUN, cwd=tmp_path)
    mirror.release()
    again = call_cli("predict", RUN, "--json", cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0)
    assert json.loads(again.stdout)["existed"] is True


def test_what_a_killed_command_left_goes_with_the_next_one(tmp_path: Path, cache: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    left = cache / "0123456789abcdef"
    (left / "files" / "old").mkdir(parents=True)
    (left / "lock").touch()
    (left / "files" / "old" / "step_1.pt").write_bytes(b"x")
    assert call_cli("inspect", RUN, cwd=tmp_path).returncode == 0
    assert not (left / "files").exists()


def test_files_that_the_disk_has_no_room_for_are_not_begun(
    tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS, shapes=LARGE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    done = call_cli("predict", RUN, "--horizon", 100, "--even-if-worse", "--method", "persistence", cwd=tmp_path)
    assert done.returncode == 5
    assert f"bytes of {RUN}: 1048576 are free" in done.stderr
    assert done.hints == ["hint: FARCAST_CACHE_DIR=DIR names a folder on a larger disk"]


def test_a_file_address_is_the_path(tmp_path: Path, call_cli: CallCli) -> None:
    shutil.copytree(SAMPLES / "plain", tmp_path / "plain")
    done = call_cli("inspect", f"file://{tmp_path / 'plain'}", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert str(tmp_path / "plain") in done.stdout


# --- outputs ---------------------------------------------------------------------------------------------------------


def stored() -> dict[str, bytes]:
    """The files of the store in memory, in the order of their coming."""
    return {name: file.getvalue() for name, file in fsspec.filesystem("memory").store.items()}


def below(prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(prefix): data for name, data in stored().items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", ["huggingface", "plain", "safetensors"])
@pytest.mark.parametrize("source", ["local", "remote"])
def test_an_output_at_an_address_is_uploaded(name: str, source: str, tmp_path: Path, call_cli: CallCli) -> None:
    shutil.copytree(SAMPLES / name, tmp_path / "here" / name)
    upload(SAMPLES / name, f"memory://store/{name}")
    before = stored()
    local = call_cli("predict", name, "-o", "out/", cwd=tmp_path / "here")
    run = name if source == "local" else f"memory://store/{name}"
    done = call_cli("predict", run, "-o", "memory://store/leaps/", cwd=tmp_path / "here")
    final = local.stdout.strip().removeprefix("out/")
    assert (done.returncode, done.stdout) == (0, f"memory://store/leaps/{final}\n")
    found = below("/store/leaps/")
    assert {name: data for name, data in found.items() if not name.endswith("farcast.json")} == files_in(
        tmp_path / "here" / "out"
    )
    assert b"/cache/" not in b"".join(data for name, data in found.items() if name.endswith("farcast.json"))
    assert before.items() <= stored().items()
    assert next(reversed(found)).endswith(("model.safetensors", final))
    assert "leaps" in (tmp_path / "here" / "forecasts" / "ledger.jsonl").read_text()
    mirror.release()
    again = call_cli("predict", run, "-o", "memory://store/leaps/", "--json", cwd=tmp_path / "here")
    assert (again.returncode, json.loads(again.stdout)["existed"]) == (0, True)
    assert json.loads(again.stdout)["path"] == f"memory://store/leaps/{final}"


def test_an_uploaded_forecast_is_verified_where_it_is(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    done = call_cli("predict", RUN, "-o", "memory://store/leaps/", cwd=tmp_path)
    mirror.release()
    truth = SAMPLES / "truth" / "plain" / "step_2000.pt"
    there = call_cli("verify", done.stdout.strip(), "--against", truth, "--json", cwd=tmp_path)
    shutil.copytree(SAMPLES / "plain", tmp_path / "plain")
    local = call_cli("predict", "plain", "-o", "out/", cwd=tmp_path)
    here = call_cli("verify", local.stdout.strip(), "--against", truth, "--json", cwd=tmp_path)
    assert there.returncode == here.returncode == 0
    assert json.loads(there.stdout)["ratio"] == json.loads(here.stdout)["ratio"]


def test_objects_that_are_there_stay_without_overwrite(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "huggingface")
    out = "memory://store/leaps/checkpoint-9"
    store = fsspec.filesystem("memory")
    store.pipe_file("/store/leaps/checkpoint-9/notes.txt", b"mine")
    before = stored()
    for more, told in ((), "exists already"), (("--overwrite",), "is not a forecast"):
        done = call_cli("predict", RUN, "-o", out, *more, cwd=tmp_path)
        assert done.returncode == 5
        assert out in done.errors[0]
        assert told in done.errors[0]
        assert stored() == before
    store.rm_file("/store/leaps/checkpoint-9/notes.txt")
    assert call_cli("predict", RUN, "-o", out, cwd=tmp_path).returncode == 0
    first = below("/store/leaps/")
    done = call_cli("predict", RUN, "-o", out, "--scale", 0.5, "--overwrite", "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 0
    assert below("/store/leaps/").keys() == first.keys()
    assert below("/store/leaps/") != first


def test_what_lies_beside_an_output_stays(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "plain")
    store = fsspec.filesystem("memory")
    for name in ("leaps/notes.txt", "leaps/other/model.safetensors", "leaps/step_2350.pt.bak", "leaps2/x", "leap"):
        store.pipe_file(f"/store/{name}", b"mine")
    before = stored()
    for more in ((), ("--overwrite", "--even-if-worse", "--scale", 0.5)):
        done = call_cli("predict", RUN, "-o", "memory://store/leaps/", *more, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "memory://store/leaps/step_2350.pt\n")
        assert before.items() <= stored().items()
        mirror.release()


@pytest.mark.parametrize(
    ("phase", "ending"), [("upload", ""), ("upload", ".farcast.json"), ("upload", "/of mine"), ("sync to disk", "")]
)
def test_what_came_to_the_address_in_the_meantime_stays(
    phase: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_loose_run(tmp_path / "run", STEPS)
    monkeypatch.chdir(tmp_path)

    def progress(now: str, _total: int) -> Callable[[int], None]:
        if now == phase:
            fsspec.filesystem("memory").pipe_file(f"/store/leaps/step_000700.safetensors{ending}", b"mine")
        return lambda _: None

    with pytest.raises(OutputError, match=f"step_000700.safetensors{ending}: changed on the store"):
        api.predict(run, horizon=100, even_if_worse=True, output="memory://store/leaps/", progress=progress)
    assert stored() == {f"/store/leaps/step_000700.safetensors{ending}": b"mine"}
    assert not (tmp_path / "forecasts" / "ledger.jsonl").exists()


def test_an_output_does_not_lie_inside_the_run(tmp_path: Path, call_cli: CallCli) -> None:
    upload(SAMPLES / "huggingface")
    before = stored()
    for out in (f"{RUN}/forecast", f"{RUN}/", RUN):
        done = call_cli("predict", RUN, "-o", out, cwd=tmp_path)
        assert done.returncode == 5
        assert f"lies inside the run's folder {RUN}" in done.errors[0]
    assert stored() == before


def test_what_cannot_be_uploaded_is_refused_first(tmp_path: Path, call_cli: CallCli) -> None:
    for arguments, told in (
        (
            ("-o", "memory://store/out", "--eval-cmd", "true {ckpt}"),
            "error: --eval-cmd: expected a local output, found memory://store/out",
        ),
        (
            ("-o", "hf://owner/name/out"),
            "error: hf://owner/name/out: farcast does not write to the Hub, where each file is a commit of its own",
        ),
    ):
        done = call_cli("predict", *arguments, cwd=tmp_path)
        assert (done.returncode, done.errors) == (2, [told])


def _trainer(folder: Path) -> None:
    shutil.copytree(next((SAMPLES / "huggingface").glob("checkpoint-*")), folder)


def _shards(folder: Path) -> None:
    _trainer(folder)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").unlink()
    for name in names:
        save_file({name: torch.ones(4)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))


def _bare_shards(folder: Path) -> None:
    _shards(folder)
    (folder / "trainer_state.json").unlink()


def _distributed(folder: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a single process
        save({"model": {"w": torch.ones(4)}}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("make", [_trainer, _shards, _bare_shards, _distributed])
def test_a_folder_without_its_deciding_files_is_no_checkpoint(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-600"
    make(folder)
    open_snapshot(folder)
    for file in deciding([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]):
        (folder / file).unlink()
    with pytest.raises(FarcastError):
        open_snapshot(folder)


# --- a real S3 server ------------------------------------------------------------------------------------------------


class Faults:
    """Between a client and a server: HTTP requests pass, but for those that `refuse` answers with a status."""

    def __init__(self, host: str, port: int) -> None:
        self.refuse: Callable[[str, str], int] = lambda _method, _path: 0
        self.seen: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen.append((self.command, self.path))
                status, headers, content = outer.refuse(self.command, self.path), {}, b""
                if not status:
                    server = http.client.HTTPConnection(host, port)
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    status, headers, content = answer.status, dict(answer.getheaders()), answer.read()
                    server.close()
                self.send_response(status)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                for name, value in headers.items():
                    if name not in {"Content-Length", "Transfer-Encoding", "Connection"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 - as http.server has them

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def faults(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The S3 server, with faults."""
    import s3fs

    url = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    found = Faults(str(url.hostname), int(url.port or 0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.server.server_port}")
    s3fs.S3FileSystem.clear_instance_cache()
    assert bucket
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on this machine, with one bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "hidden"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urlopen(f"http://{host}:{port}/moto-api/reset", b"").close()  # its buckets outlive it
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "bucket"
    server.stop()


def test_a_run_on_s3_gives_the_same_forecast(bucket: str, tmp_path: Path, call_cli: CallCli) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(SAMPLES / "plain"), f"{bucket}/plain", recursive=True)
    shutil.copytree(SAMPLES / "plain", tmp_path / "here" / "plain")
    (tmp_path / "there").mkdir()
    local = call_cli("predict", "plain", "-o", "out/", cwd=tmp_path / "here")
    there = call_cli("predict", f"s3://{bucket}/plain", "-o", "out/", cwd=tmp_path / "there")
    assert (there.returncode, there.stdout) == (0, local.stdout)
    assert files_in(tmp_path / "there" / "out") == files_in(tmp_path / "here" / "out") != {}
    texts = "".join(p.read_text() for p in (tmp_path / "there").rglob("*.json*"))
    assert "hidden" not in texts + there.stderr


def test_an_output_on_s3_is_uploaded_in_parts_and_its_weights_come_last(
    bucket: str, faults: Faults, tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr("farcast_cli.remote.upload.PART_BYTES", 5 << 20)
    make_loose_run(tmp_path / "run", STEPS, shapes=LARGE)
    local = call_cli("predict", "run", "-o", "out/", *FORCED, cwd=tmp_path)
    done = call_cli("predict", "run", "-o", f"s3://{bucket}/leaps/", *FORCED, cwd=tmp_path)
    final = local.stdout.strip().removeprefix("out/")
    assert (done.returncode, done.stdout) == (0, f"s3://{bucket}/leaps/{final}\n")
    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    assert files.cat_file(f"{bucket}/leaps/{final}") == (tmp_path / "out" / final).read_bytes()
    sent = [path for method, path in faults.seen if method in {"PUT", "POST"}]
    assert sum("partNumber=" in path for path in sent) == 2
    assert f"{final}?" in sent[-1]
    assert f"/leaps/{final}.farcast.json" in " ".join(sent[:-1])
    mirror.release()
    again = call_cli("predict", "run", "-o", f"s3://{bucket}/leaps/", *FORCED, "--json", cwd=tmp_path)
    assert (again.returncode, json.loads(again.stdout)["existed"]) == (0, True)


@pytest.mark.parametrize("refused", ["partNumber=2", "uploadId=", "farcast.json"])
def test_an_upload_that_fails_leaves_nothing(  # noqa: PLR0917 - fixtures
    refused: str, bucket: str, faults: Faults, tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr("farcast_cli.remote.upload.PART_BYTES", 5 << 20)
    make_loose_run(tmp_path / "run", STEPS, shapes=LARGE)
    faults.refuse = lambda method, path: 403 if method in {"PUT", "POST"} and refused in path else 0
    done = call_cli("predict", "run", "-o", f"s3://{bucket}/leaps/", *FORCED, cwd=tmp_path)
    assert done.returncode == 6
    (line,) = done.errors
    assert line.startswith(f"error: s3://{bucket}/leaps: cannot be written: PermissionError")
    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    assert files.find(f"{bucket}/leaps") == []
    assert files.list_multipart_uploads(bucket) == []
    assert not (tmp_path / "forecasts" / "ledger.jsonl").exists()


def test_an_upload_whose_rest_cannot_be_removed_names_it(
    bucket: str, faults: Faults, tmp_path: Path, call_cli: CallCli
) -> None:
    make_loose_run(tmp_path / "run", STEPS)
    out = f"s3://{bucket}/leaps/step.safetensors"
    begun: list[str] = []

    def stop(method: str, path: str) -> int:
        begun.extend([path] if method == "PUT" else [])
        return 403 if begun[1:] else 0

    faults.refuse = stop
    done = call_cli("predict", "run", "-o", out, *FORCED, cwd=tmp_path)
    assert done.returncode == 6
    assert f"may still be there: {out}, {out}.farcast.json" in done.errors[0]


def test_a_store_without_credentials_is_exit_code_6(
    bucket: str, tmp_path: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    make_loose_run(tmp_path / "run", STEPS)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    done = call_cli("predict", "run", "-o", f"s3://{bucket}/leaps/", *FORCED, cwd=tmp_path)
    assert done.returncode == 6
    assert "usual credentials" in done.hints[0]
    assert not (tmp_path / "forecasts" / "ledger.jsonl").exists()


def test_a_fault_of_the_server_that_passes_is_no_error(
    bucket: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    run = make_loose_run(tmp_path / "run", STEPS)
    s3fs.S3FileSystem().put(str(run), f"{bucket}/run", recursive=True)
    monkeypatch.setattr("farcast_cli.remote.store.WAITS_S", (0.01, 0.01, 0.01))
    met: list[str] = []

    def twice(method: str, path: str) -> int:
        is_first = method == "GET" and "step_000300" in path and met.count(path) < 2
        met.append(path)
        return 500 if is_first else 0

    faults.refuse = twice
    there = api.fit(f"s3://{bucket}/run")
    assert len(met) > 2
    assert np.array_equal(api.fit(run).fitted.gram.matrix, there.fitted.gram.matrix)


def test_api_refuses_what_the_command_refuses() -> None:
    with pytest.raises(UsageError, match="a password or a query"):
        api.fit("s3://key:word@bucket/run")
