"""
What is the outlier for? Changes the massive entries of a checkpoint's streams and sees what the losses say → table, intervene.json, figures.

    python -m studies.intervene --ckpt out/ledger_160m                       every stream, at the sublayer where its outlier stands out most
    python -m studies.intervene --ckpt out/ledger_160m --stream=C --sublayer=3 --how=zero --top=1

What is worth knowing before reading on:
- `top`: each sequence's own largest entries in the unedited stream, measure.py's top-k; `start`: the dimensions largest at position 0, there; `dims`: the
  dimensions of largest mean over positions, at every position; `last start`, `last dims`: those of the last sublayer; `all`: the whole stream;
- all but `top` is fixed, and chosen on windows that are not evaluated; there, too, means and quantiles of magnitudes are estimated;
- where: `stream`, as it leaves the sublayer (`once`) or there and after every later one (`downstream`); `reads`, kept from the input of every
  sublayer, the stream itself untouched (for C that is λ ⊙ C); `decoder`, kept from the head alone;
- how: `zero`; `mean`, over sequences, of that entry at that sublayer; `clip q`, all magnitudes limited to their q-quantile there. Sun et al. 2024, §4;
- every result has its controls, run on the same sequences: `random`, as many other dimensions at other positions, drawn anew for each sequence;
  `median`, as many start-token entries (or dimensions) of median magnitude; `other`, the same dimensions half a window away; and `moved`,
  the very change made in other dimensions of the same token: as large in norm, downstream too. But to zero a massive entry lowers the token's RMS and to
  move the change raises it, so that `moved` does not rule out an effect of size: of the same entries, `mean` beside `zero` is the closer control.
  What changes a whole stream has `moved` alone: it changes as many entries by as much;
- a ratio is exp(mean loss after − before), with 95% intervals from a bootstrap over sequences, pairs kept, where there are at least 5. Changes of loss, in
  nats, are given apart for the predictions at edited positions and at later ones that are not; those before an edit cannot change. Of `clip`, edited is what
  exceeds the limit in the unedited streams; of what changes every position, there are no later ones.

intervene.json: {schema, checkpoint, iter_num, model, data, evaluations, perplexity, loss: {value, low, high},
 sweep: [result], results: [result], before: {breakdown: {label: {share, sequences: how many have it, loss}}},
 attention: {edit: {stream, what, …, sink: mean probability of position 0, by_layer, control: the same},
             constancy: {position: {constancy: 0 to 1, norm: root mean square, by_layer}}},
 samples: [{prompt, unedited, edits: [{stream, what, …, text, control}]}]; the control of these two is `moved`}
 result: {stream, sublayer, where, what, how, reach, entries: [[position or null, dimension]], share, standout, edit: outcome, controls: {name: outcome}};
         entries of `top` are the most frequent, share is that of the sequences that have the first; else null
 outcome: {loss, perplexity, ratio, edited, later: {value, low, high} or null,
           by: {breakdown: {label: [change of loss, low, high]}}}; breakdowns: class and since_line of the predicted token, position of the input, carrier
           (class of the token that carries the first entry); they are left out of the sweep.

Sources: Sun et al. 2024, arXiv 2402.17762 (interventions, implicit bias); Gu et al. 2025, arXiv 2410.10781 (sink metric).
"""

import argparse
import json
import math
import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import add_run_arguments, check_run_arguments, open_runs
from data.classes import CLASSES, describe, language_of
from data.loader import UserError, atomic_write, encoding, philox
from figures import figure, short
from measure import (
    REPLICATES,
    Statistics,
    attention_sink,
    bootstrap_weights,
    command,
    headline,
    number,
    topk_first,
)
from model import RESIDUALS

QUANTILES = (0.9999, 0.999, 0.99, 0.9)
CALIBRATION, ENOUGH = (
    128,
    8,
)  # windows beside the evaluated ones, for entries, means and quantiles; the fewest that will do
FEW = 5  # sequences below which there is no interval
PROMPTS, NEW_TOKENS = 3, 40  # continuations
HOWS = {'zero': ('zero',), 'mean': ('mean',), 'clip': ('clip',), 'all': ('zero', 'mean', 'clip')}
CONTROLS = ('random', 'median', 'other', 'moved')
MARKS = {
    'edit': dict(
        color='#000000', marker='o', markersize=4.5, markeredgecolor='white', markeredgewidth=0.7, zorder=3
    ),
    'random': dict(color='#0072B2', marker='s'),
    'median': dict(color='#009E73', marker='^'),
    'other': dict(color='#E69F00', marker='D'),
    'moved': dict(color='#CC79A7', marker='v'),
}
SWEPT = {
    'top': dict(color='#D55E00', marker='o'),
    'start': dict(color='#0072B2', marker='s'),
    'dims': dict(color='#009E73', marker='^'),
}
ROW = '{:33.33} {:24}{:>6} {:>7} {:>7} |' + '{:>7}' * len(CONTROLS)
COLUMNS = ('ratio [95% interval]', 'loss', 'edited', 'later', *CONTROLS)
EDGES = (1, 2, 8, 32, 128, 512)
BUCKETS = ('0', '1', '2–7', '8–31', '32–127', '128–511', '512–')


@dataclass(frozen=True)
class Edit:
    """One change. Level s is the state before sublayer s, level s + 1 the one after it."""

    where: str  # stream, reads or decoder
    stream: str
    levels: tuple  # at which it is made; none: nothing is changed
    how: str  # zero, mean or clip
    dims: tuple = ()  # of its entries
    positions: tuple = None  # beside them; None: every position
    own: int = (
        0  # the level of which each sequence's own largest entries are taken; 0: the entries are those above
    )
    quantile: float = 0.0  # of clip
    control: str = ''  # random: other entries instead; other: half a window away; moved: the same change in other dimensions


