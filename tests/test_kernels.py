"""The specification of speed/kernels.py: the functions of model.py's plain formulas, forward and backward."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import model as model_py
from model import GPT, MLP, GPTConfig, Ledger, linear, twin

pytest.importorskip('triton', reason='speed/kernels.py needs Triton')

# The gates' rank is padded to 64, or above it to 128. 3 sequences of 23 tokens are three tiles of 32, the
# last in part.
SMALL = dict(n_embd=48, n_head=3, block_size=23, gate_rank=10)
SIZES = {
    'small': SMALL,
    'decoding D too': dict(n_embd=80, n_head=2, block_size=27, gate_rank=33, decode_gamma=0.7),
    'a large rank': SMALL | dict(gate_rank=70),
}
WIDTH_OF_160M = dict(n_embd=768, n_head=12, block_size=129, gate_rank=64)


def random_ledger(**settings):
    """Returns a ledger none of whose parameters is zero or has another special value."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(residual='ledger', vocab_size=31, n_layer=2, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def random_batch(model, sequences=3):
    device = model.norm.weight.device
    return torch.randint(0, 31, (2, sequences, model.config.block_size), device=device)


def in_float64(model):
    """Returns the same plain model in float64: what the errors of the others are measured against."""
    exact = GPT(replace(model.config, bf16_streams=False)).to(model.norm.weight.device, torch.float64)
    exact.load_state_dict(model.state_dict())
    return exact


def outputs_and_gradients(step_model, parameters, idx, targets):
    """Returns the logits and the commit rates, and the gradients by name, all in float64."""
    objective, loss, commit_rate = step_model(idx, targets)
    names, values = zip(*parameters.named_parameters())
    gradients = torch.autograd.grad(objective, values)
    with torch.no_grad():
        outputs = step_model(idx).double(), commit_rate.double()
    return outputs, {name: gradient.double() for name, gradient in zip(names, gradients)}


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ---- On the CPU. Triton's interpreter has to be chosen before Triton is imported, so these checks run in
# processes of their own. The interpreter multiplies no bfloat16, so they run in float32.


