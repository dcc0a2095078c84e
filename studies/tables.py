"""
Prints the tables of the README and of results/README.md from the files in results/, so that text and data cannot drift apart: a test compares them.

    python -m studies.tables
"""

import json
import re
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / 'results'
from studies import verdicts
from studies.verdicts import markdown

read_runs = cache(verdicts.read_runs)

COLUMNS = {
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_ratio': 'start ratio',
    'start_token_concentration': 'start-token conc.',
    'persistence': 'persistence',
    'kurtosis': 'kurtosis',
    'max_over_median': 'max over median',
}


def cell(q):
    return f'{q["value"]:.3g} [{q["low"]:.3g}, {q["high"]:.3g}]'


def comparisons():
    """The folders of runs that verdicts are made from beside the demo's."""
    return sorted({path.parent.parent for path in RESULTS.glob('comparison_*/*/measure.json')})


def named(stream, s):
    """The decoded stream is bold."""
    return f'**{stream}**' if s['decoded'] else stream


def table(folder):
    """folder: one that holds <run>/measure.json. Returns a Markdown table: a line for each run and stream, 95% intervals over sequences."""
    rows = []
    for path in sorted(Path(folder).glob('*/measure.json')):
        report = json.loads(path.read_text())
        rows += [
            (path.parent.name, named(stream, s), cell(report['loss']), *(cell(s[key]) for key in COLUMNS))
            for stream, s in report['streams'].items()
        ]
    return markdown(['run', 'stream', 'loss (nats per token)', *COLUMNS.values()], rows)


def scale_of(folder):
    return {'demo_long': 'demo, five times longer'}.get(folder.name, folder.name.removeprefix('comparison_'))


def how_many(answers):
    """How many of the answers, True or False, or None where there is none, are True."""
    given = [answer for answer in answers if answer is not None]
    return f'{sum(given)} of {len(given)}'


def arms(folders):
    """folders: such that hold <arm>_<scale>_<seed>/measure.json. Returns a Markdown table: a line for each scale, arm and stream, the values of all its seeds, without intervals, and how
    many of them have a start-token outlier. Doses of α are left out, which have a figure, and the shorter cosines, which are there for the loss they end at."""
    found = {}
    for folder in folders:
        for (arm, seed), run in read_runs(folder).items():
            for stream, s in (
                run['measure']['streams'].items()
                if not re.match(rf'ledger_a\d|{verdicts.SHORT}', arm)
                else ()
            ):
                values = [
                    f'{run["measure"]["val_loss"]:.3f}',
                    *(verdicts.short(s[key]['value'], 3) for key in COLUMNS),
                ]
                found.setdefault((scale_of(folder), arm, named(stream, s)), []).append(
                    (verdicts.has_outlier(run, stream, seed), values)
                )
    rows = [
        (*key, how_many(has for has, _ in seeds), *map(', '.join, zip(*(values for _, values in seeds))))
        for key, seeds in found.items()
    ]
    return markdown(['scale', 'arm', 'stream', 'outlier', 'loss', *COLUMNS.values()], rows)


def claims(folders):
    """The verdicts on every claim, a column for each folder of runs."""
    judged = [verdicts.judge(read_runs(folder)) for folder in folders]
    said = lambda word: word.partition('; needs')[0] if not word.startswith('cannot') else 'not judged yet'
    return markdown(
        ['claim', *map(scale_of, folders)],
        [(judged[0][key][0], *(said(one[key][1]) for one in judged)) for key in judged[0]],
    )


def outliers(folder):
    """In words: of how many seeds of the ledger C has a start-token outlier by the rule of verdicts.py, by the price of committing."""
    found = {}
    for (arm, seed), run in read_runs(folder).items():
        if re.fullmatch(r'ledger(_hs|_a[\d.]+)?', arm):
            found.setdefault(run['measure']['model']['commit_sparsity'], []).append(
                verdicts.has_outlier(run, 'C', seed)
            )
    return ', '.join(f'{how_many(has)} at {alpha:g}' for alpha, has in sorted(found.items()))


