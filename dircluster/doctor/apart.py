"""A check in a process of its own: what would end the doctor, such as a segmentation fault, is a finding of it.

python -m dircluster.doctor.apart MODULE:FUNCTION < WHAT.json
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from dircluster.distributed.launch import local_workers
from dircluster.doctor.findings import Finding
from dircluster.doctor.machine import Machine
from dircluster.presets import run_from_plain, run_to_plain

Work = Callable[..., Iterator[Finding]]


def apart(work: Work, name: str, machine: Machine, *numbers: float) -> Iterator[Finding]:
    """The findings of ``work(machine, *numbers)``, a function of a module, made by a process of their own.

    Where that process dies, one more finding has ``name`` and says of what, and where.
    """
    given = {"run": run_to_plain(machine.config), "rates": machine.rates, "numbers": numbers}
    command = [sys.executable, "-X", "faulthandler", "-m", __name__, f"{work.__module__}:{work.__qualname__}"]
    with tempfile.TemporaryFile("w+") as errors:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, env=_environment(), text=True, **pipes) as process:
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(given))
                process.stdin.close()
                for line in process.stdout or ():
                    yield Finding.of(json.loads(line))
                process.wait()
            finally:
                process.kill()
        if process.returncode:
            errors.seek(0)
            yield Finding(name, "fail", note=_end(process.returncode, errors.read()))


def _environment() -> dict[str, str]:
    """This process's, with what it imports from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))}


def _end(code: int, errors: str) -> str:
    """What ended a process: its signal and the innermost line of this package, or its last line on stderr."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if code > 0:
        return lines[-1] if lines else f"its process ended with {code}"
    own = next((line for line in lines if line.startswith("File ") and "dircluster" in line), "nobody knows where")
    return f"its process died of {signal.Signals(-code).name}: {own}"


def main(argv: list[str]) -> int:
    """One check; -> exit code."""
    given = json.load(sys.stdin)
    module, _, function = argv[0].partition(":")
    run = run_from_plain(given["run"])
    with local_workers(run.scaling) as parallel:
        machine = Machine(run, parallel, given["rates"])
        for finding in getattr(importlib.import_module(module), function)(machine, *given["numbers"]):
            sys.stdout.write(f"{json.dumps(finding.to_plain())}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
