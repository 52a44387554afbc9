"""jobs/train.py that kills itself at a moment: python kill_at.py MOMENT WORDS...

The moments are those of the second checkpoint of the DIR stage. Storage, data and the kill are real; only the place
where it strikes is chosen.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

from upath.implementations.cloud import S3Path

from dircluster.cluster.commands.train import main

MOMENTS = ("writing", "uploading", "before the marker", "after the marker", "loading")


def strike() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_struck(path: Any, name: str) -> bool:
    folder = path.parent.name
    return "/dir-" in str(path) and folder.startswith("step-") and int(folder[5:]) >= 4 and path.name == name


def watch(kind: type, moment: str) -> None:
    """Put the kill into one of the calls of ``kind``."""
    write_bytes, write_text, read_bytes = kind.write_bytes, kind.write_text, kind.read_bytes

    def writes_bytes(self: Any, data: bytes) -> Any:
        if moment == "writing" and is_struck(self, "model.safetensors"):
            write_bytes(self, data[: len(data) // 2])
            strike()
        if moment == "uploading" and is_struck(self, "model.safetensors"):
            threading.Thread(target=write_bytes, args=(self, data)).start()
            time.sleep(0.002)
            strike()
        return write_bytes(self, data)

    def writes_text(self: Any, data: str, *rest: Any, **named: Any) -> Any:
        if moment == "before the marker" and is_struck(self, "COMMIT"):
            strike()
        done = write_text(self, data, *rest, **named)
        if moment == "after the marker" and is_struck(self, "COMMIT"):
            strike()
        return done

    def reads_bytes(self: Any) -> bytes:
        if moment == "loading" and is_struck(self, "model.safetensors"):
            strike()
        return read_bytes(self)

    for name, call in {"write_bytes": writes_bytes, "write_text": writes_text, "read_bytes": reads_bytes}.items():
        setattr(kind, name, call)


if __name__ == "__main__":
    for kind in (pathlib.Path, S3Path):
        watch(kind, sys.argv[1])
    sys.exit(main(sys.argv[2:]))
