"""
Fits the curve of emergence, and four simpler ones, to series of a ratio over training steps.

The curve is f(t) = A exp(−λ x) log x + K with x = γ t + t0 (Gallego-Feliciano et al. 2025, eq. 7). With
β = λγ, τ = t0 / γ, A₁ = A exp(−λ t0) and A₂ = A₁ log γ it reads exp(−β t) (A₁ log(t + τ) + A₂) + K. So two
parameters are searched, on a fixed grid and then by least squares from its best points, and three are solved.
Nothing is drawn at random.

Its rivals are a constant, a logarithm, a first-order and a second-order relaxation. They are compared by
AIC = n log(RSS / n) + 2k over n steps, where k counts a curve's parameters and the variance of the noise.

Intervals are 95%, from the Gauss–Newton covariance of (log|A|, log λ, log γ, log t0, K) and, for the peak,
the delta method. They take residuals to be independent. Where neighbouring residuals depend on each other,
they are too narrow.

What is not reported:
- The five parameters, where one of them is known to no better than a factor of ten either way. They are then
  "not identifiable", and only the curve and its peak are reported.
- A peak, where f is not clearly (by 10 of AIC) better than its monotone limits, the logarithm (β → 0) and the
  first-order relaxation (A₁ → 0). Class and half height are then those of the better limit.

Classes. "Early peak": the curve rises and falls by a tenth of its span or more within training. "Log
increase": it ends at least half of its span above its start, and has fallen by less than a tenth. Half height
is the step where it first is halfway to its largest value from the lowest before that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from measure import number
from studies import science

PARAMETERS = ('A', 'lambda', 'gamma', 't0', 'K')
FEWEST_POINTS = 8  # finite points that a fit needs: five parameters and something to be wrong about
WIDEST = math.log(10)  # half the width of a logarithmic interval beyond which a parameter is not identifiable
CLEARLY = 10  # by how much of AIC a curve must be better, after a search
CLASSES = ('early peak', 'log increase', 'neither')


@dataclass
class Series:
    """The ratio of one stream after one sublayer in the course of training."""

    run: str
    stream: str
    sublayer: int
    t: np.ndarray  # (n,) steps, rising
    r: np.ndarray  # (n,) largest over median, finite
    model: dict = None  # the run's model_args, where they are known
    loss_half: float = None  # the step at which half of the fall of its validation loss is behind it


# ---- The curve and its rivals. Each is linear but for θ, the logarithms of at most two positive numbers.


def columns_f(theta, t):
    """theta: (…, 2) log β, log τ. t: (n,). Returns (…, 2, n), what A₁ and A₂ multiply."""
    beta, tau = np.moveaxis(np.exp(theta)[..., None], -2, 0)
    decay = np.exp(-beta * t)
    return np.stack([decay * np.log(t + tau), decay], -2)


def columns_logarithm(theta, t):
    """theta: (…, 1) log τ. t: (n,). Returns (…, 1, n): log(t + τ)."""
    return np.log(t + np.exp(theta))[..., None, :]


def columns_first(theta, t):
    """theta: (…, 1) the logarithm of the time constant. t: (n,). Returns (…, 1, n): what is left, from 1 to
    0."""
    return np.exp(-t * np.exp(-theta))[..., None, :]


def columns_second(theta, t):
    """theta: (…, 2) log ω, log ζ. t: (n,). Returns (…, 1, n): what is left of the step response of ẍ + 2ζω ẋ
    + ω² x = 0."""
    omega, zeta = np.moveaxis(np.exp(theta)[..., None], -2, 0)
    root = np.sqrt((zeta * zeta - 1).astype(complex))
    root = np.where(abs(root) < 1e-4, 1e-4, root)  # ζ = 1 is a limit
    slow, fast = omega * (root - zeta), omega * (-root - zeta)
    return ((slow * np.exp(fast * t) - fast * np.exp(slow * t)) / (slow - fast)).real[..., None, :]


@dataclass(frozen=True)
class Family:
    """A kind of curve: columns(θ, t), each times a coefficient, plus a constant."""

    parameters: int  # besides the variance of the noise
    columns: Callable = None  # None: the constant alone
    box: Callable = None  # (log of the first step above 0, log of the last) → the range of each θ
    starts: int = 2  # of the search: more where the residual is a long valley


FAMILIES = {
    'constant': Family(1),
    'logarithm': Family(3, columns_logarithm, lambda low, high: [(low - 4, high + 2)]),
    'first order': Family(3, columns_first, lambda low, high: [(low - 1, high + 3)]),
    'second order': Family(
        4, columns_second, lambda low, high: [(-high - 2, -low + 2), (math.log(0.05), math.log(20))], starts=3
    ),
    'f': Family(5, columns_f, lambda low, high: [(-high - 4, -low + 1), (low - 4, high + 2)], starts=8),
}


def residual_vector(columns, y):
    """columns: (…, m, n), y: (…, n). Returns (…, n): what least squares on the columns and a constant leaves
    of y."""
    y = y - y.mean(-1, keepdims=True)
    directions = []
    for column in np.moveaxis(columns, -2, 0):
        q = column - column.mean(-1, keepdims=True)
        for p in directions:
            q = q - p * (p * q).sum(-1, keepdims=True)
        length = np.sqrt((q * q).sum(-1, keepdims=True))
        is_direction_of_its_own = length > 1e-10 * np.sqrt((column * column).sum(-1, keepdims=True))
        q = np.where(is_direction_of_its_own, q / np.where(is_direction_of_its_own, length, 1), 0)
        y = y - q * (q * y).sum(-1, keepdims=True)
        directions.append(q)
    return y


def residual(columns, y):
    """columns: (…, m, n), y: (…, n). Returns (…): the sum of squares that least squares leaves."""
    return (residual_vector(columns, y) ** 2).sum(-1)


def design(columns, theta, t):
    """Returns (n, m + 1): the columns, and a constant."""
    return np.concatenate([columns(theta, t), np.ones((1, len(t)))]).T


def solve(columns, theta, t, y, at):
    """Returns the coefficients (m + 1,) of least squares on y at the steps t, and the curve at the steps
    `at`."""
    basis = design(columns, theta, t)
    scale = np.sqrt((basis**2).sum(0))
    coefficients = np.linalg.lstsq(basis / scale, y, rcond=1e-13)[0] / scale
    return coefficients, design(columns, theta, at) @ coefficients


def valley_starts(columns, box, t, y, fine=121, coarse=7):
    """y: (S, n). Returns (S, k, p): the starts of each series' search.

    Over two parameters the residual is a valley, narrow across and long, with low places at its middle and
    its ends. So there is a start at every step along the second parameter, where the first is the best of a
    fine grid, and one at the low end of the first. Over one parameter the starts are the best of every
    stretch of a fine grid."""
    first = np.linspace(*box[0], fine)
    if len(box) == 1:
        grid = first[: fine // coarse * coarse].reshape(coarse, -1, 1)
        values = residual(columns(grid, t), y[:, None, None])  # (S, coarse, stretch)
        return grid[np.arange(coarse), values.argmin(-1)]
    second = np.linspace(*box[1], coarse)
    grid = np.stack(np.meshgrid(first, second), -1)  # (coarse, fine, 2)
    along = grid[np.arange(coarse), residual(columns(grid, t), y[:, None, None]).argmin(-1)]
    low_end = np.stack(np.meshgrid(first[:1], np.linspace(*box[1], fine)), -1)[:, 0]
    at_low_end = low_end[residual(columns(low_end, t), y[:, None]).argmin(-1)]
    return np.concatenate([along, at_low_end[:, None]], 1)


def follow_valley(columns, box, t, y, starts):
    """y: (n,), starts: (k, p). Returns the θ of least residual in the box that least squares reaches."""
    low, high = np.array(box).T
    best, least = None, math.inf
    for start in starts:
        found = science.least_squares(
            lambda theta: residual_vector(columns(np.clip(theta, low, high), t), y), start
        )
        for theta in (start, np.clip(found, low, high)):
            value = residual(columns(theta, t), y)
            if value < least:
                best, least = theta, value
    return best


def search(columns, box, t, y, most=8):
    """y: (S, n). Returns (S, p): for each series the θ in the box with the least residual.

    most: how many of the best starts are followed."""
    starts = valley_starts(columns, box, t, y)
    order = residual(columns(starts, t), y[:, None]).argsort(1, kind='stable')[:, :most]
    best_starts = np.take_along_axis(starts, order[..., None], 1)
    return np.stack([follow_valley(columns, box, t, *pair) for pair in zip(y, best_starts)])


def jacobian(t, beta, tau, A1, log_gamma):
    """Returns (n, 5): the derivatives of f by log|A|, log λ, log γ, log t0 and K.

    The form is one that cannot overflow where A and γ would."""
    u, log_x = A1 * np.exp(-beta * t), log_gamma + np.log(t + tau)
    slope = u * (1 / (t + tau) - beta * log_x)
    return np.stack([u * log_x, -beta * (t + tau) * u * log_x, t * slope, tau * slope, np.ones_like(t)], -1)


def symmetric_interval(middle, half, back=float):
    """Returns middle ± half as a report has it, through `back` from the scale on which the interval is
    symmetric."""
    return {
        'value': number(back(middle)),
        'low': number(back(middle - half)),
        'high': number(back(middle + half)),
    }


def factor_known(half):
    """Says in words how well a parameter is known whose logarithm has a half width of `half`."""
    if half < math.log(1e6):
        return f'known within a factor of {math.exp(half):.0e} only'
    return 'not known at all'


def five_parameters(t, theta, coefficients, rss):
    """Returns three things: the five parameters, or None; the peak, or None where none lies between the
    steps; and why the five are None, or None. A parameter and the peak are {"value", "low", "high"}."""
    (beta, tau), (A1, A2, K) = np.exp(theta), coefficients
    # log γ = A₂ / A₁, kept where its exponential is finite
    log_gamma = A2 / A1 if abs(A2) < 600 * abs(A1) else math.copysign(600, A2 * (A1 or 1))
    J = jacobian(t, beta, tau, A1 or 1e-300, log_gamma)
    size = np.sqrt((J * J).sum(0))
    if not (size > 1e-12 * size.max()).all():
        return None, None, 'not identifiable: a parameter does not move the curve'
    _, singular, V = np.linalg.svd(J / size)
    if singular[-1] < 1e-9 * singular[0]:
        return None, None, 'not identifiable: two parameters move the curve in the same way'
    freedom = len(t) - 5
    # the root of the covariance, in half widths of the intervals
    spread = science.t_quantile(0.975, freedom) * math.sqrt(rss / freedom) * V / np.outer(singular, size)
    half = np.linalg.norm(spread, axis=0)

    # f peaks where x log x = 1 / λ, that is at x = exp(W(1 / λ)); log(1 / λ) = log γ − log β
    w = science.lambert_w_of_exp(log_gamma - math.log(beta))
    at, peak = math.exp(w - log_gamma) - tau, None
    if A1 > 0 and t[0] < at < t[-1]:
        gradient_of_peak = np.array([0, -(at + tau) * w / (1 + w), -at, -tau, 0])
        peak = symmetric_interval(at, np.linalg.norm(spread @ gradient_of_peak))

    worst = int(half[:4].argmax())
    if half[worst] > WIDEST:
        return None, peak, f'not identifiable: {PARAMETERS[worst]} is {factor_known(half[worst])}'
    logs = (
        math.log(abs(A1)) + beta * tau,
        math.log(beta) - log_gamma,
        log_gamma,
        math.log(tau) + log_gamma,
    )
    parameters = {name: symmetric_interval(v, h, np.exp) for name, v, h in zip(PARAMETERS, logs, half)}
    if A1 < 0:
        parameters['A'] = symmetric_interval(logs[0], -half[0], lambda v: -np.exp(v))
    return {**parameters, 'K': symmetric_interval(K, half[4])}, peak, None


def refusal(t, r):
    """Returns the sentence that says why a series is not fitted, or None."""
    if len(t) < FEWEST_POINTS:
        return f'not fitted: {len(t)} finite points, and a fit needs {FEWEST_POINTS}'
    if np.ptp(r) <= 1e-5 * abs(r).max():
        return f'not fitted: constant at {r.mean():.6g}'
    farthest = ((r - np.median(r)) ** 2).argmax()
    others = np.delete(r, farthest)
    if ((others - others.mean()) ** 2).sum() < 0.05 * ((r - r.mean()) ** 2).sum():
        return f'not fitted: a spike, one point holds the variance, {r[farthest]:.4g} at step {t[farthest]:g}'
    return None


def shape(t, values):
    """t: steps of a dense grid; values: the fitted curve there. Returns its class and the step of half
    height, or None if it never rises."""
    top, span = int(values.argmax()), np.ptp(values)
    low = int(values[: top + 1].argmin())
    rise, fall = values[top] - values[low], values[top] - values[-1]
    half = None
    if rise > 0.1 * span:
        half = float(t[low:][values[low:] >= values[low] + rise / 2][0])
    if min(rise, fall) > 0.1 * span:
        return 'early peak', half
    is_increase = values[-1] - values[0] >= 0.5 * span and fall < 0.1 * span
    return ('log increase' if is_increase else 'neither'), half


def fit_one(t, r, thetas, total, dense):
    """t, r: (n,). thetas: {family: θ}. total: the sum of squares around the mean. dense: steps on which
    curves are looked at. Returns the fit as emergence.json has it."""
    n = len(t)
    rss = {name: float(residual(FAMILIES[name].columns(theta, t), r)) for name, theta in thetas.items()}
    rss['constant'] = float(total)
    floor = 1e-14 * total  # a perfect fit has no AIC
    aic = {}
    for name, family in FAMILIES.items():
        aic[name] = n * math.log(max(rss[name], floor) / n) + 2 * (family.parameters + 1)
    limit = min(('logarithm', 'first order'), key=aic.get)  # β → 0 and A₁ → 0
    coefficients, values = solve(columns_f, thetas['f'], t, r, dense)
    _, monotone = solve(FAMILIES[limit].columns, thetas[limit], t, r, dense)

    is_clear = aic['f'] < aic[limit] - CLEARLY
    has_trend = min(aic.values()) <= aic['constant'] - CLEARLY
    kind, half = shape(dense, values if is_clear else monotone)
    parameters, peak, note = five_parameters(t, thetas['f'], coefficients, rss['f'])
    if not is_clear:
        parameters, peak = None, None
        note = f'not identifiable: f is not clearly better than its limit, the {limit}'
    if not has_trend:
        kind, half, parameters, peak = 'neither', None, None, None
        note = 'no trend: no curve is clearly better than a constant'
    curve = dict(zip(('beta', 'tau', 'A1', 'A2', 'K'), (*np.exp(thetas['f']), *coefficients)))
    return {
        'n': n,
        'r2': number(1 - rss['f'] / total),
        'preferred': min(aic, key=aic.get),
        'aic': {name: number(v) for name, v in aic.items()},
        'curve': {name: float(v) for name, v in curve.items()},  # in full: as β → 0 they cancel
        'parameters': parameters,
        'note': note,
        'class': kind,
        'peak': peak,
        'half_step': half,
        'first': number(values[0]),
        'top': number(values.max()),
        'final': number(values[-1]),
        'last_step': float(t[-1]),
    }


def fit_group(t, y):
    """t: (n,), y: (S, n), none of them degenerate. Returns a dict for each series, as emergence.json has
    it."""
    first = t[t > 0][0]
    thetas = {}
    for name, family in FAMILIES.items():
        if family.columns:
            box = family.box(math.log(first), math.log(t[-1]))
            thetas[name] = search(family.columns, box, t, y, family.starts)
    total = residual(np.zeros((0, len(t))), y)
    dense = np.unique(np.concatenate([t, np.geomspace(first, t[-1], 400)]))
    return [
        fit_one(t, r, {name: theta[i] for name, theta in thetas.items()}, total[i], dense)
        for i, r in enumerate(y)
    ]


def fit(t, r):
    """t, r: (n,) steps and largest over median. Returns the dict that emergence.json has of a series: the
    fit, or {"note": why there is none}."""
    return fit_all([Series('', 'h', 0, np.asarray(t, float), np.asarray(r, float))])[0]


def fit_all(series):
    """Returns the fit of each Series. Those of equal steps are searched together, which is most of the
    speed."""
    fits = [{'n': len(x.t), 'note': refusal(x.t, x.r), 'class': 'neither'} for x in series]
    groups = {}
    for i, x in enumerate(series):
        if not fits[i]['note']:
            groups.setdefault(tuple(x.t), []).append(i)
    at_once = 16  # the grid of one series takes 2 MB
    for t, members in groups.items():
        for k in range(0, len(members), at_once):
            part = members[k : k + at_once]
            found = fit_group(np.array(t), np.stack([series[i].r for i in part]))
            for i, fitted in zip(part, found):
                fits[i] = fitted
    return fits


def curve_at(fitted, steps):
    """Returns (m,): the fitted curve at these steps."""
    c = fitted['curve']
    return design(columns_f, np.log([c['beta'], c['tau']]), steps) @ [c['A1'], c['A2'], c['K']]
