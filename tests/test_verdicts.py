"""The second set of rules: two objects, three readings, the claims, on planted files."""

import json

import pytest
from planted import UNTRAINED, around, stream, sublayer, write_run

from studies import verdicts
from studies.evidence import HOLDS, Evidence, Need, is_below, not_counting, verdict
from studies.results import by_scale, runs_in
from studies.verdicts import DECODED, DEPTH, DIMENSION, PUBLISHED, READINGS, START

SEEDS = (1338, 1339, 1340)


def group(folder):
    return by_scale(runs_in(folder))['160m']


def judged(folder, text, row, post_hoc=False):
    """Returns {reading: what was found} of the row whose claim has this text."""
    rows = verdicts.judge(group(folder), post_hoc)
    return next(found for (_, claim, name), found in rows.items() if text in claim and name == row)


def words(folder, text, row, words=('yes', 'in part', 'no'), post_hoc=False):
    return [verdict(found, words) for found in judged(folder, text, row, post_hoc).values()]


def answer(folder, kind, reading, arm='baseline', name='h', seed=1338):
    item = verdicts.object_in(verdicts.View(group(folder)[arm, seed], name), kind, reading, False)
    return item if isinstance(item, Need) else item.holds


def with_sublayers(*changes, **values):
    """A stream whose sublayers are massive but for these changes, one dict a sublayer."""
    usual = dict(
        fixed_dim_ratio=20, start_ratio=30, relative_start_concentration=4, start_token_concentration=5
    )
    entries = [
        sublayer(s, {**usual, 'kurtosis': 20, **change.pop('values', {})}, **change)
        for s, change in enumerate(changes)
    ]
    return {'h': stream({**usual, 'kurtosis': 20, **values}, sublayers=entries)}


# ---- What is counted


def test_a_verdict_says_how_many_conditions_hold_and_in_how_many_seeds():
    lines = [Evidence(seed, 'x', '', True, '') for seed in SEEDS]
    assert verdict(lines, HOLDS) == 'yes (3 of 3; 3 seeds)'
    assert verdict(lines[:2], HOLDS) == 'yes (2 of 2; only 2 seeds)'
    other = Evidence(1338, 'y', '', False, '')
    assert verdict([*lines, other], HOLDS) == 'in part (3 of 4; 3 seeds)'
    assert verdict([other], HOLDS) == 'no (0 of 1; only 1 seed)'
    assert verdict([], HOLDS) == '–'


def test_conditions_of_one_quantity_stand_or_fall_together():
    lines = [Evidence(1338, 'x', '', True, ''), Evidence(1338, 'x', '', False, '')]
    assert verdict(lines, HOLDS).startswith('no (0 of 1')


def test_a_seed_that_does_not_count_is_shown_and_changes_no_verdict():
    lines = [Evidence(1337, 'x', '', True, ''), Evidence(1338, 'x', '', False, '')]
    assert (
        verdict(not_counting(lines, [1337]), HOLDS) == 'no (0 of 1; only 1 seed); 1337, not counted: 1 of 1'
    )
    assert verdict(not_counting(lines[:1], [1337]), HOLDS) == 'no seed that counts; 1337, not counted: 1 of 1'


def test_what_is_missing_is_named_once():
    assert verdict([Need('a'), Need('a'), Need('b')], HOLDS) == 'no seed that counts; needs a; b'


def test_apart_and_a_factor_are_meant_between_near_ends():
    assert is_below(around(1), around(1.3)) and not is_below(around(1), around(1.2))
    assert is_below(around(1), around(3.5), 3) and not is_below(around(1), around(3.3), 3)
    assert not is_below(around(1), {'value': None, 'low': None, 'high': None})


# ---- The objects


@pytest.mark.parametrize('reading', READINGS)
def test_both_objects_are_found_in_every_reading(tmp_path, reading):
    write_run(tmp_path, 'baseline')
    assert answer(tmp_path, DIMENSION, reading) is True and answer(tmp_path, START, reading) is True


