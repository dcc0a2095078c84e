"""
Makes every table of results/README.md from the files in results/, so that text and data cannot drift apart.

    python -m studies.tables              prints all tables
    python -m studies.tables --write      puts each in its place, between <!-- table NAME --> and <!-- end -->

Every README.md below results/ may have such places. A test holds them to what this prints.
"""

import argparse
import re
from functools import cache

from data.loader import UserError, atomic_write, interrupts_exit, user_errors_exit
from studies import first_rules, verdicts
from studies.chance import chance_table
from studies.pack import read_json
from studies.results import (
    DOSE,
    RESULTS,
    by_scale,
    markdown,
    runs_in,
    significant,
    stream_label,
    with_interval,
)
from studies.table import table_of

SOURCE_SETS = ('demo_long', 'comparison_160m', 'comparison_290m')  # judged by the first set of rules
SECOND_SETS = ('english',)  # judged by the second one
ARM_SETS = ('arms',)  # one table of many arms; no claim is judged
COLUMNS = {
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_ratio': 'start ratio',
    'start_token_concentration': 'start-token conc.',
    'persistence': 'persistence',
    'kurtosis': 'kurtosis',
    'max_over_median': 'max over median',
}
BLOCK = re.compile(r'<!-- table (.+?) -->\n(.*?)<!-- end -->', re.S)


@cache
def runs_of(name):
    """Returns the runs of a set in results/."""
    return runs_in(RESULTS / name)


@cache
def compared(name):
    """Returns {(arm, seed): run} of a set in results/ that has one scale."""
    (runs,) = by_scale(runs_of(name)).values()
    return runs


def named(runs):
    """Returns {(arm, seed): run}. Unlike by_scale() it takes runs whose windows begin with another token."""
    return {(run.arm, run.seed): run for run in runs}


# ---- Runs


def run_table(name):
    """A line for each run and stream of a set: headlines with 95% intervals over sequences."""
    rows = [
        (
            run.name,
            stream_label(stream, entry),
            with_interval(run.measure['loss']),
            *(with_interval(entry[key]) for key in COLUMNS),
        )
        for run in runs_of(name)
        for stream, entry in run.measure['streams'].items()
    ]
    return markdown(['run', 'stream', 'loss (nats per token)', *COLUMNS.values()], rows)


def how_many(answers):
    """Returns how many of the answers are True, of those that are known: '2 of 3'."""
    known = [answer for answer in answers if answer is not None]
    return f'{sum(known)} of {len(known)}'


def arm_table(names):
    """A line for each scale, arm and stream, with the headlines of all seeds.
    Doses of α and shorter cosines are left out."""
    left_out = re.compile(rf'ledger_a\d.*|{first_rules.SHORT}.*')
    found = {}
    for name in names:
        for run in runs_of(name):
            if left_out.fullmatch(run.arm):
                continue
            for stream, entry in run.measure['streams'].items():
                values = [f'{run.loss:.3f}', *(significant(entry[key]['value'], 3) for key in COLUMNS)]
                key = run.scale, run.arm, stream_label(stream, entry)
                found.setdefault(key, []).append((first_rules.has_outlier(run, stream), values))
    rows = [
        (*key, how_many(has for has, _ in seeds), *map(', '.join, zip(*(values for _, values in seeds))))
        for key, seeds in found.items()
    ]
    return markdown(['scale', 'arm', 'stream', 'outlier', 'loss', *COLUMNS.values()], rows)


def claim_table(names):
    """The verdicts by the first set of rules, a column for each set."""
    judged = [first_rules.judge(compared(name)) for name in names]
    rows = [
        (text, *(one[claim][1].partition('; needs')[0] for one in judged))
        for claim, (text, _, _) in judged[0].items()
    ]
    return markdown(['claim', *names], rows)


