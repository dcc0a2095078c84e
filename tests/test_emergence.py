"""Emergence of a run: from its log to fits, figures and sentences, and the sweep of architectures."""

import json
import warnings

import numpy as np
import pytest
from planted_series import LEDGER, PLANTED, SHAPES, STEPS, curve, made_up, sweep_file, write_log

from studies import emergence, sweep
from studies.curves import PARAMETERS, Series, fit, fit_all
from train import read_config


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(
        emergence, 'draw_curves', lambda *_: None
    )  # half a second each, and one test looks at them


def values(found):
    return np.array([found['parameters'][name]['value'] for name in PARAMETERS])


def rows_of(stream, count, peaked):
    series = [
        Series(
            'baseline_160m_1337',
            stream,
            s,
            STEPS,
            curve(STEPS, *PLANTED[0]) if s in peaked else 20 - 15 * np.exp(-STEPS / 900),
        )
        for s in range(count)
    ]
    return series, fit_all(series)


def test_curves_say_how_many_sublayers_are_shown_and_bend_before_the_first_step_too(tmp_path, drawn):
    for count, shown in ((1, 1), (24, 6)):
        emergence.draw_curves(
            'baseline_160m_1337', list(zip(*rows_of('h', count, {0}))), tmp_path / 'curves.png'
        )
        assert (
            f'{shown} of {count} sublayers' in drawn[-1]._suptitle.get_text() and len(drawn[-1].axes) == shown
        )
        steps = drawn[-1].axes[0].lines[1].get_xdata()
        assert (np.diff(steps) >= 0).all() and ((steps > 0) & (steps < 1)).sum() >= 20


def test_peaks_have_a_colour_bar_only_where_they_differ(tmp_path, drawn):
    for peaked, text, axes in (((), '0 of 24 sublayers;', 1), ({3}, '1 of 24 sublayers, step 3785;', 1)):
        emergence.draw_peaks(*rows_of('h', 24, peaked), tmp_path / 'peaks.png')
        assert text in drawn[-1]._suptitle.get_text() and len(drawn[-1].axes) == axes
    emergence.draw_peaks(*made_up(SHAPES[:2], arms=[('baseline', 'h')]), tmp_path / 'peaks.png')
    assert [t.get_text() for t in drawn[-1].axes[1].get_yticklabels()] == [
        '2000',
        '2048',
        '2098',
        '2148',
        '2200',
    ]


def test_the_rank_correlation_over_runs_gives_ties_their_mean_rank_and_runs_alike_have_none(capsys):
    of = [
        {
            'stream': 'h',
            'run': f'run {i}',
            'sublayers': 2,
            'fitted': 2,
            'r2': 0.9,
            'r2_least': 0.8,
            'f_preferred': 1,
            'identifiable': 0,
            'peak': None,
            'half_step': half,
            'loss_half_step': loss,
            'classes': {},
        }
        for i, (half, loss) in enumerate(zip([1, 1, 1, 1, 2, 2, 2, 2], [1, 2, 1, 2, 1, 2, 1, 2]))
    ]
    emergence.print_summary(of)
    assert (
        'rank correlation 0.00 over 8 runs' in capsys.readouterr().out
    )  # 0.57 if ties were in the order of the runs
    emergence.print_summary([{**s, 'half_step': 3} for s in of])
    assert 'rank correlation' not in capsys.readouterr().out


def test_a_run_is_fitted_from_its_log_and_figures_are_drawn(tmp_path, capsys):
    write_log(tmp_path / 'run')
    emergence.main([str(tmp_path / 'run')])
    report = json.loads((tmp_path / 'run' / 'emergence.json').read_text())
    for i, of in enumerate(report['series']):
        assert (of['stream'], of['sublayer']) == ('DDCC'[i], i % 2)
        np.testing.assert_allclose(
            values(of), PLANTED[i], rtol=5e-3
        )  # r is max_over_median, not 99 over the median
    for name in ('peaks.png', 'curves_run.png'):
        assert (tmp_path / 'run' / name).read_bytes().startswith(b'\x89PNG')
    printed = capsys.readouterr().out
    for word in (
        'R²',
        'AIC',
        'second order',
        'gamma',
        'peak at step',
        'early peak',
        '14M 0.931',
        '12B 0.983',
    ):
        assert word in printed
    assert [s['r2'] > 0.999 and s['sublayers'] == s['fitted'] == 2 for s in report['summary']] == [True, True]


