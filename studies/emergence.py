"""
When does the outlier emerge? Fits the training-time series of every stream and sublayer, and predicts it from the architecture.

    python -m studies.emergence out/ledger_160m out/baseline_160m             runs trained here: their log.jsonl
    python -m studies.emergence --csv=series.csv                              columns step, sublayer, top1, median[, stream, run]
    python -m studies.emergence --pack out/sweep/* --out=sweep.jsonl          many runs as one compact file, a line each, to be read like a run
    python -m studies.emergence sweep.jsonl --predict                         regress on architecture, leaving out whole architectures; predictor.json
    python -m studies.emergence --arch=n_layer=6,n_embd=256,n_head=8,residual=ledger,stream=C --predictor=predictor.json

What is worth knowing before reading on:
- r(t) of a log is max_over_median, the mean over sequences of largest over median (Gallego-Feliciano et al. 2025, eq. 6); a csv has only
  top1 and median, and there r = top1 / median. The two differ where sequences do: a sequence with a small median counts more in the first;
- the curve is f(t) = A exp(−λ x) log x + K with x = γ t + t0 (the same, eq. 7). With β = λγ, τ = t0/γ, A₁ = A exp(−λ t0), A₂ = A₁ log γ it reads
  exp(−β t)(A₁ log(t + τ) + A₂) + K: two parameters are searched on a fixed grid and zoomed in on, three solved; nothing is drawn at random;
- intervals are 95%, from the Gauss–Newton covariance of (log|A|, log λ, log γ, log t0, K) and, for the peak, the delta method. Residuals are taken to be
  independent: where neighbouring ones depend on each other, intervals are too narrow, and there are false peaks all the same, which no AIC tells;
- the five are "not identifiable", and only the curve and its peak are reported, where one is wider than a factor of ten either way. One limit of f has a peak and
  four parameters: exp(−β t)(a + b t) + K, as τ → ∞. Where f is not clearly (10 of AIC) better than its monotone limits, the logarithm, as β → 0, and a first-order
  relaxation, as A₁ → 0, no peak is reported either, and class and half height are those of the better limit;
- early peak: the curve rises and falls by a tenth of its span or more within training; log increase: it ends at least half of its span above its start, and has
  fallen by less than a tenth. Half height: where it first is halfway to its largest value from the lowest before that;
- AIC = n log(RSS / n) + 2k over n steps; k counts a curve's parameters and the noise's variance: constant 2, logarithm and first order 4, second order 5, f 6.
"""

import argparse
import csv
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from checkpoint import load_checkpoint, read_log
from data.loader import UserError, atomic_write
from figures import STREAM_STYLE, figure
from measure import number
from model import RESIDUALS

PUBLISHED_R2 = {
    '14M': 0.931,
    '70M': 0.968,
    '160M': 0.983,
    '410M': 0.994,
    '1B': 0.992,
    '1.4B': 0.996,
    '2.8B': 0.969,
    '6.9B': 0.995,
    '12B': 0.983,
}  # Pythia
PARAMETERS = ('A', 'lambda', 'gamma', 't0', 'K')
KEPT = (
    'max_over_median',
    'top1',
    'start_ratio',
)  # of a log, in its compact form; what is fitted is the first
FEWEST = 8  # finite points that a fit needs: five parameters and something to be wrong about
WIDEST = math.log(10)  # half the width of a logarithmic interval beyond which a parameter is not identifiable
CLEARLY = 10  # of AIC: less is no evidence, after a search
CLASSES = ('early peak', 'log increase', 'neither')
PENALTIES = 10.0 ** np.arange(-3, 2)  # of ridge, per row, on standardized features


# ---- Series


@dataclass
class Series:
    run: str
    stream: str
    sublayer: int
    t: np.ndarray  # (n,) steps, rising
    r: np.ndarray  # (n,) largest over median, finite
    model: dict = None  # the run's model_args, where they are known
    loss_half: float = None  # the step at which half of the fall of its validation loss is behind it


def run_settings(folder):
    """Returns the model's settings of a run, from the smallest file that has them, or None, and what made the run, where that file says so."""
    for name, key in (('run.json', 'model_args'), ('measure.json', 'model')):
        if (folder / name).exists():
            try:
                found = json.loads((folder / name).read_text())
                return found[key], {k: found[k] for k in ('config', 'data_sha256') if k in found}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{folder / name} does not hold {key} ({error}): remove it, and the settings are read from elsewhere'
                ) from None
    return load_checkpoint(folder / 'ckpt.pt')['model_args'] if (folder / 'ckpt.pt').exists() else None, {}


def pack(folder):
    """Returns the compact form of a run's log.jsonl: a dict of lists over steps, in 5 significant digits, with what made the run where run.json says so."""
    lines = read_log(folder / 'log.jsonl')
    if not lines:
        raise UserError(
            f'there is no log.jsonl in {folder}: name folders of runs, files written with --pack, or --csv=FILE'
        )
    model, made = run_settings(folder)

    def short(values):
        return [None if v is None else float(f'{v:.5g}') for v in values]

    try:
        streams = {
            stream: {
                key: [short(column) for column in zip(*(line['streams'][stream][key] for line in lines))]
                for key in KEPT
            }
            for stream in lines[0]['streams']
        }
        return {
            'run': folder.name,
            'model_args': model,
            'made': made,
            'steps': [line['iter'] for line in lines],
            'val_loss': short(line['val_loss'] for line in lines),
            'streams': streams,
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f'{folder}/log.jsonl lacks the streams that train.py writes ({error}): train the run again'
        ) from None


def read_runs(path):
    """Returns the packed runs in a folder or a packed file."""
    if path.is_dir():
        return [pack(path)]
    try:
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        if not all({'run', 'model_args', 'steps', 'val_loss', 'streams'} <= run.keys() for run in runs):
            raise ValueError('a line lacks run, model_args, steps, val_loss or streams')
        return runs
    except FileNotFoundError:
        raise UserError(
            f'there is no {path}: name a run that train.py made, like out/ledger_demo, or a file written with --pack'
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f'{path} is neither the folder of a run nor a file written with --pack ({error})'
        ) from None


