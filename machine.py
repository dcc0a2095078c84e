"""
What a program settles with its machine before PyTorch is imported. Every program imports this module first.

- OpenMP's threads wait for one another at the end of every operation, and they wait by spinning. On a machine
  that is busy with something else the one waited for may not be running, and the others burn the time that it
  needs. They spin for a bounded time here, and then sleep.
- PyTorch starts a thread for every core that it sees; a container may be allowed fewer.
- A console may lack a character, such as α. It shows a question mark then, and the program goes on.

What the user has set in the environment stays as it is.
"""

import math
import os
import sys
from pathlib import Path

# How often a waiting thread looks before it sleeps; libgomp's own limit is 300,000. A sleeper wakes slowly,
# so a low limit costs speed on an idle machine. Steps of the demo's ledger on two cores, medians: idle, 98 ms
# with this limit and 96 without one; beside two busy programs 255 ms (466 with a limit of 5,000), and
# without one not ten steps in half a minute.
SPINS = '60000'


def usable_cores(root='/sys/fs/cgroup', membership='/proc/self/cgroup'):
    """Returns how many cores this process may use: those that it may run on, and no more than its
    container's share of time comes to. root and membership: where Linux shows control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in cpu_shares(Path(root), Path(membership)))]))


def cpu_shares(root, membership):
    """Yields the limits, in cores, that the control groups of this process and those above it set."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers == '':
            tops = [root]  # version 2
        elif 'cpu' in controllers.split(','):
            tops = [root / controllers, root / 'cpu']  # version 1
        else:
            continue
        for top in tops:
            group = top / path.lstrip('/')
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield from cpu_share(folder)


def cpu_share(folder):
    """Yields the limit, in cores, that one control group sets, if it sets one."""
    try:
        if (folder / 'cpu.max').exists():
            quota, period = (folder / 'cpu.max').read_text().split()
        else:
            quota = (folder / 'cpu.cfs_quota_us').read_text()
            period = (folder / 'cpu.cfs_period_us').read_text()
        if int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):  # no limit: 'max', −1, or no such file
        return


def settle(environment):
    """Sets in the environment what PyTorch and its OpenMP read when they are imported."""
    if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & environment.keys():
        environment['GOMP_SPINCOUNT'] = SPINS
    if usable_cores() < (os.cpu_count() or 1):
        environment.setdefault('OMP_NUM_THREADS', str(usable_cores()))


def say(text):
    """Prints a line. If the console is gone (closed, full, or piped into head), says so once on stderr;
    from then on lines go nowhere, and the program goes on."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        complain(f'the console is gone ({error.strerror}): the program goes on without it')


def complain(text):
    """Prints a line on stderr, if that is still there."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


if os.name == 'nt':
    raise SystemExit(
        'error: Windows lacks what this program stands on (flock, pread). It runs in WSL, '
        "Windows' own Linux: https://learn.microsoft.com/windows/wsl/install"
    )
settle(os.environ)
for console in (sys.stdout, sys.stderr):
    if hasattr(console, 'reconfigure'):
        console.reconfigure(errors='replace')
