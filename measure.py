"""
Where do massive activations sit? Hooks on residual streams → statistics → measure.json, a table, figures.

    python measure.py --ckpt out/ledger_demo          one run
    python measure.py --ckpt out                      every run below out/, side by side

What is worth knowing before reading on:
- a statistic belongs to a stream (h, or D and C) as it leaves a sublayer;
- only sums over sequences are kept, one for each bootstrap replicate: memory does not grow with their number;
- replicate 0 has weight 1 everywhere: it is the measurement. The others have Poisson(1) weights, a function
  of the seed and of the sequence's index, and give 95% intervals. In each of them j* and j0 are chosen again;
- the model runs uncompiled, in float32 without TF32, whatever it was trained in.

Definitions. X is one stream after one sublayer, N sequences of T tokens in d dimensions; a = |X|.

  top-k                     the k largest a, each with sequence, position, token and dimension            [S]
  median                    of a over a sequence's tokens and dimensions, averaged over sequences         [S]
  max over median           the largest a of a sequence over its median, averaged over sequences          [G]
  massive count             entries with a > 100 and a ≥ 1000 × median, per sequence                      [S]
  kurtosis                  excess kurtosis over the d dimensions of a token, averaged over tokens        [V]
  m_j, p_j                  mean of a over sequences and tokens, and at position 0 alone, per dimension   [V]
  fixed-dimension ratio     max_j m_j / median_j m_j                                                      [V]
  j*, dominant dimension    argmax_j of m_j averaged over the stream's sublayers                          [V]
  persistence               share of the sublayers whose largest m_j is at j*                             [V]
  start-token conc.         p_j* / m_j*: between 0 and T, 1 where position 0 is like the others           [V]
  start ratio               max_j p_j / median_j p_j
  j0, start dimension       argmax_j of p_j averaged over sublayers; its start persistence, and p_j0 / m_j0
  relative start conc.      (p_j / m_j) / median_j (p_j / m_j): 1 for a stream that is merely larger at
                            position 0. Three rows: for the sublayer's own largest p_j, for j0, and for j*
  norm, start norm          mean L2 norm of a token; that at position 0 over it                         [V, Z]
  share of norm             norm over its largest among the stream's sublayers: is the stream nearly empty?
  read share                mean norm of what a stream adds to the read of this sublayer (λ ⊙ C) over that
                            of the first stream (D)
  top-1 at start            share of the sequences whose largest a sits at position 0
  attention sink            mean probability that queries give to position 0, per head; share above 0.3   [Q]

A headline is the largest value over the sublayers, with that sublayer; a concentration is quoted where m at
its dimension is largest. Beside it stands the value at the last sublayer, which is what the head decodes.

How a stream is caught is in hooks.py, how it is summed up in streams.py; the rules for "has an outlier", and
the tables, are in report.py.

Sources: [S] Sun et al. 2024, arXiv 2402.17762; [G] Gallego-Feliciano et al. 2025, arXiv 2508.03616; [V]
Vemula 2026, arXiv 2606.20743; [Z] Sun, Canziani, LeCun, Zhu 2026, arXiv 2603.05498; [Q] Gu et al. 2025, arXiv
2410.10781.
"""

import machine

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import figures
from checkpoint import (
    build_model,
    check_run_arguments,
    load_checkpoint,
    open_runs,
    read_log,
    run_parser,
)
from data.loader import UserError, atomic_write, user_errors_exit
from data.progress import Progress
from figures import HEADLINES
from hooks import hooked, modules_hooked
from report import REFERENCE, compare, judge, print_comparison, print_run, untrained_bounds
from streams import Statistics, bootstrap_weights

REPLICATES = 1000  # of the bootstrap
SINK_THRESHOLD = 0.3  # a head that gives position 0 more than this on average is a sink. Gu et al. 2025, §3
LANDSCAPE_SEQUENCES = 8

QUOTED_AT = {  # the others: at their own largest
    'start_token_concentration': 'magnitude_at_dominant',
    'relative_start_token_concentration': 'magnitude_at_dominant',
    'start_dim_concentration': 'magnitude_at_start_dim',
    'relative_start_dim_concentration': 'magnitude_at_start_dim',
}


# ---- from a model to statistics


