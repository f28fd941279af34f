"""One call of `fit` at a time writes to a run folder: two would both count the same epochs."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from lossledger.errors import CheckpointError

FILE = "lock"
# What other systems say of a file that somebody else has locked.
_HELD = (errno.EACCES, errno.EAGAIN)


class Alone:
    """A run folder that no other process writes to until this one leaves it, or dies.

    The lock belongs to the process and not to the open file: workers of a loader, which outlive one that was killed,
    do not hold it. Where the system or the file system has no such locks, nothing is held.

    Args:
        folder: of the run, made if missing.

    Raises:
        CheckpointError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Closed by `leave`; appending, since opening must not change what another process reads.
            self._file = (folder / FILE).open("ab")
        except OSError as error:
            raise CheckpointError(
                f"run_dir: cannot write to {folder} ({error}). Free the space or pass another folder."
            ) from None
        try:
            _lock(self._file.fileno())
        except OSError as error:
            if error.errno not in _HELD:
                return
            self.leave()
            raise CheckpointError(
                f"run_dir: expected a folder that no other run writes to, received {folder}, where another process is "
                "training now. Wait until it has ended, or pass another folder."
            ) from None

    def leave(self) -> None:
        """Let others write."""
        self._file.close()


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