def lag(folder):
    """In words: the loss of `ledger`, of the same without a price, and of the same whose gates open late, less that of the baseline of each seed."""
    losses = {key: run['measure']['val_loss'] for key, run in read_runs(folder).items()}
    found = {}
    for (arm, seed), loss in losses.items():
        if re.fullmatch(r'ledger(_a0|_ramp\d+)?', arm) and ('baseline', seed) in losses:
            found.setdefault(arm, []).append(f'{loss - losses["baseline", seed]:+.3f}')
    return ', '.join(f'`{arm}` {", ".join(values)}' for arm, values in found.items())


def fits():
    """The fits of emergence.py: for each stream of the sweep, and for each stream of each 160m run."""
    rows = []
    for name in ('sweep', '160m'):
        summary = json.loads((RESULTS / 'emergence' / name / 'emergence.json').read_text())['summary']
        groups = {}
        for line in summary:
            groups.setdefault(
                ('28 small architectures' if name == 'sweep' else line['run'], line['stream']), []
            ).append(line)
        for (run, stream), some in groups.items():
            count = {
                key: sum(line[key] for line in some) for key in ('fitted', 'f_preferred', 'identifiable')
            }
            r2 = sum(line['r2'] * line['fitted'] for line in some) / count['fitted']
            classes = ' / '.join(
                str(sum(line['classes'].get(key, 0) for line in some))
                for key in ('early peak', 'log increase', 'neither')
            )
            rows.append(
                (
                    run,
                    stream,
                    count['fitted'],
                    f'{r2:.3f} ({min(line["r2_least"] for line in some):.2f})',
                    count['f_preferred'],
                    count['identifiable'],
                    classes,
                )
            )
    return markdown(
        [
            'runs',
            'stream',
            'series',
            'mean R² (least)',
            'f is best by AIC',
            'all five identifiable',
            'early peak / log increase / neither',
        ],
        rows,
    )


def predictions():
    """How well emergence.py predicts what it has not seen from the architecture."""
    words = {'curve': 'the whole curve', 'final': 'ratio at the end', 'half_step': 'step of half height'}
    found = json.loads((RESULTS / 'emergence/sweep/emergence.json').read_text())['prediction']
    rows = []
    for key, line in found.items():
        alone = ', '.join(
            '–' if arm not in line['r2_of_arm'] else f'{line["r2_of_arm"][arm]:.2f}'
            for arm in ('baseline/h', 'ledger/D', 'ledger/C')
        )
        rows.append(
            (
                words.get(key, key),
                line['n'],
                f'{line["r2_architectures_out"]:.2f}',
                f'{line["r2_random_split"]:.2f}',
                alone,
            )
        )
    return markdown(
        ['predicted', 'series', 'R², architectures left out', 'R², random split', 'of h, D, C alone'], rows
    )


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
    '160m baseline, h': ('pysource_160m_lr6e-4/baseline_160m_1337', 'h'),
    '160m ledger, D': ('pysource_160m_lr6e-4/ledger_160m_1337', 'D'),
    '160m ledger, C': ('pysource_160m_lr6e-4/ledger_160m_1337', 'C'),
    'longer demo, baseline, h': ('demo_long/baseline_demo_1337', 'h'),
    'longer demo, ledger, D': ('demo_long/ledger_demo_1337', 'D'),
    'longer demo, ledger, C': ('demo_long/ledger_demo_1337', 'C'),
    '160m ledger, 101M tokens, D': ('comparison_160m/ledger_160m_1337', 'D'),
    '160m ledger, 101M tokens, C': ('comparison_160m/ledger_160m_1337', 'C'),
}


def interventions(names, changes):
    """Ratios of perplexities after to before, with 95% intervals; after the semicolon, of the control `moved`, the very change made in other dimensions of the same tokens."""
    found = {}
    for name in names:
        run, stream = EDITED[name]
        results = [
            r
            for r in json.loads((RESULTS / run / 'intervene.json').read_text())['results']
            if r['stream'] == stream
        ]
        found[f'{name} after {results[0]["sublayer"]}'] = {
            tuple(r[key] for key in ('where', 'what', 'how', 'reach')): r for r in results
        }
    rows = []
    for words, key in changes.items():
        cells = [
            '–'
            if key not in of
            else '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**of[key]['edit']['ratio'])
            + f'; {of[key]["controls"]["moved"]["ratio"]["value"]:.3f}'
            for of in found.values()
        ]
        rows.append((words, *cells))
    return markdown(['changed', *found], rows)


