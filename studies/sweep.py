"""
Trains the small architectures that studies.predict regresses on, in both arms.

    python -m studies.sweep --gpus=0                                      28 architectures, 600 steps each
    python -m studies.sweep --pairs=2 --steps=32 --jobs=1 --device=cpu    two of them, to try it on a CPU

A run keeps its log and its settings, and its weights are deleted. Runs are pairs, baseline and ledger of one
architecture side by side, in an order that covers the range early: a sweep cut short is balanced. After
--time_limit seconds no run starts, and the same command goes on with the others. At the end all whole runs
are packed into one file.
"""

import argparse
import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import train
from data.loader import UserError, atomic_write, dataset_folder
from studies.emergence import command, write_packed

# layers, width, width of a head, MLP ratio
ARCHITECTURES = [  # layers, width, head size, MLP ratio
    (2, 64, 16, 4),
    (6, 192, 32, 4),
    (10, 384, 64, 2),
    (4, 128, 16, 8),
    (8, 256, 64, 3),
    (3, 384, 32, 6),
    (9, 96, 32, 2),
    (5, 320, 64, 4),
    (8, 384, 64, 4),
    (2, 256, 64, 8),
    (4, 192, 64, 2),
    (10, 128, 32, 4),
    (6, 384, 64, 3),
    (3, 96, 16, 3),
    (8, 192, 16, 6),
    (5, 64, 32, 2),
    (2, 384, 32, 2),
    (7, 256, 32, 8),
    (4, 320, 16, 4),
    (9, 192, 64, 3),
    (6, 128, 64, 8),
    (3, 256, 16, 2),
    (10, 64, 16, 3),
    (5, 128, 32, 6),
    (7, 64, 16, 6),
    (2, 128, 64, 6),
    (7, 192, 32, 2),
    (4, 64, 64, 4),
]
RUNS = [(residual, *shape) for shape in ARCHITECTURES for residual in ('baseline', 'ledger')]


def run_name(residual, n_layer, n_embd, head, mlp_ratio):
    return f'{residual}_{n_layer}x{n_embd}_h{head}_m{mlp_ratio}'


def settings(args, residual, n_layer, n_embd, head, mlp_ratio):
    """Returns what train.py is told of one run, as a list of --key=value."""
    values = {
        'residual': residual,
        'n_layer': n_layer,
        'n_embd': n_embd,
        'n_head': n_embd // head,
        'mlp_ratio': mlp_ratio,
        'dataset': args.dataset,
        'device': args.device,
        'block_size': args.block_size,
        'batch_size': args.batch_size,
        'max_iters': args.steps,
        'warmup_iters': max(1, args.steps // 12),
        'lr': 2e-3,
        'beta2': 0.99,
        'eval_sequences': 16,
        'eval_interval': max(1, args.steps // 25),
        'ckpt_interval': args.steps,
        'log_interval': 100,
        'compile': False,
        'kernels': False,
        'out_dir': args.runs / run_name(residual, n_layer, n_embd, head, mlp_ratio),
    }
    if residual == 'ledger':
        values['gate_rank'] = max(8, n_embd // 8)
    return [f'--{key}={value}' for key, value in values.items()]


def keep_log_and_settings(folder):
    """Writes run.json and deletes the checkpoints. One of the largest is 0.4 GB, and nobody asks for it."""
    checkpoint = torch.load(folder / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
    kept = {key: checkpoint[key] for key in ('model_args', 'config', 'data_sha256')}
    (folder / 'run.json').write_text(json.dumps(kept))
    for path in folder.glob('ckpt*'):
        path.unlink()


def train_one(folder, argv):
    """Trains one run with its console in <folder>.txt. Returns how it ended, in words, and whether it was
    told to end."""
    with open(f'{folder}.txt', 'w') as console, redirect_stdout(console):
        try:
            train.main(argv)
        except SystemExit as error:
            return f'failed: {error.code}', error.code in (130, 143)
        except Exception as error:  # one run that fails does not stop the others
            return f'failed: {type(error).__name__}: {error}', False
    keep_log_and_settings(folder)
    return 'done', False


def work(args):
    """One worker: takes the next run that nobody has taken, until none is left or the time is over."""
    torch.set_num_threads(1)
    for shape in RUNS[: 2 * args.pairs]:
        folder = args.runs / run_name(*shape)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue  # another worker's, or of an earlier sweep
        if time.time() > args.until:
            folder.rmdir()
            return
        begin = time.time()
        outcome, told_to_end = train_one(folder, settings(args, *shape))
        print(f'{folder.name}: {outcome}, {time.time() - begin:.0f} s', flush=True)
        if told_to_end:
            return
        gc.collect()  # the optimizer and the model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def remove_half_trained(args):
    """What an interrupted sweep has left half trained starts again."""
    for shape in RUNS:
        folder = args.runs / run_name(*shape)
        if folder.exists() and not (folder / 'run.json').exists():
            shutil.rmtree(folder)


def make_demo_data(args):
    """Makes the demo's data once, and not by every worker."""
    if args.dataset == 'pysource_demo' and not (dataset_folder(args.dataset) / 'train.bin').exists():
        from data.pysource import prepare

        prepare.main(prepare.DEMO)


def start_workers(args, argv):
    """Starts --jobs workers on every GPU, waits for them, and ends those that still train long after the
    limit."""
    until = time.time() + args.time_limit
    workers = []
    for gpu in args.gpus.split(','):
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': gpu, 'OMP_NUM_THREADS': '1'}
        for _ in range(args.jobs):
            line = [sys.executable, '-m', 'studies.sweep', *argv, f'--until={until}']
            workers.append(subprocess.Popen(line, env=environment))
    for worker in workers:
        try:
            worker.wait(max(1, until + args.grace - time.time()))
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()


def sweep(args, argv):
    """Trains what is left of the sweep, and packs all runs that are whole, with what made them."""
    args.runs.mkdir(parents=True, exist_ok=True)
    make_demo_data(args)
    remove_half_trained(args)
    start_workers(args, argv)
    whole = [args.runs / run_name(*shape) for shape in RUNS]
    whole = [folder for folder in whole if (folder / 'run.json').exists()]
    if not whole:
        raise UserError(f'no run of the sweep ended: see {args.runs}/*.txt')
    print(f'{len(whole)} of {2 * args.pairs} runs are whole')
    write_packed(whole, args.packed)
    recipe = {
        'command': shlex.join(['python', '-m', 'studies.sweep', *argv]),
        'runs': len(whole),
        'torch': torch.__version__,
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
    }
    with atomic_write(args.packed.with_name(f'{args.packed.stem}_recipe.json'), 'w') as file:
        json.dump(recipe, file, indent=1)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pairs', type=int, default=len(ARCHITECTURES), help='how many architectures')
    parser.add_argument('--steps', type=int, default=600, help='training steps of a run')
    parser.add_argument('--block_size', type=int, default=256)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--dataset', default='pysource_demo')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--gpus', default='0', help='with commas: 0,1')
    parser.add_argument('--jobs', type=int, default=8, help='runs at a time on each GPU')
    parser.add_argument('--time_limit', type=float, default=420, help='seconds after which no run starts')
    parser.add_argument('--grace', type=float, default=100, help='seconds after that in which runs may end')
    parser.add_argument('--runs', type=Path, default=Path('out/sweep'), help='folder of the runs')
    parser.add_argument('--packed', type=Path, default=Path('out/sweep/sweep.jsonl'), help='file of all runs')
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)  # tells a worker from the sweep itself
    return parser.parse_args(argv)


def run(argv):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.until:
        work(args)
    else:
        sweep(args, argv)


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
