"""
The dataset that needs no download: the Python source that lies beside the interpreter running this script.

    python data/pysource/prepare.py                          # standard library and site-packages, GPT-2's BPE
    python data/pysource/prepare.py --tokenizer=bytes --root ~/code

files → documents without copies → a side for each group of near-copies → tokens → train.bin, val.bin, meta.json.
The bytes written depend on nothing but the contents and names of the files: not on where they lie, on the order in which
the file system lists them, or on the number of workers. The workers are threads, since reading, hashing and tiktoken all
let go of the interpreter's lock: they scale as processes do, with nothing to pickle and nothing to start.
"""
import argparse
import json
import os
import platform
import site
import sys
import sysconfig
import time
from collections import Counter
from hashlib import sha256
from itertools import accumulate
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, when this file is run as a script
from data.loader import UserError, atomic_write, dataset_folder, encoding

# What train.py makes for the demo configs by itself: quick, and nearly the same on every machine.
DEMO = ['--stdlib', '--tokenizer=bytes', '--limit=8M', f'--out={dataset_folder("pysource_demo")}']

# --stdlib leaves out what some distributions package apart or drop, and pydoc_data, generated prose. It also keeps to the
# modules that Python itself lists: the others, build settings and site hooks, belong to the machine.
OFTEN_MISSING = {'test', 'tests', 'idlelib', 'lib2to3', 'distutils', 'ensurepip', 'tkinter', 'turtledemo', 'pydoc_data'}
SITE_FOLDERS = {'site-packages', 'dist-packages'}


def python_files(folder, skip=()):
    """Yields the path of every .py file under the folder, in no particular order. Links to folders are not followed."""
    for where, folders, names in os.walk(folder):
        folders[:] = set(folders).difference(skip)
        yield from (os.path.join(where, name) for name in names if name.endswith('.py'))


def sources(args):
    """Returns the paths of the files asked for, and a phrase for meta.json that names no folder of this machine."""
    for root in args.root or ():
        if not os.path.isdir(root):
            raise UserError(f'--root {root} is not a folder: expected one that holds Python files')
    if args.root:
        return [path for root in args.root for path in python_files(root)], 'Python source of folders given by --root'
    library, version = sysconfig.get_path('stdlib'), f'Python {platform.python_version()} standard library'
    if args.stdlib:
        paths = python_files(library, OFTEN_MISSING | SITE_FOLDERS)
        return [path for path in paths if os.path.relpath(path, library).split(os.sep)[0].removesuffix('.py') in sys.stdlib_module_names], version
    paths = list(python_files(library, SITE_FOLDERS))
    return paths + [path for folder in site.getsitepackages() for path in python_files(folder)], f'{version} and site-packages'


def read_file(path):
    """Returns (sha256, name, content) of one file, or the reason to leave it out."""
    try:
        if not os.path.isfile(path):  # a broken link, or a named pipe, on which open would wait forever
            return 'unreadable'
        content = Path(path).read_bytes()
        content.decode()
    except OSError:
        return 'unreadable'
    except UnicodeDecodeError:
        return 'not UTF-8'
    return (sha256(content).digest(), os.path.basename(path), content) if content else 'empty'


def read_all(paths, pool):
    """Returns {sha256: content}, every content once; the set of (sha256, name, size) seen; and a Counter of what was left out."""
    documents, seen, left_out = {}, set(), Counter()
    for found in shown(pool.imap_unordered(read_file, paths), len(paths), 'reading'):
        if isinstance(found, str):
            left_out[found] += 1
            continue
        digest, name, content = found
        left_out['duplicate'] += digest in documents
        documents[digest] = content
        seen.add((digest, name, len(content)))
    return documents, seen, left_out


def groups(seen):
    """
    seen: (sha256, name, size) each. Returns {sha256: the smallest sha256 of its group}, in which contents that carry the same
    name and size, directly or through others, are one group: a vendored copy often differs in an import line or a version.
    The name alone is the path's tail, so that six.py and _vendor/six.py meet; it costs nothing that small __init__.py
    of strangers meet as well.
    """
    leader, first = {}, {}

    def find(digest):
        while leader.setdefault(digest, digest) != digest:
            digest = leader[digest]
        return digest

    for digest, name, size in seen:
        one, other = find(digest), find(first.setdefault((name, size), digest))
        leader[max(one, other)] = min(one, other)
    return {digest: find(digest) for digest in leader}


def split_of(leader):
    """One group in sixteen is validation. The last hex digit decides: the first ones order the documents, and --limit takes the first."""
    return 'val' if leader[-1] % 16 == 0 else 'train'


