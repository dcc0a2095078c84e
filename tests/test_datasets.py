"""Datasets from elsewhere: FineWeb-Edu from a server that misbehaves, any text, and what others prepared."""

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import training
from test_data import documents, folder_bytes, needs_gpt2

from data.fineweb_edu import prepare as fineweb
from data.loader import GPT2_META, Tokens, UserError, encoding, read_meta
from data.text import prepare as text

SHARD, VAL = 100_000, 4_000  # tokens, instead of 100M and 4M
NAMES = ['finewebedu_val_000000.bin', *(f'finewebedu_train_{i:06}.bin' for i in range(1, 5))]


def shard_ids(i, count=SHARD):
    return np.random.default_rng(i).integers(0, 50257, count).astype('<u2')


def shard(ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


class Server(ThreadingHTTPServer):
    """Serves shards on loopback.

    answers[name] is what goes wrong, one request after the other: a status, 'drop' (half of what is asked),
    'corrupt …', or None for what is right; the last one holds for all requests that follow."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.files = {name: shard(shard_ids(i)) for i, name in enumerate(NAMES)}
        self.answers, self.requests, self.sent, self.ignores_range, self.delay = {}, [], Counter(), False, 0
        self.retry_after, self.asked = '0', 0
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()

    def handle_error(self, request, address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path[1:]
        server.requests.append(name)
        answers = server.answers.get(name, [None])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            self.send_response(answer)
            self.send_header('Retry-After', server.retry_after)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        ids = shard_ids(NAMES.index(name))
        content = {
            None: server.files[name],
            'drop': server.files[name],
            'corrupt magic': shard(ids, magic=20240521),
            'corrupt version': shard(ids, version=2),
            'corrupt count': shard(ids, count=SHARD - 1),
            'corrupt size': shard(ids)[:-2],
            'corrupt ids': shard(ids | 0xFFFF),
        }[answer]
        first, last = (int(x) for x in re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers['Range']).groups())
        last = min(last, len(content) - 1)
        server.asked += last + 1 - first
        if server.ignores_range:
            first, last = 0, len(content) - 1
            self.send_response(200)
        else:
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {first}-{last}/{len(content)}')
        self.send_header('Content-Length', str(last + 1 - first))
        self.end_headers()
        end = (first + last) // 2 if answer == 'drop' else last + 1
        while first < end:
            time.sleep(server.delay)
            block = content[first : min(end, first + 4096)] if server.delay else content[first:end]
            self.wfile.write(block)
            server.sent[name] += len(block)
            first += len(block)


@pytest.fixture
def server(monkeypatch):
    """A server, and prepare.py made fit for small shards and short waits."""
    monkeypatch.setattr(fineweb, 'SHARD_TOKENS', SHARD)
    monkeypatch.setattr(fineweb, 'VAL_TOKENS', VAL)
    monkeypatch.setattr(fineweb, 'BACKOFF', 0.001)
    monkeypatch.setenv('no_proxy', '*')
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def download(server, out, tokens='250k', *more):
    fineweb.main([f'--tokens={tokens}', f'--url={server.url}', f'--out={out}', '--workers=3', *more])


def is_right(out, tokens=250_000):
    """Whether the set is what the shards hold, with a meta.json that says so, and nothing lies beside it."""
    train = np.concatenate([shard_ids(i) for i in range(1, 5)])[:tokens].tobytes()
    files = {'train.bin': train, 'val.bin': shard_ids(0)[:VAL].tobytes()}
    meta, found = read_meta(out), folder_bytes(out)
    return (
        found.pop('meta.json')
        and found == files
        and meta['sha256'] == {name: sha256(content).hexdigest() for name, content in files.items()}
        and (meta['train_tokens'], meta['val_tokens']) == (tokens, VAL)
        and GPT2_META.items() <= meta.items()
    )


def sentence(function, *args):
    """Returns the one sentence in which a call ends."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code.startswith('error: ') and '\n' not in stop.value.code
    return stop.value.code


def test_shards_become_a_dataset(server, tmp_path):
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_decimal_fraction_is_a_whole_number_of_tokens(server, tmp_path):
    download(server, tmp_path, '0.0000643B')
    assert is_right(tmp_path, 64_300)


def test_no_more_is_downloaded_than_is_needed(server, tmp_path):
    download(server, tmp_path)
    assert sum(server.sent.values()) == 2 * (250_000 + VAL) + 4 * 1024


def test_a_second_call_downloads_nothing(server, tmp_path, capsys):
    download(server, tmp_path)
    before = len(server.requests)
    download(server, tmp_path)
    assert len(server.requests) == before and 'nothing to download' in capsys.readouterr().out


@pytest.mark.parametrize(
    'answers',
    [
        ['drop', None],
        ['drop'] * 5 + [None],
        [429, None],
        [503, 500, 502, None],
        [503, 'drop', 429, 'drop', None],
    ],
    ids=str,
)
def test_what_time_mends_is_tried_again(server, tmp_path, answers):
    server.answers = {name: list(answers) for name in NAMES}
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_dropped_connection_costs_no_byte_twice(server, tmp_path):
    server.answers[NAMES[1]] = ['drop', 'drop', None]
    download(server, tmp_path)
    assert server.sent[NAMES[1]] == 2 * SHARD + 1024


def test_the_wait_that_the_server_asks_for_is_kept(server, tmp_path):
    server.answers[NAMES[1]], server.retry_after = [429, None], '1'
    begin = time.time()
    download(server, tmp_path)
    assert time.time() - begin > 1 and is_right(tmp_path)


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, tmp_path):
    server.ignores_range = True
    server.answers[NAMES[1]] = ['drop', None]
    download(server, tmp_path)
    assert is_right(tmp_path)


