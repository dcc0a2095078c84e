"""The specification of kernels.py: the same function as model.py's plain formulas, forward and backward."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

from model import GPT, MLP, GPTConfig, Ledger, linear, twin

pytest.importorskip('triton', reason='kernels.py needs Triton')


def shaken(**settings):
    """A ledger none of whose parameters is zero or has another special value."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(residual='ledger', vocab_size=31, n_layer=2, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def loss_and_gradients(step_model, parameters, idx, targets):
    """Returns the logits and the commit rates, and the gradients by name, all in float64."""
    objective, loss, commit_rate = step_model(idx, targets)
    objective.backward()
    gradients = {name: p.grad.double() for name, p in parameters.named_parameters()}
    for p in parameters.parameters():
        p.grad = None
    with torch.no_grad():
        return (step_model(idx).double(), commit_rate.double()), gradients


@torch.no_grad()
def commit_gates(model, idx):
    """Returns every token's gate after every sublayer. Of their means, which the model returns, there are too few to compare errors by."""
    seen = []
    handles = [
        sublayer.register_forward_hook(lambda _, __, output: seen.append(output[1].double()))
        for sublayer in model.sublayers
    ]
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


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


ODD_SIZES = [
    dict(n_embd=48, n_head=3, block_size=23, gate_rank=10),
    dict(n_embd=80, n_head=2, block_size=27, gate_rank=33, decode_gamma=0.7),
]


class Bilinear(nn.Module):
    """An MLP of another make, without the parts that the kernels ask for."""

    def __init__(self, config):
        super().__init__()
        self.left, self.right = linear(config.n_embd, config.n_embd), linear(config.n_embd, config.n_embd)

    def forward(self, u):
        return self.left(u) * self.right(u)


def check_in_float32():
    """Run by the test below in a process of its own: Triton's interpreter has to be chosen before it is imported."""
    import model as model_py
    from speed import kernels

    kernels.HALF = torch.float32  # the interpreter multiplies no bfloat16
    for tile in (
        kernels.DELIBERATE,
        kernels.GRADIENT_A,
        kernels.GRADIENT_U,
        kernels.GRADIENT_READ,
        kernels.ADD_PRODUCT,
        kernels.DIRECTION,
    ):
        tile |= (
            dict(ROWS=32, PROGRAMS=2) if 'PROGRAMS' in tile else dict(ROWS=32)
        )  # 69 tokens are three tiles, the last in part: two programs share them, or one has all
    for sizes in [*ODD_SIZES, ODD_SIZES[0] | dict(gate_rank=70)]:  # which is filled up to 128
        model = shaken(**sizes)
        exact = GPT(model.config).double()
        exact.load_state_dict(model.state_dict())
        idx, targets = torch.randint(0, 31, (2, 3, model.config.block_size))
        outputs, gradients = loss_and_gradients(exact, exact, idx, targets)
        fast = kernels.as_fast(model)
        for step in [fast] + [torch.compile(fast, backend='aot_eager', fullgraph=True, dynamic=False)] * (
            sizes is ODD_SIZES[0]
        ):
            found, found_gradients = loss_and_gradients(step, model, idx, targets)
            assert all(error(*pair) < 3e-6 for pair in zip(found, outputs))
            for name, gradient in gradients.items():
                assert (
                    error(found_gradients[name], gradient) < 3e-5
                    or (found_gradients[name] - gradient).norm() < 1e-8
                ), name
    deliberate, commit = Ledger.deliberate, Ledger.commit
    assert kernels.fast(model)
    for part, method, changed in (
        (
            Ledger,
            'deliberate',
            lambda self, D, u, y: D + torch.sigmoid(self.write_gate(u)) * (y + self.write_map(y)),
        ),  # no erase
        (
            Ledger,
            'deliberate',
            lambda self, D, u, y: (
                deliberate(self, D, u, y) - torch.sigmoid(self.write_gate(u)) * self.write_map(y)
            ),
        ),
        (Ledger, 'deliberate', lambda self, D, u, y: deliberate(self, D, u.roll(1, -1), y)),
        (Ledger, 'read', lambda self, streams: streams['D']),
        (
            Ledger,
            'commit',
            lambda self, D, C, u: (
                {'D': D, 'C': C + commit(self, D, 0 * C, u)[1] * D},
                commit(self, D, C, u)[1],
            ),
        ),  # no map
        (MLP, 'forward', lambda self, u: self.proj(F.relu(self.fc(u)))),
        (model_py, 'MLP', Bilinear),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(part, method, changed)
            assert kernels.fast(model) is None


def test_the_kernels_compute_the_plain_formulas_and_their_gradients_and_notice_if_these_were_changed():
    code = 'import sys; sys.path[:0] = ["tests", "."]; import test_kernels; test_kernels.check_in_float32()'
    subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1'}, check=True
    )


