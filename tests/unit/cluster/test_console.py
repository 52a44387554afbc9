"""The terminal of a run: closed, hung up, piped away. The run goes on until it has stored what it must."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as Rich

from dircluster.cluster.console import Terminal

RUN = """
import signal, sys, time
from dircluster.cluster.console import Terminal
with Terminal() as terminal:
    terminal.say("ready")
    until = time.monotonic() + 20
    while not terminal.stop_signal() and time.monotonic() < until:
        time.sleep(0.02)
    terminal.say("storing")
    print("storing", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write(f"stored after {terminal.stop_signal()}")
"""


def test_a_run_whose_terminal_is_closed_ends_as_by_sigterm(root: Path, tmp_path: Path) -> None:
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have had it ignored
        os.execve(sys.executable, [sys.executable, "-c", RUN, str(tmp_path / "end")], {"PYTHONPATH": str(root)})
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "end").read_text() == f"stored after {signal.SIGHUP:d}"


@pytest.mark.parametrize(("before", "heard"), [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)])
def test_a_hangup_that_nohup_ignores_stays_ignored(before: signal.Handlers, heard: int) -> None:
    usual = signal.signal(signal.SIGHUP, before)
    try:
        with Terminal() as terminal:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # a shell passes on what the kernel sends too
            assert terminal.stop_signal() == heard
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_run_goes_on_where_nobody_reads_what_it_says(root: Path) -> None:
    code = (
        "import os\nos.close(int(__import__('sys').argv[1]))\n"
        "from dircluster.cluster.console import Terminal\n"
        "with Terminal() as terminal:\n    [terminal.say('line') for _ in range(9)]\n"
        "os.write(2, b'went on')\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(reader)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(root)},
        pass_fds=[reader],
    )
    os.close(reader)
    os.close(writer)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"went on")


ROW = {
    "defense": "dir",
    "attack": "transfer-pgd20",
    "randomness": "fixed",
    "protocol": "deterministic white box",
    "accuracy": 0.875,
    "interval": (0.812, 0.931),
    "total": 359,
    "epsilon": 0.15,
    "norm": "linf",
    "steps": 20,
    "step_size": 0.0375,
    "restarts": 2,
    "eot": 1,
    "average": 1,
    "draws": 1,
}
CELLS = ("transfer-pgd20", "deterministic white box", "87.5 %", "81.2 - 93.1", "359", "eps 0.15", "0.0375;")


@pytest.mark.parametrize(("width", "is_table"), [(40, False), (80, False), (140, True)])
def test_a_terminal_of_any_width_shows_every_cell(width: int, is_table: bool) -> None:
    terminal, shown = Terminal(), io.StringIO()
    terminal.rich = Rich(file=shown, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    terminal.table([ROW, ROW])
    lines = shown.getvalue().splitlines()
    assert ("┃" in shown.getvalue()) == is_table
    assert max(map(len, lines)) <= width
    assert all(any(cell in line for line in lines) for cell in CELLS)
    assert "…" not in shown.getvalue()


@pytest.mark.parametrize(("columns", "widest"), [("40", 40), (None, 118), ("wide", 118)])
def test_a_log_is_as_wide_as_columns_says(columns: str | None, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", shown := io.StringIO())
        Terminal().lines("Points", [{"point": "alpha 2", "said": "word " * 60, "robust": "55.1 %"}])
    assert widest - 12 < max(map(len, shown.getvalue().splitlines())) <= widest
    assert "55.1 %" in shown.getvalue()


@pytest.mark.parametrize("width", [40, 140])
def test_brackets_in_a_table_are_shown(width: int) -> None:
    terminal, shown = Terminal(), io.StringIO()
    terminal.rich = Rich(file=shown, force_terminal=True, color_system=None, width=width, soft_wrap=True)
    terminal.lines("Table [x]", [{"[row]": "54.1 [red]", "error": "[/closed] twice"}])
    terminal.table([{**ROW, "defense": "[b]mine"}])
    assert [
        text for text in ("Table [x]", "[row]", "54.1 [red]", "[/closed]", "[b]mine") if text not in shown.getvalue()
    ] == []


def test_what_a_run_says_holds_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say("403 at https://bucket/model?X-Amz-Signature=CANARY&a=1 by http://joe:CANARY@proxy:3128")
    assert capsys.readouterr().out == "403 at https://bucket/model?X-Amz-Signature=...&a=1 by http://...@proxy:3128\n"
