"""The specification of arms/: what holds of every arm, then what is special of each. tests/reference.py has
their equations in numpy."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from reference import ARMS, reference_of

import arms
from arms import arm_names, arm_part, arm_settings
from data.loader import UserError
from model import GPT, GPTConfig, RMSNorm

SMALL = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=12, gate_rank=5)
PAIRS = ['rope_swiglu,gated_attention', 'rope_swiglu,delta_only', 'gated_norm,sandwich']
EVERY = [*arm_names(), *PAIRS]
pytestmark = pytest.mark.usefixtures('one_thread')
every_arm = pytest.mark.parametrize('arm', EVERY)


def model_settings(arm):
    """Returns the settings of the model that an arm asks for."""
    return {key: value for key, value in arm_settings(arm).items() if key in GPTConfig.__dataclass_fields__}


def fresh(arm='', seed=0, **settings):
    """A model at its start values, with the settings that its arm asks for."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(arm=arm, **{**SMALL, **model_settings(arm), **settings}))


def shaken(arm='', std=0.5, dtype=torch.float64, **settings):
    """A model none of whose parameters is zero or has another special value."""
    model = fresh(arm, **settings).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn_like(parameter)
    return model


def batch(sequences=5):
    """Returns tokens and targets, (sequences, block_size) each."""
    order = torch.randperm(2 * sequences * 8, generator=torch.Generator().manual_seed(1))
    return (order % 13).view(2, sequences, 8)


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@torch.no_grad()
def observe(model, idx):
    """Returns the logits and what a forward hook sees of each sublayer: (streams by name, commit gate)."""
    seen, handles = [], []
    for sublayer in model.sublayers:
        handles.append(sublayer.register_forward_hook(lambda _, __, output: seen.append(output)))
    logits = model(idx)
    for handle in handles:
        handle.remove()
    return logits, seen


@torch.no_grad()
def logits_of(model):
    return model(batch()[0]).numpy()


def gradients(model, device='cpu'):
    """Returns the gradients of the objective by name."""
    objective, loss, _ = model(*batch().to(device))
    objective.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- every arm


def test_every_arm_has_a_reference():
    assert set(ARMS) == set(arm_names())


@every_arm
def test_logits_streams_and_gates_follow_the_equations(arm):
    model = shaken(arm)
    idx, _ = batch()
    logits, seen = observe(model, idx)
    expected, levels, gates = reference_of(model).forward(idx.numpy())
    assert distance(logits, expected) < 1e-10
    assert tuple(model.start(idx)) == model.stream_names and model.decoded in model.stream_names
    for (streams, gate), level, expected_gate in zip(seen, levels[1:], gates, strict=True):
        assert tuple(streams) == tuple(level) == model.stream_names
        assert all(distance(streams[name], level[name]) < 1e-10 for name in streams)
        assert gate is expected_gate is None or distance(gate, expected_gate) < 1e-10


@every_arm
def test_with_one_seed_all_parameters_shared_by_name_and_shape_start_as_in_the_published_arm(arm):
    model = fresh(arm)
    plain = fresh(residual=model.config.residual, mlp_ratio=model.config.mlp_ratio).state_dict()
    shared = {
        name
        for name, value in model.state_dict().items()
        if getattr(plain.get(name), 'shape', 0) == value.shape
    }
    assert {'tok_emb.weight', 'head.weight', 'sublayers.2.function.qkv.weight'} <= shared
    assert all(torch.equal(model.state_dict()[name], plain[name]) for name in shared)


@every_arm
def test_every_parameter_gets_a_gradient_from_the_first_step_on(arm):
    assert all(gradient is not None for gradient in gradients(fresh(arm)).values())
    unused = ('sublayers.0.residual.read_scale',)  # C is zero there
    if arm == 'decode_scratch':
        unused += ('sublayers.3.residual.commit_map',)  # of a C that is neither read nor decoded
    for name, gradient in gradients(shaken(arm)).items():
        assert gradient.any() != name.startswith(unused), name


