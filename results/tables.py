"""
Prints the tables of the README and of results/README.md from the files in results/, so that text and data cannot drift apart: a test compares them.

    python results/tables.py
"""
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS / 'pysource_160m'))
import verdicts  # noqa: E402

COLUMNS = {'fixed_dim_ratio': 'fixed-dimension ratio', 'start_ratio': 'start ratio', 'start_token_concentration': 'start-token conc.',
           'persistence': 'persistence', 'kurtosis': 'kurtosis', 'max_over_median': 'max over median'}


def cell(q):
    return f"{q['value']:.3g} [{q['low']:.3g}, {q['high']:.3g}]"


def table(folder):
    """folder: one that holds <run>/measure.json. Returns a Markdown table: a line for each run and stream, 95% intervals over sequences."""
    lines = ['| run | stream | loss (nats per token) | ' + ' | '.join(COLUMNS.values()) + ' |', '|---|---|---|' + '---|' * len(COLUMNS)]
    for path in sorted(Path(folder).glob('*/measure.json')):
        report = json.loads(path.read_text())
        for stream, s in report['streams'].items():
            name = f'**{stream}**' if s['decoded'] else stream
            lines.append(f"| {path.parent.name} | {name} | {cell(report['loss'])} | " + ' | '.join(cell(s[key]) for key in COLUMNS) + ' |')
    return '\n'.join(lines)


def fits():
    """The fits of emergence.py: for each stream of the sweep, and for each stream of each 160m run."""
    lines = ['| runs | stream | series | mean R² (least) | f is best by AIC | all five identifiable | early peak / log increase / neither |', '|---|---|---|---|---|---|---|']
    for name in ('sweep', '160m'):
        summary = json.loads((RESULTS / 'emergence' / name / 'emergence.json').read_text())['summary']
        groups = {}
        for line in summary:
            groups.setdefault(('28 small architectures' if name == 'sweep' else line['run'], line['stream']), []).append(line)
        for (run, stream), some in groups.items():
            count = {key: sum(line[key] for line in some) for key in ('fitted', 'f_preferred', 'identifiable')}
            r2 = sum(line['r2'] * line['fitted'] for line in some) / count['fitted']
            classes = ' / '.join(str(sum(line['classes'].get(key, 0) for line in some)) for key in ('early peak', 'log increase', 'neither'))
            lines.append(f"| {run} | {stream} | {count['fitted']} | {r2:.3f} ({min(line['r2_least'] for line in some):.2f}) | {count['f_preferred']} | {count['identifiable']} | {classes} |")
    return '\n'.join(lines)


def predictions():
    """How well emergence.py predicts what it has not seen from the architecture."""
    words = {'curve': 'the whole curve', 'final': 'ratio at the end', 'half_step': 'step of half height'}
    found = json.loads((RESULTS / 'emergence/sweep/emergence.json').read_text())['prediction']
    lines = ['| predicted | series | R², architectures left out | R², random split | of h, D, C alone |', '|---|---|---|---|---|']
    for key, line in found.items():
        arms = ', '.join('–' if arm not in line['r2_of_arm'] else f"{line['r2_of_arm'][arm]:.2f}" for arm in ('baseline/h', 'ledger/D', 'ledger/C'))
        lines.append(f"| {words.get(key, key)} | {line['n']} | {line['r2_architectures_out']:.2f} | {line['r2_random_split']:.2f} | {arms} |")
    return '\n'.join(lines)


def interventions(path, rows):
    """path: an intervene.json. rows: (where, what, how, reach) of the edits to show. Returns a Markdown table of ratios of perplexities, controls beside them."""
    names = ('random', 'median', 'other', 'moved')
    lines = ['| changed | ratio of perplexities | ' + ' | '.join(names) + ' |', '|---|---|' + '---|' * len(names)]
    results = {tuple(r[key] for key in ('where', 'what', 'how', 'reach')): r for r in json.loads(Path(path).read_text())['results']}
    for key in rows:
        q, controls = results[key]['edit']['ratio'], results[key]['controls']
        lines.append(f"| {' '.join(filter(None, key))} | {q['value']:.4f} [{q['low']:.4f}, {q['high']:.4f}] | "
                     + ' | '.join(f"{controls[name]['ratio']['value']:.4f}" if name in controls else '–' for name in names) + ' |')
    return '\n'.join(lines)


SHOWN = [('stream', 'top', 'zero', 'once'), ('stream', 'start', 'zero', 'once'), ('stream', 'dims', 'zero', 'once'), ('stream', 'dims', 'mean', 'once'),
         ('reads', 'dims', 'zero', 'every'), ('decoder', 'dims', 'zero', ''), ('stream', 'all', 'clip 0.999', 'once'), ('stream', 'all', 'clip 0.9', 'once')]


def tables():
    """Returns {what: Markdown} of every table."""
    folders = sorted({path.parent.parent for path in RESULTS.glob('*/*/measure.json')})
    return {**{folder.name: table(folder) for folder in folders}, 'verdicts, demo_long': verdicts.verdict_table(verdicts.read_runs(RESULTS / 'demo_long')),
            'fits': fits(), 'predictions': predictions(),
            'interventions, 160m baseline': interventions(RESULTS / 'pysource_160m_lr6e-4/baseline_160m_1337/intervene.json', SHOWN)}


if __name__ == '__main__':
    for name, text in tables().items():
        print(f'{name}\n\n{text}\n')