@pytest.mark.parametrize(
    'kind, values',
    (
        (DIMENSION, dict(fixed_dim_ratio=6.3)),  # 6.2 is less than 3 × 2.1
        (START, dict(start_ratio=9.3)),
        (START, dict(relative_start_concentration=1.55)),  # its interval begins at 1.45
    ),
    ids=str,
)
@pytest.mark.parametrize('reading', READINGS)
def test_an_object_is_missing_where_one_of_its_conditions_fails_at_a_near_end(
    tmp_path, kind, values, reading
):
    write_run(tmp_path, 'baseline', **values)
    other = START if kind == DIMENSION else DIMENSION
    assert answer(tmp_path, kind, reading) is False and answer(tmp_path, other, reading) is True


def test_a_dimension_as_large_at_every_token_is_no_start_token_outlier(tmp_path):
    write_run(tmp_path, 'baseline', relative_start_concentration=1.0)
    assert answer(tmp_path, DIMENSION, DECODED) is True and answer(tmp_path, START, DECODED) is False


def test_decoded_reads_the_last_sublayer_alone(tmp_path):
    cancelled = dict(values=dict(fixed_dim_ratio=2.5))
    write_run(tmp_path, 'baseline', streams=with_sublayers({}, {}, {}, cancelled))
    assert answer(tmp_path, DIMENSION, DECODED) is False
    assert answer(tmp_path, DIMENSION, DEPTH) is True and answer(tmp_path, DIMENSION, PUBLISHED) is True


def test_published_reads_the_sublayer_where_the_dominant_dimension_peaks(tmp_path):
    small = [dict(values=dict(fixed_dim_ratio=2.5)) for _ in range(3)]
    streams = with_sublayers(small[0], {}, *small[1:])
    write_run(tmp_path, 'baseline', streams={'h': {**streams['h'], 'peak_sublayer': 1}})
    assert answer(tmp_path, DIMENSION, PUBLISHED) is True
    assert answer(tmp_path, DIMENSION, DEPTH) is False and answer(tmp_path, DIMENSION, DECODED) is False


def test_sublayers_where_a_stream_is_nearly_empty_do_not_count_along_the_depth(tmp_path):
    small, empty = dict(values=dict(fixed_dim_ratio=2.5)), dict(norm=0.09)
    streams = with_sublayers(dict(empty), dict(empty), {}, dict(small))
    write_run(tmp_path, 'baseline', streams=streams)
    view = verdicts.View(group(tmp_path)['baseline', 1338], 'h')
    assert view.counting() == [2, 3]
    assert answer(tmp_path, DIMENSION, DEPTH) is True
    streams = with_sublayers(dict(empty), {}, dict(small), dict(small))
    write_run(tmp_path, 'baseline', seed=1339, streams=streams)
    assert answer(tmp_path, DIMENSION, DEPTH, seed=1339) is False


def test_along_the_depth_one_dimension_is_the_largest_in_half_of_the_sublayers_that_count(tmp_path):
    streams = with_sublayers(dict(dim=1), dict(dim=1), dict(dim=2), dict(dim=3))
    write_run(tmp_path, 'baseline', streams=streams)
    assert answer(tmp_path, DIMENSION, DEPTH) is True
    streams = with_sublayers(dict(dim=1), dict(dim=2), dict(dim=3), dict(dim=4))
    write_run(tmp_path, 'baseline', seed=1339, streams=streams)
    assert answer(tmp_path, DIMENSION, DEPTH, seed=1339) is False
    assert answer(tmp_path, START, DEPTH, seed=1339) is True
    streams = with_sublayers(*(dict(start_dim=s) for s in range(4)))
    write_run(tmp_path, 'baseline', seed=1340, streams=streams)
    assert answer(tmp_path, START, DEPTH, seed=1340) is False


def test_the_numbers_along_the_depth_say_how_many_sublayers_and_which_dimension(tmp_path):
    write_run(tmp_path, 'baseline', streams=with_sublayers({}, {}, {}, dict(dim=9)))
    item = judged(tmp_path, 'h has it', DIMENSION)[DEPTH][0]
    assert item.numbers == 'in 4 of 4 sublayers that count; dimension 7 the largest in 3'


