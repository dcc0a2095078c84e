"""
One table and one figure of many runs: outlier, sinks, and what rounding to few bits costs.

    python -m studies.table out                                 all runs below out/, measured and quantized
    python -m studies.table results/arms --out=results/arms     the same from packed files

Writes table.md and table.png, and prints the table.

- A row is a run. Quantities are those of its decoded stream. The first number is the value at the last
  sublayer, which is what the head reads; the second is the largest along the depth, with its sublayer.
- Rounding is in nats per token: what W8A8 and W4A4 of studies/quantize.py add to the loss.
- A run that was not measured is a row too, with the last line of its log: a run that diverged has no
  measurement."""

import argparse
import statistics
from pathlib import Path

from data.loader import UserError, atomic_write, interrupts_exit, user_errors_exit
from figures import figure
from studies.results import RUN_NAME, Run, markdown, significant, with_interval

QUANTITIES = {
    'fixed_dim_ratio': 'fixed-dimension ratio',
    'start_ratio': 'start ratio',
    'relative_start_concentration': 'relative start concentration',
    'kurtosis': 'kurtosis',
    'massive_count': 'massive count',
    'start_norm': 'start norm',
}
SCHEMES = ('W8A8', 'W4A4')
DRAWN, DAMAGE = 'fixed_dim_ratio', 'W4A4'
LEAST_COLOUR_RANGE = 0.1  # so that one sink among all heads does not look like many


def runs_below(folders):
    """Returns the runs in folders, in the order of their names. Raises UserError where there are none."""
    paths = {
        path.parent
        for folder in folders
        for name in ('measure.json', 'log.jsonl')
        for path in [*folder.glob(name), *folder.glob(f'*/{name}')]
    }
    runs = []
    for path in sorted(paths):
        match = RUN_NAME.fullmatch(path.name)
        seed = int(match[3]) if match and match[3] else None
        runs.append(Run(path, match[1] if match else path.name, match[2] if match else '', seed))
    if not runs:
        raise UserError(
            f'there is no run in {", ".join(map(str, folders))}: name a folder that holds folders with '
            'measure.json or log.jsonl'
        )
    return runs


def is_measured(run):
    return (run.folder / 'measure.json').exists()


def headline(run, key):
    """Returns what measure.json says of a quantity of the decoded stream, or None."""
    return run.measure['streams'][run.decoded].get(key)


def last_and_peak(run, key):
    """'3.1 · 30.1 (3)': the value at the last sublayer, the largest, and its sublayer."""
    found = headline(run, key)
    if found is None:
        return '–'
    where = f' ({found["sublayer"]})' if found['sublayer'] is not None else ''
    return f'{significant(found["last"], 3)} · {significant(found["value"], 3)}{where}'


def sinks(run):
    """Returns the fraction of heads that are attention sinks, or None."""
    report = run.measure['attention_sink']
    return report['fraction_of_heads']['value'] if report else None


def damage(run, scheme):
    """Returns the headline of what rounding adds to the loss, or None where that is not known."""
    return run.quantized['schemes'][scheme]['damage'] if run.quantized else None


def damage_cell(run, scheme):
    found = damage(run, scheme)
    return '–' if found is None else with_interval(found)


def tokens_per_second(run):
    """Returns the median over the lines of the log, or None: the first lines hold compilation."""
    rates = [line['tokens_per_s'] for line in run.log if line.get('tokens_per_s')]
    return statistics.median(rates) if rates else None


def row(run):
    """Returns the cells of a run's row."""
    rate = tokens_per_second(run)
    speed = '–' if rate is None else f'{rate / 1000:,.0f}k'
    name = [run.arm, run.scale, '' if run.seed is None else str(run.seed)]
    if not is_measured(run):
        end = run.log[-1] if run.log else {}
        loss = end.get('val_loss')
        said = 'not finite' if loss is None else f'{loss:.3f}'
        cells = [f'not measured: {said} at step {end.get("iter", 0):,}']
        return [*name, *cells, *['–'] * (len(QUANTITIES) + 1 + len(SCHEMES)), speed]
    return [
        *name,
        f'{run.loss:.3f}',
        *(last_and_peak(run, key) for key in QUANTITIES),
        '–' if sinks(run) is None else f'{sinks(run):.1%}',
        *(damage_cell(run, scheme) for scheme in SCHEMES),
        speed,
    ]


