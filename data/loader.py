"""
Token files: from `data/<name>/{train,val}.bin` and `meta.json` to batches.

- A .bin file is flat little-endian uint16 token ids, so nanoGPT's GPT-2 sets work unchanged.
- Which windows a training step sees is a pure function of (seed, step, index of the sequence in the batch).
- Windows are read with os.pread, not mapped: a file cut short under a running job ends in a sentence, not in a signal.
"""
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken
import torch

from model import UserError

END_OF_TEXT = '<|endoftext|>'
GPT2_META = {'tokenizer': 'gpt2', 'vocab_size': 50257, 'eot': 50256}  # what a set without meta.json is taken to be


def dataset_folder(name):
    """'pysource' is data/pysource beside this file; anything with a slash is a path of its own."""
    return Path(name) if os.sep in name else Path(__file__).parent / name


def prepare_command(folder):
    """What makes the dataset in `folder`, as far as it is known here."""
    known = sorted(str(script) for script in Path(__file__).parent.glob('*/prepare.py'))
    return next((f'python {script}' for script in known if Path(script).parent == folder), 'one of ' + ', '.join(f'python {script}' for script in known))


def read_meta(folder):
    """Returns the dict in meta.json with at least tokenizer, vocab_size and eot, or GPT-2's where there is no such file."""
    path = Path(folder) / 'meta.json'
    try:
        meta = json.loads(path.read_text())
        missing = [key for key in GPT2_META if key not in meta]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: make the dataset again with its prepare.py")
        if type(meta['vocab_size']) is not int or not 2 <= meta['vocab_size'] <= 65536:
            raise UserError(f"{path}: vocab_size is {meta['vocab_size']!r}, expected a whole number from 2 to 65536 (ids are uint16)")
        if type(meta['eot']) is not int or not 0 <= meta['eot'] < meta['vocab_size']:
            raise UserError(f"{path}: eot is {meta['eot']!r}, expected a token id below vocab_size = {meta['vocab_size']}")
        return meta
    except FileNotFoundError:
        return dict(GPT2_META)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path} is not readable as JSON ({error}): make the dataset again with its prepare.py') from None


def encoding(tokenizer):
    """The tiktoken.Encoding named 'gpt2', or 'bytes': ids 0 … 255 are the bytes of UTF-8, 256 is the end of text."""
    if tokenizer == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={END_OF_TEXT: 256})
    if tokenizer == 'gpt2':
        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as error:  # tiktoken downloads the BPE files, and raises whatever its HTTP library raised
            raise UserError(f"GPT-2's BPE files are not at hand ({type(error).__name__}): connect once, point TIKTOKEN_CACHE_DIR to a folder that has them, "
                            'or use the tokenizer bytes') from None
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


class Tokens:
    """One split of a dataset, opened for reading windows of block_size + 1 tokens."""

    def __init__(self, folder, split, block_size, vocab_size):
        self.path = Path(folder) / f'{split}.bin'
        self.block_size, self.vocab_size = block_size, vocab_size
        try:
            self.fd = os.open(self.path, os.O_RDONLY)
            size = os.fstat(self.fd).st_size
            os.pread(self.fd, 1, 0)  # a folder can be opened, but not read
        except OSError as error:
            raise UserError(f'cannot read {self.path} ({error.strerror}): make it with {prepare_command(Path(folder))}') from None
        if size % 2:
            raise UserError(f'{self.path} has an odd number of bytes ({size}): it is cut short or not a file of uint16 token ids')
        self.length = size // 2
        if self.length <= block_size:
            raise UserError(f'{self.path} holds {self.length} tokens, fewer than the {block_size + 1} that one window of block_size = {block_size} needs')

    def close(self):
        os.close(self.fd)

    def training_starts(self, seed, step, batch_size):
        """Returns (batch_size,) int64: where the windows of one training step begin. A longer batch begins with the same windows."""
        raw = philox(seed, step).random_raw(batch_size)
        return (raw % np.uint64(self.length - self.block_size)).astype(np.int64)

    def fixed_starts(self, count, seed=0):
        """Returns up to `count` starts of windows that do not overlap, in an order that only the seed and the file's length determine.
        Fewer come back if the file holds fewer; a larger count begins with the same windows."""
        slots = (self.length - 1) // self.block_size
        order = philox(seed, 0).random_raw(slots).argsort(kind='stable')
        return order[:count] * self.block_size

    def windows(self, starts):
        """starts: (B,) token positions. Returns inputs and targets, each (B, block_size) int64; targets are the inputs' next tokens."""
        tokens = np.empty((len(starts), self.block_size + 1), dtype='<u2')
        for row, start in zip(tokens, starts):
            data = os.pread(self.fd, row.nbytes, 2 * int(start))
            if len(data) != row.nbytes:
                raise UserError(f'{self.path} ends at token {int(start) + len(data) // 2} although it held {self.length} when it was opened: it was cut short under this run')
            row[:] = np.frombuffer(data, dtype='<u2')
        if tokens.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            raise UserError(f'{self.path} holds token id {tokens[row, column]} at position {int(starts[row]) + column}, beyond the vocabulary of {self.vocab_size}: '
                            'it was made with another tokenizer, or is not little-endian uint16')
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]