NOTHING = Edit('stream', '', (), 'zero')


class Reference:
    """The unedited streams, by level: what edits aim at and what they put in. Means, magnitudes, limits and what is chosen by them are of windows of their own,
    (S + 1, T, d) over levels, positions and dimensions. The evaluated ones give the entries of `top`, which are a sequence's own, and where clip cuts."""

    @torch.no_grad()
    def __init__(self, model, tokens, starts, evaluated, k, batch_size, seed):
        """starts, evaluated: of the windows, (M,) and (N,). k: how many entries an edit changes."""
        self.seed, self.k, self.T, self.d, self.S = (
            seed,
            k,
            tokens.block_size,
            model.config.n_embd,
            len(model.sublayers),
        )
        device, names, N = model.head.weight.device, RESIDUALS[model.config.residual].streams, len(evaluated)
        self.mean, self.magnitude, self.limit = (
            {stream: torch.zeros(self.S + 1, *shape, device=device) for stream in names}
            for shape in ((self.T, self.d), (self.T, self.d), (len(QUANTILES),))
        )
        self.own = {stream: np.zeros((self.S + 1, N, k), np.int64) for stream in names}  # indices into T · d
        self.over = {
            stream: np.zeros((self.S + 1, len(QUANTILES), N, self.T), bool) for stream in names
        }  # is an entry above the limit?
        ranks = [math.ceil(q * self.T * self.d) - 1 for q in QUANTILES]

        def passes(starts):
            for i in range(0, len(starts), batch_size):
                idx = tokens.windows(starts[i : i + batch_size])[0].to(device)
                for level, streams in enumerate(states(model, idx)[0]):
                    for stream, x in streams.items():
                        yield slice(i, i + len(idx)), stream, level, x, x.abs()

        for _, stream, level, x, a in passes(starts):
            self.mean[stream][level] += x.sum(0) / len(starts)
            self.magnitude[stream][level] += a.sum(0) / len(starts)
            self.limit[stream][level] += a.flatten(1).sort(1).values[:, ranks].sum(0) / len(starts)
        for rows, stream, level, _, a in passes(evaluated):
            self.own[stream][level, rows] = topk_first(a.flatten(1), k)[1].cpu().numpy()
            self.over[stream][level, :, rows] = (
                (a.amax(-1) > self.limit[stream][level][:, None, None]).cpu().numpy()
            )

    def pick(self, stream, level):
        """Returns {what: (positions, dimensions)}: the largest dimensions at the start token, and those that are largest everywhere."""
        a = self.magnitude[stream][level]
        start, dims = (tuple(topk_first(x[None], self.k)[1][0].tolist()) for x in (a[0], a.mean(0)))
        return {'start': ((0,) * self.k, start), 'dims': (None, dims)}

    def common(self, stream, level):
        """Returns the most frequent of the sequences' own entries, [[position, dimension]], and the share of the sequences that have the first."""
        index, counts = np.unique(self.own[stream][level], return_counts=True)
        order = (-counts).argsort(kind='stable')[: self.k]
        return [list(divmod(i, self.d)) for i in index[order].tolist()], number(
            counts[order[0]] / len(self.own[stream][level])
        )

    def standout(self, stream, level):
        """The largest mean magnitude over the median dimension of the same position: unlike max over median, not raised by tokens that commit little."""
        a = self.magnitude[stream][level]
        i = int(topk_first(a.flatten()[None], 1)[1])
        return float(a.flatten()[i] / a[i // self.d].median())

    def peak(self, stream):
        """The sublayer where the outlier stands out most, of those that an attention follows: no later prediction sees an edit after the others.
        Nor do those count where the stream has yet to grow: C holds next to nothing after the first."""
        size = self.magnitude[stream].mean((1, 2)).tolist()[1 : max(2, self.S - 1)]
        return max(
            (s for s, of in enumerate(size) if of >= max(size) / 4),
            key=lambda s: self.standout(stream, s + 1),
        )

    def other_dims(self, dims, n):
        """Returns the dimensions that are not in dims, in an order that depends on the seed and on n, the number of the sequence."""
        order = philox(self.seed, 2**32 + n).random_raw(self.d).argsort(kind='stable')
        return order[~np.isin(order, dims)]

    def entries(self, edit, n):
        """Returns the positions, or a slice of all, and the dimensions that an edit changes in sequence n of the evaluated ones."""
        positions, dims = (
            (part.tolist() for part in np.divmod(self.own[edit.stream][edit.own, n], self.d))
            if edit.own
            else (edit.positions, edit.dims)
        )
        if edit.control == 'other':
            positions = [(t + self.T // 2) % self.T for t in positions]
        if edit.control == 'random':
            positions = (
                positions
                and (philox(self.seed, 2**33 + n).random_raw(len(dims)) % np.uint64(self.T)).tolist()
            )
            dims = self.other_dims(dims, n)[: len(dims)]
        return slice(None) if positions is None else positions, dims

    def touched(self, edit, N):
        """Returns (N, T) bool: the positions that an edit changes in the first N evaluated sequences."""
        if edit.how == 'clip':
            return self.over[edit.stream][list(edit.levels), QUANTILES.index(edit.quantile), :N].any(0)
        at = np.zeros((N, self.T), bool)
        for n in range(N):
            at[n, self.entries(edit, n)[0]] = True
        return at

    def aim(self, edit, sequences):
        """Returns the mask of the entries that an edit replaces in these sequences, (B, T, d) bool, and for `moved`, (B, d): the dimension whose
        change each takes."""
        mask, source = (
            np.zeros((len(sequences), self.T, self.d), bool),
            np.empty((len(sequences), self.d), np.int64),
        )
        for row, taken, n in zip(mask, source, sequences):
            positions, dims = self.entries(edit, n)
            row[positions, dims] = True
            if edit.control == 'moved':
                few = (
                    sorted(set(dims)) if len(dims) <= self.d // 2 else []
                )  # they take the first of the others, which take the next
                order = np.append(few, self.other_dims(few, n)).astype(np.int64)
                taken[np.roll(order, -max(1, len(few)))] = order
        return torch.from_numpy(mask), torch.from_numpy(source) if edit.control == 'moved' else None

    def change(self, edit, level, x, mask):
        """x: (B, T or fewer, d), the edit's stream at that level. Returns what the edit makes of it."""
        if edit.how == 'clip':
            limit = self.limit[edit.stream][level, QUANTILES.index(edit.quantile)]
            return x.clamp(-limit, limit)
        T = x.shape[1]
        return torch.where(mask[:, :T], self.mean[edit.stream][level, :T] if edit.how == 'mean' else 0.0, x)


@contextmanager
def edited(model, edit, reference, sequences):
    """While it lasts, the uncompiled model makes the edit. sequences: the numbers of those it is about to see."""
    mask, source = (
        aim if aim is None else aim.to(model.head.weight.device) for aim in reference.aim(edit, sequences)
    )
    carried = 0  # what `moved` has added to the stream so far: downstream, each level is to differ by its own change, not by the sum of them all

    def change(level, x):
        nonlocal carried
        if source is None:
            return reference.change(edit, level, x, mask)
        if edit.where == 'stream' and level != edit.levels[0]:
            x = x - carried
        carried = (reference.change(edit, level, x, mask) - x).gather(-1, source[:, None].expand(x.shape))
        return x + carried

    def changed(level, streams):
        return {**streams, edit.stream: change(level, streams[edit.stream])}

    with ExitStack() as undo:
        for level in edit.levels:
            if edit.where == 'stream':
                undo.enter_context(
                    model.sublayers[level - 1].register_forward_hook(
                        lambda _, __, output, level=level: (changed(level, output[0]), output[1])
                    )
                )
            elif edit.where == 'decoder':
                undo.enter_context(
                    model.norm.register_forward_pre_hook(
                        lambda _, inputs, level=level: change(level, inputs[0])
                    )
                )
            else:
                residual = model.sublayers[level].residual
                residual.read = lambda streams, level=level, read=residual.read: read(changed(level, streams))
                undo.callback(delattr, residual, 'read')  # the class's own is seen again
        yield


def states(model, idx):
    """idx: (B, T). Returns the streams at every level, a list of S + 1 dicts, and the logits."""
    seen = [model.start(idx)]
    for sublayer in model.sublayers:
        seen.append(sublayer(seen[-1])[0])
    return seen, model.head(model.decode(seen[-1]))


@torch.no_grad()
def evaluate(model, tokens, starts, edits, reference, batch_size, progress=lambda done: None):
    """Returns the loss of every prediction without an edit, (N, T) float32, and {edit: the same with it}. What an edit does not reach is not computed again."""
    device, losses = (
        model.head.weight.device,
        np.zeros((1 + len(edits), len(starts), tokens.block_size), np.float32),
    )
    for i in range(0, len(starts), batch_size):
        idx, targets = (t.to(device) for t in tokens.windows(starts[i : i + batch_size]))
        before, logits = states(model, idx)
        for count, edit in enumerate((None, *edits)):
            if edit is not None:
                first = min((level - (edit.where == 'stream') for level in edit.levels), default=0)
                streams = before[first]
                with edited(model, edit, reference, range(i, i + len(idx))):
                    for sublayer in model.sublayers[first:]:
                        streams, _ = sublayer(streams)
                    logits = model.head(model.decode(streams))
            losses[count, i : i + len(idx)] = (
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none')
                .view_as(targets)
                .cpu()
            )
            progress((i * len(losses) + (count + 1) * len(idx)) / (len(starts) * len(losses)))
    return losses[0], dict(zip(edits, losses[1:]))


def with_controls(edit, reference, level):
    """Returns {'edit': edit, name: each of its controls}; level: where its entries were chosen. Nothing is evaluated that has not come through here."""
    group, k, placed = (
        {'edit': edit},
        reference.k if edit.own else len(edit.dims),
        bool(edit.own or edit.positions),
    )
    if 0 < k < reference.d:
        group['random'] = replace(edit, control='random')
        magnitude = reference.magnitude[edit.stream][level]
        order = (magnitude[0] if placed else magnitude.mean(0)).argsort(stable=True)
        group['median'] = replace(
            edit,
            own=0,
            dims=tuple(order[(reference.d - k) // 2 :][:k].tolist()),
            positions=(0,) * k if placed else None,
        )
        if placed:
            group['other'] = replace(edit, control='other')
    return {**group, 'moved': replace(edit, control='moved')}


def plan(reference, stream, s, hows, decoded, alone):
    """Returns what is tried at sublayer s: a list of results that have yet to be evaluated. decoded: is it this stream? alone: is there no other?"""

    def add(where, what, how, reach, levels, chosen_at, positions=None, dims=(), **settings):
        edit = Edit(where, stream, tuple(levels), how, dims, positions, **settings)
        entries, share = (
            reference.common(stream, edit.own)
            if edit.own
            else ([[t, j] for t, j in zip(positions or [None] * len(dims), dims)], None)
        )
        results.append(
            {
                'stream': stream,
                'sublayer': s,
                'where': where,
                'what': what,
                'how': f'clip {edit.quantile}' if how == 'clip' else how,
                'reach': reach,
                'entries': [] if what == 'all' else entries,
                'share': share,
                'standout': number(reference.standout(stream, chosen_at)),
                'group': with_controls(edit, reference, chosen_at),
            }
        )

    results, S, replacing = [], reference.S, [how for how in hows if how != 'clip']
    here, last, reaches = (
        reference.pick(stream, s + 1),
        reference.pick(stream, S),
        {'once': (s + 1,), 'downstream': range(s + 1, S + 1)},
    )
    for what, how, (reach, levels) in product(('top', *here), replacing, reaches.items()):
        add('stream', what, how, reach, levels, s + 1, *here.get(what, ()), own=0 if what in here else s + 1)
    for (reach, levels), quantile in product(reaches.items(), QUANTILES if 'clip' in hows else ()):
        add('stream', 'all', 'clip', reach, levels, s + 1, quantile=quantile)
    for how in replacing if decoded else ():
        for what, entries in here.items():
            add('reads', what, how, 'every', range(S), s + 1, *entries)
            add('decoder', what, how, '', (S,), s + 1, *entries)
            if set(last[what][1]) != set(entries[1]):
                add('decoder', f'last {what}', how, '', (S,), S, *last[what])
        if not alone:
            add('reads', 'all', how, 'every', range(S), s + 1, None, tuple(range(reference.d)))
    return results


def interval(weights, values, chosen, scale=lambda means: means):
    """weights: (R, N) of the bootstrap; values: (N, T); chosen: (N, T) bool, those that count. Returns {value, low, high} of scale(their mean), over the replicates
    that have drawn any; low and high are None where fewer than FEW sequences bear on it. None if none is chosen."""
    counts, totals = weights @ chosen.sum(1), weights @ (values * chosen).sum(1)
    if not counts[0]:
        return None
    of, enough = headline(scale(totals[counts > 0] / counts[counts > 0])), chosen.any(1).sum() >= FEW
    return {
        'value': of['value'],
        'low': of['low'] if enough else None,
        'high': of['high'] if enough else None,
    }


def outcome(before, after, at, weights, labels):
    """before, after: (N, T) losses. at: (N, T) bool, the positions edited. labels: {breakdown: ((N, T) places, names)}."""
    of, loss = partial(interval, weights, after.astype(np.float64) - before), after.mean(dtype=np.float64)
    return {
        'loss': number(loss),
        'perplexity': number(np.exp(loss)),
        'ratio': of(np.ones_like(at), np.exp),
        'edited': of(at),
        'later': of(~at & np.logical_or.accumulate(at, 1)),
        'by': {
            name: {names[i]: list(of(places == i).values()) for i in np.unique(places)}
            for name, (places, names) in labels.items()
        },
    }


def finish(results, before, losses, reference, weights, labels, kinds):
    """Turns the results' groups of edits into outcomes. labels: none, and there are no breakdowns. kinds: (N, T) places of the inputs' classes."""
    N, T = before.shape
    for result in results:
        outcomes, carried = {}, {}
        for name, edit in result.pop('group').items():
            if labels and (edit.own or edit.positions):
                carrier = np.array([kinds[n, reference.entries(edit, n)[0][0]] for n in range(N)])
                carried = {'carrier': (carrier[:, None].repeat(T, 1), labels['class'][1])}
            outcomes[name] = outcome(
                before, losses[edit], reference.touched(edit, N), weights, {**labels, **carried}
            )
        result.update(edit=outcomes.pop('edit'), controls=outcomes)


def label(tokens, starts, meta):
    """Returns {breakdown: ((N, T) places, names)} of the predicted tokens, and the classes of the inputs, (N, T)."""
    language = language_of(meta, tokens)
    kinds, found = describe(tokens, starts, encoding(meta['tokenizer']), language)
    since = found['since_line']
    position, since = (
        np.searchsorted(EDGES, of, 'right') for of in (np.arange(tokens.block_size), since[:, 1:])
    )
    return {
        'class': (kinds[:, 1:], CLASSES[language]),
        'position': (np.broadcast_to(position, since.shape), BUCKETS),
        'since_line': (since, BUCKETS),
    }, kinds[:, :-1]


@contextmanager
def qkv_hooked(model, on_qkv):
    """While it lasts, calls on_qkv(layer, attention, output of its qkv map)."""
    attentions = [sublayer.function for sublayer in model.sublayers if sublayer.kind == 'attn']
    handles = [
        attend.qkv.register_forward_hook(
            lambda _, __, output, layer=layer, attend=attend: on_qkv(layer, attend, output)
        )
        for layer, attend in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention(model, tokens, starts, batch_size, reference, edit, positions=()):
    """Returns the sink of every head under the edit, (n_layer, n_head), and {position: (2, n_layer, n_head)}: of what the position's value adds to later
    outputs, p̄ W v with p̄ its mean probability, the square of its mean over sequences and the mean of its square."""
    statistics, device = Statistics(1), model.head.weight.device

    def on_qkv(layer, attend, qkv):
        q, k, v = attend.heads(*qkv.chunk(3, -1))
        statistics.add((layer, 'sink'), attention_sink(attend, q, k))
        for t in positions:
            one_hot = torch.zeros_like(k)
            one_hot[:, :, t] = 1
            p = attend.attend(q, k, one_hot)[:, :, t:, 0].mean(-1)
            added = p[..., None] * torch.einsum(
                'bhe,dhe->bhd', v[:, :, t], attend.proj.weight.unflatten(1, (attend.n_head, -1))
            )
            statistics.add((layer, t), torch.cat([added, added.square().sum(-1, keepdim=True)], -1))

    for i in range(0, len(starts), batch_size):
        idx = tokens.windows(starts[i : i + batch_size])[0].to(device)
        statistics.begin(len(idx), device)
        with qkv_hooked(model, on_qkv), edited(model, edit, reference, range(i, i + len(idx))):
            model(idx)

    def layers(key):
        return np.stack([statistics.mean((layer, key))[0] for layer in range(model.config.n_layer)])

    return layers('sink'), {
        t: np.stack([np.square(layers(t)[..., :-1]).sum(-1), layers(t)[..., -1]]) for t in positions
    }


def constancy(of_mean, mean_of, n):
    """of_mean, mean_of: the square of the mean of vectors over n sequences and the mean of their squares, (…, n_head). Returns (…): the share of the
    mean square that is the true mean's, 1 for a constant, an implicit bias, and 0 for what has no mean. n vectors without one still have
    a mean of 1/n of their square: (n of_mean − mean_of) / (n − 1) in the place of of_mean is unbiased."""
    return np.clip((n * of_mean.sum(-1) / mean_of.sum(-1) - 1) / (n - 1), 0, 1)


@torch.no_grad()
def sample(model, prompts, count, seed, reference, edit):
    """prompts: (B, P). Returns (B, count): continuations at temperature 1. The noise depends on the seed alone: an edit that changes nothing changes no token."""
    generator, ids = torch.Generator().manual_seed(seed), prompts
    with edited(model, edit, reference, range(len(prompts))):
        for _ in range(count):
            logits = model(ids[:, -model.config.block_size :])[:, -1].double().cpu()
            noise = -torch.log(
                -torch.log(torch.rand(logits.shape, generator=generator, dtype=torch.float64))
            )  # Gumbel: the largest sum is a sample
            ids = torch.cat([ids, (logits + noise).argmax(-1, keepdim=True).to(ids.device)], 1)
    return ids[:, prompts.shape[1] :]


def shown(results):
    """Returns of one stream's results at one sublayer those whose classes, sinks and continuations are shown: of the first `how`, made again downstream."""
    return [
        r
        for r in results
        if r['where'] == 'stream'
        and r['reach'] == 'downstream'
        and r['how'] == results[0]['how']
        and r['what'] != 'top'
    ]


def sinks_and_constants(model, tokens, starts, batch_size, reference, few):
    """Returns the `attention` of intervene.json. few: (what it says of an edit, the edit, its control)."""

    def look(edit, positions=()):
        heads, added = attention(model, tokens, starts, batch_size, reference, edit, positions)
        return {'sink': number(heads.mean()), 'by_layer': [number(v) for v in heads.mean(1)]}, added

    unedited, added = look(NOTHING, (0, 1, reference.T // 2))
    edits = [{**names, **look(edit)[0], 'control': look(control)[0]} for names, edit, control in few]
    with np.errstate(invalid='ignore'):  # where nothing is added
        constant = {
            t: {
                'constancy': number(constancy(*squares.reshape(2, -1), len(starts))),
                'norm': number(np.sqrt(squares[1].mean())),
                'by_layer': [number(v) for v in constancy(*squares, len(starts))],
            }
            for t, squares in added.items()
        }
    return {'sequences': len(starts), 'unedited': unedited, 'edits': edits, 'constancy': constant}


def continuations(model, prompts, seed, reference, few, coder):
    """Returns the `samples` of intervene.json. prompts: (B, P). few: as above."""

    def texts(edit):
        return [
            coder.decode(ids) for ids in sample(model, prompts, NEW_TOKENS, seed, reference, edit).tolist()
        ]

    unedited = texts(NOTHING)
    edits = [(names, texts(edit), texts(control)) for names, edit, control in few]
    return [
        {
            'prompt': coder.decode(prompt),
            'unedited': unedited[i],
            'edits': [{**names, 'text': text[i], 'control': control[i]} for names, text, control in edits],
        }
        for i, prompt in enumerate(prompts.tolist())
    ]


def intervene(run, args):
    """Returns what intervene.json holds, and of each stream the results that the figures show."""
    model, path, tokens, meta = run.model, run.path, run.tokens, run.meta
    S, N, operator = len(model.sublayers), args.sequences, RESIDUALS[model.config.residual]
    streams = operator.streams if args.stream is None else (args.stream,)
    if not set(streams) <= set(operator.streams):
        raise UserError(f'--stream={args.stream}, but {path} has {" and ".join(operator.streams)}')
    if args.sublayer.isdecimal() and int(args.sublayer) >= S:
        raise UserError(f'--sublayer={args.sublayer}, but {path} has sublayers 0 to {S - 1}')
    decoded, alone = None if model.config.decode_gamma else operator.decoded, len(operator.streams) == 1
    reached = {
        stream: range(S - (decoded not in (None, stream))) for stream in streams
    }  # nothing reads the other stream after the last sublayer
    if args.sublayer.isdecimal() and not any(int(args.sublayer) in of for of in reached.values()):
        raise UserError(
            f'--stream={args.stream} --sublayer={args.sublayer}, but nothing reads that: ask for an earlier sublayer, or for {decoded}'
        )
    if args.top > model.config.n_embd // 4:
        raise UserError(
            f'--top={args.top}, but {path} has {model.config.n_embd} dimensions, and the controls need three times as many others: ask for fewer'
        )
    starts = tokens.fixed_starts(N + CALIBRATION, args.seed)
    if len(starts) < N + ENOUGH:
        most = len(starts) - ENOUGH
        raise UserError(
            f'--sequences={N} and at least {ENOUGH} more to choose entries on, but {tokens.path} holds {len(starts)} windows: '
            + (f'ask for at most {most}' if most >= 2 else 'name a larger set with --data')
        )
    batch_size = max(1, (8192 if args.device == 'cuda' else 4096) // tokens.block_size)
    labels, kinds = label(tokens, starts[:N], meta)
    reference = Reference(model, tokens, starts[N:], starts[:N], args.top, batch_size, args.seed)
    weights = bootstrap_weights(args.seed, range(N), REPLICATES)

    def carry_out(results, count, what, labels):
        """Evaluates what is planned on the first `count` sequences. Returns their losses without an edit, and how many edits there were."""

        def progress(share):
            if sys.stderr.isatty():
                text = f'{path}: {what}, {len(edits)} edits of {count} sequences, {share:.0%}' * (share < 1)
                print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)

        edits = list(dict.fromkeys(edit for result in results for edit in result['group'].values()))
        before, losses = evaluate(model, tokens, starts[:count], edits, reference, batch_size, progress)
        finish(results, before, losses, reference, weights[:, :count], labels, kinds)
        return before, len(edits)

    results, sweep, figured = [], [], {}
    for stream in streams:
        peak = reference.peak(stream)
        planned = {
            s: plan(reference, stream, s, HOWS[args.how], stream == decoded, alone)
            for s in reached[stream]
            if args.sublayer == 'all' or s == (peak if args.sublayer == 'auto' else int(args.sublayer))
        }
        results += sum(planned.values(), [])
        if planned:
            figured[stream] = planned[peak if peak in planned else min(planned)]
        if args.sublayer == 'auto':
            tried = [
                result
                for s in reached[stream]
                for result in plan(reference, stream, s, ('zero',), False, True)
            ]
            sweep += [
                result
                for what in SWEPT
                for result in tried
                if (result['what'], result['reach']) == (what, 'once')
            ]
    few = [
        (
            {key: result[key] for key in ('stream', 'sublayer', 'where', 'what', 'how', 'reach')},
            result['group']['edit'],
            result['group']['moved'],
        )
        for group in figured.values()
        for result in shown(group)
    ]
    heads = sinks_and_constants(model, tokens, starts[:N], batch_size, reference, few)
    prompts = tokens.windows(starts[N:][:PROMPTS])[0][:, : min(64, tokens.block_size // 2)].to(args.device)
    samples = continuations(model, prompts, args.seed, reference, few, run.encoding)
    before, evaluations = carry_out(results, N, 'interventions', labels)
    swept = max(N // 2, min(N, FEW))
    if sweep:
        evaluations += carry_out(sweep, swept, 'every sublayer', {})[1]
    report = {
        'schema': 1,
        'checkpoint': str(path),
        'iter_num': run.iter_num,
        'model': {**run.model_args, 'parameters': model.num_params()},
        'data': {
            **run.data,
            'sequences': N,
            'calibration': len(starts) - N,
            'sweep_sequences': swept,
            'block_size': tokens.block_size,
            'seed': args.seed,
        },
        'evaluations': evaluations,
        'loss': interval(weights, before.astype(np.float64), np.ones_like(before, bool)),
        'perplexity': number(np.exp(before.mean(dtype=np.float64))),
        'sweep': sweep,
        'results': results,
        'before': {
            name: {
                of[i]: {
                    'share': number(found.mean()),
                    'sequences': int(found.any(1).sum()),
                    'loss': number(before[found].mean(dtype=np.float64)),
                }
                for i in np.unique(places)
                for found in [places == i]
            }
            for name, (places, of) in labels.items()
        },
        'attention': heads,
        'samples': samples,
    }
    return report, figured


def ratio_text(q):
    return short(q, 3) if q is None or not 0.1 <= q < 10 else f'{q:.4f}'


def signed(q):
    """A change of loss in at most 7 characters."""
    v = q and q['value']
    return '–' if v is None else '-+'[v >= 0] + short(abs(v), 3)


def fixed(v, form):
    """v in this format, or a dash of its width where there is no finite number."""
    return format(v, form) if v is not None else '–'.rjust(len(format(0, form)))


def result_row(head, result):
    """One line: the edit, its controls after the bar; a star where its interval is apart from all of theirs."""
    edit, controls = result['edit'], result['controls']
    q, others = edit['ratio'], [control['ratio'] for control in controls.values()]
    apart = all(
        None not in (q['low'], q['high'], c['low'], c['high'])
        and (q['low'] > c['high'] or q['high'] < c['low'])
        for c in others
    )
    return ROW.format(
        head,
        f'{ratio_text(q["value"])} [{ratio_text(q["low"])}, {ratio_text(q["high"])}]' + '*' * apart,
        short(edit['loss'], 4),
        *(signed(edit[key]) for key in ('edited', 'later')),
        *(ratio_text(controls[name]['ratio']['value']) if name in controls else '' for name in CONTROLS),
    )


def print_report(name, report):
    data = report['data']
    print(
        f'\n{name}, iteration {report["iter_num"]}: {data["sequences"]} sequences of {data["block_size"]} tokens, {data["name"]} val, seed {data["seed"]}; '
        f'{report["evaluations"]} edits'
    )
    print(
        f'loss {short(report["loss"]["value"], 4)}, perplexity {short(report["perplexity"], 4)}. Ratio of perplexities, after an edit to before; loss after it; '
        'changes of\nloss at edited positions and later; ratios of the controls; * apart from them all'
    )
    for (stream, what), results in groupby(
        report['sweep'], lambda result: (result['stream'], result['what'])
    ):
        print('\n' + ROW.format(f'{stream}, {what} zeroed after sublayer', *COLUMNS))
        for result in results:
            (position, dim), *_ = result['entries']
            print(
                result_row(
                    f'{result["sublayer"]:<3} '
                    + (
                        f'{dim} at {position} in {result["share"]:.0%}, {short(result["standout"], 3)} ×'
                        if what == 'top'
                        else ' '.join(str(j) for _, j in result['entries'])
                    ),
                    result,
                )
            )
    for (stream, s), results in groupby(
        report['results'], lambda result: (result['stream'], result['sublayer'])
    ):
        print('\n' + ROW.format(f'{stream} after sublayer {s}', *COLUMNS))
        for result in results:
            print(
                result_row(
                    f'{result["where"]:8}{result["what"] + " " + result["how"].replace(" 0.", " ."):14} {result["reach"]}',
                    result,
                )
            )


def print_details(report, figured):
    """Losses by class of the predicted token and the rest, the sinks and the continuations, each beside the same change in other dimensions."""
    for results in map(shown, figured.values()):
        heads = [f'{r["stream"]} {r["what"]} {r["how"]} (moved)' for r in results]
        print(
            f'\n{"change of loss, downstream":28}{"share":>6} {"before":>7}'
            + ''.join(f'{head:>32}' for head in heads)
        )
        rows = {
            (breakdown, of): f'{line["share"]:6.1%} {fixed(line["loss"], "7.3f")}'
            for breakdown, lines in report['before'].items()
            for of, line in lines.items()
        }
        rows |= {
            ('carrier', of): f'{"–":>6} {"–":>7}'
            for r in results
            for of in r['edit']['by'].get('carrier', ())
        }
        for (breakdown, of), unedited in rows.items():
            pairs = [
                [by['by'].get(breakdown, {}).get(of) for by in (r['edit'], r['controls']['moved'])]
                for r in results
            ]
            cells = [
                f'{fixed(edit[0], "+.4f")} ({fixed(moved[0], "+.4f")})' if edit else '   – (   –)'
                for edit, moved in pairs
            ]
            print(f'{f"{breakdown} {of}":28}{unedited}' + ''.join(f'{cell:>32}' for cell in cells))
    heads = report['attention']
    print(f'\nattention to position 0, unedited: {fixed(heads["unedited"]["sink"], ".4f")}')
    for edit in heads['edits']:
        print(
            f'  {edit["stream"]} {edit["what"]} {edit["how"]}: {fixed(edit["sink"], ".4f")} (moved {fixed(edit["control"]["sink"], ".4f")})'
        )
    print(
        'a constant over inputs (1) or not (0) is what later outputs get from position '
        + ', '.join(f'{t}: {short(c["constancy"], 3)}' for t, c in heads['constancy'].items())
    )
    for text in report['samples']:
        print(f'\n{text["prompt"][-60:]!r:.80} …\n  {"unedited":24}{text["unedited"]!r:.80}')
        for edit in text['edits']:
            print(
                f'  {edit["stream"] + " " + edit["what"] + " " + edit["how"]:24}{edit["text"]!r:.80}\n  {"  moved":24}{edit["control"]!r:.80}'
            )


def point(axis, y, value, low, high, label, **style):
    value, low, high = np.array([value, low, high], float)  # None becomes NaN, which is not drawn
    axis.plot([low, high], [y, y], color=style['color'], linewidth=1.2)
    axis.plot(value, y, linestyle='', label=label, **style)


def finish_panel(axis, lines, unchanged, **settings):
    axis.set(ylim=(len(lines) - 0.4, -0.6), **settings)
    axis.set_yticks(range(len(lines)), lines, fontsize='small')
    axis.axvline(unchanged, color='#999999', linewidth=0.8)
    axis.grid(alpha=0.3)


def ratio_ticks(axis):
    """Gives an axis of ratios in logarithms plain numbers to read, 1 always among them and none upon it."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    low, high = min(low, 1), max(high, 1)
    ticks = (
        MaxNLocator(6, steps=(1, 2, 5, 10))
        if high < 10 * low
        else LogLocator(10, (1, 2, 5) if high < 1000 * low else (1,))
    ).tick_values(low, high)
    axis.set_ticks(
        [1, *(t for t in ticks if low <= t <= high and abs(math.log(t)) > 0.08 * math.log(high / low))]
    )
    axis.set_major_formatter('{x:.8g}')
    axis.set_minor_formatter('')


def draw_ratios(name, figured, sweep, path):
    """Every intervention of a stream in a line, with its controls and 95% intervals; below, the sweep over the sublayers."""
    heights = [1.2 + 0.2 * max(map(len, figured.values())), 3.2][: 1 + bool(sweep)]
    with figure(
        path,
        f'{name}: perplexity after ÷ before\nbars: 95% intervals over sequences',
        len(heights),
        len(figured),
        (6.2, sum(heights) / len(heights)),
    ) as axes:
        axes[0].get_gridspec().set_height_ratios(heights)
        for axis, (stream, results) in zip(axes, figured.items()):
            for y, result in enumerate(results):
                for kind, of in {'edit': result['edit'], **result['controls']}.items():
                    place = y if kind == 'edit' else y + 0.18 * (CONTROLS.index(kind) - 1.5)
                    point(
                        axis,
                        place,
                        **of['ratio'],
                        label=None if y else kind,
                        **{'markersize': 3.5, **MARKS[kind]},
                    )
            lines = [f'{r["where"]} {r["what"]}, {r["how"]} {r["reach"]}' for r in results]
            finish_panel(
                axis,
                lines,
                1,
                xscale='log',
                xlabel='perplexity ratio (log scale)',
                title=f'{stream}: entries of sublayer {results[0]["sublayer"]}'
                + " ('last': of the last)" * ('last' in ' '.join(lines)),
            )
            ratio_ticks(axis.xaxis)
        for axis, stream in zip(axes[len(figured) :], figured):
            draw_sweep(axis, stream, [result for result in sweep if result['stream'] == stream])
        handles, labels = (
            sum(parts, [])
            for parts in zip(*(axis.get_legend_handles_labels() for axis in axes[:: len(figured)]))
        )
        axes[0].figure.legend(
            handles, labels, loc='outside lower center', ncols=1 + 2 * len(figured), fontsize='small'
        )


def draw_sweep(axis, stream, sweep):
    """Along the depth, what it does to zero entries once; thin, the same in other places."""
    for what, style in SWEPT.items():
        results = [result for result in sweep if result['what'] == what]
        for kind, line in {
            'random': dict(linestyle=':'),
            'moved': dict(linestyle='--'),
            '': dict(linewidth=1.6, markersize=4, marker=style['marker']),
        }.items():
            of = [
                (result['controls'][kind] if kind else result['edit'])['ratio']['value'] for result in results
            ]
            axis.plot(
                [result['sublayer'] for result in results],
                np.array(of, float),
                color=style['color'],
                label=f'{what} zeroed once' + f', {kind}' * bool(kind),
                **{'linewidth': 0.8, **line},
            )
    axis.axhline(1, color='#999999', linewidth=0.8)
    axis.set(
        title=f'{stream}, every sublayer',
        xlabel='sublayer (even: attention, odd: MLP)',
        ylabel='perplexity ratio (log scale)',
        yscale='log',
    )
    axis.grid(alpha=0.3)
    ratio_ticks(axis.yaxis)


def draw_classes(name, before, figured, path):
    """What the shown interventions, and the same changes in other dimensions, do to the loss of every class of predicted tokens but the rarest."""
    classes = {key: line for key, line in before['class'].items() if line['share'] >= 0.001}
    with figure(
        path,
        f'{name}\nchange of loss by class of the predicted token\nbars: 95% intervals over sequences',
        1,
        len(figured),
        (5.6, 2.3 + 0.4 * len(classes)),
    ) as axes:
        for axis, results in zip(axes, map(shown, figured.values())):
            for i, result in enumerate(results):
                for j, of in enumerate((result['edit'], result['controls']['moved'])):
                    for y, key in enumerate(classes):
                        label = f'{result["what"]} {result["how"]}' + ', moved' * j if y == 0 else None
                        point(
                            axis,
                            y + 0.18 * (2 * i + j - 1.5),
                            *of['by']['class'][key],
                            label,
                            color=('#0072B2', '#D55E00')[i],
                            marker='os'[i],
                            markerfacecolor='none' if j else None,
                        )
            finish_panel(
                axis,
                [f'{key} ({line["share"]:.1%})' for key, line in classes.items()],
                0,
                xlabel='change of loss (nats per token)',
                title=f'{results[0]["stream"]}, sublayer {results[0]["sublayer"]} and downstream',
            )
            axis.locator_params(axis='x', nbins=6)
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize='small'
        )


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, sequences=32, writes='intervene.json and figures')
    parser.add_argument('--stream', help="one of the model's streams (default: all of them)")
    parser.add_argument(
        '--sublayer',
        default='auto',
        help='a number; all; or auto, a sweep over all and the one where the outlier stands out most (default)',
    )
    parser.add_argument('--top', type=int, default=4, help='how many entries to change (default 4)')
    parser.add_argument('--how', choices=HOWS, default='all')
    args = parser.parse_args(argv)
    if args.sublayer not in ('auto', 'all') and not args.sublayer.isdecimal():
        raise UserError(f'--sublayer is {args.sublayer}: expected auto, all or a number')
    check_run_arguments(args, top=1, sequences=2)
    return args


def run(argv):
    args = parse_arguments(argv)
    for run in open_runs(args):
        out, suffix, name = run.out, run.suffix, run.name
        report, figured = intervene(run, args)
        with atomic_write(out / f'intervene{suffix}.json', 'w') as file:
            json.dump(report, file, separators=(',', ':'))
        print_report(name, report)
        print_details(report, figured)
        draw_ratios(name, figured, report['sweep'], out / f'intervene{suffix}.png')
        draw_classes(name, report['before'], figured, out / f'intervene_class{suffix}.png')
        print(
            f'written: {os.path.relpath(out)}/intervene{suffix}.json, intervene{suffix}.png, intervene_class{suffix}.png'
        )


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
