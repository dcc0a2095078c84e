"""
Statistics of a residual stream: magnitudes → sums over sequences, one for each replicate of a bootstrap.

measure.py's first lines define every quantity. This file knows no model: any (B, T, d) tensor can be added.
"""

import math

import numpy as np
import torch

from data.loader import philox

# what sequence_statistics returns of every sequence, before top1, top2, …
VALUES = ('median', 'max_over_median', 'massive_count', 'kurtosis', 'norm', 'norm_at_start', 'top1_at_start')


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