def test_without_the_untrained_weights_nothing_is_said_of_an_object(tmp_path):
    write_run(tmp_path, 'baseline', untrained=False)
    assert answer(tmp_path, DIMENSION, DECODED) == Need('the untrained baseline_160m_1338, measured')


# ---- Runs that are older than the rules


def without_intervals(folder):
    """Makes a planted run one of the older kind: no interval and no relative concentration at a sublayer."""
    for name in ('measure.json', 'measure_0.json'):
        report = json.loads((folder / name).read_text())
        for entry in report['streams'].values():
            del entry['relative_start_concentration']
            for line in entry['sublayers']:
                del line['intervals'], line['relative_start_concentration']
        (folder / name).write_text(json.dumps(report))


def test_an_older_run_is_judged_only_where_its_intervals_allow_or_post_hoc_with_a_mark(tmp_path):
    without_intervals(write_run(tmp_path, 'baseline'))
    need = 'no seed that counts; needs fixed-dimension ratio with an interval at single sublayers'
    where_it_was_quoted = 'yes (1 of 1; only 1 seed)'
    assert words(tmp_path, 'h has it', DIMENSION) == [need, need, where_it_was_quoted]
    assert words(tmp_path, 'h has it', DIMENSION, post_hoc=True) == ['yes (1 of 1; only 1 seed)'] * 3
    found = judged(tmp_path, 'h has it', DIMENSION, post_hoc=True)
    assert [found[reading][0].numbers.endswith('†') for reading in READINGS] == [True, True, False]


def test_the_relative_start_concentration_of_an_older_run_is_that_of_its_controls(tmp_path):
    folder = write_run(tmp_path, 'baseline')
    without_intervals(folder)
    assert 'needs relative start conc., measured' in words(tmp_path, 'h has it', START, post_hoc=True)[2]
    quantiles = {'at': [0, 0.5, 1], 'concentration': [0.1, 0.8, 9]}
    of_stream = {'peak_sublayer': 0, 'start_dim': {'concentration': 1.4}, 'quantiles': quantiles}
    controls = {'streams': {'h': of_stream}}
    (folder / 'controls.json').write_text(json.dumps(controls))
    item = judged(tmp_path, 'h has it', START, post_hoc=True)[PUBLISHED][0]
    assert item.holds and 'relative start conc. 1.75 †' in item.numbers


# ---- The claims


def test_the_premise_is_said_before_any_claim_and_what_hangs_on_it(tmp_path, capsys):
    for seed in (1337, *SEEDS):
        write_run(tmp_path, 'baseline', seed, relative_start_concentration=1)
    verdicts.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith('## 160m: Premise')
    assert 'Has h the outlier dimension along the depth? Yes, in every seed (3 of 3; 3 seeds)' in printed
    assert (
        'Has h the start-token outlier along the depth? No (0 of 3; 3 seeds); 1337, not counted: 0' in printed
    )
    assert 'Claims about the start-token outlier speak of what the baseline has not' in printed


def test_claim_1_wants_a_baseline_of_the_same_seed_at_the_same_loss(tmp_path):
    write_run(tmp_path, 'ledger', loss=2.1)
    write_run(tmp_path, 'baseline', loss=2.0)
    need = 'a baseline of seed 1338 that ends within 0.01 nats of the ledger'
    assert all(need in said for said in words(tmp_path, 'rebuilt in C', START))
    write_run(tmp_path, 'baseline_short900', loss=2.095)
    assert words(tmp_path, 'rebuilt in C', START) == ['yes (1 of 1; only 1 seed)'] * 3


def test_claim_2_wants_ratio_and_kurtosis_of_C_below_and_concentration_above_those_of_h(tmp_path):
    write_run(tmp_path, 'baseline')
    write_run(tmp_path, 'ledger', fixed_dim_ratio=15, kurtosis=19.9, start_token_concentration=6)
    yes, no = ['yes (1 of 1; only 1 seed)'] * 3, ['no (0 of 1; only 1 seed)'] * 3
    assert words(tmp_path, 'smaller than in h', 'fixed_dim_ratio') == yes
    assert words(tmp_path, 'smaller than in h', 'kurtosis') == no  # they overlap
    assert words(tmp_path, 'more concentrated', 'start_token_concentration') == yes


