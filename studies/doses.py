"""
Draws what several runs say together, from the files in results/ alone; a figure whose runs are not there yet is left out.

    python -m studies.doses

Of results/ itself these are the sets named in SETS; of another folder, all of its sets.

dose_<scale>.png  the decoded stream of the ledger against α, the price of committing: runs ledger, ledger_hs and ledger_a<α> of one scale, every seed
scale.png         the decoded stream's signature at demo, 160m and 290m, per arm, every seed
"""

import argparse
import json
import re
import sys
from pathlib import Path

from checkpoint import read_log
from data.loader import UserError
from figures import HEADLINES, figure

RESULTS = Path(__file__).resolve().parent.parent / 'results'
SIGNATURE = ('start_token_concentration', 'persistence', 'fixed_dim_ratio', 'start_ratio')
SCALES = ('demo', '160m', '290m')
ARMS = {'baseline': '#000000', 'qknorm': '#E69F00', 'ledger': '#0072B2', 'ledger_hs': '#CC79A7'}
FEWEST_DOSES = 3
SETS = 'demo_long,comparison_160m,comparison_290m'  # of runs that differ in arm, seed, α and scale alone


def read_runs(folder, sets='*'):
    """Returns a list of the runs in these sets below folder: {'arm', 'scale', 'seed', 'alpha' or None, 'loss' and the signature as headlines, 'commit_rate' or None}."""
    runs = []
    for path in sorted(
        path for name in sets.split(',') for path in Path(folder).glob(f'{name}/*/measure.json')
    ):
        match = re.fullmatch(rf'(.+)_({"|".join(SCALES)})(?:_(\d+))?', path.parent.name)
        if not match:
            continue
        try:
            report, log = json.loads(path.read_text()), read_log(path.with_name('log.jsonl'))
            decoded = next(s for s in report['streams'].values() if s['decoded'])
            rate = log[-1]['commit_rate'] if log else []
            runs.append(
                {
                    'arm': match[1],
                    'scale': match[2],
                    'seed': match[3] or '',
                    'alpha': report['model'].get('commit_sparsity')
                    if report['model']['residual'] == 'ledger'
                    else None,
                    'loss': report['loss'],
                    'commit_rate': sum(rate) / len(rate) if rate else None,
                    **{key: decoded[key] for key in SIGNATURE},
                }
            )
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise UserError(
                f'{path} is not a whole measurement ({error}): make it again with python measure.py'
            ) from None
    return runs


def doses(runs, scale):
    """Returns the runs of one scale that differ in α alone, in its order: {seed: [run]}, seeds with fewer than two left out; {} if there are too few doses."""
    some = [
        run for run in runs if run['scale'] == scale and re.fullmatch(r'ledger(_hs|_a[\d.]+)?', run['arm'])
    ]
    by_seed = {
        seed: sorted((run for run in some if run['seed'] == seed), key=lambda run: run['alpha'])
        for seed in sorted({run['seed'] for run in some})
    }
    by_seed = {seed: mine for seed, mine in by_seed.items() if len(mine) > 1}
    return by_seed if len({run['alpha'] for mine in by_seed.values() for run in mine}) >= FEWEST_DOSES else {}


def draw_point(axis, x, headline, **style):
    """One value with its interval, where it has one."""
    if headline is None or headline['value'] is None:
        return
    around = (
        None
        if None in (headline['low'], headline['high'])
        else [[max(0, headline['value'] - headline['low'])], [max(0, headline['high'] - headline['value'])]]
    )
    axis.errorbar([x], [headline['value']], yerr=around, capsize=2, markersize=4, **style)


def draw_doses(by_seed, scale, path):
    panels = {
        'commit_rate': 'mean commit gate at the end',
        'loss': 'loss (nats per token)',
        **{key: HEADLINES[key] for key in SIGNATURE},
    }
    with figure(
        path,
        f'{scale} ledger, C: against the price of committing; bars: 95% intervals over sequences',
        2,
        3,
        (3.6, 2.9),
    ) as axes:
        for axis, (key, name) in zip(axes, panels.items()):
            for i, (seed, runs) in enumerate(by_seed.items()):
                style = dict(color=list(ARMS.values())[i % 4], marker='os^D'[i % 4])
                at = [run['alpha'] for run in runs]
                points = [
                    {'value': run[key], 'low': None, 'high': None} if key == 'commit_rate' else run[key]
                    for run in runs
                ]
                axis.plot(
                    at,
                    [p['value'] for p in points],
                    color=style['color'],
                    linewidth=0.8,
                    label=f'seed {seed}',
                )
                for x, p in zip(at, points):
                    draw_point(axis, x, p, **style)
            axis.set(title=name, xlabel='α')
            axis.set_xscale('symlog', linthresh=0.02)
            axis.set_xticks(sorted({run['alpha'] for runs in by_seed.values() for run in runs}), minor=False)
            axis.xaxis.set_major_formatter('{x:g}')
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)


def draw_scales(runs, path):
    with figure(
        path,
        'the decoded stream across scales; bars: 95% intervals over sequences',
        1,
        len(SIGNATURE),
        (3.2, 3.0),
    ) as axes:
        for axis, key in zip(axes, SIGNATURE):
            for i, (arm, color) in enumerate(ARMS.items()):
                mine = [run for run in runs if run['arm'] == arm]
                for j, run in enumerate(mine):
                    draw_point(
                        axis,
                        SCALES.index(run['scale'])
                        + (i - 1.5) * 0.16
                        + 0.03 * sum(other['scale'] == run['scale'] for other in mine[:j]),
                        run[key],
                        color=color,
                        marker='os^D'[i],
                        linestyle='none',
                        label=arm if j == 0 else None,
                    )
            axis.set(
                title=HEADLINES[key],
                xticks=range(len(SCALES)),
                xticklabels=SCALES,
                xlim=(-0.5, len(SCALES) - 0.5),
            )
            if key != 'persistence':
                axis.set_yscale('log')
                axis.yaxis.set_major_formatter('{x:g}')
                axis.yaxis.set_minor_formatter(lambda x, _: f'{x:g}' if f'{x:.0e}'[0] in '235' else '')
            axis.grid(alpha=0.3, axis='y')
        axes[0].legend(fontsize=7)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Draws what several runs say together.')
    parser.add_argument(
        'folder',
        nargs='?',
        type=Path,
        default=RESULTS,
        help='one that holds <set>/<arm>_<scale>[_<seed>]/ (default: where this file is)',
    )
    parser.add_argument('--out', type=Path, help='folder for the figures (default: the same)')
    args = parser.parse_args(argv)
    out = args.out or args.folder
    try:
        runs = read_runs(args.folder, SETS if args.folder == RESULTS else '*')
        if not runs:
            raise UserError(
                f'there is no <set>/<arm>_<scale>/measure.json in {args.folder}: make them with bash studies/recipe.sh'
            )
        out.mkdir(parents=True, exist_ok=True)
        for scale in SCALES:
            if by_seed := doses(runs, scale):
                draw_doses(by_seed, scale, out / f'dose_{scale}.png')
                print(f'written: {out}/dose_{scale}.png')
        if len({run['scale'] for run in runs if run['arm'] in ARMS}) > 1:
            draw_scales(runs, out / 'scale.png')
            print(f'written: {out}/scale.png')
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