def table_of(runs):
    """Returns a Markdown table: a row for each run."""
    head = [
        'arm',
        'scale',
        'seed',
        'loss',
        *QUANTITIES.values(),
        'heads that are sinks',
        *SCHEMES,
        'tokens/s',
    ]
    return markdown(head, map(row, runs)) + '\n'


def points(runs, place):
    """place: 'last' or 'value', which is the peak. Returns {arm: [(outlier, damage, sinks, loss)]} over
    seeds."""
    found = {}
    for run in runs:
        if not is_measured(run) or damage(run, DAMAGE) is None or headline(run, DRAWN) is None:
            continue
        outlier = headline(run, DRAWN)[place]
        arm = f'{run.arm} {run.scale}'.strip()
        found.setdefault(arm, []).append((outlier, damage(run, DAMAGE)['value'], sinks(run), run.loss))
    return found


def draw(runs, path):
    """Draws the outlier against the damage of rounding, at the last sublayer and at the peak. An arm has a
    number, which stands in the point of each of its seeds; its name and losses stand beside the figure."""
    by_arm = points(runs, 'last')
    with figure(path, 'outlier of the decoded stream and what rounding costs', 1, 3, (4.6, 4.8)) as axes:
        draw_points(axes[0], by_arm, 'at the last sublayer')
        colours = draw_points(axes[1], points(runs, 'value'), 'at its peak along the depth')
        axes[1].figure.colorbar(colours, ax=axes[1], label='heads that are sinks', format='{x:.0%}')
        axes[2].axis('off')
        axes[2].text(0, 1, names(by_arm), va='top', fontsize=8, family='monospace')


def draw_points(axis, by_arm, where):
    """Draws the points of every arm with its number in them, coloured by sinks. Returns what has the
    colours."""
    from matplotlib.ticker import LogLocator

    most_sinks = max((sink or 0) for seeds in by_arm.values() for _, _, sink, _ in seeds)
    most_sinks = max(most_sinks, LEAST_COLOUR_RANGE)
    style = dict(cmap='YlGnBu', vmin=0, vmax=most_sinks, s=150, edgecolors='black', linewidths=0.6)
    for number, seeds in enumerate(by_arm.values(), 1):
        outliers, damages, sinks_of_seeds, _ = zip(*seeds)
        axis.plot(outliers, damages, color='grey', linewidth=0.8, zorder=1)
        shades = [sink or 0 for sink in sinks_of_seeds]
        colours = axis.scatter(outliers, damages, c=shades, zorder=2, **style)
        for x, y, shade in zip(outliers, damages, shades):
            colour = 'white' if shade > most_sinks / 2 else 'black'
            axis.text(x, y, number, ha='center', va='center', fontsize=7, color=colour)
    axis.set(
        xscale='log',
        yscale=scale_of([y for seeds in by_arm.values() for _, y, _, _ in seeds]),
        xlabel=f'fixed-dimension ratio {where}',
        ylabel=f'{DAMAGE}: nats per token more',
    )
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == 'log':
            side.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            side.set_minor_formatter('{x:g}')
        side.set_major_formatter('{x:g}')
        side.set_tick_params(which='both', labelsize=8)
    axis.grid(alpha=0.3)
    return colours


def scale_of(values):
    return 'log' if min(values) > 0 else 'linear'


def names(by_arm):
    """Returns the text beside the figure: number, arm, and the losses of its seeds."""
    width = max(map(len, by_arm))
    lines = [
        f'{number:2} {arm:{width}} ' + ' '.join(f'{loss:.3f}' for *_, loss in seeds)
        for number, (arm, seeds) in enumerate(by_arm.items(), 1)
    ]
    return '\n'.join([f'   {"arm":{width}} loss, nats per token', *lines])


def run(args):
    runs = runs_below(args.folders)
    table, out = table_of(runs), args.out or args.folders[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / 'table.md', 'w') as file:
            file.write(table)
    except OSError as error:
        raise UserError(f'cannot write to {out} ({error.strerror}): name another folder with --out') from None
    print(table)
    if points(runs, 'last'):
        draw(runs, out / 'table.png')
        print(f'written: {out}/table.md, table.png')
    else:
        print(f'written: {out}/table.md; for the figure quantize runs: python -m studies.quantize --ckpt …')


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='+', type=Path, help='runs, or folders that hold runs')
    parser.add_argument('--out', type=Path, help='folder for the table and the figure (default: the first)')
    with interrupts_exit(), user_errors_exit():
        run(parser.parse_args(argv))


if __name__ == '__main__':
    main()
