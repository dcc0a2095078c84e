"""The specification of measure.py. DESIGN.md's definitions are computed again in numpy, float64, over all of a stream at once:
X is (S, N, T, d), sublayers × sequences × tokens × dimensions."""
import json
import pickle
import shutil
from contextlib import redirect_stdout
from dataclasses import asdict
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import measure
from data.loader import Tokens
from measure import Statistics, attention_sink, bootstrap_weights, collect, find_checkpoints, print_run, row_median, stream_report, training_record
from model import GPT, GPTConfig, build_model, load_checkpoint

N, T, D = 10, 16, 20
SMALL = dict(block_size=T, vocab_size=257, n_layer=2, n_head=2, n_embd=D, gate_rank=3)
ARMS = {'baseline': {}, 'qknorm': dict(qk_norm=True), 'ledger': dict(residual='ledger', bf16_streams=True)}  # trained in bfloat16, to be measured in float32
every_stream = pytest.mark.parametrize('run, stream', [('baseline', 'h'), ('qknorm', 'h'), ('ledger', 'D'), ('ledger', 'C')])
HEADLINES = ('fixed_dim_ratio', 'start_token_concentration', 'start_ratio', 'start_dim_concentration', 'kurtosis', 'max_over_median', 'top1_at_start',
             'massive_count', 'median', 'norm', 'persistence', 'start_persistence')


def write_dataset(folder, vocab_size=257, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    meta = {'tokenizer': 'bytes', 'vocab_size': vocab_size, 'eot': 256, 'sha256': {}}
    for split in ('train', 'val'):
        ids = np.random.default_rng([seed, split == 'val']).integers(0, 257, 400).astype('<u2')
        ids.tofile(folder / f'{split}.bin')
        meta['sha256'][split] = sha256(ids.tobytes()).hexdigest()
    (folder / 'meta.json').write_text(json.dumps(meta))


def write_run(folder, data, name='ckpt.pt', closed=(), **settings):
    """Saves a model of random weights with outliers: on the start token, in every token, in every token from sublayers 1 and 3 on.
    closed: the sublayers whose commit gate is exactly 0. Returns the checkpoint's path."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.pos_emb.weight[0, 3] = 3000
        model.pos_emb.weight[:, 7] += 400
        for s, value in ((1, 900), (3, 3000)):
            model.sublayers[s].function.proj.bias[11] += value
        for s in closed:
            model.sublayers[s].residual.commit_weight.zero_()
            model.sublayers[s].residual.commit_bias.fill_(-1e4)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 3, 'config': {'dataset': str(data)},
                'data_sha256': json.loads((data / 'meta.json').read_text())['sha256']}, folder / name)
    return folder / name


def run_main(*argv):
    """Returns what was printed."""
    with redirect_stdout(StringIO()) as printed:
        measure.main([str(arg) for arg in argv])
    return printed.getvalue()


def read_report(path):
    def refuse(constant):
        raise ValueError(f'{constant} is not JSON')
    return json.loads(path.read_text(), parse_constant=refuse)


def write_log(folder, record):
    """Two lines as train.py writes them, and a third that is still being written."""
    lines = [json.dumps({'iter': i, 'tokens': 100 * i, 'val_loss': 5.0 - i, 'streams': record}) + '\n' for i in (0, 1, 2)]
    (folder / 'log.jsonl').write_text(''.join(lines)[:-50])


@torch.no_grad()
def observe(model, idx):
    """Returns the logits, {stream: X}, and what each attention reads, (N, T, d), in float64."""
    streams, reads = {}, []

    def see(sublayer, inputs, output):
        for name, x in output[0].items():
            streams.setdefault(name, []).append(x.double().numpy())

    hooks = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    hooks += [sublayer.function.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0].double().numpy())) for sublayer in model.sublayers[::2]]
    logits = model(idx).double().numpy()
    for hook in hooks:
        hook.remove()
    return logits, {name: np.stack(x) for name, x in streams.items()}, reads


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Three arms measured by one command on N sequences, and for each what there was to be seen. The ledger has a log, the others none."""
    root = tmp_path_factory.mktemp('measured')
    write_dataset(root / 'data')
    tokens = Tokens(root / 'data', 'val', T, 257)
    starts = tokens.fixed_starts(N)
    idx, targets = tokens.windows(starts)
    models, records, seen = {}, {}, {}
    for arm, settings in ARMS.items():
        path = write_run(root / 'out' / arm, root / 'data', **settings)
        models[arm] = build_model(load_checkpoint(path), path, bf16_streams=False)
        records[arm] = training_record(collect(models[arm], tokens, starts, 3, Statistics(topk=3)), ['D', 'C'] if arm == 'ledger' else ['h'])
        seen[arm] = observe(models[arm], idx)
    write_log(root / 'out/ledger', records['ledger'])
    printed = run_main('--ckpt', root / 'out', f'--sequences={N}')
    return SimpleNamespace(out=root / 'out', tokens=tokens, starts=starts, idx=idx.numpy(), targets=targets.numpy(), models=models, records=records, seen=seen,
                           printed=printed, reports={arm: read_report(root / 'out' / arm / 'measure.json') for arm in ARMS})


@pytest.fixture
def runs(tmp_path):
    """Returns (folder of data, folder of a run on it, both new)."""
    write_dataset(tmp_path / 'data')
    write_run(tmp_path / 'out/run', tmp_path / 'data')
    return tmp_path / 'data', tmp_path / 'out/run'


@pytest.fixture
def undrawn(monkeypatch):
    """Figures stay empty, which is quicker."""
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *_, **__: None)


