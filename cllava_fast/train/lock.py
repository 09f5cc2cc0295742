"""One run in a folder at a time.

The lock is the kernel's (``flock``) and goes with the process that holds it, however that ends: a ``.lock`` file that a
killed run left locks nothing. On NFS (Linux 2.6.12 and later) it holds between machines, unless mounted with
``local_lock`` or ``nolock``: then within one machine. File systems without locks (Lustre without ``-o flock``, Windows)
get a warning.
"""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cllava_fast.atomic import make_folder, save_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # descriptors


class InUseError(RuntimeError):
    """Another process runs in this folder."""

    exit_code = 5


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds ``folder``, which is made if it is not there.

    Raises:
        InUseError: another process, or another trainer of this one, holds it.
        SaveError: the folder cannot be written.
    """
    path = folder / LOCK
    with save_errors(folder):
        make_folder(folder)
        descriptor = _take(path)
    try:
        yield
    finally:
        if descriptor is not None:
            _held.discard(descriptor)
            # before the lock is let go: whoever waits sees that this file is not the folder's any more
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raises InUseError if another process runs in ``folder``; leaves it as it is."""
    path = folder / LOCK
    if path.is_file() and os.access(path, os.W_OK) and (descriptor := _take(path)) is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def _take(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                _held.add(descriptor)
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise InUseError(f"{path.parent} is in use by {holder}; wait for it, or give another output_dir") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): start no second run in it", stacklevel=2)
            return None
        finally:
            if descriptor not in _held:  # where none is returned; without an error, of a run that has ended in between
                os.close(descriptor)


def _forget() -> None:
    """A forked child, such as a data loader's worker, must not keep the lock of a parent that was killed."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
