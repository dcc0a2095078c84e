"""What a dataset is, and what the loader promises about the windows it reads from one."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import GPT2_META, Tokens, UserError, atomic_write, dataset_folder, encoding, read_meta
from data.pysource import prepare

GPT2_FILES = os.environ.get('TIKTOKEN_CACHE_DIR')
needs_gpt2 = pytest.mark.skipif(
    not (GPT2_FILES and os.path.isdir(GPT2_FILES) and os.listdir(GPT2_FILES)),
    reason="GPT-2's BPE files are not at hand: set TIKTOKEN_CACHE_DIR to a folder that holds them",
)


def write_tokens(folder, ids, dtype='<u2'):
    np.asarray(ids).astype(dtype).tofile(folder / 'val.bin')


def opened(folder, ids, block_size, vocab_size=50257):
    write_tokens(folder, ids)
    return Tokens(folder, 'val', block_size, vocab_size)


def test_windows_are_slices_of_the_file(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 1000)
    inputs, targets = opened(tmp_path, ids, 64).windows([0, 17, 935])
    assert inputs.dtype == targets.dtype == torch.int64
    for row, start in enumerate((0, 17, 935)):
        np.testing.assert_array_equal(inputs[row], ids[start : start + 64])
        np.testing.assert_array_equal(targets[row], ids[start + 1 : start + 65])


def test_training_starts_are_the_same_in_every_process_and_year(tmp_path):
    tokens = opened(tmp_path, np.arange(1000), 64)
    np.testing.assert_array_equal(tokens.training_starts(1337, 5, 4), [419, 803, 538, 876])


def test_a_larger_batch_begins_with_the_windows_of_a_smaller_one(tmp_path):
    tokens = opened(tmp_path, np.arange(1000), 64)
    np.testing.assert_array_equal(tokens.training_starts(1, 7, 32)[:8], tokens.training_starts(1, 7, 8))


def test_another_step_or_seed_sees_other_windows(tmp_path):
    tokens = opened(tmp_path, np.arange(10000), 64)
    starts = {tuple(tokens.training_starts(seed, step, 8)) for seed in range(10) for step in range(10)}
    assert len(starts) == 100


def test_every_window_that_fits_can_be_drawn_and_no_other(tmp_path):
    tokens = opened(tmp_path, np.arange(67), 64)
    starts = tokens.training_starts(0, 0, 200)
    assert set(starts) == {0, 1, 2}
    tokens.windows(starts)


def test_training_starts_are_uniform(tmp_path):
    starts = opened(tmp_path, np.arange(10064), 64).training_starts(0, 0, 100_000)
    counts, _ = np.histogram(starts, bins=10, range=(0, 10000))
    assert abs(counts - 10_000).max() < 5 * np.sqrt(10_000)


def test_fixed_windows_share_no_input_and_cover_the_file(tmp_path):
    tokens = opened(tmp_path, np.arange(1001), 100)
    np.testing.assert_array_equal(np.sort(tokens.fixed_starts(10)), np.arange(0, 1000, 100))
    tokens.windows(tokens.fixed_starts(10))


def test_a_file_with_fewer_fixed_windows_than_asked_gives_those_it_has(tmp_path):
    assert len(opened(tmp_path, np.arange(1000), 100).fixed_starts(64)) == 9


def test_more_fixed_windows_begin_with_the_fewer(tmp_path):
    tokens = opened(tmp_path, np.arange(5000), 10)
    np.testing.assert_array_equal(tokens.fixed_starts(100)[:20], tokens.fixed_starts(20))


def test_another_seed_chooses_other_fixed_windows(tmp_path):
    tokens = opened(tmp_path, np.arange(5000), 10)
    assert (tokens.fixed_starts(20, seed=0) != tokens.fixed_starts(20, seed=1)).any()


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r'cannot read .*val\.bin .*prepare\.py'):
        Tokens(tmp_path, 'val', 64, 50257)


def test_an_odd_number_of_bytes_is_refused(tmp_path):
    (tmp_path / 'val.bin').write_bytes(b'abc')
    with pytest.raises(UserError, match=r'val\.bin has an odd number of bytes \(3\)'):
        Tokens(tmp_path, 'val', 1, 50257)


def test_a_file_shorter_than_one_window_is_refused(tmp_path):
    with pytest.raises(UserError, match='holds 64 tokens, fewer than the 65'):
        opened(tmp_path, np.arange(64), 64)


def test_an_id_beyond_the_vocabulary_is_named_with_file_and_position(tmp_path):
    ids = np.zeros(200, dtype=int)
    ids[117] = 300
    tokens = opened(tmp_path, ids, 64, vocab_size=257)
    tokens.windows([0, 118])
    with pytest.raises(
        UserError, match=r'val\.bin holds token id 300 at position 117, beyond the vocabulary of 257'
    ):
        tokens.windows([0, 100])


def test_a_big_endian_file_is_recognised(tmp_path):
    write_tokens(tmp_path, np.arange(200), dtype='>u2')
    with pytest.raises(UserError, match='not little-endian'):
        Tokens(tmp_path, 'val', 64, 257).windows([0])


IDS = np.arange(9000) * 7919 % 50257
WRONG_TYPES = {'<u4': '32-bit', '>i4': '32-bit', '<i8': '64-bit', '>u8': '64-bit'}


@pytest.mark.parametrize('dtype', WRONG_TYPES)
@pytest.mark.parametrize('count', [100, 9000])
def test_integers_of_another_width_are_refused(tmp_path, dtype, count):
    write_tokens(tmp_path, IDS[:count], dtype)
    with pytest.raises(UserError, match=f'val.bin looks like a file of {WRONG_TYPES[dtype]} integers'):
        Tokens(tmp_path, 'val', 64, 50257)


def test_integers_of_another_width_are_refused_although_some_have_all_their_bits(tmp_path):
    ids = IDS.copy()
    ids[1000:1100] = 0
    write_tokens(tmp_path, ids, '<u4')
    with pytest.raises(UserError, match='32-bit'):
        Tokens(tmp_path, 'val', 64, 50257)


@pytest.mark.parametrize(
    'ids', [np.zeros(2000), np.arange(2000) % 2 * 50, np.arange(2000) % 2 * 50 + 1, np.arange(2000) % 4 // 3]
)
def test_ids_are_refused_only_if_every_second_one_is_zero_and_there_is_a_stretch_to_see_it(tmp_path, ids):
    if ids[::2].any() or not ids.any():
        assert opened(tmp_path, ids, 64).length == 2000
    else:
        with pytest.raises(UserError, match='integers'):
            opened(tmp_path, ids, 64)
    assert opened(tmp_path, ids[:60], 32).length == 60


def test_an_array_of_numpy_that_was_renamed_is_named(tmp_path):
    np.save(tmp_path / 'ids.npy', IDS.astype('<u2'))
    (tmp_path / 'ids.npy').rename(tmp_path / 'val.bin')
    with pytest.raises(
        UserError, match='val.bin looks like a file of np.save: give it a name that ends in .npy'
    ):
        Tokens(tmp_path, 'val', 64, 50257)


@pytest.mark.parametrize(
    'content, expected',
    [
        (gzip.compress(bytes(IDS.astype('<u2'))), 'a gzip file'),
        (lzma.compress(bytes(IDS.astype('<u2'))), 'an xz file'),
        (bz2.compress(bytes(IDS.astype('<u2'))), 'a bzip2 file'),
        (b'PK\x03\x04' + bytes(1000), 'a zip archive'),
        (b'MMIDIDX\x00' + bytes(1000), "an index of Megatron's"),
        (np.array([20240520, 2, 500], '<i4').tobytes() + bytes(2000), 'a shard of another version'),
        (b'It was the best of times, it was the worst of times.\n' * 20, 'plain text'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_begins_like_another_kind_of_file_is_named(tmp_path, content, expected):
    (tmp_path / 'val.bin').write_bytes(content)
    with pytest.raises(UserError, match=f'val.bin looks like {expected}'):
        Tokens(tmp_path, 'val', 64, 50257)


def test_every_kind_of_honest_file_is_read(tmp_path):
    text = 'It was the best of times, it was the worst of times.\n' * 20
    for ids in (IDS, np.random.default_rng(0).integers(0, 2, 5000), list(text.encode())):
        assert opened(tmp_path, ids, 64).length == len(ids)


def test_a_file_cut_short_under_a_run_ends_in_a_sentence(tmp_path):
    tokens = opened(tmp_path, np.arange(1000), 64)
    os.truncate(tmp_path / 'val.bin', 2 * 500)
    tokens.windows([400])
    with pytest.raises(UserError, match='ends at token 500 although it held 1000'):
        tokens.windows([480])


def test_a_set_without_meta_json_is_gpt2(tmp_path):
    assert read_meta(tmp_path) == GPT2_META


@pytest.mark.parametrize(
    'text, sentence',
    [
        ('{"tokenizer": ', 'not readable as JSON'),
        ('7', 'not readable as JSON'),
        ('[]', 'lacks tokenizer, vocab_size, eot'),
        ('{"tokenizer": "bytes", "vocab_size": 257}', 'lacks eot'),
        ('{"tokenizer": "bytes", "vocab_size": "257", "eot": 256}', "vocab_size is '257'"),
        ('{"tokenizer": "bytes", "vocab_size": 65537, "eot": 256}', 'vocab_size is 65537'),
        ('{"tokenizer": "bytes", "vocab_size": 1, "eot": 0}', 'vocab_size is 1,'),
    ],
)
def test_a_malformed_meta_json_is_refused(tmp_path, text, sentence):
    (tmp_path / 'meta.json').write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_meta(tmp_path)


def test_a_dataset_is_found_by_name_or_by_path(tmp_path):
    assert dataset_folder('pysource') == Path(prepare.__file__).parent
    assert dataset_folder(str(tmp_path)) == tmp_path


def test_the_bytes_encoding_is_utf8_and_one_end_of_text():
    text = 'naïve, 速い, \U0001f40d\n<|endoftext|>'
    bpe = encoding('bytes')
    assert bytes(bpe.encode_ordinary(text)) == text.encode()
    assert bpe.decode(bpe.encode_ordinary(text)) == text
    assert (bpe.n_vocab, bpe.eot_token) == (257, 256)


def test_an_unknown_encoding_is_refused():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt5': expected gpt2 or bytes"):
        encoding('gpt5')


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with atomic_write(path) as file:
        file.write(b'new')
        file.flush()
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new'
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with pytest.raises(error):
        with atomic_write(path) as file:
            file.write(b'new')
            raise error
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['file']


def make_sources(root, count=80):
    """Writes files with what is easily lost on the way: a BOM, \\r\\n, no last newline, special tokens as
    text. Returns {name: content}."""
    contents = {
        f'module_{i}.py': f'# {i}\r\nx = "é速\U0001f40d" * {i}\n\n\tpass  # <|endoftext|>'.encode()
        for i in range(count)
    }
    contents['module_0.py'] = b'\xef\xbb\xbf' + contents['module_0.py']
    for i, (name, content) in enumerate(contents.items()):
        put(root / f'package_{i % 7}' / name, content)
    return contents


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def run(root, out, *flags):
    """Runs prepare.py with the bytes tokenizer. Returns the documents of both splits, read without tiktoken,
    as {'train': [content, …], 'val': […]}."""
    prepare.main(['--tokenizer=bytes', f'--root={root}', f'--out={out}', *flags])
    return {split: documents(out / f'{split}.bin', 256) for split in ('train', 'val')}


def documents(path, end_of_text):
    ids = np.fromfile(path, dtype='<u2')
    ends = np.flatnonzero(ids == end_of_text)
    assert ends[-1] == len(ids) - 1
    return [
        bytes(part[part != end_of_text].astype('u1'))
        if end_of_text == 256
        else part[part != end_of_text].tolist()
        for part in np.split(ids, ends[:-1] + 1)
    ]


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sides(splits, content):
    return [split for split in splits if content in splits[split]]


def test_the_documents_are_the_files_byte_for_byte(tmp_path):
    contents = make_sources(tmp_path / 'root')
    splits = run(tmp_path / 'root', tmp_path / 'out')
    assert sorted(splits['train'] + splits['val']) == sorted(contents.values())
    assert 0 < len(splits['val']) < len(splits['train'])


def test_meta_json_says_what_was_written(tmp_path):
    contents = make_sources(tmp_path / 'root')
    run(tmp_path / 'root', tmp_path / 'out')
    meta, files = read_meta(tmp_path / 'out'), folder_bytes(tmp_path / 'out')
    assert meta['sha256'] == {name: sha256(files[name]).hexdigest() for name in ('train.bin', 'val.bin')}
    assert (meta['train_tokens'], meta['val_tokens']) == (
        len(files['train.bin']) // 2,
        len(files['val.bin']) // 2,
    )
    assert (meta['files'], meta['bytes']) == (len(contents), sum(map(len, contents.values())))
    assert (meta['tokenizer'], meta['vocab_size'], meta['eot']) == ('bytes', 257, 256)
    assert str(tmp_path) not in json.dumps(meta)


def test_the_loader_reads_what_was_written(tmp_path):
    make_sources(tmp_path / 'root')
    run(tmp_path / 'root', tmp_path / 'out')
    meta = read_meta(tmp_path / 'out')
    tokens = Tokens(tmp_path / 'out', 'train', 64, meta['vocab_size'])
    assert tokens.length == meta['train_tokens']
    tokens.windows(tokens.fixed_starts(1000))


def test_the_number_of_workers_changes_nothing(tmp_path):
    make_sources(tmp_path / 'root')
    for workers in (1, 5):
        run(tmp_path / 'root', tmp_path / f'out{workers}', f'--workers={workers}')
    assert folder_bytes(tmp_path / 'out1') == folder_bytes(tmp_path / 'out5')


def test_where_the_root_lies_changes_nothing(tmp_path):
    make_sources(tmp_path / 'here')
    shutil.copytree(tmp_path / 'here', tmp_path / 'far' / 'away')
    run(tmp_path / 'here', tmp_path / 'out1')
    run(tmp_path / 'far' / 'away', tmp_path / 'out2')
    assert folder_bytes(tmp_path / 'out1') == folder_bytes(tmp_path / 'out2')


def test_the_order_of_the_file_system_changes_nothing(tmp_path, monkeypatch):
    make_sources(tmp_path / 'root')
    run(tmp_path / 'root', tmp_path / 'out1')
    listed = prepare.python_files
    monkeypatch.setattr(prepare, 'python_files', lambda *args: reversed(list(listed(*args))))
    run(tmp_path / 'root', tmp_path / 'out2')
    assert folder_bytes(tmp_path / 'out1') == folder_bytes(tmp_path / 'out2')


def test_the_split_follows_the_content_and_not_the_path(tmp_path):
    for i, content in enumerate(make_sources(tmp_path / 'root1').values()):
        put(tmp_path / 'root2' / f'other{i % 3}' / f'renamed_{i}.py', content)
    assert run(tmp_path / 'root1', tmp_path / 'out1') == run(tmp_path / 'root2', tmp_path / 'out2')


def test_a_copy_is_dropped(tmp_path):
    make_sources(tmp_path / 'root')
    once = run(tmp_path / 'root', tmp_path / 'out1')
    shutil.copytree(tmp_path / 'root' / 'package_3', tmp_path / 'root' / '_vendor' / 'package_3')
    assert run(tmp_path / 'root', tmp_path / 'out2') == once


def test_versions_of_a_vendored_file_stay_on_one_side(tmp_path):
    pairs = [(f'original {i:04}'.encode(), f'modified {i:04}'.encode()) for i in range(100)]
    for i, (original, modified) in enumerate(pairs):
        put(tmp_path / 'root' / f'six_{i}.py', original)
        put(tmp_path / 'root' / 'pip' / '_vendor' / f'six_{i}.py', modified)
    splits = run(tmp_path / 'root', tmp_path / 'out')
    assert all(sides(splits, original) == sides(splits, modified) for original, modified in pairs)
    by_itself = [[prepare.split_of(sha256(content).digest()) for content in pair] for pair in pairs]
    assert any(one != other for one, other in by_itself)  # or the lines above would show nothing


def test_versions_linked_only_through_a_third_stay_on_one_side(tmp_path):
    chains = [[f'{word} {i:04}'.encode() for word in ('one', 'two', 'ten')] for i in range(100)]
    for i, (first, between, last) in enumerate(chains):
        put(tmp_path / 'root' / f'first_{i}.py', first)
        put(tmp_path / 'root' / 'copied' / f'first_{i}.py', between)
        put(tmp_path / 'root' / 'copied' / f'last_{i}.py', between)
        put(tmp_path / 'root' / f'last_{i}.py', last)
    splits = run(tmp_path / 'root', tmp_path / 'out')
    assert all(
        sides(splits, first) == sides(splits, between) == sides(splits, last)
        for first, between, last in chains
    )


def test_what_is_not_utf8_or_empty_or_no_file_is_left_out_and_counted(tmp_path, capsys):
    contents = make_sources(tmp_path / 'root')
    put(tmp_path / 'root' / 'latin.py', '# é'.encode('latin-1'))
    put(tmp_path / 'root' / 'empty.py', b'')
    put(tmp_path / 'root' / 'notes.txt', b'no source')
    put(tmp_path / 'root' / 'SETUP.PY', b'shouted = True')
    contents['SETUP.PY'] = b'shouted = True'
    (tmp_path / 'root' / 'vanished.py').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'root' / 'loop').symlink_to(tmp_path / 'root')
    os.mkfifo(tmp_path / 'root' / 'pipe.py')
    splits = run(tmp_path / 'root', tmp_path / 'out')
    assert sorted(splits['train'] + splits['val']) == sorted(contents.values())
    assert 'left out: 1 empty, 1 linked folder, 1 not UTF-8, 2 unreadable' in capsys.readouterr().out


def test_the_limit_takes_documents_in_the_order_of_their_hash(tmp_path):
    contents = sorted(make_sources(tmp_path / 'root').values(), key=lambda content: sha256(content).digest())
    splits = run(tmp_path / 'root', tmp_path / 'out', '--limit=2k')
    taken = len(splits['train'] + splits['val'])
    assert sorted(splits['train'] + splits['val']) == sorted(contents[:taken])
    assert sum(map(len, contents[:taken])) <= 2000 < sum(map(len, contents[: taken + 1]))


def test_a_document_stays_on_its_side_whatever_the_limit(tmp_path):
    make_sources(tmp_path / 'root')
    whole, part = (
        run(tmp_path / 'root', tmp_path / 'out1'),
        run(tmp_path / 'root', tmp_path / 'out2', '--limit=2k'),
    )
    assert all(set(part[split]) <= set(whole[split]) for split in whole)


def test_several_roots_are_one_set(tmp_path):
    make_sources(tmp_path / 'root')
    whole = run(tmp_path / 'root', tmp_path / 'out1')
    shutil.move(tmp_path / 'root' / 'package_2', tmp_path / 'other')
    assert run(tmp_path / 'root', tmp_path / 'out2', '--root', str(tmp_path / 'other')) == whole


def test_the_demo_set_is_small_and_has_enough_to_validate_on(tmp_path):
    prepare.main([*prepare.DEMO, f'--out={tmp_path}'])
    meta = read_meta(tmp_path)
    assert 5_000_000 < meta['bytes'] <= 8_000_000
    assert meta['val_tokens'] > 100_000
    assert meta['source'].endswith('standard library')


@needs_gpt2
def test_gpt2_tokens_are_those_of_tiktoken(tmp_path):
    contents = make_sources(tmp_path / 'root')
    prepare.main([f'--root={tmp_path / "root"}', f'--out={tmp_path / "out"}'])
    found = [ids for split in ('train', 'val') for ids in documents(tmp_path / 'out' / f'{split}.bin', 50256)]
    assert sorted(found) == sorted(
        encoding('gpt2').encode_ordinary(content.decode()) for content in contents.values()
    )
    assert {key: read_meta(tmp_path / 'out')[key] for key in GPT2_META} == GPT2_META


@needs_gpt2
def test_a_run_of_a_million_blanks_is_tokenized(tmp_path):
    content = b'x = 1;' + b' ' * 1_200_000 + b'y = 2'
    bpe = encoding('gpt2')
    assert bpe.decode_bytes(prepare.tokenize(content, bpe)[:-1].tolist()) == content


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--root=nowhere'], '--root nowhere is not a folder'),
        (['--root=hollow'], '0 Python files found'),
        (['--root=single'], '1 Python files found, 1 documents left of them, none for '),
        (['--root=root', '--limit=1'], '0 documents left'),
        (['--root=root', '--limit=lots'], "--limit is 'lots'"),
        (['--root=root', '--workers=0'], '--workers is 0'),
        (['--root=root', '--tokenizer=gpt5'], "unknown tokenizer 'gpt5'"),
    ],
)
def test_a_mistake_ends_in_a_sentence_and_leaves_the_old_dataset(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path / 'root')
    (tmp_path / 'hollow').mkdir()
    put(tmp_path / 'single' / 'one.py', b'pass')
    run('root', tmp_path / 'out')
    before = folder_bytes(tmp_path / 'out')
    with pytest.raises(SystemExit) as stop:
        prepare.main(['--tokenizer=bytes', '--out=out', *flags])
    assert (
        stop.value.code.startswith('error: ') and sentence in stop.value.code and '\n' not in stop.value.code
    )
    assert folder_bytes(tmp_path / 'out') == before


def test_a_folder_that_cannot_be_written_ends_in_a_sentence(tmp_path):
    make_sources(tmp_path / 'root')
    (tmp_path / 'out').write_text('a file')
    with pytest.raises(SystemExit, match='error: cannot write to .*out: File exists'):
        run(tmp_path / 'root', tmp_path / 'out')


def test_bpe_files_that_cannot_be_had_end_in_a_sentence(tmp_path, monkeypatch):
    def no_network(name):
        raise ConnectionError('HTTPSConnectionPool, Max retries exceeded')

    monkeypatch.setattr('tiktoken.get_encoding', no_network)
    with pytest.raises(SystemExit, match='error: .*TIKTOKEN_CACHE_DIR.*--tokenizer=bytes'):
        prepare.main([f'--root={tmp_path}', f'--out={tmp_path / "out"}'])


def test_a_run_that_dies_while_tokenizing_leaves_the_old_dataset(tmp_path, monkeypatch):
    make_sources(tmp_path / 'root')
    run(tmp_path / 'root', tmp_path / 'out')
    before = folder_bytes(tmp_path / 'out')
    put(tmp_path / 'root' / 'bad.py', b'bad')
    tokenize = prepare.tokenize
    monkeypatch.setattr(
        prepare, 'tokenize', lambda content, bpe: tokenize(None if content == b'bad' else content, bpe)
    )
    with pytest.raises(AttributeError):
        run(tmp_path / 'root', tmp_path / 'out')
    assert folder_bytes(tmp_path / 'out') == before


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_a_run_cut_while_files_take_their_names_leaves_no_file_beside_a_meta_json_of_another_set(
    tmp_path, monkeypatch, renames
):
    make_sources(tmp_path / 'root', count=100)
    make_sources(tmp_path / 'old')
    run(tmp_path / 'old', tmp_path / 'out')
    done, replace = [], os.replace

    def replace_some(*names):
        if len(done) == renames:
            raise OSError(28, 'No space left on device')
        done.append(replace(*names))

    monkeypatch.setattr(os, 'replace', replace_some)
    with pytest.raises(SystemExit, match='No space left on device'):
        run(tmp_path / 'root', tmp_path / 'out')
    left = folder_bytes(tmp_path / 'out')
    assert 'train.bin' not in left
    meta = json.loads(left.pop('meta.json'))
    assert all(sha256(content).hexdigest() == meta['sha256'][name] for name, content in left.items())


def test_the_script_says_error_without_a_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, prepare.__file__, '--tokenizer=bytes', '--root', str(tmp_path / 'nowhere')],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1 and result.stderr.startswith('error: ')