def per_sequence(X):
    """Returns {name: (S, N, …)}: what is defined for a single sequence."""
    a = np.abs(X)
    flat = a.reshape(*X.shape[:2], -1)
    median, largest = np.median(flat, -1), flat.max(-1)
    z = (X - X.mean(-1, keepdims=True)) / X.std(-1, keepdims=True)
    return {'m': a.mean(2), 'p': a[:, :, 0], 'median': median, 'max_over_median': largest / median, 'kurtosis': (z ** 4 - 3).mean((2, 3)),
            'massive_count': ((flat > 100) & (flat >= 1000 * median[..., None])).sum(-1), 'norm': np.sqrt((X ** 2).sum(-1)).mean(-1),
            'top1_at_start': flat.argmax(-1) < X.shape[-1]}


def over_sequences(sequences, weights):
    """Returns {quantity: (S,)}, {quantity: the sublayer that is quoted} and {quantity: number of the stream} of weighted sequences."""
    q = {name: np.einsum('n,sn...->s...', weights / weights.sum(), value) for name, value in sequences.items()}
    m, p = q.pop('m'), q.pop('p')
    dominant, start = m.mean(0).argmax(), p.mean(0).argmax()
    q |= {'fixed_dim_ratio': m.max(1) / np.median(m, 1), 'start_ratio': p.max(1) / np.median(p, 1)}
    quoted = {name: value.argmax() for name, value in q.items()}
    for name, j in (('start_token_concentration', dominant), ('start_dim_concentration', start)):
        q[name], quoted[name] = p[:, j] / m[:, j], m[:, j].argmax()
    return q, quoted, {'dominant_dim': dominant, 'start_dim': start, 'persistence': (m.argmax(1) == dominant).mean(), 'start_persistence': (p.argmax(1) == start).mean()}


def headlines(sequences, weights):
    q, quoted, whole = over_sequences(sequences, weights)
    return {key: whole[key] if key in whole else q[key][quoted[key]] for key in HEADLINES}


def largest(a, k):
    """a: (N, T, d). Returns the k largest as (value, sequence, position, dimension), ties from the lowest on."""
    order = np.argsort(-a, axis=None, kind='stable')[:k]
    return [(a.flat[i], *(int(n) for n in np.unravel_index(i, a.shape))) for i in order]


def added(X, batch_size, k=5, replicates=0, device='cpu'):
    """Returns the Statistics of X as a stream h, added in batches."""
    statistics = Statistics(k, replicates)
    X = torch.as_tensor(X, dtype=torch.float32).to(device)
    for i in range(0, X.shape[1], batch_size):
        batch = X[:, i:i + batch_size]
        statistics.begin(batch.shape[1], device)
        for s, x in enumerate(batch):
            statistics.add_stream('h', s, x)
    return statistics