def test_a_packed_run_is_small_and_fitted_like_its_folder(tmp_path, no_curves):
    write_log(tmp_path / 'a', LEDGER)
    write_log(tmp_path / 'b', LEDGER)
    emergence.main(['--pack', str(tmp_path / 'a'), str(tmp_path / 'b'), f'--out={tmp_path}/deep/sweep.jsonl'])
    packed = [json.loads(line) for line in (tmp_path / 'deep' / 'sweep.jsonl').read_text().splitlines()]
    assert (
        [run['run'] for run in packed] == ['a', 'b']
        and packed[0]['model_args'] == LEDGER
        and packed[0]['steps'] == STEPS.tolist()
    )
    log = [json.loads(line) for line in (tmp_path / 'a' / 'log.jsonl').read_text().splitlines()]
    assert packed[0]['streams']['C']['max_over_median'][1][7] == float(
        f'{log[7]["streams"]["C"]["max_over_median"][1]:.5g}'
    )
    emergence.main([str(tmp_path / 'deep' / 'sweep.jsonl'), f'--out={tmp_path}/packed'])
    emergence.main([str(tmp_path / 'a'), str(tmp_path / 'b'), f'--out={tmp_path}/folders'])
    assert (tmp_path / 'packed' / 'emergence.json').read_text() == (
        tmp_path / 'folders' / 'emergence.json'
    ).read_text()


def test_a_csv_gives_r_as_top1_over_median_whatever_the_order_of_its_rows(tmp_path, no_curves):
    planted = PLANTED[2]
    rows = [
        f'{t:g},{s},{3 * r!r},3.0,{stream}'
        for s, stream in ((0, 'C'), (1, 'D'))
        for t, r in zip(STEPS, curve(STEPS, *planted).tolist())
    ]
    np.random.RandomState(14).shuffle(rows)
    (tmp_path / 'series.csv').write_text('step,sublayer,top1,median,stream\n' + '\n'.join(rows))
    emergence.main([f'--csv={tmp_path}/series.csv'])
    found = json.loads((tmp_path / 'emergence.json').read_text())['series']
    assert [(f['run'], f['stream'], f['sublayer']) for f in found] == [('series', 'C', 0), ('series', 'D', 1)]
    for f in found:
        np.testing.assert_allclose(values(f), planted, rtol=5e-3)
        assert (
            f['half_step'] == pytest.approx(fit(STEPS, curve(STEPS, *planted))['half_step'])
            and f['last_step'] == 14000
        )


