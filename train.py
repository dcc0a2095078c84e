"""
Trains one arm: one process or many, CPU or GPUs, the same run.

    python train.py config/ledger_demo.py --max_iters=500                       one process
    torchrun --nproc_per_node=8 train.py config/ledger_290m.py                  eight GPUs
    python train.py config/ledger_demo.py --init_from=resume                    goes on exactly where it stopped

Settings are the fields of Config below; a config file assigns some of them, --key=value has the last word.
A run writes out/<name of the config file>/: log.jsonl, ckpt.pt, ckpt_prev.pt, ckpt_best.pt.
"""

import ast
import difflib
import fcntl
import gc
import inspect
import json
import math
import os
import re
import runpy
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from checkpoint import DamagedCheckpoint, build_model, load_checkpoint, read_log, writing
from data.loader import Tokens, UserError, atomic_write, dataset_folder, read_meta
from measure import Statistics, at_once, collect, training_record, window_batches
from model import GPT, RESIDUALS, GPTConfig, twin


@dataclass
class Config(GPTConfig):
    """The settings of a run: those of the model, and these. vocab_size comes with the data, and is none."""

    # the data
    dataset: str = 'fineweb_edu'  # data/<dataset>/, or a path if it has a slash
    bos: bool = (
        False  # every window starts with the end-of-text id, in training, evaluating and measuring alike
    )
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
    out_dir: str = ''  # '': out/<name of the config file, or else of the residual>
    init_from: str = 'scratch'  # 'resume' goes on from out_dir's checkpoint; 'auto' does if there is one
    log_interval: int = 10  # steps between lines on the console
    eval_interval: int = (
        500  # steps between lines in log.jsonl; also at step 0, at powers of two and at the end
    )
    eval_sequences: int = (
        128  # fixed windows of each split for the losses; the first 64 of val for the streams
    )
    ckpt_interval: int = 1000  # steps between checkpoints
    snapshots: str = ''  # '0,500': iterations whose weights are kept as ckpt_<iter>.pt
    # the machine
    device: str = 'auto'  # cuda if there is one, else cpu
    dtype: str = 'auto'  # of autocast: bfloat16 on cuda, float32 (none) on cpu
    compile: bool = True  # torch.compile; up to a minute well spent, except for the smallest runs
    cuda_graphs: bool = (
        True  # with compile, on a GPU: launching its kernels one by one would take longer than they do
    )
    kernels: bool = True  # kernels.py for the training step where it applies: the ledger in bfloat16 on a GPU

    def __post_init__(self):
        positive = (
            'lr',
            'grad_clip',
            'batch_size',
            'max_iters',
            'log_interval',
            'eval_interval',
            'eval_sequences',
            'ckpt_interval',
        )
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and not (
                0 < value < math.inf if f.name in positive else 0 <= value < math.inf
            ):
                raise UserError(
                    f'{f.name} is {value}: expected a number {"above 0" if f.name in positive else "of 0 or more"}'
                )
        for name, choices in {
            'init_from': ('scratch', 'resume', 'auto'),
            'device': ('auto', 'cpu', 'cuda'),
            'dtype': ('auto', 'float32', 'bfloat16'),
        }.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is '{getattr(self, name)}': expected one of {', '.join(choices)}")
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2**63:
            raise UserError(
                f'beta1 = {self.beta1}, beta2 = {self.beta2}, seed = {self.seed}: expected betas below 1 and a seed below 2⁶³'
            )
        if not all(part.isdecimal() for part in self.snapshots.split(',') if self.snapshots):
            raise UserError(
                f"snapshots is '{self.snapshots}': expected iterations with commas between, like 0,500"
            )
        super().__post_init__()

    def model_config(self, vocab_size):
        own = {field.name: getattr(self, field.name) for field in fields(GPTConfig)}
        return GPTConfig(**{**own, 'vocab_size': vocab_size})


# What may differ between a checkpoint and the command that resumes it: none of it changes a step that has been taken.
FREE_TO_CHANGE = (
    'max_iters',
    'out_dir',
    'init_from',
    'log_interval',
    'eval_interval',
    'ckpt_interval',
    'snapshots',
    'device',
    'compile',
    'cuda_graphs',
    'kernels',
    'micro_batch',
)
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12}  # dense bfloat16, from the vendor's data sheets
MEASURED_SEQUENCES = 64  # windows of the short measurement in log.jsonl


