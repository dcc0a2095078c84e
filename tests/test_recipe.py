"""The recipe: which runs it makes in which order, what it packs, and how it ends."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from data.loader import UserError
from studies import recipe

ROOT = Path(__file__).resolve().parent.parent

# Stands for train.py, measure.py and the studies: writes the files that they write and a line of calls.txt.
# FAIL holds a regular expression: a command that it matches fails. SLOW: a training that it matches lasts.
STUB = """
import json, os, re, signal, sys, time
from pathlib import Path

command = ' '.join(sys.argv[1:])
flags = dict(word[2:].split('=', 1) for word in sys.argv[1:] if word.startswith('--') and '=' in word)
with open(os.environ['CALLS'], 'a') as file:
    file.write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + command + chr(10))
if re.search(os.environ.get('FAIL', '^$'), command):
    sys.exit('it went wrong')
if sys.argv[1] == 'train.py':
    out = Path(flags['out_dir'])
    out.mkdir(exist_ok=True)
    (out / 'ckpt_0.pt').touch()
    if re.search(os.environ.get('SLOW', '^$'), command):
        def save(*_):
            (out / 'saved').touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        (out / 'begun').touch()
        time.sleep(30)
    for name in ('ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt'):
        (out / name).touch()
    line = {'iter': 1, 'val_loss': 2.0, 'streams': {}}
    (out / 'log.jsonl').write_text(json.dumps(line) + chr(10))
elif sys.argv[1] == 'measure.py':
    path = Path(sys.argv[3])
    name = path.name.replace('ckpt', 'measure').replace('.pt', '.json')
    path.with_name(name).write_text(json.dumps({'loss': hash(str(path)) / 2**64, 'streams': {}}))
