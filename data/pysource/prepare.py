"""
The dataset that needs no download: the Python source that lies beside the interpreter running this script.

    python data/pysource/prepare.py                          # standard library and site-packages, GPT-2's BPE
    python data/pysource/prepare.py --tokenizer=bytes --root ~/code

files → documents without copies → near-copies on one side → token ids → train.bin, val.bin, meta.json.

The bytes written depend on nothing but the contents and names of the files: not on where they lie, on the
order in which the file system lists them, or on the number of workers. The workers are threads, since
reading, hashing and tiktoken let go of the interpreter's lock.
"""

import argparse
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

# Run as a script, it finds the repository and not its own folder.
if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from machine import usable_cores

from data.loader import UserError, dataset_folder, encoding, user_errors_exit
from data.progress import Progress
from data.writer import add_out_argument, number, tokenize, write_dataset

# What train.py makes for the demo configs by itself: quick, and nearly the same on every machine.
DEMO = ['--stdlib', '--tokenizer=bytes', '--limit=8M', f'--out={dataset_folder("pysource_demo")}']

# --stdlib leaves out what some distributions package apart or drop, and pydoc_data, which is generated prose.
# It keeps to the modules that Python itself lists: the others, build settings and site hooks, belong to the
# machine.
OFTEN_MISSING = {
    'test',
    'tests',
    'idlelib',
    'lib2to3',
    'distutils',
    'ensurepip',
    'tkinter',
    'turtledemo',
    'pydoc_data',
}
SITE_FOLDERS = {'site-packages', 'dist-packages'}


def python_files(folder, left_out, skip=()):
    """Yields the path of every .py file under the folder, in any order.

    Folders that cannot be read, and links to folders, which are not followed, are counted in left_out."""

    def cannot_list(error):
        left_out['unreadable folder'] += 1

    for where, folders, names in os.walk(folder, onerror=cannot_list):
        folders[:] = set(folders).difference(skip)
        left_out['linked folder'] += sum(os.path.islink(os.path.join(where, name)) for name in folders)
        yield from (os.path.join(where, name) for name in names if name.lower().endswith('.py'))


def sources(args, left_out):
    """Returns the paths of the files asked for, and a phrase for meta.json that names no folder."""
    for root in args.root or ():
        if not os.path.isdir(root):
            raise UserError(f'--root {root} is not a folder: expected one that holds Python files')
    if args.root:
        paths = [path for root in args.root for path in python_files(root, left_out)]
        return paths, 'Python source of folders given by --root'
    library, version = sysconfig.get_path('stdlib'), f'Python {platform.python_version()} standard library'
    if args.stdlib:
        paths = python_files(library, left_out, OFTEN_MISSING | SITE_FOLDERS)
        return [path for path in paths if module_of(path, library) in sys.stdlib_module_names], version
    paths = list(python_files(library, left_out, SITE_FOLDERS))
    for folder in site.getsitepackages():
        paths += python_files(folder, left_out)
    return paths, f'{version} and site-packages'


def module_of(path, library):
    """Returns the name of the top-level module of the library that a file belongs to."""
    return os.path.relpath(path, library).split(os.sep)[0].removesuffix('.py')


def read_file(path):
    """Returns (sha256, name, content) of one file, or the reason to leave it out."""
    try:
        # A broken link, or a named pipe, on which open would wait forever.
        if not os.path.isfile(path):
            return 'unreadable'
        content = Path(path).read_bytes()
        content.decode()
    except OSError:
        return 'unreadable'
    except UnicodeDecodeError:
        return 'not UTF-8'
    return (sha256(content).digest(), os.path.basename(path), content) if content else 'empty'


def read_all(paths, pool, left_out):
    """Reads files and counts in left_out. Returns {sha256: content}, every content once, and the set of
    (sha256, name, size) seen."""
    documents, seen = {}, set()
    for found in shown(pool.imap_unordered(read_file, paths), len(paths), 'reading'):
        if isinstance(found, str):
            left_out[found] += 1
            continue
        digest, name, content = found
        left_out['duplicate'] += digest in documents
        documents[digest] = content
        seen.add((digest, name, len(content)))
    return documents, seen


def groups(seen):
    """Finds groups of near-copies: contents that carry the same name and size, directly or through others.
    A vendored copy often differs in an import line or a version.

    seen: (sha256, name, size) each; the name is the path's tail alone, so that six.py and _vendor/six.py
    meet. It costs nothing that small __init__.py of strangers meet as well.
    Returns {sha256: the smallest sha256 of its group}."""
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
    """Returns 'val' for one group in sixteen and 'train' for the others.

    The last hex digit decides: the first ones order the documents, and --limit takes the first documents."""
    return 'val' if leader[-1] % 16 == 0 else 'train'


def first_bytes(documents, limit):
    """Returns the sha256s of the documents in order, which shuffles them, up to `limit` bytes of content."""
    order = sorted(documents)
    totals = accumulate(len(documents[digest]) for digest in order)
    return [digest for digest, total in zip(order, totals) if total <= limit]


def shown(items, total, verb):
    """Passes the items on and says how many of the total have come."""
    with Progress(verb, total, 'files') as progress:
        for count, item in enumerate(items, 1):
            progress.show(count)
            yield item


def prepare(args):
    begin, limit, bpe = time.time(), number('--limit', args.limit), encoding(args.tokenizer)
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}: expected at least 1')
    left_out = Counter()
    paths, source = sources(args, left_out)
    with ThreadPool(args.workers) as pool:
        documents, seen = read_all(paths, pool, left_out)
        leaders = groups(seen)
        splits = {digest: split_of(leaders[digest]) for digest in first_bytes(documents, limit)}
        missing = {'train', 'val'}.difference(splits.values())
        if missing:
            raise UserError(
                f'{len(paths):,} Python files found, {len(splits):,} documents left of them, none for '
                f'{min(missing)}: give more files or a higher --limit'
            )
        meta = {
            'tokenizer': args.tokenizer,
            'vocab_size': bpe.n_vocab,
            'eot': bpe.eot_token,
            'source': source,
            'files': len(splits),
            'bytes': sum(len(documents[digest]) for digest in splits),
        }
        with write_dataset(args.out, meta) as append:
            encoded = pool.imap(lambda digest: tokenize(documents[digest], bpe), splits)
            for tokens, split in zip(shown(encoded, len(splits), 'tokenizing'), splits.values()):
                append(split, tokens)
    left_out['over the limit'] = len(documents) - len(splits)
    print(
        f'{args.out}: {meta["files"]:,} files, {meta["bytes"]:,} bytes, {meta["train_tokens"]:,} train and '
        f'{meta["val_tokens"]:,} val tokens, {time.time() - begin:.1f} s'
    )
    reasons = [f'{count:,} {reason}' for reason, count in sorted(left_out.items()) if count]
    print('left out: ' + (', '.join(reasons) or 'nothing'))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Makes train.bin, val.bin and meta.json from the Python source beside this interpreter.'
    )
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2 or bytes')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--root', nargs='+', action='extend', metavar='FOLDER', help='take these folders instead'
    )
    which.add_argument(
        '--stdlib',
        action='store_true',
        help='take the standard library only, without tests and what is often missing',
    )
    parser.add_argument(
        '--limit', default='inf', metavar='BYTES', help='stop at this many bytes of source, as in 8M'
    )
    add_out_argument(parser, __file__)
    parser.add_argument(
        '--workers', type=int, default=usable_cores(), metavar='N', help='threads (default: one per core)'
    )
    with user_errors_exit():
        prepare(parser.parse_args(argv))


if __name__ == '__main__':
    main()
