"""
Does the outlier's onset go with a drop in the loss of some class of tokens?

    python train.py config/baseline_160m.py --snapshots=0,128,256,512,768,1024,1536,2048,3072,4100 …
    python -m studies.onset --ckpt out/baseline_160m

Looks at the snapshots of a run, and at its log at the same steps. onset.json has, for every class of
predicted tokens, its loss at each snapshot and the step at which half of its fall is done; for every stream
the largest start ratio and fixed-dimension ratio over its sublayers, and the step at which half of their way
is done. It sets them beside each other by Spearman's rank correlation, over the intervals between snapshots:
the growth of the ratio's logarithm, and the class's share in the fall of the mean loss. A share is the
class's own fall over the mean's, since everything falls early. A share of nearly nothing is noise, so
intervals in which the mean falls by less than 0.01 nats are left out, and those in which a ratio is not
finite.

The p-value is two-sided, over 10,000 permutations of the intervals. Among C classes a p of 1 / C comes by
chance.
"""

import json
import math
from pathlib import Path

import numpy as np

from checkpoint import check_run_arguments, open_runs, read_log, run_parser
from data.loader import UserError, atomic_write
from figures import HEADLINES, STREAM_STYLE, figure
from measure import command, number, sequences_at_once
from studies import science
from studies.edits import evaluate
from studies.emergence import text
from studies.intervene import label

RATIOS = ('start_ratio', 'fixed_dim_ratio')
COLOURS = (
    '#000000',
    '#E69F00',
    '#56B4E9',
    '#009E73',
    '#CC79A7',
    '#0072B2',
    '#D55E00',
    '#F0E442',
    '#999999',
)  # Okabe and Ito 2008, and grey
FEWEST = 5  # snapshots: with fewer, a rank correlation over the intervals says nothing
LEAST_FALL = 0.01  # nats: losses nearer than this count as matched


def halfway(steps, values):
    """Returns the step at which a series has first gone half of its way from its first to its last value, by
    interpolation, or None."""
    points = [(t, v) for t, v in zip(steps, values) if math.isfinite(v)] or [(0, 0)]
    steps, values = np.array(points, float).T
    way = (values - values[0]) / ((values[-1] - values[0]) or math.inf)
    i = int((way >= 0.5).argmax())
    return number(np.interp(0.5, way[i - 1 : i + 1], steps[i - 1 : i + 1])) if i else None


def spearman(x, y):
    """x, y: (n,). Returns their rank correlation and its p-value, or two None where one is constant or
    short."""
    if len(x) < FEWEST - 1 or not np.ptp(x) or not np.ptp(y):
        return None, None
    return number(science.rank_correlation(x, y)), number(science.rank_correlation_p(x, y))


def set_beside(growth, fall, by_class):
    """growth: (n,) of a ratio's logarithm between snapshots; fall: (n,) of the mean loss there; by_class:
    {class: its loss (n + 1,)}. Returns {class: its rank correlation and p}, and how many intervals it is
    over."""
    use = (fall > LEAST_FALL) & np.isfinite(growth)
    found = {}
    for kind, loss in by_class.items():
        share = -np.diff(loss)[use] / fall[use]
        found[kind] = dict(zip(('rank_correlation', 'p'), spearman(growth[use], share)))
    return found, int(use.sum())


def analyse(steps, by_class, mean, ratios):
    """steps: (n,); by_class: {class: (n,) loss}; mean: (n,) loss; ratios: {(stream, name): (n,)}. Returns
    what onset.json says."""
    streams, classes = [], {}
    for (stream, name), r in ratios.items():
        found, intervals = set_beside(np.diff(np.log(r)), -np.diff(mean), by_class)
        streams.append(
            {
                'stream': stream,
                'ratio': name,
                'values': [number(v) for v in r],
                'half_way': halfway(steps, r),
                'intervals': intervals,
                'with': found,
            }
        )
    for name, loss in by_class.items():
        classes[name] = {'loss': [number(v) for v in loss], 'half_fall': halfway(steps, loss)}
    return {
        'steps': [int(t) for t in steps],
        'loss': [number(v) for v in mean],
        'streams': streams,
        'classes': classes,
    }


