"""What is packed for git: few digits, one untrained measurement for all arms that share it, short logs."""

import json

import pytest

from data.loader import UserError
from figures import draw_profile, draw_series
from studies import pack

HEADLINE = {'value': 12.345678, 'low': 11.98765, 'high': 13.0, 'sublayer': 1, 'last': None}
QUANTITIES = ('fixed_dim_ratio', 'start_ratio', 'start_token_concentration', 'kurtosis', 'max_over_median')


def report(start_ratio=3.14159265):
    top = [{'value': 9.87654321, 'sequence': 3, 'position': 0, 'token': 17, 'dim': 5}] * 5
    sublayer = {
        'sublayer': 0,
        'kind': 'attn',
        'top': top,
        'top_mean': [1.0] * 5,
        **{key: 2.7182818 for key in (*QUANTITIES, 'norm')},
        'intervals': {'start_ratio': [2.654321, 2.8], 'norm': [1.0, 2.0]},
    }
    stream = {'decoded': True, 'start_ratio': {**HEADLINE, 'value': start_ratio}, 'sublayers': [sublayer]}
    return {
        'iter_num': 4100,
        'val_loss': 3.6912345,
        'loss': {**HEADLINE, 'value': 3.6912345},
        'model': {'n_embd': 123456},
        'data': {'tokens': 262144},
        'streams': {'h': stream},
        'landscape': [[1.0] * 9] * 9,
    }


def log_line(iteration, value=1.23456789):
    stream = {key: [value, None] for key in (*QUANTITIES, 'norm', 'magnitude_at_dominant', 'top1')}
    return {
        'iter': iteration,
        'tokens': 10 * iteration,
        'val_loss': 3.6912345,
        'streams_s': 0.4,
        'streams': {'h': {**stream, 'persistence': 0.958333333}},
    }


def write_run(folder, untrained=None, **files):
    folder.mkdir(parents=True)
    (folder / 'measure.json').write_text(json.dumps(report()))
    (folder / 'log.jsonl').write_text(''.join(json.dumps(log_line(i)) + '\n' for i in (0, 1, 2)))
    if untrained:
        (folder / 'measure_0.json').write_text(json.dumps(untrained))
    for name, value in files.items():
        (folder / f'{name}.json').write_text(json.dumps(value))
    return folder


def packed(folder, name='measure.json'):
    return json.loads((folder / name).read_text())


def test_numbers_have_four_significant_digits_losses_six_and_whole_numbers_all():
    small = pack.compact_measure(report())
    assert small['streams']['h']['start_ratio']['value'] == 3.142
    assert (small['val_loss'], small['loss']['value']) == (3.69123, 3.69123)
    assert (small['model']['n_embd'], small['data']['tokens']) == (123456, 262144)
    assert pack.rounded([float('nan'), float('inf'), -0.000123456, True]) == [None, None, -0.0001235, True]


def test_a_sublayer_keeps_its_largest_entry_and_the_intervals_that_are_judged():
    sublayer = pack.compact_measure(report())['streams']['h']['sublayers'][0]
    assert len(sublayer['top']) == 1 and 'top_mean' not in sublayer
    assert sublayer['intervals'] == {'start_ratio': [2.654, 2.8]}
    assert 'landscape' not in pack.compact_measure(report())


def test_what_is_packed_stays_as_it_is_when_it_is_packed_again(tmp_path):
    source = write_run(tmp_path / 'out/a', untrained=report(2.0))
    pack.main([str(source), f'--out={tmp_path}/results'])
    first = {path.name: path.read_text() for path in (tmp_path / 'results/a').iterdir()}
    pack.main(['--again', str(tmp_path / 'results')])
    assert {path.name: path.read_text() for path in (tmp_path / 'results/a').iterdir()} == first


def test_a_log_keeps_what_figures_draw(tmp_path):
    source = write_run(tmp_path / 'out/a')
    pack.pack_run(source, tmp_path / 'results/a')
    lines = [json.loads(line) for line in (tmp_path / 'results/a/log.jsonl').read_text().splitlines()]
    assert [line['iter'] for line in lines] == [0, 1, 2] and lines[0]['val_loss'] == 3.69123
    assert lines[1]['streams']['h']['start_ratio'] == [1.23, None] and 'top1' not in lines[1]['streams']['h']
    draw_series('a', lines, tmp_path / 'series.png')
    draw_profile('a', packed(tmp_path / 'results/a'), tmp_path / 'profile.png')