def existence_table(name):
    """A line for each run and stream: the three conditions of the first set of rules."""
    rows = []
    for run in compared(name).values():
        for stream, entry in run.measure['streams'].items():
            cells = [
                f'{line.numbers.replace("trained ", "", 1)}: {"yes" if line.holds else "no"}'
                for line in first_rules.existence(run, stream)
            ]
            label = stream_label(stream, entry)
            rows.append((run.name, label, *cells, first_rules.outlier_cell(run, stream)))
    conditions = ['start ratio, ≥ 3 × untrained', 'start persistence, ≥ 0.5', 'start-token conc., above']
    return markdown(['run', 'stream', *conditions, 'outlier'], rows)


def price_table(names):
    """A line for each set and dose of α: in how many seeds C has an outlier by the first set of rules,
    the mean commit gate at the end, and the loss less that of the baseline of the same seed."""
    rows = []
    for name in names:
        runs = compared(name)
        doses = {}
        for run in runs.values():
            if DOSE.fullmatch(run.arm) or run.arm.startswith('ledger_ramp'):
                label = f'{run.alpha:g}' + ', gates open last' * run.arm.startswith('ledger_ramp')
                doses.setdefault((run.alpha, label), []).append(run)
        for (_, label), group in sorted(doses.items()):
            gates = [sum(run.log[-1]['commit_rate']) / len(run.log[-1]['commit_rate']) for run in group]
            lag = [
                f'{run.loss - runs["baseline", run.seed].loss:+.3f}'
                for run in group
                if ('baseline', run.seed) in runs
            ]
            has = how_many(first_rules.has_outlier(run, 'C') for run in group)
            rows.append((name, label, has, ', '.join(significant(x, 2) for x in gates), ', '.join(lag)))
    header = ['set', 'α', 'seeds with an outlier in C', 'mean commit gate', "loss − the baseline's"]
    return markdown(header, rows)


def post_hoc_table(name):
    """The verdicts on claims 1 to 4 by the second set of rules, where the files allow."""
    judged = verdicts.judge(compared(name), post_hoc=True)
    some = {key: found for key, found in judged.items() if key[0] in ('premise', '1', '2', '3', '4')}
    return verdicts.verdict_table(some)


# ---- Controls


def control_windows(run, stream):
    """Returns the start ratio on each kind of window as cells."""
    return [
        with_interval(window['streams'][stream]['start_ratio']) if 'streams' in window else '–'
        for window in run.controls['windows'].values()
    ]


def control_ranks(entry):
    """Returns the ranks of j* and j0 among all dimensions as cells."""
    return [
        f'{x["dim"]}: {x["rank_by_m"]}, {x["rank_by_p"]}, {x["rank_by_concentration"]}'
        for x in (entry['dominant_dim'], entry['start_dim'])
    ]


def map_shares(run, entry):
    """Returns the share of C that U_P V_P adds, at three places, as cells."""
    last = run.controls.get('commits', {}).get('last') if entry['decoded'] else None
    places = ('start_at_start_dim', 'mean_at_dominant', 'mean_at_others')
    return [f'{last[place]["map_share"]:.0%}' if last and place in last else '–' for place in places]


def control_table(runs):
    """A line for each run and stream with controls: other windows, other dimensions, what C is made of."""
    rows = [
        (run.name, stream, *control_windows(run, stream), *control_ranks(entry), *map_shares(run, entry))
        for run in runs.values()
        if run.controls
        for stream, entry in run.controls['streams'].items()
    ]
    kinds = ('anywhere', 'at a document', 'at its end-of-text', 'anywhere, bfloat16')
    ranks = ['j*: rank by m, p, p/m', 'j0: rank by m, p, p/m']
    shares = ["U_P V_P's share of C at (0, j0)", 'at j*', 'elsewhere']
    return markdown(['run', 'stream', *(f'start ratio, {kind}' for kind in kinds), *ranks, *shares], rows)


