"""
What do the massive dimensions encode? Probes on a stream of a checkpoint → table, probe.json, probe.png.

    python -m studies.probe --ckpt out/ledger_160m                       every stream, where its outlier is largest and at its last sublayer
    python -m studies.probe --ckpt out/ledger_demo --stream=C --tokens=2048 --seeds=2     less of it, for a CPU

A probe is told some dimensions of a stream after a sublayer, for one token, and asks what the token is. What it is told:
- mean:   the `top` dimensions of largest m_j, the mean magnitude over sequences and tokens, at that sublayer; README's fixed_dim_ratio is of the first;
- start:  the `top` dimensions of largest p_j, the mean magnitude at position 0 (start_ratio);
- random: as many of the other dimensions, drawn anew for each seed;
- all:    the whole stream.

- Linear probes are logistic regressions; the others have one hidden layer. Each is trained a second time on shuffled labels.
- Training and test side share neither a document nor a window: attention would carry one document into the next.
- A dimension is centred on its training median, divided by its interquartile range, and passed through asinh: divided by a standard deviation that
  the start token alone makes large, all other tokens would be one point.
- Balanced accuracy is the mean recall over the classes on the test side, of the class that would be most probable if all were equally frequent
  (its probability over its share of the training side): of 1,024 tokens one is the first, so that accuracy says nothing there.
- A seed draws the split, the tokens (the first of each window before the others), the random dimensions, the first weights and the shuffling.
  Intervals are the smallest and the largest over the seeds: their splits overlap, so that nothing narrower would be honest.

probe.json: {"schema": 1, "checkpoint", "iter_num", "data", "settings", "streams": {stream: [{"sublayer", "kind", "because", "mean_dims", "start_dims", "tasks":
{task: {"classes", "majority", "linear" | "hidden": {"mean" | "start" | "random" | "all": {"accuracy", "shuffled", "selectivity", "balanced",
"balanced_shuffled"}}}}}]}}, each of the last a share as {"value", "low", "high"} over the seeds. Every share is of the test side.
"""

import argparse
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import add_run_arguments, check_run_arguments, open_runs
from data.classes import CLASSES, classify, language_of, structure
from data.loader import UserError, atomic_write, philox
from figures import figure
from measure import Statistics, at_once, collect, command, hooked, number, window_batches

HIDDEN, STEPS = 32, 200  # units of the hidden layer; steps of AdamW on all training tokens at once
ADAMW = {
    'linear': dict(lr=0.1, weight_decay=0),
    'hidden': dict(lr=0.03, weight_decay=0.5),
}  # the rate falls to 0 along a cosine; biases never decay
TEST_SHARE = 0.3  # of the windows, about
POSITIONS = 8  # parts of equal length into which a window's positions fall
SETS = ('mean', 'start', 'random', 'all')
SET_STYLE = {
    'mean': dict(color='#D55E00', marker='o'),
    'start': dict(color='#E69F00', marker='s'),
    'random': dict(color='#999999', marker='v'),
    'all': dict(color='#0072B2', marker='^'),
}  # Okabe and Ito 2008


