"""
A queue of runs over the GPUs: trains, measures, looks closer, packs what is small, and ends in time.

    python -m studies.recipe                                            the queue below on all GPUs
    python -m studies.recipe runs.txt --limit=1700 --tgz=packed.tgz     a queue of your own, for half an hour
    python -m studies.recipe runs.txt --dataset=english --max_iters=4100      settings for every run

A line of the queue is a run and what is special about it:

    baseline_160m.1338                                   config/baseline_160m.py with --seed=1338
    ledger_160m.1338 --commit_sparsity=0                 one setting changed; its name is ledger_a0_160m_1338
    baseline_160m.1338 --arm=rope_swiglu,gated_attention    its name is rope_swiglu+gated_attention_160m_1338
    mine_160m.1338 config/ledger_160m.py --lr=1e-3       any name, and the config file that it starts from
    ledger_160m.1338 ~17 +intervene "+probe --seeds=3"   takes about 17 minutes to train; then two studies

What is worth knowing before reading on:
- Each GPU trains one run at a time. Its next training starts while the last run is measured beside it.
- A run is measured trained (measure.json) and untrained (measure_0.json), and packed. Then its studies are
  made, and it is packed again after each. What is packed is skipped; what was interrupted is resumed.
- The weights may be lost with the machine at the limit, so measuring comes first: no training begins that
  would not end in time, and what still trains is stopped early enough to leave the GPUs to measurements.
  With --resumable the weights stay, and the same command goes on: then training lasts as long as the limit.
- A stage that fails is named with the end of its output, and keeps no other from running.
"""

import argparse
import heapq
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from data.loader import UserError, dataset_folder, read_meta, user_errors_exit
from studies.pack import pack_run

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
DATASET = 'english'
RESERVE = 150  # seconds before the limit from which on nothing trains
GRACE = 30  # seconds that a process has to save and end

# The published comparison at 160m, one whole seed of the published arms first; minutes on an H100.
QUEUE = """
baseline_160m.1338 ~14 +controls +quantize +intervene +probe
ledger_160m.1338 ~18 +controls +quantize +intervene +probe
ledger_hs_160m.1338 ~18 +controls +quantize
qknorm_160m.1338 ~14 +controls +quantize
ledger_160m.1338 --commit_sparsity=0 ~18 +controls +quantize +intervene +probe
rotated_commit_a0_160m.1338 config/ledger_160m.py --arm=rotated_commit --commit_sparsity=0 ~22 +controls
ledger_160m.1338 --commit_sparsity=0.1 ~18 +controls +quantize
decode_scratch_160m.1338 config/ledger_160m.py --arm=decode_scratch ~18 +controls +quantize
decode_scratch_a0_160m.1338 config/ledger_160m.py --arm=decode_scratch --commit_sparsity=0 ~18 +controls
baseline_wide_160m.1338 config/baseline_160m.py --arm=baseline_wide ~15 +controls +quantize
""" + ''.join(
    f"""
baseline_160m.{seed} ~14 +controls +quantize
ledger_160m.{seed} ~18 +controls +quantize
ledger_hs_160m.{seed} ~18 +controls +quantize
qknorm_160m.{seed} ~14 +controls +quantize
ledger_160m.{seed} --commit_sparsity=0 ~18 +controls +quantize
rotated_commit_a0_160m.{seed} config/ledger_160m.py --arm=rotated_commit --commit_sparsity=0 ~22 +controls
"""
    for seed in (1339, 1340)
)


@dataclass
class Run:
    """A line of the queue."""

    name: str
    config: str
    seed: int
    settings: list  # of train.py, as --key=value
    studies: list = field(default_factory=list)  # each a list of words: its name, then its flags
    minutes: float = 0.0  # that training is expected to take; 0: nobody knows
    seconds: dict = field(default_factory=dict)  # that each stage has taken


def name_of(arm, scale, seed, settings):
    """Returns the name of a run: the arm, what its settings change, the scale and the seed.

    Files of arms/ are named in the place of the baseline, and after any other arm."""
    changes = ''
    for setting in settings:
        key, _, value = setting.removeprefix('--').partition('=')
        if key == 'arm':
            files = value.replace(',', '+')
            arm = files if arm == 'baseline' else f'{arm}+{files}'
        elif key == 'commit_sparsity':
            changes += f'_a{value}'
        elif key != 'snapshots':  # which weights are kept changes nothing in a run
            changes += f'_{key}={value}'
    return f'{arm}{changes}_{scale}_{seed}'


