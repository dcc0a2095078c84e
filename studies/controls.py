"""
What the numbers of measure.json are to be held against: other windows, other dimensions, and where C has its outlier from.

    python -m studies.controls --ckpt out/ledger_160m_1337/ckpt.pt out/ledger_160m_1337/ckpt_0.pt

Flags are measure.py's. Writes controls.json (of ckpt_0.pt, the untrained weights: controls_0.json) beside the checkpoint, or below --out:

    windows   the headlines of every stream, with 95% intervals, on three kinds of windows that do not overlap: `anywhere`, measure.py's own; `document`,
              whose first token is the one after an end-of-text id; `end_of_text`, the same windows one token earlier, so that the id itself is at position 0;
              and `anywhere_bfloat16`: `anywhere` under bfloat16 autocast with bfloat16 streams, where all else here is float32
    streams   at the sublayer where m of j* peaks, on the windows `anywhere`: m, p and p/m of j* and j0 with their ranks among the d dimensions (1: the
              largest), quantiles over the dimensions, and the ten largest by each; and the dimension of the largest m and p after every sublayer
    likeness  of the streams that are not decoded: correlation over the dimensions between their m (and p) after each sublayer and the decoded stream's after the last
    commits   an exact decomposition of C, which is Σ_s c_s · (D_s + U_P V_P D_s): what each sublayer s adds by its identity, c_s · D_s, and by its map

m_j is the mean magnitude of dimension j over tokens, p_j that at position 0, j* and j0 the dominant and the start dimension (README, "Reading the output").
`commits` has C after the `last` sublayer and after its `peak`, at (position 0, j0), at (position 0, j*), and averaged over positions at j*. `signed` terms add up to the
mean of C[j]. The others are multiplied by the sign of C[j], token by token, and add up to its mean magnitude; their sums over it are the shares. `others` is the
control: the same averaged over 32 random dimensions.
"""

import json
import os
import sys

import numpy as np
import torch

import measure
from checkpoint import build_model, load_checkpoint, open_runs
from data.loader import UserError, atomic_write, philox
from figures import cell, short
from measure import REPLICATES, Statistics, at_once, collect, headline, number, stream_report
from model import RESIDUALS

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
LISTED, OTHERS = 10, 32  # dimensions that are listed, and drawn as a control


def window_starts(tokens, eot, count, seed):
    """Returns {kind: up to `count` starts}, each kind without overlaps and in an order that the seed and the data determine."""
    documents = []
    for path, offset, length, end in zip(tokens.paths, tokens.offsets, tokens.lengths, tokens.ends):
        begins = np.flatnonzero(np.fromfile(path, '<u2', offset=offset) == eot) + 1
        begins, i = begins[begins < length - tokens.block_size], 0
        while i < len(begins):
            documents.append(end - length + begins[i])
            i = begins.searchsorted(
                begins[i] + tokens.block_size + 1
            )  # one more, so that windows that begin a token earlier do not overlap either
    order = philox(seed, 0).random_raw(len(documents)).argsort(kind='stable')[:count]
    documents = np.array(documents, dtype=np.int64)[order]
    return {'anywhere': tokens.fixed_starts(count, seed), 'document': documents, 'end_of_text': documents - 1}


def ranks(values):
    """values: (d,). Returns (d,) int: 1 for the largest; ties go to the lowest index."""
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(-values, kind='stable')] = np.arange(1, len(values) + 1)
    return rank


def dimensions(m, p, named):
    """m, p: (d,), mean magnitudes over all positions and at position 0. named: {name: dimension}. Returns the entry of a stream in controls.json."""
    columns = {'m': m, 'p': p, 'concentration': np.divide(p, m, out=np.zeros(len(m)), where=m > 0)}
    rank = {name: ranks(values) for name, values in columns.items()}

    def row(j):
        return {
            'dim': int(j),
            **{name: number(v[j]) for name, v in columns.items()},
            **{f'rank_by_{name}': int(r[j]) for name, r in rank.items()},
        }

    return {
        **{name: row(j) for name, j in named.items()},
        'dimensions': len(m),
        'quantiles': {
            'at': QUANTILES,
            **{name: [number(q) for q in np.quantile(v, QUANTILES)] for name, v in columns.items()},
        },
        'largest_by': {name: [row(j) for j in r.argsort()[:LISTED]] for name, r in rank.items()},
    }


