"""The machine: its cores, its processes, its console, its compiler, whatever state it is in."""

import machine

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.loader import UserError
from settings import Config
from world import World, precision, torchrun_numbers, wants_compile

ROOT = Path(machine.__file__).parent
TORCHRUN = {
    'WORLD_SIZE': '2',
    'RANK': '1',
    'LOCAL_RANK': '1',
    'MASTER_ADDR': 'localhost',
    'MASTER_PORT': '29500',
}


def python(code, **environment):
    """Returns what a new process of Python that runs `code` leaves: its status, stdout and stderr."""
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


# ---- Threads


@pytest.mark.parametrize(
    'files, groups, cores',
    [
        ({'cpu.max': '150000 100000'}, '0::/', 2),
        ({'cpu.max': 'max 100000'}, '0::/', 8),
        ({'a/b/cpu.max': 'max 100000', 'a/cpu.max': '300000 100000'}, '0::/a/b', 3),
        ({'cpu.max': '10000 100000'}, '0::/a/b', 1),
        ({'cpu/x/cpu.cfs_quota_us': '400000', 'cpu/x/cpu.cfs_period_us': '100000'}, '4:cpu,cpuacct:/x', 4),
        ({'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, '4:cpu:/x', 8),
        ({}, '3:memory:/x\n0::/x', 8),
        ({'cpu.max': 'nonsense'}, '0::/', 8),
        ({'cpu.max': '1600000 100000'}, '0::/', 8),
    ],
)
def test_the_cores_are_those_that_the_process_may_use_and_no_more_than_its_container_is_given(
    tmp_path, monkeypatch, files, groups, cores
):
    monkeypatch.setattr(machine.os, 'sched_getaffinity', lambda process: set(range(8)), raising=False)
    for name, content in files.items():
        (tmp_path / 'fs' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'fs' / name).write_text(content + '\n')
    (tmp_path / 'groups').write_text(groups + '\n')
    assert machine.usable_cores(tmp_path / 'fs', tmp_path / 'groups') == cores
    assert machine.usable_cores(tmp_path / 'fs', tmp_path / 'nothing') == 8


@pytest.mark.parametrize(
    'given, added',
    [
        ({}, {'GOMP_SPINCOUNT': machine.SPINS, 'OMP_NUM_THREADS': '3'}),
        ({'OMP_WAIT_POLICY': 'ACTIVE'}, {'OMP_NUM_THREADS': '3'}),
        ({'GOMP_SPINCOUNT': '7', 'OMP_NUM_THREADS': '1'}, {}),
    ],
)
def test_threads_wait_for_a_bounded_time_unless_the_user_has_said_otherwise(monkeypatch, given, added):
    monkeypatch.setattr(machine, 'usable_cores', lambda: 3)
    monkeypatch.setattr(machine.os, 'cpu_count', lambda: 8)
    environment = dict(given)
    machine.settle(environment)
    assert environment == {**given, **added}


def test_where_all_cores_may_be_used_pytorch_chooses_its_threads(monkeypatch):
    monkeypatch.setattr(machine, 'usable_cores', lambda: 8)
    monkeypatch.setattr(machine.os, 'cpu_count', lambda: 8)
    environment = {}
    machine.settle(environment)
    assert 'OMP_NUM_THREADS' not in environment


def imported(path):
    """Returns the modules that a file imports outermost, in order."""
    statements = ast.parse(path.read_text()).body
    modules = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            modules += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            modules.append(statement.module)
    return modules


@pytest.mark.parametrize(
    'file',
    [
        'train.py',
        'measure.py',
        'data/loader.py',
        'studies/__init__.py',
        'speed/__init__.py',
        'tests/conftest.py',
    ],
)
def test_every_program_settles_with_the_machine_before_it_imports_anything_else(file):
    assert imported(ROOT / file)[0] == 'machine'


@pytest.mark.parametrize('file', sorted(ROOT.glob('data/*/prepare.py')), ids=lambda path: path.parent.name)
def test_what_prepares_data_imports_the_loader_and_not_pytorch_before_it(file):
    modules = imported(file)
    assert 'data.loader' in modules and 'torch' not in modules


# ---- The console


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_console_that_lacks_a_character_shows_a_question_mark(encoding):
    shown = python("import machine; machine.say('α = 2'); print('ψ')", PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, '')
    assert shown.stdout.splitlines() == ['? = 2', '?']


def test_a_console_that_is_full_is_said_once_and_the_program_goes_on():
    code = "import machine\nfor i in range(3): machine.say('line')\nmachine.complain('still here')"
    with open('/dev/full', 'w') as full:
        process = subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    said = process.stderr.splitlines()
    assert process.returncode == 0 and len(said) == 2 and said[1] == 'still here'
    assert said[0].startswith('the console is gone (No space left on device)')


def test_on_windows_the_import_says_that_it_takes_wsl():
    shown = python("import os; os.name = 'nt'; import machine")
    assert shown.returncode == 1 and shown.stderr.count('\n') == 1
    assert 'WSL' in shown.stderr


# ---- Processes and devices


@pytest.mark.parametrize(
    'environment, numbers',
    [
        ({}, (0, 1, 0)),
        ({'WORLD_SIZE': ''}, (0, 1, 0)),
        ({'WORLD_SIZE': '1', 'RANK': '0', 'LOCAL_RANK': '0'}, (0, 1, 0)),
        ({'RANK': '3', 'LOCAL_RANK': ''}, (0, 1, 0)),
        (TORCHRUN, (1, 2, 1)),
    ],
)
def test_one_process_alone_is_a_run_of_one_and_torchrun_numbers_the_others(environment, numbers):
    assert torchrun_numbers(environment) == numbers


@pytest.mark.parametrize(
    'environment', [{'WORLD_SIZE': '2'}, {**TORCHRUN, 'RANK': ''}, {**TORCHRUN, 'WORLD_SIZE': 'two'}]
)
def test_a_world_size_left_over_in_the_environment_is_refused_in_a_sentence(environment):
    with pytest.raises(UserError, match='WORLD_SIZE=.*left over.*torchrun'):
        torchrun_numbers(environment)


def test_a_port_in_use_is_refused_in_a_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {**TORCHRUN, 'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_PORT': port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f'did not meet at localhost:{port} .*another port') as error:
            World('cpu')
    assert '\n' not in str(error.value)


def test_an_apple_gpu_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    with pytest.raises(UserError, match='device=mps, but PyTorch sees no Apple GPU: use --device=cpu'):
        World('mps')


@pytest.mark.parametrize(
    'dtype, device, has_bfloat16, chosen',
    [
        ('auto', 'cpu', True, 'float32'),
        ('auto', 'mps', True, 'float32'),
        ('auto', 'cuda:0', True, 'bfloat16'),
        ('auto', 'cuda:1', False, 'float16'),
        ('bfloat16', 'cuda:0', False, 'bfloat16'),
    ],
)
def test_a_gpu_without_bfloat16_trains_in_float16(monkeypatch, dtype, device, has_bfloat16, chosen):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bfloat16)
    assert precision(Config(dtype=dtype), device) == chosen


# ---- The compiler


@pytest.mark.parametrize('device, variable', [('cpu', 'CXX'), ('cuda', 'CC')])
def test_without_a_compiler_auto_goes_without_and_true_is_refused_in_a_sentence(
    monkeypatch, device, variable
):
    monkeypatch.setenv(variable, '/nowhere/g++')
    is_compiled, sentence = wants_compile(Config(compile='auto'), device)
    assert not is_compiled and '/nowhere/g++' in sentence and 'uncompiled' in sentence
    assert wants_compile(Config(compile=False), device) == (False, '')
    with pytest.raises(UserError, match='finds no compiler .*--compile=False'):
        wants_compile(Config(compile=True), device)


@pytest.mark.parametrize('device, variable', [('cpu', 'CXX'), ('cuda', 'CC')])
def test_with_a_compiler_auto_compiles(monkeypatch, device, variable):
    monkeypatch.setenv(variable, sys.executable)
    assert wants_compile(Config(compile='auto'), device) == (True, '')
    assert wants_compile(Config(compile='auto'), 'mps') == (False, '')
