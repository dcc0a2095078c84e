"""
The verdicts on the four published claims, by rules that were fixed before the runs (DESIGN.md §1), with every number that went into them.

    python results/pysource_160m/verdicts.py                    the runs packed beside this file
    python results/pysource_160m/verdicts.py out/packed         those that run.sh has packed

Prints Markdown tables and draws onset.png (when the outlier appears) and commits.png (what C is committed from) from <arm>_<scale>_<seed>/: measure.json and measure_0.json,
the same of the untrained weights, log.jsonl, controls.json.

- Apart: the 95% intervals over sequences do not overlap. A claim is a list of conditions, each judged in every seed: all hold: reproduced; some: partly; none: not reproduced.
- A stream has a start-token outlier if its start ratio is at least 3 times the untrained model's, apart; its start persistence is at least 0.5; and its start-token concentration is
  above the untrained model's, apart.
- Losses are matched within 0.01 nats: against a baseline of the same seed whose own, shorter cosine ends there (baseline_short); beside it, without intervals,
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, when this file is run as a script
from measure import HEADLINES, QUOTED_AT, cell, figure, read_log, short
from model import UserError

MATCHED, DOSES = 0.01, 4   # nats; how many values of α claim 3 needs
TIMES, PERSISTENT = 3, 0.5  # of existence
SHORT = 'short'             # arms named so end at another run's loss on purpose: they do not say which loss all reach
CLAIMS = {1: 'at matched loss, the outlier is rebuilt in C', 2: 'C: smaller than in h, and more concentrated on the start token',
          3: 'a higher price α on committing: more persistent, more concentrated', 4: 'QK-norm lowers the outlier of the baseline'}
SERIES = ('fixed_dim_ratio', 'start_ratio', 'start_token_concentration', 'persistence', 'start_persistence', 'kurtosis')


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
            runs[match[1], int(match[2])] = {'name': path.parent.name, 'measure': read(path), 'untrained': read(path.with_name('measure_0.json')),
                                             'log': read_log(path.with_name('log.jsonl')), 'controls': read(path.with_name('controls.json'))}
    if not runs:
        raise UserError(f'there is no <arm>_<scale>_<seed>/measure.json in {folder}: make them with bash results/pysource_160m/run.sh')
    if len({json.dumps(run['measure']['data'], sort_keys=True) for run in runs.values()}) > 1:
        raise UserError(f'the runs in {folder} were not measured on the same windows: measure them again, with the same flags')
    return runs


def decoded(report):
    """Returns the name of the stream that the head reads, and its entry in measure.json."""
    return next((name, s) for name, s in report['streams'].items() if s['decoded'])


def below(x, y):
    """x, y: headlines. Is x below y, apart? What is not finite is never apart."""
    return None not in (x['high'], y['low']) and x['high'] < y['low']


def condition(seed, text, holds, *numbers):
    """One line of evidence; numbers: (label, headline or number), as many as went into it."""
    return {'seed': seed, 'text': text, 'holds': bool(holds),
            'numbers': '; '.join(f'{label} {cell(x) if isinstance(x, dict) else short(x, 4)}' for label, x in numbers)}


def compare(seed, key, low, high):
    """Evidence that the quantity `key` of one stream lies below that of another, apart. low, high: (label, entry of measure.json)."""
    return condition(seed, f'{HEADLINES[key]} of {low[0]} below that of {high[0]}, apart', below(low[1][key], high[1][key]), (low[0], low[1][key]), (high[0], high[1][key]))


def existence(run, stream, seed):
    """The three conditions for a start-token outlier in a stream; none if the untrained weights were not measured."""
    if run['untrained'] is None:
        return []
    s, untrained, who = run['measure']['streams'][stream], run['untrained']['streams'][stream], f"{run['name']} {stream}"
    ratio, before = s['start_ratio'], untrained['start_ratio']
    return [
        condition(seed, f'start ratio of {who} at least {TIMES} times the untrained, apart',
                  None not in (ratio['value'], before['value']) and ratio['value'] >= TIMES * before['value'] and below(before, ratio), ('', ratio), ('untrained', before)),
        condition(seed, f'start persistence of {who} at least {PERSISTENT}', s['start_persistence']['value'] >= PERSISTENT, ('', s['start_persistence'])),
        condition(seed, f'start-token conc. of {who} above the untrained, apart', below(untrained['start_token_concentration'], s['start_token_concentration']),
                  ('', s['start_token_concentration']), ('untrained', untrained['start_token_concentration']))]


def pairs(runs, arm, partner):
    """Yields (seed, run or None, partner's run or None) for every seed of the two arms."""
    for seed in sorted({seed for name, seed in runs if name in (arm, partner)}) or [None]:
        yield seed, runs.get((arm, seed)), runs.get((partner, seed))


def missing(seed, **named):
    """Says which of the runs are None."""
    return [f"{arm}{'' if seed is None else f', seed {seed}'}" for arm, run in named.items() if run is None]


def matched_partner(runs, seed):
    """Returns the baseline of the seed whose loss is nearest to the ledger's, and the difference, ledger − baseline, in nats."""
    loss = runs['ledger', seed]['measure']['val_loss']
    near = [(run, loss - run['measure']['val_loss']) for (arm, other), run in runs.items() if other == seed and arm in ('baseline', f'baseline_{SHORT}')]
    return min(near, key=lambda pair: abs(pair[1]), default=(None, math.inf))


def claim_1(runs):
    evidence, needs = [], []
    for seed in sorted(seed for arm, seed in runs if arm == 'ledger') or [None]:
        if seed is None:
            needs.append('ledger')
            continue
        partner, difference = matched_partner(runs, seed)
        if abs(difference) > MATCHED:
            needs.append(f'a baseline of seed {seed} that ends within {MATCHED} nats of the ledger'
                         + (f" (nearest: {partner['name']}, {abs(difference):.3f} nats {'below' if difference > 0 else 'above'})" if partner else ''))
        elif not (lines := existence(runs['ledger', seed], 'C', seed)):
            needs.append(f'the untrained ledger of seed {seed}, measured')
        else:
            lines[0]['numbers'] += f"; loss {difference:+.4f} nats against {partner['name']}"
            evidence += lines
    return evidence, needs


def claim_2(runs, partner='baseline'):
    evidence, needs = [], []
    for seed, ledger, baseline in pairs(runs, 'ledger', partner):
        needs += missing(seed, ledger=ledger, **{partner: baseline})
        if ledger and baseline:
            C, h = (('C', ledger['measure']['streams']['C']), ('h', baseline['measure']['streams']['h']))
            evidence += [compare(seed, 'fixed_dim_ratio', C, h), compare(seed, 'start_token_concentration', h, C)]
    return evidence, needs


def claim_3(runs):
    evidence, needs = [], []
    for seed in sorted({seed for arm, seed in runs if arm.startswith('ledger')}) or [None]:
        doses = {run['measure']['model']['commit_sparsity']: run['measure']['streams']['C'] for (arm, other), run in sorted(runs.items())
                 if other == seed and re.fullmatch(r'ledger(_hs|_a[\d.]+)?', arm)}
        alphas = sorted(doses)
        if len(alphas) < DOSES:
            needs.append(f"{DOSES} doses of α{'' if seed is None else f' in seed {seed}'} (so far: {', '.join(f'{a:g}' for a in alphas) or 'none'})")
            continue
        for key in ('persistence', 'start_token_concentration'):
            series = [doses[a][key] for a in alphas]
            values = [x['value'] for x in series]
            rises = None not in values and all(a <= b for a, b in zip(values, values[1:])) and below(series[0], series[-1])
            evidence.append(condition(seed, f'{HEADLINES[key]} of C rises with α, ends apart', rises, *((f'α = {a:g}:', x) for a, x in zip(alphas, series))))
    return evidence, needs


def claim_4(runs):
    evidence, needs = [], []
    for seed, qknorm, baseline in pairs(runs, 'qknorm', 'baseline'):
        needs += missing(seed, qknorm=qknorm, baseline=baseline)
        if qknorm and baseline:
            q, b = (('qknorm', qknorm['measure']['streams']['h']), ('baseline', baseline['measure']['streams']['h']))
            evidence += [compare(seed, key, q, b) for key in ('fixed_dim_ratio', 'kurtosis')]
    return evidence, needs


def verdict(evidence, needs):
    """'reproduced', 'partly', 'not reproduced' or 'cannot be judged yet', with the seeds and with what is missing."""
    wanted = f"needs {'; '.join(dict.fromkeys(needs))}"
    if not evidence:
        return f'cannot be judged yet: {wanted}'
    held, seeds = [e['holds'] for e in evidence], len({e['seed'] for e in evidence})
    word = 'reproduced' if all(held) else 'partly' if any(held) else 'not reproduced'
    return f"{word} ({sum(held)} of {len(held)} conditions, {seeds} seed{'s' * (seeds > 1)})" + (f'; {wanted}' if needs else '')


def judge(runs):
    """Returns {title: (verdict, evidence)} for the four claims, claim 2 also against the baseline of the same loss."""
    judged = {}
    for n, claim in {1: claim_1, 2: claim_2, 3: claim_3, 4: claim_4}.items():
        evidence, needs = claim(runs)
        judged[f'{n}. {CLAIMS[n]}'] = verdict(evidence, needs), evidence
        if n == 2:
            matched = {(arm, seed): run for (arm, seed), run in runs.items() if arm == 'ledger' or arm == f'baseline_{SHORT}'}
            for _, seed in [key for key in matched if key[0] == 'ledger']:
                if abs(matched_partner(matched, seed)[1]) > MATCHED:
                    matched.pop((f'baseline_{SHORT}', seed), None)
            evidence, needs = claim_2(matched, f'baseline_{SHORT}')
            judged['2, against the baseline that ends at the same loss'] = verdict(evidence, needs), evidence
    return judged


def quoted(record, key):
    """record: one stream in a line of log.jsonl. Returns a quantity's headline value: at its peak, as measure.py quotes it."""
    values, at = record[key], record[QUOTED_AT.get(key, key)]
    return values[max(range(len(at)), key=lambda s: -math.inf if at[s] is None else at[s])] if isinstance(values, list) else values


def at_loss(log, loss):
    """log: the lines of log.jsonl. Returns the iteration, and {stream: {quantity: value}}, when the validation loss first came down to `loss`: linear in the loss between
    the two evaluations around it, of those that were the lowest so far. None if it never did, or began below."""
    lowest = [line for i, line in enumerate(log) if all(line['val_loss'] < earlier['val_loss'] for earlier in log[:i])]
    after = next((i for i, line in enumerate(lowest) if line['val_loss'] <= loss), 0)
    if not after:
        return None
    a, b = lowest[after - 1], lowest[after]
    share = (a['val_loss'] - loss) / (a['val_loss'] - b['val_loss'])

    def between(x, y):
        return None if None in (x, y) else x + share * (y - x)

    return between(a['iter'], b['iter']), {stream: {key: between(*(quoted(line['streams'][stream], key) for line in (a, b))) for key in SERIES} for stream in a['streams']}


def matched_series(runs):
    """Returns {seed: (loss, {run's name: at_loss of it})}: the loss that all runs of a seed reach is the highest of their last ones."""
    result = {}
    for seed in sorted({seed for _, seed in runs}):
        logs = {run['name']: run['log'] for (arm, other), run in runs.items() if other == seed and run['log'] and not arm.endswith(SHORT)}
        if len(logs) > 1:
            loss = max(log[-1]['val_loss'] for log in logs.values())
            result[seed] = loss, {name: at_loss(log, loss) for name, log in logs.items()}
    return result


def markdown(header, rows):
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in [header, ['---'] * len(header), *rows])


