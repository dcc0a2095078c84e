"""
FineWeb-Edu in GPT-2's BPE, the data of the published runs: downloads shards that are tokenized already.

    python data/fineweb_edu/prepare.py                     # 500M training tokens and 4M for validation: 1 GB
    python data/fineweb_edu/prepare.py --tokens=9.9B --url=http://mirror.example/finewebedu10B-gpt2

shards, several at a time → parts/ → in their order into parts/joined.bin → train.bin, val.bin, meta.json.

- A part holds the ids of one shard without its header, which is checked before the first id is written. So
  the length of a part is all that must be known to go on with it, however the process before ended.
- The last shard and the validation shard are downloaded only as far as they are needed.
- A part goes as soon as it has been joined: disk for one more shard than the result is enough.
"""

import argparse
import http.client
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

# Run as a script, it finds the repository and not its own folder.
if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])
from data.loader import GPT2_META, SHARD_HEADER, UserError, lock, shard_tokens, user_errors_exit
from data.progress import Progress
from data.writer import add_out_argument, announce, number

DATASET = 'kjj0/finewebedu10B-gpt2'
URL = f'https://huggingface.co/datasets/{DATASET}/resolve/main'
SHARDS, SHARD_TOKENS = 99, 100_000_000  # training shards; ids in every shard
VAL_TOKENS = 4_000_000  # of the validation shard's, the first: as in the publication
BLOCK = 1 << 18  # bytes: a process that is killed has lost less than this of every download
TRIES = 8  # failures in a row without a byte won, after which a download is given up
BACKOFF = 1.0  # seconds of the first wait; each further one is twice as long
TIMEOUT = 60  # seconds of silence that are a failure


class TryAgain(Exception):
    """What time may mend. Its args: the reason, and the seconds that the server asks to wait."""


class Corrupt(Exception):
    """What was served is no shard, or not a whole one."""


def ask(url, first, last):
    """Asks for the bytes `first` to `last` of a shard.

    Returns the response, and whether it begins at `first` rather than with the file."""
    request = urllib.request.Request(url, headers={'Range': f'bytes={first}-{last}'})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise what_follows(error, url, first) from None
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(str(error) or type(error).__name__, 0) from None
    partial, size = response.status == 206, SHARD_HEADER + 2 * SHARD_TOKENS
    said = response.headers.get('Content-Range' if partial else 'Content-Length', 'nothing')
    expected = rf'bytes {first}-\d+/{size}' if partial else str(size)
    if not re.fullmatch(expected, said):
        response.close()
        where = f' from {first} on' if partial else ''
        raise Corrupt(f"the server says '{said}' of its size, expected {size} bytes{where}")
    return response, partial


def what_follows(error, url, first):
    """error: an HTTPError. Returns the exception that says what to do about it."""
    if error.code == 416:
        return Corrupt(f'it ends before byte {first:,}')
    if error.code in (408, 429) or error.code >= 500:
        asked = error.headers.get('Retry-After', '')
        return TryAgain(f'{error.code} {error.reason}', int(asked) if asked.isdecimal() else 0)
    return UserError(
        f'{url} answered {error.code} {error.reason}, expected a shard: name a server that has it with --url'
    )


def read(response, size):
    """Returns up to `size` bytes of the response, at least one."""
    try:
        data = response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(str(error) or type(error).__name__, 0) from None
    if not data:
        raise TryAgain('the connection was dropped', 0)
    return data


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        # A corrupt part may go at any moment: another thread is about to fetch it once more.
        return 0


