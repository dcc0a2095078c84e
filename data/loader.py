"""
Token files: from `data/<name>/{train,val}.bin` and `meta.json` to batches.

- A .bin file is flat little-endian uint16 token ids, so nanoGPT's GPT-2 sets work unchanged. Where there is no train.bin, the shards
  *train*.bin, which carry a header, are the split as they lie; no window straddles two of them.
- Which windows a training step sees is a pure function of (seed, step, index of the sequence in the batch).
- Windows are read with os.pread, not mapped: a file cut short under a running job ends in a sentence, not in a signal.
"""

import hashlib
import json
import os
from bisect import bisect_right
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken
import torch


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: every main() prints it as one sentence, without a traceback.
    `setting` is the name of the setting whose value is wrong, where it is one."""

    def __init__(self, message, setting=None):
        super().__init__(message)
        self.setting = setting


END_OF_TEXT = '<|endoftext|>'
GPT2_META = {
    'tokenizer': 'gpt2',
    'vocab_size': 50257,
    'eot': 50256,
}  # what a set without meta.json is taken to be
SHARD_MAGIC, SHARD_HEADER = (
    20240520,
    1024,
)  # a shard begins with 256 little-endian int32: magic, version 1, token count, zeros; ids follow


def dataset_folder(name):
    """'pysource' is data/pysource beside this file; anything with a slash is a path of its own."""
    return Path(name) if os.sep in name else Path(__file__).parent / name


def prepare_command(folder):
    """What makes the dataset in `folder`, as far as it is known here."""
    known = sorted(str(script) for script in Path(__file__).parent.glob('*/prepare.py'))
    return next(
        (f'python {script}' for script in known if Path(script).parent == folder),
        'one of ' + ', '.join(f'python {script}' for script in known),
    )


def read_meta(folder):
    """Returns the dict in meta.json with at least tokenizer, vocab_size and eot, or GPT-2's where there is no such file."""
    path = Path(folder) / 'meta.json'
    if not path.exists() and (Path(folder) / 'meta.pkl').exists():
        raise UserError(
            f"{folder} is a character set of nanoGPT's: its meta.pkl could run any program, so it is never unpickled; "
            f'make the set again from its text with python {Path(__file__).parent / "text" / "prepare.py"} input.txt --tokenizer=bytes'
        )
    try:
        meta = json.loads(path.read_text())
        missing = [key for key in GPT2_META if key not in meta]
        if missing:
            raise UserError(f'{path} lacks {", ".join(missing)}: make the dataset again with its prepare.py')
        if type(meta['vocab_size']) is not int or not 2 <= meta['vocab_size'] <= 65536:
            raise UserError(
                f'{path}: vocab_size is {meta["vocab_size"]!r}, expected a whole number from 2 to 65536 (ids are uint16)'
            )
        if type(meta['eot']) is not int or not 0 <= meta['eot'] < meta['vocab_size']:
            raise UserError(
                f'{path}: eot is {meta["eot"]!r}, expected a token id below vocab_size = {meta["vocab_size"]}'
            )
        return meta
    except FileNotFoundError:
        return dict(GPT2_META)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f'{path} is not readable as JSON ({error}): make the dataset again with its prepare.py'
        ) from None


def encoding(tokenizer):
    """The tiktoken.Encoding named 'gpt2', or 'bytes': ids 0 … 255 are the bytes of UTF-8, 256 is the end of text."""
    if tokenizer == 'bytes':
        return tiktoken.Encoding(
            'bytes',
            pat_str=r'[\s\S]',
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if tokenizer == 'gpt2':
        try:
            return tiktoken.get_encoding('gpt2')
        except (
            Exception
        ) as error:  # tiktoken downloads the BPE files, and raises whatever its HTTP library raised
            raise UserError(
                f"GPT-2's BPE files are not at hand ({type(error).__name__}): connect once, point TIKTOKEN_CACHE_DIR to a folder that has them, "
                'or prepare the data with --tokenizer=bytes'
            ) from None
    raise UserError(f"unknown tokenizer '{tokenizer}': expected gpt2 or bytes")


@contextmanager
def atomic_write(path, mode='wb'):
    """Opens a file that appears under `path` only when it is whole and on disk; until then an older one stays as it is."""
    temporary = Path(f'{path}.tmp')
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def philox(seed, stream):
    """A generator that depends on (seed, stream) alone. Its raw words are the same in every version of numpy."""
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))


