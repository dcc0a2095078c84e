"""Figures over several runs: which runs they take, and when they are left out."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
from studies import doses as figures


def write_run(folder, name, alpha=None, value=2.0):
    q = {'value': value, 'low': value - 0.5, 'high': value + 0.5, 'sublayer': 1, 'last': value}
    path = folder / 'set' / name
    path.mkdir(parents=True)
    streams = {'D': {'decoded': False}, 'C': {'decoded': True, **{key: q for key in figures.SIGNATURE}}}
    model = {'residual': 'baseline'} if alpha is None else {'residual': 'ledger', 'commit_sparsity': alpha}
    (path / 'measure.json').write_text(json.dumps({'model': model, 'loss': q, 'streams': streams}))
    (path / 'log.jsonl').write_text(
        json.dumps({'iter': 3, 'commit_rate': [0.1, 0.3] if alpha is not None else []}) + '\n'
    )


def test_doses_are_the_ledgers_that_differ_in_alpha_alone_in_its_order_seed_by_seed(tmp_path):
    for name, alpha in (
        ('ledger_160m_1', 0.02),
        ('ledger_hs_160m_1', 0.3),
        ('ledger_a0_160m_1', 0.0),
        ('ledger_ramp64_160m_1', 0.02),
        ('ledger_160m_2', 0.02),
        ('ledger_290m_1', 0.02),
        ('baseline_160m_1', None),
        ('ledger_a1_160m_3', 1.0),
        ('ledger_a0_160m_3', 0.0),
    ):
        write_run(tmp_path, name, alpha)
    runs = figures.read_runs(tmp_path)
    found = figures.doses(runs, '160m')
    assert {seed: [run['alpha'] for run in mine] for seed, mine in found.items()} == {
        '1': [0, 0.02, 0.3],
        '3': [0, 1],
    }  # of seed 2 there is one dose
    assert found['1'][0]['commit_rate'] == pytest.approx(0.2) and found['1'][0]['persistence']['high'] == 2.5
    assert figures.doses(runs, '290m') == {}


def test_a_figure_is_drawn_only_of_runs_that_are_there(tmp_path, capsys):
    write_run(tmp_path, 'baseline_160m_1')
    figures.main([str(tmp_path)])
    assert not list(tmp_path.glob('*.png'))
    for name, alpha in (
        ('ledger_160m_1', 0.02),
        ('ledger_hs_160m_1', 0.3),
        ('ledger_a1.0_160m_1', 1.0),
        ('ledger_demo', 0.02),
    ):
        write_run(tmp_path, name, alpha, value=3.0)
    figures.main([str(tmp_path), f'--out={tmp_path}/deep/new'])
    assert {path.name for path in (tmp_path / 'deep/new').glob('*.png')} == {
        'dose_160m.png',
        'scale.png',
    } and 'written' in capsys.readouterr().out


def test_what_is_missing_or_torn_is_said_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match='there is no <set>/<arm>_<scale>/measure.json'):
        figures.main([str(tmp_path)])
    write_run(tmp_path, 'baseline_160m_1')
    (tmp_path / 'set/baseline_160m_1/measure.json').write_text('{"model": ')
    with pytest.raises(SystemExit, match='is not a whole measurement'):
        figures.main([str(tmp_path)])
