"""The recipe's queue, with a stub in place of Python."""

import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / 'studies'

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
