"""
Arms: variants of the model and of its training, one file each. `--arm=<name>` on top of a config takes
arms/<name>.py; `--arm=rope_swiglu,gated_attention` takes two that replace different parts.

A file holds plain classes, named after the parts that they replace:

    Residual(config, s)             the residual operator of sublayer s, derived from one in model.py
    Attention(config), MLP(config)  (B, T, d) → (B, T, d), derived from those in model.py
    Norm(n)                         what a sublayer's input and the head's pass through; n dimensions
    Positions(config)               puts positions into the embedded tokens, or into queries and keys
    make_optimizer(model, config)   what train.py takes its steps with

and, if the arm needs other defaults, SETTINGS: {setting: value}. A config file and the command line still
have the last word about them. Nothing needs to be registered, and a checkpoint carries the names of its arms.
To make an arm of your own, copy the file that is nearest and change a line. It should `import model` rather
than names from it, since the classes have its names.

With one seed all arms start alike: a parameter of a replaced part takes the value of the default's parameter
of the same name and shape. An arm need not think of it.
"""

import difflib
from importlib import import_module
from pathlib import Path

from data.loader import UserError

PARTS = ('Residual', 'Attention', 'MLP', 'Norm', 'Positions', 'make_optimizer')


def arm_names():
    """Returns the names of all arms, in alphabetical order."""
    files = [path for folder in __path__ for path in Path(folder).glob('*.py')]
    return sorted(path.stem for path in files if not path.stem.startswith('_'))


def load_arm(name):
    """Returns the module arms/<name>.py. Raises UserError if there is none."""
    known = arm_names()
    if name in known:
        return import_module(f'arms.{name}')
    near = difflib.get_close_matches(name, known, 1, 0.5)
    suggestion = f", did you mean '{near[0]}'?" if near else ':'
    raise UserError(f"arm: there is no arm '{name}'{suggestion} arms/ holds {', '.join(known)}", 'arm')


def load_arms(names):
    """names: text, the names of arms with commas between. Returns their modules, [] for ''."""
    return [load_arm(name.strip()) for name in names.split(',')] if names else []


def replaces(module, part):
    """Says whether an arm has a part of its own or another arm's. What it imports from model.py does not
    count."""
    return getattr(getattr(module, part, None), '__module__', '').startswith('arms.')


def check_arms(names):
    """Raises UserError if an arm is unknown, or if two replace the same part or differ about a setting."""
    arms = load_arms(names)
    for part in PARTS:
        owners = [arm.__name__.removeprefix('arms.') for arm in arms if replaces(arm, part)]
        if len(owners) > 1:
            raise UserError(f'arm: {" and ".join(owners)} both replace {part}: name one of them', 'arm')
    settings = {}
    for arm in arms:
        for key, value in getattr(arm, 'SETTINGS', {}).items():
            if settings.setdefault(key, value) != value:
                text = f'arm: {names} ask for two values of {key}, {settings[key]!r} and {value!r}'
                raise UserError(text, 'arm')


def arm_part(config, part, default):
    """part: a name in PARTS. Returns what an arm of `config` holds under that name, or else `default`."""
    for arm in load_arms(config.arm):
        if replaces(arm, part):
            return getattr(arm, part)
    return default


def arm_settings(names):
    """Returns {setting: value}: the defaults that the named arms change."""
    check_arms(names)
    return {key: value for arm in load_arms(names) for key, value in getattr(arm, 'SETTINGS', {}).items()}
