"""The recipe of the 160m comparison: its controls against numpy in float64, its verdicts on planted files, its queue with a stub in place of Python."""

import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / 'studies'
import measure
from data.loader import SHARD_MAGIC, Tokens
from model import GPT, GPTConfig
from studies import controls, tables, verdicts

T, D, EOT = 8, 40, 256


def write_dataset(folder, lengths=(23, 5, 41, 9, 64, 70, 30, 30, 50)):
    """Documents of these lengths, with an end-of-text id after each; token ids count up through a document."""
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


# ---- Controls


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
    assert controls.ranks(np.array([1.0, 3.0, 3.0, 0.0])).tolist() == [3, 1, 2, 4]


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
    assert ledger['likeness']['D']['m'][3].keys() == {'pearson', 'spearman'} and h['likeness'] == {}
    printed = capsys.readouterr().out
    assert (
        'written: ' in printed
        and 'anywhere_bfloat16 (20)' in printed
        and max(len(line) for line in printed.splitlines() if line[:4] in ('    ', 'loss', 'h: s', 'C: s'))
        <= 110
    )


def test_correlations_follow_the_values_and_their_ranks():
    x = np.array([1.0, 2, 3, 100])
    both = controls.correlations(x, np.array([1.0, 3, 2, 50]))
    assert both['spearman'] == pytest.approx(0.8) and both['pearson'] == pytest.approx(
        np.corrcoef(x, [1, 3, 2, 50])[0, 1], rel=1e-6
    )
    assert controls.correlations(x, np.ones(4))['pearson'] is None


def test_controls_of_nothing_end_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no ckpt.pt'):
        controls.main(['--ckpt', str(tmp_path)])


# ---- Verdicts


def around(value, width=0.1):
    return {'value': value, 'low': value - width, 'high': value + width, 'sublayer': 0, 'last': value}


USUAL = dict(
    start_ratio=30,
    start_persistence=0.9,
    start_token_concentration=5,
    fixed_dim_ratio=10,
    kurtosis=20,
    persistence=0.9,
)
UNTRAINED = dict(
    start_ratio=3,
    start_persistence=0.2,
    start_token_concentration=1,
    fixed_dim_ratio=2,
    kurtosis=0,
    persistence=0.2,
)


def write_run(folder, arm, seed=1337, loss=2.0, alpha=0.02, untrained=True, windows=256, **values):
    """Plants measure.json, measure_0.json of a run. values: a headline's value, or a whole headline, of the decoded stream."""
    path = folder / f'{arm}_160m_{seed}'
    path.mkdir(parents=True)
    for name, base in (('measure', {**USUAL, **values}), ('measure_0', UNTRAINED))[: 1 + untrained]:
        entry = {key: x if isinstance(x, dict) else around(x) for key, x in base.items()}
        streams = (
            {'D': {'decoded': False, **entry}, 'C': {'decoded': True, **entry}}
            if arm.startswith('ledger')
            else {'h': {'decoded': True, **entry}}
        )
        (path / f'{name}.json').write_text(
            json.dumps(
                {
                    'val_loss': loss,
                    'loss': around(loss),
                    'model': {'commit_sparsity': alpha},
                    'data': {'name': 'x', 'sequences': windows},
                    'streams': streams,
                }
            )
        )
    return path


def word(folder, what):
    return verdicts.judge(verdicts.read_runs(folder))[what][1]


def test_a_start_token_outlier_of_the_baseline_is_said_first(tmp_path):
    write_run(tmp_path, 'baseline')
    shutil.copytree(
        tmp_path / 'baseline_160m_1337', tmp_path / 'baseline_160m_1338_old'
    )  # no run of the recipe
    assert word(tmp_path, 'premise') == 'yes (1 of 1; 1 seed)'


@pytest.mark.parametrize(
    'values',
    (
        dict(start_ratio=8.9),
        dict(start_persistence=0.49),
        dict(start_token_concentration=1.15),
        dict(start_ratio={**around(30), 'low': 3.05}),
        dict(start_ratio={'value': None, 'low': None, 'high': None}),
    ),
    ids=str,
)
def test_an_outlier_needs_all_three_of_its_conditions(tmp_path, values):
    write_run(tmp_path, 'baseline', **values)
    assert word(tmp_path, 'premise') == 'no (0 of 1; 1 seed)'
    assert [e['holds'] for e in verdicts.judge(verdicts.read_runs(tmp_path))['premise'][2]].count(False) == 1


