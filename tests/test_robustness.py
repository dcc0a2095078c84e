"""Nothing lost: what a run survives, and files that cannot hurt it."""

import copy
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from training import (
    ARMS,
    TORCHRUN,
    at_step,
    equal,
    flags,
    load,
    log,
    numbers,
    run,
    same_state,
    stop,
    write_dataset,
)

import measure
import train

NAN = float('nan')
pytestmark = pytest.mark.usefixtures('one_thread', 'signal_handlers')


def contents(folder='.'):
    return {
        str(path): sha256(path.read_bytes()).hexdigest() if path.is_file() else 'folder'
        for path in Path(folder).rglob('*')
    }


def is_the_run(out, straight):
    return (
        same_state(out / 'ckpt.pt', straight / 'ckpt.pt')
        and log(out) == log(straight)
        and not list(out.glob('*.tmp'))
    )


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp('data') / 'text')


@pytest.fixture(scope='module')
def straight(tmp_path_factory, dataset):
    """The folder of an undisturbed run of 20 steps; ckpt_prev.pt is at 10."""
    return run(dataset, tmp_path_factory.mktemp('straight') / 'out')


@pytest.fixture
def halfway(tmp_path, straight):
    """The folder of that run when it had taken 10 steps."""
    shutil.copytree(straight, tmp_path / 'halfway', ignore=shutil.ignore_patterns('ckpt.pt', 'ckpt_best.pt'))
    os.replace(tmp_path / 'halfway' / 'ckpt_prev.pt', tmp_path / 'halfway' / 'ckpt.pt')
    return tmp_path / 'halfway'


# ---- Killed


