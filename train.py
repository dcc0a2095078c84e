"""
Trains one arm: one process or many, CPU or GPUs, the same run.

    python train.py config/ledger_demo.py --max_iters=500                   one process
    torchrun --nproc_per_node=8 train.py config/ledger_290m.py              eight GPUs
    python train.py config/ledger_demo.py --init_from=resume                goes on exactly where it stopped

Settings are the fields of GPTConfig (model.py) and of Config (settings.py); --help lists them. A config file
assigns some of them, --key=value has the last word. A run writes out/<name of the config file>/: log.jsonl,
ckpt.pt, ckpt_prev.pt, ckpt_best.pt.
"""

import machine

import copy
import math
import re
import signal
import sys
import time
from bisect import bisect_right
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from arms import arm_part
from checkpoint import RunFolder, build_model, differences, resumable
from data.loader import Tokens, UserError, dataset_folder, read_meta, user_errors_exit
from measure import Statistics, at_once, collect, training_record, window_batches
from model import GPT, twin
from settings import FREE_TO_CHANGE, Config, help_text, read_config
from world import World, first_line, precision, wants_compile

PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12}  # dense bfloat16, from the vendor's data sheets
MEASURED_SEQUENCES = 64  # windows of the short measurement in log.jsonl
# In float16 a step whose gradients overflow is skipped, and the scale of the loss halved. After so many in
# a row the scale is far below 1: it is not the scale that is wrong.
OVERFLOWS_IN_A_ROW = 30


def open_data(config, world):
    """Returns {'train': Tokens, 'val': Tokens} and the dataset's meta. The demo's data is made here if it is
    missing."""
    folder = dataset_folder(config.dataset)
    if config.dataset == 'pysource_demo' and not (folder / 'train.bin').exists():
        if world.rank == 0:
            from data.pysource import prepare

            prepare.main(prepare.DEMO)
        world.any(False)  # the others wait
    meta = read_meta(folder)
    first_token = meta['eot'] if config.bos else None
    splits = ('train', 'val')
    sizes = (config.block_size, meta['vocab_size'], first_token)
    return {split: Tokens(folder, split, *sizes) for split in splits}, meta


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


class Smoothed:
    """A mean that forgets: the first value at once, since it holds compiling and warming up, the others
    slowly."""

    def __init__(self):
        self.value, self.count = 0.0, 0

    def add(self, value):
        weight = max(0.1, 1 / max(1, self.count))
        self.value += weight * (value - self.value)
        self.count += 1


class Pace:
    """The clocks of a run: of the stretch of steps since the last line on the console or the last pause; of
    all steps since the last line of log.jsonl; and smoothed, for the time left. Evaluating and saving are
    pauses."""

    def __init__(self):
        self.begin, self.steps = time.perf_counter(), 0
        self.logged_steps, self.logged_seconds = 0, 0.0
        self.seconds_per_step, self.seconds_per_pause = Smoothed(), Smoothed()

    def stretch(self):
        """Ends a stretch. Returns its steps and seconds, and begins the next."""
        now = time.perf_counter()
        steps, seconds = self.steps, now - self.begin
        self.begin, self.steps = now, 0
        self.logged_steps += steps
        self.logged_seconds += seconds
        if steps:
            self.seconds_per_step.add(seconds / steps)
        return steps, seconds

    def since_last_log(self):
        """Returns the steps and seconds since this was last asked."""
        answer = self.logged_steps, self.logged_seconds
        self.logged_steps, self.logged_seconds = 0, 0.0
        return answer

    @contextmanager
    def pause(self):
        self.stretch()
        begin = self.begin
        yield
        self.begin = time.perf_counter()
        self.seconds_per_pause.add(self.begin - begin)

    def time_left(self, steps, pauses):
        """Returns how long so many steps and pauses take, as minutes and seconds."""
        seconds = steps * self.seconds_per_step.value + pauses * self.seconds_per_pause.value
        minutes, seconds = divmod(round(seconds), 60)
        return f'{minutes}m{seconds:02d}s'