@pytest.mark.parametrize(
    'damage', ['corrupt magic', 'corrupt version', 'corrupt count', 'corrupt size', 'corrupt ids']
)
def test_a_corrupt_shard_is_downloaded_once_more(server, tmp_path, damage):
    server.answers[NAMES[2]] = [damage, None]
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_part_that_goes_while_it_is_looked_at_has_no_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, 'exists', lambda path: True)
    assert fineweb.size_of(tmp_path / 'gone.bin') == 0


@pytest.mark.parametrize(
    'answer, expected, requests',
    [
        ('corrupt magic', 'is corrupt, twice in a row (its header is [20240521, 1, 100000], expected', 2),
        ('corrupt size', "/201022' of its size, expected 201024 bytes from 0 on", 2),
        (404, 'answered 404 Not Found, expected a shard', 1),
        (403, 'answered 403 Forbidden', 1),
        (416, 'is corrupt, twice in a row (it ends before byte', 2),
        (503, '503 Service Unavailable; 8 attempts', 8),
    ],
)
def test_what_time_does_not_mend_ends_in_a_sentence_and_the_next_call_goes_on(
    server, tmp_path, answer, expected, requests
):
    server.answers[NAMES[2]] = [answer]
    message = sentence(download, server, tmp_path)
    assert expected in message and f'{server.url}/{NAMES[2]}' in message
    assert server.requests.count(NAMES[2]) == requests
    assert not (tmp_path / 'train.bin').exists() and not (tmp_path / 'meta.json').exists()
    server.answers = {}
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_server_that_is_not_there_ends_in_a_sentence(server, tmp_path):
    server.shutdown()
    server.server_close()
    assert 'Connection refused' in sentence(download, server, tmp_path)


def process(server, out, *more):
    """Starts prepare.py as a process of its own."""
    settings = f'prepare.SHARD_TOKENS, prepare.VAL_TOKENS, prepare.BLOCK = {SHARD}, {VAL}, 4096'
    argv = ['--tokens=250k', f'--url={server.url}', f'--out={out}', *more]
    code = f'from data.fineweb_edu import prepare; {settings}; prepare.main({argv})'
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a job that a shell runs in the background ignores SIGINT
    return subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    )


def wait_for(condition):
    limit = time.time() + 20
    while not condition():
        assert time.time() < limit
        time.sleep(0.01)


@pytest.mark.parametrize('number, status', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_stopped_download_goes_on_where_it_was(server, tmp_path, number, status):
    server.delay = 0.02
    run = process(server, tmp_path, '--workers=2')
    wait_for(lambda: sum(server.sent.values()) > 200_000)
    run.send_signal(number)
    assert run.wait(10) == status
    message = run.stderr.read()
    assert 'Traceback' not in message and (
        number == signal.SIGKILL or 'run the same command again' in message
    )
    kept = sum(path.stat().st_size for path in (tmp_path / 'parts').iterdir())
    assert kept > 100_000 and not (tmp_path / 'train.bin').exists()
    server.delay, server.asked = 0, 0
    download(server, tmp_path)
    assert is_right(tmp_path)
    assert server.asked <= 2 * (250_000 + VAL) + 4 * 1024 - kept


@pytest.mark.parametrize('moment', range(8))
def test_a_process_that_dies_while_files_are_joined_and_named_loses_nothing(
    server, tmp_path, monkeypatch, moment
):
    class Died(BaseException):
        pass

    left, real = [moment], {name: getattr(os, name) for name in ('fsync', 'replace')}

    def dying(name):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    try:
        download(server, tmp_path)
    except Died:
        assert not is_made(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(fineweb, 'SHARD_TOKENS', SHARD)
    monkeypatch.setattr(fineweb, 'VAL_TOKENS', VAL)
    before = len(server.requests)
    download(server, tmp_path)
    assert is_right(tmp_path) and len(server.requests) == before


def is_made(out):
    return (out / 'train.bin').exists() and (out / 'val.bin').exists()


def test_the_old_dataset_stays_until_the_new_one_is_there(server, tmp_path):
    download(server, tmp_path, '150k')
    server.answers[NAMES[3]] = [404]
    sentence(download, server, tmp_path)
    assert (
        read_meta(tmp_path)['train_tokens'] == 150_000 and (tmp_path / 'train.bin').stat().st_size == 300_000
    )
    server.answers = {}
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_damaged_dataset_is_made_again(server, tmp_path):
    download(server, tmp_path)
    os.truncate(tmp_path / 'train.bin', 1000)
    download(server, tmp_path)
    assert is_right(tmp_path)


def test_a_full_disk_is_noticed_before_the_first_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=700_000))
    assert 'GB are needed: make room' in sentence(download, server, tmp_path)
    assert not server.requests
    download(server, tmp_path, '240k')  # 480 kB, 8 kB for validation, 200 kB to join them