def finite(run, stream, sublayer, t, r, **more):
    """A Series of the finite points, in the order of their steps."""
    t, r = np.asarray(t, float), np.asarray([math.nan if v is None else v for v in r], float)
    if len(set(t)) < len(t) or not ((t >= 0) & (t < math.inf)).all():
        raise UserError(f'{run}, {stream}, sublayer {sublayer}: a step is no number from 0, or stands twice')
    order = t.argsort()
    keep = order[np.isfinite(r[order])]
    return Series(run, stream, sublayer, t[keep], r[keep], **more)


def half_of_fall(steps, loss):
    """The step at which a loss has made half of its fall, by interpolation, or None."""
    steps, loss = np.array([(t, v) for t, v in zip(steps, loss) if v is not None] or [(0, 0)]).T
    middle = (loss[0] + loss.min()) / 2
    i = (loss <= middle).argmax()
    return number(np.interp(-middle, -loss[i - 1 : i + 1], steps[i - 1 : i + 1])) if i else None


def series_of(run):
    """Returns the Series of a packed run."""
    try:
        more = {'model': run['model_args'], 'loss_half': half_of_fall(run['steps'], run['val_loss'])}
        found = [
            finite(run['run'], stream, s, run['steps'], r, **more)
            for stream, q in run['streams'].items()
            for s, r in enumerate(q['max_over_median'])
        ]
        if not (found and run['steps'] and isinstance(run['run'], str)):
            raise ValueError('a name, steps and streams are what it needs')
        return found
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f'{run["run"]}: not written with --pack, or cut short ({error})') from None


def read_csv(path):
    """Returns the Series of a csv with a header; columns step, sublayer, top1, median and, if they are there, stream and run."""
    points = {}
    try:
        with open(path, newline='') as file:
            for i, row in enumerate(csv.DictReader(file), 2):
                try:
                    top1, median = float(row['top1']), float(row['median'])
                    key = row.get('run') or path.stem, row.get('stream') or 'h', int(row['sublayer'])
                    points.setdefault(key, []).append(
                        (float(row['step']), top1 / median if median else math.nan)
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f'{path}, line {i}: expected numbers in the columns step, sublayer, top1, median ({error})'
                    ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'cannot read {path} as csv ({error})') from None
    if not points:
        raise UserError(
            f'{path} has no rows: expected a header step,sublayer,top1,median and a line for each point'
        )
    return [finite(*key, *zip(*rows)) for key, rows in sorted(points.items())]


# ---- The curve and its simpler rivals. Each is linear but for the logarithms of at most two positive numbers, which are searched.


def columns_f(theta, t):
    """theta: (…, 2) log β, log τ. t: (n,). Returns (…, 2, n), what A₁ and A₂ multiply."""
    beta, tau = np.moveaxis(np.exp(theta)[..., None], -2, 0)
    decay = np.exp(-beta * t)
    return np.stack([decay * np.log(t + tau), decay], -2)


def columns_second(theta, t):
    """theta: (…, 2) log ω, log ζ. Returns (…, 1, n): what is left of the step response, 1 → 0, of ẍ + 2ζω ẋ + ω² x = 0."""
    omega, zeta = np.moveaxis(np.exp(theta)[..., None], -2, 0)
    root = np.sqrt((zeta * zeta - 1).astype(complex))
    root = np.where(abs(root) < 1e-4, 1e-4, root)  # ζ = 1 is a limit
    slow, fast = omega * (root - zeta), omega * (-root - zeta)
    return ((slow * np.exp(fast * t) - fast * np.exp(slow * t)) / (slow - fast)).real[..., None, :]


FAMILIES = {  # name → parameters besides the noise's variance, columns beside the constant, box of what is searched
    'constant': (1, None, None),
    'logarithm': (
        3,
        lambda theta, t: np.log(t + np.exp(theta))[..., None, :],
        lambda low, high: [(low - 4, high + 2)],
    ),
    'first order': (
        3,
        lambda theta, t: np.exp(-t * np.exp(-theta))[..., None, :],
        lambda low, high: [(low - 1, high + 3)],
    ),
    'second order': (
        4,
        columns_second,
        lambda low, high: [(-high - 2, -low + 2), (math.log(0.05), math.log(20))],
    ),
    'f': (5, columns_f, lambda low, high: [(-high - 4, -low + 1), (low - 4, high + 2)]),
}


def residual(columns, y):
    """columns: (…, m, n), y: (…, n). Returns (…): the sum of squares that least squares on the columns and a constant leaves."""
    y, done = y - y.mean(-1, keepdims=True), []
    for column in np.moveaxis(columns, -2, 0):
        q = column - column.mean(-1, keepdims=True)
        for p in done:
            q = q - p * (p * q).sum(-1, keepdims=True)
        length = np.sqrt((q * q).sum(-1, keepdims=True))
        whole = length > 1e-10 * np.sqrt(
            (column * column).sum(-1, keepdims=True)
        )  # else it is no direction of its own
        q = np.where(whole, q / np.where(whole, length, 1), 0)
        y = y - q * (q * y).sum(-1, keepdims=True)
        done.append(q)
    return (y * y).sum(-1)


def design(columns, theta, t):
    """Returns (n, m + 1): the columns, and a constant."""
    return np.concatenate([columns(theta, t), np.ones((1, len(t)))]).T


def solve(columns, theta, t, y, at):
    """Returns the coefficients (m + 1,) of least squares on y at t, and the curve at other steps."""
    basis = design(columns, theta, t)
    scale = np.sqrt((basis**2).sum(0))
    coefficients = np.linalg.lstsq(basis / scale, y, rcond=1e-13)[0] / scale
    return coefficients, design(columns, theta, at) @ coefficients


