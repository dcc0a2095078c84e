"""
Where a run takes place: its processes, their device, its precision, and whether there is a compiler.
"""

import machine

import gc
import os
import shutil

import torch
import torch.distributed as dist

from data.loader import UserError


def torchrun_numbers(environment):
    """Returns the number of this process in its run, how many the run has, and its number on this machine,
    from what torchrun sets in the environment. One process alone is a run of one."""
    names = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    given = {name: environment[name] for name in names if environment.get(name)}
    if given.get('WORLD_SIZE', '1') == '1':
        return 0, 1, 0
    try:
        if len(given) == len(names):
            return int(given['RANK']), int(given['WORLD_SIZE']), int(given['LOCAL_RANK'])
    except ValueError:
        pass
    raise UserError(
        f'the environment says WORLD_SIZE={given["WORLD_SIZE"]}, but not all that torchrun would '
        f'({", ".join(names)}): it is left over, unset it; or start with torchrun'
    )


class World:
    """The processes of one run, numbered by torchrun; one process alone is a world of size 1."""

    def __init__(self, device):
        self.rank, self.size, self.local_rank = torchrun_numbers(os.environ)
        self.device = self.own_device(device)
        self.device_type = self.device.partition(':')[0]
        if self.size > 1 and not dist.is_initialized():
            self.join()

    def own_device(self, device):
        gpus = torch.cuda.device_count()
        if device == 'mps' and not torch.backends.mps.is_available():
            raise UserError('device=mps, but PyTorch sees no Apple GPU: use --device=cpu', 'device')
        if device in ('cpu', 'mps') or device == 'auto' and not gpus:
            return device.replace('auto', 'cpu')
        if self.local_rank >= gpus:
            raise UserError(
                f'device={device}, but PyTorch sees {gpus} GPUs for {self.local_rank + 1} or more processes '
                'on this machine: use --device=cpu, or fewer processes',
                'device',
            )
        torch.cuda.set_device(self.local_rank)
        return f'cuda:{self.local_rank}'

    def join(self):
        """Meets the other processes of the run."""
        where = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        if self.rank == 0:
            machine.say(f'waiting for {self.size} processes at {where}')
        try:
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device_type == 'cuda' else 'gloo')
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'the {self.size} processes did not meet at {where} ({first_line(error)}): choose another '
                'port with torchrun --master_port, or unset WORLD_SIZE if another program left it over'
            ) from None

    def sum(self, tensor):
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """True on all processes if it is on one. On the CPU, so that nobody waits for a GPU."""
        return bool(self.sum(torch.tensor(float(flag)))) if self.size > 1 else flag

    @staticmethod
    def leave():
        """To be called at the end of a run, once nothing refers to its DDP: PyTorch 2.11 aborts now and
        then if that outlives the processes' group."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()

    def share(self, config):
        """Returns how many sequences this process has of every step, and how many it puts through the model
        at once."""
        whole = config.batch_size
        if whole % self.size:
            divisors = ', '.join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise UserError(
                f'batch_size = {whole} cannot be shared by {self.size} processes: it can by {divisors}'
            )
        own = whole // self.size
        micro_batch = min(config.micro_batch or own, own)
        if own % micro_batch:
            raise UserError(
                f'micro_batch = {micro_batch} does not divide the {own} sequences that each of {self.size} '
                f'processes has of batch_size = {whole}'
            )
        return own, micro_batch

    def __str__(self):
        processes = '1 process' if self.size == 1 else f'{self.size} processes'
        threads = torch.get_num_threads()
        return f'{processes} on {self.device_type} with {threads} thread{"s" * (threads > 1)} each'


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def precision(config, device):
    """Returns the name of autocast's dtype; float32 is no autocast."""
    if config.dtype != 'auto':
        return config.dtype
    if not device.startswith('cuda'):
        return 'float32'
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'


def wants_compile(config, device_type):
    """Returns whether the step is compiled, and a sentence if it should be and cannot."""
    names = {'cpu': ['CXX', 'g++', 'clang++'], 'cuda': ['CC', 'gcc', 'clang', 'cc']}
    if config.compile is False or device_type not in names:
        return False, ''
    variable, *compilers = names[device_type]
    if variable in os.environ:
        compilers = [os.environ[variable]]
    if any(shutil.which(name) for name in compilers):
        return True, ''
    lacking = f'torch.compile finds no compiler ({" or ".join(compilers)})'
    if config.compile is True:
        raise UserError(f'{lacking}: install one, or add --compile=False', 'compile')
    return False, f'{lacking}: the steps run uncompiled, which takes longer'