def listed(statistics, s, shape):
    """The largest magnitudes in the form of `largest`. shape: (T, d)."""
    return [(value, n, *map(int, np.unravel_index(i, shape))) for value, n, i in zip(*(t.tolist() for t in statistics.top['h', s]))]


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, float), desired, rtol=rtol, atol=atol)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- what is measured

@every_stream
def test_every_quantity_of_a_sublayer_is_the_one_defined(measured, run, stream):
    report = measured.reports[run]['streams'][stream]
    q, _, whole = over_sequences(per_sequence(measured.seen[run][1][stream]), np.ones(N))
    for key, values in q.items():
        close([sublayer[key] for sublayer in report['sublayers']], values)
    assert q['massive_count'].max() > 0 and 0 < whole['persistence'] < 1 and whole['dominant_dim'] != whole['start_dim']  # else little was tested


@every_stream
def test_headlines_are_maxima_over_sublayers_and_concentrations_are_quoted_where_their_dimension_peaks(measured, run, stream):
    report = measured.reports[run]['streams'][stream]
    q, quoted, whole = over_sequences(per_sequence(measured.seen[run][1][stream]), np.ones(N))
    for key in q:
        close([report[key]['value'], report[key]['last']], [q[key][quoted[key]], q[key][-1]])
        assert report[key]['sublayer'] == quoted[key]
    close([report['persistence']['value'], report['start_persistence']['value']], [whole['persistence'], whole['start_persistence']])
    assert (report['dominant_dim'], report['start_dim'], report['same_dim']) == (whole['dominant_dim'], whole['start_dim'], whole['dominant_dim'] == whole['start_dim'])
    assert report['peak_sublayer'] == quoted['start_token_concentration']


@every_stream
def test_the_largest_magnitudes_are_listed_with_their_place_and_token(measured, run, stream):
    for sublayer, x in zip(measured.reports[run]['streams'][stream]['sublayers'], measured.seen[run][1][stream]):
        for entry, (value, n, t, j) in zip(sublayer['top'], largest(np.abs(x), 5), strict=True):
            close(entry.pop('value'), value)
            assert entry == {'sequence': n, 'position': t, 'token': measured.idx[n, t], 'dim': j}
        close(sublayer['top_mean'], np.sort(np.abs(x).reshape(N, -1))[:, :-6:-1].mean(0))


@pytest.mark.parametrize('run', ARMS)
def test_the_loss_is_the_mean_over_tokens_in_nats(measured, run):
    logits, report = measured.seen[run][0], measured.reports[run]
    nll = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - np.take_along_axis(logits, measured.targets[..., None], 2)[..., 0]
    close([report['val_loss'], report['loss']['value']], nll.mean())


def softmax_sink(q, k):
    """q, k: (N, n_head, T, d / n_head). Returns (N, n_head)."""
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True))[..., 0].mean(-1)


