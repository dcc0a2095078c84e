"""The first set of rules, by which the older runs were judged, on planted files."""

import json
import shutil

import pytest
from planted import around, write_run

from studies import first_rules, verdicts
from studies.evidence import Evidence
from studies.results import by_scale, runs_in


def judged(folder):
    return first_rules.judge(by_scale(runs_in(folder))['160m'])


def word(folder, claim):
    return judged(folder)[claim][1]


def test_a_start_token_outlier_of_the_baseline_is_said_first(tmp_path):
    write_run(tmp_path, 'baseline')
    no_run_of_the_recipe = tmp_path / 'baseline_160m_1338_old'
    shutil.copytree(tmp_path / 'baseline_160m_1338', no_run_of_the_recipe)
    assert next(iter(judged(tmp_path))) == 'premise'
    assert word(tmp_path, 'premise') == 'yes (1 of 1; only 1 seed)'


@pytest.mark.parametrize(
    'values',
    (
        dict(start_ratio=8.9),
        dict(start_persistence=0.49),
        dict(start_token_concentration=1.15),
        dict(start_ratio={**around(30), 'low': 3.05}),
        dict(start_ratio={'value': None, 'low': None, 'high': None}),
    ),
    ids=str,
)
def test_an_outlier_needs_all_three_of_its_conditions(tmp_path, values):
    write_run(tmp_path, 'baseline', **values)
    assert word(tmp_path, 'premise') == 'no (0 of 1; only 1 seed)'
    assert [line.holds for line in judged(tmp_path)['premise'][2]].count(False) == 1


def test_three_times_the_untrained_start_ratio_and_half_the_sublayers_are_enough(tmp_path):
    write_run(tmp_path, 'baseline', start_ratio=9, start_persistence=0.5, start_token_concentration=1.3)
    assert word(tmp_path, 'premise').startswith('yes')


def test_without_the_untrained_model_nobody_knows_of_an_outlier(tmp_path):
    write_run(tmp_path, 'baseline', untrained=False)
    assert (
        word(tmp_path, 'premise')
        == 'no seed that counts; needs the untrained baseline of seed 1338, measured'
    )
    run = runs_in(tmp_path)[0]
    assert first_rules.has_outlier(run, 'h') is None and first_rules.outlier_cell(run, 'h') == '–'


def test_every_number_that_goes_into_a_verdict_is_shown(tmp_path):
    write_run(tmp_path, 'baseline', start_ratio=31, start_persistence=0.8, start_token_concentration=6)
    assert [line.numbers for line in judged(tmp_path)['premise'][2]] == [
        'trained 31 [30.9, 31.1]; untrained 3 [2.9, 3.1]',
        'trained 0.8 [0.7, 0.9]',
        'trained 6 [5.9, 6.1]; untrained 1 [0.9, 1.1]',
    ]


def test_claim_1_is_judged_only_beside_a_baseline_of_the_same_seed_and_loss(tmp_path):
    write_run(tmp_path, 'ledger', loss=2.1)
    need = 'a baseline of seed 1338 that ends within 0.01 nats of the ledger'
    assert word(tmp_path, '1') == f'no seed that counts; needs {need}'
    write_run(tmp_path, 'baseline', loss=2.0)
    write_run(tmp_path, 'baseline_short2000', seed=1339, loss=2.1)
    assert 'nearest: baseline_160m_1338, 0.100 nats below' in word(tmp_path, '1')
    write_run(tmp_path, 'baseline', seed=1340, loss=2.05)
    write_run(tmp_path, 'ledger', seed=1340, loss=2.0)
    assert 'nearest: baseline_160m_1340, 0.050 nats above' in word(tmp_path, '1')
    write_run(tmp_path, 'baseline_short2000', loss=2.109)
    assert word(tmp_path, '1').startswith('reproduced (1 of 1; only 1 seed); needs a baseline of seed 1340')


def test_claim_1_fails_where_C_has_no_outlier_and_is_partly_true_where_one_seed_has(tmp_path):
    for arm in ('baseline', 'ledger'):
        write_run(tmp_path, arm, start_ratio=4)
    assert word(tmp_path, '1') == 'not reproduced (0 of 1; only 1 seed)'
    for arm in ('baseline', 'ledger'):
        write_run(tmp_path, arm, seed=1339)
    assert word(tmp_path, '1') == 'partly (1 of 2; only 2 seeds)'