def at_once(device, block_size):
    """Returns how many sequences are put through the model together: a GPU wants more than a CPU."""
    return max(1, (32768 if str(device).startswith('cuda') else 4096) // block_size)


def sequences_at_once(model, device, block_size):
    """Returns the same for a model that may know better: a pretrained one is larger than those of ours."""
    if hasattr(model, 'sequences_at_once'):
        return model.sequences_at_once(block_size)
    return at_once(device, block_size)


def window_batches(tokens, starts, batch_size):
    """Yields inputs and targets, each (B, T), of the windows of `tokens` at `starts`."""
    for i in range(0, len(starts), batch_size):
        yield tokens.windows(starts[i : i + batch_size])


@torch.no_grad()
def collect(model, batches, statistics, streams=None, extras=False, progress=lambda done: None):
    """Puts batches through a model, adds its streams to `statistics` and returns that.

    batches: an iterable of token ids, (B, T) int64, or of pairs of these and their targets.
    streams: None for a model that hooked() knows; for any other, {name of a stream: names of its modules}, as
    in modules_hooked. extras: also the loss and, of a model that hooked() knows, the attention sink."""

    def on_streams(s, seen):
        for name, x in seen.items():
            statistics.add_stream(name, s, x)

    def on_sinks(layer, sinks):
        statistics.add(('sink', layer), sinks)

    if streams is None:
        hooks = hooked(model, on_streams, on_sinks if extras else None, statistics.add_reads)
    else:
        hooks = modules_hooked(model, streams, on_streams)
    device = next((parameter.device for parameter in model.parameters()), 'cpu')
    with hooks:
        for batch in batches:
            idx, targets = (batch, None) if torch.is_tensor(batch) else batch
            idx = idx.to(device)
            statistics.begin(len(idx), device, idx)
            output = model(idx)
            if extras and targets is not None:
                statistics.add_losses(sequence_losses(output, targets.to(device)))
            progress(statistics.sequences)
    for stream, places in (streams or {}).items():
        for s, place in enumerate(places):
            if (stream, s, 'magnitude') not in statistics.sums:
                raise UserError(
                    f"nothing passed through module '{place}', which is to be place {s} of {stream}"
                )
    return statistics


def sequence_losses(logits, targets):
    """logits: (B, T, V); targets: (B, T). Returns (B,) float64: the mean cross-entropy of each sequence, in
    nats per token. One sequence at a time, since it takes a copy of the logits."""
    pairs = zip(logits, targets)
    losses = [F.cross_entropy(*pair, reduction='none').mean(dtype=torch.float64) for pair in pairs]
    return torch.stack(losses)


# ---- from statistics to a report


def number(x, digits=7):
    """A float that JSON can carry, to 7 digits, which is float32's precision; None if it is not finite."""
    return float(f'{x:.{digits}g}') if math.isfinite(x) else None


def interval(values):
    """values: (R,), the measurement and its replicates. Returns {value, low, high}: the 2.5% and 97.5%
    quantiles over the replicates, None where there are none or where one of them is not finite."""
    low, high = interval_ends(values[:, None])[0]
    return {'value': number(values[0]), 'low': low, 'high': high}


def interval_ends(values):
    """values: (R, S). Returns S pairs [low, high], as above."""
    if len(values) < 2:
        return [[None, None] for _ in range(values.shape[1])]
    with np.errstate(invalid='ignore'):
        ends = np.quantile(values[1:], (0.025, 0.975), axis=0)
    return [[number(low), number(high)] for low, high in ends.T]


def headline(values, quoted_at=None):
    """values: (R, S), quoted at the sublayer where quoted_at, (R, S), is largest in each replicate; or (R,),
    of a whole stream. Returns what measure.json says of it: an interval, and another for the last
    sublayer."""
    if values.ndim == 1:
        return {**interval(values), 'sublayer': None, 'last': None, 'last_low': None, 'last_high': None}
    peak = np.where(np.isfinite(quoted_at), quoted_at, -np.inf).argmax(1)
    at_peak = np.take_along_axis(values, peak[:, None], 1)[:, 0]
    last = interval(values[:, -1])
    return {
        **interval(at_peak),
        'sublayer': int(peak[0]),
        'last': last['value'],
        'last_low': last['low'],
        'last_high': last['high'],
    }


def log_line(run, args):
    """Measures an open run as train.py does in the course of training, on args.sequences windows.

    Returns what a line of log.jsonl holds: {'iter', 'val_loss', 'streams'}. With such a line for every
    revision of a pretrained model, its training can be read like that of a run."""
    starts = run.tokens.fixed_starts(args.sequences, args.seed)
    at_once = sequences_at_once(run.model, args.device, run.tokens.block_size)
    batches = window_batches(run.tokens, starts, at_once)
    statistics = collect(run.model, batches, Statistics(topk=3), extras=True)
    loss = number(statistics.mean('loss')[0])
    return {'iter': run.iter_num, 'val_loss': loss, 'streams': training_record(statistics)}


def training_record(statistics):
    """Returns what a line of log.jsonl says of each stream: a list over the sublayers for each quantity, a
    number for what belongs to the whole stream."""

    def plain(v):
        if v.ndim:
            return [plain(w) for w in v]
        return int(v) if v.dtype.kind == 'i' else number(v)

    return {
        stream: {name: plain(v[0]) for name, v in statistics.stream(stream).items()}
        for stream in statistics.streams()
    }


def streams_report(statistics, kinds=None, decoded=None):
    """Returns {stream: its entry in measure.json}.

    kinds: 'attn', 'mlp' or 'block' of every sublayer (default: all 'block'). decoded: the stream that the
    head reads."""
    entries = {}
    for stream in statistics.streams():
        kinds_of_stream = kinds or ['block'] * statistics.depth(stream)
        entries[stream] = stream_report(statistics, stream, kinds_of_stream, stream == decoded)
    return entries


def stream_report(statistics, stream, kinds, decoded=False):
    """Returns the entry of one stream in measure.json; kinds: as above."""
    q = statistics.stream(stream)
    dominant, start_dim = q['dominant_dim'], q['start_dim']
    return {
        'decoded': decoded,
        'dominant_dim': int(dominant[0]),
        'start_dim': int(start_dim[0]),
        'same_dim': bool(dominant[0] == start_dim[0]),
        # the share of the replicates in which the same dimension is chosen again
        'dominant_dim_share': share_of_first(dominant),
        'start_dim_share': share_of_first(start_dim),
        'peak_sublayer': int(q['magnitude_at_dominant'][0].argmax()),
        **{key: headline(q[key], q.get(QUOTED_AT.get(key, key))) for key in HEADLINES},
        'sublayers': sublayer_reports(statistics, stream, kinds, q),
    }


def share_of_first(values):
    """values: (R,). Returns the share of the replicates that equal the measurement, None without
    replicates."""
    return number((values[1:] == values[0]).mean()) if len(values) > 1 else None


def sublayer_reports(statistics, stream, kinds, q):
    """Returns what measure.json says of a stream after every sublayer. q: statistics.stream(stream)."""
    keys = [key for key in HEADLINES if q[key].ndim == 2]
    ends = {key: interval_ends(q[key]) for key in keys}
    k = sum(name.startswith('top') and name[3:].isdecimal() for name in q)
    return [
        {
            'sublayer': s,
            'kind': kind,
            'top': top_entries(statistics.top[stream, s]),
            'top_mean': [number(q[f'top{i + 1}'][0, s]) for i in range(k)],
            'largest_dim': int(q['largest_dim'][0, s]),
            'largest_start_dim': int(q['largest_start_dim'][0, s]),
            **{key: number(q[key][0, s]) for key in keys},
            'intervals': {key: ends[key][s] for key in keys},
        }
        for s, kind in enumerate(kinds)
    ]


def top_entries(top):
    """top: five columns of Statistics.top. Returns the largest magnitudes with their places."""
    names = ('value', 'sequence', 'position', 'token', 'dim')
    rows = zip(*(column.tolist() for column in top))
    return [dict(zip(names, (number(value), *place))) for value, *place in rows]


def sink_report(statistics):
    """Returns what measure.json says of attention sinks, None where no attention was seen."""
    layers = [name[1] for name in statistics.sums if name[0] == 'sink']
    if not layers:
        return None
    sink = np.stack([statistics.mean(('sink', layer)) for layer in layers], 1)  # (R, n_layer, n_head)
    return {
        'heads': [[number(v) for v in layer] for layer in sink[0]],
        'mean': headline(sink.mean((1, 2))),
        'threshold': SINK_THRESHOLD,
        'fraction_of_heads': headline((sink > SINK_THRESHOLD).mean((1, 2))),
    }


def measure(run, args):
    """Measures an open run. Returns what measure.json holds."""
    model, tokens = run.model, run.tokens
    size = tokens.block_size * model.n_embd
    if args.topk > size:
        raise UserError(
            f'--topk is {args.topk}, but a sequence of {run.path} has {size} entries: ask for fewer'
        )
    starts = tokens.fixed_starts(args.sequences, args.seed)
    batch_size = sequences_at_once(model, args.device, tokens.block_size)
    statistics = Statistics(args.topk, REPLICATES, args.seed)
    batches = window_batches(tokens, starts, batch_size)
    with Progress(f'measuring {run.name}:', len(starts), 'sequences') as progress:
        collect(model, batches, statistics, extras=True, progress=progress.show)
    kinds = [sublayer.kind for sublayer in model.sublayers]
    streams = streams_report(statistics, kinds, model.decoded)
    shown = tokens.windows(starts[:LANDSCAPE_SEQUENCES])[0]
    for name, image in landscapes(model, shown, streams, batch_size).items():
        streams[name]['landscape'] = image
    loss = headline(statistics.mean('loss'))
    return {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'val_loss': loss['value'],
        'loss': loss,
        'loss_per_byte': per_byte(loss, tokens),
        'loss_by_sequence': [number(v, 6) for batch in statistics.losses for v in batch.tolist()],
        'model': {**run.model_args, 'parameters': model.num_params()},
        'data': {
            **run.data,
            'sequences': len(starts),
            'block_size': tokens.block_size,
            'first_token': tokens.first_token,
            'tokens': len(starts) * tokens.block_size,
            'seed': args.seed,
        },
        'streams': streams,
        'attention_sink': sink_report(statistics),
    }


def per_byte(loss, tokens):
    """Returns the headline of a loss in nats per byte of the text, which all tokenizers have in common.
    None where the bytes are not known, as in files of token ids."""
    if not hasattr(tokens, 'bytes_per_token'):
        return None
    ends = {key: loss[key] and number(loss[key] / tokens.bytes_per_token) for key in ('value', 'low', 'high')}
    return {**loss, **ends}


@torch.no_grad()
def landscapes(model, idx, streams, batch_size):
    """idx: (B, T), of which batch_size go through the model together. streams: from streams_report.
    Returns {stream: pooled mean magnitude over the B sequences, after the sublayer of its peak}."""
    totals = {}

    def on_streams(s, seen):
        for name, x in seen.items():
            if streams[name]['peak_sublayer'] == s:
                totals[name] = totals.get(name, 0) + x.abs().float().sum(0).cpu().numpy()

    with hooked(model, on_streams):
        for part in idx.split(batch_size):
            model(part.to(next(model.parameters()).device))
    return {
        name: {
            'sublayer': streams[name]['peak_sublayer'],
            'sequences': len(idx),
            **pooled(total / len(idx)),
        }
        for name, total in totals.items()
    }


def pooled(a):
    """a: (T, d) magnitudes. Returns the largest of each block of positions and dimensions, a single large
    entry being what must not be lost, with the edges of the blocks; and the largest of all with its place.

    Blocks of positions grow with the position, so that position 0 has one of its own; those of dimensions do
    not."""
    T, d = a.shape
    position_edges = np.unique(np.geomspace(1, T + 1, min(T, 64) + 1).round().astype(int)) - 1
    dim_edges = np.unique(np.linspace(0, d, min(d, 64) + 1).round().astype(int))
    blocks = np.maximum.reduceat(np.maximum.reduceat(a, position_edges[:-1], 0), dim_edges[:-1], 1)
    position, dim = np.unravel_index(a.argmax(), a.shape)
    return {
        'largest': {'value': number(a[position, dim]), 'position': int(position), 'dim': int(dim)},
        'position_edges': position_edges.tolist(),
        'dim_edges': dim_edges.tolist(),
        'magnitude': [[number(v, 3) for v in row] for row in blocks],
    }


def find_untrained(run, report, args):
    """Returns the untrained model's streams, {name: {'sublayers': …}}, and in words where they come from:
    from measure_0.json, from ckpt_0.pt, which is then measured, or from the first line of log.jsonl; else
    None."""
    for path in dict.fromkeys((run.out / 'measure_0.json', run.path.with_name('measure_0.json'))):
        untrained = read_report(path)
        if untrained and untrained['data'] == report['data'] and untrained['model'] == report['model']:
            return untrained['streams'], path.name
    path = run.path.with_name('ckpt_0.pt')
    if path.exists():
        untrained = measure_untrained(run, path, args)
        write_report(run.out / 'measure_0.json', untrained)
        return untrained['streams'], path.name
    log = read_log(run.path.with_name('log.jsonl'))
    if log and log[0]['iter'] == 0 and log[0].get('streams'):
        return {
            name: sublayers_of_record(record) for name, record in log[0]['streams'].items()
        }, 'log.jsonl, step 0'
    return None


def measure_untrained(run, path, args):
    """Measures ckpt_0.pt beside a run, in the place of its model, which is let go of."""
    run.model = None
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, path, bf16_streams=False).to(args.device)
    return measure(replace(run, name=f'{run.name}, untrained', path=path, model=model, iter_num=0), args)


