"""
When does the outlier emerge? Fits a curve to the training-time series of every stream and sublayer.

    python -m studies.emergence out/ledger_160m out/baseline_160m       runs trained here, by their log.jsonl
    python -m studies.emergence hf:EleutherAI/pythia-160m --revisions step0,step512,step143000 --text FILE …
    python -m studies.emergence --csv=series.csv                        columns step, sublayer, top1, median
    python -m studies.emergence --pack out/sweep/* --out=sweep.jsonl    many runs as one file, a line each

The series. r(t) of a log is max_over_median: the largest entry of a sequence over its median, averaged over
sequences (Gallego-Feliciano et al. 2025, eq. 6). A csv has only top1 and median, and there r = top1 / median.
Of a run of train.py there is a series for each stream after each sublayer. Of a pretrained model there is
one for h after each block, which is what that publication fits; studies/revisions.py measures them. The line
that begins with "fitted" says which stream, where, and which ratio.

The curve, its rivals and what is not reported of a fit: studies/curves.py.
"""

import argparse
import csv
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoint import add_reading_arguments, is_pretrained, load_checkpoint, read_log
from data.loader import UserError, atomic_write, user_errors_exit
from figures import STREAM_STYLE, figure
from measure import number
from studies import science
from studies.curves import CLASSES, FAMILIES, Series, curve_at, fit_all
from studies.revisions import measure_revisions

# Published mean R² over the layers of each Pythia model, one stream. Gallego-Feliciano et al. 2025, table 1.
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
}
RATIOS = {
    'max_over_median': 'the largest entry of a sequence over its median, averaged over sequences',
    'csv: top1 / median': 'top1 / median of the csv',
}
KEPT = ('max_over_median', 'top1', 'start_ratio')  # what a packed run keeps of its log; the first is fitted


# ---- Series


def run_settings(folder):
    """Returns the model's settings of a run, or None, and a dict of what made the run.

    Both come from the smallest file of the folder that has them."""
    for name, key in (('run.json', 'model_args'), ('measure.json', 'model')):
        if not (folder / name).exists():
            continue
        try:
            found = json.loads((folder / name).read_text())
            return found[key], {k: found[k] for k in ('config', 'data_sha256') if k in found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{folder / name} does not hold {key} ({error}): remove it') from None
    if (folder / 'ckpt.pt').exists():
        return load_checkpoint(folder / 'ckpt.pt', weights=False)['model_args'], {}
    return None, {}


def five_digits(values):
    return [None if v is None else float(f'{v:.5g}') for v in values]


def packed_stream(lines, stream):
    """Returns {quantity: a list over steps for each sublayer} of one stream in the lines of a log."""
    packed = {}
    for key in KEPT:
        by_step = [line['streams'][stream][key] for line in lines]
        packed[key] = [five_digits(series) for series in zip(*by_step)]
    return packed


def pack(folder):
    """Returns the compact form of a run's log.jsonl: a dict of lists over steps, in five significant
    digits."""
    lines = read_log(folder / 'log.jsonl')
    if not lines:
        raise UserError(
            f'there is no log.jsonl in {folder}: name folders of runs, files of --pack, or --csv=FILE'
        )
    model, made = run_settings(folder)
    try:
        return {
            'run': folder.name,
            'model_args': model,
            'made': made,
            'steps': [line['iter'] for line in lines],
            'val_loss': five_digits(line['val_loss'] for line in lines),
            'streams': {stream: packed_stream(lines, stream) for stream in lines[0]['streams']},
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f'{folder}/log.jsonl lacks the streams that train.py writes ({error}): train the run again'
        ) from None


def read_packed(path):
    """Returns a list of packed runs: that of a run's folder, or those of a file written with --pack."""
    if path.is_dir():
        return [pack(path)]
    needed = {'run', 'model_args', 'steps', 'val_loss', 'streams'}
    try:
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(needed <= run.keys() for run in runs):
            raise ValueError('a line lacks run, model_args, steps, val_loss or streams')
        return runs
    except FileNotFoundError:
        raise UserError(
            f'there is no {path}: name a run of train.py, like out/ledger_demo, or a file of --pack'
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f'{path} is neither the folder of a run nor a file written with --pack ({error})'
        ) from None


def finite_series(run, stream, sublayer, t, r, **extra):
    """Returns the Series of the finite points, in the order of their steps."""
    t = np.asarray(t, float)
    r = np.asarray([math.nan if v is None else v for v in r], float)
    steps_are_valid = len(set(t)) == len(t) and ((t >= 0) & (t < math.inf)).all()
    if not steps_are_valid:
        raise UserError(f'{run}, {stream}, sublayer {sublayer}: a step is no number from 0, or stands twice')
    order = t.argsort()
    kept = order[np.isfinite(r[order])]
    return Series(run, stream, sublayer, t[kept], r[kept], **extra)


def half_of_fall(steps, loss):
    """Returns the step at which a loss has made half of its fall, by interpolation, or None."""
    points = [(t, v) for t, v in zip(steps, loss) if v is not None] or [(0, 0)]
    steps, loss = np.array(points).T
    middle = (loss[0] + loss.min()) / 2
    i = (loss <= middle).argmax()
    if i == 0:
        return None
    return number(np.interp(-middle, -loss[i - 1 : i + 1], steps[i - 1 : i + 1]))


def series_of(run):
    """Returns the Series of a packed run."""
    try:
        if not isinstance(run['run'], str):
            raise ValueError('its name is no text')
        extra = {'model': run['model_args'], 'loss_half': half_of_fall(run['steps'], run['val_loss'])}
        found = []
        for stream, quantities in run['streams'].items():
            for s, r in enumerate(quantities['max_over_median']):
                found.append(finite_series(run['run'], stream, s, run['steps'], r, **extra))
        if not found or not run['steps']:
            raise ValueError('a name, steps and streams are what it needs')
        return found
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f'{run["run"]}: not written with --pack, or cut short ({error})') from None


