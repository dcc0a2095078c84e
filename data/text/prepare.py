"""
Anybody's own text as a dataset: .txt, .md, .py, .jsonl, .json, plain or compressed, and folders of them.

    python data/text/prepare.py notes.txt ~/corpus                    # GPT-2's BPE, into data/text
    python data/text/prepare.py dump.jsonl.xz --field=data.text --out=data/dump --tokenizer=bytes

files in the order of their paths → pieces → workers: documents, token ids → train.bin, val.bin, meta.json.

- A line of a .jsonl or .json is a document, of any other kind the file is.
- A piece is all that is held of a file, and only a few pieces are on their way at a time. So memory does not
  depend on the size of the input; nor do the bytes written depend on the number of workers.
- A document's sha256 alone decides whether it is for training or for validation, unless --val names files to
  validate on. A text longer than a piece is divided piece by piece, and a document ends where the side
  changes: a single book is then enough to train and to validate on.
- The workers are threads, since hashing and tiktoken let go of the interpreter's lock.
"""

import argparse
import bz2
import codecs
import copy
import gzip
import io
import json
import lzma
import os
import sys
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

# Run as a script, it finds the repository and not its own folder.
if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from machine import usable_cores

from data.loader import UserError, encoding, user_errors_exit
from data.progress import Progress
from data.writer import add_out_argument, tokenize, write_dataset

TEXTS, LINES_OF_JSON = ('.txt', '.md', '.py'), ('.jsonl', '.json')
UNPACK_FIRST = (
    '.zip',
    '.7z',
    '.rar',
    '.tar',
    '.tgz',
    '.lz4',
    '.br',
    '.parquet',
    '.arrow',
)  # nothing here reads them
PIECE = 1 << 18  # bytes, and up to as much again to the end of a line
NO_DOCUMENT = object()