def process(argv, console, moment=None, byte=None, at_byte=signal.SIG_IGN):
    """What a process of `start` does: train.main, its console in a file. It is killed when it opens or
    renames a file of its run for the moment-th time; it can write no file beyond `byte`, where the write
    fails or, with at_byte=SIG_DFL, the process is killed."""
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    out, moments = (
        next((arg.partition('=')[2] for arg in argv if arg.startswith('--out_dir=')), ''),
        itertools.count(1),
    )

    def hook(event, args):
        if event in ('open', 'os.rename') and str(args[0]).startswith(out) and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if byte:
        signal.signal(signal.SIGXFSZ, at_byte)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
    train.main(argv)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """Returns start(*arguments of process) → a process of its own that trains, forked from one that has
    imported torch and this file. That one must not have computed anything: OpenMP's threads do not survive a
    fork."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_robustness', 'torch._dynamo'])

    def start(*args, **kwargs):
        child = context.Process(target=process, args=args, kwargs=kwargs, daemon=True)
        child.start()
        return child

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, sys.path)))
        start(['--help'], tmp_path_factory.mktemp('help') / 'console').join()
    return start


def test_a_run_killed_anywhere_and_restarted_until_it_ends_is_the_undisturbed_run(
    tmp_path, dataset, start, request
):
    settings = dict(ARMS['ledger'], max_iters=24, eval_interval=10, ckpt_interval=3, eval_sequences=4)
    console, whole, begin = tmp_path / 'console', tmp_path / 'undisturbed', time.perf_counter()
    start(flags(dataset, whole, **settings), console).join()
    seconds, size = time.perf_counter() - begin, (whole / 'ckpt.pt').stat().st_size
    rng, kills, wanted = random.Random(0), 0, request.config.getoption('--runs')
    while kills < wanted:
        out, status = tmp_path / f'run{kills}', None
        while status != 0:
            # Killed at some time, at some file, at some byte, in turns; left alone once that is enough.
            ways = [
                {},
                {'moment': rng.randrange(5, 40)},
                {'byte': rng.randrange(1000, size), 'at_byte': signal.SIG_DFL},
            ]
            how = ways[kills % 3] if kills < wanted else {}
            patience = rng.uniform(0, seconds) if kills < wanted and not how else 600
            begun = any((out / name).exists() for name in ('ckpt.pt', 'ckpt_prev.pt'))
            argv = flags(dataset, out, init_from='resume' if begun else 'auto', **settings)
            child = start(argv, console, **how)
            child.join(patience)
            child.kill()
            child.join()
            status = child.exitcode
            assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), console.read_text()
            kills += status < 0
            assert all(load(path) for path in out.glob('*.pt'))
        assert is_the_run(out, whole)


def test_two_processes_that_are_terminated_or_lose_one_end_with_a_sentence_and_resume(tmp_path, dataset):
    settings = dict(
        ARMS['ledger'],
        batch_size=8,
        max_iters=200,
        eval_interval=200,
        eval_sequences=4,
        ckpt_interval=50,
        log_interval=1,
        lr=1e-3,
    )

    def launch(until, act, **more):
        """Returns what two processes print from iteration `until` on, where act(process of the launcher)
        happens."""
        argv = [*TORCHRUN, *flags(dataset, tmp_path / 'two', **settings, **more)]
        launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert any(line.startswith(f'iter {until:6d}/200 | loss') for line in launcher.stdout)
        act(launcher.pid)
        printed = launcher.communicate(timeout=600)[0]
        assert launcher.returncode != 0
        return printed

    def kill_one(launcher):
        os.kill(
            int(Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()[1]), signal.SIGKILL
        )

    assert re.search(
        '^stopped by SIGTERM after iteration .*--init_from=resume',
        launch(30, lambda pid: os.kill(pid, signal.SIGTERM)),
        re.M,
    )
    printed = launch(60, kill_one, init_from='resume')
    one, two = (
        run(dataset, tmp_path / 'one', **settings),
        run(dataset, tmp_path / 'two', init_from='resume', **settings),
    )
    np.testing.assert_allclose(numbers(log(two)), numbers(log(one)), rtol=1e-5)
    assert re.search('^error: .*--init_from=resume', printed, re.M), printed


# ---- Started again


@pytest.mark.parametrize('init_from', ['auto', 'resume'])
def test_a_run_goes_on_from_its_newest_checkpoint(halfway, dataset, straight, init_from):
    assert is_the_run(run(dataset, halfway, init_from=init_from), straight)


def test_auto_starts_where_there_is_nothing(tmp_path, dataset, straight):
    assert is_the_run(run(dataset, tmp_path / 'out', init_from='auto'), straight)


def test_the_same_command_again_goes_on_and_then_says_that_the_run_has_ended(
    tmp_path, dataset, straight, monkeypatch, capsys
):
    command = flags(dataset, tmp_path / 'out', init_from='auto')
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda run: os.kill(os.getpid(), signal.SIGINT))
        assert stop(command) == 128 + signal.SIGINT
    train.main(command)
    assert is_the_run(tmp_path / 'out', straight)
    before = contents(tmp_path / 'out')
    capsys.readouterr()
    train.main(command)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match('.*out has taken its 20 steps already, .*--max_iters.*python measure.py --ckpt', last)
    assert contents(tmp_path / 'out') == before


def test_a_resume_finds_its_data_in_another_place(tmp_path, halfway, dataset, straight, monkeypatch, capsys):
    moved = shutil.copytree(dataset, tmp_path / 'moved')
    monkeypatch.chdir(tmp_path)
    run('./moved', halfway, init_from='resume')
    assert f"dataset '{dataset}' → './moved'" in capsys.readouterr().out
    assert is_the_run(halfway, straight) and load(halfway / 'ckpt.pt')['config']['dataset'] == './moved'
    assert moved.exists()


def test_a_setting_that_the_checkpoint_has_never_heard_of_had_its_default(halfway, dataset, straight):
    checkpoint = load(halfway / 'ckpt.pt')
    for name in ('bos', 'decay_all', 'wandb', 'arm', 'min_lr_ratio'):
        del checkpoint['config'][name]
    del checkpoint['model_args']['arm'], checkpoint['scaler']
    torch.save(checkpoint, halfway / 'ckpt.pt')
    sentence = stop(flags(dataset, halfway, init_from='resume', min_lr_ratio=0.5))
    assert 'belongs to another run (min_lr_ratio 0.1 → 0.5)' in sentence
    assert is_the_run(run(dataset, halfway, init_from='resume'), straight)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(
    tmp_path, dataset, monkeypatch, capsys, number
):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', refuse)
    out = run(dataset, tmp_path / 'out', max_iters=2)
    said = [line for line in capsys.readouterr().out.splitlines() if 'has no locks' in line]
    assert len(said) == 1 and f'{out}' in said[0]
    assert load(out / 'ckpt.pt')['iter_num'] == 2


def test_a_run_whose_console_is_full_trains_on(tmp_path, dataset, straight, start):
    child = start(flags(dataset, tmp_path / 'out'), '/dev/full')
    child.join(600)
    assert child.exitcode == 0 and is_the_run(tmp_path / 'out', straight)


def test_a_run_whose_reader_is_gone_trains_on(tmp_path, dataset, straight, start):
    os.mkfifo(tmp_path / 'console')
    child = start(flags(dataset, tmp_path / 'out'), tmp_path / 'console')
    with open(tmp_path / 'console') as reader:
        assert 'parameters' in reader.readline()
    child.join(600)
    assert child.exitcode == 0 and is_the_run(tmp_path / 'out', straight)


def flip(path, where):
    """Changes one bit of a file, at `where` of its length."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 16
    path.write_bytes(content)


