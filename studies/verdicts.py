"""
The verdicts on the four published claims, by rules that were fixed before the runs, with every number that went into them.

    python -m studies.verdicts                    the runs packed beside this file
    python -m studies.verdicts out/packed         those that run.sh has packed

Prints Markdown tables and draws onset.png (when the outlier appears) and commits.png (what C is committed from) from <arm>_<scale>_<seed>/: measure.json and measure_0.json,
the same of the untrained weights, log.jsonl, controls.json.

- Apart: the 95% intervals over sequences do not overlap. Each quantity of a claim is judged in every seed: all hold: reproduced; some: partly; none: not.
- A stream has a start-token outlier if its start ratio is at least 3 times the untrained model's, apart; its start persistence is at least 0.5; and its start-token concentration is
  above the untrained model's, apart: all three, or it has none.
- Losses are matched within 0.01 nats: with a baseline of the same seed whose own, shorter cosine ends there (baseline_short<steps>); beside it, without intervals,
  every run's training-time series is interpolated at the loss that all of the seed's runs reach.
- Quantities rise with α if they never fall from dose to dose and the two ends are apart.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from checkpoint import read_log
from data.loader import UserError
from figures import HEADLINES, cell, figure, short
from measure import QUOTED_AT

MATCHED, DOSES = 0.01, 4  # nats; how many values of α claim 3 needs
WORDS = ('reproduced', 'partly', 'not reproduced')
TIMES, PERSISTENT = 3, 0.5  # of existence
SHORT = 'baseline_short'  # arms whose name begins so end at another run's loss on purpose: they do not say which loss all reach
DOSE = r'ledger_a[\d.]*[1-9]'  # arms that are there for the curve over α, which has a figure of its own (../figures.py); that of no price says more
SERIES = (
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'persistence',
    'start_persistence',
    'kurtosis',
)


def read_runs(folder):
    """Returns {(arm, seed): run}, a run being {'name', 'measure', 'untrained', 'log', 'controls'}, None or [] for what is not there."""

    def read(path):
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(f'{path} is not readable as JSON ({error}): measure the run again') from None

    runs = {}
    for path in sorted(Path(folder).glob('*/measure.json')):
        if match := re.fullmatch(r'(.+)_(?:demo|160m|290m)_(\d+)', path.parent.name):
            runs[match[1], int(match[2])] = {
                'name': path.parent.name,
                'measure': read(path),
                'untrained': read(path.with_name('measure_0.json')),
                'log': read_log(path.with_name('log.jsonl')),
                'controls': read(path.with_name('controls.json')),
            }
    if not runs:
        raise UserError(
            f'there is no <arm>_<scale>_<seed>/measure.json in {folder}: make them with bash studies/recipe.sh'
        )
    if len({json.dumps(run['measure']['data'], sort_keys=True) for run in runs.values()}) > 1:
        raise UserError(
            f'the runs in {folder} were not measured on the same windows: measure them again, with the same flags'
        )
    return runs


def decoded(report):
    """Returns the name of the stream that the head reads."""
    return next(name for name, s in report['streams'].items() if s['decoded'])


def below(x, y):
    """x, y: headlines. Is x below y, apart? What is not finite is never apart."""
    return None not in (x['high'], y['low']) and x['high'] < y['low']


def condition(seed, quantity, text, holds, **numbers):
    """One line of evidence. Lines of the same seed and quantity stand or fall together. numbers: the headlines that went into it, by label."""
    return {
        'seed': seed,
        'quantity': quantity,
        'text': text,
        'holds': bool(holds),
        'numbers': '; '.join(f'{label} {cell(x)}' for label, x in numbers.items()),
    }


def compare(seed, key, low, high):
    """Evidence that the quantity `key` of one stream lies below that of another, apart. low, high: (label, entry of measure.json)."""
    (a, x), (b, y) = low, high
    return condition(
        seed,
        key,
        f'{HEADLINES[key]} of {a} below that of {b}, apart',
        below(x[key], y[key]),
        **{a: x[key], b: y[key]},
    )


def existence(run, stream, seed):
    """The three conditions for a start-token outlier in a stream; none if the untrained weights were not measured."""
    if run['untrained'] is None:
        return []
    s, untrained = run['measure']['streams'][stream], run['untrained']['streams'][stream]
    ratio, before, after, at_first = (
        s['start_ratio'],
        untrained['start_ratio'],
        s['start_token_concentration'],
        untrained['start_token_concentration'],
    )
    large = None not in (ratio['value'], before['value']) and ratio['value'] >= TIMES * before['value']
    return [
        condition(
            seed,
            'outlier',
            f'start ratio of {stream} at least {TIMES} times the untrained, apart',
            large and below(before, ratio),
            trained=ratio,
            untrained=before,
        ),
        condition(
            seed,
            'outlier',
            f'start persistence of {stream} at least {PERSISTENT}',
            s['start_persistence']['value'] >= PERSISTENT,
            trained=s['start_persistence'],
        ),
        condition(
            seed,
            'outlier',
            f'start-token conc. of {stream} above the untrained, apart',
            below(at_first, after),
            trained=after,
            untrained=at_first,
        ),
    ]


def has_outlier(run, stream, seed):
    """Do all three hold? None if the untrained weights were not measured."""
    lines = existence(run, stream, seed)
    return all(line['holds'] for line in lines) if lines else None


def existence_in(runs, arm):
    """Has the decoded stream of an arm a start-token outlier? Returns evidence, and what is missing."""
    evidence, needs = [], [] if any(name == arm for name, _ in runs) else [arm]
    for (name, seed), run in runs.items():
        if name == arm:
            lines = existence(run, decoded(run['measure']), seed)
            evidence, needs = (
                evidence + lines,
                needs + [f'the untrained {arm} of seed {seed}, measured'] * (not lines),
            )
    return evidence, needs


def nearest_baseline(runs, seed):
    """Returns the baseline of the seed whose loss is nearest to its ledger's, and the difference, ledger − baseline, in nats; (None, ∞) without either."""
    ledger = runs.get(('ledger', seed))
    near = [
        (run, ledger['measure']['val_loss'] - run['measure']['val_loss'])
        for (arm, other), run in runs.items()
        if ledger and other == seed and (arm == 'baseline' or arm.startswith(SHORT))
    ]
    return min(near, key=lambda pair: abs(pair[1]), default=(None, math.inf))