def open_zst(raw):
    """raw: a file of zstd frames, open for reading. Returns what they hold, open for reading."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        import zstandard

        decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
        return io.BufferedReader(decoder.stream_reader(raw, read_across_frames=True))
    return zstd.open(raw)


def has_zst():
    try:
        open_zst(io.BytesIO()).close()
    except ImportError:
        return False
    return True


OPENERS = {'': lambda raw: raw, '.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zst}
DECODING_ERRORS = OSError, EOFError, zlib.error, lzma.LZMAError
EXPECTED = f'{", ".join(TEXTS + LINES_OF_JSON)}, or one of these with {", ".join(list(OPENERS)[1:])}'


def kind_of(path):
    """Returns two suffixes in lower case: what a file holds, and how it is compressed, '' for not at all."""
    stem, last = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], last) if last in OPENERS else (last, '')


class LeftOut:
    """Counts what is not taken, by reason, with the bytes of text lost and the first path concerned."""

    def __init__(self):
        self.counts, self.bytes, self.first = Counter(), Counter(), {}

    def add(self, reason, path, size=0):
        self.counts[reason] += 1
        self.bytes[reason] += size
        self.first.setdefault(reason, path)

    def __str__(self):
        return 'left out: ' + (', '.join(map(self.phrase, sorted(self.counts))) or 'nothing')

    def phrase(self, reason):
        count, size = self.counts[reason], self.bytes[reason]
        lost = f'{size:,} bytes in ' if size else ''
        where = self.first[reason] if count == 1 else f'the first: {self.first[reason]}'
        return f'{lost}{count:,} {reason} ({where})'


class Finder:
    """Collects the files that paths name or hold: {the file itself: the first path that leads to it}."""

    def __init__(self, left_out):
        self.found, self.left_out = {}, left_out

    def add(self, path):
        """Takes a file, once, whatever names it goes by."""
        if kind_of(path)[1] == '.zst' and not has_zst():
            raise UserError(
                f'{path} needs a decoder for .zst: pip install zstandard, or unpack it with zstd -d {path}'
            )
        if self.found.setdefault(os.path.realpath(path), path) != path:
            self.left_out.add('second names of a file', path)

    def add_named(self, path):
        suffix, _ = kind_of(path)
        if suffix in UNPACK_FIRST:
            raise UserError(f'{path} needs a decoder for {suffix}, which is not here: unpack it first')
        if suffix not in TEXTS + LINES_OF_JSON:
            raise UserError(f'{path} is of no kind that is known here: expected {EXPECTED}')
        self.add(path)

    def add_folder(self, folder):
        """Takes what a folder holds. Links to folders are not followed, since they may lead in circles."""

        def cannot_list(error):
            self.left_out.add('folders that cannot be read', error.filename)

        for where, folders, names in os.walk(folder, onerror=cannot_list):
            for path in (os.path.join(where, name) for name in folders):
                if os.path.islink(path):
                    self.left_out.add('linked folders', path)
            for path in (os.path.join(where, name) for name in sorted(names)):
                self.add_found(path)

    def add_found(self, path):
        suffix, _ = kind_of(path)
        if suffix in TEXTS + LINES_OF_JSON:
            self.add(path)
        elif suffix in UNPACK_FIRST:
            self.left_out.add('files to unpack first', path)
        else:
            self.left_out.add('files of other kinds', path)


def text_files(paths, left_out):
    """Returns the files that the paths name or hold, sorted."""
    finder = Finder(left_out)
    for path in sorted({os.path.normpath(path) for path in paths}):
        if os.path.isdir(path):
            finder.add_folder(path)
        elif os.path.exists(path):
            finder.add_named(path)
        else:
            raise UserError(f'there is no {path}: expected a file or a folder')
    if not finder.found:
        raise UserError(
            f'{", ".join(paths)} hold no text ({left_out}): expected one file at least of {EXPECTED}'
        )
    return sorted(finder.found.values())


def pieces_of_text(file):
    """Yields the content in pieces that end with a line or, where a line is too long, with a character."""
    while piece := file.read(PIECE) + file.readline(PIECE):
        for _ in range(3):
            next_byte = file.peek(1)[:1]
            if b'\x80' <= next_byte < b'\xc0':  # it goes on with a character of UTF-8
                piece += file.read(1)
        yield piece


def pieces_of_lines(file):
    """Yields lists of lines."""
    while lines := file.readlines(PIECE):
        yield lines


@dataclass
class Piece:
    """A part of a file."""

    path: str
    content: bytes | list  # lines of JSON are a list
    side: str | None  # 'train' or 'val'; None: the hash of a document decides


class Source:
    """All pieces of all files in turn. `done` counts the bytes read of `size`, as they lie on the disk."""

    def __init__(self, paths, sides, left_out):
        self.paths, self.sides, self.left_out = paths, sides, left_out
        self.size = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        self.done = 0

    def __iter__(self):
        for path in self.paths:
            before = self.done
            try:
                # A broken link, or a named pipe, on which open would wait forever.
                if not os.path.isfile(path):
                    raise OSError
                with open(path, 'rb') as raw:
                    for content in self.pieces(path, raw):
                        self.done = before + raw.tell()
                        yield Piece(path, content, self.sides.get(path))
            except (
                DECODING_ERRORS
            ):  # a compressed file may break off in the middle: what was read of it stays
                self.left_out.add('unreadable files', path)

    @staticmethod
    def pieces(path, raw):
        suffix, compression = kind_of(path)
        cut = pieces_of_lines if suffix in LINES_OF_JSON else pieces_of_text
        with OPENERS[compression](raw) as file:
            for i, content in enumerate(cut(file)):
                if i == 0 and cut is pieces_of_text:  # json.loads drops a byte order mark by itself
                    content = content.removeprefix(codecs.BOM_UTF8)
                if content:
                    yield content


def look_up(value, field):
    """Returns value[field], or, where there is no such key, what its parts between dots lead to."""
    if field in value:
        return value[field]
    for key in field.split('.'):
        value = value[key]
    return value


def content_of(line, field):
    """Returns the document in a line of JSON as UTF-8, or the reason to leave it out."""
    try:
        return look_up(json.loads(line), field).encode() or 'empty documents'
    except UnicodeError:  # a lone surrogate, too
        return 'lines that are not UTF-8'
    except (KeyError, TypeError, AttributeError):
        return f"lines without a text as '{field}'"
    except (ValueError, RecursionError):
        return 'malformed lines'


@dataclass
class Part:
    """A whole document, or what a piece holds of one."""

    document: object  # parts that follow each other belong together if this is equal
    side: str | None  # as a Piece's
    digest: int  # sha256 of the text as a number
    tokens: np.ndarray
    size: int  # bytes of text


@dataclass
class Hole:
    """Something that is left out: nothing may be joined over it. `size`: bytes of text."""

    reason: str
    path: str
    size: int


def convert(piece, field, bpe):
    """Returns the Parts and Holes of a piece."""
    if isinstance(piece.content, bytes):
        return [convert_text(piece.path, piece.content, piece, bpe)]
    lines = [line for line in piece.content if line.strip()]
    return [convert_line(line, piece, field, bpe) for line in lines]


def convert_line(line, piece, field, bpe):
    content = content_of(line, field)
    if isinstance(content, str):
        return Hole(content, piece.path, len(line))
    return convert_text(object(), content, piece, bpe)


def convert_text(document, content, piece, bpe):
    # Zero bytes are valid UTF-8, but what holds them is UTF-16 or no text at all.
    is_text = isinstance(piece.content, list) or b'\0' not in content
    try:
        tokens = tokenize(content, bpe, end_of_text=False) if is_text else None
    except UnicodeDecodeError:
        tokens = None
    if tokens is None:
        return Hole(f'pieces of up to {PIECE // 1000} kB that are not UTF-8', piece.path, len(content))
    digest = int.from_bytes(sha256(content).digest(), 'big')
    return Part(document, piece.side, digest, tokens, len(content))


def converted(source, field, bpe, workers):
    """Yields what convert finds, in the source's order, with a few pieces on their way for each worker."""
    waiting = deque()
    with ThreadPool(workers) as pool, Progress('tokenizing', source.size / 1e6, 'MB') as progress:
        for piece in source:
            waiting.append(pool.apply_async(convert, (piece, field, bpe)))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().get()
                progress.show(source.done / 1e6)
        for result in waiting:
            yield from result.get()