PROBED = ('token class', 'next token class', 'position', 'line start', 'bracket depth', 'inside')


def probes():
    """Balanced accuracy of linear probes in percent, smallest and largest over the seeds, where the fixed-dimension ratio is largest."""
    rows = []
    for name, (run, stream) in EDITED.items():
        if not (RESULTS / run / 'probe.json').exists():
            continue
        place = json.loads((RESULTS / run / 'probe.json').read_text())['streams'][stream][0]
        for told in ('mean', 'start', 'random', 'all'):
            cells = [
                '{value:.0f} [{low:.0f}, {high:.0f}]'.format(
                    **{k: 100 * v for k, v in place['tasks'][task]['linear'][told]['balanced'].items()}
                )
                for task in PROBED
            ]
            rows.append((f'{name} after {place["sublayer"]}', told, *cells))
        cells = [f'{100 / len(place["tasks"][task]["classes"]):.0f}' for task in PROBED]
    return markdown(['stream', 'told', *PROBED], [*rows, ('', 'chance', *cells)])


SCALING = ('bench_290m_32.json', 'two_gpus_290m.json')


def scaling():
    """290m, 32 sequences a GPU: tokens/s over all GPUs, efficiency against one, and the share of a step spent waiting for gradients."""
    one, two = (json.loads((RESULTS / 'h100' / name).read_text()) for name in SCALING)
    rows = []
    for report in (one, two):
        for arm, line in report['arms'].items():
            n = report['processes']
            rows.append(
                (
                    f'{arm}_290m',
                    n,
                    f'{line["tokens_per_s"] / 1000:.0f}',
                    f'{line["tokens_per_s"] / n / one["arms"][arm]["tokens_per_s"]:.2f}',
                    '–' if n == 1 else f'{line["waiting_for_gradients"]:.1%}',
                    f'{line["ratio"]:.2f}',
                )
            )
    return markdown(
        ['arm', 'GPUs', 'thousand tokens/s', 'efficiency', 'waiting for gradients', 'ledger ÷ baseline'], rows
    )


