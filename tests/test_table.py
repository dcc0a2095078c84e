"""The table and the figure of many runs, from planted files."""

import json

import planted
import pytest

from data.loader import UserError
from studies import table


def headline(value, last, sublayer=3):
    return {'value': value, 'low': value - 1, 'high': value + 1, 'sublayer': sublayer, 'last': last}


def write_run(
    folder, name, loss=3.7, ratio=30.0, damage=0.5, sinks=0.25, rates=(1, 400_000, 420_000, 410_000)
):
    path = folder / name
    path.mkdir(parents=True)
    values = {key: headline(20.0, 2.0) for key in table.QUANTITIES} | {
        'fixed_dim_ratio': headline(ratio, 3.1)
    }
    report = {
        'val_loss': loss,
        'loss': planted.around(loss),
        'model': {'residual': 'baseline'},
        'streams': {'h': planted.stream(values)},
        'attention_sink': {'fraction_of_heads': planted.around(sinks)},
    }
    (path / 'measure.json').write_text(json.dumps(report))
    lines = [{'iter': i, 'val_loss': 5.0 - i, 'tokens_per_s': rate} for i, rate in enumerate(rates)]
    (path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if damage is not None:
        schemes = {'W8A8': {'damage': planted.around(0.02, 0.01)}, 'W4A4': {'damage': planted.around(damage)}}
        (path / 'quantize.json').write_text(json.dumps({'schemes': schemes}))
    return path


def rows(text):
    """Returns the rows of a Markdown table as dicts."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line]
    return [dict(zip(lines[0], cells)) for cells in lines[2:]]


def test_a_row_has_the_last_sublayer_first_and_then_the_peak(tmp_path):
    write_run(tmp_path, 'sandwich_160m_1338')
    (row,) = rows(table.table_of(table.runs_below([tmp_path])))
    assert (row['arm'], row['scale'], row['seed'], row['loss']) == ('sandwich', '160m', '1338', '3.700')
    assert row['fixed-dimension ratio'] == '3.1 · 30 (3)' and row['kurtosis'] == '2 · 20 (3)'
    assert row['heads that are sinks'] == '25.0%'


def test_damage_has_its_interval_and_the_rate_is_the_median(tmp_path):
    write_run(tmp_path, 'sandwich_160m_1338')
    (row,) = rows(table.table_of(table.runs_below([tmp_path])))
    assert row['W4A4'] == '0.5 [0.4, 0.6]' and row['W8A8'] == '0.02 [0.01, 0.03]'
    assert row['tokens/s'] == '405k'


def test_what_is_not_known_is_a_dash(tmp_path):
    path = write_run(tmp_path, 'sandwich_160m_1338', damage=None)
    report = json.loads((path / 'measure.json').read_text())
    report['attention_sink'] = None
    del report['streams']['h']['start_norm']
    (path / 'measure.json').write_text(json.dumps(report))
    (path / 'log.jsonl').unlink()
    (row,) = rows(table.table_of(table.runs_below([tmp_path])))
    assert {row[key] for key in ('W8A8', 'W4A4', 'tokens/s', 'start norm', 'heads that are sinks')} == {'–'}


@pytest.mark.parametrize('loss, said', [(None, 'not finite'), (7.25, '7.250')])
def test_a_run_that_was_not_measured_is_a_row(tmp_path, loss, said):
    write_run(tmp_path, 'baseline_160m_1338')
    (tmp_path / 'muon_160m_1338').mkdir()
    line = {'iter': 500, 'val_loss': loss}
    (tmp_path / 'muon_160m_1338' / 'log.jsonl').write_text(json.dumps(line) + '\n')
    row = rows(table.table_of(table.runs_below([tmp_path])))[1]
    assert row['arm'] == 'muon' and row['loss'] == f'not measured: {said} at step 500'


def test_runs_of_several_folders_are_sorted_and_each_is_there_once(tmp_path):
    for folder, name in (('b', 'x_demo_1'), ('a', 'y_demo_2'), ('a', 'odd name')):
        write_run(tmp_path / folder, name)
    found = table.runs_below([tmp_path / 'b', tmp_path / 'a', tmp_path / 'a' / 'y_demo_2'])
    assert [(run.arm, run.scale, run.seed) for run in found] == [
        ('odd name', '', None),
        ('y', 'demo', 2),
        ('x', 'demo', 1),
    ]


def test_the_figure_has_a_point_for_each_seed_of_each_arm(tmp_path):
    for seed, ratio in ((1, 20.0), (2, 40.0)):
        write_run(tmp_path, f'baseline_demo_{seed}', ratio=ratio, loss=3.0 + seed)
    write_run(tmp_path, 'ledger_demo_1', damage=None)
    runs = table.runs_below([tmp_path])
    assert table.points(runs, 'value') == {'baseline demo': [(20.0, 0.5, 0.25, 4.0), (40.0, 0.5, 0.25, 5.0)]}
    assert {outlier for outlier, *_ in table.points(runs, 'last')['baseline demo']} == {3.1}
    names = table.names(table.points(runs, 'last'))
    assert ' 1 baseline demo 4.000 5.000' in names


@pytest.mark.parametrize('damage', [0.5, -0.01, None])
def test_the_table_is_written_and_the_figure_where_runs_are_quantized(tmp_path, capsys, damage):
    write_run(tmp_path, 'baseline_demo_1', damage=damage)
    write_run(tmp_path, 'ledger_demo_1', damage=damage, sinks=0)
    table.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert (tmp_path / 'table.md').read_text() in said
    assert (tmp_path / 'table.png').exists() == (damage is not None)
    assert damage is not None or 'python -m studies.quantize' in said


def test_a_folder_without_runs_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match='there is no run in'):
        table.runs_below([tmp_path])
    with pytest.raises(SystemExit, match='error: there is no run in'):
        table.main([str(tmp_path)])
