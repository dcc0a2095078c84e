"""
How long one sublayer's share of each kernel of speed/kernels.py takes on this GPU, by tile. This is how
the tiles in kernels.py were chosen.

    python -m speed.tiles --out=results/speed/tiles.json         64 × 1024 tokens of 160m, bfloat16 streams
    python -m speed.tiles --width=1024 --streams=float32         290m, float32 streams

Every tile computes the same random problem, and what it finds must agree with what the tile of kernels.py
finds. Times are medians of repeated launches on a warm device. GB/s counts the tensors that are as large
as D, each once, and nothing else. A tile that the GPU cannot hold says so. One that breaks the process,
as an illegal access does, takes nothing with it, because every tile runs in a worker process.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
import triton

from speed import kernels
from speed.bench import machine, write_report


def tiles(names, *rows):
    """Returns a list of dicts: the names are the same for all rows, the values differ."""
    return [dict(zip(names.split(), row)) for row in rows]


CANDIDATES = {
    'DELIBERATE': tiles(
        'ROWS COLUMNS PROGRAMS STAGES num_warps',
        *((32, 128, programs, 3, 4) for programs in (132, 264, 396, 528)),
        *((32, 64, programs, 3, 4) for programs in (264, 396, 528, 792)),
        *((64, 128, programs, 3, 8) for programs in (132, 264)),
        *((64, 64, programs, 2, 8) for programs in (264, 528)),
    ),
    'GRADIENT_HIDDEN': tiles(
        'ROWS COLUMNS STAGES num_warps',
        (64, 32, 3, 4),
        (64, 32, 4, 4),
        (64, 16, 4, 4),
        (64, 64, 2, 4),
        (128, 32, 3, 8),
        (128, 64, 3, 8),
    ),
    'GRADIENT_U': tiles(
        'ROWS COLUMNS PROGRAMS STAGES num_warps',
        (32, 64, 264, 3, 4),
        (32, 64, 528, 3, 4),
        (32, 64, 264, 2, 4),
        (32, 64, 264, 4, 4),
        (16, 64, 264, 3, 4),
        (32, 128, 132, 3, 8),
        (16, 128, 132, 3, 8),
    ),
    'GRADIENT_READ': tiles(
        'ROWS PROGRAMS STAGES',
        *((2, programs, 3) for programs in (264, 396, 528, 792, 1056)),
        *((2, programs, 2) for programs in (264, 396, 528, 792, 1056)),
        *((1, programs, 3) for programs in (264, 396, 528, 792, 1056)),
    ),
    'ADD_PRODUCT': tiles(
        'ROWS COLUMNS num_warps',
        (64, 128, 4),
        (64, 64, 4),
        (128, 64, 4),
        (128, 128, 8),
        (64, 256, 8),
    ),
    'DIRECTION': tiles(
        'ROWS num_warps',
        *((rows, warps) for rows in (32, 64, 128) for warps in (4, 8)),
    ),
}

# How many tensors as large as D each kernel reads or writes.
LARGE_TENSORS = {
    'DELIBERATE': 3,
    'GRADIENT_HIDDEN': 2,
    'GRADIENT_U': 3,
    'GRADIENT_READ': 7,
    'ADD_PRODUCT': 2,
    'DIRECTION': 0,
}


def tile_of(name):
    """Returns the tile of kernels.py for a kernel: a dict that can be changed in place."""
    return getattr(kernels, f'{name}_TILE')


def problem(N, d, r, streams, device):
    """Returns, for each kernel, its operation and random inputs for it."""
    torch.manual_seed(0)

    def single(*shape):
        return torch.randn(shape, device=device)

    def half(*shape):
        return single(*shape).to(kernels.HALF)

    def stream(*shape):
        return single(*shape).to(streams)

    D, grad_D, y = stream(N, d), stream(N, d), half(N, d)
    hidden = half(N, 3 * d + 3 * r)[:, 3 * d :]  # a part of wider rows, as in training
    U = half(3, d, r) * r**-0.5
    gram = U[2].float().T @ U[2].float()
    erase_bias, write_bias = single(d), single(d)
    overlap, shrink, length = single(N), single(N), 1 + single(N).abs()
    gates = U, erase_bias, write_bias
    of_rows = half(N, d), single(N), grad_D, stream(N, d), D, stream(N, d), single(N)
    of_columns = single(d), single(d), single(d)
    return {
        'DELIBERATE': (kernels.deliberate, (D, y, hidden, overlap, *gates)),
        'GRADIENT_HIDDEN': (
            kernels.gradient_hidden,
            (grad_D, y, hidden, overlap, *gates, half(N, r), half(N, r), length),
        ),
        'GRADIENT_U': (kernels.gradient_U, (grad_D, y, hidden, overlap, shrink, *gates)),
        'GRADIENT_READ': (kernels.gradient_read, (*of_rows, *of_columns, None, 1e-6)),
        'ADD_PRODUCT': (
            kernels.add_product,
            (grad_D, half(N, 2 * r), half(2 * r, d) * r**-0.5, None, None),
        ),
        'DIRECTION': (kernels.direction, (hidden, half(N, 2 * r)[:, r:], gram)),
    }


def summed(outputs):
    """Returns the outputs with the programs' shares added up, since how many there are depends on the
    tile."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [(x.sum(0) if x.ndim > 2 else x).double() for x in outputs]


