"""
Makes the files of a run small enough for git: results/ holds nothing else than what these functions return.

    python -m studies.pack out/ledger_160m_1338 --out=results/english        one run, or several
    python -m studies.pack --again results/english                           what is packed already, once more

What is packed:
- numbers have four significant digits; losses have six, since they are compared within 0.01 nats;
- measure.json keeps every headline, and of each sublayer what a verdict, a table or a figure reads;
- an untrained measurement (measure_0.json) is there once: the measure.json of a run that shares it names
  the run that has it, under "untrained", and `untrained_report` finds it;
- log.jsonl keeps the quantities that the figures draw;
- controls.json, intervene.json and probe.json keep what the tables show; other JSON files are only rounded;
- pictures stay behind, for figures.py draws them again.

To pack from Python: `pack_run(source, target)`, from the folder of a run to the folder of its packed files.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from checkpoint import read_log
from data.loader import UserError, atomic_write
from figures import PROFILE
from measure import QUOTED_AT

DIGITS, LOSS_DIGITS = 4, 6  # significant
LOSSES = ('loss', 'val_loss', 'train_loss')

# Of a sublayer in measure.json: what has an interval there that a verdict reads.
JUDGED_AT_SUBLAYER = (
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'relative_start_concentration',
    'kurtosis',
)
LOGGED = ('iter', 'tokens', 'val_loss', 'train_loss', 'lr', 'commit_rate', 'precision', 'streams')
LOGGED_OF_STREAM = (*PROFILE, *QUOTED_AT.values(), 'persistence', 'start_persistence')


def rounded(x, digits=DIGITS):
    """Returns x, any JSON value, with its floats at so many significant digits.
    What stands under a key of LOSSES keeps LOSS_DIGITS; what is not finite becomes None."""
    if isinstance(x, dict):
        return {key: rounded(value, LOSS_DIGITS if key in LOSSES else digits) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value, digits) for value in x]
    if isinstance(x, float):
        return float(f'{x:.{digits}g}') if math.isfinite(x) else None
    return x


def without(x, names):
    """Returns x, any JSON value, without the entries of dicts that have one of these names, at any depth."""
    if isinstance(x, dict):
        return {key: without(value, names) for key, value in x.items() if key not in names}
    if isinstance(x, list):
        return [without(value, names) for value in x]
    return x


def compact_sublayer(sublayer):
    """Returns a sublayer's entry in measure.json with its largest magnitude and the intervals that are judged."""
    kept = {key: value for key, value in sublayer.items() if key != 'top_mean'}
    kept['top'] = sublayer.get('top', [])[:1]
    if 'intervals' in sublayer:
        kept['intervals'] = {
            key: value for key, value in sublayer['intervals'].items() if key in JUDGED_AT_SUBLAYER
        }
    return kept


def compact_measure(report):
    """Returns what is packed of a measure.json."""
    report = without(report, ('landscape', 'landscapes'))
    for stream in report['streams'].values():
        stream['sublayers'] = [compact_sublayer(sublayer) for sublayer in stream['sublayers']]
    return rounded(report)


def compact_log(lines):
    """lines: of a log.jsonl. Returns them with what a figure draws, and the rate of training."""
    return [
        {
            **{key: rounded(value) for key, value in line.items() if key in (*LOGGED, 'tokens_per_s')},
            **{key: rounded(line[key], LOSS_DIGITS) for key in LOSSES if key in line},
            'streams': {
                name: rounded({key: stream[key] for key in LOGGED_OF_STREAM if key in stream})
                for name, stream in line['streams'].items()
            },
        }
        for line in lines
    ]


def compact_controls(report):
    """Returns what is packed of a controls.json: no lists of dimensions, and the commits after the last sublayer."""
    report = without(report, ('largest_by', 'likeness', 'identity_signed', 'map_signed'))
    if 'commits' in report:
        report['commits'] = {'last': report['commits']['last']}
    return rounded(report)


def compact_intervene(report):
    """Returns what is packed of an intervene.json: what was changed, and the ratios of perplexities."""
    return rounded(without(report, ('sweep', 'samples', 'by', 'entries', 'edited', 'later')))


