"""
Where a training step's time goes on a GPU. For each arm: the time of a step, and the time of its kernels
by what they do, from torch.profiler.

    python -m speed.where --bf16_streams=True --out=results/speed/where.json     160m, 64 × 1024 tokens

Further --key=value are settings of train.py. Kinds of kernels are told by the names that cuBLAS, cuDNN
and Inductor give them; launches are of kernels on the device.
"""

import argparse
import gc
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from speed import bench

KINDS = {
    'products': 'nvjet|gemm|splitK|cutlass',
    'attention': 'cudnn|sdpa|flash',
    'kernels.py': '(deliberate|direction|add_product|gradient_hidden|gradient_U|gradient_read)_kernel',
    'cross entropy': 'log_softmax|logsumexp',
    'gelu': 'gelu',
    'optimizer and clip': 'multi_tensor|lpnorm',
    'other fused elementwise and sums': 'triton_',
}
PROFILED_STEPS = 2
LARGEST = 25  # kernels that the report lists by name


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), 'the rest')


def profiled_kernels(run):
    """Returns (milliseconds, launches, name) of every kernel, per step, the longest first."""
    cuda = run.world.device_type == 'cuda'
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        bench.seconds_of(run, run.step, PROFILED_STEPS)
    rows = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            rows.append((microseconds / 1000 / PROFILED_STEPS, event.count / PROFILED_STEPS, event.key))
    return sorted(rows, reverse=True)


def look(args, arm):
    """Returns what the report says of one arm."""
    begin = time.perf_counter()
    run = bench.start_run(args, arm)
    bench.seconds_of(run, run.step)
    first_step = time.perf_counter() - begin
    bench.seconds_of(run, run.step, 5)
    ms = [1e3 * bench.seconds_of(run, run.step, args.steps) for _ in range(args.turns)]
    rows = profiled_kernels(run)
    ms_of, launches_of = Counter(), Counter()
    for kernel_ms, launches, name in rows:
        ms_of[kind_of(name)] += kernel_ms
        launches_of[kind_of(name)] += launches
    cuda = run.world.device_type == 'cuda'
    return {
        'ms': round(float(np.median(ms)), 2),
        'all_ms': sorted(round(x, 2) for x in ms),
        'first_step_s': round(first_step, 1),
        'device_ms': round(sum(ms_of.values()), 2),
        'launches': round(sum(launches_of.values())),
        'peak_GB': round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        'kinds': {
            kind: {'ms': round(ms_of[kind], 2), 'launches': round(launches_of[kind])} for kind in ms_of
        },
        'largest': [
            {'ms': round(kernel_ms, 3), 'launches': launches, 'name': name[:100]}
            for kernel_ms, launches, name in rows[:LARGEST]
        ],
    }


def print_summary(arm, found):
    on_device = f'{found["device_ms"]} on the device in {found["launches"]} launches'
    print(f'{arm}: {found["ms"]} ms a step, {on_device}; first step after {found["first_step_s"]} s')
    for kind, part in found['kinds'].items():
        print(f'    {kind:34} {part["ms"]:8.2f} ms {part["launches"]:6} launches')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--scale', default='160m')
    parser.add_argument('--arms', default='baseline,ledger', help='as of speed.bench')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--steps', type=int, default=5, help='steps a turn')
    parser.add_argument('--out', type=Path, help='JSON to write')
    args, settings = parser.parse_known_args(argv)
    args.settings = bench.with_batch_size(settings)
    command = 'python -m speed.where ' + ' '.join(sys.argv[1:] if argv is None else argv)
    report = {'command': command, **bench.machine(), 'arms': {}}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        bench.write_tokens(args.folder)
        for arm in args.arms.split(','):
            report['arms'][arm] = look(args, arm)
            print_summary(arm, report['arms'][arm])
            gc.collect()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    bench.write_report(report, args.out)


if __name__ == '__main__':
    main()
