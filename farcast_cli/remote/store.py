"""A folder on a remote store, by its address: what is in it, and ranges of its files. All use of fsspec is here.

Credentials are fsspec's own, from the environment or its configuration: farcast takes, prints and writes none.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError, TooFewSnapshotsError, UnreadableError, UnsafeFileError, UploadError, UsageError
from farcast_cli.files.place import SIDECAR
from farcast_cli.optional import need

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADDRESS = re.compile(r"(s3|gs|gcs|hf|az|abfs|memory):/{1,2}(?=[^/])(.+)", re.DOTALL)
"""pathlib makes one slash of two."""
_NOWHERE = re.compile(r"(s3|gs|gcs|hf|az|abfs):///*", re.DOTALL)
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
"""What the extra does not install."""
IN_FLIGHT = 64  # requests
_S3 = {"max_pool_connections": IN_FLIGHT, "connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
"""s3fs tries again itself; with botocore's tries inside each of its own, a broken connection took four minutes to be an error."""
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": _S3}}
WAITS_S = (0.2, 0.8, 3.2)
"""Before each further try; s3fs itself tries again where a connection breaks, but not where the server has a fault."""
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "created", "mtime", "LastModified", "last_modified")
"""Where the filesystems of fsspec tell one version of a file from another."""
_TIME_KEYS = ("LastModified", "last_modified", "updated", "mtime", "created")
_CREDENTIALS = "farcast uses the store's usual credentials, such as AWS_PROFILE for s3"


def address_of(text: str) -> str | None:
    """The address that a text is, in one form; None where it is a path.

    >>> address_of("s3:/bucket/run/"), address_of("C:/run"), address_of("https://host/run")
    ('s3://bucket/run', None, None)

    Raises:
        UsageError: it holds a password or a query, which the message does not repeat; or a part that leads elsewhere.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        if _NOWHERE.fullmatch(text):
            raise UsageError(f"{text}: an address without a bucket is refused", hint="such as s3://bucket/run")
        return None
    scheme, rest = found[1], found[2].rstrip("/")
    if "@" in rest.split("/", 1)[0] or "?" in rest:
        raise UsageError(f"{scheme}://...: an address with a password or a query is refused", hint=_CREDENTIALS)
    if not {"", ".", ".."}.isdisjoint(rest.split("/")) or "::" in rest:  # fsspec takes :: for several stores
        raise UsageError(f"{scheme}://{rest}: an address with an empty part, '.', '..' or '::' is refused")
    return f"{scheme}://{rest}"


def check_takes_files(address: str) -> None:
    """See that a store takes files as outputs need it: unseen until they are whole.

    Raises:
        UsageError: it does not.
    """
    if address.startswith("hf://"):
        raise UsageError(
            f"{address}: farcast does not write to the Hub, where each file is a commit of its own",
            hint="write to a local path, then: hf upload OWNER/NAME OUT",
        )


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the folder: its path on the store, its bytes, and a number that another version of it has not."""

    key: str
    num_bytes: int
    version: int
    saved_ns: int
    """When it was saved, in ns; 0 where the store does not tell."""


class Upload:
    """A file on its way to a store. It can be seen when it is closed, and only then."""

    def __init__(self, file: Any) -> None:
        self._file, self._is_ended = file, False

    def write(self, part: bytes) -> None:
        self._file.write(part)

    def close(self) -> None:
        """Let the file be seen."""
        self._file.close()
        self._is_ended = True

    def abort(self) -> None:
        """Throw away the parts, where it was not closed: otherwise the store keeps them, unseen, and bills them."""
        if not self._is_ended:
            self._is_ended = True
            try:
                self._file.discard()
            finally:
                with suppress(AttributeError):  # of files held back
                    self._file.closed = True  # or its removal from memory would close it


class _HeldBack(io.BytesIO):
    """A file for fsspec's store in memory, which would show it from its beginning."""

    def __init__(self, files: Any, key: str) -> None:
        super().__init__()
        self._files, self._key = files, key

    def close(self) -> None:
        if not self.closed:
            self._files.pipe_file(self._key, self.getvalue())
        super().close()

    def discard(self) -> None:
        super().close()

    __del__ = discard