@pytest.mark.parametrize('rank', [64, 128])
@pytest.mark.parametrize('streams', ['*fp32', '*bf16'])
def test_the_kernels_compile_for_hopper_and_fit_into_its_shared_memory(monkeypatch, streams, rank):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from speed import kernels

    monkeypatch.setattr(
        kernels, 'PTX', kernels.tl.constexpr(True)
    )  # the branch that the interpreter never takes
    types = {name: streams for name in ('D', 'C', 'g', 'gD', 'gC', 'D2', 'gD2', 'gC2', 'g2')} | dict.fromkeys(
        ('y', 'a', 'U', 'gy', 'gu', 'projected', 'gprojected', 'Ga', 'ga', 'x', 'W'), '*bf16'
    )
    types |= dict.fromkeys(('N', 'apart', 'apart_p', 'LOOP'), 'i32') | {'eps': 'fp32'}
    for kernel, tile, sizes in (
        (kernels.deliberate_kernel, kernels.DELIBERATE, dict(r=rank)),
        (kernels.gradient_a_kernel, kernels.GRADIENT_A, dict(r=rank)),
        (kernels.gradient_U_kernel, kernels.GRADIENT_U, dict(r=rank)),
        (kernels.gradient_read_kernel, kernels.GRADIENT_READ, dict(WIDTH=1024)),
        (kernels.add_product_kernel, kernels.ADD_PRODUCT, dict(r=2 * rank)),
        (kernels.direction_kernel, kernels.DIRECTION, dict(r=rank)),
    ):
        fixed = {
            **{name: value for name, value in tile.items() if name != 'PROGRAMS'},
            **sizes,
            **({'d': 768} if 'd' in kernel.arg_names else {}),
        }
        options = {'num_warps': fixed.pop('num_warps', 4)}
        arguments = {
            name: 'constexpr' if name in fixed else types.get(name, '*fp32') for name in kernel.arg_names
        }
        source = ASTSource(
            kernel,
            arguments,
            {(i,): fixed[name] for i, name in enumerate(kernel.arg_names) if name in fixed},
            {
                (i,): [['tt.divisibility', 16]]
                for i, name in enumerate(kernel.arg_names)
                if name not in (*fixed, 'LOOP')
            },
        )
        assert (
            compile(source, target=GPUTarget('cuda', 90, 32), options=options).metadata.shared <= 227 * 1024
        )


@pytest.mark.gpu
@pytest.mark.parametrize('bf16_streams', [False, True])
@pytest.mark.parametrize('sizes', [*ODD_SIZES, dict(n_embd=768, n_head=12, block_size=129, gate_rank=64)])
def test_on_a_gpu_the_error_against_float64_is_at_most_1_5_times_that_of_plain_bfloat16(sizes, bf16_streams):
    from speed import kernels

    model = shaken(bf16_streams=bf16_streams, **sizes).cuda()
    exact = GPT(replace(model.config, bf16_streams=False)).double().cuda()
    exact.load_state_dict(model.state_dict())
    idx, targets = torch.randint(0, 31, (2, 5, model.config.block_size), device='cuda')
    outputs, gradients = loss_and_gradients(exact, exact, idx, targets)
    fast = kernels.as_fast(model)
    with torch.autocast('cuda', torch.bfloat16):
        (plain, plain_gradients), (found, found_gradients) = (
            loss_and_gradients(compiled(m) if model.config.n_embd == 768 else m, model, idx, targets)
            for m in (model, fast)
        )
        plain_gates, found_gates = commit_gates(model, idx), commit_gates(fast, idx)
    for found, slow, right in (
        (found[0], plain[0], outputs[0]),
        (found_gates, plain_gates, commit_gates(exact, idx)),
    ):
        assert error(found, right) < 1.5 * error(slow, right) + 1e-5
    every = lambda some: torch.cat([some[name].flatten() for name in gradients])
    assert error(every(found_gradients), every(gradients)) < 1.5 * error(
        every(plain_gradients), every(gradients)
    )


@pytest.mark.gpu
@pytest.mark.parametrize('bf16_streams', [False, True])
def test_on_a_gpu_the_160m_ledger_is_recognized_and_runs_through_the_kernels(bf16_streams):
    from speed import kernels

    assert kernels.fast(
        shaken(n_embd=768, n_head=12, block_size=16, gate_rank=64, bf16_streams=bf16_streams).cuda()
    )
