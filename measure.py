"""
Where do massive activations sit? Hooks on the residual streams of a checkpoint → statistics → table, measure.json, figures.

    python measure.py --ckpt out/ledger_demo          one run
    python measure.py --ckpt out                      every run below out/, side by side

What is worth knowing before reading on:
- a statistic belongs to a stream (h, or D and C) as it leaves a sublayer; a headline is its largest value over the sublayers;
- only sums over sequences are kept, one for each bootstrap replicate, so memory does not grow with the number of sequences;
- replicate 0 has weight 1 everywhere: it is the measurement. The others have Poisson(1) weights and give the 95% intervals;
- the model runs uncompiled, in float32 without TF32, whatever it was trained in.

Sources: Sun et al. 2024, arXiv 2402.17762; Gallego-Feliciano et al. 2025, arXiv 2508.03616; Vemula 2026, arXiv 2606.20743;
Gu et al. 2025, arXiv 2410.10781.
"""

import argparse
import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import add_run_arguments, check_run_arguments, open_runs, read_log
from data.loader import UserError, atomic_write, philox
from figures import (
    COMPARED,
    HEADLINES,
    cell,
    draw_comparison,
    draw_landscape,
    draw_profile,
    draw_series,
    short,
)

REPLICATES = 200  # of the bootstrap
SINK_THRESHOLD = (
    0.3  # a head whose queries give position 0 more than this on average is a sink. Gu et al. 2025, §3
)

QUOTED_AT = {
    'start_token_concentration': 'magnitude_at_dominant',
    'start_dim_concentration': 'magnitude_at_start_dim',
}  # the others: at their own largest


