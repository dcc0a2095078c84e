"""
Draws what several runs say together, from packed files alone.

    python -m studies.overview results/english
    python -m studies.overview results/demo_long results/comparison_160m results/comparison_290m --out=results

A figure whose runs are not there is left out. All but scale.png are of one scale:

    depth_<scale>.png    the decoded stream of the four published arms along the depth
    axes_<scale>.png     C of a rotated ledger on its own axes and on D's
    dose_<scale>.png     C against α, the price of committing
    onset_<scale>.png    when the start-token outlier appears, over training and depth, first seed
    commits_<scale>.png  what each sublayer adds to C, by the identity and by the map, first seed
    scale.png            the decoded stream at several scales
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np

from data.loader import UserError, interrupts_exit, user_errors_exit
from figures import HEADLINES, figure
from report import COUNTS_FROM, TIMES_UNTRAINED
from studies.results import DOSE, SCALES, by_scale, runs_in, significant
from studies.verdicts import ON_AXES_OF_D

SIGNATURE = ('start_token_concentration', 'persistence', 'fixed_dim_ratio', 'start_ratio')
ALONG = {
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_ratio': 'start ratio',
    'start_token_concentration': 'start-token concentration',
}
COLORS = {'baseline': '#000000', 'qknorm': '#E69F00', 'ledger': '#0072B2', 'ledger_hs': '#CC79A7'}
MARKERS = 'os^D'
FEWEST_DOSES = 3
# Arms that the figure of the onset leaves out: shorter cosines, and doses of α, which have their own figure.
NOT_IN_ONSET = re.compile(r'baseline_short.*|ledger_a(?!0$)[\d.]+')


def value_or_nan(x):
    return math.nan if x is None else x


def scale_by_logarithm(axis):
    """A logarithmic axis with the values 1, 2, 3 and 5 of each power of ten written out."""
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_formatter(lambda x, _: f'{x:g}' if f'{x:.0e}'[0] in '235' else '')


# ---- Along the depth


def draw_line(axis, stream, key, color, label):
    """One stream along the depth, with hollow markers where its norm is less than a tenth of its largest."""
    norms = np.array([value_or_nan(sublayer['norm']) for sublayer in stream['sublayers']])
    values = np.array([value_or_nan(sublayer[key]) for sublayer in stream['sublayers']])
    full = norms >= COUNTS_FROM * np.nanmax(norms)
    depth = np.arange(len(values))
    axis.plot(depth, values, color=color, linewidth=0.8)
    axis.plot(depth[full], values[full], 'o', color=color, markersize=3, label=label)
    axis.plot(depth[~full], values[~full], 'o', color=color, markersize=3, markerfacecolor='white')


def draw_along(lines, title, path):
    """lines: [(label, color, stream of measure.json)]. A panel for each quantity of ALONG."""
    with figure(path, title, 1, len(ALONG), (4.2, 3.2)) as axes:
        for axis, (key, name) in zip(axes, ALONG.items()):
            labelled = set()
            for label, color, stream in lines:
                draw_line(axis, stream, key, color, None if label in labelled else label)
                labelled.add(label)
            axis.set(title=name, xlabel='sublayer (even: attention, odd: MLP)')
            scale_by_logarithm(axis)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)


def depth_lines(runs):
    """Returns the decoded streams of the four published arms, a line for every seed."""
    return [
        (f'{arm}: {run.decoded}', COLORS[arm], run.measure['streams'][run.decoded])
        for (arm, _), run in runs.items()
        if arm in COLORS
    ]


def axes_lines(runs):
    """Returns C on its own axes and on D's, and D, of the rotated ledgers."""
    shown = {'C': ('C on its own axes', '#0072B2'), 'D': ('D', '#E69F00')}
    shown[ON_AXES_OF_D] = "C on D's axes", '#009E73'
    return [
        (*shown[name], stream)
        for (arm, _), run in runs.items()
        if ON_AXES_OF_D in run.measure['streams'] and arm.startswith('rotated_commit')
        for name, stream in run.measure['streams'].items()
    ]


# ---- Against α


def doses_by_seed(runs):
    """Returns {seed: [ledgers that differ in α alone, in its order]} without seeds that have fewer than two,
    and {} where all seeds together have fewer than FEWEST_DOSES values of α."""
    found = {}
    for (arm, seed), run in sorted(runs.items(), key=lambda item: item[0][1]):
        if DOSE.fullmatch(arm):
            found.setdefault(seed, []).append(run)
    found = {
        seed: sorted(group, key=lambda run: run.alpha) for seed, group in found.items() if len(group) > 1
    }
    alphas = {run.alpha for group in found.values() for run in group}
    return found if len(alphas) >= FEWEST_DOSES else {}


def final_commit_rate(run):
    """Returns the mean of the commit gates at the end of training as a headline, or None."""
    rates = run.log[-1]['commit_rate'] if run.log else []
    return {'value': sum(rates) / len(rates), 'low': None, 'high': None} if rates else None


