"""
How fast is it: the training step, the measurement and the loader, each by itself.

    python -m speed.bench                                           the step of baseline_160m and ledger_160m, 64 × 1024 synthetic tokens
    python -m speed.bench --scale=290m --arms=baseline,ledger,ledger/kernels=False --bf16_streams=True --out=results/bench_h200.json
    torchrun --nproc_per_node=2 -m speed.bench --batch_size=128     the same on two GPUs
    python -m speed.bench --what=measure                            measure.py's work against a plain float32 forward pass
    python -m speed.bench --what=loader                             reading random windows from a sparse file of 20 GB

train: every arm is a Run of train.py, with config/<arm>_<scale>.py and any --key=value of train.py on top (after a slash: for one arm
alone). Arms take turns, a few steps at a time, so that they share what the machine does meanwhile; quoted are medians over the turns.
The tokens are random and lie on the device, unless --dataset names a set. Memory, and the seconds from the start of a process to its first finished step with cold
compiler caches, come from a process of its own for each arm.
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
from measure import REPLICATES, Statistics, at_once, collect, window_batches
from train import Run, World, read_config

SEQUENCES, BLOCK_SIZE, BATCHES = 64, 1024, 10_000  # of the loader; a window has a token more than its block
GPU_TOKENS_PER_S = 1e6  # what an H200 may come to take in


def resident():
    """Returns the bytes of memory that this process holds now; where /proc is missing, the most it ever held."""
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def bench_loader(args):
    """Returns seconds of each batch as quantiles, tokens/s, the share of a step, and how memory has grown."""
    if args.file and not args.file.name.endswith('.bin'):
        raise UserError(f'--file is {args.file}: expected a token file, like data/pysource/train.bin')
    file = args.file or args.folder / 'train.bin'
    if not args.file:
        file.touch()
        os.truncate(file, 20 * 10**9)
    tokens = Tokens(file.parent, file.stem, BLOCK_SIZE, 65536)
    seconds, memory = np.zeros(BATCHES), []
    for step in range(-100, BATCHES):  # the first hundred warm up, and are overwritten
        begin = time.perf_counter()
        tokens.windows(tokens.training_starts(0, step % 2**32, SEQUENCES))
        seconds[step] = time.perf_counter() - begin
        if step in (0, BATCHES - 1):
            memory.append(resident())
    ms = {
        'mean': 1e3 * seconds.mean(),
        **{f'{q}%': 1e3 * np.quantile(seconds, q / 100) for q in (5, 50, 95, 100)},
    }
    return {
        'sparse': not args.file,
        'file_bytes': 2 * tokens.length,
        'sequences': SEQUENCES,
        'block_size': BLOCK_SIZE,
        'batches': BATCHES,
        'ms_per_batch': {name: round(value, 3) for name, value in ms.items()},
        'tokens_per_s': round(SEQUENCES * BLOCK_SIZE / seconds.mean()),
        'share_of_a_step_at_1M_tokens_per_s': round(
            seconds.mean() * GPU_TOKENS_PER_S / (SEQUENCES * BLOCK_SIZE), 4
        ),
        'memory_growth_bytes': memory[1] - memory[0],
    }


def synchronize(run):
    if run.world.device != 'cpu':
        torch.cuda.synchronize()


def seconds_of(run, function, times=1):
    """Returns the seconds of one call, the device's work included."""
    synchronize(run)
    begin = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(run)
    return (time.perf_counter() - begin) / times


def start_run(args, arm):
    """Returns the Run of one arm, 'ledger' or 'ledger/kernels=False/…'; its tokens are random unless --dataset named some."""
    name, *own = arm.split('/')
    synthetic = not any(setting.startswith('--dataset=') for setting in args.settings)
    argv = [
        f'config/{name}_{args.scale}.py',
        *args.settings,
        *(f'--{setting}' for setting in own),
        f'--out_dir={args.folder}',
    ]
    run = Run(read_config(argv + ([f'--dataset={args.folder}'] if synthetic else [])))
    if synthetic:
        fixed = run.windows('train', run.tokens['train'].training_starts(0, 0, run.micro_batch))
        run.windows = lambda split, starts: [t[: len(starts)] for t in fixed]
    return run


