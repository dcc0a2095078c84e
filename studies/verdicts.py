"""
The verdicts on the claims about the outlier, by rules that were fixed before the runs.

    python -m studies.verdicts results/english                             the rules of 2026-11-28
    python -m studies.verdicts results/comparison_160m --rules=first       those of 2026-11-21, for older runs
    python -m studies.verdicts results/comparison_160m --post-hoc          older runs by the newer rules

Prints Markdown, with every number behind every verdict. The rules, in short:

- Seed 1337 was a pilot: it is shown and never counted. A claim holds if it does in every seed that counts.
- Every quantity is read three times. *Decoded*: after the last sublayer, which is what the head sees, at
  the same depth in every arm. *Along the depth*: in at least half of the sublayers that count, which are
  those where the mean norm of the stream is at least a tenth of its largest. *Published*: after the
  sublayer where m of the stream's dominant dimension peaks, whichever that is.
- Two objects, against the untrained weights at the same sublayer. An *outlier dimension*: the
  fixed-dimension ratio is at least 3 times the untrained. A *start-token outlier*: the start ratio is at
  least 3 times the untrained, and the relative start concentration of its dimension is at least 1.5. Along
  the depth, the same dimension is the largest in at least half of the sublayers that count.
- *Apart* and *at least* are meant between the near ends of 95% intervals over sequences.
- Losses are matched within 0.01 nats, with a baseline of the same seed.

Older runs have no intervals at single sublayers. With --post-hoc the value alone takes the place of a missing
interval, and a dagger marks the condition. Their relative start concentration is that of controls.json, at
the sublayer where m of the dominant dimension peaks: only the published reading has it.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import report
from data.loader import interrupts_exit, user_errors_exit
from figures import HEADLINES
from studies import first_rules
from studies.evidence import (
    HOLDS,
    REPRODUCED,
    Evidence,
    Need,
    counted,
    high,
    holds_in_all,
    is_below,
    low,
    not_counting,
    seeds_in_words,
    verdict,
)
from studies.first_rules import doses_of, matched_pairs, pairs_of
from studies.results import by_scale, markdown, runs_in, stream_label, with_interval

PILOT = (1337,)
MOST = 0.5  # share of the sublayers that count
MATCHED, DOSES = 0.01, (0, 0.02, 0.1, 0.3)
DECODED, DEPTH, PUBLISHED = READINGS = ('decoded', 'along the depth', 'published')
DIMENSION, START = OBJECTS = ('outlier dimension', 'start-token outlier')
QUANTITY_OF = {DIMENSION: 'fixed_dim_ratio', START: 'start_ratio'}
WITH_ARTICLE = {DIMENSION: f'an {DIMENSION}', START: f'a {START}'}
RULE_OF = {name: report.RULES[key] for key, name in report.OBJECTS.items()}
ROTATED, SCRATCH = re.compile(r'rotated_commit(_.*)?'), re.compile(r'decode_scratch(_.*)?')
ON_AXES_OF_D = 'C_unrotated'  # the stream of a rotated ledger that holds Qᵀ C


class NotMeasured(Exception):
    """A quantity that a rule needs is not in a measurement."""


@dataclass(frozen=True)
class View:
    """One stream of a run beside the same stream of its untrained weights."""

    run: object
    name: str

    @property
    def trained(self):
        return self.run.measure['streams'][self.name]

    @property
    def untrained(self):
        if self.run.untrained is None:
            raise NotMeasured(f'the untrained {self.run.name}, measured')
        return self.run.untrained['streams'][self.name]

    def counting(self):
        """Returns the sublayers where the stream's mean norm is at least a tenth of its largest."""
        norms = [sublayer['norm'] for sublayer in self.trained['sublayers']]
        return [s for s, norm in enumerate(norms) if norm >= report.COUNTS_FROM * max(norms)]


