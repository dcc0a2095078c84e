"""The controls of a measurement against numpy in float64: other windows and dimensions, what C is made of."""

import json
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
import torch

import measure
from data.loader import SHARD_MAGIC, Tokens
from model import GPT, GPTConfig
from studies import controls

T, D, EOT = 8, 40, 256


def write_dataset(folder, lengths=(23, 5, 41, 9, 64, 70, 30, 30, 50)):
    """Documents of these lengths, with an end-of-text id after each. Ids count up through a document."""
    folder.mkdir(parents=True)
    ids = np.concatenate([[*range(n), EOT] for n in lengths]).astype('<u2')
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    meta = {
        'tokenizer': 'bytes',
        'vocab_size': 257,
        'eot': EOT,
        'sha256': {split: sha256(ids).hexdigest() for split in ('train', 'val')},
    }
    (folder / 'meta.json').write_text(json.dumps(meta))
    return ids


def random_model(**settings):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=T, vocab_size=257, n_layer=2, n_head=2, n_embd=D, gate_rank=3, **settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokens(tmp_path):
    write_dataset(tmp_path / 'data')
    return Tokens(tmp_path / 'data', 'val', T, 257)


@torch.no_grad()
def observe(model, idx):
    """Returns in float64 D and C after every sublayer, (S, N, T, d), and the gates, (S, N, T, 1)."""
    seen = []

    def see(sublayer, inputs, output):
        streams, gate = output
        seen.append([x.numpy() for x in (streams['D'], streams['C'], gate)])

    handles = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    model(idx)
    for handle in handles:
        handle.remove()
    return map(np.array, zip(*seen))


def committed_by_numpy(model, idx):
    """Returns what every sublayer adds to C by identity and by map, (2, S, N, T, d), and C after it."""
    d, c, gate = observe(model, idx)
    maps = [sublayer.residual.commit_map for sublayer in model.sublayers]
    mapped = np.stack([x @ (m.U.weight @ m.V.weight).detach().numpy().T for x, m in zip(d, maps)])
    terms = np.stack([gate * d, gate * mapped])
    if model.config.arm == 'rotated_commit':
        terms = terms @ model.sublayers[0].residual.rotation.numpy().T
    return terms, c


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('arm, t', (('', 1), ('', 3), ('rotated_commit', 3)))
def test_what_the_sublayers_commit_adds_up_to_C_and_with_its_sign_to_its_magnitude(tokens, arm, t, device):
    model = random_model(residual='ledger', arm=arm).double()
    starts, dims = tokens.fixed_starts(20), [3, 17, 5]
    assert len(starts) == 20
    terms, C = controls.decompose(model.to(device), tokens, starts, 6, dims, t)
    expected, after = committed_by_numpy(model.cpu(), tokens.windows(starts)[0])
    parts, final = expected[:, : t + 1, ..., dims], after[t][..., dims]
    signs = np.ones_like(final), np.sign(final)
    averages = (lambda x: x[..., 0, :]), (lambda x: x.mean(-2))
    for k, sign in enumerate(signs):
        for position, average in enumerate(averages):
            found, total = terms[..., k, position], average(final * sign).mean(0)
            np.testing.assert_allclose(found, average(parts * sign).mean(-2), rtol=0, atol=1e-13)
            np.testing.assert_allclose(found.sum((0, 1)), total, rtol=0, atol=1e-13)
            np.testing.assert_allclose(C[:, k, position], total, rtol=0, atol=1e-13)