def draw(name, report, path):
    """Above, the loss of every class; below, the ratios of every stream."""
    title = f'{name}\nwhen classes of tokens are learned, and when the outlier comes'
    with figure(path, title, 2, 1, (7.5, 3.2)) as (above, below):
        for i, (kind, c) in enumerate(report['classes'].items()):
            style = dict(marker='os^Dv<>Px'[i % 9], markersize=4, color=COLOURS[i % 9])
            above.plot(report['steps'], c['loss'], label=kind, **style)
        above.set(ylabel='loss (nats per token)')
        for s in report['streams']:
            line = '-' if s['ratio'] == RATIOS[0] else '--'
            style = {'markersize': 4, **STREAM_STYLE.get(s['stream'], {}), 'linestyle': line}
            below.plot(report['steps'], s['values'], label=f'{s["stream"]}, {HEADLINES[s["ratio"]]}', **style)
        below.set(ylabel='ratio, largest over sublayers', xlabel='step')
        for axis in (above, below):
            axis.set_xscale('symlog', linthresh=100)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))


def snapshots_of(folder):
    """Returns {step: path} of the snapshots of a run that are in its log, and {step: line of the log}."""
    log = {line['iter']: line for line in read_log(folder / 'log.jsonl')}
    paths = {int(path.stem[5:]): path for path in folder.glob('ckpt_*.pt') if path.stem[5:].isdecimal()}
    steps = sorted(set(log) & set(paths))
    if len(steps) < FEWEST:
        raise UserError(
            f'{folder} holds {len(steps)} snapshots that are in its log, and this needs {FEWEST}: '
            'train with --snapshots=0,128,256,… at steps that are evaluated'
        )
    return {step: paths[step] for step in steps}, log


def losses_of_snapshots(paths, args):
    """Returns the losses at every snapshot, a list of (N, T), the classes of the predicted tokens (N, T), and
    their names."""
    args.ckpt = list(map(str, paths))
    losses = []
    for run in open_runs(args):
        starts = run.tokens.fixed_starts(args.sequences, args.seed)
        if not losses:
            kinds, names = label(run.tokens, starts, run.meta)[0]['class']
        batch = sequences_at_once(run.model, args.device, run.tokens.block_size)
        losses.append(evaluate(run.model, run.tokens, starts, (), None, batch)[0])
    return losses, kinds, names


def largest(values):
    """Returns the largest of the values that are there, or NaN."""
    return max((v for v in values if v is not None), default=math.nan)


def ratios_of(log, steps):
    """Returns {(stream, ratio): (n,)}: the largest over the sublayers at each step."""
    found = {}
    for stream in log[steps[0]]['streams']:
        for name in RATIOS:
            found[stream, name] = np.array([largest(log[step]['streams'][stream][name]) for step in steps])
    return found


def print_stream(s):
    """Prints when a ratio has gone half of its way, and the class of tokens that it goes with most."""
    line = f'{s["stream"]} {HEADLINES[s["ratio"]]}: '
    if s['half_way']:
        first, *_, last = [v for v in s['values'] if v is not None]
        line += f'half of its {"rise" if last > first else "fall"} at step {text(s["half_way"])}'
    else:
        line += 'stands still'
    kind, best = min(s['with'].items(), key=lambda item: item[1]['p'] or 2)
    if best['p']:
        rho, p = text(best['rank_correlation'], 2), text(best['p'], 2)
        line += f'; most like {kind}: rank correlation {rho}, p {p}'
    else:
        line += '; no rank correlation'
    print(line + f' over {s["intervals"]} intervals and {len(s["with"])} classes')


def run(argv):
    parser = run_parser(__doc__, sequences=64, writes='onset.json and its figure')
    args = parser.parse_args(argv)
    check_run_arguments(args, sequences=1)
    for folder in map(Path, args.ckpt):
        paths, log = snapshots_of(folder)
        steps = list(paths)
        losses, kinds, names = losses_of_snapshots(paths.values(), args)
        by_class = {}
        for i, name in enumerate(names):
            if (kinds == i).any():
                by_class[name] = np.array([loss[kinds == i].mean() for loss in losses])
        mean = np.array([loss.mean() for loss in losses])
        report = {
            'checkpoint': str(folder),
            'sequences': len(kinds),
            **analyse(np.array(steps), by_class, mean, ratios_of(log, steps)),
        }
        for s in report['streams']:
            print_stream(s)
        out = args.out / folder.name if args.out else folder
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / 'onset.json', 'w') as file:
            json.dump(report, file, indent=1)
        draw(folder.name, report, out / 'onset.png')
        print(f'written: {out}/onset.json, onset.png')


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