def quantity(stream, key, s, post_hoc):
    """stream: an entry of measure.json. Returns {'value', 'low', 'high'} after sublayer s.
    Raises NotMeasured if it is not there, or lacks an interval. A headline has one where it was quoted."""
    sublayer, headline = stream['sublayers'][s], stream.get(key, {})
    if key not in sublayer:
        raise NotMeasured(f'{HEADLINES[key]}, measured')
    ends = sublayer.get('intervals', {}).get(key, (None, None))
    if None in ends and headline.get('sublayer') == s:
        ends = headline['low'], headline['high']
    if sublayer[key] is not None and None in ends and not post_hoc:
        raise NotMeasured(f'{HEADLINES[key]} with an interval at single sublayers')
    return {'value': sublayer[key], 'low': ends[0], 'high': ends[1]}


def dagger(*quantities):
    """Returns the mark of a condition in which a quantity has no interval."""
    return ' †' if any(None in (x['low'], x['high']) for x in quantities) else ''


def places_of(reading, *views):
    """Returns where the streams are read, a list of tuples with one sublayer for every View.
    Along the depth these are the sublayers that count in all of them."""
    if reading == PUBLISHED:
        return [tuple(view.trained['peak_sublayer'] for view in views)]
    if reading == DECODED:
        return [tuple(len(view.trained['sublayers']) - 1 for view in views)]
    counting = set.intersection(*(set(view.counting()) for view in views))
    return [(s,) * len(views) for s in sorted(counting)]


def relative_concentration(view, s, post_hoc):
    """Returns p/m of the start dimension over the median of p/m over all dimensions."""
    key, controls = 'relative_start_concentration', view.run.controls
    is_in_controls = controls and controls['streams'][view.name]['peak_sublayer'] == s
    if post_hoc and is_in_controls and key not in view.trained['sublayers'][s]:
        of_stream = controls['streams'][view.name]
        median = of_stream['quantiles']['concentration'][of_stream['quantiles']['at'].index(0.5)]
        return {'value': of_stream['start_dim']['concentration'] / median, 'low': None, 'high': None}
    return quantity(view.trained, key, s, post_hoc)


def has_at(view, kind, s, post_hoc):
    """Has the stream this object after sublayer s? Returns the answer and the numbers behind it."""
    key = QUANTITY_OF[kind]
    after = quantity(view.trained, key, s, post_hoc)
    before = quantity(view.untrained, key, s, post_hoc)
    numbers, mark = f'{with_interval(after)}, untrained {with_interval(before)}', dagger(after, before)
    intervals = {key: (low(after), high(after))}
    if kind == START:
        relative = relative_concentration(view, s, post_hoc)
        intervals['relative_start_concentration'] = low(relative), high(relative)
        numbers += f'; relative start conc. {with_interval(relative)}'
        mark = dagger(after, before, relative)
    rule, _ = RULE_OF[kind]
    return rule({'intervals': intervals}, {key: high(before)}) is True, numbers + mark


def object_in(view, kind, reading, post_hoc, wanted=True, quantity_name=None):
    """Returns the evidence that a stream has an object in a reading, or with wanted=False that it has not;
    a Need where it was not measured."""
    label = f'{view.run.arm}: {view.name}'
    condition = f'{label} has {WITH_ARTICLE[kind] if wanted else f"no {kind}"}, {reading}'
    try:
        sublayers = [s for (s,) in places_of(reading, view)]
        answers = [has_at(view, kind, s, post_hoc) for s in sublayers]
    except NotMeasured as error:
        return Need(str(error))
    if reading != DEPTH:
        has, numbers = answers[0]
    else:
        _, key = RULE_OF[kind]
        largest = [view.trained['sublayers'][s][key] for s in sublayers]
        dimension = max(sorted(set(largest)), key=largest.count)
        there, same, among = sum(has for has, _ in answers), largest.count(dimension), len(sublayers)
        has = min(there, same) >= MOST * among
        mark = ' †' if any(numbers.endswith('†') for _, numbers in answers) else ''
        numbers = (
            f'in {there} of {among} sublayers that count; dimension {dimension} the largest in {same}{mark}'
        )
    return Evidence(view.run.seed, quantity_name or label, condition, has == wanted, numbers)


