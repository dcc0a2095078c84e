"""
Where a training step's time goes on a GPU: for each arm its time, and its kernels by what they do, from torch.profiler.

    python -m speed.where --bf16_streams=True --out=results/h100/where.json          160m, 64 × 1024 random tokens; further --key=value are train.py's

Kinds go by the names that cuBLAS, cuDNN and Inductor give their kernels; launches are of kernels on the device.
"""

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from data.loader import atomic_write
from speed import bench

KINDS = {
    'products': 'nvjet|gemm|splitK|cutlass',
    'attention': 'cudnn|sdpa|flash',
    "kernels.py's": '(deliberate|direction|add_product|gradient_[aU]|gradient_read)_kernel',
    'cross entropy': 'log_softmax|logsumexp',
    'gelu': 'gelu',
    'optimizer and clip': 'multi_tensor|lpnorm',
    'other fused elementwise and sums': 'triton_',
}


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), 'the rest')


def look(args, arm):
    """Returns what the report says of one arm."""
    begin = time.perf_counter()
    run = bench.start_run(args, arm)
    bench.seconds_of(run, run.step)
    first = time.perf_counter() - begin
    bench.seconds_of(run, run.step, 5)
    ms = sorted(1e3 * bench.seconds_of(run, run.step, args.steps) for _ in range(args.turns))
    cuda = run.world.device != 'cpu'
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as p:
        bench.seconds_of(run, run.step, 2)
    rows = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key)
        for e in p.key_averages()
    ]
    rows = sorted(((total / 2000, count / 2, name) for total, count, name in rows if total > 0), reverse=True)
    time_of, launches = Counter(), Counter()
    for total, count, name in rows:
        time_of[kind_of(name)] += total
        launches[kind_of(name)] += count
    return {
        'ms': round(ms[len(ms) // 2], 2),
        'all_ms': [round(x, 2) for x in ms],
        'first_step_s': round(first, 1),
        'device_ms': round(sum(time_of.values()), 2),
        'launches': round(sum(launches.values())),
        'peak_GB': round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        'kinds': {
            kind: {'ms': round(time_of[kind], 2), 'launches': round(launches[kind])} for kind in time_of
        },
        'largest': [
            {'ms': round(total, 3), 'launches': count, 'name': name[:100]} for total, count, name in rows[:25]
        ],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--scale', default='160m')
    parser.add_argument('--arms', default='baseline,ledger', help='as of bench.py')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--out', type=Path)
    args, settings = parser.parse_known_args(argv)
    args.settings = settings + ['--batch_size=64'] * (
        not any(s.startswith('--batch_size=') for s in settings)
    )
    report = {
        'command': 'python -m speed.where ' + ' '.join(sys.argv[1:] if argv is None else argv),
        **bench.machine(),
        'arms': {},
    }
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        bench.write_tokens(args.folder)
        for arm in args.arms.split(','):
            report['arms'][arm] = found = look(args, arm)
            print(
                f'{arm}: {found["ms"]} ms a step, {found["device_ms"]} on the device in {found["launches"]} launches; first step after {found["first_step_s"]} s'
            )
            for kind, of in found['kinds'].items():
                print(f'    {kind:34} {of["ms"]:8.2f} ms {of["launches"]:6} launches')
            gc.collect()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    if args.out:
        with atomic_write(args.out, 'w') as file:
            json.dump(report, file, indent=1)


if __name__ == '__main__':
    main()
