"""
One worker of the sweep: takes the next run that nobody has taken, trains it, keeps its log and settings, deletes its weights. sweep.sh starts several.

Runs are pairs, baseline and ledger of one architecture side by side, in an order that covers the range early: a sweep cut short is balanced.
"""

import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import train

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


def settings(residual, n_layer, n_embd, head, mlp_ratio):
    """Returns a run's name and what train.py is told."""
    name, steps = f'{residual}_{n_layer}x{n_embd}_h{head}_m{mlp_ratio}', int(os.environ['STEPS'])
    values = dict(
        residual=residual,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_embd // head,
        mlp_ratio=mlp_ratio,
        dataset=os.environ['DATASET'],
        device=os.environ['DEVICE'],
        block_size=os.environ['BLOCK'],
        batch_size=os.environ['BATCH'],
        max_iters=steps,
        warmup_iters=max(1, steps // 12),
        lr=2e-3,
        beta2=0.99,
        eval_sequences=16,
        eval_interval=max(1, steps // 25),
        ckpt_interval=steps,
        log_interval=100,
        compile=False,
        kernels=False,
        out_dir=f'{os.environ["RUNS"]}/{name}',
    )
    if residual == 'ledger':
        values['gate_rank'] = max(8, n_embd // 8)
    return name, [f'--{key}={value}' for key, value in values.items()]


def finish(folder):
    """Keeps the log of a whole run and its settings. A checkpoint of the largest is 0.4 GB, and nobody asks for it."""
    args = torch.load(folder / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
    (folder / 'run.json').write_text(
        json.dumps({key: args[key] for key in ('model_args', 'config', 'data_sha256')})
    )
    for path in folder.glob('ckpt*'):
        path.unlink()


def main():
    torch.set_num_threads(1)
    out, stop = Path(os.environ['RUNS']), time.time() + float(os.environ['TIME_LIMIT'])
    for shape in RUNS[: 2 * int(os.environ['PAIRS'])]:
        name, argv = settings(*shape)
        try:
            os.makedirs(out / name)
        except FileExistsError:
            continue  # another worker's, or of an earlier sweep
        if time.time() > stop:
            shutil.rmtree(out / name)
            break
        begin, console = time.time(), sys.stdout
        with open(out / f'{name}.txt', 'w') as sys.stdout:
            try:
                train.main(argv)
                outcome = 'done'
            except SystemExit as error:
                outcome = f'failed: {error.code}'
                stop = 0 if error.code in (130, 143) else stop  # told to end
            except Exception as error:  # one run that fails does not stop the others
                outcome = f'failed: {type(error).__name__}: {error}'
            finally:
                sys.stdout = console
        if outcome == 'done':
            finish(out / name)
        print(f'{name}: {outcome}, {time.time() - begin:.0f} s', flush=True)
        gc.collect()  # the optimizer and the model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
