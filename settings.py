"""
The settings of a run, and how a command line is read: one config file at most, which assigns some of them;
then --key=value or --key value, which have the last word.

A mistake is said with the place where it stands, what was expected there, and the setting that was probably
meant.
"""

import ast
import difflib
import inspect
import math
import os
import runpy
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, get_args

from arms import arm_settings
from data.loader import UserError
from model import RESIDUALS, GPTConfig, operator_of


@dataclass
class Config(GPTConfig):
    """The settings of a run: those of the model, and these. vocab_size comes with the data, and is none."""

    # the data
    dataset: str = 'fineweb_edu'  # data/<dataset>/, or a path if it has a slash
    bos: bool = False  # every window starts with the end-of-text id: in training, evaluating and measuring
    # the step
    batch_size: int = 24  # sequences a step, over all processes
    micro_batch: int = 0  # sequences that one process puts through the model at once; 0: all that it has
    max_iters: int = 14000  # 344M tokens
    lr: float = 3e-4  # at its peak
    warmup_iters: int = 300  # linear, from nothing
    min_lr_ratio: float = 0.1  # cosine from lr to this share of it at max_iters
    weight_decay: float = 0.1  # of matrices and embeddings
    decay_all: bool = False  # gate biases, gains, λ and w_c decay too, as in the published code
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0  # largest L2 norm of all gradients together
    seed: int = 1337  # of the weights and of the windows
    # the record
    out_dir: str = ''  # '': out/<name of the config file, or of the residual>_<arm>
    init_from: str = 'scratch'  # 'resume' goes on from out_dir's checkpoint; 'auto' does if there is one
    log_interval: int = 10  # steps between lines on the console
    eval_interval: int = 500  # steps between lines in log.jsonl; also at 0, at powers of two and at the end
    eval_sequences: int = 128  # fixed windows of each split for the losses; 64 of val for the streams
    ckpt_interval: int = 1000  # steps between checkpoints
    snapshots: str = ''  # '0,500': iterations whose weights are kept as ckpt_<iter>.pt
    wandb: str = ''  # a project of Weights & Biases that the record goes to as well
    # the machine
    device: str = 'auto'  # cuda if there is one, else cpu; or mps
    dtype: str = 'auto'  # of autocast: float32 (none) on cpu, bfloat16 on cuda, float16 on GPUs that lack it
    compile: bool | str = (
        'auto'  # torch.compile, up to a minute well spent: 'auto' does if a compiler is there
    )
    cuda_graphs: bool = True  # with compile, on a GPU: launching kernels one by one takes longer than they do
    kernels: bool = True  # speed/kernels.py where it applies: the ledger in bfloat16 on a GPU

    def __post_init__(self):
        super().__post_init__()
        for field in fields(self):
            if field.type in (int, float):
                self.check_number(field.name)
        choices = {
            'init_from': ('scratch', 'resume', 'auto'),
            'device': ('auto', 'cpu', 'cuda', 'mps'),
            'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
            'compile': ('auto', True, False),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                expected = ', '.join(map(str, allowed))
                raise UserError(f"{name} is '{value}': expected one of {expected}", name)
        for name in ('beta1', 'beta2'):
            if getattr(self, name) >= 1:
                raise UserError(f'{name} is {getattr(self, name)}: expected a number below 1', name)
        if self.seed >= 2**63:
            raise UserError(f'seed is {self.seed}: expected a whole number below 2⁶³', 'seed')
        if self.snapshots and not all(part.isdecimal() for part in self.snapshots.split(',')):
            raise UserError(
                f"snapshots is '{self.snapshots}': expected iterations with commas between, like 0,500",
                'snapshots',
            )

    def check_number(self, name):
        value = getattr(self, name)
        if not 0 <= value < math.inf:
            raise UserError(f'{name} is {value}: expected a number of 0 or more', name)
        if value == 0 and name in ABOVE_ZERO:
            raise UserError(f'{name} is {value}: expected a number above 0', name)

    def model_config(self):
        return GPTConfig(**{field.name: getattr(self, field.name) for field in fields(GPTConfig)})


ABOVE_ZERO = (
    'lr grad_clip batch_size max_iters log_interval eval_interval eval_sequences ckpt_interval'.split()
)
# What may differ between a checkpoint and the command that resumes it: none of it changes a step that was
# taken.
FREE_TO_CHANGE = (
    'max_iters out_dir init_from log_interval eval_interval eval_sequences ckpt_interval snapshots wandb '
    'device compile cuda_graphs kernels micro_batch'.split()
)

# What other programs call a setting, nanoGPT above all, and what it is called here.
CALLED_HERE = {
    'learning_rate': 'lr',
    'min_lr': 'min_lr_ratio',
    'lr_decay_iters': 'max_iters',
    'decay_lr': 'min_lr_ratio',
    'gradient_accumulation_steps': 'micro_batch',
    'eval_iters': 'eval_sequences',
    'always_save_checkpoint': 'ckpt_interval',
    'wandb_log': 'wandb',
    'wandb_project': 'wandb',
    'wandb_run_name': 'wandb',
    'optimizer': 'arm',
    'steps': 'max_iters',
    'epochs': 'max_iters',
    'context_length': 'block_size',
    'd_model': 'n_embd',
    'checkpoint_interval': 'ckpt_interval',
}
IN_WORDS = {
    int: 'a whole number',
    float: 'a number',
    bool: 'True or False',
    str: 'text in quotes',
    bool | str: "True, False or 'auto'",
}


class Given(NamedTuple):
    """A value that a setting was given, and where: '--lr=1e-3', or 'config/mine.py, line 3'."""

    value: object
    origin: str


def nearest(name, known):
    """Returns the setting that was probably meant by a name that is none, or None: one that other programs
    call so, one that the name begins with or that begins with it, or the one that is spelled most alike."""
    if name in CALLED_HERE:
        return CALLED_HERE[name]
    relatives = [other for other in known if other.startswith(name) or name.startswith(other)]
    if relatives and len(name) > 1:
        return min(relatives, key=lambda other: abs(len(other) - len(name)))
    return next(iter(difflib.get_close_matches(name, known, 1, 0.5)), None)


def split_command_line(argv):
    """Returns the arguments that are no flags, and [(flag as it was written, setting, text)]."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith('--'):
            files.append(argument)
            continue
        name, equals, text = argument[2:].partition('=')
        if not equals:
            if not rest or rest[0].startswith('--'):
                raise UserError(f'{argument} has no value: write every setting as --key=value', name)
            text = rest.pop(0)
        flags.append((f'--{name}={text}', name, text))
    return files, flags


def run_config_file(file):
    """Returns {name: Given} of what a config file assigns. It is the user's own Python: whatever it raises
    is said in one line."""
    try:
        names = runpy.run_path(file)
        lines = assigned_lines(file)
    except FileNotFoundError:
        raise UserError(f'there is no config file {file}: config/ holds one for each arm and scale') from None
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = frames[-1].lineno if frames else getattr(error, 'lineno', None) or '?'
        raise UserError(f'{file}, line {line}: {type(error).__name__}: {error}') from None
    given = {}
    for name, value in names.items():
        is_module = type(value) is type(os)
        if not name.startswith('_') and not is_module:
            given[name] = Given(value, f'{file}, line {lines[name]}' if name in lines else file)
    return given


def assigned_lines(file):
    """Returns {name: line} of the assignments in a Python file that stand in no block."""
    lines = {}
    for statement in ast.parse(Path(file).read_bytes()).body:
        targets = getattr(statement, 'targets', [getattr(statement, 'target', None)])
        lines |= {target.id: statement.lineno for target in targets if isinstance(target, ast.Name)}
    return lines


def parse_value(text, kind):
    """Returns the text of --key=text as a value of the kind that the setting has, or as it stands if it has
    no such form. 1e3 is a whole number too."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    is_whole = type(value) is float and value.is_integer()
    return int(value) if kind is int and is_whole else value


def checked(name, given, settings):
    """Returns what was given, as the type that the setting has. settings: {name: dataclass field}."""
    value, origin = given
    if name not in settings:
        near = nearest(name, settings)
        advice = f", did you mean '{near}'?" if near else ': python train.py --help lists them'
        raise UserError(f"{origin}: there is no setting '{name}'{advice}", name)
    field = settings[name]
    kinds = get_args(field.type) or (field.type,)
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        raise UserError(
            f'{origin}: {name} is {value!r}, expected {IN_WORDS[field.type]}, like {field.default!r}', name
        )
    return Given(value, origin)


def read_command_line(argv, settings):
    """settings: {name: dataclass field}, all that there are. Returns three things: the config file that the
    command line names, or None; and {name: Given} of what the file and what the flags say."""
    files, flags = split_command_line(argv)
    if len(files) > 1:
        raise UserError(
            f'more than one config file ({", ".join(files)}): name one, and settings as --key=value'
        )
    from_file = run_config_file(files[0]) if files else {}
    from_flags = {}
    for origin, name, text in flags:
        if name in from_flags:
            raise UserError(f'{origin}: write every setting once, as --key=value', name)
        kind = settings[name].type if name in settings else str
        from_flags[name] = Given(parse_value(text, kind), origin)
    from_file = {name: checked(name, given, settings) for name, given in from_file.items()}
    from_flags = {name: checked(name, given, settings) for name, given in from_flags.items()}
    return (files[0] if files else None), from_file, from_flags


def read_config(argv):
    """Returns the Config of a command line: at most one config file, then settings. Every setting must be
    one that its arm uses: for a config file that is the file's own arm."""
    known = {field.name: field for field in fields(Config) if field.name != 'vocab_size'}
    file, from_file, from_flags = read_command_line(argv, known)
    config = make_config({**from_file, **from_flags})
    if from_file:
        refuse_idle(from_file, make_config(from_file))
    refuse_idle(from_flags, config)
    if not config.out_dir:
        named = [Path(file).stem] if file else [config.residual]
        if config.arm and 'arm' not in from_file:
            named += config.arm.split(',')
        config.out_dir = f'out/{"_".join(named)}'
    return config


def make_config(given):
    """given: {name: Given}. Returns a Config; what is not given has the default of the arm or else of
    Config."""
    values = {name: value for name, (value, _) in given.items()}
    try:
        return Config(**{**arm_settings(values.get('arm', '')), **values})
    except UserError as error:
        if error.setting not in given:
            raise
        raise UserError(f'{given[error.setting].origin}: {error}', error.setting) from None


def refuse_idle(given, config):
    """Raises UserError if a setting belongs to another residual operator than the one of `config`, which
    would not look at it."""
    used = operator_of(config).settings
    for name, operator in RESIDUALS.items():
        for setting in operator.settings:
            if setting in given and setting not in used:
                raise UserError(
                    f'{given[setting].origin}: {setting} does nothing where residual is '
                    f"'{config.residual}': it belongs to '{name}'",
                    setting,
                )


def help_text():
    """Returns the lines that declare the settings, comments and all."""
    sources = [inspect.getsource(kind).partition('    def ')[0] for kind in (GPTConfig, Config)]
    lines = '\n'.join(sources).splitlines()
    return '\n'.join(line for line in lines if 'vocab_size: ' not in line)