def test_three_times_the_untrained_start_ratio_and_half_the_sublayers_are_enough(tmp_path):
    write_run(tmp_path, 'baseline', start_ratio=9, start_persistence=0.5, start_token_concentration=1.3)
    assert word(tmp_path, 'premise').startswith('yes')


def test_without_the_untrained_model_there_is_no_verdict_on_existence(tmp_path):
    write_run(tmp_path, 'baseline', untrained=False)
    assert (
        word(tmp_path, 'premise')
        == 'cannot be judged yet: needs the untrained baseline of seed 1337, measured'
    )


def test_every_number_that_goes_into_a_verdict_is_shown(tmp_path):
    write_run(tmp_path, 'baseline', start_ratio=31, start_persistence=0.8, start_token_concentration=6)
    evidence = verdicts.judge(verdicts.read_runs(tmp_path))['premise'][2]
    assert [e['numbers'] for e in evidence] == [
        'trained 31 [30.9, 31.1]; untrained 3 [2.9, 3.1]',
        'trained 0.8 [0.7, 0.9]',
        'trained 6 [5.9, 6.1]; untrained 1 [0.9, 1.1]',
    ]


def test_claim_1_is_judged_only_beside_a_baseline_of_the_same_seed_and_loss(tmp_path):
    write_run(tmp_path, 'ledger', loss=2.1)
    assert (
        word(tmp_path, '1')
        == 'cannot be judged yet: needs a baseline of seed 1337 that ends within 0.01 nats of the ledger'
    )
    write_run(tmp_path, 'baseline', loss=2.0)
    write_run(tmp_path, 'baseline_short2000', seed=1338, loss=2.1)
    assert 'nearest: baseline_160m_1337, 0.100 nats below' in word(tmp_path, '1')
    write_run(tmp_path, 'baseline', seed=1339, loss=2.05)
    write_run(tmp_path, 'ledger', seed=1339, loss=2.0)
    assert 'nearest: baseline_160m_1339, 0.050 nats above' in word(tmp_path, '1')
    write_run(tmp_path, 'baseline_short2000', loss=2.109)
    assert word(tmp_path, '1').startswith('reproduced (1 of 1; 1 seed); needs a baseline of seed 1339')


def test_claim_1_fails_where_C_has_no_outlier_and_is_partly_true_where_one_seed_has(tmp_path):
    for arm in ('baseline', 'ledger'):
        write_run(tmp_path, arm, start_ratio=4)
    assert word(tmp_path, '1') == 'not reproduced (0 of 1; 1 seed)'
    for arm in ('baseline', 'ledger'):
        write_run(tmp_path, arm, seed=1338)
    assert word(tmp_path, '1') == 'partly (1 of 2; 2 seeds)'


@pytest.mark.parametrize(
    'ratio, concentration, verdict',
    (
        (8, 6, 'reproduced (2 of 2'),
        (8, 4, 'partly (1 of 2'),
        (9.9, 6, 'partly (1 of 2'),
        (12, 4, 'not reproduced (0 of 2'),
    ),
)
def test_claim_2_compares_C_with_h_apart(tmp_path, ratio, concentration, verdict):
    write_run(tmp_path, 'baseline')
    write_run(tmp_path, 'ledger', loss=2.3, fixed_dim_ratio=ratio, start_token_concentration=concentration)
    assert word(tmp_path, '2').startswith(verdict) and word(tmp_path, '2, at matched loss').startswith(
        'cannot'
    )


def test_claim_2_at_matched_loss_takes_the_baseline_that_ends_there(tmp_path):
    write_run(tmp_path, 'baseline', fixed_dim_ratio=100)
    write_run(tmp_path, 'ledger', loss=2.3, fixed_dim_ratio=10, start_token_concentration=6)
    write_run(tmp_path, 'baseline_short900', loss=2.295, fixed_dim_ratio=5)
    assert word(tmp_path, '2').startswith('reproduced') and word(tmp_path, '2, at matched loss').startswith(
        'partly (1 of 2'
    )


def test_a_missing_run_is_named_and_the_other_seeds_are_judged(tmp_path):
    write_run(tmp_path, 'baseline')
    assert (
        word(tmp_path, '4') == 'cannot be judged yet: needs qknorm, seed 1337'
        and word(tmp_path, 'control') == 'cannot be judged yet: needs baseline_bias'
    )
    write_run(tmp_path, 'qknorm', fixed_dim_ratio=3, kurtosis=2)
    write_run(tmp_path, 'qknorm', seed=1338)
    assert word(tmp_path, '4') == 'reproduced (2 of 2; 1 seed); needs baseline, seed 1338'