def search(columns, box, t, y, points=41, starts=3):
    """y: (S, n). Returns (S, p): for each series the θ in the box with the least residual. From the lowest local minima of a grid
    the search goes on in stencils of ±2 spacings, which halve whenever their best point is not on the rim."""
    (low, high), p = np.array(box).T, len(box)
    grid = np.array(list(product(*np.linspace(low, high, points).T)))
    left = residual(columns(grid, t), y[:, None]).reshape(len(y), *[points] * p)
    walled = np.pad(left, [(0, 0)] + [(1, 1)] * p, constant_values=np.inf)
    lowest = sliding_window_view(walled, [3] * p, range(1, p + 1)).min(tuple(range(-p, 0)))
    order = np.where(left <= lowest, left, np.inf).reshape(len(y), -1).argsort(1, kind='stable')[:, :starts]
    theta = grid[order]  # (S, starts, p)
    step = np.broadcast_to((high - low) / (points - 1), theta.shape)
    stencil = np.array(list(product(range(-2, 3), repeat=p)))
    for _ in range(60):
        around = np.clip(theta[:, :, None] + stencil * step[:, :, None] / 2, low, high)
        left = residual(columns(around, t), y[:, None, None])  # (S, starts, stencil)
        best = left.argmin(-1)
        theta = np.take_along_axis(around, best[..., None, None], 2)[:, :, 0]
        step = np.where((abs(stencil[best]).max(-1) == 2)[..., None], step, step / 2)
        if step.max() < 1e-7:
            break
    return theta[np.arange(len(y)), left.min(-1).argmin(1)]


def lambert_w(z):
    """W(eᶻ): the w > 0 with w + log w = z, by Newton. Of z = log(1/λ), because 1/λ itself may overflow."""
    w = np.exp(z) if z < 1 else z - math.log(z) + math.log(z) / z
    for _ in range(50):
        new = w * (1 + z - math.log(w)) / (1 + w) if w > 1e-300 else w
        if abs(new - w) <= 1e-16 * new:
            break
        w = new
    return float(w)


def jacobian(t, beta, tau, A1, g):
    """(n, 5): derivatives of f by log|A|, log λ, log γ, log t0 and K; g = log γ. In a form that cannot overflow where A and γ would."""
    u, log_x = A1 * np.exp(-beta * t), g + np.log(t + tau)
    slope = u * (1 / (t + tau) - beta * log_x)
    return np.stack([u * log_x, -beta * (t + tau) * u * log_x, t * slope, tau * slope, np.ones_like(t)], -1)


def t_quantile(df):
    """97.5% quantile of Student's t, by its expansion in 1/df (Cornish and Fisher)."""
    z = 1.959963985
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def interval(middle, half, back=float):
    """middle ± half, through `back` from the scale on which it is symmetric, as the report has it."""
    return {
        'value': number(back(middle)),
        'low': number(back(middle - half)),
        'high': number(back(middle + half)),
    }


def five(t, theta, coefficients, rss):
    """Returns the five parameters, or None, the peak, or None where none lies between the steps, each {"value", "low", "high"}, and why the five are None, or None."""
    (beta, tau), (A1, A2, K) = np.exp(theta), coefficients
    g = A2 / A1 if abs(A2) < 600 * abs(A1) else math.copysign(600, A2 * (A1 or 1))
    J = jacobian(t, beta, tau, A1 or 1e-300, g)
    size = np.sqrt((J * J).sum(0))
    if not (size > 1e-12 * size.max()).all():
        return None, None, 'not identifiable: a parameter does not move the curve'
    _, s, V = np.linalg.svd(J / size)
    if s[-1] < 1e-9 * s[0]:
        return None, None, 'not identifiable: two parameters move the curve in the same way'
    spread = (
        t_quantile(len(t) - 5) * math.sqrt(rss / (len(t) - 5)) * V / np.outer(s, size)
    )  # the root of the covariance, in half widths
    half = np.linalg.norm(spread, axis=0)
    worst = int(half[:4].argmax())
    w = lambert_w(g - math.log(beta))
    at, peak = math.exp(w - g) - tau, None
    if A1 > 0 and t[0] < at < t[-1]:
        gradient = np.array([0, -(at + tau) * w / (1 + w), -at, -tau, 0])  # of the peak by the same five
        peak = interval(at, np.linalg.norm(spread @ gradient))
    if half[worst] > WIDEST:
        known = (
            f'known within a factor of {math.exp(half[worst]):.0e} only'
            if half[worst] < math.log(1e6)
            else 'not known at all'
        )
        return None, peak, f'not identifiable: {PARAMETERS[worst]} is {known}'
    logs = math.log(abs(A1)) + beta * tau, math.log(beta) - g, g, math.log(tau) + g
    parameters = {name: interval(v, h, np.exp) for name, v, h in zip(PARAMETERS, logs, half)}
    if A1 < 0:
        parameters['A'] = interval(logs[0], -half[0], lambda v: -np.exp(v))
    return {**parameters, 'K': interval(K, half[4])}, peak, None


def refusal(t, r):
    """Returns the sentence that says why a series is not fitted, or None."""
    if len(t) < FEWEST:
        return f'not fitted: {len(t)} finite points, and a fit needs {FEWEST}'
    away = (r - np.median(r)) ** 2
    if np.ptp(r) <= 1e-5 * abs(r).max():
        return f'not fitted: constant at {r.mean():.6g}'
    rest = np.delete(r, away.argmax())
    if ((rest - rest.mean()) ** 2).sum() < 0.05 * ((r - r.mean()) ** 2).sum():
        return f'not fitted: a spike, one point holds the variance, {r[away.argmax()]:.4g} at step {t[away.argmax()]:g}'
    return None


def shape(t, values):
    """t: steps of a dense grid; values: the fitted curve there. Returns its class and the step of half height, or None if it never rises."""
    top, span = int(values.argmax()), np.ptp(values)
    low = int(values[: top + 1].argmin())
    rise, fall = values[top] - values[low], values[top] - values[-1]
    half = float(t[low:][values[low:] >= values[low] + rise / 2][0]) if rise > 0.1 * span else None
    if min(rise, fall) > 0.1 * span:
        return 'early peak', half
    return 'log increase' if values[-1] - values[0] >= 0.5 * span and fall < 0.1 * span else 'neither', half