def sentences():
    """Returns {what: text} of the numbers that the README says in words."""
    fitted = {
        name: json.loads((RESULTS / 'emergence' / name / 'emergence.json').read_text())
        for name in ('sweep', '160m')
    }

    def r2(name, stream):
        some = [line for line in fitted[name]['summary'] if line['stream'] == stream]
        return (
            ' and '.join(f'{line["r2"]:.3f}' for line in some)
            if name == '160m'
            else f'{sum(line["r2"] * line["fitted"] for line in some) / sum(line["fitted"] for line in some):.3f}'
        )

    predicted = {
        key: f'{line["r2_architectures_out"]:.2f}' for key, line in fitted['sweep']['prediction'].items()
    }
    five = sorted((predicted[key] for key in ('A', 'lambda', 'gamma', 't0', 'K')), key=float)
    told = {}
    for name, (run, stream) in list(EDITED.items())[:3]:
        place = json.loads((RESULTS / run / 'probe.json').read_text())['streams'][stream][0]
        told[f'{stream} after {place["sublayer"]}'] = [
            f'{100 * place["tasks"]["position"]["linear"][part]["balanced"]["value"]:.0f}'
            for part in ('start', 'random', 'all')
        ]
    looked = [json.loads(path.read_text()) for path in sorted((RESULTS / 'emergence/onset').glob('*.json'))]
    found = [
        (with_class['p'], s['stream'], kind)
        for report in looked
        for s in report['streams']
        for kind, with_class in s['with'].items()
        if with_class['p'] is not None
    ]
    least, stream, kind = min(found)
    one, two = (
        {
            arm: line['tokens_per_s']
            for arm, line in json.loads((RESULTS / 'h100' / name).read_text())['arms'].items()
        }
        for name in SCALING
    )
    compared = [run for folder in comparisons() for run in read_runs(folder).values()]
    speed = {
        scale: json.loads((RESULTS / 'h200' / f'bench_{scale}_bf16.json').read_text())['arms']
        for scale in ('160m', '290m')
    }
    measured = json.loads((RESULTS / 'h100/bench_measure.json').read_text())['arms']
    quick, windows = speed['160m'], [run['controls']['windows'] for run in compared if run['controls']]
    moved = {
        key: [
            (w['anywhere_bfloat16']['streams'][stream][key]['value'], q[key]['value'])
            for w in windows
            for stream, q in w['anywhere']['streams'].items()
        ]
        for key in COLUMNS
    }
    shares = max(abs(x - y) for x, y in moved.pop('persistence'))  # of the sublayers
    most = max(abs(x - y) / abs(y) for pairs in moved.values() for x, y in pairs)
    return {
        'outliers': outliers(RESULTS / 'comparison_160m'),
        'lag': f'at 160M {lag(RESULTS / "comparison_160m")}; in the longer demo {lag(RESULTS / "demo_long")}',
        'speed': '; '.join(
            f'{scale}, baseline {arms["baseline"]["tokens_per_s"] / 1000:.0f} and ledger {arms["ledger"]["tokens_per_s"] / 1000:.0f} thousand tokens/s '
            f'({arms["ledger"]["ratio"]:.2f})'
            for scale, arms in speed.items()
        ),
        'memory': f'{quick["baseline"]["peak_memory_GB"]:.1f} and {quick["ledger"]["peak_memory_GB"]:.1f} GB, {quick["baseline"]["first_step_s"]:.0f} and '
        f'{quick["ledger"]["first_step_s"]:.0f} s to the first finished step with cold compiler caches',
        'measuring': f'{measured["baseline"]["ratio"]:.1f} (baseline) and {measured["ledger"]["ratio"]:.1f} times (ledger) a plain float32 forward pass',
        'precisions': f'streams in bfloat16 move persistence by {shares:.2f} at most, nothing else above by more than {most:.1%}',
        'onset': f'of {len(found)} rank correlations between the growth of a ratio and the share of a class of tokens in the fall of the loss, the smallest p is {least:.3f} ({stream}, {kind})',
        'fits': 'mean R² of the sweep: '
        + ', '.join(f'{stream} {r2("sweep", stream)}' for stream in 'hDC')
        + '; of the 160M runs: '
        + ', '.join(f'{stream} {r2("160m", stream)}' for stream in 'hDC'),
        'scaling': f'two H100s take {two["baseline"] / one["baseline"]:.2f} (baseline) and {two["ledger"] / one["ledger"]:.2f} times (ledger) the tokens/s of one, with 32 sequences each',
        'predictions': f'R² {predicted["final"]} for the ratio at the end, mostly arm and depth; {predicted["half_step"]} for the step of half height; {five[0]} to {five[-1]} for the five parameters',
        'probes': '; '.join(f'{name} {", ".join(values)}%' for name, values in told.items()),
    }


def tables():
    """Returns {what: Markdown} of every table."""
    short = {
        words: key for words, key in CHANGES.items() if key[0] == 'stream' and key[1] in ('start', 'dims')
    }
    folders = sorted({path.parent.parent for path in RESULTS.glob('*/*/measure.json')})
    compared = comparisons()
    return {
        **{folder.name: table(folder) for folder in folders},
        'arms': arms(compared),
        'claims': claims([RESULTS / 'demo_long', *compared]),
        'verdicts, demo_long': verdicts.verdict_table(read_runs(RESULTS / 'demo_long')),
        'fits': fits(),
        'predictions': predictions(),
        'interventions': interventions([*list(EDITED)[:3], 'longer demo, ledger, C'], short),
        **{
            f'{name}, {folder.name}': of(read_runs(folder))
            for folder in compared
            for name, of in verdicts.TABLES.items()
            if name != 'Evidence'
        },
        'interventions, all': interventions(EDITED, CHANGES),
        'probes': probes(),
        'scaling': scaling(),
    }


if __name__ == '__main__':
    for name, text in {
        **tables(),
        **{f'{name}, in words': text for name, text in sentences().items()},
    }.items():
        print(f'{name}\n\n{text}\n')
