"""What is printed, whose reader may have left, or which goes to a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator


def lead_nowhere(output: int) -> None:
    """What is written to a file descriptor is lost from now on, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a file says that takes no more."""


def say(text: str) -> None:
    """Print ``text`` at once, whose reader may leave."""
    with reader_may_leave():
        print(text)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, who reads what is printed may leave before its end (``--help | head``): exit 141, as of any program.

    Where it goes to a disk that is full, it ends with one line on stderr and exit code 1.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # its descriptor was closed (`>&-`)
                sys.stdout.flush()
    except BrokenPipeError:
        lead_nowhere(sys.stdout.fileno())  # else Python tries again at its end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        lead_nowhere(sys.stdout.fileno())
        sys.exit(f"error: what is printed cannot be written: {error.strerror}; give it another place, or make room")