def fit_group(t, y):
    """t: (n,), y: (S, n), none of them degenerate. Returns a dict for each series, as emergence.json has it."""
    n, first = len(t), t[t > 0][0]
    total = residual(np.zeros((0, n)), y)
    thetas = {
        name: search(columns, box(math.log(first), math.log(t[-1])), t, y)
        for name, (_, columns, box) in FAMILIES.items()
        if columns
    }
    dense = np.unique(np.concatenate([t, np.geomspace(first, t[-1], 400)]))
    fits = []
    for i, r in enumerate(y):
        rss = {name: float(residual(FAMILIES[name][1](theta[i], t), r)) for name, theta in thetas.items()} | {
            'constant': float(total[i])
        }
        floor = 1e-14 * total[i]  # a perfect fit has no AIC
        aic = {
            name: n * math.log(max(rss[name], floor) / n) + 2 * (FAMILIES[name][0] + 1) for name in FAMILIES
        }
        limit = min(('logarithm', 'first order'), key=aic.get)  # β = 0 and A₁ = 0
        clear = aic['f'] < aic[limit] - CLEARLY
        (coefficients, values), (_, monotone) = (
            solve(FAMILIES[name][1], thetas[name][i], t, r, dense) for name in ('f', limit)
        )
        kind, half = shape(dense, values if clear else monotone)
        parameters, peak, why = five(t, thetas['f'][i], coefficients, rss['f'])
        if not clear:
            parameters, peak, why = (
                None,
                None,
                f'not identifiable: f is not clearly better than its limit, the {limit}',
            )
        if min(aic.values()) > aic['constant'] - CLEARLY:
            kind, half, parameters, peak, why = (
                'neither',
                None,
                None,
                None,
                'no trend: no curve is clearly better than a constant',
            )
        fits.append(
            {
                'n': n,
                'r2': number(1 - rss['f'] / total[i]),
                'preferred': min(aic, key=aic.get),
                'aic': {name: number(v) for name, v in aic.items()},
                'curve': {
                    name: float(v)
                    for name, v in zip(
                        ('beta', 'tau', 'A1', 'A2', 'K'), (*np.exp(thetas['f'][i]), *coefficients)
                    )
                },  # in full: as β → 0 they cancel
                'parameters': parameters,
                'note': why,
                'class': kind,
                'peak': peak,
                'half_step': half,
                'first': number(values[0]),
                'top': number(values.max()),
                'final': number(values[-1]),
                'last_step': float(t[-1]),
            }
        )
    return fits


def fit(t, r):
    """t, r: (n,) steps and largest over median. Returns the dict that emergence.json has of a series: the fit, or {"note": why there is none}."""
    return fit_all([Series('', 'h', 0, np.asarray(t, float), np.asarray(r, float))])[0]


def fit_all(series):
    """Returns the fit of each Series. Those of equal steps are searched together, which is most of the speed."""
    fits, groups = [{'n': len(x.t), 'note': refusal(x.t, x.r), 'class': 'neither'} for x in series], {}
    for i, x in enumerate(series):
        if not fits[i]['note']:
            groups.setdefault(tuple(x.t), []).append(i)
    for t, members in groups.items():
        for k in range(0, len(members), 16):  # the grid of a series takes 2 MB
            part = members[k : k + 16]
            for i, found in zip(part, fit_group(np.array(t), np.stack([series[i].r for i in part]))):
                fits[i] = found
    return fits


# ---- Prediction from the architecture

SHAPE = (
    'n_layer',
    'n_head',
    'n_embd',
    'mlp_ratio',
)  # what an architecture is: an arm is not part of it, so that both arms leave together
TARGETS = {  # name → its value in a fit, or None
    'final': lambda f: f['final'] if (f['final'] or 0) > 0 else None,
    'peak_step': lambda f: f['peak'] and f['peak']['value'],
    'half_step': lambda f: f['half_step'] or None,
    **{name: lambda f, name=name: f['parameters'] and f['parameters'][name]['value'] for name in PARAMETERS},
}
ASKED = {
    'final': 'ratio at the end of training',
    'half_step': 'step of half height',
    'peak_step': 'step of the peak',
}


def architecture(model):
    return tuple(model.get(key, 4) for key in SHAPE)  # a model without mlp_ratio has 4


def arm(model, stream):
    return model['residual'] + '+qk_norm' * bool(model.get('qk_norm')) + '/' + stream


def features(model, stream, sublayer, arms):
    """Returns {feature: number} of one sublayer. Architecture alone, and the arm; the depth's powers are each arm's own."""
    L, heads, d, ratio = architecture(model)
    depth = sublayer / (2 * L - 1)
    powers = {'depth': depth, 'depth^2': depth**2, 'depth^3': depth**3}
    mine = {name: float(name == arm(model, stream)) for name in arms}
    return {
        'heads / width': heads / d,
        'MLP ratio': ratio,
        'width / depth': d / L,
        'heads / layers': heads / L,
        'log width': math.log(d),
        'depth x layers': depth * L,
        'layers': L,
        'MLP sublayer': sublayer % 2,
        **{
            f'{name}: {key}': on * value
            for name, on in mine.items()
            for key, value in {'arm': 1, **powers}.items()
        },
    }


def ridge(X, y, penalties):
    """X: (n, p), y: (n, m). Returns (P, p, m) weights and (P, 1, m) intercepts, for each of P penalties, per row and on standardized features."""
    centre, scale = X.mean(0), X.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)  # a feature that is constant says nothing
    Z = (X - centre) / scale
    weights = (
        np.linalg.solve(
            Z.T @ Z + np.multiply.outer(penalties, len(X) * np.eye(X.shape[1])), Z.T @ (y - y.mean(0))
        )
        / scale[:, None]
    )
    return weights, y.mean(0) - centre @ weights[:, None]


def leave_out(groups):
    """groups: (n,) integers. Yields (kept, left out) masks, one pair for each group: all rows of a group leave together."""
    for group in np.unique(groups):
        yield groups != group, groups == group


def choose_penalty(X, y, groups):
    """Returns the penalty with the least error on groups left out, five sets of them."""
    fifth = np.unique(groups, return_inverse=True)[1] % 5
    if fifth.max() < 1:
        return PENALTIES[-1]
    errors = 0
    for kept, left in leave_out(fifth):
        weights, intercepts = ridge(X[kept], y[kept], PENALTIES)
        errors = errors + ((y[left] - X[left] @ weights - intercepts) ** 2).sum((1, 2))
    return PENALTIES[errors.argmin()]


