"""
Does the outlier's onset go with a drop in the loss of some class of tokens? Looks at a run's snapshots, and at its log at the same steps.

    python train.py config/baseline_160m.py --snapshots=0,128,256,512,768,1024,1536,2048,3072,4100 …
    python -m studies.onset --ckpt out/baseline_160m

onset.json: for every class of predicted tokens its loss at each snapshot and the step at which half of its fall is done; for every stream the largest start ratio and
fixed-dimension ratio over its sublayers, the step at which half of their way is done, and Spearman's rank correlation, over the intervals between snapshots, of the
growth of the ratio's logarithm with the class's share in the fall of the mean loss: its own fall over the mean's, since everything falls early. A share of nearly
nothing is noise: intervals in which the mean falls by less than 0.01 nats, or has no finite ratio at an end, are left out. The p-value is that of 10,000 permutations
of the intervals, two-sided. With C classes and few intervals a small one is expected by chance in one of 1/p.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoint import build_model, load_checkpoint, read_log
from data.loader import Tokens, UserError, atomic_write, dataset_folder, read_meta
from figures import HEADLINES, STREAM_STYLE, figure
from measure import number
from studies import science
from studies.emergence import text
from studies.intervene import evaluate, label

RATIOS = ('start_ratio', 'fixed_dim_ratio')
COLOURS = (
    '#000000',
    '#E69F00',
    '#56B4E9',
    '#009E73',
    '#CC79A7',
    '#0072B2',
    '#D55E00',
    '#F0E442',
    '#999999',
)  # Okabe and Ito 2008, and grey
FEWEST = 5  # snapshots: with fewer, a rank correlation over the intervals says nothing
LEAST_FALL = 0.01  # nats: losses nearer than this count as matched


def halfway(steps, values):
    """The step at which a series has first gone half of its way from its first to its last value, by interpolation, or None."""
    steps, values = np.array([(t, v) for t, v in zip(steps, values) if math.isfinite(v)] or [(0, 0)], float).T
    way = (values - values[0]) / ((values[-1] - values[0]) or math.inf)
    i = int((way >= 0.5).argmax())
    return number(np.interp(0.5, way[i - 1 : i + 1], steps[i - 1 : i + 1])) if i else None


def spearman(x, y):
    """x, y: (n,). Returns their rank correlation and its p-value, or two None where one is constant or short."""
    if len(x) < FEWEST - 1 or not np.ptp(x) or not np.ptp(y):
        return None, None
    return number(science.rank_correlation(x, y)), number(science.rank_correlation_p(x, y))


def analyse(steps, by_class, mean, ratios):
    """steps: (n,); by_class: {class: (n,) loss}; mean: (n,) loss; ratios: {(stream, name): (n,)}. Returns what onset.json says."""
    fall, streams = -np.diff(mean), []
    for (stream, name), r in ratios.items():
        growth = np.diff(np.log(r))
        use = (fall > LEAST_FALL) & np.isfinite(growth)
        streams.append(
            {
                'stream': stream,
                'ratio': name,
                'values': [number(v) for v in r],
                'half_way': halfway(steps, r),
                'intervals': int(use.sum()),
                'with': {
                    kind: dict(
                        zip(('rank_correlation', 'p'), spearman(growth[use], -np.diff(loss)[use] / fall[use]))
                    )
                    for kind, loss in by_class.items()
                },
            }
        )
    return {
        'steps': [int(t) for t in steps],
        'loss': [number(v) for v in mean],
        'streams': streams,
        'classes': {
            name: {'loss': [number(v) for v in loss], 'half_fall': halfway(steps, loss)}
            for name, loss in by_class.items()
        },
    }


def draw(name, report, path):
    with figure(
        path, f'{name}\nwhen classes of tokens are learned, and when the outlier comes', 2, 1, (7.5, 3.2)
    ) as (above, below):
        for i, (kind, c) in enumerate(report['classes'].items()):
            above.plot(
                report['steps'],
                c['loss'],
                label=kind,
                marker='os^Dv<>Px'[i % 9],
                markersize=4,
                color=COLOURS[i % 9],
            )
        above.set(ylabel='loss (nats per token)')
        for s in report['streams']:
            style = {
                **STREAM_STYLE.get(s['stream'], {}),
                'linestyle': '-' if s['ratio'] == RATIOS[0] else '--',
            }
            below.plot(
                report['steps'],
                s['values'],
                label=f'{s["stream"]}, {HEADLINES[s["ratio"]]}',
                markersize=4,
                **style,
            )
        below.set(ylabel='ratio, largest over sublayers', xlabel='step')
        for axis in (above, below):
            axis.set_xscale('symlog', linthresh=100)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))


def run(args):
    folder = Path(args.ckpt)
    log = {line['iter']: line for line in read_log(folder / 'log.jsonl')}
    paths = {int(path.stem[5:]): path for path in folder.glob('ckpt_*.pt') if path.stem[5:].isdecimal()}
    steps = sorted(set(log) & set(paths))
    if len(steps) < FEWEST:
        raise UserError(
            f'{folder} holds {len(steps)} snapshots that are in its log, and this needs {FEWEST}: train with --snapshots=0,128,256,… at steps that are evaluated'
        )
    found = []
    for step in steps:
        checkpoint = load_checkpoint(paths[step])
        model = build_model(checkpoint, paths[step], bf16_streams=False).to(args.device)
        if step == steps[0]:
            data = dataset_folder(args.data or checkpoint['config']['dataset'])
            meta = read_meta(data)
            tokens = Tokens(data, 'val', model.config.block_size, meta['vocab_size'])
            starts = tokens.fixed_starts(args.sequences)
            kinds, names = label(tokens, starts, meta)[0]['class']
        found.append(
            evaluate(
                model,
                tokens,
                starts,
                (),
                None,
                max(1, (8192 if args.device == 'cuda' else 2048) // model.config.block_size),
            )[0]
        )
    by_class = {
        name: np.array([loss[kinds == i].mean() for loss in found])
        for i, name in enumerate(names)
        if (kinds == i).any()
    }
    ratios = {
        (stream, name): np.array(
            [
                max((v for v in log[step]['streams'][stream][name] if v is not None), default=math.nan)
                for step in steps
            ]
        )
        for stream in log[steps[0]]['streams']
        for name in RATIOS
    }
    report = {
        'checkpoint': str(folder),
        'sequences': len(starts),
        **analyse(np.array(steps), by_class, np.array([loss.mean() for loss in found]), ratios),
    }
    for s in report['streams']:
        best = min(s['with'].items(), key=lambda item: item[1]['p'] or 2)
        first, *_, last = [v for v in s['values'] if v is not None] or [1, 1]
        print(
            f'{s["stream"]} {HEADLINES[s["ratio"]]}: '
            + (
                f'half of its {"rise" if last > first else "fall"} at step {text(s["half_way"])}'
                if s['half_way']
                else 'stands still'
            )
            + (
                f'; most like {best[0]}: rank correlation {text(best[1]["rank_correlation"], 2)}, p {text(best[1]["p"], 2)}'
                if best[1]['p']
                else '; no rank correlation'
            )
            + f' over {s["intervals"]} intervals and {len(s["with"])} classes'
        )
    with atomic_write(folder / 'onset.json', 'w') as file:
        json.dump(report, file, indent=1)
    draw(folder.name, report, folder / 'onset.png')
    print(f'written: {folder}/onset.json, onset.png')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Sets the losses of token classes beside the outlier, over the snapshots of a run.'
    )
    parser.add_argument('--ckpt', required=True, help='folder of a run with snapshots')
    parser.add_argument('--sequences', type=int, default=64)
    parser.add_argument('--data', help="dataset (default: the run's own)")
    args = parser.parse_args(argv)
    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        run(args)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
