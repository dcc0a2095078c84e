"""
The revisions of a pretrained model, measured one after another: its log.jsonl, as a run of train.py has one.

Used by `python -m studies.emergence hf:<name> --revisions step0,step1,… --text FILE …`, which then fits it.

- The step of a revision is the number in its name: step3000, checkpoint-500, stage1-step1000-tokens3B.
- The stream is h after every block, as in Gallego-Feliciano et al. 2025: parallel and sequential blocks alike
  give one series each.
- A line of the log is there as soon as its revision is measured. The same command goes on where it stopped,
  and revisions can be added. What was measured, on which windows, stands in run.json beside the log.
"""

import argparse
import hashlib
import json
import math
import tempfile
from pathlib import Path

from checkpoint import check_run_arguments, open_runs, read_log
from data.loader import UserError, atomic_write, read_text
from measure import log_line
from pretrained import STEP

RATIO = 'max_over_median'  # of a log line: what the console says of a revision


def step_of(revision):
    """Returns the step in the name of a revision. Raises UserError for a name that has none."""
    found = STEP.search(f'@{revision}')
    if not found:
        raise UserError(
            f'--revisions: {revision!r} has no step in its name, which is where it would stand in training: '
            'expected names like step3000 or checkpoint-500'
        )
    return int(found[1])


def revisions_by_step(words):
    """words: the text of --revisions. Returns {step: name of the revision}, from the first step on."""
    names = [name.strip() for name in words.split(',') if name.strip()]
    if not names:
        raise UserError('--revisions names none: expected a list with commas, like step0,step512,step1000')
    found = {}
    for name in names:
        step = step_of(name)
        if step in found:
            raise UserError(f'--revisions: {found[step]} and {name} are the same step: name one of them')
        found[step] = name
    return dict(sorted(found.items()))


def what_is_measured(name, args):
    """Returns a dict: two logs may be joined only if it is the same for both."""
    texts = '\0'.join(read_text(path) for path in args.text)
    return {
        'model': name,
        'text_sha256': hashlib.sha256(texts.encode()).hexdigest(),
        **{key: getattr(args, key) for key in ('block_size', 'bos', 'dtype', 'sequences', 'seed')},
    }


def earlier_lines(folder, measured):
    """Returns {step: line} of the log in a folder. Raises UserError if it is a log of something else."""
    lines = read_log(folder / 'log.jsonl')
    if not lines:
        return {}
    try:
        earlier = json.loads((folder / 'run.json').read_text()).get('measured')
    except (OSError, ValueError, AttributeError):
        earlier = None
    if earlier != measured:
        raise UserError(
            f'{folder}/log.jsonl is of another model, text or windows: name another folder with --out, '
            'or remove it'
        )
    return {line['iter']: line for line in lines}


def write_run(folder, run, measured):
    """Writes run.json, where studies find the settings of a model."""
    content = {'model_args': {**run.model_args, 'blocks_only': True}, 'measured': measured}
    with atomic_write(folder / 'run.json', 'w') as file:
        json.dump(content, file)


def write_log(folder, lines):
    """lines: {step: line}. Writes them in the order of their steps."""
    with atomic_write(folder / 'log.jsonl', 'w') as file:
        file.writelines(json.dumps(lines[step]) + '\n' for step in sorted(lines))


def sentence(name, line):
    """Returns what the console says of a line of the log."""
    ratios = [-math.inf if ratio is None else ratio for ratio in line['streams']['h'][RATIO]]
    place, largest = max(enumerate(ratios), key=lambda pair: pair[1])
    loss = 'not finite' if line['val_loss'] is None else f'{line["val_loss"]:.3f} nats per token'
    return (
        f'{name}, step {line["iter"]:,}: loss {loss}, largest over median {largest:.4g} after block {place}'
    )


def measure_revisions(name, args):
    """Measures the revisions of a pretrained model that are not in its log yet.

    name: hf:<owner>/<model>, or a local folder whose revisions are the folders in it. args: the arguments of
    studies.emergence. Returns the folder of the log: --out, or out/<name>."""
    revisions = revisions_by_step(args.revisions)
    check_run_arguments(args, sequences=1)
    if not args.text:
        raise UserError('--revisions are measured on a text: name some with --text FILE …')
    label = str(name).removeprefix('hf:').rstrip('/')
    measured = what_is_measured(label, args)
    folder = args.out or Path('out', Path(label).name if Path(label).is_dir() else label.replace('/', '_'))
    folder.mkdir(parents=True, exist_ok=True)
    lines = earlier_lines(folder, measured)
    wanted = {step: revision for step, revision in revisions.items() if step not in lines}
    args.ckpt = [f'hf:{label}@{revision}' for revision in wanted.values()]
    with tempfile.TemporaryDirectory() as nothing_kept:
        # Every open run gets a folder for reports. None are written here.
        opening = {'out': Path(nothing_kept), 'blocks_only': True, 'data': None, 'force': False}
        for run in open_runs(argparse.Namespace(**{**vars(args), **opening})):
            lines[run.iter_num] = log_line(run, args)
            write_run(folder, run, measured)
            write_log(folder, lines)
            print(sentence(label, lines[run.iter_num]), flush=True)
    return folder
