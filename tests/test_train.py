"""The job: what a command line means, what a run leaves behind, and that it is the same run however it is cut
up."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training import (
    ARMS,
    LOGGED,
    TIMES,
    TINY,
    TORCHRUN,
    at_step,
    flags,
    load,
    log,
    numbers,
    recomputed,
    run,
    same_state,
    stop,
    write_dataset,
)

import data.loader
import measure
import train
from data.loader import UserError
from data.pysource import prepare
from model import GPT
from train import Config, World, learning_rate, make_optimizer

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.usefixtures('one_thread', 'signal_handlers')
every_arm = pytest.mark.parametrize('arm', ARMS)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp('data') / 'text')


@pytest.fixture(scope='module')
def straight(tmp_path_factory, dataset):
    """The folder of a run of 20 steps for each arm."""
    out = tmp_path_factory.mktemp('straight')
    return {
        arm: run(dataset, out / arm, micro_batch=2, snapshots='0,3', **settings)
        for arm, settings in ARMS.items()
    }


# ---- The batch and the step


@pytest.mark.parametrize('warmup', [0, 1, 30])
def test_the_learning_rate_climbs_in_a_line_and_falls_along_a_cosine_to_a_tenth(warmup):
    config = Config(lr=0.3, warmup_iters=warmup, max_iters=100)
    fall = np.linspace(0, np.pi / 2, 101 - warmup)
    expected = np.concatenate(
        [0.3 * np.arange(1, warmup + 1) / max(1, warmup), 0.3 - 0.27 * np.sin(fall) ** 2]
    )
    np.testing.assert_allclose([learning_rate(it, config) for it in range(101)], expected, rtol=1e-12)
    assert max(expected) == 0.3 and math.isclose(learning_rate(100, config), 0.03)


def test_a_batch_that_the_processes_cannot_share_is_refused_with_what_they_can():
    world = World('cpu')
    world.size = 4
    assert [world.share(Config(batch_size=24, micro_batch=n)) for n in (0, 1, 3, 6, 12)] == [
        (6, 6),
        (6, 1),
        (6, 3),
        (6, 6),
        (6, 6),
    ]
    with pytest.raises(UserError, match='micro_batch = 4 does not divide the 6 sequences'):
        world.share(Config(batch_size=24, micro_batch=4))
    with pytest.raises(
        UserError, match='batch_size = 18 cannot be shared by 4 processes: it can by 1, 2, 3, 6, 9, 18$'
    ):
        world.share(Config(batch_size=18))


def test_gradient_accumulation_is_the_whole_batch(tmp_path, dataset, capsys):
    seen = []
    for n in (4, 2, 1):
        lines = log(
            run(dataset, tmp_path / str(n), micro_batch=n, eval_sequences=4, log_interval=1, **ARMS['ledger'])
        )
        printed = [float(loss) for loss in re.findall(r' \| loss ([0-9.]+)', capsys.readouterr().out)]
        assert len(printed) == 20
        seen.append((numbers(lines), printed))
    for logged, printed in seen[1:]:
        np.testing.assert_allclose(logged, seen[0][0], rtol=1e-5)
        np.testing.assert_allclose(printed, seen[0][1], atol=2e-4)


def test_a_step_is_adamw_with_clipped_gradients_on_the_windows_of_its_seed_and_number(tmp_path, dataset):
    adamw = dict(beta1=0.8, beta2=0.9, weight_decay=0.3, grad_clip=0.1)
    settings = dict(ARMS['ledger'], **adamw, max_iters=3, warmup_iters=2, seed=5)
    trained = load(run(dataset, tmp_path / 'out', **settings) / 'ckpt.pt')['model']
    config = Config(**{**TINY, **settings}, vocab_size=257)
    torch.manual_seed(5)
    model, tokens = GPT(config.model_config()), data.loader.Tokens(dataset, 'train', 16, 257)
    m, v = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    for it in range(3):
        gradients = torch.autograd.grad(
            model(*tokens.windows(tokens.training_starts(5, it, 4)))[0], list(model.parameters())
        )
        norm, lr = math.sqrt(sum(g.double().square().sum() for g in gradients)), learning_rate(it, config)
        assert norm > 0.1
        for p, g, m_p, v_p in zip(model.parameters(), gradients, m, v):
            g = g * 0.1 / norm
            m_p.copy_(0.8 * m_p + 0.2 * g)
            v_p.copy_(0.9 * v_p + 0.1 * g * g)
            decay = lr * 0.3 if p.ndim == 2 else 0
            p.data = (1 - decay) * p.data - lr * m_p / (1 - 0.8 ** (it + 1)) / (
                (v_p / (1 - 0.9 ** (it + 1))).sqrt() + 1e-8
            )
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.data, rtol=1e-4, atol=1e-6)


@every_arm
def test_the_loss_goes_down(straight, arm):
    first, *_, last = log(straight[arm])
    assert abs(first['val_loss'] - math.log(257)) < 0.1
    assert last['train_loss'] < first['train_loss'] - 1 and last['val_loss'] < first['val_loss'] - 1


@every_arm
def test_exactly_matrices_and_embeddings_decay(arm):
    model = GPT(Config(**{**TINY, **ARMS[arm]}, qk_norm=True, vocab_size=257).model_config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {
        f'{name}.weight'
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    decay = {
        names[id(p)]: group['weight_decay']
        for group in make_optimizer(model, Config(weight_decay=0.3)).param_groups
        for p in group['params']
    }
    assert decay == {name: 0.3 if name in matrices else 0.0 for name in names.values()}


@every_arm
def test_with_decay_all_every_parameter_decays(arm):
    config = Config(**{**TINY, **ARMS[arm]}, qk_norm=True, weight_decay=0.3, decay_all=True, vocab_size=257)
    model = GPT(config.model_config())
    groups = make_optimizer(model, config).param_groups
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    assert {group['weight_decay'] for group in groups} == {0.3}


@pytest.mark.parametrize(
    'arm, bf16_streams, precision',
    [
        ('baseline', False, 'bfloat16 autocast, float32 streams'),
        ('ledger', True, 'bfloat16 autocast, bfloat16 streams'),
    ],
)
def test_bfloat16_stays_near_float32(tmp_path, dataset, straight, arm, bf16_streams, precision):
    lines = log(run(dataset, tmp_path / 'out', dtype='bfloat16', bf16_streams=bf16_streams, **ARMS[arm]))
    assert lines[0]['precision'] == precision
    losses = {line['iter']: line['val_loss'] for line in log(straight[arm])}
    np.testing.assert_allclose(
        [line['val_loss'] for line in lines], [losses[line['iter']] for line in lines], rtol=0.02
    )


@every_arm
def test_float16_stays_near_float32_and_resumes_bit_for_bit(tmp_path, dataset, straight, arm):
    out, settings = tmp_path / 'out', dict(dtype='float16', micro_batch=2, **ARMS[arm])
    lines = log(run(dataset, out, **settings))
    assert lines[0]['precision'] == 'float16 autocast, float32 streams'
    losses = {line['iter']: line['val_loss'] for line in log(straight[arm])}
    np.testing.assert_allclose(
        [line['val_loss'] for line in lines], [losses[line['iter']] for line in lines], rtol=0.05
    )
    resumed = shutil.copytree(out, tmp_path / 'resumed')
    os.replace(resumed / 'ckpt_prev.pt', resumed / 'ckpt.pt')
    run(dataset, resumed, init_from='resume', **settings)
    assert same_state(resumed / 'ckpt.pt', out / 'ckpt.pt') and log(resumed) == log(out)


def test_in_float16_a_step_that_overflows_is_skipped_and_the_scale_of_the_loss_halved(
    tmp_path, dataset, monkeypatch
):
    seen = []

    def overflow(run):
        weights = {name: p.clone() for name, p in run.model.state_dict().items()}
        seen.append((weights, run.scaler.get_scale()))
        gain = run.model.norm.weight
        handle = gain.register_hook(lambda gradient: gradient * math.inf)
        monkeypatch.setattr(run, 'after', lambda: handle.remove(), raising=False)

    def afterwards(run):
        run.after()
        weights, scale = seen[0]
        assert all(torch.equal(weights[name], p) for name, p in run.model.state_dict().items())
        assert run.scaler.get_scale() == scale / 2

    at_step(monkeypatch, 12, afterwards)
    at_step(monkeypatch, 11, overflow)
    out = run(dataset, tmp_path / 'out', dtype='float16')
    assert load(out / 'ckpt.pt')['iter_num'] == 20 and log(out)[-1]['val_loss'] < log(out)[0]['val_loss'] - 1


@pytest.mark.slow
def test_the_compiled_run_is_the_eager_run(tmp_path, dataset, straight):
    compiled = log(run(dataset, tmp_path / 'out', compile=True, snapshots='0,3', **ARMS['ledger']))
    np.testing.assert_allclose(
        [line['val_loss'] for line in compiled],
        [line['val_loss'] for line in log(straight['ledger'])],
        rtol=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize('arm', ARMS)
def test_on_a_gpu_cuda_graphs_take_the_same_steps(tmp_path, dataset, arm):
    torch.compiler.reset()  # or the compilations of all tests count against one limit
    plain, graphs = (
        log(
            run(
                dataset,
                tmp_path / str(on),
                device='cuda',
                dtype='float32',
                compile=True,
                cuda_graphs=on,
                micro_batch=2,
                **ARMS[arm],
            )
        )
        for on in (False, True)
    )
    np.testing.assert_allclose(
        [line['val_loss'] for line in graphs], [line['val_loss'] for line in plain], rtol=1e-4
    )


# ---- The record


@every_arm
def test_the_log_has_a_line_at_zero_at_powers_of_two_at_every_interval_and_at_the_end(straight, arm):
    its = [line['iter'] for line in log(straight[arm])]
    assert its == sorted(set(its)) and {0, 1, 2, 4, 8, 16, 7, 14, 20} <= set(its)


@every_arm
def test_a_log_line_lacks_nothing_that_later_work_reads(straight, arm):
    per_sublayer = {'top1', 'top2', 'top3', *LOGGED}
    assert TIMES <= json.loads((straight[arm] / 'log.jsonl').read_text().splitlines()[-1]).keys()
    for line in log(straight[arm]):
        assert {
            'iter',
            'tokens',
            'train_loss',
            'val_loss',
            'lr',
            'commit_rate',
            'precision',
            'streams',
        } <= line.keys()
        assert line['tokens'] == line['iter'] * 4 * 16 and math.isclose(
            line['lr'], learning_rate(line['iter'], Config(**TINY))
        )
        assert len(line['commit_rate']) == (2 if arm == 'ledger' else 0) and all(
            0 < c < 1 for c in line['commit_rate']
        )
        assert set(line['streams']) == ({'D', 'C'} if arm == 'ledger' else {'h'})
        for stream in line['streams'].values():
            assert all(len(stream[key]) == 2 and all(map(math.isfinite, stream[key])) for key in per_sublayer)
            assert (
                0 <= stream['persistence'] <= 1
                and stream['dominant_dim'] in range(16)
                and stream['start_dim'] in range(16)
            )


def test_a_loss_that_is_not_finite_is_null_in_the_log_and_saved_nowhere(tmp_path, dataset):
    settings = dict(lr=1e30, eval_interval=1, ckpt_interval=1, warmup_iters=0, snapshots='1')
    sentence = stop(flags(dataset, tmp_path / 'out', **settings))
    assert re.match('error: the loss is not finite at iteration 1, .*lower --lr', sentence)
    assert '\n' not in sentence and not list((tmp_path / 'out').glob('*.pt'))
    written = (tmp_path / 'out' / 'log.jsonl').read_text()
    assert 'NaN' not in written and 'Infinity' not in written
    assert [line['val_loss'] is None for line in log(tmp_path / 'out')] == [False, True]


class WandB:
    """What train.py uses of wandb."""

    def __init__(self, refuses=''):
        self.lines, self.settings, self.refuses = [], None, refuses

    def init(self, **settings):
        if self.refuses:
            raise ValueError(self.refuses)
        self.settings = settings
        return self

    def log(self, values, step):
        self.lines.append((step, values))


def test_the_record_goes_to_weights_and_biases_as_well(tmp_path, dataset, monkeypatch):
    wandb = WandB()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    lines = log(run(dataset, tmp_path / 'out', wandb='outliers', log_interval=5, **ARMS['ledger']))
    assert (wandb.settings['project'], wandb.settings['name']) == ('outliers', 'out')
    assert wandb.settings['config']['lr'] == TINY['lr']
    logged = {step: values for step, values in wandb.lines if 'val_loss' in values}
    assert list(logged) == [line['iter'] for line in lines]
    for line in lines:
        sent = logged[line['iter']]
        assert sent['val_loss'] == line['val_loss']
        assert sent['streams/C/norm/1'] == line['streams']['C']['norm'][1]
        assert sent['commit_rate/0'] == line['commit_rate'][0]
    assert [step for step, values in wandb.lines if 'loss' in values] == [1, 5, 10, 15, 20]


@pytest.mark.parametrize(
    'wandb, said', [(None, 'not installed .pip install wandb'), (WandB(refuses='no account'), 'no account')]
)
def test_without_weights_and_biases_a_run_says_so_and_goes_on(
    tmp_path, dataset, monkeypatch, capsys, wandb, said
):
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    out = run(dataset, tmp_path / 'out', wandb='outliers', max_iters=2)
    assert re.search(f'^--wandb=outliers: .*{said}.*goes on without', capsys.readouterr().out, re.M)
    assert load(out / 'ckpt.pt')['iter_num'] == 2


@every_arm
def test_every_file_of_a_run_has_its_role(straight, dataset, arm):
    out, lines = straight[arm], {line['iter']: line for line in log(straight[arm])}
    files = {path.name: load(path) for path in out.glob('*.pt')}
    assert {name: file['iter_num'] for name, file in files.items()} == {
        'ckpt.pt': 20,
        'ckpt_prev.pt': 10,
        'ckpt_best.pt': 20,
        'ckpt_0.pt': 0,
        'ckpt_3.pt': 3,
    }
    assert {path.name for path in out.iterdir()} == {*files, 'log.jsonl', 'lock'}
    for name, file in files.items():
        assert {'model', 'model_args', 'iter_num', 'val_loss', 'config'} <= file.keys()
        assert {'optimizer', 'best_val_loss'} & file.keys() == (
            {'optimizer', 'best_val_loss'} if name in ('ckpt.pt', 'ckpt_prev.pt') else set()
        )
        assert all(
            type(value) in (int, float, bool, str) for value in (file['config'] | file['model_args']).values()
        )
        assert file['val_loss'] == pytest.approx(recomputed(out / name, dataset), rel=1e-5), name
    assert files['ckpt.pt']['val_loss'] == lines[20]['val_loss']


def test_ckpt_best_is_the_best_of_those_saved(tmp_path):
    folder = write_dataset(tmp_path / 'data')
    np.random.default_rng(2).integers(0, 256, 1500).astype('<u2').tofile(
        folder / 'val.bin'
    )  # noise: learning the text makes it worse
    for init_from in ('scratch', 'resume'):
        out = run(folder, tmp_path / 'out', ckpt_interval=4, lr=0.03, init_from=init_from)
        best = load(out / 'ckpt_best.pt')
        saved = {line['val_loss']: line['iter'] for line in log(out) if line['iter'] in (4, 8, 12, 16, 20)}
        assert (best['val_loss'], best['iter_num']) == min(saved.items())
        assert best['iter_num'] < 16 and load(out / 'ckpt.pt')['best_val_loss'] == best['val_loss']
        os.replace(out / 'ckpt_prev.pt', out / 'ckpt.pt')


def test_with_bos_every_window_starts_with_the_end_of_text_and_the_targets_stay_its_next_tokens(
    tmp_path, dataset, monkeypatch
):
    seen = []
    forward = GPT.forward

    def watched(model, idx, targets=None):
        seen.append((idx, targets))
        return forward(model, idx, targets)

    monkeypatch.setattr(GPT, 'forward', watched)
    out = run(dataset, tmp_path / 'out', bos=True, max_iters=2)
    assert load(out / 'ckpt.pt')['config']['bos'] is True
    measure.main([f'--ckpt={out}', '--sequences=4', '--device=cpu'])
    assert any(targets is None for _, targets in seen)  # the short measurement, and measure.py
    for idx, targets in seen:
        assert (idx[:, 0] == 256).all()
        assert targets is None or torch.equal(idx[:, 1:], targets[:, :-1])
    plain = data.loader.Tokens(dataset, 'val', 16, 257)
    shifted = data.loader.Tokens(dataset, 'val', 16, 257, first_token=256)
    starts = plain.fixed_starts(3)
    assert torch.equal(shifted.windows(starts)[1], plain.windows(starts)[0])


# ---- One run, however it is cut up


@every_arm
def test_twenty_steps_are_ten_and_a_resume_and_ten_bit_for_bit(tmp_path, dataset, straight, arm):
    out = tmp_path / 'out'
    shutil.copytree(straight[arm], out)  # with log lines up to 20, of which those past 10 have to go
    os.replace(out / 'ckpt_prev.pt', out / 'ckpt.pt')
    run(dataset, out, init_from='resume', micro_batch=2, snapshots='0,3', **ARMS[arm])
    assert same_state(out / 'ckpt.pt', straight[arm] / 'ckpt.pt') and same_state(
        out / 'ckpt_best.pt', straight[arm] / 'ckpt_best.pt'
    )
    assert log(out) == log(straight[arm])


@pytest.mark.parametrize(
    'number, step', [(signal.SIGTERM, 8), (signal.SIGINT, 13), (signal.SIGHUP, 13), (signal.SIGUSR1, 8)]
)
def test_a_signal_ends_the_run_after_its_step_and_a_resume_makes_up_for_it(
    tmp_path, dataset, straight, monkeypatch, capsys, number, step
):
    out, argv = tmp_path / 'out', dict(micro_batch=2, snapshots='0,3', **ARMS['ledger'])
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda run: os.kill(os.getpid(), number))
        assert stop(flags(dataset, out, **argv)) == 128 + number
    assert f'stopped by {number.name} after iteration {step + 1}' in capsys.readouterr().out
    assert load(out / 'ckpt.pt')['iter_num'] == step + 1
    assert load(out / 'ckpt.pt')['val_loss'] == pytest.approx(recomputed(out / 'ckpt.pt', dataset), rel=1e-5)
    assert (out / 'ckpt_best.pt').exists() == (step > 10)  # what is best depends on no signal
    run(dataset, out, init_from='resume', **argv)
    assert same_state(out / 'ckpt.pt', straight['ledger'] / 'ckpt.pt') and log(out) == log(straight['ledger'])


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path, dataset, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    at_step(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGHUP))
    assert load(run(dataset, tmp_path / 'out', max_iters=4) / 'ckpt.pt')['iter_num'] == 4


def test_a_process_that_is_terminated_saves_and_a_resume_makes_up_for_it(tmp_path, dataset):
    settings = dict(max_iters=150, eval_interval=100, ckpt_interval=100, eval_sequences=4, log_interval=1)
    process = subprocess.Popen(
        [sys.executable, train.__file__, *flags(dataset, tmp_path / 'out', **settings)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(line.startswith('iter     20/150 | loss') for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert re.match(
        'stopped by SIGTERM after iteration [0-9]+: go on with --init_from=resume',
        process.stdout.readlines()[-1],
    )
    assert process.wait(timeout=600) == 128 + signal.SIGTERM
    run(dataset, tmp_path / 'out', init_from='resume', **settings)
    run(dataset, tmp_path / 'undisturbed', **settings)
    assert same_state(tmp_path / 'out' / 'ckpt.pt', tmp_path / 'undisturbed' / 'ckpt.pt')


def test_two_processes_are_one(tmp_path, dataset):
    settings = dict(eval_interval=1, batch_size=8, **ARMS['ledger'])
    launched = subprocess.run(
        TORCHRUN + flags(dataset, tmp_path / 'two', micro_batch=2, **settings),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert launched.returncode == 0, launched.stderr
    assert (
        '2 processes on cpu with 1 thread each, 8 sequences of 16 tokens a step as 2 × 2 × 2'
        in launched.stdout
    )
    one, two = log(run(dataset, tmp_path / 'one', **settings)), log(tmp_path / 'two')
    assert len(one) == len(two) == 21
    np.testing.assert_allclose(numbers(two), numbers(one), rtol=1e-5)


@every_arm
@pytest.mark.parametrize('windows', [1, 2, 3])
def test_the_record_of_two_processes_is_that_of_one_for_any_number_of_windows(
    tmp_path, dataset, monkeypatch, arm, windows
):
    few = shutil.copytree(dataset, tmp_path / 'few')
    os.truncate(few / 'val.bin', 2 * (windows * TINY['block_size'] + 1))
    settings = {**TINY, **ARMS[arm], 'dataset': f'{few}', 'out_dir': f'{tmp_path / "out"}', 'micro_batch': 2}
    run = train.Run(Config(**settings))
    whole = run.evaluate()
    collected, records = {}, {}
    run.world.size = 2

    def gather(parts, own):
        collected[run.world.rank] = own
        parts[:] = [collected[rank] if rank in collected else own for rank in (0, 1)]

    monkeypatch.setattr(train.dist, 'all_gather_object', gather)
    sums = {rank: losses_of(run, rank) for rank in (0, 1)}
    np.testing.assert_allclose(
        np.add(sums[0], sums[1]), [whole['val_loss'], *whole['commit_rate']], rtol=1e-5
    )
    for rank in (1, 0):  # the record is made on the first, which comes last here
        run.world.rank = rank
        records[rank] = run.streams()
    assert records[1] is None
    np.testing.assert_allclose(numbers([records[0]]), numbers([whole['streams']]), rtol=1e-4)


def losses_of(run, rank):
    """What one process of two adds to the losses."""
    run.world.rank = rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, 'sum', lambda world, tensor: tensor)
        return run.losses('val')


# ---- What is missing


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A data folder of the test's own, with nothing in it but prepare.py of pysource."""
    (tmp_path / 'data' / 'pysource').mkdir(parents=True)
    (tmp_path / 'data' / 'pysource' / 'prepare.py').touch()
    monkeypatch.setattr(data.loader, 'HERE', tmp_path / 'data')
    return tmp_path / 'data'


@pytest.mark.parametrize(
    'name, command',
    [
        ('pysource', 'make it with python {}/pysource/prepare.py'),
        ('nowhere', 'make it with one of python {}/pysource/prepare.py'),
    ],
)
def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path, elsewhere, name, command):
    assert stop(flags(name, tmp_path / 'out')).endswith(command.format(elsewhere))
    assert not (tmp_path / 'out').exists()


def test_the_demos_dataset_is_made_once_if_it_is_missing(tmp_path, elsewhere, monkeypatch):
    asked = []
    monkeypatch.setattr(
        prepare, 'main', lambda argv: asked.append(argv) or write_dataset(elsewhere / 'pysource_demo')
    )
    for out in ('one', 'two'):
        run('pysource_demo', tmp_path / out)
    assert asked == [prepare.DEMO]