class Run:
    """One training run: the model, its optimizer, its data and its folder."""

    def __init__(self, config):
        self.world = World(config.device)
        self.device = self.world.device
        self.own_sequences, self.micro_batch = self.world.share(config)
        self.dtype = precision(config, self.device)
        self.tokens, meta = open_data(config, self.world)
        self.config = config = replace(config, vocab_size=meta['vocab_size'])
        count = max(config.eval_sequences, MEASURED_SEQUENCES)
        self.fixed_starts = {split: tokens.fixed_starts(count) for split, tokens in self.tokens.items()}
        self.folder = RunFolder(config.out_dir, writes=self.world.rank == 0, say=self.say)
        self.wandb = None
        self.make_model()
        self.constants = {
            'model_args': asdict(self.model.config),
            'config': asdict(config),
            'data_sha256': meta.get('sha256'),
        }
        self.iter_num, self.val_loss, self.best_val_loss = 0, math.inf, math.inf
        self.first = 0  # the iteration at which this process took the run up
        self.is_logged = False  # whether that iteration stands in the log already
        self.snapshots = {int(part) for part in config.snapshots.split(',') if part}
        self.lines_due = [it for it in range(config.max_iters + 1) if self.is_due(it)]

    def make_model(self):
        """Makes the model, what the training step makes of it, and the optimizer."""
        config, is_cuda = self.config, self.world.device_type == 'cuda'
        self.compiled, sentence = wants_compile(config, self.world.device_type)
        if sentence:
            self.say(sentence)
        self.graphs = self.compiled and config.cuda_graphs and is_cuda
        if self.compiled and is_cuda:
            # The compiler's worker processes come up while the model is made.
            import_module('torch._inductor.async_compile')
        torch.manual_seed(config.seed)
        self.model = GPT(config.model_config()).to(self.device)
        self.step_model = self.model_for_steps()
        if self.compiled:
            self.compile_parts()
        self.wrapped = self.step_model
        if self.world.size > 1:
            # Fewer, larger exchanges (results/speed/h100_buckets.json). Buffers are an arm's constants.
            how = {'gradient_as_bucket_view': True, 'bucket_cap_mb': 100, 'broadcast_buffers': False}
            self.wrapped = DistributedDataParallel(self.step_model, **how)
        self.optimizer = arm_part(config, 'make_optimizer', make_optimizer)(self.model, config)
        self.scaler = torch.amp.GradScaler(self.world.device_type, enabled=self.dtype == 'float16')
        # Fused AdamW leaves the weights alone while found_inf is 1.
        self.optimizer.found_inf = torch.zeros((), device=self.device)
        self.overflows = torch.zeros((), device=self.device)  # steps in a row whose gradients are not finite
        self.broken = torch.zeros((), device=self.device)  # becomes 1 when those are too many, and stays
        self.good_steps = torch.zeros((), device=self.device)  # steps before that

    def model_for_steps(self):
        """Returns the model as the training step runs it: through the kernels if they apply, else as it
        stands."""
        applies = self.dtype == 'bfloat16' and self.world.device_type == 'cuda'
        if not self.config.kernels or not applies or self.config.residual == 'baseline':
            return self.model
        try:
            from speed.kernels import fast
        except ImportError:  # kernels.py was deleted, or there is no Triton
            return self.model
        fast_model = fast(self.model)
        if fast_model:
            self.say('the ledger update runs through kernels.py')
        else:
            self.say(
                f'kernels.py is left out: it does not compute this {self.config.residual}, or not on this GPU'
            )
        return fast_model or self.model

    def compile_parts(self):
        """Compiles the step's model in parts, each kind of sublayer once: unrolled, all of them take twice
        as long. The measured model stays as it is."""
        options = {'triton.cudagraphs': True} if self.graphs else None
        how = {'fullgraph': True, 'dynamic': False, 'options': options}
        # An operator may be another one in every sublayer.
        torch._dynamo.config.recompile_limit = max(64, 4 * len(self.model.sublayers))
        # It would cut the parts up; their gradients come one part after another as it is.
        torch._dynamo.config.optimize_ddp = False
        self.step_model = twin(self.step_model)
        for sublayer in self.step_model.sublayers:
            sublayer.compile(**how)
        self.step_model.start = torch.compile(self.step_model.start, **how)
        self.step_model.cross_entropy = torch.compile(self.step_model.cross_entropy, **how)

    def begin_pass(self):
        """To be called before what no longer needs anything of an earlier pass: CUDA graphs use its memory
        again."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self):
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.world.device_type, getattr(torch, self.dtype))

    def windows(self, split, starts):
        """Returns inputs and targets on the device, without waiting for the copy."""
        pair = self.tokens[split].windows(starts)
        if self.world.device_type != 'cuda':
            return [t.to(self.device) for t in pair]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in pair]

    def micro_batches(self, it):
        """Yields inputs and targets of step `it`, as much at once as this process puts through the model."""
        starts = self.tokens['train'].training_starts(self.config.seed, it, self.config.batch_size)
        own = starts[self.world.rank * self.own_sequences :][: self.own_sequences]
        for i in range(0, len(own), self.micro_batch):
            yield self.windows('train', own[i : i + self.micro_batch])

    def step(self):
        """Takes one step. Returns the mean loss of this process's sequences and the commit rates, on the
        device."""
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate(self.iter_num, self.config)
        share, total = self.micro_batch / self.own_sequences, 0
        self.begin_pass()
        for i, (x, y) in enumerate(self.micro_batches(self.iter_num), 1):
            is_last = i * self.micro_batch == self.own_sequences
            # Processes exchange their gradients once a step, at its last backward pass.
            keeps_to_itself = self.world.size > 1 and not is_last
            with self.wrapped.no_sync() if keeps_to_itself else nullcontext():
                with self.autocast():
                    objective, loss, commit_rate = self.wrapped(x, y)
                self.scaler.scale(objective * share).backward()
            total = total + torch.cat([loss.detach()[None], commit_rate.detach()]) * share
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.note_overflow(~norm.isfinite())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()
        self.iter_num += 1
        return total

    def note_overflow(self, overflow):
        """Keeps the weights as they are if this step's gradients are not finite, without waiting for the
        device. overflow: a bool on the device. In float16 it may be the scale of the loss that is too
        large."""
        allowed = OVERFLOWS_IN_A_ROW if self.dtype == 'float16' else 1
        overflow = overflow.float()
        self.overflows.copy_((self.overflows + overflow) * overflow)
        self.broken.copy_(torch.maximum(self.broken, (self.overflows >= allowed).float()))
        self.good_steps += 1 - self.broken
        self.optimizer.found_inf.copy_(torch.maximum(self.broken, overflow))

    def check_finite(self):
        """Waits for the device. Raises if the gradients were not finite at some step; no weight has changed
        since."""
        if self.broken.item():
            it = self.first + int(self.good_steps.item())
            raise UserError(
                f'step {it} is not finite, first in {self.first_not_finite(it)}; no weight has changed '
                f'since, and the checkpoints in {self.folder.path} are from before it: start again with a '
                'lower --lr in another --out_dir'
            )

    def first_not_finite(self, it):
        """Takes step `it` again, uncompiled, without an update. Returns the name of what is first not
        finite, in the order of computing."""
        found = []

        def watch(name):
            def hook(module, args, output):
                tensors = [x for x in tree_leaves(output) if torch.is_tensor(x)]
                if not all(x.isfinite().all() for x in tensors):
                    found.append(f'the output of {name}' if name else 'the loss')

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.model.named_modules()]
        for x, y in self.micro_batches(it):
            with self.autocast():
                objective = self.model(x, y)[0]
            self.scaler.scale(objective).backward()
        for handle in handles:
            handle.remove()
        for name, p in reversed(list(self.model.named_parameters())):
            if p.grad is not None and not p.grad.isfinite().all():
                found.append(f'the gradient of {name}')
        return found[0] if found else 'a gradient of another process'

    def losses(self, split):
        """Returns the loss on the first eval_sequences fixed windows and the commit rate of each sublayer,
        as one list."""
        starts, size = self.fixed_starts[split][: self.config.eval_sequences], self.micro_batch
        # MPS has no float64.
        device = 'cpu' if self.world.device_type == 'mps' else self.device
        total = 0
        for i in range(0, len(starts), size * self.world.size):
            own = starts[i + size * self.world.rank :][:size]
            weight = len(own) / len(starts)
            if not len(own):
                own = starts[:1]  # of no weight: a process that has no window left keeps step with the others
            # The compiled graph has one shape, and one mode: evaluating in it spares a second compilation.
            model = self.step_model if len(own) == size else self.model
            self.begin_pass()
            with torch.set_grad_enabled(self.compiled), self.autocast():
                _, loss, commit_rate = model(*self.windows(split, own))
            values = torch.cat([loss.detach()[None], commit_rate.detach()])
            total = total + values.to(device).double() * weight
        return self.world.sum(total).tolist()

    def streams(self):
        """Returns the short measurement of every stream on the fixed windows, in the precision of training;
        None on all processes but the first."""
        starts, statistics = self.fixed_starts['val'][:MEASURED_SEQUENCES], Statistics(topk=3)
        own = starts[self.world.rank :: self.world.size]
        batches = window_batches(self.tokens['val'], own, at_once(self.device, self.config.block_size))
        if self.world.device_type == 'mps':
            collect(copy.deepcopy(self.model).cpu(), batches, statistics)  # MPS has no float64
        else:
            with self.autocast():
                collect(self.model, batches, statistics)
        if self.world.size > 1:
            parts = [None] * self.world.size
            dist.all_gather_object(parts, {name: total.cpu() for name, total in statistics.sums.items()})
            statistics.sums = {name: sum(part[name] for part in parts if part) for name in parts[0]}
        return training_record(statistics) if self.world.rank == 0 else None

    def evaluate(self):
        """Returns a line of log.jsonl but for the speed of training."""
        losses_begin = time.perf_counter()
        train_loss, *_ = self.losses('train')
        self.val_loss, *commit_rate = self.losses('val')
        streams_begin = time.perf_counter()
        stream_precision = 'bfloat16' if self.config.bf16_streams else 'float32'
        return {
            'iter': self.iter_num,
            'tokens': self.iter_num * self.config.batch_size * self.config.block_size,
            'train_loss': train_loss,
            'val_loss': self.val_loss,
            'lr': learning_rate(self.iter_num, self.config),
            'commit_rate': commit_rate,
            'precision': f'{self.dtype} autocast, {stream_precision} streams',
            'losses_s': round(streams_begin - losses_begin, 3),
            'streams': self.streams(),
            'streams_s': round(time.perf_counter() - streams_begin, 3),
        }

    def record(self, pace):
        """Evaluates, and says so in log.jsonl and on the console. Raises if a loss is not finite."""
        line = {**self.evaluate(), **self.speed(*pace.since_last_log())}
        self.folder.log(line)
        self.to_wandb(line)
        losses = f'train loss {line["train_loss"]:.4f} | val loss {line["val_loss"]:.4f}'
        self.say(f'iter {self.iter_num:6d}/{self.config.max_iters} | {losses}')
        self.refuse_infinite_loss(line['train_loss'] + line['val_loss'])

    def refuse_infinite_loss(self, loss):
        if not math.isfinite(loss):
            raise UserError(
                f'the loss is not finite at iteration {self.iter_num}, and nothing of it was saved: '
                f'a checkpoint in {self.folder.path} is from before it: start again with a lower --lr in '
                'another --out_dir'
            )

    def report(self, losses, pace):
        """Says on the console how the last steps went. losses: what the last of them returned."""
        it, config = self.iter_num, self.config
        loss, *commit_rate = (self.world.sum(losses) / self.world.size).tolist()
        self.check_finite()
        steps, seconds = pace.stretch()
        ms, speed = 1000 * seconds / steps, self.speed(steps, seconds)
        lr, mfu = learning_rate(it - 1, config), speed['mfu']
        commit = sum(commit_rate) / len(commit_rate) if commit_rate else None
        pauses = len(self.lines_due) - bisect_right(self.lines_due, it)
        self.say(
            f'iter {it:6d}/{config.max_iters} | loss {loss:.4f} | lr {lr:.2e} | {ms:.0f} ms | '
            f'{speed["tokens_per_s"] / 1e3:,.1f}k tok/s | mfu {"n/a" if mfu is None else f"{mfu:.1%}"} | '
            f'commit {"n/a" if commit is None else f"{commit:.3f}"} | '
            f'left {pace.time_left(config.max_iters - it, pauses)}'
        )
        self.to_wandb({'iter': it, 'loss': loss, 'lr': lr, 'ms': ms, 'commit': commit, **speed})

    def weights(self):
        """Returns what every checkpoint holds."""
        return {
            'model': self.model.state_dict(),
            'iter_num': self.iter_num,
            'val_loss': self.val_loss,
            **self.constants,
        }

    def save(self, planned):
        """Writes ckpt.pt and, if it was planned and is the best so far, ckpt_best.pt. What is best depends
        on no signal. A checkpoint that was not planned has no evaluation to take its loss from."""
        if not planned:
            self.val_loss = self.losses('val')[0]
            self.refuse_infinite_loss(self.val_loss)
        if self.world.rank > 0:
            return
        if planned and self.val_loss < self.best_val_loss:
            self.best_val_loss = self.val_loss
            self.folder.write('ckpt_best.pt', self.weights())
        state = {'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict()}
        self.folder.save({**self.weights(), **state, 'best_val_loss': self.best_val_loss})

    def restore(self, checkpoint, path):
        """Puts the state of a checkpoint in place, unless it is damaged or belongs to another run than this
        one's config describes."""
        changed = differences(checkpoint, self.constants, asdict(Config()))
        free = [*FREE_TO_CHANGE]
        if self.constants['data_sha256'] and 'data_sha256' not in changed:
            free.append('dataset')  # the same data in another place
        refused = [text for setting, text in changed.items() if setting not in free]
        if refused:
            raise UserError(
                f'{path} belongs to another run ({", ".join(refused)}): give it those settings, or name '
                'another --out_dir'
            )
        build_model(checkpoint, path)  # says what is wrong with the weights, before anything is replaced
        state = resumable(checkpoint, self.optimizer, path)
        self.model.load_state_dict(checkpoint['model'])
        self.optimizer.load_state_dict(state)
        if checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.iter_num = self.first = checkpoint['iter_num']
        self.val_loss, self.best_val_loss = checkpoint['val_loss'], checkpoint['best_val_loss']
        self.say(', '.join([f'resuming {path} at iteration {self.iter_num}', *changed.values()]))

    def open(self):
        """Starts in out_dir, or goes on from its newest whole checkpoint."""
        self.folder.open(self.config.init_from, self.restore)
        self.is_logged = self.world.any(self.folder.cut_log(self.iter_num))
        if self.config.wandb and self.world.rank == 0:
            self.wandb = open_wandb(self.config, self.say)
        own = self.own_sequences // self.micro_batch
        name = f'{self.config.residual} {self.config.arm}'.strip()
        self.say(
            f'{self.config.out_dir}: {name}, {self.model.num_params() / 1e6:.1f}M '
            f'parameters, {self.dtype}, {self.world}, {self.config.batch_size} sequences of '
            f'{self.config.block_size} tokens a step as {self.world.size} × {own} × {self.micro_batch}'
        )

    def is_planned(self, it):
        """Whether a checkpoint is written at an iteration, if it is reached."""
        return it % self.config.ckpt_interval == 0 or it == self.config.max_iters

    def is_due(self, it):
        """Whether there is a line of log.jsonl at an iteration: at 0, at powers of two, and with every
        checkpoint."""
        is_power_of_two = it & (it - 1) == 0
        at_interval = it % self.config.eval_interval == 0
        return at_interval or is_power_of_two or self.is_planned(it) or it in self.snapshots

    def say(self, text):
        if self.world.rank == 0:
            machine.say(text)

    def to_wandb(self, line):
        if self.wandb:
            self.wandb.log(dict(flat(line)), step=line['iter'])

    def speed(self, steps, seconds):
        """Returns tokens/s over all processes, and their share of the GPUs' bfloat16 peak. The share is
        None where the peak is not known."""
        rate = steps * self.config.batch_size * self.config.block_size / seconds
        name = torch.cuda.get_device_name() if self.world.device_type == 'cuda' else ''
        peak = next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)
        mfu = peak and round(rate * self.model.flops_per_token() / (peak * self.world.size), 4)
        return {'tokens_per_s': round(rate), 'mfu': mfu}


