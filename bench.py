"""
How fast is it, by itself: the parts of a training run that must not be what it waits for.

    python bench.py --what=loader                            # on a sparse file of 20 GB, made for it and removed
    python bench.py --what=loader --file=data/fineweb_edu/train.bin --out=loader.json

loader: one process reads batches of random windows, as train.py does. A sparse file needs no disk, so this is the cost of the reading
itself; what a disk adds shows with --file on a file much larger than memory.
"""
import argparse
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from data.loader import Tokens, UserError, atomic_write

SEQUENCES, BLOCK_SIZE, BATCHES = 64, 1024, 10_000  # a window has a token more than its block
GPU_TOKENS_PER_S = 1e6                             # what an H200 may come to take in


def resident():
    """Returns the bytes of memory that this process holds now; where /proc is missing, the most it ever held."""
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def bench_loader(file):
    """Returns seconds of each batch as quantiles, tokens/s, the share of a step, and how memory has grown."""
    tokens = Tokens(file.parent, file.stem, BLOCK_SIZE, 65536)
    seconds, memory = np.zeros(BATCHES), []
    for step in range(-100, BATCHES):  # the first hundred warm up, and are overwritten
        begin = time.perf_counter()
        tokens.windows(tokens.training_starts(0, step % 2**32, SEQUENCES))
        seconds[step] = time.perf_counter() - begin
        if step in (0, BATCHES - 1):
            memory.append(resident())
    ms = {'mean': 1e3 * seconds.mean(), **{f'{q}%': 1e3 * np.quantile(seconds, q / 100) for q in (5, 50, 95, 100)}}
    return {'file_bytes': 2 * tokens.length, 'sequences': SEQUENCES, 'block_size': BLOCK_SIZE, 'batches': BATCHES,
            'ms_per_batch': {name: round(value, 3) for name, value in ms.items()},
            'tokens_per_s': round(SEQUENCES * BLOCK_SIZE / seconds.mean()),
            'share_of_a_step_at_1M_tokens_per_s': round(seconds.mean() * GPU_TOKENS_PER_S / (SEQUENCES * BLOCK_SIZE), 4),
            'memory_growth_bytes': memory[1] - memory[0]}


def machine():
    cpuinfo = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {'date': str(date.today()), 'commit': commit, 'cpu': cpu[1] if cpu else platform.processor(), 'cores': os.cpu_count(),
            'python': platform.python_version(), 'numpy': np.__version__, 'torch': torch.__version__}


def bench(args):
    if args.what != 'loader':
        raise UserError(f"--what is '{args.what}': expected loader")
    if args.file and not args.file.name.endswith('.bin'):
        raise UserError(f'--file is {args.file}: expected a token file, like data/pysource/train.bin')
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder) / 'train.bin'
        if not args.file:
            file.touch()
            os.truncate(file, 20 * 10**9)
        report = {'command': shlex.join(['python', 'bench.py', *args.argv]), 'sparse': not args.file, **bench_loader(file), **machine(), 'note': args.note}
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out, 'w') as out:
            out.write(text + '\n')


def main(argv=None):
    parser = argparse.ArgumentParser(description='Measures parts of a training run by themselves.')
    parser.add_argument('--what', default='loader', help='loader')
    parser.add_argument('--file', type=Path, help='token file to read (default: a sparse one of 20 GB, made for it)')
    parser.add_argument('--out', type=Path, help='JSON to write')
    parser.add_argument('--note', default='', help='what a reader should know of the machine')
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        bench(args)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
