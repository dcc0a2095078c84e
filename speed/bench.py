"""
How fast is it: the training step, several GPUs, the measurement and the loader, each by itself.

    python -m speed.bench                            the step of two 160m arms, 64 × 1024 tokens
    python -m speed.bench --scale=290m --bf16_streams=True --arms=baseline,ledger,ledger/kernels=False
    python -m speed.bench --skip_cold_starts         without the processes that start with cold caches
    python -m speed.bench --what=scale               on 1, 2, 4 … GPUs, 64 sequences on each: one table
    torchrun --nproc_per_node=2 -m speed.bench --batch_size=128       one line of that table
    python -m speed.bench --what=measure             measure.py's work against a plain float32 forward pass
    python -m speed.bench --what=loader              reading random windows from a sparse file of 20 GB

train: every arm is a Run of train.py, with config/<arm>_<scale>.py and any --key=value of train.py on
top; settings after a slash are for one arm alone. Arms take turns, a few steps at a time, so that they
share what the machine does meanwhile; quoted are medians over the turns. The tokens are random and lie on
the device, unless --dataset names a set. Peak memory, and the seconds from the start of a process to its
first finished step, come from two processes of their own for each arm: the compilers' caches are cold for
the first, and warm for the second.

loader: one process reads batches of random windows, as train.py does. A sparse file needs no disk, so
this is the cost of the reading itself. What a disk adds shows with --file on a file much larger than
memory.
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

from data.loader import Tokens, UserError, atomic_write, user_errors_exit
from measure import REPLICATES, Statistics, at_once, collect, window_batches
from train import Run, World, read_config

ROOT = Path(__file__).parent.parent
SEQUENCES = 64  # a step or a batch, unless --batch_size says otherwise
BLOCK_SIZE = 1024  # of the loader's windows, which have a token more
BATCHES = 10_000  # that the loader reads
WARM_UP_BATCHES = 100
SPARSE_BYTES = 20 * 10**9
GPU_TOKENS_PER_S = 1e6  # what an H200 may come to take in


# ---- Reading


def resident_bytes():
    """Returns the memory that this process holds now. Where /proc is missing, it is the most that it
    ever held."""
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        unit = 1 if sys.platform == 'darwin' else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def token_file(args):
    """Returns the file that --file names, or a sparse one."""
    if args.file is None:
        file = args.folder / 'train.bin'
        file.touch()
        os.truncate(file, SPARSE_BYTES)
        return file
    if not args.file.name.endswith('.bin'):
        raise UserError(f'--file is {args.file}: expected a token file, like data/pysource/train.bin')
    return args.file


def bench_loader(args):
    """Returns milliseconds a batch as quantiles, tokens/s, the share of a step, and by how much memory
    has grown."""
    file = token_file(args)
    tokens = Tokens(file.parent, file.stem, BLOCK_SIZE, 65536)
    for step in range(WARM_UP_BATCHES):
        tokens.windows(tokens.training_starts(1, step, SEQUENCES))
    memory_before = resident_bytes()
    ms = np.zeros(BATCHES)
    for step in range(BATCHES):
        begin = time.perf_counter()
        tokens.windows(tokens.training_starts(0, step, SEQUENCES))
        ms[step] = 1e3 * (time.perf_counter() - begin)
    quantiles = {f'{q}%': round(np.quantile(ms, q / 100), 3) for q in (5, 50, 95, 100)}
    seconds, tokens_a_batch = ms.mean() / 1e3, SEQUENCES * BLOCK_SIZE
    return {
        'sparse': args.file is None,
        'file_bytes': 2 * tokens.length,
        'sequences': SEQUENCES,
        'block_size': BLOCK_SIZE,
        'batches': BATCHES,
        'ms_per_batch': {'mean': round(ms.mean(), 3), **quantiles},
        'tokens_per_s': round(tokens_a_batch / seconds),
        'share_of_a_step_at_1M_tokens_per_s': round(seconds * GPU_TOKENS_PER_S / tokens_a_batch, 4),
        'memory_growth_bytes': resident_bytes() - memory_before,
    }


# ---- Training


def synchronize(run):
    if run.world.device_type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(run, function, times=1):
    """Returns the seconds of one call, the device's work included."""
    synchronize(run)
    begin = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(run)
    return (time.perf_counter() - begin) / times


def write_tokens(folder, count=2_000_000):
    """Writes a set of random GPT-2 tokens: what a step costs does not depend on them."""
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(0, 50257, count).astype('<u2').tofile(folder / f'{split}.bin')


def is_given(settings, key):
    return any(setting.startswith(f'--{key}=') for setting in settings)


def with_batch_size(settings):
    """Returns the settings of train.py, with the bench's batch_size unless they have one."""
    return settings if is_given(settings, 'batch_size') else [*settings, f'--batch_size={SEQUENCES}']