class OneSided(UserError):
    """All text is training, or all is validation. `smallest`: its smallest sha256 as a number."""

    def __init__(self, smallest):
        super().__init__(
            f'all text is one document shorter than {PIECE // 1000} kB, or copies of one: '
            'expected at least two, one of them to validate on'
        )
        self.smallest = smallest


class Dataset:
    """What is written: documents end to end on either side. What has a sha256 below `bound` is validation."""

    def __init__(self, append, meta, bound):
        self.append, self.meta, self.bound = append, meta, bound
        self.document, self.side = NO_DOCUMENT, None  # the one that has not ended
        self.smallest = {'train': 2**256, 'val': 2**256}  # sha256 on either side

    def add(self, part):
        side = part.side or ('val' if part.digest < self.bound else 'train')
        if (part.document, side) != (self.document, self.side):
            self.end()
        self.append(side, part.tokens)
        self.document, self.side = part.document, side
        self.smallest[side] = min(self.smallest[side], part.digest)
        self.meta['bytes'] += part.size

    def end(self):
        """Ends the document at hand, if there is one."""
        if self.document is not NO_DOCUMENT:
            self.append(self.side, np.array([self.meta['eot']], dtype='<u2'))
            self.meta['documents'] += 1
        self.document = NO_DOCUMENT


def write(args, bpe, paths, sides, left_out, bound):
    """Writes the dataset, and counts in left_out. Returns its meta."""
    meta = {
        'tokenizer': args.tokenizer,
        'vocab_size': bpe.n_vocab,
        'eot': bpe.eot_token,
        'source': 'text given to data/text/prepare.py',
        'documents': 0,
        'bytes': 0,
    }
    source = Source(paths, sides, left_out)
    with write_dataset(args.out, meta) as append:
        dataset = Dataset(append, meta, bound)
        for found in converted(source, args.field, bpe, args.workers):
            if isinstance(found, Hole):
                dataset.end()
                left_out.add(found.reason, found.path, found.size)
            else:
                dataset.add(found)
        dataset.end()
        if not meta['documents']:
            raise UserError(f'no text in {len(paths):,} files ({left_out}): nothing is written')
        missing = [side for side, digest in dataset.smallest.items() if digest == 2**256]
        if missing and args.val:
            raise UserError(
                f'there is no text for {missing[0]}.bin: --val names what to validate on, PATH the rest'
            )
        if missing:
            raise OneSided(min(dataset.smallest.values()))
    return meta


def sides_of(args, left_out):
    """Returns all files, sorted, and {path: its side} where --val tells them apart."""
    paths = text_files(args.paths, left_out)
    if not args.val:
        return paths, {}
    val = text_files(args.val, left_out)
    real = {os.path.realpath(path) for path in val}
    train = [path for path in paths if os.path.realpath(path) not in real]
    sides = {path: 'train' for path in train} | {path: 'val' for path in val}
    return sorted(sides), sides


def check(args):
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}: expected at least 1')
    if not 0 < args.val_share < 1:
        raise UserError(f'--val_share is {args.val_share}: expected a share of the text between 0 and 1')


def prepare(args):
    check(args)
    begin, bpe, left_out = time.time(), encoding(args.tokenizer), LeftOut()
    paths, sides = sides_of(args, left_out)
    found_so_far = copy.deepcopy(left_out)
    try:
        meta = write(args, bpe, paths, sides, left_out, round(2**256 * Fraction(args.val_share)))
    except OneSided as few:  # by chance: then the smallest sha256 alone is validation
        left_out = found_so_far
        meta = write(args, bpe, paths, sides, left_out, few.smallest + 1)
    print(
        f'{args.out}: {len(paths):,} files, {meta["documents"]:,} documents, {meta["bytes"]:,} bytes, '
        f'{meta["train_tokens"]:,} train and {meta["val_tokens"]:,} val tokens, {time.time() - begin:.1f} s'
    )
    print(left_out)


def arguments():
    parser = argparse.ArgumentParser(description='Makes train.bin, val.bin and meta.json from text.')
    parser.add_argument('paths', nargs='+', metavar='PATH', help=f'files or folders: {EXPECTED}')
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2 or bytes')
    parser.add_argument(
        '--field', default='text', help='of the JSON objects, as in content or data.text (default: text)'
    )
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument(
        '--val',
        action='append',
        metavar='PATH',
        help='file or folder to validate on; all others are for training',
    )
    sides.add_argument(
        '--val_share',
        type=float,
        default=1 / 16,
        metavar='SHARE',
        help='of the text to validate on (default: 1/16)',
    )
    add_out_argument(parser, __file__)
    parser.add_argument(
        '--workers', type=int, default=usable_cores(), metavar='N', help='threads (default: one per core)'
    )
    return parser


def main(argv=None):
    try:
        with user_errors_exit():
            prepare(arguments().parse_intermixed_args(argv))
    except KeyboardInterrupt:
        print('stopped: nothing is written, and an older dataset is as it was', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
