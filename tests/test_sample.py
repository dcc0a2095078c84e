"""Text from a checkpoint."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.loader import encoding
from studies import sample

pytestmark = pytest.mark.usefixtures('one_thread')
EOT = 256


def counting(idx):
    """A model that is sure of the next number: the logits of 1 + the last id."""
    logits = torch.zeros(*idx.shape, 257)
    return logits.scatter_(2, (idx + 1).clamp(max=EOT)[..., None], 50.0)


def continued(model, prompt, length=5, block_size=8, temperature=1.0, top_k=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(
        sample.sample(model, torch.tensor([prompt]), length, block_size, EOT, temperature, top_k, generator)
    )


def test_each_token_is_drawn_after_those_before():
    assert continued(counting, [10]) == [11, 12, 13, 14, 15]


def test_a_sample_ends_at_the_end_of_text():
    assert continued(counting, [253]) == [254, 255]


def test_a_model_reads_no_more_than_its_block_size():
    lengths = []

    def model(idx):
        lengths.append(idx.shape[1])
        return counting(idx)

    continued(model, [1, 2, 3], length=8, block_size=4)
    assert lengths == [3, 4, 4, 4, 4, 4, 4, 4]


def test_tokens_are_drawn_with_the_softmax_over_the_temperature_among_the_best():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [sample.draw(logits, 0.5, 3, generator) for _ in range(4000)]
    share = np.bincount(drawn, minlength=4) / 4000
    expected = np.exp(np.array([4.0, 2.0, 0.0])) / np.exp(np.array([4.0, 2.0, 0.0])).sum()
    assert share[3] == 0 and np.abs(share[:3] - expected).max() < 0.03


def test_temperature_zero_takes_the_most_probable():
    assert sample.draw(torch.tensor([0.0, 3.0, 2.9]), 0, 200, None) == 1


def test_one_seed_gives_one_text():
    def model(idx):
        return torch.zeros(*idx.shape, 257)

    assert continued(model, [1], seed=4) == continued(model, [1], seed=4) != continued(model, [1], seed=5)


@pytest.fixture
def opened(monkeypatch):
    """A run whose model counts, in the place of a checkpoint."""
    tokens = SimpleNamespace(block_size=16, first_token=None)
    run = SimpleNamespace(
        name='counter',
        iter_num=3,
        model=counting,
        tokens=tokens,
        meta={'eot': EOT},
        encoding=encoding('bytes'),
    )
    monkeypatch.setattr(sample, 'open_runs', lambda args: [run])
    return run


def test_a_document_begins_after_an_end_of_text(opened):
    assert sample.prompt_ids(opened, 'ab').tolist() == [[EOT, 97, 98]]
    opened.tokens.first_token = 7
    assert sample.prompt_ids(opened, 'ab').tolist() == [[7, 97, 98]]


def test_the_prompt_and_its_continuations_are_printed(opened, tmp_path, capsys):
    (tmp_path / 'opening.txt').write_text('abc')
    flags = ['--ckpt=any', '--length=3', '--samples=2', '--device=cpu']
    for prompt in ('abc', f'FILE:{tmp_path}/opening.txt'):
        sample.main([*flags, f'--prompt={prompt}'])
        assert capsys.readouterr().out.splitlines() == [
            '---- counter, iteration 3, sample 1',
            'abcdef',
            '---- counter, iteration 3, sample 2',
            'abcdef',
        ]


@pytest.mark.parametrize(
    'flag, expected',
    [
        ('--temperature=-1', '--temperature is -1.0: expected 0 or more'),
        ('--temperature=nan', '--temperature is nan'),
        ('--samples=0', '--samples is 0: expected at least 1'),
        ('--prompt=FILE:nowhere.txt', 'cannot read nowhere.txt as text'),
    ],
)
def test_a_mistake_ends_in_a_sentence(opened, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        sample.main(['--ckpt=any', '--device=cpu', flag])
