"""
Prints the README's tables from the files in results/, so that text and data cannot drift apart: a test compares them.

    python results/tables.py
"""
import json
from pathlib import Path

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


if __name__ == '__main__':
    for folder in sorted(path.parent.parent for path in Path(__file__).parent.glob('*/baseline*/measure.json')):
        print(f'{folder.name}\n\n{table(folder)}\n')
