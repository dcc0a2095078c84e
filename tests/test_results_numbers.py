"""The helper that holds the numbers of a README to the files that it names."""

import json

import pytest
import results_numbers
from results_numbers import is_measurement, numbers_in, parsed, sections_of, stands_among, without_source


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with two files of results."""
    (tmp_path / 'results').mkdir()
    report = {'loss': {'value': 1.28529, 'low': -0.0149}, 'rate': [445012.3], 'share': 0.1249, 'yes': True}
    (tmp_path / 'results/a.json').write_text(json.dumps(report))
    text = '# Results\n\n17.5\n\n## One, first\n\n| x | 43.6 [43, 44.2] |\n\n## Two\n\n99.25\n'
    (tmp_path / 'results/README.md').write_text(text)
    monkeypatch.setattr(results_numbers, 'ROOT', tmp_path)
    results_numbers.values_of.cache_clear()
    yield tmp_path
    results_numbers.values_of.cache_clear()


def test_numbers_of_a_text_are_those_of_its_prose_and_tables():
    prose = 'At 160M, 1.06 to 1,024 and −0.25 or 12%.\n'
    text = prose + '```\n77\n```\n`88` [x](a/99.png) arXiv 2402.17762\n| 3e-4 |'
    assert numbers_in(text) == ['1.06', '1,024', '−0.25', '12%', '3e-4']


@pytest.mark.parametrize(
    'number, value, places',
    (('12.30', 12.3, -2), ('1,024', 1024, 0), ('−0.25', -0.25, -2), ('3e-4', 3e-4, -4), ('12%', 12, 0)),
)
def test_a_number_says_how_far_it_is_rounded(number, value, places):
    assert parsed(number) == (value, places)


def test_numbers_of_one_or_two_digits_are_words():
    assert [is_measurement(x) for x in ('3', '24', '144', '0.5', '7%', '3e-4')] == [False, False] + [True] * 4


def test_a_section_ends_at_the_next_heading_and_code_has_none():
    text = 'a\n# One\nb\n```\n# no heading\n```\n## Two\nc\n'
    assert {heading: below.strip() for heading, below in sections_of(text).items()} == {
        '': 'a',
        'One': 'b',
        'Two': 'c',
    }


@pytest.mark.parametrize('number', ('1.285', '1.29', '0.015', '+0.01', '445', '445,012', '12%', '12.5%'))
def test_a_number_stands_where_it_is_the_value_rounded(number):
    assert stands_among(number, {1.28529, -0.0149, 445012.3, 0.1249})


@pytest.mark.parametrize('number', ('1.286', '1.2', '0.016', '446', '13%', '128.6%'))
def test_another_number_does_not(number):
    assert not stands_among(number, {1.28529, -0.0149, 445012.3, 0.1249})


def test_numbers_are_looked_for_in_the_files_that_their_section_names(root):
    assert without_source('# A\nLoss 1.285, `results/a.json`.\n') == []
    assert without_source('# A\nLoss 1.275, `results/a.json`.\n') == [('A', '1.275')]
    assert without_source('# A\nLoss 1.285.\n# B\n[17.5](results/README.md)\n') == []
    assert without_source('# A\n17.5 in `results/a.json`\n') == [('A', '17.5')]


def test_a_link_to_a_section_of_a_readme_means_that_section_alone(root):
    link = '[table](results/README.md#one-first)'
    assert without_source(f'# A\n43.6 {link}\n') == []
    assert without_source(f'# A\n99.25 {link}\n') == [('A', '99.25')]
    with pytest.raises(ValueError, match='no heading three'):
        without_source('# A\n1.25 (results/README.md#three)\n')