def shard_tokens(head):
    """head: how a file begins, up to SHARD_HEADER bytes. Returns the token count that a shard's header promises, or None if it is no such header."""
    if len(head) < SHARD_HEADER:
        return None
    magic, version, count = np.frombuffer(head, dtype='<i4', count=3).tolist()
    return count if (magic, version) == (SHARD_MAGIC, 1) else None


def shards_of(folder, split):
    """Returns the files *train*.bin or *val*.bin of a folder, sorted; of a name that holds both words, the last counts: retrieval_train_1.bin."""
    return [
        path
        for path in sorted(Path(folder).glob(f'*{split}*.bin'))
        if path.name.rfind(split) == max(map(path.name.rfind, ('train', 'val')))
    ]


class Tokens:
    """One split of a dataset, opened for reading windows of block_size + 1 tokens. Positions count through all of its files.
    first_token: an id that every window starts with, or None. The window's own tokens then follow it, all but the last one."""

    def __init__(self, folder, split, block_size, vocab_size, first_token=None):
        self.first_token = first_token
        self.path = Path(folder) / f'{split}.bin'
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = [self.path] if self.path.exists() else shards_of(folder, split) or [self.path]
        self.fds, self.offsets, lengths = zip(
            *map(self.open, self.paths)
        )  # an offset is the byte at which a file's ids begin
        self.lengths = np.array(lengths)
        self.ends = self.lengths.cumsum().tolist()
        self.length = self.ends[-1]

    def open(self, path):
        """Returns the file descriptor, where in the file the ids begin, and how many there are."""
        try:
            fd = os.open(path, os.O_RDONLY)
            size, promised = (
                os.fstat(fd).st_size,
                shard_tokens(os.pread(fd, SHARD_HEADER, 0)),
            )  # a folder can be opened, but not read
        except OSError as error:
            raise UserError(
                f'cannot read {path} ({error.strerror}): make it with {prepare_command(path.parent)}'
            ) from None
        if promised is None and path != self.path:
            raise UserError(
                f'{path} does not begin like a shard (magic number {SHARD_MAGIC}, version 1): without a header, a split is one file, {self.path}'
            )
        if promised is not None and size != SHARD_HEADER + 2 * promised:
            raise UserError(
                f'{path} has {size:,} bytes, but its header promises {promised:,} tokens, which take {SHARD_HEADER + 2 * promised:,}: get it again'
            )
        if size % 2:
            raise UserError(
                f'{path} has an odd number of bytes ({size}): it is cut short or not a file of uint16 token ids'
            )
        offset = 0 if promised is None else SHARD_HEADER
        length = (size - offset) // 2
        if length <= self.block_size:
            raise UserError(
                f'{path} holds {length} tokens, fewer than the {self.block_size + 1} that one window of block_size = {self.block_size} needs'
            )
        return fd, offset, length

    def close(self):
        for fd in self.fds:
            os.close(fd)

    def place(self, numbers, each, stride=1):
        """each: (files,) how many windows every file has, `stride` apart. Returns where the windows of these numbers begin, counted through all files."""
        ends = each.cumsum()
        file = ends.searchsorted(numbers, side='right')
        return (self.lengths.cumsum() - self.lengths)[file] + (numbers - (ends - each)[file]) * stride

    def training_starts(self, seed, step, batch_size):
        """Returns (batch_size,) int64: where the windows of one training step begin. A longer batch begins with the same windows."""
        each = self.lengths - self.block_size
        raw = philox(seed, step).random_raw(batch_size)
        return self.place((raw % np.uint64(each.sum())).astype(np.int64), each)

    def fixed_starts(self, count, seed=0):
        """Returns up to `count` starts of windows that do not overlap, in an order that only the seed and the files' lengths determine.
        Fewer come back if the files hold fewer; a larger count begins with the same windows."""
        each = (self.lengths - 1) // self.block_size
        order = philox(seed, 0).random_raw(int(each.sum())).argsort(kind='stable')
        return self.place(order[:count], each, self.block_size)

    def windows(self, starts):
        """starts: (B,) token positions. Returns inputs and targets, each (B, block_size) int64; targets are the inputs' next tokens."""
        tokens = np.empty((len(starts), self.block_size + 1), dtype='<u2')
        places = [self.locate(start) for start in starts]
        for i, start in (
            places if hasattr(os, 'posix_fadvise') else ()
        ):  # the disk looks for all of them at once
            os.posix_fadvise(
                self.fds[i],
                self.offsets[i] + 2 * start,
                tokens.itemsize * tokens.shape[1],
                os.POSIX_FADV_WILLNEED,
            )
        for row, (i, start) in zip(tokens, places):
            data = os.pread(self.fds[i], row.nbytes, self.offsets[i] + 2 * start)
            if len(data) != row.nbytes:
                raise UserError(
                    f'{self.paths[i]} ends at token {start + len(data) // 2} although it held {self.lengths[i]} when it was opened: '
                    'it was cut short under this run'
                )
            row[:] = np.frombuffer(data, dtype='<u2')
        if tokens.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            i, start = places[row]
            raise UserError(
                f'{self.paths[i]} holds token id {tokens[row, column]} at position {start + column}, beyond the vocabulary of {self.vocab_size}: '
                'it was made with another tokenizer, or is not little-endian uint16'
            )
        if self.first_token is not None:
            tokens[:, 1:] = tokens[:, :-1].copy()
            tokens[:, 0] = self.first_token
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def locate(self, start):
        """Returns the number of the file that holds a position, and the position counted in that file."""
        i = bisect_right(self.ends, start)
        return i, int(start) - (self.ends[i - 1] if i else 0)


