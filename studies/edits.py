"""
Edits of a model's streams: what is changed, what stands beside it as a control, and how a running model
makes the change.

studies/intervene.py says what the words mean, and what came of it. Everything that an edit needs to know
about the streams without it is in a Reference.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from data.loader import philox
from measure import hooked, number
from model import GPT
from streams import topk_first

QUANTILES = (0.9999, 0.999, 0.99, 0.9)
CONTROLS = ('random', 'median', 'other', 'moved')
SWEPT = ('top', 'start', 'dims')  # what is zeroed along the depth


@dataclass(frozen=True)
class Edit:
    """One change of one stream. Level s is the state before sublayer s, level s + 1 the one after it."""

    where: str  # stream, reads or decoder
    stream: str
    levels: tuple  # at which it is made; none: nothing is changed
    how: str  # zero, mean, overall or clip
    dims: tuple = ()  # of its entries
    positions: tuple = None  # beside them; None: every position
    own: int = 0  # the level of which each sequence's own largest entries are taken; 0: the entries above
    quantile: float = 0.0  # of clip
    control: str = ''  # random: other entries; other: half a window away; moved: in other dimensions


NOTHING = Edit('stream', '', (), 'zero')


class Reference:
    """The streams without an edit, by level: what edits aim at, and what they put in.

    Means, magnitudes, limits, and what is chosen by them, are of windows that are not evaluated. The
    evaluated ones give the entries of `top`, which are a sequence's own, and the positions at which clip
    cuts. S sublayers, T tokens, d dimensions, N evaluated sequences, k entries that an edit changes.

    mean, magnitude: {stream: (S + 1, T, d)}, over sequences.
    limit: {stream: (S + 1, quantiles)} of the magnitudes of a sequence, averaged over sequences.
    own: {stream: (S + 1, N, k)}, places in T · d of the largest magnitudes of each evaluated sequence.
    exceeds: {stream: (S + 1, quantiles, N, T)} bool, whether an entry of that token is above the limit.
    """

    @torch.no_grad()
    def __init__(self, model, tokens, starts, evaluated, k, batch_size, seed):
        """starts: (M,) of windows that are not evaluated. evaluated: (N,) of those that are.
        k: how many entries an edit changes.
        """
        self.seed, self.k, self.T, self.d = seed, k, tokens.block_size, model.n_embd
        self.S = len(model.sublayers)
        names, levels, N = model.stream_names, self.S + 1, len(evaluated)
        device = next(model.parameters()).device

        def zeros(*shape):
            return {stream: torch.zeros(levels, *shape, device=device) for stream in names}

        self.mean, self.magnitude = zeros(self.T, self.d), zeros(self.T, self.d)
        self.limit = zeros(len(QUANTILES))
        self.own = {stream: np.zeros((levels, N, k), np.int64) for stream in names}
        self.exceeds = {stream: np.zeros((levels, len(QUANTILES), N, self.T), bool) for stream in names}
        ranks = [math.ceil(q * self.T * self.d) - 1 for q in QUANTILES]

        def add_means(rows, stream, level, x):
            a = x.abs()
            self.mean[stream][level] += x.sum(0) / len(starts)
            self.magnitude[stream][level] += a.sum(0) / len(starts)
            self.limit[stream][level] += a.flatten(1).sort(1).values[:, ranks].sum(0) / len(starts)

        def find_largest(rows, stream, level, x):
            a = x.abs()
            limit = self.limit[stream][level][:, None, None]
            self.own[stream][level, rows] = topk_first(a.flatten(1), k)[1].cpu().numpy()
            self.exceeds[stream][level, :, rows] = (a.amax(-1) > limit).cpu().numpy()

        visit_streams(model, tokens, starts, batch_size, add_means)
        visit_streams(model, tokens, evaluated, batch_size, find_largest)

    def pick(self, stream, level):
        """Returns {what: (positions, dimensions)}: the largest dimensions at the start token, and those
        largest everywhere.
        """
        a = self.magnitude[stream][level]
        start, dims = (tuple(topk_first(x[None], self.k)[1][0].tolist()) for x in (a[0], a.mean(0)))
        return {'start': ((0,) * self.k, start), 'dims': (None, dims)}

    def common(self, stream, level):
        """Returns the most frequent of the sequences' own entries, [[position, dimension]], and the share
        of the sequences that have the first."""
        index, counts = np.unique(self.own[stream][level], return_counts=True)
        order = (-counts).argsort(kind='stable')[: self.k]
        entries = [list(divmod(i, self.d)) for i in index[order].tolist()]
        return entries, number(counts[order[0]] / len(self.own[stream][level]))

    def standout(self, stream, level):
        """Returns the largest mean magnitude over the median dimension of the same position. Unlike max
        over median, it is not raised by tokens that commit little."""
        a = self.magnitude[stream][level]
        i = int(topk_first(a.flatten()[None], 1)[1])
        return float(a.flatten()[i] / a[i // self.d].median())

    def peak(self, stream):
        """Returns the sublayer where the outlier stands out most, of those that an attention follows, since
        no later prediction sees an edit after the others. Nor do those count where the stream has yet to
        grow: C holds next to nothing after the first."""
        sizes = self.magnitude[stream].mean((1, 2)).tolist()[1 : max(2, self.S - 1)]
        grown = [s for s, size in enumerate(sizes) if size >= max(sizes) / 4]
        return max(grown, key=lambda s: self.standout(stream, s + 1))

    def other_dims(self, dims, n):
        """Returns the dimensions that are not in dims, in an order that depends on the seed and on n,
        the number of the sequence.
        """
        order = philox(self.seed, 2**32 + n).random_raw(self.d).argsort(kind='stable')
        return order[~np.isin(order, dims)]

    def entries(self, edit, n):
        """Returns the positions, or a slice of all, and the dimensions that an edit changes in evaluated
        sequence n.
        """
        positions, dims = edit.positions, edit.dims
        if edit.own:
            positions, dims = (
                part.tolist() for part in np.divmod(self.own[edit.stream][edit.own, n], self.d)
            )
        if edit.control == 'other':
            positions = [(t + self.T // 2) % self.T for t in positions]
        if edit.control == 'random':
            if positions:
                draws = philox(self.seed, 2**33 + n).random_raw(len(dims))
                positions = (draws % np.uint64(self.T)).tolist()
            dims = self.other_dims(dims, n)[: len(dims)]
        return slice(None) if positions is None else positions, dims

    def touched(self, edit, N):
        """Returns (N, T) bool: the positions that an edit changes in the first N evaluated sequences."""
        if edit.how == 'clip':
            return self.exceeds[edit.stream][list(edit.levels), QUANTILES.index(edit.quantile), :N].any(0)
        mask = np.zeros((N, self.T), bool)
        for n in range(N):
            mask[n, self.entries(edit, n)[0]] = True
        return mask

    def aim(self, edit, sequences):
        """sequences: the numbers of B evaluated ones. Returns the mask of the entries that an edit
        replaces, (B, T, d) bool, and for `moved` the dimension whose change each dimension takes, (B, d),
        else None."""
        mask = np.zeros((len(sequences), self.T, self.d), bool)
        source = np.empty((len(sequences), self.d), np.int64)
        for row, n in enumerate(sequences):
            positions, dims = self.entries(edit, n)
            mask[row, positions, dims] = True
            if edit.control == 'moved':
                source[row] = self.turn(dims, n)
        return torch.from_numpy(mask), torch.from_numpy(source) if edit.control == 'moved' else None

    def turn(self, dims, n):
        """Returns (d,): the dimension whose change each dimension takes. Those of dims are taken by the
        first of the others, which are taken by the next, so that nothing changes in dims, unless they are
        more than half of all."""
        few = sorted(set(dims)) if len(dims) <= self.d // 2 else []
        order = np.append(few, self.other_dims(few, n)).astype(np.int64)
        source = np.empty(self.d, np.int64)
        source[np.roll(order, -max(1, len(few)))] = order
        return source

    def change(self, edit, level, x, mask):
        """x: (B, T or fewer, d), the edit's stream at that level. Returns what the edit makes of it."""
        if edit.how == 'clip':
            limit = self.limit[edit.stream][level, QUANTILES.index(edit.quantile)]
            return x.clamp(-limit, limit)
        T, replacement = x.shape[1], 0.0
        if edit.how == 'mean':
            replacement = self.mean[edit.stream][level, :T]
        if edit.how == 'overall':
            replacement = self.mean[edit.stream][level].mean(0)
        return torch.where(mask[:, :T], replacement, x)


