"""
Predicts when the outlier emerges from the architecture alone, and says how well.

    python -m studies.predict results/emergence/sweep.jsonl --out=out/sweep    regress on the architecture
    python -m studies.predict --arch=n_layer=6,n_embd=256,n_head=8,residual=ledger,stream=C

The series are those of studies.emergence. A ridge regression predicts from the shape of the model and from
the arm: the value at the end of training, the step of half height, the step of the peak, the five parameters
and the whole curve. Whole architectures are left out in turn, with both arms and all of their streams, so no
prediction has seen its own architecture. Beside it stands the published kind of split, which is random.
"""

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

from data.loader import UserError, atomic_write
from figures import STREAM_STYLE, figure
from measure import number
from model import RESIDUALS
from studies.curves import PARAMETERS, curve_at, fit_all
from studies.emergence import command, output_folder, read_series, text

PREDICTOR = Path(__file__).resolve().parent.parent / 'results/emergence/sweep/predictor.json'
PENALTIES = 10.0 ** np.arange(-3, 2)  # of ridge, per row, on standardized features
# What an architecture is. An arm is not part of it, so that both arms leave together.
SHAPE = ('n_layer', 'n_head', 'n_embd', 'mlp_ratio')
ASKED = {  # what a person asks for, and how a figure calls it
    'final': 'ratio at the end of training',
    'half_step': 'step of half height',
    'peak_step': 'step of the peak',
}
TARGETS = (*ASKED, *PARAMETERS)
FEWEST_ARCHITECTURES, FEWEST_SERIES = 3, 20  # that a target must be known of


def target_value(fitted, name):
    """Returns the value of a target in a fit, or None where the fit does not have it."""
    if name == 'final':
        return fitted['final'] if (fitted['final'] or 0) > 0 else None
    if name == 'half_step':
        return fitted['half_step'] or None
    if name == 'peak_step':
        return fitted['peak']['value'] if fitted['peak'] else None
    return fitted['parameters'][name]['value'] if fitted['parameters'] else None


def architecture(model):
    """Returns the shape of a model. One without mlp_ratio has 4."""
    return tuple(model.get(key, 4) for key in SHAPE)


def arm(model, stream):
    """Returns the name of an arm and a stream: 'ledger/C', 'baseline+qk_norm/h'."""
    suffix = '+qk_norm' if model.get('qk_norm') else ''
    return f'{model["residual"]}{suffix}/{stream}'


def features(model, stream, sublayer, arms):
    """Returns {feature: number} of one sublayer: the architecture, and the arm with its own powers of the
    depth."""
    L, heads, d, ratio = architecture(model)
    depth = sublayer / (2 * L - 1)
    found = {
        'heads / width': heads / d,
        'MLP ratio': ratio,
        'width / depth': d / L,
        'heads / layers': heads / L,
        'log width': math.log(d),
        'depth x layers': depth * L,
        'layers': L,
        'MLP sublayer': sublayer % 2,
    }
    mine = arm(model, stream)
    for name in arms:
        is_mine = float(name == mine)
        for key, value in (('arm', 1), ('depth', depth), ('depth^2', depth**2), ('depth^3', depth**3)):
            found[f'{name}: {key}'] = is_mine * value
    return found


def ridge(X, y, penalties):
    """X: (n, p), y: (n, m). Returns (P, p, m) weights and (P, 1, m) intercepts for each of P penalties.

    A penalty is per row, and on standardized features."""
    centre, scale = X.mean(0), X.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)  # a feature that is constant says nothing
    Z = (X - centre) / scale
    penalty = np.multiply.outer(penalties, len(X) * np.eye(X.shape[1]))
    weights = np.linalg.solve(Z.T @ Z + penalty, Z.T @ (y - y.mean(0))) / scale[:, None]
    return weights, y.mean(0) - centre @ weights[:, None]


def leave_out(groups):
    """groups: (n,) integers. Yields (kept, left out) masks, a pair for each group: all rows of a group leave
    together."""
    for group in np.unique(groups):
        yield groups != group, groups == group


def choose_penalty(X, y, groups):
    """Returns the penalty with the least error on groups that are left out, in five sets."""
    fifth = np.unique(groups, return_inverse=True)[1] % 5
    if fifth.max() < 1:
        return PENALTIES[-1]
    errors = 0
    for kept, left_out in leave_out(fifth):
        weights, intercepts = ridge(X[kept], y[kept], PENALTIES)
        errors = errors + ((y[left_out] - X[left_out] @ weights - intercepts) ** 2).sum((1, 2))
    return PENALTIES[errors.argmin()]