else:
    name = sys.argv[2].split('.')[1]
    (Path(sys.argv[4]) / (name + '.json')).write_text(json.dumps({'studied': name}))
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Returns what runs a queue with the stub, and gives the exit code and the commands in their order."""
    (tmp_path / 'stub.py').write_text(STUB)
    (tmp_path / 'data').mkdir()
    for split in ('train', 'val'):
        np.zeros(100, dtype='<u2').tofile(tmp_path / 'data' / f'{split}.bin')
    monkeypatch.setattr(recipe, 'PYTHON', [sys.executable, '-S', str(tmp_path / 'stub.py')])
    monkeypatch.setattr(signal, 'signal', lambda *_: None)  # the tests keep their own Ctrl-C
    monkeypatch.setenv('CALLS', str(tmp_path / 'calls.txt'))

    def run(text, *flags, gpus='0', **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / 'runs.txt').write_text(text)
        (tmp_path / 'calls.txt').write_text('')
        common = [f'--gpus={gpus}', f'--dataset={tmp_path}/data', f'--runs={tmp_path}/out']
        with pytest.raises(SystemExit) as stop:
            recipe.main([f'{tmp_path}/runs.txt', *common, f'--pack={tmp_path}/packed', *flags])
        return stop.value.code, (tmp_path / 'calls.txt').read_text().splitlines()

    return run


def packed(tmp_path, name):
    return sorted(path.name for path in (tmp_path / 'packed' / name).iterdir())


def test_a_run_is_trained_measured_twice_and_packed(queue, tmp_path, capsys):
    code, calls = queue('baseline_demo.7\n', '--max_iters=5')
    out = tmp_path / 'out' / 'baseline_demo_7'
    assert code == 0
    assert calls == [
        f'0 train.py config/baseline_demo.py --seed=7 --dataset={tmp_path}/data --snapshots=0 --max_iters=5 '
        f'--out_dir={out} --init_from=auto',
        f'0 measure.py --ckpt {out}/ckpt.pt',
        f'0 measure.py --ckpt {out}/ckpt_0.pt',
    ]
    names = ['log.jsonl', 'measure.json', 'measure_0.json', 'recipe.json']
    assert packed(tmp_path, 'baseline_demo_7') == names
    described = json.loads((tmp_path / 'packed/baseline_demo_7/recipe.json').read_text())
    assert len(described['commands']) == 3 and {'commit', 'torch', 'device', 'data'} <= described.keys()
    said = capsys.readouterr().out
    assert 'packed baseline_demo_7; seconds: train ' in said and ', measure ' in said


def test_untrained_weights_that_are_measured_already_are_not_measured_again(queue, tmp_path):
    out = tmp_path / 'out' / 'baseline_demo_7'
    out.mkdir(parents=True)
    (out / 'measure_0.json').write_text(json.dumps({'loss': 1, 'streams': {}}))
    _, calls = queue('baseline_demo.7')
    assert len(calls) == 2 and 'measure_0.json' in packed(tmp_path, 'baseline_demo_7')


def test_weights_that_nothing_reads_go_and_the_newest_stay(queue, tmp_path):
    queue('baseline_demo.7')
    left = {path.name for path in (tmp_path / 'out/baseline_demo_7').glob('*.pt')}
    assert left == {'ckpt.pt', 'ckpt_0.pt'}


def test_settings_of_a_line_replace_those_of_all_and_name_the_run(queue, tmp_path):
    _, calls = queue('ledger_demo.7 --commit_sparsity=0 --lr=1e-3 --snapshots=0,5', '--lr=2e-3')
    assert '--snapshots=0,5 --lr=1e-3 --commit_sparsity=0 --out_dir' in calls[0]
    assert packed(tmp_path, 'ledger_a0_lr=1e-3_demo_7')


@pytest.mark.parametrize(
    'line, name',
    [
        ('baseline_160m.1 --arm=sandwich', 'sandwich_160m_1'),
        ('baseline_160m.1 --arm=rope_swiglu,muon --bos=True', 'rope_swiglu+muon_bos=True_160m_1'),
        ('ledger_160m.1 --arm=rope_swiglu --commit_sparsity=0', 'ledger+rope_swiglu_a0_160m_1'),
    ],
)
def test_files_of_arms_are_in_the_name(line, name):
    assert recipe.read_line(line).name == name


def test_a_line_may_name_a_run_and_the_config_that_it_starts_from(queue, tmp_path):
    _, calls = queue('mine_demo.7 config/ledger_demo.py --commit_sparsity=0')
    assert 'config/ledger_demo.py' in calls[0] and packed(tmp_path, 'mine_demo_7')


def test_what_is_packed_is_skipped(queue):
    queue('baseline_demo.7\nledger_demo.7')
    code, calls = queue('baseline_demo.7\nledger_demo.7\nqknorm_demo.7')
    assert code == 0 and {call.split('config/')[1][:6] for call in calls if 'train' in call} == {'qknorm'}


def test_a_study_is_made_after_the_measurement_with_its_flags_and_packed(queue, tmp_path):
    _, calls = queue('baseline_demo.7 +intervene "+probe --seeds=3"')
    out = tmp_path / 'out' / 'baseline_demo_7'
    assert set(calls[3:]) == {
        f'0 -m studies.intervene --ckpt {out}',
        f'0 -m studies.probe --ckpt {out} --seeds=3',
    }
    assert {'intervene.json', 'probe.json'} <= set(packed(tmp_path, 'baseline_demo_7'))


def test_a_study_that_is_missing_from_a_packed_run_is_made(queue, tmp_path):
    queue('baseline_demo.7 +intervene')
    _, calls = queue('baseline_demo.7 +intervene +probe')
    assert calls == [f'0 -m studies.probe --ckpt {tmp_path}/out/baseline_demo_7']


def test_of_what_waits_measurements_come_first_then_the_first_study_of_each_run(tmp_path):
    args = argparse.Namespace(limit=60, dataset=str(tmp_path), commit='', pack=tmp_path, runs=tmp_path)
    todo = recipe.Recipe(args, [])
    runs = recipe.read_queue('baseline_demo.1 +intervene +probe\nbaseline_demo.2 +intervene')
    for run in runs:
        todo.add_missing_studies(run)
    todo.add_job(0, runs[1], todo.measure)
    taken = [todo.next_job()[:2] for _ in range(4)]
    assert taken == [(0, 4), (1, 1), (1, 3), (2, 2)]


def test_a_mistake_of_ours_in_one_run_does_not_keep_the_others_waiting(queue, tmp_path, monkeypatch):
    pack_run = recipe.pack_run

    def broken(source, target):
        if 'baseline' in source.name:
            raise KeyError('streams')
        return pack_run(source, target)

    monkeypatch.setattr(recipe, 'pack_run', broken)
    code, _ = queue('baseline_demo.7\nledger_demo.7')
    assert code == 1 and packed(tmp_path, 'ledger_demo_7')


def test_runs_are_shared_by_the_gpus_and_each_is_trained_once(queue):
    text = ''.join(f'baseline_demo.{seed}\n' for seed in range(6))
    code, calls = queue(text, gpus='0,1')
    trained = [call for call in calls if 'train.py' in call]
    assert code == 0 and len(trained) == len(set(trained)) == 6
    assert {call[0] for call in trained} == {'0', '1'}


def test_a_run_that_fails_is_named_with_its_output_and_keeps_no_other_from_running(queue, tmp_path, capsys):
    code, calls = queue('baseline_demo.7\nledger_demo.7', FAIL='train.*baseline')
    said = capsys.readouterr().out
    assert code == 1 and 'baseline_demo_7: exit 1 of train' in said and 'it went wrong' in said
    assert 'not packed: baseline_demo_7' in said and packed(tmp_path, 'ledger_demo_7')


def test_a_study_that_fails_leaves_the_run_packed(queue, tmp_path, capsys):
    code, _ = queue('baseline_demo.7 +intervene +probe', FAIL='intervene')
    assert code == 0 and 'exit 1 of intervene' in capsys.readouterr().out
    assert 'probe.json' in packed(tmp_path, 'baseline_demo_7')


def test_a_run_whose_measurement_fails_is_measured_by_the_next_call(queue, tmp_path):
    assert queue('baseline_demo.7', FAIL='measure.*ckpt.pt')[0] == 1
    code, calls = queue('baseline_demo.7', FAIL='^$')
    assert code == 0 and packed(tmp_path, 'baseline_demo_7') and len(calls) == 2


def test_the_archive_holds_all_that_is_packed(queue, tmp_path):
    queue('baseline_demo.7\nledger_demo.7 +probe', f'--tgz={tmp_path}/all.tgz')
    with tarfile.open(tmp_path / 'all.tgz') as archive:
        names = set(archive.getnames())
    assert {'./baseline_demo_7/measure.json', './ledger_demo_7/probe.json'} <= names


def test_no_training_begins_that_would_not_end_in_time(queue, tmp_path, capsys):
    code, calls = queue('baseline_demo.7 ~5\nledger_demo.7 ~0.1', '--limit=300', '--reserve=100')
    assert code == 1 and 'baseline_demo_7 is not begun: ' in capsys.readouterr().out
    assert packed(tmp_path, 'ledger_demo_7') and not any('baseline' in call for call in calls)


def test_training_ends_before_the_limit_by_the_reserve_and_measuring_at_the_limit(tmp_path, monkeypatch):
    args = argparse.Namespace(limit=1000, reserve=300, dataset=str(tmp_path), commit='', settings=[])
    args.runs = args.pack = tmp_path
    todo, given = recipe.Recipe(args, []), {}

    def call(run, stage, command, gpu, seconds=None):
        given[stage] = seconds

    monkeypatch.setattr(todo, 'call', call)
    (run,) = recipe.read_queue('baseline_demo.1')
    todo.train(run, '0')
    todo.measure(run, '0')
    assert 600 < given['train'] <= 700 and given['measure'] is None


def test_a_process_whose_time_is_over_is_asked_to_end(tmp_path):
    args = argparse.Namespace(limit=1000, dataset=str(tmp_path), commit='')
    process = subprocess.Popen(['sleep', '1000'])
    recipe.Recipe(args, []).wait(process, 0.01)
    assert process.returncode == -signal.SIGTERM


def test_where_weights_stay_training_begins_whatever_it_takes(queue, tmp_path):
    code, _ = queue('baseline_demo.7 ~1000', '--limit=60', '--resumable')
    assert code == 0 and packed(tmp_path, 'baseline_demo_7')


def test_told_to_stop_it_lets_the_training_save_and_ends(queue, tmp_path):
    queue('')  # writes what the process below reads
    (tmp_path / 'runs.txt').write_text('baseline_demo.7\nledger_demo.7')
    code = f'from studies import recipe; recipe.PYTHON = {recipe.PYTHON!r}; recipe.main()'
    flags = ['--gpus=0', f'--dataset={tmp_path}/data', f'--runs={tmp_path}/out', f'--pack={tmp_path}/packed']
    process = subprocess.Popen(
        [sys.executable, '-c', code, f'{tmp_path}/runs.txt', *flags],
        cwd=ROOT,
        env={**os.environ, 'SLOW': 'baseline'},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.time() + 60
    while not (tmp_path / 'out/baseline_demo_7/begun').exists():
        assert time.time() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 1
    assert (tmp_path / 'out/baseline_demo_7/saved').exists() and not (tmp_path / 'out/ledger_demo_7').exists()


@pytest.mark.parametrize(
    'text, expected',
    [
        ('baseline_demo', 'is no run: expected <arm>_<scale>.<seed>'),
        ('nothing_demo.7', 'config/nothing_demo.py, which does not exist'),
        ('baseline_demo.7 fast', 'has a word that is none of'),
        ('baseline_demo.7 +dance', 'studies/dance.py, which does not exist'),
        ('baseline_demo.7\nbaseline_demo.7', 'baseline_demo_7 is twice in the queue'),
    ],
)
def test_a_mistake_in_the_queue_ends_in_a_sentence(text, expected):
    with pytest.raises(UserError) as error:
        recipe.read_queue(text)
    assert expected in str(error.value)


def test_comments_and_empty_lines_are_no_runs():
    assert [run.name for run in recipe.read_queue('\n# one\nbaseline_demo.7  # the first\n')] == [
        'baseline_demo_7'
    ]


def test_the_published_queue_begins_with_one_seed_of_the_published_arms(monkeypatch):
    names = [run.name for run in recipe.read_queue(recipe.QUEUE)]
    assert {name.removesuffix('_160m_1338') for name in names[:4]} == {
        'baseline',
        'ledger',
        'ledger_hs',
        'qknorm',
    }
    assert names.count('ledger_a0_160m_1340') == 1 and len(names) == 22


def test_a_tiny_model_is_trained_and_measured_on_the_cpu(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 4000).astype('<u2')
    (tmp_path / 'data').mkdir()
    for split in ('train', 'val'):
        ids.tofile(tmp_path / 'data' / f'{split}.bin')
    meta = {'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256}
    (tmp_path / 'data' / 'meta.json').write_text(json.dumps(meta))
    (tmp_path / 'runs.txt').write_text('ledger_demo.7 --commit_sparsity=0\n')
    size = ['--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16', '--batch_size=2', '--max_iters=2']
    flags = ['--gpus=', f'--dataset={tmp_path}/data', f'--runs={tmp_path}/out', f'--pack={tmp_path}/packed']
    command = [sys.executable, '-m', 'studies.recipe', f'{tmp_path}/runs.txt', *flags, *size]
    subprocess.run([*command, '--compile=False', '--eval_sequences=4'], cwd=ROOT, check=True)
    names = packed(tmp_path, 'ledger_a0_demo_7')
    assert names == ['log.jsonl', 'measure.json', 'measure_0.json', 'recipe.json']