def test_the_report_of_commits_names_its_places_and_its_shares_are_all_of_C(tokens, monkeypatch):
    monkeypatch.setattr(controls, 'OTHERS', D)  # all others
    model, starts = random_model(residual='ledger').double(), tokens.fixed_starts(20)
    report = controls.commit_report(model, tokens, starts, 8, 3, 17, 1)
    _, c, _ = observe(model, tokens.windows(starts)[0])
    for name, t in {'last': 3, 'peak': 1}.items():
        assert report[name]['sublayer'] == t
        expected = {
            'start_at_start_dim': (17, c[t][:, 0, 17]),
            'start_at_dominant': (3, c[t][:, 0, 3]),
            'mean_at_dominant': (3, c[t][..., 3]),
        }
        for place, (dim, x) in expected.items():
            entry = report[name][place]
            assert entry['dim'] == dim and len(entry['identity']) == t + 1
            assert (entry['mean'], entry['magnitude']) == pytest.approx((x.mean(), abs(x).mean()), rel=1e-6)
            assert sum(entry['identity_signed']) + sum(entry['map_signed']) == pytest.approx(
                x.mean(), abs=1e-6
            )
        for place in (*expected, 'start_at_others', 'mean_at_others'):
            entry = report[name][place]
            assert entry['identity_share'] == pytest.approx(
                sum(entry['identity']) / entry['magnitude'], rel=1e-5
            )
            assert entry['identity_share'] + entry['map_share'] == pytest.approx(1, abs=1e-6)
    assert report['last']['start_at_others']['magnitude'] == pytest.approx(
        abs(c[3][:, 0, np.setdiff1d(np.arange(D), (3, 17))]).mean(), rel=1e-6
    )


def test_ranks_of_planted_dimensions_are_found_by_m_by_p_and_by_concentration():
    m, p = np.linspace(2, 1, 50), np.linspace(1, 2, 50)
    m[7], p[7] = 90, 9  # the largest everywhere, ten times less so at the start
    m[30], p[30] = 1.7, 80  # a start-token spike
    m[40] = p[40] = 0
    entry = controls.dimensions(m, p, {'dominant_dim': 7, 'start_dim': 30})
    rank = {
        key: [entry[key][f'rank_by_{name}'] for name in ('m', 'p', 'concentration')]
        for key in ('dominant_dim', 'start_dim')
    }
    assert rank['dominant_dim'] == [1, 2, 49] and rank['start_dim'] == [16, 1, 1]
    assert entry['start_dim']['concentration'] == pytest.approx(80 / 1.7) and entry['dominant_dim']['m'] == 90
    assert [row['dim'] for row in entry['largest_by']['p']][:3] == [30, 7, 49] and len(
        entry['largest_by']['m']
    ) == 10
    assert (
        entry['quantiles']['p'][0] == 0
        and entry['quantiles']['p'][-1] == 80
        and entry['quantiles']['at'][3] == 0.5
    )
    assert entry['quantiles']['m'][3] == pytest.approx(np.median(m), rel=1e-6)


def test_among_equal_values_the_lower_index_ranks_first():
    assert controls.descending_ranks(np.array([1.0, 3.0, 3.0, 0.0])).tolist() == [3, 1, 2, 4]


def test_document_windows_begin_after_an_end_of_text_and_do_not_overlap(tokens, tmp_path):
    starts = controls.window_starts(tokens, EOT, 100, 0)
    ids = np.fromfile(tmp_path / 'data/val.bin', '<u2')
    begins, windows = starts['document'], tokens.windows(starts['document'])[0]
    assert (
        len(begins) == 7 and (ids[begins - 1] == EOT).all()
    )  # the document of 5 tokens begins another window, which the next would overlap
    assert (windows[:, 0] == 0).all()
    assert (tokens.windows(starts['end_of_text'])[0][:, 0] == EOT).all() and (
        starts['end_of_text'] == begins - 1
    ).all()
    assert np.diff(np.sort(begins)).min() > T and (begins + T + 1 <= len(ids)).all()
    assert (starts['anywhere'] == tokens.fixed_starts(100)).all()
    assert (
        sorted(begins) != list(begins)
        and (controls.window_starts(tokens, EOT, 3, 0)['document'] == begins[:3]).all()
    )


def test_no_document_window_straddles_two_shards(tmp_path):
    shards = [[1, 2, EOT, *range(20)], [EOT, *range(30), EOT, 4, 5], [9] * 5 + [EOT, *range(20)]]
    for i, ids in enumerate(shards):
        header = np.zeros(256, '<i4')
        header[:3] = SHARD_MAGIC, 1, len(ids)
        (tmp_path / f'val_{i}.bin').write_bytes(header.tobytes() + np.array(ids, '<u2').tobytes())
    starts = controls.window_starts(Tokens(tmp_path, 'val', T, 257), EOT, 10, 0)
    assert sorted(starts['document']) == [3, 23 + 1, 23 + 34 + 6]


