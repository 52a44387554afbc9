"""What a person sees: a live line on a terminal, a plain line every so often in a log, a table at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console as Rich
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dircluster.config import without_secrets
from dircluster.printing import lead_nowhere
from dircluster.training.protocols import Status

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals after which a run commits a checkpoint and ends: Ctrl-C, a job that is stopped, a terminal that is closed."""
EVERY = 10.0
"""Seconds between two progress lines in a log."""


LOG_WIDTH = 118
"""Columns of a table in a log, where COLUMNS does not say."""


def progress_line(status: Status) -> str:
    """stage, epoch, step, loss terms, images/s, ETA."""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in status.terms.items() if name != "loss")
    return (
        f"{status.stage}  epoch {status.epoch}/{status.epochs}  step {status.step}/{status.steps}"
        f"  loss {status.terms['loss']:.4f}{f' ({terms})' if terms else ''}  {status.images_per_second:,.0f} images/s"
        f"  ETA {timedelta(seconds=round(status.eta_seconds))}"
    )


def least_width(table: Table) -> int:
    """Columns of a terminal below which cells of a table would be cut."""
    width = 1
    for column in table.columns:
        texts = [str(column.header), *map(str, column.cells)]
        pieces = texts if column.no_wrap else [word for text in texts for word in text.split()]
        width += 3 + max(map(cell_len, pieces), default=0)
    return width


def blocks(table: Table) -> Group:
    """A table as its title and a block a row, one line a cell: for a terminal that is too narrow for it."""
    parts: list[Any] = [Text(str(table.title))]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        block = Table.grid(padding=(0, 2))
        block.add_column(no_wrap=True)
        block.add_column(overflow="fold")
        for column, cell in zip(table.columns, row, strict=True):
            block.add_row(column.header, cell)
        parts += [Text(""), block]
    return Group(*parts)


class _Output(Rich):
    """Standard output. Where its reader is gone (``| head``) a run goes on without it."""

    def on_broken_pipe(self) -> None:
        lead_nowhere(sys.stdout.fileno())


class Terminal:
    """The console of the process that the person started. Use it in a ``with`` block, where it catches signals."""

    def __init__(self) -> None:
        self.rich = _Output(highlight=False, soft_wrap=True)
        self.signal = 0
        self._live: Live | None = None
        self._last: tuple[str, float] = ("", 0.0)

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.rich.print(without_secrets(line), markup=False)
        self._flush()

    def show(self, status: Status) -> None:
        line = progress_line(status)
        ended = status.step >= status.steps
        if self._live is not None:
            self._live.update(Text(line))
            if ended:
                self._live.update(Text(""))
                self.say(line)
            return
        stage, when = self._last
        if ended or stage != status.stage or time.monotonic() - when >= EVERY:
            self._last = (status.stage, time.monotonic())
            self.say(line)

    def tell(self, event: str | dict[str, Any]) -> None:
        """What a worker said or showed, as it comes out of the channel."""
        if isinstance(event, str):
            self.say(event)
        else:
            self.show(Status(**event))

    def stop_signal(self) -> int:
        return self.signal

    def table(self, rows: list[dict[str, Any]]) -> None:
        """The results, one row each, with what was done to get them."""
        from dircluster.evaluation.results import images_of, n_of
        from dircluster.evaluation.suites import how  # with torch, which is needed by then anyway

        table = Table(title=f"Accuracy on the test split, {images_of(rows[0])}")
        for name in ("defense", "attack", "protocol", "accuracy", "95 % interval", "n", "how"):
            number = name in ("accuracy", "n")
            table.add_column(name, justify="right" if number else "left", no_wrap=name != "how")
        for row in rows:
            low, high = row["interval"]
            accuracy = f"{100 * row['accuracy']:.1f} %" + (" !" if row.get("marks") else "")
            texts = (
                row["defense"],
                row["attack"],
                row.get("protocol", row["randomness"]),
                accuracy,
                f"{100 * low:.1f} - {100 * high:.1f}",
                n_of(row),
                how(row),
            )
            table.add_row(*map(Text, texts))
        self._print(table)

    def lines(self, title: str, rows: list[dict[str, str]]) -> None:
        """A table of texts, its columns those of the first row. Brackets are shown as they are: they are no markup."""
        table = Table(title=Text(title))
        for name in rows[0]:
            table.add_column(Text(name), justify="right")
        for row in rows:
            table.add_row(*map(Text, row.values()))
        self._print(table)

    def _print(self, table: Table) -> None:
        asked = self.rich.is_terminal or os.environ.get("COLUMNS", "").isdigit()
        wide = self.rich if asked else _Output(highlight=False, width=max(self.rich.width, LOG_WIDTH))
        with contextlib.suppress(OSError):
            wide.print(table if least_width(table) <= wide.width else blocks(table), soft_wrap=False)
        self._flush()

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        self.listen()
        if self.rich.is_terminal:
            self._live = Live(console=self.rich, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Hear signals that end a run (again, after a library has put its own handlers in place).

        A hangup that nohup ignores stays ignored.
        """
        for number in STOPPING:
            if number != signal.SIGHUP or self._before[number] is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            for output in (1, 2):
                try:
                    os.write(output, b"")
                except OSError:  # its terminal is closed
                    lead_nowhere(output)
        elif self.signal:  # asked twice: leave at once, but end what was started
            sys.exit(128 + number)
        self.signal = self.signal or number

    def _flush(self) -> None:
        try:
            if sys.stdout is not None:  # its descriptor was closed (`>&-`)
                sys.stdout.flush()
        except BrokenPipeError:
            lead_nowhere(sys.stdout.fileno())
        except (OSError, ValueError):  # a full disk may have room again
            pass


class Bystander(Terminal):
    """A torchrun process other than the first: hears signals, says nothing."""

    def say(self, line: str) -> None: ...

    def show(self, status: Status) -> None: ...
