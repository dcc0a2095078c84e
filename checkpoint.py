"""
The folder of a run, out/<run>/: its checkpoints and its log, written whole or not at all, and opened for
reading."""

import argparse
import json
import math
import os
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from data.loader import Texts, Tokens, UserError, atomic_write, dataset_folder, encoding, lock, read_meta
from model import GPT, GPTConfig

# Bytes that a report and its pictures may take: tried before a measurement, not after it.
ROOM_FOR_REPORTS = 2**21


class DamagedCheckpoint(UserError):
    """A file that is no checkpoint of ours, or not a whole one."""


def load_checkpoint(path, weights=True):
    """Returns the dict that train.py saved in `path`. Executes nothing that the file may carry, and notices a
    flipped bit.

    weights: False leaves the tensors on disk and returns the rest, without looking for flipped bits.
    Raises UserError where there is no such file and DamagedCheckpoint where it is not a whole checkpoint of
    this model.py."""
    try:
        if weights:
            checkpoint = read_whole(path)
        else:
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
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
            f'{path} was not written by this train.py: model, model_args, iter_num or config is missing'
        )
    try:
        sizes = ('residual', 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd')
        required = {key: checkpoint['model_args'][key] for key in sizes}
        checkpoint['model_args'] = asdict(GPTConfig(**{**checkpoint['model_args'], **required}))
        checkpoint['config']['dataset'] + ''  # is text
    except (UserError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f'{path} holds another model than this model.py builds: {error}') from None
    if not weights:
        checkpoint = {key: value for key, value in checkpoint.items() if key not in ('model', 'optimizer')}
    return checkpoint


def read_whole(path):
    """Returns what torch.load makes of a file whose checksums are all right. The file is opened once: a run
    that is writing its next checkpoint does not change what is read here."""
    with open(path, 'rb') as file:
        if zipfile.ZipFile(file).testzip():
            raise ValueError('a checksum is wrong')
        file.seek(0)
        return torch.load(file, map_location='cpu', weights_only=True)


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
            f'cannot write {path}{needs} ({str(error).splitlines()[0]}): the checkpoints that were there are '
            'whole; make room or name another --out_dir, then go on with --init_from=resume'
        ) from None


def read_log(path):
    """Returns the lines of a log.jsonl, or [] where there is none; a last line that is not whole is left
    out."""
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