def matched(runs):
    """Returns the ledgers, each with the baseline of its seed that ends at the same loss as the arm `baseline`, and what is missing."""
    found, needs = {}, [] if any(arm == 'ledger' for arm, _ in runs) else ['ledger']
    for seed in (seed for arm, seed in runs if arm == 'ledger'):
        ledger, (partner, difference) = runs['ledger', seed], nearest_baseline(runs, seed)
        if abs(difference) <= MATCHED:
            found |= {('ledger', seed): ledger, ('baseline', seed): partner}
            continue
        need = f'a baseline of seed {seed} that ends within {MATCHED} nats of the ledger'
        if partner:
            need += f' (nearest: {partner["name"]}, {abs(difference):.3f} nats {"below" if difference > 0 else "above"})'
            passed = (
                difference > 0 and ledger['log'] and at_loss(partner['log'], ledger['log'][-1]['val_loss'])
            )
            need += (
                f': it passes there at step {passed[0]:.0f}, and a whole cosine needs fewer' if passed else ''
            )
        needs.append(need)
    return found, needs


def rebuilt(runs):
    pairs, needs = matched(runs)
    evidence, more = existence_in(pairs, 'ledger') if pairs else ([], [])
    return evidence, needs + more


def pairs_of(runs, arm):
    """Returns [(seed, run of the arm, baseline)] of every seed that has both, and what is missing."""
    seeds = sorted({seed for name, seed in runs if name in (arm, 'baseline')})
    needs = (
        [f'{name}, seed {seed}' for seed in seeds for name in (arm, 'baseline') if (name, seed) not in runs]
        if seeds
        else [arm, 'baseline']
    )
    return [
        (seed, runs[arm, seed]['measure']['streams'], runs['baseline', seed]['measure']['streams'])
        for seed in seeds
        if (arm, seed) in runs and ('baseline', seed) in runs
    ], needs


def smaller_and_more_concentrated(runs):
    pairs, needs = pairs_of(runs, 'ledger')
    return [
        line
        for seed, ledger, baseline in pairs
        for C, h in [(('C', ledger['C']), ('h', baseline['h']))]
        for line in (compare(seed, 'fixed_dim_ratio', C, h), compare(seed, 'start_token_concentration', h, C))
    ], needs


def smaller_at_matched_loss(runs):
    pairs, needs = matched(runs)
    return (smaller_and_more_concentrated(pairs)[0] if pairs else []), needs


