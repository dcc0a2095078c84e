"""
What does rounding to few bits cost? Rounds weights and activations of a checkpoint and measures its loss.

    python -m studies.quantize --ckpt out/ledger_demo             the loss before and after, four schemes
    python -m studies.quantize --ckpt out/ledger_demo --sweep     and which sublayers and streams cost most
    python -m studies.quantize --ckpt out/ledger_demo --skip=0,1  with sublayers 0 and 1 in full precision

Writes quantize.json and quantize.png beside the checkpoint, or below --out.

What is worth knowing before reading on:
- Rounding is symmetric, x → s · round(x / s) with s = max |x| / (2^(bits − 1) − 1), half to even. A weight
  has one
  scale for each output, an activation one for each token. An outlier sets the scale of its whole token.
- W8 and W4 round weights alone, to 8 and 4 bits. W8A8 and W4A4 also round what these weights are multiplied
  with.
- What is rounded are the linear layers of the sublayers: attention, MLP and the ledger's gates. Embeddings
  and the
  head stay, and so do the products inside attention, between queries and keys and between probabilities and
  values.
- The loss is taken on the same windows before and after. Its intervals come from one bootstrap over the
  windows for
  all schemes, so that differences are paired.

Sources: Vemula 2026, arXiv 2606.20743 (W8, W4); Qiu et al. 2026, arXiv 2601.22966 (W4A4).
"""

import argparse
import json
import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn

from checkpoint import check_run_arguments, open_runs, run_parser
from data.loader import UserError, atomic_write
from data.progress import Progress
from figures import STREAM_STYLE, cell, figure, short
from measure import (
    REPLICATES,
    bootstrap_weights,
    command,
    headline,
    hooked,
    number,
    sequence_losses,
    sequences_at_once,
    window_batches,
)

SCHEMES = {'W8': (8, None), 'W4': (4, None), 'W8A8': (8, 8), 'W4A4': (4, 4)}  # bits of weights, of inputs
STREAM_BITS = (8, 4)
SAVED_STYLE = {'W4': dict(color='#009E73', marker='s'), 'W4A4': dict(color='#D55E00', marker='o')}


def rounded(x, bits, dim=-1):
    """x: a float tensor. Returns it rounded to 2^bits − 1 levels around 0, with one scale for each slice
    along `dim`, computed in float32 and returned in the precision of x."""
    largest = 2 ** (bits - 1) - 1
    values = x.float()
    scale = values.abs().amax(dim, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1)  # a slice of zeros stays one
    return ((values / scale).round().clamp(-largest, largest) * scale).to(x.dtype)