def download(url, part, size, stop):
    """Makes the part `size` bytes of ids long, going on where it ends."""
    have = size_of(part)
    if have >= size:
        return
    response, resumed = ask(url, SHARD_HEADER + have if have else 0, SHARD_HEADER + size - 1)
    with response, open(part, 'ab' if have and resumed else 'wb') as file:
        if not (have and resumed):
            have, header = 0, b''
            while len(header) < SHARD_HEADER:
                header += read(response, SHARD_HEADER - len(header))
            if shard_tokens(header) != SHARD_TOKENS:
                found = np.frombuffer(header, '<i4', 3).tolist()
                raise Corrupt(
                    f'its header is {found}, expected magic 20240520, version 1, {SHARD_TOKENS} tokens'
                )
        while have < size:
            data = read(response, min(BLOCK, size - have))
            if stop.is_set():
                return
            have += file.write(data)
            file.flush()


def fetch(url, part, size, stop):
    """Makes the part whole, whatever happens on the way that time or a second download can mend."""
    failures = corrupt = 0
    while not stop.is_set():
        before = size_of(part)
        try:
            download(url, part, size, stop)
            if not stop.is_set() and np.memmap(part, '<u2', 'r').max() >= GPT2_META['vocab_size']:
                raise Corrupt('it holds ids beyond the vocabulary')
            return
        except Corrupt as error:
            part.unlink(missing_ok=True)
            corrupt += 1
            if corrupt == 2:
                raise UserError(
                    f'{url} is corrupt, twice in a row ({error}): name another server with --url'
                ) from None
        except TryAgain as error:
            reason, asked = error.args
            failures = 1 if size_of(part) > before else failures + 1
            if failures == TRIES:
                raise UserError(
                    f'{url} cannot be had ({reason}; {TRIES} attempts): '
                    'run the same command again later, it goes on from here'
                ) from None
            # Random, or all workers would come back at once.
            wait = max(asked, min(60, BACKOFF * 2**failures) * random.uniform(0.5, 1))
            print(f'{part.name}: {reason}, again in {wait:.0f} s', file=sys.stderr)
            stop.wait(wait)


def fetch_all(url, wanted, workers, stop):
    """wanted: {part: bytes of ids}. Downloads what is missing of the parts and says how it goes."""

    def have():
        return sum(min(size_of(part), size) for part, size in wanted.items())

    total = sum(wanted.values())
    with Progress('downloading', total / 1e6, 'MB', have() / 1e6) as progress, ThreadPool(workers) as pool:
        waiting = []
        for part, size in wanted.items():
            waiting.append(pool.apply_async(fetch, (f'{url}/{part.name}', part, size, stop)))
        while waiting:
            waiting[0].wait(0.1)
            for result in [result for result in waiting if result.ready()]:
                result.get()  # raises what was raised there
                waiting.remove(result)
            progress.show(have() / 1e6)


def join(joined, wanted):
    """Appends the parts to the joined file in their order. A part goes when its bytes are on disk."""
    with open(joined, 'ab') as file:
        for part, size in wanted.items():
            os.truncate(part, size)  # it may be longer, from a call that asked for more tokens
            with open(part, 'rb') as source:
                shutil.copyfileobj(source, file, BLOCK)
            file.flush()
            os.fsync(file.fileno())
            part.unlink()


