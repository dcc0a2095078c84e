"""The specification of probe.py: labels planted where they must be found, and definitions computed again
in numpy, a token at a time.
"""

import json
from contextlib import redirect_stdout
from hashlib import sha256
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from test_measure import observe, write_checkpoint

from checkpoint import build_model, load_checkpoint
from data.classes import CLASSES
from data.loader import SHARD_MAGIC, Tokens, encoding
from studies import probe
from studies.probe import (
    Probes,
    choose_dims,
    choose_sublayers,
    document_groups,
    draw_samples,
    label_windows,
    scores,
    split_windows,
    standardize,
)

pytestmark = pytest.mark.usefixtures('one_thread')

EOT, N, T, S = 256, 20, 100, 2  # windows, tokens of each, seeds, of the planted streams
PYTHON = [
    "def f(a, b=(1, [2])):\n    return 'no' + a  # why\n",
    'x = {3: """two\nlines""", 4: [f(1), -2]}\n',
    'for i in y:\n    z += i\n',
    '"""Says what."""\nimport os\n',
]


def write_tokens(folder, documents, source='Python lines, made up'):
    """Returns the ids of both splits: the documents, each with its end of text."""
    folder.mkdir(parents=True)
    ids = np.array([i for text in documents for i in (*text.encode(), EOT)], dtype='<u2')
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    digest = sha256(ids).hexdigest()
    (folder / 'meta.json').write_text(
        json.dumps(
            {
                'tokenizer': 'bytes',
                'vocab_size': 257,
                'eot': EOT,
                'source': source,
                'sha256': {'train': digest, 'val': digest},
            }
        )
    )
    return ids.tolist()


def command(*flags):
    """Runs probe.py, on the CPU unless the flags say otherwise. Returns what it printed."""
    with redirect_stdout(StringIO()) as printed:
        probe.main(['--device=cpu', *map(str, flags)])
    return printed.getvalue()


# ---- Probes


