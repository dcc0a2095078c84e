"""Figures over several runs: which runs they take, and when they are left out."""

import json

import pytest
from planted import stream, sublayer, write_log, write_run

from studies import overview
from studies.results import by_scale, runs_in

DOSES = {'ledger_a0': 0.0, 'ledger': 0.02, 'ledger_hs': 0.3}
COMMITS = {
    name: {'dim': 3, 'magnitude': 2.0, 'identity': [0.5, None], 'map': [0.25, 0.25]}
    for name in ('start_at_start_dim', 'mean_at_dominant')
} | {
    name: {'dim': None, 'magnitude': 2.0, 'identity': [0.5, 1.0], 'map': [0.25, 0.25]}
    for name in ('start_at_others', 'mean_at_others')
}


def group(folder, scale='160m'):
    return by_scale(runs_in(folder))[scale]


def drawn(folder, *arguments):
    overview.main([str(folder), *arguments])
    return {path.name for path in folder.glob('*.png')}


def test_doses_are_the_ledgers_that_differ_in_alpha_alone_in_its_order_seed_by_seed(tmp_path):
    for arm, alpha, seed in (
        ('ledger', 0.02, 1),
        ('ledger_hs', 0.3, 1),
        ('ledger_a0', 0.0, 1),
        ('ledger_ramp64', 0.02, 1),
        ('baseline', None, 1),
        ('ledger', 0.02, 2),
        ('ledger_a1', 1.0, 3),
        ('ledger_a0', 0.0, 3),
    ):
        write_run(tmp_path, arm, seed, alpha=alpha)
    write_run(tmp_path, 'ledger', 1, scale='290m')
    found = overview.doses_by_seed(group(tmp_path))
    of_seed_2_there_is_one = {seed: [run.alpha for run in runs] for seed, runs in found.items()}
    assert of_seed_2_there_is_one == {1: [0, 0.02, 0.3], 3: [0, 1]}
    assert overview.doses_by_seed(group(tmp_path, '290m')) == {}


def test_the_commit_rate_at_the_end_is_the_mean_over_sublayers(tmp_path):
    write_log(write_run(tmp_path, 'ledger'), {0: 8.0, 4: 2.0})
    assert overview.final_commit_rate(group(tmp_path)['ledger', 1338])['value'] == pytest.approx(0.2)
    write_run(tmp_path, 'ledger', 1339)
    assert overview.final_commit_rate(group(tmp_path)['ledger', 1339]) is None


def test_a_figure_is_drawn_only_of_runs_that_are_there(tmp_path):
    write_run(tmp_path, 'baseline_wide')
    assert drawn(tmp_path) == set()
    write_run(tmp_path, 'baseline')
    assert drawn(tmp_path) == {'depth_160m.png'}
    for arm, alpha in DOSES.items():
        write_run(tmp_path, arm, alpha=alpha)
    assert drawn(tmp_path) == {'depth_160m.png', 'dose_160m.png'}


def test_all_figures_are_pictures_made_from_the_files_alone(tmp_path):
    for arm, alpha in DOSES.items():
        folder = write_run(tmp_path, arm, alpha=alpha)
        write_log(folder, {0: 8.0, 1: 7.9, 4: 4.0, 20: 2.0}, 'DC')
    (folder / 'controls.json').write_text(json.dumps({'commits': {'last': COMMITS}}))
    write_run(tmp_path, 'baseline', scale='290m')
    back = stream(dict(fixed_dim_ratio=2, start_ratio=3, start_token_concentration=1))
    write_run(tmp_path, 'rotated_commit_a0', streams={overview.ON_AXES_OF_D: back})
    names = {f'{name}_160m.png' for name in ('depth', 'axes', 'dose', 'onset', 'commits')}
    assert drawn(tmp_path) == names | {'depth_290m.png', 'scale.png'}
    assert all(path.read_bytes()[:4] == b'\x89PNG' for path in tmp_path.glob('*.png'))


def test_a_stream_is_hollow_where_it_is_nearly_empty(tmp_path):
    values = dict(fixed_dim_ratio=2, start_ratio=3, start_token_concentration=1)
    sublayers = [sublayer(s, values, norm) for s, norm in enumerate((0.5, 1.0, 10.0))]
    with overview.figure(tmp_path / 'x.png', '', 1, 1, (2, 2)) as axes:
        axis = list(axes)[0]
        overview.draw_line(axis, stream(values, sublayers=sublayers), 'start_ratio', 'k', 'x')
        line, full, hollow = axis.lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(full.get_xdata()) == [1, 2] and list(hollow.get_xdata()) == [0]


def test_the_figure_of_the_onset_has_the_price_of_zero_but_neither_other_doses_nor_short_runs(tmp_path):
    for arm in (
        'baseline',
        'baseline_short20',
        *(f'ledger{x}' for x in ('', '_hs', '_a0', '_a0.1', '_a1', '_a10')),
    ):
        streams = 'h' if arm.startswith('baseline') else 'DC'
        write_log(write_run(tmp_path, arm), {0: 8.0, 4: 4.0, 20: 2.0}, streams)
        write_log(write_run(tmp_path, arm, 1339), {0: 8.0}, streams)
    titles = [title for title, _, _ in overview.onset_panels(group(tmp_path))]
    arms = [f'{arm}_160m_1338: {name}' for arm in ('ledger', 'ledger_a0', 'ledger_hs') for name in 'DC']
    assert titles == ['baseline_160m_1338: h', *arms]


def test_what_is_missing_or_torn_is_said_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no <arm>_<scale>_<seed>/measure.json'):
        overview.main([str(tmp_path)])
    folder = write_run(tmp_path, 'baseline')
    with pytest.raises(SystemExit, match='^error: several sets are drawn together: name a folder'):
        overview.main([str(tmp_path), str(tmp_path)])
    (folder / 'measure.json').write_text('{"model": ')
    with pytest.raises(SystemExit, match='is not readable as JSON'):
        overview.main([str(tmp_path)])