def precision_table(names):
    """For each quantity the largest change that bfloat16 streams make to a headline, over all controls."""
    windows = [run.controls['windows'] for name in names for run in compared(name).values() if run.controls]
    rows = []
    for key, label in COLUMNS.items():
        pairs = [
            (w['anywhere_bfloat16']['streams'][stream][key]['value'], entry[key]['value'])
            for w in windows
            for stream, entry in w['anywhere']['streams'].items()
        ]
        if key == 'persistence':
            largest = f'{max(abs(x - y) for x, y in pairs):.3f} of the sublayers'
        else:
            largest = f'{max(abs(x - y) / abs(y) for x, y in pairs):.1%}'
        rows.append((label, len(pairs), largest))
    return markdown(['headline', 'streams', 'largest change'], rows)


# ---- Emergence

STREAMS_OF = {'baseline/h': 'h', 'ledger/D': 'D', 'ledger/C': 'C'}


def emergence(name, file='emergence.json'):
    return read_json(RESULTS / 'emergence' / name / file)


def fit_row(run, stream, lines):
    """lines: of the summary in emergence.json, for one stream. Returns a row of fit_table."""
    fitted, preferred, identifiable = (
        sum(line[key] for line in lines) for key in ('fitted', 'f_preferred', 'identifiable')
    )
    mean = sum(line['r2'] * line['fitted'] for line in lines) / fitted
    least = min(line['r2_least'] for line in lines)
    kinds = ('early peak', 'log increase', 'neither')
    classes = ' / '.join(str(sum(line['classes'].get(kind, 0) for line in lines)) for kind in kinds)
    return run, stream, fitted, f'{mean:.3f} ({least:.2f})', preferred, identifiable, classes


def fit_table():
    """A line for each stream of the sweep, and for each stream of each run at 160m."""
    groups = {}
    for name in ('sweep', '160m'):
        for line in emergence(name)['summary']:
            run = '28 small architectures' if name == 'sweep' else line['run']
            groups.setdefault((run, line['stream']), []).append(line)
    header = ['runs', 'stream', 'series', 'mean R² (least)', 'f is best by AIC', 'all five identifiable']
    rows = [fit_row(*key, lines) for key, lines in groups.items()]
    return markdown([*header, 'early peak / log increase / neither'], rows)


def prediction_table():
    """How well the architecture alone predicts what was left out."""
    words = {'curve': 'the whole curve', 'final': 'ratio at the end', 'half_step': 'step of half height'}
    rows = []
    for key, line in emergence('sweep', 'prediction.json').items():
        of_arm = line['r2_of_arm']
        alone = [f'{of_arm[arm]:.2f}' if arm in of_arm else '–' for arm in STREAMS_OF]
        pooled = [f'{line[split]:.2f}' for split in ('r2_architectures_out', 'r2_random_split')]
        rows.append((words.get(key, key), line['n'], *pooled, *alone))
    header = ['predicted', 'series', 'R², architectures left out', 'R², random split']
    return markdown([*header, *(f'R² within {stream}' for stream in STREAMS_OF.values())], rows)


def onset_table():
    """The growth of a ratio beside what a class of tokens adds to the fall of the loss: rank correlations."""
    rows = []
    for path in sorted((RESULTS / 'emergence/onset').glob('*.json')):
        for entry in read_json(path)['streams']:
            found = {kind: x for kind, x in entry['with'].items() if x['p'] is not None}
            kind = min(found, key=lambda name: found[name]['p'])
            ratio, p = f'{entry["stream"]}, {entry["ratio"]}', f'{found[kind]["p"]:.3f}'
            rows.append((path.stem, ratio, len(found), kind, f'{found[kind]["rank_correlation"]:.2f}', p))
    return markdown(['run', 'of', 'classes', 'smallest p for', 'rank correlation', 'p'], rows)


# ---- Interventions and probes