def verdict_table(runs):
    return markdown(['claim', 'verdict'], [(title, text) for title, (text, _) in judge(runs).items()])


def evidence_table(runs):
    return markdown(['claim', 'seed', 'condition', 'numbers', 'holds'], [
        (title.split('.')[0].split(',')[0] + '*' * (',' in title[:2]), e['seed'], e['text'], e['numbers'], 'yes' if e['holds'] else 'no')
        for title, (_, evidence) in judge(runs).items() for e in evidence])


def existence_table(runs):
    rows = []
    for (arm, seed), run in runs.items():
        for stream, s in run['measure']['streams'].items():
            lines = existence(run, stream, seed)
            marks = [f"{line['numbers'].strip()}: {'yes' if line['holds'] else 'no'}" for line in lines] or ['untrained not measured'] * 3
            rows.append((run['name'], f'**{stream}**' if s['decoded'] else stream, cell(run['measure']['loss']), *marks,
                         '–' if not lines else 'yes' if all(line['holds'] for line in lines) else 'no'))
    return markdown(['run', 'stream', 'loss', f'start ratio, ≥ {TIMES} × untrained', f'start persistence, ≥ {PERSISTENT}', 'start-token conc., above untrained', 'outlier'], rows)


def matched_table(runs):
    rows = [(name, f'{loss:.4f}', f'{where[0]:.0f}', stream, *(short(q[key], 3) for key in SERIES))
            for loss, found in matched_series(runs).values() for name, where in found.items() if where for stream, q in where[1].items()]
    return markdown(['run', 'loss', 'at step', 'stream', *(HEADLINES[key] for key in SERIES)], rows)


