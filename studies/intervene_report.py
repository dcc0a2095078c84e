"""
What intervene.py prints and draws of an intervene.json: a summary of eight rows, everything on demand, two
figures.

shown: {stream: sublayer}, the place of each stream that is summarized and drawn.
"""

import math
from itertools import groupby

import numpy as np

from figures import figure, short
from studies.edits import CONTROLS, SWEPT

ROWS = 8  # of the summary and of a panel

# What is summarized first: where, what, how, reach. Results that are not in this list follow.
RANKED = (
    ('stream', 'start', 'zero', 'downstream'),
    ('stream', 'start', 'mean', 'downstream'),
    ('decoder', 'start', 'zero', ''),
    ('reads', 'start', 'zero', 'every'),
    ('stream', 'all', 'clip 0.999', 'downstream'),
    ('stream', 'top', 'zero', 'once'),
    ('stream', 'dims', 'zero', 'downstream'),
    ('decoder', 'dims', 'zero', ''),
    ('stream', 'start', 'overall', 'downstream'),
    ('stream', 'dims', 'mean', 'downstream'),
    ('stream', 'top', 'zero', 'downstream'),
    ('stream', 'start', 'zero', 'once'),
)

MARKS = {
    'edit': dict(
        color='#000000', marker='o', markersize=4.5, markeredgecolor='white', markeredgewidth=0.7, zorder=3
    ),
    'random': dict(color='#0072B2', marker='s'),
    'median': dict(color='#009E73', marker='^'),
    'other': dict(color='#E69F00', marker='D'),
    'moved': dict(color='#CC79A7', marker='v'),
}
SWEEP_STYLE = {
    'top': dict(color='#D55E00', marker='o'),
    'start': dict(color='#0072B2', marker='s'),
    'dims': dict(color='#009E73', marker='^'),
}
SWEEP_LINES = {
    'edit': dict(linewidth=1.6, markersize=4, zorder=3),
    'random': dict(linewidth=0.8, linestyle=':', marker=''),
    'moved': dict(linewidth=0.8, linestyle='--', marker=''),
}

TABLE_ROW = '{:33.33} {:24}{:>6} {:>7} {:>7} |' + '{:>7}' * len(CONTROLS)
COLUMNS = ('ratio [95% interval]', 'loss', 'edited', 'later', *CONTROLS)


def is_detailed(result, first_how):
    """Whether the classes, sinks and continuations of a result are shown: it is made downstream, as the
    first `how` of its place says, and aims at the same entries in all sequences."""
    return (result['where'], result['reach'], result['how']) == ('stream', 'downstream', first_how) and (
        result['what'] != 'top'
    )


def results_at(report, stream, sublayer):
    place = (stream, sublayer)
    return [result for result in report['results'] if (result['stream'], result['sublayer']) == place]


def detailed_results(report, stream, sublayer):
    results = results_at(report, stream, sublayer)
    return [result for result in results if is_detailed(result, results[0]['how'])]


def rank(result):
    key = tuple(result[part] for part in ('where', 'what', 'how', 'reach'))
    return RANKED.index(key) if key in RANKED else len(RANKED)


def summarized(results):
    """Returns the ROWS results that say most, in the order in which they were tried."""
    chosen = sorted(range(len(results)), key=lambda i: (rank(results[i]), i))[:ROWS]
    return [results[i] for i in sorted(chosen)]


# ---- Tables


def ratio_text(ratio):
    return short(ratio, 3) if ratio is None or not 0.1 <= ratio < 10 else f'{ratio:.4f}'


def interval_text(ratio):
    return f'{ratio_text(ratio["value"])} [{ratio_text(ratio["low"])}, {ratio_text(ratio["high"])}]'


def signed(change):
    """change: {value, low, high} of a loss, or None. Returns it in at most 7 characters."""
    value = change and change['value']
    return '–' if value is None else '-+'[value >= 0] + short(abs(value), 3)


def fixed(value, form):
    """Returns value in this format, or a dash of its width where there is no finite number."""
    return format(value, form) if value is not None else '–'.rjust(len(format(0, form)))


def is_apart(ratio, other):
    """Whether two intervals do not overlap. Unknown ones do."""
    ends = ratio['low'], ratio['high'], other['low'], other['high']
    return None not in ends and (ratio['low'] > other['high'] or ratio['high'] < other['low'])