CHANGES = {
    'the four largest entries of each sequence, zeroed': ('stream', 'top', 'zero', 'once'),
    'the four largest at the start token, zeroed': ('stream', 'start', 'zero', 'once'),
    'the four largest dimensions everywhere, zeroed': ('stream', 'dims', 'zero', 'once'),
    'the same at their means for each position': ('stream', 'dims', 'mean', 'once'),
    'these dimensions kept from what sublayers read': ('reads', 'dims', 'zero', 'every'),
    'these dimensions kept from the head alone': ('decoder', 'dims', 'zero', ''),
    'all magnitudes clipped at their 0.9 quantile': ('stream', 'all', 'clip 0.9', 'once'),
}
EDITED = {
    '160m baseline, 61M tokens, h': ('pysource_160m_lr6e-4/baseline_160m_1337', 'h'),
    '160m ledger, D': ('comparison_160m/ledger_160m_1337', 'D'),
    '160m ledger, C': ('comparison_160m/ledger_160m_1337', 'C'),
    'longer demo, baseline, h': ('demo_long/baseline_demo_1337', 'h'),
    'longer demo, ledger, D': ('demo_long/ledger_demo_1337', 'D'),
    'longer demo, ledger, C': ('demo_long/ledger_demo_1337', 'C'),
}
PROBED = ('token class', 'next token class', 'position', 'line start', 'bracket depth', 'inside')


def changes_in(run, stream):
    """Returns the sublayer and {(where, what, how, reach): result} of an intervene.json."""
    results = read_json(RESULTS / run / 'intervene.json')['results']
    of_stream = [result for result in results if result['stream'] == stream]
    keys = ('where', 'what', 'how', 'reach')
    return of_stream[0]['sublayer'], {tuple(result[key] for key in keys): result for result in of_stream}


def change_cell(result):
    """Returns the ratio of perplexities with its interval; after the semicolon, of the control."""
    if result is None:
        return '–'
    x, control = result['edit']['ratio'], result['controls']['moved']['ratio']['value']
    return f'{x["value"]:.3f} [{x["low"]:.3f}, {x["high"]:.3f}]; {control:.3f}'


def intervention_table():
    """Each cell is the perplexity after a change over the one before, with a 95% interval.
    The number after the semicolon is the control: the same change in other dimensions of the same tokens."""
    found = {name: changes_in(*place) for name, place in EDITED.items()}
    header = [f'{name} after {sublayer}' for name, (sublayer, _) in found.items()]
    rows = [
        (words, *(change_cell(results.get(key)) for _, results in found.values()))
        for words, key in CHANGES.items()
    ]
    return markdown(['changed', *header], rows)


def accuracy_cell(x):
    """x: {'value', 'low', 'high'}, shares. Returns them in percent."""
    return f'{100 * x["value"]:.0f} [{100 * x["low"]:.0f}, {100 * x["high"]:.0f}]'


def probe_table():
    """Balanced accuracy of linear probes in percent, with the smallest and largest over the seeds, where the
    fixed-dimension ratio is largest."""
    rows = []
    for name, (run, stream) in EDITED.items():
        place = read_json(RESULTS / run / 'probe.json')['streams'][stream][0]
        for told in ('mean', 'start', 'random', 'all'):
            cells = [accuracy_cell(place['tasks'][task]['linear'][told]['balanced']) for task in PROBED]
            rows.append((f'{name} after {place["sublayer"]}', told, *cells))
        chance = [f'{100 / len(place["tasks"][task]["classes"]):.0f}' for task in PROBED]
    return markdown(['stream', 'told', *PROBED], [*rows, ('', 'chance', *chance)])


# ---- Speed

# By the number of GPUs.
SCALING = {1: 'speed/h100_bench_290m_32.json', 2: 'speed/h100_two_gpus_290m.json'}


