"""
Does training through kernels.py follow training through the plain formulas? Four runs of one seed on the same tokens: plain, plain again, plain with
half the micro_batch (the same sums in another order), and through the kernels. Printed and saved: the mean over steps of how far each loss lies from the first run's.

    python results/h200/same_loss.py --dataset=pysource --out=results/h200/same_loss.json           200 steps of config/ledger_160m.py; any --key=value of train.py

Rule: the kernels' difference is no larger than that of half the micro_batch.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import machine
from data.loader import atomic_write
from train import Run, read_config


def losses(config, settings, steps):
    """Returns the losses of the first steps of a run, and how it ran."""
    run = Run(read_config([config, *settings]))
    found = torch.stack([run.step()[0] for _ in range(steps)])
    return found.double().cpu(), {'micro_batch': run.micro_batch, 'sublayer': type(run.step_model.sublayers[0]).__name__}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='config/ledger_160m.py')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--out', type=Path)
    args, settings = parser.parse_known_args(argv)
    half = read_config([args.config, *settings]).batch_size // 2
    runs = {'plain': ['--kernels=False'], 'plain again': ['--kernels=False'], 'half the micro_batch': ['--kernels=False', f'--micro_batch={half}'], 'kernels': []}
    report, first = {'command': 'python results/h200/same_loss.py ' + ' '.join(sys.argv[1:] if argv is None else argv), 'steps': args.steps, **machine(), 'runs': {}}, None
    for name, own in runs.items():
        found, how = losses(args.config, settings + own, args.steps)
        first = found if first is None else first
        difference = (found - first).abs()
        report['runs'][name] = {**how, 'mean_difference': difference.mean().item(), 'largest_difference': difference.max().item(), 'signed_mean': (found - first).mean().item(),
                                'last_loss': found[-1].item(), 'losses': [round(x, 5) for x in found.tolist()]}
        print(f"{name:22} {how}: last loss {found[-1]:.4f}, from plain: mean {difference.mean():.2e}, largest {difference.max():.2e}", flush=True)
    if args.out:
        with atomic_write(args.out, 'w') as file:
            json.dump(report, file)


if __name__ == '__main__':
    main()
