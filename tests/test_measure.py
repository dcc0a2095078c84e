"""The specification of measure.py. The README's definitions are computed again in numpy, float64, over all of
a stream at once: X is (S, N, T, d), sublayers × sequences × tokens × dimensions."""

import copy
import json
import os
import pickle
import resource
import shutil
import zipfile
from contextlib import redirect_stdout
from dataclasses import asdict
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import LOGGED

import measure
from checkpoint import build_model, find_checkpoints, load_checkpoint, open_runs
from data import progress
from data.loader import Tokens, UserError
from hooks import attention_sink
from measure import (
    Statistics,
    bootstrap_weights,
    collect,
    stream_report,
    streams_report,
    training_record,
    window_batches,
)
from model import GPT, Attention, GPTConfig
from report import print_run, verdict_text
from streams import row_median

pytestmark = pytest.mark.usefixtures('one_thread')
N, T, D = 10, 16, 20
KINDS = ('attn', 'mlp', 'attn', 'mlp')
SMALL = dict(block_size=T, vocab_size=257, n_layer=2, n_head=2, n_embd=D, gate_rank=3)
ARMS = {
    'baseline': {},
    'qknorm': dict(qk_norm=True),
    'ledger': dict(residual='ledger', bf16_streams=True),
}  # to be measured in float32 all the same
HEADLINES = (
    'fixed_dim_ratio',
    'start_token_concentration',
    'start_ratio',
    'start_dim_concentration',
    'kurtosis',
    'max_over_median',
    'top1_at_start',
    'massive_count',
    'median',
    'norm',
    'start_norm',
    'share_of_norm',
    'relative_start_concentration',
    'relative_start_token_concentration',
    'relative_start_dim_concentration',
    'read_share',
    'persistence',
    'start_persistence',
)
HEADLINE = ('value', 'low', 'high', 'sublayer', 'last', 'last_low', 'last_high')
every_arm = pytest.mark.parametrize('arm', ARMS)
every_stream = pytest.mark.parametrize(
    'arm, stream', [('baseline', 'h'), ('qknorm', 'h'), ('ledger', 'D'), ('ledger', 'C')]
)
every_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])