def test_two_downloads_to_one_folder_do_not_meet(server, tmp_path):
    with fineweb.alone_in(tmp_path / 'parts'):
        assert 'another process is downloading' in sentence(download, server, tmp_path)
    download(server, tmp_path)
    assert is_right(tmp_path)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_the_download_goes_on(
    server, tmp_path, monkeypatch, capsys, number
):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr('fcntl.flock', no_locks)
    download(server, tmp_path)
    assert is_right(tmp_path) and 'has no locks' in capsys.readouterr().err


def test_a_lock_that_fails_for_another_reason_ends_in_a_sentence(server, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr('fcntl.flock', broken)
    assert 'Input/output error' in sentence(download, server, tmp_path)


@pytest.mark.parametrize(
    'flags, expected',
    [
        (['--tokens=lots'], "--tokens is 'lots'"),
        (['--tokens=0'], 'from 1 to 9.9B'),
        (['--tokens=10B'], 'from 1 to 9.9B'),
        (['--tokens=1.5'], 'a whole number'),
        (['--tokens=nan'], 'a whole number'),
        (['--workers=0'], '--workers is 0'),
        (['--url=ftp://nowhere'], 'begins with http'),
        (['--out=/dev/null'], 'cannot write to /dev/null'),
    ],
)
def test_a_mistake_ends_in_a_sentence(tmp_path, flags, expected):
    assert expected in sentence(fineweb.main, [f'--out={tmp_path}', '--url=http://127.0.0.1:9', *flags])


# Anybody's own text


def make_text(out, *paths, tokenizer='bytes', flags=()):
    """Returns the documents of both splits, without their order."""
    text.main([*map(str, paths), f'--tokenizer={tokenizer}', f'--out={out}', *flags])
    eot = read_meta(out)['eot']
    return sorted(document for split in ('train', 'val') for document in documents(out / f'{split}.bin', eot))


def write_corpus(folder):
    """Writes a file of each kind. Returns the documents in them."""
    folder.mkdir()
    poem, notes, code = (
        ('Ærøskøbing, 速い \U0001f40d\r\n\n<|endoftext|>\n' * 20).encode(),
        b'# notes',
        b'def f():\n\tpass\n',
    )
    lines = [f'line {i} é' for i in range(60)]
    (folder / 'poem.txt').write_bytes(poem)
    (folder / 'deep' / 'er').mkdir(parents=True)
    (folder / 'deep' / 'notes.md').write_bytes(notes)
    (folder / 'deep' / 'er' / 'code.py').write_bytes(code)
    (folder / 'lines.jsonl').write_text(
        ''.join(json.dumps({'text': line, 'body': line[::-1]}) + '\n' for line in lines)
    )
    with gzip.open(folder / 'more.jsonl.gz', 'wt') as file:
        file.write(
            '\n'.join(
                json.dumps({'text': line + ' more', 'body': line + ' body'}, ensure_ascii=False)
                for line in lines
            )
        )
    with gzip.open(folder / 'verse.txt.gz', 'wb') as file:
        file.write(poem[:100])
    (folder / 'picture.png').write_bytes(b'\x89PNG')
    return sorted(
        [
            poem,
            notes,
            code,
            poem[:100],
            *(line.encode() for line in lines),
            *((line + ' more').encode() for line in lines),
        ]
    )


def test_every_kind_of_file_becomes_documents(tmp_path):
    expected = write_corpus(tmp_path / 'corpus')
    assert make_text(tmp_path / 'out', tmp_path / 'corpus') == expected
    meta, files = read_meta(tmp_path / 'out'), folder_bytes(tmp_path / 'out')
    assert (meta['documents'], meta['bytes'], meta['vocab_size']) == (
        len(expected),
        sum(map(len, expected)),
        257,
    )
    assert meta['sha256'] == {name: sha256(files[name]).hexdigest() for name in ('train.bin', 'val.bin')}
    assert 0 < meta['val_tokens'] < meta['train_tokens'] and str(tmp_path) not in json.dumps(meta)


@needs_gpt2
def test_gpt2_tokens_of_text_are_those_of_tiktoken(tmp_path):
    expected = write_corpus(tmp_path / 'corpus')
    found = make_text(tmp_path / 'out', tmp_path / 'corpus', tokenizer='gpt2')
    assert found == sorted(encoding('gpt2').encode_ordinary(document.decode()) for document in expected)


def test_another_field_is_another_text(tmp_path):
    write_corpus(tmp_path / 'corpus')
    assert make_text(tmp_path / 'out', tmp_path / 'corpus' / 'lines.jsonl', flags=['--field=body']) == sorted(
        f'line {i} é'[::-1].encode() for i in range(60)
    )


def test_neither_workers_nor_pieces_nor_the_order_of_paths_change_the_dataset(tmp_path, monkeypatch):
    write_corpus(tmp_path / 'corpus')
    paths = [tmp_path / 'corpus' / name for name in ('lines.jsonl', 'poem.txt', 'more.jsonl.gz')]
    make_text(tmp_path / 'one', *paths, flags=['--workers=1'])
    make_text(tmp_path / 'many', *paths[::-1], paths[0], flags=['--workers=7'])
    assert folder_bytes(tmp_path / 'one') == folder_bytes(tmp_path / 'many')


def test_a_long_text_is_cut_at_line_ends_and_ends_where_it_changes_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(text, 'PIECE', 100)
    book = ''.join(f'{i} {"é速" * (i % 10)}\n' for i in range(1000)).encode()
    (tmp_path / 'book.txt').write_bytes(book)
    make_text(tmp_path / 'out', tmp_path / 'book.txt')
    parts = {split: documents(tmp_path / 'out' / f'{split}.bin', 256) for split in ('train', 'val')}
    assert all(part.endswith(b'\n') and part in book for split in parts for part in parts[split])
    assert sorted(b''.join(parts['train'] + parts['val']).splitlines()) == sorted(book.splitlines())
    assert 0 < len(parts['val']) < len(parts['train']) + 2 and len(b''.join(parts['val'])) < len(book) / 4


def test_a_line_longer_than_a_piece_is_never_cut_inside_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(text, 'PIECE', 7)
    line = 'é速\U0001f40d' * 100
    (tmp_path / 'line.txt').write_text(line)
    found = make_text(tmp_path / 'out', tmp_path / 'line.txt')
    assert Counter(''.join(part.decode() for part in found)) == Counter(line)


def test_what_is_malformed_is_counted_and_not_fatal(tmp_path, capsys):
    lines = [
        '{"text": "good"}',
        '{"text": "fine"}',
        '{"text": "cut',
        '[1]',
        '7',
        '{"other": "field"}',
        '{"text": 7}',
        '{"text": ""}',
        '',
        '{"text": "\\ud800"}',
        'null',
    ]
    (tmp_path / 'a.jsonl').write_bytes('\n'.join(lines).encode() + b'\n{"text": "\xff"}\n')
    (tmp_path / 'b.txt').write_bytes('é'.encode('latin-1'))
    (tmp_path / 'c.txt').write_bytes(b'')
    (tmp_path / 'd.txt.gz').write_bytes(b'no gzip')
    (tmp_path / 'e.txt.gz').write_bytes(gzip.compress(b'breaks off')[:-9])
    (tmp_path / 'f.txt').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(tmp_path / 'g.txt')
    found = make_text(tmp_path / 'out', tmp_path)
    assert found == [b'fine', b'good']
    said = capsys.readouterr().out
    assert "5 lines without a text as 'text'" in said
    assert (
        '1 empty documents' in said and '1 malformed lines' in said and '2 lines that are not UTF-8' in said
    )
    assert '1 bytes in 1 pieces of up to 262 kB that are not UTF-8' in said
    assert '4 unreadable files (the first: ' in said


@pytest.mark.parametrize(
    'files, flags, expected',
    [
        ({'a.txt': b''}, [], 'no text in 1 files'),
        (
            {'a.jsonl': b'{"text": \n'},
            [],
            'no text in 1 files (left out: 10 bytes in 1 malformed lines (corpus/a.jsonl))',
        ),
        ({'a.txt': b'one'}, [], 'all text is one document'),
        ({'a.txt': b'copy', 'b.txt': b'copy'}, [], 'all text is one document'),
        ({'a.html': b'text'}, [], 'hold no text (left out: 1 files of other kinds (corpus/a.html))'),
        ({'a.txt': b'one'}, ['nowhere'], 'there is no nowhere'),
        ({'a.html': b'text'}, ['corpus/a.html'], 'is of no kind that is known'),
        ({'a.txt': b'one', 'b.txt': b'two'}, ['--workers=0'], '--workers is 0'),
        ({'a.txt': b'one', 'b.txt': b'two'}, ['--tokenizer=gpt5'], "unknown tokenizer 'gpt5'"),
    ],
)
def test_a_mistake_with_text_ends_in_a_sentence_and_leaves_the_old_dataset(
    tmp_path, monkeypatch, files, flags, expected
):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / 'old')
    make_text(tmp_path / 'out', 'old')
    before = folder_bytes(tmp_path / 'out')
    (tmp_path / 'corpus').mkdir()
    for name, content in files.items():
        (tmp_path / 'corpus' / name).write_bytes(content)
    assert expected in sentence(text.main, ['corpus', '--tokenizer=bytes', '--out=out', *flags])
    assert folder_bytes(tmp_path / 'out') == before


