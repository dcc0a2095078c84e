"""
How long one sublayer's share of each kernel of kernels.py takes on this GPU, by tile: what DELIBERATE, GRADIENT_A and so on are chosen by.

    python -m speed.tiles --out=results/h200/tiles.json                 64 × 1024 tokens of the 160m models, bfloat16 streams
    python -m speed.tiles --width=1024 --streams=float32                290m, float32 streams

Every tile computes the same random problem; what it finds must agree with the tile that kernels.py names. Times are medians of
repeated launches on a warm device; GB/s counts the tensors as large as D alone, each once. A tile that the GPU cannot hold says so; one
that breaks the process, as an illegal access does, takes nothing with it.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
import triton

from data.loader import atomic_write
from speed import kernels
from speed.bench import machine

TILES = {
    'DELIBERATE': [
        dict(ROWS=rows, COLUMNS=c, PROGRAMS=n, STAGES=s, num_warps=w)
        for rows, c, s, w, programs in (
            (32, 128, 3, 4, (132, 264, 396, 528)),
            (32, 64, 3, 4, (264, 396, 528, 792)),
            (64, 128, 3, 8, (132, 264)),
            (64, 64, 2, 8, (264, 528)),
        )
        for n in programs
    ],
    'GRADIENT_A': [
        dict(ROWS=rows, COLUMNS=c, STAGES=s, num_warps=w)
        for rows, c, s, w in (
            (64, 32, 3, 4),
            (64, 32, 4, 4),
            (64, 16, 4, 4),
            (64, 64, 2, 4),
            (128, 32, 3, 8),
            (128, 64, 3, 8),
        )
    ],
    'GRADIENT_U': [
        dict(ROWS=rows, COLUMNS=c, PROGRAMS=n, STAGES=s, num_warps=w)
        for rows, c, s, w, programs in (
            (32, 64, 3, 4, (264, 528)),
            (32, 64, 2, 4, (264,)),
            (32, 64, 4, 4, (264,)),
            (16, 64, 3, 4, (264,)),
            (32, 128, 3, 8, (132,)),
            (16, 128, 3, 8, (132,)),
        )
        for n in programs
    ],
    'GRADIENT_READ': [
        dict(ROWS=rows, PROGRAMS=n, STAGES=s)
        for rows, s in ((2, 3), (2, 2), (1, 3))
        for n in (264, 396, 528, 792, 1056)
    ],
    'ADD_PRODUCT': [
        dict(ROWS=rows, COLUMNS=c, num_warps=w)
        for rows, c, w in ((64, 128, 4), (64, 64, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8))
    ],
    'DIRECTION': [dict(ROWS=rows, num_warps=w) for rows in (32, 64, 128) for w in (4, 8)],
}
LARGE = {
    'DELIBERATE': 3,
    'GRADIENT_A': 2,
    'GRADIENT_U': 3,
    'GRADIENT_READ': 7,
    'ADD_PRODUCT': 2,
    'DIRECTION': 0,
}  # tensors as large as D, read or written


def problem(N, d, r, streams, device):
    """Returns what each kernel's operation is called with, by name."""
    torch.manual_seed(0)
    stream, half, single = (
        lambda *shape: torch.randn(shape, device=device).to(streams),
        lambda *shape: torch.randn(shape, device=device).to(kernels.HALF),
        lambda *shape: torch.randn(shape, device=device),
    )
    D, g, y, a, U = (
        stream(N, d),
        stream(N, d),
        half(N, d),
        half(N, 3 * d + 3 * r)[:, 3 * d :],
        half(3, d, r) * r**-0.5,
    )  # a: a part of wider rows, as in training
    be, bw, f, length = single(d), single(d), single(N), 1 + single(N).abs()
    return {
        'DELIBERATE': (kernels.deliberate, (D, y, a, f, U, be, bw)),
        'GRADIENT_A': (kernels.gradient_a, (g, y, a, f, U, be, bw, half(N, r), half(N, r), length)),
        'GRADIENT_U': (kernels.gradient_U, (g, y, a, f, single(N), U, be, bw)),
        'GRADIENT_READ': (
            kernels.gradient_read,
            (
                half(N, d),
                single(N),
                g,
                stream(N, d),
                D,
                stream(N, d),
                single(N),
                single(d),
                single(d),
                single(d),
                1e-6,
            ),
        ),
        'ADD_PRODUCT': (kernels.add_product, (g, half(N, 2 * r), half(2 * r, d) * r**-0.5)),
        'DIRECTION': (kernels.direction, (a, half(N, 2 * r)[:, r:], U[2].float().T @ U[2].float())),
    }