DAMAGES = {
    'empty': lambda path: path.write_bytes(b''),
    'truncated': lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    'a bit flipped in a tensor': lambda path: flip(path, 0.5),
    'a bit flipped in the pickle': lambda path: flip(path, 0.01),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path, dataset, straight, capsys, damage
):
    out = shutil.copytree(straight, tmp_path / 'out')
    DAMAGES[damage](out / 'ckpt.pt')
    run(dataset, out, init_from='auto')
    printed = capsys.readouterr().out
    assert printed.startswith(f'{out}/ckpt.pt ') and f'resuming {out}/ckpt_prev.pt at iteration 10' in printed
    assert is_the_run(out, straight) and load(out / 'ckpt_prev.pt')['iter_num'] == 10


def test_where_both_checkpoints_are_damaged_auto_starts_again(tmp_path, dataset, straight):
    out = shutil.copytree(straight, tmp_path / 'out')
    for name in ('ckpt.pt', 'ckpt_prev.pt'):
        DAMAGES['truncated'](out / name)
    assert is_the_run(run(dataset, out, init_from='auto'), straight)


def test_a_resume_with_another_micro_batch_is_the_same_run(halfway, dataset, straight):
    np.testing.assert_allclose(
        numbers(log(run(dataset, halfway, init_from='resume', micro_batch=1))),
        numbers(log(straight)),
        rtol=1e-5,
    )


def test_a_resume_may_change_what_no_step_depends_on_and_says_so(halfway, dataset, capsys):
    changes = dict(
        max_iters=22, log_interval=3, eval_interval=11, eval_sequences=8, ckpt_interval=4, device='auto'
    )
    run(dataset, halfway, init_from='resume', **changes)
    said = capsys.readouterr().out.splitlines()[0]
    assert all(
        re.search(f'{key} [^ ]* → {value!r}', said)
        for key, value in {**changes, 'out_dir': str(halfway)}.items()
    )
    assert load(halfway / 'ckpt.pt')['iter_num'] == 22


def test_a_resume_that_contradicts_its_checkpoint_is_refused_with_the_list_of_differences(
    tmp_path, halfway, dataset
):
    other = write_dataset(tmp_path / 'other', seed=7)
    changes = dict(dataset=str(other), n_layer=2, seed=1, residual='ledger', lr=0.02)
    before = contents(halfway)
    for some in [{key: changes[key]} for key in changes] + [changes]:
        sentence = stop(flags(**{'dataset': dataset, 'out': halfway, 'init_from': 'resume', **some}))
        assert 'ckpt.pt belongs to another run' in sentence and '\n' not in sentence
        assert {
            key for key, value in changes.items() if re.search(f'{key} [^ ]* → {value!r}', sentence)
        } == some.keys()
    assert contents(halfway) == before


@pytest.mark.parametrize('init_from', ['scratch', 'auto', 'resume'])
def test_a_second_run_in_one_folder_is_refused_and_the_first_unharmed(
    tmp_path, dataset, straight, monkeypatch, init_from
):
    out, sentences = tmp_path / 'out', []
    at_step(monkeypatch, 12, lambda first: sentences.append(stop(flags(dataset, out, init_from=init_from))))
    assert is_the_run(run(dataset, out), straight)
    assert sentences == [f'error: another run is writing to {out}: wait for it, or name another --out_dir']