def is_lower(key, lower, upper, reading, post_hoc):
    """Returns the evidence that a quantity of the View `lower` is below that of `upper`, apart."""
    condition = (
        f'{HEADLINES[key]} of {lower.run.arm}: {lower.name} below that of {upper.run.arm}: {upper.name}, '
        f'apart, {reading}'
    )
    try:
        pairs = [
            tuple(quantity(view.trained, key, s, post_hoc) for view, s in zip((lower, upper), place))
            for place in places_of(reading, lower, upper)
        ]
    except NotMeasured as error:
        return Need(str(error))
    below = sum(is_below(x, y) for x, y in pairs)
    mark = max((dagger(*pair) for pair in pairs), default='')
    if reading == DEPTH:
        numbers = f'in {below} of {len(pairs)} sublayers that count in both'
    else:
        numbers = ' and '.join(with_interval(x) for x in pairs[0])
    return Evidence(lower.run.seed, key, condition, below >= MOST * len(pairs) > 0, numbers + mark)


# ---- The claims: what is found for each. runs: {(arm, seed): run} of one scale.


def runs_of(runs, arm):
    """arm: a name or a pattern. Returns the runs of an arm, in the order of seeds, or a Need of it."""
    pattern = re.compile(re.escape(arm)) if isinstance(arm, str) else arm
    found = [run for (name, _), run in runs.items() if pattern.fullmatch(name)]
    return sorted(found, key=lambda run: (run.seed, run.arm))


def premise(runs, kind, reading, post_hoc):
    found = [object_in(View(run, run.decoded), kind, reading, post_hoc) for run in runs_of(runs, 'baseline')]
    return found or [Need('baseline')]


def rebuilt(runs, kind, reading, post_hoc):
    pairs, needs = matched_pairs(runs)
    return [object_in(View(ledger, 'C'), kind, reading, post_hoc) for ledger, _ in pairs] + needs


def smaller(runs, key, reading, post_hoc):
    """Claim 2: ratio and kurtosis of C below those of h, its start-token concentration above."""
    pairs, needs = pairs_of(runs, 'ledger')
    found = []
    for ledger, baseline in pairs:
        views = View(ledger, 'C'), View(baseline, 'h')
        if key == 'start_token_concentration':
            views = views[::-1]
        found.append(is_lower(key, *views, reading, post_hoc))
    return found + needs


def lowered(runs, key, reading, post_hoc):
    """Claim 4: QK-norm's h has a lower ratio and kurtosis than the baseline's."""
    pairs, needs = pairs_of(runs, 'qknorm')
    return [
        is_lower(key, View(qknorm, 'h'), View(baseline, 'h'), reading, post_hoc) for qknorm, baseline in pairs
    ] + needs


def never_falls(series):
    """series: quantities from the lowest dose to the highest. Do they never fall, with the ends apart?"""
    values = [x['value'] for x in series]
    return None not in values and values == sorted(values) and is_below(series[0], series[-1])


def rises(runs, key, reading, post_hoc):
    """Claim 3: a quantity of C never falls over the doses of α. Persistence belongs to a whole stream:
    along the depth it is the same as published, and it has no decoded reading."""
    if key == 'persistence' and reading == DECODED:
        return []
    found = []
    for seed in sorted({seed for _, seed in runs}):
        doses = {alpha: run for alpha, run in doses_of(runs, seed).items() if alpha in DOSES}
        if len(doses) < len(DOSES):
            missing = ', '.join(f'{alpha:g}' for alpha in DOSES if alpha not in doses)
            found.append(Need(f'α = {missing} in seed {seed}'))
            continue
        views = [View(run, 'C') for run in doses.values()]
        places = places_of(reading, *views)
        try:
            if key == 'persistence':
                series = [[view.trained[key] for view in views]]
            else:
                series = [
                    [quantity(view.trained, key, s, post_hoc) for view, s in zip(views, place)]
                    for place in places
                ]
        except NotMeasured as error:
            found.append(Need(str(error)))
            continue
        rising = sum(map(never_falls, series))
        numbers = f'in {rising} of {len(series)} sublayers that count at every α'
        if len(series) == 1:
            numbers = ', '.join(with_interval(x) for x in series[0])
        mark = max((dagger(*x) for x in series), default='')
        condition = f'{HEADLINES[key]} of C never falls over α = 0, 0.02, 0.1, 0.3, ends apart, {reading}'
        holds = rising >= MOST * len(series) > 0
        found.append(Evidence(seed, key, condition, holds, numbers + mark))
    return found or [Need('ledgers of four doses')]


