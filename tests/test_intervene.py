"""The specification of intervene.py and edits.py.

What an edit must do is done again by hand: tests/reference.py computes the whole model in numpy and
float64, and shows every stream to a function that may change it. d dimensions, S sublayers, levels 0 … S.
"""

import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import nothing, reference_of

from checkpoint import open_runs
from data.classes import CLASSES, classify, structure
from data.loader import Tokens, encoding
from measure import bootstrap_weights
from model import GPT, GPTConfig
from studies import intervene
from studies.edits import (
    CONTROLS,
    Edit,
    Reference,
    edited,
    evaluate,
    plan,
    states,
    with_controls,
)
from studies.intervene import attention, constancy, outcome, sample
from studies.intervene_report import (
    ROWS,
    detailed_results,
    print_all,
    print_summary,
    ratio_ticks,
    results_at,
    summarized,
)

pytestmark = pytest.mark.usefixtures('one_thread')

N, T, D, S, K = 6, 16, 20, 4, 3
SMALL = dict(block_size=T, vocab_size=257, n_layer=S // 2, n_head=2, n_embd=D, gate_rank=3)
ARMS = {'baseline': dict(qk_norm=True), 'ledger': dict(residual='ledger'), 'bias': dict(attn_bias_kv=True)}
OTHER_ARMS = {
    'decode_scratch': dict(residual='ledger', arm='decode_scratch'),
    'rotated_commit': dict(residual='ledger', arm='rotated_commit'),
    'two_stream': dict(arm='two_stream'),
}
HOWS = ('zero', 'mean', 'overall', 'clip')
STREAMS = [('baseline', 'h'), ('ledger', 'D'), ('ledger', 'C')]
every_stream = pytest.mark.parametrize('arm, stream', STREAMS)
ENTRIES = dict(positions=(0, 3, 3), dims=(7, 5, 7))
SOURCE = ''.join(
    f"def f{i}(x):\n    '''Adds {i * i}.'''\n    return x + {i * 37 % 101}  # {'word ' * (i % 5)}\n"
    for i in range(40)
)
NOTHING = Edit('stream', 'h', (), 'zero')


def write_dataset(folder, ids):
    folder.mkdir(parents=True)
    for split in ('train', 'val'):
        np.asarray(ids, '<u2').tofile(folder / f'{split}.bin')
    (folder / 'meta.json').write_text(
        json.dumps({'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256, 'source': 'Python code'})
    )
    return Tokens(folder, 'val', T, 257)


def random_model(arm):
    """Random weights, every one in use, with outliers at position 0 and in dimension 7."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **{**ARMS, **OTHER_ARMS}[arm])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.pos_emb.weight[0, 5] += 8
        model.pos_emb.weight[:, 7] += 2
    return model


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """The arms, N windows of Python source to evaluate on, and N others that entries are chosen on."""
    root = tmp_path_factory.mktemp('lab')
    tokens = write_dataset(root / 'data', np.frombuffer(SOURCE.encode(), np.uint8))
    starts = tokens.fixed_starts(2 * N)
    models = {arm: random_model(arm) for arm in ARMS}
    return SimpleNamespace(
        root=root,
        tokens=tokens,
        starts=starts[:N],
        idx=tokens.windows(starts[:N])[0],
        targets=tokens.windows(starts[:N])[1].numpy(),
        others=tokens.windows(starts[N:])[0],
        models=models,
        references={arm: Reference(models[arm], tokens, starts[N:], starts[:N], K, 4, 0) for arm in ARMS},
    )


def by_hand(model, idx, touch=nothing):
    """The forward pass in numpy, float64, with a touch as tests/reference.py calls it.
    Returns the logits and {stream: (S + 1, B, T, d)}."""
    logits, levels, _ = reference_of(model).forward(idx.numpy(), touch)
    return logits, {stream: np.stack([level[stream] for level in levels]) for stream in levels[0]}


def losses(logits, targets):
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def limit_of(x, quantile):
    """x: (M, T, d). The quantile of the magnitudes of a sequence, its mean over sequences."""
    return np.mean([np.sort(np.abs(sequence).ravel())[math.ceil(quantile * T * D) - 1] for sequence in x])


def largest(x):
    """x: (T, d). Returns the places of its K largest magnitudes, (position, dimension)."""
    return [tuple(divmod(int(i), D)) for i in np.argsort(-np.abs(x), axis=None, kind='stable')[:K]]


def put_in(how, others, t, j):
    """others: (M, T, d).

    Returns what an edit puts in the place of dimension j at position t, or at all of them.
    """
    return {'zero': 0, 'mean': others[:, t, j].mean(0), 'overall': others[:, :, j].mean()}[how]


def by_hand_with(lab, model, edit, others=None):
    """Returns what an edit without a control must make of the losses, (N, T). others: the windows of its
    reference.
    """
    others = lab.idx if others is None else others
    others, own = (by_hand(model, idx)[1][edit.stream] for idx in (others, lab.idx))

    def touch(where, level, streams):
        if where != edit.where or level not in edit.levels:
            return streams
        x = streams[edit.stream].copy()
        if edit.how == 'clip':
            limit = limit_of(others[level], edit.quantile)
            x = np.clip(x, -limit, limit)
        elif edit.own:
            for n in range(N):
                for t, j in largest(own[edit.own, n]):
                    x[n, t, j] = put_in(edit.how, others[level], t, j)
        else:
            for t, j in zip(edit.positions or [slice(None)] * len(edit.dims), edit.dims):
                x[:, t, j] = put_in(edit.how, others[level], t, j)
        return {**streams, edit.stream: x}

    return losses(by_hand(model, lab.idx, touch)[0], lab.targets)


def evaluated(lab, arm, edits, batch_size=4):
    return evaluate(lab.models[arm], lab.tokens, lab.starts, edits, lab.references[arm], batch_size)


# ---- edits

PLACES = {
    'once': ('stream', (2,)),
    'downstream': ('stream', (1, 2, 3, 4)),
    'reads': ('reads', (0, 1, 2, 3)),
    'decoder': ('decoder', (4,)),
}


@pytest.mark.parametrize(
    'arm, stream, place',
    [
        (*names, place)
        for names in STREAMS
        for place in PLACES
        if names[1] != 'D' or place in ('once', 'downstream')
    ],
)
def test_an_edit_is_the_tensor_changed_by_hand(lab, arm, stream, place):
    where, levels = PLACES[place]
    edits = [
        Edit(where, stream, levels, how, **entries)
        for how in ('zero', 'mean', 'overall')
        for entries in (ENTRIES, dict(dims=(5, 7)))
    ]
    edits.append(Edit(where, stream, levels, 'clip', quantile=0.9))
    edits += [Edit(where, stream, levels, how, own=2) for how in ('zero', 'mean', 'overall')]
    before, after = evaluated(lab, arm, edits)
    np.testing.assert_allclose(before, losses(by_hand(lab.models[arm], lab.idx)[0], lab.targets), atol=1e-4)
    for edit in edits:
        np.testing.assert_allclose(
            after[edit], by_hand_with(lab, lab.models[arm], edit, lab.others), atol=1e-4, err_msg=str(edit)
        )
        assert np.abs(after[edit] - before).max() > 1e-3, f'{edit} changed nothing'


@pytest.mark.parametrize(
    'arm, stream, place',
    [
        ('decode_scratch', 'D', 'decoder'),
        ('decode_scratch', 'D', 'reads'),
        ('rotated_commit', 'C', 'reads'),
        ('rotated_commit', 'C', 'once'),
        ('two_stream', 's0', 'once'),
        ('two_stream', 'sum', 'decoder'),
    ],
)
def test_an_arm_is_edited_as_the_others_are(lab, arm, stream, place):
    model = random_model(arm)
    where, levels = PLACES[place]
    edit = Edit(where, stream, levels, 'zero', **ENTRIES)
    reference = Reference(model, lab.tokens, lab.starts, lab.starts, K, 4, 0)
    before, after = evaluate(model, lab.tokens, lab.starts, [edit], reference, 4)
    np.testing.assert_allclose(after[edit], by_hand_with(lab, model, edit), atol=1e-4)
    assert np.abs(after[edit] - before).max() > 1e-3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_pretrained_model_is_edited_as_if_patched_by_hand(lab, dtype):
    transformers = pytest.importorskip('transformers')
    from pretrained import Pretrained

    torch.manual_seed(0)
    shape = dict(hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=257, **shape, attn_implementation='eager')
    llama = transformers.LlamaForCausalLM(config).to(dtype)
    model = Pretrained(llama)
    reference = Reference(model, lab.tokens, lab.starts, lab.starts, K, 4, 0)
    block = llama.model.layers[0]

    def zeroed(x):
        x = x.clone()
        x[:, ENTRIES['positions'], ENTRIES['dims']] = 0
        return x

    def attention_that_leaves_zeros(module, inputs, options, output):
        return zeroed(entered[-1] + output[0]) - entered[-1], *output[1:]

    entered = []
    patches = {
        Edit('stream', 'h', (1,), 'zero', **ENTRIES): [
            lambda: block.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0])),
            lambda: block.self_attn.register_forward_hook(attention_that_leaves_zeros, with_kwargs=True),
        ],
        Edit('stream', 'h', (2,), 'zero', **ENTRIES): [
            lambda: block.register_forward_hook(lambda module, inputs, output: zeroed(output))
        ],
        Edit('decoder', 'h', (4,), 'zero', **ENTRIES): [
            lambda: llama.model.norm.register_forward_pre_hook(lambda module, inputs: (zeroed(inputs[0]),))
        ],
    }
    before, after = evaluate(model, lab.tokens, lab.starts, list(patches), reference, 4)
    for edit, patch in patches.items():
        handles = [register() for register in patch]
        with torch.no_grad():
            expected = losses(llama(lab.idx).logits.double().numpy(), lab.targets)
        for handle in handles:
            handle.remove()
        np.testing.assert_allclose(after[edit], expected, atol=1e-5 if dtype == torch.float32 else 0.02)
        assert np.abs(after[edit] - before).max() > 1e-4


@every_stream
@pytest.mark.parametrize('where', ['stream', 'reads', 'decoder'])
@pytest.mark.parametrize('control', ['', 'random', 'moved'])
def test_an_intervention_of_no_entries_changes_no_bit(lab, arm, stream, where, control):
    edits = [
        Edit(where, stream, (1, 2, 3), how, positions=positions, control=control)
        for how in ('zero', 'mean')
        for positions in ((), None)
    ]
    before, after = evaluated(lab, arm, [*edits, replace(NOTHING, stream=stream)])
    assert all((losses == before).all() for losses in after.values())


@every_stream
def test_what_an_edit_does_not_reach_is_not_computed_again_and_no_bit_differs(lab, arm, stream):
    edit = Edit('stream', stream, (3,), 'zero', **ENTRIES)
    _, after = evaluated(lab, arm, [edit], N)
    model, reference = lab.models[arm], lab.references[arm]
    with torch.no_grad(), edited(model, edit, reference, range(N)):
        whole = torch.nn.functional.cross_entropy(
            model(lab.idx).flatten(0, 1), torch.from_numpy(lab.targets).flatten(), reduction='none'
        )
    assert (whole.view(N, T).numpy() == after[edit]).all()


@every_stream
def test_the_model_is_as_before_after_an_edit_even_one_that_failed(lab, arm, stream):
    model, reference = lab.models[arm], lab.references[arm]
    with torch.no_grad():
        before = model(lab.idx)
        for where in ('stream', 'reads', 'decoder'):
            with (
                pytest.raises(RuntimeError),
                edited(model, Edit(where, stream, (1, 2), 'zero', **ENTRIES), reference, range(N)),
            ):
                assert not torch.equal(model(lab.idx), before)
                raise RuntimeError
            assert torch.equal(model(lab.idx), before)


def test_predictions_before_an_edit_do_not_change(lab):
    edit = Edit('stream', 'h', (1, 2, 3), 'zero', positions=(6, 9), dims=(5, 7))
    before, after = evaluated(lab, 'baseline', [edit])
    assert (after[edit] == before)[:, :6].all() and (np.abs(after[edit] - before)[:, 6:] > 0).mean() > 0.9


def test_an_edit_for_the_decoder_alone_leaves_every_stream_untouched(lab):
    model, edit = lab.models['ledger'], Edit('decoder', 'C', (S,), 'zero', dims=(7,))
    with torch.no_grad():
        before, logits = states(model, lab.idx)
        with edited(model, edit, lab.references['ledger'], range(N)):
            after, changed = states(model, lab.idx)
    assert all(torch.equal(x[name], y[name]) for x, y in zip(before, after) for name in 'DC')
    assert not torch.isclose(logits, changed).any(-1).all()


def test_without_the_read_coupling_the_ledger_is_one_whose_lambda_is_zero(lab):
    edit = Edit('reads', 'C', tuple(range(S)), 'zero', dims=tuple(range(D)))
    before, after = evaluated(lab, 'ledger', [edit])
    model = random_model('ledger')
    with torch.no_grad():
        for sublayer in model.sublayers:
            sublayer.residual.read_scale.zero_()
    uncoupled, _ = evaluate(model, lab.tokens, lab.starts, [], lab.references['ledger'], 4)
    np.testing.assert_allclose(after[edit], uncoupled, atol=1e-5)
    assert np.abs(before - uncoupled).max() > 0.01


@every_stream
def test_batches_do_not_matter(lab, arm, stream):
    edits = [
        edit
        for entries in (ENTRIES, dict(own=1))
        for edit in with_controls(
            Edit('stream', stream, (1, 2), 'zero', **entries), lab.references[arm], 1
        ).values()
    ]
    results = [evaluated(lab, arm, edits, batch_size)[1] for batch_size in (1, N)]
    for edit in edits:
        np.testing.assert_allclose(results[0][edit], results[1][edit], atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_losses(lab):
    for arm, stream in STREAMS:
        edits = [
            edit
            for trial in plan(lab.references[arm], stream, 1, HOWS, stream != 'D', arm != 'ledger')
            for edit in trial.group.values()
        ]
        model = random_model(arm).cuda()
        reference = Reference(model, lab.tokens, lab.tokens.fixed_starts(2 * N)[N:], lab.starts, K, 4, 0)
        before, after = evaluate(model, lab.tokens, lab.starts, edits, reference, 4)
        expected = evaluated(lab, arm, edits)
        np.testing.assert_allclose(before, expected[0], atol=1e-4)
        for edit in edits:
            np.testing.assert_allclose(after[edit], expected[1][edit], atol=1e-4)
        assert attention(model, lab.tokens, lab.starts, 4, reference, edits[0], (0, 1))[0].shape == (2, 2)


# ---- which entries, and their controls


@every_stream
def test_the_largest_dimensions_are_chosen_on_other_windows(lab, arm, stream):
    a = np.abs(by_hand(lab.models[arm], lab.others)[1][stream][2]).mean(0)
    assert lab.references[arm].pick(stream, 2) == {
        'start': ((0,) * K, tuple(np.argsort(-a[0])[:K])),
        'dims': (None, tuple(np.argsort(-a.mean(0))[:K])),
    }
    t = a.argmax() // D
    assert lab.references[arm].standout(stream, 2) == pytest.approx(
        a.max() / np.sort(a[t])[(D - 1) // 2], rel=1e-4
    )


@every_stream
def test_top_are_the_largest_entries_of_each_evaluated_sequence_itself(lab, arm, stream):
    reference, x = lab.references[arm], by_hand(lab.models[arm], lab.idx)[1][stream][2]
    own = [largest(sequence) for sequence in x]
    assert [
        list(zip(*reference.entries(Edit('stream', stream, (3,), 'zero', own=2), n))) for n in range(N)
    ] == own
    assert len(set(map(tuple, own))) > 1, 'not the same in all'
    entries, share = reference.common(stream, 2)
    counts = {entry: sum(entry in of for of in own) for of in own for entry in of}
    assert [counts[tuple(entry)] for entry in entries] == sorted(counts.values(), reverse=True)[
        :K
    ] and share == pytest.approx(counts[tuple(entries[0])] / N)


@every_stream
def test_a_position_that_clip_edits_has_an_entry_over_the_limit(lab, arm, stream):
    x, others = (by_hand(lab.models[arm], idx)[1][stream] for idx in (lab.idx, lab.others))
    for quantile in (0.99, 0.9):
        over = [(np.abs(x[level]) > limit_of(others[level], quantile)).any(-1) for level in (2, 3)]
        once, twice = (
            lab.references[arm].touched(Edit('stream', stream, levels, 'clip', quantile=quantile), N)
            for levels in ((2,), (2, 3))
        )
        assert (once == over[0]).all() and (twice == over[0] | over[1]).all() and over[0].any()
        change = seen_in(lab, arm, Edit('stream', stream, (2,), 'clip', quantile=quantile))
        assert ((change != 0).any(-1) == over[0]).all()


def candidates(lab, magnitude, standouts):
    """What `auto` takes of a stream whose mean magnitude and standout after every sublayer are these."""
    reference = object.__new__(Reference)
    reference.S, reference.magnitude = (
        len(magnitude),
        {'C': torch.tensor([0, *magnitude])[:, None, None].expand(-1, 2, 2)},
    )
    reference.standout = lambda stream, level: standouts[level - 1]
    return reference.peak('C')


def test_auto_takes_the_sublayer_where_the_outlier_stands_out_of_those_that_an_attention_follows(lab):
    assert candidates(lab, [1.0] * 6, [1, 2, 5, 4, 9, 9]) == 2
    assert candidates(lab, [1.0] * 6, [1, 2, 3, 4, 9, 9]) == 3
    assert candidates(lab, [1.0, 1.0], [1, 2]) == 0


def test_auto_takes_no_sublayer_after_which_the_stream_is_a_quarter_of_its_largest_or_less(lab):
    assert candidates(lab, [0.1, 0.9, 1.1, 4.0, 50.0, 50.0], [9, 8, 3, 2, 9, 9]) == 2


def seen_in(lab, arm, edit):
    """Returns by how much an edit of one level changes its stream there, (N, T, d)."""
    model = lab.models[arm]
    with torch.no_grad():
        before, _ = states(model, lab.idx)
        with edited(model, edit, lab.references[arm], range(N)):
            after, _ = states(model, lab.idx)
    return (after[edit.levels[0]][edit.stream] - before[edit.levels[0]][edit.stream]).numpy()


@every_stream
@pytest.mark.parametrize(
    'entries', [ENTRIES, dict(dims=(5, 7)), dict(own=2)], ids=['entries', 'dimensions', 'own']
)
def test_random_entries_are_as_many_others_and_not_the_same_in_every_sequence(lab, arm, stream, entries):
    edit = Edit('stream', stream, (2,), 'zero', **entries)
    change = seen_in(lab, arm, replace(edit, control='random'))
    per_sequence = (change != 0).sum((1, 2))
    assert (per_sequence == (K if edit.own or edit.positions else T * len(edit.dims))).all()
    for n in range(N):
        assert not change[n][:, lab.references[arm].entries(edit, n)[1]].any()
    assert len({tuple(np.flatnonzero(x)) for x in change}) > N // 2


@every_stream
@pytest.mark.parametrize(
    'entries',
    [ENTRIES, dict(dims=(5, 7)), dict(own=2), dict(quantile=0.9)],
    ids=['entries', 'dimensions', 'own', 'clip'],
)
def test_a_moved_change_is_as_large_in_every_token_but_in_other_dimensions(lab, arm, stream, entries):
    edit = Edit('stream', stream, (2,), 'clip' if 'quantile' in entries else 'zero', **entries)
    change, moved = seen_in(lab, arm, edit), seen_in(lab, arm, replace(edit, control='moved'))
    np.testing.assert_allclose(np.sort(moved, -1), np.sort(change, -1), atol=1e-5)
    assert np.abs(change).sum() > 1 and (moved[change != 0] == change[change != 0]).mean() < 0.1
    for n in range(N):
        assert not moved[n][:, list(lab.references[arm].entries(edit, n)[1])].any()


@pytest.mark.parametrize('entries', [dict(dims=(5, 7)), dict(quantile=0.9)], ids=['dimensions', 'clip'])
@torch.no_grad()
def test_moved_again_downstream_a_change_does_not_add_up(lab, entries):
    model = random_model('baseline')
    for sublayer in model.sublayers:  # nothing is written: the stream is the same at every level
        for parameter in sublayer.function.proj.parameters():
            parameter.zero_()
    reference = Reference(model, lab.tokens, lab.starts, lab.starts, K, 4, 0)
    once, downstream = (
        Edit('stream', 'h', levels, 'clip' if 'quantile' in entries else 'zero', control='moved', **entries)
        for levels in ((1,), (1, 2, 3, 4))
    )
    with edited(model, once, reference, range(N)):
        expected = states(model, lab.idx)[0][S]['h']
    assert not torch.allclose(expected, states(model, lab.idx)[0][S]['h'])
    with edited(model, downstream, reference, range(N)):
        for _ in range(2):  # the second pass remembers nothing of the first
            torch.testing.assert_close(states(model, lab.idx)[0][S]['h'], expected, rtol=0, atol=1e-5)


def test_the_other_controls_are_median_dimensions_at_the_start_and_the_same_dimensions_half_a_window_away(
    lab,
):
    reference = lab.references['ledger']
    group = with_controls(Edit('stream', 'C', (2,), 'zero', **ENTRIES), reference, 2)
    assert set(group) == {'edit', *CONTROLS}
    start = np.abs(by_hand(lab.models['ledger'], lab.others)[1]['C'][2]).mean(0)[0]
    ranks = np.argsort(np.argsort(start))[list(group['median'].dims)]
    assert group['median'].positions == (0, 0, 0) and set(ranks) == {8, 9, 10}
    assert reference.entries(group['other'], 0) == ([8, 11, 11], ENTRIES['dims'])
    assert all(
        replace(edit, positions=(), dims=(), control='') == replace(group['edit'], positions=(), dims=())
        for edit in group.values()
    )


def test_the_controls_of_a_sequences_own_entries_are_made_from_them(lab):
    reference = lab.references['ledger']
    group = with_controls(Edit('stream', 'C', (2, 3), 'zero', own=2), reference, 2)
    assert set(group) == {'edit', *CONTROLS}
    assert (
        group['median']
        == with_controls(Edit('stream', 'C', (2, 3), 'zero', **ENTRIES), reference, 2)['median']
    )
    for n in range(N):
        positions, dims = reference.entries(group['edit'], n)
        assert reference.entries(group['moved'], n) == (positions, dims)
        assert reference.entries(group['other'], n) == ([(t + 8) % T for t in positions], dims)


@every_stream
def test_every_planned_result_has_its_controls(lab, arm, stream):
    trials = plan(lab.references[arm], stream, 1, HOWS, stream != 'D', arm != 'ledger')
    for trial in trials:
        what = trial.said['what']
        expected = {'edit', 'moved'}
        if what != 'all':
            expected |= {'random', 'median'}
        if what in ('top', 'start', 'last start'):
            expected |= {'other'}
        assert set(trial.group) == expected


@every_stream
def test_every_way_of_changing_a_stream_is_planned_and_of_keeping_it_from_those_that_read_it(
    lab, arm, stream
):
    trials = plan(lab.references[arm], stream, 1, HOWS, stream != 'D', arm != 'ledger')
    made = {tuple(trial.said[key] for key in ('where', 'what', 'how', 'reach')) for trial in trials}
    assert len(made) == len(trials)
    quantiles = [f'clip {q}' for q in (0.9999, 0.999, 0.99, 0.9)]
    for reach in ('once', 'downstream'):
        for what in ('top', 'start', 'dims'):
            assert {('stream', what, how, reach) for how in ('zero', 'mean', 'overall')} <= made
        assert {('stream', 'all', how, reach) for how in quantiles} <= made
    kept = {('reads', 'every'), ('decoder', '')} if stream != 'D' else set()
    assert {(where, reach) for where, *_, reach in made if where != 'stream'} == kept
    for where, reach in kept:
        assert {
            (where, what, how, reach) for what in ('start', 'dims') for how in ('zero', 'mean', 'overall')
        } <= made
        assert {(where, 'all', how, reach) for how in quantiles} <= made
    assert (('reads', 'all', 'zero', 'every') in made) == (stream == 'C')


def test_the_decoder_loses_what_the_reads_lose_and_what_is_largest_at_its_own_place(lab):
    reference = lab.references['ledger']
    for s in (1, S - 1):
        dims = {
            (trial.said['where'], trial.said['what']): trial.group['edit'].dims
            for trial in plan(reference, 'C', s, ('zero',), True, False)
        }
        last = reference.pick('C', S)
        for what in ('start', 'dims'):
            assert dims['decoder', what] == dims['reads', what] == reference.pick('C', s + 1)[what][1]
            assert dims.get(('decoder', f'last {what}')) == (
                None if set(last[what][1]) == set(dims['decoder', what]) else last[what][1]
            )
        assert any(what.startswith('last') for _, what in dims) == (s == 1)


# ---- what is reported


def test_losses_at_edited_and_at_later_positions_are_apart_with_intervals_over_sequences():
    rng = np.random.default_rng(0)
    before, after = rng.random((N, T)), rng.random((N, T)) * 2
    positions, weights = [(2 + n, 4 + n) for n in range(N)], bootstrap_weights(0, range(N), 50)
    classes = rng.integers(0, 2, (N, T))
    at = np.array([np.isin(np.arange(T), of) for of in positions])
    got = outcome(before, after, at, weights, {'class': (classes, ('keyword', 'name'))})
    change, t = after - before, np.arange(T)
    masks = {
        'edited': np.array([(t == 2 + n) | (t == 4 + n) for n in range(N)]),
        'later': np.array([(t > 2 + n) & (t != 4 + n) for n in range(N)]),
        'keyword': classes == 0,
        'name': classes == 1,
        'all': np.ones((N, T), bool),
    }
    for name, mask in masks.items():
        replicates = np.array([sum(w @ (change * mask)) / sum(w @ mask) for w in weights if w.any()])
        replicates = np.exp(replicates) if name == 'all' else replicates
        expected = [replicates[0], *np.quantile(replicates[1:], (0.025, 0.975))]
        value = (
            list(got['ratio'].values())
            if name == 'all'
            else list(got[name].values())
            if name in got
            else got['by']['class'][name]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert got['loss'] == pytest.approx(after.mean()) and got['perplexity'] == pytest.approx(
        math.exp(after.mean())
    )
    assert outcome(before, after, np.ones((N, T), bool), weights, {})['later'] is None


def test_there_is_no_interval_over_fewer_than_five_sequences():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, N, T))
    for carrying in (4, 5):
        classes = np.zeros((N, T), int)
        classes[:carrying, 3] = 1
        value, *interval = outcome(
            before,
            after,
            classes == 1,
            bootstrap_weights(0, range(N), 50),
            {'class': (classes, ('name', 'keyword'))},
        )['by']['class']['keyword']
        assert value == pytest.approx((after - before)[:carrying, 3].mean(), rel=1e-5)
        assert (interval == [None, None]) == (carrying == 4)


def test_what_every_sequence_gets_alike_is_a_constant_and_what_has_no_mean_is_none():
    rng, n = np.random.default_rng(0), 16
    x = {
        'constant': np.broadcast_to(rng.normal(size=(4, 300)), (n, 4, 300)),
        'independent': rng.normal(size=(n, 4, 300)),
    }
    x['half'] = x['constant'] + x['independent']
    got = {
        name: constancy(np.square(v.mean(0)).sum(-1), np.square(v).sum(-1).mean(0), n)
        for name, v in x.items()
    }
    assert got['constant'] == pytest.approx(1) and got['constant'] <= 1
    assert 0 <= got['independent'] < 0.02  # the norm of a mean over the mean of norms would be 1/4
    assert got['half'] == pytest.approx(0.5, abs=0.05)


def test_predictions_are_labelled_by_class_position_and_distance_from_the_last_line(lab):
    labels, kinds = intervene.label(lab.tokens, lab.starts, {'tokenizer': 'bytes', 'source': 'Python code'})
    named = {name: np.array(of, dtype=object)[places] for name, (places, of) in labels.items()}
    for n, start in enumerate(lab.starts):
        window = np.fromfile(lab.tokens.path, '<u2')[start : start + T + 1]
        assert [CLASSES['python'][k] for k in classify(window, encoding('bytes'), 'python')[1:]] == named[
            'class'
        ][n].tolist()
        assert kinds[n].tolist() == classify(window, encoding('bytes'), 'python')[:-1].tolist()
        for t, since in enumerate(structure(window, encoding('bytes'))['since_line'][1:]):
            for name, value in (('position', t), ('since_line', since)):
                low, _, high = named[name][n, t].partition('–')
                assert int(low) <= value <= int(high or low)


def test_predictions_in_english_are_labelled_by_their_place_in_the_sentence_too(tmp_path):
    text = 'As it is. We go on.\n\nSo he did. '
    tokens = write_dataset(tmp_path / 'data', [*(text * 3).encode()])
    labels, _ = intervene.label(tokens, [0, 16], {'tokenizer': 'bytes', 'source': 'novels'})
    places, names = labels['sentence']
    found = {name: np.argwhere(places == i).tolist() for i, name in enumerate(names)}
    # What is predicted: 's it is. We go o' and 'n.//So he did. A'.
    assert found['end'] == [[0, 7], [1, 1], [1, 13]]
    assert found['start'] == [[0, 9], [1, 15]]
    assert found['start of paragraph'] == [[1, 4]]
    assert len(found['within']) == 2 * T - 6


@pytest.mark.parametrize('arm', ['baseline', 'bias'])
def test_the_sinks_and_what_a_position_adds_to_later_outputs_are_those_of_the_formula(lab, arm):
    model, edit = lab.models[arm], Edit('stream', 'h', (1,), 'zero', positions=(0,), dims=(5,))
    reads = []
    handle = model.sublayers[2].function.register_forward_pre_hook(
        lambda _, inputs: reads.append(inputs[0].double().numpy())
    )
    sinks, constants = attention(model, lab.tokens, lab.starts, N, lab.references[arm], edit, (0, 3))
    handle.remove()
    layer = model.sublayers[2].function
    with torch.no_grad():
        q, k, v = (
            x.double().numpy()
            for x in layer.heads(*layer.qkv(torch.from_numpy(reads[0]).float()).chunk(3, -1))
        )
    if arm == 'bias':
        q, k = (
            np.concatenate(
                [np.broadcast_to(first.detach().double().numpy().reshape(1, 2, 1, -1), (N, 2, 1, D // 2)), x],
                2,
            )
            for first, x in ((0 * layer.bias_k, q), (layer.bias_k, k))
        )
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // 2) + np.triu(np.full((q.shape[2],) * 2, -np.inf), 1)
    p = (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True))[:, :, -T:, -T:]
    np.testing.assert_allclose(sinks[1], p[..., 0].mean((0, 2)), rtol=1e-4)
    W = layer.proj.weight.detach().double().numpy()
    for t in (0, 3):
        for head in range(2):
            added = p[:, head, t:, t].mean(1)[:, None] * (
                v[:, head, t] @ W[:, head * D // 2 : (head + 1) * D // 2].T
            )
            np.testing.assert_allclose(
                constants[t][:, 1, head],
                [np.square(added.mean(0)).sum(), np.square(added).sum(1).mean()],
                rtol=1e-4,
            )


def test_continuations_differ_only_by_the_edit(lab):
    model, reference, prompts = lab.models['baseline'], lab.references['baseline'], lab.idx[:3, :8]
    drawn = [
        sample(model, prompts, 20, seed, reference, edit)
        for seed, edit in (
            (0, NOTHING),
            (0, Edit('stream', 'h', (1, 2), 'zero', (), ())),
            (0, Edit('stream', 'h', (1, 2, 3, 4), 'zero', dims=(5, 7))),
            (1, NOTHING),
        )
    ]
    assert drawn[0].shape == (3, 20) and torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


# ---- the command


def save(model, root, data, name):
    path = root / 'out' / name / 'ckpt.pt'
    path.parent.mkdir(parents=True)
    torch.save(
        {
            'model': model.state_dict(),
            'model_args': asdict(model.config),
            'iter_num': 3,
            'config': {'dataset': str(data)},
        },
        path,
    )
    return path


def planted(functional):
    """An outlier in dimension 3 of the start token, which every query finds. functional: the head lives
    on what it adds; else it adds nothing.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL)).eval()
    attend = model.sublayers[2].function
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if 'norm' not in name):
            parameter.zero_()
        model.tok_emb.weight.normal_(std=0.1)[:, 3] = 0
        model.pos_emb.weight[0, 3], model.pos_emb.weight[0, 7], model.pos_emb.weight[1:, 7] = 310, 300, 1
        attend.qkv.weight[0, 7], attend.qkv.weight[D, 3], attend.qkv.weight[2 * D, 3] = 1, 2, 1
        attend.proj.weight[5, 0] = 20 if functional else 0
        model.head.weight[97, 5 if functional else 7] = 2
    return model


