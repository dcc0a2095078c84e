"""
The standard pictures of a run and of several.
"""

import math
from contextlib import contextmanager

import numpy as np

from data.loader import atomic_write

HEADLINES = {  # key → name in tables and figures. Each is a quantity of one sublayer, but for the two persistences.
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_token_concentration': 'start-token conc.',
    'persistence': 'persistence',
    'start_ratio': 'start ratio',
    'start_dim_concentration': 'start-dimension conc.',
    'start_persistence': 'start persistence',
    'kurtosis': 'kurtosis',
    'max_over_median': 'max over median',
    'top1_at_start': 'top-1 at start',
    'massive_count': 'massive count',
    'median': 'median',
    'norm': 'norm',
}
COMPARED = ('fixed_dim_ratio', 'start_token_concentration', 'persistence', 'kurtosis', 'max_over_median')

# Colours that stay apart in grey and for colour-blind readers (Okabe and Ito 2008), and what a figure shows of every sublayer, with its unit.
STREAM_STYLE = {
    'h': dict(color='#000000', marker='o'),
    'D': dict(color='#E69F00', marker='s', linestyle='--'),
    'C': dict(color='#0072B2', marker='^'),
}
PROFILE = {
    'fixed_dim_ratio': 'largest ÷ median dimension',
    'start_ratio': 'largest ÷ median dimension',
    'start_token_concentration': 'position 0 ÷ mean over positions',
    'kurtosis': 'excess kurtosis',
    'max_over_median': 'largest ÷ median entry',
    'norm': 'mean L2 norm of a token',
}


def short(x, digits):
    """x with so many significant digits in at most digits + 5 characters; '–' for None."""
    if x is None:
        return '–'
    return (
        f'{x:.{digits}g}'
        if x == 0 or 0.01 <= abs(x) < 10**digits
        else f'{x:.{digits - 2}e}'.replace('e+0', 'e').replace('e-0', 'e-')
    )


def cell(q):
    """'12.3 [11.9, 12.8]' of a headline."""
    return f'{short(q["value"], 4)} [{short(q["low"], 3)}, {short(q["high"], 3)}]'