def validate(X, y, groups, inner):
    """Predicts every group by a ridge on the others, whose penalty is chosen on them alone, by leaving out
    groups of `inner`. Returns (n, m)."""
    predicted = np.full(y.shape, np.nan)
    for kept, left_out in leave_out(groups):
        penalty = choose_penalty(X[kept], y[kept], inner[kept])
        (weights,), (intercept,) = ridge(X[kept], y[kept], [penalty])
        predicted[left_out] = X[left_out] @ weights + intercept
    return predicted


def r_squared(y, predicted):
    """Returns the share of the variance that is predicted, or None where there is no variance."""
    total = ((y - y.mean(0)) ** 2).sum()
    return number(1 - ((y - predicted) ** 2).sum() / total) if total > 0 else None


def lost_without(X, y, groups, names, r2):
    """names: (p,), the feature that each column belongs to. Returns {feature: what R² loses without it}, most
    first."""
    if r2 is None:
        return {}
    lost = {}
    for name in dict.fromkeys(names.tolist()):
        others = X[:, names != name]
        lost[name] = number(r2 - r_squared(y, validate(others, y, groups, groups)))
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def regress(rows, y, arms):
    """rows: [(Series, fit)], y: (n, m). Returns what predictor.json says of one target, and its predictions
    for architectures that are left out."""
    table = [features(x.model, x.stream, x.sublayer, arms) for x, _ in rows]
    X = np.array([list(row.values()) for row in table])
    names = np.array(['arm and depth' if ':' in key else key for key in table[0]])
    arm_of_row = np.array([arm(x.model, x.stream) for x, _ in rows])
    shapes = [architecture(x.model) for x, _ in rows]
    groups = np.unique(shapes, axis=0, return_inverse=True)[1].ravel()
    each = np.arange(len(rows))

    predicted = validate(X, y, groups, groups)
    of_random_split = validate(X, y, np.random.RandomState(0).permutation(each) % 5, each)
    r2 = r_squared(y, predicted)
    r2_of_arm = {}
    for name in arms:
        mine = arm_of_row == name
        if mine.any():
            r2_of_arm[name] = r_squared(y[mine], predicted[mine])
    (weights,), (intercept,) = ridge(X, y, [choose_penalty(X, y, groups)])
    return {
        'n': len(rows),
        'architectures': len(set(groups)),
        'r2_architectures_out': r2,
        'r2_random_split': r_squared(y, of_random_split),
        'r2_of_arm': r2_of_arm,
        'error': number(np.median(abs(y - predicted))),
        'r2_lost_without': lost_without(X, y, groups, names, r2),
        'weights': weights.tolist(),
        'intercept': intercept[0].tolist(),
    }, predicted


def rows_of_one_length(series, fits):
    """Returns [(Series, fit)] of what can be regressed, and the step at which all of it ends.

    A ratio at the end of another length of training is another quantity."""
    known = [(x, f) for x, f in zip(series, fits) if 'residual' in (x.model or {}) and 'curve' in f]
    if len({architecture(x.model) for x, _ in known}) < FEWEST_ARCHITECTURES:
        raise UserError(
            f'a regression needs fitted runs of at least {FEWEST_ARCHITECTURES} architectures: '
            'train more with python -m studies.sweep'
        )
    last = Counter(f['last_step'] for _, f in known).most_common(1)[0][0]
    rows = [(x, f) for x, f in known if f['last_step'] == last]
    if len(rows) < len(known):
        print(f'{len(known) - len(rows)} series that do not end at step {last:g}, as most do, are left out')
    return rows, last


def targets_of(rows, steps):
    """Yields (name, rows that have the target, its values (n, m) on the scale of the regression)."""
    # a fitted curve may undershoot its data, and a ratio is positive
    least = [[max(x.r.min(), 1)] for x, _ in rows]
    yield 'curve', rows, np.log(np.maximum([curve_at(f, steps) for _, f in rows], least))
    for name in TARGETS:
        having = [(x, f) for x, f in rows if target_value(f, name) is not None]
        to_scale = np.arcsinh if name in ('A', 'K') else np.log  # these two may be negative
        yield name, having, to_scale([[target_value(f, name)] for _, f in having])