def summed(outputs):
    """Returns the outputs with the programs' shares added up: how many there are depends on the tile."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [(x.sum(0) if x.ndim > 2 else x).double() for x in outputs]


def ms(call, device):
    if device == 'cuda':
        return triton.testing.do_bench(call, warmup=20, rep=60, return_mode='median')
    begin = time.perf_counter()  # the interpreter's time says nothing
    call()
    return 1e3 * (time.perf_counter() - begin)


@cache
def call_and_result(name, *sizes):
    """Returns the operation and its inputs, and what it finds with the tile that kernels.py names."""
    N, d, r, streams, device = sizes
    operation, inputs = problem(N, d, r, getattr(torch, streams), device)[name]
    return operation, inputs, summed(operation(*inputs))


def timed(name, candidate, *sizes):
    """Returns what the report says of one tile. Run in a process of its own."""
    tile = getattr(kernels, name)
    operation, inputs, expected = call_and_result(name, *sizes)
    named, entry = dict(tile), {'tile': candidate, 'named': candidate == tile}
    tile.clear()
    tile.update(candidate)
    try:
        entry['error'] = max(
            ((x - y).norm() / y.norm()).item() for x, y in zip(summed(operation(*inputs)), expected)
        )
        entry['ms'] = round(ms(lambda: operation(*inputs), sizes[-1]), 4)
        entry['GB_per_s'] = round(
            LARGE[name] * inputs[0].numel() * inputs[0].element_size() / entry['ms'] / 1e6
        )
    except (
        RuntimeError,
        triton.runtime.errors.OutOfResources,
        triton.compiler.errors.CompilationError,
    ) as error:
        entry['failed'] = str(error).splitlines()[0][:120]
    tile.clear()
    tile.update(named)
    return entry


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tokens', type=int, default=65536)
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--rank', type=int, default=64)
    parser.add_argument('--streams', choices=('bfloat16', 'float32'), default='bfloat16')
    parser.add_argument('--kernels', default=','.join(TILES), help='some of them, separated by commas')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args(argv)
    sizes = args.tokens, args.width, args.rank, args.streams, 'cuda' if torch.cuda.is_available() else 'cpu'
    worker, found = None, {}
    for name in args.kernels.split(','):
        named, found[name] = dict(getattr(kernels, name)), []
        for candidate in [named] + [t for t in TILES[name] if t != named]:
            worker = worker or ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
            entry = worker.submit(timed, name, candidate, *sizes).result()
            if 'CUDA' in entry.get('failed', ''):  # nothing that follows in that process would be right
                worker.shutdown()
                worker = None
            found[name].append(entry)
            print(
                f'{name:14} {str(candidate):75} '
                + (
                    f'{entry["ms"]:8.3f} ms {entry["GB_per_s"]:6} GB/s  differs by {entry["error"]:.1e}'
                    if 'ms' in entry
                    else entry['failed']
                )
                + ('  <- kernels.py' if entry['named'] else ''),
                flush=True,
            )
        timed_ones = [e for e in found[name] if 'ms' in e]
        if timed_ones:
            best = min(timed_ones, key=lambda e: e['ms'])
            print(f'{name:14} best: {best["tile"]}, {best["ms"]} ms', flush=True)
        if args.out:
            with atomic_write(args.out, 'w') as file:
                json.dump(
                    {
                        'command': 'python -m speed.tiles '
                        + ' '.join(sys.argv[1:] if argv is None else argv),
                        **machine(),
                        'triton': triton.__version__,
                        'kernels': found,
                    },
                    file,
                    indent=1,
                )


if __name__ == '__main__':
    main()
