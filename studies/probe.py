"""
What do the massive dimensions encode? Probes on a stream of a checkpoint → table, probe.json, probe.png.

    python -m studies.probe --ckpt out/ledger_160m
        every stream, where its outlier is largest and after its last sublayer
    python -m studies.probe --ckpt out/ledger_demo --stream=C --tokens=2048 --seeds=2
        less of it, for a CPU

A probe is told the values that some dimensions of a stream have after a sublayer, for one token, and asks
what the token is. What it is told:
- mean:   the `top` dimensions of largest m_j, the mean magnitude over sequences and tokens, at that
          sublayer (the fixed-dimension ratio is that of the first);
- start:  the `top` dimensions of largest p_j, the mean magnitude at position 0 (the start ratio is that of
          the first);
- random: as many of the other dimensions, drawn anew for each seed;
- all:    the whole stream.

What it asks, for Python source: the class of the token and of the next one, its place in the window,
whether it starts a line, how many brackets are open, whether it is code, string or comment. For English:
the same classes and places; whether it starts or ends a sentence or starts a paragraph; how many words of
its sentence stand before it; whether its word is capitalized. The class tells numbers, punctuation,
function and content words apart. data/classes.py says how.

- Linear probes are logistic regressions; the others have one hidden layer. Each is trained a second time on
  shuffled labels.
- Training and test side share neither a document nor a window, because attention would carry one document
  into the next.
- A dimension is centred on its training median, divided by its interquartile range, and passed through
  asinh. If it were divided by a standard deviation, which the start token alone makes large, all other
  tokens would be one point.
- Balanced accuracy is the mean recall over the classes on the test side, where a probe names the class that
  would be most probable if all were equally frequent (its probability over its share of the training side).
  Of 1,024 tokens one is the first, so that accuracy says nothing there.
- A seed draws the split, the tokens (the first of each window before the others), the random dimensions,
  the first weights and the shuffling. Intervals are the smallest and the largest over the seeds: their
  splits overlap, so that nothing narrower would be honest.

probe.json:
    {"schema": 1, "checkpoint", "iter_num", "data", "settings", "streams": {stream: [place]}}
    place: {"sublayer", "kind", "because", "mean_dims", "start_dims", "tasks": {task: {"classes", "majority",
            "linear" | "hidden": {"mean" | "start" | "random" | "all": scores}}}}
    scores: {"accuracy", "shuffled", "selectivity", "balanced", "balanced_shuffled"}
Majority and scores are shares of the test side as {"value", "low", "high"} over the seeds.
"""

import json
import math
import os
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import check_run_arguments, open_runs, run_parser
from data.classes import CLASSES, describe, language_of
from data.loader import UserError, atomic_write, philox
from data.progress import Progress
from measure import Statistics, collect, command, hooked, number, sequences_at_once, window_batches
from studies.probe_report import SETS, draw, print_run

HIDDEN = 32  # units of the hidden layer
STEPS = 200  # of AdamW, on all training tokens at once
# The rate falls to 0 along a cosine. Biases never decay.
ADAMW = {'linear': dict(lr=0.1, weight_decay=0), 'hidden': dict(lr=0.03, weight_decay=0.5)}
KINDS = {'linear': 0, 'hidden': HIDDEN}
TEST_SHARE = 0.3  # of the windows, about
POSITIONS = 8  # parts of equal length into which a window's positions fall
# Into these fall the words of a sentence, by how many stand before them.
WORD_EDGES, WORD_PARTS = (1, 2, 4, 8, 16), ('0', '1', '2–3', '4–7', '8–15', '16–')