class RunFolder:
    """The folder of a run that trains: its lock, its checkpoints and its log. Nothing in it is ever half
    written.

    ckpt.pt is the newest checkpoint and ckpt_prev.pt the one before. Of several processes of one run only the
    first writes; the others read the same checkpoint. say: what to call with a sentence for the console."""

    def __init__(self, path, writes, say):
        self.path = Path(path)
        self.writes = writes
        self.say = say
        self.lock = None
        self.newest_is_whole = True  # ckpt.pt, that is: a damaged one is not kept as ckpt_prev.pt

    def open(self, init_from, restore):
        """Makes the folder this run's own and calls restore(checkpoint, path) with its newest whole
        checkpoint, if it has one. init_from: 'scratch' refuses a folder that has one, 'resume' one that has
        none."""
        if (self.path / 'lock').exists():
            self.take_lock()  # first of all: another run may be writing
        found = [self.path / name for name in ('ckpt.pt', 'ckpt_prev.pt')]
        found = [path for path in found if path.exists()]
        if found and init_from == 'scratch':
            raise UserError(
                f'{self.path} holds a run already: go on with --init_from=resume, or name another --out_dir'
            )
        if not found and init_from == 'resume':
            raise UserError(
                f'there is no checkpoint in {self.path} to resume: start without --init_from=resume'
            )
        self.take_lock()
        for path in found:
            try:
                return restore(load_checkpoint(path), path)
            except DamagedCheckpoint as error:
                if path == found[-1] and init_from == 'resume':
                    raise
                self.say(str(error))
                self.newest_is_whole = False

    def take_lock(self):
        """Keeps other runs out of the folder until this process ends, however it ends."""
        if self.lock or not self.writes:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / 'lock', 'a')
            reason = lock(
                self.lock, f'another run is writing to {self.path}: wait for it, or name another --out_dir'
            )
            if reason:
                self.say(
                    f'the file system of {self.path} has no locks ({reason}): '
                    'see to it that no second run writes there'
                )

    def release(self):
        """Lets other runs into the folder."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def write(self, name, contents):
        """Writes a checkpoint under a name of its own. contents: a dict of tensors and plain values."""
        size = sum(x.nbytes for x in tree_leaves(contents) if torch.is_tensor(x))
        path = self.path / name
        with writing(path, f', which needs about {size:,} bytes'), atomic_write(path) as file:
            torch.save(contents, file)

    def save(self, contents):
        """Writes ckpt.pt. What was ckpt.pt becomes ckpt_prev.pt."""
        newest = self.path / 'ckpt.pt'
        self.write('ckpt_new.pt', contents)
        if newest.exists() and self.newest_is_whole:
            os.replace(newest, self.path / 'ckpt_prev.pt')
        os.replace(self.path / 'ckpt_new.pt', newest)
        self.newest_is_whole = True

    def cut_log(self, iter_num):
        """Drops the lines of log.jsonl past an iteration, since its steps will be taken again; all of them
        if it is 0. Returns whether the iteration itself is in the log."""
        if not self.writes:
            return False
        path = self.path / 'log.jsonl'
        lines = [line for line in read_log(path) if line['iter'] <= iter_num > 0]
        with writing(path), atomic_write(path, 'w') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
        return any(line['iter'] == iter_num for line in lines)

    def log(self, line):
        """Adds a line to log.jsonl, on disk before the checkpoint that relies on it. A number that is not
        finite, for which JSON has no word, is null."""
        if not self.writes:
            return
        path = self.path / 'log.jsonl'
        with writing(path), open(path, 'a') as file:
            file.write(json.dumps(finite(line), allow_nan=False) + '\n')
            file.flush()
            os.fsync(file.fileno())


def finite(value):
    """Returns a nest of dicts and lists with None in the place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(checkpoint, constants, defaults):
    """Returns {setting: 'setting old → new'} for all in which a run differs from its checkpoint. constants:
    what the run's own checkpoints say of it. A setting that the checkpoint has never heard of had its
    default."""
    old = {**defaults, **checkpoint['config'], **checkpoint['model_args']}
    old['data_sha256'] = checkpoint.get('data_sha256')
    new = {**constants['config'], **constants['model_args'], 'data_sha256': constants['data_sha256']}
    return {key: f'{key} {old.get(key)!r} → {new[key]!r}' for key in new if old.get(key) != new[key]}


def resumable(checkpoint, optimizer, path):
    """Returns the state_dict that puts the optimizer where the checkpoint left it. Raises DamagedCheckpoint
    if this or anything else that a resume needs is missing: fused AdamW checks nothing, and would write
    past the end of a tensor that is too small."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    now = optimizer.state_dict()
    state = {}
    try:
        losses = (checkpoint['val_loss'], checkpoint['best_val_loss'])
        is_count = type(checkpoint['iter_num']) is int and checkpoint['iter_num'] >= 0
        if not is_count or not all(isinstance(loss, int | float) for loss in losses):
            raise ValueError('iter_num')
        for i, parameter in enumerate(parameters):
            saved = checkpoint['optimizer']['state'][i]
            # AdamW's comes with its first step; another optimizer has made its own by now.
            names = now['state'].get(i, ('step', 'exp_avg', 'exp_avg_sq'))
            state[i] = {name: saved[name].contiguous() for name in names}
            for name, value in state[i].items():
                shape = () if name == 'step' else parameter.shape
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(name)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise DamagedCheckpoint(
            f'{path} lacks what a resume needs, or its optimizer belongs to another model: '
            'use ckpt_prev.pt beside it, or start again'
        ) from None
    return {'state': state, 'param_groups': now['param_groups']}


def run_parser(description, sequences, writes):
    """Returns a parser with the arguments of every program that reads runs; open_runs and check_run_arguments
    know them.

    description: what the program does, as its docstring has it.
    sequences: the default of --sequences, or None for a program that has no such argument.
    writes: what the program writes, as its help says it: 'measure.json and figures'."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--ckpt',
        nargs='+',
        required=True,
        help='checkpoints, folders of runs, folders above them, or hf:<name>[@<revision>] if pretrained',
    )
    parser.add_argument('--data', help="dataset, a name below data/ or a path (default: the run's own)")
    add_reading_arguments(parser, sequences)
    parser.add_argument('--out', type=Path, help=f"folder for {writes} (default: the run's own)")
    parser.add_argument(
        '--force',
        action='store_true',
        help='go on although data differ between runs, or from those of the training',
    )
    return parser