def sublayers_of_record(record):
    """record: a stream of log.jsonl. Returns the same as a stream of measure.json, without intervals."""
    keys = [key for key, values in record.items() if isinstance(values, list) and key in HEADLINES]
    return {'sublayers': [dict(zip(keys, values)) for values in zip(*(record[key] for key in keys))]}


def read_report(path):
    """Returns a measure.json, or None where there is no whole one."""
    try:
        report = json.loads(path.read_text())
        return report if report['schema'] == 1 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def add_verdicts(run, report, args):
    """Adds to a report what its streams are judged to hold, and the untrained values that they were held
    against."""
    if run.path.name == 'ckpt_0.pt':
        return
    untrained, source = find_untrained(run, report, args) or ({}, 'no untrained weights at hand')
    report['untrained'] = {'source': source, 'streams': {}}
    for name, entry in report['streams'].items():
        before = untrained.get(name)
        if before and len(before['sublayers']) == len(entry['sublayers']):
            bounds = untrained_bounds(before)
            keys = [key for key in figures.PROFILE if key in before['sublayers'][0]]
            values = {key: [sublayer[key] for sublayer in before['sublayers']] for key in keys}
            report['untrained']['streams'][name] = values
        else:
            bounds = [REFERENCE] * len(entry['sublayers'])
        entry['outlier'] = judge(entry, bounds)