def start_run(args, arm):
    """Returns the Run of one arm, 'ledger' or 'ledger/kernels=False/…'. Its tokens are random and lie on
    the device, unless --dataset named a set."""
    name, *own_settings = arm.split('/')
    argv = [f'config/{name}_{args.scale}.py', *args.settings, *(f'--{s}' for s in own_settings)]
    argv.append(f'--out_dir={args.folder}')
    if is_given(args.settings, 'dataset'):
        return Run(read_config(argv))
    run = Run(read_config([*argv, f'--dataset={args.folder}']))
    starts = run.tokens['train'].training_starts(0, 0, run.micro_batch)
    on_device = run.windows('train', starts)
    run.windows = lambda split, starts: [t[: len(starts)] for t in on_device]
    return run


def in_a_process_of_its_own(args, arm, caches):
    """Returns what --what=first prints: the seconds from the start of a process to its first finished step,
    and its peak memory. caches: the folder of the compilers' caches."""
    argv = [
        '--what=first',
        f'--scale={args.scale}',
        f'--arms={arm}',
        f'--began={time.time()}',
        *args.settings,
    ]
    folders = {'TORCHINDUCTOR_CACHE_DIR': f'{caches}/inductor', 'TRITON_CACHE_DIR': f'{caches}/triton'}
    output = subprocess.run(
        [sys.executable, '-m', 'speed.bench', *argv],
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if output.returncode:
        raise UserError(f'{arm} did not finish a step: {output.stderr.strip().splitlines()[-1]}')
    return json.loads(output.stdout.splitlines()[-1])


def starts(args, arm):
    """Returns the peak memory of an arm, and the seconds to its first step with cold caches and with warm
    ones."""
    with tempfile.TemporaryDirectory() as caches:
        cold = in_a_process_of_its_own(args, arm, caches)
        warm = in_a_process_of_its_own(args, arm, caches)
    return {**cold, 'first_step_warm_s': warm['first_step_s']}


def first_step(args):
    """Prints what in_a_process_of_its_own returns."""
    run = start_run(args, args.arms[0])
    run.step()
    synchronize(run)
    seconds = time.time() - args.began
    seconds_of(run, run.step, 2)
    memory_GB = None
    if run.world.device_type == 'cuda':
        memory_GB = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps({'first_step_s': round(seconds, 1), 'peak_memory_GB': memory_GB}))


def seconds_without_exchange(run, steps):
    """Returns the seconds of a step that does not exchange its gradients with other processes."""
    wrapped, run.wrapped = run.wrapped, run.step_model
    seconds = seconds_of(run, run.step, steps)
    run.wrapped = wrapped
    return seconds


def evaluation_cost(run, step_s):
    """Returns the seconds of an evaluation, of its short measurement of the streams, and the
    evaluation's share of the time of training at the config's eval_interval."""
    run.evaluate()
    evaluation_s = seconds_of(run, run.evaluate)
    return {
        'evaluation_s': round(evaluation_s, 3),
        'streams_s': round(seconds_of(run, run.streams), 3),
        'evaluation_share': round(evaluation_s / (run.config.eval_interval * step_s), 4),
    }


def line_of(run, ms, ms_without_exchange):
    """Returns what the report says of one arm. ms: of each turn; ms_without_exchange: the same, empty on
    one GPU."""
    median = float(np.median(ms))
    tokens = run.config.batch_size * run.config.block_size
    speed = run.speed(1, median / 1000)
    line = {
        'parameters': run.model.num_params(),
        'tokens_per_step': tokens,
        'ms_per_step': {'median': round(median, 2), 'all': [round(x, 2) for x in ms]},
        'tokens_per_s': speed['tokens_per_s'],
        'TFLOP_per_s': round(1e3 * tokens / median * run.model.flops_per_token() / 1e12, 2),
        'share_of_peak': speed['mfu'],
    }
    if ms_without_exchange:
        line['waiting_for_gradients'] = round(1 - float(np.median(ms_without_exchange)) / median, 4)
    if run.world.size == 1:
        line |= evaluation_cost(run, median / 1000)
    return line


def rate_of(line):
    """Returns an arm's tokens a millisecond."""
    return line['tokens_per_step'] / line['ms_per_step']['median']


