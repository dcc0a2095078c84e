"""
Reads what runs have left, in results/ or as the recipe packs it, and says numbers and tables.

A set is a folder of runs, <arm>_<scale>_<seed>/ with measure.json; studies/pack.py says what else is there.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from checkpoint import read_log
from data.loader import UserError
from studies.pack import read_json, untrained_report

RESULTS = Path(__file__).resolve().parent.parent / 'results'
SCALES = ('demo', '160m', '290m')
RUN_NAME = re.compile(rf'(.+)_({"|".join(SCALES)})(?:_(\d+))?')
DOSE = re.compile(r'ledger(_hs|_a[\d.]+)?')  # arms that differ from one another in α alone


@dataclass(frozen=True)
class Run:
    """One run of a set: what it is, and its reports, each None where there is none."""

    folder: Path
    arm: str
    scale: str
    seed: int | None

    @property
    def name(self):
        return self.folder.name

    @cached_property
    def measure(self):
        """measure.json. Raises UserError if it is not a whole measurement."""
        report = read_json(self.folder / 'measure.json')
        if not {'streams', 'loss', 'val_loss', 'model'} <= report.keys():
            raise UserError(f'{self.folder}/measure.json is not a whole measurement: measure the run again')
        return report

    @cached_property
    def untrained(self):
        """The same of the untrained weights."""
        return untrained_report(self.folder)

    @cached_property
    def log(self):
        """The lines of log.jsonl, or []."""
        return read_log(self.folder / 'log.jsonl')

    @cached_property
    def controls(self):
        return read_json(self.folder / 'controls.json')

    @cached_property
    def quantized(self):
        return read_json(self.folder / 'quantize.json')

    @cached_property
    def interventions(self):
        return read_json(self.folder / 'intervene.json')

    @property
    def loss(self):
        """The cross-entropy on the windows that all runs are measured on, in nats per token."""
        return self.measure['val_loss']

    @property
    def alpha(self):
        """The price of committing, or None where nothing commits."""
        model = self.measure['model']
        return model.get('commit_sparsity') if model['residual'] == 'ledger' else None

    @property
    def decoded(self):
        """The name of the stream that the head reads."""
        return next(name for name, stream in self.measure['streams'].items() if stream['decoded'])


def runs_in(folder):
    """Returns the runs of a set, in the order of their names; raises UserError where there is none."""
    folders = [path.parent for path in sorted(Path(folder).glob('*/measure.json'))]
    named = [(path, RUN_NAME.fullmatch(path.name)) for path in folders]
    runs = [
        Run(path, match[1], match[2], int(match[3]) if match[3] else None) for path, match in named if match
    ]
    if not runs:
        raise UserError(
            f'there is no <arm>_<scale>_<seed>/measure.json in {folder}: make runs with '
            'python -m studies.recipe'
        )
    return runs


def by_scale(runs):
    """Returns {scale: {(arm, seed): run}}, without runs that have no seed in their name.
    Raises UserError where runs of a scale were measured on different windows: they cannot be compared."""
    found = {}
    for run in runs:
        if run.seed is not None:
            found.setdefault(run.scale, {})[run.arm, run.seed] = run
    for scale, group in found.items():
        windows = {tuple(sorted(run.measure['data'].items())) for run in group.values()}
        if len(windows) > 1:
            raise UserError(
                f'the runs at {scale} were not measured on the same windows: measure them again, with the '
                'same flags'
            )
    return {scale: found[scale] for scale in SCALES if scale in found}


def significant(x, digits):
    """Returns x with so many significant digits, or a dash for None. The very large have an exponent."""
    if x is None:
        return '–'
    if x == 0 or 0.01 <= abs(x) < 10**digits:
        return f'{x:.{digits}g}'
    return f'{x:.{digits - 1}e}'.replace('e+0', 'e').replace('e-0', 'e-')


def with_interval(quantity, digits=3):
    """quantity: {'value', 'low', 'high'}. Returns '12.3 [11.9, 12.8]', or '12.3' if it has no interval."""
    value, low, high = (significant(quantity.get(key), digits) for key in ('value', 'low', 'high'))
    return value if None in (quantity.get('low'), quantity.get('high')) else f'{value} [{low}, {high}]'


def stream_label(name, stream):
    """Returns the name of a stream as tables have it: the decoded one is bold."""
    return f'**{name}**' if stream['decoded'] else name


def markdown(header, rows):
    """Returns a Markdown table of cells, each with its text."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