@contextmanager
def figure(path, title, rows, columns, size):
    """Gives the axes of a figure, flat, and writes it to `path`. size: (width, height) of one panel in inches.
    matplotlib is imported here: training does not need it."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout='constrained', squeeze=False
    )
    drawing.suptitle(title)
    yield axes.flat
    with atomic_write(path) as file:
        drawing.savefig(file, format='png', dpi=130)
    plt.close(drawing)


def scale(values):
    """How an axis that shows these values is best scaled: evenly, unless they span more than a factor of twenty."""
    wide = max(map(abs, values)) > 20 * min(map(abs, values))
    return ('log' if min(values) > 0 else 'symlog') if wide and max(values) > 20 else 'linear'


def draw_lines(axis, x, lines, key, xlabel):
    """One panel: a line for each stream. lines: {stream: values}, None where a value is not finite."""
    for stream, values in lines.items():
        axis.plot(
            x,
            [math.nan if v is None else v for v in values],
            label=stream,
            markersize=3,
            **STREAM_STYLE.get(stream, {}),
        )
    finite = [v for values in lines.values() for v in values if v is not None]
    axis.set(title=HEADLINES[key], xlabel=xlabel, ylabel=PROFILE[key], yscale=scale(finite or [1]))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.grid(alpha=0.3)


def draw_profile(name, report, path):
    """Every stream along the depth, a panel for each quantity."""
    with figure(path, f'{name}, iteration {report["iter_num"]}: along the depth', 2, 3, (3.8, 2.8)) as axes:
        for axis, key in zip(axes, PROFILE):
            lines = {
                stream: [sublayer[key] for sublayer in s['sublayers']]
                for stream, s in report['streams'].items()
            }
            draw_lines(
                axis,
                range(len(next(iter(lines.values())))),
                lines,
                key,
                'sublayer (even: attention, odd: MLP)',
            )
        axes[0].legend()


def draw_landscape(name, report, landscapes, path):
    """Mean magnitude over position and dimension at each stream's peak; beside it the largest value of each column and row."""
    from matplotlib.colors import LogNorm

    with figure(
        path,
        f'{name}, iteration {report["iter_num"]}: mean magnitude |x| over 8 sequences',
        len(landscapes),
        2,
        (5.5, 3.8),
    ) as axes:
        for (stream, a), image, margin in zip(landscapes.items(), axes[::2], axes[1::2]):
            position, dim = np.unravel_index(a.argmax(), a.shape)
            peak = report['streams'][stream]['sublayers'][report['streams'][stream]['peak_sublayer']]
            blocks = [
                np.arange(0, n, max(1, n // 256)) for n in a.shape
            ]  # their maxima are drawn: a single large entry must not fall between pixels
            pooled = np.maximum.reduceat(np.maximum.reduceat(a, blocks[0], 0), blocks[1], 1)
            largest = pooled.max() or 1
            mesh = image.imshow(
                pooled.T,
                norm=LogNorm(largest / 1e3, largest),
                cmap='cividis',
                aspect='auto',
                origin='lower',
                extent=(0, a.shape[0], 0, a.shape[1]),
            )
            image.annotate(
                f'{a.max():.3g} in dimension {dim} at position {position}',
                (position, dim),
                (0.25, 0.92),
                textcoords='axes fraction',
                arrowprops=dict(arrowstyle='->'),
                bbox=dict(facecolor='white'),
            )
            image.set(
                title=f'{stream} after {peak["kind"]} {peak["sublayer"]}',
                xlabel='position (tokens)',
                ylabel='dimension',
            )
            image.figure.colorbar(mesh, ax=image, label='magnitude')
            margin.plot(a.max(1), color='#0072B2', label='by position (largest over dimensions)')
            margin.plot(
                a.max(0),
                color='#D55E00',
                linestyle='--',
                linewidth=0.8,
                label='by dimension (largest over positions)',
            )
            margin.set(
                title='the same, from both sides',
                xlabel='position or dimension',
                ylabel='largest magnitude',
                xscale='symlog',
                yscale='log' if a.any() else 'linear',
            )
            margin.margins(y=0.3)
            margin.legend(fontsize='small')


def draw_comparison(rows, path):
    """rows: what print_comparison returns. A panel for each of its columns, a line for each run."""
    columns = list(next(iter(rows.values()))[1])
    with figure(
        path,
        'decoded stream of each run, bars: 95% intervals over sequences',
        2,
        math.ceil(len(columns) / 2),
        (3.8, 1.2 + 0.35 * len(rows)),
    ) as axes:
        for axis, column in zip(axes, columns):
            for y, (stream, quantities) in enumerate(rows.values()):
                q = {key: math.nan if value is None else value for key, value in quantities[column].items()}
                axis.plot([q['low'], q['high']], [y, y], color='#999999', linewidth=4)
                axis.plot(q['value'], y, **{**STREAM_STYLE.get(stream, {}), 'linestyle': ''})
            axis.set(title=column, ylim=(len(rows) - 0.5, -0.5))
            axis.set_yticks(range(len(rows)), [f'{name} ({stream})' for name, (stream, _) in rows.items()])
            axis.grid(alpha=0.3)


def draw_series(name, log, path):
    """log: the lines of log.jsonl. The loss, and of each quantity the largest value over the sublayers, in the course of training."""
    tokens = [line['tokens'] for line in log]
    with figure(path, f'{name}: during training, largest value over the sublayers', 2, 3, (3.8, 2.8)) as axes:
        axes[0].plot(tokens, [line['val_loss'] for line in log], color='#009E73', marker='.')
        axes[0].set(title='validation loss', xlabel='training tokens', ylabel='nats per token')
        for axis, key in zip(axes[1:], PROFILE):
            draw_lines(
                axis,
                tokens,
                {
                    stream: [
                        max((v for v in line['streams'][stream][key] if v is not None), default=None)
                        for line in log
                    ]
                    for stream in log[0]['streams']
                },
                key,
                'training tokens',
            )
        axes[1].legend()
        for axis in axes:
            axis.set_xscale('symlog', linthresh=max(tokens[:2] + [1]))  # step 0 is at 0
            axis.set_xlim(0, max(tokens + [1]) * 1.1)