def csv_point(row, default_run):
    """Returns the key (run, stream, sublayer) and the point (step, ratio) of one row of a csv."""
    top1, median = float(row['top1']), float(row['median'])
    key = row.get('run') or default_run, row.get('stream') or 'h', int(row['sublayer'])
    return key, (float(row['step']), top1 / median if median else math.nan)


def read_csv(path):
    """Returns the Series of a csv with a header: step, sublayer, top1, median and, if they are there, stream
    and run."""
    points = {}
    try:
        with open(path, newline='') as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    key, point = csv_point(row, path.stem)
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f'{path}, line {line}: expected numbers as step, sublayer, top1, median ({error})'
                    ) from None
                points.setdefault(key, []).append(point)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'cannot read {path} as csv ({error})') from None
    if not points:
        raise UserError(
            f'{path} has no rows: expected a header step,sublayer,top1,median and a line for each point'
        )
    return [finite_series(*key, *zip(*rows)) for key, rows in sorted(points.items())]


# ---- What is printed


def place_of(x):
    """Returns what the stream of a Series was seen after: 'sublayer', or 'block' of a pretrained model."""
    return 'block' if x.model and x.model.get('blocks_only') else 'sublayer'


def what_is_fitted(series, ratios):
    """Returns which streams, where, and which ratio: 'h after each block: the largest entry of …'."""
    places = dict.fromkeys(f'{x.stream} after each {place_of(x)}' for x in series)
    return f'{", ".join(places)}: {"; ".join(RATIOS[ratio] for ratio in ratios)}'


def text(q, digits=3):
    """Returns a number, an interval or a missing value as a table has it."""
    if q is None:
        return '–'
    if isinstance(q, dict):
        return f'{text(q["value"], digits)} [{text(q["low"], digits)}, {text(q["high"], digits)}]'
    if isinstance(q, float) and 1000 <= abs(q) < 1e6:
        return f'{q:.0f}'
    return f'{q:.{digits}g}'


def print_fit(x, fitted):
    """Prints what is known of one sublayer: a line if it is not fitted, else three."""
    head = f'\n{x.run}, {x.stream}, {place_of(x)} {x.sublayer}: '
    if 'r2' not in fitted:
        print(head + fitted['note'])
        return
    head += f'R² {fitted["r2"]:.3f}, n = {fitted["n"]}, {fitted["class"]}'
    if fitted['peak']:
        head += f', peak at step {text(fitted["peak"])}'
    if fitted['half_step']:
        head += f', half height at step {text(fitted["half_step"])}'
    print(head)
    aic = []
    for name, v in fitted['aic'].items():
        mark = '*' if name == fitted['preferred'] else ''
        aic.append(f'{name} (k = {FAMILIES[name].parameters + 1}) {v:.1f}{mark}')
    print('  AIC ' + ', '.join(aic))
    print(
        '  ' + (fitted['note'] or ', '.join(f'{name} {text(q)}' for name, q in fitted['parameters'].items()))
    )