def save_checkpoint(path, model, data):
    path.parent.mkdir(parents=True)
    checkpoint = {
        'model': model.state_dict(),
        'model_args': asdict(model.config),
        'iter_num': 3,
        'config': {'dataset': str(data)},
    }
    torch.save(checkpoint, path)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Returns what controls.py writes beside two checkpoints, and what measure.py says of them, by arm."""
    folder = tmp_path_factory.mktemp('controls')
    write_dataset(folder / 'data')
    paths = {'baseline': folder / 'baseline/ckpt.pt', 'ledger': folder / 'ledger/ckpt_0.pt'}
    for arm, path in paths.items():
        model = random_model(residual=arm)
        with torch.no_grad():
            for s, sign in ((1, 1), (3, -1)):  # so that h and D peak before the last sublayer
                model.sublayers[s].function.proj.bias[11] += 50 * sign
        save_checkpoint(path, model, folder / 'data')
    flags = ['--ckpt', *map(str, paths.values()), '--device=cpu', '--sequences=20']
    controls.main(flags)
    measure.main([*flags, f'--out={folder / "m"}'])
    names = {
        'baseline': ('baseline/controls.json', 'baseline'),
        'ledger': ('ledger/controls_0.json', 'ledger_0'),
    }
    reports = {arm: json.loads((folder / name).read_text()) for arm, (name, _) in names.items()}
    measured = {
        arm: json.loads((folder / 'm' / name / 'measure.json').read_text())
        for arm, (_, name) in names.items()
    }
    return reports, measured


def test_each_arm_has_its_streams_and_only_a_ledger_has_commits(written):
    reports, _ = written
    assert set(reports['baseline']['streams']) == {'h'} and 'commits' not in reports['baseline']
    assert set(reports['ledger']['streams']) == {'D', 'C'}
    assert reports['ledger']['commits']['last']['sublayer'] == 3
    assert reports['baseline']['streams']['h']['peak_sublayer'] < 3


def test_windows_anywhere_are_those_of_measure_and_so_are_their_numbers(written):
    reports, measured = written
    same = ('fixed_dim_ratio', 'start_ratio', 'start_token_concentration', 'persistence')
    for arm, report in reports.items():
        for stream, entry in measured[arm]['streams'].items():
            anywhere, own = report['windows']['anywhere']['streams'][stream], report['streams'][stream]
            assert all(anywhere[key] == entry[key] for key in (*same, 'dominant_dim', 'peak_sublayer'))
            concentration = entry['start_token_concentration']['value']
            assert own['dominant_dim']['concentration'] == pytest.approx(concentration, rel=1e-5)
            assert own['largest_start_dim'] == [line['largest_start_dim'] for line in entry['sublayers']]


def test_bfloat16_moves_the_numbers_a_little(written):
    for report in written[0].values():
        exact, low = report['windows']['anywhere'], report['windows']['anywhere_bfloat16']
        assert 0 < abs(low['loss']['value'] / exact['loss']['value'] - 1) < 0.01
        assert low['sequences'] == exact['sequences']
        for stream, entry in exact['streams'].items():
            other = low['streams'][stream]
            assert other['dominant_dim'] == entry['dominant_dim']
            moved = other['fixed_dim_ratio']['value'] / entry['fixed_dim_ratio']['value'] - 1
            assert 0 < abs(moved) < 0.02


def test_windows_at_documents_are_fewer_and_have_intervals_too(written):
    for report in written[0].values():
        assert report['windows']['document']['sequences'] == 7
        loss = report['windows']['end_of_text']['loss']
        assert loss['low'] < loss['high']


def test_the_table_fits_a_terminal(written, capsys):
    controls.print_controls('ledger', written[0]['ledger'])
    printed = capsys.readouterr().out
    assert 'anywhere_bfloat16 (20)' in printed and 'C after sublayer 3, start at dominant' in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_controls_of_a_pretrained_model_are_refused():
    with pytest.raises(SystemExit, match='^error: hf:some/model is a pretrained model'):
        controls.main(['--ckpt', 'hf:some/model'])


def test_controls_of_nothing_end_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no ckpt.pt'):
        controls.main(['--ckpt', str(tmp_path)])
