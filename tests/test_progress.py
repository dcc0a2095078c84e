"""What a long task says of its progress."""

import io

import pytest

from data import progress


class Screen(io.StringIO):
    def __init__(self, on_terminal):
        super().__init__()
        self.on_terminal = on_terminal

    def isatty(self):
        return self.on_terminal


@pytest.fixture
def run(monkeypatch):
    """Returns what shows counts at given times, and gives what was printed."""

    def run(on_terminal, counts_at, total=1000, done=0):
        screen, clock = Screen(on_terminal), [0.0]
        monkeypatch.setattr(progress.sys, 'stderr', screen)
        monkeypatch.setattr(progress.time, 'monotonic', lambda: clock[0])
        with progress.Progress('reading', total, 'files', done) as shown:
            for clock[0], count in counts_at:
                shown.show(count)
        return screen.getvalue()

    return run


def test_a_file_gets_a_line_every_half_minute(run):
    lines = run(False, [(t, 2 * t) for t in range(1, 100)]).splitlines()
    assert lines == [
        'reading 60 of 1,000 files, 2.0 files/s, 7m50s left',
        'reading 120 of 1,000 files, 2.0 files/s, 7m20s left',
        'reading 180 of 1,000 files, 2.0 files/s, 6m50s left',
    ]


def test_a_terminal_has_one_line_that_is_redrawn_and_cleared_in_the_end(run):
    said = run(True, [(t / 4, t) for t in range(1, 9)])
    assert '\n' not in said and said.count('\r') == 8 and said.endswith('\033[K')


def test_what_was_done_before_does_not_count_as_speed(run):
    assert '1.0 files/s' in run(False, [(40, 540)], done=500)


def test_the_rate_is_smoothed_over_a_pause(run):
    counts = [(t, t) for t in range(1, 61)] + [(90, 60)]
    rate = float(run(False, counts).splitlines()[-1].split(', ')[1].split()[0])
    assert 0.1 < rate < 0.5


def test_nothing_is_said_before_something_is_done(run):
    assert run(False, [(31, 0), (62, 0)]) == ''
