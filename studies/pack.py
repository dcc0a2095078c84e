"""
Makes the files of a run small enough for git: results/ holds nothing else than what these functions return.

    python -m studies.pack out/ledger_160m_1338 --out=results/english        one run, or several
    python -m studies.pack --again results/english                           what is packed already, once more

What is packed:
- numbers have four significant digits; losses and ratios of perplexities have six; logs have three;
- measure.json keeps every headline, and of each sublayer what a verdict, a table or a figure reads;
- an untrained measurement (measure_0.json) is there once: the measure.json of a run that shares it names
  the run that has it, under "untrained_in", and `untrained_report` finds it;
- log.jsonl keeps the quantities that the figures draw, in at most 24 lines;
- controls.json, intervene.json and probe.json keep what the tables show; other JSON files are only rounded;
- pictures stay behind, for figures.py draws them again.

To pack from Python: `pack_run(source, target)`, from the folder of a run to the folder of its packed files.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

from checkpoint import read_log
from data.loader import UserError, atomic_write, interrupts_exit, user_errors_exit
from figures import PROFILE

DIGITS, FINE_DIGITS, LOG_DIGITS = 4, 6, 3  # significant
FINE = ('loss', 'val_loss', 'train_loss', 'ratio', 'damage')  # what is compared at a thousandth
LOG_LINES = 24

# Of a sublayer in measure.json: what has an interval there that a verdict reads.
JUDGED_AT_SUBLAYER = (
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'relative_start_concentration',
    'kurtosis',
)
LOGGED = ('iter', 'tokens', 'val_loss', 'train_loss', 'lr', 'commit_rate', 'precision', 'tokens_per_s')
LOGGED_OF_STREAM = (*PROFILE, 'persistence', 'start_persistence')
# Of each kind of window in controls.json.
CONTROLLED = (
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'persistence',
    'kurtosis',
    'max_over_median',
)


def rounded(x, digits=DIGITS):
    """Returns x, any JSON value, with its floats at so many significant digits.
    What stands under a key of FINE keeps FINE_DIGITS; what is not finite becomes None."""
    if isinstance(x, dict):
        return {key: rounded(value, FINE_DIGITS if key in FINE else digits) for key, value in x.items()}
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
    """Returns a sublayer's entry in measure.json with its largest magnitude and the judged intervals."""
    kept = {key: value for key, value in sublayer.items() if key != 'top_mean'}
    kept['top'] = sublayer.get('top', [])[:1]
    if 'intervals' in sublayer:
        kept['intervals'] = {
            key: value for key, value in sublayer['intervals'].items() if key in JUDGED_AT_SUBLAYER
        }
    return kept


def compact_untrained(report):
    """Returns what is packed of a measure_0.json: of each sublayer, what a verdict or a profile is held
    against."""
    report = compact_measure(report)
    kept = {
        *PROFILE,
        *JUDGED_AT_SUBLAYER,
        'sublayer',
        'kind',
        'largest_dim',
        'largest_start_dim',
        'intervals',
    }
    for stream in report['streams'].values():
        stream['sublayers'] = [
            {key: value for key, value in sublayer.items() if key in kept} for sublayer in stream['sublayers']
        ]
    return report


def compact_measure(report):
    """Returns what is packed of a measure.json."""
    report = without(report, ('landscape', 'landscapes'))
    for stream in report['streams'].values():
        stream['sublayers'] = [compact_sublayer(sublayer) for sublayer in stream['sublayers']]
    return rounded(report)


def thinned(lines, most=LOG_LINES):
    """Returns at most so many lines of a log, even over log(1 + step), with the first and the last."""
    if len(lines) <= most:
        return lines
    place = np.log1p([line['iter'] for line in lines])
    wanted = np.linspace(place[0], place[-1], most)
    nearest = {int(np.abs(place - x).argmin()) for x in wanted}
    return [lines[i] for i in sorted(nearest)]


def compact_line(line):
    """Returns what is packed of a line of log.jsonl."""
    kept = rounded({key: line[key] for key in LOGGED if key in line}, LOG_DIGITS)
    kept['streams'] = {
        name: rounded({key: stream[key] for key in LOGGED_OF_STREAM if key in stream}, LOG_DIGITS)
        for name, stream in line['streams'].items()
    }
    return kept


def compact_windows(window):
    """Returns what is packed of one kind of window in controls.json."""
    streams = {
        name: {key: value for key, value in stream.items() if key in CONTROLLED}
        for name, stream in window.get('streams', {}).items()
    }
    return {**window, 'streams': streams} if streams else window


def compact_controls(report):
    """Returns what is packed of a controls.json: no dimensions, and only the commits after the last."""
    report = without(report, ('largest_by', 'likeness', 'identity_signed', 'map_signed'))
    report['windows'] = {kind: compact_windows(window) for kind, window in report.get('windows', {}).items()}
    if 'commits' in report:
        report['commits'] = {'last': report['commits']['last']}
    return rounded(report)


def compact_emergence(report):
    """Returns what is packed of an emergence.json: the summaries; fits are made again from logs."""
    return rounded(without(report, ('series',)))


def compact_intervene(report):
    """Returns what is packed of an intervene.json: what was changed, and the ratios of perplexities."""
    return rounded(without(report, ('sweep', 'samples', 'by', 'entries', 'edited', 'later')))


def compact_probe(report):
    """Returns what is packed of a probe.json: of the linear probes, without the confusions."""
    return rounded(without(report, ('hidden', 'shuffled', 'selectivity', 'accuracy', 'confusion')))


COMPACT = {
    'measure.json': compact_measure,
    'measure_0.json': compact_untrained,
    'controls.json': compact_controls,
    'intervene.json': compact_intervene,
    'probe.json': compact_probe,
    'emergence.json': compact_emergence,
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


def compact_json(value):
    """Returns a JSON value as text without blanks."""
    return json.dumps(value, separators=(',', ':'), ensure_ascii=False)


def write_json(path, value):
    """Writes a JSON value; the file is whole or not there."""
    with atomic_write(path, 'w') as file:
        file.write(compact_json(value) + '\n')


def untrained_report(folder):
    """folder: of a run, packed or not. Returns the measurement of its untrained weights,
    or None if they were not measured."""
    own = read_json(folder / 'measure_0.json')
    if own is not None:
        return own
    elsewhere = (read_json(folder / 'measure.json') or {}).get('untrained_in')
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
        read_json(path).get('untrained_in') == target.name for path in target.parent.glob('*/measure.json')
    )


def pack_run(source, target):
    """Packs the files of the run in the folder `source` into the folder `target`, which may be the same one.
    Returns the names of the files that it has written, recipe.json last: a run that has it is whole."""
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
            measured['untrained_in'] = twin
            del packed['measure_0.json']
            (target / 'measure_0.json').unlink(missing_ok=True)
    for name, report in packed.items():
        write_json(target / name, report)
    if lines := read_log(source / 'log.jsonl'):
        with atomic_write(target / 'log.jsonl', 'w') as file:
            file.writelines(f'{compact_json(line)}\n' for line in map(compact_line, thinned(lines)))
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
    with interrupts_exit(), user_errors_exit():
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


if __name__ == '__main__':
    main()