def make_predictor(series, fits):
    """Returns predictor.json's content and {target: (rows, actual, predicted)} for architectures that are
    left out."""
    rows, last = rows_of_one_length(series, fits)
    arms = sorted({arm(x.model, x.stream) for x, _ in rows})
    shapes = zip(*(architecture(x.model) for x, _ in rows))
    first = min(x.t[x.t > 0][0] for x, _ in rows)
    steps = np.unique(np.geomspace(first, last, 25).round())
    targets, left_out = {}, {}
    for name, having, y in targets_of(rows, steps):
        count = len({architecture(x.model) for x, _ in having})
        if count < FEWEST_ARCHITECTURES or len(having) < FEWEST_SERIES:
            print(f'{name} is known of {len(having)} series of {count} architectures only: not regressed')
            continue
        targets[name], predicted = regress(having, y, arms)
        left_out[name] = having, y, predicted
    return {
        'schema': 1,
        'arms': arms,
        'last_step': last,
        'range': {key: [min(values), max(values)] for key, values in zip(SHAPE, shapes)},
        'targets': targets,
        'steps': steps.tolist(),
    }, left_out


# ---- What is printed and drawn


def print_predictor(predictor):
    """Prints a row for each target, then what the columns mean."""
    row = '{:12}{:>8}{:>14}{:>11}{:>15}   {}'
    head = ('target', 'series', 'R² archs out', 'R² random', 'typical error')
    print('\n' + row.format(*head, 'R² of each arm; what R² loses without a feature'))
    for name, p in predictor['targets'].items():
        of_arms = ', '.join(f'{key} {text(v, 2)}' for key, v in p['r2_of_arm'].items())
        lost = ', '.join(f'{key} {v:.2f}' for key, v in list(p['r2_lost_without'].items())[:3])
        error = f'x {text(math.exp(p["error"]))}'
        r2 = text(p['r2_architectures_out']), text(p['r2_random_split'])
        print(row.format(name, p['n'], *r2, error, f'{of_arms}; {lost}'))
    print('R² and errors are on a log scale, of A and K on that of arcsinh: x 1.3 is wrong by 30%.')
    print(
        'archs out: whole architectures, both arms and all streams. random: five random parts, as published.'
    )


def expected_values(predictor, model, stream):
    """Returns {target: (2 · n_layer, m)}: what the predictor expects of every sublayer."""
    table = [features(model, stream, s, predictor['arms']) for s in range(2 * model['n_layer'])]
    X = np.array([list(row.values()) for row in table])
    expected = {}
    for name, target in predictor['targets'].items():
        if name == 'curve' or name in ASKED:
            expected[name] = np.exp(X @ np.array(target['weights']) + target['intercept'])
    return expected


def print_expected(predictor, model, stream):
    """Prints the curve that is expected of each sublayer, and what a person asks for."""
    expected = expected_values(predictor, model, stream)
    settings = dict(zip(SHAPE, architecture(model)))
    outside = []
    for (key, value), (low, high) in zip(settings.items(), predictor['range'].values()):
        if not low <= value <= high:
            outside.append(f'{key} = {value}, seen {low} to {high}')

    def print_row(head, values, extra=''):
        print(f'{head:>12}' + ''.join(f'{text(float(v)):>8}' for v in values) + extra)

    print(f'{arm(model, stream)}, {", ".join(f"{key} = {v}" for key, v in settings.items())}:')
    print('expected largest over median, a row for each step, a column for each sublayer')
    if outside:
        print(f'outside of what was trained: {"; ".join(outside)}')
    print_row('step', range(2 * model['n_layer']))
    for step, values in zip(predictor['steps'], expected['curve'].T):
        print_row(f'{step:.0f}', values)
    for name in ASKED:
        if name not in expected:
            continue
        target = predictor['targets'][name]
        error, r2 = text(math.exp(target['error'])), text(target['r2_architectures_out'])
        extra = f'   typical error x {error}, R² {r2} on architectures left out'
        if name == 'peak_step':
            extra += ' (of sublayers that have a peak inside training)'
        print_row(name, expected[name][:, 0], extra)


