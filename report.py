"""
What a measure.json says: whether a stream has an outlier, by rules that were fixed before the runs; the table
of a run; the comparison of several. Everything here reads reports and knows no model.

An outlier dimension, at a sublayer: fixed-dimension ratio at least 3 times the untrained model's at that
sublayer. A start-token outlier: start ratio at least 3 times the untrained, and relative start concentration
at least 1.5. Both hold only if they hold between the near ends of the 95% intervals. Along the depth they
hold if they do in half of the sublayers with a share of norm of at least a tenth, and half of these have the
same largest dimension.
"""

from machine import say

import figures
from figures import HEADLINES, cell, short

STABLE = 0.95  # a dimension that is chosen again in fewer of the replicates is said to be uncertain
TIMES_UNTRAINED = 3  # how far above the untrained model's a ratio must be to be an outlier's
RELATIVE_CONCENTRATION = 1.5  # and how far a start-token outlier's dimension is above the median dimension's
COUNTS_FROM = 0.1  # share of norm from which a sublayer counts
# the largest ratios of any sublayer of the untrained models that were measured here, up to 290M parameters:
# the reference where a model's own untrained weights are missing
REFERENCE = {'fixed_dim_ratio': 5.6, 'start_ratio': 4.5}

RULE = (
    'Rule, by the near ends of intervals: the fixed-dimension ratio, or the start ratio with a relative\n'
    f'start conc. of at least {RELATIVE_CONCENTRATION}, is at least {TIMES_UNTRAINED} times the untrained.'
)
LOSS_DIFFERENCE = 'loss − first run'
WORDS = {True: 'yes', False: 'no', None: 'open'}


# ---- is there an outlier?


def ends_of(sublayer, key):
    """Returns the low and the high end of an interval in measure.json, two None where it has none."""
    return sublayer.get('intervals', {}).get(key) or (None, None)


def untrained_bounds(entry):
    """entry: a stream of an untrained model's measure.json. Returns for every sublayer {quantity: the upper
    end of its interval}, or its value where there is none, for the quantities of the two rules."""
    bounds = []
    for sublayer in entry['sublayers']:
        upper = {key: ends_of(sublayer, key)[1] for key in REFERENCE}
        bounds.append({key: sublayer[key] if high is None else high for key, high in upper.items()})
    return bounds


def far_above(sublayer, bound, key):
    """Is a ratio at least TIMES_UNTRAINED times the untrained, between the near ends? None where that is
    open."""
    low, _ = ends_of(sublayer, key)
    return None if low is None or bound[key] is None else low >= TIMES_UNTRAINED * bound[key]


def outlier_dimension(sublayer, bound):
    """sublayer: of a stream in measure.json. bound: of the same sublayer, from untrained_bounds.
    Returns whether a dimension is far larger than the median dimension; None where it cannot be said."""
    return far_above(sublayer, bound, 'fixed_dim_ratio')


def start_token_outlier(sublayer, bound):
    """The same of the start token: its ratio is large, and its dimension is not as large everywhere else."""
    large = far_above(sublayer, bound, 'start_ratio')
    low, _ = ends_of(sublayer, 'relative_start_concentration')
    concentrated = None if low is None else low >= RELATIVE_CONCENTRATION
    if large is False or concentrated is False:
        return False
    return None if None in (large, concentrated) else True


OBJECTS = {'outlier_dimension': 'outlier dimension', 'start_token_outlier': 'start-token outlier'}
RULES = {  # the object → its rule, and which dimension must be the same along the depth
    'outlier_dimension': (outlier_dimension, 'largest_dim'),
    'start_token_outlier': (start_token_outlier, 'largest_start_dim'),
}


def counting_sublayers(entry):
    """Returns the sublayers where a stream holds enough to be judged."""
    shares = [sublayer['share_of_norm'] for sublayer in entry['sublayers']]
    return [s for s, share in enumerate(shares) if share is not None and share >= COUNTS_FROM]


