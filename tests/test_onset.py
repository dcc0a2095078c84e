"""Losses of token classes beside the outlier, over the snapshots of a run."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from studies import onset

# Windows of as many bytes as it repeats after hold each class as often.
SOURCE = b'def f(x):\n    return x + 1  # one\n\n' * 40


def test_the_rank_correlation_is_that_of_the_textbook_and_a_permutation_is_rarely_as_good():
    x, y = np.array([3.0, 1, 4, 10, 5, 9]), np.array([2.0, 7, 1, 8, 2.5, 3])
    d = x.argsort().argsort() - y.argsort().argsort()
    rho, p = onset.spearman(x, y)
    assert rho == pytest.approx(1 - 6 * (d @ d) / (6 * 35), rel=1e-6) and p > 0.2
    assert onset.spearman(x, -(x**3)) == (-1, pytest.approx(2 / 720, abs=2e-3))
    assert onset.spearman(x, np.ones(6)) == (None, None)
    assert onset.spearman(x[:3], y[:3]) == (None, None)


def test_half_of_the_way_is_interpolated_up_and_down():
    assert onset.halfway([0, 10, 20], [8, 6, 0]) == pytest.approx(10 + 10 * 2 / 6)
    assert (
        onset.halfway([0, 10, 20, 30], [1, np.nan, 2, np.nan]) == 10
        and onset.halfway([0, 1], [np.nan] * 2) is None
    )
    assert onset.halfway([0, 10, 20], [1, 1, 2]) == 15 and onset.halfway([0, 1], [3, 3]) is None


def test_a_class_that_is_learned_when_the_outlier_grows_is_found_and_one_that_falls_as_all_do_is_not():
    growth, fall = np.array([0.1, 2.0, 0.3, 0.0, 1.0, 0.2]), np.array([3, 1, 0.7, 0.5, 0.2, 0.1])
    mean = 10 - np.append(0, fall.cumsum())
    report = onset.analyse(
        np.arange(7) * 100,
        {'early': 12 - np.append(0, (fall * (1 + growth)).cumsum()), 'other': mean + 1},
        mean,
        {('C', 'start_ratio'): np.exp(np.append(0, growth.cumsum()))},
    )
    found = report['streams'][0]['with']
    assert found['early']['rank_correlation'] == 1 and found['early']['p'] < 0.01
    assert (
        found['other']['rank_correlation'] is None or found['other']['p'] > 0.05
    )  # its share is 1 but for rounding


def test_intervals_in_which_nothing_is_learned_or_a_ratio_is_missing_are_left_out():
    growth, fall = (
        np.array([0.1, 2, 0.3, 0.5, 1, 0.2, 0.7, 0.6]),
        np.array([3, 1, 0.7, 0.001, 0.2, -0.1, 0.1, 0.1]),
    )
    own = fall * (1 + growth) + np.array(
        [0, 0, 0, 5, 0, -5, 0, 0]
    )  # where the mean stands still a share would be 5000, or 50
    mean, loss, ratio = (
        10 - np.append(0, fall.cumsum()),
        12 - np.append(0, own.cumsum()),
        np.exp(np.append(0, growth.cumsum())),
    )
    ratio[-1] = np.nan
    report = onset.analyse(
        np.arange(9) * 100,
        {'early': loss},
        mean,
        {('C', 'start_ratio'): ratio, ('C', 'fixed_dim_ratio'): np.full(9, np.nan)},
    )
    assert [s['intervals'] for s in report['streams']] == [5, 0]
    assert [s['with']['early']['rank_correlation'] for s in report['streams']] == [1, None]
    json.dumps(report, allow_nan=False)


@pytest.fixture
def run(tmp_path):
    """A run of random models: six snapshots, and a log that says something of each."""
    data, folder = tmp_path / 'data', tmp_path / 'run'
    data.mkdir()
    folder.mkdir()
    for split in ('train', 'val'):
        np.frombuffer(SOURCE, np.uint8).astype('<u2').tofile(data / f'{split}.bin')
    (data / 'meta.json').write_text(
        json.dumps({'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256, 'source': 'Python source'})
    )
    for i, step in enumerate((0, 1, 2, 4, 8, 16)):
        torch.manual_seed(i)
        model = GPT(GPTConfig(block_size=len(SOURCE) // 40, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
        torch.save(
            {
                'model': model.state_dict(),
                'model_args': asdict(model.config),
                'iter_num': step,
                'config': {'dataset': str(data)},
            },
            folder / f'ckpt_{step}.pt',
        )
        with open(folder / 'log.jsonl', 'a') as log:
            log.write(
                json.dumps({'iter': step, 'streams': {'h': {name: [1 + i, 0.5] for name in onset.RATIOS}}})
                + '\n'
            )
    return folder


def test_losses_of_the_classes_are_those_of_their_tokens_and_mend_to_the_mean(run, capsys):
    onset.main([f'--ckpt={run}', '--sequences=8'])
    report = json.loads((run / 'onset.json').read_text())
    assert report['steps'] == [0, 1, 2, 4, 8, 16] and report['streams'][0]['values'] == [1, 2, 3, 4, 5, 6]
    assert {'keyword', 'name', 'operator', 'number', 'comment', 'white space', 'line end'} <= report[
        'classes'
    ].keys()
    share = {
        'keyword': 9,
        'operator': 4,
        'name': 3,
        'number': 1,
        'comment': 5,
        'white space': 10,
        'line end': 3,
    }  # of 35 bytes
    assert sum(share.values()) == len(SOURCE) // 40 and share.keys() == report['classes'].keys()
    assert sum(n * report['classes'][name]['loss'][3] for name, n in share.items()) / 35 == pytest.approx(
        report['loss'][3], rel=1e-6
    )
    assert (run / 'onset.png').stat().st_size > 10_000 and 'rank correlation' in capsys.readouterr().out


def test_a_falling_ratio_has_half_of_a_fall_and_sublayers_without_a_number_are_left_out(
    run, capsys, monkeypatch
):
    monkeypatch.setattr(onset, 'LEAST_FALL', -9)  # random models learn nothing
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    for i, line in enumerate(lines):
        line['streams']['h'] = {'start_ratio': [None, 9 - i], 'fixed_dim_ratio': [None, None]}
    (run / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    onset.main([f'--ckpt={run}', '--sequences=8'])
    first, second = json.loads((run / 'onset.json').read_text())['streams']
    assert first['values'] == [9, 8, 7, 6, 5, 4] and first['half_way'] == 3 and second['values'] == [None] * 6
    printed = capsys.readouterr().out
    assert (
        'half of its fall at step 3; most like' in printed
        and 'over 5 intervals' in printed
        and 'stands still; no rank' in printed
        and 'rise' not in printed
        and 'nan' not in printed
    )


def test_too_few_snapshots_are_refused_with_what_to_do(run):
    for step in (0, 4):
        (run / f'ckpt_{step}.pt').unlink()
    with pytest.raises(
        SystemExit, match='holds 4 snapshots that are in its log, and this needs 5: train with --snapshots'
    ):
        onset.main([f'--ckpt={run}'])
    assert not (run / 'onset.json').exists()
