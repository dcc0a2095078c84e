"""
The folder of a run, out/<run>/: its checkpoints and its log, written whole or not at all, and opened for reading.
"""

import json
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from data.loader import Tokens, UserError, dataset_folder, read_meta
from model import GPT, GPTConfig


class DamagedCheckpoint(UserError):
    """A file that is no checkpoint of ours, or not a whole one."""


def load_checkpoint(path):
    """Returns the dict that train.py saved in `path`; executes nothing that the file may carry, and notices a flipped bit."""
    try:
        with open(
            path, 'rb'
        ) as file:  # opened once: a run that is writing its next checkpoint does not change what is read here
            if zipfile.ZipFile(file).testzip():
                raise ValueError('a checksum is wrong')
            file.seek(0)
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f'there is no checkpoint {path}: train one with python train.py config/<arm>_<scale>.py'
        ) from None
    except Exception:  # a damaged file makes zipfile and torch.load raise almost anything
        raise DamagedCheckpoint(
            f'{path} is not a whole checkpoint of tensors and plain values, and nothing in it was executed: '
            'use ckpt_prev.pt beside it, or train again'
        ) from None
    if (
        not isinstance(checkpoint, dict)
        or not {'model', 'model_args', 'iter_num', 'config'} <= checkpoint.keys()
    ):
        raise DamagedCheckpoint(
            f'{path} was not written by this train.py: model, model_args, iter_num or config is missing from it'
        )
    try:
        size = {
            key: checkpoint['model_args'][key]
            for key in ('residual', 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd')
        }
        checkpoint['model_args'] = asdict(GPTConfig(**{**checkpoint['model_args'], **size}))
        checkpoint['config']['dataset'] + ''  # is text
    except (UserError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f'{path} holds another model than this model.py builds: {error}') from None
    return checkpoint


def build_model(checkpoint, path, **overrides):
    """Returns the GPT of a checkpoint, in eval mode on the CPU. overrides: keys of GPTConfig to change."""
    try:
        with torch.device('meta'):  # no weights are drawn that the checkpoint replaces
            model = GPT(GPTConfig(**{**checkpoint['model_args'], **overrides}))
        model.load_state_dict(
            dict(checkpoint['model']), assign=True
        )  # a copy: PyTorch notes `assign` in the dict, and the next to load it would assign too
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = ' '.join(str(error).split())[:120]
        raise DamagedCheckpoint(f'{path} holds another model than this model.py builds: {reason}') from None
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DamagedCheckpoint(
                f'{path} has weights that are not finite, first in {name}: use an earlier checkpoint'
            )
    return model.float().eval()


@contextmanager
def writing(path, needs=''):
    """Turns what a full disk or a folder that cannot be written raises into a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a failing write
        raise UserError(
            f'cannot write {path}{needs} ({str(error).splitlines()[0]}): the checkpoints that were there are whole; '
            'make room or name another --out_dir, then go on with --init_from=resume'
        ) from None


def find_checkpoints(paths):
    """A file is itself; a folder is its newest checkpoint or, if it holds none, that of every run below it."""

    def newest(folder):
        return next((folder / name for name in ('ckpt.pt', 'ckpt_prev.pt') if (folder / name).exists()), None)

    found = []
    for path in map(Path, paths):
        if path.is_dir():
            below = (
                [newest(path)]
                if newest(path)
                else [newest(f) for f in sorted(path.rglob('*')) if f.is_dir() and newest(f)]
            )
            if not below:
                raise UserError(
                    f'there is no ckpt.pt in {path} or below it: train a run with --out_dir={path}/<run>'
                )
            found += below
        else:
            found.append(path)
    return found


def read_log(path):
    """Returns the lines of a log.jsonl, or [] where there is none; a last line that is not whole is left out."""
    try:
        lines = [
            json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')
        ]
        return [line for line in lines if line['iter'] >= 0]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{path} is not a log of training ({error}): move it away, and the run goes on with a new one'
        ) from None


def open_runs(args):
    """Returns {name: (path, checkpoint, tokens, tokenizer)} of all that --ckpt names. Refuses what would compare apples with pears:
    runs whose data are not the same, or not those that they were trained on."""
    paths = {path.resolve(): path for path in find_checkpoints(args.ckpt)}
    names = [path.parent.name for path in paths]
    if len(set(zip(names, (path.stem for path in paths)))) < len(paths):
        names = ['_'.join(path.parent.parts[-2:]) for path in paths]
    runs, data = {}, set()
    for path, name in zip(paths.values(), names):
        checkpoint = load_checkpoint(path)
        checkpoint.pop('optimizer', None)  # two thirds of a checkpoint, and all runs are held at once
        folder, model_args = (
            dataset_folder(args.data or checkpoint['config']['dataset']),
            checkpoint['model_args'],
        )
        meta = read_meta(folder)
        first_token = meta['eot'] if checkpoint['config'].get('bos') else None
        tokens = Tokens(folder, args.split, model_args['block_size'], meta['vocab_size'], first_token)
        if meta['vocab_size'] != model_args['vocab_size']:
            raise UserError(
                f'{folder} has a vocabulary of {meta["vocab_size"]}, {path} one of {model_args["vocab_size"]}: name its data with --data'
            )
        if args.topk > (size := model_args['block_size'] * model_args['n_embd']):
            raise UserError(
                f'the {args.topk} largest magnitudes are asked for, but a sequence of {path} has {size}: ask for fewer'
            )
        sha256 = meta.get('sha256')
        if not args.data and not args.force and checkpoint.get('data_sha256') not in (None, sha256):
            raise UserError(
                f'{folder} is not the data that {path} was trained on (sha256 differs), so its validation text may have been trained on: '
                'make it as it was, or add --force'
            )
        data.add(json.dumps(sha256, sort_keys=True))
        runs[name + path.stem.removeprefix('ckpt')] = path, checkpoint, tokens, meta['tokenizer']
    if len(data) > 1 and not args.force:
        raise UserError(
            f'{", ".join(runs)} have different data (sha256): name one set with --data, or add --force'
        )
    return runs


def open_output(args, name, path):
    """Makes the folder that a run's report goes to: --out/<name>, or the checkpoint's own. Returns it and what its files' names end in: _0 for ckpt_0.pt."""
    out, suffix = (args.out / name, '') if args.out else (path.parent, path.stem.removeprefix('ckpt'))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write to {out} ({error.strerror}): name another folder with --out') from None
    return out, suffix