def first_bytes(documents, limit):
    """Returns the sha256s of the documents in their order, which shuffles them, up to `limit` bytes of content."""
    order = sorted(documents)
    return [digest for digest, total in zip(order, accumulate(len(documents[digest]) for digest in order)) if total <= limit]


def tokenize(content, bpe):
    """content: bytes of UTF-8. Returns (n,) little-endian uint16, the end-of-text id last; special tokens in the text are plain text."""
    text, piece = content.decode(), 500_000  # characters: a run of a million blanks overflows the stack of tiktoken's regex
    parts = [bpe.encode_to_numpy(text[i:i + piece], disallowed_special=()) for i in range(0, len(text), piece)]
    return np.concatenate([*parts, [bpe.eot_token]]).astype('<u2')


def write(out, meta, documents, splits, bpe, pool):
    """
    splits: {sha256: 'train' or 'val'}, in the order of writing. Returns meta with token counts and sha256s added.
    The old dataset stays until the new one lies beside it. Then the old .bin files go, meta.json is replaced, and the new .bin
    files take their names: cut at any point, this leaves no .bin beside a meta.json that is not its own, nor beside none,
    which would make it GPT-2's.
    """
    counts, sums = Counter(), {'train': sha256(), 'val': sha256()}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / 'train.bin') as train, atomic_write(out / 'val.bin') as val:
        files = {'train': train, 'val': val}
        encoded = pool.imap(lambda digest: tokenize(documents[digest], bpe), splits)
        for tokens, split in zip(shown(encoded, len(splits), 'tokenizing'), splits.values()):
            files[split].write(tokens)
            sums[split].update(tokens)
            counts[split] += len(tokens)
        meta = meta | {'train_tokens': counts['train'], 'val_tokens': counts['val'],
                       'sha256': {f'{split}.bin': digest.hexdigest() for split, digest in sums.items()}}
        for split in files:
            (out / f'{split}.bin').unlink(missing_ok=True)
        with atomic_write(out / 'meta.json', 'w') as file:
            json.dump(meta, file, indent=2)
    return meta


def shown(items, total, verb):
    """Passes the items on and says on stderr how many of the total have come: a line redrawn, or every ten seconds one where it is a file."""
    live, last = sys.stderr.isatty(), time.time()
    for count, item in enumerate(items, 1):
        if time.time() - last > (0.1 if live else 10):
            print(f'{verb} {count:,} of {total:,} files', end='   \r' if live else '\n', file=sys.stderr, flush=True)
            last = time.time()
        yield item


def parse_limit(text):
    """'8M' is 8,000,000 bytes."""
    unit = {'k': 1e3, 'M': 1e6, 'G': 1e9}.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise UserError(f"--limit is '{text}': expected a number of bytes, as in 8000000, 800k, 8M or 1.5G") from None


def prepare(args):
    begin, limit, bpe = time.time(), parse_limit(args.limit), encoding(args.tokenizer)
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}: expected at least 1')
    paths, source = sources(args)
    with ThreadPool(args.workers) as pool:
        documents, seen, left_out = read_all(paths, pool)
        leaders = groups(seen)
        splits = {digest: split_of(leaders[digest]) for digest in first_bytes(documents, limit)}
        missing = {'train', 'val'}.difference(splits.values())
        if missing:
            raise UserError(f'{len(paths):,} Python files found, {len(splits):,} documents left of them, none for {min(missing)}: give more files or a higher --limit')
        meta = {'tokenizer': args.tokenizer, 'vocab_size': bpe.n_vocab, 'eot': bpe.eot_token, 'source': source,
                'files': len(splits), 'bytes': sum(len(documents[digest]) for digest in splits)}
        try:
            meta = write(args.out, meta, documents, splits, bpe, pool)
        except OSError as error:
            raise UserError(f'cannot write to {args.out}: {error.strerror}') from None
    left_out['over the limit'] = len(documents) - len(splits)
    print(f"{args.out}: {meta['files']:,} files, {meta['bytes']:,} bytes, {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, {time.time() - begin:.1f} s")
    print('left out: ' + (', '.join(f'{count:,} {reason}' for reason, count in sorted(left_out.items()) if count) or 'nothing'))


def main(argv=None):
    parser = argparse.ArgumentParser(description='Makes train.bin, val.bin and meta.json from the Python source beside this interpreter.')
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2 or bytes')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--root', nargs='+', action='extend', metavar='FOLDER', help='take these folders instead')
    which.add_argument('--stdlib', action='store_true', help='take the standard library only, without tests and what is often missing')
    parser.add_argument('--limit', default='inf', metavar='BYTES', help='stop at this many bytes of source, as in 8M')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent, metavar='FOLDER', help='where to write (default: beside this script)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), metavar='N', help='threads (default: one per core)')
    try:
        prepare(parser.parse_args(argv))
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