def in_the_interpreter(check):
    """Runs one of this file's functions, by its name, under Triton's interpreter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': path}
    command = [sys.executable, '-c', f'import test_kernels; test_kernels.{check}()']
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def kernels_in_float32():
    """Returns speed.kernels with small tiles, so that few tokens are several tiles, and two programs
    share them."""
    from speed import kernels

    kernels.HALF = torch.float32
    for name in dir(kernels):
        if name.endswith('_TILE'):
            tile = getattr(kernels, name)
            tile['ROWS'] = 32
            if 'PROGRAMS' in tile:
                tile['PROGRAMS'] = 2
    return kernels


def assert_as_exact_as_float32(step_model, model, idx, targets, exact_outputs, exact_gradients):
    outputs, gradients = outputs_and_gradients(step_model, model, idx, targets)
    for found, expected in zip(outputs, exact_outputs):
        assert error(found, expected) < 3e-6
    for name, expected in exact_gradients.items():
        is_nothing = (gradients[name] - expected).norm() < 1e-8
        assert is_nothing or error(gradients[name], expected) < 3e-5, name


def check_formulas_and_gradients():
    kernels = kernels_in_float32()
    for name, sizes in SIZES.items():
        model = random_ledger(**sizes)
        batch = random_batch(model)
        exact = in_float64(model)
        expected = outputs_and_gradients(exact, exact, *batch)
        fast_model = kernels.as_fast(model)
        assert_as_exact_as_float32(fast_model, model, *batch, *expected)
        if name == 'small':
            traced = torch.compile(fast_model, backend='aot_eager', fullgraph=True, dynamic=False)
            assert_as_exact_as_float32(traced, model, *batch, *expected)


def check_arms():
    kernels = kernels_in_float32()
    for arm in ('rotated_commit', 'decode_scratch'):
        model = random_ledger(arm=arm, **SMALL)
        batch = random_batch(model)
        exact = in_float64(model)
        expected = outputs_and_gradients(exact, exact, *batch)
        fast_model = kernels.fast(model)
        assert fast_model, arm
        assert_as_exact_as_float32(fast_model, model, *batch, *expected)
        if arm == 'rotated_commit':
            traced = torch.compile(fast_model, backend='aot_eager', fullgraph=True, dynamic=False)
            assert_as_exact_as_float32(traced, model, *batch, *expected)


class Bilinear(nn.Module):
    """An MLP of another make, without the parts that the kernels ask for."""

    def __init__(self, config):
        super().__init__()
        self.first = linear(config.n_embd, config.n_embd)
        self.second = linear(config.n_embd, config.n_embd)

    def forward(self, u):
        return self.first(u) * self.second(u)


def changed_formulas():
    """Yields (class or module, name, what takes its place): changes that the kernels do not know of."""
    deliberate, commit = Ledger.deliberate, Ledger.commit

    def never_erase(self, D, u, y):
        w = torch.sigmoid(self.write_gate(u))
        return D + w * (y + self.write_map(y))

    def no_write_map(self, D, u, y):
        w = torch.sigmoid(self.write_gate(u))
        return deliberate(self, D, u, y) - w * self.write_map(y)

    def gates_of_other_dimensions(self, D, u, y):
        return deliberate(self, D, u.roll(1, -1), y)

    def read_D_alone(self, streams):
        return streams['D']

    def no_commit_map(self, D, C, u):
        c = commit(self, D, C, u)[1]
        return {'D': D, 'C': C + c * D}, c

    def relu(self, u):
        return self.proj(F.relu(self.fc(u)))

    yield Ledger, 'deliberate', never_erase
    yield Ledger, 'deliberate', no_write_map
    yield Ledger, 'deliberate', gates_of_other_dimensions
    yield Ledger, 'read', read_D_alone
    yield Ledger, 'commit', no_commit_map
    yield MLP, 'forward', relu
    yield model_py, 'MLP', Bilinear


def check_changed_formulas():
    kernels = kernels_in_float32()
    for arm in ('no_erase', 'gated_attention', 'gated_norm', 'muon_ssnorm'):
        assert kernels.fast(random_ledger(arm=arm, **SMALL)) is None, arm
    model = random_ledger(**SMALL)
    assert kernels.fast(model)
    for part, name, change in changed_formulas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(part, name, change)
            assert kernels.fast(model) is None, (name, change)


def test_the_kernels_compute_the_plain_formulas_and_their_gradients():
    in_the_interpreter('check_formulas_and_gradients')


def test_the_kernels_compute_a_rotated_commit_and_a_decoded_scratch():
    in_the_interpreter('check_arms')


def test_the_kernels_are_left_out_where_the_formulas_were_changed():
    in_the_interpreter('check_changed_formulas')


# ---- Compiling for a GPU, without one

STREAMS = {'D', 'C', 'grad_D', 'grad_C', 'grad_new_D', 'new_D', 'grad_old_D', 'grad_old_C', 'added', 'total'}
HALF = {
    'y',
    'hidden',
    'U',
    'grad_y',
    'grad_u',
    'projected',
    'grad_projected',
    'gram_hidden',
    'grad_hidden',
    'x',
    'W',
    'rotated',
}
INTEGERS = {'N', 'hidden_stride', 'projected_stride', 'rotated_stride', 'y_stride', 'TILES'}
OPTIONAL = {
    'gradient_read_kernel': {'rotated', 'rotated_stride'},
    'add_product_kernel': {'c', 'y', 'y_stride'},
}


def type_of(name, streams):
    """Returns the type of a kernel's argument; all others are pointers to float32."""
    if name in STREAMS:
        return f'*{streams}'
    if name in HALF:
        return '*bf16'
    if name in INTEGERS:
        return 'i32'
    return 'fp32' if name == 'eps' else '*fp32'