def bench_train(args):
    """Returns the time of train.py's step for each arm, and what follows from it. The ratio is that of
    tokens/s to the first arm's."""
    is_alone = int(os.environ.get('WORLD_SIZE', 1)) == 1
    with_starts = is_alone and not args.skip_cold_starts
    report = {arm: starts(args, arm) if with_starts else {} for arm in args.arms}
    runs = {}
    for arm in args.arms:
        runs[arm] = start_run(args, arm)
        seconds_of(runs[arm], runs[arm].step, 3)
    ms = {arm: [] for arm in args.arms}
    ms_without_exchange = {arm: [] for arm in args.arms}
    for _ in range(args.turns):
        for arm, run in runs.items():
            ms[arm].append(1e3 * seconds_of(run, run.step, args.steps))
            if run.world.size > 1:
                ms_without_exchange[arm].append(1e3 * seconds_without_exchange(run, args.steps))
    for arm, run in runs.items():
        report[arm] |= line_of(run, ms[arm], ms_without_exchange[arm])
        report[arm]['ratio'] = round(rate_of(report[arm]) / rate_of(report[args.arms[0]]), 4)
    return {
        'scale': args.scale,
        'settings': args.settings,
        'turns': args.turns,
        'steps_a_turn': args.steps,
        'processes': run.world.size,
        'arms': report,
    }


# ---- Several GPUs


def process_counts(args):
    """Returns 1, 2, 4 … up to the number of GPUs, or the counts that --processes names."""
    if args.processes:
        return [int(count) for count in args.processes.split(',')]
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError('--what=scale needs GPUs, or --processes=1,2 --device=cpu')
    return [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]


def bench_on(processes, args):
    """Returns the report of --what=train on some processes, with batch_size sequences on each."""
    sequences = int(next(s for s in args.settings if s.startswith('--batch_size=')).split('=')[1])
    out = args.folder / f'on_{processes}.json'
    settings = [s for s in args.settings if not s.startswith('--batch_size=')]
    argv = [
        '--skip_cold_starts',
        f'--scale={args.scale}',
        f'--arms={",".join(args.arms)}',
        f'--turns={args.turns}',
        f'--steps={args.steps}',
        f'--batch_size={processes * sequences}',
        f'--out={out}',
        *settings,
    ]
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    output = subprocess.run(
        [sys.executable, *launcher, '-m', 'speed.bench', *argv], capture_output=True, text=True, cwd=ROOT
    )
    if output.returncode:
        said = [line for line in output.stderr.splitlines() if 'error' in line.lower()]
        reason = said[0] if said else output.stderr.strip()[-200:]
        raise UserError(f'the bench on {processes} processes failed: {reason}')
    return json.loads(out.read_text())


def bench_scale(args):
    """Returns, for each arm and number of GPUs, tokens/s, and its efficiency: tokens/s a GPU over those
    of the fewest."""
    rows = {}
    for processes in process_counts(args):
        for arm, line in bench_on(processes, args)['arms'].items():
            fewest = min((row['processes'] for row in rows.values() if row['arm'] == arm), default=processes)
            base = rows.get(f'{arm} × {fewest}', line)
            speed_up = rate_of(line) / rate_of(base)
            rows[f'{arm} × {processes}'] = {
                'arm': arm,
                'processes': processes,
                'tokens_per_step': line['tokens_per_step'],
                'ms_per_step': line['ms_per_step'],
                'tokens_per_s': line['tokens_per_s'],
                'speed_up': round(speed_up, 3),
                'efficiency': round(speed_up * fewest / processes, 3),
                'waiting_for_gradients': line.get('waiting_for_gradients'),
            }
    return {'scale': args.scale, 'settings': args.settings, 'arms': rows}


# ---- Measuring


class Measuring:
    """measure.py's work on one arm, and a plain float32 forward pass over the same sequences."""

    def __init__(self, args, arm):
        self.run = start_run(args, f'{arm}/compile=False/dtype=float32')
        self.model = self.run.model.eval()
        self.tokens = self.run.tokens['val']
        self.starts = self.tokens.fixed_starts(2 * args.sequences)
        self.batch = at_once(self.run.device, self.run.config.block_size)
        self.sequences = args.sequences

    def measure(self, times=1):
        """Measures the sequences, or `times` as many."""
        starts = self.starts[: times * self.sequences]
        batches = window_batches(self.tokens, starts, self.batch)
        collect(self.model, batches, Statistics(5, REPLICATES), extras=True)

    @torch.no_grad()
    def forward(self):
        for i in range(0, self.sequences, self.batch):
            starts = self.starts[: self.sequences][i : i + self.batch]
            idx = self.tokens.windows(starts)[0].to(self.run.device)
            self.model(idx).sum().item()

    def peak_memory_GB(self, times):
        torch.cuda.reset_peak_memory_stats()
        self.measure(times)
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def bench_measure(args):
    """Returns the time of measure.py's work over that of a plain float32 forward pass, in alternation,
    and its memory at two numbers of sequences."""
    report = {}
    for arm in args.arms:
        measuring = Measuring(args, arm)
        cuda = measuring.run.world.device_type == 'cuda'
        memory = [measuring.peak_memory_GB(times) for times in (1, 2)] if cuda else None
        measuring.forward()
        measure_s, forward_s = [], []
        for _ in range(args.turns):
            measure_s.append(seconds_of(measuring.run, measuring.measure))
            forward_s.append(seconds_of(measuring.run, measuring.forward))
        report[arm] = {
            'measure_s': round(float(np.median(measure_s)), 3),
            'forward_s': round(float(np.median(forward_s)), 3),
            'ratio': round(float(np.median(measure_s) / np.median(forward_s)), 3),
            'sequences': args.sequences,
            'peak_memory_GB_at_once_and_twice_as_many': memory,
        }
    return {'scale': args.scale, 'settings': args.settings, 'arms': report}