@pytest.mark.parametrize('arm', ARMS)
def test_the_same_seed_gives_the_same_hundred_losses_bit_for_bit(tmp_path, dataset, monkeypatch, arm):
    losses, take = [], train.Run.step
    monkeypatch.setattr(train.Run, 'step', lambda run: losses.append(take(run)) or losses[-1])
    for name in ('one', 'two'):
        run(
            dataset,
            tmp_path / name,
            max_iters=100,
            eval_interval=100,
            ckpt_interval=100,
            eval_sequences=4,
            **ARMS[arm],
        )
    assert len(losses) == 200 and equal(losses[:100], losses[100:])


# ---- No room, and numbers gone wrong


def recovers(sentence, out, dataset, straight):
    """Checks what a run said that could not write after step 10, what it left, and that it resumes."""
    assert re.match(f'error: .*{out}.*--init_from=resume', sentence) and '\n' not in sentence
    assert load(out / 'ckpt.pt')['iter_num'] == 10 and not list(out.glob('*.tmp'))
    assert is_the_run(run(dataset, out, init_from='resume'), straight)


@pytest.mark.parametrize(
    'left, said',
    [(100_000, r'ckpt\w*.pt, which needs about [0-9,]+ bytes'), (0, 'log.jsonl')],
    ids=['a checkpoint', 'a log line'],
)
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, dataset, straight, monkeypatch, left, said):
    disk, filler = tmp_path, tmp_path / 'filler'
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], capture_output=True
    ).returncode:
        pytest.skip('only root can mount a small tmpfs')

    def fill(run):
        with pytest.raises(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - left)

    try:
        with monkeypatch.context() as patch:
            at_step(patch, 10, fill)
            sentence = stop(flags(dataset, disk / 'out'))
        assert re.search(said, sentence)
        assert stop(flags(dataset, disk / 'out', init_from='resume')).startswith('error: cannot write')
        filler.unlink()
        recovers(sentence, disk / 'out', dataset, straight)
    finally:
        subprocess.run(['umount', '-l', disk])


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint_whole(
    tmp_path, halfway, dataset, straight, start
):
    start(flags(dataset, halfway, init_from='resume'), tmp_path / 'console', byte=100_000).join()
    sentence = (tmp_path / 'console').read_text().splitlines()[-1]
    needed = re.search(r'cannot write .*/ckpt\w*.pt, which needs about ([0-9,]+) bytes', sentence)[1]
    assert int(needed.replace(',', '')) == pytest.approx((straight / 'ckpt.pt').stat().st_size, rel=0.2)
    recovers(sentence, halfway, dataset, straight)


def test_a_folder_that_turns_read_only_leaves_the_last_checkpoint_whole(
    tmp_path, dataset, straight, monkeypatch
):
    out = tmp_path / 'out'
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 10, lambda run: subprocess.run(['chattr', '+i', out], check=True))
            sentence = stop(flags(dataset, out))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('permissions do not bind root, and there is no chattr +i here')
    finally:
        shutil.which('chattr') and subprocess.run(['chattr', '-i', out])
    assert re.search(r'cannot write .*/ckpt\w*.pt, which needs about [0-9,]+ bytes', sentence)
    recovers(sentence, out, dataset, straight)


def test_a_token_file_cut_short_under_a_run_ends_it_with_a_sentence(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / 'text')
    at_step(monkeypatch, 12, lambda run: os.truncate(folder / 'train.bin', 1000))
    assert re.search('train.bin ends at token .*cut short', stop(flags(folder, tmp_path / 'out')))
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 10


@pytest.mark.parametrize(
    'planted, named',
    [('loss', 'the output of sublayers.1.function'), ('gradient', 'the gradient of norm.weight')],
)
def test_a_number_gone_wrong_never_reaches_the_weights(tmp_path, dataset, monkeypatch, planted, named):
    seen, bad = {}, {}

    def state(run):
        return copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()['state']))

    def plant(run):  # step 10 is bad whenever it is taken; those after it are not
        batch = next(run.micro_batches(10))[0]
        run.model.register_forward_pre_hook(lambda model, args: bad.update(now=torch.equal(args[0], batch)))
        if planted == 'loss':
            run.model.sublayers[1].function.register_forward_hook(
                lambda module, args, output: output * NAN if bad['now'] else output
            )
        else:
            run.model.norm.weight.register_hook(lambda gradient: gradient * NAN if bad['now'] else gradient)
        seen.update(run=run, state=state(run), files=contents(tmp_path / 'out'))

    at_step(monkeypatch, 10, plant)
    sentence = stop(flags(dataset, tmp_path / 'out', log_interval=100))
    assert 'step 10 ' in sentence and named in sentence and '\n' not in sentence
    assert (
        seen['run'].iter_num == 14
    )  # where the flag was read: the good steps after the bad one are masked too
    assert equal(state(seen['run']), seen['state']) and contents(tmp_path / 'out') == seen['files']