def add_reading_arguments(parser, sequences):
    """Declares what a model reads, and where it runs. sequences: as above."""
    parser.add_argument(
        '--text',
        nargs='+',
        type=Path,
        help="text files to use in the place of a dataset, in the model's own tokenizer",
    )
    add_text_arguments(parser)
    if sequences:
        parser.add_argument(
            '--sequences',
            type=int,
            default=sequences,
            help=f'how many windows of the data (default {sequences})',
        )
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    parser.add_argument(
        '--seed',
        type=int,
        default=0,
        help='of all that is drawn (default 0; the windows are then those of training)',
    )


def add_text_arguments(parser):
    """Declares how text is cut into windows, and how a pretrained model is opened."""
    parser.add_argument(
        '--block_size',
        type=int,
        help='tokens of a window (default: all that the model takes, at most 1024 if pretrained)',
    )
    parser.add_argument(
        '--bos',
        choices=('auto', 'always', 'never'),
        default='auto',
        help='begin every window with the token for the beginning of a text? auto: as the tokenizer does, '
        'or as in training',
    )
    parser.add_argument(
        '--dtype',
        choices=('float32', 'bfloat16'),
        default='float32',
        help='precision of a pretrained model (default float32)',
    )
    parser.add_argument(
        '--device_map', help='auto: spread a pretrained model over all GPUs (needs accelerate)'
    )
    parser.add_argument(
        '--blocks_only',
        type=lambda value: value in ('True', 'true', '1'),
        nargs='?',
        const=True,
        default=False,
        help='measure a pretrained model at the ends of its blocks alone',
    )


def check_run_arguments(args, **least):
    """Says what is wrong with shared arguments, and puts cpu or cuda in the place of --device=auto.

    least: the smallest allowed value of each whole-number argument: sequences=1."""
    for name, smallest in {**least, 'block_size': 1}.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f'--{name} is {value}: expected at least {smallest}')
    if not 0 <= args.seed < 2**63:
        raise UserError(f'--seed is {args.seed}: expected a whole number from 0 to 2⁶³ − 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device=cuda, but PyTorch sees no GPU: use --device=cpu')
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass
class OpenRun:
    """One run that is open for reading: a model, the text that it is asked about, and where answers go."""

    name: str  # as tables show it
    path: Path  # of the checkpoint
    model: torch.nn.Module  # on args.device, in eval mode, float32
    tokens: object  # has windows(starts), fixed_starts(count, seed), block_size and vocab_size
    meta: dict  # of the data: tokenizer, eot, …
    data: dict  # what reports say of the data: name and split
    iter_num: int
    model_args: dict  # the keys of GPTConfig
    out: Path  # the folder for output
    suffix: str  # what the names of output files end in: '_0' for ckpt_0.pt, '' for the newest checkpoint

    @cached_property
    def encoding(self):
        """The tokenizer: decode(ids) returns text. Raises UserError where its files are not at hand."""
        return encoding(self.meta['tokenizer'])

    def say_token(self, token):
        """Returns a token as Python would quote it, or its number where the tokenizer is not at hand."""
        try:
            return repr(self.encoding.decode([token]))
        except UserError:
            return f'token {token}'

    def close(self):
        """Lets go of the weights, so that the next run does not meet them in memory."""
        self.model = None
        self.tokens.close()


def newest_checkpoint(folder):
    """Returns the newest checkpoint of a run's folder, or None where there is none."""
    found = (folder / name for name in ('ckpt.pt', 'ckpt_prev.pt'))
    return next((path for path in found if path.exists()), None)


def find_checkpoints(paths):
    """Returns the checkpoints that these paths name. A file is itself; a folder is its newest checkpoint or,
    if it holds none, the newest of every run below it."""
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        newest = newest_checkpoint(path)
        folders = [path] if newest else sorted(folder for folder in path.rglob('*') if folder.is_dir())
        below = [newest_checkpoint(folder) for folder in folders]
        if not any(below):
            raise UserError(
                f'there is no ckpt.pt in {path} or below it: train a run with --out_dir={path}/<run>'
            )
        found += [checkpoint for checkpoint in below if checkpoint]
    return found


def is_pretrained(name):
    """Does --ckpt name a model of Hugging Face: hf:<name>, or a local folder of save_pretrained?"""
    return str(name).startswith('hf:') or (
        Path(name, 'config.json').exists() and not Path(name, 'ckpt.pt').exists()
    )