@pytest.mark.parametrize('functional', [True, False])
def test_removing_a_planted_outlier_hurts_if_the_model_lives_on_it_and_not_otherwise(tmp_path, functional):
    write_dataset(tmp_path / 'data', np.where(np.random.default_rng(0).random(1000) < 0.95, 97, 98))
    path = save(planted(functional), tmp_path, tmp_path / 'data', 'planted')
    args = intervene.parse_arguments(
        ['--ckpt', str(path), '--how=zero', '--top=1', '--sequences=8', '--device=cpu']
    )
    report, _ = intervene.intervene(next(open_runs(args)), args)
    for result in report['results'] + [result for result in report['sweep'] if result['sublayer'] < 2]:
        if result['where'] == 'stream' and result['what'] in ('top', 'start'):
            assert result['entries'] == [[0, 3]]
            later = result['edit']['later']
            if functional:
                assert result['edit']['ratio']['low'] > 10 and later['low'] > 2
            else:
                assert result['edit']['ratio']['value'] == pytest.approx(1, abs=0.1) and later[
                    'value'
                ] == pytest.approx(0, abs=1e-6)
            for control in result['controls'].values():
                assert control['ratio']['value'] == pytest.approx(1, abs=0.3)
    assert report['attention']['unedited']['by_layer'][1] > 0.5  # of two heads, one looks everywhere
    of_start = next(edit for edit in report['attention']['edits'] if edit['what'] == 'start')
    assert of_start['by_layer'][1] < 0.3 < 0.5 < of_start['control']['by_layer'][1]