def test_of_many_runs_the_curves_of_two_of_each_kind_are_drawn(tmp_path, monkeypatch):
    sweep_file(tmp_path / 'sweep.jsonl')
    runs = sorted((tmp_path / 'sweep.jsonl').read_text().splitlines())  # all baselines first
    (tmp_path / 'sweep.jsonl').write_text('\n'.join(runs))
    drawn = []
    monkeypatch.setattr(
        emergence,
        'draw_curves',
        lambda run, rows, path: drawn.append((run, path.name, {x.stream for x, _ in rows})),
    )
    emergence.main([str(tmp_path / 'sweep.jsonl')])
    names = [json.loads(run)['run'] for run in runs]
    assert drawn == [
        (name, f'curves_{name}.png', {'h'} if 'base' in name else {'D', 'C'})
        for name in names[:2] + names[len(names) // 2 :][:2]
    ]


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        ('', 'nothing to read'),
        ('{}/nothing', 'there is no'),
        ('{}/empty', 'there is no log.jsonl'),
        ('{}/bad.jsonl', 'neither the folder of a run nor'),
        ('--csv={}/bad.csv', 'line 2'),
        ('--csv={}/empty.csv', 'no rows'),
        ('--csv={}/nan.csv', 'step'),
        ('--csv={}/twice.csv', 'stands twice'),
        ('--pack {}/run', '--pack needs'),
        ('{}/run {}/run', 'two runs are named run'),
        ('{}/run --csv={}/run.csv', 'two runs are named run'),
        ('{}/none.jsonl', 'no finite'),
        ('{}/bare.jsonl', 'cut short'),
        ('{}/run --out={}/bad.csv', 'cannot write'),
    ],
)
def test_a_mistake_of_the_user_is_a_sentence(tmp_path, arguments, sentence):
    write_log(tmp_path / 'run', LEDGER, STEPS[:9])
    (tmp_path / 'empty').mkdir()
    for name, content in {
        'bad.jsonl': '{"run": 1}\n',
        'bad.csv': 'step,sublayer,top1,median\n1,0,x,2\n',
        'empty.csv': 'step,sublayer,top1,median\n',
        'nan.csv': 'step,sublayer,top1,median\nnan,0,1,2\n',
        'twice.csv': 'step,sublayer,top1,median\n1,0,1,2\n1,0,1,2\n',
        'run.csv': 'step,sublayer,top1,median\n1,0,1,2\n',
        'none.jsonl': '',
        'bare.jsonl': '{"run": "a", "model_args": null, "steps": [], "val_loss": [], "streams": {}}',
    }.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        emergence.main([part.format(tmp_path) for part in arguments.split()])
    assert (
        error.value.code.startswith('error: ')
        and sentence in error.value.code
        and '\n' not in error.value.code
    )


def test_the_sweep_covers_what_it_must_in_pairs_with_settings_that_train_takes():
    args = sweep.parse_arguments([])
    configs = [read_config(sweep.settings(args, *run)) for run in sweep.RUNS]
    assert len({c.out_dir for c in configs}) == len(configs) == 2 * len(set(sweep.ARCHITECTURES)) >= 48
    for a, b in zip(configs[::2], configs[1::2]):
        assert (a.residual, b.residual) == ('baseline', 'ledger') and (
            a.n_layer,
            a.n_embd,
            a.n_head,
            a.mlp_ratio,
        ) == (b.n_layer, b.n_embd, b.n_head, b.mlp_ratio)
    for part in (configs, configs[:20]):  # cut short, it covers the range too
        for low, high, seen in (
            (2, 10, [c.n_layer for c in part]),
            (64, 384, [c.n_embd for c in part]),
            (16, 64, [c.n_embd // c.n_head for c in part]),
            (2, 8, [c.mlp_ratio for c in part]),
        ):
            assert (min(seen), max(seen)) == (low, high)
    steps, every = configs[0].max_iters, configs[0].eval_interval
    assert len({0, *range(0, steps + 1, every), *(2**i for i in range(steps.bit_length()))}) >= 30


def test_a_sweep_of_one_architecture_trains_both_arms_packs_them_and_leaves_no_weights(tmp_path, capfd):
    small = '--pairs=1 --steps=2 --block_size=16 --batch_size=2 --jobs=1 --device=cpu'.split()
    sweep.main([*small, f'--runs={tmp_path}', f'--packed={tmp_path}/sweep.jsonl', '--grace=600'])
    packed = [json.loads(line) for line in (tmp_path / 'sweep.jsonl').read_text().splitlines()]
    assert [run['run'] for run in packed] == ['baseline_2x64_h16_m4', 'ledger_2x64_h16_m4']
    assert [run['steps'] for run in packed] == [[0, 1, 2]] * 2
    assert not list(tmp_path.rglob('ckpt*')) and '2 of 2 runs are whole' in capfd.readouterr().out


def test_ctrl_c_is_a_sentence(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_log(tmp_path / 'run')
    monkeypatch.setattr(emergence, 'fit_all', interrupted)
    with pytest.raises(SystemExit, match='stopped by Ctrl-C'):
        emergence.main([str(tmp_path / 'run')])
