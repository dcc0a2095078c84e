"""
Multiple comparisons: how many verdict lines are there, and how many would hold by chance?

    python -m studies.chance results/english       writes chance.json there

A verdict line is one cell of the table of studies/verdicts.py: a claim, judged for one object or quantity,
in one reading, at one scale. Three answers, in a table with a row for each claim:

- *by direction*: intervals over sequences are narrow beside the spread between models. If training moved
  two arms up or down at random, a quantity of one would be below the other's, apart, in nearly half of the
  seeds, and the lines of claims 2 and 4 would hold with a chance of ½ in each seed; one of 24 orders of
  four doses never falls.
- *untrained*: every run is replaced with its untrained model, and its untrained model with that of another
  seed.
- *noise*: every stream is independent noise, with dimensions as unequal as --spread says (the standard
  deviation of the logarithm of their scale), and the untrained streams are noise with equal dimensions.
  Such a stream has large dimensions, and none of them is larger at the first token."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.loader import interrupts_exit, user_errors_exit
from measure import Statistics, stream_report
from studies import verdicts
from studies.evidence import counted, holds_in_all
from studies.pack import rounded, write_json
from studies.results import by_scale, markdown, runs_in

SHAPE = dict(sequences=256, tokens=16, dims=256, sublayers=4)  # of the noise
REPLICATES = 200
BY_DIRECTION = {'2': 1 / 2, '3': 1 / 24, '4': 1 / 2}  # the chance of a line in one seed
LEDGERS = {'ledger_a0': 0.0, 'ledger': 0.02, 'ledger_a0.1': 0.1, 'ledger_hs': 0.3}
NOISE_ARMS = {'baseline': None, 'qknorm': None, **LEDGERS, 'rotated_commit_a0': 0.0, 'decode_scratch': 0.02}
NOISE_SEEDS = (1338, 1339, 1340)


def lines_of(judged):
    """judged: as verdicts.judge returns it. Returns {(claim, text, judged for, reading): what was found} of
    the lines that can be judged."""
    return {
        (number, text, row, reading): found
        for (number, text, row), by_reading in judged.items()
        for reading, found in by_reading.items()
        if counted(found)
    }


def expected_by_direction(lines):
    """Returns the number of lines of each claim that would hold if arms differed in random directions."""
    expected = {}
    for (number, *_), found in lines.items():
        if number in BY_DIRECTION:
            seeds = len(counted(found))
            expected[number] = expected.get(number, 0) + BY_DIRECTION[number] ** seeds
    return expected


def replaced(run, measured, untrained):
    """Returns a run with other measurements in the place of its own."""
    return SimpleNamespace(
        arm=run.arm,
        seed=run.seed,
        name=run.name,
        loss=run.loss,
        alpha=run.alpha,
        decoded=run.decoded,
        measure=measured,
        untrained=untrained,
        controls=None,
        quantized=None,
        interventions=None,
    )


def with_untrained(runs):
    """runs: {(arm, seed): run}. Returns them with the untrained model in the place of the trained one, and
    that of the arm's next seed in the place of the untrained one; arms with one seed are left out."""
    result = {}
    for (arm, seed), run in runs.items():
        seeds = sorted(other for name, other in runs if name == arm and runs[name, other].untrained)
        if len(seeds) > 1 and seed in seeds:
            following = seeds[(seeds.index(seed) + 1) % len(seeds)]
            result[arm, seed] = replaced(run, run.untrained, runs[arm, following].untrained)
    return result


def noise_report(generator, streams, decoded, spread, shape):
    """Returns the streams of a measure.json in which every stream is noise of its own."""
    size = shape['sequences'], shape['tokens'], shape['dims']
    kinds = ['block'] * shape['sublayers']
    statistics = Statistics(1, REPLICATES, int(generator.integers(2**31)))
    statistics.begin(shape['sequences'], 'cpu', torch.zeros(size[:2], dtype=torch.long))
    for name in streams:
        scale = np.exp(spread * generator.standard_normal(shape['dims'], dtype=np.float32))
        for s in range(shape['sublayers']):
            x = generator.standard_normal(size, dtype=np.float32) * scale
            statistics.add_stream(name, s, torch.from_numpy(x))
    return {'streams': {name: stream_report(statistics, name, kinds, name == decoded) for name in streams}}