def same_cost(runs, width, reading, post_hoc):
    """Claim 5: rounding the weights raises the loss of every arm by the same. A loss has one reading."""
    if reading != DECODED:
        return []
    found = []
    for seed in sorted({seed for _, seed in runs}):
        rises = {
            arm: run.quantized['schemes'][width]['damage']['value']
            for (arm, other), run in runs.items()
            if other == seed and run.quantized
        }
        if not {'baseline', 'ledger'} <= rises.keys():
            found.append(Need(f'quantize.json of the arms of seed {seed}'))
            continue
        spread = max(rises.values()) - min(rises.values())
        numbers = ', '.join(f'{arm} {rise:+.4f}' for arm, rise in rises.items())
        condition = f'{width}: the losses of all arms rise by the same, within {MATCHED} nats'
        found.append(Evidence(seed, width, condition, spread <= MATCHED, numbers))
    return found


def on_own_axes(runs, kind, reading, post_hoc):
    """Claim 6: a ledger that commits through a fixed rotation has the object on its own axes: rebuilt."""
    found = [object_in(View(run, 'C'), kind, reading, post_hoc) for run in runs_of(runs, ROTATED)]
    return found or [Need('rotated_commit')]


def on_axes_of_D(runs, kind, reading, post_hoc):
    """Claim 6: it has the object on D's axes, Qᵀ C: what was there in D has leaked through the identity."""
    found = [
        object_in(View(run, ON_AXES_OF_D), kind, reading, post_hoc)
        if ON_AXES_OF_D in run.measure['streams']
        else Need(f'{run.arm} measured on the axes of D')
        for run in runs_of(runs, ROTATED)
    ]
    return found or [Need('rotated_commit')]


def follows_decoding(runs, kind, reading, post_hoc):
    """Claim 7: with D decoded in the place of C, D has it after the last sublayer and C has not."""
    if reading != DECODED:
        return []
    found = [
        object_in(View(run, name), kind, reading, post_hoc, name == 'D', f'{run.arm}: D and not C')
        for run in runs_of(runs, SCRATCH)
        for name in ('D', 'C')
    ]
    return found or [Need('decode_scratch')]


WITHOUT = {DIMENSION: 'dims', START: 'start'}  # as the results of intervene.json name what is taken out


def taken_out(run, kind):
    """Returns {'head' or 'reads': the result of intervene.json}: an object of C, set to zero for those who
    read it. For the head these are, where they differ, the dimensions that are the largest after the last
    sublayer."""
    what, found = WITHOUT[kind], {}
    for result in run.interventions['results']:
        is_zeroed = result['stream'] == 'C' and result['how'] == 'zero'
        if is_zeroed and result['where'] == 'reads' and result['what'] == what:
            found['reads'] = result
        if is_zeroed and result['where'] == 'decoder' and result['what'] in (what, f'last {what}'):
            if result['what'] != what or 'head' not in found:
                found['head'] = result
    return found


def costs_more(run, kind):
    """Returns the evidence that taking an object out of C costs more than every matched control,
    or nothing where no such change was made."""
    numbers, answers = [], []
    for reader, result in taken_out(run, kind).items():
        edit = result['edit']['ratio']
        controls = {name: control['ratio'] for name, control in result['controls'].items()}
        answers.append(all(is_below(control, edit) for control in controls.values()))
        name = max(controls, key=lambda name: controls[name]['value'])
        numbers.append(f'{reader}: {with_interval(edit, 5)}, {name} {with_interval(controls[name], 5)}')
    if not answers:
        return []
    condition = f'{run.arm}: without the {kind} of C perplexity rises more than with any control, apart'
    return [Evidence(run.seed, run.arm, condition, any(answers), '; '.join(numbers))]