def controls_table(runs):
    rows = []
    for run in runs.values():
        for stream, s in (run['controls'] or {'streams': {}})['streams'].items():
            kinds = [cell(w['streams'][stream]['start_ratio']) if 'streams' in w else '–' for w in run['controls']['windows'].values()]
            ranks = [f"{s[key]['dim']}: {s[key]['rank_by_m']}, {s[key]['rank_by_p']}, {s[key]['rank_by_concentration']}" for key in ('dominant_dim', 'start_dim')]
            after = run['controls'].get('commits', {}).get('last') if s['decoded'] else None
            shares = [f"{after[place]['map_share']:.0%}" if after and place in after else '–' for place in ('start_at_start_dim', 'mean_at_dominant', 'mean_at_others')]
            rows.append((run['name'], stream, *kinds, *ranks, *shares))
    return markdown(['run', 'stream', *(f'start ratio, windows {kind}' for kind in ('anywhere', 'at a document', 'at its end-of-text')), 'j*: rank by m, p, p/m', 'j0: rank by m, p, p/m',
                     "U_P V_P's share of C at (0, j0)", 'at j*', 'elsewhere'], rows)


def draw_onset(runs, path, key='start_ratio'):
    """Heat maps of one quantity over training and depth, a panel for each run of the first seed that has a log, and each of its streams."""
    from matplotlib.colors import LogNorm
    seed = min(seed for (_, seed), run in runs.items() if run['log'])
    panels = [(f"{run['name']}: {stream}", run['log'], stream) for (_, other), run in runs.items() if other == seed and run['log'] for stream in run['log'][0]['streams']]
    data = [np.array([[math.nan if v is None else v for v in line['streams'][stream][key]] for line in log]).T for _, log, stream in panels]
    norm = LogNorm(min(np.nanmin(x) for x in data), max(np.nanmax(x) for x in data))
    columns = min(3, len(panels))
    with figure(path, f'{HEADLINES[key]} (largest ÷ median dimension at position 0) during training, along the depth', math.ceil(len(panels) / columns), columns, (4.2, 3)) as axes:
        for axis, (title, log, stream), x in zip(axes, panels, data):
            steps, peak = [line['iter'] for line in log], np.nanmax(x, 0)
            onset = next((step for step, v in zip(steps, peak) if v >= TIMES * peak[0]), None)
            mesh = axis.pcolormesh([*steps, steps[-1] * 1.15 + 1], np.arange(len(x) + 1) - 0.5, x, norm=norm, cmap='cividis')  # from its step to the next
            axis.set_xscale('symlog', linthresh=1)
            axis.set(title=f"{title}\n{TIMES} × step 0: {'never' if onset is None else f'from step {onset}'}", xlabel='training step', ylabel='sublayer')
            axis.title.set_size('medium')
            if onset is not None:
                axis.axvline(onset, color='white', linestyle='--', linewidth=1)
            axis.figure.colorbar(mesh, ax=axis, format='{x:g}')
        for axis in list(axes)[len(panels):]:
            axis.set_axis_off()