def median_or_none(values):
    return number(np.median(values)) if values else None


def summarize(series, fits):
    """Returns a dict for each run and stream: what emergence.json and the table say of it."""
    summary = []
    for run, stream in dict.fromkeys((x.run, x.stream) for x in series):
        mine = [(x, f) for x, f in zip(series, fits) if (x.run, x.stream) == (run, stream)]
        fitted = [f for _, f in mine if 'r2' in f]
        r2 = [f['r2'] for f in fitted]
        summary.append(
            {
                'run': run,
                'stream': stream,
                'sublayers': len(mine),
                'fitted': len(fitted),
                'r2': number(np.mean(r2)) if r2 else None,
                'r2_least': min(r2, default=None),
                'f_preferred': sum(f['preferred'] == 'f' for f in fitted),
                'identifiable': sum(f['parameters'] is not None for f in fitted),
                'peak': median_or_none([f['peak']['value'] for f in fitted if f['peak']]),
                'half_step': median_or_none([f['half_step'] for f in fitted if f['half_step']]),
                'loss_half_step': mine[0][0].loss_half,
                'classes': {name: sum(f['class'] == name for _, f in mine) for name in CLASSES},
            }
        )
    return summary


SUMMARY_ROW = '{:28.27}{:8}{:>9}{:>9}{:>8}{:>8}{:>6}{:>8}{:>8}{:>11}   {}'
SUMMARY_HEAD = ('run', 'stream', 'fitted', 'mean R²', 'least', 'f best', 'five', 'peak', 'half', 'loss half')


def print_summary(summary):
    """Prints a row for each run and stream, then what all runs say of a stream."""
    print('\n' + SUMMARY_ROW.format(*SUMMARY_HEAD, ' / '.join(CLASSES)))
    for s in summary:
        row = (
            s['run'],
            s['stream'],
            f'{s["fitted"]}/{s["sublayers"]}',
            text(s['r2']),
            text(s['r2_least']),
            s['f_preferred'],
            s['identifiable'],
            text(s['peak']),
            text(s['half_step']),
            text(s['loss_half_step']),
        )
        print(SUMMARY_ROW.format(*row, ' / '.join(map(str, s['classes'].values()))))
    print('f best: sublayers where f has the lowest AIC. five: those where all five are identifiable.')
    print('peak, half: the median step over the sublayers.')
    for stream in dict.fromkeys(s['stream'] for s in summary):
        mine = [s for s in summary if s['stream'] == stream and s['fitted']]
        if mine:
            print(stream_line(stream, mine))
    published = ', '.join(f'{size} {r2}' for size, r2 in PUBLISHED_R2.items())
    print(f'published mean R², Pythia, one h: {published}')


def stream_line(stream, summary):
    """Returns what all runs with fits say of one stream."""
    n = sum(s['fitted'] for s in summary)
    r2 = sum(s['fitted'] * s['r2'] for s in summary) / n
    line = f'{stream}: mean R² {r2:.3f} over {n} sublayers of {len(summary)} runs'
    pairs = [(s['half_step'], s['loss_half_step']) for s in summary if s['half_step'] and s['loss_half_step']]
    halves = np.array(pairs)
    if len(pairs) >= 8 and np.ptp(halves, 0).all():
        rho = science.rank_correlation(*halves.T)
        line += f'; half height and half of the loss: rank correlation {rho:.2f} over {len(pairs)} runs'
    return line


# ---- Figures


def draw_series(axis, x, fitted):
    """Draws one panel: the points of a series and the curve through them."""
    first = x.t[x.t > 0][0] if (x.t > 0).any() else 1
    colour = STREAM_STYLE.get(x.stream, {}).get('color', '#000000')
    axis.plot(x.t, x.r, 'o', markersize=3, color=colour)
    kind = 'block' if place_of(x) == 'block' else ('attn', 'mlp')[x.sublayer % 2]
    title = f'{x.stream}, {kind} {x.sublayer}'
    if 'curve' in fitted:
        # the axis is even up to the first step, and logarithmic after it
        t = np.concatenate([np.linspace(0, first, 30), np.geomspace(first, x.t[-1], 300)])
        t = t[t >= x.t[0]]
        axis.plot(t, curve_at(fitted, t), color='#D55E00', linewidth=1.2)
        title += f': R² {fitted["r2"]:.3f}'
    else:
        title += ': no fit'
    if fitted.get('peak'):
        axis.axvline(fitted['peak']['value'], color='#999999', linestyle=':')
    axis.set_title(title, fontsize='small')
    axis.set_xscale('symlog', linthresh=first)
    axis.set(xlim=(-0.3 * first, 1.5 * x.t[-1]), ylim=(min(0, x.r.min()), None))
    axis.set_xlabel('step', fontsize='small')
    axis.grid(alpha=0.3)


