"""What speed/bench.py measures, and the reports that it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_datasets import sentence

from speed import bench

SMALL = [
    '--scale=demo',
    '--n_layer=1',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=2',
    '--eval_sequences=2',
    '--device=cpu',
]
SHORT = ['--turns=2', '--steps=1']


def report_of(tmp_path, *argv):
    """Runs the bench and returns the report that it wrote."""
    out = tmp_path / 'new' / 'report.json'
    bench.main([f'--out={out}', *argv])
    return json.loads(out.read_text())


def test_the_loader_bench_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'BATCHES', 200)
    report = report_of(tmp_path, '--what=loader', '--note=a test')
    assert report == json.loads(capsys.readouterr().out)
    assert report['file_bytes'] == 20 * 10**9
    assert report['ms_per_batch']['50%'] > 0
    assert report['memory_growth_bytes'] < 2**22


def test_the_bench_of_the_step_lets_arms_take_turns_and_quotes_medians_against_the_first(tmp_path, capsys):
    arms = report_of(tmp_path, '--arms=baseline,ledger/gate_rank=4', '--skip_cold_starts', *SHORT, *SMALL)[
        'arms'
    ]
    assert list(arms) == ['baseline', 'ledger/gate_rank=4']
    for arm in arms.values():
        assert arm['tokens_per_step'] == 2 * 16
        assert len(arm['ms_per_step']['all']) == 2
        median = np.median(arm['ms_per_step']['all'])
        assert arm['tokens_per_s'] == pytest.approx(32e3 / median, rel=1e-2, abs=0.6)
    baseline, ledger = arms.values()
    assert baseline['ratio'] == 1
    ms, first_ms = (line['ms_per_step']['median'] for line in (ledger, baseline))
    assert ledger['ratio'] == pytest.approx(first_ms / ms, rel=1e-3)
    gates_of_a_sublayer = 5 * 2 * 32 * 4 + 4 * 32 + 1
    assert ledger['parameters'] - baseline['parameters'] == 2 * gates_of_a_sublayer
    assert 'ledger/gate_rank=4' in capsys.readouterr().out.splitlines()[-1]


def test_the_bench_of_the_step_says_what_share_of_training_its_evaluations_take(tmp_path):
    argv = '--arms=baseline', '--skip_cold_starts', '--eval_interval=50', *SHORT, *SMALL
    line = report_of(tmp_path, *argv)['arms']['baseline']
    assert line['evaluation_s'] > 0 and line['streams_s'] > 0
    step_s = line['ms_per_step']['median'] / 1000
    assert line['evaluation_share'] == pytest.approx(line['evaluation_s'] / (50 * step_s), rel=0.1)


def test_cold_and_warm_starts_are_two_processes_with_the_same_caches_unless_they_are_skipped(
    tmp_path, monkeypatch, capsys
):
    caches = []

    def run_in_this_process(argv, env=None, **options):  # another would spend its time on imports
        if env is None:
            return subprocess.CompletedProcess(argv, 0, 'a commit', '')
        assert argv[:3] == [sys.executable, '-m', 'speed.bench']
        caches.append((env['TRITON_CACHE_DIR'], env['TORCHINDUCTOR_CACHE_DIR']))
        was_cold = not any(Path(folder).exists() for folder in caches[-1])
        assert was_cold == (len(caches) == 1)
        Path(caches[-1][0]).mkdir(exist_ok=True)
        bench.main(argv[3:])
        return subprocess.CompletedProcess(argv, 0, capsys.readouterr().out, '')

    monkeypatch.setattr(bench.subprocess, 'run', run_in_this_process)
    argv = '--arms=baseline', *SHORT, *SMALL
    line = report_of(tmp_path, *argv)['arms']['baseline']
    assert line['first_step_s'] > 0 and line['first_step_warm_s'] > 0
    assert len(caches) == 2 and caches[0] == caches[1]
    assert 'first_step_s' not in report_of(tmp_path, '--skip_cold_starts', *argv)['arms']['baseline']
    assert len(caches) == 2


def test_the_bench_under_torchrun_has_all_arms_and_says_how_long_they_wait_for_gradients(tmp_path):
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    argv = ['-m', 'speed.bench', f'--out={tmp_path / "bench.json"}', *SHORT, *SMALL]
    subprocess.run([*launcher, *argv], check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert report['processes'] == 2
    assert list(report['arms']) == ['baseline', 'ledger']
    for arm in report['arms'].values():
        assert arm['waiting_for_gradients'] < 1
        assert arm['tokens_per_step'] == 2 * 16


def test_one_command_prints_the_table_of_several_numbers_of_processes(tmp_path, monkeypatch, capsys):
    ms_on = {1: 10.0, 2: 12.5}
    started = []

    def run_without_processes(argv, env=None, **options):
        if 'torch.distributed.run' not in argv:
            return subprocess.CompletedProcess(argv, 0, 'a commit', '')
        started.append(argv)
        given = dict(arg.split('=', 1) for arg in argv if '=' in arg)
        processes = int(given['--nproc_per_node'])
        line = {
            'tokens_per_step': 16 * int(given['--batch_size']),
            'ms_per_step': {'median': ms_on[processes]},
            'tokens_per_s': 0,
            'waiting_for_gradients': 0.25 if processes > 1 else None,
        }
        Path(given['--out']).write_text(json.dumps({'arms': {'baseline': line}}))
        return subprocess.CompletedProcess(argv, 0, '', '')

    monkeypatch.setattr(bench.subprocess, 'run', run_without_processes)
    report = report_of(tmp_path, '--what=scale', '--processes=1,2', '--arms=baseline', *SHORT, *SMALL)
    one, two = report['arms']['baseline × 1'], report['arms']['baseline × 2']
    assert all({'--skip_cold_starts', '--device=cpu', '--steps=1'} <= set(argv) for argv in started)
    # Every process has its own 2 sequences of 16 tokens.
    assert [line['tokens_per_step'] for line in (one, two)] == [32, 64]
    assert (one['speed_up'], one['efficiency']) == (1, 1)
    assert (two['speed_up'], two['efficiency']) == (1.6, 0.8)
    assert two['waiting_for_gradients'] == 0.25
    table = capsys.readouterr().out.splitlines()[-3:]
    assert 'efficiency' in table[0]
    assert table[2].startswith('baseline × 2')


def test_the_bench_of_the_measurement_sets_it_against_a_plain_forward_pass(tmp_path):
    argv = ['--what=measure', '--arms=ledger', '--sequences=4', *SHORT, *SMALL]
    line = report_of(tmp_path, *argv)['arms']['ledger']
    assert line['ratio'] == pytest.approx(line['measure_s'] / line['forward_s'], rel=0.3)
    assert line['sequences'] == 4


def test_lists_of_numbers_stand_on_one_line_of_a_report():
    report = {'all': [1.5, 2.5], 'nested': [{'a': [1, 2]}], 'text': 'a [list  of] words'}
    text = bench.as_text(report)
    assert json.loads(text) == report
    assert '"all": [ 1.5, 2.5 ]' in text


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['--what=speed'], "--what is 'speed': expected train, scale, measure or loader"),
        (['--what=loader', '--n_layer=2'], '--n_layer=2 does nothing for --what=loader'),
        (['--scale=demo', '--kernel=False'], "no setting 'kernel'"),
        (['--what=loader', '--file=nowhere/train.bin'], 'cannot read'),
    ],
)
def test_the_bench_says_what_it_does_not_know(argv, expected):
    assert expected in sentence(bench.main, argv)


def test_a_bench_of_several_gpus_without_one_says_how_to_run_it_on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, 'device_count', lambda: 0)
    assert '--processes=1,2 --device=cpu' in sentence(bench.main, ['--what=scale'])