def rises_with_price(runs):
    evidence, needs = [], [] if any(arm == 'ledger' for arm, _ in runs) else [f'{DOSES} doses of α']
    for seed in sorted({seed for arm, seed in runs if arm == 'ledger'}):
        doses = {
            run['measure']['model']['commit_sparsity']: run['measure']['streams']['C']
            for (arm, other), run in runs.items()
            if other == seed and re.fullmatch(r'ledger(_hs|_a[\d.]+)?', arm)
        }
        alphas = sorted(doses)
        if len(alphas) < DOSES:
            needs.append(f'{DOSES} doses of α in seed {seed} (so far: {", ".join(f"{a:g}" for a in alphas)})')
            continue
        for key in ('persistence', 'start_token_concentration'):
            series = {f'α = {a:g}': doses[a][key] for a in alphas}
            values, (first, *_, last) = [x['value'] for x in series.values()], series.values()
            rises = None not in values and values == sorted(values) and below(first, last)
            evidence.append(
                condition(seed, key, f'{HEADLINES[key]} of C rises with α, ends apart', rises, **series)
            )
    return evidence, needs


def lowered_by_qknorm(runs):
    pairs, needs = pairs_of(runs, 'qknorm')
    return [
        compare(seed, key, ('qknorm', q['h']), ('baseline', b['h']))
        for seed, q, b in pairs
        for key in ('fixed_dim_ratio', 'kurtosis')
    ], needs


# What is judged, by what, and in which words: all quantities hold in all seeds, some do, none does.
JUDGED = {
    'premise': (
        'the baseline has a start-token outlier in h',
        lambda runs: existence_in(runs, 'baseline'),
        ('yes', 'in some seeds', 'no'),
    ),
    '1': ('at matched loss, the outlier is rebuilt in C', rebuilt, WORDS),
    '2': (
        'in C it is smaller than in h, and more concentrated on the start token',
        smaller_and_more_concentrated,
        WORDS,
    ),
    '2, at matched loss': (
        'the same against the baseline that ends at the same loss',
        smaller_at_matched_loss,
        WORDS,
    ),
    '3': (
        'a higher price α on committing makes it more persistent and more concentrated',
        rises_with_price,
        WORDS,
    ),
    '4': ('QK-norm lowers it in the baseline', lowered_by_qknorm, WORDS),
    'control': (
        'with explicit attention biases, h has a start-token outlier',
        lambda runs: existence_in(runs, 'baseline_bias'),
        ('yes', 'in some seeds', 'no'),
    ),
}


def verdict(evidence, needs, words):
    """words: for all, some and none of the quantities in all seeds. Returns one of them, with the count and what is missing, or that it cannot be judged yet."""
    wanted = f'needs {"; ".join(dict.fromkeys(needs))}'
    if not evidence:
        return f'cannot be judged yet: {wanted}'
    held = {}
    for line in evidence:
        held[line['seed'], line['quantity']] = (
            held.get((line['seed'], line['quantity']), True) and line['holds']
        )
    word, seeds = (
        words[0 if all(held.values()) else 1 if any(held.values()) else 2],
        len({seed for seed, _ in held}),
    )
    return f'{word} ({sum(held.values())} of {len(held)}; {seeds} seed{"s" * (seeds > 1)})' + (
        f'; {wanted}' if needs else ''
    )


def judge(runs):
    """Returns {what: (its text, verdict, evidence)} of everything in JUDGED."""
    judged = {}
    for what, (text, rule, words) in JUDGED.items():
        evidence, needs = rule(runs)
        judged[what] = text, verdict(evidence, needs, words), evidence
    return judged


def quoted(record, key):
    """record: one stream in a line of log.jsonl. Returns a quantity's headline value: at its peak, as measure.py quotes it."""
    values, at = record[key], record[QUOTED_AT.get(key, key)]
    return (
        values[max(range(len(at)), key=lambda s: -math.inf if at[s] is None else at[s])]
        if isinstance(values, list)
        else values
    )


def at_loss(log, loss):
    """log: the lines of log.jsonl. Returns the iteration, and {stream: {quantity: value}}, when the validation loss first came down to `loss`: linear in the loss between
    the two evaluations around it, of those that were the lowest so far. None if it never did, or began below."""
    lowest = [
        line
        for i, line in enumerate(log)
        if all(line['val_loss'] < earlier['val_loss'] for earlier in log[:i])
    ]
    after = next((i for i, line in enumerate(lowest) if line['val_loss'] <= loss), 0)
    if not after:
        return None
    a, b = lowest[after - 1], lowest[after]
    share = (a['val_loss'] - loss) / (a['val_loss'] - b['val_loss'])

    def between(x, y):
        return None if None in (x, y) else x + share * (y - x)

    return between(a['iter'], b['iter']), {
        stream: {key: between(*(quoted(line['streams'][stream], key) for line in (a, b))) for key in SERIES}
        for stream in a['streams']
    }