def draw_curves(run, rows, path):
    """rows: [(Series, fit)] of one run. A row of panels for each stream, of at most six of its sublayers."""
    streams = {}
    for x, fitted in rows:
        streams.setdefault(x.stream, []).append((x, fitted))
    chosen = {}
    for stream, pairs in streams.items():
        places = np.linspace(0, len(pairs) - 1, min(6, len(pairs)))
        chosen[stream] = [pairs[round(i)] for i in places]
    width = max(map(len, chosen.values()))
    sublayers = max(map(len, streams.values()))
    title = f'{run}\nlargest over median, with fits, {width} of {sublayers} {place_of(rows[0][0])}s'
    with figure(path, title, len(chosen), width, (max(2.6, 5.2 / width), 2.3)) as axes:
        panels = np.array(list(axes)).reshape(len(chosen), width)
        for pairs, line in zip(chosen.values(), panels):
            for axis, (x, fitted) in zip(line, pairs):
                draw_series(axis, x, fitted)
            line[0].set_ylabel('largest ÷ median entry', fontsize='small')
            for axis in line[len(pairs) :]:
                axis.set_visible(False)


def draw_peaks(series, fits, path):
    """A panel for each stream: a row for each run, the relative depth across, the colour the step of the
    peak.

    Grey is a sublayer that has no peak inside training."""
    from matplotlib.colors import LogNorm

    steps = {}  # stream → run → [(sublayer, step of its peak)]
    for x, fitted in zip(series, fits):
        step = fitted['peak']['value'] if fitted.get('peak') else math.nan
        steps.setdefault(x.stream, {}).setdefault(x.run, []).append((x.sublayer, step))
    peaks = [f['peak']['value'] for f in fits if f.get('peak')]
    low, high = min(peaks, default=1), max(peaks, default=1)
    norm = LogNorm(low, max(high, 1.01 * low))
    are_several = len(set(peaks)) > 1
    where = f', step {text(peaks[0])}' if peaks and not are_several else ''
    title = (
        'step at which largest over median peaks\n'
        f'{len(peaks)} of {len(fits)} sublayers{where}; grey: no peak inside training'
    )
    tall = max(map(len, steps.values()))
    with figure(path, title, 1, len(steps), (max(5, 6 / len(steps)), 1.8 + 0.22 * tall)) as axes:
        for (stream, runs), axis in zip(steps.items(), axes):
            for y, row in enumerate(runs.values()):
                edges = np.linspace(0, 1, len(row) + 1)
                colours = np.ma.masked_invalid([[v for _, v in sorted(row)]])
                style = dict(norm=norm, cmap='cividis', edgecolors='white', linewidth=0.3)
                mesh = axis.pcolormesh(edges, [y - 0.45, y + 0.45], colours, **style)
            axis.set(title=stream, xlabel='relative depth (first to last sublayer)')
            axis.set(xlim=(0, 1), ylim=(len(runs) - 0.5, -0.5), facecolor='#DDDDDD')
            axis.set_yticks(range(len(runs)), runs, fontsize='x-small')
        if are_several:
            ticks = np.geomspace(norm.vmin, norm.vmax, 5)
            bar = axis.figure.colorbar(mesh, ax=list(axis.figure.axes), label='step of the peak', ticks=ticks)
            bar.ax.yaxis.set_major_formatter(lambda v, _: text(float(v)))
            bar.minorticks_off()


# ---- The command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='*', type=Path, help='folders of runs, or files written with --pack')
    parser.add_argument(
        '--csv', type=Path, help='series from elsewhere: columns step, sublayer, top1, median[, stream, run]'
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
        help="folder for emergence.json and figures (default: the first run's own, or that above several)",
    )
    group = parser.add_argument_group(
        'a pretrained model', 'Name it as hf:<name>, or a folder that holds a folder for each revision.'
    )
    group.add_argument('--revisions', help='with commas: step0,step512,step1000; measured at their blocks')
    add_reading_arguments(group, sequences=64)
    args = parser.parse_args(argv)
    check_revisions(args)
    if not (args.runs or args.csv or args.pack):
        raise UserError('nothing to read: name runs, like out/ledger_demo, or --csv=FILE, --pack')
    if args.pack and not args.out:
        raise UserError('--pack needs the file to write: --out=results/emergence/sweep.jsonl')
    return args