def run_config_file(file):
    """Returns the names that a config file assigns. It is the user's own Python: whatever it raises is said in one line."""
    try:
        names = runpy.run_path(file)
    except FileNotFoundError:
        raise UserError(f'there is no config file {file}: config/ holds one for each arm and scale') from None
    except (Exception, SystemExit) as error:
        lines = [getattr(error, 'lineno', None)] + [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        raise UserError(
            f'{file}, line {next(filter(None, lines[::-1]), "?")}: {type(error).__name__}: {error}'
        ) from None
    return {
        key: value for key, value in names.items() if not key.startswith('_') and type(value) is not type(sys)
    }


def parse_value(text, expected):
    """Returns the text of --key=text as the type that the setting has, or as it stands if it has no such form."""
    if expected is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return int(value) if expected is int and type(value) is float and value.is_integer() else value  # 1e3


def read_config(argv):
    """Returns the Config of a command line: at most one config file, then --key=value. Every name must be a setting that the arm uses."""
    types = {f.name: f.type for f in fields(Config) if f.name != 'vocab_size'}
    files = [arg for arg in argv if not arg.startswith('--')]
    if len(files) > 1:
        raise UserError(
            f'more than one config file ({", ".join(files)}): name one, and settings as --key=value'
        )
    given = [(file, key, value) for file in files for key, value in run_config_file(file).items()]
    flags = [(arg, *arg[2:].partition('=')) for arg in argv if arg.startswith('--')]
    for arg, key, equals, text in flags:
        if not equals or [flag[1] for flag in flags].count(key) > 1:
            raise UserError(f'{arg}: write every setting once, as --key=value')
        given.append((arg, key, parse_value(text, types.get(key, str))))
    values = {}
    for where, key, value in given:
        if key not in types:
            near = difflib.get_close_matches(key, types, 1, 0.5)
            raise UserError(
                f"{where}: there is no setting '{key}'"
                + (f", did you mean '{near[0]}'?" if near else ': python train.py --help lists them')
            )
        values[key] = float(value) if types[key] is float and type(value) is int else value
        if type(values[key]) is not types[key]:
            words = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text in quotes'}[
                types[key]
            ]
            raise UserError(f'{where}: {key} is {value!r}, expected {words}, like {getattr(Config, key)!r}')
    try:
        config = Config(**values)
    except UserError as error:  # it begins with the setting's name
        place = next((f'{where}: ' for where, key, _ in given if str(error).startswith(f'{key} ')), '')
        raise UserError(f'{place}{error}') from None
    for name, operator in RESIDUALS.items():
        idle = [
            key
            for key in operator.settings
            if key in values and key not in RESIDUALS[config.residual].settings
        ]
        if idle:
            raise UserError(
                f"{idle[0]} does nothing where residual is '{config.residual}': it belongs to '{name}'"
            )
    config.out_dir = config.out_dir or f'out/{Path(files[0]).stem if files else config.residual}'
    return config