@pytest.fixture(scope='module')
def planted():
    """What probes say of a random stream, whose dimensions 2 and 5 are large and know the labels;
    dimension 7 is large and knows nothing.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N * T, 14))
    sign, half = x[:, 2] > 0, np.where(x[:, 2] > 0.67, 2, x[:, 2] > -0.67)
    labels = {
        'sign': (('no', 'yes'), sign),
        'part': (('low', 'middle', 'high'), half),
        'either': (('no', 'yes'), sign ^ (x[:, 5] > 0)),
    }
    labels = {
        task: (names, column.reshape(N, T).astype(np.int64)) for task, (names, column) in labels.items()
    }
    x[:, [2, 5, 7]] = 1000 * x[:, [2, 5, 7]] + 300
    samples = draw_samples(np.arange(N), T, S, 700)
    dims = {
        'mean': np.array([[2, 5]] * S),
        'start': np.array([[7, 2]] * S),
        'random': np.array([[8, 9], [10, 11]]),
        'all': np.array([range(14)] * S),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, 'STEPS', 60)
        return labels, samples, probe.probe(torch.from_numpy(x).float(), labels, samples, dims)


@pytest.mark.parametrize(
    'task, kind, told, least',
    [
        ('sign', 'linear', 'mean', 0.98),
        ('sign', 'hidden', 'mean', 0.98),
        ('sign', 'linear', 'start', 0.98),
        ('sign', 'linear', 'all', 0.93),
        ('part', 'linear', 'mean', 0.8),
        ('part', 'hidden', 'mean', 0.92),
        ('either', 'hidden', 'mean', 0.9),
    ],
)
def test_a_planted_label_is_found_where_it_was_planted(planted, task, kind, told, least):
    q = planted[2][task][kind][told]
    assert least < q['accuracy']['low'] <= q['accuracy']['value'] <= q['accuracy']['high'] <= 1
    assert q['selectivity']['low'] > 0.3 and q['balanced']['low'] > 0.7
    assert q['balanced_shuffled']['high'] < 0.65


@pytest.mark.parametrize(
    'task, kind, told',
    [
        ('sign', 'linear', 'random'),
        ('sign', 'hidden', 'random'),
        ('part', 'hidden', 'random'),
        ('either', 'linear', 'mean'),
        ('either', 'hidden', 'start'),
    ],
)
def test_a_label_is_not_found_where_it_is_not_or_not_linear(planted, task, kind, told):
    results = planted[2][task]
    q = results[kind][told]
    assert q['balanced']['value'] == pytest.approx(1 / len(results['classes']), abs=0.08)
    assert abs(q['selectivity']['value']) < 0.12


def test_shuffled_labels_are_never_found(planted):
    for results in planted[2].values():
        found = [q for kind in ('linear', 'hidden') for q in results[kind].values()]
        chance = 1 / len(results['classes'])
        balanced = [q['balanced_shuffled']['value'] for q in found]
        assert all(q['shuffled']['value'] < results['majority']['value'] + 0.05 for q in found)
        assert balanced == pytest.approx([chance] * len(found), abs=0.15)
        assert np.mean(balanced) == pytest.approx(chance, abs=0.06)


def test_the_majority_is_that_of_the_test_side(planted):
    labels, (_, test), report = planted
    for task, (names, column) in labels.items():
        shares = [np.bincount(column.ravel()[places]).max() / len(places) for places in test]
        expected = {'value': np.mean(shares), 'low': min(shares), 'high': max(shares)}
        assert report[task]['majority'] == pytest.approx(expected, rel=1e-6)
        assert report[task]['classes'] == list(names)


def two_questions():
    """Features (2, 200, 3) and labels (2, 2, 200) of a question with two classes and one with three."""
    x = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
    two = (x[..., 0] > 0).long()
    three = (x[..., 1] + x[..., 2] > 1).long() + (x[..., 1] > 0).long()
    return x, torch.stack([two, three], 1)


def test_probes_trained_together_learn_as_if_alone():
    x, labels = two_questions()
    together = Probes(2, 3, [2, 3], 0, 'cpu').fit(x, labels).logits(x)
    for seed in range(2):
        for i, size in enumerate((2, 3)):
            alone = Probes(1, 3, [size], 0, 'cpu').fit(x[[seed]], labels[[seed], i : i + 1])
            expected = alone.logits(x[[seed]])[0, 0]
            torch.testing.assert_close(together[seed, i, :, :size], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('hidden', [0, 8])
def test_a_class_that_a_question_lacks_is_never_named(hidden):
    x, labels = two_questions()
    probes = Probes(2, 3, [2, 3], hidden, 'cpu').fit(x, labels)
    assert probes.predict(10 * x)[0][:, 0].max() == 1


def test_a_linear_probe_is_a_logistic_regression():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(120, 2)), rng.integers(0, 3, 120)
    X, W = np.c_[x, np.ones(120)], np.zeros((3, 3))
    for _ in range(2000):  # down the gradient, to the only minimum
        share = np.exp(X @ W) / np.exp(X @ W).sum(1, keepdims=True)
        W -= X.T @ (share - np.eye(3)[y]) / 120
    features, labels = torch.from_numpy(x).float()[None], torch.from_numpy(y)[None, None]
    fitted = Probes(1, 2, [3], 0, 'cpu').fit(features, labels)
    np.testing.assert_allclose(fitted.logits(features)[0, 0].softmax(-1).detach(), share, atol=1e-3)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_the_test_side_has():
    labels, fair = torch.tensor([[[0, 0, 0, 1], [2, 2, 2, 2]]]), torch.tensor([[[0, 0, 1, 1], [2, 0, 2, 1]]])
    accuracy, balanced, majority = scores(torch.zeros_like(labels), fair, labels, 3)
    assert accuracy.tolist() == [[0.75, 0]] and majority.tolist() == [[0.75, 1]]
    np.testing.assert_allclose(balanced, [[(2 / 3 + 1) / 2, 0.5]])


def test_a_rare_class_is_recalled_as_if_all_classes_were_equally_frequent():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(1, 1, 4000, generator=generator) < 0.02).long()
    # Two Gaussians, one apart by 2: the most probable class changes at 1 + ln(49) / 2 or, fairly, at 1.
    x = (torch.randn(1, 4000, generator=generator) + 2 * labels[0])[..., None]
    probes = Probes(1, 1, [3], 0, 'cpu').fit(x, labels)  # the third class is never seen
    grid = torch.arange(-4, 6, 0.01)[None, :, None]
    predicted, fair = (side[0, 0] for side in probes.predict(grid))
    assert grid[0, predicted.argmax(), 0] == pytest.approx(1 + np.log(49) / 2, abs=0.4)
    assert grid[0, fair.argmax(), 0] == pytest.approx(1, abs=0.4)
    assert fair.max() == 1


def test_dimensions_are_centred_and_scaled_by_the_training_side_alone():
    train = torch.tensor([[-8.0, 5, 1], [0, 5, 2], [2, 5, 3], [4, 5, 4], [1000, 5, 5]])[None]
    test = torch.tensor([[2.0, 5, 3], [6, 7, 1e6]])[None]
    median, range_of_quartiles = np.array([2, 5, 3]), np.array([4, 1, 2])
    for found, x in zip(standardize(train, test), (train, test)):
        expected = np.arcsinh((x[0].numpy() - median) / range_of_quartiles)
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)


# ---- Documents, windows, tokens


def sharded(folder, lengths):
    """Two shards of documents of these lengths, the first shard ended in the middle of the fourth document.

    Returns the document of each token.
    """
    ids, of = [], []
    for number, length in enumerate(lengths):
        ids += [65] * (length - 1) + [EOT]
        of += [number] * length
    cut = sum(lengths[:3]) + lengths[3] // 2
    for name, part in (('val_0.bin', ids[:cut]), ('val_1.bin', ids[cut:])):
        header = np.zeros(256, '<i4')
        header[:3] = SHARD_MAGIC, 1, len(part)
        (folder / name).write_bytes(header.tobytes() + np.array(part, '<u2').tobytes())
    return np.array(of)


def test_windows_are_of_one_group_only_if_a_chain_of_documents_joins_them(tmp_path):
    rng = np.random.default_rng(3)
    for draw in range(20):
        (folder := tmp_path / str(draw)).mkdir()
        of = sharded(folder, [50, 3, 40, 60, *rng.integers(1, 30, 30)])
        tokens = Tokens(folder, 'val', 8, 257)
        starts = tokens.fixed_starts(int(rng.integers(5, 25)), seed=draw)
        # The window and the token that it predicts last.
        shown = [set(of[start : start + 9]) for start in starts]
        joined = np.array([[bool(a & b) for b in shown] for a in shown])
        for _ in starts:
            joined = joined | (joined.astype(int) @ joined > 0)
        groups = document_groups(tokens, starts, EOT)
        assert ((groups[:, None] == groups) == joined).all()


def test_no_document_and_no_window_is_on_both_sides_and_each_side_has_its_share():
    groups = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9])
    held = []
    for seed in range(100):
        test = split_windows(groups, seed)
        assert not set(groups[test]) & set(groups[~test])
        held.append(test.sum())
    assert 1 <= min(held) and max(held) == 6 and np.mean(held) > 4
    smaller = [True, False, False, False]
    assert split_windows(np.array([0, 1, 1, 1]), 0).tolist() == smaller


def test_what_only_the_tokens_of_a_document_share_is_not_found(monkeypatch):
    monkeypatch.setattr(probe, 'STEPS', 30)
    rng, document = np.random.default_rng(1), np.arange(300) // 5
    fingerprint, coin = 5 * rng.normal(size=(60, 40)), rng.integers(0, 2, 60)
    x = torch.from_numpy(np.repeat(fingerprint[document], 10, 0) + rng.normal(size=(3000, 40))).float()
    labels = {'coin': (('no', 'yes'), np.repeat(coin[document, None], 10, 1))}
    dims = {'all': np.array([range(40)] * 3)}

    def found(groups):
        samples = draw_samples(groups, 10, 3, 2000)
        return probe.probe(x, labels, samples, dims)['coin']['linear']['all']['balanced']['value']

    assert found(document) < 0.65 < 0.85 < found(rng.permutation(300))


def test_a_seed_draws_tokens_of_each_side_without_repetition_and_the_first_of_every_window():
    groups = np.arange(12) // 2
    train, test = draw_samples(groups, 10, 5, 80)
    assert train.shape == (5, 60) and test.shape[0] == 5 and 10 < test.shape[1] <= 20
    for seed in range(5):
        on_test = split_windows(groups, seed)
        for places, side in ((train[seed], ~on_test), (test[seed], on_test)):
            assert side[places // 10].all() and len(set(places)) == len(places)
            assert set(10 * np.flatnonzero(side)) <= set(places)
    assert len({tuple(places) for places in train}) == 5
    assert all((a == b).all() for a, b in zip(draw_samples(groups, 10, 5, 80), (train, test)))


def test_labels_are_those_of_the_token_itself_but_for_the_class_of_the_next(tmp_path):
    ids = write_tokens(tmp_path / 'data', PYTHON * 3)
    tokens = Tokens(tmp_path / 'data', 'val', 16, 257)
    starts = np.array([50, 0])  # the first begins with the second document: x = {3: """two⏎line
    assert ids[49] == EOT
    labels = label_windows(tokens, starts, encoding('bytes'), 'python')
    found = {task: [names[v] for v in column[0]] for task, (names, column) in labels.items()}
    string = 'string'
    before = 'name,white space,operator,white space,operator,number,operator,white space'.split(',')
    assert found['token class'] == [*before, *[string] * 6, 'line end', string]
    assert found['next token class'] == found['token class'][1:] + [string]
    assert found['first of window'] == ['yes'] + ['no'] * 15
    assert found['position'] == [f'{i}–{i + 1}' for i in range(0, 16, 2) for _ in 'ab']
    assert found['line start'] == ['no'] * 15 + ['yes']  # what came before the window is not known
    assert found['bracket depth'] == ['0'] * 5 + ['1'] * 11 and found['inside'] == ['code'] * 8 + [string] * 8
    assert all(column.shape == (2, 16) and column.dtype == np.int64 for _, column in labels.values())


