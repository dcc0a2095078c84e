"""Rounding to few bits: its arithmetic against numpy, what it touches, and what is said of its cost."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from model import GPT, GPTConfig
from studies import quantize
from studies.quantize import Comparison, linears_of, quantized, rounded

pytestmark = pytest.mark.usefixtures('one_thread')
T, V = 8, 257


def reference(x, bits, axis):
    """The same rounding in numpy, float32."""
    largest = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(x).max(axis, keepdims=True) / largest
    scale[scale == 0] = 1
    return np.clip(np.rint(x / scale), -largest, largest) * scale


def tiny(residual='ledger'):
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16, gate_rank=3, residual=residual
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


class Windows:
    """Random tokens in the place of a dataset."""

    block_size = T

    def __init__(self, count):
        self.ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (count, T + 1)))

    def fixed_starts(self, count, seed):
        return np.arange(min(count, len(self.ids)))

    def windows(self, starts):
        return self.ids[starts, :-1], self.ids[starts, 1:]


def opened(model, count=12):
    return SimpleNamespace(
        model=model,
        tokens=Windows(count),
        name='tiny',
        path='tiny/ckpt.pt',
        iter_num=7,
        data={'name': 'random'},
    )


def arguments(**changes):
    values = dict(sequences=12, seed=0, device='cpu', skip=set(), sweep=False)
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('bits', [8, 4, 2])
def test_rounding_is_that_of_numpy_bit_for_bit(bits, axis, device):
    x = np.random.default_rng(0).standard_normal((300, 200), dtype=np.float32)
    x[7], x[:, 9] = 0, 0
    x[11, 12] = 1e4  # an outlier
    x[13] = np.arange(200) / 2 - 50  # ties
    x[14] = np.float32(1e-45)
    found = rounded(torch.from_numpy(x).to(device), bits, axis).cpu().numpy()
    np.testing.assert_array_equal(found, reference(x, bits, axis))


def test_the_precision_of_what_is_rounded_is_kept():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    expected = torch.from_numpy(reference(x.float().numpy(), 4, 1)).bfloat16()
    assert torch.equal(rounded(x, 4), expected)


def test_a_slice_has_at_most_fifteen_levels_with_four_bits():
    levels = [len(row.unique()) for row in rounded(torch.randn(20, 500), 4)]
    assert max(levels) <= 15


@pytest.mark.parametrize('residual', ['baseline', 'ledger'])
def test_all_linear_layers_of_the_sublayers_are_rounded_and_nothing_else(residual):
    model = tiny(residual)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with quantized(sum(linears_of(model), []), 4, None):
        for name, p in model.named_parameters():
            matrix = name.startswith('sublayers.') and name.endswith('.weight') and p.ndim == 2
            expected = reference(before[name].numpy(), 4, 1) if matrix else before[name].numpy()
            np.testing.assert_array_equal(p.detach().numpy(), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_token_that_a_linear_layer_gets_is_rounded():
    layer, x = nn.Linear(16, 5), torch.randn(3, 4, 16)
    weight, inputs = (torch.from_numpy(reference(a.detach().numpy(), 4, -1)) for a in (layer.weight, x))
    with quantized([layer], 4, 4):
        assert torch.equal(layer(x), nn.functional.linear(inputs, weight, layer.bias))
    assert not torch.equal(layer(x), nn.functional.linear(inputs, weight, layer.bias))


def test_weights_come_back_and_hooks_go_when_something_fails_in_between():
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError), quantized([layer], 4, 4):
        raise RuntimeError
    assert torch.equal(layer.weight, before) and not layer._forward_pre_hooks


def test_a_transposed_layer_of_transformers_has_a_scale_for_each_output():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 9))  # inputs, outputs

    layer = Conv1D()
    before = layer.weight.detach().numpy().copy()
    with quantized([layer], 4, None):
        np.testing.assert_array_equal(layer.weight.detach().numpy(), reference(before, 4, 0))


def test_skipped_sublayers_stay_in_full_precision():
    model = tiny()
    linears = linears_of(model)
    kept = [module.weight.clone() for module in linears[2]]
    with quantized(quantize.chosen(linears, {2}), 4, 4):
        assert all(torch.equal(module.weight, weight) for module, weight in zip(linears[2], kept))
        assert not any(module._forward_pre_hooks for module in linears[2])
        assert all(module._forward_pre_hooks for module in linears[1])


def test_a_pretrained_model_is_rounded_in_the_sublayers_that_it_is_measured_in():
    pytest.importorskip('transformers')
    from transformers import GPT2Config, GPT2LMHeadModel

    from pretrained import Pretrained

    sizes = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2)
    model = Pretrained(GPT2LMHeadModel._from_config(GPT2Config(**sizes), attn_implementation='eager'))
    linears = linears_of(model)
    assert [sublayer.kind for sublayer in model.sublayers] == ['attn', 'mlp'] * 2
    assert [len(modules) for modules in linears] == [2, 2, 2, 2]
    rounded_modules = {id(module) for modules in linears for module in modules}
    assert id(model.model.lm_head) not in rounded_modules
    report = quantize.quantize(opened(model), arguments())
    assert set(report['schemes']) == set(quantize.SCHEMES)


def test_losses_are_those_of_a_model_whose_weights_are_rounded_beforehand():
    report = quantize.quantize(opened(tiny()), arguments())
    model, tokens = tiny(), Windows(12)
    idx, targets = tokens.windows(range(12))
    with torch.no_grad():
        for module in sum(linears_of(model), []):
            module.weight.data = torch.from_numpy(reference(module.weight.detach().numpy(), 4, 1))
        expected = model(idx, targets)[1].item()
    assert report['schemes']['W4']['loss']['value'] == pytest.approx(expected, abs=1e-5)
    damage = report['schemes']['W4']['loss']['value'] - report['loss']['value']
    assert report['schemes']['W4']['damage']['value'] == pytest.approx(damage, abs=1e-5)


def test_the_damage_is_paired_over_windows():
    before = np.random.default_rng(0).normal(3, 1, 50)
    report = Comparison(before, seed=0).report(before + 0.25)
    assert report['damage'] == {key: pytest.approx(0.25) for key in ('value', 'low', 'high')}
    assert report['loss']['high'] - report['loss']['low'] > 0.1


def test_one_window_has_no_interval():
    report = Comparison(np.array([3.0]), seed=0).report(np.array([3.5]))
    assert report['damage'] == {'value': 0.5, 'low': None, 'high': None}


def test_the_costliest_sublayer_is_named_if_its_interval_stays_above_zero():
    report = {'sublayers': ['attn', 'mlp', 'attn']}
    headlines = [{'value': 0.1, 'low': 0.05, 'high': 0.2}, None, {'value': 0.3, 'low': 0.2, 'high': 0.4}]
    assert quantize.most(report, headlines, 'it costs').startswith('attn 2 costs most, it costs 0.3 ')
    headlines[2]['low'] = -0.1
    assert quantize.most(report, headlines, 'it costs') == 'no sublayer stands out'


def test_an_outlier_makes_four_bits_a_token_costly():
    plain, model = tiny('baseline'), tiny('baseline')
    with torch.no_grad():
        model.sublayers[1].norm.weight[3] = 100  # one input of the first MLP is far above the others
        model.sublayers[1].function.fc.weight[:, 3] = 0  # which reads nothing from it
        plain.sublayers[1].function.fc.weight[:, 3] = 0
    reports = [quantize.quantize(opened(m), arguments(sweep=True)) for m in (plain, model)]
    assert reports[0]['loss'] == reports[1]['loss']
    damage = [report['schemes']['W4A4']['damage']['value'] for report in reports]
    saved = [report['saved_without']['W4A4'][1]['value'] for report in reports]
    assert damage[1] > 1.5 * damage[0] and saved[1] > 3 * saved[0]
    assert quantize.largest(reports[1]['saved_without']['W4A4']) == 1


def test_rounding_a_stream_is_sized_by_its_own_outlier():
    model = tiny('baseline')
    with torch.no_grad():
        model.tok_emb.weight[:, 5] = 50
    errors = quantize.quantize(opened(model), arguments())['streams']['h']['rounding_error']
    smooth = quantize.quantize(opened(tiny('baseline')), arguments())['streams']['h']['rounding_error']
    assert len(errors[4]) == 4 and all(eight < four for eight, four in zip(errors[8], errors[4]))
    # One dimension fills the norm, and all else is rounded to nothing: the error is the share of the rest.
    assert errors[4][0] < smooth[4][0]


def test_a_sweep_knows_the_streams_and_leaves_skipped_sublayers_out():
    report = quantize.quantize(opened(tiny()), arguments(sweep=True, skip={0}))
    assert report['skipped'] == [0] and report['saved_without']['W4'][0] is None
    assert set(report['streams']) == {'D', 'C'}
    for entry in report['streams'].values():
        assert [len(damage) for damage in entry['damage'].values()] == [4, 4]
        assert entry['damage'][4][3]['low'] <= entry['damage'][4][3]['high']


def test_rounding_the_decoded_stream_alone_is_what_the_head_then_reads():
    run = opened(tiny('baseline'))
    damage = quantize.quantize(run, arguments(sweep=True))['streams']['h']['damage'][4][-1]['value']
    model, (idx, targets) = run.model, run.tokens.windows(range(12))
    with torch.no_grad():
        streams = model.start(idx)
        for sublayer in model.sublayers:
            streams, _ = sublayer(streams)
        losses = [
            model.cross_entropy({'h': torch.from_numpy(h)}, targets).item()
            for h in (streams['h'].numpy(), reference(streams['h'].numpy(), 4, -1))
        ]
    assert damage == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_a_checkpoint_gets_its_report_and_its_figure(tmp_path, monkeypatch, capsys):
    run = opened(tiny())
    run.out, run.suffix = tmp_path, '_0'
    monkeypatch.setattr(quantize, 'open_runs', lambda args: [run])
    run.data = {'name': 'random', 'split': 'val'}
    quantize.main(['--ckpt=anywhere', '--sequences=4', '--sweep', '--skip=3', '--device=cpu'])
    report = json.loads((tmp_path / 'quantize_0.json').read_text())
    assert report['schema'] == 1 and report['data']['sequences'] == 4
    assert (tmp_path / 'quantize_0.png').stat().st_size > 10_000
    assert 'W4A4: ' in capsys.readouterr().out


@pytest.mark.parametrize(
    'flags, expected',
    [
        (['--skip=9'], '--skip names sublayer 9, but tiny has 0 to 3'),
        (['--sequences=1'], '--sequences is 1: expected at least 2'),
    ],
)
def test_a_mistake_ends_in_a_sentence(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(quantize, 'open_runs', lambda args: [opened(tiny())])
    with pytest.raises(SystemExit, match=expected):
        quantize.main(['--ckpt=anywhere', '--device=cpu', *flags])