def correlations(x, y):
    """x, y: (d,). Returns Pearson's correlation, which the largest dimensions govern, and Spearman's, for which all count alike."""
    return {
        name: number(np.corrcoef(a, b)[0, 1]) if a.std() > 0 < b.std() else None
        for name, a, b in (('pearson', x, y), ('spearman', ranks(x), ranks(y)))
    }


@torch.no_grad()
def commits(model, idx, dims):
    """idx: (B, T). Returns (2, S, B, T, n), what the identity and the map of every sublayer add to the n dimensions `dims` of C, and (S, B, T, n), C after it."""
    terms, after = [], []

    def see(sublayer, inputs, output):
        streams, c = output
        terms.append(
            torch.stack(
                [(c * x)[..., dims] for x in (streams['D'], sublayer.residual.commit_map(streams['D']))]
            )
        )
        after.append(streams['C'][..., dims])

    handles = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    try:
        model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(terms, 1), torch.stack(after)


def decompose(model, tokens, starts, batch_size, dims, t):
    """Means over the windows at `starts` for C after sublayer t. Returns two numpy arrays in float64, of the last axis (position 0, mean over positions):
    the terms, (2 identity and map, t + 1 sublayers, n dims, 2 signed and aligned with C, 2), and C itself, (n, 2 its value and magnitude, 2)."""
    total, device = [0, 0], next(model.parameters()).device
    for i in range(0, len(starts), batch_size):
        terms, after = commits(model, tokens.windows(starts[i : i + batch_size])[0].to(device), dims)
        terms, C = terms[:, : t + 1].double(), after[t].double()
        for k, x in enumerate(
            (torch.stack([terms, terms * C.sign()], -1), torch.stack([C, C.abs()], -1))
        ):  # (…, B, T, n, 2)
            total[k] = total[k] + torch.stack([x.select(-3, 0), x.mean(-3)], -1).sum(-4)
    return [(x / len(starts)).cpu().numpy() for x in total]


def commit_report(model, tokens, starts, batch_size, dominant, start, peak):
    """Returns `commits` of controls.json."""
    d = model.config.n_embd
    others = [
        j for j in philox(0, 0).random_raw(d).argsort(kind='stable').tolist() if j not in (dominant, start)
    ][:OTHERS]
    places = {
        'start_at_start_dim': ([0], 0),
        'start_at_dominant': ([1], 0),
        'mean_at_dominant': ([1], 1),
        'start_at_others': (range(2, 2 + len(others)), 0),
        'mean_at_others': (range(2, 2 + len(others)), 1),
    }
    report = {}
    for name, t in {'last': len(model.sublayers) - 1, 'peak': peak}.items():
        if name == 'peak' and t == report['last']['sublayer']:
            return {**report, 'peak': report['last']}
        terms, C = decompose(model, tokens, starts, batch_size, [start, dominant, *others], t)
        report[name] = {'sublayer': t}
        for place, (columns, average) in places.items() if others else list(places.items())[:3]:
            x, (value, magnitude) = (
                terms[..., average][:, :, columns].mean(2),
                C[..., average][columns].mean(0),
            )
            lists = {
                key: [number(v) for v in values]
                for key, values in {
                    'identity_signed': x[0, :, 0],
                    'map_signed': x[1, :, 0],
                    'identity': x[0, :, 1],
                    'map': x[1, :, 1],
                }.items()
            }
            report[name][place] = {
                'dim': [start, dominant][columns[0]] if columns[0] < 2 else None,
                'mean': number(value),
                'magnitude': number(magnitude),
                'identity_share': number(x[0, :, 1].sum() / magnitude),
                'map_share': number(x[1, :, 1].sum() / magnitude),
                **lists,
            }
    return report


