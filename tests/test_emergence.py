"""The curve of emergence: planted series, the formulas against numpy written differently, prediction that leaks nothing, the command."""

import itertools
import json
import math
import runpy
import warnings

import numpy as np
import pytest

from studies import emergence
from studies.emergence import (
    PARAMETERS,
    Series,
    columns_second,
    fit,
    fit_all,
    jacobian,
    lambert_w,
    leave_out,
    make_predictor,
    regress,
    ridge,
    t_quantile,
)
from train import read_config

STEPS = np.array(
    sorted({0, *(2**i for i in range(14)), *range(0, 14001, 500)}), float
)  # train.py's points of a 160m run
PLANTED = [
    (30, 0.05, 0.002, 1.5, 5),
    (80, 0.3, 0.01, 2, 3),
    (5, 0.1, 0.003, 1.2, 20),
    (200, 0.15, 0.004, 1.05, 1),
    (1, 0.02, 0.005, 1.1, 2),
]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def curve(t, A, lam, gamma, t0, K):
    x = gamma * t + t0  # Gallego-Feliciano et al. 2025, eq. 7
    return A * np.exp(-lam * x) * np.log(x) + K


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(
        emergence, 'draw_curves', lambda *_: None
    )  # half a second each, and one test looks at them


def values(found):
    return np.array([found['parameters'][name]['value'] for name in PARAMETERS])


def true_peak(planted, t=np.linspace(0, 14000, 1_400_001)):
    return t[curve(t, *planted).argmax()]


def many(curves, t=STEPS):
    return fit_all([Series('run', 'h', i, t, r) for i, r in enumerate(curves)])


# ---- The fit


def test_five_planted_parameters_and_the_peak_come_back_from_a_clean_series():
    for planted, found in zip(PLANTED, many([curve(STEPS, *planted) for planted in PLANTED])):
        np.testing.assert_allclose(values(found), planted, rtol=5e-3)
        assert (
            abs(found['peak']['value'] - true_peak(planted)) < 1e-3 * true_peak(planted)
            and found['class'] == 'early peak'
            and found['r2'] > 0.9999999
        )


def test_a_falling_curve_has_a_negative_A_and_the_others_positive():
    planted = (-20, 0.2, 0.01, 2, 40)
    found = fit(STEPS, curve(STEPS, *planted))
    np.testing.assert_allclose(values(found), planted, rtol=5e-3)
    assert all(q['low'] <= q['value'] <= q['high'] for q in found['parameters'].values())


def test_5_percent_noise_leaves_R2_at_098_and_the_peak_within_15_percent():
    rng = np.random.RandomState(1)
    for planted in PLANTED[:1] + PLANTED[2:4]:
        clean = curve(STEPS, *planted)
        found = many([clean + 0.05 * clean.std() * rng.randn(len(STEPS)) for _ in range(8)])
        assert min(f['r2'] for f in found) >= 0.98
        for f in found:
            assert abs(f['peak']['value'] / true_peak(planted) - 1) < 0.15
            fitted = emergence.curve_at(f, STEPS)
            assert (
                (fitted - clean) ** 2
            ).mean() < 0.03**2 * clean.var()  # nearer to the truth than the noise is


def test_intervals_of_the_parameters_and_the_peak_cover_the_planted_value_as_often_as_they_say():
    planted, rng = PLANTED[2], np.random.RandomState(2)
    clean = curve(STEPS, *planted)
    found = many([clean + 0.03 * clean.std() * rng.randn(len(STEPS)) for _ in range(40)])
    assert all(f['parameters'] for f in found)
    inside = {
        name: np.mean([f['parameters'][name]['low'] <= value <= f['parameters'][name]['high'] for f in found])
        for name, value in zip(PARAMETERS, planted)
    }
    inside['peak'] = np.mean([f['peak']['low'] <= true_peak(planted) <= f['peak']['high'] for f in found])
    assert all(0.85 <= share <= 1 for share in inside.values()), inside
    assert min(inside.values()) < 1  # not by being wide: 5% of 40 are outside on average, of each of six


def test_the_fit_depends_neither_on_luck_nor_on_the_other_series_nor_on_their_order():
    rng = np.random.RandomState(3)
    rows = [
        Series('run', 'h', i, STEPS, curve(STEPS, *planted) + rng.randn(len(STEPS)))
        for i, planted in enumerate(PLANTED)
    ]
    assert fit_all(rows) == fit_all(rows[::-1])[::-1] == [fit(x.t, x.r) for x in rows]


