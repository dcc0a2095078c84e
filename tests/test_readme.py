"""The README keeps its word: its examples work, its numbers are those of results/, and it is short."""

import re
from pathlib import Path

import torch
from results_numbers import without_source
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()


def block_after(mark):
    return re.search(rf'^<!-- {mark} -->\n```\w+\n(.*?)^```', README, re.M | re.S).group(1)


class PlainGPT(nn.Module):
    """A small GPT of plain torch layers, which knows nothing of this repository."""

    def __init__(self, d=16):
        super().__init__()
        self.embedding = nn.Embedding(100, d)
        layer = dict(d_model=d, nhead=2, dim_feedforward=4 * d, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(3))
        self.head = nn.Linear(d, 100)

    def forward(self, idx):
        x = self.embedding(idx)
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.head(x)


def test_the_example_in_python_measures_a_model_of_plain_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {'torch': torch, 'model': PlainGPT().eval()}
    exec(block_after('example'), names)
    assert len(names['streams']['x']['sublayers']) == 3
    assert 'fixed-dimension ratio' in capsys.readouterr().out
    assert (tmp_path / 'profile.png').read_bytes().startswith(b'\x89PNG')


def test_the_arm_that_the_readme_shows_is_the_core_of_its_file():
    shown = re.search(r'```python\n(class Residual.*?)^```', README, re.M | re.S).group(1)
    source = (ROOT / 'arms/no_erase.py').read_text()
    assert all(line in source for line in shown.splitlines())


def test_every_number_stands_in_the_file_that_its_section_names():
    assert without_source(README) == []


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r'\]\(([^)#]+)\)', README):
        assert target.startswith('http') or (ROOT / target).exists(), target


def test_every_section_that_the_readme_links_is_there():
    for file, anchor in re.findall(r'\]\(([^)#]*)#([\w-]+)\)', README):
        text = (ROOT / (file or 'README.md')).read_text()
        headings = [re.sub(r'[^\w\- ]', '', line.lstrip('# ').lower()) for line in text.splitlines()]
        assert anchor in [heading.replace(' ', '-') for heading in headings], anchor


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.split()) <= 1500 and len(README.encode()) <= 12_000
    assert max(map(len, README.splitlines())) <= 110


def test_ci_calls_the_readmes_commands_as_written():
    assert block_after('tests').strip().endswith('-m pytest')
    assert all(line.endswith('\\') for line in block_after('demo').strip().splitlines()[:-1])
    assert 'command_of tests' in (ROOT / '.ci/run').read_text()