def draw_point(axis, x, headline, **style):
    """One value, with its interval where it has one."""
    if headline is None or headline['value'] is None:
        return
    around = None
    if None not in (headline['low'], headline['high']):
        below, above = headline['value'] - headline['low'], headline['high'] - headline['value']
        around = [[max(0, below)], [max(0, above)]]
    axis.errorbar([x], [headline['value']], yerr=around, capsize=2, markersize=4, **style)


def draw_doses(by_seed, scale, path):
    panels = {
        'mean commit gate at the end': final_commit_rate,
        'loss (nats per token)': lambda run: run.measure['loss'],
    }
    panels |= {HEADLINES[key]: lambda run, key=key: run.measure['streams']['C'][key] for key in SIGNATURE}
    title = f'{scale} ledger, C: against the price of committing; bars: 95% intervals over sequences'
    alphas = sorted({run.alpha for group in by_seed.values() for run in group})
    with figure(path, title, 2, 3, (3.6, 2.9)) as axes:
        for axis, (name, value_of) in zip(axes, panels.items()):
            for i, (seed, group) in enumerate(by_seed.items()):
                color, marker = list(COLORS.values())[i % 4], MARKERS[i % 4]
                points = [value_of(run) for run in group]
                values = [value_or_nan(point and point['value']) for point in points]
                axis.plot(
                    [run.alpha for run in group], values, color=color, linewidth=0.8, label=f'seed {seed}'
                )
                for run, point in zip(group, points):
                    draw_point(axis, run.alpha, point, color=color, marker=marker)
            axis.set(title=name, xlabel='α')
            axis.set_xscale('symlog', linthresh=0.02)
            axis.set_xticks(alphas, minor=False)
            axis.xaxis.set_major_formatter('{x:g}')
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)


# ---- Across scales


def draw_scales(runs, path):
    """runs: [Run] of several scales. A panel for each quantity of the signature, a point for each seed."""
    title = 'the decoded stream across scales; bars: 95% intervals over sequences'
    with figure(path, title, 1, len(SIGNATURE), (3.2, 3.0)) as axes:
        for axis, key in zip(axes, SIGNATURE):
            for i, (arm, color) in enumerate(COLORS.items()):
                seen = dict.fromkeys(SCALES, 0)
                for run in (run for run in runs if run.arm == arm):
                    x = SCALES.index(run.scale) + (i - 1.5) * 0.16 + 0.03 * seen[run.scale]
                    label = None if any(seen.values()) else arm
                    seen[run.scale] += 1
                    style = dict(color=color, marker=MARKERS[i], linestyle='none', label=label)
                    draw_point(axis, x, run.measure['streams'][run.decoded][key], **style)
            axis.set(title=HEADLINES[key], xlim=(-0.5, len(SCALES) - 0.5))
            axis.set_xticks(range(len(SCALES)), SCALES)
            if key != 'persistence':
                scale_by_logarithm(axis)
            axis.grid(alpha=0.3, axis='y')
        axes[0].legend(fontsize=7)


# ---- Over training


def onset_panels(runs):
    """Returns [(title, log, stream)] of the first seed."""
    seed = min(seed for _, seed in runs)
    return [
        (f'{run.name}: {stream}', run.log, stream)
        for (arm, other), run in runs.items()
        if other == seed and run.log and not NOT_IN_ONSET.fullmatch(arm)
        for stream in run.log[0]['streams']
    ]


def over_training(log, stream, key):
    """Returns (S, lines) numpy: a quantity by sublayer and line of the log."""
    return np.array([list(map(value_or_nan, line['streams'][stream][key])) for line in log]).T


def draw_onset(panels, path, key='start_ratio'):
    """Heat maps over training and depth. A line marks where the largest is TIMES_UNTRAINED that of step 0."""
    from matplotlib.colors import LogNorm

    data = [over_training(log, stream, key) for _, log, stream in panels]
    norm = LogNorm(min(np.nanmin(x) for x in data), max(np.nanmax(x) for x in data))
    columns = min(3, len(panels))
    title = f'{HEADLINES[key]} (largest ÷ median dimension at position 0) during training, along the depth'
    with figure(path, title, math.ceil(len(panels) / columns), columns, (4, 2.9)) as axes:
        axes = list(axes)
        for axis, (name, log, _), x in zip(axes, panels, data):
            steps, peak = [line['iter'] for line in log], np.nanmax(x, 0)
            reached = (step for step, v in zip(steps, peak) if v >= TIMES_UNTRAINED * peak[0])
            onset = next(reached, None)
            edges = [*steps, steps[-1] * 1.15 + 1]  # a column reaches from its step to the next
            mesh = axis.pcolormesh(edges, np.arange(len(x) + 1) - 0.5, x, norm=norm, cmap='cividis')
            axis.set_xscale('symlog', linthresh=1)
            axis.xaxis.set_major_formatter('{x:g}')
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel='training step', ylabel='sublayer')
            said = 'never' if onset is None else f'first at step {onset}:'
            axis.set_title(f"{name}\n{said} {TIMES_UNTRAINED} × step 0's largest", fontsize='medium')
            if onset is not None:
                axis.axvline(onset, color='white', linestyle='--', linewidth=1)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        nice = [n * 10.0**k for k in range(-2, 6) for n in (1, 1.5, 2, 3, 5, 7)]
        ticks = [tick for tick in nice if norm.vmin <= tick <= norm.vmax]
        aspect = 15 * len(axes) // columns
        bar = axes[0].figure.colorbar(mesh, ax=axes, aspect=aspect, ticks=ticks, format='{x:g}')
        bar.set_label(HEADLINES[key])
        bar.minorticks_off()


