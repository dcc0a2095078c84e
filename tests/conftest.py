"""What every test shares: the import path, the `gpu` and `slow` markers, and GPT-2's BPE files if they
are at hand.
"""

import machine  # noqa: F401

import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests marked slow')
    parser.addoption(
        '--runs', type=int, default=3, help='how often the kill test kills its run (default 3; 50 by hand)'
    )


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA GPU')
    config.addinivalue_line('markers', 'slow: takes minutes; run with --slow')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))
        if item.get_closest_marker('slow') and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))


@pytest.fixture(scope='module')
def one_thread():
    """Tensors of tests are so small that a second thread makes them five times slower where other work
    has the cores, here and in the processes that a test starts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def signal_handlers():
    """train.main takes the signals of its process; here they are given back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are when written."""
    from matplotlib.figure import Figure

    figures = []

    def look(figure, *_, **__):
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert 0 <= title.x0 and title.x1 <= figure.bbox.x1, 'the title is cut off'
        figures.append(figure)

    monkeypatch.setattr(Figure, 'savefig', look)
    return figures
