"""
Does training through speed/kernels.py follow training through the plain formulas, and does training on
several processes follow that on one? Runs of one seed on the same tokens, each with settings of its own,
are set side by side. Runs that differ in micro_batch alone add the same numbers in another order, so they
show how far runs part that compute the same.

    python -m speed.same_loss --dataset=pysource --out=results/speed/same_loss.json
    torchrun --nproc_per_node=2 -m speed.same_loss --runs=kernels=True …            one run on two GPUs

Each run takes 200 steps of config/ledger_160m.py; further --key=value are settings of train.py. Printed
and saved are the loss of every step, and the mean over steps of how far every two runs lie apart. The
rule: kernels and plain formulas, or more processes and one, lie no further apart than runs that differ in
micro_batch alone. Once two runs have parted they stay apart, so there are several of those.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

import torch

from speed.bench import machine, write_report
from train import Run, read_config

RUNS = (
    'kernels=False',
    'kernels=False,micro_batch=12',
    'kernels=False,micro_batch=8',
    'kernels=False,micro_batch=6',
    'kernels=True',
    'kernels=True,micro_batch=12',
)


def losses(config, settings, steps):
    """Returns the losses of the first steps of a run, means over all processes, and a description of how
    it ran."""
    run = Run(read_config([config, *settings]))
    found = torch.stack([run.step()[0] for _ in range(steps)])
    description = {
        'processes': run.world.size,
        'micro_batch': run.micro_batch,
        'sublayer': type(run.step_model.sublayers[0]).__name__,
    }
    return run.world.sum(found.double()).cpu() / run.world.size, description


def free_memory():
    torch._dynamo.reset()  # and with it the memory of CUDA graphs
    gc.collect()
    torch.cuda.empty_cache()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default='config/ledger_160m.py')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument(
        '--runs',
        default=';'.join(RUNS),
        help='settings of each run with commas between, runs with semicolons between',
    )
    parser.add_argument('--out', type=Path, help='JSON to write')
    args, settings = parser.parse_known_args(argv)
    command = 'python -m speed.same_loss ' + ' '.join(sys.argv[1:] if argv is None else argv)
    report = {'command': command, 'steps': args.steps, **machine(), 'runs': {}}
    is_first_process = int(os.environ.get('RANK', 0)) == 0
    losses_of = {}
    for name in args.runs.split(';'):
        own_settings = [f'--{setting}' for setting in name.split(',')]
        found, description = losses(args.config, settings + own_settings, args.steps)
        differences = {other: (found - x).abs().mean().item() for other, x in losses_of.items()}
        losses_of[name] = found
        report['runs'][name] = {
            **description,
            'mean_difference': differences,
            'last_loss': found[-1].item(),
            'losses': [round(x, 6) for x in found.tolist()],
        }
        if is_first_process:
            from_others = ' '.join(f'{x:.2e}' for x in differences.values())
            print(f'{name:45} {description}: last loss {found[-1]:.4f}, from those above: {from_others}')
            sys.stdout.flush()
            write_report(report, args.out)
        free_memory()


if __name__ == '__main__':
    main()