def table_row(head, result):
    """One line: the edit, and its controls after the bar; a star where its interval is apart from all of
    theirs.
    """
    edit, controls = result['edit'], result['controls']
    stands_out = all(is_apart(edit['ratio'], control['ratio']) for control in controls.values())
    return TABLE_ROW.format(
        head,
        interval_text(edit['ratio']) + '*' * stands_out,
        short(edit['loss'], 4),
        signed(edit['edited']),
        signed(edit['later']),
        *(ratio_text(controls[name]['ratio']['value']) if name in controls else '' for name in CONTROLS),
    )


def result_head(result):
    how = result['how'].replace(' 0.', ' .')
    return f'{result["where"]:8}{result["what"] + " " + how:14} {result["reach"]}'


def print_results(results):
    """A table for each stream and sublayer."""
    for (stream, s), group in groupby(results, lambda result: (result['stream'], result['sublayer'])):
        print('\n' + TABLE_ROW.format(f'{stream} after sublayer {s}', *COLUMNS))
        for result in group:
            print(table_row(result_head(result), result))


def print_summary(name, report, shown):
    """The eight rows that say most, and where the sweep found most."""
    data = report['data']
    print(
        f'\n{name}, iteration {report["iter_num"]}: {data["sequences"]} sequences of {data["block_size"]} '
        f'tokens, {data["name"]} {data["split"]}, seed {data["seed"]}; {report["evaluations"]} edits\n'
        f'loss {short(report["loss"]["value"], 4)}, perplexity {short(report["perplexity"], 4)}. '
        'ratio: perplexity after an edit over the one before; loss: after it;\n'
        'edited, later: changes of loss there; then the ratios of the controls; *: apart from them all'
    )
    results = [result for stream, s in shown.items() for result in results_at(report, stream, s)]
    rows = summarized(results)
    print_results(rows)
    print_peaks(report)
    rest = len(report['results']) + len(report['sweep']) - len(rows)
    print(f'\n{rest} more results, token classes, sinks and continuations: with --all, or in intervene.json')


def print_peaks(report):
    """Of each stream, the sublayer of the sweep after which it costs most to zero the start-token entries."""
    data = report['data']
    if report['sweep']:
        print(
            f'\nevery sublayer, on the first {data["sweep_sequences"]} of these {data["sequences"]} '
            'sequences: zeroing `start` once costs most'
        )
    for stream in dict.fromkeys(result['stream'] for result in report['sweep']):
        ratios = {
            result['sublayer']: result['edit']['ratio']
            for result in report['sweep']
            if (result['stream'], result['what']) == (stream, 'start')
            and result['edit']['ratio']['value'] is not None
        }
        if ratios:
            most = max(ratios, key=lambda s: ratios[s]['value'])
            print(f'  {stream} after sublayer {most}: ratio {interval_text(ratios[most])}')


def print_all(report, shown):
    """Every result, then the losses by class of the predicted token and the rest, the sinks and the
    continuations.
    """
    print_sweep(report)
    print_results(report['results'])
    for stream, s in shown.items():
        print_breakdowns(report, detailed_results(report, stream, s))
    print_attention(report['attention'])
    print_samples(report['samples'])


def print_sweep(report):
    """A table for each stream and kind of entries, a row for each sublayer."""
    data = report['data']
    if report['sweep']:
        print(
            f'\nevery sublayer, on the first {data["sweep_sequences"]} of these {data["sequences"]} '
            'sequences, whose loss is another'
        )
    for (stream, what), group in groupby(report['sweep'], lambda result: (result['stream'], result['what'])):
        print('\n' + TABLE_ROW.format(f'{stream}, {what} zeroed after sublayer', *COLUMNS))
        for result in group:
            (position, dim), *_ = result['entries']
            text = ' '.join(str(j) for _, j in result['entries'])
            if what == 'top':
                text = f'{dim} at {position} in {result["share"]:.0%}, {short(result["standout"], 3)} ×'
            print(table_row(f'{result["sublayer"]:<3} {text}', result))