def command(*flags):
    with redirect_stdout(StringIO()) as printed:
        intervene.main(['--device=cpu', *map(str, flags)])
    return printed.getvalue()


def watched(name, used):
    """Returns a function of intervene that also notes which windows it is first called with."""
    true = getattr(intervene, name)

    def watching(model, tokens, starts, *rest):
        used.setdefault(name, set(starts.tolist()))
        return true(model, tokens, starts, *rest)

    return watching


@pytest.fixture(scope='module')
def ran(lab):
    """The whole command on a ledger."""
    path, used = save(lab.models['ledger'], lab.root, lab.root / 'data', 'run'), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ('Reference', 'evaluate'):
            patch.setattr(intervene, name, watched(name, used))
        printed = command('--ckpt', path.parent, '--sequences=6', '--top=2', '--all')
    text = (path.parent / 'intervene.json').read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    return SimpleNamespace(out=path.parent, printed=printed, used=used, report=report)


def test_the_command_writes_a_report_and_two_figures_and_prints_at_most_110_columns(ran):
    figures = {'intervene.png', 'intervene_class.png'}
    assert {path.name for path in ran.out.iterdir()} == {'ckpt.pt', 'intervene.json', *figures}
    assert all((ran.out / name).read_bytes().startswith(b'\x89PNG') for name in figures)
    # Where the files were written to is not ours to shorten.
    lines = [line for line in ran.printed.splitlines() if not line.startswith('written: ')]
    assert max(map(len, lines)) <= 110


