"""The file of rows for `farcast tune`: what is read from it, and that no damaged or hostile one does more than stop it."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farcast_cli.errors import DataError, FileFormatError, SnapshotError, UnsafeFileError
from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.data import Draw, Fit, read_anchors, read_data
from farcast_cli.tune.rows_file import BLOCK_BYTES, MAX_HEADER_BYTES, open_rows
from farcast_cli.tune.weight import Weight, find_weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import CallCli

NUM_INPUTS, NUM_OUTPUTS, NUM_ROWS = 6, 64, 80
CALL = ("tune", "step_10.safetensors", "--layer", "fc.weight", "--data", "rows.npz", "--loss", "mse", "-o", "out.safetensors")
X = np.random.default_rng(0).normal(size=(NUM_ROWS, NUM_INPUTS))
Y = np.random.default_rng(1).normal(size=(NUM_ROWS, NUM_OUTPUTS))


@pytest.fixture
def layer(tmp_path: Path) -> Weight:
    """A layer that the rows fit, in `step_10.safetensors`."""
    weights = {"fc.weight": torch.from_numpy(np.random.default_rng(2).normal(size=(NUM_OUTPUTS, NUM_INPUTS)))}
    save_file(weights, tmp_path / "step_10.safetensors", metadata={"format": "pt"})
    return find_weight(open_snapshot(tmp_path / "step_10.safetensors"), "fc.weight")


def npy(shape: object, descr: str = "<f8", data: bytes = b"", *, order: str = "False", version: int = 1) -> bytes:
    """An .npy with any header that one likes."""
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def of(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def rows(x: bytes, *, method: int = zipfile.ZIP_STORED) -> bytes:
    return archive(("x.npy", x), ("y.npy", of(Y)), method=method)


def patched(content: bytes, *, at: int, in_directory: int, value: int) -> bytes:
    """A 16-bit field of the first member changed, in its own header and in the directory."""
    found = bytearray(content)
    struct.pack_into("<H", found, at, value)
    struct.pack_into("<H", found, content.index(b"PK\x01\x02") + in_directory, value)
    return bytes(found)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


def many_records() -> bytes:
    """A directory of two MiB, which is a record for each 50 bytes."""
    return archive(("x.npy", of(X)), ("y.npy", of(Y)), *((f"{number:05}", b"") for number in range(2 * MAX_HEADER_BYTES // 50)))


DAMAGED: dict[str, tuple[Callable[[], bytes], int, tuple[str, ...]]] = {
    "rows that are not there": (
        lambda: rows(npy((2**40, NUM_INPUTS))),
        4,
        ("x.npy", "expected 52776558133248 bytes of data, found 0"),
    ),
    "more rows than there are numbers": (lambda: rows(npy((2**62, 4))), 4, ("x.npy", "found 0")),
    "a negative size": (lambda: rows(npy((-1, NUM_INPUTS))), 4, ("without negative sizes", "[-1, 6]")),
    "two negative sizes": (lambda: rows(npy((-2, -3), data=bytes(48))), 4, ("without negative sizes", "[-2, -3]")),
    "more data than the header says": (lambda: rows(of(X) + bytes(8)), 4, ("expected 3840 bytes of data, found 3848",)),
    "less data than the header says": (lambda: rows(of(X)[:-8]), 4, ("expected 3840 bytes of data, found 3832",)),
    "objects": (lambda: rows(of(np.array([{"a": 1}], dtype=object))), 4, ("x.npy", "pickled objects")),
    "claimed objects": (lambda: rows(npy((NUM_ROWS, NUM_INPUTS), "|O", b"x")), 4, ("pickled objects",)),
    "a structure": (lambda: rows(of(np.zeros(4, dtype=[("a", "f8"), ("b", "O")]))), 4, ("pickled objects",)),
    "a structure of numbers": (lambda: rows(of(np.zeros((4, 2), dtype=[("a", "f8")]))), 3, ("expected rows of numbers",)),
    "elements of a gigabyte": (lambda: rows(npy((1, 1), "|V1073741824")), 3, ("expected rows of numbers", "|V1073741824")),
    "no type of numpy's": (lambda: rows(npy((2, 2), "<q9")), 3, ("expected rows of numbers", "<q9")),
    "a 0 as fortran_order": (lambda: rows(npy(X.shape, data=X.tobytes(), order="0")), 4, ("expected True or False",)),
    "a space of another kind": (lambda: rows(of(X).replace(b"} ", b"}\xa0", 1)), 4, ("its header cannot be read",)),
    "no zip from the start": (lambda: flipped(rows(of(X)), 1), 4, ("not a zip file",)),
    "a shape of letters": (lambda: rows(npy("('a', 2)")), 4, ("its header cannot be read",)),
    "a header that calls": (lambda: rows(npy("__import__('os').getcwd()")), 4, ("its header cannot be read",)),
    "a header of brackets": (lambda: rows(npy("(" * 5000)), 4, ("its header cannot be read",)),
    "a header of 60 kB": (lambda: rows(npy("(" * 60_000)), 4, ("at most 10000 bytes, found 60",)),
    "a header of 4 GB": (
        lambda: rows(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)),
        4,
        ("at most 10000 bytes, found 4294967295",),
    ),
    "a header cut short": (lambda: rows(of(X)[:40]), 4, ("its header cannot be read",)),
    "a later version": (lambda: rows(npy((2, 2), version=9)), 4, (".npy format 1.0 or 2.0",)),
    "no array": (lambda: rows(b"nonsense"), 4, ("expected an array of numbers", "nonsense")),
    "an empty member": (lambda: rows(b""), 4, ("expected an array of numbers",)),
    "an encrypted member": (
        lambda: patched(rows(of(X)), at=6, in_directory=8, value=1),
        4,
        ("x.npy", "stored or deflated, found one encrypted"),
    ),
    "an unknown compression": (lambda: patched(rows(of(X)), at=8, in_directory=10, value=99), 4, ("method 99",)),
    "another compression": (lambda: rows(of(X), method=zipfile.ZIP_LZMA), 4, ("compressed by method 14",)),
    "a newer zip": (lambda: patched(rows(of(X)), at=4, in_directory=6, value=99), 4, ("rows.npz",)),
    "a wrong checksum": (lambda: flipped(rows(of(X)), 2000), 4, ("x.npy", "CRC")),
    "a broken stream": (lambda: flipped(rows(of(X), method=zipfile.ZIP_DEFLATED), 400), 4, ("rows.npz",)),
    "an array twice": (
        lambda: archive(("x.npy", of(X)), ("x", of(X)), ("y.npy", of(Y))),
        3,
        ("expected one array 'x', found 2",),
    ),
    "a directory of two MiB": (many_records, 4, ("its directory: expected at most 1048576 bytes",)),
    "a file cut short": (lambda: rows(of(X))[:-30], 4, ("rows.npz",)),
    "nothing": (lambda: b"", 4, ("rows.npz",)),
    "no rows": (lambda: rows(of(X[:0])), 3, ("expected rows of numbers", "[0, 6]")),
    "a single number": (lambda: rows(of(np.array(1.0))), 3, ("expected rows of numbers", "[]")),
    "text": (lambda: rows(of(X.astype(str))), 3, ("expected rows of numbers",)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_hostile_archive_is_refused_in_one_line(
    layer: Weight, tmp_path: Path, call_cli: CallCli, case: str
) -> None:
    content, code, words = DAMAGED[case]
    (tmp_path / "rows.npz").write_bytes(content())
    done = call_cli(*CALL, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.errors)) == (code, "", 1), done
    assert "rows.npz" in done.errors[0]
    assert all(word in done.errors[0] for word in words), done.errors[0]
    assert not (tmp_path / "out.safetensors").exists()
    assert layer.num_inputs == NUM_INPUTS


def test_whatever_byte_of_an_archive_is_wrong_it_is_read_as_it_was_or_refused(tmp_path: Path) -> None:
    """Flips and cuts anywhere, of both kinds of members."""
    random, refused = np.random.default_rng(3), 0
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        whole = archive(("x.npy", of(X[:8])), ("y.npy", of(Y[:8, :4])), method=method)
        for _ in range(300):
            broken = bytearray(whole)
            if random.random() < 0.2:
                del broken[random.integers(len(broken)) :]
            for at in random.integers(0, max(1, len(broken)), size=random.integers(1, 4)):
                broken[at : at + 1] = random.bytes(len(broken[at : at + 1]))
            (tmp_path / "rows.npz").write_bytes(broken)
            try:
                found = read_data(tmp_path / "rows.npz", "mse")
            except (FileFormatError, SnapshotError):
                refused += 1
            else:
                assert np.array_equal(found.inputs, X[:8])
                assert np.array_equal(found.targets, Y[:8, :4])
    assert refused > 400


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8])
def test_rows_of_every_kind_of_number_are_read_as_float64(tmp_path: Path, ending: str, kind: type[np.generic]) -> None:
    x, y = (100 * abs(X)).astype(kind), (100 * abs(Y)).astype(kind)
    path = tmp_path / f"rows.{ending}"
    if ending == "npz":
        np.savez(path, x=x, y=y)
    else:
        save_file({"x": torch.from_numpy(x), "y": torch.from_numpy(y)}, path)
    found = read_data(path, "mse")
    assert found.inputs.dtype == found.targets.dtype == np.float64
    assert np.array_equal(found.inputs, x.astype(np.float64))
    assert np.array_equal(found.targets, y.astype(np.float64))


def test_arrays_stored_by_columns_and_compressed_are_read_alike(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "rows.npz", x=np.asfortranarray(X), y=Y[:, 0])
    found = read_data(tmp_path / "rows.npz", "mse")
    assert np.array_equal(found.inputs, X)
    assert np.array_equal(found.targets, Y[:, :1])


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_rows_of_several_blocks_are_all_read_and_drawn_by_their_place(tmp_path: Path, ending: str) -> None:
    num_rows = 3 * BLOCK_BYTES // 64 + 5
    x = np.arange(8.0 * num_rows).reshape(num_rows, 8)
    labels = np.arange(num_rows) % 7
    path = tmp_path / f"rows.{ending}"
    if ending == "npz":
        np.savez(path, x=x, y=labels)
    else:
        save_file({"x": torch.from_numpy(x), "y": torch.from_numpy(labels)}, path)
    chosen = np.sort(np.random.default_rng(4).permutation(num_rows)[:50])
    found = read_data(path, "cross-entropy", draw=Draw(50, seed=4))
    assert np.array_equal(found.inputs, x[chosen])
    assert np.array_equal(found.targets, labels[chosen])
    x[num_rows - 2, 3] = np.nan
    np.savez(tmp_path / "bad.npz", x=x, y=labels)
    with pytest.raises(DataError, match=f"x holds nan in row {num_rows - 2}, column 3"):  # a row that is not drawn
        read_data(tmp_path / "bad.npz", "cross-entropy", draw=Draw(1, seed=0))


def hole(path: Path, num_rows: int) -> None:
    """Rows of zeros that take no room on disk."""
    places, at = {}, 0
    for name, width in (("x", NUM_INPUTS), ("y", NUM_OUTPUTS)):
        places[name] = {"dtype": "U8", "shape": [num_rows, width], "data_offsets": [at, at + num_rows * width]}
        at += num_rows * width
    header = json.dumps(places).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)


def bomb(path: Path, num_rows: int) -> None:
    """Rows of zeros, which a zip stores in a thousandth of their size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, width in (("x.npy", NUM_INPUTS), ("y.npy", NUM_OUTPUTS)):
            with file.open(name, "w") as stream:
                stream.write(npy((num_rows, width)))
                for _ in range(8 * num_rows * width >> 20):
                    stream.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20