@every_arm
def test_gradients_are_the_slope_of_the_objective(arm):
    if 'value_scale' in arm:
        pytest.skip('its gradient is another by design')
    model = shaken(arm, std=0.3)
    found = gradients(model)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def objective(step):
        moved = {name: p.detach() + step * direction[name] for name, p in model.named_parameters()}
        return torch.func.functional_call(model, moved, batch().unbind())[0].item()

    slope = sum((gradient * direction[name]).sum().item() for name, gradient in found.items())
    assert (objective(1e-6) - objective(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5)


@every_arm
def test_a_token_changes_no_logits_before_its_position(arm):
    model = shaken(arm)
    idx = batch(1)[0]
    changed = idx.clone()
    changed[:, 4] = (idx[:, 4] + 1) % 13
    with torch.no_grad():
        moved = (model(changed) - model(idx)).abs().amax((0, 2))
    assert (moved[:4] < 1e-12).all() and (moved[4:] > 1e-6).all()


@pytest.mark.parametrize('arm', [arm for arm in EVERY if arm not in ('muon', 'baseline_wide')])
def test_compiles_as_one_graph_a_part_with_the_eager_loss_and_gradients(arm):
    torch.compiler.reset()
    # The slower backend traces the backward pass too: only a gradient of one's own needs it.
    backend = 'aot_eager' if arm == 'value_scale' else 'eager'
    how = dict(fullgraph=True, dynamic=False, backend=backend)
    model = shaken(arm, std=0.2, dtype=torch.float32, n_layer=1)
    expected = gradients(model)
    loss = model(*batch())[1].item()
    model.zero_grad()
    for sublayer in model.sublayers:
        sublayer.compile(**how)
    model.start, model.cross_entropy = (
        torch.compile(part, **how) for part in (model.start, model.cross_entropy)
    )
    found = gradients(model)
    assert model(*batch())[1].item() == pytest.approx(loss, abs=1e-5)
    assert all(distance(found[name], gradient) < 1e-4 for name, gradient in expected.items())


@every_arm
def test_bf16_autocast_trains_close_to_float32_with_streams_in_the_precision_asked_for(arm):
    exact = shaken(arm, std=0.2, dtype=torch.float32, n_layer=1)
    expected = torch.cat([gradient.flatten() for gradient in gradients(exact).values()])
    for bf16_streams in (False, True):
        model = GPT(replace(exact.config, bf16_streams=bf16_streams))
        model.load_state_dict(exact.state_dict())
        with torch.autocast('cpu', torch.bfloat16):
            found = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
            streams = observe(model, batch()[0])[1][-1][0]
        assert (found - expected).norm() < 0.1 * expected.norm()
        assert {x.dtype for x in streams.values()} == {torch.bfloat16 if bf16_streams else torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize('arm', ['rope_swiglu', 'rotated_commit', 'softmax_one', 'value_scale'])
def test_compiled_bf16_on_a_gpu_trains_close_to_eager_float32(arm):
    torch.compiler.reset()
    model = shaken(arm, std=0.1, dtype=torch.float32, n_layer=1, n_embd=64, block_size=8).cuda()
    expected = gradients(model, 'cuda')
    model.zero_grad()
    model.compile(fullgraph=True)
    with torch.autocast('cuda', torch.bfloat16):
        found = gradients(model, 'cuda')
    expected, found = (torch.cat([g.flatten() for g in side.values()]) for side in (expected, found))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize('arm', arm_names())
def test_parameters_are_within_two_percent_of_the_baseline_or_the_file_says_how_many(arm):
    with torch.device('meta'):
        count = GPT(GPTConfig(arm=arm, **model_settings(arm))).num_params()
        baseline = GPT(GPTConfig()).num_params()
    text = Path(arms.__file__).with_name(f'{arm}.py').read_text()
    said = f'{(count - baseline) / 1e6:.1f}M', f'{count / 1e6:.0f}M'
    assert abs(count / baseline - 1) < 0.02 or any(number in text for number in said)


# ---- reductions: with the new part neutral, an arm is the model that it varies


def assert_same_function(model, plain):
    """The logits of the model, whose shared parameters are copied into `plain`, are those of `plain`."""
    shared = {name: p for name, p in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(shared, strict=False)
    assert distance(logits_of(model), logits_of(plain)) < 1e-10


def each(model, name):
    """Yields the attribute `a.b` of each sublayer that has it."""
    for sublayer in model.sublayers:
        part = sublayer
        for step in name.split('.'):
            part = getattr(part, step, None)
        if part is not None:
            yield part


@torch.no_grad()
def test_rotated_commit_with_the_identity_is_the_ledger_and_with_its_rotation_is_not():
    model, plain = shaken('rotated_commit'), shaken(residual='ledger')
    shared = {name: p for name, p in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(shared)
    assert distance(logits_of(model), logits_of(plain)) > 1e-3
    model.sublayers[0].residual.shared.Q.copy_(torch.eye(12))
    assert_same_function(model, plain)


@torch.no_grad()
def test_no_erase_is_the_ledger_with_closed_erase_gates():
    model, plain = shaken('no_erase'), shaken(residual='ledger')
    for bias in each(plain, 'residual.erase_gate.U.bias'):
        bias.fill_(-1000)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert distance(logits_of(model), logits_of(plain)) < 1e-10


@torch.no_grad()
def test_decode_scratch_is_the_ledger_where_nothing_is_read_or_decoded_but_D():
    model, plain = shaken('decode_scratch'), shaken(residual='ledger')
    plain.load_state_dict(model.state_dict())
    expected = observe(plain, batch()[0])[1][-1][0]['D']
    assert distance(observe(model, batch()[0])[1][-1][0]['D'], expected) < 1e-10
    assert distance(logits_of(model), plain.head(plain.norm(expected))) < 1e-10


@torch.no_grad()
def test_delta_only_that_never_erases_and_always_writes_is_the_baseline():
    model = shaken('delta_only')
    for bias in each(model, 'residual.erase_gate.U.bias'):
        bias.fill_(-1000)
    for bias in each(model, 'residual.write_gate.U.bias'):
        bias.fill_(1000)
    for weight in each(model, 'residual.write_map.U.weight'):
        weight.zero_()
    assert_same_function(model, shaken())


@torch.no_grad()
def test_delta_only_tied_is_delta_only_with_the_same_gate_twice():
    model, untied = shaken('delta_only_tied'), shaken('delta_only')
    state = model.state_dict()
    gates = {name.replace('write', 'erase'): p for name, p in state.items() if 'write_gate' in name}
    untied.load_state_dict({**state, **gates})
    assert distance(logits_of(model), logits_of(untied)) < 1e-10


@torch.no_grad()
def test_two_stream_starts_as_the_baseline():
    model, plain = fresh('two_stream').double(), fresh().double()
    # The sum is twice h, so its norm needs four times the eps to be the same function.
    model.norm.eps *= 4
    assert_same_function(model, plain)


@torch.no_grad()
def test_sandwich_without_its_second_norm_is_the_baseline():
    model = shaken('sandwich')
    for sublayer in model.sublayers:
        sublayer.residual.output_norm = torch.nn.Identity()
    assert_same_function(model, shaken())


@torch.no_grad()
def test_gated_norm_with_open_gates_is_the_baseline():
    model = shaken('gated_norm')
    for gate in [model.norm.gate, *each(model, 'norm.gate')]:
        gate.U.weight.zero_()
        gate.U.bias.fill_(1000)
    assert_same_function(model, shaken())


@torch.no_grad()
def test_gated_attention_with_half_open_gates_and_twice_the_projection_is_the_baseline():
    model, plain = shaken('gated_attention'), shaken()
    for weight in each(model, 'function.gate.weight'):
        weight.zero_()
    plain.load_state_dict({name: p.clone() for name, p in model.state_dict().items() if 'gate' not in name})
    for sublayer in model.sublayers[::2]:
        sublayer.function.proj.weight *= 2
    assert distance(logits_of(model), logits_of(plain)) < 1e-10


@torch.no_grad()
def test_softmax_one_is_a_learned_key_and_value_of_zeros():
    model, plain = shaken('softmax_one'), shaken(attn_bias_kv=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    for name in ('bias_k', 'bias_v'):
        for bias in each(plain, f'function.{name}'):
            bias.zero_()
    assert distance(logits_of(model), logits_of(plain)) < 1e-10


@torch.no_grad()
def test_value_scale_computes_what_the_baseline_computes():
    assert_same_function(shaken('value_scale'), shaken())


@torch.no_grad()
def test_rope_swiglu_attends_by_distance_alone():
    attention = shaken('rope_swiglu').sublayers[0].function
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64).expand(2, 1, 2, 8, 6)
    q, k, _ = attention.heads(*(x.transpose(1, 2).flatten(2) for x in (q, k, k)))
    scores = q @ k.transpose(-1, -2)
    for offset in range(-7, 8):
        diagonal = scores.diagonal(offset, -2, -1)
        assert distance(diagonal, diagonal[..., :1]) < 1e-10
    assert distance(scores[..., 0, :], scores[..., 0, :1]) > 1e-3


@torch.no_grad()
def test_single_scale_norms_start_as_the_norms_of_the_baseline():
    model, plain = fresh('muon_ssnorm').double(), fresh().double()
    assert_same_function(model, plain)


def test_baseline_wide_is_the_baseline_with_a_wider_mlp():
    assert arm_settings('baseline_wide') == {'mlp_ratio': 5}
    assert_same_function(shaken('baseline_wide'), shaken(mlp_ratio=5))


# ---- what is special of an arm


def test_the_rotation_is_one_proper_rotation_for_all_sublayers_and_seeds_and_is_kept_in_the_checkpoint():
    model = fresh('rotated_commit', n_embd=64)
    rotations = [sublayer.residual.rotation for sublayer in model.sublayers]
    Q = rotations[0].double()
    assert len({Q.data_ptr() for Q in rotations}) == 1
    assert len(list(model.buffers())) == 1
    assert distance(Q @ Q.T, np.eye(64)) < 1e-6 and torch.linalg.det(Q) > 0
    assert torch.equal(
        fresh('rotated_commit', seed=1, n_embd=64).sublayers[3].residual.rotation, rotations[0]
    )
    assert any(torch.equal(value, rotations[0]) for value in model.state_dict().values())
    assert len({Q.data_ptr() for Q in (s.residual.rotation for s in model.double().sublayers)}) == 1


def test_the_rotation_spreads_one_dimension_over_all():
    Q = fresh('rotated_commit', n_embd=64).sublayers[0].residual.rotation
    assert Q.abs().amax() < 0.6 and 0.5 / 64 < Q.square().mean(1).min()


def test_what_rotated_commit_derives_for_measuring_is_C_on_the_axes_of_D():
    model = shaken('rotated_commit')
    streams = observe(model, batch()[0])[1][-1][0]
    residual = model.sublayers[-1].residual
    derived, Q = residual.derived(streams), residual.rotation
    assert tuple(derived) == ('C_unrotated',)
    assert distance(derived['C_unrotated'] @ Q.T, streams['C']) < 1e-5


def test_a_rotated_commit_in_bfloat16_is_within_half_a_percent_of_float32():
    residual = fresh('rotated_commit', n_embd=64).sublayers[0].residual
    D = torch.randn(100, 64)
    with torch.no_grad():
        exact = residual.committed(D)
        with torch.autocast('cpu', torch.bfloat16):
            rounded = residual.committed(D)
    assert 0 < (rounded.float() - exact).norm() < 0.005 * exact.norm()


def test_two_stream_without_learning_keeps_its_streams_equal():
    streams = observe(fresh('two_stream'), batch()[0])[1][-1][0]
    assert torch.equal(streams['s0'], streams['s1'])
    assert torch.equal(streams['sum'], 2 * streams['s0'])


def test_softmax_one_gives_less_than_all_of_its_attention_away():
    attention = shaken('softmax_one').sublayers[0].function
    q, k, ones = torch.randn(3, 5, 2, 8, 6, dtype=torch.float64)
    weight = np.exp(np.tril(q @ k.mT / 6**0.5)) * np.tril(np.ones((8, 8)))
    expected = weight.sum(-1) / (1 + weight.sum(-1))
    assert distance(attention.attend(q, k, torch.ones_like(ones))[..., 0], expected) < 1e-10


def test_value_scale_divides_the_gradient_of_a_value_by_one_plus_its_attention_and_no_other_gradient():
    scaled, plain = (shaken(arm).sublayers[0].function for arm in ('value_scale', ''))
    torch.manual_seed(3)
    q, k, v = (torch.randn(5, 2, 8, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    g = torch.randn(5, 2, 8, 6, dtype=torch.float64)
    P = reference_of(shaken()).probabilities(q.detach().numpy(), k.detach().numpy())
    mass = P.sum(-2)[..., None]
    expected = P.swapaxes(-1, -2) @ g.numpy() / (1 + mass)
    found = torch.autograd.grad(scaled.attend(q, k, v), (q, k, v), g)
    others = torch.autograd.grad(plain.attend(q, k, v), (q, k, v), g)
    assert distance(found[2], expected) < 1e-10
    assert distance(others[2], expected) > 1e-2
    assert distance(found[0], others[0]) < 1e-10 and distance(found[1], others[1]) < 1e-10


def test_value_scale_divides_by_the_same_mass_whatever_the_size_of_the_loss():
    model = shaken('value_scale')
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    (model(*batch())[0] * 1024).backward()
    assert all(distance(p.grad / 1024, found[name]) < 1e-10 for name, p in model.named_parameters())


def test_rope_swiglu_has_no_learned_positions_and_an_mlp_of_equal_size():
    model, plain = (fresh(arm, n_embd=96) for arm in ('rope_swiglu', ''))
    assert not any(name.startswith('pos_emb') for name in model.state_dict())
    sizes = [
        sum(p.numel() for p in m.sublayers[1].function.parameters() if p.ndim == 2) for m in (model, plain)
    ]
    assert sizes[0] == sizes[1]


def test_dynamic_tanh_is_bounded_where_a_norm_is_not():
    norm = fresh('dyt').norm
    assert norm(torch.full((12,), 1e6)).abs().max() == 1
    assert RMSNorm(12)(torch.eye(12)[0] * 1e6).max() > 3


# ---- Muon


def settings_of_a_run(**changes):
    from train import Config

    return Config(**{**dict(lr=1e-2, weight_decay=0.1, vocab_size=13), **changes})


def optimized(model, steps, config=None, optimizer=None):
    optimizer = optimizer or arm_part(model.config, 'make_optimizer', None)(
        model, config or settings_of_a_run()
    )
    for _ in range(steps):
        model(*batch())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def newton_schulz(update):
    """Five steps of the quintic iteration of Jordan et al. 2024 on one matrix."""
    X = update.T if update.shape[0] > update.shape[1] else update
    X = X / np.linalg.norm(X)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X.T if update.shape[0] > update.shape[1] else X


def test_muon_takes_the_hidden_matrices_and_AdamW_all_else():
    model = fresh('muon')
    muon, adamw = optimized(model, 0).parts
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon, of_adamw = (
        {names[id(p)] for group in part.param_groups for p in group['params']} for part in (muon, adamw)
    )
    assert of_muon == {
        f'sublayers.{s}.function.{m}.weight'
        for s in range(4)
        for m in (('qkv', 'proj'), ('fc', 'proj'))[s % 2]
    }
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    decay = {names[id(p)]: g['weight_decay'] for g in adamw.param_groups for p in g['params']}
    assert decay['head.weight'] == decay['tok_emb.weight'] == 0.1 and decay['norm.weight'] == 0


def test_a_step_of_muon_is_the_orthogonalized_momentum_in_the_size_of_a_step_of_AdamW():
    model = shaken('muon', std=0.2, dtype=torch.float32)
    model(*batch())[0].backward()
    W = model.sublayers[1].function.fc.weight
    before, gradient = W.detach().double().numpy().copy(), W.grad.double().numpy()
    model.zero_grad()
    optimized(model, 1)
    momentum = 0.05 * gradient
    update = newton_schulz(0.05 * gradient + 0.95 * momentum)
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * 0.2 * max(W.shape) ** 0.5 * update
    # Newton-Schulz runs in bfloat16.
    assert distance(W.detach().double(), expected) < 0.05 * np.abs(expected - before).max()


def test_muon_leaves_weights_and_momenta_alone_while_found_inf_is_one():
    model = fresh('muon')
    optimizer = optimized(model, 2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    momenta = [
        entry['momentum_buffer'].clone()
        for entry in optimizer.state_dict()['state'].values()
        if 'momentum_buffer' in entry
    ]
    optimizer.found_inf = torch.ones(())
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    after = [
        entry['momentum_buffer']
        for entry in optimizer.state_dict()['state'].values()
        if 'momentum_buffer' in entry
    ]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert len(after) == 8 and all(map(torch.equal, after, momenta))
    optimizer.found_inf.zero_()
    optimizer.zero_grad()
    optimized(model, 1, optimizer=optimizer)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize('arm', ['muon', 'muon_ssnorm'])
def test_the_saved_state_of_muon_goes_on_exactly(arm):
    model = fresh(arm)
    optimizer = optimized(model, 2)
    copy = fresh(arm)
    copy.load_state_dict(model.state_dict())
    other = optimized(copy, 0)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    optimized(model, 2, optimizer=optimizer)
    optimized(copy, 2, optimizer=other)
    assert all(map(torch.equal, model.state_dict().values(), copy.state_dict().values()))


# ---- how an arm is chosen


def test_an_arm_that_replaces_nothing_leaves_the_model_as_it_is():
    assert [type(part) for part in fresh('muon').modules()] == [type(part) for part in fresh().modules()]


def test_arms_that_replace_different_parts_combine():
    model = fresh('dyt,gated_attention')
    assert {type(model.norm).__module__, type(model.sublayers[0].function).__module__} == {
        'arms.dyt',
        'arms.gated_attention',
    }


@pytest.mark.parametrize(
    'arm, complaint',
    [
        (
            'softmax_one,gated_attention',
            'softmax_one and gated_attention both replace Attention: name one of them',
        ),
        ('delta_only,sandwich', 'delta_only and sandwich both replace Residual'),
        ('muon,muon_ssnorm', 'both replace make_optimizer'),
        (
            'gated_norms',
            "there is no arm 'gated_norms', did you mean 'gated_norm'. arms/ holds baseline_wide, ",
        ),
        ('xyz', "there is no arm 'xyz': arms/ holds baseline_wide, .*, value_scale$"),
        ('../arms/dyt', "there is no arm '../arms/dyt'"),
        ('arms/dyt', "there is no arm 'arms/dyt'"),
        ('dyt,', "there is no arm ''"),
        (
            'no_erase',
            "a kind of ledger, but residual is 'baseline': start from a ledger config, or add --residual",
        ),
    ],
)
def test_a_wrong_name_and_two_arms_for_one_part_are_refused_in_a_sentence(arm, complaint):
    with pytest.raises(UserError, match=complaint):
        GPTConfig(**SMALL, arm=arm)


def test_a_ledger_config_is_refused_to_an_arm_of_the_baseline():
    with pytest.raises(UserError, match="'sandwich', a kind of baseline, but residual is 'ledger'"):
        GPTConfig(**SMALL, arm='sandwich', residual='ledger')


@pytest.mark.parametrize('arm', ['softmax_one', 'value_scale'])
def test_attention_without_a_learned_key_refuses_one(arm):
    with pytest.raises(UserError, match='attn_bias_kv'):
        fresh(arm, attn_bias_kv=True)


@pytest.fixture
def own_arm(tmp_path, monkeypatch):
    """Puts a file into arms/ for the duration of a test. Returns a function of its name and text."""
    monkeypatch.setattr(arms, '__path__', [*arms.__path__, str(tmp_path)])
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / f'{name}.py').write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith('arms.'):
            del sys.modules[name]


def test_a_new_arm_is_one_file_and_nothing_to_register(own_arm):
    own_arm(
        'damped',
        """
import model

class Residual(model.Baseline):
    def update(self, streams, u, y):
        return {'h': streams['h'] + 0.5 * y}, None
""",
    )
    streams = observe(fresh('damped'), batch()[0])[1]
    assert 'damped' in arm_names() and list(streams[0][0]) == ['h']
    assert distance(logits_of(fresh('damped')), logits_of(fresh())) > 0


def test_two_arms_that_want_different_values_of_a_setting_are_refused(own_arm):
    own_arm('narrow', "SETTINGS = {'mlp_ratio': 2}")
    with pytest.raises(UserError, match='two values of mlp_ratio, 5 and 2'):
        arm_settings('baseline_wide,narrow')


def test_what_an_arm_imports_is_not_what_it_replaces(own_arm):
    own_arm('imports', 'from model import Attention, MLP')
    assert arm_part(GPTConfig(arm='imports'), 'Attention', None) is None


# ---- a run


SHORT = dict(n_layer=2, max_iters=4, warmup_iters=2, eval_interval=4, eval_sequences=8, ckpt_interval=2)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return training.write_dataset(tmp_path_factory.mktemp('data') / 'words')


def trained(dataset, out, arm, **settings):
    training.run(dataset, out, arm=arm, **{**SHORT, **settings})
    return training.load(out / 'ckpt.pt')


def measured_streams(arm):
    """Returns the names of the streams of an arm and of what its operator derives from them."""
    return fresh(arm).stream_names + (('C_unrotated',) if arm == 'rotated_commit' else ())


@pytest.mark.parametrize('arm', [*arm_names(), PAIRS[0]])
def test_a_run_of_an_arm_resumes_exactly_and_logs_its_streams(arm, dataset, tmp_path):
    whole = trained(dataset, tmp_path / 'whole', arm)
    trained(dataset, tmp_path / 'cut', arm, max_iters=2)
    resumed = trained(dataset, tmp_path / 'cut', arm, init_from='resume')
    assert whole['model_args']['arm'] == arm
    assert all(torch.equal(value, resumed['model'][name]) for name, value in whole['model'].items())
    lines = [(tmp_path / out / 'log.jsonl').read_text().splitlines()[-1] for out in ('whole', 'cut')]
    streams = [json.loads(line)['streams'] for line in lines]
    assert streams[0] == streams[1]
    assert tuple(streams[0]) == measured_streams(arm)


@pytest.mark.parametrize('arm', ['rotated_commit', 'two_stream'])
def test_measure_reads_and_draws_an_arm(arm, dataset, tmp_path):
    import measure

    trained(dataset, tmp_path / 'run', arm, max_iters=1, ckpt_interval=1)
    measure.main([f'--ckpt={tmp_path / "run"}', '--sequences=4', '--device=cpu'])
    report = json.loads((tmp_path / 'run/measure.json').read_text())
    assert tuple(report['streams']) == measured_streams(arm)
    decoded = [name for name, stream in report['streams'].items() if stream['decoded']]
    assert decoded == [fresh(arm).decoded]
    assert (tmp_path / 'run/profile.png').exists() and (tmp_path / 'run/landscape.png').exists()
