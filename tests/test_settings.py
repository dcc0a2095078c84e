"""What a command line means: every setting from one place, and every mistake in one sentence."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest

import train
from data.loader import UserError
from settings import Config, read_config

ROOT = Path(train.__file__).parent


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


def test_a_setting_may_be_written_with_a_blank(tmp_path):
    (tmp_path / 'mine.py').write_text('n_layer = 3\n')
    config = read_config(['--lr', '1e-3', str(tmp_path / 'mine.py'), '--compile', 'False', '--n_head=4'])
    assert (config.lr, config.n_layer, config.compile, config.n_head) == (1e-3, 3, False, 4)


def test_a_config_file_may_hold_what_its_own_arm_uses_and_a_flag_what_the_run_uses():
    ledger = str(ROOT / 'config' / 'ledger_demo.py')
    assert read_config([ledger, '--residual=baseline']).residual == 'baseline'
    with pytest.raises(UserError, match='^--gate_rank=8: gate_rank does nothing where residual is'):
        read_config([ledger, '--residual=baseline', '--gate_rank=8'])
    assert read_config([str(ROOT / 'config' / 'baseline_demo.py'), '--residual=ledger', '--gate_rank=8'])


def test_an_arm_changes_defaults_and_has_a_folder_of_its_own(tmp_path):
    assert (read_config(['--arm=no_erase']).residual, read_config([]).residual) == ('ledger', 'baseline')
    config = read_config([str(ROOT / 'config' / 'ledger_demo.py'), '--arm=no_erase', '--gate_rank=8'])
    assert (config.gate_rank, config.out_dir) == (8, 'out/ledger_demo_no_erase')
    with pytest.raises(UserError, match="^--arm=no_eras: .*did you mean 'no_erase'"):
        read_config(['--arm=no_eras'])


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
    'demo': dict(dataset='pysource_demo', init_from='auto'),
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