def label_windows(tokens, starts, bpe, language):
    """Returns {task: (class names, (N, T) int64)}: what the probes ask of every token of the windows at `starts`."""
    T, columns = tokens.block_size, []
    for start in starts:
        idx, targets = tokens.windows([start])
        ids = np.append(idx[0].numpy(), targets[0, -1])
        kind, found = classify(ids, bpe, language), structure(ids, bpe, language)
        columns.append(
            (
                kind[:-1],
                kind[1:],
                *(found[key][:-1] for key in ('line_start', 'bracket_depth', 'inside') if key in found),
            )
        )
    kind, following, line_start, *rest = (np.stack(column).astype(np.int64) for column in zip(*columns))
    position = np.broadcast_to(np.arange(T), kind.shape)
    names, yes_no = CLASSES[language], ('no', 'yes')
    edges = [f'{-(-i * T // POSITIONS)}–{-(-(i + 1) * T // POSITIONS) - 1}' for i in range(POSITIONS)]
    labels = {
        'token class': (names, kind),
        'next token class': (names, following),
        'first of window': (yes_no, (position == 0).astype(np.int64)),
        'position': (edges, position * POSITIONS // T),
        'line start' if rest else 'sentence start': (yes_no, line_start),
    }
    more = {'bracket depth': ('0', '1', '2', '3 or more'), 'inside': ('code', 'string', 'comment')}
    return labels | {task: (names, column) for (task, names), column in zip(more.items(), rest)}


def document_groups(tokens, starts, eot):
    """Returns (N,) int64: windows have the same number if a chain of shared documents joins them. A document ends with its end of text."""
    ends = np.concatenate(
        [
            np.flatnonzero(np.fromfile(path, '<u2', length, offset=offset) == eot) + end - length
            for path, length, offset, end in zip(tokens.paths, tokens.lengths, tokens.offsets, tokens.ends)
        ]
    )
    order = np.argsort(
        starts
    )  # windows do not overlap and documents are contiguous: only neighbours can share one
    first, last = (
        ends.searchsorted(starts[order]),
        ends.searchsorted(starts[order] + tokens.block_size),
    )  # its last token is a label
    groups = np.empty(len(starts), dtype=np.int64)
    groups[order] = np.cumsum(np.append(0, first[1:] > last[:-1]))
    return groups


def split_windows(groups, seed):
    """groups: (N,). Returns (N,) bool, True on the test side: groups in a random order, as long as they leave it near TEST_SHARE."""
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise UserError(
            'all windows belong to one chain of documents, so that no split keeps a document on one side: take other data, or fewer --sequences'
        )
    test, held = np.zeros(len(groups), dtype=bool), 0
    for group in philox(seed, 0).random_raw(len(sizes)).argsort(kind='stable'):
        if held + sizes[group] <= max(TEST_SHARE * len(groups), sizes.min()):
            test |= groups == group
            held += sizes[group]
    return test


def draw_samples(groups, T, seeds, count):
    """Returns train and test, each (S, n) places in (N · T): for each seed tokens of its two sides, three quarters of `count` and one, or what there is.
    They are in random order, but that the first tokens of all windows come before the others."""
    sides = [], []
    for seed in range(seeds):
        test = split_windows(groups, seed)
        for side, drawn in enumerate(sides):
            places = (np.flatnonzero(test == side)[:, None] * T + np.arange(T)).ravel()
            drawn.append(
                places[np.lexsort((philox(seed, 1 + side).random_raw(len(places)), places % T != 0))]
            )
    return [
        np.stack([places[: min(share, *map(len, drawn))] for places in drawn])
        for drawn, share in zip(sides, (count * 3 // 4, count // 4))
    ]


class Probes:
    """Probes for S seeds and H questions at once, on (S, n, f) features. hidden: units of the hidden layer of each, 0 for none.
    Their parameters meet in no product, and the loss is a sum over them, so that each learns as if it were alone."""

    def __init__(self, S, f, sizes, hidden, device):
        """sizes: how many classes each question has."""
        self.H, self.K, self.hidden = len(sizes), max(sizes), hidden
        self.absent = (
            torch.arange(self.K, device=device) >= torch.tensor(sizes, device=device)[:, None]
        )  # (H, K)
        width = self.H * (hidden or self.K)
        std = 1 / math.sqrt(f) if hidden else 0
        first = [
            torch.randn(f, width, generator=torch.Generator().manual_seed(seed)) * std for seed in range(S)
        ]
        self.weights = [torch.stack(first).to(device), torch.zeros(S, 1, width, device=device)]
        if hidden:
            self.weights += [
                torch.zeros(S, self.H, hidden, self.K, device=device),
                torch.zeros(S, self.H, 1, self.K, device=device),
            ]
        for weight in self.weights:
            weight.requires_grad_()

    def logits(self, x):
        """x: (S, n, f). Returns (S, H, n, K), −∞ for classes that a question does not have."""
        y = torch.baddbmm(self.weights[1], x, self.weights[0]).unflatten(-1, (self.H, -1)).transpose(1, 2)
        if self.hidden:
            y = torch.relu(y) @ self.weights[2] + self.weights[3]
        return y.masked_fill(self.absent[:, None], -math.inf)

    def fit(self, x, labels):
        """labels: (S, H, n)."""
        counts = F.one_hot(labels, self.K).sum(2, keepdim=True)  # (S, H, 1, K)
        self.log_share = (counts / labels.shape[2]).log()
        settings = ADAMW['hidden' if self.hidden else 'linear']
        optimizer = torch.optim.AdamW(
            [{'params': self.weights[::2]}, {'params': self.weights[1::2], 'weight_decay': 0}], **settings
        )
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group['lr'] = settings['lr'] * (1 + math.cos(math.pi * step / STEPS)) / 2
            loss = (
                F.cross_entropy(self.logits(x).flatten(0, 2), labels.flatten(), reduction='sum') / x.shape[1]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    @torch.no_grad()
    def predict(self, x):
        """Returns two (S, H, n): the most probable class, and the one that would be if all classes were equally frequent."""
        logits = self.logits(x)
        return logits.argmax(-1), (logits - self.log_share).masked_fill(
            self.log_share.isinf(), -math.inf
        ).argmax(-1)


def standardize(train, test):
    """(S, n, f) and (S, m, f). Returns both with each dimension's median over the training tokens at 0 and its quartiles one apart, through asinh."""
    n = train.shape[1]
    low, median, high = train.sort(1).values[:, [n // 4, n // 2, n * 3 // 4]].unbind(1)
    scale = torch.where(high > low, high - low, 1)[:, None]
    return [torch.asinh((x - median[:, None]) / scale) for x in (train, test)]


def scores(predicted, fair, labels, K):
    """predicted, fair: what Probes.predict returns; labels: (S, H, n). Returns accuracy, balanced accuracy, which is `fair`'s, and the largest
    class's share, each (S, H) float64 numpy."""
    of_class = torch.stack([labels == k for k in range(K)], -1)  # (S, H, n, K)
    held, hit = (
        of_class.sum(2).double(),
        (of_class & (fair == labels)[..., None]).sum(2).double(),
    )  # (S, H, K)
    balanced = torch.where(held > 0, hit / held, 0).sum(-1) / (held > 0).sum(-1)
    return [
        x.cpu().numpy()
        for x in ((predicted == labels).double().mean(-1), balanced, held.max(-1).values / labels.shape[-1])
    ]


def over_seeds(values):
    """values: (S,). Returns their mean with the smallest and the largest."""
    return {'value': number(values.mean()), 'low': number(values.min()), 'high': number(values.max())}


def choose_dims(m, p, top, seeds):
    """m, p: (d,) mean magnitudes, over tokens and at position 0. Returns {set: (S, f) int64} dimensions; ties go to the lowest."""
    mean, start = ((-x).argsort(kind='stable')[:top] for x in (m, p))
    others = np.setdiff1d(np.arange(len(m)), np.union1d(mean, start))
    random = np.stack(
        [
            others[philox(seed, 3).random_raw(len(others)).argsort(kind='stable')[:top]]
            for seed in range(seeds)
        ]
    )
    return {
        'mean': np.tile(mean, (seeds, 1)),
        'start': np.tile(start, (seeds, 1)),
        'random': random,
        'all': np.tile(np.arange(len(m)), (seeds, 1)),
    }


def probe(x, labels, samples, dims):
    """x: (N · T, d), a stream after a sublayer. labels: {task: (names, (N, T))}. samples: train and test, (S, n) places. dims: {set: (S, f)}.
    Returns what probe.json says of each task. A question is a task, then, in the second half, a task with its labels shuffled within each side."""
    device, S = x.device, len(samples[0])
    sizes = [len(names) for names, _ in labels.values()] * 2
    asked = []
    for side, places in enumerate(samples):
        true = np.stack([column.ravel()[places] for _, column in labels.values()], 1)  # (S, tasks, n)
        shuffled = np.stack(
            [
                true[seed][:, philox(seed, 4 + side).random_raw(places.shape[1]).argsort(kind='stable')]
                for seed in range(S)
            ]
        )
        asked.append(torch.from_numpy(np.concatenate([true, shuffled], 1)).to(device))
    places = [torch.from_numpy(side).to(device) for side in samples]
    report = {task: {'classes': list(names)} for task, (names, _) in labels.items()}
    for name, dim in dims.items():
        columns = torch.from_numpy(dim).to(device)
        train, test = standardize(*(x[side[:, :, None], columns[:, None, :]] for side in places))
        for kind, hidden in (('linear', 0), ('hidden', HIDDEN)):
            probes = Probes(S, dim.shape[1], sizes, hidden, device).fit(train, asked[0])
            accuracy, balanced, majority = scores(*probes.predict(test), asked[1], max(sizes))
            for i, task in enumerate(report):
                control = i + len(report)
                report[task]['majority'] = over_seeds(majority[:, i])
                report[task].setdefault(kind, {})[name] = {
                    'accuracy': over_seeds(accuracy[:, i]),
                    'shuffled': over_seeds(accuracy[:, control]),
                    'selectivity': over_seeds(accuracy[:, i] - accuracy[:, control]),
                    'balanced': over_seeds(balanced[:, i]),
                    'balanced_shuffled': over_seeds(balanced[:, control]),
                }
    return report


def choose_sublayers(statistics, stream, asked):
    """Returns {sublayer: why it was chosen}."""
    ratio = statistics.stream(stream)['fixed_dim_ratio'][0]
    if asked != 'auto':
        return {int(asked): 'asked for'}
    peak, last = int(np.where(np.isfinite(ratio), ratio, -np.inf).argmax()), len(ratio) - 1
    return {peak: 'largest fixed-dimension ratio' + ', and the last' * (peak == last)} | (
        {last: 'the last'} if peak != last else {}
    )


@torch.no_grad()
def gather(model, tokens, starts, batch_size, wanted):
    """wanted: a set of (stream, sublayer). Returns {(stream, sublayer): (N · T, d) float32} over the windows at `starts`."""
    parts = {key: [] for key in wanted}

    def on_streams(s, streams):
        for name, x in streams.items():
            if (name, s) in parts:
                parts[name, s].append(x.flatten(0, 1).float())

    with hooked(model, on_streams):
        for i in range(0, len(starts), batch_size):
            model(tokens.windows(starts[i : i + batch_size])[0].to(next(model.parameters()).device))
    return {key: torch.cat(part) for key, part in parts.items()}


def probe_run(run, args):
    """Returns what probe.json holds of one checkpoint."""
    model, tokens, path = run.model, run.tokens, run.path
    names, d, T = model.stream_names, model.n_embd, tokens.block_size
    if args.stream not in (*names, 'all'):
        raise UserError(
            f'--stream={args.stream}, but {path} has {", ".join(names)}: name one of them, or all'
        )
    if args.sublayer != 'auto' and not (
        args.sublayer.isdecimal() and int(args.sublayer) < len(model.sublayers)
    ):
        raise UserError(
            f'--sublayer={args.sublayer}, but the sublayers of {path} are 0 to {len(model.sublayers) - 1}: name one of them, or auto'
        )
    if 3 * args.top > d:
        raise UserError(
            f'--top={args.top}, but {path} has {d} dimensions: ask for at most {d // 3}, so that as many random ones are left'
        )
    folder, starts = tokens.path.parent, tokens.fixed_starts(args.sequences)
    language = language_of(run.meta if 'source' in run.meta else folder)
    groups = document_groups(tokens, starts, run.meta['eot'])
    samples = draw_samples(groups, T, args.seeds, args.tokens)
    labels = label_windows(tokens, starts, run.encoding, language)
    batch_size = at_once(args.device, T)
    statistics = collect(model, window_batches(tokens, starts, batch_size), Statistics(topk=1))
    chosen = {
        name: choose_sublayers(statistics, name, args.sublayer)
        for name in names
        if args.stream in (name, 'all')
    }
    features = gather(
        model,
        tokens,
        starts,
        batch_size,
        {(name, s) for name, sublayers in chosen.items() for s in sublayers},
    )
    streams = {name: [] for name in chosen}
    for name, sublayers in chosen.items():
        for s, why in sublayers.items():
            dims = choose_dims(
                *(statistics.mean((name, s, part))[0] for part in ('magnitude', 'start')),
                args.top,
                args.seeds,
            )
            streams[name].append(
                {
                    'sublayer': s,
                    'kind': model.sublayers[s].kind,
                    'because': why,
                    'mean_dims': dims['mean'][0].tolist(),
                    'start_dims': dims['start'][0].tolist(),
                    'tasks': probe(features.pop((name, s)), labels, samples, dims),
                }
            )
    return {
        'schema': 1,
        'checkpoint': str(path),
        'iter_num': run.iter_num,
        'data': {
            **run.data,
            'language': language,
            'sequences': len(starts),
            'block_size': T,
            'seed': 0,
            'document_groups': int(groups.max()) + 1,
            'train_tokens': samples[0].shape[1],
            'test_tokens': samples[1].shape[1],
        },
        'settings': {'top': args.top, 'seeds': args.seeds, 'hidden': HIDDEN, 'steps': STEPS, 'adamw': ADAMW},
        'streams': streams,
    }


def print_run(name, report):
    """A block for each stream and sublayer, two lines a task, four columns of what the probe is told."""
    data, settings = report['data'], report['settings']
    print(
        f'\n{name}, iteration {report["iter_num"]}: {data["train_tokens"]} tokens to train on and {data["test_tokens"]} to test on, '
        f'of {data["sequences"]} windows\nin {data["document_groups"]} groups that share no document, {data["name"]} {data["split"]}; {settings["seeds"]} seeds. In %: '
        'accuracy ± half its range over the seeds,\n± accuracy above shuffled labels, balanced accuracy. Majority: accuracy of the largest class'
    )
    for stream, places in report['streams'].items():
        for place in places:
            print(
                f'\n{stream} after {place["kind"]} {place["sublayer"]} ({place["because"]}); dimensions: mean {place["mean_dims"]}\nstart {place["start_dims"]}'
            )
            print(f'{"majority":>29}' + ''.join(f'{title:>20}' for title in SETS))
            for task, t in place['tasks'].items():
                for kind in ('linear', 'hidden'):
                    row = (
                        f'{task:16} linear{100 * t["majority"]["value"]:6.1f}'
                        if kind == 'linear'
                        else f'{"hidden":>23}{"":6}'
                    )
                    for told in SETS:
                        q = t[kind][told]
                        half = 50 * (q['accuracy']['high'] - q['accuracy']['low'])
                        row += f'{100 * q["accuracy"]["value"]:.1f}±{half:.{int(half < 10)}f}{100 * q["selectivity"]["value"]:+6.1f}{100 * q["balanced"]["value"]:4.0f}'.rjust(
                            20
                        )
                    print(row)


def draw(name, report, path):
    """A panel for each stream and sublayer: balanced accuracy in every task, for what the probe is told; bars from the smallest to the largest over the seeds."""
    panels = [(stream, place) for stream, places in report['streams'].items() for place in places]
    top = report['settings']['top']
    with figure(
        path,
        f'{name}, iteration {report["iter_num"]}: what probes read from a stream\n'
        f'mean, start: the {top} largest dimensions over all tokens or at position 0; random: {top} others; all: every one',
        len(panels),
        1,
        (10, 3),
    ) as axes:
        for axis, (stream, place) in zip(axes, panels):
            for i, told in enumerate(SETS):
                for kind, shift in (('linear', -0.045), ('hidden', 0.045)):
                    rows = [t[kind][told] for t in place['tasks'].values()]
                    x = np.arange(len(rows)) + (i - 1.5) * 0.2 + shift
                    value, low, high = (
                        100 * np.array([q['balanced'][key] for q in rows]) for key in ('value', 'low', 'high')
                    )
                    axis.errorbar(
                        x,
                        value,
                        (value - low, high - value),
                        linestyle='',
                        markersize=5,
                        linewidth=1,
                        **SET_STYLE[told],
                        markerfacecolor=SET_STYLE[told]['color'] if kind == 'linear' else 'white',
                        label=f'{told}, {kind}',
                    )
                    axis.hlines(
                        [100 * q['balanced_shuffled']['value'] for q in rows],
                        x - 0.045,
                        x + 0.045,
                        color='#000000',
                        linewidth=1.2,
                        label='shuffled labels' if (i, kind) == (3, 'hidden') else None,
                    )
            axis.hlines(
                [100 / len(t['classes']) for t in place['tasks'].values()],
                np.arange(len(rows)) - 0.45,
                np.arange(len(rows)) + 0.45,
                color='#CC79A7',
                linestyle='--',
                linewidth=1,
                zorder=1,
                label='chance: 1 ÷ number of classes',
            )
            axis.set(
                title=f'{stream} after {place["kind"]} {place["sublayer"]} ({place["because"]})',
                ylabel='balanced accuracy (%)',
                ylim=(0, 105),
            )
            axis.set_xticks(range(len(place['tasks'])), list(place['tasks']))
            axis.grid(alpha=0.3, axis='y')
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, fontsize='small'
        )


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, sequences=128, writes='probe.json and the figure')
    parser.add_argument('--stream', default='all', help='h, D, C, or all (default)')
    parser.add_argument(
        '--sublayer',
        default='auto',
        help='0 to 2 · n_layer − 1; auto (default): where the fixed-dimension ratio is largest, and the last',
    )
    parser.add_argument(
        '--top',
        type=int,
        default=4,
        help='how many dimensions of largest magnitude a probe is told (default 4)',
    )
    parser.add_argument(
        '--tokens',
        type=int,
        default=16384,
        help='tokens a seed draws from them, a quarter of them to test on (default 16384)',
    )
    parser.add_argument('--seeds', type=int, default=5, help='how often to draw and train (default 5)')
    args = parser.parse_args(argv)
    check_run_arguments(args, top=1, sequences=2, tokens=64, seeds=1)
    return args


def run(argv):
    args = parse_arguments(argv)
    for run in open_runs(args):
        out, suffix, name = run.out, run.suffix, run.name
        report = probe_run(run, args)
        with atomic_write(out / f'probe{suffix}.json', 'w') as file:
            json.dump(report, file, indent=1)
        draw(name, report, out / f'probe{suffix}.png')
        print_run(name, report)
        print(f'written: {os.path.relpath(out)}/probe{suffix}.json, probe{suffix}.png')


def main(argv=None):
    command(run, argv, 'these probes: use fewer --sequences or --tokens, or --device=cpu')


if __name__ == '__main__':
    main()