@pytest.mark.parametrize(
    'persistence, verdict',
    (
        ((0.1, 0.4, 0.4, 0.9), 'reproduced'),
        ((0.1, 0.5, 0.4, 0.9), 'partly'),
        ((0.5, 0.5, 0.6, 0.65), 'partly'),
    ),
)
def test_claim_3_wants_four_doses_that_never_fall_and_ends_that_are_apart(tmp_path, persistence, verdict):
    for i, (arm, alpha) in enumerate(
        {'ledger_a0': 0, 'ledger': 0.02, 'ledger_a0.1': 0.1, 'ledger_hs': 0.3}.items()
    ):
        if i == 3:
            assert (
                word(tmp_path, '3')
                == 'cannot be judged yet: needs 4 doses of α in seed 1337 (so far: 0, 0.02, 0.1)'
            )
        write_run(tmp_path, arm, alpha=alpha, persistence=persistence[i], start_token_concentration=2 + i)
    assert word(tmp_path, '3').startswith(verdict)


def test_runs_measured_on_other_windows_are_refused(tmp_path):
    write_run(tmp_path, 'baseline')
    write_run(tmp_path, 'ledger', windows=64)
    with pytest.raises(SystemExit, match='^error: the runs in .* were not measured on the same windows'):
        verdicts.main([str(tmp_path)])


def test_a_folder_without_runs_ends_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match='^error: there is no <arm>_<scale>_<seed>/measure.json'):
        verdicts.main([str(tmp_path)])


def write_log(path, losses, streams=('h',), scale=1):
    """A log whose quantities are its iteration times `scale` in sublayer 1, and half that in sublayer 0."""
    lines = []
    for i, loss in losses.items():
        wide = {
            key: [0.5 * i * scale + 1, i * scale + 1] for key in (*verdicts.SERIES, 'magnitude_at_dominant')
        }
        stream = {
            **wide,
            'persistence': i / 100,
            'start_persistence': 0.5,
            'magnitude_at_dominant': [9, 1],
        }  # concentrations are quoted at sublayer 0
        lines.append(
            json.dumps(
                {'iter': i, 'tokens': i, 'val_loss': loss, 'streams': {name: stream for name in streams}}
            )
            + '\n'
        )
    (path / 'log.jsonl').write_text(''.join(lines))


def test_a_series_is_interpolated_where_its_loss_first_came_down_to_another(tmp_path):
    write_log(tmp_path, {0: 8.0, 10: 4.0, 20: 5.0, 30: 3.0, 40: 3.5, 50: 2.0})
    log = verdicts.read_log(tmp_path / 'log.jsonl')
    step, streams = verdicts.at_loss(log, 3.25)  # between steps 10 and 30: at 20 it was higher than before
    assert step == pytest.approx(25) and streams['h']['fixed_dim_ratio'] == pytest.approx(26)
    assert streams['h']['start_token_concentration'] == pytest.approx(13.5) and streams['h'][
        'persistence'
    ] == pytest.approx(0.25)
    assert (
        verdicts.at_loss(log, 2.0)[0] == 50
        and verdicts.at_loss(log, 1.9) is None
        and verdicts.at_loss(log, 9) is None
    )


def test_the_loss_that_all_reach_is_the_highest_last_one_and_short_runs_do_not_count(tmp_path):
    for arm, last in (('baseline', 2.0), ('ledger', 2.5), ('baseline_short20', 3.0)):
        write_log(write_run(tmp_path, arm), {0: 8.0, 10: 4.0, 20: last})
    loss, found = verdicts.matched_series(verdicts.read_runs(tmp_path))[1337]
    assert (
        loss == 2.5
        and found['ledger_160m_1337'][0] == 20
        and found['baseline_160m_1337'][0] == pytest.approx(17.5)
        and len(found) == 2
    )


def test_where_the_baseline_passes_the_ledgers_loss_is_said(tmp_path):
    for arm, last in (('baseline', 2.0), ('ledger', 3.0)):
        write_log(write_run(tmp_path, arm, loss=last), {0: 8.0, 10: 4.0, 20: last})
    assert 'it passes there at step 15, and a whole cosine needs fewer' in word(tmp_path, '1')