def milliseconds(call, device):
    """Returns the median time of a call. On a CPU that is the interpreter's time and says nothing."""
    if device == 'cuda':
        return triton.testing.do_bench(call, warmup=20, rep=60, return_mode='median')
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


@cache
def expected_result(name, N, d, r, streams, device):
    """Returns a kernel's operation, its inputs, and what it finds with the tile of kernels.py."""
    operation, inputs = problem(N, d, r, getattr(torch, streams), device)[name]
    return operation, inputs, summed(operation(*inputs))


def largest_error(found, expected):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected))


def measure(name, candidate, *sizes):
    """Returns what the report says of one tile: its error and its time, or why it failed. Runs in a
    worker process."""
    tile = tile_of(name)
    operation, inputs, expected = expected_result(name, *sizes)
    chosen = dict(tile)
    entry = {'tile': candidate, 'named': candidate == chosen}
    failures = (
        RuntimeError,
        triton.runtime.errors.OutOfResources,
        triton.compiler.errors.CompilationError,
    )
    tile.clear()
    tile.update(candidate)
    try:
        entry['error'] = largest_error(summed(operation(*inputs)), expected)
        entry['ms'] = round(milliseconds(lambda: operation(*inputs), sizes[-1]), 4)
        bytes_moved = LARGE_TENSORS[name] * inputs[0].numel() * inputs[0].element_size()
        entry['GB_per_s'] = round(bytes_moved / entry['ms'] / 1e6)
    except failures as error:
        entry['failed'] = str(error).splitlines()[0][:120]
    tile.clear()
    tile.update(chosen)
    return entry


class Worker:
    """A process that measures tiles. It is replaced when a tile has broken it."""

    def __init__(self):
        self.pool = None

    def measure(self, *arguments):
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
        entry = self.pool.submit(measure, *arguments).result()
        if 'CUDA' in entry.get('failed', ''):  # nothing that follows in that process would be right
            self.pool.shutdown()
            self.pool = None
        return entry


def line_of(name, entry):
    found = entry.get('failed')
    if 'ms' in entry:
        found = f'{entry["ms"]:8.3f} ms {entry["GB_per_s"]:6} GB/s  differs by {entry["error"]:.1e}'
    return f'{name:16} {entry["tile"]!s:75} {found}' + ('  <- kernels.py' if entry['named'] else '')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tokens', type=int, default=65536)
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--rank', type=int, default=64)
    parser.add_argument('--streams', choices=('bfloat16', 'float32'), default='bfloat16')
    parser.add_argument('--kernels', default=','.join(CANDIDATES), help='some of them, separated by commas')
    parser.add_argument('--out', type=Path, help='JSON to write')
    args = parser.parse_args(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    sizes = args.tokens, args.width, args.rank, args.streams, device
    command = 'python -m speed.tiles ' + ' '.join(sys.argv[1:] if argv is None else argv)
    report = {'command': command, **machine(), 'triton': triton.__version__, 'kernels': {}}
    worker = Worker()
    for name in args.kernels.split(','):
        chosen = dict(tile_of(name))
        entries = report['kernels'][name] = []
        for candidate in [chosen, *(tile for tile in CANDIDATES[name] if tile != chosen)]:
            entries.append(worker.measure(name, candidate, *sizes))
            print(line_of(name, entries[-1]), flush=True)
        timed = [entry for entry in entries if 'ms' in entry]
        if timed:
            best = min(timed, key=lambda entry: entry['ms'])
            print(f'{name:16} best: {best["tile"]}, {best["ms"]} ms', flush=True)
        write_report(report, args.out)


if __name__ == '__main__':
    main()