def validate(X, y, groups, inner):
    """Predicts every group by a ridge on the others, whose penalty is chosen on them alone, by leaving out groups of `inner`. Returns (n, m)."""
    predicted = np.full(y.shape, np.nan)
    for kept, left in leave_out(groups):
        (weights,), (intercept,) = ridge(X[kept], y[kept], [choose_penalty(X[kept], y[kept], inner[kept])])
        predicted[left] = X[left] @ weights + intercept
    return predicted


def r_squared(y, predicted):
    total = ((y - y.mean(0)) ** 2).sum()
    return number(1 - ((y - predicted) ** 2).sum() / total) if total > 0 else None


def curve_at(fit, steps):
    """(m,) the fitted curve at these steps."""
    c = fit['curve']
    return design(columns_f, np.log([c['beta'], c['tau']]), steps) @ [c['A1'], c['A2'], c['K']]


def regress(rows, y, arms):
    """rows: [(Series, fit)], y: (n, m). Returns what predictor.json says of one target, and its predictions for left-out architectures."""
    table = [features(x.model, x.stream, x.sublayer, arms) for x, _ in rows]
    X, of_arm = (
        np.array([list(f.values()) for f in table]),
        np.array([arm(x.model, x.stream) for x, _ in rows]),
    )
    groups = np.unique([architecture(x.model) for x, _ in rows], axis=0, return_inverse=True)[1].ravel()
    each = np.arange(len(rows))
    predicted, mixed = (
        validate(X, y, groups, groups),
        validate(X, y, np.random.RandomState(0).permutation(each) % 5, each),
    )
    r2, names = (
        r_squared(y, predicted),
        np.array(['arm and depth' if ':' in key else key for key in table[0]]),
    )
    carried = (
        {
            name: number(r2 - r_squared(y, validate(X[:, names != name], y, groups, groups)))
            for name in dict.fromkeys(names.tolist())
        }
        if r2 is not None
        else {}
    )
    (weights,), (intercept,) = ridge(X, y, [choose_penalty(X, y, groups)])
    return {
        'n': len(rows),
        'architectures': len(set(groups)),
        'r2_architectures_out': r2,
        'r2_random_split': r_squared(y, mixed),
        'r2_of_arm': {
            a: r_squared(y[of_arm == a], predicted[of_arm == a]) for a in arms if (of_arm == a).any()
        },
        'error': number(np.median(abs(y - predicted))),
        'r2_lost_without': dict(sorted(carried.items(), key=lambda item: -item[1])),
        'weights': weights.tolist(),
        'intercept': intercept[0].tolist(),
    }, predicted


def make_predictor(series, fits):
    """Returns predictor.json's content and {target: (rows, actual, predicted)}, on the scale of the regression, for left-out architectures."""
    known = [(x, f) for x, f in zip(series, fits) if x.model and 'curve' in f]
    if len({architecture(x.model) for x, _ in known}) < 3:
        raise UserError(
            '--predict needs fitted runs of at least 3 architectures with known settings: train more with studies/sweep.sh'
        )
    last = Counter(f['last_step'] for _, f in known).most_common(1)[0][0]
    rows = [
        (x, f) for x, f in known if f['last_step'] == last
    ]  # a final ratio at another length of training is another quantity
    if len(rows) < len(known):
        print(
            f'predictor: {len(known) - len(rows)} series that do not end at step {last:g}, as most do, are left out'
        )
    arms = sorted({arm(x.model, x.stream) for x, _ in rows})
    ranges = {key: [min(v), max(v)] for key, v in zip(SHAPE, zip(*(architecture(x.model) for x, _ in rows)))}
    steps = np.unique(np.geomspace(min(x.t[x.t > 0][0] for x, _ in rows), last, 25).round())
    floor = [
        [max(x.r.min(), 1)] for x, _ in rows
    ]  # a fitted curve may undershoot its data; a ratio is positive
    jobs = {'curve': (rows, np.log(np.maximum([curve_at(f, steps) for _, f in rows], floor)))}
    for name, value in TARGETS.items():
        some = [(x, f) for x, f in rows if value(f) is not None]
        jobs[name] = some, (np.arcsinh if name in ('A', 'K') else np.log)([[value(f)] for _, f in some])
    targets, left_out = {}, {}
    for name, (some, y) in jobs.items():
        count = len({architecture(x.model) for x, _ in some})
        if count < 3 or len(some) < 20:
            print(
                f'predictor: {name} is known of {len(some)} series of {count} architectures only: not regressed'
            )
            continue
        targets[name], predicted = regress(some, y, arms)
        left_out[name] = some, y, predicted
    return {
        'schema': 1,
        'arms': arms,
        'last_step': last,
        'range': ranges,
        'targets': targets,
        'steps': steps.tolist(),
    }, left_out


# ---- What is printed


def text(q, digits=3):
    if q is None:
        return '–'
    if isinstance(q, float) and 1000 <= abs(q) < 1e6:
        return f'{q:.0f}'
    return (
        f'{q:.{digits}g}'
        if not isinstance(q, dict)
        else text(q['value'], digits) + f' [{text(q["low"], digits)}, {text(q["high"], digits)}]'
    )


def print_fits(series, fits):
    """A line for each sublayer."""
    for x, f in zip(series, fits):
        print(
            f'\n{x.run}, {x.stream}, sublayer {x.sublayer}: '
            + (
                f['note']
                if 'r2' not in f
                else f'R² {f["r2"]:.3f}, n = {f["n"]}, {f["class"]}'
                + (f', peak at step {text(f["peak"])}' if f['peak'] else '')
                + (f', half height at step {text(f["half_step"])}' if f['half_step'] else '')
            )
        )
        if 'r2' in f:
            print(
                '  AIC '
                + ', '.join(
                    f'{name} (k = {FAMILIES[name][0] + 1}) {v:.1f}' + '*' * (name == f['preferred'])
                    for name, v in f['aic'].items()
                )
            )
            print('  ' + (f['note'] or ', '.join(f'{name} {text(q)}' for name, q in f['parameters'].items())))