def write_tokens(folder, count=2_000_000):
    """A set of random GPT-2 tokens: what a step costs does not depend on them."""
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(0, 50257, count).astype('<u2').tofile(folder / f'{split}.bin')


def in_a_process_of_its_own(args, arm):
    """Returns what --what=first prints: seconds from the start of the process to its first finished step, and peak memory."""
    argv = [
        '--what=first',
        f'--scale={args.scale}',
        f'--arms={arm}',
        f'--began={time.time()}',
        *args.settings,
    ]
    with tempfile.TemporaryDirectory() as cache:
        cold = {
            **os.environ,
            'TORCHINDUCTOR_CACHE_DIR': f'{cache}/inductor',
            'TRITON_CACHE_DIR': f'{cache}/triton',
        }
        output = subprocess.run(
            [sys.executable, '-m', 'speed.bench', *argv],
            env=cold,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
    if output.returncode:
        raise UserError(f'{arm} did not finish a step: {output.stderr.strip().splitlines()[-1]}')
    return json.loads(output.stdout.splitlines()[-1])


def first_step(args):
    """Prints what in_a_process_of_its_own returns."""
    run = start_run(args, args.arms[0])
    run.step()
    synchronize(run)
    seconds = time.time() - args.began
    for _ in range(2):
        run.step()
    synchronize(run)
    memory = None if run.world.device == 'cpu' else torch.cuda.max_memory_allocated()
    print(
        json.dumps({'first_step_s': round(seconds, 1), 'peak_memory_GB': memory and round(memory / 1e9, 2)})
    )


def bench_train(args):
    """Returns, for each arm, the time of train.py's step and what follows from it; the ratio is to the first arm's tokens/s."""
    alone = int(os.environ.get('WORLD_SIZE', 1)) == 1
    report = {arm: in_a_process_of_its_own(args, arm) if alone else {} for arm in args.arms}
    runs, rates, ms, unshared = {}, {}, {arm: [] for arm in args.arms}, {arm: [] for arm in args.arms}
    for arm in args.arms:
        runs[arm] = start_run(args, arm)
        seconds_of(runs[arm], runs[arm].step, 3)
    for _ in range(args.turns):
        for arm, run in runs.items():
            ms[arm].append(1e3 * seconds_of(run, run.step, args.steps))
            if run.world.size > 1:  # the same steps without the exchange of gradients
                wrapped, run.wrapped = run.wrapped, run.step_model
                unshared[arm].append(1e3 * seconds_of(run, run.step, args.steps))
                run.wrapped = wrapped
    for arm, run in runs.items():
        tokens, median = run.config.batch_size * run.config.block_size, float(np.median(ms[arm]))
        speed = run.speed(1, median / 1000)
        rates[arm] = tokens / median
        report[arm] |= {
            'parameters': run.model.num_params(),
            'tokens_per_step': tokens,
            'ms_per_step': {'median': round(median, 2), 'all': [round(x, 2) for x in ms[arm]]},
            'tokens_per_s': speed['tokens_per_s'],
            'TFLOP_per_s': round(1e3 * rates[arm] * run.model.flops_per_token() / 1e12, 2),
            'share_of_peak': speed['mfu'],
            'ratio': round(rates[arm] / rates[args.arms[0]], 4),
            'streams_s': round(seconds_of(run, run.streams), 3) if run.world.size == 1 else None,
            'waiting_for_gradients': round(1 - float(np.median(unshared[arm])) / median, 4)
            if unshared[arm]
            else None,
        }
    return {
        'scale': args.scale,
        'settings': args.settings,
        'turns': args.turns,
        'steps_a_turn': args.steps,
        'processes': run.world.size,
        'arms': report,
    }


def bench_measure(args):
    """Returns the time of measure.py's work over that of a plain float32 forward pass on the same sequences, in alternation, and its memory at two counts."""
    report = {}
    for arm in args.arms:
        run = start_run(args, f'{arm}/compile=False/dtype=float32')
        model, tokens, starts, cuda = (
            run.model.eval(),
            run.tokens['val'],
            run.tokens['val'].fixed_starts(2 * args.sequences),
            run.world.device != 'cpu',
        )
        batch = at_once(run.world.device, run.config.block_size)

        def measure(count=args.sequences):
            batches = window_batches(tokens, starts[:count], batch)
            collect(model, batches, Statistics(5, REPLICATES), extras=True)

        @torch.no_grad()
        def forward():
            for i in range(0, args.sequences, batch):
                model(
                    tokens.windows(starts[: args.sequences][i : i + batch])[0].to(run.world.device)
                ).sum().item()

        memory = []
        for count in (args.sequences, 2 * args.sequences) if cuda else ():
            torch.cuda.reset_peak_memory_stats()
            measure(count)
            memory.append(round(torch.cuda.max_memory_allocated() / 1e9, 3))
        forward()
        pairs = [(seconds_of(run, measure), seconds_of(run, forward)) for _ in range(args.turns)]
        seconds = dict(
            zip(('measure_s', 'forward_s'), (round(float(np.median(side)), 3) for side in zip(*pairs)))
        )
        report[arm] = {
            **seconds,
            'ratio': round(float(np.median([m for m, _ in pairs]) / np.median([f for _, f in pairs])), 3),
            'sequences': args.sequences,
            'peak_memory_GB_at_once_and_twice_as_many': memory or None,
        }
    return {'scale': args.scale, 'settings': args.settings, 'arms': report}


def machine():
    cpuinfo = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty'],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        'date': str(date.today()),
        'commit': os.environ.get('COMMIT') or commit,
        'cpu': cpu[1] if cpu else platform.processor(),
        'cores': os.cpu_count(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        'numpy': np.__version__,
        'torch': torch.__version__,
    }


def print_table(arms):
    columns = {
        'first_step_s': 'first step, s',
        'tokens_per_s': 'tokens/s',
        'TFLOP_per_s': 'TFLOP/s',
        'share_of_peak': 'of peak',
        'peak_memory_GB': 'memory, GB',
        'ratio': 'ratio',
        'measure_s': 'measure, s',
        'forward_s': 'forward, s',
        'waiting_for_gradients': 'waiting',
    }
    shown = [key for key in columns if any(line.get(key) is not None for line in arms.values())]
    print(f'{"arm":24}' + ''.join(f'{columns[key]:>14}' for key in shown))
    for arm, line in arms.items():
        print(f'{arm:24}' + ''.join(f'{line.get(key) or "–":>14}' for key in shown))


def bench(args):
    what = {'train': bench_train, 'measure': bench_measure, 'loader': bench_loader, 'first': first_step}
    if args.what not in what:
        raise UserError(f"--what is '{args.what}': expected train, measure or loader")
    if args.what == 'loader' and args.settings:
        raise UserError(f'{args.settings[0]} does nothing for --what=loader')
    rank = int(os.environ.get('RANK', 0))
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        if args.what != 'loader':
            write_tokens(args.folder)
        found = what[args.what](args)
    World.leave()
    if not found or rank:
        return
    report = {
        'command': shlex.join(['python', '-m', 'speed.bench', *args.argv]),
        **found,
        **machine(),
        'note': args.note,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if 'arms' in report:
        print_table(report['arms'])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out, 'w') as out:
            out.write(text + '\n')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Measures parts of a training run by themselves. Further --key=value are settings of train.py, for every arm.'
    )
    parser.add_argument('--what', default='train', help='train (default), measure or loader')
    parser.add_argument('--scale', default='160m', help='train, measure: which configs (default 160m)')
    parser.add_argument(
        '--arms',
        default='baseline,ledger',
        help='train, measure: arms with commas between; ledger/kernels=False changes a setting of one arm',
    )
    parser.add_argument(
        '--turns', type=int, default=7, help='train, measure: how often the arms take turns (default 7)'
    )
    parser.add_argument('--steps', type=int, default=10, help='train: steps a turn (default 10)')
    parser.add_argument('--sequences', type=int, default=64, help='measure: sequences (default 64)')
    parser.add_argument('--began', type=float, help=argparse.SUPPRESS)
    parser.add_argument(
        '--file', type=Path, help='loader: token file to read (default: a sparse one of 20 GB, made for it)'
    )
    parser.add_argument('--out', type=Path, help='JSON to write')
    parser.add_argument('--note', default='', help='what a reader should know of the machine')
    args, args_settings = parser.parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.arms = args.arms.split(',')
    given = {setting.split('=')[0] for setting in args_settings}
    args.settings = args_settings + ['--batch_size=64'] * (
        '--batch_size' not in given and args.what != 'loader'
    )
    try:
        bench(args)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
