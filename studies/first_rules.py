"""
The first set of rules (2026-11-21), by which the runs on Python source were judged.

It reads every quantity at its own largest value over the sublayers, and concentrations where m of the
dominant dimension peaks: in C that is another depth than in h. A stream has a start-token outlier if its
start ratio is at least 3 times the untrained model's and apart from it, its start persistence is at least
0.5, and its start-token concentration is above the untrained model's, apart. A dimension that is as large at
every token can pass. Every seed counts. studies/verdicts.py has the rules that replaced these.
"""

from figures import HEADLINES
from studies.evidence import HOLDS, REPRODUCED, Evidence, Need, is_below, verdict
from studies.results import DOSE, with_interval

TIMES, PERSISTENT, MATCHED, FEWEST_DOSES = 3, 0.5, 0.01, 4
SHORT = 'baseline_short'  # an arm with a shorter cosine, which ends at the loss of a ledger


def line(seed, quantity, condition, holds, **numbers):
    """numbers: headlines that went into the condition, by label."""
    shown = '; '.join(f'{label} {with_interval(x, 4)}' for label, x in numbers.items())
    return Evidence(seed, quantity, condition, bool(holds), shown)


def existence(run, stream):
    """Returns the three conditions for a start-token outlier, or a Need if the untrained one is missing."""
    if run.untrained is None:
        return [Need(f'the untrained {run.arm} of seed {run.seed}, measured')]
    after, before = run.measure['streams'][stream], run.untrained['streams'][stream]
    ratio, untrained_ratio = after['start_ratio'], before['start_ratio']
    large = None not in (ratio['value'], untrained_ratio['value'])
    large = large and ratio['value'] >= TIMES * untrained_ratio['value'] and is_below(untrained_ratio, ratio)
    persistence = after['start_persistence']
    concentration, untrained_concentration = (s['start_token_concentration'] for s in (after, before))
    return [
        line(
            run.seed,
            'outlier',
            f'start ratio of {stream} at least {TIMES} times the untrained, apart',
            large,
            trained=ratio,
            untrained=untrained_ratio,
        ),
        line(
            run.seed,
            'outlier',
            f'start persistence of {stream} at least {PERSISTENT}',
            persistence['value'] >= PERSISTENT,
            trained=persistence,
        ),
        line(
            run.seed,
            'outlier',
            f'start-token conc. of {stream} above the untrained, apart',
            is_below(untrained_concentration, concentration),
            trained=concentration,
            untrained=untrained_concentration,
        ),
    ]


def has_outlier(run, stream):
    """Do all three hold? None if the untrained weights were not measured."""
    found = existence(run, stream)
    return None if any(isinstance(item, Need) for item in found) else all(item.holds for item in found)


def existence_in(runs, arm):
    """Returns the evidence for an outlier in the decoded stream of an arm, seed by seed."""
    of_arm = [run for (name, _), run in runs.items() if name == arm]
    return [item for run in of_arm for item in existence(run, run.decoded)] or [Need(arm)]


def compare(seed, key, lower, upper):
    """lower, upper: (label, stream of measure.json).
    Returns the evidence that the headline `key` of one lies below that of the other."""
    (lower_name, x), (upper_name, y) = lower, upper
    return line(
        seed,
        key,
        f'{HEADLINES[key]} of {lower_name} below that of {upper_name}, apart',
        is_below(x[key], y[key]),
        **{lower_name: x[key], upper_name: y[key]},
    )


def nearest_baseline(runs, ledger):
    """Returns the baseline of the ledger's seed whose loss is nearest to the ledger's, or None."""
    baselines = [
        run
        for (arm, seed), run in runs.items()
        if seed == ledger.seed and (arm == 'baseline' or arm.startswith(SHORT))
    ]
    return min(baselines, key=lambda run: abs(run.loss - ledger.loss), default=None)


def matched_pairs(runs):
    """Returns [(ledger, baseline that ends within MATCHED nats of it)], and Needs for ledgers without one."""
    pairs, needs = [], []
    for (arm, seed), ledger in runs.items():
        if arm != 'ledger':
            continue
        baseline = nearest_baseline(runs, ledger)
        difference = baseline and ledger.loss - baseline.loss
        if baseline and abs(difference) <= MATCHED:
            pairs.append((ledger, baseline))
            continue
        need = f'a baseline of seed {seed} that ends within {MATCHED} nats of the ledger'
        if baseline:
            side = 'below' if difference > 0 else 'above'
            need += f' (nearest: {baseline.name}, {abs(difference):.3f} nats {side})'
        needs.append(Need(need))
    return pairs, needs if pairs or needs else [Need('ledger')]