# ---- What is tried


def with_controls(edit, reference, level):
    """Returns {'edit': edit, name: each of its controls}. level: where its entries were chosen.
    Nothing is evaluated that has not come through here."""
    k = reference.k if edit.own else len(edit.dims)
    has_positions = bool(edit.own or edit.positions)
    group = {'edit': edit}
    if 0 < k < reference.d:
        magnitude = reference.magnitude[edit.stream][level]
        order = (magnitude[0] if has_positions else magnitude.mean(0)).argsort(stable=True)
        middle = tuple(order[(reference.d - k) // 2 :][:k].tolist())
        group['random'] = replace(edit, control='random')
        group['median'] = replace(edit, own=0, dims=middle, positions=(0,) * k if has_positions else None)
        if has_positions:
            group['other'] = replace(edit, control='other')
    return {**group, 'moved': replace(edit, control='moved')}


@dataclass
class Trial:
    """An edit with its controls that has yet to be evaluated. said: what its result says of it."""

    said: dict
    group: dict

    def is_one_of(self, where, what, reach):
        return (self.said['where'], self.said['what'], self.said['reach']) == (where, what, reach)


def trial(reference, edit, what, reach, sublayer, chosen_at):
    """sublayer: that whose outlier this is about. chosen_at: the level where the entries were chosen.

    Returns the Trial.
    """
    share = None
    positions = edit.positions or [None] * len(edit.dims)
    entries = [[position, dim] for position, dim in zip(positions, edit.dims)]
    if edit.own:
        entries, share = reference.common(edit.stream, edit.own)
    if what == 'all':
        entries = []
    said = {
        'stream': edit.stream,
        'sublayer': sublayer,
        'where': edit.where,
        'what': what,
        'how': f'clip {edit.quantile}' if edit.how == 'clip' else edit.how,
        'reach': reach,
        'entries': entries,
        'share': share,
        'standout': number(reference.standout(edit.stream, chosen_at)),
    }
    return Trial(said, with_controls(edit, reference, chosen_at))


def stream_trials(reference, stream, s, hows):
    """Returns what is tried on the stream itself, as it leaves sublayer s, and there and after every
    later one.
    """
    S, level, trials = reference.S, s + 1, []
    reaches = {'once': (level,), 'downstream': tuple(range(level, S + 1))}
    here = {'top': (None, ()), **reference.pick(stream, level)}
    replacing = [how for how in hows if how != 'clip']
    for what, how, reach in product(here, replacing, reaches):
        positions, dims = here[what]
        own = level if what == 'top' else 0
        edit = Edit('stream', stream, reaches[reach], how, dims, positions, own)
        trials.append(trial(reference, edit, what, reach, s, level))
    for reach, quantile in product(reaches, QUANTILES if 'clip' in hows else ()):
        edit = Edit('stream', stream, reaches[reach], 'clip', quantile=quantile)
        trials.append(trial(reference, edit, 'all', reach, s, level))
    return trials


def reader_trials(reference, stream, s, hows, has_reads, is_alone):
    """Returns what is kept from those that read the decoded stream: from all sublayers (`reads`) or from
    the head (`decoder`).

    has_reads: whether what sublayers read can be changed. is_alone: whether there is no other stream."""
    S, level, trials = reference.S, s + 1, []
    here, last = reference.pick(stream, level), reference.pick(stream, S)

    def add(where, what, how, chosen_at=level, positions=None, dims=(), quantile=0.0):
        levels, reach = (tuple(range(S)), 'every') if where == 'reads' else ((S,), '')
        if where == 'reads' and not has_reads:
            return
        edit = Edit(where, stream, levels, how, dims, positions, quantile=quantile)
        trials.append(trial(reference, edit, what, reach, s, chosen_at))

    replacing = [how for how in hows if how != 'clip']
    for how in replacing:
        for what, (positions, dims) in here.items():
            add('reads', what, how, level, positions, dims)
            add('decoder', what, how, level, positions, dims)
            if set(last[what][1]) != set(dims):
                add('decoder', f'last {what}', how, S, *last[what])
        if not is_alone:
            add('reads', 'all', how, level, None, tuple(range(reference.d)))
    for where, quantile in product(('reads', 'decoder'), QUANTILES if 'clip' in hows else ()):
        add(where, 'all', 'clip', quantile=quantile)
    return trials


def plan(reference, stream, s, hows, is_decoded, is_alone, has_reads=True):
    """Returns the Trials at sublayer s. is_decoded: is it this stream? is_alone: is there no other?"""
    trials = stream_trials(reference, stream, s, hows)
    if is_decoded:
        trials += reader_trials(reference, stream, s, hows, has_reads, is_alone)
    return trials


def plan_sweep(reference, stream, sublayers):
    """Returns the Trials along the depth: entries zeroed once after every sublayer."""
    tried = [trial for s in sublayers for trial in stream_trials(reference, stream, s, ('zero',))]
    return [trial for what in SWEPT for trial in tried if trial.is_one_of('stream', what, 'once')]


# ---- How it is done


class Editor:
    """Makes one edit in one pass of a model.

    mask, source: what Reference.aim returns.
    added: what `moved` has added to the stream so far. Downstream, each level is to differ by its own change,
        and not by the sum of them all, so that what the levels before have added is taken away first.
    """

    def __init__(self, edit, reference, mask, source):
        self.edit, self.reference, self.mask, self.source = edit, reference, mask, source
        self.added = 0

    def change(self, level, x):
        """x: (B, T, d), the stream at one level of the edit. Returns it changed, in its own precision."""
        return self.changed(level, x.float()).to(x.dtype)

    def changed(self, level, x):
        """As change, in float32."""
        if self.source is None:
            return self.reference.change(self.edit, level, x, self.mask)
        if self.edit.where == 'stream' and level != self.edit.levels[0]:
            x = x - self.added
        change = self.reference.change(self.edit, level, x, self.mask) - x
        self.added = change.gather(-1, self.source[:, None].expand(x.shape))
        return x + self.added

    def after_sublayer(self, s, streams):
        """As measure.hooked calls it."""
        if s + 1 not in self.edit.levels:
            return None
        return {self.edit.stream: self.change(s + 1, streams[self.edit.stream])}

    def before_decoder(self, module, inputs):
        """A forward pre-hook of model.decoder_input_module."""
        return self.change(self.edit.levels[-1], inputs[0])

    def reading(self, read, level):
        """read: the method of a residual operator.

        Returns one that sees the changed stream and leaves the stream itself as it is.
        """

        def changed_read(streams):
            return read({**streams, self.edit.stream: self.change(level, streams[self.edit.stream])})

        return changed_read


def offers_reads(model):
    """Whether what a sublayer reads can be changed apart from the stream. In pretrained models it cannot."""
    return isinstance(model, GPT)


@contextmanager
def edited(model, edit, reference, sequences):
    """While it lasts, the uncompiled model makes the edit. sequences: the numbers of those it is about
    to see.
    """
    device = next(model.parameters()).device
    mask, source = reference.aim(edit, sequences)
    editor = Editor(edit, reference, mask.to(device), None if source is None else source.to(device))
    with ExitStack() as undo:
        if not edit.levels:
            pass
        elif edit.where == 'stream':
            undo.enter_context(hooked(model, editor.after_sublayer))
        elif edit.where == 'decoder':
            undo.enter_context(model.decoder_input_module.register_forward_pre_hook(editor.before_decoder))
        else:
            for level in edit.levels:
                residual = model.sublayers[level].residual
                residual.read = editor.reading(residual.read, level)
                # Without the attribute, the method of the class is seen again.
                undo.callback(delattr, residual, 'read')
        yield


def visit_streams(model, tokens, starts, batch_size, see):
    """Runs the model on the windows at `starts` and calls see(rows, stream, level, x) on every stream at
    every level: rows is a slice of the windows, x is (B, T, d)."""
    device = next(model.parameters()).device
    for i in range(0, len(starts), batch_size):
        idx = tokens.windows(starts[i : i + batch_size])[0].to(device)
        rows = slice(i, i + len(idx))

        def on_streams(s, streams, rows=rows):
            for stream in model.stream_names:
                see(rows, stream, s + 1, streams[stream].float())

        on_streams(-1, model.start(idx))
        with hooked(model, on_streams):
            model(idx)


def states(model, idx):
    """idx: (B, T).

    Returns the streams of a GPT of ours at every level, a list of S + 1 dicts, and the logits.
    """
    seen = [model.start(idx)]
    for sublayer in model.sublayers:
        seen.append(sublayer(seen[-1])[0])
    return seen, model.head(model.decode(seen[-1]))


def logits_from(model, level, streams):
    """streams: of a GPT of ours at that level.

    Returns the logits, without computing again what comes before.
    """
    for sublayer in model.sublayers[level:]:
        streams, _ = sublayer(streams)
    return model.head(model.decode(streams))


def first_level(edit):
    """Returns the level up to which an edit leaves everything as it is."""
    return min((level - (edit.where == 'stream') for level in edit.levels), default=0)


@torch.no_grad()
def evaluate(model, tokens, starts, edits, reference, batch_size, progress=lambda done: None):
    """Returns the loss of every prediction without an edit, (N, T) float32, and {edit: the same with it}.

    progress: called with how many windows have been evaluated, each counted once without and once with
    every edit."""
    device, can_resume = next(model.parameters()).device, isinstance(model, GPT)
    losses = np.zeros((1 + len(edits), len(starts), tokens.block_size), np.float32)
    for i in range(0, len(starts), batch_size):
        idx, targets = (t.to(device) for t in tokens.windows(starts[i : i + batch_size]))
        rows = slice(i, i + len(idx))

        def keep(count, logits, rows=rows, targets=targets):
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none')
            losses[count, rows] = loss.view_as(targets).cpu()
            progress(rows.start * len(losses) + (count + 1) * len(targets))

        before, logits = states(model, idx) if can_resume else (None, model(idx))
        keep(0, logits)
        for count, edit in enumerate(edits, 1):
            with edited(model, edit, reference, range(i, i + len(idx))):
                level = first_level(edit)
                logits = logits_from(model, level, before[level]) if can_resume else model(idx)
            keep(count, logits)
    return losses[0], dict(zip(edits, losses[1:]))
