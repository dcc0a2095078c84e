"""
The standard pictures of a run and of several, drawn from measure.json, comparison.json and log.jsonl alone.

    python figures.py out/          draws again whatever measure.py has measured below out/

- profile: every stream along the depth, with 95% intervals; dotted, the untrained model. A marker is hollow
  where
  the stream holds less than a tenth of its largest norm: a statistic of a nearly empty stream says little;
- landscape: mean magnitude over position and dimension where the dominant dimension is largest;
- series: the loss and the largest value over the sublayers in the course of training;
- comparison: the decoded stream of each run, at its largest and at the last sublayer.
"""

import machine

import argparse
import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from checkpoint import read_log
from data.loader import UserError, atomic_write, interrupts_exit, user_errors_exit

HEADLINES = {  # key → name in tables and figures. All but the two persistences belong to one sublayer.
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_ratio': 'start ratio',
    'start_token_concentration': 'start-token conc.',
    'start_dim_concentration': 'start-dimension conc.',
    'relative_start_concentration': 'relative start conc.',
    'relative_start_token_concentration': 'the same of j*',
    'relative_start_dim_concentration': 'the same of j0',
    'persistence': 'persistence',
    'start_persistence': 'start persistence',
    'kurtosis': 'kurtosis',
    'max_over_median': 'max over median',
    'top1_at_start': 'top-1 at start',
    'massive_count': 'massive count',
    'median': 'median',
    'norm': 'norm',
    'start_norm': 'start norm',
    'share_of_norm': 'share of norm',
    'read_share': 'read share',
}
UNPRINTED = ('relative_start_token_concentration', 'relative_start_dim_concentration')
COMPARED = (
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'relative_start_concentration',
    'persistence',
    'kurtosis',
    'max_over_median',
)
PROFILE = {  # what a figure shows of every sublayer, with its unit
    'fixed_dim_ratio': 'largest ÷ median dimension',
    'start_ratio': 'largest ÷ median dimension',
    'start_token_concentration': 'position 0 ÷ mean over positions',
    'relative_start_concentration': '÷ that of the median dimension',
    'kurtosis': 'excess kurtosis',
    'max_over_median': 'largest ÷ median entry',
    'norm': 'mean L2 norm of a token',
    'start_norm': 'position 0 ÷ mean over positions',
}
NEARLY_EMPTY = 0.1  # share of norm below which a marker is hollow

# Colours that stay apart in grey and for colour-blind readers. Okabe and Ito 2008.
STREAM_STYLE = {
    'h': dict(color='#000000', marker='o'),
    'D': dict(color='#E69F00', marker='s', linestyle='--'),
    'C': dict(color='#0072B2', marker='^'),
    'C_unrotated': dict(color='#009E73', marker='D', linestyle='-.'),
    's0': dict(color='#E69F00', marker='s', linestyle='--'),
    's1': dict(color='#D55E00', marker='v', linestyle='--'),
    'sum': dict(color='#0072B2', marker='^'),
}
OTHER_STREAMS = (
    dict(color='#009E73', marker='D', linestyle='-.'),
    dict(color='#CC79A7', marker='v', linestyle='-.'),
    dict(color='#D55E00', marker='P', linestyle='-.'),
)


def short(x, digits):
    """x with so many significant digits in at most digits + 5 characters; '–' for None."""
    if x is None:
        return '–'
    if x == 0 or 0.01 <= abs(x) < 10**digits:
        return f'{x:.{digits}g}'
    if 1 <= abs(x) < 99_999:
        return f'{x:.0f}'
    return f'{x:.{digits - 2}e}'.replace('e+0', 'e').replace('e-0', 'e-')


def cell(q):
    """'12.3 [11.9, 12.8]' of an interval; a dash in the place of what it lacks."""
    if q['value'] is None:
        return '–'
    ends = '–' if q['low'] is None and q['high'] is None else f'[{short(q["low"], 3)}, {short(q["high"], 3)}]'
    return f'{short(q["value"], 4)} {ends}'


def plain(text):
    """The text as it stands: matplotlib would read what is between two $ as mathematics."""
    return text.replace('$', r'\$')


def stream_style(stream):
    return STREAM_STYLE.get(stream) or OTHER_STREAMS[sum(map(ord, stream)) % len(OTHER_STREAMS)]


def floats(values):
    """Returns a float array, NaN for None, which matplotlib leaves out."""
    return np.array([math.nan if v is None else v for v in values], float)