@pytest.mark.parametrize(
    'ratio, concentration, verdict',
    (
        (8, 6, 'reproduced (2 of 2'),
        (8, 4, 'partly (1 of 2'),
        (19.9, 6, 'partly (1 of 2'),
        (22, 4, 'not reproduced (0 of 2'),
    ),
)
def test_claim_2_compares_C_with_h_apart(tmp_path, ratio, concentration, verdict):
    write_run(tmp_path, 'baseline')
    write_run(tmp_path, 'ledger', loss=2.3, fixed_dim_ratio=ratio, start_token_concentration=concentration)
    assert word(tmp_path, '2').startswith(verdict)
    assert word(tmp_path, '2, at matched loss').startswith('no seed that counts')


def test_claim_2_at_matched_loss_takes_the_baseline_that_ends_there(tmp_path):
    write_run(tmp_path, 'baseline', fixed_dim_ratio=100)
    write_run(tmp_path, 'ledger', loss=2.3, fixed_dim_ratio=10, start_token_concentration=6)
    write_run(tmp_path, 'baseline_short900', loss=2.295, fixed_dim_ratio=5)
    assert word(tmp_path, '2').startswith('reproduced')
    assert word(tmp_path, '2, at matched loss').startswith('partly (1 of 2')


def test_a_missing_run_is_named_and_the_other_seeds_are_judged(tmp_path):
    write_run(tmp_path, 'baseline')
    assert word(tmp_path, '4') == 'no seed that counts; needs qknorm, seed 1338'
    assert word(tmp_path, 'control') == 'no seed that counts; needs baseline_bias'
    write_run(tmp_path, 'qknorm', fixed_dim_ratio=3, kurtosis=2)
    write_run(tmp_path, 'qknorm', seed=1339)
    assert word(tmp_path, '4') == 'reproduced (2 of 2; only 1 seed); needs baseline, seed 1339'


@pytest.mark.parametrize(
    'persistence, verdict',
    (
        ((0.1, 0.4, 0.4, 0.9), 'reproduced'),
        ((0.1, 0.5, 0.4, 0.9), 'partly'),
        ((0.5, 0.5, 0.6, 0.65), 'partly'),
    ),
)
def test_claim_3_wants_four_doses_that_never_fall_and_ends_that_are_apart(tmp_path, persistence, verdict):
    doses = {'ledger_a0': 0, 'ledger': 0.02, 'ledger_a0.1': 0.1, 'ledger_hs': 0.3}
    for i, (arm, alpha) in enumerate(doses.items()):
        if i == 3:
            need = '4 doses of α in seed 1338 (so far: 0, 0.02, 0.1)'
            assert word(tmp_path, '3') == f'no seed that counts; needs {need}'
        write_run(tmp_path, arm, alpha=alpha, persistence=persistence[i], start_token_concentration=2 + i)
    assert word(tmp_path, '3').startswith(verdict)


def test_the_pilot_counts_as_every_seed_did_then(tmp_path):
    write_run(tmp_path, 'baseline', seed=1337)
    evidence = judged(tmp_path)['premise'][2]
    assert all(isinstance(line, Evidence) and line.counts for line in evidence)


def test_they_are_asked_for_by_name(tmp_path, capsys):
    write_run(tmp_path, 'baseline')
    verdicts.main([str(tmp_path), '--rules=first'])
    printed = capsys.readouterr().out
    assert '| premise | h has a start-token outlier | yes (1 of 1; only 1 seed) |' in printed
    assert 'along the depth' not in printed


def test_runs_measured_on_other_windows_are_refused(tmp_path):
    write_run(tmp_path, 'baseline')
    write_run(tmp_path, 'ledger', windows=64)
    with pytest.raises(SystemExit, match='^error: the runs at 160m were not measured on the same windows'):
        verdicts.main([str(tmp_path)])


def test_a_folder_without_runs_ends_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no <arm>_<scale>_<seed>/measure.json'):
        verdicts.main([str(tmp_path)])


def test_a_torn_measurement_ends_in_a_sentence(tmp_path):
    folder = write_run(tmp_path, 'baseline')
    (folder / 'measure.json').write_text('{"model": ')
    with pytest.raises(SystemExit, match='^error: .*measure.json is not readable as JSON'):
        verdicts.main([str(tmp_path)])
    (folder / 'measure.json').write_text(json.dumps({'model': {}}))
    with pytest.raises(SystemExit, match='^error: .*measure.json is not a whole measurement'):
        verdicts.main([str(tmp_path)])
