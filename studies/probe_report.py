"""
What probe.py prints and draws of a probe.json.
"""

import numpy as np

from figures import figure

SETS = ('mean', 'start', 'random', 'all')  # what a probe is told
# Colours that stay apart in grey and for colour-blind readers. Okabe and Ito 2008.
SET_STYLE = {
    'mean': dict(color='#D55E00', marker='o'),
    'start': dict(color='#E69F00', marker='s'),
    'random': dict(color='#999999', marker='v'),
    'all': dict(color='#0072B2', marker='^'),
}


def percent(scores):
    """Returns the cell of a table: accuracy ± half its range over the seeds, accuracy above shuffled
    labels, balanced accuracy.
    """
    accuracy = scores['accuracy']
    half_range = 50 * (accuracy['high'] - accuracy['low'])
    return (
        f'{100 * accuracy["value"]:.1f}±{half_range:.{int(half_range < 10)}f}'
        f'{100 * scores["selectivity"]["value"]:+6.1f}{100 * scores["balanced"]["value"]:4.0f}'
    )


def print_run(name, report):
    """A block for each stream and sublayer, two lines a task, four columns of what the probe is told."""
    data, settings = report['data'], report['settings']
    print(
        f'\n{name}, iteration {report["iter_num"]}, {data["name"]} {data["split"]}: '
        f'{data["train_tokens"]} tokens to train on, {data["test_tokens"]} to test on,\n'
        f'from {data["sequences"]} windows in {data["document_groups"]} groups that share no document; '
        f'{settings["seeds"]} seeds.\n'
        'A cell has, in percent: accuracy ± half its range over the seeds; how much that is above the\n'
        'accuracy with shuffled labels; balanced accuracy. majority: always naming the largest class.'
    )
    for stream, places in report['streams'].items():
        for place in places:
            print(
                f'\n{stream} after {place["kind"]} {place["sublayer"]} ({place["because"]}); '
                f'dimensions: mean {place["mean_dims"]}\nstart {place["start_dims"]}'
            )
            print(f'{"majority":>29}' + ''.join(f'{title:>20}' for title in SETS))
            for task, results in place['tasks'].items():
                majority = 100 * results['majority']['value']
                heads = {'linear': f'{task:16} linear{majority:6.1f}', 'hidden': f'{"hidden":>23}{"":6}'}
                for kind, head in heads.items():
                    print(head + ''.join(f'{percent(results[kind][told]):>20}' for told in SETS))


def draw_scores(axis, results, told, kind, x):
    """One kind of probe, told one set of dimensions: a point for each task at x, with bars over the seeds."""
    rows = [task[kind][told] for task in results]
    value, low, high = (
        100 * np.array([row['balanced'][key] for row in rows]) for key in ('value', 'low', 'high')
    )
    style = SET_STYLE[told]
    axis.errorbar(
        x,
        value,
        (value - low, high - value),
        **style,
        linestyle='',
        markersize=5,
        linewidth=1,
        markerfacecolor=style['color'] if kind == 'linear' else 'white',
        label=f'{told}, {kind}',
    )
    shuffled = [100 * row['balanced_shuffled']['value'] for row in rows]
    is_last = (told, kind) == ('all', 'hidden')
    label = 'shuffled labels' if is_last else None
    axis.hlines(shuffled, x - 0.045, x + 0.045, color='#000000', linewidth=1.2, label=label)


def draw_place(axis, stream, place):
    """One stream after one sublayer: balanced accuracy in every task, for what the probe is told."""
    results, tasks = list(place['tasks'].values()), np.arange(len(place['tasks']))
    for i, told in enumerate(SETS):
        middle = tasks + (i - 1.5) * 0.2
        draw_scores(axis, results, told, 'linear', middle - 0.045)
        draw_scores(axis, results, told, 'hidden', middle + 0.045)
    chance = [100 / len(task['classes']) for task in results]
    style = dict(color='#CC79A7', linestyle='--', linewidth=1, zorder=1)
    axis.hlines(chance, tasks - 0.45, tasks + 0.45, **style, label='chance: 1 ÷ number of classes')
    axis.set(
        title=f'{stream} after {place["kind"]} {place["sublayer"]} ({place["because"]})',
        ylabel='balanced accuracy (%)',
        ylim=(0, 105),
    )
    axis.set_xticks(tasks, [task.replace(' ', '\n', 1) for task in place['tasks']])
    axis.grid(alpha=0.3, axis='y')


def draw(name, report, path):
    """A panel for each stream and sublayer. Bars are from the smallest to the largest over the seeds."""
    panels = [(stream, place) for stream, places in report['streams'].items() for place in places]
    top, tasks = report['settings']['top'], len(panels[0][1]['tasks'])
    title = (
        f'{name}, iteration {report["iter_num"]}: what probes read from a stream\n'
        f'mean, start: the {top} largest dimensions over all tokens or at position 0; '
        f'random: {top} others; all: every one'
    )
    with figure(path, title, len(panels), 1, (max(10, 1.4 * tasks), 3)) as axes:
        for axis, (stream, place) in zip(axes, panels):
            draw_place(axis, stream, place)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc='outside lower center', ncols=5, fontsize='small')