def judge(entry, bounds):
    """entry: a stream of measure.json. bounds: from untrained_bounds. Returns for both objects of RULES
    whether the stream has it, in three readings: decoded (at the last sublayer), depth, published (where m at
    j* peaks); and in how many of the sublayers that count. None stands for what cannot be said, as of one
    sequence."""
    counting, found = counting_sublayers(entry), {}
    for name, (rule, dimension) in RULES.items():
        judged = [rule(sublayer, bound) for sublayer, bound in zip(entry['sublayers'], bounds, strict=True)]
        holding = sum(judged[s] is True for s in counting)
        dims = [entry['sublayers'][s][dimension] for s in counting]
        most_frequent = max((dims.count(j) for j in dims), default=0)
        open_everywhere = all(judged[s] is None for s in counting)
        along_depth = 2 * holding >= len(counting) and 2 * most_frequent >= len(counting)
        found[name] = {
            'decoded': judged[-1],
            'depth': None if open_everywhere else along_depth,
            'published': judged[entry['peak_sublayer']],
            'holding': holding,
            'counting': len(counting),
        }
    return found


# ---- what is printed


def print_run(name, report, say_token=str):
    """Prints a run's table. say_token: token id → text."""
    data, loss, sink = report['data'], report['loss'], report['attention_sink']
    windows = f'{data["sequences"]} sequences of {data["block_size"]} tokens, {data["name"]} {data["split"]}'
    say(f'\n{name}, iteration {report["iter_num"]}: {windows}, seed {data["seed"]}')
    sentence = f'loss {cell(loss)} nats per token'
    if report.get('loss_per_byte'):
        sentence += f', {cell(report["loss_per_byte"])} per byte'
    if sink:
        sentence += f'; {cell(sink["fraction_of_heads"])} of the heads are attention sinks'
    say(sentence)
    if data.get('first_token') is not None:
        say(f'position 0 is {say_token(data["first_token"])}, the token for the beginning of a text')
    elif data['split'] == 'text':
        say('position 0 is a token of the text, not one for its beginning')
    print_streams(report['streams'], say_token, report.get('untrained'))
    if 'untrained' in report:
        say(f'\n{RULE} Untrained: {describe_source(report["untrained"])}.')
        say(conclusion(report['streams']))


def print_streams(streams, say_token=str, untrained=None):
    """Prints a block for each stream of a report, one line a quantity: its headline, and its value at the
    last sublayer, beside the untrained one."""
    for stream, s in streams.items():
        title = stream + ' (decoded)' * s['decoded']
        before = untrained['streams'].get(stream, {}) if untrained else {}
        last = f'last: {s["sublayers"][-1]["kind"]} {len(s["sublayers"]) - 1}'
        headings = f'{"largest over sublayers":29}{"at":9}{last:29}{"untrained" * bool(before)}'
        say(f'\n{title:23}{headings}'.rstrip())
        for key, label in HEADLINES.items():
            if key not in figures.UNPRINTED and s[key]['value'] is not None:
                say(table_row(label, s, s[key], before.get(key)))
        print_dimensions(s, say_token)
        for name, verdict in s.get('outlier', {}).items():
            say(f'{OBJECTS[name]:23}{verdict_text(verdict)}')


def table_row(label, s, q, before):
    """q: a headline of the stream s. before: the untrained values over the sublayers, or None."""
    if q['sublayer'] is None:
        return f'{label:23}{cell(q)}'
    at = f'{s["sublayers"][q["sublayer"]]["kind"]} {q["sublayer"]}'
    untrained = short(before[-1], 3) if before else ''
    return f'{label:23}{cell(q):29}{at:9}{cell(last_interval(q)):29}{untrained}'.rstrip()


def print_dimensions(s, say_token):
    """Prints j* and j0 of a stream, whether they are certain, and its largest entry where m at j* peaks."""
    say(f'{"dimensions":23}dominant j* {s["dominant_dim"]}, start j0 {s["start_dim"]}')
    for symbol, share in {'j*': s['dominant_dim_share'], 'j0': s['start_dim_share']}.items():
        if share is not None and share < STABLE:
            say(f'{"":23}{symbol} is uncertain: the same in {share:.0%} of the replicates')
    peak = s['sublayers'][s['peak_sublayer']]
    if peak['top']:
        top = peak['top'][0]
        place = f'dimension {top["dim"]}, position {top["position"]}, {say_token(top["token"])}'
        after = f'{short(top["value"], 4)} after {peak["kind"]} {s["peak_sublayer"]}'
        say(f'{"largest entry":23}{after}: {place}')


def describe_source(untrained):
    if untrained['streams']:
        return untrained['source']
    numbers = ' and '.join(f'{value} ({HEADLINES[key]})' for key, value in REFERENCE.items())
    return f'{untrained["source"]},\nso the largest of untrained models up to 290M parameters: {numbers}'