@pytest.mark.parametrize(
    'clean',
    [curve(STEPS, *PLANTED[0]), 20 - 15 * np.exp(-((np.log(STEPS + 1) - 4) ** 2)), 5 * np.sin(STEPS / 1500)],
    ids=['peak', 'dip', 'wave'],
)
def test_no_other_start_finds_a_better_curve_than_the_search(clean):
    r = clean + np.random.RandomState(4).randn(len(STEPS))
    rss = (1 - fit(STEPS, r)['r2']) * ((r - r.mean()) ** 2).sum()
    best = math.inf
    for beta, tau in itertools.product(np.geomspace(1e-7, 1, 60), np.geomspace(1e-2, 1e5, 60)):
        basis = np.stack(
            [np.exp(-beta * STEPS) * np.log(STEPS + tau), np.exp(-beta * STEPS), np.ones_like(STEPS)], 1
        )
        best = min(best, ((r - basis @ np.linalg.lstsq(basis, r, rcond=None)[0]) ** 2).sum())
    assert rss <= best * (1 + 1e-6)


def test_of_two_basins_the_search_ends_in_the_deeper():
    r = 5 * np.sin(STEPS / 1500) + np.random.RandomState(4).randn(len(STEPS))
    grid = np.log(np.array(list(itertools.product(np.geomspace(1e-5, 1, 300), np.geomspace(0.05, 20, 60)))))
    x = columns_second(grid, STEPS)[:, 0]
    x, y, n = x - x.mean(1, keepdims=True), r - r.mean(), len(r)
    best = (y @ y - (x @ y) ** 2 / np.maximum((x * x).sum(1), 1e-12)).min()
    assert fit(STEPS, r)['aic']['second order'] <= n * math.log(best / n) + 2 * 5


@pytest.mark.parametrize('kind', ['logarithm', 'first order', 'second order', 'f'])
def test_the_curve_that_made_a_series_has_the_lowest_AIC(kind):
    t = STEPS
    r = {
        'logarithm': 3 + 5 * np.log(t + 30),
        'first order': 20 - 15 * np.exp(-t / 900),
        'f': curve(t, *PLANTED[0]),
        'second order': 10 - 8 * np.exp(-t / 2000) * (np.cos(t / 700) + 700 / 2000 * np.sin(t / 700)),
    }[kind]
    found = fit(t, r + 0.01 * r.std() * np.random.RandomState(5).randn(len(t)))
    assert found['preferred'] == kind
    assert found['class'] == {
        'logarithm': 'log increase',
        'first order': 'log increase',
        'f': 'early peak',
    }.get(kind, found['class'])


def test_AIC_is_that_of_least_squares_with_the_noise_counted_as_a_parameter():
    r = 3 + 5 * np.log(STEPS + 30) + np.random.RandomState(6).randn(len(STEPS))
    aic, n = fit(STEPS, r)['aic'], len(STEPS)
    best = min(
        ((r - np.polyval(np.polyfit(x, r, 1), x)) ** 2).sum()
        for x in (np.log(STEPS + tau) for tau in np.geomspace(1, 1000, 3000))
    )
    assert aic['constant'] == pytest.approx(n * math.log(r.var()) + 2 * 2, rel=1e-6)
    assert aic['logarithm'] == pytest.approx(n * math.log(best / n) + 2 * 4, rel=1e-5)


@pytest.mark.parametrize('zeta', [0.1, 0.7, 1.0, 3.0])
def test_the_second_order_response_solves_its_equation(zeta):
    omega, dt = 0.05, 0.01
    t = np.arange(0, 200, dt)
    x = columns_second(np.log([omega, zeta]), t)[0]
    v = np.gradient(x, dt)
    rest = np.gradient(v, dt) + 2 * zeta * omega * v + omega**2 * x
    assert x[0] == pytest.approx(1) and abs(v[1]) < 1e-4 and abs(rest[5:-5]).max() < 1e-3 * omega**2


