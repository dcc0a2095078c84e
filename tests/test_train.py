"""The job: what a command line means, what a run leaves behind, and that it is the same run however it is cut up."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import data.loader
import measure
import train
from checkpoint import build_model
from data.loader import UserError
from data.pysource import prepare
from model import GPT
from train import Config, World, learning_rate, make_optimizer, read_config

ROOT = Path(train.__file__).parent
TINY = dict(
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    max_iters=20,
    warmup_iters=4,
    lr=0.01,
    eval_interval=7,
    eval_sequences=16,
    ckpt_interval=10,
    compile=False,
    device='cpu',
)
ARMS = {'baseline': {}, 'ledger': dict(residual='ledger', gate_rank=4)}
TIMES = {'tokens_per_s', 'mfu', 'streams_s'}
TORCHRUN = [
    sys.executable,
    '-m',
    'torch.distributed.run',
    '--standalone',
    '--nproc_per_node=2',
    train.__file__,
]
pytestmark = pytest.mark.usefixtures('one_thread')
every_arm = pytest.mark.parametrize('arm', ARMS)


def write_dataset(folder, seed=0):
    """A few thousand bytes of sentences that a model can learn something about. Returns the folder."""
    folder.mkdir(parents=True)
    words = 'the ledger keeps what deliberation commits and scratch is written over again'.split()
    for split, count in (('train', 6000), ('val', 1500)):
        rng = np.random.default_rng(seed + (split == 'val'))
        text = ' '.join(rng.choice(words, count))[:count]
        np.frombuffer(text.encode(), dtype=np.uint8).astype('<u2').tofile(folder / f'{split}.bin')
    hashes = {
        f'{split}.bin': sha256((folder / f'{split}.bin').read_bytes()).hexdigest()
        for split in ('train', 'val')
    }
    (folder / 'meta.json').write_text(
        json.dumps({'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256, 'sha256': hashes})
    )
    return folder


def flags(dataset, out, **settings):
    return [
        f'--{key}={value}' for key, value in {**TINY, 'dataset': dataset, 'out_dir': out, **settings}.items()
    ]


def run(dataset, out, **settings):
    train.main(flags(dataset, out, **settings))
    return out


def stop(argv, main=train.main):
    """Returns the status that main exits with, a sentence or a number; no frame of the stopped run stays alive, nor does its lock."""
    try:
        main(argv)
    except SystemExit as error:
        return error.code
    pytest.fail('it went on')


def load(path):
    return torch.load(path, weights_only=True)


def log(out):
    """The lines of log.jsonl without their times and rates."""
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def equal(a, b):
    """Whether two nests of dicts, lists, tensors and values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        pairs = [(a[key], b.get(key)) for key in a] if isinstance(a, dict) else zip(a, b)
        return type(a) is type(b) and len(a) == len(b) and all(equal(*pair) for pair in pairs)
    return a == b


def same_state(one, other):
    """Whether two checkpoints hold the same run at the same point: all but the command line that got it there."""
    one, other = (
        {key: value for key, value in load(path).items() if key != 'config'} for path in (one, other)
    )
    return equal(one, other)


def numbers(lines):
    """Every number of some log lines, in order; NaN where there is none."""
    if isinstance(lines, dict):
        lines = [lines[key] for key in sorted(lines) if key != 'precision']
    return (
        [x for item in lines for x in numbers(item)]
        if isinstance(lines, list)
        else [math.nan if lines is None else lines]
    )


def at_step(monkeypatch, number, action):
    """Makes every run call action(run) when it is about to take step `number`."""
    take = train.Run.step
    monkeypatch.setattr(
        train.Run, 'step', lambda run: (action(run) if run.iter_num == number else None, take(run))[1]
    )