def ranks(x):
    """Ranks from 0, ties at their mean."""
    return ((x < x[:, None]).sum(1) + (x <= x[:, None]).sum(1) - 1) / 2


def summarize(series, fits):
    """Returns a dict for each run and stream: what emergence.json and the table say of it."""
    summary = []
    for run, stream in dict.fromkeys((x.run, x.stream) for x in series):
        of = [(x, f) for x, f in zip(series, fits) if (x.run, x.stream) == (run, stream)]
        good = [f for _, f in of if 'r2' in f]
        r2, peak, half = (
            [f['r2'] for f in good],
            [f['peak']['value'] for f in good if f['peak']],
            [f['half_step'] for f in good if f['half_step']],
        )
        summary.append(
            {
                'run': run,
                'stream': stream,
                'sublayers': len(of),
                'fitted': len(good),
                'r2': number(np.mean(r2)) if r2 else None,
                'r2_least': min(r2, default=None),
                'f_preferred': sum(f['preferred'] == 'f' for f in good),
                'identifiable': sum(f['parameters'] is not None for f in good),
                'peak': number(np.median(peak)) if peak else None,
                'half_step': number(np.median(half)) if half else None,
                'loss_half_step': of[0][0].loss_half,
                'classes': {name: sum(f['class'] == name for _, f in of) for name in CLASSES},
            }
        )
    return summary


def print_summary(summary):
    print(
        f'\n{"run":28}{"stream":8}{"fitted":>9}{"mean R²":>9}{"least":>8}{"f best":>8}{"five":>6}{"peak":>8}{"half":>8}{"loss half":>11}   {" / ".join(CLASSES)}'
    )
    for s in summary:
        fitted, parts = f'{s["fitted"]}/{s["sublayers"]}', ' / '.join(map(str, s['classes'].values()))
        print(
            f'{s["run"]:28.27}{s["stream"]:8}{fitted:>9}{text(s["r2"]):>9}{text(s["r2_least"]):>8}{s["f_preferred"]:>8}{s["identifiable"]:>6}'
            f'{text(s["peak"]):>8}{text(s["half_step"]):>8}{text(s["loss_half_step"]):>11}   {parts}'
        )
    print(
        'f best: sublayers where f has the lowest AIC; five: where all parameters are identifiable; peak, half: median step over the sublayers'
    )
    for stream in dict.fromkeys(s['stream'] for s in summary):
        of = [s for s in summary if s['stream'] == stream and s['fitted']]
        if of:
            n, r2 = sum(s['fitted'] for s in of), sum(s['fitted'] * s['r2'] for s in of)
            line = f'{stream}: mean R² {r2 / n:.3f} over {n} sublayers of {len(of)} runs'
            both = np.array(
                [(s['half_step'], s['loss_half_step']) for s in of if s['half_step'] and s['loss_half_step']]
            )
            if len(both) >= 8 and np.ptp(both, 0).all():
                line += f'; half height and half of the loss: rank correlation {np.corrcoef(*map(ranks, both.T))[0, 1]:.2f} over {len(both)} runs'
            print(line)
    print(
        'published mean R², Pythia, one h: ' + ', '.join(f'{size} {r2}' for size, r2 in PUBLISHED_R2.items())
    )


def print_predictor(predictor):
    print(
        f'\n{"target":12}{"series":>8}{"R² archs out":>14}{"R² random":>11}{"typical error":>15}   R² of each arm; what R² loses without a feature'
    )
    for name, p in predictor['targets'].items():
        print(
            f'{name:12}{p["n"]:>8}{text(p["r2_architectures_out"]):>14}{text(p["r2_random_split"]):>11}{"x " + text(math.exp(p["error"])):>15}   '
            + ', '.join(f'{a} {text(v, 2)}' for a, v in p['r2_of_arm'].items())
            + '; '
            + ', '.join(f'{k} {v:.2f}' for k, v in list(p['r2_lost_without'].items())[:3])
        )
    print(
        'R² and errors are on a log scale, of A and K on that of arcsinh: x 1.3 is wrong by 30%. archs out: whole architectures, both arms and all streams; '
        'random: the published kind of split, five parts'
    )


def print_expected(predictor, model, stream):
    """Prints the curve that is expected of each sublayer, and what a person asks for."""
    X = np.array(
        [list(features(model, stream, s, predictor['arms']).values()) for s in range(2 * model['n_layer'])]
    )
    expected = {
        name: np.exp(X @ np.array(target['weights']) + target['intercept'])
        for name, target in predictor['targets'].items()
        if name in ('curve', *ASKED)
    }
    settings = dict(zip(SHAPE, architecture(model)))
    outside = [
        f'{key} = {v}, seen {low} to {high}'
        for (key, v), (low, high) in zip(settings.items(), predictor['range'].values())
        if not low <= v <= high
    ]

    def row(head, values):
        return f'{head:>12}' + ''.join(f'{text(float(v)):>8}' for v in values)

    print(
        f'{arm(model, stream)}, {", ".join(f"{key} = {v}" for key, v in settings.items())}: expected largest over median, a row for each step, a column for each sublayer'
    )
    if outside:
        print(f'outside of what was trained: {"; ".join(outside)}')
    print(row('step', range(len(X))))
    for step, values in zip(predictor['steps'], expected['curve'].T):
        print(row(f'{step:.0f}', values))
    for name in [name for name in ASKED if name in expected]:
        out = predictor['targets'][name]
        print(
            row(name, expected[name][:, 0])
            + f'   typical error x {text(math.exp(out["error"]))}, R² {text(out["r2_architectures_out"])} on architectures left out'
            + ' (of sublayers that have a peak inside training)' * (name == 'peak_step')
        )


# ---- Figures