# ---- The report

COLUMNS = {
    'first_step_s': 'first step, s',
    'first_step_warm_s': 'warm, s',
    'tokens_per_s': 'tokens/s',
    'TFLOP_per_s': 'TFLOP/s',
    'share_of_peak': 'of peak',
    'peak_memory_GB': 'memory, GB',
    'ratio': 'ratio',
    'speed_up': 'speed-up',
    'efficiency': 'efficiency',
    'measure_s': 'measure, s',
    'forward_s': 'forward, s',
    'evaluation_s': 'evaluation, s',
    'waiting_for_gradients': 'waiting',
}


def machine():
    """Returns what a reader of a report wants to know of the machine and of the software."""
    cpuinfo = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    described = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
    )
    return {
        'date': str(date.today()),
        'commit': os.environ.get('COMMIT') or described.stdout.strip(),
        'cpu': cpu[1] if cpu else platform.processor(),
        'cores': os.cpu_count(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        'numpy': np.__version__,
        'torch': torch.__version__,
    }


def as_text(report):
    """Returns a report as JSON, with every list of numbers on one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    return re.sub(r'\[\n[^][{}"]*\]', lambda found: ' '.join(found[0].split()), text)


def write_report(report, out):
    """Writes a report as JSON, unless `out` is None."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out, 'w') as file:
            file.write(as_text(report) + '\n')


def print_table(arms):
    shown = [key for key in COLUMNS if any(line.get(key) is not None for line in arms.values())]
    print(f'{"arm":24}' + ''.join(f'{COLUMNS[key]:>14}' for key in shown))
    for arm, line in arms.items():
        cells = ['–' if line.get(key) is None else line[key] for key in shown]
        print(f'{arm:24}' + ''.join(f'{cell:>14}' for cell in cells))


KINDS = {
    'train': bench_train,
    'scale': bench_scale,
    'measure': bench_measure,
    'loader': bench_loader,
    'first': first_step,
}


def bench(args):
    if args.what not in KINDS:
        raise UserError(f"--what is '{args.what}': expected train, scale, measure or loader")
    if args.what == 'loader' and args.settings:
        raise UserError(f'{args.settings[0]} does nothing for --what=loader')
    args.settings = with_batch_size(args.settings)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        if args.what in ('train', 'measure', 'first'):
            write_tokens(args.folder)
        found = KINDS[args.what](args)
    World.leave()
    is_first_process = int(os.environ.get('RANK', 0)) == 0
    if not found or not is_first_process:
        return
    command = shlex.join(['python', '-m', 'speed.bench', *args.argv])
    report = {'command': command, **found, **machine(), 'note': args.note}
    print(as_text(report))
    if 'arms' in report:
        print_table(report['arms'])
    write_report(report, args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Measures parts of a training run by themselves. '
        'Further --key=value are settings of train.py, for every arm.'
    )
    parser.add_argument('--what', default='train', help='train (default), scale, measure or loader')
    parser.add_argument('--scale', default='160m', help='which configs (default 160m)')
    parser.add_argument(
        '--arms',
        default='baseline,ledger',
        help='arms with commas between; ledger/kernels=False changes a setting of one arm',
    )
    parser.add_argument('--turns', type=int, default=7, help='how often the arms take turns (default 7)')
    parser.add_argument('--steps', type=int, default=10, help='steps a turn (default 10)')
    parser.add_argument('--skip_cold_starts', action='store_true', help='no first step, no peak memory')
    parser.add_argument('--processes', help='scale: how many, like 1,2 (default: 1, 2, 4 … GPUs)')
    parser.add_argument('--sequences', type=int, default=64, help='measure: sequences (default 64)')
    parser.add_argument('--file', type=Path, help='loader: token file (default: a sparse one of 20 GB)')
    parser.add_argument('--began', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--out', type=Path, help='JSON to write')
    parser.add_argument('--note', default='', help='what a reader should know of the machine')
    args, args.settings = parser.parse_known_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.arms = args.arms.split(',')
    with user_errors_exit():
        bench(args)


if __name__ == '__main__':
    main()