def test_entries_are_not_chosen_on_the_windows_that_are_evaluated(ran):
    assert (
        len(ran.used['evaluate']) == 6
        and len(ran.used['Reference']) == ran.report['data']['calibration'] >= 100
        and not ran.used['Reference'] & ran.used['evaluate']
    )


def table_rows(printed):
    return [line for line in printed.splitlines() if re.search(r'\[\S+, \S+\]\S* .*\|', line)]


def test_eight_rows_are_printed_first_and_with_them_what_the_sweep_was_made_on(ran, capsys):
    shown = {result['stream']: result['sublayer'] for result in ran.report['results']}
    print_summary('run', ran.report, shown)
    summary = capsys.readouterr().out
    assert summary in ran.printed and len(table_rows(summary)) == ROWS == 8
    assert 'on the first 5 of these 6 sequences' in summary and 'with --all' in summary
    chosen = summarized([r for stream, s in shown.items() for r in results_at(ran.report, stream, s)])
    kept = {(r['stream'], r['where']) for r in chosen}
    assert kept == {('D', 'stream'), ('C', 'stream'), ('C', 'reads'), ('C', 'decoder')}
    for stream, s in shown.items():
        assert len(summarized(results_at(ran.report, stream, s))) == ROWS
        assert {r['what'] for r in detailed_results(ran.report, stream, s)} == {'start', 'dims'}