def draw_curves(run, rows, path):
    """rows: [(Series, fit)] of one run. A row of panels for each stream, at most six sublayers of it: points and fits."""
    streams = {}
    for x, f in rows:
        streams.setdefault(x.stream, []).append((x, f))
    chosen = {
        stream: [of[round(i)] for i in np.linspace(0, len(of) - 1, min(6, len(of)))]
        for stream, of in streams.items()
    }
    width = max(map(len, chosen.values()))
    title = f'{run}\nlargest over median, with fits, {width} of {max(map(len, streams.values()))} sublayers'
    with figure(path, title, len(chosen), width, (max(2.6, 5.2 / width), 2.3)) as axes:
        for (stream, pairs), line in zip(chosen.items(), np.array(list(axes)).reshape(len(chosen), width)):
            for axis, (x, f) in zip(line, pairs):
                first = x.t[x.t > 0][0] if (x.t > 0).any() else 1
                axis.plot(
                    x.t, x.r, 'o', markersize=3, color=STREAM_STYLE.get(stream, {}).get('color', '#000000')
                )
                if 'curve' in f:
                    t = np.concatenate(
                        [np.linspace(0, first, 30), np.geomspace(first, x.t[-1], 300)]
                    )  # the axis is even up to the first step
                    axis.plot(t[t >= x.t[0]], curve_at(f, t[t >= x.t[0]]), color='#D55E00', linewidth=1.2)
                if f.get('peak'):
                    axis.axvline(f['peak']['value'], color='#999999', linestyle=':')
                axis.set_title(
                    f'{stream}, {("attn", "mlp")[x.sublayer % 2]} {x.sublayer}'
                    + (f': R² {f["r2"]:.3f}' if 'r2' in f else ': no fit'),
                    fontsize='small',
                )
                axis.set_xscale('symlog', linthresh=first)
                axis.set(xlim=(-0.3 * first, 1.5 * x.t[-1]), ylim=(min(0, x.r.min()), None))
                axis.set_xlabel('step', fontsize='small')
                axis.grid(alpha=0.3)
            line[0].set_ylabel('largest ÷ median entry', fontsize='small')
            for axis in line[len(pairs) :]:
                axis.set_visible(False)


def draw_peaks(series, fits, path):
    """A panel for each stream: a row for each run, the relative depth across, the colour the step of the peak; grey where none lies inside training."""
    from matplotlib.colors import LogNorm

    steps = {}  # stream → run → [(sublayer, step of its peak)]
    for x, f in zip(series, fits):
        steps.setdefault(x.stream, {}).setdefault(x.run, []).append(
            (x.sublayer, f['peak']['value'] if f.get('peak') else math.nan)
        )
    peaks = [f['peak']['value'] for f in fits if f.get('peak')]
    norm = LogNorm(min(peaks, default=1), max(max(peaks, default=1), 1.01 * min(peaks, default=1)))
    tall = max(map(len, steps.values()))
    several = len(set(peaks)) > 1
    title = f'step at which largest over median peaks\n{len(peaks)} of {len(fits)} sublayers{"" if several or not peaks else f", step {text(peaks[0])}"}; grey: no peak inside training'
    with figure(path, title, 1, len(steps), (max(5, 6 / len(steps)), 1.8 + 0.22 * tall)) as axes:
        for (stream, runs), axis in zip(steps.items(), axes):
            for y, row in enumerate(runs.values()):
                edges, colours = (
                    np.linspace(0, 1, len(row) + 1),
                    np.ma.masked_invalid([[v for _, v in sorted(row)]]),
                )
                mesh = axis.pcolormesh(
                    edges,
                    [y - 0.45, y + 0.45],
                    colours,
                    norm=norm,
                    cmap='cividis',
                    edgecolors='white',
                    linewidth=0.3,
                )
            axis.set(
                title=stream,
                xlabel='relative depth (first to last sublayer)',
                xlim=(0, 1),
                ylim=(len(runs) - 0.5, -0.5),
                facecolor='#DDDDDD',
            )
            axis.set_yticks(range(len(runs)), runs, fontsize='x-small')
        if several:
            bar = axis.figure.colorbar(
                mesh,
                ax=list(axis.figure.axes),
                label='step of the peak',
                ticks=np.geomspace(norm.vmin, norm.vmax, 5),
                format=lambda v, _: text(float(v)),
            )
            bar.minorticks_off()


def draw_predicted(left_out, shown, path):
    """Predicted against actual for left-out architectures, a panel for each target shown."""
    with figure(
        path,
        'predicted from the architecture alone,\neach architecture left out in turn',
        1,
        len(shown),
        (4.2, 4),
    ) as axes:
        for axis, name in zip(axes, shown):
            rows, y, predicted = left_out[name]
            for stream in dict.fromkeys(x.stream for x, _ in rows):
                mine = [x.stream == stream for x, _ in rows]
                axis.plot(
                    np.exp(y[mine, 0]),
                    np.exp(predicted[mine, 0]),
                    markersize=4,
                    alpha=0.6,
                    **{**STREAM_STYLE.get(stream, {'marker': 'o'}), 'linestyle': ''},
                    label=stream,
                )
            ends = np.exp(np.quantile(y, (0, 1)))
            axis.plot(ends, ends, color='#999999', linewidth=1, zorder=0)
            axis.set(
                title=f'{ASKED[name]}: R² {text(r_squared(y, predicted), 2)}',
                xlabel='actual (fitted curve)',
                ylabel='predicted',
                xscale='log',
                yscale='log',
            )
            ticks = [float(f'{v:.2g}') for v in np.geomspace(*ends, 4)]
            for side in (axis.xaxis, axis.yaxis):
                side.set_ticks(ticks, map('{:g}'.format, ticks))
            axis.minorticks_off()  # their labels overprint
            axis.grid(alpha=0.3)
        axes[0].legend(title='stream')


# ---- The command