def draw_commits(runs, path):
    """What each sublayer adds to C after the last one, at (position 0, j0) and over all positions at j*: identity and map, of each ledger run of its first seed."""
    found = {run['name']: run['controls']['commits']['last'] for run in runs.values() if run['controls'] and 'commits' in run['controls']}
    first = min(name.rsplit('_', 1)[1] for name in found)
    found = {name: last for name, last in found.items() if name.endswith(f'_{first}')}
    with figure(path, 'C after the last sublayer: what each sublayer commits, share of the mean magnitude', len(found), 2, (5.5, 2.8)) as axes:
        for i, (name, last) in enumerate(found.items()):
            for axis, place, label in zip(axes[2 * i:2 * i + 2], ('start_at_start_dim', 'mean_at_dominant'), ('position 0, j0', 'all positions, j*')):
                parts = [np.array([math.nan if v is None else v for v in last[place][part]]) / last[place]['magnitude'] for part in ('identity', 'map')]
                x = np.arange(len(parts[0]))
                for offset, part, color, legend in zip((-0.2, 0.2), parts, ('#0072B2', '#D55E00'), ('identity: c · D', 'map: c · U_P V_P D')):
                    axis.bar(x + offset, part, 0.4, color=color, label=legend)
                if 'mean_at_others' in last:
                    other = last[place.split('_at_')[0] + '_at_others']
                    axis.plot(x, [(a + b) / other['magnitude'] for a, b in zip(other['identity'], other['map'])], color='#000000', marker='.', linewidth=1, label='both, other dimensions')
                axis.set(title=f"{name}: {label} = {last[place]['dim']}, |C| = {short(last[place]['magnitude'], 3)}", xlabel='committing sublayer', ylabel='share')
                axis.title.set_size('medium')
                axis.axhline(0, color='#999999', linewidth=0.8)
                axis.grid(alpha=0.3)
        axes[0].legend(fontsize='small')


TABLES = {'Existence': existence_table, 'Verdicts': verdict_table, 'Evidence (2*: at matched loss)': evidence_table,
          'At the loss that all runs of a seed reach, interpolated; largest value over the sublayers, no intervals': matched_table, 'Controls': controls_table}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=Path(__file__).parent, help='one that holds <arm>_<scale>_<seed>/ (default: where this file is)')
    folder = parser.parse_args(argv).folder
    try:
        runs = read_runs(folder)
        for title, table in TABLES.items():
            print(f'{title}\n\n{table(runs)}\n')
        if any(run['log'] for run in runs.values()):
            draw_onset(runs, folder / 'onset.png')
        if any(run['controls'] and 'commits' in run['controls'] for run in runs.values()):
            draw_commits(runs, folder / 'commits.png')
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