def test_the_smallest_hash_validates_where_chance_would_leave_no_one(tmp_path):
    (tmp_path / 'corpus').mkdir()
    for name in 'abc':
        (tmp_path / 'corpus' / f'{name}.txt').write_text(name)
    make_text(tmp_path / 'out', tmp_path / 'corpus')
    assert documents(tmp_path / 'out' / 'val.bin', 256) == [
        min((b'a', b'b', b'c'), key=lambda content: sha256(content).digest())
    ]


def test_memory_does_not_grow_with_the_input(tmp_path):
    for megabytes, name in ((4, 'small'), (60, 'big')):
        (tmp_path / name).mkdir()
        with (
            open(tmp_path / name / 'a.txt', 'w') as plain,
            gzip.open(tmp_path / name / 'b.jsonl.gz', 'wt', compresslevel=1) as lines,
        ):
            for i in range(1000 * megabytes // 2):
                plain.write(f'{i:0100}\n' * 10)
                lines.write(json.dumps({'text': f'{i:01000}'}) + '\n')
    flags = ['--tokenizer=bytes', f'--out={tmp_path}/out', '--workers=2']
    code = (
        f'import resource; from data.text import prepare\nfor name in ("small", "big"):\n'
        f'  prepare.main(["{tmp_path}/" + name, *{flags}])\n'
        '  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    small, big = (int(line) for line in result.stdout.splitlines()[2::3])
    assert big - small < 12


COMPRESSED = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}


@pytest.mark.parametrize('suffix', COMPRESSED)
@pytest.mark.parametrize('lines', [False, True], ids=['text', 'lines'])
def test_compressed_files_are_the_texts_that_they_hold(tmp_path, suffix, lines):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for word in ('one', 'two', 'three'):
        content = json.dumps({'text': word}) + '\n' if lines else word
        name = f'{word}.jsonl{suffix}' if lines else f'{word}.txt{suffix}'
        (corpus / name).write_bytes(COMPRESSED[suffix](content.encode()))
    assert make_text(tmp_path / 'out', corpus) == [b'one', b'three', b'two']


@pytest.mark.parametrize('suffix', COMPRESSED)
def test_a_compressed_file_that_breaks_off_is_read_as_far_as_it_goes_and_counted(tmp_path, capsys, suffix):
    lines = ''.join(json.dumps({'text': f'{sha256(bytes([i])).hexdigest()}'}) + '\n' for i in range(200))
    for name, lost in (('whole', 0), ('cut', 100)):
        packed = COMPRESSED[suffix](lines.encode())
        (tmp_path / f'{name}.jsonl{suffix}').write_bytes(packed[: len(packed) - lost])
    assert len(make_text(tmp_path / 'out', tmp_path)) >= 200
    assert f'1 unreadable files ({tmp_path}/cut.jsonl{suffix})' in capsys.readouterr().out


def test_json_is_read_line_by_line_like_jsonl(tmp_path):
    (tmp_path / 'c4.json.gz').write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert make_text(tmp_path / 'out', tmp_path) == [b'one', b'two']


def test_zst_is_read_where_there_is_a_decoder(tmp_path):
    zstandard = pytest.importorskip('zstandard')
    for name in ('one', 'two'):
        line = json.dumps({'text': name}).encode()
        (tmp_path / f'{name}.jsonl.zst').write_bytes(zstandard.compress(line))
    assert make_text(tmp_path / 'out', tmp_path) == [b'one', b'two']


@pytest.mark.parametrize('given', ['corpus', 'corpus/a.jsonl.zst'])
def test_zst_without_a_decoder_ends_in_a_sentence_that_names_one(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, 'has_zst', lambda: False)
    (tmp_path / 'corpus').mkdir()
    (tmp_path / 'corpus' / 'a.jsonl.zst').write_bytes(b'')
    said = sentence(text.main, [given, '--tokenizer=bytes', '--out=out'])
    assert 'corpus/a.jsonl.zst needs a decoder for .zst: pip install zstandard' in said


def test_what_nothing_here_unpacks_is_named(tmp_path, capsys):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    for name in 'bc':
        (tmp_path / f'{name}.txt').write_text(name)
    assert 'needs a decoder for .parquet' in sentence(text.main, [str(tmp_path / 'a.parquet')])
    make_text(tmp_path / 'out', tmp_path)
    assert f'left out: 1 files to unpack first ({tmp_path}/a.parquet)' in capsys.readouterr().out


def test_a_field_may_lie_within_others(tmp_path):
    lines = [{'data': {'text': 'inner'}}, {'data.text': 'literal'}, {'data': 'flat'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert make_text(tmp_path / 'out', tmp_path, flags=['--field=data.text']) == [b'inner', b'literal']


def test_a_byte_that_is_not_utf8_ends_the_document_and_its_piece_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, 'PIECE', 64)
    lines = [f'{i:031}\n'.encode() for i in range(12)]
    lines[5] = b'\xff' * 31 + b'\n'
    (tmp_path / 'big.txt').write_bytes(b''.join(lines))
    (tmp_path / 'small.txt').write_bytes(b'small')
    # All that is left of big.txt is put on one side, so that documents end at the hole alone.
    found = make_text(tmp_path / 'out', tmp_path, flags=[f'--val={tmp_path}/small.txt'])
    hole_begins = next(i for i, document in enumerate(sorted(found)) if document.startswith(lines[0]))
    before, after = sorted(found)[hole_begins : hole_begins + 2]
    lost = sum(map(len, lines)) - len(before) - len(after)
    assert b''.join(lines).startswith(before) and b''.join(lines).endswith(after)
    assert before and after and 32 <= lost <= 128
    assert f'{lost} bytes in 1 pieces' in capsys.readouterr().out


def test_text_in_utf16_is_not_taken_for_utf8(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, 'PIECE', 64)
    (tmp_path / 'windows.txt').write_bytes(('plain ASCII\r\n' * 50).encode('utf-16'))
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(name)
    assert make_text(tmp_path / 'out', tmp_path) == [b'a', b'b']
    assert '1,302 bytes in' in capsys.readouterr().out


def test_a_byte_order_mark_is_no_token(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone')
    (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'\xef\xbb\xbftwo'))
    (tmp_path / 'c.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "three"}')
    assert make_text(tmp_path / 'out', tmp_path) == [b'one', b'three', b'two']


def test_suffixes_count_in_any_case(tmp_path):
    (tmp_path / 'BIG.TXT').write_text('big')
    (tmp_path / 'Small.Jsonl.GZ').write_bytes(gzip.compress(b'{"text": "small"}'))
    assert make_text(tmp_path / 'out', tmp_path) == [b'big', b'small']


def test_a_file_is_taken_once_whatever_names_lead_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'corpus').mkdir()
    for name in ('one', 'two'):
        (tmp_path / 'corpus' / f'{name}.txt').write_text(name)
    (tmp_path / 'corpus' / 'three.txt').symlink_to('one.txt')
    names = ['corpus', './corpus', tmp_path / 'corpus', 'corpus/one.txt']
    assert make_text(tmp_path / 'out', *names) == [b'one', b'two']
    assert 'second names of a file' in capsys.readouterr().out


def test_folders_that_are_links_or_cannot_be_read_are_counted_and_named(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / 'corpus'
    (corpus / 'closed').mkdir(parents=True)
    (corpus / 'linked').symlink_to(tmp_path)
    for name in 'ab':
        (corpus / f'{name}.txt').write_text(name)
    scandir = os.scandir

    def refuses(path):  # root may read everything, whatever chmod says
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuses)
    assert make_text(tmp_path / 'out', corpus) == [b'a', b'b']
    said = capsys.readouterr().out
    assert f'1 folders that cannot be read ({corpus}/closed)' in said
    assert f'1 linked folders ({corpus}/linked)' in said


def test_val_names_what_to_validate_on(tmp_path):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for name in 'abcdef':
        (corpus / f'{name}.txt').write_text(name)
    make_text(tmp_path / 'out', corpus, flags=[f'--val={corpus}/b.txt', f'--val={corpus}/d.txt'])
    assert documents(tmp_path / 'out' / 'val.bin', 256) == [b'b', b'd']
    assert documents(tmp_path / 'out' / 'train.bin', 256) == [b'a', b'c', b'e', b'f']


def test_all_text_for_validation_ends_in_a_sentence(tmp_path):
    (tmp_path / 'a.txt').write_text('a')
    flags = [str(tmp_path), f'--val={tmp_path}', '--tokenizer=bytes', f'--out={tmp_path}/out']
    assert 'there is no text for train.bin' in sentence(text.main, flags)


@pytest.mark.parametrize('share', ['0', '1', 'nan', '-0.5'])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    assert '--val_share is' in sentence(text.main, [str(tmp_path), f'--val_share={share}'])


def test_val_share_is_the_share_of_documents_that_validate(tmp_path):
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': str(i)}) for i in range(2000)))
    make_text(tmp_path / 'out', tmp_path, flags=['--val_share=0.25'])
    assert abs(len(documents(tmp_path / 'out' / 'val.bin', 256)) - 500) < 6 * np.sqrt(2000 * 0.25 * 0.75)


# What others have prepared


def write_shards(folder, lengths=((300, 200, 250), (200,)), vocab_size=50257):
    """Returns the ids of each split, shard by shard."""
    folder.mkdir(exist_ok=True)
    ids = {
        split: [
            np.random.default_rng(i).integers(0, vocab_size, n).astype('<u2') for i, n in enumerate(counts)
        ]
        for split, counts in zip(('train', 'val'), lengths)
    }
    for split, parts in ids.items():
        for i, part in enumerate(parts):
            (folder / f'some_{split}_{i:03}.bin').write_bytes(shard(part))
    return ids


def test_windows_of_shards_never_straddle_two(tmp_path):
    parts = write_shards(tmp_path)['train']
    tokens = Tokens(tmp_path, 'train', 64, 50257)
    flat, inside = np.concatenate(parts), {*range(0, 236), *range(300, 436), *range(500, 686)}
    assert tokens.length == 750
    starts = tokens.training_starts(0, 0, 20_000)
    assert set(starts) == inside
    inputs, targets = tokens.windows(starts[:500])
    for start, x, y in zip(starts, inputs.numpy(), targets.numpy()):
        np.testing.assert_array_equal(np.append(x, y[-1]), flat[start : start + 65])


def test_a_training_shard_is_not_validation_because_its_name_holds_the_word(tmp_path):
    write_shards(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / f'retrieval_{path.name}')
    assert (Tokens(tmp_path, 'train', 64, 50257).length, Tokens(tmp_path, 'val', 64, 50257).length) == (
        750,
        200,
    )


def test_windows_of_shards_are_uniform(tmp_path):
    write_shards(tmp_path)
    counts = np.bincount(Tokens(tmp_path, 'train', 64, 50257).training_starts(0, 0, 558_000), minlength=750)
    assert abs(counts[counts > 0] - 1000).max() < 6 * np.sqrt(1000)


def test_fixed_windows_of_shards_do_not_overlap(tmp_path):
    write_shards(tmp_path)
    tokens = Tokens(tmp_path, 'train', 64, 50257)
    assert sorted(tokens.fixed_starts(100)) == [0, 64, 128, 192, 300, 364, 428, 500, 564, 628]
    np.testing.assert_array_equal(tokens.fixed_starts(100)[:5], tokens.fixed_starts(5))
    np.testing.assert_array_equal(tokens.training_starts(3, 4, 50)[:5], tokens.training_starts(3, 4, 5))


def test_one_shard_gives_the_windows_of_the_same_ids_in_a_flat_file(tmp_path):
    ids = write_shards(tmp_path / 'shards', ((1000,), (200,)))['train'][0]
    (tmp_path / 'flat').mkdir()
    ids.tofile(tmp_path / 'flat' / 'train.bin')
    shards, flat = (Tokens(tmp_path / name, 'train', 64, 50257) for name in ('shards', 'flat'))
    for starts in (shards.training_starts(1337, 5, 4), shards.fixed_starts(8)):
        assert all((one == other).all() for one, other in zip(shards.windows(starts), flat.windows(starts)))
    np.testing.assert_array_equal(shards.training_starts(1337, 5, 4), flat.training_starts(1337, 5, 4))
    np.testing.assert_array_equal(shards.fixed_starts(8), flat.fixed_starts(8))


@pytest.mark.parametrize(
    'content, expected',
    [
        (
            shard(shard_ids(0, 200))[:-2],
            'some_train_001.bin has 1,422 bytes, but its header promises 200 tokens, which take 1,424',
        ),
        (shard_ids(0, 2000).tobytes(), 'some_train_001.bin does not begin like a shard'),
        (shard(shard_ids(0, 2000), version=2), 'some_train_001.bin does not begin like a shard'),
        (b'', 'some_train_001.bin does not begin like a shard'),
        (shard(shard_ids(0, 64)), 'some_train_001.bin holds 64 tokens, fewer than the 65'),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, content, expected):
    write_shards(tmp_path)
    (tmp_path / 'some_train_001.bin').write_bytes(content)
    with pytest.raises(UserError, match=expected):
        Tokens(tmp_path, 'train', 64, 50257)


def test_what_is_wrong_inside_a_shard_is_named_with_the_shard_and_the_position_in_it(tmp_path):
    write_shards(tmp_path)
    tokens = Tokens(tmp_path, 'train', 64, 50257)
    ids = np.fromfile(tmp_path / 'some_train_001.bin', dtype='<u2')
    ids[512 + 17] = 50999
    ids.tofile(tmp_path / 'some_train_001.bin')
    with pytest.raises(UserError, match='some_train_001.bin holds token id 50999 at position 17,'):
        tokens.windows([0, 310])
    os.truncate(tmp_path / 'some_train_002.bin', 1024 + 200)
    with pytest.raises(UserError, match='some_train_002.bin ends at token 100 although it held 250'):
        tokens.windows([0, 580])


def write_npy_shards(folder, lengths=(300, 200, 250), dtype='<u2'):
    """Writes shards as build-nanogpt does. Returns the ids of those for training."""
    folder.mkdir(exist_ok=True)
    ids = [shard_ids(i, n) for i, n in enumerate(lengths)]
    np.save(folder / 'edufineweb_val_000000.npy', shard_ids(9, 200).astype(dtype))
    for i, part in enumerate(ids):
        np.save(folder / f'edufineweb_train_{i + 1:06}.npy', part.astype(dtype))
    return ids


def test_shards_of_numpy_are_the_split_as_they_lie(tmp_path):
    flat = np.concatenate(write_npy_shards(tmp_path))
    tokens = Tokens(tmp_path, 'train', 64, 50257)
    assert tokens.length == 750 and Tokens(tmp_path, 'val', 64, 50257).length == 200
    starts = tokens.training_starts(0, 0, 500)
    for start, x in zip(starts, tokens.windows(starts)[0].numpy()):
        np.testing.assert_array_equal(x, flat[start : start + 64])


def test_shards_of_numpy_of_another_type_are_refused(tmp_path):
    write_npy_shards(tmp_path, dtype='<i4')
    with pytest.raises(
        UserError, match=r'000001.npy holds an array of int32 of shape \(300,\): expected uint16'
    ):
        Tokens(tmp_path, 'train', 64, 50257)


@pytest.mark.parametrize('content', [b'', b'\x93NUMPY', b'no header at all' * 20])
def test_a_damaged_shard_of_numpy_is_named(tmp_path, content):
    write_npy_shards(tmp_path)
    (tmp_path / 'edufineweb_train_000002.npy').write_bytes(content)
    with pytest.raises(UserError, match='train_000002.npy does not begin like an .npy file'):
        Tokens(tmp_path, 'train', 64, 50257)


def test_a_shard_of_numpy_that_is_cut_short_is_named(tmp_path):
    write_npy_shards(tmp_path)
    os.truncate(tmp_path / 'edufineweb_train_000002.npy', 500)
    with pytest.raises(UserError, match='train_000002.npy has 500 bytes, but its header promises 200 tokens'):
        Tokens(tmp_path, 'train', 64, 50257)


def test_a_character_set_of_nanogpt_is_not_unpickled(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    with pytest.raises(UserError, match=r'never unpickled; .*text/prepare\.py input\.txt --tokenizer=bytes'):
        read_meta(tmp_path)


def test_a_meta_json_beside_a_meta_pkl_is_read(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(b'')
    (tmp_path / 'meta.json').write_text(json.dumps(GPT2_META))
    assert read_meta(tmp_path) == GPT2_META


# A run on each


def a_text_set(folder, server):
    write_corpus(folder.parent / 'corpus')
    text.main([str(folder.parent / 'corpus'), '--tokenizer=bytes', f'--out={folder}'])


def a_prepared_set(folder, server):
    download(server, folder, '10k')


def shards_as_they_lie(folder, server):
    write_shards(folder)


def shards_of_numpy(folder, server):
    write_npy_shards(folder)


def a_set_of_nanogpt(folder, server):
    folder.mkdir()
    for i, split in enumerate(('train', 'val')):
        shard_ids(i, 2000).tofile(folder / f'{split}.bin')


@pytest.mark.parametrize(
    'kind',
    [a_text_set, a_prepared_set, shards_as_they_lie, shards_of_numpy, a_set_of_nanogpt],
    ids=lambda kind: kind.__name__,
)
def test_a_run_trains_on(kind, tmp_path, server, signal_handlers):
    kind(tmp_path / 'set', server)
    training.run(tmp_path / 'set', tmp_path / 'out', max_iters=2, eval_sequences=4)
    lines = training.log(tmp_path / 'out')
    assert lines[-1]['iter'] == 2 and 0 < lines[-1]['val_loss'] < 15