def print_breakdowns(report, results):
    """Changes of loss by class of the predicted token and the rest, each beside the same change in other
    dimensions.
    """
    heads = [f'{result["stream"]} {result["what"]} {result["how"]} (moved)' for result in results]
    title = f'{"change of loss, downstream":28}{"share":>6} {"before":>7}'
    print('\n' + title + ''.join(f'{head:>32}' for head in heads))
    rows = {}
    for breakdown, lines in report['before'].items():
        for name, line in lines.items():
            rows[breakdown, name] = f'{line["share"]:6.1%} {fixed(line["loss"], "7.3f")}'
    for result in results:
        for name in result['edit']['by'].get('carrier', ()):
            rows['carrier', name] = f'{"–":>6} {"–":>7}'
    for (breakdown, name), unedited in rows.items():
        cells = [breakdown_cell(result, breakdown, name) for result in results]
        print(f'{f"{breakdown} {name}":28}{unedited}' + ''.join(f'{cell:>32}' for cell in cells))


def breakdown_cell(result, breakdown, name):
    edit = result['edit']['by'].get(breakdown, {}).get(name)
    moved = result['controls']['moved']['by'].get(breakdown, {}).get(name)
    if not edit:
        return '   – (   –)'
    return f'{fixed(edit[0], "+.4f")} ({fixed(moved[0], "+.4f")})'


def print_attention(heads):
    print(f'\nattention to position 0, unedited: {fixed(heads["unedited"]["sink"], ".4f")}')
    for edit in heads['edits']:
        print(
            f'  {edit["stream"]} {edit["what"]} {edit["how"]}: {fixed(edit["sink"], ".4f")} '
            f'(moved {fixed(edit["control"]["sink"], ".4f")})'
        )
    if heads['constancy']:
        values = [f'{t}: {short(found["constancy"], 3)}' for t, found in heads['constancy'].items()]
        print(
            'a constant over inputs (1) or not (0) is what later outputs get from position '
            + ', '.join(values)
        )


def print_samples(samples):
    for sample in samples:
        print(f'\n{sample["prompt"][-60:]!r:.80} …\n  {"unedited":24}{sample["unedited"]!r:.80}')
        for edit in sample['edits']:
            name = f'{edit["stream"]} {edit["what"]} {edit["how"]}'
            print(f'  {name:24}{edit["text"]!r:.80}\n  {"  moved":24}{edit["control"]!r:.80}')


# ---- Figures


def point(axis, y, value, low, high, label, **style):
    """Draws one value with its interval. None becomes NaN, which is not drawn."""
    value, low, high = np.array([value, low, high], float)
    axis.plot([low, high], [y, y], color=style['color'], linewidth=1.2)
    axis.plot(value, y, linestyle='', label=label, **style)


def finish_panel(axis, lines, unchanged, **settings):
    """lines: the names of the rows. unchanged: the value of an edit that changes nothing."""
    axis.set(ylim=(len(lines) - 0.4, -0.6), **settings)
    axis.set_yticks(range(len(lines)), lines, fontsize='small')
    axis.axvline(unchanged, color='#999999', linewidth=0.8)
    axis.grid(alpha=0.3)