# ---- Broken files


@pytest.fixture(scope='module')
def place(tmp_path_factory, dataset):
    """A folder with a dataset in text/ and a run of four steps in run/."""
    folder = tmp_path_factory.mktemp('place')
    shutil.copytree(dataset, folder / 'text')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run('./text', 'run', max_iters=4, eval_interval=4)
    return folder


class Malice:
    def __reduce__(self):
        return os.system, ('touch executed',)


def put(path, content):
    """Returns what writes a file, or makes a folder where content is None."""

    def spoil():
        os.remove(path)
        Path(path).mkdir() if content is None else Path(path).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )

    return spoil


def saved(change):
    """Returns what saves the run's checkpoint after change(checkpoint)."""

    def spoil():
        checkpoint = load('run/ckpt.pt')
        change(checkpoint)
        torch.save(checkpoint, 'run/ckpt.pt')

    return spoil


def tokens(split, change):
    return lambda: change(np.fromfile(f'text/{split}.bin', dtype='<u2')).tofile(f'text/{split}.bin')


def meta(**values):
    return lambda: Path('text/meta.json').write_text(
        json.dumps({**json.loads(Path('text/meta.json').read_text()), **values})
    )


NANOGPT = dict(
    model={},
    optimizer={},
    iter_num=9,
    best_val_loss=3.0,
    config={'dataset': 'openwebtext'},
    data_sha256=None,
    model_args=dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False, vocab_size=50304, dropout=0.0
    ),
)
CHECKPOINTS = {  # what is wrong with run/ckpt.pt
    'a pickle that runs a command': put('run/ckpt.pt', pickle.dumps(Malice())),
    'a checkpoint that runs a command': saved(lambda c: c.update(config=Malice())),
    **{name: lambda damage=damage: damage(Path('run/ckpt.pt')) for name, damage in DAMAGES.items()},
    'text': put('run/ckpt.pt', 'a checkpoint\n'),
    'a folder': put('run/ckpt.pt', None),
    'a tensor': lambda: torch.save(torch.zeros(3), 'run/ckpt.pt'),
    'of nanoGPT': saved(lambda c: c.update(NANOGPT)),
    'weights that are NaN': saved(lambda c: c['model']['head.weight'].fill_(NAN)),
    'weights that lack one': saved(lambda c: c['model'].pop('head.weight')),
    'weights of another shape': saved(lambda c: c['model'].update({'norm.weight': torch.ones(3)})),
    'weights that are text': saved(lambda c: c.update(model='weights')),
    'no weights': saved(lambda c: c.pop('model')),
    'a config that is a list': saved(lambda c: c.update(config=[])),
    'a config without a dataset': saved(lambda c: c['config'].pop('dataset')),
    'model_args that are a list': saved(lambda c: c.update(model_args=[])),
    'model_args without a size': saved(lambda c: c['model_args'].pop('vocab_size')),
}
FOR_TRAINING = {  # and with what only a resume reads
    'no optimizer': saved(lambda c: c.pop('optimizer')),
    'an optimizer of a larger model': saved(
        lambda c: c['optimizer']['state'][0].update(exp_avg=torch.zeros(9999))
    ),
    'an optimizer without a state': saved(lambda c: c['optimizer'].update(state={})),
    'an optimizer that is NaN': saved(lambda c: c['optimizer']['state'][0]['exp_avg'].fill_(NAN)),
    'an optimizer without a step': saved(lambda c: c['optimizer']['state'][0].pop('step')),
    'an iteration below 0': saved(lambda c: c.update(iter_num=-4)),
    'an iteration that is text': saved(lambda c: c.update(iter_num='four')),
    'no best_val_loss': saved(lambda c: c.pop('best_val_loss')),
}
DATA = {  # what is wrong with the dataset: how, and what is said
    'odd length': (
        put('text/train.bin', b'\x01\x00' * 999 + b'\x01'),
        'train.bin has an odd number of bytes',
    ),
    'big-endian': (
        tokens('train', np.ndarray.byteswap),
        'train.bin holds token id .* beyond the vocabulary .* little-endian',
    ),
    'out of vocabulary': (
        tokens('val', lambda ids: ids + 200),
        'val.bin holds token id .* beyond the vocabulary of 257: .* another tokenizer',
    ),
    'shorter than a block': (
        tokens('train', lambda ids: ids[:16]),
        'train.bin holds 16 tokens, fewer than the 17',
    ),
    'empty': (put('text/val.bin', ''), 'val.bin holds 0 tokens'),
    'missing': (lambda: os.remove('text/train.bin'), 'cannot read text/train.bin .*prepare.py'),
    'a folder': (put('text/val.bin', None), 'cannot read text/val.bin .*prepare.py'),
    'meta.json without keys': (
        put('text/meta.json', '{"tokenizer": "bytes"}'),
        'meta.json lacks vocab_size, eot: .*prepare.py',
    ),
    'meta.json of text': (put('text/meta.json', 'bytes'), 'meta.json is not readable as JSON .*prepare.py'),
    'meta.json with a list': (
        put('text/meta.json', '["tokenizer", "vocab_size", "eot"]'),
        'meta.json .*prepare.py',
    ),
    'meta.json a folder': (put('text/meta.json', None), 'meta.json is not readable as JSON .*prepare.py'),
    'a vocabulary of text': (
        meta(vocab_size='257'),
        "meta.json: vocab_size is '257', expected a whole number",
    ),
    'a vocabulary of 0': (meta(vocab_size=0), 'meta.json: vocab_size is 0, expected'),
    'a vocabulary of 70000': (meta(vocab_size=70000), 'meta.json: vocab_size is 70000, expected'),
    'another vocabulary': (meta(vocab_size=300), 'ckpt.pt .*257 → 300'),
    'an end of text beyond the vocabulary': (meta(eot=257), 'meta.json: eot is 257, expected'),
    'a broken log': (put('run/log.jsonl', '{"iter": 0}\n{"it\n{"iter": 4}\n'), 'log.jsonl'),
    'a log of other lines': (put('run/log.jsonl', '{"step": 0}\n5\n'), 'log.jsonl'),
    'a log that is a folder': (put('run/log.jsonl', None), 'log.jsonl'),
}
CONFIGS = {  # a config file, and what is said
    'n_layrs = 2': "mine.py, line 1: there is no setting 'n_layrs', did you mean 'n_layer'",
    "lr = '3e-4'": "mine.py, line 1: lr is '3e-4', expected a number",
    'n_layer = -2': 'n_layer is -2: expected',
    'batch_size = 0': 'batch_size is 0: expected',
    "residual = 'leger'": "residual is 'leger': expected one of baseline, ledger",
    "dtype = 'float8'": "dtype is 'float8': expected one of",
    'n_embd = 100': 'n_embd = 100 is not divisible by n_head = 12',
    "snapshots = '1;2'": "snapshots is '1;2': expected",
    "lr = float('nan')": 'lr is nan: expected',
    'beta2 = 1.0': 'beta2 is 1.0: expected',
    'seed = 2**70': 'seed is [0-9]*: expected',
    "residual = 'ledger'\ncommit_sparsity = float('nan')": 'commit_sparsity is nan: expected',
    "residual = 'ledger'\ndecode_gamma = float('inf')": 'decode_gamma is inf: expected',
    'lr = "\0"': 'mine.py, line .: (SyntaxError|ValueError)',
}
COMMANDS = {  # settings of a command line beside those that would resume the run, and what is said
    'no such dataset': (dict(dataset='./txt'), 'cannot read txt/train.bin .*prepare.py'),
    'over a run': (dict(init_from='scratch'), 'run holds a run already: .*--init_from=resume'),
    'nothing to resume': (dict(out='nowhere'), 'no checkpoint in nowhere to resume: start without'),
    'a file for a folder': (
        dict(out='text/val.bin', init_from='auto'),
        'cannot write text/val.bin .*--out_dir',
    ),
    'a micro_batch that does not divide': (
        dict(micro_batch=3),
        'micro_batch = 3 does not divide the 4 sequences',
    ),
    'a device that is not there': (
        dict(device='cuda'),
        'device=cuda, but PyTorch sees 0 GPUs .*--device=cpu',
    ),
}


