"""The curve of emergence: planted series, and the formulas against numpy written differently."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
from planted_series import PLANTED, STEPS, curve

from studies import science
from studies.curves import (
    FAMILIES,
    PARAMETERS,
    Series,
    columns_f,
    columns_second,
    curve_at,
    fit,
    fit_all,
    follow_valley,
    jacobian,
    residual,
    search,
    shape,
)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def values(found):
    return np.array([found['parameters'][name]['value'] for name in PARAMETERS])


def true_peak(planted):
    t = np.linspace(0, 14000, 1_400_001)
    return t[curve(t, *planted).argmax()]


def many(curves, t=STEPS):
    return fit_all([Series('run', 'h', i, t, r) for i, r in enumerate(curves)])


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
            fitted = curve_at(f, STEPS)
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

        def f(log_A, log_lambda, log_gamma, log_t0, K, sign=sign):
            return curve(t, sign * math.exp(log_A), *map(math.exp, (log_lambda, log_gamma, log_t0)), K)

        at, h = np.array([math.log(A), *map(math.log, positive), K]), 1e-5
        numeric = np.stack([(f(*(at + h * e)) - f(*(at - h * e))) / (2 * h) for e in np.eye(5)], -1)
        lam, gamma, t0 = positive
        analytic = jacobian(t, lam * gamma, t0 / gamma, sign * A * math.exp(-lam * t0), math.log(gamma))
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-7 * abs(numeric).max())


def test_lambert_w_solves_its_equation_where_its_argument_would_overflow_too():
    for z in (-700.0, -30.0, -1.0, 0.0, 0.999, 1.0, 2.0, 50.0, 5000.0):
        w = science.lambert_w_of_exp(z)
        assert w > 0 and w + math.log(w) == pytest.approx(z, rel=1e-12, abs=1e-12)
    assert science.lambert_w_of_exp(1) == pytest.approx(1) and science.lambert_w_of_exp(
        math.log(2) + 2
    ) == pytest.approx(2)  # w exp(w) at 1 and at 2


def test_the_quantile_is_that_of_students_tables():
    for df, table in ((1, 12.706), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        assert science.t_quantile(0.975, df) == pytest.approx(table, rel=1e-4)


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
        science.t_quantile(0.975, len(t) - 5) * math.sqrt(gradient @ covariance[1:4, 1:4] @ gradient),
        rel=0.02,
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
        fitted = np.array([curve_at(f, STEPS) for f in found])
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
    assert shape(t, np.interp(t, [0, 20, 100], [8, 2, 10])) == (
        'neither',
        60,
    )  # at 6, which it has passed on its way down too
    assert shape(t, np.interp(t, [0, 20, 100], [2, 10, 4])) == ('early peak', 10)
    assert shape(t, 9 - t / 50) == ('neither', None)


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
    fitted = curve_at(found, dense)
    expected = dense[(fitted >= (fitted[0] + fitted.max()) / 2).argmax()]
    assert found['half_step'] == pytest.approx(expected, rel=0.03)


def test_a_peak_after_the_end_of_training_is_none():
    planted = (30, 0.05, 0.002, 1.5, 5)
    t = STEPS[STEPS < true_peak(planted) - 500]
    found = fit(t, curve(t, *planted))
    assert found['r2'] > 0.999 and found['peak'] is None and found['class'] == 'log increase'


def dense_search(t, y, box, points):
    """Returns the least sum of squares that a grid of points × points and least squares from its 12 best
    local minima find."""
    grid = np.array(list(itertools.product(*[np.linspace(*limits, points) for limits in box])))
    values = np.concatenate([residual(columns_f(part, t), y) for part in np.array_split(grid, 20)])
    walled = np.pad(values.reshape(points, points), 1, constant_values=np.inf)
    shifts = itertools.product(range(3), repeat=2)
    lowest_around = np.min([walled[i : i + points, j : j + points] for i, j in shifts], 0).ravel()
    minima = np.flatnonzero(values <= lowest_around)
    starts = grid[minima[values[minima].argsort()][:12]]
    return residual(columns_f(follow_valley(columns_f, box, t, y, starts), t), y)


def narrow_valley(rng):
    """Returns steps and a series as a short log may have them: 7 to 30 points that tell τ and β badly
    apart."""
    last = rng.choice([600, 14000, 143000])
    t = np.unique(np.concatenate([[0], np.geomspace(1, last, rng.randint(7, 30)).round()]))
    beta, tau = np.exp(rng.uniform(-12, -2)), np.exp(rng.uniform(-1, 9))
    y = np.exp(-beta * t) * (10 * rng.randn() * np.log(t + tau) + 20 * rng.randn()) + 5
    return t, y + rng.choice([0.001, 0.01, 0.1]) * y.std() * rng.randn(len(t))


@pytest.mark.parametrize('count', [8, pytest.param(200, marks=pytest.mark.slow)])
def test_in_narrow_valleys_the_search_leaves_no_more_than_a_dense_search(count):
    rng = np.random.RandomState(0)
    for _ in range(count):
        t, y = narrow_valley(rng)
        box = FAMILIES['f'].box(math.log(t[t > 0][0]), math.log(t[-1]))
        found = residual(columns_f(search(columns_f, box, t, y[None])[0], t), y)
        assert found <= 1.001 * dense_search(t, y, box, 150 if count < 100 else 300)
