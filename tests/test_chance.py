"""How many verdict lines there are, and how many hold for noise and for untrained models."""

import json

import pytest
from planted import UNTRAINED, stream, write_run

from studies import chance, verdicts
from studies.results import by_scale, runs_in
from studies.verdicts import DIMENSION, START

SMALL = dict(sequences=32, tokens=8, dims=64, sublayers=2)
SEEDS = (1338, 1339)


@pytest.fixture(scope='module')
def noise():
    """What is judged of a whole comparison of noise with very unequal dimensions."""
    return verdicts.judge(chance.noise_runs(spread=1.0, shape=SMALL, seeds=SEEDS[:1]))


def group(folder):
    return by_scale(runs_in(folder))['160m']


def test_every_claim_that_needs_only_measurements_has_its_lines(noise):
    judged = {number: lines for number, (_, lines) in chance.count(noise).items()}
    # two objects or two to three quantities, in three readings; persistence and a decoded D have fewer
    assert judged == {'premise': 6, '1': 6, '2': 9, '3': 5, '4': 6, '6': 12, '7': 2}
    assert sum(judged.values()) == 46


def test_noise_with_unequal_dimensions_has_outlier_dimensions_but_no_start_token_outlier(noise):
    lines = chance.lines_of(noise)
    start = [found for (_, _, row, _), found in lines.items() if row == START]
    dimension = [found for (number, _, row, _), found in lines.items() if row == DIMENSION and number != '7']
    assert len(start) == 13 and not any(map(verdicts.holds_in_all, start))
    assert len(dimension) == 12 and sum(map(verdicts.holds_in_all, dimension)) > 6


def test_noise_with_equal_dimensions_has_neither_object():
    judged = verdicts.judge(chance.noise_runs(spread=0.0, shape=SMALL, seeds=SEEDS[:1]))
    objects = {key: found for key, found in chance.lines_of(judged).items() if key[2] in (DIMENSION, START)}
    assert len(objects) == 26 and not any(map(verdicts.holds_in_all, objects.values()))


def test_the_same_seed_makes_the_same_noise(monkeypatch):
    monkeypatch.setattr(chance, 'NOISE_ARMS', {'ledger': 0.02})
    first, second = (chance.noise_runs(0.5, 3, {**SMALL, 'sublayers': 1}, SEEDS) for _ in range(2))
    assert first['ledger', 1338].measure == second['ledger', 1338].measure
    assert first['ledger', 1338].measure != first['ledger', 1339].measure


def test_by_direction_a_line_holds_with_a_half_in_each_seed_that_counts(tmp_path):
    for seed in (1337, *SEEDS):
        for arm in ('baseline', 'qknorm', 'ledger'):
            write_run(tmp_path, arm, seed)
    expected = chance.expected_by_direction(chance.lines_of(verdicts.judge(group(tmp_path))))
    assert expected == {'2': 9 / 4, '4': 6 / 4}
    for seed in SEEDS:
        for arm, alpha in (('ledger_a0', 0), ('ledger_a0.1', 0.1), ('ledger_hs', 0.3)):
            write_run(tmp_path, arm, seed, alpha=alpha)
    expected = chance.expected_by_direction(chance.lines_of(verdicts.judge(group(tmp_path))))
    assert expected['3'] == pytest.approx(5 / 24**2)


def test_untrained_models_are_judged_against_those_of_another_seed(tmp_path):
    for seed, ratio in ((1337, 2), (1338, 2), (1339, 20)):
        folder = write_run(tmp_path, 'baseline', seed)
        untrained = json.loads((folder / 'measure_0.json').read_text())
        untrained['streams']['h'] = stream({**UNTRAINED, 'fixed_dim_ratio': ratio})
        (folder / 'measure_0.json').write_text(json.dumps(untrained))
    write_run(tmp_path, 'qknorm', 1338)
    runs = chance.with_untrained(group(tmp_path))
    assert list(runs) == [('baseline', seed) for seed in (1337, 1338, 1339)]  # of qknorm there is one seed

    def ratios(run):
        return [report['streams']['h']['fixed_dim_ratio']['value'] for report in (run.measure, run.untrained)]

    assert [ratios(run) for run in runs.values()] == [[2, 2], [2, 20], [20, 2]]
    assert chance.count(verdicts.judge(runs))['premise'] == [0, 6]


def test_the_table_has_a_row_for_each_claim_and_one_for_all(tmp_path, monkeypatch, capsys):
    noise = chance.noise_runs(0.5, shape={**SMALL, 'sublayers': 1}, seeds=SEEDS[:1])
    monkeypatch.setattr(chance, 'noise_runs', lambda spread: noise)
    for seed in SEEDS:
        for arm in ('baseline', 'qknorm'):
            write_run(tmp_path, arm, seed)
    chance.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert '| premise | 6 of 6 | – | 0 of 6 |' in printed
    assert '| 4 | 0 of 6 | 1.5 | 0 of 6 |' in printed
    assert '| all | 6 of 12 | 1.5 | 0 of 12 |' in printed
    report = json.loads((tmp_path / 'chance.json').read_text())['160m']
    assert report['holding'] == {'premise': [6, 6], '4': [0, 6]}
    assert chance.chance_table(report) in printed


def test_a_folder_without_runs_ends_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no <arm>_<scale>_<seed>/measure.json'):
        chance.main([str(tmp_path)])