def test_a_long_log_is_thinned_evenly_over_the_logarithm_of_the_step_and_keeps_both_ends():
    lines = [log_line(i) for i in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, *range(500, 14001, 500))]
    steps = [line['iter'] for line in pack.thinned(lines)]
    assert steps[:10] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256] and steps[-1] == 14000
    assert 12 < len(steps) <= 24 and pack.thinned(lines[:24]) == lines[:24]
    late = [b / a for a, b in zip(steps[10:], steps[11:])]
    assert max(late) < 2.1


def test_arms_that_share_their_untrained_weights_share_one_measurement_of_them(tmp_path):
    for name, untrained in (('ledger', report(2.0)), ('ledger_hs', report(2.0)), ('qknorm', report(5.0))):
        pack.pack_run(write_run(tmp_path / 'out' / name, untrained), tmp_path / 'results' / name)
    have = sorted(path.parent.name for path in (tmp_path / 'results').glob('*/measure_0.json'))
    assert have == ['ledger', 'qknorm']
    assert packed(tmp_path / 'results/ledger_hs')['untrained_in'] == 'ledger'
    ratio = {
        name: pack.untrained_report(tmp_path / 'results' / name)['streams']['h']['start_ratio']['value']
        for name in ('ledger', 'ledger_hs', 'qknorm')
    }
    assert ratio == {'ledger': 2.0, 'ledger_hs': 2.0, 'qknorm': 5.0}


def test_the_run_that_has_the_shared_measurement_keeps_it_when_all_are_packed_again(tmp_path):
    for name in ('a', 'b'):
        pack.pack_run(write_run(tmp_path / 'out' / name, report(2.0)), tmp_path / 'results' / name)
    pack.main(['--again', str(tmp_path / 'results')])
    assert (tmp_path / 'results/a/measure_0.json').exists()
    assert packed(tmp_path / 'results/b')['untrained_in'] == 'a'


def test_without_the_run_that_has_the_untrained_measurement_one_sentence_says_so(tmp_path):
    for name in ('a', 'b'):
        pack.pack_run(write_run(tmp_path / 'out' / name, report(2.0)), tmp_path / 'results' / name)
    (tmp_path / 'results/a/measure_0.json').unlink()
    with pytest.raises(UserError, match='has its untrained measurement in a, which is not beside it'):
        pack.untrained_report(tmp_path / 'results/b')
    assert pack.untrained_report(write_run(tmp_path / 'out/c')) is None


def test_other_reports_keep_what_tables_show(tmp_path):
    place = {'identity': [0.5], 'map': [0.25], 'identity_signed': [0.5], 'map_share': 0.123456}
    window = {'start_ratio': {'value': 8.2}, 'median': {'value': 1.0}}
    ratio = {'value': 1.00012345, 'low': 1.0, 'high': 1.1}
    change = {'what': 'top', 'entries': [[1, 2]], 'edit': {'ratio': ratio, 'by': {'a': 1}}}
    source = write_run(
        tmp_path / 'out/a',
        controls={
            'windows': {'document': {'sequences': 1}, 'anywhere': {'streams': {'C': window}}},
            'commits': {'last': {'mean': place}, 'peak': {}},
            'likeness': {},
        },
        intervene={'results': [change], 'sweep': [1]},
        probe={'linear': {'balanced': 0.123456, 'accuracy': 1.0}, 'hidden': {}},
        quantize={'W8': 1.23456789},
        emergence={'summary': [{'r2': 0.987654}], 'series': [1.0]},
        recipe={'commit': 'abc'},
    )
    names = pack.pack_run(source, tmp_path / 'results/a')
    assert names[-1] == 'recipe.json' and len(names) == 8
    folder = tmp_path / 'results/a'
    assert packed(folder, 'controls.json') == {
        'windows': {
            'document': {'sequences': 1},
            'anywhere': {'streams': {'C': {'start_ratio': {'value': 8.2}}}},
        },
        'commits': {'last': {'mean': {'identity': [0.5], 'map': [0.25], 'map_share': 0.1235}}},
    }
    assert packed(folder, 'intervene.json') == {
        'results': [{'what': 'top', 'edit': {'ratio': {'value': 1.00012, 'low': 1.0, 'high': 1.1}}}]
    }
    assert packed(folder, 'probe.json') == {'linear': {'balanced': 0.1235}}
    assert packed(folder, 'emergence.json') == {'summary': [{'r2': 0.9877}]}
    assert packed(folder, 'quantize.json') == {'W8': 1.235}


@pytest.mark.parametrize('arguments', (['{}/nothing', '--out={}/results'], ['{}/nothing']))
def test_what_cannot_be_packed_ends_in_a_sentence(tmp_path, arguments):
    with pytest.raises(SystemExit, match='^error: '):
        pack.main([argument.format(tmp_path) for argument in arguments])