def test_every_result_stands_beside_its_controls(ran):
    results = ran.report['results'] + ran.report['sweep']
    assert all('moved' in result['controls'] for result in results)
    assert {(r['stream'], r['what'], r['sublayer']) for r in ran.report['sweep']} == {
        (stream, what, s)
        for stream in 'DC'
        for what in ('top', 'start', 'dims')
        for s in range(S)
        if (stream, s) != ('D', S - 1)
    }
    assert {(r['where'], r['reach']) for r in ran.report['results'] if r['stream'] == 'C'} == {
        ('stream', 'once'),
        ('stream', 'downstream'),
        ('reads', 'every'),
        ('decoder', ''),
    }
    ratios = [line for line in table_rows(ran.printed) if line.partition('|')[2].strip()]
    assert len(ratios) == ROWS + len(results)


def test_the_breakdowns_add_up_to_the_whole(ran):
    whole = ran.report['loss']['value']
    for name, rows in ran.report['before'].items():
        assert sum(row['share'] for row in rows.values()) == pytest.approx(1, abs=1e-6) and all(
            1 <= row['sequences'] <= 6 for row in rows.values()
        )
        assert sum(row['share'] * row['loss'] for row in rows.values()) == pytest.approx(whole, rel=1e-5)
        for result in ran.report['results']:
            for of in (result['edit'], *result['controls'].values()):
                change = sum(rows[label]['share'] * value for label, (value, _, _) in of['by'][name].items())
                assert change == pytest.approx(of['loss'] - whole, abs=1e-5)
                assert change == pytest.approx(math.log(of['ratio']['value']), abs=1e-5)
    start = next(r for r in ran.report['results'] if r['what'] == 'start')['edit']
    assert set(start['by']['carrier']) <= set(CLASSES['python'])
    assert [len(sample['edits']) for sample in ran.report['samples']] == [4, 4, 4]