def compact_probe(report):
    """Returns what is packed of a probe.json: of the linear probes, without the confusions."""
    return rounded(without(report, ('hidden', 'shuffled', 'selectivity', 'accuracy', 'confusion')))


COMPACT = {
    'measure.json': compact_measure,
    'measure_0.json': compact_measure,
    'controls.json': compact_controls,
    'intervene.json': compact_intervene,
    'probe.json': compact_probe,
    'onset.json': rounded,
    'quantize.json': rounded,
    'recipe.json': lambda report: report,
}


def read_json(path):
    """Returns the JSON value in a file, or None where there is no file."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is not readable as JSON ({error}): make it again') from None


def write_json(path, value):
    """Writes a JSON value without blanks; the file is whole or not there."""
    with atomic_write(path, 'w') as file:
        file.write(json.dumps(value, separators=(',', ':'), ensure_ascii=False) + '\n')


def untrained_report(folder):
    """folder: of a run, packed or not. Returns the measurement of its untrained weights,
    or None if they were not measured."""
    own = read_json(folder / 'measure_0.json')
    if own is not None:
        return own
    elsewhere = (read_json(folder / 'measure.json') or {}).get('untrained')
    if elsewhere is None:
        return None
    shared = read_json(folder.parent / elsewhere / 'measure_0.json')
    if shared is None:
        raise UserError(
            f'{folder}/measure.json has its untrained measurement in {elsewhere}, which is not beside it: '
            'pack both runs into one folder'
        )
    return shared


def twin_of(report, target):
    """Returns the name of a run beside the folder `target` with the same untrained measurement, or None."""
    for path in sorted(target.parent.glob('*/measure_0.json')):
        other = read_json(path)
        if path.parent != target and all(other[key] == report[key] for key in ('loss', 'streams')):
            return path.parent.name
    return None


def is_named_elsewhere(target):
    """Does a run beside this one name it as the place of its untrained measurement?"""
    return any(
        read_json(path).get('untrained') == target.name for path in target.parent.glob('*/measure.json')
    )


def pack_run(source, target):
    """Packs the files of the run in the folder `source` into the folder `target`, which may be the same one.
    Returns the names of the files that it has written; recipe.json is the last: a run that has it is whole."""
    target.mkdir(parents=True, exist_ok=True)
    packed = {
        name: compact(report)
        for name, compact in COMPACT.items()
        if (report := read_json(source / name)) is not None
    }
    recipe = packed.pop('recipe.json', None)
    measured, untrained = packed.get('measure.json'), packed.get('measure_0.json')
    if measured and untrained and not is_named_elsewhere(target):
        twin = twin_of(untrained, target)
        if twin is not None:
            measured['untrained'] = twin
            del packed['measure_0.json']
            (target / 'measure_0.json').unlink(missing_ok=True)
    for name, report in packed.items():
        write_json(target / name, report)
    if lines := read_log(source / 'log.jsonl'):
        with atomic_write(target / 'log.jsonl', 'w') as file:
            file.writelines(json.dumps(line, separators=(',', ':')) + '\n' for line in compact_log(lines))
        packed['log.jsonl'] = lines
    if recipe is not None:
        write_json(target / 'recipe.json', recipe)
        packed['recipe.json'] = recipe
    return list(packed)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Packs what runs have written, for git.')
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs that were measured')
    parser.add_argument('--out', type=Path, help='folder that gets a folder for every run')
    parser.add_argument(
        '--again', action='store_true', help='the folders hold packed runs: pack each where it is'
    )
    args = parser.parse_args(argv)
    try:
        if args.again == bool(args.out):
            raise UserError('say where packed runs go with --out=results/<set>, or pack them --again')
        runs = args.folders
        if args.again:
            runs = [path.parent for folder in args.folders for path in sorted(folder.glob('*/measure.json'))]
        for run in runs:
            target = run if args.again else args.out / run.name
            names = pack_run(run, target)
            if not names:
                raise UserError(f'{run} holds no measure.json or log.jsonl: train and measure the run first')
            print(f'{os.path.relpath(target)}: {", ".join(names)}')
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
