"""
What is the outlier for? Changes the massive entries of a model's streams, and sees what the losses say →
table, intervene.json, figures.

    python -m studies.intervene --ckpt out/ledger_160m
        every stream, at the sublayer where its outlier stands out most, and of the decoded one what the head
        and sublayers read
    python -m studies.intervene --ckpt out/ledger_160m --stream=C --sublayer=3 --how=zero --top=1

What is changed (`what`):
- top: each sequence's own largest entries in the unedited stream, measure.py's top-k;
- start: the dimensions that are largest at position 0, there;
- dims: the dimensions of largest mean over positions, at every position;
- last start, last dims: those of the last sublayer;
- all: the whole stream.
All but `top` is fixed, and chosen on windows that are not evaluated. Means and quantiles of magnitudes are
estimated on these as well.

Where it is changed:
- stream: as it leaves the sublayer, there only (`once`) or there and after every later one (`downstream`);
- reads: kept from the input of every sublayer, while the stream itself is untouched (for C that is λ ⊙ C);
- decoder: kept from the head alone.

How it is changed:
- zero;
- mean: to the mean over sequences of that entry, at that sublayer and position (Sun et al. 2024, §4);
- overall: to the mean over sequences and positions of that dimension, at that sublayer;
- clip q: all magnitudes are limited to their q-quantile there.

Every result has its controls, run on the same sequences:
- random: as many other dimensions at other positions, drawn anew for each sequence;
- median: as many start-token entries (or dimensions) of median magnitude;
- other: the same dimensions half a window away;
- moved: the very change made in other dimensions of the same token, as large in norm, downstream too. But
  to zero a massive entry lowers the token's RMS and to move the change raises it, so that `moved` does not
  rule out an effect of size. For that, `mean` beside `zero` on the same entries is the closer control.
What changes a whole stream has `moved` alone, which changes as many entries by as much.

A ratio is exp(mean loss after − before), with 95% intervals from a bootstrap over sequences, pairs kept,
where there are at least 5. Changes of loss, in nats, are also given for the predictions at edited positions
and at later ones that are not edited; those before an edit cannot change. Of `clip`, edited is what exceeds
the limit in the unedited streams. What changes every position has no later ones.

Pretrained models offer no `reads`, and of attention their sinks alone.

intervene.json:
    {schema, checkpoint, iter_num, model, data, evaluations, loss: {value, low, high}, perplexity,
     sweep: [result], results: [result],
     before: {breakdown: {label: {share, sequences: how many have it, loss}}},
     attention: {sequences, unedited: heads, edits: [{stream, what, …, heads, control: heads}],
                 constancy: {position: {constancy: 0 to 1, norm: root mean square, by_layer}}},
     samples: [{prompt, unedited, edits: [{stream, what, …, text, control}]}]}
    heads: {sink: the mean probability of position 0, by_layer}
    The control of attention and samples is `moved`.
    result: {stream, sublayer, where, what, how, reach, entries: [[position or null, dimension]], share,
             standout, edit: outcome, controls: {name: outcome}}
             entries of `top` are the most frequent; share is that of the sequences with the first, or null
    outcome: {loss, perplexity, ratio, edited, later: {value, low, high} or null,
              by: {breakdown: {label: [change of loss, low, high]}}}
Breakdowns are the class of the predicted token and its since_line, in English its place in the sentence,
the position of the input, and carrier (the class of the token that carries the first entry). They are left
out of the sweep.

Sources: Sun et al. 2024, arXiv 2402.17762 (interventions, implicit bias); Gu et al. 2025, arXiv 2410.10781
(sink metric).
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint import check_run_arguments, open_runs, run_parser
from data.classes import CLASSES, describe, language_of
from data.loader import UserError, atomic_write, encoding
from data.progress import Progress
from measure import (
    REPLICATES,
    Statistics,
    bootstrap_weights,
    command,
    hooked,
    interval,
    number,
    sequences_at_once,
    window_batches,
)
from model import GPT
from studies.edits import NOTHING, Reference, edited, evaluate, offers_reads, plan, plan_sweep
from studies.intervene_report import draw_classes, draw_ratios, is_detailed, print_all, print_summary

# Windows beside the evaluated ones, for entries, means and quantiles; and the fewest that will do.
CALIBRATION, ENOUGH = 128, 8
FEW = 5  # sequences below which there is no interval
PROMPTS, NEW_TOKENS = 3, 40  # continuations
EVERY_HOW = ('zero', 'mean', 'overall', 'clip')
HOWS = {**{how: (how,) for how in EVERY_HOW}, 'all': EVERY_HOW}
TOKENS_AT_ONCE = {'cpu': 4096, 'cuda': 8192}
# Positions, and tokens since a line end, fall into these.
EDGES = (1, 2, 8, 32, 128, 512)
BUCKETS = ('0', '1', '2–7', '8–31', '32–127', '128–511', '512–')
PLACES = ('within', 'end', 'start', 'start of paragraph')  # of a sentence


# ---- What comes of it


def mean_with_interval(weights, values, mask, scale=lambda means: means):
    """weights: (R, N) of the bootstrap. values: (N, T). mask: (N, T) bool, those that count.

    Returns {value, low, high} of scale(their mean), over the replicates that have drawn any; low and high
    are None where fewer than FEW sequences bear on it. None if nothing counts."""
    counts, totals = weights @ mask.sum(1), weights @ (values * mask).sum(1)
    if not counts[0]:
        return None
    drawn = counts > 0
    found = interval(scale(totals[drawn] / counts[drawn]))
    if mask.any(1).sum() < FEW:
        found |= {'low': None, 'high': None}
    return found


def outcome(before, after, is_edited, weights, labels):
    """before, after: (N, T) losses. is_edited: (N, T) bool. labels: {breakdown: ((N, T) places, names)}."""
    change, loss = after.astype(np.float64) - before, after.mean(dtype=np.float64)
    is_later = ~is_edited & np.logical_or.accumulate(is_edited, 1)

    def change_by(places, names):
        return {
            names[i]: list(mean_with_interval(weights, change, places == i).values())
            for i in np.unique(places)
        }

    return {
        'loss': number(loss),
        'perplexity': number(np.exp(loss)),
        'ratio': mean_with_interval(weights, change, np.ones_like(is_edited), np.exp),
        'edited': mean_with_interval(weights, change, is_edited),
        'later': mean_with_interval(weights, change, is_later),
        'by': {name: change_by(*breakdown) for name, breakdown in labels.items()},
    }


def carriers(reference, edit, kinds, names):
    """Returns the breakdown by the class of the token that carries an edit's first entry. kinds: (N, T)
    of the inputs.
    """
    N, T = kinds.shape
    kind = np.array([kinds[n, reference.entries(edit, n)[0][0]] for n in range(N)])
    return kind[:, None].repeat(T, 1), names


def result(trial, before, losses, reference, weights, labels, kinds):
    """Returns the result of a Trial that has been evaluated. labels: none, and there are no breakdowns."""
    outcomes, by_carrier = {}, {}
    for name, edit in trial.group.items():
        if labels and (edit.own or edit.positions):
            by_carrier = {'carrier': carriers(reference, edit, kinds, labels['class'][1])}
        touched = reference.touched(edit, len(before))
        outcomes[name] = outcome(before, losses[edit], touched, weights, {**labels, **by_carrier})
    return {**trial.said, 'edit': outcomes.pop('edit'), 'controls': outcomes}


def label(tokens, starts, meta, tokenizer=None):
    """Returns {breakdown: ((N, T) places, names)} of the predicted tokens, and the classes of the inputs,
    (N, T).

    tokenizer: where it is not one that meta names."""
    language = language_of(meta, tokens)
    kinds, found = describe(tokens, starts, tokenizer or encoding(meta['tokenizer']), language)
    found = {name: column[:, 1:] for name, column in found.items()}
    position = np.searchsorted(EDGES, np.arange(tokens.block_size), 'right')
    since_line = np.searchsorted(EDGES, found['since_line'], 'right')
    labels = {
        'class': (kinds[:, 1:], CLASSES[language]),
        'position': (np.broadcast_to(position, since_line.shape), BUCKETS),
        'since_line': (since_line, BUCKETS),
    }
    if language == 'english':
        place = np.zeros(since_line.shape, np.int64)
        for i, name in enumerate(('sentence_end', 'sentence_start', 'paragraph_start'), 1):
            place[found[name]] = i
        labels['sentence'] = (place, PLACES)
    return labels, kinds[:, :-1]


# ---- What attention makes of a position


@contextmanager
def qkv_hooked(model, on_qkv):
    """While it lasts, calls on_qkv(layer, attention, output of its qkv map) of a GPT of ours."""

    def hook_of(layer, attention):
        return lambda module, inputs, output: on_qkv(layer, attention, output)

    attentions = [sublayer.function for sublayer in model.sublayers if sublayer.kind == 'attn']
    handles = [
        attention.qkv.register_forward_hook(hook_of(layer, attention))
        for layer, attention in enumerate(attentions)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_by(attention, q, k, v, t):
    """q, k, v: (B, n_head, T, d / n_head). Returns (B, n_head, d): what the value of position t adds to the
    outputs from there on, p̄ W v with p̄ its mean probability."""
    one_hot = torch.zeros_like(k)
    one_hot[:, :, t] = 1
    probability = attention.attend(q, k, one_hot)[:, :, t:, 0].mean(-1)
    projection = attention.proj.weight.unflatten(1, (attention.n_head, -1))
    return probability[..., None] * torch.einsum('bhe,dhe->bhd', v[:, :, t], projection)


@torch.no_grad()
def attention(model, tokens, starts, batch_size, reference, edit, positions=()):
    """Returns the sink of every head under the edit, (n_layer, n_head), and {position: (2, n_layer,
    n_head)}: of what the position's value adds to later outputs, the square of its mean over sequences and
    the mean of its square.

    positions: of a GPT of ours; other models have their sinks alone."""
    statistics, device = Statistics(1), next(model.parameters()).device

    def on_sinks(layer, sinks):
        statistics.add((layer, 'sink'), sinks)

    def on_qkv(layer, attend, qkv):
        q, k, v = attend.heads(*qkv.chunk(3, -1))
        for t in positions:
            added = added_by(attend, q, k, v, t)
            statistics.add((layer, t), torch.cat([added, added.square().sum(-1, keepdim=True)], -1))

    for i, (idx, _) in enumerate(window_batches(tokens, starts, batch_size)):
        statistics.begin(len(idx), device)
        sequences = range(i * batch_size, i * batch_size + len(idx))
        with hooked(model, lambda s, streams: None, on_sinks), edited(model, edit, reference, sequences):
            if positions:
                with qkv_hooked(model, on_qkv):
                    model(idx.to(device))
            else:
                model(idx.to(device))

    layers = sorted(key[0] for key in statistics.sums if key[1] == 'sink')

    def by_layer(what):
        return np.array([statistics.mean((layer, what))[0] for layer in layers])

    squares = {}
    for t in positions:
        added = by_layer(t)
        squares[t] = np.stack([np.square(added[..., :-1]).sum(-1), added[..., -1]])
    return by_layer('sink'), squares


def constancy(of_mean, mean_of, n):
    """of_mean, mean_of: the square of the mean of vectors over n sequences and the mean of their squares,
    (…, n_head).

    Returns (…): the share of the mean square that is the true mean's, 1 for a constant, an implicit bias,
    and 0 for what has no mean. n vectors without one still have a mean of 1/n of their square, which this
    takes away: with (n of_mean − mean_of) / (n − 1) in the place of of_mean it is unbiased."""
    return np.clip((n * of_mean.sum(-1) / mean_of.sum(-1) - 1) / (n - 1), 0, 1)


@torch.no_grad()
def sample(model, prompts, count, seed, reference, edit):
    """prompts: (B, P). Returns (B, count): continuations at temperature 1.

    The noise depends on the seed alone, so that an edit that changes nothing changes no token."""
    generator, ids = torch.Generator().manual_seed(seed), prompts
    with edited(model, edit, reference, range(len(prompts))):
        for _ in range(count):
            logits = model(ids[:, -reference.T :])[:, -1].double().cpu()
            # Gumbel noise: the largest sum is a sample.
            noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator, dtype=torch.float64)))
            ids = torch.cat([ids, (logits + noise).argmax(-1, keepdim=True).to(ids.device)], 1)
    return ids[:, prompts.shape[1] :]


# ---- One run


@dataclass
class Setting:
    """What all evaluations of one run share."""

    run: object  # an OpenRun
    reference: Reference
    evaluated: np.ndarray  # (N,) starts of the windows
    others: np.ndarray  # (M,) of those that entries are chosen on
    weights: np.ndarray  # (R, N) of the bootstrap
    labels: dict
    kinds: np.ndarray
    batch_size: int


def readable_levels(model):
    """Returns the decoded stream, or None where the head reads no stream alone, and {stream: sublayers}:
    those after which anything reads the stream, which is nothing but the head after the last."""
    decoded = model.decoded if model.decoded in model.stream_names else None
    if isinstance(model, GPT) and model.config.decode_gamma:
        decoded = None
    S = len(model.sublayers)
    return decoded, {name: range(S - (decoded not in (None, name))) for name in model.stream_names}


def check(run, args):
    """Refuses what cannot be done to this run."""
    names, S = run.model.stream_names, len(run.model.sublayers)
    if args.stream is not None and args.stream not in names:
        raise UserError(f'--stream={args.stream}, but {run.path} has {" and ".join(names)}')
    if args.sublayer.isdecimal():
        if int(args.sublayer) >= S:
            raise UserError(f'--sublayer={args.sublayer}, but {run.path} has sublayers 0 to {S - 1}')
        decoded, sublayers = readable_levels(run.model)
        if args.stream and int(args.sublayer) not in sublayers[args.stream]:
            raise UserError(
                f'--stream={args.stream} --sublayer={args.sublayer}, but nothing reads that: '
                f'ask for an earlier sublayer, or for {decoded}'
            )
    if args.top > run.model.n_embd // 4:
        raise UserError(
            f'--top={args.top}, but {run.path} has {run.model.n_embd} dimensions, '
            'and the controls need three times as many others: ask for fewer'
        )


def choose_windows(run, args):
    """Returns the starts of the windows to evaluate on, and of those to choose entries on."""
    starts = run.tokens.fixed_starts(args.sequences + CALIBRATION, args.seed)
    if len(starts) < args.sequences + ENOUGH:
        most = len(starts) - ENOUGH
        advice = f'ask for at most {most}' if most >= 2 else 'name a larger set with --data'
        raise UserError(
            f'--sequences={args.sequences} and at least {ENOUGH} more to choose entries on, '
            f'but {run.tokens.path} holds {len(starts)} windows: {advice}'
        )
    return starts[: args.sequences], starts[args.sequences :]


def prepare(run, args):
    """Returns the Setting of a run."""
    evaluated, others = choose_windows(run, args)
    batch_size = max(1, TOKENS_AT_ONCE[args.device] // run.tokens.block_size)
    batch_size = min(batch_size, sequences_at_once(run.model, args.device, run.tokens.block_size))
    labels, kinds = label(run.tokens, evaluated, run.meta, run.encoding)
    reference = Reference(run.model, run.tokens, others, evaluated, args.top, batch_size, args.seed)
    weights = bootstrap_weights(args.seed, range(len(evaluated)), REPLICATES)
    return Setting(run, reference, evaluated, others, weights, labels, kinds, batch_size)


def plan_run(setting, args):
    """Returns the Trials of a run at the sublayers that were asked for, those of the sweep, and {stream:
    the sublayer that is shown}.
    """
    model, reference = setting.run.model, setting.reference
    decoded, sublayers = readable_levels(model)
    trials, sweep, shown = [], [], {}
    for stream in model.stream_names:
        if args.stream not in (None, stream):
            continue
        peak = reference.peak(stream)
        asked = {'all': sublayers[stream], 'auto': [peak]}.get(args.sublayer) or [int(args.sublayer)]
        asked = [s for s in asked if s in sublayers[stream]]
        for s in asked:
            is_alone = len(model.stream_names) == 1
            hows, has_reads = HOWS[args.how], offers_reads(model)
            trials += plan(reference, stream, s, hows, stream == decoded, is_alone, has_reads)
        if asked:
            shown[stream] = peak if peak in asked else asked[0]
        if args.sublayer == 'auto':
            sweep += plan_sweep(reference, stream, sublayers[stream])
    return trials, sweep, shown


def carry_out(setting, trials, count, what, labels):
    """Evaluates Trials on the first `count` sequences. Returns their results, the losses without an edit,
    (count, T), and how many edits there were. what: as the progress says it."""
    run, starts = setting.run, setting.evaluated[:count]
    edits = list(dict.fromkeys(edit for trial in trials for edit in trial.group.values()))
    with Progress(f'{run.name}, {what}:', (1 + len(edits)) * count, 'windows') as progress:
        before, losses = evaluate(
            run.model, run.tokens, starts, edits, setting.reference, setting.batch_size, progress.show
        )
    weights, kinds = setting.weights[:, :count], setting.kinds[:count]
    results = [result(trial, before, losses, setting.reference, weights, labels, kinds) for trial in trials]
    return results, before, len(edits)


def sinks_and_constants(setting, examples):
    """Returns the `attention` of intervene.json. examples: Trials."""
    run, reference, starts = setting.run, setting.reference, setting.evaluated

    def look(edit, positions=()):
        heads, squares = attention(
            run.model, run.tokens, starts, setting.batch_size, reference, edit, positions
        )
        if not len(heads):
            return {'sink': None, 'by_layer': []}, squares
        return {'sink': number(heads.mean()), 'by_layer': [number(v) for v in heads.mean(1)]}, squares

    has_values = isinstance(run.model, GPT)
    unedited, squares = look(NOTHING, (0, 1, reference.T // 2) if has_values else ())
    edits = []
    for trial in examples:
        heads, control = look(trial.group['edit'])[0], look(trial.group['moved'])[0]
        edits.append({**example_names(trial), **heads, 'control': control})
    return {
        'sequences': len(starts),
        'unedited': unedited,
        'edits': edits,
        'constancy': {t: constancy_report(square, len(starts)) for t, square in squares.items()},
    }


def constancy_report(squares, n):
    """squares: (2, n_layer, n_head), as `attention` returns them, over n sequences."""
    with np.errstate(invalid='ignore'):  # where nothing is added
        return {
            'constancy': number(constancy(*squares.reshape(2, -1), n)),
            'norm': number(np.sqrt(squares[1].mean())),
            'by_layer': [number(v) for v in constancy(*squares, n)],
        }


def examples_of(trials, shown):
    """Returns the Trials whose sinks and continuations are reported. shown: {stream: the sublayer that
    is shown}.
    """
    examples = []
    for stream, s in shown.items():
        group = [trial for trial in trials if (trial.said['stream'], trial.said['sublayer']) == (stream, s)]
        examples += [trial for trial in group if is_detailed(trial.said, group[0].said['how'])]
    return examples


def example_names(trial):
    """Returns what the attention and the samples of intervene.json say of an edit."""
    return {key: trial.said[key] for key in ('stream', 'sublayer', 'where', 'what', 'how', 'reach')}


def continuations(setting, examples, device):
    """Returns the `samples` of intervene.json. examples: Trials."""
    run, reference = setting.run, setting.reference
    length = min(64, reference.T // 2)
    prompts = run.tokens.windows(setting.others[:PROMPTS])[0][:, :length].to(device)

    def texts(edit):
        ids = sample(run.model, prompts, NEW_TOKENS, reference.seed, reference, edit)
        return [run.encoding.decode(row) for row in ids.tolist()]

    unedited = texts(NOTHING)
    edits = [
        (example_names(trial), texts(trial.group['edit']), texts(trial.group['moved'])) for trial in examples
    ]
    return [
        {
            'prompt': run.encoding.decode(prompt),
            'unedited': unedited[i],
            'edits': [{**names, 'text': text[i], 'control': control[i]} for names, text, control in edits],
        }
        for i, prompt in enumerate(prompts.tolist())
    ]


def losses_before(before, places, names):
    """before: (N, T) losses without an edit. places: (N, T) of one breakdown.

    Returns what intervene.json says of it.
    """
    lines = {}
    for i in np.unique(places):
        mask = places == i
        lines[names[i]] = {
            'share': number(mask.mean()),
            'sequences': int(mask.any(1).sum()),
            'loss': number(before[mask].mean(dtype=np.float64)),
        }
    return lines


def intervene(run, args):
    """Returns what intervene.json holds, and {stream: the sublayer that is shown}."""
    check(run, args)
    setting = prepare(run, args)
    trials, sweep, shown = plan_run(setting, args)
    examples = examples_of(trials, shown)
    heads = sinks_and_constants(setting, examples)
    samples = continuations(setting, examples, args.device)
    N = len(setting.evaluated)
    results, before, evaluations = carry_out(setting, trials, N, 'interventions', setting.labels)
    swept, in_sweep = max(N // 2, min(N, FEW)), []
    if sweep:
        in_sweep, _, count = carry_out(setting, sweep, swept, 'every sublayer', {})
        evaluations += count
    report = {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'model': {**run.model_args, 'parameters': run.model.num_params()},
        'data': {
            **run.data,
            'sequences': N,
            'calibration': len(setting.others),
            'sweep_sequences': swept,
            'block_size': run.tokens.block_size,
            'seed': args.seed,
        },
        'evaluations': evaluations,
        'loss': mean_with_interval(setting.weights, before.astype(np.float64), np.ones_like(before, bool)),
        'perplexity': number(np.exp(before.mean(dtype=np.float64))),
        'sweep': in_sweep,
        'results': results,
        'before': {name: losses_before(before, *breakdown) for name, breakdown in setting.labels.items()},
        'attention': heads,
        'samples': samples,
    }
    return report, shown


def parse_arguments(argv):
    parser = run_parser(__doc__, sequences=32, writes='intervene.json and figures')
    parser.add_argument('--stream', help="one of the model's streams (default: all of them)")
    parser.add_argument(
        '--sublayer',
        default='auto',
        help='a number; all; or auto (default): a sweep, and the one where the outlier stands out most',
    )
    parser.add_argument('--top', type=int, default=4, help='how many entries to change (default 4)')
    parser.add_argument('--how', choices=HOWS, default='all')
    parser.add_argument('--all', action='store_true', help='print every result, not the summary alone')
    args = parser.parse_args(argv)
    if args.sublayer not in ('auto', 'all') and not args.sublayer.isdecimal():
        raise UserError(f'--sublayer is {args.sublayer}: expected auto, all or a number')
    check_run_arguments(args, top=1, sequences=2)
    return args


def intervene_all(argv):
    args = parse_arguments(argv)
    for run in open_runs(args):
        report, shown = intervene(run, args)
        with atomic_write(run.out / f'intervene{run.suffix}.json', 'w') as file:
            json.dump(report, file, separators=(',', ':'))
        print_summary(run.name, report, shown)
        if args.all:
            print_all(report, shown)
        draw_ratios(run.name, report, shown, run.out / f'intervene{run.suffix}.png')
        draw_classes(run.name, report, shown, run.out / f'intervene_class{run.suffix}.png')
        print(
            f'written: {os.path.relpath(run.out)}/intervene{run.suffix}.json, '
            f'intervene{run.suffix}.png, intervene_class{run.suffix}.png'
        )


def main(argv=None):
    command(intervene_all, argv)


if __name__ == '__main__':
    main()
