"""
Token files: from `data/<name>/{train,val}.bin` and `meta.json` to batches.

- A .bin file is flat little-endian uint16 token ids, so nanoGPT's GPT-2 sets work unchanged. Where there is
  no train.bin, the shards *train*.bin, which carry a header, or else *train*.npy are the split as they lie;
  no window straddles two of them. What is clearly something else than such ids is refused.
- Which windows a training step sees is a pure function of (seed, step, index of the sequence in the batch).
- Windows are read with os.pread, not mapped: a file cut short under a running job ends in a sentence, not
  in a signal.
"""

import machine  # noqa: F401

import errno
import fcntl
import hashlib
import json
import os
import sys
from bisect import bisect_right
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


class UserError(Exception):
    """A mistake that the person at the keyboard can mend. Every main() prints it without a traceback, with
    user_errors_exit.

    setting: the name of the setting whose value is wrong, where it is one."""

    def __init__(self, message, setting=None):
        super().__init__(message)
        self.setting = setting


@contextmanager
def user_errors_exit():
    """A UserError in the block ends the program: its sentence goes to the console, without a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f'error: {error}')


@contextmanager
def interrupts_exit():
    """Ctrl-C in the block ends the program with a sentence, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit('stopped by Ctrl-C: what was written before is whole')


HERE = Path(__file__).parent
# What a file system says that knows no locks: some network disks and containers.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
END_OF_TEXT = '<|endoftext|>'
# What a set without meta.json is taken to be.
GPT2_META = {'tokenizer': 'gpt2', 'vocab_size': 50257, 'eot': 50256}
# A shard begins with 256 little-endian int32: magic, version 1, token count, zeros. Its ids follow.
SHARD_MAGIC, SHARD_HEADER = 20240520, 1024
SAMPLE = 4096  # ids that are looked at in three places of a file, to see whether it is what it should be
TEXT_BYTES = {*b'\t\n\r', *range(32, 127)}
OTHER_HEADERS = {
    b'\x93NUMPY': 'a file of np.save: give it a name that ends in .npy, or write its ids with .tofile()',
    b'PK\x03\x04': 'a zip archive, as of np.savez or torch.save',
    b'\x1f\x8b\x08': 'a gzip file: unpack it first',
    b'\xfd7zXZ\x00': 'an xz file: unpack it first',
    b'BZh': 'a bzip2 file: unpack it first',
    b'\x28\xb5\x2f\xfd': 'a zstd file: unpack it first',
    b'MMIDIDX\x00': "an index of Megatron's: its ids lie in the .bin beside it",
    b'PAR1': 'a file of Parquet: make token ids from its text first',
    b'ARROW1': 'a file of Arrow: make token ids from its text first',
    b'\x89HDF': 'a file of HDF5: make token ids from its text first',
    np.array([SHARD_MAGIC], '<i4').tobytes(): 'a shard of another version, or one that is cut short',
    np.array([20240801], '<i4').tobytes(): 'a shard of 32-bit ids, as for the vocabulary of Llama 3',
}


def dataset_folder(name):
    """'pysource' is data/pysource beside this file; anything with a slash is a path of its own."""
    return Path(name) if os.sep in name else HERE / name


def prepare_command(folder):
    """Returns the command that makes the dataset in `folder`, or all that are known here."""
    commands = {script.parent: f'python {script}' for script in sorted(HERE.glob('*/prepare.py'))}
    return commands.get(folder) or 'one of ' + ', '.join(commands.values())


def read_meta(folder):
    """Returns the dict in meta.json, which has at least tokenizer, vocab_size and eot.

    Where there is no such file, GPT-2's is returned. Raises UserError where the file is malformed, and for a
    character set of nanoGPT's, which has a meta.pkl instead."""
    path = Path(folder) / 'meta.json'
    if not path.exists() and (Path(folder) / 'meta.pkl').exists():
        raise UserError(
            f"{folder} is a character set of nanoGPT's: its meta.pkl could run any program, so it is never "
            'unpickled; make the set again from its text with '
            f'python {HERE / "text" / "prepare.py"} input.txt --tokenizer=bytes'
        )
    try:
        meta = json.loads(path.read_text())
        check_meta(meta, path)
        return meta
    except FileNotFoundError:
        return dict(GPT2_META)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f'{path} is not readable as JSON ({error}): make the dataset again with its prepare.py'
        ) from None


