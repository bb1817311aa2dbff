"""The processes of one training: the first one works, all of them learn what came of it and get its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from farcast_cli.errors import FarcastError, MemoryUsedUpError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Told = TypeVar("Told")


def by_the_first(work: Callable[[], Told]) -> Told:
    """What came of work that the first process does while the others wait.

    Raises:
        FarcastError: it failed, in all processes alike.
    """
    told: list[Any] = [_done(work) if is_first() else None]
    if _are_several():
        distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], FarcastError):
        raise told[0]
    result: Told = told[0]
    return result


def _done(work: Callable[[], Told]) -> Told | FarcastError:
    """What came of work, or what it stopped for."""
    try:
        return work()
    except FarcastError as error:
        return error
    except MemoryError:
        return MemoryUsedUpError("not enough memory for a leap")
    except OSError as error:
        return OutputError(f"{error.filename or 'a file'}: {error.strerror}")


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Give the values of the first process to all, one tensor at a time."""
    if not _are_several():
        return
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            distributed.broadcast(sent, src=0)
            tensor.copy_(sent)


def is_first() -> bool:
    """Whether this process is the one that works, or the only one."""
    return not _are_several() or distributed.get_rank() == 0


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