def predict_arch(args):
    """--arch=n_layer=6,n_embd=256,n_head=8[,mlp_ratio=4,residual=ledger,stream=C,qk_norm=True]"""
    model = {'mlp_ratio': 4, 'residual': 'baseline', 'stream': '', 'qk_norm': 'False'}
    for part in args.arch.split(','):
        key, equals, value = part.partition('=')
        if (
            not equals
            or key not in (*SHAPE, *model)
            or key in SHAPE
            and not (value.isdecimal() and int(value))
        ):
            raise UserError(
                f'--arch: {part!r} is not one of n_layer=, n_embd=, n_head= and, if wanted, mlp_ratio=, each with a whole number, residual=, stream=, qk_norm='
            )
        model[key] = int(value) if key in SHAPE else value
    if missing := [key for key in SHAPE if key not in model]:
        raise UserError(f'--arch={args.arch} lacks {", ".join(missing)}: like n_layer=6,n_embd=256,n_head=8')
    if model['qk_norm'] not in ('True', 'False'):
        raise UserError(f'--arch: qk_norm is {model["qk_norm"]}: expected True or False')
    model['qk_norm'] = model['qk_norm'] == 'True'
    stream = model.pop('stream') or getattr(RESIDUALS.get(model['residual']), 'decoded', '')
    try:
        predictor = json.loads(args.predictor.read_text())
        if arm(model, stream) not in predictor['arms']:
            raise UserError(
                f'--arch: {args.predictor} knows {", ".join(predictor["arms"])}, not {arm(model, stream)}: name residual= and stream='
            )
        print_expected(predictor, model, stream)
    except OSError as error:
        raise UserError(
            f'cannot read {args.predictor} ({error.strerror}): make it with python -m studies.emergence results/emergence/sweep.jsonl --predict --out=results/emergence/sweep'
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{args.predictor} is not a predictor that --predict wrote of 20 series or more ({error}): make it again'
        ) from None


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='*', type=Path, help='folders of runs, or files written with --pack')
    parser.add_argument(
        '--csv',
        type=Path,
        help='series from elsewhere: columns step, sublayer, top1, median and, if wanted, stream, run',
    )
    parser.add_argument(
        '--pack',
        nargs='+',
        type=Path,
        help='write these runs to the file --out, a line each, and do nothing else',
    )
    parser.add_argument(
        '--out',
        type=Path,
        help="folder for emergence.json, predictor.json and figures (default: the first run's own, or that above several); of --pack the file",
    )
    parser.add_argument('--predict', action='store_true', help='regress on the architecture')
    parser.add_argument(
        '--arch',
        help='print the curve expected of n_layer=…,n_embd=…,n_head=…[,mlp_ratio=4,residual=ledger,stream=C]',
    )
    parser.add_argument(
        '--predictor',
        type=Path,
        default=Path(__file__).parent / 'results/emergence/sweep/predictor.json',
        help='what --arch reads (default: that in results/emergence/sweep)',
    )
    args = parser.parse_args(argv)
    if not (args.runs or args.csv or args.pack or args.arch):
        raise UserError('nothing to read: name runs, like out/ledger_demo, or --csv=FILE, --pack, --arch')
    if args.pack and not args.out:
        raise UserError('--pack needs the file to write: --out=results/emergence/sweep.jsonl')
    return args


def write_packed(args):
    lines = [
        json.dumps(packed, separators=(',', ':')) + '\n' for path in args.pack for packed in read_runs(path)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out, 'w') as file:
        file.writelines(lines)
    print(f'written: {args.out}, {len(lines)} runs, {sum(map(len, lines)):,} bytes')


def analyse(args):
    runs = [packed for path in args.runs for packed in read_runs(path)]
    series, of_csv = [x for packed in runs for x in series_of(packed)], read_csv(args.csv) if args.csv else []
    if twice := [
        name
        for name, count in Counter([*(packed['run'] for packed in runs), *{x.run for x in of_csv}]).items()
        if count > 1
    ]:
        raise UserError(f'two runs are named {", ".join(twice)}: rename a folder')
    series = [x for x in series + of_csv if len(x.t)]
    if not series:
        raise UserError(
            'what was named holds no finite largest over median: name runs that train.py made, or a csv that has lines'
        )
    source = args.runs[0] if args.runs else args.csv
    out = args.out or (source if source.is_dir() and len(args.runs) == 1 else source.resolve().parent)
    out.mkdir(parents=True, exist_ok=True)
    fits = fit_all(series)
    summary, names = summarize(series, fits), list(dict.fromkeys(x.run for x in series))
    if len(names) <= 4:
        print_fits(series, fits)
    print_summary(summary)
    written = ['emergence.json', 'peaks.png']
    report = {
        'schema': 1,
        'ratio': ' and '.join(['max_over_median'] * bool(runs) + ['csv: top1 / median'] * bool(args.csv)),
        'summary': summary,
        'published_r2': PUBLISHED_R2,
        'series': [
            {'run': x.run, 'stream': x.stream, 'sublayer': x.sublayer, **f} for x, f in zip(series, fits)
        ],
    }
    if args.predict:
        predictor, left_out = make_predictor(series, fits)
        print_predictor(predictor)
        with atomic_write(out / 'predictor.json', 'w') as file:
            json.dump(predictor, file)
        report['prediction'] = {
            name: {k: v for k, v in p.items() if k not in ('weights', 'intercept')}
            for name, p in predictor['targets'].items()
        }
        written.append('predictor.json')
        if shown := [name for name in ASKED if name in left_out]:
            draw_predicted(left_out, shown, out / 'predicted.png')
            written.append('predicted.png')
    with atomic_write(out / 'emergence.json', 'w') as file:
        json.dump(report, file)
    draw_peaks(series, fits, out / 'peaks.png')
    kinds = {}
    for name in names:
        kinds.setdefault(frozenset(s['stream'] for s in summary if s['run'] == name), []).append(name)
    for name in [name for alike in kinds.values() for name in alike[:2]]:  # all are in emergence.json
        written.append(f'curves_{name.replace("/", "_")}.png')
        draw_curves(name, [(x, f) for x, f in zip(series, fits) if x.run == name], out / written[-1])
    print(f'written: {os.path.relpath(out)}/{", ".join(written)}')


def main(argv=None):
    try:
        args = parse_arguments(argv)
        (predict_arch if args.arch else write_packed if args.pack else analyse)(args)
    except OSError as error:
        sys.exit(
            f'error: cannot write {error.filename or "the output"} ({error.strerror}): name another place with --out'
        )
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