def verdict_text(verdict):
    """'last sublayer: no; along the depth: yes, in 6 of 8 sublayers that count; where m at j* peaks: yes'."""
    last, depth, peak = (WORDS[verdict[reading]] for reading in ('decoded', 'depth', 'published'))
    held = f'in {verdict["holding"]} of {verdict["counting"]}'
    is_spread = verdict['depth'] is False and 2 * verdict['holding'] >= verdict['counting'] > 0
    if is_spread:  # there is one nearly everywhere, but it is not the same dimension
        held = f'in changing dimensions, {held}'
    return f'last sublayer: {last}; along the depth: {depth}, {held} that count; where m at j* peaks: {peak}'


def conclusion(streams):
    """Returns one sentence: what a reader may conclude of the stream that the head reads."""
    name, s = next((item for item in streams.items() if item[1]['decoded']), next(iter(streams.items())))
    dimension, start = s['outlier']['outlier_dimension'], s['outlier']['start_token_outlier']
    if s['norm']['last'] is None:
        found = f'{name} is not finite: this model has diverged, and its statistics say nothing'
    elif start['decoded']:
        found = f'what the head reads of {name} has a start-token outlier, in dimension '
        found += f'{s["sublayers"][-1]["largest_start_dim"]}'
    elif dimension['decoded']:
        found = f'what the head reads of {name} has an outlier dimension, but not on the start token alone'
    elif start['depth'] or dimension['depth']:
        found = f'{name} has an outlier along the depth, and none in what the head reads'
    elif None in (start['decoded'], dimension['decoded']):
        found = f'too few sequences, or too empty a stream, to say whether {name} has an outlier'
    else:
        found = f'{name} does not stand out from an untrained model: no outlier to explain here'
    return f'To conclude: {found}.'


def compare(reports, paired_difference):
    """Returns what comparison.json holds of each run: its decoded stream, and {quantity: interval} of that.
    The first run's difference from itself is None.

    paired_difference(report, first): the interval of the difference between two losses on the same
    windows."""
    columns, first = {}, next(iter(reports.values()))
    for name, report in reports.items():
        stream, s = next(item for item in report['streams'].items() if item[1]['decoded'])
        quantities = {'loss (nats per token)': report['loss']}
        if all(other.get('loss_per_byte') for other in reports.values()):
            quantities['loss (nats per byte)'] = report['loss_per_byte']
        if len(reports) > 1:
            quantities[LOSS_DIFFERENCE] = None if report is first else paired_difference(report, first)
        for key in figures.COMPARED:
            quantities[HEADLINES[key]] = s[key]
        verdicts = {rule: verdict['decoded'] for rule, verdict in s.get('outlier', {}).items()}
        columns[name] = {'stream': stream, 'quantities': quantities, 'outlier': verdicts}
    return columns


def last_interval(q):
    """q: a headline, or None. Returns the interval of its value at the last sublayer."""
    q = q or {}
    return {'value': q.get('last'), 'low': q.get('last_low'), 'high': q.get('last_high')}


def comparison_rows(columns):
    """columns: as compare returns them. Returns the table's rows, (label, [text for each run])."""
    rows = []
    for label in columns[0]['quantities']:
        quantities = [column['quantities'][label] for column in columns]
        rows.append((label, [cell(q) if q else '' for q in quantities]))
        if any(q and q.get('sublayer') is not None for q in quantities):
            rows.append(('  at the last sublayer', [cell(last_interval(q)) for q in quantities]))
    for rule in RULES:
        verdicts = [column['outlier'].get(rule) for column in columns]
        rows.append((OBJECTS[rule], [WORDS[verdict] for verdict in verdicts]))
    return rows


def print_comparison(columns):
    """columns: as compare returns them. Prints a column for each run, three beside one another."""
    say('\ndecoded stream of each run: largest over the sublayers [95% interval over sequences]')
    names = list(columns)
    for i in range(0, len(names), 3):
        block = {name: columns[name] for name in names[i : i + 3]}
        print_row('', [f'{name} ({column["stream"]})'[:28] for name, column in block.items()])
        for label, texts in comparison_rows(list(block.values())):
            print_row(label, texts)


def print_row(label, texts):
    say((f'{label:23}' + ''.join(f'{text:29}' for text in texts)).rstrip())