def test_the_jacobian_is_that_of_finite_differences():
    t = np.linspace(0, 5000, 23)
    for sign, (A, *positive, K) in itertools.product((1, -1), PLANTED):

        def f(log_A, log_lambda, log_gamma, log_t0, K):
            return curve(t, sign * math.exp(log_A), *map(math.exp, (log_lambda, log_gamma, log_t0)), K)

        at, h = np.array([math.log(A), *map(math.log, positive), K]), 1e-5
        numeric = np.stack([(f(*(at + h * e)) - f(*(at - h * e))) / (2 * h) for e in np.eye(5)], -1)
        lam, gamma, t0 = positive
        analytic = jacobian(t, lam * gamma, t0 / gamma, sign * A * math.exp(-lam * t0), math.log(gamma))
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-7 * abs(numeric).max())


def test_lambert_w_solves_its_equation_where_its_argument_would_overflow_too():
    for z in (-700.0, -30.0, -1.0, 0.0, 0.999, 1.0, 2.0, 50.0, 5000.0):
        w = lambert_w(z)
        assert w > 0 and w + math.log(w) == pytest.approx(z, rel=1e-12, abs=1e-12)
    assert lambert_w(1) == pytest.approx(1) and lambert_w(math.log(2) + 2) == pytest.approx(
        2
    )  # w exp(w) at 1 and at 2


