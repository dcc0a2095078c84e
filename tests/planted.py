"""Plants the packed files of runs, with the values that a test needs."""

import json

SUBLAYERS = 4
# {quantity: (its value after training, of the untrained weights)}
VALUES = {
    'start_ratio': (30, 3),
    'start_persistence': (0.9, 0.2),
    'start_token_concentration': (5, 1),
    'relative_start_concentration': (4, 1),
    'fixed_dim_ratio': (20, 2),
    'kurtosis': (20, 0),
    'persistence': (0.9, 0.2),
    'max_over_median': (40, 5),
    'start_dim_concentration': (5, 1),
}
TRAINED = {key: trained for key, (trained, _) in VALUES.items()}
UNTRAINED = {key: untrained for key, (_, untrained) in VALUES.items()}
OF_STREAM = ('persistence', 'start_persistence')


def around(value, width=0.1):
    """A headline with an interval."""
    return {'value': value, 'low': value - width, 'high': value + width, 'sublayer': 0, 'last': value}


def sublayer(s, values, norm=1.0, dim=7, start_dim=7, width=0.1):
    """An entry of a stream's sublayers. values: {quantity: value}."""
    values = {key: x['value'] if isinstance(x, dict) else x for key, x in values.items()}
    entry = {key: x for key, x in values.items() if key not in OF_STREAM}
    intervals = {key: [x - width, x + width] for key, x in entry.items() if x is not None}
    return {
        'sublayer': s,
        'kind': ('attn', 'mlp')[s % 2],
        'norm': norm,
        'largest_dim': dim,
        'largest_start_dim': start_dim,
        **entry,
        'intervals': intervals,
    }


def stream(values, decoded=True, sublayers=None, peak=0):
    """An entry of measure.json's streams. values: {quantity: its value, or a whole headline}."""
    headlines = {key: x if isinstance(x, dict) else around(x) for key, x in values.items()}
    return {
        'decoded': decoded,
        'peak_sublayer': peak,
        **headlines,
        'sublayers': sublayers or [sublayer(s, values) for s in range(SUBLAYERS)],
    }


def report(streams, loss=2.0, alpha=0.02, windows=256, ledger=True):
    return {
        'val_loss': loss,
        'loss': around(loss),
        'iter_num': 3,
        'model': {'residual': 'ledger' if ledger else 'baseline', 'commit_sparsity': alpha},
        'data': {'name': 'x', 'sequences': windows},
        'streams': streams,
    }


def write_run(folder, arm, seed=1338, loss=2.0, alpha=0.02, scale='160m', streams=None, **values):
    """Plants measure.json and measure_0.json of a run, and returns its folder.

    streams: {name: stream()} for other than the usual ones. values: of the decoded stream and of D;
    untrained=False leaves measure_0.json out."""
    untrained, windows = values.pop('untrained', True), values.pop('windows', 256)
    path = folder / f'{arm}_{scale}_{seed}'
    path.mkdir(parents=True)
    ledger = not arm.startswith(('baseline', 'qknorm'))
    for name, usual in (('measure', {**TRAINED, **values}), ('measure_0', UNTRAINED))[: 1 + untrained]:
        if ledger:
            found = {'D': stream(usual, decoded=False), 'C': stream(usual)}
        else:
            found = {'h': stream(usual)}
        if streams and name == 'measure':
            found |= streams
        text = json.dumps(report(found, loss, alpha, windows, ledger))
        (path / f'{name}.json').write_text(text)
    return path


def write_log(path, losses, streams=('h',)):
    """A log whose start ratio is the iteration in sublayer 1, and half that in sublayer 0."""
    lines = [
        {
            'iter': i,
            'tokens': i,
            'val_loss': loss,
            'commit_rate': [0.1, 0.3],
            'streams': {name: {'start_ratio': [0.5 * i + 1, i + 1]} for name in streams},
        }
        for i, loss in losses.items()
    ]
    (path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
