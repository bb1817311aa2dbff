"""Files and folders that are invisible until they are whole, and that appear together or not at all.

Each is written in a hidden folder beside its final place. At the end all are synced to disk, and then all are renamed. If
one of the renames fails, the others are undone.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import OutputError, TakenError, UnreadableError
from farcast_cli.files.hidden import Hidden, clear_left, identity, is_renamed, make_hidden
from farcast_cli.files.renames import ASIDE, put, swap, swap_back
from farcast_cli.system import ENDINGS, sync

if TYPE_CHECKING:
    from collections.abc import Iterator

Check = Callable[[Path], None]
"""Raises an OutputError if what lies at a place must stay."""


def refuse_existing(final: Path, *, hint: str = "--overwrite replaces it; -o OUT writes elsewhere") -> None:
    if os.path.lexists(final):
        raise TakenError(f"{final}: exists already", hint=hint)


@dataclass(slots=True)
class _Output:
    """One output: its hidden folder and what is known of its publication."""

    final: Path
    hidden: Hidden
    check: Check
    may_stay_empty: bool
    is_renamed: bool = False
    has_replaced: bool = False
    checked: list[int] | None = None
    """What tells the file that had the final name when it was checked."""

    @property
    def written(self) -> Path:
        return self.hidden.path / self.final.name

    def may_be_published(self) -> None:
        """Check what has the final name, if anything has."""
        self.checked = None
        if os.path.lexists(self.final):
            self.checked = identity(self.final)
            self.check(self.final)

    def publish(self, *, replaces: bool) -> None:
        """Take the final name. What had it is kept in the hidden folder until all is well.

        Args:
            replaces: something had the name when it was checked; else the name must be free.
        """
        try:
            if replaces:
                swap(self.written, self.final)
                self.has_replaced = True
                aside = self.written.with_name(ASIDE)
                if not is_renamed(self.checked, identity(aside if os.path.lexists(aside) else self.written)):
                    raise OutputError(f"{self.final}: changed during its replacement", hint="-o OUT writes elsewhere")
            else:
                put(self.written, self.final)
            self.is_renamed = True
        except FileExistsError:
            refuse_existing(self.final)
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.final)) from error
        sync(self.final.parent)

    def undo(self) -> None:
        if self.has_replaced:
            swap_back(self.written, self.final)
        elif self.is_renamed:
            self.final.rename(self.written)
        self.is_renamed = self.has_replaced = False


class Staging:
    """Outputs that are published together. Made by `staging`."""

    def __init__(self, option: str = "-o") -> None:
        self._option = option
        self._outputs: list[_Output] = []
        self._made: list[Path] = []
        self._alongside: list[AbstractContextManager[Any]] = []
        self._told: list[Callable[[BaseException | None], None]] = []
        self._is_published = False
        self.failure: BaseException | None = None

    def add(self, final: Path, *, check: Check = refuse_existing, may_stay_empty: bool = False) -> Path:
        """A path to write to, which becomes `final`.

        Args:
            check: of what has the name `final`. It is called now, and again right before the rename. By default nothing
                may have that name.
            may_stay_empty: the block may decide to write nothing; then nothing is published under this name.

        Returns:
            a path of the same name that does not exist yet, to be made a file or a folder.

        Raises:
            OutputError: `final` must stay, or the place cannot be written.
        """
        clear_left(final)
        if os.path.lexists(final):
            check(final)
        try:
            with _uninterrupted():
                self._make_parents(final.parent)
                self._outputs.append(_Output(final, make_hidden(final), check, may_stay_empty))
        except OSError as error:
            raise OutputError(
                f"{final}: cannot be written: {error.strerror}", hint=f"choose another place with {self._option}"
            ) from error
        return self._outputs[-1].written

    @property
    def written(self) -> list[tuple[Path, Path]]:
        """What has been written so far: where it is, and the name that it will have."""
        return [(one.written, one.final) for one in self._outputs if os.path.lexists(one.written)]

    def alongside(self, record: AbstractContextManager[Any]) -> None:
        """Enter a block right before the renames, and leave it right after; it sees the exception if one of them fails."""
        self._alongside.append(record)

    def tell_end(self, tell: Callable[[BaseException | None], None]) -> None:
        """Call a function with what went wrong, None if nothing did, right before the hidden folders are removed."""
        self._told.append(tell)

    def publish(self) -> None:
        """Sync everything, then rename everything; what was added last comes first.

        Raises:
            OutputError, OSError: nothing was published.
        """
        ready = [one for one in self._outputs[::-1] if os.path.lexists(one.written) or not one.may_stay_empty]
        for one in ready:
            _sync_tree(one.written)
        if ready:
            with _uninterrupted(is_too_late=lambda: self._is_published):
                with ExitStack() as stack:
                    for record in self._alongside:
                        stack.enter_context(record)
                    self._publish_all(ready)
                self._is_published = True

    def _publish_all(self, ready: list[_Output]) -> None:
        for one in ready:
            one.may_be_published()
        leader = ready[0].hidden
        replaced = {one.final for one in ready if os.path.lexists(one.final)}
        try:
            for one in ready:
                one.hidden.join(leader.path)
            leader.decide((one.hidden.path, one.final) for one in ready)
            for one in ready:
                one.publish(replaces=one.final in replaced)
        except BaseException:
            for one in reversed(ready):
                with suppress(OSError):
                    one.undo()
            with suppress(OSError):
                leader.withdraw()
            raise

    def close(self) -> None:
        """Remove the hidden folders, and the folders that were made for outputs and hold none."""
        try:
            for tell in self._told:
                tell(self.failure)
        finally:
            self._remove()

    def _remove(self) -> None:
        with _uninterrupted(is_too_late=lambda: self._is_published):
            for one in self._outputs:
                one.hidden.remove()
            for folder in reversed(self._made):
                with suppress(OSError):  # not empty: something was published there
                    folder.rmdir()

    def named(self, error: OSError) -> OutputError:
        """An error of the block as one that names the output that it belongs to."""
        where = str(error.filename or "")
        hit = [one.final for one in self._outputs if where and where.startswith((str(one.hidden.path), str(one.final)))]
        final = hit[0] if hit else self._outputs[0].final
        return OutputError(f"{final}: cannot be written: {error.strerror or error}", hint=_space_hint(error, self._option))

    def misread(self, error: UnreadableError) -> OutputError | UnreadableError:
        """An error of reading, if it was an output that was read back, as one that names the output."""
        hit = [one.final for one in self._outputs if str(one.hidden.path) in str(error)]
        return OutputError(f"{hit[0]}: cannot be read back: {error}", hint="check the disk") if hit else error

    def _make_parents(self, folder: Path) -> None:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            self._made.append(place)
            sync(place.parent)


@contextmanager
def staging(*, option: str = "-o") -> Iterator[Staging]:
    """Outputs that appear together when the block ends well, and vanish when it does not.

    Args:
        option: chooses another place, as a hint says.

    Raises:
        OutputError: one of them cannot be written; none is published.
    """
    outputs = Staging(option)
    try:
        try:
            yield outputs
            outputs.publish()
        except OSError as error:
            raise outputs.named(error) from error
        except UnreadableError as error:
            raise outputs.misread(error) from error
    except BaseException as error:
        outputs.failure = error
        raise
    finally:
        outputs.close()


@contextmanager
def staged(final: Path, *, check: Check = refuse_existing, may_stay_empty: bool = False, option: str = "-o") -> Iterator[Path]:
    """The same for one output; yields the path to write to."""
    with staging(option=option) as outputs:
        yield outputs.add(final, check=check, may_stay_empty=may_stay_empty)


@contextmanager
def _uninterrupted(*, is_too_late: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """A block that signals do not interrupt: they take effect after it. The renames take milliseconds.

    Args:
        is_too_late: whether, at the end of the block, nothing is left to be interrupted; then the command ends as it would have.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    former = {number: signal.getsignal(number) for number in ENDINGS}
    try:
        for number, handler in former.items():
            if callable(handler):
                signal.signal(number, lambda one, frame: came.append((one, frame)))
        yield
    finally:
        for number, handler in former.items():
            if callable(handler):
                signal.signal(number, handler)
    for first, frame in came[:1] if not is_too_late() else ():
        handler = former[signal.Signals(first)]
        assert callable(handler)  # noqa: S101 - only such were replaced
        handler(first, frame)


def _space_hint(error: OSError, option: str) -> str:
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return f"free some space, or choose another disk with {option}" if is_full else f"choose another place with {option}"


def _sync_tree(top: Path) -> None:
    """Files first, then the folders that hold them."""
    if not top.is_dir():
        sync(top)
    for root, _, names in os.walk(top, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))