def import_matplotlib():
    """Imports matplotlib, which training does not need, without the backend that a notebook leaves in the
    environment: figures are written to files, and no window is opened."""
    backend = os.environ.pop('MPLBACKEND', None)
    try:
        import matplotlib.figure
    finally:
        if backend is not None:
            os.environ['MPLBACKEND'] = backend
    return matplotlib


@contextmanager
def figure(path, title, rows, columns, size):
    """Gives the axes of a figure, flat, and writes it to `path`, whatever settings of matplotlib the user
    has. size: (width, height) of one panel in inches."""
    matplotlib = import_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figsize = (size[0] * columns, size[1] * rows)
        drawing = matplotlib.figure.Figure(figsize=figsize, layout='constrained')
        axes = drawing.subplots(rows, columns, squeeze=False)
        drawing.suptitle(plain(title))
        yield list(axes.flat)
        with atomic_write(path) as file:
            drawing.savefig(file, format='png', dpi=130)


def scale(values):
    """How an axis that shows these values is best scaled: evenly, unless they span more than a factor of
    twenty."""
    wide = max(map(abs, values)) > 20 * min(map(abs, values))
    if not wide or max(values) <= 20:
        return 'linear'
    return 'log' if min(values) > 0 else 'symlog'


def round_ticks(axis, whole=False):
    """Gives an axis (axes.xaxis or axes.yaxis), linear or logarithmic, a few ticks at round numbers.
    whole: at whole numbers alone. Call it when everything is drawn."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

    linear = MaxNLocator(5, steps=(1, 2, 5, 10), integer=whole)
    if axis.get_scale() == 'log':
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        if decades > 0.7:
            steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
            ticks = LogLocator(10, steps).tick_values(low, high)
        else:
            ticks = linear.tick_values(low, high)
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_minor_formatter(NullFormatter())
    elif axis.get_scale() == 'linear':
        axis.set_major_locator(linear)
    axis.set_major_formatter('{x:.6g}')


def draw_line(axis, x, values, stream, low=None, high=None, hollow=()):
    """One stream in one panel. low, high: the ends of its intervals. hollow: where it is nearly empty."""
    style, values = stream_style(stream), floats(values)
    axis.plot(x, values, label=plain(stream), markersize=3.5, **style)
    if low is not None:
        axis.fill_between(x, floats(low), floats(high), color=style['color'], alpha=0.2, linewidth=0)
    emptied = {**style, 'linestyle': '', 'markerfacecolor': 'white'}
    axis.plot([x[i] for i in hollow], values[list(hollow)], markersize=3.5, **emptied)


def finish_panel(axis, key, xlabel):
    """Title, unit, scale and ticks of a panel that shows one quantity of PROFILE."""
    shown = [line.get_ydata() for line in axis.get_lines()]
    finite = [v for values in shown for v in values if math.isfinite(v)]
    axis.set(title=HEADLINES[key], xlabel=xlabel, ylabel=PROFILE[key], yscale=scale(finite or [1]))
    axis.grid(alpha=0.3)
    round_ticks(axis.yaxis)


def draw_profile(name, report, path):
    """Every stream of a report along the depth, a panel for each quantity of PROFILE."""
    step = f', iteration {report["iter_num"]}' if 'iter_num' in report else ''
    untrained = report.get('untrained', {}).get('streams', {})
    note = '; dotted: untrained' if untrained else ''
    title = f'{name}{step}: along the depth. Bands: 95% intervals; hollow: nearly empty{note}'
    with figure(path, title, 2, math.ceil(len(PROFILE) / 2), (3.5, 2.8)) as axes:
        for axis, key in zip(axes, PROFILE):
            for stream, s in report['streams'].items():
                draw_profile_line(axis, key, stream, s['sublayers'])
                if key in untrained.get(stream, {}):
                    before = floats(untrained[stream][key])
                    axis.plot(before, color=stream_style(stream)['color'], linestyle=':', linewidth=1.2)
            finish_panel(axis, key, 'sublayer')
            round_ticks(axis.xaxis, whole=True)
        axes[0].legend()


def draw_profile_line(axis, key, stream, sublayers):
    """One quantity of one stream over its sublayers."""
    ends = [sublayer.get('intervals', {}).get(key, (None, None)) for sublayer in sublayers]
    low, high = zip(*ends)
    shares = [sublayer.get('share_of_norm') for sublayer in sublayers]
    hollow = [s for s, share in enumerate(shares) if share is not None and share < NEARLY_EMPTY]
    values = [sublayer.get(key) for sublayer in sublayers]
    draw_line(axis, range(len(sublayers)), values, stream, low, high, hollow)


def draw_landscape(name, report, path):
    """Mean magnitude over position and dimension at each stream's peak; beside it the largest over the
    dimensions of every position, and over the positions of every dimension. Positions are drawn in a
    logarithm."""
    shown = {stream: s for stream, s in report['streams'].items() if 'landscape' in s}
    if not shown:
        raise UserError('there is no landscape in this measure.json: measure again')
    count = max(s['landscape']['sequences'] for s in shown.values())
    title = f'{name}, iteration {report["iter_num"]}: mean magnitude |x| over {count} sequences'
    with figure(path, title, len(shown), 3, (4.2, 3.4)) as axes:
        for row, (stream, s) in enumerate(shown.items()):
            kind = s['sublayers'][s['landscape']['sublayer']]['kind']
            heading = f'{plain(stream)} after {kind} {s["landscape"]["sublayer"]}'
            draw_landscape_row(axes[3 * row : 3 * row + 3], heading, s['landscape'])


def draw_landscape_row(axes, heading, landscape):
    """Three panels of one stream."""
    from matplotlib.colors import LogNorm

    image, by_position, by_dim = axes
    a = np.array(
        [floats(row) for row in landscape['magnitude']]
    )  # (blocks of positions, blocks of dimensions)
    positions, dims = np.array(landscape['position_edges']) + 1, np.array(landscape['dim_edges'])
    largest = landscape['largest']
    top = np.nanmax(a, initial=0) or 1
    mesh = image.pcolormesh(positions, dims, a.T, norm=LogNorm(top / 1e3, top, clip=True), cmap='cividis')
    bar = image.figure.colorbar(mesh, ax=image, label='magnitude')
    round_ticks(bar.ax.yaxis)
    image.plot(
        largest['position'] + 1.4, largest['dim'] + 0.5, 'o', markersize=11, fillstyle='none', color='#D55E00'
    )
    value = short(largest['value'], 3)
    image.set(title=f'{heading}\n○ {value}: position {largest["position"]}, dimension {largest["dim"]}')
    image.set(ylabel='dimension')
    with np.errstate(all='ignore'):
        over_dims, over_positions = a.max(1), a.max(0)
    by_position.stairs(over_dims, positions, baseline=None, color='#0072B2', linewidth=1.2)
    by_position.set(title='by position', ylabel='largest over dimensions')
    by_dim.stairs(over_positions, dims, baseline=None, color='#D55E00', linewidth=1.2)
    by_dim.set(title='by dimension', ylabel='largest over positions', xlabel='dimension')
    for axis in (image, by_position):
        position_ticks(axis, positions[-1] - 1)
    round_ticks(image.yaxis, whole=True)
    round_ticks(by_dim.xaxis, whole=True)
    for axis in (by_position, by_dim):
        axis.set_yscale('log' if (a > 0).any() else 'linear')
        axis.grid(alpha=0.3)
        round_ticks(axis.yaxis)


def position_ticks(axis, T):
    """Scales an axis that shows position + 1 by its logarithm, and labels it with positions."""
    shown = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000) if t < T]
    axis.set(xscale='log', xlabel='position (logarithmic)', xlim=(1, T + 1))
    axis.xaxis.set_ticks([t + 1 for t in shown], [str(t) for t in shown])
    axis.xaxis.set_ticks([], minor=True)


def draw_series(name, log, path):
    """log: the lines of log.jsonl. The loss, and of each quantity the largest value over the sublayers, in
    the course of training."""
    tokens = [line['tokens'] for line in log]
    keys = [key for key in PROFILE if key != 'start_norm']
    with figure(path, f'{name}: during training, largest value over the sublayers', 2, 4, (3.5, 2.8)) as axes:
        axes[0].plot(tokens, floats(line['val_loss'] for line in log), color='#009E73', marker='.')
        axes[0].set(title='validation loss', ylabel='nats per token', xlabel='training tokens')
        axes[0].grid(alpha=0.3)
        round_ticks(axes[0].yaxis)
        for axis, key in zip(axes[1:], keys):
            for stream in log[0]['streams']:
                records = [line['streams'].get(stream, {}).get(key) or [] for line in log]
                largest = [max((v for v in values if v is not None), default=None) for values in records]
                draw_line(axis, tokens, largest, stream)
            finish_panel(axis, key, 'training tokens')
        axes[1].legend()
        for axis in axes:
            axis.set_xscale('symlog', linthresh=max(tokens[:2] + [1]))  # step 0 is at 0
            axis.set_xlim(0, max(tokens + [1]) * 1.1)


def draw_comparison(columns, path):
    """columns: what comparison.json holds. A panel for each quantity, a line for each run: filled at the
    largest over the sublayers, hollow at the last sublayer."""
    labels = list(next(iter(columns.values()))['quantities'])
    across = min(3, len(labels))
    title = 'decoded stream: filled, largest over the sublayers; hollow, at the last; bars: 95% intervals'
    size = (3.9, 1.1 + 0.3 * len(columns))
    with figure(path, title, math.ceil(len(labels) / across), across, size) as axes:
        for i, (axis, label) in enumerate(zip(axes, labels)):
            draw_compared(axis, label, columns)
            names = [plain(f'{name} ({column["stream"]})') for name, column in columns.items()]
            axis.set_yticks(range(len(names)), names if i % across == 0 else [])
        for axis in axes[len(labels) :]:
            axis.remove()


def draw_compared(axis, label, columns):
    """One panel of the comparison."""
    for y, column in enumerate(columns.values()):
        q = column['quantities'][label]
        if q is None:  # the first run has no difference from itself
            continue
        style = {**stream_style(column['stream']), 'linestyle': '', 'markersize': 6}
        low, value, high = floats((q['low'], q['value'], q['high']))
        axis.plot([low, high], [y - 0.12] * 2, color='#999999', linewidth=3)
        axis.plot(value, y - 0.12, **style)
        if q.get('sublayer') is not None:
            low, value, high = floats((q['last_low'], q['last'], q['last_high']))
            axis.plot([low, high], [y + 0.15] * 2, color='#BBBBBB', linewidth=3)
            axis.plot(value, y + 0.15, **{**style, 'markerfacecolor': 'white'})
    finite = [x for line in axis.get_lines() for x in line.get_xdata() if math.isfinite(x)]
    is_ratio = 'loss' not in label and 'persistence' not in label
    axis.set(title=label, ylim=(len(columns) - 0.5, -0.5))
    if is_ratio and finite and min(finite) > 0:
        axis.set_xscale('log')
    if 'persistence' in label:
        axis.set_xlim(-0.05, 1.05)
    round_ticks(axis.xaxis)
    axis.grid(alpha=0.3)


# ---- all pictures of a folder


def attempt(draw, path, *what):
    """Draws a picture. Returns its name in a list, or nothing and a sentence on the console where that fails:
    what was measured is on disk already."""
    try:
        draw(*what, path)
        return [path.name]
    except Exception as error:  # whatever matplotlib or the file system may raise
        reason = str(error).splitlines() or [type(error).__name__]
        machine.say(
            f'{path.name} could not be drawn ({reason[0][:120]}): python figures.py {path.parent} tries again'
        )
        return []


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is not readable as JSON ({error}): measure the run again') from None


def draw_run(name, folder, suffix, log_path=None):
    """Draws the pictures of measure<suffix>.json in a folder and of a log.jsonl. Returns the names of those
    drawn."""
    report = read_json(folder / f'measure{suffix}.json')
    drawn = attempt(draw_profile, folder / f'profile{suffix}.png', name, report)
    drawn += attempt(draw_landscape, folder / f'landscape{suffix}.png', name, report)
    log = read_log(log_path) if log_path else []
    return drawn + (attempt(draw_series, folder / 'series.png', name, log) if log else [])


def draw_comparison_of(folder):
    """Draws the picture of comparison.json in a folder. Returns the names of those drawn."""
    return attempt(draw_comparison, folder / 'comparison.png', read_json(folder / 'comparison.json'))


def run(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs, or folders above them')
    found = False
    for top in parser.parse_args(argv).folders:
        for path in sorted(top.rglob('measure*.json')):
            suffix = path.stem.removeprefix('measure')
            log = path.with_name('log.jsonl') if suffix == '' else None
            drawn = draw_run(path.parent.resolve().name + suffix, path.parent, suffix, log)
            machine.say(f'{path.parent}: {", ".join(drawn)}')
            found = True
        for path in sorted(top.rglob('comparison.json')):
            machine.say(f'{path.parent}: {", ".join(draw_comparison_of(path.parent))}')
    if not found:
        folders = ', '.join(argv)
        raise UserError(
            f'there is no measure.json in {folders} or below: python measure.py --ckpt … writes one'
        )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with interrupts_exit(), user_errors_exit():
        run(argv)


if __name__ == '__main__':
    main()