def test_streams_are_compared_where_both_count(tmp_path):
    write_run(tmp_path, 'baseline')
    low, empty = dict(values=dict(fixed_dim_ratio=3)), dict(norm=0.01)
    C = with_sublayers(dict(empty), dict(empty), dict(low), {})['h']
    write_run(tmp_path, 'ledger', streams={'C': C})
    item = judged(tmp_path, 'smaller than in h', 'fixed_dim_ratio')[DEPTH][0]
    assert item.holds and item.numbers == 'in 1 of 2 sublayers that count in both'


@pytest.mark.parametrize(
    'values, holds',
    (((1, 2, 2, 3), True), ((1, 2, 1.9, 3), False), ((2, 2, 2.05, 2.1), False)),
)
def test_claim_3_wants_four_doses_over_which_C_never_falls_with_ends_apart(tmp_path, values, holds):
    doses = {'ledger_a0': 0, 'ledger': 0.02, 'ledger_a0.1': 0.1, 'ledger_hs': 0.3, 'ledger_a1': 1}
    for (arm, alpha), value in zip(doses.items(), (*values, 0)):  # α = 1 is none of the four
        if arm == 'ledger_hs':
            assert 'needs α = 0.3 in seed 1338' in words(tmp_path, 'price', 'persistence')[2]
        write_run(tmp_path, arm, alpha=alpha, start_token_concentration=value, persistence=value)
    said = words(tmp_path, 'price', 'start_token_concentration')
    assert said == [f'{"yes" if holds else "no"} ({int(holds)} of 1; only 1 seed)'] * 3
    assert words(tmp_path, 'price', 'persistence') == ['–', *said[1:]]


def test_claim_4_wants_ratio_and_kurtosis_of_qknorm_below_those_of_the_baseline(tmp_path):
    for seed in SEEDS:
        write_run(tmp_path, 'baseline', seed)
        write_run(tmp_path, 'qknorm', seed, fixed_dim_ratio=5, kurtosis=5 if seed < 1340 else 30)
    assert words(tmp_path, 'QK-norm', 'fixed_dim_ratio') == ['yes (3 of 3; 3 seeds)'] * 3
    assert words(tmp_path, 'QK-norm', 'kurtosis') == ['in part (2 of 3; 3 seeds)'] * 3


def write_quantized(folder, arm, W8, W4):
    schemes = {'W8': {'damage': around(W8)}, 'W4': {'damage': around(W4)}}
    (folder / f'{arm}_160m_1338/quantize.json').write_text(json.dumps({'schemes': schemes}))


def test_claim_5_wants_the_losses_of_all_arms_to_rise_by_the_same(tmp_path):
    for arm in ('baseline', 'ledger', 'qknorm'):
        write_run(tmp_path, arm)
    write_quantized(tmp_path, 'baseline', 0.001, 0.10)
    assert 'needs quantize.json' in words(tmp_path, 'quantized', 'W8')[0]
    write_quantized(tmp_path, 'ledger', 0.002, 0.105)
    assert words(tmp_path, 'quantized', 'W4') == ['yes (1 of 1; only 1 seed)', '–', '–']
    write_quantized(tmp_path, 'qknorm', 0.003, 0.12)
    assert words(tmp_path, 'quantized', 'W8')[0].startswith('yes')
    assert words(tmp_path, 'quantized', 'W4')[0].startswith('no')


@pytest.mark.parametrize(
    'own, on_D, said', ((4, 4, 'rebuilt'), (1, 4, 'leaked through the identity'), (1, 1, 'neither'))
)
def test_claim_6_tells_rebuilt_from_leaked(tmp_path, own, on_D, said):
    C, back = (
        stream({**UNTRAINED, 'start_ratio': 30, 'relative_start_concentration': x}) for x in (own, on_D)
    )
    folder = write_run(tmp_path, 'rotated_commit_a0', alpha=0, streams={'C': C, verdicts.ON_AXES_OF_D: back})
    untrained = json.loads((folder / 'measure_0.json').read_text())
    untrained['streams'][verdicts.ON_AXES_OF_D] = stream(UNTRAINED)
    (folder / 'measure_0.json').write_text(json.dumps(untrained))
    sentence = verdicts.rotation_in_words(verdicts.judge(group(tmp_path)))
    assert f'The start-token outlier: decoded, {said}' in sentence and '(only 1 seed).' in sentence