class Store:
    """What is at an address of a remote store: all below a folder, or a file and its sidecar. Names are relative to `folder`."""

    def __init__(self, address: str, *, may_be_empty: bool = False) -> None:
        self.address, self._may_be_empty = address, may_be_empty
        self.folder, _, self.name = address.rpartition("/")
        self._open: tuple[int, Any, str] | None = None

    def _files(self) -> tuple[Any, str]:
        """The filesystem and the folder's path on it; a forked worker has a filesystem of its own."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), *self._connect())
        return self._open[1:]

    def _connect(self) -> tuple[Any, str]:
        need("fsspec", self.address)
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        scheme = self.address.partition("://")[0]
        try:
            return url_to_fs(self.address, **(_OPTIONS.get(scheme, {}) | conf.get(scheme, {})))  # type: ignore[no-any-return]
        except ImportError as error:
            package = _PACKAGES.get(scheme)
            command = f"pip install {package}" if package else "pip install 'farcast[remote]'"
            raise UsageError(f"{self.address}: its store needs a package: {error}", hint=command) from error
        except Exception as error:  # each store has errors of its own
            raise self._failed(self.address, error) from error

    def listed(self) -> dict[str, RemoteFile]:
        """The files at the address, as the store has them now.

        Raises:
            UsageError: a package is missing.
            TooFewSnapshotsError: there are none.
            UnreadableError: the store cannot be asked.
        """
        files, top = self._files()
        try:
            files.invalidate_cache()
            found: dict[str, Mapping[str, Any]] = files.find(top, detail=True)
            if set(found) <= {top} and files.exists(f"{top}.{SIDECAR}"):
                found[f"{top}.{SIDECAR}"] = files.info(f"{top}.{SIDECAR}")
        except FileNotFoundError:
            found = {}
        except Exception as error:
            raise self._failed(self.address, error) from error
        listed = {
            name: RemoteFile(key, int(info["size"] or 0), _version(info), _saved_ns(info))
            for key, info in found.items()
            if info.get("type") == "file" and (name := _name_in(key, _above(top))) and not name.endswith("/")
        }
        for name in listed:
            if not set(name.split("/")).isdisjoint({"", ".", ".."}) or "\\" in name or not name.isprintable():
                raise UnsafeFileError(f"{self.address}: a file is called {name!r}", hint="copy the run to a local folder")
        if not listed and not self._may_be_empty:
            raise TooFewSnapshotsError(
                f"{self.address}: expected a folder of checkpoints, found no files", hint="check the address"
            )
        return listed

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file; fewer where it has become shorter.

        Raises:
            UnreadableError: the store does not give them.
        """
        files, _ = self._files()
        # without a cache, which would read ahead; stores that read many ranges at once have none
        options = {} if files.async_impl else {"cache_type": "none"}
        for wait_s in (*WAITS_S, None):
            try:
                return files.cat_file(file.key, start=begin, end=end, **options)  # type: ignore[no-any-return]
            except FarcastError:
                raise
            except Exception as error:
                if wait_s is None or _is_final(error):
                    raise self._failed(self.address_in(file.key), error) from error
                time.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 - so that not all requests come again at once
        raise AssertionError

    def upload(self, name: str, part_bytes: int) -> Upload:
        """A new file, to be written from its beginning to its end."""
        files, top = self._files()
        key = _key_of(name, top)
        if self.address.startswith("memory://"):
            return Upload(_HeldBack(files, key))
        return Upload(files.open(key, "wb", block_size=part_bytes))

    def has(self, name: str) -> bool:
        """Whether something has this name on the store now."""
        files, top = self._files()
        files.invalidate_cache()
        return bool(files.exists(_key_of(name, top)))

    def remove(self, name: str) -> None:
        """Remove a file; nothing need be there."""
        files, top = self._files()
        with suppress(FileNotFoundError):
            files.rm_file(_key_of(name, top))

    def check_sizes(self, num_bytes: Mapping[str, int]) -> None:
        """See that files of these names have so many bytes.

        Raises:
            UploadError: one has not.
        """
        files, top = self._files()
        files.invalidate_cache()
        for name, expected in num_bytes.items():
            found = files.info(_key_of(name, top))["size"]
            if found != expected:
                raise UploadError(f"{self.folder}/{name}: expected {expected} bytes after the upload, found {found}")

    def address_in(self, key: str) -> str:
        """The address of a path on the store."""
        return f"{self.address.partition('://')[0]}://{key.lstrip('/')}"

    def _failed(self, what: str, error: Exception) -> UnreadableError:
        return UnreadableError(f"{what}: cannot be read: {type(error).__name__}: {error}", hint=hint_for(error))


def _is_final(error: Exception) -> bool:
    """Whether it makes no sense to try again: nothing is there, or the store refuses."""
    return isinstance(error, (FileNotFoundError, ValueError)) or _is_refused(error)


def _is_refused(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "redential" in f"{type(error).__name__} {error}"


def hint_for(error: Exception) -> str:
    """What may help."""
    return _CREDENTIALS if _is_refused(error) else "check the connection, then run the command again"


def _above(top: str) -> str:
    return top.rpartition("/")[0]


def _key_of(name: str, top: str) -> str:
    """The path on the store of a name beside or below its top."""
    return f"{_above(top)}/{name}".lstrip("/")


def _name_in(key: str, top: str) -> str:
    """A file's name below the folder; "" for what is not below it."""
    inside = f"{top.strip('/')}/".lstrip("/")
    return key.lstrip("/").removeprefix(inside) if key.lstrip("/").startswith(inside) else ""


def _version(info: Mapping[str, Any]) -> int:
    told = repr([str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")


def _saved_ns(info: Mapping[str, Any]) -> int:
    """When a file was saved; the filesystems of fsspec give a date, its text, or seconds."""
    told = next((info[key] for key in _TIME_KEYS if info.get(key) is not None), 0)
    try:
        told = datetime.fromisoformat(told) if isinstance(told, str) else told
        return int((told.timestamp() if isinstance(told, datetime) else float(told)) * 1e9)
    except (TypeError, ValueError, OverflowError):
        return 0
