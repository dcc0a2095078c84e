"""
FineWeb-Edu in GPT-2's BPE, the data of the published runs: downloads shards that are tokenized already.

    python data/fineweb_edu/prepare.py                       # 500M training tokens and 4M for validation: 1 GB
    python data/fineweb_edu/prepare.py --tokens=9.9B --url=http://mirror.example/finewebedu10B-gpt2

shards, several at a time → parts/ → one after the other into parts/joined.bin → train.bin, val.bin, meta.json.
A part holds the ids of one shard without its header, which is checked before the first of them is written: so the length of
a part is all that must be known to go on with it, however the process before ended. The last shard and the validation shard are
downloaded only as far as they are needed. A part goes as soon as it has been joined: disk for one more shard than the result is enough.
"""
import argparse
import fcntl
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
from hashlib import file_digest
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, when this file is run as a script
from data.loader import GPT2_META, Progress, SHARD_HEADER, UserError, announce, number, shard_tokens

DATASET = 'kjj0/finewebedu10B-gpt2'
URL = f'https://huggingface.co/datasets/{DATASET}/resolve/main'
SHARDS, SHARD_TOKENS = 99, 100_000_000  # training shards; ids in every shard
VAL_TOKENS = 4_000_000                  # of the validation shard's, the first: as in the publication
BLOCK = 1 << 18                         # bytes: a process that is killed has lost less than this of every download
TRIES, BACKOFF, TIMEOUT = 8, 1.0, 60    # failures in a row without a byte won; seconds of the first wait; seconds of silence that are a failure


class TryAgain(Exception):
    """What time may mend. `wait`: seconds that the server asks for."""

    def __init__(self, reason, wait=0):
        super().__init__(reason)
        self.wait = wait


class Corrupt(Exception):
    """What was served is no shard, or not a whole one."""


def ask(url, first, last):
    """Asks for the bytes `first` to `last` of a shard. Returns the response, and whether it begins at `first` rather than with the file."""
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers={'Range': f'bytes={first}-{last}'}), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what we have is longer than the file
            raise Corrupt(f'it has fewer than {last + 1:,} bytes') from None
        if error.code in (408, 429) or error.code >= 500:
            asked = error.headers.get('Retry-After', '')
            raise TryAgain(f'{error.code} {error.reason}', int(asked) if asked.isdecimal() else 0) from None
        raise UserError(f'{url} answered {error.code} {error.reason}, expected a shard: name a server that has it with --url') from None
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(str(error) or type(error).__name__) from None
    found = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', response.headers.get('Content-Range', '')) if response.status == 206 else None
    size = int(found[2]) if found else response.headers.get('Content-Length')
    expected = SHARD_HEADER + 2 * SHARD_TOKENS
    if response.status == 206 and not (found and int(found[1]) == first) or size is None or int(size) != expected:
        response.close()
        raise Corrupt(f"the server's answer describes {size} bytes ({response.headers.get('Content-Range', 'no range')}), expected {expected} of a shard")
    return response, response.status == 206


def read(response, size):
    """Returns up to `size` bytes of the response, at least one."""
    try:
        data = response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(str(error) or type(error).__name__) from None
    if not data:
        raise TryAgain('the connection was dropped')
    return data


def download(url, part, size, stop):
    """Makes the part `size` bytes of ids long, going on where it ends."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    response, resumed = ask(url, SHARD_HEADER + have if have else 0, SHARD_HEADER + size - 1)
    with response, open(part, 'ab' if have and resumed else 'wb') as file:
        if not (have and resumed):
            have, header = 0, b''
            while len(header) < SHARD_HEADER:
                header += read(response, SHARD_HEADER - len(header))
            if shard_tokens(header) != SHARD_TOKENS:
                raise Corrupt(f'its header is {np.frombuffer(header, "<i4", 3).tolist()}, expected magic 20240520, version 1, {SHARD_TOKENS} tokens')
        while have < size and not stop.is_set():
            have += file.write(read(response, min(BLOCK, size - have)))
            file.flush()


def fetch(url, part, size, stop):
    """Makes the part whole, whatever happens on the way that time or a second download can mend."""
    failures = corrupt = 0
    while not stop.is_set():
        before = part.stat().st_size if part.exists() else 0
        try:
            download(url, part, size, stop)
            if not stop.is_set() and np.memmap(part, '<u2', 'r').max() >= GPT2_META['vocab_size']:
                raise Corrupt('it holds ids beyond the vocabulary')
            return
        except Corrupt as error:
            part.unlink(missing_ok=True)
            corrupt += 1
            if corrupt == 2:
                raise UserError(f'{url} is corrupt, twice in a row ({error}): name another server with --url') from None
        except TryAgain as error:
            failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
            if failures == TRIES:
                raise UserError(f'{url} cannot be had ({error}; {TRIES} attempts): run the same command again later, it goes on from here') from None
            stop.wait(max(error.wait, min(60, BACKOFF * 2 ** failures) * random.uniform(0.5, 1)))


def fetch_all(url, wanted, workers, stop):
    """wanted: {part: bytes of ids}. Downloads what is missing of the parts and says how it goes."""
    def have():
        return sum(min(part.stat().st_size, size) for part, size in wanted.items() if part.exists())

    progress = Progress('downloading', sum(wanted.values()) / 1e6, 'MB', have() / 1e6)
    with ThreadPool(workers) as pool:
        waiting = [pool.apply_async(fetch, (f'{url}/{part.name}', part, size, stop)) for part, size in wanted.items()]
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
            with open(part, 'rb') as source:
                left = size
                while left:
                    left -= file.write(source.read(min(BLOCK, left)))
            file.flush()
            os.fsync(file.fileno())
            part.unlink()


def prepare(args, stop):
    tokens, begin = number('--tokens', args.tokens), time.time()
    if not (1 <= tokens <= SHARDS * SHARD_TOKENS and tokens == round(tokens)):
        raise UserError(f'--tokens is {args.tokens}: expected a whole number from 1 to {SHARDS * SHARD_TOKENS / 1e9:g}B')
    if args.workers < 1 or not args.url.startswith(('http://', 'https://')):
        raise UserError(f'--workers is {args.workers} and --url is {args.url}: expected at least 1, and an address that begins with http:// or https://')
    meta = GPT2_META | {'source': f'FineWeb-Edu, {DATASET}', 'train_tokens': round(tokens), 'val_tokens': VAL_TOKENS}
    final = {split: args.out / f'{split}.bin' for split in ('train', 'val')}
    parts = args.out / 'parts'
    made = {path: path.exists() and path.stat().st_size == 2 * meta[f'{split}_tokens'] for split, path in final.items()}
    meta_path = args.out / 'meta.json'
    ours = meta_path.exists() and meta.items() <= json.loads(meta_path.read_text()).items()
    if ours and all(made.values()):
        shutil.rmtree(parts, ignore_errors=True)
        print(f'{args.out} holds this dataset already: nothing to download')
        return
    ...