def check_revisions(args):
    """Says what is wrong with --revisions, or with a pretrained model without it."""
    if args.revisions is not None and (len(args.runs) != 1 or args.csv or args.pack):
        raise UserError('--revisions are those of one model: hf:<name> --revisions step0,step512 --text FILE')
    if args.revisions is not None:
        return
    for run in map(str, args.runs):
        if is_pretrained(run):
            raise UserError(f'{run} is a pretrained model: name steps of its training with --revisions')
    if args.text:
        raise UserError('--text is what --revisions are measured on: name some, or leave it out')


def write_packed(paths, out):
    lines = []
    for path in paths:
        lines += [json.dumps(packed, separators=(',', ':')) + '\n' for packed in read_packed(path)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out, 'w') as file:
        file.writelines(lines)
    print(f'written: {out}, {len(lines)} runs, {sum(map(len, lines)):,} bytes')


def read_series(paths, csv_path=None):
    """Returns the Series with points of all runs and of a csv. Refuses two runs of one name."""
    packed = [run for path in paths for run in read_packed(path)]
    series = [x for run in packed for x in series_of(run)]
    of_csv = read_csv(csv_path) if csv_path else []
    names = Counter([*(run['run'] for run in packed), *{x.run for x in of_csv}])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f'two runs are named {", ".join(twice)}: rename a folder')
    series = [x for x in series + of_csv if len(x.t)]
    if not series:
        raise UserError(
            'what was named holds no finite largest over median: name runs of train.py, or a csv with lines'
        )
    return series


def output_folder(args):
    """Returns the folder of --out, or the first run's own, or that above several runs."""
    source = args.runs[0] if args.runs else args.csv
    is_one_run = source.is_dir() and len(args.runs) == 1
    out = args.out or (source if is_one_run else source.resolve().parent)
    out.mkdir(parents=True, exist_ok=True)
    return out


def two_of_each_kind(series):
    """Returns the names of the runs whose curves are drawn: the first two with the same streams."""
    kinds = {}
    for name in dict.fromkeys(x.run for x in series):
        streams = frozenset(x.stream for x in series if x.run == name)
        kinds.setdefault(streams, []).append(name)
    return [name for alike in kinds.values() for name in alike[:2]]


def analyse(args):
    """Fits what the command line names, prints the fits, and writes emergence.json and figures."""
    if args.revisions is not None:
        args.runs = [measure_revisions(args.runs[0], args)]
    series = read_series(args.runs, args.csv)
    out = output_folder(args)
    fits = fit_all(series)
    summary = summarize(series, fits)
    if len({x.run for x in series}) <= 4:
        for x, fitted in zip(series, fits):
            print_fit(x, fitted)
    print_summary(summary)
    ratios = ['max_over_median'] if args.runs else []
    ratios += ['csv: top1 / median'] if args.csv else []
    print(f'fitted: {what_is_fitted(series, ratios)}')
    report = {
        'schema': 1,
        'ratio': ' and '.join(ratios),
        'fitted': what_is_fitted(series, ratios),
        'summary': summary,
        'published_r2': PUBLISHED_R2,
        'series': [
            {'run': x.run, 'stream': x.stream, 'sublayer': x.sublayer, **f} for x, f in zip(series, fits)
        ],
    }
    with atomic_write(out / 'emergence.json', 'w') as file:
        json.dump(report, file)
    draw_peaks(series, fits, out / 'peaks.png')
    written = ['emergence.json', 'peaks.png']
    for name in two_of_each_kind(series):
        written.append(f'curves_{name.replace("/", "_")}.png')
        draw_curves(name, [(x, f) for x, f in zip(series, fits) if x.run == name], out / written[-1])
    print(f'written: {os.path.relpath(out)}/{", ".join(written)}')


def command(run, argv):
    """Runs run(argv) as a program: what a user can mend is one sentence."""
    try:
        with user_errors_exit():
            run(argv)
    except KeyboardInterrupt:
        sys.exit('stopped by Ctrl-C: what was written before is whole')
    except OSError as error:
        what = error.filename or 'the output'
        sys.exit(f'error: cannot write {what} ({error.strerror}): name another place with --out')


def run(argv):
    args = parse_arguments(argv)
    if args.pack:
        write_packed(args.pack, args.out)
    else:
        analyse(args)


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