def is_used(runs, kind, reading, post_hoc):
    """Claim 8: C's object matters to the head or to what sublayers read. A loss has one reading."""
    if reading != DECODED:
        return []
    with_both = [run for run in runs.values() if run.interventions and 'C' in run.measure['streams']]
    found = [item for run in with_both for item in costs_more(run, kind)]
    return found or [Need(f'intervene.json of a ledger, with the {kind} kept from the head or from reads')]


@dataclass(frozen=True)
class Claim:
    """What is judged: rows are what it is judged for, each an argument of `rule`."""

    number: str
    text: str
    rows: tuple
    rule: object
    words: tuple = REPRODUCED


CLAIMS = (
    Claim('premise', 'h has it', OBJECTS, premise, HOLDS),
    Claim('1', 'at matched loss it is rebuilt in C', OBJECTS, rebuilt),
    Claim('2', 'in C it is smaller than in h', ('fixed_dim_ratio', 'kurtosis'), smaller),
    Claim('2', 'in C it is more concentrated on the start token', ('start_token_concentration',), smaller),
    Claim('3', 'it rises with the price α', ('persistence', 'start_token_concentration'), rises),
    Claim('4', 'QK-norm lowers it in h', ('fixed_dim_ratio', 'kurtosis'), lowered),
    Claim('5', 'quantized weights cost every arm the same', ('W8', 'W4'), same_cost),
    Claim('6', 'committed through a rotation, C has it on its own axes', OBJECTS, on_own_axes, HOLDS),
    Claim('6', "committed through a rotation, C has it on D's axes", OBJECTS, on_axes_of_D, HOLDS),
    Claim('7', 'with D decoded, D has it and C has not', OBJECTS, follows_decoding, HOLDS),
    Claim('8', "C's is used by the head or by sublayers", OBJECTS, is_used, HOLDS),
)


def judge(runs, post_hoc=False):
    """runs: {(arm, seed): run} of one scale. Returns {(number, text, row): {reading: what was found}}."""
    judged = {}
    for claim in CLAIMS:
        for row in claim.rows:
            judged[claim.number, claim.text, row] = {
                reading: not_counting(claim.rule(runs, row, reading, post_hoc), PILOT) for reading in READINGS
            }
    return judged


def words_of(number):
    """Returns the words for all, some and none of a claim."""
    return next(claim.words for claim in CLAIMS if claim.number == number)


def verdict_table(judged):
    """judged: as `judge` returns it. A row for every claim and what it is judged for, a column a reading."""
    rows = []
    for (number, text, row), by_reading in judged.items():
        cells = [verdict(found, words_of(number)) for found in by_reading.values()]
        rows.append((number, text, HEADLINES.get(row, row), *cells))
    return markdown(['claim', 'is', 'judged for', *READINGS], rows)


def evidence_table(judged):
    """Every condition of every claim, with its numbers."""
    rows = []
    for (number, _, _), by_reading in judged.items():
        for found in by_reading.values():
            for item in found:
                if isinstance(item, Evidence):
                    seed = item.seed if item.counts else f'{item.seed} (not counted)'
                    holds = 'yes' if item.holds else 'no'
                    rows.append((number, seed, item.condition, item.numbers, holds))
    return markdown(['claim', 'seed', 'condition', 'numbers', 'holds'], rows)


def object_table(runs, post_hoc=False):
    """Every stream of every run: has it the two objects, in each reading?"""
    rows = []
    for run in runs.values():
        for name, stream in run.measure['streams'].items():
            cells = []
            for kind in OBJECTS:
                for reading in READINGS:
                    found = object_in(View(run, name), kind, reading, post_hoc)
                    if isinstance(found, Need):
                        cells.append('–')
                    else:
                        cells.append(f'{"yes" if found.holds else "no"}: {found.numbers}')
            rows.append((run.name, stream_label(name, stream), f'{run.loss:.3f}', *cells))
    header = [f'{kind}, {reading}' for kind in OBJECTS for reading in READINGS]
    return markdown(['run', 'stream', 'loss', *header], rows)