def streams_of(arm):
    """Returns the streams of an arm, and which is decoded."""
    if arm in ('baseline', 'qknorm'):
        return ('h',), 'h'
    if arm.startswith('rotated_commit'):
        return ('D', 'C', verdicts.ON_AXES_OF_D), 'C'
    return ('D', 'C'), 'D' if arm == 'decode_scratch' else 'C'


def noise_runs(spread, seed=0, shape=None, seeds=NOISE_SEEDS):
    """Returns {(arm, seed): run}, the whole comparison with noise in the place of every stream."""
    generator, runs, shape = np.random.default_rng(seed), {}, shape or SHAPE
    for arm, alpha in NOISE_ARMS.items():
        streams, decoded = streams_of(arm)
        for run_seed in seeds:
            run = SimpleNamespace(
                arm=arm, seed=run_seed, name=f'{arm}_{run_seed}', loss=0.0, alpha=alpha, decoded=decoded
            )
            measured = noise_report(generator, streams, decoded, spread, shape)
            untrained = noise_report(generator, streams, decoded, 0.0, shape)
            runs[arm, run_seed] = replaced(run, measured, untrained)
    return runs


def count(judged):
    """judged: as verdicts.judge returns it. Returns {claim: [lines that hold, lines that were judged]}."""
    counts = {}
    for (number, *_), found in lines_of(judged).items():
        so_far = counts.setdefault(number, [0, 0])
        so_far[0] += bool(holds_in_all(found))
        so_far[1] += 1
    return counts


def chance_report(runs, noise, post_hoc):
    """runs: {(arm, seed): run} of one scale. noise: the counts of noise_runs.
    Returns what chance.json says of the scale."""
    judged = verdicts.judge(runs, post_hoc)
    return {
        'holding': count(judged),
        'by_direction': expected_by_direction(lines_of(judged)),
        'untrained': count(verdicts.judge(with_untrained(runs), post_hoc)),
        'noise': noise,
    }


COUNTED = ('holding', 'untrained', 'noise')


def chance_table(report):
    """report: as chance_report returns it. Returns the table, with all claims in its last row."""
    rows = []
    for number in dict.fromkeys(claim.number for claim in verdicts.CLAIMS):
        holding, untrained, noise = (
            ' of '.join(map(str, report[key][number])) if number in report[key] else '–' for key in COUNTED
        )
        expected = report['by_direction'].get(number)
        rows.append((number, holding, '–' if expected is None else f'{expected:.1f}', untrained, noise))
    totals = [' of '.join(str(sum(x)) for x in zip(*report[key].values())) or '–' for key in COUNTED]
    rows.append(('all', totals[0], f'{sum(report["by_direction"].values()):.1f}', *totals[1:]))
    return markdown(['claim', 'lines that hold', 'by direction', 'untrained', 'noise'], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='one that holds <arm>_<scale>_<seed>/')
    parser.add_argument('--spread', type=float, default=0.5, help='of the noise (default 0.5)')
    parser.add_argument('--post-hoc', action='store_true', help='as of studies.verdicts')
    args = parser.parse_args(argv)
    with interrupts_exit(), user_errors_exit():
        groups = by_scale(runs_in(args.folder))
        noise = count(verdicts.judge(noise_runs(args.spread)))
        report = {scale: chance_report(runs, noise, args.post_hoc) for scale, runs in groups.items()}
        for scale, of_scale in report.items():
            print(f'## {scale}: chance\n\n{chance_table(of_scale)}\n')
        write_json(args.folder / 'chance.json', rounded(report))


if __name__ == '__main__':
    main()
