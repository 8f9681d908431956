"""How far `prepare` is: a bar in a terminal, a plain line a minute in the log of a job."""

from __future__ import annotations

import sys
import time


def count_text(number: float) -> str:
    """A number with spaces between its thousands."""
    return f"{number:,.0f}".replace(",", " ")


def duration_text(seconds: float) -> str:
    """A time in its two largest units, as in "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def bytes_text(number: float) -> str:
    """Bytes as MB or GB."""
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:.1f} GB"


def rate_text(amount: float, seconds: float, of_bytes: bool) -> str:
    """An amount a second: recordings, or bytes."""
    rate = amount / max(seconds, 1e-9)
    if of_bytes:
        return f"{bytes_text(rate)}/s"
    return f"{count_text(rate)}/s" if rate >= 10 else f"{rate:.2g}/s"


class Progress:
    """Tells on stderr how far something is; use it in a `with` statement.

    In a terminal it is a bar. Elsewhere, as in the log of a SLURM job, it is a line at the start, one every
    `every_s` seconds while it goes on, and one at the end with the rate of this call.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        of_bytes: bool = False,
        show: bool = True,
        every_s: float = 60.0,
    ):
        """Starts the clock.

        Args:
          what: what goes on, at the start of every line.
          total: recordings, or bytes.
          done: of those, how many were done before this call.
          of_bytes: count bytes.
          show: False says nothing.
          every_s: seconds between two lines.
        """
        self.what, self.total, self.done = what, total, done
        self._before, self._of_bytes, self._show, self._every = done, of_bytes, show, every_s
        self._started = self._last = time.monotonic()
        self._bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                unit="B" if of_bytes else "rec",
                unit_scale=of_bytes,
                desc=what,
                mininterval=0.5,
            )
        else:
            before = f", {self._amount(done)} done before" if done else ""
            self._line(f"{self._amount(total)}{before}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            seconds = time.monotonic() - self._started
            fresh = self.done - self._before
            self._line(
                f"{self._amount(fresh)} in {duration_text(seconds)}, {rate_text(fresh, seconds, self._of_bytes)}"
            )

    @property
    def fresh(self) -> int:
        """What this call has done so far."""
        return self.done - self._before

    def update(self, fresh: int) -> None:
        """Takes note of what this call has done so far, and tells it when it is time to."""
        previous, self.done = self.done, self._before + fresh
        if self._bar is not None:
            self._bar.update(self.done - previous)
            return
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            seconds = now - self._started
            left = (
                f"{duration_text((self.total - self.done) * seconds / fresh)} left"
                if fresh
                else "no end known"
            )
            self._line(
                f"{self._amount(self.done, of=True)}, {rate_text(fresh, seconds, self._of_bytes)}, {left}"
            )

    def _amount(self, number: int, of: bool = False) -> str:
        text = bytes_text if self._of_bytes else count_text
        amount = f"{text(number)} of {text(self.total)}" if of else text(number)
        return amount if self._of_bytes else f"{amount} recordings"

    def _line(self, text: str) -> None:
        if self._show:
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)