@pytest.mark.parametrize('block_size', [8, 12, 100])
def test_the_names_of_the_position_classes_are_the_positions_in_them(tmp_path, block_size):
    write_tokens(tmp_path / 'data', PYTHON * 3)
    tokens = Tokens(tmp_path / 'data', 'val', block_size, 257)
    names, (column,) = label_windows(tokens, np.array([0]), encoding('bytes'), 'python')['position']
    assert names == [
        f'{places.min()}–{places.max()}' for places in (np.flatnonzero(column == i) for i in range(8))
    ]


def test_english_has_sentences_and_no_brackets(tmp_path):
    write_tokens(tmp_path / 'data', ['It is. So (we) go!\n'] * 5)
    labels = label_windows(
        Tokens(tmp_path / 'data', 'val', 12, 257), np.array([20]), encoding('bytes'), 'english'
    )
    assert list(labels)[:4] == ['token class', 'next token class', 'first of window', 'position']
    assert list(labels)[4:] == [
        'sentence start',
        'sentence end',
        'paragraph start',
        'word in sentence',
        'capitalized',
    ]
    assert labels['token class'][0] == CLASSES['english']
    # It is. So (we)
    assert np.flatnonzero(labels['sentence start'][1][0]).tolist() == [7]
    assert np.flatnonzero(labels['sentence end'][1][0]).tolist() == [5]
    assert not labels['paragraph start'][1].any()
    assert labels['word in sentence'][1][0].tolist() == [0, 0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 1]
    assert labels['capitalized'][1][0].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert all(column.max() < len(names) for names, column in labels.values())