@pytest.mark.parametrize('run', ARMS)
def test_a_sink_is_a_head_that_gives_position_0_more_than_0_3(measured, run):
    sink = []
    for u, sublayer in zip(measured.seen[run][2], measured.models[run].sublayers[::2]):
        qkv = (u @ sublayer.function.qkv.weight.detach().double().numpy().T).reshape(N, T, 3, 2, D // 2)
        heads = []
        for x, norm in ((qkv[:, :, 0], sublayer.function.q_norm), (qkv[:, :, 1], sublayer.function.k_norm)):
            if run == 'qknorm':
                x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * norm.weight.detach().double().numpy()
            heads.append(x.swapaxes(1, 2))
        sink.append(softmax_sink(*heads).mean(0))
    report = measured.reports[run]['attention_sink']
    close(report['heads'], sink)
    close([report['mean']['value'], report['fraction_of_heads']['value']], [np.mean(sink), np.mean(np.array(sink) > 0.3)])


def test_attention_probabilities_are_those_of_an_explicit_softmax():
    q, k = 3 * noise(2, 4, 3, T, 5)
    close(attention_sink(torch.tensor(q), torch.tensor(k)), softmax_sink(q, k), rtol=1e-12)


# ---- planted outliers

@pytest.mark.parametrize('n, t, j', [(0, 0, 0), (3, 0, 5), (7, 9, 19), (9, 15, 2)])
def test_a_planted_outlier_is_found_at_its_value_and_place(measured, n, t, j):
    X = noise(4, N, T, D)
    X[2, n, t, j] = -12345.5
    sublayers = stream_report(added(X, 4, replicates=2), 'h', measured.models['baseline'], measured.tokens, measured.starts)['sublayers']
    assert sublayers[2]['top'][0] == {'value': 12345.5, 'sequence': n, 'position': t, 'token': measured.idx[n, t], 'dim': j}
    assert [sublayer['massive_count'] for sublayer in sublayers] == [0, 0, 1 / N, 0]


@pytest.mark.parametrize('stream', ['D', 'C'])
def test_a_dimension_large_only_at_position_0_has_a_concentration_of_T(measured, stream):
    def plant(sublayer, inputs, output):
        output[0][stream][..., 5] = 0
        output[0][stream][:, 0, 5] = 1e6

    model = measured.models['ledger']
    hooks = [sublayer.register_forward_hook(plant) for sublayer in model.sublayers]
    q = collect(model, measured.tokens, measured.starts, 4, Statistics(5)).stream(stream)
    for hook in hooks:
        hook.remove()
    close([q['start_token_concentration'], q['start_dim_concentration']], T)
    assert (q['dominant_dim'], q['start_dim'], q['persistence'], q['start_persistence']) == (5, 5, 1, 1)
    close(q['top1_at_start'], 1)


def test_kurtosis_does_not_depend_on_the_scale_of_the_stream():
    x = noise(1, N, T, D) ** 3  # a commit gate that is nearly closed leaves a C as small as the smallest of these
    for factor in (1e-12, 1, 1e6):
        close(added(factor * x, 4).stream('h')['kurtosis'][0], per_sequence(x)['kurtosis'].mean(1))


# ---- batches, ties, medians

@pytest.mark.parametrize('batch_size', [1, 3, 8])
def test_the_batch_size_changes_nothing(batch_size):
    X = noise(2, N, T, D)
    whole, parts = added(X, N, replicates=20), added(X, batch_size, replicates=20)
    for key, values in whole.stream('h').items():
        close(parts.stream('h')[key], values, rtol=1e-12, atol=1e-12)
    for s in range(2):
        assert listed(parts, s, (T, D)) == listed(whole, s, (T, D))


@pytest.mark.parametrize('k', [1, 5, 40])
@pytest.mark.parametrize('values', [2, 7, 100])
def test_ties_go_to_the_lowest_sequence_position_and_dimension(values, k):
    X = np.random.default_rng(0).integers(-values, values + 1, (1, N, T, D)).astype(float)
    for batch_size in (1, 3, N):
        assert listed(added(X, batch_size, k), 0, (T, D)) == largest(np.abs(X[0]), k)


@pytest.mark.parametrize('n', [1, 2, 15, 20])
def test_the_median_is_that_of_numpy_for_even_and_odd_lengths(n):
    for rows in (noise(50, n), np.random.default_rng(0).integers(0, 4, (50, n))):
        rows = rows.astype(np.float32)
        np.testing.assert_array_equal(row_median(torch.from_numpy(rows)), np.median(rows, axis=1))


def test_memory_does_not_grow_with_the_number_of_sequences():
    def elements(statistics):
        return sum(t.numel() for t in statistics.sums.values()) + sum(t.numel() for entries in statistics.top.values() for t in entries)
    assert elements(added(noise(2, 40, 4, 6), 4, replicates=9)) == elements(added(noise(2, 8, 4, 6), 4, replicates=9))


# ---- intervals

def test_bootstrap_weights_depend_on_seed_and_sequence_alone():
    whole = bootstrap_weights(7, range(9), 30)
    np.testing.assert_array_equal(whole[:, [5, 2]], bootstrap_weights(7, [5, 2], 30))
    np.testing.assert_array_equal(whole[:11], bootstrap_weights(7, range(9), 10))
    np.testing.assert_array_equal(whole[0], 1)
    assert (whole[1:, 0] != whole[1:, 1]).any() and (whole[1:] != bootstrap_weights(8, range(9), 30)[1:]).any()


def test_bootstrap_weights_are_poisson_with_mean_1():
    weights = bootstrap_weights(0, range(1000), 200)[1:]
    close([weights.mean(), weights.var(), (weights == 0).mean(), (weights == 3).mean()], [1, 1, np.exp(-1), np.exp(-1) / 6], rtol=0.02)


@every_stream
def test_intervals_are_those_of_an_explicit_bootstrap_that_chooses_the_dimension_anew(measured, run, stream):
    report, sequences = measured.reports[run]['streams'][stream], per_sequence(measured.seen[run][1][stream])
    replicates = [headlines(sequences, weights) for weights in bootstrap_weights(0, range(N), 200)[1:]]
    for key in HEADLINES:
        close([report[key]['low'], report[key]['high']], np.quantile([replicate[key] for replicate in replicates], [0.025, 0.975]))
    for q in (report['norm'], report['median'], measured.reports[run]['loss']):
        assert q['low'] < q['value'] < q['high']


def test_replicates_choose_another_dominant_dimension_where_sequences_disagree():
    X = noise(3, N, T, D)
    X[:, ::2, :, 4] *= 3
    X[:, 1::2, :, 9] *= 3
    statistics, weights, sequences = added(X, 3, replicates=50), bootstrap_weights(0, range(N), 50), per_sequence(X)
    expected = [over_sequences(sequences, w) for w in weights]
    assert {whole['dominant_dim'] for *_, whole in expected} >= {4, 9}
    for key in ('dominant_dim', 'start_dim', 'persistence', 'start_persistence'):
        close(statistics.stream('h')[key], [whole[key] for *_, whole in expected])
    close(statistics.stream('h')['start_token_concentration'], [q['start_token_concentration'] for q, *_ in expected])


def test_replicates_that_drew_no_sequence_are_left_out(measured):
    X = noise(4, 3, T, D)
    weights = bootstrap_weights(0, range(3), 200)[1:]
    drawn = [headlines(per_sequence(X), w) for w in weights if w.any()]
    assert len(drawn) < 200
    report = stream_report(added(X, 3, replicates=200), 'h', measured.models['baseline'], measured.tokens, measured.starts)
    for key in HEADLINES:
        close([report[key]['low'], report[key]['high']], np.quantile([replicate[key] for replicate in drawn], [0.025, 0.975]))


# ---- measure.json

@pytest.mark.parametrize('run', ARMS)
def test_measure_json_has_the_keys_of_the_design(measured, run):
    report = measured.reports[run]
    assert report.keys() >= {'schema', 'checkpoint', 'iter_num', 'val_loss', 'model', 'data', 'streams', 'attention_sink'}
    assert (report['schema'], report['checkpoint'], report['iter_num']) == (1, str(measured.out / run / 'ckpt.pt'), 3)
    assert report['model'].items() >= {**SMALL, **ARMS[run]}.items()
    assert report['data'].items() >= {'name': 'data', 'split': 'val', 'sequences': N, 'tokens': N * T, 'seed': 0}.items()
    assert {name: s['decoded'] for name, s in report['streams'].items()} == ({'D': False, 'C': True} if run == 'ledger' else {'h': True})
    for s in report['streams'].values():
        assert s.keys() >= {'decoded', 'dominant_dim', 'peak_sublayer', 'sublayers', *HEADLINES}
        assert all(s[key].keys() == {'value', 'low', 'high', 'sublayer', 'last'} for key in HEADLINES)
        assert [(sublayer['sublayer'], sublayer['kind']) for sublayer in s['sublayers']] == [(0, 'attn'), (1, 'mlp'), (2, 'attn'), (3, 'mlp')]
        assert all(sublayer.keys() >= {'top', *HEADLINES[:-2]} for sublayer in s['sublayers'])


def test_a_stream_of_zeros_is_null_in_the_report_and_a_dash_in_the_tables(runs):
    data, run = runs
    write_run(run.parent / 'closed', data, residual='ledger', closed=range(4))
    printed = run_main('--ckpt', run.parent, f'--sequences={N}')
    C = read_report(run.parent / 'closed/measure.json')['streams']['C']
    assert C['norm']['value'] == C['median']['value'] == 0
    for key in ('fixed_dim_ratio', 'start_token_concentration', 'kurtosis', 'max_over_median', 'start_ratio'):
        assert C[key]['value'] is C[key]['low'] is C[key]['last'] is None
        assert all(sublayer[key] is None for sublayer in C['sublayers'])
    assert '–' in printed.split('95% intervals')[1] and (run.parent / 'comparison.png').stat().st_size > 5000


def test_a_stream_that_is_zero_at_first_is_quoted_where_it_is_not(runs, undrawn):
    data, run = runs
    write_run(run, data, residual='ledger', closed=[0])
    run_main('--ckpt', run, f'--sequences={N}')
    C = read_report(run / 'measure.json')['streams']['C']
    for key in ('fixed_dim_ratio', 'kurtosis', 'max_over_median', 'start_ratio'):
        values = [sublayer[key] for sublayer in C['sublayers']]
        assert values[0] is None and C[key]['value'] == max(values[1:])


# ---- the command line

def test_a_folder_above_several_runs_is_measured_side_by_side(measured):
    for run in ARMS:
        assert f'\n{run}, iteration 3: {N} sequences' in measured.printed
    header, *rows = measured.printed.split('decoded stream of each run')[1].splitlines()[1:]
    assert header.split() == ['baseline', '(h)', 'ledger', '(C)', 'qknorm', '(h)']
    for column, run in ((0, 'baseline'), (2, 'qknorm')):
        assert [row[22:].split('] ')[column].split()[0] for row in rows if 'kurtosis' in row] == [f"{measured.reports[run]['streams']['h']['kurtosis']['value']:.4g}"]


def test_figures_are_written_and_a_series_only_where_there_is_a_log(measured):
    figures = {str(path.relative_to(measured.out)): path.read_bytes() for path in measured.out.rglob('*.png')}
    assert figures.keys() == {'comparison.png', 'ledger/series.png', *(f'{run}/{name}.png' for run in ARMS for name in ('profile', 'landscape'))}
    for png in figures.values():
        assert png.startswith(b'\x89PNG\r\n\x1a\n') and len(png) > 5000


def test_printed_tables_fit_in_110_columns(measured):
    assert max(len(line) for line in measured.printed.splitlines() if not line.startswith('written:')) <= 110


@pytest.mark.parametrize('value', [12345.6, -0.00123456, 1.23456e9])
def test_columns_stay_apart_and_within_110_whatever_the_values(measured, capsys, value):
    report = json.loads(json.dumps(measured.reports['ledger']))
    for s in report['streams'].values():
        for key in HEADLINES:
            s[key] |= {'value': value, 'low': value, 'high': value, 'last': value}
    print_run('ledger', report, 'bytes')
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(('kurtosis', 'max over median'))]
    assert len(rows) == 2 and all(len(row) <= 110 and len(row[22:].split()) == 12 for row in rows)  # a stream: value, low, high, kind, sublayer, last