def distinct_names(paths):
    """Returns a name for every checkpoint: that of its folder, and the folder above it where that alone does
    not tell them apart."""
    names = [path.parent.name for path in paths]
    if len(set(zip(names, (path.stem for path in paths)))) < len(paths):
        names = ['_'.join(path.parent.parts[-2:]) for path in paths]
    return [name + path.stem.removeprefix('ckpt') for name, path in zip(names, paths)]


def run_data(args, path, header, split):
    """Returns what is to be read with a run: what reports say of the data, their meta.json, and the tokens.

    header: the run's checkpoint without weights.
    Raises UserError where the model cannot read the data, or was trained on others of that name."""
    model_args = header['model_args']
    folder = dataset_folder(args.data or header['config']['dataset'])
    meta = read_meta(folder)
    block_size = args.block_size or model_args['block_size']
    if block_size > model_args['block_size']:
        raise UserError(
            f'--block_size is {block_size}, but {path} reads {model_args["block_size"]} tokens at most'
        )
    has_bos = header['config'].get('bos') if args.bos == 'auto' else args.bos == 'always'
    first_token = meta['eot'] if has_bos else None
    if args.text:
        encode = encoding(meta['tokenizer']).encode_ordinary
        tokens = Texts(args.text, encode, block_size, meta['vocab_size'], first_token)
        data = tokens.describe()
        meta['sha256'] = tokens.sha256
    else:
        tokens = dataset_tokens(folder, split, block_size, meta['vocab_size'], first_token)
        data = {'name': folder.name, 'split': split}
    if meta['vocab_size'] != model_args['vocab_size']:
        raise UserError(
            f'{folder} has a vocabulary of {meta["vocab_size"]}, {path} one of {model_args["vocab_size"]}: '
            'name its data with --data'
        )
    is_named = args.data or args.text or args.force
    if not is_named and header.get('data_sha256') not in (None, meta.get('sha256')):
        raise UserError(
            f'{folder} is not the data that {path} was trained on (sha256 differs), so its validation text '
            'may have been trained on: make it as it was, or add --force'
        )
    return data, meta, tokens


def dataset_tokens(*args):
    """Returns Tokens(*args), or says that other data can be named."""
    try:
        return Tokens(*args)
    except UserError as error:
        raise UserError(f'{error}; or name other data with --data') from None


def output_folder(args, name, path):
    """Makes the folder that a run's reports go to, --out/<name> or the checkpoint's own, and tries to write
    in it. Returns it and the suffix of its files."""
    out, suffix = (args.out / name, '') if args.out else (path.parent, path.stem.removeprefix('ckpt'))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as trial:
            trial.write(bytes(ROOM_FOR_REPORTS))
    except OSError as error:
        raise UserError(f'cannot write to {out} ({error.strerror}): name another folder with --out') from None
    return out, suffix


def open_runs(args, split='val'):
    """Yields an OpenRun for every checkpoint that --ckpt names, one in memory at a time.

    args: as run_parser declares and check_run_arguments checks them. Raises UserError, before the
    first set of weights is loaded, where runs have different data or data that they were not trained on: that
    would compare apples with pears."""
    pretrained_names = [name for name in args.ckpt if is_pretrained(name)]
    own = find_checkpoints(name for name in args.ckpt if name not in pretrained_names)
    paths = {path.resolve(): path for path in own}
    opened, sha256 = [], set()
    for resolved, name in zip(paths, distinct_names(list(paths))):
        header = load_checkpoint(paths[resolved], weights=False)
        data, meta, tokens = run_data(args, paths[resolved], header, split)
        sha256.add(json.dumps(meta.get('sha256'), sort_keys=True))
        opened.append((name, paths[resolved], data, meta, tokens))
    if len(sha256) > 1 and not args.force:
        names = ', '.join(name for name, *_ in opened)
        raise UserError(f'{names} have different data (sha256): name one set with --data, or add --force')
    for name, path, data, meta, tokens in opened:
        checkpoint = load_checkpoint(path)
        out, suffix = output_folder(args, name, path)
        run = OpenRun(
            name,
            path,
            build_model(checkpoint, path, bf16_streams=False).to(args.device),
            tokens,
            meta,
            data,
            checkpoint['iter_num'],
            checkpoint['model_args'],
            out,
            suffix,
        )
        del checkpoint
        yield run
        run.close()
    for name in pretrained_names:
        import pretrained

        run = pretrained.open_run(name, args)
        yield run
        run.close()