def matched_series(runs):
    """Returns {seed: (loss, {run's name: at_loss of it})}: the loss that all runs of a seed reach is the highest of their last ones."""
    result = {}
    for seed in sorted({seed for _, seed in runs}):
        logs = {
            run['name']: run['log']
            for (arm, other), run in runs.items()
            if other == seed and run['log'] and not arm.startswith(SHORT)
        }
        if len(logs) > 1:
            loss = max(log[-1]['val_loss'] for log in logs.values())
            result[seed] = loss, {name: at_loss(log, loss) for name, log in logs.items()}
    return result


def markdown(header, rows):
    return '\n'.join(
        '| ' + ' | '.join(map(str, row)) + ' |' for row in [header, ['---'] * len(header), *rows]
    )


def verdict_table(runs):
    return markdown(
        ['claim', 'is', 'verdict'], [(what, text, word) for what, (text, word, _) in judge(runs).items()]
    )


def evidence_table(runs):
    return markdown(
        ['claim', 'seed', 'condition', 'numbers', 'holds'],
        [
            (what, e['seed'], e['text'], e['numbers'], 'yes' if e['holds'] else 'no')
            for what, (_, _, evidence) in judge(runs).items()
            for e in evidence
        ],
    )


def existence_table(runs):
    rows = []
    for (arm, seed), run in runs.items():
        for stream, s in run['measure']['streams'].items():
            lines = existence(run, stream, seed)
            marks = [
                f'{line["numbers"].replace("trained ", "", 1)}: {"yes" if line["holds"] else "no"}'
                for line in lines
            ] or ['untrained not measured'] * 3
            rows.append(
                (
                    run['name'],
                    f'**{stream}**' if s['decoded'] else stream,
                    cell(run['measure']['loss']),
                    *marks,
                    {None: '–', True: 'yes', False: 'no'}[has_outlier(run, stream, seed)],
                )
            )
    return markdown(
        [
            'run',
            'stream',
            'loss',
            f'start ratio, ≥ {TIMES} × untrained',
            f'start persistence, ≥ {PERSISTENT}',
            'start-token conc., above untrained',
            'outlier',
        ],
        rows,
    )


def matched_table(runs):
    rows = [
        (name, f'{loss:.4f}', f'{where[0]:.0f}', stream, *(short(q[key], 3) for key in SERIES))
        for loss, found in matched_series(runs).values()
        for name, where in found.items()
        if where
        for stream, q in where[1].items()
    ]
    return markdown(['run', 'loss', 'at step', 'stream', *(HEADLINES[key] for key in SERIES)], rows)


def controls_table(runs):
    rows = []
    for run in runs.values():
        for stream, s in (run['controls'] or {'streams': {}})['streams'].items():
            kinds = [
                cell(w['streams'][stream]['start_ratio']) if 'streams' in w else '–'
                for w in run['controls']['windows'].values()
            ]
            ranks = [
                f'{s[key]["dim"]}: {s[key]["rank_by_m"]}, {s[key]["rank_by_p"]}, {s[key]["rank_by_concentration"]}'
                for key in ('dominant_dim', 'start_dim')
            ]
            after = run['controls'].get('commits', {}).get('last') if s['decoded'] else None
            shares = [
                f'{after[place]["map_share"]:.0%}' if after and place in after else '–'
                for place in ('start_at_start_dim', 'mean_at_dominant', 'mean_at_others')
            ]
            rows.append((run['name'], stream, *kinds, *ranks, *shares))
    kinds = [
        f'start ratio, windows {kind}'
        for kind in ('anywhere', 'at a document', 'at its end-of-text', 'anywhere, bfloat16')
    ]
    return markdown(
        [
            'run',
            'stream',
            *kinds,
            'j*: rank by m, p, p/m',
            'j0: rank by m, p, p/m',
            "U_P V_P's share of C at (0, j0)",
            'at j*',
            'elsewhere',
        ],
        rows,
    )


