"""
Anybody's own text as a dataset: .txt, .md, .py and .jsonl, these with .gz, and folders of them.

    python data/text/prepare.py notes.txt ~/corpus                           # GPT-2's BPE, into data/text
    python data/text/prepare.py dump.jsonl.gz --field=content --out=data/dump --tokenizer=bytes

files in the order of their paths → pieces of lines → workers: documents, their sides, their ids → train.bin, val.bin, meta.json.
A line of a .jsonl is a document, of any other kind the file is. A piece is all that is held of a file, and only a few pieces are on
their way at a time, so memory does not depend on the size of the input; nor do the bytes written depend on the number of workers.
A text longer than a piece takes its sides piece by piece, and ends where it changes sides: a single book is then enough to train
and to validate on. The workers are threads, since hashing and tiktoken let go of the interpreter's lock.
"""

import argparse
import gzip
import json
import os
import sys
import time
import zlib
from collections import Counter, deque
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

sys.path[0] = str(
    Path(__file__).resolve().parents[2]
)  # run as a script, it finds the repository and not its own folder
from data.loader import UserError, encoding
from data.writer import Progress, tokenize, write_dataset

SUFFIXES = ('.txt', '.md', '.py', '.jsonl')
PIECE = 1 << 18  # bytes, and up to as much again to the end of a line
VAL = 2**256 // 16  # sha256s below it, one in sixteen, are validation


def text_files(paths):
    """Returns the files that the paths name or hold, sorted. Links to folders are not followed."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += [
                os.path.join(where, name)
                for where, _, names in os.walk(path)
                for name in names
                if name.removesuffix('.gz').endswith(SUFFIXES)
            ]
        elif not os.path.exists(path):
            raise UserError(f'there is no {path}: expected a file or a folder')
        elif not path.removesuffix('.gz').endswith(SUFFIXES):
            raise UserError(
                f'{path} is of no kind that is known here: expected {", ".join(SUFFIXES)}, or one of these with .gz'
            )
        else:
            found.append(path)
    if not found:
        raise UserError(
            f'{", ".join(paths)} hold no {", ".join(SUFFIXES)}, with or without .gz: expected one such file at least'
        )
    return sorted(set(found))


def text_pieces(file):
    """Yields the content in pieces that end with a line, or, if that is longer than a piece, at least with a character."""
    while piece := file.read(PIECE) + file.readline(PIECE):
        for _ in range(3):
            if b'\x80' <= file.peek(1)[:1] < b'\xc0':  # the next byte goes on with a character of UTF-8
                piece += file.read(1)
        yield piece


class Source:
    """All pieces of all files in turn, each with its path: lines of a .jsonl as a list, any other text as bytes."""

    def __init__(self, paths):
        self.paths, self.done, self.unreadable = paths, 0, 0
        self.size = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def __iter__(self):
        for path in self.paths:
            is_jsonl, before = path.removesuffix('.gz').endswith('.jsonl'), self.done
            try:
                if not os.path.isfile(
                    path
                ):  # a broken link, or a named pipe, on which open would wait forever
                    raise OSError
                with open(path, 'rb') as raw, gzip.open(raw) if path.endswith('.gz') else raw as file:
                    for piece in iter(lambda: file.readlines(PIECE), []) if is_jsonl else text_pieces(file):
                        self.done = before + raw.tell()
                        yield path, piece
            except (
                OSError,
                EOFError,
                zlib.error,
            ):  # a .gz may break off in the middle: what was read of it stays
                self.unreadable += 1


def content_of(line, field):
    """Returns the document in a line of JSON as UTF-8, or the reason to leave it out."""
    try:
        return json.loads(line)[field].encode() or 'empty documents'
    except UnicodeError:  # a lone surrogate, too
        return 'texts that are not UTF-8'
    except (KeyError, TypeError, AttributeError):
        return f"lines without a text as '{field}'"
    except (ValueError, RecursionError):
        return 'malformed lines'


def convert(path, piece, field, bpe):
    """Returns what there is in a piece, (document, sha256 as a number, ids, bytes of text) each, or the reason to leave it out instead.
    Equal documents are parts of one."""
    found = []
    for document, content in (
        [(object(), content_of(line, field)) for line in piece if line.strip()]
        if isinstance(piece, list)
        else [(path, piece)]
    ):
        try:
            found.append(
                content
                if isinstance(content, str)
                else (
                    document,
                    int.from_bytes(sha256(content).digest(), 'big'),
                    tokenize(content, bpe, end_of_text=False),
                    len(content),
                )
            )
        except UnicodeDecodeError:
            found.append('texts that are not UTF-8')
    return found


def converted(source, field, bpe, workers):
    """Yields what convert finds, in the source's order, with a few pieces for each worker on their way at a time."""
    waiting, progress = deque(), Progress('tokenizing', source.size / 1e6, 'MB')
    with ThreadPool(workers) as pool:
        for path, piece in source:
            waiting.append(pool.apply_async(convert, (path, piece, field, bpe)))
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().get()
                progress.show(source.done / 1e6)
        for result in waiting:
            yield from result.get()


