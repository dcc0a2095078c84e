"""
How far a long task has come, on stderr: one line that is redrawn, or a line every half minute in a file.
"""

import math
import sys
import time

REDRAW, APPEND = 0.1, 30  # seconds between two lines, on a terminal and in a file
MEMORY = 20  # seconds: how far back the rate looks, so that the time left neither jumps nor lags


class Progress:
    """Reports `done` of `total` units with the rate and the time left.

    verb: what is being done, as in 'tokenizing'. unit: what is counted, as in 'MB'.
    done: how many units were there at the start.
    """

    def __init__(self, verb, total, unit, done=0):
        self.verb, self.total, self.unit = verb, total, unit
        self.shown_at = self.counted_at = time.monotonic()
        self.done, self.rate = done, 0.0
        self.on_terminal = sys.stderr.isatty()

    def show(self, done):
        """Says that `done` units are there now. It prints only if the last line is old enough."""
        now = time.monotonic()
        if now - self.shown_at < (REDRAW if self.on_terminal else APPEND):
            return
        self.smooth(done, now - self.counted_at)
        self.shown_at = self.counted_at = now
        self.done = done
        if self.rate > 0:
            print(self.line(), end='\033[K\r' if self.on_terminal else '\n', file=sys.stderr, flush=True)

    def smooth(self, done, seconds):
        """Moves the rate towards that of the last `seconds`, an exponential average over MEMORY seconds."""
        latest = (done - self.done) / seconds
        share = 1 - math.exp(-seconds / MEMORY) if self.rate else 1
        self.rate += share * (latest - self.rate)

    def line(self):
        minutes, seconds = divmod(round((self.total - self.done) / self.rate), 60)
        return (
            f'{self.verb} {self.done:,.0f} of {self.total:,.0f} {self.unit}, '
            f'{self.rate:,.1f} {self.unit}/s, {minutes}m{seconds:02}s left'
        )

    def close(self):
        """Clears the line on a terminal, so that what is printed next begins on an empty one."""
        if self.on_terminal:
            print(end='\033[K', file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