def paired_difference(report, first):
    """Returns the interval of the difference between two runs' losses on the same windows, pairs kept; None
    in it where their windows are not the same."""
    losses = [np.array(r['loss_by_sequence'], float) for r in (report, first)]
    if report['data'] != first['data'] or len(losses[0]) != len(losses[1]):
        return dict.fromkeys(('value', 'low', 'high'))
    weights = bootstrap_weights(
        report['data']['seed'], range(len(losses[0])), REPLICATES if len(losses[0]) > 1 else 0
    )
    weights = weights[weights.any(1)]
    return interval(weights @ (losses[0] - losses[1]) / weights.sum(1))


# ---- the program


def parse_arguments(argv):
    parser = run_parser(__doc__, sequences=256, writes='measure.json and figures')
    parser.add_argument(
        '--topk', type=int, default=5, help='how many of the largest magnitudes to list (default 5)'
    )
    parser.add_argument('--split', choices=('val', 'train'), default='val')
    args = parser.parse_args(argv)
    check_run_arguments(args, sequences=1, topk=1)
    return args


def write_report(path, report):
    with atomic_write(path, 'w') as file:
        json.dump(report, file, separators=(',', ':'))


def run(argv):
    args = parse_arguments(argv)
    reports, folders = {}, []
    for run in open_runs(args, args.split):
        report = measure(run, args)
        add_verdicts(run, report, args)
        write_report(run.out / f'measure{run.suffix}.json', report)
        print_run(run.name, report, run.say_token)
        log = run.path.with_name('log.jsonl') if run.path.stem == 'ckpt' else None
        drawn = figures.draw_run(run.name, run.out, run.suffix, log)
        say_written(run.out, f'measure{run.suffix}.json', *drawn)
        reports[run.name] = report
        folders.append(run.out.resolve().parent)
    if len(reports) > 1:
        columns = compare(reports, paired_difference)
        print_comparison(columns)
        out = args.out or common_folder(folders)
        write_report(out / 'comparison.json', columns)
        say_written(out, 'comparison.json', *figures.draw_comparison_of(out))


def say_written(folder, *names):
    machine.say(f'written: {os.path.relpath(folder)}/{", ".join(names)}')


def common_folder(folders):
    """Returns the folder that holds all of these, or the working folder where that is none but the root."""
    common = Path(os.path.commonpath(folders))
    return Path() if common == Path(common.root) else common


def command(run, argv, too_large='this model in float32: use --device=cpu'):
    """Runs run(argv) as a program: in float32 without TF32, and says in one sentence what a user can mend."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        with user_errors_exit():
            run(argv)
    except torch.cuda.OutOfMemoryError:
        sys.exit(f'error: the GPU has too little free memory for {too_large}')
    except KeyboardInterrupt:
        sys.exit('stopped by Ctrl-C: what was written before is whole')
    except OSError as error:
        where = f'{error.filename}: ' if error.filename else ''
        sys.exit(f'error: {where}{error.strerror}: if this was to be written, name another folder with --out')


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