def test_what_is_not_finite_is_printed_as_a_dash(ran, capsys):
    def broken(x):
        return (
            {k: broken(v) for k, v in x.items()}
            if isinstance(x, dict)
            else [broken(v) for v in x]
            if isinstance(x, list)
            else None
            if isinstance(x, float)
            else x
        )

    report = broken(ran.report) | {'sweep': []}
    for of in report['before'].values():
        for row in of.values():
            row['share'] = 0.5  # counted, so always a number
    shown = {'D': report['results'][0]['sublayer'], 'C': report['results'][-1]['sublayer']}
    print_summary('broken', report, shown)
    print_all(report, shown)
    printed = capsys.readouterr().out
    assert 'nan' not in printed and 'None' not in printed and '– [–, –]' in printed


def test_the_stream_that_is_not_decoded_is_refused_after_the_last_sublayer_before_anything_is_computed(
    ran, monkeypatch
):
    monkeypatch.setattr(intervene, 'Reference', None)
    with pytest.raises(SystemExit, match='nothing reads that'):
        command('--ckpt', ran.out, '--stream=D', f'--sublayer={S - 1}')


def test_two_runs_of_the_command_say_the_same(ran, tmp_path):
    flags = ('--ckpt', ran.out, '--sequences=4', '--top=1', '--stream=C', '--sublayer=2', '--how=zero')
    reports = []
    for name in 'ab':
        command(*flags, f'--out={tmp_path / name}')
        reports.append((tmp_path / name / 'run/intervene.json').read_bytes())
    results = json.loads(reports[0])['results']
    assert reports[0] == reports[1] and {(r['stream'], r['sublayer']) for r in results} == {('C', 2)}
    assert ('reads', 'all') in {(r['where'], r['what']) for r in results}, (
        'the read coupling is there when C is looked at alone'
    )