def resume(**settings):
    return flags(
        **{
            'dataset': './text',
            'out': 'run',
            'max_iters': 8,
            'eval_interval': 4,
            'init_from': 'resume',
            **settings,
        }
    )


MEASURE = ['--ckpt=run', '--sequences=8', '--device=cpu']
BROKEN = {  # main, its command line, what breaks the place, and what is said
    **{
        f'checkpoint: {name}, resumed': (train.main, resume(), spoil, 'run/ckpt.pt')
        for name, spoil in {**CHECKPOINTS, **FOR_TRAINING}.items()
    },
    **{
        f'checkpoint: {name}, measured': (measure.main, MEASURE, spoil, 'run/ckpt.pt')
        for name, spoil in CHECKPOINTS.items()
    },
    **{f'data: {name}': (train.main, resume(), spoil, said) for name, (spoil, said) in DATA.items()},
    **{
        f'config: {text!r}': (
            train.main,
            ['mine.py'],
            lambda text=text: Path('mine.py').write_text(text),
            said,
        )
        for text, said in CONFIGS.items()
    },
    **{
        f'command: {name}': (train.main, resume(**settings), lambda: None, said)
        for name, (settings, said) in COMMANDS.items()
    },
    'measuring nothing': (
        measure.main,
        ['--ckpt=text'],
        lambda: None,
        'no ckpt.pt in text or below it: train a run',
    ),
    'measuring a missing file': (
        measure.main,
        ['--ckpt=run/ckpt_7.pt'],
        lambda: None,
        'no checkpoint run/ckpt_7.pt: train one',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_input_ends_in_one_sentence_and_changes_nothing(tmp_path, place, monkeypatch, case):
    main, argv, spoil, said = BROKEN[case]
    monkeypatch.chdir(shutil.copytree(place, tmp_path / 'place'))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    spoil()
    before = contents()
    sentence = stop(argv, main)
    assert str(sentence).startswith('error: ') and '\n' not in sentence and re.search(said, sentence), (
        sentence
    )
    assert contents() == before


@pytest.mark.parametrize(
    'change',
    [
        lambda o: o['param_groups'][0]['params'].reverse(),
        lambda o: o['state'][1].update(exp_avg=torch.zeros(1, 1).expand(16, 16)),
    ],
    ids=['parameters that change places', 'a tensor larger than its memory'],
)
def test_an_optimizer_from_elsewhere_is_never_written_past_its_end(tmp_path, halfway, dataset, start, change):
    checkpoint = load(halfway / 'ckpt.pt')
    assert checkpoint['optimizer']['state'][1]['exp_avg'].shape == (16, 16)
    change(checkpoint['optimizer'])
    torch.save(checkpoint, halfway / 'ckpt.pt')
    child = start(
        flags(dataset, halfway, init_from='resume', max_iters=200), tmp_path / 'console'
    )  # of its own: this one would die of it
    child.join(600)
    said = (tmp_path / 'console').read_text().splitlines()[-1]
    assert (child.exitcode, said[:6]) in ((1, 'error:'), (0, 'done: ')), said


def test_the_shell_sees_the_sentence_a_status_and_no_traceback(tmp_path, place, monkeypatch):
    started = []
    for case in (
        'checkpoint: a checkpoint that runs a command, resumed',
        'checkpoint: truncated, measured',
        "config: 'n_layrs = 2'",
    ):
        main, argv, spoil, said = BROKEN[case]
        monkeypatch.chdir(shutil.copytree(place, tmp_path / main.__module__ / str(len(argv))))
        spoil()
        argv = [sys.executable, sys.modules[main.__module__].__file__, *argv]
        started.append(
            (
                said,
                os.getcwd(),
                contents(os.getcwd()),
                subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
            )
        )
    for said, where, before, child in started:
        error = child.communicate(timeout=600)[1]
        assert (
            child.returncode == 1
            and error.startswith('error: ')
            and error.count('\n') == 1
            and re.search(said, error)
        ), error
        assert contents(where) == before