def controls(run, args):
    """Returns what controls.json holds for one checkpoint."""
    model, tokens, path, eot = run.model, run.tokens, run.path, run.meta['eot']
    operator, batch_size = RESIDUALS[model.config.residual], at_once(args.device, tokens.block_size)
    report = {
        'schema': 1,
        'checkpoint': str(path),
        'iter_num': run.iter_num,
        'model': run.model_args,
        'data': {
            'name': tokens.path.parent.name,
            'split': args.split,
            'block_size': tokens.block_size,
            'seed': args.seed,
        },
        'windows': {},
        'streams': {},
    }
    kinds = window_starts(tokens, eot, args.sequences, args.seed)
    for kind, starts in {**kinds, 'anywhere_bfloat16': kinds['anywhere']}.items():
        report['windows'][kind] = {'sequences': len(starts)}
        if len(starts) < 2:  # no interval without two
            continue
        low = kind == 'anywhere_bfloat16'
        with torch.autocast(args.device, torch.bfloat16, enabled=low):
            seen = (
                build_model(load_checkpoint(path), path, bf16_streams=True).to(args.device) if low else model
            )
            batches = window_batches(tokens, starts, batch_size)
            statistics = collect(seen, batches, Statistics(1, REPLICATES, args.seed), extras=True)
        kinds_of_sublayers = [sublayer.kind for sublayer in model.sublayers]
        entries = {
            name: stream_report(statistics, name, kinds_of_sublayers, name == model.decoded)
            for name in operator.streams
        }
        report['windows'][kind].update(
            loss=headline(statistics.mean('loss')),
            streams={
                name: {key: value for key, value in entry.items() if key != 'sublayers'}
                for name, entry in entries.items()
            },
        )
        if kind == 'anywhere':
            measured, anywhere, fixed = entries, statistics, starts

    S = len(model.sublayers)
    m, p = (
        {name: np.stack([anywhere.mean((name, s, part))[0] for s in range(S)]) for name in operator.streams}
        for part in ('magnitude', 'start')
    )
    for name, entry in measured.items():
        peak = entry['peak_sublayer']
        report['streams'][name] = {
            'decoded': entry['decoded'],
            'peak_sublayer': peak,
            **dimensions(
                m[name][peak], p[name][peak], {key: entry[key] for key in ('dominant_dim', 'start_dim')}
            ),
            'largest_dim': m[name].argmax(1).tolist(),
            'largest_start_dim': p[name].argmax(1).tolist(),
        }
    report['likeness'] = {
        name: {
            part: [correlations(x[name][s], x[operator.decoded][-1]) for s in range(S)]
            for part, x in (('m', m), ('p', p))
        }
        for name in operator.streams
        if name != operator.decoded
    }
    if hasattr(model.sublayers[0].residual, 'commit_map'):
        C = measured[operator.decoded]
        report['commits'] = commit_report(
            model, tokens, fixed, batch_size, C['dominant_dim'], C['start_dim'], C['peak_sublayer']
        )
    return report


def print_controls(name, report):
    """Windows against windows, the ranks of j* and j0, and the shares of what is committed."""
    print(f'\n{name}, iteration {report["iter_num"]}')
    seen = [(f'{kind} ({w["sequences"]})', w) for kind, w in report['windows'].items() if 'loss' in w]
    for columns in (seen[:3], seen[3:]):
        lines = {
            '': [kind for kind, _ in columns],
            'loss (nats per token)': [cell(w['loss']) for _, w in columns],
        }
        for stream in report['streams']:
            for key in ('start_ratio', 'start_token_concentration', 'fixed_dim_ratio', 'top1_at_start'):
                lines[f'{stream}: {measure.HEADLINES[key]}'] = [
                    cell(w['streams'][stream][key]) for _, w in columns
                ]
        for name, cells in lines.items():
            print((f'{name:30}' + ''.join(f'{text:26}' for text in cells)).rstrip())
    for stream, s in report['streams'].items():
        for key, symbol in {'dominant_dim': 'j*', 'start_dim': 'j0'}.items():
            j = s[key]
            print(
                f'{stream}: {symbol} = {j["dim"]} after sublayer {s["peak_sublayer"]}: rank {j["rank_by_m"]} of {s["dimensions"]} by m, {j["rank_by_p"]} by p, '
                f'{j["rank_by_concentration"]} by p/m = {short(j["concentration"], 3)} (median {short(s["quantiles"]["concentration"][QUANTILES.index(0.5)], 3)})'
            )
    for after in {x['sublayer']: x for x in report.get('commits', {}).values()}.values():
        for place, x in after.items():
            if place != 'sublayer':
                print(
                    f'C after sublayer {after["sublayer"]}, {place.replace("_", " ")}: magnitude {short(x["magnitude"], 3)}, '
                    f'{x["identity_share"]:.0%} from the identity, {x["map_share"]:.0%} from the map'
                )


def run(argv):
    args = measure.parse_arguments(argv)
    if args.sequences < 2:
        raise UserError(f'--sequences is {args.sequences}: expected at least 2')
    for run in open_runs(args, args.split):
        out, name = run.out / f'controls{run.suffix}.json', run.name
        report = controls(run, args)
        with atomic_write(out, 'w') as file:
            json.dump(report, file)
        print_controls(name, report)
        print(f'written: {os.path.relpath(out)}')


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & set(argv):
        print(__doc__)
        return
    measure.command(run, argv)


if __name__ == '__main__':
    main()