def premise_in_words(judged):
    """Returns the sentences that come before any claim: whether h has each object along the depth."""
    sentences = []
    for kind in OBJECTS:
        found = judged['premise', 'h has it', kind][DEPTH]
        holds = holds_in_all(found)
        said = verdict(found, ('yes, in every seed', 'in some seeds', 'no'))
        sentence = f'Has h the {kind} along the depth? {said[:1].upper()}{said[1:]}.'
        if holds is False:
            sentence += f' Claims about the {kind} speak of what the baseline has not in every seed.'
        sentences.append(sentence)
    return '\n'.join(sentences)


def rotation_in_words(judged):
    """Returns what the rotation says of each object in each reading: rebuilt, leaked, or neither."""
    own, ofD = (
        {row: by_reading for (number, text, row), by_reading in judged.items() if text == claim.text}
        for claim in CLAIMS
        if claim.number == '6'
    )
    sentences = []
    for kind in OBJECTS:
        found = {reading: (own[kind][reading], ofD[kind][reading]) for reading in READINGS}
        said = [
            f'{reading}, {rebuilt_or_leaked(*map(holds_in_all, pair))}'
            for reading, pair in found.items()
            if holds_in_all(pair[0]) is not None
        ]
        seeds = {seed for own_found, _ in found.values() for seed, _ in counted(own_found)}
        if said:
            sentences.append(f'The {kind}: {"; ".join(said)} ({seeds_in_words(seeds)}).')
    return ' '.join(sentences)


def rebuilt_or_leaked(on_own_axes, on_axes_of_D):
    """Has C the object on its own axes, and on D's, in every seed that counts? Returns what that means."""
    if on_own_axes:
        return 'rebuilt'
    return 'leaked through the identity' if on_axes_of_D else 'neither rebuilt nor leaked in every seed'


def tables_second(runs, post_hoc=False):
    """Returns {title: text} for the runs of one scale by the second set of rules."""
    judged = judge(runs, post_hoc)
    note = 'Post hoc: the rules are younger than these runs. † has no interval.\n\n' if post_hoc else ''
    found = {
        'Premise': note + premise_in_words(judged),
        'Verdicts': verdict_table(judged),
        'Rebuilt or leaked': rotation_in_words(judged),
        'Objects': object_table(runs, post_hoc),
        'Evidence': evidence_table(judged),
    }
    return {title: text for title, text in found.items() if text}


def tables_first(runs):
    """Returns {title: text} for the runs of one scale by the first set of rules."""
    judged = first_rules.judge(runs)
    verdicts = [(claim, text, said) for claim, (text, said, _) in judged.items()]
    evidence = [
        (claim, item.seed, item.condition, item.numbers, 'yes' if item.holds else 'no')
        for claim, (_, _, found) in judged.items()
        for item in found
        if isinstance(item, Evidence)
    ]
    return {
        'Verdicts': markdown(['claim', 'is', 'verdict'], verdicts),
        'Evidence': markdown(['claim', 'seed', 'condition', 'numbers', 'holds'], evidence),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='one that holds <arm>_<scale>_<seed>/')
    parser.add_argument('--rules', choices=('first', 'second'), default='second')
    parser.add_argument(
        '--post-hoc', action='store_true', help='judge values where a measurement has no intervals'
    )
    args = parser.parse_args(argv)
    with interrupts_exit(), user_errors_exit():
        for scale, runs in by_scale(runs_in(args.folder)).items():
            found = tables_first(runs) if args.rules == 'first' else tables_second(runs, args.post_hoc)
            for title, text in found.items():
                print(f'## {scale}: {title}\n\n{text}\n')


if __name__ == '__main__':
    main()