# ---- Dimensions and sublayers


def test_dimensions_of_largest_mean_magnitude_are_told_and_random_ones_are_others():
    m, p = np.array([1.0, 9, 2, 9, 3, 0, 0, 0, 0, 0]), np.array([7.0, 1, 0, 0, 8, 0, 0, 0, 0, 0])
    dims = choose_dims(m, p, 2, 40)
    assert dims['mean'].tolist() == [[1, 3]] * 40
    assert dims['start'].tolist() == [[4, 0]] * 40
    assert dims['all'].tolist() == [list(range(10))] * 40
    assert all(len(set(row)) == 2 for row in dims['random'])
    assert set(dims['random'].ravel()) == {2, 5, 6, 7, 8, 9}


class Measured:
    def __init__(self, ratio):
        self.ratio = np.array([ratio])

    def stream(self, stream):
        return {'fixed_dim_ratio': self.ratio}


def test_auto_takes_the_sublayer_of_the_largest_ratio_and_the_last():
    assert list(choose_sublayers(Measured([2, 9, np.inf, 9, 3]), 'C', 'auto')) == [1, 4]
    assert list(choose_sublayers(Measured([2, np.nan, 9]), 'C', 'auto')) == [2]
    assert list(choose_sublayers(Measured([2, 9]), 'C', '0')) == [0]