def test_a_small_set_leaves_fewer_windows_to_choose_on_but_eight_at_least(ran, tmp_path):
    with pytest.raises(SystemExit) as refused:
        command('--ckpt', ran.out, '--sequences=1000')
    flags = ('--ckpt', ran.out, '--stream=D', '--sublayer=1', '--how=zero', '--top=1', f'--out={tmp_path}')
    most = int(re.search(r'ask for at most (\d+)$', str(refused.value))[1])
    command(*flags, f'--sequences={most}')
    assert json.loads((tmp_path / 'run/intervene.json').read_text())['data']['calibration'] == 8
    with pytest.raises(SystemExit, match='ask for at most'):
        command(*flags, f'--sequences={most + 1}')


def test_a_set_that_is_too_small_for_any_number_of_sequences_is_to_be_replaced(ran, tmp_path):
    write_dataset(tmp_path / 'data', [97] * T * 9)
    with pytest.raises(SystemExit, match='holds 8 windows: name a larger set with --data'):
        command('--ckpt', ran.out, f'--data={tmp_path / "data"}', '--sequences=2')


@pytest.mark.parametrize('low, high', [(0.9, 1.004), (0.999999, 1.000002), (0.5, 40), (1, 1e9), (0.98, 200)])
def test_a_ratio_of_one_can_be_read_off_every_axis(low, high):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    drawing, axis = pyplot.subplots()
    axis.set(xscale='log', xlim=(low, high))
    ratio_ticks(axis.xaxis)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels.count('1') == 1 and 2 <= len(set(labels)) == len(labels) <= 12
    pyplot.close(drawing)


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--stream=h'], '--stream=h, but .* has D and C'),
        (['--sublayer=4'], 'sublayers 0 to 3'),
        (['--sublayer=last'], 'expected auto, all or a number'),
        (['--top=6'], 'ask for fewer'),
        (['--top=0'], 'at least 1'),
        (['--sequences=1'], 'at least 2'),
        (['--sequences=100000'], r'ask for at most \d+$'),
        (['--stream=D', '--sublayer=3'], 'nothing reads that'),
        (['--seed=-1'], 'whole number'),
        (['--data=nowhere'], 'cannot read'),
        (['--out=/dev/null/out'], 'cannot write'),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(ran, flags, sentence):
    with pytest.raises(SystemExit) as refused:
        command('--ckpt', ran.out, *flags)
    assert (
        re.search(sentence, str(refused.value))
        and str(refused.value).startswith('error: ')
        and '\n' not in str(refused.value)
    )
