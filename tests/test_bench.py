"""What speed/bench.py measures, and the report that it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_datasets import sentence

from speed import bench


def test_the_loader_bench_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'BATCHES', 200)
    bench.main(['--what=loader', f'--out={tmp_path / "new" / "loader.json"}', '--note=a test'])
    report = json.loads((tmp_path / 'new' / 'loader.json').read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (
        report['file_bytes'] == 20 * 10**9
        and report['ms_per_batch']['50%'] > 0
        and report['memory_growth_bytes'] < 2**22
    )


SMALL_BENCH = [
    '--scale=demo',
    '--turns=2',
    '--batch_size=2',
    '--n_layer=1',
    '--n_embd=32',
    '--block_size=16',
    '--device=cpu',
]


def test_the_bench_of_the_step_lets_arms_take_turns_and_quotes_medians_against_the_first(
    tmp_path, monkeypatch, capsys
):
    def in_this_process(argv, env, **_):  # another would spend its time on imports
        assert (
            argv[0] == sys.executable
            and argv[1:3] == ['-m', 'speed.bench']
            and not Path(env['TRITON_CACHE_DIR']).exists()
        )
        bench.main(argv[3:])
        return subprocess.CompletedProcess(argv, 0, capsys.readouterr().out, '')

    monkeypatch.setattr(
        bench.subprocess,
        'run',
        lambda argv, **more: (
            in_this_process(argv, **more)
            if 'env' in more
            else subprocess.CompletedProcess(argv, 0, 'a commit', '')
        ),
    )
    bench.main(
        ['--arms=baseline,ledger/gate_rank=4', '--steps=1', f'--out={tmp_path / "bench.json"}', *SMALL_BENCH]
    )
    arms = json.loads((tmp_path / 'bench.json').read_text())['arms']
    assert list(arms) == ['baseline', 'ledger/gate_rank=4'] and arms['baseline']['ratio'] == 1
    for arm in arms.values():
        assert (
            arm['tokens_per_step'] == 2 * 16
            and len(arm['ms_per_step']['all']) == 2
            and arm['first_step_s'] > 0
        )
        assert arm['tokens_per_s'] == pytest.approx(32e3 / np.median(arm['ms_per_step']['all']), rel=1e-2)
    assert arms['ledger/gate_rank=4']['parameters'] - arms['baseline']['parameters'] == 2 * (
        5 * 2 * 32 * 4 + 4 * 32 + 1
    )
    assert 'ledger/gate_rank=4' in capsys.readouterr().out.splitlines()[-1]


def test_the_bench_of_two_processes_has_all_arms_and_says_how_long_they_wait_for_gradients(tmp_path):
    subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            '-m',
            'speed.bench',
            '--steps=1',
            f'--out={tmp_path / "bench.json"}',
            *SMALL_BENCH,
        ],
        check=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert report['processes'] == 2 and list(report['arms']) == ['baseline', 'ledger']
    assert all(
        arm['waiting_for_gradients'] < 1 and arm['tokens_per_step'] == 2 * 16
        for arm in report['arms'].values()
    )


def test_the_bench_of_the_measurement_sets_it_against_a_plain_forward_pass(tmp_path):
    bench.main(
        ['--what=measure', '--arms=ledger', '--sequences=4', f'--out={tmp_path / "bench.json"}', *SMALL_BENCH]
    )
    line = json.loads((tmp_path / 'bench.json').read_text())['arms']['ledger']
    assert (
        line['ratio'] == pytest.approx(line['measure_s'] / line['forward_s'], rel=0.3)
        and line['sequences'] == 4
    )


def test_the_bench_says_what_it_does_not_know(tmp_path):
    assert "--what is 'speed': expected train, measure or loader" in sentence(bench.main, ['--what=speed'])
    assert '--n_layer=2 does nothing for --what=loader' in sentence(
        bench.main, ['--what=loader', '--n_layer=2']
    )
    assert "no setting 'kernel', did you mean 'kernels'?" in sentence(
        bench.main, ['--scale=demo', '--kernel=False']
    )
    assert 'cannot read' in sentence(bench.main, ['--what=loader', f'--file={tmp_path / "train.bin"}'])