def ratio_ticks(axis):
    """Gives an axis of ratios in logarithms plain numbers to read, 1 always among them and none upon it."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    low, high = min(low, 1), max(high, 1)
    locator = MaxNLocator(6, steps=(1, 2, 5, 10))
    if high >= 10 * low:
        locator = LogLocator(10, (1, 2, 5) if high < 1000 * low else (1,))
    nearest = 0.08 * math.log(high / low)
    ticks = [t for t in locator.tick_values(low, high) if low <= t <= high and abs(math.log(t)) > nearest]
    axis.set_ticks([1, *ticks])
    axis.set_major_formatter('{x:.8g}')
    axis.set_minor_formatter('')


def draw_ratios(name, report, shown, path):
    """The eight interventions of each stream that say most, with controls and intervals; below, the
    sweep over the sublayers.
    """
    has_sweep = bool(report['sweep'])
    heights = [1.2 + 0.3 * ROWS, 3.2][: 1 + has_sweep]
    title = f'{name}: perplexity after ÷ before\nbars: 95% intervals over sequences'
    with figure(path, title, len(heights), len(shown), (6.2, sum(heights) / len(heights))) as axes:
        axes[0].get_gridspec().set_height_ratios(heights)
        for axis, (stream, s) in zip(axes, shown.items()):
            draw_results(axis, stream, s, summarized(results_at(report, stream, s)))
        for axis, stream in zip(axes[len(shown) :], shown):
            results = [result for result in report['sweep'] if result['stream'] == stream]
            draw_sweep(axis, stream, results, report['data']['sweep_sequences'])
        handles, labels = [], []
        for axis in axes[:: len(shown)]:
            for collected, found in zip((handles, labels), axis.get_legend_handles_labels()):
                collected.extend(found)
        columns = 1 + 2 * len(shown)
        axes[0].figure.legend(handles, labels, loc='outside lower center', ncols=columns, fontsize='small')


def draw_results(axis, stream, sublayer, results):
    """One panel: a row for each result."""
    for y, result in enumerate(results):
        for kind, outcome in {'edit': result['edit'], **result['controls']}.items():
            shift = 0 if kind == 'edit' else 0.18 * (CONTROLS.index(kind) - 1.5)
            style = {'markersize': 3.5, **MARKS[kind]}
            point(axis, y + shift, **outcome['ratio'], label=kind if y == 0 else None, **style)
    lines = [f'{r["where"]} {r["what"]}, {r["how"]} {r["reach"]}'.strip() for r in results]
    title = f'{stream}: entries of sublayer {sublayer}'
    if any('last' in line for line in lines):
        title += " ('last': of the last)"
    finish_panel(axis, lines, 1, xscale='log', xlabel='perplexity ratio (log scale)', title=title)
    ratio_ticks(axis.xaxis)


def draw_sweep(axis, stream, sweep, sequences):
    """Along the depth, what it does to zero entries once; thin, the same in other places."""
    for what in SWEPT:
        results = [result for result in sweep if result['what'] == what]
        sublayers = [result['sublayer'] for result in results]
        for kind in ('edit', 'random', 'moved'):
            outcomes = [result['edit'] if kind == 'edit' else result['controls'][kind] for result in results]
            values = np.array([outcome['ratio']['value'] for outcome in outcomes], float)
            label = f'{what} zeroed once' + ('' if kind == 'edit' else f', {kind}')
            axis.plot(sublayers, values, label=label, **{**SWEEP_STYLE[what], **SWEEP_LINES[kind]})
    axis.axhline(1, color='#999999', linewidth=0.8)
    axis.set(
        title=f'{stream}, every sublayer ({sequences} sequences)',
        xlabel='sublayer (even: attention, odd: MLP)',
        ylabel='perplexity ratio (log scale)',
        yscale='log',
    )
    axis.grid(alpha=0.3)
    ratio_ticks(axis.yaxis)


def draw_classes(name, report, shown, path):
    """What the detailed interventions, and the same changes in other dimensions, do to the loss of every
    class of predicted tokens but the rarest."""
    classes = {key: line for key, line in report['before']['class'].items() if line['share'] >= 0.001}
    title = f'{name}\nchange of loss by class of the predicted token\nbars: 95% intervals over sequences'
    with figure(path, title, 1, len(shown), (5.6, 2.3 + 0.4 * len(classes))) as axes:
        for axis, (stream, s) in zip(axes, shown.items()):
            draw_changes(axis, detailed_results(report, stream, s), classes)
            axis.set_title(f'{stream}, sublayer {s} and downstream')
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc='outside lower center', ncols=4, fontsize='small')


def draw_changes(axis, results, classes):
    """One panel: a row for each class."""
    for i, result in enumerate(results):
        style = dict(color=('#0072B2', '#D55E00')[i], marker='os'[i])
        for j, outcome in enumerate((result['edit'], result['controls']['moved'])):
            fill = None if j == 0 else 'none'
            for y, key in enumerate(classes):
                label = f'{result["what"]} {result["how"]}' + (', moved' if j else '')
                change = outcome['by']['class'][key]
                place = y + 0.18 * (2 * i + j - 1.5)
                point(axis, place, *change, label if y == 0 else None, markerfacecolor=fill, **style)
    lines = [f'{key} ({line["share"]:.1%})' for key, line in classes.items()]
    finish_panel(axis, lines, 0, xlabel='change of loss (nats per token)')
    axis.locator_params(axis='x', nbins=6)
