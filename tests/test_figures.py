"""The specification of figures.py: pictures come from JSON alone, whatever matplotlib is told elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import figures
from measure import Statistics, pooled, streams_report

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')
S, T, D = 4, 12, 10


def report():
    """What measure.json holds of a ledger whose C is nearly empty at first, without what no figure reads."""
    statistics = Statistics(2, 20)
    generator = torch.Generator().manual_seed(0)
    statistics.begin(6, 'cpu')
    for s in range(S):
        for stream, size in (('D', 1), ('C', 8.0**s / 10)):
            statistics.add_stream(stream, s, size * torch.randn(6, T, D, generator=generator))
    streams = streams_report(statistics, ('attn', 'mlp') * 2, 'C')
    for s in streams.values():
        image = pooled(np.abs(np.random.default_rng(0).standard_normal((T, D))))
        s['landscape'] = {'sublayer': 3, 'sequences': 6, **image}
    untrained = {'source': 'measure_0.json', 'streams': {'C': {'kurtosis': [1.0, 2.0, 3.0, 4.0]}}}
    return {'iter_num': 7, 'streams': streams, 'untrained': untrained}


REPORT = report()


@pytest.fixture
def run(tmp_path):
    """The folder of a run, as measure.py and train.py leave it, in a folder with a comparison."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'measure.json').write_text(json.dumps(REPORT))
    values = {key: [1.0, 2.0, None, 4.0] for key in figures.PROFILE}
    lines = [{'iter': i, 'tokens': 100 * i, 'val_loss': 5.0 - i, 'streams': {'C': values}} for i in range(3)]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    quantities = {figures.HEADLINES[key]: REPORT['streams']['C'][key] for key in figures.COMPARED}
    column = {'stream': 'C', 'quantities': {'loss − first run': None, **quantities}, 'outlier': {}}
    (tmp_path / 'comparison.json').write_text(json.dumps({'a': column, 'b': column}))
    return folder


PICTURES = ['comparison.png', 'run/landscape.png', 'run/profile.png', 'run/series.png']


def drawn(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.png')}
    assert all(png.startswith(b'\x89PNG\r\n\x1a\n') and len(png) > 5000 for png in found.values())
    return sorted(found)


def test_all_pictures_below_a_folder_are_drawn_again_from_json(run, capsys):
    figures.main([str(run.parent)])
    assert drawn(run.parent) == PICTURES and 'profile.png' in capsys.readouterr().out


def test_settings_of_a_notebook_and_of_the_user_change_nothing(run, tmp_path):
    figures.draw_run('run', run, '')
    plain = (run / 'profile.png').read_bytes()
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.size: 40\n')
    settings = {
        'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
        'MATPLOTLIBRC': str(tmp_path),
        'OMP_NUM_THREADS': '1',
    }
    command = [sys.executable, str(ROOT / 'figures.py'), str(run)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0 and 'profile.png' in done.stdout, done.stderr
    assert (run / 'profile.png').read_bytes() == plain


def test_a_backend_that_does_not_exist_is_not_looked_at(monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'no such backend')
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    assert figures.import_matplotlib().figure and os.environ['MPLBACKEND'] == 'no such backend'


def test_a_name_with_dollars_is_drawn_as_it_stands(run):
    for name in ('$x_$', '$'):
        assert figures.draw_run(name, run, '') == ['profile.png', 'landscape.png']


def test_a_picture_that_fails_is_a_sentence_and_the_others_are_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(figures, 'draw_profile', lambda *_: 1 / 0)
    assert figures.draw_run('run', run, '') == ['landscape.png']
    printed = capsys.readouterr().out
    assert 'profile.png could not be drawn (division by zero)' in printed and printed.count('\n') == 1


@pytest.fixture
def axes(monkeypatch):
    """Keeps the figure open: {title of a panel: its axes} after something has been drawn."""
    kept, savefig = {}, figures.import_matplotlib().figure.Figure.savefig

    def keep(figure, file, **settings):
        savefig(figure, file, **settings)
        kept.update({axis.get_title(): axis for axis in figure.axes})

    monkeypatch.setattr('matplotlib.figure.Figure.savefig', keep)
    return kept


def test_a_profile_shows_intervals_the_untrained_model_and_where_a_stream_is_nearly_empty(axes, tmp_path):
    figures.draw_profile('run', REPORT, tmp_path / 'profile.png')
    kurtosis = axes['kurtosis']
    lines = kurtosis.get_lines()
    hollow = [line for line in lines if line.get_markerfacecolor() == 'white' and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[0, 1]]  # where C is 512 and 64 times smaller
    dotted = [line for line in lines if line.get_linestyle() == ':']
    assert [list(line.get_ydata()) for line in dotted] == [[1, 2, 3, 4]]
    assert len(kurtosis.collections) == 2  # a band for each stream


def test_ticks_are_round_numbers(axes, tmp_path):
    figures.draw_profile('run', REPORT, tmp_path / 'profile.png')
    assert axes['norm'].get_yscale() == 'log'
    for axis in axes.values():
        for tick in (*axis.get_yticks(), *axis.get_xticks()):
            assert len(f'{abs(tick):.10g}'.replace('.', '').strip('0')) <= 2
        assert all(tick == int(tick) for tick in axis.get_xticks())


def test_a_landscape_has_axes_of_its_own_for_position_and_dimension(axes, tmp_path):
    figures.draw_landscape('run', REPORT, tmp_path / 'landscape.png')
    assert (
        axes['by position'].get_xlabel().startswith('position')
        and axes['by dimension'].get_xlabel() == 'dimension'
    )
    assert [label.get_text() for label in axes['by position'].get_xticklabels()] == ['0', '1', '3', '10']
    assert not any(axis.texts for axis in axes.values())  # nothing is written over the picture


def test_a_comparison_of_ratios_is_in_a_logarithm_and_that_of_losses_is_not(axes, run):
    assert figures.draw_comparison_of(run.parent) == ['comparison.png']
    assert axes['fixed-dimension ratio'].get_xscale() == 'log'
    assert axes['loss − first run'].get_xscale() == axes['persistence'].get_xscale() == 'linear'


@pytest.mark.parametrize(
    'x, digits, text',
    [
        (None, 3, '–'),
        (0, 3, '0'),
        (12.345, 3, '12.3'),
        (12345.6, 3, '12346'),
        (1234567, 3, '1.2e6'),
        (0.00123, 3, '1.2e-3'),
        (-0.5, 3, '-0.5'),
    ],
)
def test_a_number_is_short(x, digits, text):
    assert figures.short(x, digits) == text


def test_an_interval_is_written_behind_its_value():
    assert figures.cell({'value': 12.345, 'low': 11.94, 'high': 12.81}) == '12.35 [11.9, 12.8]'
    assert figures.cell({'value': 12.345, 'low': None, 'high': None}) == '12.35 –'
    assert figures.cell({'value': None, 'low': None, 'high': None}) == '–'


def test_what_cannot_be_drawn_is_said_in_one_sentence(run):
    with pytest.raises(SystemExit, match='error: there is no measure.json'):
        figures.main([str(run / 'nothing')])
    (run / 'measure.json').write_text('{"streams": ')
    with pytest.raises(SystemExit, match='error: .*measure the run again'):
        figures.main([str(run)])