def check_meta(meta, path):
    missing = [key for key in GPT2_META if key not in meta]
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}: make the dataset again with its prepare.py')
    vocab_size, eot = meta['vocab_size'], meta['eot']
    if type(vocab_size) is not int or not 2 <= vocab_size <= 65536:
        raise UserError(
            f'{path}: vocab_size is {vocab_size!r}, expected a whole number from 2 to 65536 (ids are uint16)'
        )
    if type(eot) is not int or not 0 <= eot < vocab_size:
        raise UserError(f'{path}: eot is {eot!r}, expected a token id below vocab_size = {vocab_size}')


def encoding(tokenizer):
    """Returns the tiktoken.Encoding named 'gpt2' or 'bytes'.

    The ids of 'bytes' from 0 to 255 are the bytes of UTF-8, 256 is the end of text."""
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
        except Exception as error:
            # tiktoken downloads the files, and raises whatever its HTTP library raised.
            raise UserError(
                f"GPT-2's BPE files are not at hand ({type(error).__name__}): connect once, "
                'point TIKTOKEN_CACHE_DIR to a folder that has them, or prepare the data with '
                '--tokenizer=bytes'
            ) from None
    raise UserError(f"unknown tokenizer '{tokenizer}': expected gpt2 or bytes")


@contextmanager
def atomic_write(path, mode='wb'):
    """Opens a file that appears under `path` when it is whole and on disk. Until then an older one stays."""
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


def lock(file, message):
    """Locks an open file or folder against other processes, until it is closed or this process ends.

    Returns None, or the reason why the file system has no locks. Raises UserError(message) if another process
    has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(message) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return error.strerror


def philox(seed, stream):
    """Returns a generator that depends on (seed, stream) alone, in every version of numpy."""
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))


class TokenFile(NamedTuple):
    """A file of token ids, opened for reading."""

    path: Path
    fd: int
    offset: int  # the byte at which its ids begin
    length: int  # how many ids it holds


def shard_tokens(head):
    """head: how a file begins, up to SHARD_HEADER bytes.

    Returns the number of tokens that a shard's header promises, or None where it is no such header."""
    if len(head) < SHARD_HEADER:
        return None
    magic, version, count = np.frombuffer(head, dtype='<i4', count=3).tolist()
    return count if (magic, version) == (SHARD_MAGIC, 1) else None


def shards_of(folder, split):
    """Returns the files *train*.bin or *val*.bin of a folder, or else those that end in .npy, sorted.

    Of a name that holds both words the last one counts: retrieval_train_1.bin is for training."""

    def belongs(path):
        return path.name.rfind(split) == max(path.name.rfind(word) for word in ('train', 'val'))

    for suffix in ('bin', 'npy'):
        found = [path for path in sorted(Path(folder).glob(f'*{split}*.{suffix}')) if belongs(path)]
        if found:
            return found
    return []


def npy_header(path):
    """Returns where the ids of an .npy file begin, and how many its header promises."""
    try:
        with open(path, 'rb') as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[version](file)
            offset = file.tell()
    except (ValueError, KeyError, EOFError):
        raise UserError(f'{path} does not begin like an .npy file: get it again') from None
    if dtype != np.dtype('<u2') or len(shape) != 1:
        raise UserError(
            f'{path} holds an array of {dtype} of shape {shape}: expected uint16 token ids in a row; '
            f"make it with np.save('{path.name}', ids.astype('<u2'))"
        )
    return offset, shape[0]