class World:
    """The processes of one run, numbered by torchrun; one process alone is a world of size 1."""

    def __init__(self, device):
        self.rank, self.size, local = (
            int(os.environ.get(name, default))
            for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
        )
        gpus = torch.cuda.device_count()
        self.device = f'cuda:{local}' if device == 'cuda' or device == 'auto' and gpus else 'cpu'
        if self.device != 'cpu':
            if local >= gpus:
                raise UserError(
                    f'device={device}, but PyTorch sees {gpus} GPUs for {local + 1} or more processes on this machine: use --device=cpu, or fewer processes'
                )
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group('gloo' if self.device == 'cpu' else 'cpu:gloo,cuda:nccl')

    def sum(self, tensor):
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """True on all processes if it is on one. On the CPU, so that nobody waits for a GPU."""
        return bool(self.sum(torch.tensor(float(flag)))) if self.size > 1 else flag

    @staticmethod
    def leave():
        """To be called at the end of a run, once nothing refers to its DDP: PyTorch 2.11 aborts now and then if that outlives the processes' group."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()

    def share(self, config):
        """Returns how many sequences this process has of every step, and how many it puts through the model at once."""
        n = config.batch_size
        if n % self.size:
            raise UserError(
                f'batch_size = {n} cannot be shared by {self.size} processes: it can by {", ".join(str(k) for k in range(1, n + 1) if n % k == 0)}'
            )
        mine = n // self.size
        micro_batch = min(config.micro_batch or mine, mine)
        if mine % micro_batch:
            raise UserError(
                f'micro_batch = {micro_batch} does not divide the {mine} sequences that each of {self.size} processes has of batch_size = {n}'
            )
        return mine, micro_batch


def open_data(config, world):
    """Returns {'train': Tokens, 'val': Tokens} and the dataset's meta. The demo's data is made here if it is missing."""
    folder = dataset_folder(config.dataset)
    if config.dataset == 'pysource_demo' and not (folder / 'train.bin').exists():
        if world.rank == 0:
            from data.pysource import prepare

            prepare.main(prepare.DEMO)
        world.any(False)  # the others wait
    meta = read_meta(folder)
    return {
        split: Tokens(
            folder, split, config.block_size, meta['vocab_size'], meta['eot'] if config.bos else None
        )
        for split in ('train', 'val')
    }, meta


def make_optimizer(model, config):
    """AdamW. Matrices and embeddings decay; vectors (biases, gains, λ, w_c) do so with decay_all alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {'params': matrices, 'weight_decay': config.weight_decay},
        {'params': vectors, 'weight_decay': config.weight_decay if config.decay_all else 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(it, config):
    """Linear warm-up to lr, then a cosine to min_lr_ratio · lr at max_iters."""
    if it < config.warmup_iters:
        return config.lr * (it + 1) / config.warmup_iters
    progress = min(1.0, (it - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters))
    low = config.min_lr_ratio * config.lr
    return low + (config.lr - low) * (1 + math.cos(math.pi * progress)) / 2


class Run:
    """One training run: the model, its optimizer, its data and its folder."""

    def __init__(self, config):
        self.config, self.world = config, World(config.device)
        self.mine, self.micro_batch = self.world.share(config)
        self.tokens, meta = open_data(config, self.world)
        self.fixed_starts = {
            split: tokens.fixed_starts(max(config.eval_sequences, MEASURED_SEQUENCES))
            for split, tokens in self.tokens.items()
        }
        self.out = Path(config.out_dir)
        cuda = self.world.device != 'cpu'
        self.dtype = config.dtype if config.dtype != 'auto' else 'bfloat16' if cuda else 'float32'
        if config.compile and cuda:
            import_module(
                'torch._inductor.async_compile'
            )  # its worker processes come up while the model is made
        torch.manual_seed(config.seed)
        self.config = config = replace(config, vocab_size=meta['vocab_size'])
        self.model = GPT(config.model_config(meta['vocab_size'])).to(self.world.device)
        self.optimizer = make_optimizer(self.model, config)
        self.step_model = self.model_for_steps()
        self.graphs = config.compile and config.cuda_graphs and cuda
        if config.compile:
            self.compile_parts()
        # fewer, larger exchanges: results/h100/buckets.json
        self.wrapped = (
            DistributedDataParallel(self.step_model, gradient_as_bucket_view=True, bucket_cap_mb=100)
            if self.world.size > 1
            else self.step_model
        )
        self.constants = {
            'model_args': asdict(self.model.config),
            'config': asdict(config),
            'data_sha256': meta.get('sha256'),
        }
        self.iter_num, self.val_loss, self.best_val_loss = 0, math.inf, math.inf
        self.broken = torch.zeros(
            (), device=self.world.device
        )  # becomes 1 at the first gradient that is not finite, and stays
        self.good_steps = torch.zeros((), device=self.world.device)  # steps before that
        self.lock = None
        self.newest_is_whole = True  # ckpt.pt, that is: what cannot be read is not kept as ckpt_prev.pt
        self.optimizer.found_inf = self.broken  # fused AdamW leaves the weights alone while this is 1

    def model_for_steps(self):
        """The model as the training step runs it: through kernels.py if that applies, and else as it stands."""
        if (
            not self.config.kernels
            or self.dtype != 'bfloat16'
            or self.world.device == 'cpu'
            or self.config.residual == 'baseline'
        ):
            return self.model
        try:
            from speed.kernels import fast
        except ImportError:  # kernels.py was deleted, or there is no Triton
            return self.model
        fast_model = fast(self.model)
        self.say(
            'the ledger update runs through kernels.py'
            if fast_model
            else f'kernels.py is left out: it does not compute this {self.config.residual}, or not on this GPU'
        )
        return fast_model or self.model

    def compile_parts(self):
        """Compiles the step's model in parts, each kind of sublayer once: unrolled, all of them take twice as long. The measured model stays as it is."""
        how = {
            'fullgraph': True,
            'dynamic': False,
            'options': {'triton.cudagraphs': True} if self.graphs else None,
        }
        torch._dynamo.config.recompile_limit = max(
            64, 4 * len(self.model.sublayers)
        )  # an operator may be another in every sublayer
        torch._dynamo.config.optimize_ddp = (
            False  # it would cut the parts up; their gradients come one part after another as it is
        )
        self.step_model = twin(self.step_model)
        for sublayer in self.step_model.sublayers:
            sublayer.compile(**how)
        self.step_model.start, self.step_model.cross_entropy = (
            torch.compile(part, **how) for part in (self.step_model.start, self.step_model.cross_entropy)
        )

    def begin_pass(self):
        """To be called before what no longer needs anything of an earlier pass: CUDA graphs use its memory again."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self):
        return (
            torch.autocast(self.world.device.split(':')[0], torch.bfloat16)
            if self.dtype == 'bfloat16'
            else nullcontext()
        )

    def windows(self, split, starts):
        """Returns inputs and targets on the device, without waiting for the copy."""
        pair = self.tokens[split].windows(starts)
        return (
            pair
            if self.world.device == 'cpu'
            else [t.pin_memory().to(self.world.device, non_blocking=True) for t in pair]
        )

    def micro_batches(self, it):
        """Yields inputs and targets of step `it`, as much at once as this process puts through the model."""
        starts = self.tokens['train'].training_starts(self.config.seed, it, self.config.batch_size)[
            self.world.rank * self.mine :
        ][: self.mine]
        for i in range(0, self.mine, self.micro_batch):
            yield self.windows('train', starts[i : i + self.micro_batch])

    def step(self):
        """One update of the weights. Returns the mean loss of this process's sequences and the commit rates, still on the device."""
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate(self.iter_num, self.config)
        share, total = self.micro_batch / self.mine, 0
        self.begin_pass()
        for i, (x, y) in enumerate(self.micro_batches(self.iter_num), 1):
            with (
                nullcontext()
                if i * self.micro_batch == self.mine or self.world.size == 1
                else self.wrapped.no_sync()
            ):  # gradients are exchanged once a step
                with self.autocast():
                    objective, loss, commit_rate = self.wrapped(x, y)
                (objective * share).backward()
            total = total + torch.cat([loss.detach()[None], commit_rate.detach()]) * share
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.broken.copy_(torch.maximum(self.broken, (~norm.isfinite()).float()))
        self.good_steps += 1 - self.broken
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.iter_num += 1
        return total

    def check_finite(self, first):
        """Waits for the device. Raises if a gradient was not finite at some step since `first`; no weight has changed since then."""
        if self.broken.item():
            it = first + int(self.good_steps.item())
            raise UserError(
                f'step {it} is not finite, first in {self.first_not_finite(it)}; no weight has changed since, and the checkpoints in {self.out} are from '
                'before it: start again with a lower --lr in another --out_dir'
            )

    def first_not_finite(self, it):
        """Takes step `it` again, uncompiled, without an update. Returns the name of what is first not finite, in the order of computing."""
        found = []

        def watch(name):
            def hook(module, args, output):
                if not all(x.isfinite().all() for x in tree_leaves(output) if torch.is_tensor(x)):
                    found.append(f'the output of {name}' if name else 'the loss')

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.model.named_modules()]
        for x, y in self.micro_batches(it):
            with self.autocast():
                self.model(x, y)[0].backward()
        for handle in handles:
            handle.remove()
        found += [
            f'the gradient of {name}'
            for name, p in reversed(list(self.model.named_parameters()))
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        return found[0] if found else 'a gradient of another process'

    def losses(self, split):
        """Returns the loss on the first eval_sequences fixed windows and the commit rate of each sublayer, as one list."""
        starts, n = self.fixed_starts[split][: self.config.eval_sequences], self.micro_batch
        total = 0
        for i in range(0, len(starts), n * self.world.size):
            chunk = starts[i + n * self.world.rank :][:n]
            model = self.step_model if len(chunk) == n else self.model  # the compiled graph has one shape
            self.begin_pass()
            with (
                torch.set_grad_enabled(self.config.compile),
                self.autocast(),
            ):  # and one mode: evaluating in it spares a second compilation
                _, loss, commit_rate = model(*self.windows(split, chunk if len(chunk) else starts[:1]))
            total = total + torch.cat([loss.detach()[None], commit_rate.detach()]).double() * (
                len(chunk) / len(starts)
            )
        return self.world.sum(total).tolist()

    def streams(self):
        """Returns the short measurement of every stream on the fixed windows, in the precision of training."""
        starts, statistics = self.fixed_starts['val'][:MEASURED_SEQUENCES], Statistics(topk=3)
        with self.autocast():
            mine = starts[self.world.rank :: self.world.size]
            batch_size = at_once(self.world.device, self.config.block_size)
            collect(self.model, window_batches(self.tokens['val'], mine, batch_size), statistics)
        if self.world.size > 1:
            parts = [None] * self.world.size
            dist.all_gather_object(parts, {name: total.cpu() for name, total in statistics.sums.items()})
            statistics.sums = {name: sum(part[name] for part in parts if part) for name in parts[0]}
        return training_record(statistics)

    def evaluate(self):
        """Returns a line of log.jsonl but for the speed of training."""
        (train_loss, *_), (self.val_loss, *commit_rate) = self.losses('train'), self.losses('val')
        begin = time.perf_counter()
        return {
            'iter': self.iter_num,
            'tokens': self.iter_num * self.config.batch_size * self.config.block_size,
            'train_loss': train_loss,
            'val_loss': self.val_loss,
            'lr': learning_rate(self.iter_num, self.config),
            'commit_rate': commit_rate,
            'precision': f'{self.dtype} autocast, {"bfloat16" if self.config.bf16_streams else "float32"} streams',
            'streams': self.streams(),
            'streams_s': round(time.perf_counter() - begin, 3),
        }

    def write(self, name, **more):
        """Writes a checkpoint of the weights and `more`."""
        size = sum(p.numel() * p.element_size() for p in self.model.parameters()) * (
            3 if 'optimizer' in more else 1
        )
        with (
            writing(self.out / name, f', which needs about {size:,} bytes'),
            atomic_write(self.out / name) as file,
        ):
            torch.save(
                {
                    'model': self.model.state_dict(),
                    'iter_num': self.iter_num,
                    'val_loss': self.val_loss,
                    **self.constants,
                    **more,
                },
                file,
            )

    def save(self, planned=True):
        """Writes ckpt.pt and, if it was planned and is the best so far, ckpt_best.pt; what was ckpt.pt becomes ckpt_prev.pt."""
        if planned and self.val_loss < self.best_val_loss:
            self.best_val_loss = self.val_loss
            self.write('ckpt_best.pt')
        self.write('ckpt_new.pt', optimizer=self.optimizer.state_dict(), best_val_loss=self.best_val_loss)
        if (self.out / 'ckpt.pt').exists() and self.newest_is_whole:
            os.replace(self.out / 'ckpt.pt', self.out / 'ckpt_prev.pt')
        os.replace(self.out / 'ckpt_new.pt', self.out / 'ckpt.pt')
        self.newest_is_whole = True

    def open_folder(self):
        """Makes out_dir this run's own, and starts in it or goes on from its newest whole checkpoint. Returns whether this iteration is in the log."""
        if (self.out / 'lock').exists():
            self.take_lock()
        found = [self.out / name for name in ('ckpt.pt', 'ckpt_prev.pt') if (self.out / name).exists()]
        if found and self.config.init_from == 'scratch':
            raise UserError(
                f'{self.out} holds a run already: go on with --init_from=resume, or name another --out_dir'
            )
        if not found and self.config.init_from == 'resume':
            raise UserError(
                f'there is no checkpoint in {self.out} to resume: start without --init_from=resume'
            )
        self.take_lock()
        for path in found:
            try:
                self.restore(load_checkpoint(path), path)
                break
            except DamagedCheckpoint as error:
                if path == found[-1] and self.config.init_from == 'resume':
                    raise
                self.say(f'{error}')
                self.newest_is_whole = False
        if self.world.rank > 0:
            return False
        lines = [line for line in read_log(self.out / 'log.jsonl') if line['iter'] <= self.iter_num > 0]
        with (
            writing(self.out / 'log.jsonl'),
            atomic_write(self.out / 'log.jsonl', 'w') as file,
        ):  # lines past the checkpoint go: their steps will be taken again
            file.writelines(json.dumps(line) + '\n' for line in lines)
        return any(line['iter'] == self.iter_num for line in lines)

    def take_lock(self):
        """Keeps other runs out of out_dir until this process ends, however it ends."""
        if self.world.rank > 0 or self.lock:
            return
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / 'lock', 'a')
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f'another run is writing to {self.out}: wait for it, or name another --out_dir'
                ) from None

    def restore(self, checkpoint, path):
        """Puts the state of a checkpoint in place, unless it is damaged or belongs to another run than this one's config describes."""
        old, new = (
            {**c['config'], **c['model_args'], 'data_sha256': c.get('data_sha256')}
            for c in (checkpoint, self.constants)
        )
        changed = {
            key: f'{key} {old.get(key)!r} → {value!r}' for key, value in new.items() if old.get(key) != value
        }
        refused = [text for key, text in changed.items() if key not in FREE_TO_CHANGE]
        if refused:
            raise UserError(
                f'{path} belongs to another run ({", ".join(refused)}): give it those settings, or name another --out_dir'
            )
        build_model(checkpoint, path)  # says what is wrong with the weights, before anything is replaced
        try:
            parameters = [p for group in self.optimizer.param_groups for p in group['params']]
            saved = checkpoint['optimizer']['state']
            state = {
                i: {name: saved[i][name].contiguous() for name in ('step', 'exp_avg', 'exp_avg_sq')}
                for i in range(len(parameters))
            }
            whole = all(
                x.isfinite().all()
                and x.shape == (() if name == 'step' else p.shape)  # fused AdamW itself checks nothing
                for i, p in enumerate(parameters)
                for name, x in state[i].items()
            )
            it, val_loss, best = (
                checkpoint['iter_num'],
                checkpoint['val_loss'] + 0.0,
                checkpoint['best_val_loss'] + 0.0,
            )
            whole = whole and type(it) is int and it >= 0
        except (KeyError, TypeError, AttributeError, IndexError):
            whole = False
        if not whole:
            raise DamagedCheckpoint(
                f'{path} lacks what a resume needs, or its optimizer belongs to another model: use ckpt_prev.pt beside it, or start again'
            )
        self.model.load_state_dict(checkpoint['model'])
        self.optimizer.load_state_dict(
            {'state': state, 'param_groups': self.optimizer.state_dict()['param_groups']}
        )
        self.iter_num, self.val_loss, self.best_val_loss = it, val_loss, best
        self.say(f'resuming {path} at iteration {it}' + ''.join(f', {text}' for text in changed.values()))

    def say(self, text):
        if self.world.rank == 0:
            print(text, flush=True)

    def log(self, line):
        if self.world.rank == 0:
            with writing(self.out / 'log.jsonl'), open(self.out / 'log.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that relies on it

    def speed(self, steps, seconds):
        """Returns tokens/s over all processes, and their share of the GPUs' bfloat16 peak or None where that is not known."""
        rate = steps * self.config.batch_size * self.config.block_size / seconds
        name = torch.cuda.get_device_name() if self.world.device != 'cpu' else ''
        peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
        return {
            'tokens_per_s': round(rate),
            'mfu': peak and round(rate * self.model.flops_per_token() / (peak * self.world.size), 4),
        }


def console_line(it, config, loss, commit_rate, ms, tokens_per_s, mfu):
    left = round((config.max_iters - it) * ms / 1000)
    commit, mfu = (
        f'{sum(commit_rate) / len(commit_rate):.3f}' if commit_rate else 'n/a',
        'n/a' if mfu is None else f'{mfu:.1%}',
    )
    return (
        f'iter {it:6d}/{config.max_iters} | loss {loss:.4f} | lr {learning_rate(it - 1, config):.2e} | {ms:.0f} ms | {tokens_per_s / 1e3:,.1f}k tok/s | '
        f'mfu {mfu} | commit {commit} | left {left // 60}m{left % 60:02d}s'
    )


def train(config):
    run = Run(config)
    world, logged = run.world, run.world.any(run.open_folder())
    first, snapshots = run.iter_num, {int(part) for part in config.snapshots.split(',') if part}
    received = []  # signals, as they come; acted on when a step is whole
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    run.say(
        f'{config.out_dir}: {config.residual}, {run.model.num_params() / 1e6:.1f}M parameters, {run.dtype}, {world.size} processes on {world.device}, '
        f'{config.batch_size} sequences of {config.block_size} tokens a step as {world.size} × {run.mine // run.micro_batch} × {run.micro_batch}'
    )
    clock, steps = time.perf_counter(), 0  # since the last line on the console
    trained = [0, 0.0]  # steps and seconds since the last evaluation
    while True:
        it, stopping = run.iter_num, world.any(bool(received))
        saving = it > first and (it % config.ckpt_interval == 0 or it == config.max_iters)
        if (saving or it in snapshots or it % config.eval_interval == 0 or it & (it - 1) == 0) and not (
            logged and it == first
        ):
            run.check_finite(first)
            trained = [trained[0] + steps, trained[1] + time.perf_counter() - clock]
            line = run.evaluate()
            run.log({**line, **run.speed(*trained)})
            run.say(
                f'iter {it:6d}/{config.max_iters} | train loss {line["train_loss"]:.4f} | val loss {line["val_loss"]:.4f}'
            )
            clock, steps, trained = time.perf_counter(), 0, [0, 0.0]
        if it in snapshots and world.rank == 0:
            run.write(f'ckpt_{it}.pt')
        if saving or stopping and it > first:
            run.check_finite(first)
            run.val_loss = run.val_loss if saving else run.losses('val')[0]
            if world.rank == 0:
                run.save(planned=saving)
        if stopping or it >= config.max_iters:
            break
        losses = run.step()
        steps += 1
        if run.iter_num % config.log_interval == 0 or run.iter_num == first + 1:
            loss, *commit_rate = (world.sum(losses) / world.size).tolist()
            run.check_finite(first)
            seconds = time.perf_counter() - clock
            run.say(
                console_line(
                    run.iter_num,
                    config,
                    loss,
                    commit_rate,
                    1000 * seconds / steps,
                    **run.speed(steps, seconds),
                )
            )
            clock, steps, trained = time.perf_counter(), 0, [trained[0] + steps, trained[1] + seconds]
    run.wrapped = None
    World.leave()
    if stopping and it < config.max_iters:
        number = received[0] if received else signal.SIGTERM
        run.say(
            f'stopped by {signal.Signals(number).name} after iteration {it}: go on with --init_from=resume'
        )
        sys.exit(128 + number)
    run.say(f'done: val loss {run.val_loss:.4f}; next: python measure.py --ckpt {config.out_dir}')


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & set(argv):
        sources = ''.join(inspect.getsource(kind).partition('    def ')[0] for kind in (GPTConfig, Config))
        print(__doc__ + '\n' + sources)
        return
    try:
        train(read_config(argv))
    except UserError as error:
        sys.exit(f'error: {error}')
    except torch.cuda.OutOfMemoryError:
        sys.exit(
            'error: the GPU has too little memory for this micro_batch: lower it with --micro_batch, the run stays the same'
        )
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search('gloo|NCCL|[Cc]onnection', str(error)):
            raise
        sys.exit(
            f'error: another process of this run is gone ({str(error).splitlines()[0][:120]}): go on with --init_from=resume'
        )


if __name__ == '__main__':
    main()