# ---- The command


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Both arms probed by one command. Documents of 34 to 53 tokens, windows of 16."""
    root = tmp_path_factory.mktemp('probed')
    write_tokens(root / 'data', PYTHON * 40)
    for arm, settings in (('baseline', {}), ('ledger', dict(residual='ledger'))):
        write_checkpoint(root / 'out' / arm / 'ckpt.pt', root / 'data', **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, 'STEPS', 5)
        printed = command('--ckpt', root / 'out', '--sequences=60', '--seeds=2', '--tokens=400', '--top=2')
    return root, printed


def report_in(folder):
    return json.loads(
        Path(folder, 'probe.json').read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON')
    )


def test_every_stream_task_probe_and_set_is_reported_for_both_arms(run):
    root, printed = run
    for arm, streams in (('baseline', ['h']), ('ledger', ['D', 'C'])):
        report = report_in(root / 'out' / arm)
        assert list(report['streams']) == streams
        assert report['data']['language'] == 'python' and report['settings']['seeds'] == 2
        for places in report['streams'].values():
            assert places[-1]['sublayer'] == 3
            tasks = [results for place in places for results in place['tasks'].values()]
            assert len(tasks) == 7 * len(places)
            for results in tasks:
                for kind in ('linear', 'hidden'):
                    assert set(results[kind]) == {'mean', 'start', 'random', 'all'}
        assert (root / 'out' / arm / 'probe.png').read_bytes()[:4] == b'\x89PNG'
    assert max(map(len, printed.splitlines())) <= 110


@pytest.mark.parametrize('arm, stream', [('baseline', 'h'), ('ledger', 'D'), ('ledger', 'C')])
def test_the_dimensions_and_the_sublayer_are_those_that_numpy_finds(run, arm, stream):
    root, _ = run
    path, tokens = root / 'out' / arm / 'ckpt.pt', Tokens(root / 'data', 'val', 16, 257)
    a = abs(
        observe(build_model(load_checkpoint(path), path), tokens.windows(tokens.fixed_starts(60))[0])[1][
            stream
        ]
    )  # (sublayers, N, T, d)
    m, p = a.mean((1, 2)), a[:, :, 0].mean(1)
    places = report_in(path.parent)['streams'][stream]
    assert [place['sublayer'] for place in places] == sorted(
        {int((m.max(-1) / np.median(m, -1)).argmax()), 3}
    )
    for place in places:
        assert (
            place['mean_dims'] == (-m[place['sublayer']]).argsort()[:2].tolist()
            and place['start_dims'] == (-p[place['sublayer']]).argsort()[:2].tolist()
        )


def test_what_is_probed_is_the_stream_as_it_leaves_the_sublayer(run):
    root, _ = run
    path, tokens = root / 'out/ledger/ckpt.pt', Tokens(root / 'data', 'val', 16, 257)
    model, starts = build_model(load_checkpoint(path), path), tokens.fixed_starts(7)
    streams = observe(model, tokens.windows(starts)[0])[1]
    features = probe.gather(model, tokens, starts, 3, {('C', 2), ('D', 3)})
    for (stream, s), x in features.items():
        np.testing.assert_allclose(x, streams[stream][s].reshape(-1, 20), rtol=1e-4, atol=1e-3)
    assert len(features) == 2


def test_one_stream_and_one_sublayer_can_be_asked_for_and_a_second_run_says_the_same(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(probe, 'STEPS', 3)
    for name in 'ab':
        command(
            '--ckpt',
            run[0] / 'out/ledger',
            '--stream=C',
            '--sublayer=1',
            '--sequences=20',
            '--seeds=1',
            '--tokens=64',
            '--top=6',
            f'--out={tmp_path / name}',
        )
    first, second = ((tmp_path / name / 'ledger/probe.json').read_bytes() for name in 'ab')
    places = json.loads(first)['streams']
    assert first == second and [place['sublayer'] for place in places.pop('C')] == [1] and not places


def test_other_data_than_those_of_the_training_are_probed_if_forced(run, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, 'STEPS', 1)
    path = tmp_path / 'other/ckpt.pt'
    write_checkpoint(path, run[0] / 'data')
    torch.save({**load_checkpoint(path), 'data_sha256': {'val.bin': '0'}}, path)
    flags = ('--ckpt', path, '--sequences=20', '--seeds=1', '--tokens=64', '--top=2')
    with pytest.raises(SystemExit, match='or add --force$'):
        command(*flags)
    command(*flags, '--force')
    assert report_in(path.parent)['streams']


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--stream=h'], '--stream=h, but .*ckpt.pt has D, C'),
        (['--sublayer=4'], '--sublayer=4, but the sublayers of .* are 0 to 3'),
        (['--sublayer=-1'], '--sublayer=-1, but'),
        (['--sublayer=last'], '--sublayer=last, but'),
        (['--top=7'], '--top=7, but .* has 20 dimensions: ask for at most 6'),
        (['--top=0'], '--top is 0: expected at least 1'),
        (['--seeds=0'], '--seeds is 0'),
        (['--sequences=1'], '--sequences is 1'),
        (['--tokens=1'], '--tokens is 1'),
        (['--sequences=9999'], 'one chain of documents'),
    ],
)
def test_what_cannot_be_probed_is_refused_in_a_sentence(run, flags, sentence):
    with pytest.raises(SystemExit, match=f'^error: .*{sentence}') as refused:
        command('--ckpt', run[0] / 'out/ledger', *flags)
    assert '\n' not in str(refused.value)


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says(run, tmp_path):
    for device in ('cpu', 'cuda'):
        command(
            '--ckpt',
            run[0] / 'out/ledger',
            '--sequences=60',
            '--seeds=2',
            '--tokens=400',
            f'--device={device}',
            f'--out={tmp_path / device}',
        )
    cpu, gpu = (report_in(tmp_path / device / 'ledger')['streams'] for device in ('cpu', 'cuda'))
    for stream in cpu:
        for ours, theirs in zip(cpu[stream], gpu[stream]):
            assert ours['mean_dims'] == theirs['mean_dims']
            for task, t in ours['tasks'].items():
                assert t['linear']['mean']['accuracy']['value'] == pytest.approx(
                    theirs['tasks'][task]['linear']['mean']['accuracy']['value'], abs=0.03
                )
