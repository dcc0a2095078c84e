"""The README keeps its word: its example works and what it links is there."""

import re
from pathlib import Path

import torch

import model
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()


def block_after(mark):
    return re.search(rf'^<!-- {mark} -->\n```\w+\n(.*?)^```', README, re.M | re.S).group(1)


def test_the_example_of_a_new_residual_operator_trains_as_it_stands(monkeypatch):
    monkeypatch.setattr(model, 'RESIDUALS', dict(model.RESIDUALS))
    exec(block_after('example'), vars(model) | {'RESIDUALS': model.RESIDUALS})
    torch.manual_seed(0)
    net = GPT(
        GPTConfig(
            n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11, gate_rank=2, residual='no_erase'
        )
    )
    x = torch.randint(11, (4, 8))
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for _ in range(20):
        objective, loss, _ = net(x, x)
        objective.backward()
        assert all(p.grad is not None for p in net.parameters())  # as DDP insists
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r'\]\(([^)#]+)\)', README):
        assert target.startswith('http') or (ROOT / target).exists(), target


def test_ci_calls_the_readmes_commands_as_written():
    assert block_after('tests').strip().endswith('-m pytest') and block_after('demo').count('\n') == 1
    assert 'command_of tests' in (ROOT / '.ci/run').read_text()