@pytest.fixture(autouse=True)
def handlers():
    """train.main takes the signals of its process; here they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


# ---- Settings


def test_a_flag_has_the_last_word_over_the_file_and_the_file_over_the_default(tmp_path):
    (tmp_path / 'mine.py').write_text('import math\n_half = 0.5\nlr = 2 * _half\nn_layer = 3\n')
    config = read_config(
        [str(tmp_path / 'mine.py'), '--n_layer=4', '--batch_size=1e1', '--weight_decay=1', '--compile=False']
    )
    assert (config.lr, config.n_layer, config.batch_size, config.n_head, config.compile) == (
        1.0,
        4,
        10,
        12,
        False,
    )
    assert type(config.weight_decay) is float and type(config.batch_size) is int
    assert config.out_dir == 'out/mine'


@pytest.mark.parametrize(
    'given, sentence',
    [  # given: a command line, or the text of a config file
        (['--n_layers=2'], "there is no setting 'n_layers', did you mean 'n_layer'?"),
        (['--lrate=1e-3'], "--lrate=1e-3: there is no setting 'lrate', did you mean 'lr'?"),
        (['--learning_rate', '1e-3'], "there is no setting 'learning_rate', did you mean 'lr'?"),
        (['--gradient_accumulation_steps=4'], "did you mean 'micro_batch'?"),
        (['--wandb_log=True'], "did you mean 'wandb'?"),
        (['--warmup=3'], "did you mean 'warmup_iters'?"),
        (['--vocab_size=99'], "there is no setting 'vocab_size'"),
        (['--qqq=2'], "there is no setting 'qqq': python train.py --help lists them"),
        (['--n_layer=two'], "n_layer is 'two', expected a whole number"),
        (['--n_layer=2.5'], 'n_layer is 2.5, expected a whole number'),
        (['--lr=fast'], "lr is 'fast', expected a number"),
        (['--compile=1'], "compile is 1, expected True, False or 'auto'"),
        (['--compile=true'], "--compile=true: compile is 'true': expected one of auto, True, False"),
        (['--n_layer'], 'as --key=value'),
        (['--n_layer', '--lr=1'], '--n_layer has no value'),
        (['--n_embd=100'], '--n_embd=100: n_embd = 100 is not divisible by n_head = 12'),
        (['--beta2=1.0'], '--beta2=1.0: beta2 is 1.0: expected a number below 1'),
        (['--lr=1', '--lr=2'], 'every setting once'),
        (['one.py', 'two.py'], 'more than one config file (one.py, two.py)'),
        (['nowhere.py'], 'no config file nowhere.py'),
        (['--gate_rank=8'], "gate_rank does nothing where residual is 'baseline': it belongs to 'ledger'"),
        (['--decode_gamma=0.0'], 'decode_gamma does nothing'),
        ('commit_sparsity = 0.02', 'commit_sparsity does nothing'),
        ('n_layers = 2', "mine.py, line 1: there is no setting 'n_layers', did you mean 'n_layer'?"),
        ("n_layer = '2'", "mine.py, line 1: n_layer is '2', expected a whole number"),
        ('n_layer = 2.0', 'mine.py, line 1: n_layer is 2.0, expected a whole number'),
        ('compile = 0', "mine.py, line 1: compile is 0, expected True, False or 'auto'"),
        ('dataset = 3', 'mine.py, line 1: dataset is 3, expected text in quotes'),
        ('lr = 1\n# twice\nlr = -1', 'mine.py, line 3: lr is -1.0: expected a number of 0 or more'),
        ('from math import inf as lr', 'mine.py: lr is inf: expected'),
        ('lr = 1\n\nn_layer = (2', 'mine.py, line 3: SyntaxError'),
        ('lr = 1\nn_layer = 1 // 0', 'mine.py, line 2: ZeroDivisionError'),
        ('import sys\nsys.exit()', 'mine.py, line 2: SystemExit'),
    ],
)
def test_a_mistake_in_the_settings_is_named_with_its_place(tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text(given if isinstance(given, str) else '')
    with pytest.raises(UserError) as error:
        read_config(['mine.py'] if isinstance(given, str) else given)
    assert sentence in str(error.value) and '\n' not in str(error.value)


PUBLISHED = dict(
    dataset='fineweb_edu',
    block_size=1024,
    lr=3e-4,
    warmup_iters=300,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.999,
    grad_clip=1.0,
    gate_rank=64,
    bf16_streams=False,
    decode_gamma=0.0,
)
SCALES = {
    '160m': dict(PUBLISHED, n_layer=12, n_head=12, n_embd=768, batch_size=24, max_iters=14000),
    '290m': dict(PUBLISHED, n_layer=12, n_head=16, n_embd=1024, batch_size=16, max_iters=8000),
    'demo': dict(dataset='pysource_demo'),
}
PUBLISHED_ARMS = {
    'baseline': dict(residual='baseline', qk_norm=False),
    'qknorm': dict(residual='baseline', qk_norm=True),
    'ledger': dict(residual='ledger', qk_norm=False, commit_sparsity=0.02),
    'ledger_hs': dict(residual='ledger', qk_norm=False, commit_sparsity=0.3),
}


def test_there_is_one_config_file_for_each_arm_and_scale_and_it_holds_the_reference_settings():
    files = {path.stem: path for path in (ROOT / 'config').glob('*.py')}
    assert files.keys() == {f'{arm}_{scale}' for arm in PUBLISHED_ARMS for scale in SCALES}
    for name, path in files.items():
        arm, scale = name.rsplit('_', 1)
        wanted = {**SCALES[scale], **PUBLISHED_ARMS[arm], 'out_dir': f'out/{name}'}
        config = read_config([str(path)])
        assert {key: getattr(config, key) for key in wanted} == wanted, path


def test_importing_trains_nothing_and_help_prints_every_setting_with_its_default(capsys):
    runpy.run_path(train.__file__, run_name='imported')
    assert capsys.readouterr().out == ''
    train.main(['--help'])
    printed = capsys.readouterr().out
    declared = {field.name for field in fields(Config)} - {'vocab_size'}
    assert all(f'    {name}: ' in printed for name in declared) and 'vocab_size: ' not in printed
    assert 'lr: float = 3e-4' in printed and 'def ' not in printed


@pytest.mark.parametrize('warmup', [0, 1, 30])
def test_the_learning_rate_climbs_in_a_line_and_falls_along_a_cosine_to_a_tenth(warmup):
    config = Config(lr=0.3, warmup_iters=warmup, max_iters=100)
    fall = np.linspace(0, np.pi / 2, 101 - warmup)
    expected = np.concatenate(
        [0.3 * np.arange(1, warmup + 1) / max(1, warmup), 0.3 - 0.27 * np.sin(fall) ** 2]
    )
    np.testing.assert_allclose([learning_rate(it, config) for it in range(101)], expected, rtol=1e-12)
    assert max(expected) == 0.3 and math.isclose(learning_rate(100, config), 0.03)


# ---- The batch and the step


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
    settings = dict(
        ARMS['ledger'],
        max_iters=3,
        warmup_iters=2,
        seed=5,
        grad_clip=0.1,
        beta1=0.8,
        beta2=0.9,
        weight_decay=0.3,
    )
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
    per_sublayer = {
        'top1',
        'top2',
        'top3',
        'median',
        'max_over_median',
        'kurtosis',
        'norm',
        'fixed_dim_ratio',
        'start_ratio',
        'start_token_concentration',
        'start_dim_concentration',
    }
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


def recomputed(path, dataset):
    """The validation loss of a checkpoint's weights, on the windows that the log uses."""
    tokens = data.loader.Tokens(dataset, 'val', TINY['block_size'], 257)
    with torch.no_grad():
        return build_model(load(path), path)(*tokens.windows(tokens.fixed_starts(TINY['eval_sequences'])))[
            1
        ].item()


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


@pytest.mark.parametrize('number, step', [(signal.SIGTERM, 8), (signal.SIGINT, 13)])
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
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    run(dataset, tmp_path / 'out', init_from='resume', **settings)
    run(dataset, tmp_path / 'undisturbed', **settings)
    assert same_state(tmp_path / 'out' / 'ckpt.pt', tmp_path / 'undisturbed' / 'ckpt.pt')


def test_two_processes_are_one(tmp_path, dataset):
    settings = dict(eval_interval=1, batch_size=8, **ARMS['ledger'])
    launched = subprocess.run(
        TORCHRUN + flags(dataset, tmp_path / 'two', micro_batch=2, **settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launched.returncode == 0, launched.stderr
    assert (
        '2 processes on cpu with 1 thread each, 8 sequences of 16 tokens a step as 2 × 2 × 2'
        in launched.stdout
    )
    one, two = log(run(dataset, tmp_path / 'one', **settings)), log(tmp_path / 'two')
    assert len(one) == len(two) == 21
    np.testing.assert_allclose(numbers(two), numbers(one), rtol=1e-5)


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
