"""
What the numbers of measure.json are to be held against: other windows, other dimensions, what C is made of.

    python -m studies.controls --ckpt out/ledger_160m_1338

Writes controls.json (of ckpt_0.pt, the untrained weights: controls_0.json) beside the checkpoint or below
--out:

    windows   the headlines of every stream, with 95% intervals, on windows that do not overlap. `anywhere`
              are measure.py's own. `document`: the first token is the one after an end-of-text id.
              `end_of_text`: the same windows one token earlier, so that the id itself is at position 0.
              `anywhere_bfloat16`: `anywhere` under bfloat16 autocast with bfloat16 streams, where all else
              here is float32.
    streams   after the sublayer where m of j* peaks, on the windows `anywhere`: m, p and p/m of j* and j0
              with their ranks among the d dimensions (1: the largest), quantiles over the dimensions, and
              the ten largest by each; and the dimension with the largest m and p after every sublayer.
    commits   an exact decomposition of C = Σ_s c_s · (D_s + U_P V_P D_s): what every sublayer s adds by its
              identity, c_s · D_s, and by its map. (In a ledger that commits through a rotation, both are
              rotated.)

m_j is the mean magnitude of dimension j over all tokens, p_j that at position 0; j* and j0 are the dominant
and the start dimension. `commits` has C after the `last` sublayer and after its `peak`, at (position 0,
j0), at (position 0, j*), and averaged over positions at j*. Terms that end in `_signed` add up to the mean
of C[j]. The others are multiplied by the sign of C[j], token by token, and add up to its mean magnitude;
their sums over it are the shares. `others` is the control: the same averaged over 32 random dimensions.
"""

import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

import measure
from checkpoint import (
    build_model,
    check_run_arguments,
    is_pretrained,
    load_checkpoint,
    open_runs,
    run_parser,
)
from data.loader import UserError, atomic_write, philox
from measure import REPLICATES, Statistics, collect, headline, number, stream_report, window_batches
from studies.results import significant, with_interval

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
LISTED, OTHERS = 10, 32  # dimensions that are listed, and drawn as a control


# ---- Other windows


def document_starts(is_eot, block_size):
    """is_eot: (n,) bool, of one file. Returns where windows begin right after an end-of-text id. They are
    one token further apart than they would have to be, so that windows that begin a token earlier do not
    overlap."""
    begins = np.flatnonzero(is_eot) + 1
    begins = begins[begins < len(is_eot) - block_size]
    starts, i = [], 0
    while i < len(begins):
        starts.append(begins[i])
        i = begins.searchsorted(begins[i] + block_size + 1)
    return starts


def window_starts(tokens, eot, count, seed):
    """Returns {kind: up to `count` starts}, in an order that the seed and the data determine."""
    documents = []
    for path, offset, length, end in zip(tokens.paths, tokens.offsets, tokens.lengths, tokens.ends):
        is_eot = np.fromfile(path, '<u2', offset=offset) == eot
        first = end - length  # of the file, among all tokens
        documents += [first + start for start in document_starts(is_eot, tokens.block_size)]
    order = philox(seed, 0).random_raw(len(documents)).argsort(kind='stable')[:count]
    documents = np.array(documents, dtype=np.int64)[order]
    return {'anywhere': tokens.fixed_starts(count, seed), 'document': documents, 'end_of_text': documents - 1}


def measured_on(model, run, starts, seed):
    """Returns the Statistics of the windows at `starts`."""
    at_once = measure.at_once(next(model.parameters()).device, run.tokens.block_size)
    batches = window_batches(run.tokens, starts, at_once)
    return collect(model, batches, Statistics(1, REPLICATES, seed), extras=True)


def stream_entries(statistics, model):
    """Returns {stream: its entry of measure.json}."""
    kinds = [sublayer.kind for sublayer in model.sublayers]
    return {
        name: stream_report(statistics, name, kinds, name == model.decoded) for name in statistics.streams()
    }


def window_report(statistics, model):
    """Returns what controls.json says of one kind of windows."""
    streams = {
        name: {key: value for key, value in entry.items() if key != 'sublayers'}
        for name, entry in stream_entries(statistics, model).items()
    }
    return {
        'sequences': statistics.sequences,
        'loss': headline(statistics.mean('loss')),
        'streams': streams,
    }


# ---- Other dimensions


def descending_ranks(values):
    """values: (d,). Returns (d,) int: 1 for the largest; among equal values the lowest index ranks first."""
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(-values, kind='stable')] = np.arange(1, len(values) + 1)
    return rank


def dimensions(m, p, named):
    """m, p: (d,), mean magnitudes over all positions and at position 0. named: {name: dimension}.
    Returns the entry of a stream in controls.json."""
    columns = {'m': m, 'p': p, 'concentration': np.divide(p, m, out=np.zeros(len(m)), where=m > 0)}
    rank = {name: descending_ranks(values) for name, values in columns.items()}

    def row(j):
        values = {name: number(column[j]) for name, column in columns.items()}
        ranks = {f'rank_by_{name}': int(ranks[j]) for name, ranks in rank.items()}
        return {'dim': int(j), **values, **ranks}

    quantiles = {name: [number(q) for q in np.quantile(v, QUANTILES)] for name, v in columns.items()}
    return {
        **{name: row(j) for name, j in named.items()},
        'dimensions': len(m),
        'quantiles': {'at': QUANTILES, **quantiles},
        'largest_by': {name: [row(j) for j in ranks.argsort()[:LISTED]] for name, ranks in rank.items()},
    }