def write_dataset(folder, vocab_size=257, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    ids = {
        split: np.random.default_rng([seed, i]).integers(0, 257, 400).astype('<u2')
        for i, split in enumerate(('train', 'val'))
    }
    for split, tokens in ids.items():
        tokens.tofile(folder / f'{split}.bin')
    meta = {
        'tokenizer': 'bytes',
        'vocab_size': vocab_size,
        'eot': 256,
        'sha256': {split: sha256(tokens).hexdigest() for split, tokens in ids.items()},
    }
    (folder / 'meta.json').write_text(json.dumps(meta))


def write_checkpoint(path, data, closed=(), **settings):
    """Saves a random model with outliers, on the start token, in all tokens, in all tokens from sublayer 1 on
    and from 3 on, and with a head whose queries look for the first of them. closed: the sublayers whose
    commit gate is exactly 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.3 if 'qkv' in name else 0.05) * torch.randn_like(parameter)
        model.pos_emb.weight[0, 3] = 3000
        model.pos_emb.weight[:, 7] += 400
        model.sublayers[0].function.qkv.weight[0, 7] = model.sublayers[0].function.qkv.weight[D, 3] = 2
        for s, value in ((1, 900), (3, 3000)):
            model.sublayers[s].function.proj.bias[11] += value
        for s in closed:
            model.sublayers[s].residual.commit_weight.zero_()
            model.sublayers[s].residual.commit_bias.fill_(-1e4)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            'model': model.state_dict(),
            'model_args': asdict(model.config),
            'iter_num': 3,
            'config': {'dataset': str(data.resolve())},
            'data_sha256': json.loads((data / 'meta.json').read_text())['sha256'],
        },
        path,
    )


def command(*flags):
    """Runs measure.py, on the CPU unless the flags say otherwise. Returns what it printed."""
    with redirect_stdout(StringIO()) as printed:
        measure.main(['--device=cpu', *map(str, flags)])
    return printed.getvalue()


def report_in(folder):
    return report_in_file(Path(folder, 'measure.json'))


def report_in_file(path):
    return json.loads(
        path.read_text(),
        parse_constant=lambda name: pytest.fail(f'{name} is not JSON'),
    )


@torch.no_grad()
def observe(model, idx):
    """Returns in float64 the logits, {stream: X}, and what each attention reads, (N, T, d)."""
    streams, reads = {}, []

    def see(sublayer, inputs, output):
        for name, x in output[0].items():
            streams.setdefault(name, []).append(x.double().numpy())

    hooks = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    hooks += [
        sublayer.function.register_forward_pre_hook(
            lambda module, inputs: reads.append(inputs[0].double().numpy())
        )
        for sublayer in model.sublayers[::2]
    ]
    logits = model(idx).double().numpy()
    for hook in hooks:
        hook.remove()
    return logits, {name: np.stack(x) for name, x in streams.items()}, reads


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Three arms measured by one command on N sequences, and what was to be seen of each. The ledger has a
    log whose last line is still being written."""
    root = tmp_path_factory.mktemp('measured')
    write_dataset(root / 'data')
    tokens = Tokens(root / 'data', 'val', T, 257)
    starts = tokens.fixed_starts(N)
    idx, targets = tokens.windows(starts)
    models, records, seen = {}, {}, {}
    for arm, settings in ARMS.items():
        path = root / 'out' / arm / 'ckpt.pt'
        write_checkpoint(path, root / 'data', **settings)
        models[arm] = build_model(load_checkpoint(path), path, bf16_streams=False)
        seen[arm] = observe(models[arm], idx)
        batches = window_batches(tokens, starts, 3)
        records[arm] = training_record(collect(models[arm], batches, Statistics(topk=3)))
    log = ''.join(
        json.dumps({'iter': i, 'tokens': 100 * i, 'val_loss': 5.0, 'streams': records['ledger']}) + '\n'
        for i in range(3)
    )
    (root / 'out/ledger/log.jsonl').write_text(log[:-50])
    printed = command('--ckpt', root / 'out', f'--sequences={N}')
    return SimpleNamespace(
        out=root / 'out',
        tokens=tokens,
        starts=starts,
        idx=idx.numpy(),
        targets=targets.numpy(),
        models=models,
        records=records,
        seen=seen,
        printed=printed,
        reports={arm: report_in(root / 'out' / arm) for arm in ARMS},
    )


def test_progress_in_a_file_has_the_time_left(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / 'data')
    write_checkpoint(tmp_path / 'run/ckpt.pt', tmp_path / 'data')
    monkeypatch.setattr(progress, 'APPEND', 0)
    monkeypatch.setattr(measure, 'sequences_at_once', lambda *args: 2)
    command('--ckpt', tmp_path / 'run', '--sequences=4')
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('measuring run: ')]
    assert [line.split()[2] for line in lines] == ['2', '4']
    assert all(' of 4 sequences, ' in line for line in lines)
    assert all(line.endswith('s left') for line in lines)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new working directory with a dataset and a run on it: data and out/run."""
    monkeypatch.chdir(tmp_path)
    write_dataset(Path('data'))
    write_checkpoint(Path('out/run/ckpt.pt'), Path('data'))


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
    return {
        'm': a.mean(2),
        'p': a[:, :, 0],
        'median': median,
        'max_over_median': largest / median,
        'kurtosis': (z**4 - 3).mean((2, 3)),
        'massive_count': ((flat > 100) & (flat >= 1000 * median[..., None])).sum(-1),
        'norm': np.sqrt((X**2).sum(-1)).mean(-1),
        'norm_at_start': np.sqrt((X[:, :, 0] ** 2).sum(-1)),
        'top1_at_start': flat.argmax(-1) < X.shape[-1],
    }


def over_sequences(sequences, weights):
    """Returns {quantity: (S,)}, {quantity: the sublayer to quote} and {quantity of the whole stream: number}
    of weighted sequences."""
    q = {
        name: np.einsum('n,sn...->s...', weights / weights.sum(), value) for name, value in sequences.items()
    }
    m, p = q.pop('m'), q.pop('p')
    dominant, start = m.mean(0).argmax(), p.mean(0).argmax()
    concentration = p / m
    own = np.take_along_axis(concentration, p.argmax(1)[:, None], 1)[:, 0]
    middle = np.median(concentration, 1)
    q |= {
        'fixed_dim_ratio': m.max(1) / np.median(m, 1),
        'start_ratio': p.max(1) / np.median(p, 1),
        'relative_start_concentration': own / middle,
        'start_norm': q.pop('norm_at_start') / q['norm'],
        'share_of_norm': q['norm'] / q['norm'].max(),
    }
    quoted = {name: value.argmax() for name, value in q.items()}
    for name, j in (('start_token_concentration', dominant), ('start_dim_concentration', start)):
        q[name], quoted[name] = concentration[:, j], m[:, j].argmax()
        q[f'relative_{name}'], quoted[f'relative_{name}'] = concentration[:, j] / middle, m[:, j].argmax()
    return (
        q,
        quoted,
        {
            'dominant_dim': dominant,
            'start_dim': start,
            'persistence': (m.argmax(1) == dominant).mean(),
            'start_persistence': (p.argmax(1) == start).mean(),
        },
    )


def largest(a, k):
    """a: (N, T, d). Returns the k largest as (value, sequence, position, dimension), ties from the lowest
    place on."""
    order = np.argsort(-a, axis=None, kind='stable')[:k]
    return [(a.flat[i], *map(int, np.unravel_index(i, a.shape))) for i in order]


def added(X, batch_size, k=5, replicates=0, device='cpu', tokens=None):
    """Returns the Statistics of X as a stream h, added in batches. tokens: (N, T), of its sequences."""
    statistics, X = Statistics(k, replicates), torch.as_tensor(X, dtype=torch.float32).to(device)
    for i in range(0, X.shape[1], batch_size):
        batch = X[:, i : i + batch_size]
        statistics.begin(batch.shape[1], device, None if tokens is None else tokens[i : i + batch_size])
        for s, x in enumerate(batch):
            statistics.add_stream('h', s, x)
    return statistics


def listed(statistics, s):
    """The largest magnitudes kept, in the form of `largest`."""
    columns = (column.tolist() for column in statistics.top['h', s])
    return [(value, n, t, j) for value, n, t, _, j in zip(*columns)]


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, float), desired, rtol=rtol, atol=atol)


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def whole_numbers(below, *shape):
    """Values from −below to +below: many of them equal."""
    return np.random.default_rng(0).integers(-below, below + 1, shape).astype(np.float32)


# ---- what is measured


@every_stream
def test_every_quantity_of_a_sublayer_is_the_one_defined(measured, arm, stream):
    sublayers = measured.reports[arm]['streams'][stream]['sublayers']
    q, _, whole = over_sequences(per_sequence(measured.seen[arm][1][stream]), np.ones(N))
    for key, values in q.items():
        close([sublayer[key] for sublayer in sublayers], values)
    assert (
        q['massive_count'].max() > 0
        and whole['persistence'] < 1
        and whole['dominant_dim'] != whole['start_dim']
    )  # the outliers are not all of one kind


@every_stream
def test_headlines_are_maxima_over_sublayers_and_concentrations_are_quoted_where_their_dimension_peaks(
    measured, arm, stream
):
    report = measured.reports[arm]['streams'][stream]
    q, quoted, whole = over_sequences(per_sequence(measured.seen[arm][1][stream]), np.ones(N))
    for key, values in q.items():
        close(
            [report[key]['value'], report[key]['sublayer'], report[key]['last']],
            [values[quoted[key]], quoted[key], values[-1]],
        )
    assert {key: report[key]['value'] if 'persistence' in key else report[key] for key in whole} == whole
    assert (
        report['same_dim'] == (whole['dominant_dim'] == whole['start_dim'])
        and report['peak_sublayer'] == quoted['start_token_concentration']
    )


@every_stream
def test_the_largest_magnitudes_are_listed_with_their_place_and_token(measured, arm, stream):
    for sublayer, x in zip(
        measured.reports[arm]['streams'][stream]['sublayers'],
        np.abs(measured.seen[arm][1][stream]),
        strict=True,
    ):
        close([entry['value'] for entry in sublayer['top']], [value for value, *_ in largest(x, 5)])
        for entry, (_, n, t, j) in zip(sublayer['top'], largest(x, 5)):
            assert (
                entry.items() >= {'sequence': n, 'position': t, 'token': measured.idx[n, t], 'dim': j}.items()
            )
        close(sublayer['top_mean'], np.sort(x.reshape(N, -1))[:, :-6:-1].mean(0))


@every_arm
def test_the_loss_is_the_mean_over_tokens_in_nats(measured, arm):
    logits, report = measured.seen[arm][0], measured.reports[arm]
    z = logits - logits.max(-1, keepdims=True)
    nll = (np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, measured.targets[..., None], 2)[..., 0]).mean(1)
    weights = bootstrap_weights(0, range(N), measure.REPLICATES)[1:]
    replicates = [w @ nll / w.sum() for w in weights if w.any()]
    close(
        [report['val_loss'], report['loss']['value'], report['loss']['low'], report['loss']['high']],
        [nll.mean(), nll.mean(), *np.quantile(replicates, [0.025, 0.975])],
    )
    assert report['loss']['low'] < report['val_loss'] < report['loss']['high']


def test_a_learned_key_takes_its_share_of_the_probability_and_counts_as_no_position():
    attention = Attention(GPTConfig(n_embd=6, n_head=2, attn_bias_kv=True)).double()
    q, k = torch.randn(2, 3, 2, 5, 3, dtype=torch.float64)
    torch.nn.init.normal_(attention.bias_k)
    torch.nn.init.normal_(attention.bias_v)
    p = np.tri(5) * np.exp((q @ k.mT).numpy() / np.sqrt(3))
    learned = np.exp(np.einsum('bhtn,hn->bht', q, attention.bias_k.detach().view(2, 3)) / np.sqrt(3))
    close(
        attention_sink(attention, q, k).detach(),
        (p[..., 0] / (p.sum(-1) + learned)).mean(-1),
        rtol=1e-12,
    )


@every_arm
def test_a_sink_is_a_head_that_gives_position_0_more_than_0_3(measured, arm):
    sink = []
    for u, sublayer in zip(measured.seen[arm][2], measured.models[arm].sublayers[::2]):
        attention = {
            name: parameter.detach().double().numpy()
            for name, parameter in sublayer.function.named_parameters()
        }
        q, k, _ = np.moveaxis(
            (u @ attention['qkv.weight'].T).reshape(N, T, 3, 2, D // 2), (2, 3), (0, 2)
        )  # each (N, head, T, D / 2)
        if arm == 'qknorm':
            q, k = (
                attention[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
                for name, x in (('q_norm.weight', q), ('k_norm.weight', k))
            )
        p = np.tri(T) * np.exp(q @ k.swapaxes(2, 3) / np.sqrt(D / 2))
        sink.append((p[..., 0] / p.sum(-1)).mean((0, 2)))
    report, over = measured.reports[arm]['attention_sink'], np.array(sink) > 0.3
    close(report['heads'], sink)
    close([report['mean']['value'], report['fraction_of_heads']['value']], [np.mean(sink), over.mean()])
    assert 0 < over.mean() < 1


def test_the_read_share_is_the_norm_of_what_C_adds_to_a_read_over_that_of_D(measured):
    model, sublayers = measured.models['ledger'], measured.reports['ledger']['streams']['C']['sublayers']
    D, C = (measured.seen['ledger'][1][stream] for stream in 'DC')
    for s in range(1, 4):
        scale = model.sublayers[s].residual.read_scale.detach().double().numpy()
        norms = [np.sqrt((x**2).sum(-1)).mean() for x in (scale * C[s - 1], D[s - 1])]
        close(sublayers[s]['read_share'], norms[0] / norms[1])
    assert sublayers[0]['read_share'] == 0 and sublayers[3]['read_share'] > 0
    for arm, stream in (('ledger', 'D'), ('baseline', 'h')):  # which read nothing beside themselves
        assert measured.reports[arm]['streams'][stream]['read_share']['value'] is None


def test_streams_that_an_operator_derives_are_measured_like_any_other(measured, monkeypatch):
    model = measured.models['ledger']
    derive = staticmethod(lambda streams: {'turned C': streams['C'].flip(-1)})
    monkeypatch.setattr(type(model.sublayers[0].residual), 'derived', derive, raising=False)
    batches = window_batches(measured.tokens, measured.starts, 4)
    streams = streams_report(collect(model, batches, Statistics(3, 20)), KINDS, model.decoded)
    assert list(streams) == ['D', 'C', 'turned C'] and not streams['turned C']['decoded']
    assert streams['turned C']['dominant_dim'] == D - 1 - streams['C']['dominant_dim']
    assert streams['turned C']['fixed_dim_ratio'] == streams['C']['fixed_dim_ratio']


def test_what_on_streams_returns_takes_the_place_of_the_streams(measured):
    model, idx = measured.models['ledger'], torch.from_numpy(measured.idx)
    seen = []

    def swap(s, streams):
        seen.append((s, sorted(streams)))
        return {'C': torch.zeros_like(streams['C'])} if s == 3 else None

    with torch.no_grad(), measure.hooked(model, swap):
        logits = model(idx)
    close(logits, np.zeros(logits.shape))
    assert seen == [(s, ['C', 'D']) for s in range(4)]


# ---- planted outliers


@pytest.mark.parametrize('n, t, j', [(0, 0, 0), (3, 0, 19), (7, 1, 0), (9, 15, 2)])
def test_a_planted_outlier_is_found_at_its_value_and_place(measured, n, t, j):
    X = noise(4, N, T, D)
    X[2, n, t, j] = -12345.5
    statistics = added(X, 4, replicates=2, tokens=torch.from_numpy(measured.idx))
    sublayers = stream_report(statistics, 'h', KINDS)['sublayers']
    assert sublayers[2]['top'][0] == {
        'value': 12345.5,
        'sequence': n,
        'position': t,
        'token': measured.idx[n, t],
        'dim': j,
    }
    assert [sublayer['massive_count'] for sublayer in sublayers] == [0, 0, 1 / N, 0]
    close([sublayer['top1_at_start'] for sublayer in sublayers], per_sequence(X)['top1_at_start'].mean(1))


def test_a_dimension_large_only_at_position_0_has_a_concentration_of_T():
    X = noise(4, N, T, D)
    X[..., 5] = 0
    X[:, :, 0, 5] = 1e6
    q = added(X, 4).stream('h')
    assert (q['dominant_dim'], q['start_dim'], q['persistence'], q['start_persistence']) == (5, 5, 1, 1)
    close([q['start_token_concentration'], q['start_dim_concentration']], T, rtol=1e-12)
    close(q['top1_at_start'], 1)


def test_kurtosis_does_not_depend_on_the_scale_of_the_stream():
    X = noise(1, N, T, D) ** 3
    for factor in (1e-12, 1, 1e6):  # a commit gate that is nearly closed makes a very small C
        close(added(factor * X, 4).stream('h')['kurtosis'][0], per_sequence(X)['kurtosis'].mean(1))


# ---- batches, ties, medians


@pytest.mark.parametrize('batch_size', [1, 3, 8])
def test_the_batch_size_changes_nothing(batch_size):
    X = noise(2, N, T, D)
    whole, parts = added(X, N, replicates=20), added(X, batch_size, replicates=20)
    for key, values in whole.stream('h').items():
        close(parts.stream('h')[key], values, rtol=1e-12, atol=1e-12)
    assert (
        [listed(parts, s) for s in (0, 1)]
        == [listed(whole, s) for s in (0, 1)]
        == [largest(np.abs(x.astype(np.float32)), 5) for x in X]
    )


@every_device
@pytest.mark.parametrize('k', [1, 5, 40])
@pytest.mark.parametrize('values', [2, 7, 100])
def test_ties_go_to_the_lowest_sequence_position_and_dimension(values, k, device):
    X = whole_numbers(values, 1, N, T, D)
    for batch_size in (1, 3, N):
        assert listed(added(X, batch_size, k, device=device), 0) == largest(np.abs(X[0]), k)


@every_device
@pytest.mark.parametrize('k', [2, 5, 40])
def test_the_last_of_the_largest_is_the_lowest_of_those_it_ties_with(k, device):
    X = np.zeros((1, 3, T, D))
    X[0, 1] = np.maximum(np.random.default_rng(0).permutation(T * D), T * D - k).reshape(
        T, D
    )  # k − 1 that differ, the others equal
    assert listed(added(X, 1, k, device=device), 0) == largest(X[0], k)


@every_device
@pytest.mark.parametrize('n', [1, 2, 15, 20, 70_001])
def test_the_median_is_that_of_numpy_for_even_and_odd_lengths(n, device):
    for rows in (np.abs(noise(50, n)).astype(np.float32), np.abs(whole_numbers(2, 50, n))):
        np.testing.assert_array_equal(
            row_median(torch.from_numpy(rows).to(device)).cpu(), np.median(rows, axis=1)
        )


def test_memory_does_not_grow_with_the_number_of_sequences():
    def elements(statistics):
        return sum(
            t.numel()
            for kept in ([statistics.weights], statistics.sums.values(), *statistics.top.values())
            for t in kept
        )

    assert elements(added(noise(2, 40, 4, 6), 4, replicates=9)) == elements(
        added(noise(2, 8, 4, 6), 4, replicates=9)
    )


@pytest.mark.gpu
def test_a_measurement_on_a_gpu_is_that_on_the_cpu(measured, tmp_path):
    command('--device=cuda', '--ckpt', measured.out, '--out', tmp_path, f'--sequences={N}')
    for arm, cpu in measured.reports.items():
        gpu = report_in(tmp_path / arm)
        close(
            [gpu['val_loss'], gpu['attention_sink']['mean']['value']],
            [cpu['val_loss'], cpu['attention_sink']['mean']['value']],
            rtol=1e-4,
        )
        for key in HEADLINES:
            one, other = (
                [[s[key][x] for x in ('value', 'low', 'high')] for s in report['streams'].values()]
                for report in (gpu, cpu)
            )
            close(one, other, rtol=1e-4)


# ---- intervals


def test_bootstrap_weights_depend_on_seed_and_sequence_alone():
    whole = bootstrap_weights(7, range(9), 30)
    np.testing.assert_array_equal(whole[:, [5, 2]], bootstrap_weights(7, [5, 2], 30))
    np.testing.assert_array_equal(whole[:11], bootstrap_weights(7, range(9), 10))
    assert (
        (whole[0] == 1).all()
        and (whole[:, 0] != whole[:, 1]).any()
        and (whole != bootstrap_weights(8, range(9), 30)).any()
    )


def test_bootstrap_weights_are_poisson_with_mean_1():
    weights = bootstrap_weights(0, range(1000), 200)[1:]
    close(
        [weights.mean(), weights.var(), (weights == 0).mean(), (weights == 3).mean()],
        [1, 1, np.exp(-1), np.exp(-1) / 6],
        rtol=0.02,
    )


@pytest.mark.parametrize('sequences', [N, 3])
def test_intervals_are_those_of_a_bootstrap_that_chooses_the_dimensions_anew_and_leaves_out_empty_replicates(
    sequences,
):
    X = noise(4, sequences, T, D)
    X[:, ::2, :, 4] *= 3
    X[:, 1::2, :, 9] *= 3
    weights = bootstrap_weights(0, range(sequences), 200)[1:]
    assert weights.any(1).all() == (sequences == N)
    replicates = [over_sequences(per_sequence(X), w) for w in weights if w.any()]
    assert {whole['dominant_dim'] for *_, whole in replicates} >= {4, 9}
    report = stream_report(added(X, 3, replicates=200), 'h', KINDS)
    for key in HEADLINES:
        if key == 'read_share':
            continue
        values = [q[key][quoted[key]] if key in q else whole[key] for q, quoted, whole in replicates]
        close([report[key]['low'], report[key]['high']], np.quantile(values, [0.025, 0.975]))
    every = {
        key: np.quantile([q[key] for q, *_ in replicates], [0.025, 0.975], axis=0) for key in replicates[0][0]
    }
    for key, ends in every.items():
        close([sublayer['intervals'][key] for sublayer in report['sublayers']], ends.T)
        close([report[key]['last_low'], report[key]['last_high']], ends[:, -1])
    assert report['norm']['low'] < report['norm']['value'] < report['norm']['high']


# ---- measure.json


@every_arm
def test_measure_json_has_the_keys_of_the_design(measured, arm):
    report = measured.reports[arm]
    assert report.keys() >= {
        'schema',
        'checkpoint',
        'iter_num',
        'val_loss',
        'model',
        'data',
        'streams',
        'attention_sink',
    }
    assert (report['schema'], report['checkpoint'], report['iter_num']) == (
        1,
        str(measured.out / arm / 'ckpt.pt'),
        3,
    )
    assert report['model'].items() >= {**SMALL, **ARMS[arm]}.items()
    assert (
        report['data'].items()
        >= {'name': 'data', 'split': 'val', 'sequences': N, 'tokens': N * T, 'seed': 0}.items()
    )
    assert {name: s['decoded'] for name, s in report['streams'].items()} == (
        {'D': False, 'C': True} if arm == 'ledger' else {'h': True}
    )
    for s in report['streams'].values():
        assert s.keys() >= {'decoded', 'dominant_dim', 'start_dim', 'peak_sublayer', 'sublayers', *HEADLINES}
        assert all(s[key].keys() == {*HEADLINE} for key in HEADLINES)
        assert [(sublayer['sublayer'], sublayer['kind']) for sublayer in s['sublayers']] == [
            (0, 'attn'),
            (1, 'mlp'),
            (2, 'attn'),
            (3, 'mlp'),
        ]


def test_what_is_undefined_for_a_stream_of_zeros_is_null_in_the_report_and_a_dash_in_the_tables(here):
    write_checkpoint(Path('out/closed/ckpt.pt'), Path('data'), closed=range(4), residual='ledger')
    tables = command('--ckpt=out', f'--sequences={N}')
    C = report_in('out/closed')['streams']['C']
    assert C['norm']['value'] == C['median']['value'] == 0
    for key in ('fixed_dim_ratio', 'start_token_concentration', 'kurtosis', 'max_over_median', 'start_ratio'):
        assert [
            C[key]['value'],
            C[key]['low'],
            C[key]['last'],
            *(sublayer[key] for sublayer in C['sublayers']),
        ] == [None] * 7
    assert (
        '–' in tables.split('decoded stream of each run')[1]
        and Path('out/comparison.png').stat().st_size > 5000
    )


def test_a_stream_that_is_zero_at_first_is_quoted_where_it_is_not(here, undrawn):
    write_checkpoint(Path('out/run/ckpt.pt'), Path('data'), closed=[0], residual='ledger')
    command('--ckpt=out/run', f'--sequences={N}')
    C = report_in('out/run')['streams']['C']
    for key in ('fixed_dim_ratio', 'kurtosis', 'max_over_median', 'start_ratio'):
        first, *others = (sublayer[key] for sublayer in C['sublayers'])
        assert first is None and C[key]['value'] == max(others)


def test_one_sequence_has_no_interval(here):
    tables = command('--ckpt=out/run', '--sequences=1')
    report = report_in('out/run')
    h = report['streams']['h']
    for q in (report['loss'], *(h[key] for key in HEADLINES)):
        assert [q['low'], q['high'], q['last_low'], q['last_high']] == [None] * 4
    assert h['norm']['value'] > 0 and h['sublayers'][0]['intervals']['norm'] == [None, None]
    assert h['dominant_dim_share'] is None
    row = next(row for row in tables.splitlines() if row.startswith('norm'))
    assert row.split()[2] == '–'


def test_values_that_are_not_finite_are_null_and_said_in_a_sentence(here):
    path = Path('out/run/ckpt.pt')
    edited(lambda c: [weight.mul_(1e25) for weight in c['model'].values()])(path)
    printed = command('--ckpt=out/run', f'--sequences={N}')
    assert 'diverged' in printed and report_in('out/run')['streams']['h']['norm']['last'] is None
    assert Path('out/run/profile.png').exists() and Path('out/run/landscape.png').exists()


def test_a_model_of_fewer_entries_than_training_lists_can_be_measured():
    model = GPT(GPTConfig(block_size=2, vocab_size=5, n_layer=1, n_head=1, n_embd=1)).eval()
    idx = torch.tensor([[0, 1], [2, 3]])
    record = training_record(collect(model, [(idx, idx)], Statistics(topk=3)))['h']
    assert len(record['top2']) == 2 and 'top3' not in record
    json.dumps(record, allow_nan=False)


def test_measure_json_stays_small_at_the_published_size():
    statistics = Statistics(5, 20)
    for batch in (0, 1):
        statistics.begin(
            2, 'cpu', torch.randint(50257, (2, 32), generator=torch.Generator().manual_seed(batch))
        )
        for s in range(24):
            for stream in 'DC':
                statistics.add_stream(stream, s, torch.randn(2, 32, 768))
    streams = streams_report(statistics, KINDS * 6, 'C')
    for entry in streams.values():
        entry['landscape'] = measure.pooled(np.abs(noise(1024, 768)))
    assert len(json.dumps(streams, separators=(',', ':'))) < 150_000


def test_the_landscape_keeps_the_largest_of_each_block_and_position_0_alone():
    a = np.abs(noise(300, 130))
    a[0, 129] = 77
    pooled = measure.pooled(a)
    assert pooled['largest'] == {'value': 77, 'position': 0, 'dim': 129}
    t, j = pooled['position_edges'], pooled['dim_edges']
    assert t[:2] == [0, 1] and (t[-1], j[-1]) == (300, 130) and len(t) <= 65
    blocks = [[a[t0:t1, j0:j1].max() for j0, j1 in zip(j, j[1:])] for t0, t1 in zip(t, t[1:])]
    close(pooled['magnitude'], blocks, rtol=6e-3)


# ---- is there an outlier?


def entry(ratio=(9, 10, 11), start=(9, 10, 11), relative=(1.6, 2, 3), share=1.0, dims=(4, 4, 4), peak=0):
    """A stream of measure.json with three equal sublayers, but for their largest dimensions and shares of
    norm."""
    quantities = {'fixed_dim_ratio': ratio, 'start_ratio': start, 'relative_start_concentration': relative}
    sublayer = {key: value for key, (_, value, _) in quantities.items()}
    sublayer['intervals'] = {key: [low, high] for key, (low, _, high) in quantities.items()}
    shares = share if isinstance(share, tuple) else (share,) * 3
    sublayers = [
        {**sublayer, 'largest_dim': j, 'largest_start_dim': j, 'share_of_norm': part}
        for j, part in zip(dims, shares)
    ]
    return {'sublayers': sublayers, 'peak_sublayer': peak}


BEFORE = measure.untrained_bounds(entry(ratio=(2, 2.5, 3), start=(2, 2.5, 3)))


def judged(**changes):
    """Returns the decoded and the depth reading of both objects."""
    verdicts = measure.judge(entry(**changes), BEFORE)
    return [verdicts[name][reading] for name in verdicts for reading in ('decoded', 'depth')]


def test_both_objects_are_there_where_near_ends_are_three_times_apart():
    assert judged() == [True] * 4
    assert judged(ratio=(8.9, 10, 11)) == [False, False, True, True]
    assert judged(start=(8.9, 10, 11)) == [True, True, False, False]


def test_a_dimension_as_large_everywhere_is_no_start_token_outlier():
    assert judged(relative=(1.4, 2, 3)) == [True, True, False, False]


def test_along_the_depth_half_of_the_sublayers_must_share_their_dimension():
    assert judged(dims=(4, 5, 4)) == [True] * 4
    assert judged(dims=(4, 5, 6)) == [True, False, True, False]


def test_a_nearly_empty_sublayer_does_not_count_along_the_depth():
    assert judged(dims=(4, 5, 6), share=(0.09, 0.1, 1.0)) == [True] * 4  # two count, and half of two is one


def test_what_has_no_interval_is_open():
    assert judged(ratio=(None, 10, None), start=(None, 10, None)) == [None] * 4


@pytest.mark.parametrize(
    'place', ['measure_0.json', 'ckpt_0.pt', 'log.jsonl, step 0', 'no untrained weights']
)
def test_the_untrained_model_is_found_beside_the_run(here, undrawn, place):
    run = Path('out/run')
    os.rename(run / 'ckpt.pt', run / 'ckpt_0.pt')
    command('--ckpt=out/run/ckpt_0.pt', f'--sequences={N}')  # as measure_0.json
    write_checkpoint(run / 'ckpt.pt', Path('data'))
    streams = report_in_file(run / 'measure_0.json')['streams']
    values = {key: [s[key] for s in streams['h']['sublayers']] for key in HEADLINES[:-2]}
    if place == 'log.jsonl, step 0':
        (run / 'log.jsonl').write_text(
            json.dumps({'iter': 0, 'tokens': 0, 'val_loss': 1, 'streams': {'h': values}}) + '\n'
        )
    if place != 'measure_0.json':
        (run / 'measure_0.json').unlink()
    if place != 'ckpt_0.pt':
        (run / 'ckpt_0.pt').unlink()
    printed = command('--ckpt=out/run', f'--sequences={N}')
    untrained, verdict = report_in(run)['untrained'], report_in(run)['streams']['h']['outlier']
    assert untrained['source'].startswith(place) and untrained['source'] in printed
    if place == 'no untrained weights':
        assert verdict['outlier_dimension']['decoded'] is True and '5.6' in printed
    else:  # the same weights, so that nothing is three times above them
        close(untrained['streams']['h']['kurtosis'], values['kurtosis'])
        assert verdict['outlier_dimension']['decoded'] is False and (run / 'measure_0.json').exists() != (
            place == 'log.jsonl, step 0'
        )


def test_the_difference_of_two_losses_is_taken_over_pairs_of_windows():
    rng = np.random.default_rng(0)
    hard = rng.normal(5, 1, 40)
    data = {'seed': 0}
    first, other = (
        {'data': data, 'loss_by_sequence': x.tolist()} for x in (hard, hard + rng.normal(0.1, 0.01, 40))
    )
    q = measure.paired_difference(other, first)
    close(q['value'], 0.1, rtol=0.05)
    assert q['low'] > 0.09 and q['high'] < 0.11
    assert measure.paired_difference({**other, 'data': {'seed': 1}}, first)['value'] is None


# ---- a model of one's own


class PlainGPT(torch.nn.Module):
    """A GPT of plain torch layers that knows nothing of this repository."""

    def __init__(self, vocab_size=100, n_embd=16, n_layer=3, block_size=12):
        super().__init__()
        self.tokens = torch.nn.Embedding(vocab_size, n_embd)
        self.positions = torch.nn.Parameter(torch.randn(block_size, n_embd))
        layer = torch.nn.TransformerEncoderLayer(n_embd, 2, 32, batch_first=True, norm_first=True, dropout=0)
        self.blocks = torch.nn.ModuleList(copy.deepcopy(layer) for _ in range(n_layer))
        self.head = torch.nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions[: idx.shape[1]]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.head(x)


def test_any_module_of_a_users_own_is_measured_in_ten_lines(tmp_path, capsys):
    # As it stands in the README:
    from figures import draw_profile
    from measure import Statistics, collect, streams_report
    from report import print_streams

    model = PlainGPT()  # any module that takes token ids, (B, T)
    batches = [torch.randint(100, (4, 12)) for _ in range(3)]  # any iterable of token ids
    places = {'x': ['blocks.0', 'blocks.1', 'blocks.2']}  # the modules whose outputs are the stream
    statistics = collect(model, batches, Statistics(topk=5, replicates=1000), streams=places)
    streams = streams_report(statistics)
    print_streams(streams)
    draw_profile('my model', {'streams': streams}, tmp_path / 'profile.png')

    x = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: x.append(output))
    with torch.no_grad():
        model(torch.cat(batches))
    q, *_ = over_sequences(per_sequence(torch.stack(x).double().numpy()), np.ones(12))
    for key, values in q.items():
        close([sublayer[key] for sublayer in streams['x']['sublayers']], values)
    top = streams['x']['sublayers'][2]['top'][0]
    assert top['token'] == torch.cat(batches)[top['sequence'], top['position']]
    assert 'x' in capsys.readouterr().out and (tmp_path / 'profile.png').exists()


def test_the_input_of_a_module_can_be_a_stream_as_well():
    model, batches = PlainGPT(), [torch.randint(100, (4, 12))]
    places = {'in': ['blocks.1:input', 'blocks.2:input'], 'out': ['blocks.0', 'blocks.1']}
    streams = streams_report(collect(model, batches, Statistics(5), streams=places))
    assert streams['in']['sublayers'] == streams['out']['sublayers']


@pytest.mark.parametrize(
    'place, sentence', [('block.0', 'no module'), ('head.weight', 'no module'), ('blocks', 'nothing passed')]
)
def test_a_place_that_is_no_stream_is_said_in_a_sentence(place, sentence):
    model = PlainGPT()
    with pytest.raises(UserError, match=sentence):
        collect(model, [torch.randint(100, (4, 12))], Statistics(5), streams={'x': [place]})
    assert not any(module._forward_hooks for module in model.modules())


def test_an_outlier_that_moves_from_dimension_to_dimension_is_none_along_the_depth_and_says_why():
    verdict = {'decoded': True, 'depth': False, 'published': True, 'holding': 23, 'counting': 23}
    assert 'along the depth: no, in changing dimensions, in 23 of 23 that count' in verdict_text(verdict)
    verdict = {**verdict, 'depth': True}
    assert 'along the depth: yes, in 23 of 23 that count' in verdict_text(verdict)
    verdict = {**verdict, 'depth': False, 'holding': 5}
    assert 'along the depth: no, in 5 of 23 that count' in verdict_text(verdict)


# ---- the command line


def test_a_folder_above_several_runs_is_measured_side_by_side(measured):
    header, *rows = measured.printed.split('decoded stream of each run')[1].splitlines()[1:]
    assert header.split() == ['baseline', '(h)', 'ledger', '(C)', 'qknorm', '(h)']
    kurtosis = next(row for row in rows if row.startswith('kurtosis'))[22:].split(']')
    close(
        [cell.split()[0] for cell in kurtosis[:3]],
        [
            measured.reports[arm]['streams'][stream]['kurtosis']['value']
            for arm, stream in (('baseline', 'h'), ('ledger', 'C'), ('qknorm', 'h'))
        ],
        rtol=1e-3,
    )


def test_figures_are_drawn_and_a_series_only_where_there_is_a_log(measured):
    pictures = {
        str(path.relative_to(measured.out)): path.read_bytes() for path in measured.out.rglob('*.png')
    }
    assert pictures.keys() == {
        'comparison.png',
        'ledger/series.png',
        *(f'{arm}/{name}.png' for arm in ARMS for name in ('profile', 'landscape')),
    }
    assert all(png.startswith(b'\x89PNG\r\n\x1a\n') and len(png) > 5000 for png in pictures.values())


@pytest.mark.parametrize('value', [1.5, 12345.6, -0.00123456, 1.23456e9])
def test_columns_stay_apart_and_within_110_whatever_the_values(measured, capsys, value):
    report = json.loads(json.dumps(measured.reports['ledger']))
    for s in report['streams'].values():
        s['sublayers'] *= 6
        for key in HEADLINES[:-2]:
            s[key] |= dict.fromkeys(HEADLINE, value) | {'sublayer': 22}
    print_run('ledger', report, str)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 110
    rows = [row[23:].split() for row in printed if row.startswith('kurtosis')]
    assert [len(row) for row in rows] == [
        9,
        9,
    ]  # value, low, high, kind, sublayer, last, low, high, untrained


def test_paths_may_be_relative_and_absolute(here, undrawn):
    write_checkpoint(Path('out/other/ckpt.pt'), Path('data'))
    command('--ckpt', 'out/run', Path('out/other').resolve(), f'--sequences={N}')
    assert all(
        Path('out', name).exists() for name in ('run/measure.json', 'other/measure.json', 'comparison.png')
    )


def test_runs_of_the_same_name_do_not_replace_each_other(here, undrawn):
    write_checkpoint(Path('again/run/ckpt.pt'), Path('data'), residual='ledger')
    printed = command('--ckpt', 'out/run', 'again/run', '--out=both', f'--sequences={N}')
    assert len(list(Path('both').rglob('measure.json'))) == 2
    assert (
        printed.split('decoded stream of each run')[1].count('(h)')
        == printed.split('decoded stream of each run')[1].count('(C)')
        == 1
    )


def test_a_snapshot_is_measured_beside_the_newest_checkpoint(here, undrawn):
    write_checkpoint(Path('out/run/ckpt_500.pt'), Path('data'))
    assert 'run_500, iteration 3' in command('--ckpt=out/run/ckpt_500.pt', f'--sequences={N}')
    assert {path.name for path in Path('out/run').iterdir()} == {
        'ckpt.pt',
        'ckpt_500.pt',
        'measure_500.json',
        'profile_500.png',
        'landscape_500.png',
    }


def test_the_newest_checkpoint_stands_for_its_folder(tmp_path):
    for name in ('a/ckpt.pt', 'a/ckpt_prev.pt', 'b/ckpt_prev.pt', 'b/ckpt_best.pt', 'c/d/ckpt.pt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_checkpoints([tmp_path]) == [
        tmp_path / name for name in ('a/ckpt.pt', 'b/ckpt_prev.pt', 'c/d/ckpt.pt')
    ]
    assert find_checkpoints([tmp_path / 'b', tmp_path / 'b/ckpt_best.pt']) == [
        tmp_path / 'b/ckpt_prev.pt',
        tmp_path / 'b/ckpt_best.pt',
    ]


def test_flags_choose_what_is_read_and_where_it_is_written(here, undrawn):
    write_dataset(Path('sets/other'), seed=1)
    command(
        '--ckpt=out/run',
        '--split=train',
        '--data=sets/other',
        '--seed=5',
        '--sequences=6',
        '--topk=2',
        '--out=elsewhere',
    )
    report, tokens = report_in('elsewhere/run'), Tokens('sets/other', 'train', T, 257)
    assert report['data'].items() >= {'name': 'other', 'split': 'train', 'sequences': 6, 'seed': 5}.items()
    x = observe(
        build_model(load_checkpoint('out/run/ckpt.pt'), ''), tokens.windows(tokens.fixed_starts(6, 5))[0]
    )[1]['h'][0]
    close(
        [entry['value'] for entry in report['streams']['h']['sublayers'][0]['top']],
        [value for value, *_ in largest(np.abs(x), 2)],
    )
    assert {path.name for path in Path('out/run').iterdir()} == {'ckpt.pt'}


def test_runs_on_different_data_are_refused_unless_forced(here, undrawn):
    write_dataset(Path('other'), seed=1)
    write_checkpoint(Path('out/run2/ckpt.pt'), Path('other'))
    with pytest.raises(SystemExit, match='error: .*different data.*--force'):
        command('--ckpt=out')
    assert not list(Path('out').rglob('measure.json'))
    assert 'decoded stream of each run' in command('--ckpt=out', '--force', f'--sequences={N}')


def test_data_that_changed_since_training_are_refused_unless_forced(here, undrawn):
    write_dataset(Path('data'), seed=1)
    with pytest.raises(SystemExit, match='error: .*data is not the data.*--force'):
        command('--ckpt=out/run')
    assert 'run, iteration 3' in command('--ckpt=out/run', '--force', f'--sequences={N}')


def test_runs_that_have_nothing_in_common_are_compared_in_the_working_folder():
    assert measure.common_folder([Path('/a/b'), Path('/a/c')]) == Path('/a')
    assert measure.common_folder([Path('/a/b'), Path('/c')]) == Path()


def test_a_limit_on_the_size_of_files_is_noticed_before_measuring(here):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(SystemExit, match='cannot write to out/run .*--out'):
            command('--ckpt=out/run')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in Path('out/run').iterdir()} == {'ckpt.pt'}


def test_one_model_is_in_memory_at_a_time(measured):
    runs = open_runs(measure.parse_arguments(['--ckpt', str(measured.out), '--device=cpu']))
    first = next(runs)
    assert first.model is not None and first.name == 'baseline'
    second = next(runs)
    assert first.model is None and second.model is not None


# ---- mistakes


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


def edited(change):
    def spoil(path):
        checkpoint = torch.load(path)
        change(checkpoint)
        torch.save(checkpoint, path)

    return spoil


MISTAKES = {  # what is done to the checkpoint, further flags, what the sentence must say
    'a checkpoint that is not there': (Path.unlink, ['--ckpt=out/run/ckpt.pt'], 'out/run/ckpt.pt'),
    'an empty folder': (Path.unlink, [], 'no ckpt.pt in out/run'),
    'a truncated file': (lambda path: path.write_bytes(path.read_bytes()[:9000]), [], 'out/run/ckpt.pt'),
    'a text file': (lambda path: path.write_text('weights'), [], 'out/run/ckpt.pt'),
    'a pickle that acts': (
        lambda path: path.write_bytes(pickle.dumps(Malicious())),
        [],
        'nothing in it was executed',
    ),
    'a checkpoint that acts': (
        edited(lambda c: c.update(model=Malicious())),
        [],
        'nothing in it was executed',
    ),
    'a checkpoint without weights': (edited(lambda c: c.pop('model')), [], 'out/run/ckpt.pt'),
    'a checkpoint without a dataset': (edited(lambda c: c['config'].clear()), [], 'out/run/ckpt.pt'),
    'a checkpoint without model_args': (edited(lambda c: c['model_args'].clear()), [], 'out/run/ckpt.pt'),
    'weights of another shape': (edited(lambda c: c['model_args'].update(n_embd=24)), [], 'out/run/ckpt.pt'),
    'weights that are not finite': (
        edited(lambda c: c['model']['pos_emb.weight'].fill_(np.nan)),
        [],
        'pos_emb.weight',
    ),
    'another vocabulary': (lambda path: write_dataset(Path('data'), 300), [], 'vocabulary of 300'),
    'data that are not there': (lambda path: shutil.rmtree('data'), [], '--data'),
    'no sequences': (None, ['--sequences=0'], '--sequences'),
    'no largest': (None, ['--topk=0'], '--topk'),
    'more largest than there are': (None, [f'--topk={T * D + 1}'], '--topk'),
    'a file as --out': (None, ['--out=data/meta.json'], 'data/meta.json'),
    'no GPU': (None, ['--device=cuda'], '--device=cpu'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(here, mistake, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}

    spoil, flags, named = MISTAKES[mistake]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    Path('out/run/measure.json').write_text('that of before')
    if spoil:
        spoil(Path('out/run/ckpt.pt'))
    before = files()
    with pytest.raises(SystemExit) as stop:
        command('--ckpt=out/run', *flags)
    assert stop.value.code.startswith('error: ') and named in stop.value.code and '\n' not in stop.value.code
    assert files() == before


def test_a_checkpoint_that_a_live_run_replaces_is_read_whole(here, monkeypatch):
    path, testzip = Path('out/run/ckpt.pt'), zipfile.ZipFile.testzip
    weights = load_checkpoint(path)['model']

    def meanwhile(archive):
        Path('newer').write_bytes(b'the next one')
        os.replace('newer', path)
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, 'testzip', meanwhile)
    read = load_checkpoint(path)['model']
    assert path.read_bytes() == b'the next one' and all(
        torch.equal(read[name], weights[name]) for name in weights
    )


def test_an_interrupted_measurement_leaves_the_report_of_before(here, monkeypatch):
    def interrupted(report, file, **_):
        file.write('{"schema"')
        raise KeyboardInterrupt  # Ctrl-C

    Path('out/run/measure.json').write_text('that of before')
    monkeypatch.setattr(json, 'dump', interrupted)
    with pytest.raises(SystemExit, match='Ctrl-C'):
        command('--ckpt=out/run', '--sequences=2')
    assert {path.name for path in Path('out/run').iterdir()} == {'ckpt.pt', 'measure.json'} and Path(
        'out/run/measure.json'
    ).read_text() == 'that of before'


# ---- what training uses


@every_stream
def test_the_short_measurement_has_the_values_of_the_full_one(measured, arm, stream):
    record, report = measured.records[arm][stream], measured.reports[arm]['streams'][stream]
    for key in LOGGED:
        close(record[key], [sublayer[key] for sublayer in report['sublayers']])
    close(
        [record['top1'], record['top2'], record['top3']],
        np.transpose([sublayer['top_mean'][:3] for sublayer in report['sublayers']]),
    )
    assert (record['dominant_dim'], record['start_dim'], record['persistence']) == (
        report['dominant_dim'],
        report['start_dim'],
        report['persistence']['value'],
    )
    json.dumps(record, allow_nan=False)


def test_no_hook_stays_behind_when_a_measurement_fails(measured, monkeypatch):
    model = measured.models['ledger']
    monkeypatch.setattr(Statistics, 'add_stream', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(model, window_batches(measured.tokens, measured.starts, 4), Statistics(5), extras=True)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )  # nor any of the measurements before
