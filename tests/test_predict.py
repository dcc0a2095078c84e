"""Prediction from the architecture: what is left out leaks nothing, a planted law is found, the command."""

import json
import math

import numpy as np
import pytest
from planted_series import LEDGER, SHAPES, STEPS, made_up, sweep_file, write_log

from studies import predict
from studies.predict import leave_out, make_predictor, regress, ridge


def test_what_leaves_an_architecture_out_takes_all_its_layers_arms_and_streams():
    series, _ = made_up(SHAPES)
    groups = np.array(
        [SHAPES.index((x.model['n_layer'], x.model['n_embd'], x.model['mlp_ratio'])) for x in series]
    )
    for kept, left in leave_out(groups):
        shapes = [
            {
                (x.model['n_layer'], x.model['n_embd'], x.model['mlp_ratio'])
                for x, here in zip(series, mask)
                if here
            }
            for mask in (kept, left)
        ]
        assert len(shapes[1]) == 1 and not shapes[0] & shapes[1] and (kept ^ left).all()
        assert {(x.stream, x.sublayer) for x, here in zip(series, left) if here} == {
            (stream, s) for stream in 'hDC' for s in range(2 * next(iter(shapes[1]))[0])
        }


def test_what_only_an_architecture_itself_knows_is_predicted_by_the_random_split_alone():
    shapes = [(2, 64, 2), (3, 256, 8), (4, 128, 4), (5, 96, 3), (6, 192, 6)]
    series, fits = made_up(shapes)
    lottery = dict(zip(sorted({predict.architecture(x.model) for x in series}), (1, -1, -1, 1, -1)))
    y = np.array([[lottery[predict.architecture(x.model)]] for x in series])
    report, predicted = regress(list(zip(series, fits)), y, ['baseline/h', 'ledger/C', 'ledger/D'])
    assert report['r2_architectures_out'] < 0 and report['r2_random_split'] > 0.95
    assert report['architectures'] == len(shapes) and predicted.shape == y.shape


def test_a_left_out_architecture_does_not_touch_its_own_prediction():
    series, fits = made_up(SHAPES[:5])
    X = np.array(
        [
            list(
                predict.features(
                    x.model, x.stream, x.sublayer, ['baseline/h', 'ledger/C', 'ledger/D']
                ).values()
            )
            for x in series
        ]
    )
    groups, rng = (
        np.unique([predict.architecture(x.model) for x in series], axis=0, return_inverse=True)[1].ravel(),
        np.random.RandomState(12),
    )
    y = (
        X[:, [4]] + X[:, [0]] + 0.01 * rng.randn(len(series), 1)
    )  # a law, so that the least penalty is chosen; what comes next would choose the largest
    before, mine = predict.validate(X, y, groups, groups), groups == groups[0]
    y[mine] += 1e6
    after = predict.validate(X, y, groups, groups)
    np.testing.assert_array_equal(before[mine], after[mine])
    assert (before[~mine] != after[~mine]).all()


def test_ridge_is_least_squares_on_standardized_features_with_rows_for_the_penalty():
    rng = np.random.RandomState(13)
    X, y = np.column_stack([rng.randn(30, 3) * (1, 10, 100), np.ones(30)]), rng.randn(30, 2)
    Z = (X[:, :3] - X[:, :3].mean(0)) / X[:, :3].std(0)
    weights = np.linalg.lstsq(
        np.vstack([Z, math.sqrt(0.1 * 30) * np.eye(3)]),
        np.vstack([y - y.mean(0), np.zeros((3, 2))]),
        rcond=None,
    )[0]
    (_, found), (_, intercept) = ridge(X, y, [7.0, 0.1])
    np.testing.assert_allclose(X @ found + intercept, Z @ weights + y.mean(0), rtol=1e-10)