def dimension_report(statistics, name, entry):
    """entry: of the stream in measure.json. Returns its entry in controls.json."""
    S = len(entry['sublayers'])
    m, p = (
        np.stack([statistics.mean((name, s, part))[0] for s in range(S)]) for part in ('magnitude', 'start')
    )
    peak, named = entry['peak_sublayer'], {key: entry[key] for key in ('dominant_dim', 'start_dim')}
    return {
        'decoded': entry['decoded'],
        'peak_sublayer': peak,
        **dimensions(m[peak], p[peak], named),
        'largest_dim': m.argmax(1).tolist(),
        'largest_start_dim': p.argmax(1).tolist(),
    }


# ---- What C is made of


def commit_parts(residual, D):
    """Returns what a full commit of D adds to C by the identity and by the map, each (B, T, d)."""
    parts = D, residual.commit_map(D)
    rotation = getattr(residual, 'rotation', None)  # of arms/rotated_commit.py
    return parts if rotation is None else [F.linear(part, rotation) for part in parts]


@torch.no_grad()
def commit_terms(model, idx, dims):
    """idx: (B, T). Returns (2, S, B, T, n), what the identity and the map of every sublayer add to the n
    dimensions `dims` of C, and (S, B, T, n), C after it."""
    terms, after = [], []

    def see(sublayer, inputs, output):
        streams, c = output
        parts = commit_parts(sublayer.residual, streams['D'])
        terms.append(torch.stack([(c * part)[..., dims] for part in parts]))
        after.append(streams['C'][..., dims])

    handles = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    try:
        model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(terms, 1), torch.stack(after)


def start_and_mean(x):
    """x: (…, B, T, n, k). Returns (…, n, k, 2), summed over the batch: position 0, and the mean of
    positions."""
    return torch.stack([x.select(-3, 0), x.mean(-3)], -1).sum(-4)


def decompose(model, tokens, starts, batch_size, dims, t):
    """Means over the windows at `starts`, for C after sublayer t. Returns two float64 arrays whose last
    axis is (position 0, mean over positions): the terms, (2 identity and map, t + 1 sublayers, n dims, 2
    signed and aligned with C, 2), and C itself, (n, 2 its value and its magnitude, 2)."""
    totals, device = [0, 0], next(model.parameters()).device
    for idx, _ in window_batches(tokens, starts, batch_size):
        terms, after = commit_terms(model, idx.to(device), dims)
        terms, C = terms[:, : t + 1].double(), after[t].double()
        totals[0] = totals[0] + start_and_mean(torch.stack([terms, terms * C.sign()], -1))
        totals[1] = totals[1] + start_and_mean(torch.stack([C, C.abs()], -1))
    return [(total / len(starts)).cpu().numpy() for total in totals]


def commit_place(terms, C, dim):
    """terms: (2, t + 1, n, 2) and C: (n, 2) at one average over positions, of n dimensions that are averaged.
    Returns the entry of a place in `commits`."""
    terms, (value, magnitude) = terms.mean(2), C.mean(0)
    return {
        'dim': dim,
        'mean': number(value),
        'magnitude': number(magnitude),
        'identity_share': number(terms[0, :, 1].sum() / magnitude),
        'map_share': number(terms[1, :, 1].sum() / magnitude),
        'identity_signed': [number(x) for x in terms[0, :, 0]],
        'map_signed': [number(x) for x in terms[1, :, 0]],
        'identity': [number(x) for x in terms[0, :, 1]],
        'map': [number(x) for x in terms[1, :, 1]],
    }


def other_dimensions(d, named):
    """Returns OTHERS dimensions at random, none of those in `named`."""
    drawn = philox(0, 0).random_raw(d).argsort(kind='stable').tolist()
    return [j for j in drawn if j not in named][:OTHERS]


def commit_report(model, tokens, starts, batch_size, dominant, start, peak):
    """Returns `commits` of controls.json. dominant, start: j* and j0 of C; peak: the sublayer where it
    peaks."""
    others = other_dimensions(model.n_embd, (dominant, start))
    dims, rest = [start, dominant, *others], list(range(2, 2 + len(others)))
    places = {  # name → which of `dims`, at position 0 or on average, the dimension
        'start_at_start_dim': ([0], 0, start),
        'start_at_dominant': ([1], 0, dominant),
        'mean_at_dominant': ([1], 1, dominant),
    }
    if others:
        places |= {'start_at_others': (rest, 0, None), 'mean_at_others': (rest, 1, None)}
    found = {}
    for t in {len(model.sublayers) - 1, peak}:
        terms, C = decompose(model, tokens, starts, batch_size, dims, t)
        found[t] = {'sublayer': t}
        for place, (columns, average, dim) in places.items():
            found[t][place] = commit_place(terms[..., average][:, :, columns], C[columns][..., average], dim)
    return {'last': found[len(model.sublayers) - 1], 'peak': found[peak]}