def open_wandb(config, say):
    """Returns a run of Weights & Biases, or None if there can be none: training needs no other program."""
    try:
        import wandb

        return wandb.init(project=config.wandb, name=Path(config.out_dir).name, config=asdict(config))
    except ImportError:
        say(f'--wandb={config.wandb}: wandb is not installed (pip install wandb), the run goes on without it')
    except Exception as error:  # no account, no network
        say(f'--wandb={config.wandb}: {first_line(error)}; the run goes on without it')


def flat(value, name=''):
    """Yields ('streams/C/norm/3', number) for every number in a nest of dicts and lists."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from flat(entry, f'{name}/{key}' if name else key)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from flat(entry, f'{name}/{i}')
    elif isinstance(value, int | float):
        yield name, value


def catch_signals():
    """Returns a list to which signals are added as they come, to be acted on when a step is whole. A signal
    that was ignored when this process started, as nohup ignores SIGHUP, stays so."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    return received


def train(config):
    """Trains to the end or until a signal comes, and exits with the signal's status then."""
    run = Run(config)
    try:
        run.open()
        received = catch_signals()
        is_stopped = take_steps(run, received)
    finally:
        run.folder.release()
    run.wrapped = None
    World.leave()
    out, it = run.folder.path, run.iter_num
    if is_stopped and it < config.max_iters:
        number = received[0] if received else signal.SIGTERM  # another process may have received it
        name = signal.Signals(number).name
        run.say(f'stopped by {name} after iteration {it}: go on with --init_from=resume')
        sys.exit(128 + number)
    said = f'done: val loss {run.val_loss:.4f}'
    if it == run.first:
        said = f'{out} has taken its {it} steps already, and trains on with a larger --max_iters'
    run.say(f'{said}; next: python measure.py --ckpt {out}')