def scaling_table():
    """290m, 32 sequences a GPU: tokens/s over all GPUs, efficiency against one, and the share of a step spent
    waiting for gradients."""
    arms = {count: read_json(RESULTS / name)['arms'] for count, name in SCALING.items()}
    rows = []
    for count, reports in arms.items():
        for arm, line in reports.items():
            rate, alone = line['tokens_per_s'], arms[1][arm]['tokens_per_s']
            waiting = '–' if count == 1 else f'{line["waiting_for_gradients"]:.1%}'
            efficiency = f'{rate / count / alone:.2f}'
            rows.append(
                (f'{arm}_290m', count, f'{rate / 1000:.0f}', efficiency, waiting, f'{line["ratio"]:.2f}')
            )
    header = ['arm', 'GPUs', 'thousand tokens/s', 'efficiency', 'waiting for gradients']
    return markdown([*header, 'ledger ÷ baseline'], rows)


# ---- All of them


def tables():
    """Returns {name: function that makes the Markdown} of every table."""
    found = {
        'arms': lambda: arm_table(SOURCE_SETS[1:]),
        'claims': lambda: claim_table(SOURCE_SETS),
        'price': lambda: price_table(SOURCE_SETS),
        'precision': lambda: precision_table(SOURCE_SETS[1:]),
        'fits': fit_table,
        'predictions': prediction_table,
        'onset': onset_table,
        'interventions': intervention_table,
        'probes': probe_table,
        'scaling': scaling_table,
    }
    for name in ('demo', 'pysource_160m', 'pysource_160m_lr6e-4', *SOURCE_SETS):
        found[f'runs of {name}'] = lambda name=name: run_table(name)
    for name in SOURCE_SETS:
        found[f'post hoc, {name}'] = lambda name=name: post_hoc_table(name)
    chance = read_json(RESULTS / 'comparison_160m/chance.json')
    found['chance, comparison_160m'] = lambda: chance_table(chance['160m'])
    for name in SOURCE_SETS[1:]:
        found[f'existence in {name}'] = lambda name=name: existence_table(name)
        found[f'controls in {name}'] = lambda name=name: control_table(compared(name))
    for name in ARM_SETS:
        found[f'side by side in {name}'] = lambda name=name: table_of(runs_of(name)).strip()
        found[f'objects in {name}'] = lambda name=name: verdicts.object_table(named(runs_of(name)))
    for name in SECOND_SETS:
        if (RESULTS / name).exists():
            found |= second_tables(RESULTS / name)
    return found


def second_tables(folder):
    """Returns {name: function} of the tables of a set that the second set of rules judges, at each of its
    scales."""
    found = {f'runs of {folder.name}': lambda: run_table(folder.name)}
    chance = read_json(folder / 'chance.json') or {}
    for scale, runs in by_scale(runs_in(folder)).items():
        here = f'{folder.name} {scale}'
        judged = cache(lambda runs=runs: verdicts.tables_second(runs))
        for title in judged():
            found[f'{title.lower()}, {here}'] = lambda judged=judged, title=title: judged()[title]
        found[f'controls in {here}'] = lambda runs=runs: control_table(runs)
        if scale in chance:
            found[f'chance, {here}'] = lambda scale=scale: chance_table(chance[scale])
    return found


def filled(text):
    """Returns a README with every table between its marks; raises UserError for a mark without a table."""
    makers = tables()

    def block(match):
        if match[1] not in makers:
            raise UserError(f'there is no table {match[1]}: expected one of {", ".join(makers)}')
        return f'<!-- table {match[1]} -->\n{makers[match[1]]()}\n<!-- end -->'

    return BLOCK.sub(block, text)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Makes the tables of results/README.md.')
    parser.add_argument('--write', action='store_true', help='put them into the READMEs in results/')
    args = parser.parse_args(argv)
    with interrupts_exit(), user_errors_exit():
        if args.write:
            for path in sorted(RESULTS.rglob('README.md')):
                text = filled(path.read_text())
                with atomic_write(path, 'w') as file:
                    file.write(text)
        else:
            for name, make in tables().items():
                print(f'{name}\n\n{make()}\n')


if __name__ == '__main__':
    main()