def test_paths_are_measured_as_named_whether_relative_or_absolute(runs, undrawn, monkeypatch):
    data, run = runs
    monkeypatch.chdir(run.parent)
    write_run(run.parent / 'other', data)
    run_main('--ckpt', 'run', run.parent / 'other', f'--sequences={N}')
    assert (run / 'measure.json').exists() and (run.parent / 'other/measure.json').exists() and (run.parent / 'comparison.png').exists()


def test_runs_of_the_same_name_do_not_replace_each_other(runs, undrawn):
    data, run = runs
    write_run(run.parent.parent / 'again/run', data, **ARMS['ledger'])
    printed = run_main('--ckpt', run, run.parent.parent / 'again/run', f'--sequences={N}', '--out', run.parent / 'both')
    assert '(h)' in printed.split('decoded stream of each run')[1] and '(C)' in printed.split('decoded stream of each run')[1]
    assert len(list((run.parent / 'both').rglob('measure.json'))) == 2


def test_a_snapshot_is_measured_beside_the_newest_checkpoint(runs, undrawn):
    data, run = runs
    assert 'run_500, iteration' in run_main('--ckpt', write_run(run, data, 'ckpt_500.pt'), f'--sequences={N}')
    assert (run / 'measure_500.json').exists() and (run / 'profile_500.png').exists() and not (run / 'measure.json').exists()


