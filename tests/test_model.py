"""The specification of model.py. tests/reference.py has its equations in numpy, float64."""

import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from reference import Reference, rms_norm
from torch.utils.flop_counter import FlopCounterMode

import model as model_py
from data.loader import UserError
from model import GPT, RESIDUALS, Baseline, GPTConfig, RMSNorm

SMALL = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=12, gate_rank=5)
ARMS = {
    'baseline': dict(residual='baseline'),
    'qknorm': dict(residual='baseline', qk_norm=True),
    'ledger': dict(residual='ledger'),
    'ledger_decoding_both': dict(residual='ledger', decode_gamma=0.7),
    'attn_bias_kv': dict(residual='baseline', attn_bias_kv=True, mlp_ratio=3),
}
pytestmark = pytest.mark.usefixtures('one_thread')
every_arm = pytest.mark.parametrize('arm', ARMS)


def fresh(**settings):
    """A model at its start values, always drawn from the same seed."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **settings}))


def shaken(std=0.5, dtype=torch.float64, **settings):
    """A model none of whose parameters is zero or has another special value."""
    model = fresh(**settings).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


def twin(model, **changes):
    """The same float32 weights under a changed config."""
    other = GPT(replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other


def batch(config, sequences=5):
    """Returns tokens and targets, (sequences, block_size) each; five sequences hold every token of SMALL's
    vocabulary."""
    order = torch.randperm(2 * sequences * config.block_size, generator=torch.Generator().manual_seed(1))
    return (order % config.vocab_size).view(2, sequences, config.block_size)


@torch.no_grad()
def observe(model, idx):
    """Returns the logits and what a forward hook sees of each sublayer: (streams by name, commit gate)."""
    seen = []
    hooks = [
        sublayer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for sublayer in model.sublayers
    ]
    logits = model(idx)
    for hook in hooks:
        hook.remove()
    return logits, seen


def loss_and_gradients(model, idx, targets):
    objective, loss, _ = model(idx, targets)
    objective.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def assert_follows_the_equations(model):
    idx, _ = batch(model.config, sequences=2)
    logits, seen = observe(model, idx)
    expected_logits, levels, gates = Reference(model).forward(idx.numpy())
    assert [sublayer.kind for sublayer in model.sublayers] == ['attn', 'mlp'] * model.config.n_layer
    assert distance(logits, expected_logits) < 1e-10
    for (streams, gate), expected, expected_gate in zip(seen, levels[1:], gates, strict=True):
        assert tuple(streams) == tuple(expected) == model.stream_names
        assert all(distance(streams[name], expected[name]) < 1e-10 for name in streams)
        assert (gate is None) if expected_gate is None else distance(gate, expected_gate) < 1e-10


@every_arm
def test_logits_streams_and_commit_gates_follow_the_equations(arm):
    assert_follows_the_equations(shaken(**ARMS[arm]))


@pytest.mark.parametrize('length', [1e-9, 1e-12, 0.0])
def test_the_erase_direction_has_length_one_until_it_is_divided_by_1e_12(length):
    model = shaken(residual='ledger')
    with torch.no_grad():
        for sublayer in model.sublayers:
            sublayer.residual.erase_direction.U.weight *= length
    assert_follows_the_equations(model)


@torch.no_grad()
def reduced_ledger(baseline, but=None):
    """The ledger with the baseline's weights, shut so that it is the baseline, but for the one named
    condition, or two."""
    model = shaken(residual='ledger', decode_gamma=0.0 if but == 'γ' else 1.0)
    model.load_state_dict(baseline.state_dict(), strict=False)
    for operator in (sublayer.residual for sublayer in model.sublayers):
        operator.erase_gate.U.bias.fill_(-3 if but == 'e' else -1000)
        operator.write_gate.U.bias.fill_(+3 if but == 'w' else +1000)
        operator.commit_bias.fill_(-4 if but in ('c', 'c and λ') else -1000)
        operator.write_map.U.weight *= but == 'U_g'
        operator.read_scale *= but == 'c and λ'
    return model


@pytest.mark.parametrize('but', [None, 'e', 'w', 'U_g', 'c', 'γ'])
def test_a_ledger_that_never_erases_always_writes_never_commits_and_decodes_D_is_the_baseline(but):
    """With any one of these conditions broken it is not."""
    baseline = shaken()
    idx, _ = batch(baseline.config)
    gap = distance(observe(reduced_ledger(baseline, but), idx)[0], observe(baseline, idx)[0])
    assert gap > 1e-3 if but else gap < 1e-10


@pytest.mark.parametrize('but', ['c', 'c and λ'])
def test_under_commits_D_stays_the_baseline_stream_only_if_C_is_not_read(but):
    baseline = shaken()
    idx, _ = batch(baseline.config)
    gap = distance(
        observe(reduced_ledger(baseline, but), idx)[1][-1][0]['D'], observe(baseline, idx)[1][-1][0]['h']
    )
    assert gap > 1e-3 if but == 'c and λ' else gap < 1e-10


@every_arm
def test_with_one_seed_all_weights_shared_with_the_baseline_start_equal(arm):
    expected, found = (fresh(**{**settings, 'mlp_ratio': 4}).state_dict() for settings in ({}, ARMS[arm]))
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@every_arm
def test_every_parameter_starts_at_its_constant_or_normal_with_standard_deviation_002(arm):
    constants = {
        'norm.weight': 1,
        'fc.bias': 0,
        'proj.bias': 0,
        'bias_k': 0,
        'bias_v': 0,
        'erase_gate.U.bias': -3,
        'write_gate.U.bias': 3,
        'read_scale': 0,
        'erase_gate.U.weight': 0,
        'write_gate.U.weight': 0,
        'write_map.U.weight': 0,
        'commit_map.U.weight': 0,
        'commit_weight': 0,
        '0.residual.commit_bias': -4,
        '1.residual.commit_bias': -4 / 3,
        '2.residual.commit_bias': 4 / 3,
        '3.residual.commit_bias': 4,
    }
    for name, p in fresh(n_embd=64, vocab_size=100, gate_rank=16, **ARMS[arm]).named_parameters():
        constant = [value for ending, value in constants.items() if name.endswith(ending)]
        if constant:
            assert distance(p.detach(), constant) < 1e-6, name
        else:
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(p.numel()), name
            assert abs(p.std() / 0.02 - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_with_a_steep_ramp_C_starts_as_the_last_D_alone():
    model = fresh(residual='ledger', n_layer=6, commit_ramp=64.0)
    biases = [sublayer.residual.commit_bias.item() for sublayer in model.sublayers]
    assert np.allclose(biases, [-4 + 8 * (s / 11) ** 64 for s in range(12)], atol=1e-6)
    streams = observe(model, batch(model.config)[0])[1][-1][0]
    D, C = (x.flatten().double() for x in (streams['D'], streams['C']))
    assert (D @ C) / (D.norm() * C.norm()) > 0.99


def test_a_commit_adds_the_gated_new_D_even_with_the_erase_gate_wide_open():
    model = shaken(residual='ledger')
    for sublayer in model.sublayers:
        nn.init.constant_(sublayer.residual.erase_gate.U.bias, 20.0)
    assert_follows_the_equations(model)


def test_a_sublayer_neither_scales_nor_erases_what_is_committed():
    model = shaken(residual='ledger')
    D, C, u, y = torch.randn(4, SMALL['n_embd'], dtype=torch.float64)

    def updated(C, residual):
        return residual.update({'D': D, 'C': C}, u, y)[0]

    for sublayer in model.sublayers:
        slope = torch.func.jacrev(updated)(C, sublayer.residual)
        assert torch.equal(slope['C'], torch.eye(len(C), dtype=torch.float64))
        assert not slope['D'].any()


def change_of_logits(model, s, stream):
    """How far the logits move when a hook alters one stream after sublayer s."""
    idx, _ = batch(model.config)
    before, _ = observe(model, idx)
    noise = torch.randn(model.config.n_embd, dtype=torch.float64)
    hook = model.sublayers[s].register_forward_hook(
        lambda module, inputs, output: ({**output[0], stream: output[0][stream] + noise}, output[1])
    )
    after, _ = observe(model, idx)
    hook.remove()
    return distance(before, after)


@pytest.mark.parametrize('stream, gamma, decoded', [('C', 0.0, True), ('D', 0.0, False), ('D', 0.7, True)])
def test_the_head_decodes_C_and_D_only_if_gamma_is_not_zero(stream, gamma, decoded):
    change = change_of_logits(shaken(residual='ledger', decode_gamma=gamma), -1, stream)
    assert change > 1e-3 if decoded else change == 0


def test_D_reaches_the_logits_through_later_commits_alone():
    model = shaken(residual='ledger')
    assert change_of_logits(model, 1, 'D') > 1e-3
    for sublayer in model.sublayers[2:]:
        nn.init.constant_(sublayer.residual.commit_bias, -1000.0)
    assert change_of_logits(model, 1, 'D') == 0


@every_arm
def test_a_token_changes_no_logits_before_its_position_and_all_from_there_on(arm):
    model = shaken(**ARMS[arm])
    idx, _ = batch(model.config, sequences=1)
    before, _ = observe(model, idx)
    for t in range(idx.shape[1]):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % model.config.vocab_size
        moved = (observe(model, changed)[0] - before).abs().amax((0, 2))
        assert (moved[:t] < 1e-12).all() and (moved[t:] > 1e-6).all()


@every_arm
def test_at_the_first_backward_pass_only_what_meets_a_zero_map_or_a_zero_C_has_no_gradient(arm):
    model = fresh(**ARMS[arm]).double()
    _, gradients = loss_and_gradients(model, *batch(model.config))
    none = set()
    if model.config.residual == 'ledger':
        maps = ('erase_gate', 'write_gate', 'write_map', 'commit_map')
        none = {f'sublayers.{s}.residual.{name}.V.weight' for s in range(4) for name in maps} | {
            'sublayers.0.residual.read_scale'
        }
    assert {name for name, gradient in gradients.items() if not gradient.any()} == none
    assert {name for name, gradient in gradients.items() if not gradient.all()} == none


@pytest.mark.parametrize('sequences, sizes', [(0.5, [3] * 13 + [1]), (2, [10] * 4), (5, [40])])
def test_logits_in_parts_give_the_same_loss_and_gradients(monkeypatch, sequences, sizes):
    net = shaken(n_layer=1, **ARMS['ledger'])
    loss, gradients = loss_and_gradients(net, *batch(net.config))
    kept = {name: gradient.clone() for name, gradient in gradients.items()}
    net.zero_grad()
    seen, linear = [], model_py.F.linear
    monkeypatch.setattr(
        model_py.F,
        'linear',
        lambda x, W, b=None: (seen.append(len(x)) if len(W) == 64 else None) or linear(x, W, b),
    )
    monkeypatch.setattr(model_py, 'LOGITS_AT_ONCE', net.config.vocab_size * net.config.block_size * sequences)
    in_parts, gradients = loss_and_gradients(net, *batch(net.config))
    assert seen == sizes and abs(in_parts - loss) < 1e-12
    assert all(distance(gradients[name], gradient) < 1e-12 for name, gradient in kept.items())
    with torch.no_grad():
        assert abs(net(*batch(net.config))[1] - loss) < 1e-12


@pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')), reason='torch.compile needs a C++ compiler on the CPU'
)
def test_the_compiled_loss_in_parts_has_the_gradients_of_the_whole_one_in_bfloat16(monkeypatch):
    net = shaken(std=0.3, dtype=torch.float32, n_layer=1, bf16_streams=True)
    idx, targets = batch(net.config)
    with torch.autocast('cpu', torch.bfloat16):
        streams = {'h': net.start(idx).pop('h').detach().requires_grad_()}
        whole = net.cross_entropy(streams, targets)
        expected = torch.autograd.grad(whole, [streams['h'], net.head.weight, net.norm.weight])
        monkeypatch.setattr(model_py, 'LOGITS_AT_ONCE', 100)
        torch.compiler.reset()
        in_parts = torch.compile(net.cross_entropy, fullgraph=True, options={'cpp.simdlen': 1})(
            streams, targets
        )
        found = torch.autograd.grad(in_parts, [streams['h'], net.head.weight, net.norm.weight])
    assert abs(in_parts - whole) < 1e-3
    for gradient, right in zip(found, expected):
        assert gradient.dtype == right.dtype and distance(gradient.float(), right.float()) < 0.02


@pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')), reason='torch.compile needs a C++ compiler on the CPU'
)
@pytest.mark.parametrize('arm', ['baseline', 'ledger'])
def test_the_compiled_model_is_one_graph_with_the_eager_loss_and_gradients(arm):
    model = shaken(std=0.3, dtype=torch.float32, n_layer=1, **ARMS[arm])
    compiled = twin(model)
    torch.compiler.reset()  # or the compilations of all tests count against one limit
    compiled.compile(fullgraph=True, options={'cpp.simdlen': 1})  # scalar code: g++ needs a third less time
    loss, gradients = loss_and_gradients(model, *batch(model.config))
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, *batch(model.config))
    assert abs(compiled_loss - loss) < 1e-5
    assert all(distance(compiled_gradients[name], gradient) < 1e-5 for name, gradient in gradients.items())


def assert_bf16_is_close_to_float32(model, exact, device):
    """model, exact: the same float32 weights; model runs under autocast."""
    idx, targets = batch(model.config).to(device)
    expected_loss, expected = loss_and_gradients(exact.to(device), idx, targets)
    with torch.autocast(device, torch.bfloat16):
        loss, gradients = loss_and_gradients(model.to(device), idx, targets)
    assert abs(loss - expected_loss) < 0.02
    expected, found = (
        torch.cat([gradient.flatten() for gradient in side.values()]) for side in (expected, gradients)
    )
    assert (found - expected).norm() < 0.1 * expected.norm()


@every_arm
@pytest.mark.parametrize('bf16_streams, precision', [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_autocast_trains_close_to_float32_with_streams_in_the_precision_asked_for(
    arm, bf16_streams, precision
):
    model = shaken(std=0.3, dtype=torch.float32, bf16_streams=bf16_streams, **ARMS[arm])
    assert_bf16_is_close_to_float32(model, twin(model, bf16_streams=False), 'cpu')
    with torch.autocast('cpu', torch.bfloat16):
        _, seen = observe(model, batch(model.config)[0])
    assert {x.dtype for streams, _ in seen for x in streams.values()} == {precision}


def test_norms_of_a_bf16_stream_are_computed_in_float32():
    norm, x = RMSNorm(64), torch.linspace(-1, 1, 64).bfloat16()
    assert distance(norm(x).detach(), rms_norm(x.double().numpy(), 1)) < 1e-6


@pytest.mark.gpu
# Every arm once, since each compilation takes ten seconds.
@pytest.mark.parametrize('arm, bf16_streams', [(arm, i % 2 == 1) for i, arm in enumerate(ARMS)])
def test_compiled_bf16_on_a_gpu_trains_close_to_eager_float32(arm, bf16_streams):
    model = shaken(
        std=0.1,
        dtype=torch.float32,
        n_layer=1,
        n_embd=64,
        block_size=64,
        bf16_streams=bf16_streams,
        **ARMS[arm],
    )
    exact = twin(model, bf16_streams=False)
    torch.compiler.reset()  # or the compilations of all tests count against one limit
    model.compile(fullgraph=True)
    assert_bf16_is_close_to_float32(model, exact, 'cuda')


@every_arm
@pytest.mark.parametrize('alpha', [0, 0.3])
def test_the_objective_adds_the_weighted_mean_gate_to_the_cross_entropy_that_is_reported(arm, alpha):
    model = shaken(commit_sparsity=alpha, **ARMS[arm])
    idx, targets = batch(model.config)
    objective, loss, commit_rate = (x.detach() for x in model(idx, targets))
    logits, seen = observe(model, idx)
    p = np.exp(logits.numpy())
    chosen = np.take_along_axis(p, targets.numpy()[..., None], axis=-1)[..., 0]
    assert distance(loss, -np.log(chosen / p.sum(-1)).mean()) < 1e-10
    if model.config.residual == 'baseline':
        assert commit_rate.shape == (0,) and objective == loss
    else:
        assert distance(commit_rate, [gate.mean() for _, gate in seen]) < 1e-10
        assert distance(objective, loss + alpha * np.mean([gate.numpy() for _, gate in seen])) < 1e-10


@every_arm
def test_gradients_are_the_slope_of_the_objective(arm):
    model = shaken(commit_sparsity=0.3, **ARMS[arm])
    idx, targets = batch(model.config)
    _, gradients = loss_and_gradients(model, idx, targets)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def objective(step):
        moved = {name: p.detach() + step * direction[name] for name, p in model.named_parameters()}
        return torch.func.functional_call(model, moved, (idx, targets))[0].item()

    slope = sum((gradient * direction[name]).sum().item() for name, gradient in gradients.items())
    assert (objective(1e-6) - objective(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def weights_of_products(config):
    d, maps = config.n_embd, 5 if config.residual == 'ledger' else 0
    return (
        config.n_layer * ((4 + 2 * config.mlp_ratio) * d * d + 2 * maps * 2 * d * config.gate_rank)
        + d * config.vocab_size
    )


@every_arm
@pytest.mark.parametrize(
    'scale, millions',
    [((12, 12, 768), dict(baseline=163, ledger=175)), ((12, 16, 1024), dict(baseline=255, ledger=271))],
)
def test_the_parameter_count_is_that_of_the_equations(arm, scale, millions):
    L, heads, d = scale
    config = GPTConfig(n_layer=L, n_head=heads, n_embd=d, **ARMS[arm])
    with torch.device('meta'):
        count = GPT(config).num_params()
    gains_and_biases = (
        L * (2 * d + (config.mlp_ratio + 1) * d)
        + d
        + (2 * L * d // heads if config.qk_norm else 0)
        + (2 * L * d if config.attn_bias_kv else 0)
    )
    gates = 2 * L * (4 * d + 1) if config.residual == 'ledger' else 0
    assert count == (50257 + 1024) * d + weights_of_products(config) + gains_and_biases + gates
    assert round(count / 1e6) == millions[config.residual] or config.mlp_ratio != 4


@every_arm
def test_flops_per_token_are_three_times_those_of_a_forward_pass(arm):
    config = GPTConfig(**ARMS[arm])
    T = config.block_size
    with torch.device('meta'), FlopCounterMode(display=False) as forward:
        model = GPT(config)
        model(torch.zeros(1, T, dtype=torch.long))
    assert model.flops_per_token() == 3 * (
        2 * weights_of_products(config) + 2 * 2 * config.n_layer * config.n_embd * T
    )
    assert model.flops_per_token() == pytest.approx(3 * forward.get_total_flops() / T, rel=0.01)


@pytest.mark.parametrize(
    'settings, complaint',
    [
        (dict(n_head=5), 'n_embd = 12 is not divisible by n_head = 5'),
        (dict(residual='gated'), "residual is 'gated': expected one of baseline, ledger"),
        (dict(residual=None), 'residual is None: expected str'),
        (dict(n_layer=True), 'n_layer is True: expected int'),
        (dict(n_layer='4'), "n_layer is '4': expected int"),
        (dict(qk_norm=1), 'qk_norm is 1: expected bool'),
        (dict(decode_gamma='1'), "decode_gamma is '1': expected float"),
        (dict(vocab_size=0), 'vocab_size is 0: expected at least 1'),
        (dict(gate_rank=-3), 'gate_rank is -3: expected at least 1'),
        (dict(commit_ramp=0.0), 'commit_ramp is 0.0: expected a number above 0'),
        (dict(commit_sparsity=-0.1), 'commit_sparsity is -0.1: expected 0 or more'),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        GPTConfig(**{**SMALL, **settings})


def test_a_sequence_longer_than_block_size_is_refused_in_one_sentence():
    with pytest.raises(UserError, match='9 tokens .*block_size = 8'):
        fresh()(torch.zeros(1, 9, dtype=torch.long))


class Gained(Baseline):
    """h ← h + g ⊙ F(RMSNorm(h))"""

    def __init__(self, config, s):
        super().__init__(config, s)
        self.gain = nn.Parameter(torch.ones(config.n_embd))

    def update(self, streams, u, y):
        return super().update(streams, u, self.gain * y)


def test_a_new_operator_is_one_class_and_one_name(monkeypatch):
    monkeypatch.setitem(RESIDUALS, 'gained', Gained)
    model = fresh(residual='gained')
    pattern = torch.arange(9).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        objective, loss, _ = model(pattern[:, :-1], pattern[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert all((sublayer.residual.gain != 1).all() for sublayer in model.sublayers)