def test_rows_of_more_numbers_than_memory_is_given_for_are_refused_by_their_headers_alone(
    tmp_path: Path, layer: Weight
) -> None:
    hole(tmp_path / "rows.safetensors", 1 << 22)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"4194304 rows of 64, 2\.0 GiB in float64"):
        read_data(tmp_path / "rows.safetensors", "mse", fit=Fit([layer], NUM_OUTPUTS))
    assert tracemalloc.get_traced_memory()[1] < BLOCK_BYTES
    tracemalloc.stop()


def test_drawing_a_few_rows_takes_the_memory_of_a_few_blocks(tmp_path: Path, layer: Weight) -> None:
    """140 MiB of rows, all of which are looked at."""
    bomb(tmp_path / "rows.npz", 1 << 18)
    tracemalloc.start()
    with pytest.raises(DataError, match="x is constant: all 262144 rows are the same"):
        read_data(tmp_path / "rows.npz", "mse", fit=Fit([layer], NUM_OUTPUTS), draw=Draw(64, seed=0))
    assert tracemalloc.get_traced_memory()[1] < 5 * BLOCK_BYTES
    tracemalloc.stop()


def test_more_numbers_than_fit_a_gibibyte_are_refused_before_they_are_read(tmp_path: Path, layer: Weight) -> None:
    with (tmp_path / "anchors.safetensors").open("wb") as file:
        size = 1 << 28
        header = json.dumps({"x": {"dtype": "U8", "shape": [size // 6, 6], "data_offsets": [0, size // 6 * 6]}}).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size // 6 * 6)  # a hole, which takes no room on disk
    with pytest.raises(
        DataError, match=r"anchors\.safetensors: x: expected at most 134217728 numbers, found 44739242 rows of 6"
    ):
        read_anchors(tmp_path / "anchors.safetensors", layer)


def test_a_safetensors_file_with_a_large_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    names = {f"{number:06}": torch.zeros(1) for number in range(16_000)}
    save_file({"x": torch.from_numpy(X), "y": torch.from_numpy(Y), **names}, tmp_path / "rows.safetensors")
    with pytest.raises(FileFormatError, match="its header: expected at most 1048576 bytes"):
        read_data(tmp_path / "rows.safetensors", "mse")


def test_a_safetensors_file_that_is_damaged_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    save_file({"x": torch.from_numpy(X[:8]), "y": torch.from_numpy(Y[:8])}, tmp_path / "whole.safetensors")
    whole, random = (tmp_path / "whole.safetensors").read_bytes(), np.random.default_rng(5)
    for _ in range(300):
        broken = bytearray(whole)
        broken[random.integers(200)] = random.integers(256)
        (tmp_path / "rows.safetensors").write_bytes(broken)
        try:
            found = read_data(tmp_path / "rows.safetensors", "mse")
        except (FileFormatError, SnapshotError):
            pass
        else:
            assert found.num_rows == len(found.targets)


def test_objects_are_unsafe_whatever_else_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "rows.npz").write_bytes(rows(npy((-1, 2), "|O")))
    with pytest.raises(UnsafeFileError):
        read_data(tmp_path / "rows.npz", "mse")


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_single_number_is_no_rows(tmp_path: Path, ending: str) -> None:
    arrays: dict[str, Any] = {"x": np.array(1.0), "y": np.ones(2)}
    path = tmp_path / f"rows{ending}"
    np.savez(path, **arrays) if ending == ".npz" else save_file({k: torch.from_numpy(v) for k, v in arrays.items()}, path)
    with pytest.raises(DataError, match=r"x: expected rows of numbers, found float64 of shape \[\]"):
        open_rows(path, ("x", "y"))