def test_the_newest_checkpoint_stands_for_its_folder(tmp_path):
    for name in ('a/ckpt.pt', 'a/ckpt_prev.pt', 'b/ckpt_prev.pt', 'b/ckpt_best.pt', 'c/d/ckpt.pt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_checkpoints([tmp_path]) == [tmp_path / name for name in ('a/ckpt.pt', 'b/ckpt_prev.pt', 'c/d/ckpt.pt')]
    assert find_checkpoints([tmp_path / 'b', tmp_path / 'b/ckpt_best.pt']) == [tmp_path / 'b/ckpt_prev.pt', tmp_path / 'b/ckpt_best.pt']


def test_split_data_seed_and_out_choose_what_is_read_and_where_it_is_written(runs, undrawn):
    data, run = runs
    write_dataset(data.parent / 'other', seed=1)
    run_main('--ckpt', run, '--split=train', '--data', data.parent / 'other', '--seed=5', '--sequences=6', '--topk=2', '--out', data.parent / 'elsewhere')
    report, tokens = read_report(data.parent / 'elsewhere/run/measure.json'), Tokens(data.parent / 'other', 'train', T, 257)
    assert report['data'].items() >= {'name': 'other', 'split': 'train', 'sequences': 6, 'seed': 5}.items() and not (run / 'measure.json').exists()
    x = observe(build_model(load_checkpoint(run / 'ckpt.pt'), run), tokens.windows(tokens.fixed_starts(6, 5))[0])[1]['h']
    close([entry['value'] for entry in report['streams']['h']['sublayers'][0]['top']], [value for value, *_ in largest(np.abs(x[0]), 2)])


def test_runs_on_other_data_are_refused_unless_forced(runs, undrawn):
    data, run = runs
    write_dataset(data.parent / 'other', seed=1)
    write_run(run.parent / 'other', data.parent / 'other')
    with pytest.raises(SystemExit, match='error: .*different data.*--data.*--force'):
        run_main('--ckpt', run, run.parent / 'other')
    assert not list(run.parent.rglob('measure.json'))
    assert 'decoded stream of each run' in run_main('--ckpt', run, run.parent / 'other', f'--sequences={N}', '--force')


def test_data_that_changed_since_training_are_refused_unless_forced(runs, undrawn):
    data, run = runs
    write_dataset(data, seed=1)
    with pytest.raises(SystemExit, match='error: .*data is not the data.*--force'):
        run_main('--ckpt', run)
    assert 'run, iteration 3' in run_main('--ckpt', run, f'--sequences={N}', '--force')


# ---- mistakes

class Malicious:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


def edit(run, change):
    checkpoint = torch.load(run / 'ckpt.pt')
    change(checkpoint)
    torch.save(checkpoint, run / 'ckpt.pt')


MISTAKES = {  # what is done to the run, flags, what the sentence must name
    'no such checkpoint': (lambda data, run: (run / 'ckpt.pt').unlink(), ['--ckpt=out/run/ckpt.pt'], 'out/run/ckpt.pt'),
    'empty folder': (lambda data, run: (run / 'ckpt.pt').unlink(), [], 'no ckpt.pt in out/run'),
    'truncated file': (lambda data, run: (run / 'ckpt.pt').write_bytes((run / 'ckpt.pt').read_bytes()[:9000]), [], 'out/run/ckpt.pt'),
    'text file': (lambda data, run: (run / 'ckpt.pt').write_text('weights'), [], 'out/run/ckpt.pt'),
    'pickle that acts': (lambda data, run: torch.save({'model': Malicious()}, run / 'ckpt.pt'), [], 'nothing in it was executed'),
    'bare pickle that acts': (lambda data, run: (run / 'ckpt.pt').write_bytes(pickle.dumps(Malicious())), [], 'nothing in it was executed'),
    'no weights': (lambda data, run: edit(run, lambda c: c.pop('model')), [], 'out/run/ckpt.pt'),
    'no dataset in its config': (lambda data, run: edit(run, lambda c: c['config'].clear()), [], 'out/run/ckpt.pt'),
    'no model_args': (lambda data, run: edit(run, lambda c: c['model_args'].clear()), [], 'out/run/ckpt.pt'),
    'weights of another shape': (lambda data, run: edit(run, lambda c: c['model_args'].update(n_embd=24)), [], 'out/run/ckpt.pt'),
    'weights that are not finite': (lambda data, run: edit(run, lambda c: c['model']['pos_emb.weight'].fill_(np.nan)), [], 'pos_emb.weight'),
    'another vocabulary': (lambda data, run: write_dataset(data, 300), [], 'vocabulary of 300'),
    'no dataset': (lambda data, run: shutil.rmtree(data), [], 'cannot read'),
    'no sequences': (None, ['--sequences=0'], '--sequences'),
    'no top': (None, ['--topk=0'], '--topk'),
    'more top than there is': (None, [f'--topk={T * D + 1}'], '--topk'),
    'out is a file': (None, ['--out=data/meta.json'], 'data/meta.json'),
    'no GPU': (None, ['--device=cuda'], '--device=cpu'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(runs, mistake, monkeypatch):
    (data, run), (spoil, flags, named) = runs, MISTAKES[mistake]
    monkeypatch.chdir(data.parent)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (run / 'measure.json').write_text('that of before')
    if spoil:
        spoil(data, run)
    before = set(data.parent.rglob('*'))
    with pytest.raises(SystemExit) as stop:
        run_main('--ckpt=out/run', *flags)
    assert stop.value.code.startswith('error: ') and named in stop.value.code and '\n' not in stop.value.code
    assert (run / 'measure.json').read_text() == 'that of before' and set(data.parent.rglob('*')) == before


# ---- what training uses

@every_stream
def test_the_short_measurement_has_the_values_of_the_full_one(measured, run, stream):
    record, report = measured.records[run][stream], measured.reports[run]['streams'][stream]
    for key in ('median', 'max_over_median', 'kurtosis', 'norm', 'fixed_dim_ratio', 'start_ratio', 'start_token_concentration', 'start_dim_concentration'):
        close(record[key], [sublayer[key] for sublayer in report['sublayers']])
    close([record['top1'], record['top2'], record['top3']], np.transpose([sublayer['top_mean'][:3] for sublayer in report['sublayers']]))
    assert (record['dominant_dim'], record['start_dim'], record['persistence']) == (report['dominant_dim'], report['start_dim'], report['persistence']['value'])
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize('fails', [False, True])
def test_no_hook_stays_behind(measured, monkeypatch, fails):
    model = measured.models['ledger']
    if fails:
        monkeypatch.setattr(Statistics, 'add_stream', lambda *_: 1 / 0)
    try:
        collect(model, measured.tokens, measured.starts, 4, Statistics(5), extras=True)
    except ZeroDivisionError:
        assert fails
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- on a GPU

@pytest.mark.gpu
def test_statistics_on_a_gpu_are_those_of_the_cpu(measured):
    X = noise(2, N, T, D)
    X[1, [2, 2, 5], [0, 7, 3], [4, 4, 1]] = 5000, -5000, 4000
    cpu, gpu = added(X, 4, replicates=20), added(X, 4, replicates=20, device='cuda')
    assert listed(gpu, 1, (T, D)) == listed(cpu, 1, (T, D)) == largest(np.abs(X[1].astype(np.float32)), 5)
    ties = np.random.default_rng(0).integers(-3, 4, (1, N, T, D))
    assert listed(added(ties, 3, 40, device='cuda'), 0, (T, D)) == largest(np.abs(ties[0]), 40)
    model = measured.models['ledger']
    on_cpu = collect(model, measured.tokens, measured.starts, 4, Statistics(5, 20))
    try:
        on_gpu = collect(model.cuda(), measured.tokens, measured.starts, 4, Statistics(5, 20))
    finally:
        model.cpu()
    for one, other, stream in ((gpu, cpu, 'h'), (on_gpu, on_cpu, 'D'), (on_gpu, on_cpu, 'C')):
        for key, values in other.stream(stream).items():
            close(one.stream(stream)[key], values, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('n', [1, 2, 15, 20])
def test_the_median_on_a_gpu_is_that_of_numpy(n):
    for rows in (noise(50, n), np.random.default_rng(0).integers(0, 4, (50, n))):
        rows = rows.astype(np.float32)
        np.testing.assert_array_equal(row_median(torch.from_numpy(rows).cuda()).cpu(), np.median(rows, axis=1))