def shared_memory(kernel, tile, streams, sizes):
    """Returns the bytes of shared memory of a kernel compiled for a Hopper GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {**tile, **sizes}
    constants.pop('PROGRAMS', None)
    options = {'num_warps': constants.pop('num_warps', 4)}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
            values[i,] = constants[name]
        else:
            signature[name] = type_of(name, streams)
            if name != 'TILES':
                attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return compile(source, target=GPUTarget('cuda', 90, 32), options=options).metadata.shared


@pytest.mark.parametrize('rank', [64, 128])
@pytest.mark.parametrize('streams', ['fp32', 'bf16'])
@pytest.mark.parametrize('rotated', [False, True])
def test_the_kernels_compile_for_hopper_and_fit_into_its_shared_memory(monkeypatch, streams, rank, rotated):
    from speed import kernels

    # The branch that the interpreter never takes.
    monkeypatch.setattr(kernels, 'PTX', kernels.tl.constexpr(True))
    cases = [
        (kernels.gradient_read_kernel, kernels.GRADIENT_READ_TILE, dict(d=768, WIDTH=1024)),
        (kernels.add_product_kernel, kernels.ADD_PRODUCT_TILE, dict(d=768, r=2 * rank)),
    ]
    if not rotated:
        cases += [
            (kernels.deliberate_kernel, kernels.DELIBERATE_TILE, dict(d=768, r=rank)),
            (kernels.gradient_hidden_kernel, kernels.GRADIENT_HIDDEN_TILE, dict(d=768, r=rank)),
            (kernels.gradient_U_kernel, kernels.GRADIENT_U_TILE, dict(d=768, r=rank)),
            (kernels.direction_kernel, kernels.DIRECTION_TILE, dict(r=rank)),
        ]
    for kernel, tile, sizes in cases:
        absent = set() if rotated else OPTIONAL.get(kernel.__name__, set())
        sizes = sizes | dict.fromkeys(absent)
        assert shared_memory(kernel, tile, streams, sizes) <= 227 * 1024


# ---- On a GPU


@torch.no_grad()
def commit_gates(model, idx):
    """Returns every token's gate after every sublayer. Their means, which the model returns, are too few to
    compare errors by."""
    seen = []

    def keep(module, inputs, output):
        seen.append(output[1].double())

    handles = [sublayer.register_forward_hook(keep) for sublayer in model.sublayers]
    model(idx)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def compiled(model):
    torch.compiler.reset()  # or the compilations of all tests count against one limit
    model = twin(model)
    for sublayer in model.sublayers:
        sublayer.compile(fullgraph=True, dynamic=False)
    return model


def as_one(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def uncompiled(model):
    return model


def assert_at_most_1_5_times_the_error_of_plain_bfloat16(model, plain_step, fast_step):
    """Sets the kernels against the plain formulas under autocast, by their errors against float64.
    plain_step, fast_step: compiled or uncompiled."""
    from speed import kernels

    idx, targets = random_batch(model, sequences=5)
    fast_model, exact = kernels.as_fast(model), in_float64(model)
    right_outputs, right_gradients = outputs_and_gradients(exact, exact, idx, targets)
    with torch.autocast('cuda', torch.bfloat16):
        plain_outputs, plain_gradients = outputs_and_gradients(plain_step(model), model, idx, targets)
        outputs, gradients = outputs_and_gradients(fast_step(fast_model), model, idx, targets)
        plain_gates, gates = commit_gates(model, idx), commit_gates(fast_model, idx)
    right_gates = commit_gates(exact, idx)
    assert error(outputs[0], right_outputs[0]) < 1.5 * error(plain_outputs[0], right_outputs[0]) + 1e-5
    assert error(gates, right_gates) < 1.5 * error(plain_gates, right_gates) + 1e-5
    right = as_one(right_gradients)
    assert error(as_one(gradients), right) < 1.5 * error(as_one(plain_gradients), right)


# Compiling takes nearly all the time of these tests, on a machine that has not compiled them before: of the
# kernels a second each for every width and precision, of a model ten. So each precision of the streams is
# tried at two widths.


@pytest.mark.gpu
@pytest.mark.parametrize(
    'sizes, bf16_streams', [(SIZES['small'], False), (SIZES['decoding D too'], True), (WIDTH_OF_160M, True)]
)
def test_on_a_gpu_the_error_against_float64_is_at_most_1_5_times_that_of_plain_bfloat16(sizes, bf16_streams):
    model = random_ledger(bf16_streams=bf16_streams, **sizes).cuda()
    assert_at_most_1_5_times_the_error_of_plain_bfloat16(model, uncompiled, uncompiled)


@pytest.mark.gpu
def test_on_a_gpu_the_same_holds_compiled_at_the_width_of_160m():
    model = random_ledger(**WIDTH_OF_160M).cuda()
    assert_at_most_1_5_times_the_error_of_plain_bfloat16(model, compiled, compiled)


@pytest.mark.gpu
def test_on_a_gpu_the_same_holds_of_a_rotated_commit_compiled_at_the_width_of_160m():
    model = random_ledger(arm='rotated_commit', **WIDTH_OF_160M).cuda()
    assert_at_most_1_5_times_the_error_of_plain_bfloat16(model, uncompiled, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize('arm', ['', 'rotated_commit', 'decode_scratch'])
@pytest.mark.parametrize('bf16_streams', [False, True])
def test_on_a_gpu_the_160m_ledger_is_recognized_and_runs_through_the_kernels(arm, bf16_streams):
    from speed import kernels

    sizes = WIDTH_OF_160M | dict(block_size=16)
    assert kernels.fast(random_ledger(arm=arm, bf16_streams=bf16_streams, **sizes).cuda())