class Texts(Tokens):
    """Text files held in memory as the ids of one tokenizer, of any vocabulary. Gives the same windows as Tokens.

    encode: text → list of ids, without any special token.
    first_token: an id that every window starts with, or None.
    No window straddles two files. Raises UserError for a file that cannot be read or is too short."""

    def __init__(self, paths, encode, block_size, vocab_size, first_token=None):
        self.paths, self.block_size = [Path(path) for path in paths], block_size
        self.vocab_size, self.first_token = vocab_size, first_token
        self.path, self.fds = self.paths[0], []
        self.name = ' '.join(path.name for path in self.paths)
        texts = [read_text(path) for path in self.paths]
        self.ids = [np.array(encode(text), dtype=np.int64) for text in texts]
        # one more where every window starts with first_token: it then takes one token of the text less
        self.lengths = np.array([len(ids) + (first_token is not None) for ids in self.ids])
        self.ends = self.lengths.cumsum().tolist()
        self.length = self.ends[-1]
        for path, ids, length in zip(self.paths, self.ids, self.lengths):
            if length <= block_size:
                raise UserError(
                    f'{path} is {len(ids)} tokens long, too short for one window of {block_size}: '
                    f'name a longer text, or --block_size={max(1, length - 1)}'
                )
            if ids.max() >= vocab_size:
                raise UserError(f'{path} has token {ids.max()}, but the model knows only {vocab_size}')
        self.bytes_per_token = sum(len(text.encode()) for text in texts) / sum(map(len, self.ids))
        self.sha256 = hashlib.sha256('\0'.join(texts).encode()).hexdigest()

    def windows(self, starts):
        """starts: (B,) positions. Returns inputs and targets, each (B, block_size) int64.
        Targets are the inputs' next tokens."""
        tokens = np.empty((len(starts), self.block_size + 1), dtype=np.int64)
        for row, (i, start) in zip(tokens, map(self.locate, starts)):
            if self.first_token is None:
                row[:] = self.ids[i][start : start + self.block_size + 1]
            else:
                row[0] = self.first_token
                row[1:] = self.ids[i][start : start + self.block_size]
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1], tokens[:, 1:]


def read_text(path):
    """Returns the text of a file in UTF-8."""
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise UserError(f'cannot read the text {path}: {reason}') from None
