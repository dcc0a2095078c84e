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
    handles = [
        sublayer.register_forward_hook(
            lambda _, __, output: seen.append(
                [output[0]['D'].numpy(), output[0]['C'].numpy(), output[1].numpy()]
            )
        )
        for sublayer in model.sublayers
    ]
    model(idx)
    for handle in handles:
        handle.remove()
    return map(np.array, zip(*seen))


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('t', (1, 3))
def test_what_the_sublayers_commit_adds_up_to_C_and_with_its_sign_to_its_magnitude(tokens, t, device):
    model, starts, dims = random_model(residual='ledger').double(), tokens.fixed_starts(20), [3, 17, 5]
    assert len(starts) == 20
    terms, C = controls.decompose(model.to(device), tokens, starts, 6, dims, t)
    model.cpu()
    d, c, gate = observe(model, tokens.windows(starts)[0])
    maps = [sublayer.residual.commit_map for sublayer in model.sublayers]
    mapped = np.stack([x @ (m.U.weight @ m.V.weight).detach().numpy().T for x, m in zip(d, maps)])
    parts, final = np.stack([gate * d, gate * mapped])[:, : t + 1, ..., dims], c[t][..., dims]
    for k, weight in enumerate((np.ones_like(final), np.sign(final))):
        for average, pick in enumerate((lambda x: x[..., 0, :], lambda x: x.mean(-2))):
            np.testing.assert_allclose(
                terms[..., k, average], pick(parts * weight).mean(-2), rtol=0, atol=1e-13
            )
            np.testing.assert_allclose(
                terms[..., k, average].sum((0, 1)), pick(final * weight).mean(0), rtol=0, atol=1e-13
            )
            np.testing.assert_allclose(C[:, k, average], pick(final * weight).mean(0), rtol=0, atol=1e-13)


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


def test_controls_of_both_arms_are_written_beside_their_checkpoints_and_agree_with_measure(tmp_path, capsys):
    write_dataset(tmp_path / 'data')
    paths = []
    for arm, name in (('baseline', 'ckpt.pt'), ('ledger', 'ckpt_0.pt')):
        model, path = random_model(residual=arm), tmp_path / arm / name
        with torch.no_grad():
            for s, sign in ((1, 1), (3, -1)):  # so that h and D peak before the last sublayer
                model.sublayers[s].function.proj.bias[11] += 50 * sign
        path.parent.mkdir()
        torch.save(
            {
                'model': model.state_dict(),
                'model_args': asdict(model.config),
                'iter_num': 3,
                'config': {'dataset': str(tmp_path / 'data')},
            },
            path,
        )
        paths.append(str(path))
    controls.main(['--ckpt', *paths, '--device=cpu', '--sequences=20'])
    measure.main(['--ckpt', *paths, '--device=cpu', '--sequences=20', f'--out={tmp_path / "m"}'])
    h, ledger = (
        json.loads((tmp_path / 'baseline/controls.json').read_text()),
        json.loads((tmp_path / 'ledger/controls_0.json').read_text()),
    )
    assert (
        h['streams']['h']['peak_sublayer'] < 3
        and 'commits' not in h
        and set(ledger['streams']) == {'D', 'C'}
        and ledger['commits']['last']['sublayer'] == 3
    )
    for report, name in ((h, 'baseline'), (ledger, 'ledger_0')):
        measured = json.loads((tmp_path / 'm' / name / 'measure.json').read_text())
        for stream, s in measured['streams'].items():
            anywhere, own = report['windows']['anywhere']['streams'][stream], report['streams'][stream]
            assert all(
                anywhere[key] == s[key]
                for key in (
                    'fixed_dim_ratio',
                    'start_ratio',
                    'start_token_concentration',
                    'persistence',
                    'dominant_dim',
                    'peak_sublayer',
                )
            )
            assert own['dominant_dim']['concentration'] == pytest.approx(
                s['start_token_concentration']['value'], rel=1e-5
            )
            assert own['largest_start_dim'] == [sublayer['largest_start_dim'] for sublayer in s['sublayers']]
        exact, low = report['windows']['anywhere'], report['windows']['anywhere_bfloat16']
        assert (
            0 < abs(low['loss']['value'] / exact['loss']['value'] - 1) < 0.01
            and low['sequences'] == exact['sequences']
        )
        for stream in measured['streams']:
            a, b = (w['streams'][stream] for w in (exact, low))
            assert (
                a['dominant_dim'] == b['dominant_dim']
                and 0 < abs(b['fixed_dim_ratio']['value'] / a['fixed_dim_ratio']['value'] - 1) < 0.02
            )
        assert (
            report['windows']['document']['sequences'] == 7
            and report['windows']['end_of_text']['loss']['low']
            < report['windows']['end_of_text']['loss']['high']
        )
    printed = capsys.readouterr().out
    assert (
        'written: ' in printed
        and 'anywhere_bfloat16 (20)' in printed
        and max(len(line) for line in printed.splitlines() if line[:4] in ('    ', 'loss', 'h: s', 'C: s'))
        <= 110
    )


def test_controls_of_nothing_end_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no ckpt.pt'):
        controls.main(['--ckpt', str(tmp_path)])