def test_tables_and_both_figures_are_made_from_the_files_alone(tmp_path, capsys):
    for arm, streams in (('baseline', 'h'), ('ledger', 'DC')):
        write_log(write_run(tmp_path, arm), {0: 8.0, 1: 7.9, 4: 4.0, 20: 2.0}, streams)
    place = {'dim': 3, 'magnitude': 2.0, 'identity': [0.5, 1.0], 'map': [0.25, 0.25], 'map_share': 0.25}
    windows = {kind: {'sequences': 1} for kind in ('anywhere', 'document', 'end_of_text')}
    rank = {'dim': 3, 'rank_by_m': 1, 'rank_by_p': 2, 'rank_by_concentration': 9}
    (tmp_path / 'ledger_160m_1337/controls.json').write_text(
        json.dumps(
            {
                'windows': windows,
                'streams': {'C': {'decoded': True, 'dominant_dim': rank, 'start_dim': rank}},
                'commits': {
                    'last': {
                        name: place
                        for name in (
                            'start_at_start_dim',
                            'mean_at_dominant',
                            'start_at_others',
                            'mean_at_others',
                        )
                    }
                },
            }
        )
    )
    verdicts.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert (
        '| ledger_160m_1337 | C | – | – | – | 3: 1, 2, 9 | 3: 1, 2, 9 | 25% | 25% | 25% |' in printed
        and '| ledger_160m_1337 | D | 2 [1.9, 2.1] | 30' in printed
    )
    for name in ('onset.png', 'commits.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


def test_where_the_untrained_weights_were_not_measured_nobody_knows_of_an_outlier(tmp_path):
    write_run(tmp_path, 'baseline')
    run = verdicts.read_runs(tmp_path)['baseline', 1337]
    assert verdicts.has_outlier(run, 'h', 1337) in (True, False)
    assert (
        verdicts.has_outlier(run | {'untrained': None}, 'h', 1337) is None
        and tables.how_many([None, True, False]) == '1 of 2'
    )


def test_the_figure_of_the_onset_has_the_price_of_zero_but_neither_other_doses_nor_short_runs(
    tmp_path, monkeypatch
):
    for arm, streams in (
        ('baseline', 'h'),
        ('baseline_short20', 'h'),
        *((f'ledger{more}', 'DC') for more in ('', '_hs', '_a0', '_a0.1', '_a1', '_a10')),
    ):
        write_log(write_run(tmp_path, arm), {0: 8.0, 4: 4.0, 20: 2.0}, streams)
    titles, figure = [], verdicts.figure

    @contextmanager
    def noted(*args):
        with figure(*args) as axes:
            axes = list(axes)
            yield axes
            titles.extend(axis.get_title().split('_160m')[0] for axis in axes if axis.get_title())

    monkeypatch.setattr(verdicts, 'figure', noted)
    verdicts.draw_onset(verdicts.read_runs(tmp_path), tmp_path / 'onset.png')
    assert titles == ['baseline', 'ledger', 'ledger', 'ledger_a0', 'ledger_a0', 'ledger_hs', 'ledger_hs']


# ---- The queue

STUB = """#!/usr/bin/env bash
# In place of Python: notes what it was asked, and leaves the files that the real one would.
[ "$1" = - ] && { echo '{}'; exit; }
echo "$*" >> calls
out=$(sed -E 's#.*(--out_dir=|--ckpt )([^ ]*).*#\\2#; s#/ckpt.*##' <<< "$*")
case "$*" in
  train*) [[ "$out" != *broken* ]] || exit 1
          trap 'sleep 0.5; echo saved >> calls; exit 143' TERM
          [ -z "${SLOW:-}" ] || { sleep 30 & wait; }
          touch "$out"/{ckpt,ckpt_0,ckpt_prev}.pt "$out/log.jsonl" ;;
  measure*_0.pt*) touch "$out"/{measure_0.json,profile_0.png} ;;
  measure*) touch "$out"/{measure.json,profile.png,landscape.png,series.png} ;;
  *controls.py*_0.pt*) touch "$out"/controls{,_0}.json ;;
  *controls.py*) touch "$out"/controls.json ;;
  intervene.py*) touch "$out"/intervene.json
                 [ -z "${UNDRAWN:-}" ] || exit 1
                 touch "$out"/intervene.png ;;
esac
"""
PACKED = {
    'log.jsonl',
    'measure.json',
    'measure_0.json',
    'controls.json',
    'profile.png',
    'profile_0.png',
    'landscape.png',
    'series.png',
    'recipe.json',
}


@pytest.fixture
def queue(tmp_path):
    """Returns what starts run.sh in a folder of its own, with settings as keywords."""
    script = tmp_path / 'results/pysource_160m/run.sh'
    script.parent.mkdir(parents=True)
    shutil.copy(RECIPE / 'recipe.sh', script)
    (tmp_path / 'stub').write_text(STUB)
    (tmp_path / 'stub').chmod(stat.S_IRWXU)

    def start(**settings):
        settings = {
            'PYTHON': './stub',
            'DATASET': 'tiny',
            'GPUS': '',
            'TGZ': 'all.tgz',
            'KEEP_FREE': '0',
            **settings,
        }
        return subprocess.Popen(
            ['bash', script],
            cwd=tmp_path,
            env={'PATH': os.environ['PATH'], **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def calls(folder, word=''):
    return [line for line in (folder / 'calls').read_text().splitlines() if word in line]


def test_runs_are_shared_by_the_workers_and_packed_whole_and_a_second_call_trains_nothing(queue, tmp_path):
    arms = 'baseline baseline_bias ledger_a0.1 baseline_short20 ledger_hs'
    first = queue(ARMS=arms, GPUS='0 1', SEEDS='1 2')
    assert first.wait(30) == 0, first.stdout.read()
    trained = calls(tmp_path, 'train.py')
    assert len(trained) == 10 and all(
        '--snapshots=0 ' in line and '--init_from=auto' in line for line in trained
    )
    by_arm = {
        arm: next(line for line in trained if f'out_dir=out/{arm}_160m_2' in line) for arm in arms.split()
    }
    assert (
        'config/baseline_160m.py --max_iters=4100 --attn_bias_kv=True --dataset=tiny --seed=2 '
        in by_arm['baseline_bias']
    )
    assert 'config/ledger_160m.py --max_iters=4100 --commit_sparsity=0.1 ' in by_arm['ledger_a0.1']
    assert (
        'config/baseline_160m.py --max_iters=20 ' in by_arm['baseline_short20']
        and 'config/ledger_hs_160m.py --max_iters=4100 ' in by_arm['ledger_hs']
    )
    assert {path.name for path in (tmp_path / 'out/packed/ledger_hs_160m_2').iterdir()} == PACKED
    assert {'./baseline_160m_1/log.jsonl', './ledger_a0.1_160m_2/recipe.json'} <= set(
        tarfile.open(tmp_path / 'all.tgz').getnames()
    )
    assert (tmp_path / 'out/baseline_160m_1/ckpt.pt').exists() and not (
        tmp_path / 'out/baseline_160m_1/ckpt_prev.pt'
    ).exists()
    assert queue(ARMS=arms, SEEDS='1 2').wait(30) == 0 and len(calls(tmp_path, 'train.py')) == 10


def test_a_queue_names_runs_in_any_order(queue, tmp_path):
    assert queue(QUEUE='ledger_a0.1.1338 baseline.1337').wait(30) == 0
    assert [line.split('--out_dir=')[1].split()[0] for line in calls(tmp_path, 'train.py')] == [
        'out/ledger_a0.1_160m_1338',
        'out/baseline_160m_1337',
    ]
    assert '--commit_sparsity=0.1 --dataset=tiny --seed=1338 ' in calls(tmp_path, 'train.py')[0]


def test_a_run_that_fails_is_not_packed_is_named_and_keeps_no_other_from_running(queue, tmp_path):
    run = queue(ARMS='broken baseline')
    printed = run.communicate(timeout=30)[0]
    assert (
        run.returncode == 1
        and 'not packed yet: broken_160m_1337' in printed
        and 'exit 1 of ./stub train.py config/broken_160m.py' in printed
    )
    assert [path.name for path in (tmp_path / 'out/packed').glob('*_160m_*')] == ['baseline_160m_1337']


def test_a_run_whose_results_lie_beside_the_script_is_skipped(queue, tmp_path):
    (tmp_path / 'results/pysource_160m/baseline_160m_1337').mkdir()
    (tmp_path / 'results/pysource_160m/baseline_160m_1337/recipe.json').touch()
    assert queue(ARMS='baseline qknorm').wait(30) == 0
    assert len(calls(tmp_path, 'train.py')) == 1 and 'qknorm' in calls(tmp_path, 'train.py')[0]


def test_a_folder_that_another_command_began_is_not_gone_on_with(queue, tmp_path):
    assert queue(ARMS='broken').wait(30) == 1
    run = queue(ARMS='broken', ITERS='30')
    assert (
        'was begun as: train.py config/broken_160m.py --max_iters=4100' in run.communicate(timeout=30)[0]
        and len(calls(tmp_path, 'train.py')) == 1
    )


def test_one_seeds_baseline_and_ledger_are_looked_at_closer_where_there_are_tools(queue, tmp_path):
    (tmp_path / 'intervene.py').touch()
    assert queue(ARMS='baseline qknorm', SEEDS='1 2', CLOSER='1').wait(30) == 0
    assert calls(tmp_path, 'intervene') == ['intervene.py --ckpt out/baseline_160m_1 --sequences=64']
    assert {'intervene.json', 'intervene.png'} < {
        path.name for path in (tmp_path / 'out/packed/baseline_160m_1').iterdir()
    }
    assert {path.parent.name for path in (tmp_path / 'out/packed').glob('*/controls_0.json')} == {
        'baseline_160m_1',
        'qknorm_160m_1',
    }


def test_the_closer_looks_are_shared_by_the_workers_and_each_is_taken_once(queue, tmp_path):
    (tmp_path / 'results/emergence').mkdir(parents=True)
    for tool in ('intervene.py', 'probe.py', 'results/emergence/onset.py'):
        (tmp_path / tool).touch()
    assert (
        queue(ARMS='ledger baseline', GPUS='0 1', SEEDS='1', CLOSER='1', SNAPSHOTS='0,1,2,3,4').wait(30) == 0
    )
    looked = [line for tool in ('intervene.py', 'probe.py', 'onset.py') for line in calls(tmp_path, tool)]
    assert sorted((line.split()[0], line.split()[2]) for line in looked) == sorted(
        (tool, f'out/{arm}_160m_1')
        for tool in ('intervene.py', 'probe.py', 'results/emergence/onset.py')
        for arm in ('baseline', 'ledger')
    )


def test_the_closer_look_can_be_left_out(queue, tmp_path):
    (tmp_path / 'intervene.py').touch()
    assert queue(ARMS='baseline', SEEDS='1', CLOSER='1', TOOLS='').wait(30) == 0
    assert (
        not calls(tmp_path, 'intervene')
        and (tmp_path / 'out/packed/baseline_160m_1/controls_0.json').exists()
    )


def test_probes_take_their_own_number_of_sequences(queue, tmp_path):
    (tmp_path / 'probe.py').touch()
    assert queue(ARMS='baseline', SEEDS='1', CLOSER='1').wait(30) == 0
    assert calls(tmp_path, 'probe') == ['probe.py --ckpt out/baseline_160m_1']


def test_what_a_closer_look_has_written_is_packed_although_its_figure_could_not_be_drawn(queue, tmp_path):
    (tmp_path / 'intervene.py').touch()
    run = queue(ARMS='baseline', SEEDS='1', CLOSER='1', UNDRAWN='1', TGZ='all.tgz')
    assert 'exit 1 of ./stub intervene.py' in run.communicate(timeout=30)[0]
    assert {path.name for path in (tmp_path / 'out/packed/baseline_160m_1').iterdir()} == PACKED | {
        'controls_0.json',
        'intervene.json',
    }
    assert './baseline_160m_1/intervene.json' in tarfile.open(tmp_path / 'all.tgz').getnames()


@pytest.mark.parametrize('how', ('SIGTERM', 'LIMIT'))
def test_told_to_stop_it_lets_the_training_save_and_packs_nothing_half(queue, tmp_path, how):
    run = queue(ARMS='baseline qknorm', SLOW='1', **({'LIMIT': '2'} if how == 'LIMIT' else {}))
    for _ in range(100):
        if (tmp_path / 'calls').exists():
            break
        time.sleep(0.05)
    if how == 'SIGTERM':
        time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
    assert run.wait(20) == (143 if how == 'SIGTERM' else 1)
    assert (
        len(calls(tmp_path, 'train.py')) == 1
        and calls(tmp_path, 'saved')
        and not list((tmp_path / 'out/packed').glob('*_160m_*'))
    )
    assert (
        queue(ARMS='baseline').wait(30) == 0
        and (tmp_path / 'out/packed/baseline_160m_1337/recipe.json').exists()
    )