def pairs_of(runs, arm):
    """Returns [(run of the arm, baseline)] of the seeds that have both, and Needs for the others."""
    seeds = sorted({seed for name, seed in runs if name in (arm, 'baseline')})
    missing = [(name, seed) for seed in seeds for name in (arm, 'baseline') if (name, seed) not in runs]
    pairs = [(runs[arm, s], runs['baseline', s]) for s in seeds if {(arm, s), ('baseline', s)} <= runs.keys()]
    needs = [Need(f'{name}, seed {seed}') for name, seed in missing] if seeds else [Need(arm)]
    return pairs, needs


def rebuilt(runs):
    pairs, needs = matched_pairs(runs)
    return [item for ledger, _ in pairs for item in existence(ledger, 'C')] + needs


def smaller(pairs, needs):
    """Evidence that C has a smaller ratio and a larger concentration than h. pairs: [(ledger, baseline)]."""
    found = []
    for ledger, baseline in pairs:
        C, h = ('C', ledger.measure['streams']['C']), ('h', baseline.measure['streams']['h'])
        found.append(compare(ledger.seed, 'fixed_dim_ratio', C, h))
        found.append(compare(ledger.seed, 'start_token_concentration', h, C))
    return found + needs


def doses_of(runs, seed):
    """Returns {α: run} of the ledgers of a seed that differ in α alone, in its order."""
    doses = {run.alpha: run for (arm, other), run in runs.items() if other == seed and DOSE.fullmatch(arm)}
    return {alpha: doses[alpha] for alpha in sorted(doses)}


def rises_with_price(runs):
    found = []
    for seed in sorted({seed for arm, seed in runs if arm == 'ledger'}):
        doses = doses_of(runs, seed)
        if len(doses) < FEWEST_DOSES:
            have = ', '.join(f'{alpha:g}' for alpha in doses)
            found.append(Need(f'{FEWEST_DOSES} doses of α in seed {seed} (so far: {have})'))
            continue
        for key in ('persistence', 'start_token_concentration'):
            series = {f'α = {a:g}': run.measure['streams']['C'][key] for a, run in doses.items()}
            values = [x['value'] for x in series.values()]
            ends = list(series.values())
            rises = None not in values and values == sorted(values) and is_below(ends[0], ends[-1])
            found.append(line(seed, key, f'{HEADLINES[key]} of C rises with α, ends apart', rises, **series))
    return found or [Need(f'{FEWEST_DOSES} doses of α')]


def lowered_by_qknorm(runs):
    pairs, needs = pairs_of(runs, 'qknorm')
    streams = [
        (qknorm.seed, ('qknorm', qknorm.measure['streams']['h']), ('baseline', base.measure['streams']['h']))
        for qknorm, base in pairs
    ]
    keys = ('fixed_dim_ratio', 'kurtosis')
    return [compare(seed, key, x, y) for seed, x, y in streams for key in keys] + needs


# What is judged, in which words, by what.
CLAIMS = {
    'premise': ('h has a start-token outlier', HOLDS, lambda runs: existence_in(runs, 'baseline')),
    '1': ('at matched loss, the outlier is rebuilt in C', REPRODUCED, rebuilt),
    '2': (
        'in C it is smaller than in h, and more concentrated on the start token',
        REPRODUCED,
        lambda runs: smaller(*pairs_of(runs, 'ledger')),
    ),
    '2, at matched loss': (
        'the same against the baseline that ends at the same loss',
        REPRODUCED,
        lambda runs: smaller(*matched_pairs(runs)),
    ),
    '3': (
        'a higher price α on committing makes it more persistent and more concentrated',
        REPRODUCED,
        rises_with_price,
    ),
    '4': ('QK-norm lowers it in the baseline', REPRODUCED, lowered_by_qknorm),
    'control': (
        'with explicit attention biases, h has a start-token outlier',
        HOLDS,
        lambda runs: existence_in(runs, 'baseline_bias'),
    ),
}


def judge(runs):
    """runs: {(arm, seed): run} of one scale. Returns {claim: (its text, verdict, what was found)}."""
    judged = {}
    for claim, (text, words, rule) in CLAIMS.items():
        found = rule(runs)
        judged[claim] = text, verdict(found, words), found
    return judged


def outlier_cell(run, stream):
    """Returns 'yes', 'no' or a dash where nobody knows."""
    has = has_outlier(run, stream)
    return '–' if has is None else 'yes' if has else 'no'