def draw_onset(runs, path, key='start_ratio'):
    """Heat maps of one quantity over training and depth: a panel for each stream of each run of the first seed, shorter cosines and further doses of α left out."""
    from matplotlib.colors import LogNorm

    seed = min(seed for _, seed in runs)
    panels = [
        (f'{run["name"]}: {stream}', run['log'], stream)
        for (arm, other), run in runs.items()
        if other == seed and run['log'] and not re.match(f'{SHORT}|{DOSE}', arm)
        for stream in run['log'][0]['streams']
    ]
    if not panels:
        return
    data = [
        np.array([[math.nan if v is None else v for v in line['streams'][stream][key]] for line in log]).T
        for _, log, stream in panels
    ]
    norm = LogNorm(min(np.nanmin(x) for x in data), max(np.nanmax(x) for x in data))
    columns = min(3, len(panels))
    with figure(
        path,
        f'{HEADLINES[key]} (largest ÷ median dimension at position 0) during training, along the depth',
        math.ceil(len(panels) / columns),
        columns,
        (4, 2.9),
    ) as axes:
        axes = list(axes)
        for axis, (title, log, stream), x in zip(axes, panels, data):
            steps, peak = [line['iter'] for line in log], np.nanmax(x, 0)
            onset = next(
                (step for step, v in zip(steps, peak) if v >= TIMES * peak[0]), None
            )  # the rule's factor, on the log's few windows
            mesh = axis.pcolormesh(
                [*steps, steps[-1] * 1.15 + 1], np.arange(len(x) + 1) - 0.5, x, norm=norm, cmap='cividis'
            )  # from its step to the next
            axis.set_xscale('symlog', linthresh=1)
            axis.xaxis.set_major_formatter('{x:g}')
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel='training step', ylabel='sublayer')
            axis.set_title(
                f"{title}\n{'never' if onset is None else f'first at step {onset}:'} {TIMES} × step 0's largest",
                fontsize='medium',
            )
            if onset is not None:
                axis.axvline(onset, color='white', linestyle='--', linewidth=1)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        ticks = [
            n * 10.0**k
            for k in range(-2, 6)
            for n in (1, 1.5, 2, 3, 5, 7)
            if norm.vmin <= n * 10.0**k <= norm.vmax
        ]
        axes[0].figure.colorbar(
            mesh, ax=axes, aspect=15 * len(axes) // columns, ticks=ticks, format='{x:g}', label=HEADLINES[key]
        ).minorticks_off()


def draw_commits(runs, path):
    """What each sublayer adds to C after the last one, at (position 0, j0) and over all positions at j*: identity and map, of each ledger run of its first seed."""
    seed = min(seed for _, seed in runs)
    found = {
        run['name']: run['controls']['commits']['last']
        for (_, other), run in runs.items()
        if other == seed and 'commits' in (run['controls'] or {})
    }
    if not found:
        return
    with figure(
        path,
        'C after the last sublayer: what each sublayer commits, share of the mean magnitude',
        len(found),
        2,
        (5.5, 2.8),
    ) as axes:
        for i, (name, last) in enumerate(found.items()):
            for axis, place, label in zip(
                axes[2 * i : 2 * i + 2],
                ('start_at_start_dim', 'mean_at_dominant'),
                ('position 0, j0', 'all positions, j*'),
            ):
                parts = [
                    np.array([math.nan if v is None else v for v in last[place][part]])
                    / last[place]['magnitude']
                    for part in ('identity', 'map')
                ]
                x = np.arange(len(parts[0]))
                for offset, part, color, legend in zip(
                    (-0.2, 0.2), parts, ('#0072B2', '#D55E00'), ('identity: c · D', 'map: c · U_P V_P D')
                ):
                    axis.bar(x + offset, part, 0.4, color=color, label=legend)
                if 'mean_at_others' in last:
                    other = last[place.split('_at_')[0] + '_at_others']
                    both = [(a + b) / other['magnitude'] for a, b in zip(other['identity'], other['map'])]
                    axis.plot(
                        x, both, color='#000000', marker='.', linewidth=1, label='both, other dimensions'
                    )
                axis.set_title(
                    f'{name}: {label} = {last[place]["dim"]}, mean |C| = {short(last[place]["magnitude"], 3)}',
                    fontsize='medium',
                )
                axis.set(xlabel='committing sublayer', ylabel='share')
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.axhline(0, color='#999999', linewidth=0.8)
                axis.grid(alpha=0.3)
        axes[0].legend(fontsize='small')


TABLES = {
    'Existence': existence_table,
    'Verdicts': verdict_table,
    'Evidence': evidence_table,
    'At the loss that all runs of a seed reach, interpolated; largest value over the sublayers, no intervals': matched_table,
    'Controls': controls_table,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'folder',
        nargs='?',
        type=Path,
        default=Path(__file__).parent,
        help='one that holds <arm>_<scale>_<seed>/ (default: where this file is)',
    )
    folder = parser.parse_args(argv).folder
    try:
        runs = read_runs(folder)
        for title, table in TABLES.items():
            print(f'{title}\n\n{table(runs)}\n')
        draw_onset(runs, folder / 'onset.png')
        draw_commits(runs, folder / 'commits.png')
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