def merged(*lists):
    """Returns the settings of several lists, --key=value each. A later one replaces an earlier of its key."""
    by_key = {setting.partition('=')[0]: setting for settings in lists for setting in settings}
    return list(by_key.values())


def read_line(line):
    """Returns the Run that a line of the queue describes."""
    first, *words = shlex.split(line, comments=True)
    match = re.fullmatch(r'(.+)_([^_.]+)\.(\d+)', first)
    if not match:
        raise UserError(f"'{first}' is no run: expected <arm>_<scale>.<seed>, like ledger_160m.1338")
    arm, scale, seed = match[1], match[2], int(match[3])
    settings = [word for word in words if re.match(r'--\w+=', word)]
    studies = [shlex.split(word[1:]) for word in words if word.startswith('+')]
    minutes = [word[1:] for word in words if re.fullmatch(r'~[\d.]+', word)]
    configs = [word for word in words if word.endswith('.py')]
    if len(settings) + len(studies) + len(minutes) + len(configs) < len(words):
        raise UserError(
            f"'{line.strip()}' has a word that is none of: a config file, --key=value, +study, ~minutes"
        )
    name = f'{arm}_{scale}_{seed}' if configs else name_of(arm, scale, seed, settings)
    config = configs[0] if configs else f'config/{arm}_{scale}.py'
    if not (ROOT / config).exists():
        raise UserError(f"'{line.strip()}' starts from {config}, which does not exist: name the config file")
    for study in studies:
        if not (ROOT / 'studies' / f'{study[0]}.py').exists():
            raise UserError(f"'{line.strip()}' asks for studies/{study[0]}.py, which does not exist")
    return Run(name, config, seed, settings, studies, float(minutes[0]) if minutes else 0.0)


def read_queue(text):
    """Returns the Runs of a queue in its order."""
    runs = [read_line(line) for line in text.splitlines() if line.split('#')[0].strip()]
    names = [run.name for run in runs]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise UserError(f'{min(doubled)} is twice in the queue: give one of them another name')
    return runs


def provenance(args):
    """Returns what all runs of this machine have in common: commit, versions, device, data."""
    described = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        'commit': args.commit or described.stdout.strip() or 'unknown',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'numpy': numpy.__version__,
        'device': device,
        'data': read_meta(dataset_folder(args.dataset)),
    }


