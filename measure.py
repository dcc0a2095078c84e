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

The rules for "has an outlier" are in report.py.

Sources: [S] Sun et al. 2024, arXiv 2402.17762; [G] Gallego-Feliciano et al. 2025, arXiv 2508.03616; [V]
Vemula 2026, arXiv 2606.20743; [Z] Sun, Canziani, LeCun, Zhu 2026, arXiv 2603.05498; [Q] Gu et al. 2025, arXiv
2410.10781.
"""

import machine

import argparse
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import figures
from checkpoint import (
    add_run_arguments,
    build_model,
    check_run_arguments,
    load_checkpoint,
    open_runs,
    read_log,
)
from data.loader import UserError, atomic_write, philox
from figures import HEADLINES
from report import REFERENCE, compare, judge, print_comparison, print_run, untrained_bounds

REPLICATES = 1000  # of the bootstrap
SINK_THRESHOLD = 0.3  # a head that gives position 0 more than this on average is a sink. Gu et al. 2025, §3
LANDSCAPE_SEQUENCES = 8

# what sequence_statistics returns of every sequence, before top1, top2, …
VALUES = ('median', 'max_over_median', 'massive_count', 'kurtosis', 'norm', 'norm_at_start', 'top1_at_start')
QUOTED_AT = {  # the others: at their own largest
    'start_token_concentration': 'magnitude_at_dominant',
    'relative_start_token_concentration': 'magnitude_at_dominant',
    'start_dim_concentration': 'magnitude_at_start_dim',
    'relative_start_dim_concentration': 'magnitude_at_start_dim',
}


# ---- from a stream to sums over sequences


def at_once(device, block_size):
    """Returns how many sequences are put through the model together: a GPU wants more than a CPU."""
    return max(1, (32768 if str(device).startswith('cuda') else 4096) // block_size)


def sequences_at_once(model, device, block_size):
    """Returns the same for a model that may know better: a pretrained one is larger than those of ours."""
    if hasattr(model, 'sequences_at_once'):
        return model.sequences_at_once(block_size)
    return at_once(device, block_size)


def topk_first(flat, k):
    """flat: (B, n) float32, non-negative, n < 2³². Returns the k largest of each row in falling order and
    their indices, each (B, k). Ties go to the lowest index, which torch.topk alone does not promise."""
    top, index = flat.topk(k)
    no_ties_inside = (top[:, 1:] < top[:, :-1]).all()
    no_tie_at_the_end = ((flat >= top[:, -1:]).sum(1) == k).all()
    if no_ties_inside and no_tie_at_the_end:
        return top, index
    # non-negative floats sort as their bits do, so (bits, −index) packed in 64 bits has no ties
    n = flat.shape[1]
    key = (flat.view(torch.int32).long() << 32) + torch.arange(n - 1, -1, -1, device=flat.device)
    key = key.topk(k).values
    return (key >> 32).int().view(torch.float32), n - 1 - (key & 0xFFFFFFFF)


def row_median(flat):
    """flat: (B, n) float, non-negative. Returns (B,): the median of each row, the mean of the two middle
    values where n is even."""
    n = flat.shape[1]
    if flat.device.type == 'cpu':  # numpy selects seven times faster than torch does there
        part = np.partition(flat.numpy(), n // 2, axis=1)
        upper = part[:, n // 2]
        return torch.from_numpy(upper if n % 2 else (part[:, : n // 2].max(1) + upper) / 2)
    # torch.median would select with one block of threads a row
    larger_half = flat.topk(n // 2 + 1, sorted=False).values
    return larger_half.topk(2 - n % 2, largest=False).values.mean(1)


def sequence_statistics(x, k):
    """x: (B, T, d) float32, one stream after a sublayer. Returns five things: the mean magnitude of each
    dimension over the tokens, (B, d); the magnitudes at position 0, (B, d); the VALUES of every sequence and
    its k largest magnitudes in columns, (B, len(VALUES) + k) float64; these magnitudes and their indices into
    T · d, each (B, k). A sequence of fewer than k entries has as many columns as it has entries."""
    a = x.abs()
    flat = a.flatten(1)
    top, index = topk_first(flat, min(k, flat.shape[1]))
    median = row_median(flat)
    squares = (x - x.mean(-1, keepdim=True)).square()
    fourth_moment = (squares / squares.mean(-1, keepdim=True)).square().mean(-1).double()
    norm = torch.linalg.vector_norm(x, dim=-1)
    values = {
        'median': median,
        'max_over_median': top[:, 0] / median,  # Gallego-Feliciano et al. 2025, eq. 6
        'massive_count': ((flat > 100) & (flat >= 1000 * median[:, None])).sum(1),  # Sun et al. 2024, §2
        'kurtosis': (fourth_moment - 3).mean(1),  # excess, over dimensions. Vemula 2026
        'norm': norm.mean(1),
        'norm_at_start': norm[:, 0],
        'top1_at_start': index[:, 0] < x.shape[2],
    }
    columns = [values[name].double() for name in VALUES] + list(top.double().unbind(1))
    return a.mean(1), a[:, 0], torch.stack(columns, 1), top, index


def bootstrap_weights(seed, sequences, replicates):
    """Returns (1 + replicates, B) float64: ones, then Poisson(1) weights that depend on (seed, sequence)
    alone. sequences: (B,) their indices."""
    cdf = np.cumsum([math.exp(-1) / math.factorial(n) for n in range(20)])
    draws = [philox(seed, 1 + n).random_raw(replicates) / 2**64 for n in sequences]
    weights = np.searchsorted(cdf, np.array(draws), side='right').T
    return np.concatenate([np.ones((1, len(sequences))), weights])


class Statistics:
    """Sums over sequences, weighted for each of R = 1 + replicates. Takes any stream of any model:
    begin(count, device), then add_stream(name, s, x) for every place s = 0, 1, … where the stream was
    seen."""

    def __init__(self, topk, replicates=0, seed=0):
        self.topk, self.replicates, self.seed = topk, replicates, seed
        self.sequences = 0  # how many have been added
        self.sums = {}  # name → (R, …) float64; every one is additive over sequences
        self.top = {}  # (stream, s) → value, sequence, position, token and dimension of the largest so far
        self.losses = []  # of every sequence, in batches

    def begin(self, count, device, tokens=None):
        """Says that the next calls of add and add_stream are about the next `count` sequences.
        tokens: theirs, (count, T), if the largest magnitudes are to be listed with their token."""
        self.first, self.sequences, self.tokens = self.sequences, self.sequences + count, tokens
        weights = bootstrap_weights(self.seed, range(self.first, self.sequences), self.replicates)
        self.weights = torch.from_numpy(weights).to(device)
        self.add('weight', torch.ones(count, device=device))

    def add(self, name, values):
        """values: (B, …), one entry a sequence."""
        total = (self.weights @ values.double().reshape(len(values), -1)).view(-1, *values.shape[1:])
        if name in self.sums:
            self.sums[name] += total
        else:
            self.sums[name] = total

    def add_stream(self, stream, s, x):
        """x: (B, T, d), `stream` as it leaves sublayer s."""
        magnitude, start, values, top, index = sequence_statistics(x.float(), self.topk)
        self.add((stream, s, 'magnitude'), magnitude)
        self.add((stream, s, 'start'), start)
        self.add((stream, s, 'values'), values)
        sequence = torch.arange(self.first, self.sequences, device=x.device)[:, None].expand_as(index)
        position, dim = index // x.shape[2], index % x.shape[2]
        token = torch.full_like(index, -1) if self.tokens is None else self.tokens.gather(1, position)
        entries = [column.flatten() for column in (top, sequence, position, token, dim)]
        if (stream, s) in self.top:
            entries = [torch.cat(pair) for pair in zip(self.top[stream, s], entries)]
        # stable: among ties the earlier sequence stays first
        order = entries[0].argsort(descending=True, stable=True)[: self.topk]
        self.top[stream, s] = [column[order] for column in entries]

    def add_losses(self, losses):
        """losses: (B,) float64, one a sequence."""
        self.losses.append(losses.cpu())
        self.add('loss', losses)

    def add_reads(self, s, parts):
        """parts: {stream: (B, T, d)}, what each stream alone adds to what sublayer s reads, the main one
        first."""
        norms = {name: torch.linalg.vector_norm(x.float(), dim=-1).mean(1) for name, x in parts.items()}
        main, *others = norms
        for stream in others:
            self.add((stream, s, 'read'), torch.stack([norms[stream], norms[main]], 1))

    def streams(self):
        """Returns the names of the streams that have been added, in the order in which they came."""
        return list(dict.fromkeys(name[0] for name in self.sums if name[-1] == 'magnitude'))

    def depth(self, stream):
        """Returns how many sublayers a stream has been added for."""
        return sum(name[0] == stream and name[-1] == 'magnitude' for name in self.sums)

    def mean_tensor(self, name):
        """Returns (R, …) float64 on the device of the sums: the weighted mean over sequences in each
        replicate. Of few sequences a replicate may have drawn none, and of one sequence all say the same:
        they are left out."""
        total, weight = self.sums[name], self.sums['weight']
        drawn = weight > 0
        if self.sequences == 1:
            drawn[1:] = False
        return total[drawn] / weight[drawn].view(-1, *[1] * (total.ndim - 1))

    def mean(self, name):
        """Returns the same in numpy."""
        return self.mean_tensor(name).cpu().numpy()

    def stream(self, stream):
        """Returns {quantity: (R, S), or (R,) for what belongs to the whole stream}, float64, for every row of
        the table at the top of this file. What is not defined, like a ratio of zeros, is not finite."""
        S = self.depth(stream)
        dominant, start_dim = (
            sum(self.mean_tensor((stream, s, part)) for s in range(S)).argmax(1)
            for part in ('magnitude', 'start')
        )  # j* and j0
        sublayers = [self.sublayer(stream, s, dominant, start_dim) for s in range(S)]
        q = {name: np.stack([sublayer[name] for sublayer in sublayers], 1) for name in sublayers[0]}
        dominant, start_dim = dominant.cpu().numpy(), start_dim.cpu().numpy()
        with np.errstate(divide='ignore', invalid='ignore'):
            return {
                **q,
                'share_of_norm': q['norm'] / q['norm'].max(1, keepdims=True),
                'dominant_dim': dominant,
                'start_dim': start_dim,
                'persistence': (q['largest_dim'] == dominant[:, None]).mean(1),
                'start_persistence': (q['largest_start_dim'] == start_dim[:, None]).mean(1),
            }

    def sublayer(self, stream, s, dominant, start_dim):
        """dominant, start_dim: (R,), j* and j0. Returns {quantity: (R,)} of one sublayer."""
        m, p, values = (self.mean_tensor((stream, s, part)) for part in ('magnitude', 'start', 'values'))
        concentration = p / m
        middle = row_median(concentration)
        middle[concentration.isnan().any(1)] = math.nan
        largest, largest_start = m.argmax(1), p.argmax(1)

        def at(array, dim):
            return array.gather(1, dim[:, None])[:, 0]

        names = [*VALUES, *(f'top{i + 1}' for i in range(values.shape[1] - len(VALUES)))]
        q = dict(zip(names, values.unbind(1)))
        q |= {
            'fixed_dim_ratio': at(m, largest) / row_median(m),
            'start_ratio': at(p, largest_start) / row_median(p),
            'start_token_concentration': at(concentration, dominant),
            'start_dim_concentration': at(concentration, start_dim),
            'relative_start_concentration': at(concentration, largest_start) / middle,
            'relative_start_token_concentration': at(concentration, dominant) / middle,
            'relative_start_dim_concentration': at(concentration, start_dim) / middle,
            'start_norm': q['norm_at_start'] / q['norm'],
            'read_share': self.read_share(stream, s, q['norm']),
            'magnitude_at_dominant': at(m, dominant),
            'magnitude_at_start_dim': at(m, start_dim),
            'largest_dim': largest,
            'largest_start_dim': largest_start,
        }
        return {name: value.cpu().numpy() for name, value in q.items()}

    def read_share(self, stream, s, like):
        """Returns (R,): the read share of a stream, NaN for the main one and where no reads were seen."""
        if (stream, s, 'read') not in self.sums:
            return torch.full_like(like, math.nan)
        part, main = self.mean_tensor((stream, s, 'read')).unbind(1)
        return part / main


# ---- from a model to statistics


def attention_sink(attention, q, k):
    """q, k: (B, n_head, T, d / n_head) of an Attention. Returns (B, n_head): the mean probability that
    queries give to position 0. Gu et al. 2025, §3."""
    # values that are 1 at position 0 and else 0: attention returns the probability itself
    one_hot = torch.zeros_like(k)
    one_hot[:, :, 0] = 1
    return attention.attend(q, k, one_hot)[..., 0].mean(-1)


@contextmanager
def hooked(model, on_streams, on_sinks=None, on_reads=None):
    """While it lasts, calls functions on what passes through an uncompiled model.

    on_streams(s, streams) is called after every sublayer s with {name: (B, T, d)}; streams that an operator
    derives from its own are among them. What it returns, a dict of streams or None, takes the place of these.
    on_sinks(layer, sinks) is called in every attention with the mean probability of position 0, (B, n_head).
    on_reads(s, parts) is called with what each stream alone adds to the read of sublayer s, {name: (B, T,
    d)}, if there are several. A model that has a method of this name is asked instead, as pretrained ones
    have."""
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
        if on_reads and len(model.stream_names) > 1:
            handles.append(sublayer.register_forward_pre_hook(read_hook(s, on_reads)))
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


def read_hook(s, on_reads):
    """Returns the forward pre-hook of sublayer s. A stream's part of the read is what is read of it alone."""

    def hook(sublayer, inputs):
        streams = inputs[0]
        nothing = {name: torch.zeros_like(x) for name, x in streams.items()}
        on_reads(s, {name: sublayer.residual.read({**nothing, name: x}) for name, x in streams.items()})

    return hook