@pytest.mark.parametrize('in_D, in_C, said', ((30, 4, 'yes'), (30, 30, 'no'), (4, 4, 'no')))
def test_claim_7_wants_the_object_in_a_decoded_D_and_not_in_C(tmp_path, in_D, in_C, said):
    streams = {name: stream({**UNTRAINED, 'fixed_dim_ratio': x}) for name, x in (('D', in_D), ('C', in_C))}
    write_run(tmp_path, 'decode_scratch', streams=streams)
    assert words(tmp_path, 'D decoded', DIMENSION)[0].startswith(f'{said} (')
    assert words(tmp_path, 'D decoded', DIMENSION)[1:] == ['–', '–']


def change(where, ratio, control, what='dims', name='C'):
    interval = {
        key: {'value': x, 'low': x - 0.001, 'high': x + 0.001} for key, x in (('e', ratio), ('c', control))
    }
    return {
        'stream': name,
        'where': where,
        'what': what,
        'how': 'zero',
        'edit': {'ratio': interval['e']},
        'controls': {'moved': {'ratio': interval['c']}, 'random': {'ratio': around(1.0, 0.0001)}},
    }


@pytest.mark.parametrize(
    'changes, said',
    (
        ([change('decoder', 1.05, 1.01), change('reads', 1.0, 1.0)], 'yes'),
        ([change('decoder', 1.0, 1.0), change('reads', 1.05, 1.01)], 'yes'),
        ([change('decoder', 1.011, 1.01), change('reads', 1.0, 1.2)], 'no'),
        ([change('decoder', 1.05, 1.01), change('decoder', 1.0, 1.0, 'last dims')], 'no'),
        ([change('decoder', 1.05, 0.9)], 'yes'),
        ([change('decoder', 0.95, 0.9)], 'no'),
        ([change('stream', 1.05, 1.01)], None),
        ([change('decoder', 1.05, 1.01, name='D')], None),
    ),
)
def test_claim_8_wants_a_cost_above_that_of_the_matched_control_for_the_head_or_for_reads(
    tmp_path, changes, said
):
    folder = write_run(tmp_path, 'ledger')
    (folder / 'intervene.json').write_text(json.dumps({'results': changes}))
    found = words(tmp_path, 'is used', DIMENSION)[0]
    assert found.startswith(f'{said} (1' if said == 'yes' else f'{said} (0') if said else 'needs' in found


# ---- What is printed


def test_every_condition_is_printed_with_its_numbers_and_every_stream_with_its_objects(tmp_path, capsys):
    for seed in (1337, 1338):
        write_run(tmp_path, 'baseline', seed)
        write_run(tmp_path, 'ledger', seed)
    write_run(tmp_path, 'baseline', scale='290m')
    verdicts.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert '## 290m: Verdicts' in printed
    assert '| claim | is | judged for | decoded | along the depth | published |' in printed
    condition, numbers = (
        'baseline: h has an outlier dimension, decoded',
        '20 [19.9, 20.1], untrained 2 [1.9, 2.1]',
    )
    assert f'| premise | 1338 | {condition} | {numbers} | yes |' in printed
    assert '| premise | 1337 (not counted) |' in printed
    assert '| ledger_160m_1338 | **C** | 2.000 | yes: 20 [19.9, 20.1]' in printed


def test_post_hoc_is_said_first(tmp_path, capsys):
    without_intervals(write_run(tmp_path, 'baseline'))
    verdicts.main([str(tmp_path), '--post-hoc'])
    assert 'Post hoc: the rules are younger than these runs.' in capsys.readouterr().out


def test_ctrl_c_is_a_sentence(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verdicts, 'runs_in', interrupted)
    with pytest.raises(SystemExit, match='stopped by Ctrl-C'):
        verdicts.main(['results/arms'])