def label_windows(tokens, starts, encoding, language):
    """Returns {task: (class names, (N, T) int64)}: what the probes ask of every token of the windows at
    `starts`.
    """
    kind, found = describe(tokens, starts, encoding, language)
    found = {name: column[:, :-1].astype(np.int64) for name, column in found.items()}
    T = tokens.block_size
    position = np.broadcast_to(np.arange(T), (len(starts), T))
    firsts = [math.ceil(i * T / POSITIONS) for i in range(POSITIONS + 1)]
    parts = [f'{first}–{following - 1}' for first, following in zip(firsts, firsts[1:])]
    names, yes_no = CLASSES[language], ('no', 'yes')
    labels = {
        'token class': (names, kind[:, :-1]),
        'next token class': (names, kind[:, 1:]),
        'first of window': (yes_no, (position == 0).astype(np.int64)),
        'position': (parts, position * POSITIONS // T),
    }
    if language == 'python':
        labels['line start'] = (yes_no, found['line_start'])
        labels['bracket depth'] = (('0', '1', '2', '3 or more'), found['bracket_depth'])
        labels['inside'] = (('code', 'string', 'comment'), found['inside'])
        return labels
    word = np.searchsorted(WORD_EDGES, found['word_in_sentence'], 'right')
    return {
        **labels,
        'sentence start': (yes_no, found['sentence_start']),
        'sentence end': (yes_no, found['sentence_end']),
        'paragraph start': (yes_no, found['paragraph_start']),
        'word in sentence': (WORD_PARTS, word),
        'capitalized': (yes_no, found['capitalized']),
    }


def document_ends(tokens, end_of_text):
    """Returns the places at which documents end, counted through all files: end-of-text tokens, or the
    ends of text files.
    """
    if hasattr(tokens, 'ids'):
        return np.array(tokens.ends) - 1
    ends = []
    for path, length, offset, end in zip(tokens.paths, tokens.lengths, tokens.offsets, tokens.ends):
        ids = np.fromfile(path, '<u2', length, offset=offset)
        ends.append(np.flatnonzero(ids == end_of_text) + end - length)
    return np.concatenate(ends)


def document_groups(tokens, starts, end_of_text):
    """Returns (N,) int64: windows have the same number if a chain of shared documents joins them."""
    ends = document_ends(tokens, end_of_text)
    # Windows do not overlap and documents are contiguous, so that only neighbours can share one.
    order = np.argsort(starts)
    first_document = ends.searchsorted(starts[order])
    # The token after the window is a label of its last one.
    last_document = ends.searchsorted(starts[order] + tokens.block_size)
    begins_group = first_document[1:] > last_document[:-1]
    groups = np.empty(len(starts), dtype=np.int64)
    groups[order] = np.cumsum(np.append(0, begins_group))
    return groups


def split_windows(groups, seed):
    """groups: (N,).

    Returns (N,) bool, True on the test side: groups in a random order, as long as they leave it near
    TEST_SHARE.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise UserError(
            'all windows belong to one chain of documents, so that no split keeps a document on one side: '
            'take other data, or fewer --sequences'
        )
    test, held = np.zeros(len(groups), dtype=bool), 0
    for group in philox(seed, 0).random_raw(len(sizes)).argsort(kind='stable'):
        if held + sizes[group] <= max(TEST_SHARE * len(groups), sizes.min()):
            test |= groups == group
            held += sizes[group]
    return test


def draw_tokens(windows, T, seed, stream):
    """windows: (n,) their numbers.

    Returns (n · T,) places in (N · T), in random order but for the first tokens of all windows, which come
    first.
    """
    places = (windows[:, None] * T + np.arange(T)).ravel()
    is_not_first = places % T != 0
    return places[np.lexsort((philox(seed, stream).random_raw(len(places)), is_not_first))]


def draw_samples(groups, T, seeds, count):
    """Returns train and test, each (S, n) places in (N · T): for each seed tokens of its two sides,
    three quarters of `count` and one, or what there is.
    """
    train, test = [], []
    for seed in range(seeds):
        on_test = split_windows(groups, seed)
        train.append(draw_tokens(np.flatnonzero(~on_test), T, seed, 1))
        test.append(draw_tokens(np.flatnonzero(on_test), T, seed, 2))

    def cut(drawn, wanted):
        n = min(wanted, *map(len, drawn))
        return np.stack([places[:n] for places in drawn])

    return [cut(train, count * 3 // 4), cut(test, count // 4)]


class Probes:
    """Probes for S seeds and H questions at once, on (S, n, f) features.

    Their parameters meet in no product, and the loss is a sum over them, so that each learns as if it were
    alone.
    """

    def __init__(self, S, f, sizes, hidden, device):
        """sizes: how many classes each question has. hidden: units of the hidden layer of each, 0 for
        none.
        """
        self.H, self.K, self.hidden = len(sizes), max(sizes), hidden
        classes = torch.arange(self.K, device=device)
        self.absent = classes >= torch.tensor(sizes, device=device)[:, None]  # (H, K)
        width = self.H * (hidden or self.K)
        std = 1 / math.sqrt(f) if hidden else 0
        first = [
            torch.randn(f, width, generator=torch.Generator().manual_seed(seed)) * std for seed in range(S)
        ]
        self.weights = [torch.stack(first).to(device), torch.zeros(S, 1, width, device=device)]
        if hidden:
            self.weights.append(torch.zeros(S, self.H, hidden, self.K, device=device))
            self.weights.append(torch.zeros(S, self.H, 1, self.K, device=device))
        for weight in self.weights:
            weight.requires_grad_()

    def logits(self, x):
        """x: (S, n, f). Returns (S, H, n, K), −∞ for classes that a question does not have."""
        y = torch.baddbmm(self.weights[1], x, self.weights[0]).unflatten(-1, (self.H, -1)).transpose(1, 2)
        if self.hidden:
            y = torch.relu(y) @ self.weights[2] + self.weights[3]
        return y.masked_fill(self.absent[:, None], -math.inf)

    def fit(self, x, labels, after_step=lambda: None):
        """x: (S, n, f). labels: (S, H, n). Trains the probes and returns them."""
        counts = F.one_hot(labels, self.K).sum(2, keepdim=True)  # (S, H, 1, K)
        self.log_share = (counts / labels.shape[2]).log()
        settings = ADAMW['hidden' if self.hidden else 'linear']
        matrices, biases = self.weights[::2], self.weights[1::2]
        optimizer = torch.optim.AdamW(
            [{'params': matrices}, {'params': biases, 'weight_decay': 0}], **settings
        )
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group['lr'] = settings['lr'] * (1 + math.cos(math.pi * step / STEPS)) / 2
            losses = F.cross_entropy(self.logits(x).flatten(0, 2), labels.flatten(), reduction='sum')
            loss = losses / x.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
        return self

    @torch.no_grad()
    def predict(self, x):
        """Returns two (S, H, n): the most probable class, and the one that would be if all classes were
        equally frequent.
        """
        logits = self.logits(x)
        fair = (logits - self.log_share).masked_fill(self.log_share.isinf(), -math.inf)
        return logits.argmax(-1), fair.argmax(-1)


def standardize(train, test):
    """(S, n, f) and (S, m, f).

    Returns both with each dimension's median over the training tokens at 0 and its quartiles one apart,
    through asinh.
    """
    n = train.shape[1]
    low, median, high = train.sort(1).values[:, [n // 4, n // 2, n * 3 // 4]].unbind(1)
    scale = torch.where(high > low, high - low, 1)[:, None]
    return [torch.asinh((x - median[:, None]) / scale) for x in (train, test)]


def scores(predicted, fair, labels, K):
    """predicted, fair: what Probes.predict returns. labels: (S, H, n).

    Returns accuracy, balanced accuracy, which is that of `fair`, and the share of the largest class, each
    (S, H) float64 numpy."""
    is_class = torch.stack([labels == k for k in range(K)], -1)  # (S, H, n, K)
    held = is_class.sum(2).double()  # (S, H, K)
    hit = (is_class & (fair == labels)[..., None]).sum(2).double()
    balanced = torch.where(held > 0, hit / held, 0).sum(-1) / (held > 0).sum(-1)
    accuracy = (predicted == labels).double().mean(-1)
    majority = held.max(-1).values / labels.shape[-1]
    return [x.cpu().numpy() for x in (accuracy, balanced, majority)]


def over_seeds(values):
    """values: (S,). Returns their mean with the smallest and the largest."""
    return {'value': number(values.mean()), 'low': number(values.min()), 'high': number(values.max())}


def choose_dims(m, p, top, seeds):
    """m, p: (d,) mean magnitudes, over tokens and at position 0.

    Returns {set: (S, f) int64} dimensions; ties go to the lowest.
    """
    mean, start = ((-x).argsort(kind='stable')[:top] for x in (m, p))
    others = np.setdiff1d(np.arange(len(m)), np.union1d(mean, start))
    orders = [philox(seed, 3).random_raw(len(others)).argsort(kind='stable') for seed in range(seeds)]
    return {
        'mean': np.tile(mean, (seeds, 1)),
        'start': np.tile(start, (seeds, 1)),
        'random': np.stack([others[order[:top]] for order in orders]),
        'all': np.tile(np.arange(len(m)), (seeds, 1)),
    }


def ask(labels, places, stream):
    """labels: {task: (names, (N, T))}. places: (S, n) of one side.

    Returns (S, 2 · tasks, n): the labels of every task there, and then those of every task shuffled.
    stream: of the shuffling."""
    S, n = places.shape
    true = np.stack([column.ravel()[places] for _, column in labels.values()], 1)
    orders = [philox(seed, stream).random_raw(n).argsort(kind='stable') for seed in range(S)]
    shuffled = np.stack([true[seed][:, order] for seed, order in enumerate(orders)])
    return np.concatenate([true, shuffled], 1)


def probe(x, labels, samples, dims, after_step=lambda: None):
    """x: (N · T, d), a stream after a sublayer. labels: {task: (names, (N, T))}. samples: train and test,
    (S, n) places. dims: {set: (S, f)}.

    Returns what probe.json says of each task. after_step: called after every step of training, of which
    there are STEPS for each set and kind."""
    device, S = x.device, len(samples[0])
    places = [torch.from_numpy(side).to(device) for side in samples]
    questions = [torch.from_numpy(ask(labels, side, 4 + i)).to(device) for i, side in enumerate(samples)]
    sizes = [len(names) for names, _ in labels.values()] * 2
    report = {task: {'classes': list(names)} for task, (names, _) in labels.items()}
    for name, dim in dims.items():
        columns = torch.from_numpy(dim).to(device)
        told = [x[side[:, :, None], columns[:, None, :]] for side in places]
        train, test = standardize(*told)
        for kind, hidden in KINDS.items():
            probes = Probes(S, dim.shape[1], sizes, hidden, device).fit(train, questions[0], after_step)
            accuracy, balanced, majority = scores(*probes.predict(test), questions[1], max(sizes))
            for i, task in enumerate(report):
                shuffled = i + len(report)
                report[task]['majority'] = over_seeds(majority[:, i])
                report[task].setdefault(kind, {})[name] = {
                    'accuracy': over_seeds(accuracy[:, i]),
                    'shuffled': over_seeds(accuracy[:, shuffled]),
                    'selectivity': over_seeds(accuracy[:, i] - accuracy[:, shuffled]),
                    'balanced': over_seeds(balanced[:, i]),
                    'balanced_shuffled': over_seeds(balanced[:, shuffled]),
                }
    return report


def choose_sublayers(statistics, stream, asked):
    """Returns {sublayer: why it was chosen}."""
    if asked != 'auto':
        return {int(asked): 'asked for'}
    ratio = statistics.stream(stream)['fixed_dim_ratio'][0]
    last = len(ratio) - 1
    peak = int(np.where(np.isfinite(ratio), ratio, -np.inf).argmax())
    if peak == last:
        return {last: 'largest fixed-dimension ratio, and the last'}
    return {peak: 'largest fixed-dimension ratio', last: 'the last'}


@torch.no_grad()
def gather(model, tokens, starts, batch_size, wanted):
    """wanted: pairs of a stream and a sublayer.

    Returns {(stream, sublayer): (N · T, d) float32} over the windows at `starts`.
    """
    parts = {key: [] for key in wanted}

    def on_streams(s, streams):
        for name, x in streams.items():
            if (name, s) in parts:
                parts[name, s].append(x.flatten(0, 1).float())

    device = next(model.parameters()).device
    with hooked(model, on_streams):
        for idx, _ in window_batches(tokens, starts, batch_size):
            model(idx.to(device))
    return {key: torch.cat(part) for key, part in parts.items()}


def check(run, args):
    """Refuses what cannot be probed in this run."""
    names, d, S = run.model.stream_names, run.model.n_embd, len(run.model.sublayers)
    if args.stream not in (*names, 'all'):
        raise UserError(
            f'--stream={args.stream}, but {run.path} has {", ".join(names)}: name one of them, or all'
        )
    is_sublayer = args.sublayer.isdecimal() and int(args.sublayer) < S
    if args.sublayer != 'auto' and not is_sublayer:
        raise UserError(
            f'--sublayer={args.sublayer}, but the sublayers of {run.path} are 0 to {S - 1}: '
            'name one of them, or auto'
        )
    if 3 * args.top > d:
        raise UserError(
            f'--top={args.top}, but {run.path} has {d} dimensions: '
            f'ask for at most {d // 3}, so that as many random ones are left'
        )


def probe_run(run, args):
    """Returns what probe.json holds of an open run."""
    check(run, args)
    model, tokens, T = run.model, run.tokens, run.tokens.block_size
    starts = tokens.fixed_starts(args.sequences, args.seed)
    language = language_of(run.meta, tokens)
    groups = document_groups(tokens, starts, run.meta['eot'])
    samples = draw_samples(groups, T, args.seeds, args.tokens)
    labels = label_windows(tokens, starts, run.encoding, language)

    batch_size = sequences_at_once(model, args.device, T)
    statistics = collect(model, window_batches(tokens, starts, batch_size), Statistics(topk=1))
    names = [name for name in model.stream_names if args.stream in (name, 'all')]
    chosen = {
        (name, s): why
        for name in names
        for s, why in choose_sublayers(statistics, name, args.sublayer).items()
    }
    features = gather(model, tokens, starts, batch_size, chosen)

    streams = {name: [] for name in names}
    steps = len(chosen) * len(SETS) * len(KINDS) * STEPS
    done = count(1)
    with Progress(f'probing {run.name}:', steps, 'steps') as progress:
        for (name, s), why in chosen.items():
            m, p = (statistics.mean((name, s, part))[0] for part in ('magnitude', 'start'))
            dims = choose_dims(m, p, args.top, args.seeds)
            streams[name].append(
                {
                    'sublayer': s,
                    'kind': model.sublayers[s].kind,
                    'because': why,
                    'mean_dims': dims['mean'][0].tolist(),
                    'start_dims': dims['start'][0].tolist(),
                    'tasks': probe(
                        features.pop((name, s)), labels, samples, dims, lambda: progress.show(next(done))
                    ),
                }
            )
    return {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'data': {
            **run.data,
            'language': language,
            'sequences': len(starts),
            'block_size': T,
            'seed': args.seed,
            'document_groups': int(groups.max()) + 1,
            'train_tokens': samples[0].shape[1],
            'test_tokens': samples[1].shape[1],
        },
        'settings': {'top': args.top, 'seeds': args.seeds, 'hidden': HIDDEN, 'steps': STEPS, 'adamw': ADAMW},
        'streams': streams,
    }


def parse_arguments(argv):
    parser = run_parser(__doc__, sequences=128, writes='probe.json and the figure')
    parser.add_argument('--stream', default='all', help='h, D, C, or all (default)')
    parser.add_argument(
        '--sublayer',
        default='auto',
        help='a number; or auto (default): where the fixed-dimension ratio is largest, and the last',
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
        help='tokens a seed draws from the windows, a quarter of them to test on (default 16384)',
    )
    parser.add_argument('--seeds', type=int, default=5, help='how often to draw and train (default 5)')
    args = parser.parse_args(argv)
    check_run_arguments(args, top=1, sequences=2, tokens=64, seeds=1)
    return args


def probe_all(argv):
    args = parse_arguments(argv)
    for run in open_runs(args):
        report = probe_run(run, args)
        with atomic_write(run.out / f'probe{run.suffix}.json', 'w') as file:
            json.dump(report, file, indent=1)
        draw(run.name, report, run.out / f'probe{run.suffix}.png')
        print_run(run.name, report)
        print(f'written: {os.path.relpath(run.out)}/probe{run.suffix}.json, probe{run.suffix}.png')


def main(argv=None):
    command(probe_all, argv, 'these probes: use fewer --sequences or --tokens, or --device=cpu')


if __name__ == '__main__':
    main()