class OneSided(UserError):
    """All text is training, or all is validation. `smallest`: its smallest sha256 as a number."""

    def __init__(self, smallest):
        super().__init__(
            f'all text is one document shorter than {PIECE // 1000} kB, or copies of one: expected at least two, one of them to validate on'
        )
        self.smallest = smallest


def write(args, bpe, paths, bound):
    """Writes the dataset; what has a sha256 below the bound is validation. Returns its meta and a Counter of what was left out."""
    meta = {
        'tokenizer': args.tokenizer,
        'vocab_size': bpe.n_vocab,
        'eot': bpe.eot_token,
        'source': 'text given to data/text/prepare.py',
        'documents': 0,
        'bytes': 0,
    }
    source, left_out, digests, open_on = (
        Source(paths),
        Counter(),
        {'train': 2**256, 'val': 2**256},
        None,
    )  # (document, side) that has not ended

    def end(document_and_side):
        append(document_and_side[1], np.array([bpe.eot_token], dtype='<u2'))
        meta['documents'] += 1

    with write_dataset(args.out, meta) as append:
        for found in converted(source, args.field, bpe, args.workers):
            if isinstance(found, str):
                left_out[found] += 1
                continue
            document, digest, tokens, size = found
            side = 'val' if digest < bound else 'train'
            if open_on not in (None, (document, side)):
                end(open_on)
            append(side, tokens)
            open_on = document, side
            digests[side] = min(digests[side], digest)
            meta['bytes'] += size
        left_out['unreadable files'] = source.unreadable
        if open_on is None:
            raise UserError(f'no text in {len(paths):,} files ({left_out_of(left_out)}): nothing is written')
        end(open_on)
        if max(digests.values()) == 2**256:
            raise OneSided(min(digests.values()))
    return meta, left_out


def left_out_of(counts):
    return 'left out: ' + (
        ', '.join(f'{count:,} {reason}' for reason, count in sorted(counts.items()) if count) or 'nothing'
    )


def prepare(args):
    begin, bpe, paths = time.time(), encoding(args.tokenizer), text_files(args.paths)
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}: expected at least 1')
    try:
        meta, left_out = write(args, bpe, paths, VAL)
    except OneSided as few:  # by chance: then the smallest sha256 alone is validation
        meta, left_out = write(args, bpe, paths, few.smallest + 1)
    print(
        f'{args.out}: {len(paths):,} files, {meta["documents"]:,} documents, {meta["bytes"]:,} bytes, '
        f'{meta["train_tokens"]:,} train and {meta["val_tokens"]:,} val tokens, {time.time() - begin:.1f} s'
    )
    print(left_out_of(left_out))


def main(argv=None):
    parser = argparse.ArgumentParser(description='Makes train.bin, val.bin and meta.json from text.')
    parser.add_argument(
        'paths', nargs='+', metavar='PATH', help=f'files or folders: {", ".join(SUFFIXES)}, also with .gz'
    )
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2 or bytes')
    parser.add_argument('--field', default='text', help="of a .jsonl's lines (default text)")
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(__file__).parent,
        metavar='FOLDER',
        help='where to write (default: beside this script)',
    )
    parser.add_argument(
        '--workers', type=int, default=os.cpu_count(), metavar='N', help='threads (default: one per core)'
    )
    try:
        prepare(parser.parse_intermixed_args(argv))
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('stopped: nothing is written, and an older dataset is as it was', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