def take_steps(run, received):
    """Takes the steps that are left, evaluates and saves between them. received: a list of signals. Returns
    whether one of them, on any process, ended it."""
    config, pace, first = run.config, Pace(), run.first
    while True:
        it, is_stopped = run.iter_num, run.world.any(bool(received))
        is_new = it > first
        is_planned = is_new and run.is_planned(it)
        is_save = is_planned or is_new and is_stopped
        is_line = run.is_due(it) and (is_new or not run.is_logged)
        is_snapshot = it in run.snapshots
        if is_line or is_snapshot or is_save:
            run.check_finite()  # waits for the device: here the steps end, and the pause begins
            with pace.pause():
                if is_line:
                    run.record(pace)
                if is_snapshot and run.world.rank == 0:
                    run.folder.write(f'ckpt_{it}.pt', run.weights())
                if is_save:
                    run.save(is_planned)
        if is_stopped or it >= config.max_iters:
            return is_stopped
        losses = run.step()
        pace.steps += 1
        if run.iter_num % config.log_interval == 0 or run.iter_num == first + 1:
            run.report(losses, pace)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & set(argv):
        machine.say(__doc__ + '\n' + help_text())
        return
    try:
        with user_errors_exit():
            train(read_config(argv))
    except KeyboardInterrupt:
        machine.complain('stopped before the first step')
        sys.exit(128 + signal.SIGINT)
    except torch.cuda.OutOfMemoryError:
        sys.exit(
            'error: the GPU has too little memory for this micro_batch: lower it with --micro_batch, the run '
            'stays the same'
        )
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search('gloo|NCCL|[Cc]onnection', str(error)):
            raise
        sys.exit(
            f'error: another process of this run is gone ({first_line(error)}): go on with --init_from=resume'
        )


if __name__ == '__main__':
    main()