# ---- All of it


def controls(run, args):
    """run: an open run. Returns what controls.json holds."""
    model, tokens = run.model, run.tokens
    starts = window_starts(tokens, run.meta['eot'], args.sequences, args.seed)
    anywhere = measured_on(model, run, starts['anywhere'], args.seed)
    windows = {'anywhere': window_report(anywhere, model)}
    for kind in ('document', 'end_of_text'):
        windows[kind] = {'sequences': len(starts[kind])}
        if len(starts[kind]) >= 2:  # fewer have no interval
            windows[kind] = window_report(measured_on(model, run, starts[kind], args.seed), model)
    in_bfloat16 = build_model(load_checkpoint(run.path), run.path, bf16_streams=True).to(args.device)
    with torch.autocast(args.device, torch.bfloat16):
        rounded = measured_on(in_bfloat16, run, starts['anywhere'], args.seed)
    windows['anywhere_bfloat16'] = window_report(rounded, model)

    entries = stream_entries(anywhere, model)
    report = {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'model': run.model_args,
        'data': {**run.data, 'block_size': tokens.block_size, 'seed': args.seed},
        'windows': windows,
        'streams': {name: dimension_report(anywhere, name, entry) for name, entry in entries.items()},
    }
    if hasattr(model.sublayers[0].residual, 'commit_map'):
        batch_size, C = measure.at_once(args.device, tokens.block_size), entries['C']
        dims = C['dominant_dim'], C['start_dim'], C['peak_sublayer']
        report['commits'] = commit_report(model, tokens, starts['anywhere'], batch_size, *dims)
    return report


PRINTED = ('start_ratio', 'start_token_concentration', 'fixed_dim_ratio', 'top1_at_start')


def print_windows(windows, streams):
    """windows: [(kind, its entry)]. Prints a column for each kind of windows."""
    lines = {'': [f'{kind} ({w["sequences"]})' for kind, w in windows]}
    lines['loss (nats per token)'] = [with_interval(w['loss']) for _, w in windows]
    for stream in streams:
        for key in PRINTED:
            cells = [with_interval(w['streams'][stream][key]) for _, w in windows]
            lines[f'{stream}: {measure.HEADLINES[key]}'] = cells
    for label, cells in lines.items():
        print((f'{label:30}' + ''.join(f'{text:26}' for text in cells)).rstrip())


def print_ranks(stream, entry):
    """Prints where j* and j0 stand among all dimensions."""
    median = entry['quantiles']['concentration'][QUANTILES.index(0.5)]
    for key, symbol in {'dominant_dim': 'j*', 'start_dim': 'j0'}.items():
        j = entry[key]
        ranks = ', '.join(f'{j[f"rank_by_{name}"]} by {name}' for name in ('m', 'p'))
        print(
            f'{stream}: {symbol} = {j["dim"]} after sublayer {entry["peak_sublayer"]}: rank {ranks}, '
            f'{j["rank_by_concentration"]} by p/m of {entry["dimensions"]}; '
            f'p/m = {significant(j["concentration"], 3)} (median {significant(median, 3)})'
        )


def print_controls(name, report):
    """Windows against windows, the ranks of j* and j0, and the shares of what is committed."""
    print(f'\n{name}, iteration {report["iter_num"]}')
    seen = [(kind, window) for kind, window in report['windows'].items() if 'loss' in window]
    for columns in (seen[:3], seen[3:]):
        print_windows(columns, report['streams'])
    for stream, entry in report['streams'].items():
        print_ranks(stream, entry)
    for after in {x['sublayer']: x for x in report.get('commits', {}).values()}.values():
        print_commits(after)


def print_commits(after):
    """after: an entry of `commits`. Prints the shares of identity and map at every place."""
    for place, x in after.items():
        if place != 'sublayer':
            where = f'C after sublayer {after["sublayer"]}, {place.replace("_", " ")}'
            shares = f'{x["identity_share"]:.0%} from the identity, {x["map_share"]:.0%} from the map'
            print(f'{where}: magnitude {significant(x["magnitude"], 3)}, {shares}')


def parse_arguments(argv):
    parser = run_parser(__doc__, sequences=256, writes='controls.json')
    args = parser.parse_args(argv)
    check_run_arguments(args, sequences=2)
    return args


def run(argv):
    args = parse_arguments(argv)
    pretrained = [name for name in args.ckpt if is_pretrained(name)]
    if pretrained:
        raise UserError(f'{pretrained[0]} is a pretrained model: the controls are those of runs of train.py')
    for opened in open_runs(args):
        report = controls(opened, args)
        path = opened.out / f'controls{opened.suffix}.json'
        with atomic_write(path, 'w') as file:
            json.dump(report, file)
        print_controls(opened.name, report)
        print(f'written: {os.path.relpath(path)}')


def main(argv=None):
    measure.command(run, sys.argv[1:] if argv is None else argv)


if __name__ == '__main__':
    main()