@contextmanager
def alone_in(folder):
    """Keeps other processes out of the folder until the block ends, or this process, however it ends. Where
    the file system has no locks, this is said, and the download goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        reason = lock(fd, f'another process is downloading to {folder}: wait for it, or name another --out')
        if reason:
            print(
                f'the file system of {folder} has no locks ({reason}): '
                'see to it that no second download writes there',
                file=sys.stderr,
            )
        yield
    finally:
        os.close(fd)


def is_made(out, meta):
    """Returns {split: whether its file has its final size}.

    It is empty where meta.json announces another dataset, or where there is none."""
    try:
        found = json.loads((out / 'meta.json').read_text())
        if any(found[key] != value for key, value in meta.items()):
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {split: size_of(out / f'{split}.bin') == 2 * meta[f'{split}_tokens'] for split in ('train', 'val')}


def tokens_wanted(args):
    """Checks the arguments. Returns how many training tokens are asked for."""
    tokens, most = number('--tokens', args.tokens), SHARDS * SHARD_TOKENS
    if not (1 <= tokens <= most and tokens == int(tokens)):
        raise UserError(f'--tokens is {args.tokens}: expected a whole number from 1 to {most / 1e9:g}B')
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}: expected at least 1')
    if not args.url.startswith(('http://', 'https://')):
        raise UserError(f'--url is {args.url}: expected an address that begins with http:// or https://')
    return int(tokens)


def prepare(args, stop):
    tokens, begin = tokens_wanted(args), time.time()
    source = f'FineWeb-Edu, {DATASET}'
    meta = GPT2_META | {'source': source, 'train_tokens': tokens, 'val_tokens': VAL_TOKENS}
    made = is_made(args.out, meta)
    if made and all(made.values()):
        print(f'{args.out} holds {tokens:,} training tokens of FineWeb-Edu already: nothing to download')
        return
    with alone_in(args.out / 'parts'):
        make(args, meta, [split for split in made if made[split]], stop)
    print(f'{args.out}: {tokens:,} train and {VAL_TOKENS:,} val tokens, {time.time() - begin:.1f} s')


def check_disk(out, parts, wanted, shards):
    """wanted and shards: {part: bytes of ids}, of all parts and of the training shards."""
    missing = sum(max(0, size - size_of(part)) for part, size in wanted.items())
    needed = missing + max(shards.values(), default=0)
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise UserError(
            f'{out} has {free / 1e9:,.2f} GB free, but {needed / 1e9:,.2f} GB are needed: '
            'make room, lower --tokens, or name another --out'
        )


def make(args, meta, named, stop):
    """Takes the steps to the dataset that earlier processes have not taken.

    named: splits to which the process before had given their final names."""
    parts, shard, total = args.out / 'parts', 2 * SHARD_TOKENS, 2 * meta['train_tokens']
    whole = {'train': parts / 'joined.bin', 'val': parts / 'finewebedu_val_000000.bin'}
    for split in named:
        os.replace(args.out / f'{split}.bin', whole[split])
    joined = size_of(whole['train'])
    if joined not in (0, total):  # it was cut while joining
        joined = min(joined, total) // shard * shard
        os.truncate(whole['train'], joined)
    shards = {
        parts / f'finewebedu_train_{i + 1:06}.bin': min(shard, total - i * shard)
        for i in range(-(-joined // shard), -(-total // shard))
    }
    wanted = {whole['val']: 2 * VAL_TOKENS, **shards}
    check_disk(args.out, parts, wanted, shards)
    fetch_all(args.url, wanted, args.workers, stop)
    join(whole['train'], shards)
    meta['sha256'] = {
        f'{split}.bin': sha256(np.memmap(path, mode='r')).hexdigest() for split, path in whole.items()
    }
    announce(args.out, meta)
    for split, path in whole.items():
        os.replace(path, args.out / f'{split}.bin')
    shutil.rmtree(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description='Downloads FineWeb-Edu in GPT-2 tokens into train.bin, val.bin and meta.json.',
        epilog='Run it again to go on.',
    )
    parser.add_argument(
        '--tokens',
        default='500M',
        help='training tokens, 9.9B at most (default 500M); the published runs saw 344M and 131M',
    )
    parser.add_argument(
        '--url', default=URL, help='the folder of the shards, for a mirror (default: the hub)'
    )
    add_out_argument(parser, __file__)
    parser.add_argument('--workers', type=int, default=8, metavar='N', help='downloads at a time (default 8)')
    args, stop = parser.parse_args(argv), threading.Event()
    try:
        with user_errors_exit():
            prepare(args, stop)
    except OSError as error:
        sys.exit(
            f'error: cannot write to {args.out} ({error.strerror}): what is there is kept; '
            'mend it, then run the same command again'
        )
    except KeyboardInterrupt:
        print(
            f'stopped: what is downloaded lies in {args.out / "parts"}; run the same command again to go on',
            file=sys.stderr,
        )
        sys.exit(130)
    finally:
        stop.set()


if __name__ == '__main__':
    main()