# ---- What C is made of


def committed(runs):
    """Returns {run's name: its commits after the last sublayer} of the first seed that has any."""
    found = [
        (run.seed, run.name, run.controls['commits']['last'])
        for run in runs.values()
        if run.controls and 'commits' in run.controls
    ]
    first = min((seed for seed, _, _ in found), default=None)
    return {name: last for seed, name, last in found if seed == first}


def draw_share(axis, place, others, title):
    """Bars: what each sublayer adds by identity and by map, as a share of the mean magnitude.
    The line is the same for other dimensions."""
    parts = {'identity: c · D': 'identity', 'map: c · U_P V_P D': 'map'}
    x = np.arange(len(place['identity']))
    for offset, color, (label, part) in zip((-0.2, 0.2), ('#0072B2', '#D55E00'), parts.items()):
        share = np.array(list(map(value_or_nan, place[part]))) / place['magnitude']
        axis.bar(x + offset, share, 0.4, color=color, label=label)
    if others:
        both = [(a + b) / others['magnitude'] for a, b in zip(others['identity'], others['map'])]
        axis.plot(x, both, color='#000000', marker='.', linewidth=1, label='both, other dimensions')
    axis.set_title(title, fontsize='medium')
    axis.set(xlabel='committing sublayer', ylabel='share')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.axhline(0, color='#999999', linewidth=0.8)
    axis.grid(alpha=0.3)


def draw_commits(found, path):
    """found: {run's name: its commits}. At (position 0, j0), and over all positions at j*."""
    places = {'start_at_start_dim': 'position 0, j0', 'mean_at_dominant': 'all positions, j*'}
    title = 'C after the last sublayer: what each sublayer commits, share of the mean magnitude'
    with figure(path, title, len(found), 2, (5.5, 2.8)) as axes:
        for i, (name, last) in enumerate(found.items()):
            for axis, (place, label) in zip(axes[2 * i : 2 * i + 2], places.items()):
                magnitude = significant(last[place]['magnitude'], 3)
                others = last.get(place.split('_at_')[0] + '_at_others')
                text = f'{name}: {label} = {last[place]["dim"]}, mean |C| = {magnitude}'
                draw_share(axis, last[place], others, text)
        axes[0].legend(fontsize='small')


def draw_scale(scale, group, out):
    """group: {(arm, seed): run} of one scale. Draws the figures whose runs are there; yields the paths."""
    seeds = 'one line a seed, hollow where the stream is nearly empty'
    depth = f'{scale}: the decoded stream along the depth; {seeds}'
    axes = f'{scale}, commits through a rotation: C along the depth; {seeds}'
    figures = {
        'depth': (depth_lines(group), lambda lines, path: draw_along(lines, depth, path)),
        'axes': (axes_lines(group), lambda lines, path: draw_along(lines, axes, path)),
        'dose': (doses_by_seed(group), lambda doses, path: draw_doses(doses, scale, path)),
        'onset': (onset_panels(group), draw_onset),
        'commits': (committed(group), draw_commits),
    }
    for name, (found, draw) in figures.items():
        if found:
            path = out / f'{name}_{scale}.png'
            draw(found, path)
            yield path


def draw_all(runs, out):
    """runs: [Run]. Draws every figure whose runs are there; yields the paths."""
    for scale, group in by_scale(runs).items():
        yield from draw_scale(scale, group, out)
    if len({run.scale for run in runs if run.arm in COLORS}) > 1:
        draw_scales(runs, out / 'scale.png')
        yield out / 'scale.png'


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='+', type=Path, help='sets of runs: <arm>_<scale>_<seed>/ in each')
    parser.add_argument('--out', type=Path, help='folder for the figures (default: the set, if it is one)')
    args = parser.parse_args(argv)
    with interrupts_exit(), user_errors_exit():
        if len(args.folders) > 1 and not args.out:
            raise UserError('several sets are drawn together: name a folder for the figures with --out')
        runs = [run for folder in args.folders for run in runs_in(folder)]
        out = args.out or args.folders[0]
        out.mkdir(parents=True, exist_ok=True)
        for path in draw_all(runs, out):
            print(f'written: {path}')


if __name__ == '__main__':
    main()