def test_a_law_of_the_architecture_is_found_and_the_feature_that_carries_it_named():
    predictor, left_out = make_predictor(*made_up(SHAPES, peak=lambda model: 40 * model['n_embd'] ** 0.7))
    peak = predictor['targets']['peak_step']
    assert (
        peak['r2_architectures_out'] > 0.9
        and next(iter(peak['r2_lost_without'])) == 'log width'
        and math.exp(peak['error']) < 1.1
    )
    rows, actual, predicted = left_out['peak_step']
    assert peak['r2_architectures_out'] == pytest.approx(
        1 - ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum(), rel=1e-4
    )
    assert 'lambda' not in predictor['targets']  # of none is it known


def test_what_is_predicted_is_drawn_with_a_title_and_few_ticks_that_are_plain_numbers(tmp_path, drawn):
    _, left_out = make_predictor(*made_up(SHAPES, peak=lambda model: 40 * model['n_embd'] ** 0.7))
    predict.draw_predicted(left_out, ['peak_step'], tmp_path / 'predicted.png')
    (axis,) = drawn[0].axes
    for side in (axis.xaxis, axis.yaxis):
        assert [t.get_text() for t in side.get_ticklabels()] == [
            '740',
            '1100',
            '1600',
            '2300',
        ] and not side.get_minorticklocs().size


def test_a_saved_predictor_prints_the_curve_that_it_expects_of_an_architecture(tmp_path, capsys):
    sweep_file(tmp_path / 'sweep.jsonl')
    predict.main([str(tmp_path / 'sweep.jsonl')])
    for name in ('predicted.png',):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    assert 'archs out' in capsys.readouterr().out
    predict.main(
        [
            '--arch=n_layer=2,n_embd=128,n_head=4,residual=ledger,stream=D',
            f'--predictor={tmp_path}/predictor.json',
        ]
    )
    printed = capsys.readouterr().out
    model, predictor = (
        {**LEDGER, 'n_layer': 2, 'n_embd': 128, 'n_head': 4},
        json.loads((tmp_path / 'predictor.json').read_text()),
    )
    x = list(predict.features(model, 'D', 3, predictor['arms']).values())
    target = predictor['targets']['peak_step']
    assert math.exp(np.dot(x, target['weights'])[0] + target['intercept'][0]) == pytest.approx(
        40 * 128**0.7 * 1.15, rel=0.1
    )
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line[:1] == ' '}
    assert (
        len(table) >= 20
        and float(table['peak_step'][3]) == pytest.approx(40 * 128**0.7 * 1.15, rel=0.1)
        and 'ledger/D' in printed
    )


def test_where_no_target_was_regressed_there_is_no_figure_of_it(tmp_path, capsys):
    sweep_file(tmp_path / 'sweep.jsonl', SHAPES[:3])
    (tmp_path / 'sweep.jsonl').write_text('\n'.join((tmp_path / 'sweep.jsonl').read_text().splitlines()[::2]))
    predict.main([str(tmp_path / 'sweep.jsonl')])
    assert (
        'curve is known of 6 series of 3 architectures only' in capsys.readouterr().out
        and not (tmp_path / 'predicted.png').exists()
    )
    assert json.loads((tmp_path / 'predictor.json').read_text())['targets'] == {}


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        ('', 'nothing to read'),
        ('{}/run', 'at least 3 architectures'),
        ('--arch=n_layer=1,n_embd=8,n_head=2,qk_norm=yes', 'expected True or False'),
        ('--arch=n_layer=2', 'lacks n_head, n_embd'),
        ('--arch=n_layer=x,n_embd=64,n_head=2', "'n_layer=x'"),
        ('--arch=n_layer=2,n_embd=64,n_head=2 --predictor={}/nothing', 'make it with'),
        ('--arch=n_layer=2,n_embd=64,n_head=2 --predictor={}/bad.jsonl', 'not a predictor'),
    ],
)
def test_a_mistake_of_the_user_is_a_sentence(tmp_path, arguments, sentence):
    write_log(tmp_path / 'run', LEDGER, STEPS[:9])
    (tmp_path / 'bad.jsonl').write_text('{"run": 1}\n')
    with pytest.raises(SystemExit) as error:
        predict.main([part.format(tmp_path) for part in arguments.split()])
    assert error.value.code.startswith('error: ') and sentence in error.value.code
    assert '\n' not in error.value.code