def draw_predicted(left_out, shown, path):
    """Predicted against actual for architectures that are left out, a panel for each target shown."""
    title = 'predicted from the architecture alone,\neach architecture left out in turn'
    with figure(path, title, 1, len(shown), (4.2, 4)) as axes:
        for axis, name in zip(axes, shown):
            rows, y, predicted = left_out[name]
            for stream in dict.fromkeys(x.stream for x, _ in rows):
                mine = [x.stream == stream for x, _ in rows]
                style = {**STREAM_STYLE.get(stream, {'marker': 'o'}), 'linestyle': ''}
                points = np.exp(y[mine, 0]), np.exp(predicted[mine, 0])
                axis.plot(*points, markersize=4, alpha=0.6, label=stream, **style)
            ends = np.exp(np.quantile(y, (0, 1)))
            axis.plot(ends, ends, color='#999999', linewidth=1, zorder=0)
            axis.set(
                title=f'{ASKED[name]}: R² {text(r_squared(y, predicted), 2)}', xscale='log', yscale='log'
            )
            axis.set(xlabel='actual (fitted curve)', ylabel='predicted')
            ticks = [float(f'{v:.2g}') for v in np.geomspace(*ends, 4)]
            for side in (axis.xaxis, axis.yaxis):
                side.set_ticks(ticks, map('{:g}'.format, ticks))
            axis.minorticks_off()  # their labels overprint
            axis.grid(alpha=0.3)
        axes[0].legend(title='stream')


# ---- The command


def parse_architecture(words):
    """words: the text of --arch. Returns the model's settings as a dict, and the stream."""
    model = {'mlp_ratio': 4, 'residual': 'baseline', 'stream': '', 'qk_norm': 'False'}
    for part in words.split(','):
        key, equals, value = part.partition('=')
        is_known = equals and key in (*SHAPE, *model)
        is_whole = value.isdecimal() and int(value) > 0
        if not is_known or key in SHAPE and not is_whole:
            raise UserError(
                f'--arch: {part!r} is not one of n_layer=, n_embd=, n_head= and, if wanted, mlp_ratio=, '
                'each with a whole number, residual=, stream=, qk_norm='
            )
        model[key] = int(value) if key in SHAPE else value
    missing = [key for key in SHAPE if key not in model]
    if missing:
        raise UserError(f'--arch={words} lacks {", ".join(missing)}: like n_layer=6,n_embd=256,n_head=8')
    if model['qk_norm'] not in ('True', 'False'):
        raise UserError(f'--arch: qk_norm is {model["qk_norm"]}: expected True or False')
    model['qk_norm'] = model['qk_norm'] == 'True'
    stream = model.pop('stream') or getattr(RESIDUALS.get(model['residual']), 'decoded', '')
    return model, stream


def print_architecture(words, path):
    """Prints what the predictor in `path` expects of the architecture that the text of --arch describes."""
    model, stream = parse_architecture(words)
    try:
        predictor = json.loads(path.read_text())
        if arm(model, stream) not in predictor['arms']:
            known = ', '.join(predictor['arms'])
            raise UserError(
                f'--arch: {path} knows {known}, not {arm(model, stream)}: name residual= and stream='
            )
        print_expected(predictor, model, stream)
    except OSError as error:
        raise UserError(
            f'cannot read {path} ({error.strerror}): make it with '
            'python -m studies.predict results/emergence/sweep.jsonl --out=results/emergence/sweep'
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} is not a predictor that studies.predict wrote ({error}): make it again'
        ) from None


def fit_and_regress(args):
    """Fits the runs, regresses on their architectures, and writes predictor.json, prediction.json and a
    figure."""
    series = read_series(args.runs)
    out = output_folder(args)
    predictor, left_out = make_predictor(series, fit_all(series))
    print_predictor(predictor)
    for name, content in (('predictor', predictor), ('prediction', without_weights(predictor))):
        with atomic_write(out / f'{name}.json', 'w') as file:
            json.dump(content, file)
    written = ['predictor.json', 'prediction.json']
    shown = [name for name in ASKED if name in left_out]
    if shown:
        draw_predicted(left_out, shown, out / 'predicted.png')
        written.append('predicted.png')
    print(f'written: {os.path.relpath(out)}/{", ".join(written)}')


def without_weights(predictor):
    """Returns {target: how well it is predicted}."""
    kept = {}
    for name, target in predictor['targets'].items():
        kept[name] = {key: value for key, value in target.items() if key not in ('weights', 'intercept')}
    return kept


def run(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'runs', nargs='*', type=Path, help='folders of runs, or files of studies.emergence --pack'
    )
    parser.add_argument('--out', type=Path, help="folder for what is written (default: the first run's own)")
    parser.add_argument(
        '--arch', help='print what to expect of n_layer=…,n_embd=…,n_head=…[,residual=,stream=]'
    )
    parser.add_argument('--predictor', type=Path, default=PREDICTOR, help='what --arch reads')
    args = parser.parse_args(argv)
    if args.arch:
        print_architecture(args.arch, args.predictor)
    elif args.runs:
        fit_and_regress(args)
    else:
        raise UserError('nothing to read: name runs, like results/emergence/sweep.jsonl, or --arch=')


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