def looks_like(head, ids):
    """Returns what a file is, if it is clearly something else than little-endian uint16 ids, or None.

    head: its first bytes. ids: a sample of it, read as such ids, from positions divisible by 4 on."""
    for magic, what in OTHER_HEADERS.items():
        if head.startswith(magic):
            return what
    if len(ids) < 64 or not ids.any():
        return None
    is_zero = [not ids[i::4].any() for i in range(4)]
    if is_zero in ([False, True, True, True], [True, True, True, False]):
        return 'a file of 64-bit integers: three of every four 16-bit ids in it are 0'
    if is_zero in ([False, True, False, True], [True, False, True, False]):
        return 'a file of 32-bit integers: every second 16-bit id in it is 0'
    if not set(ids.tobytes()) - TEXT_BYTES:
        return 'plain text: every byte in it is a character'
    return None


def sample_of(fd, offset, length):
    """Returns ids from the beginning, the middle and the end of a file, from positions divisible by 4 on."""
    last = max(0, length - SAMPLE)
    places = {last * i // 2 // 4 * 4 for i in range(3)}
    stretches = [os.pread(fd, 2 * SAMPLE, offset + 2 * place) for place in sorted(places)]
    return np.concatenate([np.frombuffer(data[: len(data) // 2 * 2], dtype='<u2') for data in stretches])


def open_tokens(path, has_header):
    """Opens a file of token ids. has_header: whether it must begin with a header, as a shard does.

    Raises UserError where it cannot be read, is cut short, or holds something else."""
    try:
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        head = os.pread(fd, SHARD_HEADER, 0)  # a folder can be opened, but not read
    except OSError as error:
        command = prepare_command(path.parent)
        raise UserError(f'cannot read {path} ({error.strerror}): make it with {command}') from None
    offset, promised = 0, shard_tokens(head)
    if path.suffix == '.npy':
        offset, promised = npy_header(path)
    elif promised is not None:
        offset = SHARD_HEADER
    elif has_header:
        raise UserError(
            f'{path} does not begin like a shard (magic number {SHARD_MAGIC}, version 1): '
            f'without a header, a split is one file, train.bin or val.bin'
        )
    if promised is not None and size != offset + 2 * promised:
        raise UserError(
            f'{path} has {size:,} bytes, but its header promises {promised:,} tokens, '
            f'which take {offset + 2 * promised:,}: get it again'
        )
    length = (size - offset) // 2
    found = looks_like(head if promised is None else b'', sample_of(fd, offset, length))
    if found:
        raise UserError(f'{path} looks like {found}; expected token ids as little-endian uint16')
    if size % 2:
        raise UserError(
            f'{path} has an odd number of bytes ({size}): it is cut short or not a file of uint16 token ids'
        )
    return TokenFile(path, fd, offset, length)


class Tokens:
    """One split of a dataset, opened for reading windows of block_size + 1 tokens.

    Positions count through all files of the split. first_token: an id that every window starts with, or
    None; the window's own tokens follow it, all but the last one."""

    def __init__(self, folder, split, block_size, vocab_size, first_token=None):
        self.block_size, self.vocab_size, self.first_token = block_size, vocab_size, first_token
        self.path = Path(folder) / f'{split}.bin'
        self.paths = [self.path] if self.path.exists() else shards_of(folder, split) or [self.path]
        files = [open_tokens(path, has_header=path != self.path) for path in self.paths]
        for file in files:
            if file.length <= block_size:
                raise UserError(
                    f'{file.path} holds {file.length} tokens, fewer than the {block_size + 1} that one '
                    f'window of block_size = {block_size} needs'
                )
        self.fds = [file.fd for file in files]
        self.offsets = [file.offset for file in files]
        self.lengths = np.array([file.length for file in files])
        self.ends = self.lengths.cumsum().tolist()
        self.length = self.ends[-1]

    def close(self):
        for fd in self.fds:
            os.close(fd)

    def place(self, numbers, windows_per_file, stride=1):
        """Returns where windows begin, counted through all files.

        numbers: (B,) of windows that are counted through all files too. windows_per_file: (files,) how many
        each file has; they begin `stride` tokens apart."""
        ends = windows_per_file.cumsum()
        file = ends.searchsorted(numbers, side='right')
        number_in_file = numbers - (ends - windows_per_file)[file]
        file_begins = self.lengths.cumsum() - self.lengths
        return file_begins[file] + number_in_file * stride

    def training_starts(self, seed, step, batch_size):
        """Returns (batch_size,) int64: where the windows of one training step begin.

        A longer batch begins with the same windows."""
        windows_per_file = self.lengths - self.block_size
        raw = philox(seed, step).random_raw(batch_size)
        numbers = (raw % np.uint64(windows_per_file.sum())).astype(np.int64)
        return self.place(numbers, windows_per_file)

    def fixed_starts(self, count, seed=0):
        """Returns up to `count` starts of windows that do not overlap.

        Their order depends on the seed and the files' lengths alone, and a larger count begins with the
        same windows. Fewer come back if the files hold fewer."""
        windows_per_file = (self.lengths - 1) // self.block_size
        order = philox(seed, 0).random_raw(int(windows_per_file.sum())).argsort(kind='stable')
        return self.place(order[:count], windows_per_file, self.block_size)

    def windows(self, starts):
        """starts: (B,) token positions.

        Returns inputs and targets, each (B, block_size) int64; targets are the inputs' next tokens.
        Raises UserError where a file ends too early or an id lies beyond the vocabulary."""
        tokens = np.empty((len(starts), self.block_size + 1), dtype='<u2')
        places = [self.locate(start) for start in starts]
        self.announce(places, tokens[:1].nbytes)
        for row, (i, start) in zip(tokens, places):
            data = os.pread(self.fds[i], row.nbytes, self.offsets[i] + 2 * start)
            if len(data) != row.nbytes:
                raise UserError(
                    f'{self.paths[i]} ends at token {start + len(data) // 2} although it held '
                    f'{self.lengths[i]} when it was opened: it was cut short under this run'
                )
            row[:] = np.frombuffer(data, dtype='<u2')
        if tokens.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            i, start = places[row]
            raise UserError(
                f'{self.paths[i]} holds token id {tokens[row, column]} at position {start + column}, '
                f'beyond the vocabulary of {self.vocab_size}: it was made with another tokenizer, or is not '
                'little-endian uint16'
            )
        if self.first_token is not None:
            tokens[:, 1:] = tokens[:, :-1].copy()
            tokens[:, 0] = self.first_token
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def announce(self, places, size):
        """Tells the system of all reads to come, so that the disk looks for them at once. size: bytes of
        each."""
        if hasattr(os, 'posix_fadvise'):
            for i, start in places:
                os.posix_fadvise(self.fds[i], self.offsets[i] + 2 * start, size, os.POSIX_FADV_WILLNEED)

    def locate(self, start):
        """Returns the number of the file that holds a position, and the position counted in that file."""
        i = bisect_right(self.ends, start)
        return i, int(start) - (self.ends[i - 1] if i else 0)


class Texts(Tokens):
    """Text files in memory, as the ids of one tokenizer of any vocabulary. Gives the same windows as Tokens.

    encode: text → list of ids, without any special token.
    first_token: an id that every window starts with, or None.
    No window straddles two files. Raises UserError for a file that cannot be read or is too short."""

    def __init__(self, paths, encode, block_size, vocab_size, first_token=None):
        self.paths, self.block_size = [Path(path) for path in paths], block_size
        self.vocab_size, self.first_token = vocab_size, first_token
        self.path, self.fds = self.paths[0], []
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

    def describe(self):
        """Returns what reports say of the data. It is the same for two models only if their windows are."""
        name = ' '.join(path.name for path in self.paths)
        ids_sha256 = hashlib.sha256(b''.join(ids.tobytes() for ids in self.ids)).hexdigest()
        return {'name': name, 'split': 'text', 'ids_sha256': ids_sha256}

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
