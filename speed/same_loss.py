"""
Does training through kernels.py follow training through the plain formulas, and on several processes that on one? Runs of one seed on the same tokens, each with settings of its
own; runs that differ in micro_batch alone add the same numbers in another order. Printed and saved: every step's loss, and the mean over steps of how far apart every two runs lie.

    python -m speed.same_loss --dataset=pysource --out=results/h200/same_loss.json           200 steps of config/ledger_160m.py; any --key=value of train.py
    torchrun --nproc_per_node=2 -m speed.same_loss --runs=kernels=True …                     one of them on two GPUs

Rule: kernels and plain, or more processes and one, lie no further apart than runs which differ in micro_batch alone. Once two runs have parted they stay apart, so several are there.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path

import torch

from data.loader import atomic_write
from speed.bench import machine
from train import Run, read_config

RUNS = 'kernels=False;kernels=False,micro_batch=12;kernels=False,micro_batch=8;kernels=False,micro_batch=6;kernels=True;kernels=True,micro_batch=12'


def losses(config, settings, steps):
    """Returns the losses of the first steps of a run, means over all processes, and how it ran."""
    run = Run(read_config([config, *settings]))
    found = torch.stack([run.step()[0] for _ in range(steps)])
    how = {
        'processes': run.world.size,
        'micro_batch': run.micro_batch,
        'sublayer': type(run.step_model.sublayers[0]).__name__,
    }
    return run.world.sum(found.double()).cpu() / run.world.size, how


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default='config/ledger_160m.py')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument(
        '--runs', default=RUNS, help='settings of each run with commas between, runs with semicolons between'
    )
    parser.add_argument('--out', type=Path)
    args, settings = parser.parse_known_args(argv)
    rank, all_losses = int(os.environ.get('RANK', 0)), {}
    report = {
        'command': 'python -m speed.same_loss ' + ' '.join(sys.argv[1:] if argv is None else argv),
        'steps': args.steps,
        **machine(),
        'runs': {},
    }
    for name in args.runs.split(';'):
        found, how = losses(
            args.config, settings + [f'--{setting}' for setting in name.split(',')], args.steps
        )
        apart = {other: (found - x).abs().mean().item() for other, x in all_losses.items()}
        all_losses[name] = found
        report['runs'][name] = {
            **how,
            'mean_difference': apart,
            'last_loss': found[-1].item(),
            'losses': [round(x, 6) for x in found.tolist()],
        }
        if rank == 0:
            print(
                f'{name:45} {how}: last loss {found[-1]:.4f}, from those above: '
                + ' '.join(f'{x:.2e}' for x in apart.values()),
                flush=True,
            )
        torch._dynamo.reset()  # and with it the memory of CUDA graphs
        gc.collect()
        torch.cuda.empty_cache()
        if args.out and rank == 0:
            with atomic_write(args.out, 'w') as file:
                json.dump(report, file)


if __name__ == '__main__':
    main()