class Recipe:
    """Runs to train, measurements to make, and the processes that are at it."""

    def __init__(self, args, runs):
        self.args, self.begin = args, time.monotonic()
        self.runs = deque(runs)
        self.jobs = []  # a heap of (urgency, number, run, function): measurements first, then studies
        self.condition = threading.Condition()  # guards all of these
        self.busy = 0  # trainings and jobs at work: each may bring new jobs
        self.numbered = 0
        self.processes = set()
        self.stopping = False
        self.packing = threading.Lock()
        self.provenance = provenance(args)

    def say(self, text):
        print(f'{time.monotonic() - self.begin:6.0f} s  {text}', flush=True)

    def seconds_left(self):
        return self.args.limit - (time.monotonic() - self.begin)

    # ---- Who does what: every GPU has two workers; one trains as long as there is something to train.

    def work(self, gpu, trains):
        """Takes trainings, if this worker trains, and then measurements, until nothing can come any more."""
        while trains and (run := self.next_run()):
            self.attempt(self.train, run, gpu)
        while job := self.next_job():
            _, _, run, function = job
            self.attempt(function, run, gpu)

    def attempt(self, function, run, gpu):
        """Whatever one run raises is shown, and the others go on."""
        try:
            function(run, gpu)
        except Exception:
            traceback.print_exc()
        finally:
            with self.condition:
                self.busy -= 1
                self.condition.notify_all()

    def next_run(self):
        """Returns the next run that may still be trained, or None."""
        with self.condition:
            while self.runs and not self.stopping:
                run = self.runs.popleft()
                if self.is_packed(run):
                    self.say(f'{run.name} is packed already')
                    self.add_missing_studies(run)
                    continue
                left = self.seconds_left() - self.args.reserve
                if left <= (0 if self.args.resumable else 60 * run.minutes):
                    self.say(f'{run.name} is not begun: {max(0, left):.0f} s are left for training')
                    continue
                self.busy += 1
                return run
            self.condition.notify_all()
            return None

    def next_job(self):
        """Waits for a measurement or study to make and returns it, or None when none can come any more."""
        with self.condition:
            while not self.stopping and self.seconds_left() > 0:
                if self.jobs:
                    self.busy += 1
                    return heapq.heappop(self.jobs)
                if not self.runs and not self.busy:
                    return None
                self.condition.wait(1)

    def add_job(self, urgency, run, function):
        with self.condition:
            self.numbered += 1
            heapq.heappush(self.jobs, (urgency, self.numbered, run, function))
            self.condition.notify_all()

    def add_missing_studies(self, run):
        """A study of each run comes before the second study of any."""
        for i, study in enumerate(run.studies):
            if not (self.args.pack / run.name / f'{study[0]}.json').exists():
                self.add_job(1 + i, run, lambda run, gpu, study=study: self.study(run, study, gpu))

    # ---- What is done

    def train(self, run, gpu):
        command = ['train.py', run.config, f'--seed={run.seed}', f'--dataset={self.args.dataset}']
        command += merged(['--snapshots=0'], self.args.settings, run.settings)
        command += [f'--out_dir={self.folder(run)}', '--init_from=auto']
        if self.call(run, 'train', command, gpu, self.seconds_left() - self.args.reserve):
            self.add_job(0, run, self.measure)

    def measure(self, run, gpu):
        """Measures the trained and the untrained weights, packs, and asks for the studies."""
        folder = self.folder(run)
        measured = self.call(run, 'measure', ['measure.py', '--ckpt', f'{folder}/ckpt.pt'], gpu)
        # measure.py has measured the untrained weights too, if it found them.
        if (folder / 'ckpt_0.pt').exists() and not (folder / 'measure_0.json').exists():
            self.call(run, 'measure_0', ['measure.py', '--ckpt', f'{folder}/ckpt_0.pt'], gpu)
        if measured and self.pack(run):
            for name in ('ckpt_prev.pt', 'ckpt_best.pt'):
                (folder / name).unlink(missing_ok=True)
            self.add_missing_studies(run)

    def study(self, run, study, gpu):
        """What a study has written is packed even if it failed in the end."""
        name, *flags = study
        if (self.folder(run) / 'ckpt.pt').exists():
            command = ['-m', f'studies.{name}', '--ckpt', str(self.folder(run)), *flags]
            self.call(run, name, command, gpu)
            self.pack(run)

    def call(self, run, stage, command, gpu, seconds=None):
        """Runs a command of Python on a GPU, '' for the CPU. Returns whether it succeeded.

        It is stopped when `seconds` are over, by default all that are left. Its output goes to
        <run>/console.txt, the command with its seconds and its exit code to <run>/commands.txt."""
        folder = self.folder(run)
        seconds = self.seconds_left() if seconds is None else seconds
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': gpu, 'PYTHONUNBUFFERED': '1'}
        begin = time.monotonic()
        with open(folder / 'console.txt', 'a') as console, self.condition:
            if self.stopping or seconds <= 0:
                return False
            process = subprocess.Popen(
                [*PYTHON, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the recipe alone, which asks its processes to end
            )
            self.processes.add(process)
        self.wait(process, seconds)
        run.seconds[stage] = round(time.monotonic() - begin)
        with open(folder / 'commands.txt', 'a') as file:
            file.write(f'{run.seconds[stage]} s, exit {process.returncode}: python {shlex.join(command)}\n')
        if process.returncode:
            end = (folder / 'console.txt').read_text(errors='replace').splitlines()[-3:]
            self.say('\n          '.join([f'{run.name}: exit {process.returncode} of {stage}', *end]))
        return process.returncode == 0

    def wait(self, process, seconds):
        """Waits for a process. When its time is over it is asked to end, and is killed when it does not."""
        try:
            process.wait(None if seconds == float('inf') else seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with self.condition:
            self.processes.discard(process)

    # ---- What is kept

    def folder(self, run):
        return self.args.runs / run.name

    def is_packed(self, run):
        return (self.args.pack / run.name / 'recipe.json').exists()

    def pack(self, run):
        """Puts the small results of a run into its packed folder, and all packed folders into one archive."""
        folder = self.folder(run)
        commands = (folder / 'commands.txt').read_text().splitlines()
        with self.packing:
            try:
                (folder / 'recipe.json').write_text(
                    json.dumps({'commands': commands, **self.provenance}, indent=1)
                )
                pack_run(folder, self.args.pack / run.name)
                self.archive()
            except (OSError, UserError) as error:
                self.say(f'{run.name} could not be packed: {error}')
                return False
        stages = ', '.join(f'{stage} {seconds}' for stage, seconds in run.seconds.items())
        self.say(f'packed {run.name}; seconds: {stages}')
        return True

    def archive(self):
        """Replaces the archive as a whole, so that it always holds all that is packed."""
        if self.args.tgz:
            part = Path(f'{self.args.tgz}.part')
            with tarfile.open(part, 'w:gz') as archive:
                archive.add(self.args.pack, arcname='.')
            os.replace(part, self.args.tgz)

    def stop(self, *signal_and_frame):
        """Begins nothing more and asks what runs to end; a training saves first."""
        self.stopping = True
        for process in list(self.processes):
            process.terminate()

    def run_all(self, gpus):
        """Returns the names of the runs that are not packed in the end."""
        runs = list(self.runs)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        workers = [
            threading.Thread(target=self.work, args=(gpu, trains)) for gpu in gpus for trains in (True, False)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return [run.name for run in runs if not self.is_packed(run)]


def prepare(args):
    """Makes the dataset from --text, if it is not there."""
    out = dataset_folder(args.dataset)
    if args.text and not (out / 'train.bin').exists():
        command = ['data/text/prepare.py', *args.text, f'--out={out}']
        if subprocess.run([*PYTHON, *command], cwd=ROOT).returncode:
            raise UserError(f'{out} could not be made from {" ".join(args.text)}')


def arguments():
    parser = argparse.ArgumentParser(
        description='Trains, measures and packs a queue of runs.',
        epilog='--key=value: settings for every run',
    )
    parser.add_argument(
        'queue', nargs='?', type=Path, help='file of runs, one a line (default: the published)'
    )
    parser.add_argument('--gpus', help="like 0,1; '' is the CPU; 0,0 puts two runs on one (default: all)")
    parser.add_argument('--dataset', default=DATASET, help=f'of every run (default {DATASET})')
    parser.add_argument('--text', nargs='+', help='files to make the dataset from, if it is not there')
    parser.add_argument('--limit', type=float, default=float('inf'), help='seconds after which all has ended')
    parser.add_argument(
        '--reserve',
        type=float,
        default=RESERVE,
        help=f'of them, at the end, without training (default {RESERVE})',
    )
    parser.add_argument('--resumable', action='store_true', help='the weights are not lost at the limit')
    parser.add_argument('--runs', type=Path, default=Path('out'), help='folder of the runs (default out)')
    parser.add_argument(
        '--pack', type=Path, default=Path('out/packed'), help='folder of what is small (default out/packed)'
    )
    parser.add_argument('--tgz', type=Path, help='file that always holds all that is packed')
    parser.add_argument('--commit', help='what to call the code where there is no git')
    return parser


def run(args):
    """Makes and packs the runs of the queue. Returns the names of those that are not packed."""
    for word in args.settings:
        if not re.match(r'--\w+=', word):
            raise UserError(f"'{word}' is neither a flag of the recipe nor a setting like --max_iters=4100")
    if args.resumable:
        args.reserve = 0
    if args.gpus is None:
        args.gpus = ','.join(map(str, range(torch.cuda.device_count())))
    args.runs, args.pack = args.runs.resolve(), args.pack.resolve()
    args.pack.mkdir(parents=True, exist_ok=True)
    runs = read_queue(args.queue.read_text() if args.queue else QUEUE)
    prepare(args)
    return Recipe(args, runs).run_all(args.gpus.split(','))


def main(argv=None):
    parser = arguments()
    args, args.settings = parser.parse_known_args(argv)
    try:
        with user_errors_exit():
            missing = run(args)
    except OSError as error:
        sys.exit(f'error: {error.filename}: {error.strerror}')
    for name in missing:
        print(f'not packed: {name}')
    sys.exit(1 if missing else 0)


if __name__ == '__main__':
    main()
