"""Runs on a remote store: the same answers as for the same run here, few bytes fetched, and nothing taken for zeros.

Most tests use fsspec's own store in memory. Those against an S3 server need s3fs and moto, and are skipped without them.
"""

from __future__ import annotations

import errno
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farcast_cli import api
from farcast_cli.engine.reader import Reader
from farcast_cli.errors import SnapshotError, UnreadableError, UsageError
from farcast_cli.files.reading import read_bytes
from farcast_cli.remote import mirror
from farcast_cli.remote.spans import JOINED_GAP, MAX_REQUEST, Spans, requests
from farcast_cli.remote.store import address_of
from farcast_cli.settings import here
from tests.conftest import CallCli, make_loose_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

fsspec = pytest.importorskip("fsspec")
SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"
RUN = "memory://store/run"
STEPS = range(100, 700, 100)
LARGE = {"wide": (1024, 2048)}  # 8 MiB


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own cache folder, and an empty store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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
    assert "another farcast command reads this run" in done.stderr
    assert cache.is_dir()


def test_a_name_that_leads_out_of_the_run_is_refused(tmp_path: Path, call_cli: CallCli) -> None:
    upload(make_loose_run(tmp_path / "run", STEPS))
    store = fsspec.filesystem("memory").store
    store["/store/run/../../../escaped.pt"] = store[min(store)]
    done = call_cli("fit", RUN, cwd=tmp_path)
    assert done.returncode == 4
    assert "a file is called '../../../escaped.pt'" in done.stderr


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
    root = fetched().root
    assert read_bytes(root / "step_600.pt", 0, 3_000_000) == (tmp_path / "run" / "step_600.pt").read_bytes()[:3_000_000]


# --- a real S3 server ------------------------------------------------------------------------------------------------


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


def test_api_refuses_what_the_command_refuses() -> None:
    with pytest.raises(UsageError, match="a password or a query"):
        api.fit("s3://key:word@bucket/run")