def at_once(device, block_size):
    """Returns how many sequences are put through the model together: a GPU wants more than a CPU."""
    return max(1, (32768 if str(device).startswith('cuda') else 4096) // block_size)


def sequences_at_once(model, device, block_size):
    """Returns the same for a model that may know better: a pretrained one is larger than those of ours."""
    return (
        model.sequences_at_once(block_size)
        if hasattr(model, 'sequences_at_once')
        else at_once(device, block_size)
    )


def topk_first(flat, k):
    """flat: (B, n) float32, non-negative, n < 2³². Returns the k largest of each row in falling order and their indices, each (B, k).
    Ties go to the lowest index, which torch.topk alone does not promise."""
    top, index = flat.topk(k)
    if (top[:, 1:] < top[:, :-1]).all() and ((flat >= top[:, -1:]).sum(1) == k).all():
        return top, index
    n = flat.shape[
        1
    ]  # non-negative floats sort as their bits do, so (bits, −index) packed in 64 bits has no ties
    key = (flat.view(torch.int32).long() << 32) + torch.arange(n - 1, -1, -1, device=flat.device)
    key = key.topk(k).values
    return (key >> 32).int().view(torch.float32), n - 1 - (key & 0xFFFFFFFF)


def row_median(flat):
    """flat: (B, n) float32, non-negative. Returns (B,): the median of each row, the mean of the two middle values where n is even."""
    n = flat.shape[1]
    if flat.device.type == 'cpu':  # numpy selects seven times faster than torch does there
        part = np.partition(flat.numpy(), n // 2, axis=1)
        upper = part[:, n // 2]
        return torch.from_numpy(upper if n % 2 else (part[:, : n // 2].max(1) + upper) / 2)
    larger_half = flat.topk(
        n // 2 + 1, sorted=False
    ).values  # torch.median would select with one block of threads a row
    return larger_half.topk(2 - n % 2, largest=False).values.mean(1)


def sequence_statistics(x, k):
    """x: (B, T, d) float32, one stream after a sublayer. Returns five things:
    the mean magnitude of each dimension over the tokens, (B, d); the magnitudes at position 0, (B, d);
    per-sequence values {name: (B,)}; the k largest magnitudes and their indices into T · d, each (B, k)."""
    a = x.abs()
    flat = a.flatten(1)
    top, index = topk_first(flat, k)
    median = row_median(flat)
    squares = (x - x.mean(-1, keepdim=True)).square()
    values = {
        'median': median,
        'max_over_median': top[:, 0] / median,  # Gallego-Feliciano et al. 2025, eq. 6
        'massive_count': ((flat > 100) & (flat >= 1000 * median[:, None])).sum(1),  # Sun et al. 2024, §2
        'kurtosis': ((squares / squares.mean(-1, keepdim=True)).square().mean(-1).double() - 3).mean(
            1
        ),  # excess, over dimensions. Vemula 2026
        'norm': torch.linalg.vector_norm(x, dim=-1).mean(1),
        'top1_at_start': index[:, 0] < x.shape[2],
        **{f'top{i + 1}': top[:, i] for i in range(k)},
    }
    return a.mean(1), a[:, 0], {name: value.double() for name, value in values.items()}, top, index


def bootstrap_weights(seed, sequences, replicates):
    """Returns (1 + replicates, B) float64: ones, then Poisson(1) weights that depend on (seed, sequence) alone. sequences: (B,) their indices."""
    cdf = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(20)])
    draws = [philox(seed, 1 + n).random_raw(replicates) / 2**64 for n in sequences]
    return np.concatenate(
        [np.ones((1, len(sequences))), np.searchsorted(cdf, np.array(draws), side='right').T]
    )


class Statistics:
    """Sums over sequences, weighted for each of R = 1 + replicates; S sublayers, K per-sequence values, d dimensions."""

    def __init__(self, topk, replicates=0, seed=0):
        self.topk, self.replicates, self.seed = topk, replicates, seed
        self.sequences = 0  # how many have been added
        self.sums = {}  # name → (R, …) float64; every one is additive over sequences
        self.top = {}  # (stream, sublayer) → value, sequence, position, token and dimension of the largest so far

    def begin(self, count, device, tokens=None):
        """Says that the next calls of add and add_stream are about the next `count` sequences. tokens: theirs, (count, T), if the
        largest magnitudes are to be listed with their token."""
        self.tokens = tokens
        self.first, self.sequences = self.sequences, self.sequences + count
        weights = bootstrap_weights(self.seed, range(self.first, self.sequences), self.replicates)
        self.weights = torch.from_numpy(weights).to(device)
        self.add('weight', torch.ones(count, device=device))

    def add(self, name, values):
        """values: (B, …), one entry a sequence."""
        total = torch.einsum('rb,b...->r...', self.weights, values.double())
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def add_stream(self, stream, s, x):
        """x: (B, T, d), `stream` as it leaves sublayer s."""
        magnitude, start, values, top, index = sequence_statistics(x.float(), self.topk)
        self.add((stream, s, 'magnitude'), magnitude)
        self.add((stream, s, 'start'), start)
        self.add((stream, s, 'values'), torch.stack(list(values.values()), 1))
        self.names = list(values)
        sequence = torch.arange(self.first, self.sequences, device=x.device)[:, None].expand_as(index)
        position, dim = index // x.shape[2], index % x.shape[2]
        token = torch.full_like(index, -1) if self.tokens is None else self.tokens.gather(1, position)
        entries = [t.flatten() for t in (top, sequence, position, token, dim)]
        if (stream, s) in self.top:
            entries = [torch.cat(pair) for pair in zip(self.top[stream, s], entries)]
        # stable: among ties the earlier sequence stays first
        order = entries[0].argsort(descending=True, stable=True)[: self.topk]
        self.top[stream, s] = [t[order] for t in entries]

    def streams(self):
        """Returns the names of the streams that have been added, in the order in which they came."""
        return list(dict.fromkeys(stream for stream, _ in self.top))

    def mean(self, name):
        """Returns (R, …) float64 numpy: the weighted mean over sequences in each replicate."""
        total, weight = self.sums[name].cpu().numpy(), self.sums['weight'].cpu().numpy()
        drawn = weight > 0  # of few sequences, a replicate may have drawn none: it says nothing
        return total[drawn] / weight[drawn].reshape(-1, *[1] * (total.ndim - 1))

    def stream(self, stream):
        """Returns {quantity: (R, S), or (R,) for what belongs to the whole stream} for every row of the README's table."""
        S = 1 + max(s for name, s in self.top if name == stream)
        m, p, values = (
            np.stack([self.mean((stream, s, part)) for s in range(S)], 1)
            for part in ('magnitude', 'start', 'values')
        )

        def at(array, dim):  # (R, S, d), (R,) → (R, S)
            return np.take_along_axis(array, dim[:, None, None], 2)[..., 0]

        dominant, start_dim = m.mean(1).argmax(-1), p.mean(1).argmax(-1)  # j* and j0
        with np.errstate(divide='ignore', invalid='ignore'):
            return {
                **{name: values[..., i] for i, name in enumerate(self.names)},
                'fixed_dim_ratio': m.max(-1) / np.median(m, -1),
                'start_ratio': p.max(-1) / np.median(p, -1),
                'start_token_concentration': at(p, dominant) / at(m, dominant),
                'start_dim_concentration': at(p, start_dim) / at(m, start_dim),
                'magnitude_at_dominant': at(m, dominant),
                'magnitude_at_start_dim': at(m, start_dim),
                'largest_dim': m.argmax(-1),
                'largest_start_dim': p.argmax(-1),
                'dominant_dim': dominant,
                'start_dim': start_dim,
                'persistence': (m.argmax(-1) == dominant[:, None]).mean(1),
                'start_persistence': (p.argmax(-1) == start_dim[:, None]).mean(1),
            }


def number(x):
    """A float that JSON can carry, to 7 digits, which is float32's precision; None if it is not finite."""
    return float(f'{x:.7g}') if math.isfinite(x) else None


def headline(values, quoted_at=None):
    """values: (R, S), quoted at the sublayer where quoted_at, (R, S), is largest in each replicate; or (R,), of a whole stream.
    Returns what measure.json says of it; low and high are the 2.5% and 97.5% quantiles over the bootstrap's replicates."""
    sublayer = last = None
    if values.ndim == 2:
        peak = np.where(np.isfinite(quoted_at), quoted_at, -np.inf).argmax(1)
        sublayer, last = int(peak[0]), number(values[0, -1])
        values = np.take_along_axis(values, peak[:, None], 1)[:, 0]
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {
        'value': number(values[0]),
        'low': number(low),
        'high': number(high),
        'sublayer': sublayer,
        'last': last,
    }


def attention_sink(attention, q, k):
    """q, k: (B, n_head, T, d / n_head) of an Attention. Returns (B, n_head): the mean probability that queries give to position 0. Gu et al. 2025, §3."""
    one_hot = torch.zeros_like(k)
    one_hot[:, :, 0] = (
        1  # values that are 1 at position 0 and else 0: attention returns the probability itself
    )
    return attention.attend(q, k, one_hot)[..., 0].mean(-1)


@contextmanager
def hooked(model, on_streams, on_sinks=None):
    """While it lasts, calls functions on what passes through an uncompiled model.

    on_streams(s, streams) is called after every sublayer s with {name: (B, T, d)}; streams that an operator derives from its own
    are among them. What it returns, a dict of streams or None, takes the place of those streams.
    on_sinks(layer, sinks) is called in every attention with the mean probability of position 0, (B, n_head).
    A model that has a method of this name is asked instead: pretrained ones do."""
    if hasattr(model, 'hooked'):
        with model.hooked(on_streams, on_sinks):
            yield
        return
    handles = []
    for s, sublayer in enumerate(model.sublayers):
        handles.append(sublayer.register_forward_hook(stream_hook(s, on_streams)))
        if on_sinks and sublayer.kind == 'attn':
            attention = sublayer.function
            handles.append(attention.qkv.register_forward_hook(sink_hook(s // 2, attention, on_sinks)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_hook(s, on_streams):
    """Returns the forward hook of sublayer s, whose output is its streams by name and its commit gate."""

    def hook(sublayer, inputs, output):
        streams, commit_gate = output
        derived = sublayer.residual.derived(streams) if hasattr(sublayer.residual, 'derived') else {}
        replaced = on_streams(s, {**streams, **derived})
        if replaced is None:
            return None
        return {name: replaced.get(name, x) for name, x in streams.items()}, commit_gate

    return hook


def sink_hook(layer, attention, on_sinks):
    """Returns the forward hook of an attention's qkv map."""

    def hook(qkv, inputs, output):
        q, k, _ = attention.heads(*output.chunk(3, -1))
        on_sinks(layer, attention_sink(attention, q, k))

    return hook


def window_batches(tokens, starts, batch_size):
    """Yields inputs and targets, each (B, T), of the windows of `tokens` at `starts`."""
    for i in range(0, len(starts), batch_size):
        yield tokens.windows(starts[i : i + batch_size])


@torch.no_grad()
def collect(model, batches, statistics, extras=False, progress=lambda done: None):
    """Adds batches of (inputs, targets), each (B, T) token ids, to `statistics`, and returns it. extras: also the loss and the attention sink."""

    def on_streams(s, streams):
        for name, x in streams.items():
            statistics.add_stream(name, s, x)

    def on_sinks(layer, sinks):
        statistics.add(('sink', layer), sinks)

    device = next(model.parameters()).device
    with hooked(model, on_streams, on_sinks if extras else None):
        for idx, targets in batches:
            idx, targets = idx.to(device), targets.to(device)
            statistics.begin(len(idx), device, idx)
            logits = model(idx)
            if extras:
                statistics.add('loss', sequence_losses(logits, targets))
            progress(statistics.sequences)
    return statistics


def sequence_losses(logits, targets):
    """logits: (B, T, V); targets: (B, T). Returns (B,) float64: the mean cross-entropy of each sequence, in nats per token.
    One sequence at a time, since it takes a copy of the logits."""
    losses = [
        F.cross_entropy(*pair, reduction='none').mean(dtype=torch.float64) for pair in zip(logits, targets)
    ]
    return torch.stack(losses)


def training_record(statistics):
    """Returns what a line of log.jsonl says of each stream: a list over the sublayers for each quantity, a number for the stream's own."""

    def plain(v):
        return [plain(w) for w in v] if v.ndim else int(v) if v.dtype.kind == 'i' else number(v)

    return {
        stream: {name: plain(v[0]) for name, v in statistics.stream(stream).items()}
        for stream in statistics.streams()
    }


def stream_report(statistics, stream, kinds, decoded=False):
    """Returns the entry of one stream in measure.json. kinds: of the sublayers, 'attn', 'mlp' or 'block'; decoded: is it what the head reads?"""
    q = statistics.stream(stream)
    dominant, start = int(q['dominant_dim'][0]), int(q['start_dim'][0])
    return {
        'decoded': decoded,
        'dominant_dim': dominant,
        'start_dim': start,
        'same_dim': dominant == start,
        'peak_sublayer': int(q['magnitude_at_dominant'][0].argmax()),
        **{key: headline(q[key], q.get(QUOTED_AT.get(key, key))) for key in HEADLINES},
        'sublayers': [sublayer_report(statistics, stream, s, kind, q) for s, kind in enumerate(kinds)],
    }


def sublayer_report(statistics, stream, s, kind, q):
    """Returns what measure.json says of a stream after sublayer s. q: statistics.stream(stream)."""
    columns = (column.tolist() for column in statistics.top[stream, s])
    return {
        'sublayer': s,
        'kind': kind,
        'top': [
            {'value': number(value), 'sequence': sequence, 'position': position, 'token': token, 'dim': dim}
            for value, sequence, position, token, dim in zip(*columns)
        ],
        'top_mean': [number(q[f'top{i + 1}'][0, s]) for i in range(statistics.topk)],
        'largest_dim': int(q['largest_dim'][0, s]),
        'largest_start_dim': int(q['largest_start_dim'][0, s]),
        **{key: number(q[key][0, s]) for key in HEADLINES if q[key].ndim == 2},
    }


def measure(run, args):
    """Measures an open run. Returns what measure.json holds, and {stream: (T, d)}: mean magnitudes at the stream's peak."""
    model, tokens = run.model, run.tokens
    if args.topk > (size := tokens.block_size * model.n_embd):
        raise UserError(
            f'the {args.topk} largest magnitudes are asked for, but a sequence of {run.path} has {size}: ask for fewer'
        )
    starts = tokens.fixed_starts(args.sequences, args.seed)
    batch_size = sequences_at_once(model, args.device, tokens.block_size)

    def progress(done):
        if sys.stderr.isatty():
            end = '' if done < len(starts) else '\r\033[K'
            print(f'\r{run.path}: {done} of {len(starts)} sequences', end=end, file=sys.stderr, flush=True)

    statistics = Statistics(args.topk, REPLICATES, args.seed)
    collect(model, window_batches(tokens, starts, batch_size), statistics, extras=True, progress=progress)
    kinds = [sublayer.kind for sublayer in model.sublayers]
    streams = {
        name: stream_report(statistics, name, kinds, name == model.decoded) for name in statistics.streams()
    }
    loss = headline(statistics.mean('loss'))
    report = {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'val_loss': loss['value'],
        'loss': loss,
        'loss_per_byte': per_byte(loss, tokens),
        'model': {**run.model_args, 'parameters': sum(p.numel() for p in model.parameters())},
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
    idx = tokens.windows(starts[:8])[0].to(args.device)
    return report, landscape(model, idx, {name: s['peak_sublayer'] for name, s in streams.items()})


def per_byte(loss, tokens):
    """Returns the headline of a loss in nats per byte of the text, which all tokenizers have in common.
    None where the bytes are not known, as in files of token ids."""
    if not hasattr(tokens, 'bytes_per_token'):
        return None
    scaled = {key: number(loss[key] / tokens.bytes_per_token) for key in ('value', 'low', 'high')}
    return {**loss, **scaled}


def sink_report(statistics):
    """Returns what measure.json says of attention sinks, or None where no attention is at hand."""
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


@torch.no_grad()
def landscape(model, idx, sublayers):
    """idx: (B, T). sublayers: {stream: s}. Returns {stream: (T, d) numpy}, the mean magnitude over the B sequences after that sublayer."""
    caught = {}

    def on_streams(s, streams):
        caught.update(
            {
                name: x.abs().mean(0).float().cpu().numpy()
                for name, x in streams.items()
                if sublayers[name] == s
            }
        )

    with hooked(model, on_streams):
        model(idx)
    return caught


def print_run(name, report, say_token):
    """One line a quantity: for each stream its headline with the sublayer that it belongs to, and its value at the last sublayer."""
    data, streams, sink = report['data'], report['streams'], report['attention_sink']
    print(
        f'\n{name}, iteration {report["iter_num"]}: {data["sequences"]} sequences of {data["block_size"]} tokens, {data["name"]} {data["split"]}, seed {data["seed"]}'
    )
    per_byte = report['loss_per_byte']
    print(
        f'loss {cell(report["loss"])} nats per token'
        + (f', {cell(per_byte)} per byte' if per_byte else '')
        + (f'; {cell(sink["fraction_of_heads"])} of the heads are attention sinks' if sink else '')
    )
    if data['first_token'] is not None:
        print(f'position 0 is {say_token(data["first_token"])}, the token for the beginning of a text')
    elif data['split'] == 'text':
        print('position 0 is a token of the text, not one for its beginning')
    print(
        f'{"":22}'
        + ''.join(
            f'{stream + " (decoded)" * s["decoded"]:28}{"at":8}{"last":8}' for stream, s in streams.items()
        ).rstrip()
    )
    for key, label in HEADLINES.items():
        row = f'{label:22}'
        for s in streams.values():
            at = (
                ''
                if s[key]['sublayer'] is None
                else f'{s["sublayers"][s[key]["sublayer"]]["kind"]} {s[key]["sublayer"]}'
            )
            row += f'{cell(s[key]):28}{at:8}{short(s[key]["last"], 3) if at else "":8}'
        print(row.rstrip())
    for stream, s in streams.items():
        top = s['sublayers'][s['peak_sublayer']]['top'][0]
        print(
            f'{stream}: dominant dimension {s["dominant_dim"]}, start dimension {s["start_dim"]}; after sublayer {s["peak_sublayer"]} at most '
            f'{short(top["value"], 4)}: dimension {top["dim"]}, position {top["position"]}, {say_token(top["token"])}'
        )


def print_comparison(reports):
    """Prints a column for each run. Returns what stands in it: {run: (decoded stream, {quantity: headline})}."""
    columns = {}
    for name, report in reports.items():
        stream, s = next((stream, s) for stream, s in report['streams'].items() if s['decoded'])
        losses = {'loss (nats per token)': report['loss']}
        if all(other['loss_per_byte'] for other in reports.values()):
            losses['loss (nats per byte)'] = report['loss_per_byte']
        columns[name] = stream, {**losses, **{HEADLINES[key]: s[key] for key in COMPARED}}
    print('\ndecoded stream of each run, 95% intervals over sequences')
    for i in range(0, len(columns), 3):  # three fit in 110 columns
        block = list(columns.items())[i : i + 3]
        print(f'{"":22}' + ''.join(f'{f"{name} ({stream})":29.28}' for name, (stream, _) in block).rstrip())
        for label in block[0][1][1]:
            print(
                f'{label:22}'
                + ''.join(f'{cell(quantities[label]):29}' for _, (_, quantities) in block).rstrip()
            )
    return columns


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, sequences=256, writes='measure.json and figures')
    parser.add_argument(
        '--topk', type=int, default=5, help='how many of the largest magnitudes to list (default 5)'
    )
    parser.add_argument('--split', choices=('val', 'train'), default='val')
    args = parser.parse_args(argv)
    check_run_arguments(args, sequences=1, topk=1)
    return args


def run(argv):
    args = parse_arguments(argv)
    reports, folders = {}, []
    for run in open_runs(args, args.split):
        out, suffix, name = run.out, run.suffix, run.name
        reports[name], landscapes = measure(run, args)
        folders.append(run.out.resolve().parent)
        with atomic_write(out / f'measure{suffix}.json', 'w') as file:
            json.dump(reports[name], file, indent=1)
        draw_profile(name, reports[name], out / f'profile{suffix}.png')
        draw_landscape(name, reports[name], landscapes, out / f'landscape{suffix}.png')
        if log := run.path.stem == 'ckpt' and read_log(run.path.parent / 'log.jsonl'):
            draw_series(name, log, out / 'series.png')
        print_run(name, reports[name], run.say_token)
        print(
            f'written: {os.path.relpath(out)}/measure{suffix}.json, profile{suffix}.png, landscape{suffix}.png'
            + ', series.png' * bool(log)
        )
    if len(reports) > 1:
        out = args.out or Path(os.path.commonpath(folders))
        draw_comparison(print_comparison(reports), out / 'comparison.png')
        print(f'written: {os.path.relpath(out)}/comparison.png')


def command(run, argv, too_large='this model in float32: use --device=cpu'):
    """Runs run(argv) as a program: in float32 without TF32, a user's mistake and a full GPU said in one sentence."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        run(argv)
    except UserError as error:
        sys.exit(f'error: {error}')
    except torch.cuda.OutOfMemoryError:
        sys.exit(f'error: the GPU has too little free memory for {too_large}')


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
