"""What the tests of training share: a tiny run, and how two runs are compared."""

import json
import math
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch

import train
from checkpoint import build_model
from data.loader import Tokens

TINY = dict(
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    max_iters=20,
    warmup_iters=4,
    lr=0.01,
    eval_interval=7,
    eval_sequences=16,
    ckpt_interval=10,
    compile=False,
    device='cpu',
)
# Quantities of a stream that log.jsonl has of every sublayer, beside the largest three entries.
LOGGED = (
    'median',
    'max_over_median',
    'kurtosis',
    'norm',
    'fixed_dim_ratio',
    'start_ratio',
    'start_token_concentration',
    'start_dim_concentration',
)
ARMS = {'baseline': {}, 'ledger': dict(residual='ledger', gate_rank=4)}
TIMES = {'tokens_per_s', 'mfu', 'losses_s', 'streams_s'}
TORCHRUN = [
    sys.executable,
    '-m',
    'torch.distributed.run',
    '--standalone',
    '--nproc_per_node=2',
    train.__file__,
]


def write_dataset(folder, seed=0):
    """A few thousand bytes of sentences that a model can learn something about. Returns the folder."""
    folder.mkdir(parents=True)
    words = 'the ledger keeps what deliberation commits and scratch is written over again'.split()
    for split, count in (('train', 6000), ('val', 1500)):
        rng = np.random.default_rng(seed + (split == 'val'))
        text = ' '.join(rng.choice(words, count))[:count]
        np.frombuffer(text.encode(), dtype=np.uint8).astype('<u2').tofile(folder / f'{split}.bin')
    hashes = {
        f'{split}.bin': sha256((folder / f'{split}.bin').read_bytes()).hexdigest()
        for split in ('train', 'val')
    }
    (folder / 'meta.json').write_text(
        json.dumps({'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256, 'sha256': hashes})
    )
    return folder


def flags(dataset, out, **settings):
    return [
        f'--{key}={value}' for key, value in {**TINY, 'dataset': dataset, 'out_dir': out, **settings}.items()
    ]


def run(dataset, out, **settings):
    train.main(flags(dataset, out, **settings))
    return out


def stop(argv, main=train.main):
    """Returns the status that main exits with, a sentence or a number; no frame of the stopped run stays
    alive, nor does its lock."""
    try:
        main(argv)
    except SystemExit as error:
        return error.code
    pytest.fail('it went on')


def load(path):
    return torch.load(path, weights_only=True)


def log(out):
    """The lines of log.jsonl without their times and rates."""
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def equal(a, b):
    """Whether two nests of dicts, lists, tensors and values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        pairs = [(a[key], b.get(key)) for key in a] if isinstance(a, dict) else zip(a, b)
        return type(a) is type(b) and len(a) == len(b) and all(equal(*pair) for pair in pairs)
    return a == b


def same_state(one, other):
    """Whether two checkpoints hold the same run at the same point: all but the command line that got it
    there."""
    one, other = (
        {key: value for key, value in load(path).items() if key != 'config'} for path in (one, other)
    )
    return equal(one, other)


def numbers(lines):
    """Every number of some log lines, in order; NaN where there is none."""
    if isinstance(lines, dict):
        lines = [lines[key] for key in sorted(lines) if key != 'precision']
    return (
        [x for item in lines for x in numbers(item)]
        if isinstance(lines, list)
        else [math.nan if lines is None else lines]
    )


def at_step(monkeypatch, number, action):
    """Makes every run call action(run) when it is about to take step `number`."""
    take = train.Run.step
    monkeypatch.setattr(
        train.Run, 'step', lambda run: (action(run) if run.iter_num == number else None, take(run))[1]
    )


def recomputed(path, dataset):
    """The validation loss of a checkpoint's weights, on the windows that the log uses."""
    tokens = Tokens(dataset, 'val', TINY['block_size'], 257)
    with torch.no_grad():
        return build_model(load(path), path)(*tokens.windows(tokens.fixed_starts(TINY['eval_sequences'])))[
            1
        ].item()