def is_linear(module):
    """Does a module multiply its input by a matrix? transformers' Conv1D does, with the matrix transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == 'Conv1D'


def linears_of(model):
    """Returns a list of linear layers for each sublayer of a GPT of ours or of a pretrained model."""
    if not hasattr(model, 'blocks'):
        return [list(filter(is_linear, sublayer.modules())) for sublayer in model.sublayers]
    linears = []
    for block in model.blocks:
        found = list(filter(is_linear, block.module.modules()))
        if block.mlp_start is None:  # its attention and its MLP are one sublayer
            linears.append(found)
            continue
        attention = set(block.attention.modules())
        linears.append([module for module in found if module in attention])
        linears.append([module for module in found if module not in attention])
    return linears


@contextmanager
def quantized(modules, weight_bits, input_bits):
    """While it lasts, linear layers have rounded weights and, if input_bits is not None, rounded inputs."""
    kept, handles = [], []
    try:
        for module in modules:
            kept.append((module, module.weight.data))
            inputs = (
                1 if isinstance(module, nn.Linear) else 0
            )  # the axis of the weight that a product sums over
            module.weight.data = rounded(module.weight.data, weight_bits, inputs)
            if input_bits:
                handles.append(module.register_forward_pre_hook(input_hook(input_bits)))
        yield
    finally:
        for module, weight in kept:
            module.weight.data = weight
        for handle in handles:
            handle.remove()


def input_hook(bits):
    """Returns a forward pre-hook that rounds the input of a module, (…, d), token by token."""

    def hook(module, args):
        return (rounded(args[0], bits), *args[1:])

    return hook


def batches(run, starts, args):
    """Yields inputs and targets, each (B, T), of as many windows as go through the model together."""
    at_once = sequences_at_once(run.model, args.device, run.tokens.block_size)
    return window_batches(run.tokens, starts, at_once)


@torch.no_grad()
def window_losses(run, starts, args):
    """Returns (N,) float64: the loss of each window in nats per token."""
    losses = []
    for idx, targets in batches(run, starts, args):
        logits = run.model(idx.to(args.device))
        losses.append(sequence_losses(logits, targets.to(args.device)).cpu().numpy())
    return np.concatenate(losses)


class Comparison:
    """Losses of the same windows before and after a change. before: (N,), nats per token."""

    def __init__(self, before, seed):
        self.before = before
        weights = bootstrap_weights(seed, range(len(before)), REPLICATES)
        drawn = weights.sum(1) > 0  # of few windows, a replicate may have drawn none
        self.weights = weights[drawn] / weights[drawn].sum(1, keepdims=True)

    def mean(self, values):
        """values: (N,). Returns the headline of their mean; a single window has no interval."""
        report = headline(self.weights @ values)
        if len(values) == 1:
            return {'value': report['value'], 'low': None, 'high': None}
        return {key: report[key] for key in ('value', 'low', 'high')}

    def report(self, after):
        """after: (N,). Returns the headlines of the loss and of the damage, which is paired."""
        return {'loss': self.mean(after), 'damage': self.mean(after - self.before)}


@torch.no_grad()
def rounding_errors(run, starts, args):
    """Returns {stream: {bits: [error after each sublayer]}}: how far rounding moves a token's vector, over
    its norm, averaged over tokens. Nothing in the model is rounded."""
    sums, tokens = {}, 0

    def on_streams(s, streams):
        for name, x in streams.items():
            x = x.float()
            norm = torch.linalg.vector_norm(x, dim=-1)
            for bits in STREAM_BITS:
                moved = torch.linalg.vector_norm(x - rounded(x, bits), dim=-1)
                share = torch.where(norm > 0, moved / norm, 0).double().sum()
                sums[name, bits, s] = sums.get((name, bits, s), 0) + share

    for idx, _ in batches(run, starts, args):
        with hooked(run.model, on_streams):
            run.model(idx.to(args.device))
        tokens += idx.numel()
    count = len(run.model.sublayers)
    return {
        name: {
            bits: [number(float(sums[name, bits, s]) / tokens) for s in range(count)] for bits in STREAM_BITS
        }
        for name in run.model.stream_names
    }


def sublayer_sweep(run, starts, args, linears, skipped, all_rounded):
    """Leaves one sublayer at a time in full precision.

    all_rounded: {scheme: Comparison with all of them rounded}. Returns {scheme: [headline of what is saved]},
    None for a sublayer that is skipped anyway."""
    saved = {scheme: [] for scheme in SCHEMES}
    total = len(SCHEMES) * (len(linears) - len(skipped))
    with Progress('leaving out', total, 'sublayers') as progress:
        for scheme, bits in SCHEMES.items():
            for s in range(len(linears)):
                if s in skipped:
                    saved[scheme].append(None)
                    continue
                with quantized(chosen(linears, skipped | {s}), *bits):
                    after = window_losses(run, starts, args)
                compared = all_rounded[scheme]
                saved[scheme].append(compared.mean(compared.before - after))
                progress.show(sum(map(len, saved.values())))
    return saved


def stream_sweep(run, starts, args, compared):
    """Rounds one stream as it leaves one sublayer, and nothing else.

    compared: Comparison with the loss in full precision. Returns {stream: {bits: [headline of the
    damage]}}."""
    names, count = run.model.stream_names, len(run.model.sublayers)
    damage = {name: {bits: [] for bits in STREAM_BITS} for name in names}
    done = 0
    with Progress('rounding', len(names) * len(STREAM_BITS) * count, 'places') as progress:
        for name in names:
            for bits in STREAM_BITS:
                for place in range(count):
                    with hooked(run.model, stream_rounder(name, place, bits)):
                        after = window_losses(run, starts, args)
                    damage[name][bits].append(compared.report(after)['damage'])
                    done += 1
                    progress.show(done)
    return damage


def stream_rounder(name, place, bits):
    """Returns what measure.hooked calls: it rounds a stream where it leaves the sublayer `place`."""

    def on_streams(s, streams):
        return {**streams, name: rounded(streams[name], bits)} if s == place else None

    return on_streams


def chosen(linears, skipped):
    """Returns the linear layers of all sublayers but those that are skipped."""
    return [module for s, modules in enumerate(linears) if s not in skipped for module in modules]


def largest(headlines):
    """Returns the index of the headline with the largest value; None entries do not count."""
    known = [s for s, entry in enumerate(headlines) if entry is not None]
    return max(known, key=lambda s: headlines[s]['value'])


def quantize(run, args):
    """Rounds an open run in every scheme. Returns what quantize.json holds."""
    linears = linears_of(run.model)
    beyond = [s for s in args.skip if s >= len(linears)]
    if beyond:
        raise UserError(f'--skip names sublayer {beyond[0]}, but {run.name} has 0 to {len(linears) - 1}')
    starts = run.tokens.fixed_starts(args.sequences, args.seed)
    modules = chosen(linears, args.skip)
    compared = Comparison(window_losses(run, starts, args), args.seed)
    schemes, all_rounded = {}, {}
    for scheme, bits in SCHEMES.items():
        with quantized(modules, *bits):
            after = window_losses(run, starts, args)
        schemes[scheme], all_rounded[scheme] = compared.report(after), Comparison(after, args.seed)
    errors = rounding_errors(run, starts, args)
    report = {
        'schema': 1,
        'checkpoint': str(run.path),
        'iter_num': run.iter_num,
        'data': {
            **run.data,
            'sequences': len(starts),
            'block_size': run.tokens.block_size,
            'seed': args.seed,
        },
        'sublayers': [sublayer.kind for sublayer in run.model.sublayers],
        'skipped': sorted(args.skip),
        'rounded_weights': sum(module.weight.numel() for module in modules),
        'weights': sum(p.numel() for p in run.model.parameters()),
        'loss': compared.mean(compared.before),
        'schemes': schemes,
        'streams': {name: {'rounding_error': errors[name]} for name in errors},
    }
    if args.sweep:
        report['saved_without'] = sublayer_sweep(run, starts, args, linears, args.skip, all_rounded)
        for name, damage in stream_sweep(run, starts, args, compared).items():
            report['streams'][name]['damage'] = damage
    return report


def place_of(report, s):
    return f'{report["sublayers"][s]} {s}'


def most(report, headlines, what):
    """Says in which sublayer the largest of these headlines is; none stands out if its interval reaches 0."""
    s = largest(headlines)
    low = headlines[s]['low']
    if low is not None and low <= 0:
        return 'no sublayer stands out'
    return f'{place_of(report, s)} costs most, {what} {cell(headlines[s])} nats'


def print_report(name, report):
    data, share = report['data'], report['rounded_weights'] / report['weights']
    print(
        f'\n{name}, iteration {report["iter_num"]}: {data["sequences"]} sequences of {data["block_size"]} '
        f'tokens, {data["name"]} {data["split"]}; {share:.0%} of the weights are rounded'
    )
    print(f'{"":10}{"loss, nats per token":30}{"damage":30}')
    print(f'{"none":10}{cell(report["loss"]):30}')
    for scheme, entry in report['schemes'].items():
        print(f'{scheme:10}{cell(entry["loss"]):30}{cell(entry["damage"]):30}'.rstrip())
    for stream, entry in report['streams'].items():
        errors = entry['rounding_error'][4]
        s = int(np.argmax(errors))
        print(
            f'{stream}: 4 bits move a token by {short(errors[s], 3)} of its norm after '
            f'{place_of(report, s)}, where that is most, and by {short(errors[-1], 3)} after the last'
        )
    if 'saved_without' not in report:
        return
    for scheme, saved in report['saved_without'].items():
        print(f'{scheme}: {most(report, saved, "in full precision it saves")}')
    for stream, entry in report['streams'].items():
        for bits, damage in entry['damage'].items():
            print(f'{stream} alone in {bits} bits, after one sublayer: {most(report, damage, "it costs")}')


def draw(name, report, path):
    panels = 3 if 'saved_without' in report else 2
    with figure(path, f'{name}: what rounding costs', 1, panels, (4.6, 3.6)) as axes:
        draw_damage(axes[0], report['schemes'])
        draw_errors(axes[1], report['streams'])
        if panels == 3:
            draw_saved(axes[2], report)


def ends(headlines):
    """Returns the values of headlines, and how far their intervals reach below and above, or None without
    any."""
    values = [entry['value'] for entry in headlines]
    if any(entry['low'] is None for entry in headlines):
        return values, None
    below = [entry['value'] - entry['low'] for entry in headlines]
    above = [entry['high'] - entry['value'] for entry in headlines]
    return values, [below, above]


def draw_damage(axis, schemes):
    """One bar a scheme, with its interval."""
    values, intervals = ends([entry['damage'] for entry in schemes.values()])
    bars = axis.bar(list(schemes), values, yerr=intervals, capsize=4, color='#56B4E9')
    axis.bar_label(bars, [f'{value:+.2g}' for value in values], padding=3, fontsize=8)
    axis.set(title='loss after rounding, minus before', ylabel='nats per token')
    axis.margins(y=0.2)
    axis.grid(axis='y', alpha=0.3)


def draw_errors(axis, streams):
    for stream, entry in streams.items():
        errors = entry['rounding_error'][4]
        axis.plot(errors, label=stream, markersize=3, **STREAM_STYLE.get(stream, {}))
    axis.set(
        title='what 4 bits a token do to a stream',
        xlabel='sublayer',
        ylabel='distance moved ÷ norm of the token',
        ylim=(0, None),
    )
    axis.legend()
    axis.grid(alpha=0.3)


def draw_saved(axis, report):
    """What each sublayer alone in full precision saves, with intervals, where all the others are rounded."""
    for scheme, style in SAVED_STYLE.items():
        saved = report['saved_without'][scheme]
        places = [s for s, entry in enumerate(saved) if entry is not None]
        values, intervals = ends([saved[s] for s in places])
        axis.errorbar(places, values, intervals, label=scheme, capsize=3, markersize=3, **style)
    axis.axhline(0, color='black', linewidth=0.8)
    axis.set(title='what one sublayer in full precision saves', xlabel='sublayer', ylabel='nats per token')
    axis.legend()
    axis.grid(alpha=0.3)


def sublayers(text):
    """'0,3' → {0, 3}."""
    if not all(part.isdecimal() for part in text.split(',')):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of sublayers: expected numbers, as in 0,3")
    return {int(part) for part in text.split(',')}


def run(argv):
    parser = run_parser(__doc__, sequences=64, writes='quantize.json and a figure')
    parser.add_argument('--skip', type=sublayers, default=set(), help='sublayers to leave in full precision')
    parser.add_argument('--sweep', action='store_true', help='find the sublayers and streams that cost most')
    args = parser.parse_args(argv)
    check_run_arguments(args, sequences=2)
    for opened in open_runs(args):
        report = quantize(opened, args)
        with atomic_write(opened.out / f'quantize{opened.suffix}.json', 'w') as file:
            json.dump(report, file, indent=1)
        print_report(opened.name, report)
        draw(opened.name, report, opened.out / f'quantize{opened.suffix}.png')
        folder, suffix = os.path.relpath(opened.out), opened.suffix
        print(f'written: {folder}/quantize{suffix}.json, quantize{suffix}.png')


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