def test_the_quantile_is_that_of_students_tables():
    for df, table in ((3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(df) == pytest.approx(table, rel=8e-3)


def test_the_interval_of_the_peak_is_what_the_covariance_of_the_five_says():
    planted, t = PLANTED[2], STEPS
    r = curve(t, *planted) + 0.1 * np.random.RandomState(7).randn(len(t))
    found = fit(t, r)
    A, lam, gamma, t0, K = values(found)

    def peak(logs):
        lam, gamma, t0 = np.exp(logs)
        x = np.linspace(1, 50, 2_000_001)
        return (x[(np.exp(-lam * x) * np.log(x)).argmax()] - t0) / gamma

    J = jacobian(t, lam * gamma, t0 / gamma, A * math.exp(-lam * t0), math.log(gamma))
    covariance = np.linalg.inv(J.T @ J) * ((r - curve(t, A, lam, gamma, t0, K)) ** 2).sum() / (len(t) - 5)
    at = np.log([lam, gamma, t0])
    gradient = np.array([(peak(at + 0.02 * e) - peak(at - 0.02 * e)) / 0.04 for e in np.eye(3)])
    half = (found['peak']['high'] - found['peak']['low']) / 2
    assert half == pytest.approx(
        t_quantile(len(t) - 5) * math.sqrt(gradient @ covariance[1:4, 1:4] @ gradient), rel=0.02
    )


@pytest.mark.parametrize(
    'name, r',
    [
        ('a log increase', 3 + 5 * np.log(STEPS + 30)),
        ('a relaxation', 20 - 15 * np.exp(-STEPS / 900)),
        ('a line', 1 + STEPS / 1000),
    ],
)
def test_a_curve_that_does_not_bend_has_a_fit_and_no_five_parameters(name, r):
    found = fit(STEPS, r + 0.01 * r.std() * np.random.RandomState(8).randn(len(STEPS)))
    assert (
        found['r2'] > 0.99
        and found['parameters'] is None
        and found['note'].startswith('not identifiable')
        and found['peak'] is None
    )
    assert found['class'] == 'log increase' and abs(found['final'] / r[-1] - 1) < 0.05


def test_a_peak_that_a_monotone_curve_does_as_well_without_is_none_and_the_class_is_that_curves():
    rng = np.random.RandomState(20)
    for clean, kind in (
        (20 - 15 * np.exp(-STEPS / 50), 'log increase'),
        (5 + 15 * np.exp(-STEPS / 900), 'neither'),
    ):
        found = [
            f
            for f in many([clean + 0.5 * clean.std() * rng.randn(len(STEPS)) for _ in range(40)])
            if f['aic']['f'] > min(f['aic']['logarithm'], f['aic']['first order']) - 10
        ]
        fitted = np.array([emergence.curve_at(f, STEPS) for f in found])
        assert (
            len(found) > 20
            and {f['class'] for f in found} == {kind}
            and not any(f['peak'] or f['parameters'] for f in found)
        )
        assert (
            kind == 'neither' or (np.ptp(fitted, 1) * 0.1 < fitted.max(1) - fitted[:, -1]).sum() > 3
        )  # f alone would have seen some


def test_where_tau_has_no_end_the_five_are_unknown_and_the_peak_is_known_as_well_as_its_interval_says():
    beta, a, b, rng = 1 / 800, 2, 0.02, np.random.RandomState(21)
    clean = np.exp(-beta * STEPS) * (a + b * STEPS) + 5
    found = many([clean + 0.03 * clean.std() * rng.randn(len(STEPS)) for _ in range(40)])
    assert sum('A is not known at all' in (f['note'] or '') for f in found) > 30 and {
        f['class'] for f in found
    } == {'early peak'}
    assert 0.85 <= np.mean([f['peak']['low'] <= 1 / beta - a / b <= f['peak']['high'] for f in found])
    assert max(f['peak']['high'] - f['peak']['low'] for f in found) < 60


def test_half_height_is_between_the_lowest_before_the_top_and_the_top_and_after_that_lowest():
    t = np.arange(0, 101, 1.0)
    assert emergence.shape(t, np.interp(t, [0, 20, 100], [8, 2, 10])) == (
        'neither',
        60,
    )  # at 6, which it has passed on its way down too
    assert emergence.shape(t, np.interp(t, [0, 20, 100], [2, 10, 4])) == ('early peak', 10)
    assert emergence.shape(t, 9 - t / 50) == ('neither', None)


@pytest.mark.parametrize(
    't, r, note',
    [
        (STEPS, np.full(len(STEPS), 7.0), 'constant at 7'),
        (STEPS, np.zeros(len(STEPS)), 'constant at 0'),
        (STEPS[:2], [1, 2], '2 finite points'),
        ([], [], '0 finite points'),
        (STEPS, np.where(STEPS == 500, 1e6, 3 + STEPS / 1e5), 'a spike'),
        (STEPS, 10 + np.random.RandomState(9).randn(len(STEPS)), 'no trend'),
    ],
)
def test_a_degenerate_series_ends_in_a_plain_statement(t, r, note):
    found = fit(t, r)
    assert (
        note in found['note']
        and found['class'] == 'neither'
        and not found.get('parameters')
        and not found.get('peak')
    )
    json.dumps(found, allow_nan=False)


def test_uneven_steps_and_a_start_after_0_are_fitted_alike():
    planted, rng = PLANTED[2], np.random.RandomState(10)
    for t in (np.sort(rng.uniform(1, 14000, 40)), np.unique(np.geomspace(3, 14000, 30).round())):
        np.testing.assert_allclose(values(fit(t, curve(t, *planted))), planted, rtol=5e-3)


def test_the_step_of_half_height_is_where_the_curve_has_come_half_of_its_way_up():
    t = np.arange(0, 4001, 10.0)
    found = fit(t, 2 + 10 * t / (t + 500) * np.exp(-t / 1e5))
    dense = np.linspace(0, 4000, 400_001)
    fitted = emergence.curve_at(found, dense)
    expected = dense[(fitted >= (fitted[0] + fitted.max()) / 2).argmax()]
    assert found['half_step'] == pytest.approx(expected, rel=0.03)


def test_a_peak_after_the_end_of_training_is_none():
    planted = (30, 0.05, 0.002, 1.5, 5)
    t = STEPS[STEPS < true_peak(planted) - 500]
    found = fit(t, curve(t, *planted))
    assert found['r2'] > 0.999 and found['peak'] is None and found['class'] == 'log increase'


# ---- Prediction

SHAPES = list(itertools.product((1, 2, 3), (64, 128, 256), (2, 4)))


def made_up(shapes, arms=(('baseline', 'h'), ('ledger', 'D'), ('ledger', 'C')), peak=lambda model: 2000):
    """Series without noise and their fits, as a sweep would give them; the peak's step and the height depend on the architecture as the caller says."""
    series, fits, t = [], [], STEPS[STEPS < 8193]
    for n_layer, n_embd, mlp_ratio in shapes:
        for residual, stream in arms:
            model = {
                'residual': residual,
                'n_layer': n_layer,
                'n_embd': n_embd,
                'n_head': n_embd // 32,
                'mlp_ratio': mlp_ratio,
            }
            for s in range(2 * n_layer):
                at = peak(model) * (1 + 0.1 * s / n_layer)
                beta, tau = (
                    0.28537 / at,
                    0.01 * at / 0.28537,
                )  # v log v = 1 / βτ where f peaks, at v = 1 + t / τ
                found = {
                    'curve': {'beta': beta, 'tau': tau, 'A1': 9.0, 'A2': -9 * math.log(tau), 'K': 3.0},
                    'final': 5.0 + s / n_layer,
                    'last_step': 8192.0,
                    'peak': {'value': at},
                    'half_step': at / 4,
                    'parameters': None,
                    'class': 'early peak',
                }
                series.append(
                    Series(
                        f'{residual}{n_layer}x{n_embd}x{mlp_ratio}',
                        stream,
                        s,
                        t,
                        emergence.curve_at(found, t),
                        model,
                    )
                )
                fits.append(found)
    return series, fits


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


def test_what_only_the_architecture_itself_knows_is_predicted_by_the_random_split_and_not_by_leaving_architectures_out():
    shapes = [(2, 64, 2), (3, 256, 8), (4, 128, 4), (5, 96, 3), (6, 192, 6)]
    series, fits = made_up(shapes)
    lottery = dict(zip(sorted({emergence.architecture(x.model) for x in series}), (1, -1, -1, 1, -1)))
    y = np.array([[lottery[emergence.architecture(x.model)]] for x in series])
    report, predicted = regress(list(zip(series, fits)), y, ['baseline/h', 'ledger/C', 'ledger/D'])
    assert report['r2_architectures_out'] < 0 and report['r2_random_split'] > 0.95
    assert report['architectures'] == len(shapes) and predicted.shape == y.shape


def test_a_left_out_architecture_does_not_touch_its_own_prediction():
    series, fits = made_up(SHAPES[:5])
    X = np.array(
        [
            list(
                emergence.features(
                    x.model, x.stream, x.sublayer, ['baseline/h', 'ledger/C', 'ledger/D']
                ).values()
            )
            for x in series
        ]
    )
    groups, rng = (
        np.unique([emergence.architecture(x.model) for x in series], axis=0, return_inverse=True)[1].ravel(),
        np.random.RandomState(12),
    )
    y = (
        X[:, [4]] + X[:, [0]] + 0.01 * rng.randn(len(series), 1)
    )  # a law, so that the least penalty is chosen; what comes next would choose the largest
    before, mine = emergence.validate(X, y, groups, groups), groups == groups[0]
    y[mine] += 1e6
    after = emergence.validate(X, y, groups, groups)
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


# ---- Figures


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are when written."""
    from matplotlib.figure import Figure

    figures = []

    def look(figure, *_, **__):
        figure.draw_without_rendering()
        title = figure._suptitle.get_window_extent()
        assert 0 <= title.x0 and title.x1 <= figure.bbox.x1, 'the title is cut off'
        figures.append(figure)

    monkeypatch.setattr(Figure, 'savefig', look)
    return figures


def rows_of(stream, count, peaked):
    series = [
        Series(
            'baseline_160m_1337',
            stream,
            s,
            STEPS,
            curve(STEPS, *PLANTED[0]) if s in peaked else 20 - 15 * np.exp(-STEPS / 900),
        )
        for s in range(count)
    ]
    return series, fit_all(series)


def test_curves_say_how_many_sublayers_are_shown_and_bend_before_the_first_step_too(tmp_path, drawn):
    for count, shown in ((1, 1), (24, 6)):
        emergence.draw_curves(
            'baseline_160m_1337', list(zip(*rows_of('h', count, {0}))), tmp_path / 'curves.png'
        )
        assert (
            f'{shown} of {count} sublayers' in drawn[-1]._suptitle.get_text() and len(drawn[-1].axes) == shown
        )
        steps = drawn[-1].axes[0].lines[1].get_xdata()
        assert (np.diff(steps) >= 0).all() and ((steps > 0) & (steps < 1)).sum() >= 20


def test_peaks_have_a_colour_bar_only_where_they_differ(tmp_path, drawn):
    for peaked, text, axes in (((), '0 of 24 sublayers;', 1), ({3}, '1 of 24 sublayers, step 3785;', 1)):
        emergence.draw_peaks(*rows_of('h', 24, peaked), tmp_path / 'peaks.png')
        assert text in drawn[-1]._suptitle.get_text() and len(drawn[-1].axes) == axes
    emergence.draw_peaks(*made_up(SHAPES[:2], arms=[('baseline', 'h')]), tmp_path / 'peaks.png')
    assert [t.get_text() for t in drawn[-1].axes[1].get_yticklabels()] == [
        '2000',
        '2048',
        '2098',
        '2148',
        '2200',
    ]


def test_what_is_predicted_is_drawn_with_a_title_and_few_ticks_that_are_plain_numbers(tmp_path, drawn):
    _, left_out = make_predictor(*made_up(SHAPES, peak=lambda model: 40 * model['n_embd'] ** 0.7))
    emergence.draw_predicted(left_out, ['peak_step'], tmp_path / 'predicted.png')
    (axis,) = drawn[0].axes
    for side in (axis.xaxis, axis.yaxis):
        assert [t.get_text() for t in side.get_ticklabels()] == [
            '740',
            '1100',
            '1600',
            '2300',
        ] and not side.get_minorticklocs().size


# ---- The command


def test_ranks_of_equal_values_are_their_mean_and_of_runs_alike_nothing_is_correlated(capsys):
    assert emergence.ranks(np.array([5, 2, 5, 9])).tolist() == [1.5, 0, 1.5, 3]
    of = [
        {
            'stream': 'h',
            'run': f'run {i}',
            'sublayers': 2,
            'fitted': 2,
            'r2': 0.9,
            'r2_least': 0.8,
            'f_preferred': 1,
            'identifiable': 0,
            'peak': None,
            'half_step': half,
            'loss_half_step': loss,
            'classes': {},
        }
        for i, (half, loss) in enumerate(zip([1, 1, 1, 1, 2, 2, 2, 2], [1, 2, 1, 2, 1, 2, 1, 2]))
    ]
    emergence.print_summary(of)
    assert (
        'rank correlation 0.00 over 8 runs' in capsys.readouterr().out
    )  # 0.57 if ties were in the order of the runs
    emergence.print_summary([{**s, 'half_step': 3} for s in of])
    assert 'rank correlation' not in capsys.readouterr().out


def write_log(folder, model_args=None, steps=STEPS, streams=('D', 'C')):
    """A run's folder as train.py leaves it, with planted curves in two sublayers of each stream."""
    folder.mkdir(parents=True)
    curves = {
        stream: [curve(steps, *PLANTED[(2 * i + s) % len(PLANTED)]) for s in range(2)]
        for i, stream in enumerate(streams)
    }
    with open(folder / 'log.jsonl', 'w') as file:
        for i, step in enumerate(steps):
            of = {
                stream: {
                    'max_over_median': [c[i] for c in cs],
                    'top1': [99.0, 99.0],
                    'median': [1.0, 2.0],
                    'start_ratio': [3.0, 4.0],
                }
                for stream, cs in curves.items()
            }
            file.write(
                json.dumps(
                    {'iter': int(step), 'tokens': 0, 'val_loss': 6 - 4 * step / (step + 100), 'streams': of}
                )
                + '\n'
            )
    if model_args:
        (folder / 'run.json').write_text(json.dumps({'model_args': model_args}))
    return curves


LEDGER = {'residual': 'ledger', 'n_layer': 1, 'n_head': 2, 'n_embd': 64, 'mlp_ratio': 4, 'qk_norm': False}


def test_a_run_is_fitted_from_its_log_and_figures_are_drawn(tmp_path, capsys):
    write_log(tmp_path / 'run')
    emergence.main([str(tmp_path / 'run')])
    report = json.loads((tmp_path / 'run' / 'emergence.json').read_text())
    for i, of in enumerate(report['series']):
        assert (of['stream'], of['sublayer']) == ('DDCC'[i], i % 2)
        np.testing.assert_allclose(
            values(of), PLANTED[i], rtol=5e-3
        )  # r is max_over_median, not 99 over the median
    for name in ('peaks.png', 'curves_run.png'):
        assert (tmp_path / 'run' / name).read_bytes().startswith(b'\x89PNG')
    printed = capsys.readouterr().out
    for word in (
        'R²',
        'AIC',
        'second order',
        'gamma',
        'peak at step',
        'early peak',
        '14M 0.931',
        '12B 0.983',
    ):
        assert word in printed
    assert [s['r2'] > 0.999 and s['sublayers'] == s['fitted'] == 2 for s in report['summary']] == [True, True]


def test_a_packed_run_is_small_and_fitted_like_its_folder(tmp_path, no_curves):
    write_log(tmp_path / 'a', LEDGER)
    write_log(tmp_path / 'b', LEDGER)
    emergence.main(['--pack', str(tmp_path / 'a'), str(tmp_path / 'b'), f'--out={tmp_path}/deep/sweep.jsonl'])
    packed = [json.loads(line) for line in (tmp_path / 'deep' / 'sweep.jsonl').read_text().splitlines()]
    assert (
        [run['run'] for run in packed] == ['a', 'b']
        and packed[0]['model_args'] == LEDGER
        and packed[0]['steps'] == STEPS.tolist()
    )
    log = [json.loads(line) for line in (tmp_path / 'a' / 'log.jsonl').read_text().splitlines()]
    assert packed[0]['streams']['C']['max_over_median'][1][7] == float(
        f'{log[7]["streams"]["C"]["max_over_median"][1]:.5g}'
    )
    emergence.main([str(tmp_path / 'deep' / 'sweep.jsonl'), f'--out={tmp_path}/packed'])
    emergence.main([str(tmp_path / 'a'), str(tmp_path / 'b'), f'--out={tmp_path}/folders'])
    assert (tmp_path / 'packed' / 'emergence.json').read_text() == (
        tmp_path / 'folders' / 'emergence.json'
    ).read_text()


def test_a_csv_gives_r_as_top1_over_median_whatever_the_order_of_its_rows(tmp_path, no_curves):
    planted = PLANTED[2]
    rows = [
        f'{t:g},{s},{3 * r!r},3.0,{stream}'
        for s, stream in ((0, 'C'), (1, 'D'))
        for t, r in zip(STEPS, curve(STEPS, *planted).tolist())
    ]
    np.random.RandomState(14).shuffle(rows)
    (tmp_path / 'series.csv').write_text('step,sublayer,top1,median,stream\n' + '\n'.join(rows))
    emergence.main([f'--csv={tmp_path}/series.csv'])
    found = json.loads((tmp_path / 'emergence.json').read_text())['series']
    assert [(f['run'], f['stream'], f['sublayer']) for f in found] == [('series', 'C', 0), ('series', 'D', 1)]
    for f in found:
        np.testing.assert_allclose(values(f), planted, rtol=5e-3)
        assert (
            f['half_step'] == pytest.approx(fit(STEPS, curve(STEPS, *planted))['half_step'])
            and f['last_step'] == 14000
        )


def sweep_file(path, shapes=SHAPES[1:13:2]):
    series, _ = made_up(shapes, peak=lambda model: 40 * model['n_embd'] ** 0.7)
    runs = {}
    for x in series:
        of = runs.setdefault(
            x.run,
            {
                'run': x.run,
                'model_args': x.model,
                'steps': x.t.tolist(),
                'val_loss': [1.0] * len(x.t),
                'streams': {},
            },
        )
        of['streams'].setdefault(x.stream, {'max_over_median': []})['max_over_median'].append(x.r.tolist())
    path.write_text('\n'.join(map(json.dumps, runs.values())))


def test_a_saved_predictor_prints_the_curve_that_it_expects_of_an_architecture(tmp_path, capsys, no_curves):
    sweep_file(tmp_path / 'sweep.jsonl')
    emergence.main([str(tmp_path / 'sweep.jsonl'), '--predict'])
    for name in ('predicted.png', 'peaks.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
    assert 'archs out' in capsys.readouterr().out
    emergence.main(
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
    x = list(emergence.features(model, 'D', 3, predictor['arms']).values())
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


def test_of_many_runs_the_curves_of_two_of_each_kind_are_drawn(tmp_path, monkeypatch):
    sweep_file(tmp_path / 'sweep.jsonl')
    runs = sorted((tmp_path / 'sweep.jsonl').read_text().splitlines())  # all baselines first
    (tmp_path / 'sweep.jsonl').write_text('\n'.join(runs))
    drawn = []
    monkeypatch.setattr(
        emergence,
        'draw_curves',
        lambda run, rows, path: drawn.append((run, path.name, {x.stream for x, _ in rows})),
    )
    emergence.main([str(tmp_path / 'sweep.jsonl')])
    names = [json.loads(run)['run'] for run in runs]
    assert drawn == [
        (name, f'curves_{name}.png', {'h'} if 'base' in name else {'D', 'C'})
        for name in names[:2] + names[len(names) // 2 :][:2]
    ]


def test_where_no_target_was_regressed_there_is_no_figure_of_it(tmp_path, capsys, no_curves):
    sweep_file(tmp_path / 'sweep.jsonl', SHAPES[:3])
    (tmp_path / 'sweep.jsonl').write_text('\n'.join((tmp_path / 'sweep.jsonl').read_text().splitlines()[::2]))
    emergence.main([str(tmp_path / 'sweep.jsonl'), '--predict'])
    assert (
        'curve is known of 6 series of 3 architectures only' in capsys.readouterr().out
        and not (tmp_path / 'predicted.png').exists()
    )
    assert json.loads((tmp_path / 'predictor.json').read_text())['targets'] == {}


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        ('', 'nothing to read'),
        ('{}/nothing', 'there is no'),
        ('{}/empty', 'there is no log.jsonl'),
        ('{}/bad.jsonl', 'neither the folder of a run nor'),
        ('--csv={}/bad.csv', 'line 2'),
        ('--csv={}/empty.csv', 'no rows'),
        ('--csv={}/nan.csv', 'step'),
        ('--csv={}/twice.csv', 'stands twice'),
        ('--pack {}/run', '--pack needs'),
        ('{}/run {}/run', 'two runs are named run'),
        ('{}/run --csv={}/run.csv', 'two runs are named run'),
        ('{}/none.jsonl', 'no finite'),
        ('{}/bare.jsonl', 'cut short'),
        ('--arch=n_layer=1,n_embd=8,n_head=2,qk_norm=yes', 'expected True or False'),
        ('{}/run --predict', 'at least 3 architectures'),
        ('--arch=n_layer=2', 'lacks n_head, n_embd'),
        ('--arch=n_layer=x,n_embd=64,n_head=2', "'n_layer=x'"),
        ('--arch=n_layer=2,n_embd=64,n_head=2 --predictor={}/nothing', 'make it with'),
        ('--arch=n_layer=2,n_embd=64,n_head=2 --predictor={}/bad.jsonl', 'not a predictor'),
        ('{}/run --out={}/bad.csv', 'cannot write'),
    ],
)
def test_a_mistake_of_the_user_is_a_sentence(tmp_path, arguments, sentence):
    write_log(tmp_path / 'run', LEDGER, STEPS[:9])
    (tmp_path / 'empty').mkdir()
    for name, content in {
        'bad.jsonl': '{"run": 1}\n',
        'bad.csv': 'step,sublayer,top1,median\n1,0,x,2\n',
        'empty.csv': 'step,sublayer,top1,median\n',
        'nan.csv': 'step,sublayer,top1,median\nnan,0,1,2\n',
        'twice.csv': 'step,sublayer,top1,median\n1,0,1,2\n1,0,1,2\n',
        'run.csv': 'step,sublayer,top1,median\n1,0,1,2\n',
        'none.jsonl': '',
        'bare.jsonl': '{"run": "a", "model_args": null, "steps": [], "val_loss": [], "streams": {}}',
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        emergence.main([part.format(tmp_path) for part in arguments.split()])
    assert (
        error.value.code.startswith('error: ')
        and sentence in error.value.code
        and '\n' not in error.value.code
    )


# ---- The sweep


def test_the_sweep_covers_what_it_must_in_pairs_with_settings_that_train_takes(monkeypatch):
    for key, value in {
        'STEPS': '600',
        'DATASET': 'pysource_demo',
        'DEVICE': 'cuda',
        'BLOCK': '256',
        'BATCH': '16',
        'RUNS': 'out/sweep',
    }.items():
        monkeypatch.setenv(key, value)
    sweep = runpy.run_path(str(emergence.Path(emergence.__file__).parent / 'sweep.py'))
    configs = [read_config(sweep['settings'](*run)[1]) for run in sweep['RUNS']]
    assert len({c.out_dir for c in configs}) == len(configs) == 2 * len(set(sweep['ARCHITECTURES'])) >= 48
    for a, b in zip(configs[::2], configs[1::2]):
        assert (a.residual, b.residual) == ('baseline', 'ledger') and (
            a.n_layer,
            a.n_embd,
            a.n_head,
            a.mlp_ratio,
        ) == (b.n_layer, b.n_embd, b.n_head, b.mlp_ratio)
    for part in (configs, configs[:20]):  # cut short, it covers the range too
        for low, high, seen in (
            (2, 10, [c.n_layer for c in part]),
            (64, 384, [c.n_embd for c in part]),
            (16, 64, [c.n_embd // c.n_head for c in part]),
            (2, 8, [c.mlp_ratio for c in part]),
        ):
            assert (min(seen), max(seen)) == (low, high)
    steps, every = configs[0].max_iters, configs[0].eval_interval
    assert len({0, *range(0, steps + 1, every), *(2**i for i in range(steps.bit_length()))}) >= 30
