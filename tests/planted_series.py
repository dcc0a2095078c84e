"""Series with planted parameters, which the tests of the curve, of emergence and of its prediction share."""

import itertools
import json
import math

import numpy as np

from studies.curves import Series, curve_at

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


def curve(t, A, lam, gamma, t0, K):
    x = gamma * t + t0  # Gallego-Feliciano et al. 2025, eq. 7
    return A * np.exp(-lam * x) * np.log(x) + K


LEDGER = {'residual': 'ledger', 'n_layer': 1, 'n_head': 2, 'n_embd': 64, 'mlp_ratio': 4, 'qk_norm': False}


def write_log(folder, model_args=None, steps=STEPS, streams=('D', 'C')):
    """Makes a run's folder as train.py leaves it, with planted curves in two sublayers of each stream."""
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


SHAPES = list(itertools.product((1, 2, 3), (64, 128, 256), (2, 4)))


def made_up(shapes, arms=(('baseline', 'h'), ('ledger', 'D'), ('ledger', 'C')), peak=lambda model: 2000):
    """Returns series without noise and their fits, as a sweep would give them.

    peak: from the model's settings to the step of the peak."""
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
                # f peaks where v log v = 1 / βτ, at v = 1 + t / τ
                beta, tau = 0.28537 / at, 0.01 * at / 0.28537
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
                        curve_at(found, t),
                        model,
                    )
                )
                fits.append(found)
    return series, fits


def sweep_file(path, shapes=SHAPES[1:13:2]):
    """Writes the runs of made_up as studies.emergence packs them."""
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
