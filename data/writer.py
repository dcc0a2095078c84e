"""
What the prepare.py share: from text to token ids, and from ids to a dataset that is never seen half made.
"""

import json
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np

from data.loader import UserError, atomic_write

CHARACTERS = 500_000  # tokenized at a time: a run of a million blanks overflows the stack of tiktoken's regex


def tokenize(content, bpe, end_of_text=True):
    """content: bytes of UTF-8. Special tokens in the text are plain text.

    Returns (n,) little-endian uint16 token ids; the last is the end-of-text id, unless end_of_text is False.
    Raises UnicodeDecodeError where the content is not UTF-8."""
    text = content.decode()
    if bpe.name == 'bytes':
        parts = [np.frombuffer(content, dtype='u1')]  # what tiktoken would say, without looking
    else:
        starts = range(0, len(text), CHARACTERS)
        parts = [bpe.encode_to_numpy(text[i : i + CHARACTERS], disallowed_special=()) for i in starts]
    end = np.array([bpe.eot_token] * end_of_text, dtype='<u2')
    return np.concatenate([*parts, end]).astype('<u2')


def announce(out, meta):
    """Puts the new meta.json in place of the old dataset, whose .bin files go first.

    The new .bin files lie beside and take their names afterwards. Cut at any point, this leaves no .bin
    beside a meta.json that is not its own, nor beside none, which would make it GPT-2's."""
    for split in ('train', 'val'):
        (out / f'{split}.bin').unlink(missing_ok=True)
    with atomic_write(out / 'meta.json', 'w') as file:
        json.dump(meta, file, indent=2)


@contextmanager
def write_dataset(out, meta):
    """Yields append(split, tokens), which adds token ids to 'train' or 'val'.

    When the block ends, the dataset replaces the one in the folder `out`. Its meta.json is the dict meta as
    the block has left it, with counts and sha256 added. If the block raises, the old dataset stays."""
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


def add_out_argument(parser, script):
    """Adds --out, the folder that the dataset is written to: the one of the script, if none is named."""
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(script).parent,
        metavar='FOLDER',
        help='where to write (default: beside this script)',
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
