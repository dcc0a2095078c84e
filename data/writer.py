"""
What the prepare.py share: from text to token ids, and from token ids to a dataset that is never seen half made.
"""

import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256

import numpy as np

from data.loader import UserError, atomic_write


def tokenize(content, bpe, end_of_text=True):
    """content: bytes of UTF-8. Returns (n,) little-endian uint16, the end-of-text id last unless told otherwise; special tokens in the text are plain text."""
    text, piece = (
        content.decode(),
        500_000,
    )  # characters: a run of a million blanks overflows the stack of tiktoken's regex
    if bpe.name == 'bytes':
        parts = [np.frombuffer(content, dtype='u1')]  # what tiktoken would say, without looking
    else:
        parts = [
            bpe.encode_to_numpy(text[i : i + piece], disallowed_special=())
            for i in range(0, len(text), piece)
        ]
    return np.concatenate([*parts, np.array([bpe.eot_token] * end_of_text, dtype='<u2')]).astype('<u2')


def announce(out, meta):
    """Puts the new meta.json in place of the old dataset, whose .bin files go first. The new ones lie beside and take their names afterwards:
    cut at any point, this leaves no .bin beside a meta.json that is not its own, nor beside none, which would make it GPT-2's."""
    for split in ('train', 'val'):
        (out / f'{split}.bin').unlink(missing_ok=True)
    with atomic_write(out / 'meta.json', 'w') as file:
        json.dump(meta, file, indent=2)


@contextmanager
def write_dataset(out, meta):
    """Yields append(split, tokens). The dataset replaces the one in the folder `out` when the block ends, with the dict meta as the block has
    left it, to which counts and sha256 are added; if the block raises, the old one stays as it was."""
    counts, sums = Counter(), {'train': sha256(), 'val': sha256()}

    def append(split, tokens):
        files[split].write(tokens)
        sums[split].update(tokens)
        counts[split] += len(tokens)

    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / 'train.bin') as train, atomic_write(out / 'val.bin') as val:
            files = {'train': train, 'val': val}
            yield append
            meta.update(
                train_tokens=counts['train'],
                val_tokens=counts['val'],
                sha256={f'{split}.bin': digest.hexdigest() for split, digest in sums.items()},
            )
            announce(out, meta)
    except OSError as error:
        raise UserError(f'cannot write to {out}: {error.strerror}') from None


class Progress:
    """Says on stderr how far something has come, how fast, and the time left: a line redrawn, or one every ten seconds where that is a file."""

    def __init__(self, verb, total, unit, done=0):
        self.verb, self.total, self.unit, self.first = verb, total, unit, done
        self.begin = self.last = time.time()
        self.live = sys.stderr.isatty()

    def show(self, done):
        now = time.time()
        if now - self.last > (0.1 if self.live else 10) and done > self.first:
            self.last, rate = now, (done - self.first) / (now - self.begin)
            minutes, seconds = divmod(round((self.total - done) / rate), 60)
            print(
                f'{self.verb} {done:,.0f} of {self.total:,.0f} {self.unit}, {rate:,.1f} {self.unit}/s, {minutes}m{seconds:02}s left',
                end='   \r' if self.live else '\n',
                file=sys.stderr,
                flush=True,
            )


def number(flag, text):
    """'8M' is 8,000,000."""
    unit = {'k': 1e3, 'M': 1e6, 'G': 1e9, 'B': 1e9}.get(text[-1:])
    try:
        return (
            round(float(text[:-1]) * unit, 3) if unit else float(text)
        )  # a decimal fraction is seldom exact in binary
    except ValueError:
        raise UserError(f"{flag} is '{text}': expected a number, as in 8000000, 800k, 8M or 1.5G") from None