@contextmanager
def modules_hooked(model, streams, on_streams):
    """The same for any model of torch. streams: {name of a stream: names of the modules whose outputs it is,
    in order}; 'blocks.3:input' is the first input of blocks.3. on_streams(s, {name: (B, T, d)}) is called at
    each."""
    modules, handles = dict(model.named_modules()), []
    try:
        for stream, places in streams.items():
            for s, place in enumerate(places):
                handles.append(hook_place(modules, place, partial(on_streams, s), stream))
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_place(modules, place, on_stream, stream):
    """Hooks one module of `modules`, {name: module}, so that on_stream({stream: (B, T, d)}) is called
    there."""
    name, _, side = place.partition(':')
    if name not in modules or side not in ('', 'input'):
        known = ', '.join(list(filter(None, modules))[:8])
        raise UserError(f"there is no module '{place}': name one of model.named_modules() ({known}, …)")

    def see(found):
        x = found[0] if isinstance(found, tuple) and found else found
        if not torch.is_tensor(x) or x.ndim != 3 or not x.is_floating_point():
            what = f'a tensor {tuple(x.shape)}' if torch.is_tensor(x) else f'a {type(x).__name__}'
            raise UserError(f"module '{place}' gives {what}: a stream is a tensor (B, T, d) of floats")
        on_stream({stream: x})

    if side == 'input':
        return modules[name].register_forward_pre_hook(lambda module, inputs: see(inputs))
    return modules[name].register_forward_hook(lambda module, inputs, output: see(output))


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
    progress = partial(show_progress, run.name, len(starts))
    collect(model, batches, statistics, extras=True, progress=progress)
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


def show_progress(name, count, done):
    """Says on a terminal how many sequences are done, and nothing when all are."""
    if sys.stderr.isatty():
        text = f'{name}: {done} of {count} sequences' if done < count else ''
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)


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
        run(argv)
    except UserError as error:
        sys.exit(f'error: {error}')
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
