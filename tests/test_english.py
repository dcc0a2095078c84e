"""The specification of data/english.py: sentences, paragraphs and words, told by rule and labelled here
by hand.
"""

import numpy as np
import pytest
from test_classes import BYTES, ids_of
from test_data import needs_gpt2

from data.classes import CLASSES, classify, structure
from data.english import FUNCTION_WORDS, SentenceReader
from data.loader import encoding


def sentences(text):
    reader = SentenceReader(text)
    return [text[first:end] for first, end in reader.sentences]


@pytest.mark.parametrize(
    'text',
    [
        'It rained.| We left.| Why?| Because!| So what?!| Go on.',
        'Mr. Smith met Dr. J. R. R. Tolkien and Mrs. O. Wilde.| They talked.',
        'It was 3.14 on No. 5, vol. II, p. 7, of Jan. 3, 1999.| Then 1,000.50 more.',
        'No.| Never.| See p. 12.',
        'We met at 5 p.m. and left at 9 a.m. on foot.| The U.S. Army stayed in the U.S.| They slept.',
        'Pears, plums, etc. were sold by Jones & Co. in town.| Apples, etc.| The rest was free.',
        'So did I.| Then I. Newton came, and Sir I. Newton left.',
        '"Go!" she said.| "Why?" he asked.| "Because," she said.',
        'He said, "Go home."| She went.| "Well."| “Yes.”| ‘No.’',
        '(See above.)| Then we (all of us!) went (at last).',
        'Wait... what?| Well... I am here.| It ended…| Then it began . . .| So.',
        'What!—cried he.| "Oh!" — cried she.',
        'As shown in e.g. Smith et al. (2020), cf. Jones, it holds.[3]| But it may not.',
        '1. Methods are these.| Then more.',
        '2.1. The first.',
        'IV. The fourth.',
        'She turned _pale_.| *He did not.*| # Nor I.',
        'Visit example.com or v2.0 of it.| Now.',
    ],
)
def test_a_sentence_ends_where_a_reader_would_end_it(text):
    assert sentences(text.replace('|', '')) == text.split('| ')


@pytest.mark.parametrize(
    'text, expected',
    [
        (
            'A Heading\n\nThe first, and\nthe last.\n\n\nNext',
            ['A Heading', 'The first, and\nthe last.', 'Next'],
        ),
        ('CHAPTER I\nIt begins.\nIt ends.', ['CHAPTER I', 'It begins.', 'It ends.']),
        ('He met Mr.\n\nSmith left.', ['He met Mr.', 'Smith left.']),
        ('To buy:\n- milk\n- white bread\n2) eggs', ['To buy:', '- milk', '- white bread', '2) eggs']),
        (
            'He sang:\nRoses are red,\nViolets are blue\nSo',
            ['He sang:\nRoses are red,\nViolets are blue', 'So'],
        ),
    ],
)
def test_a_line_ends_a_sentence_if_it_is_a_heading_an_item_or_the_last_of_a_paragraph(text, expected):
    assert sentences(text) == expected


def test_a_full_line_of_a_text_that_is_wrapped_ends_no_sentence_but_one_of_a_text_of_long_lines_does():
    line = 'The lines of this text were all broken at seventy characters, as by'
    assert sentences(f'{line}\nHand. It goes on.') == [f'{line}\nHand.', 'It goes on.']
    assert sentences(f'{line}\nHand.\nA {"long " * 30}end.') == [line, 'Hand.', f'A {"long " * 30}end.']


@pytest.mark.parametrize(
    'text, expected',
    [
        ('One. Two.\n\nThree.\nFour.', ['One.', 'Three.']),
        (f'One.\nTwo {"words " * 20}end.\nThree. Four.', ['One.', f'Two {"words " * 20}end.', 'Three.']),
        (f'One,\ntwo.\n\nThree {"words " * 20}end.', ['One,\ntwo.', f'Three {"words " * 20}end.']),
    ],
)
def test_a_paragraph_starts_after_a_blank_line_and_after_every_line_of_a_text_that_is_not_wrapped(
    text, expected
):
    reader = SentenceReader(text)
    end = dict(reader.sentences)
    assert [text[first : end[first]] for first in reader.paragraphs] == expected


def described(text):
    """Returns what structure says of each byte, a digit for each."""
    found = structure(ids_of(text), BYTES, 'english')
    return {name: ''.join(str(int(value)) for value in values) for name, values in found.items()}


def test_a_document_is_labelled_as_by_hand():
    assert described('⏹Hi. "A 1.5!" So\n\nIt⏹') == {
        #                   ⏹Hi. "A 1.5!" So//It⏹
        'sentence_start': '010001000000001000100',
        'paragraph_start': '010000000000000000100',
        'sentence_end': '000100000000100100010',
        'word_in_sentence': '000110011112220011000',
        'capitalized': '011000100000001100110',
        'since_line': '001201234567801200010',
    }


def test_what_the_window_cuts_has_no_start_and_no_end():
    assert described('ld it. We are. The') | {'capitalized': '', 'since_line': ''} == {
        #                   ld it. We are. The
        'sentence_start': '000000010000000100',
        'paragraph_start': '000000000000000000',
        'sentence_end': '000001000000010000',
        'word_in_sentence': '001112200111122000',
        'capitalized': '',
        'since_line': '',
    }


def test_a_blank_line_at_the_edge_of_a_window_says_that_a_paragraph_starts_or_a_sentence_ends():
    found = described('\n\nSo we\n\n')
    assert found['sentence_start'] == found['paragraph_start'] == '001000000'
    assert found['sentence_end'] == '000000100'


@pytest.mark.parametrize('text', ['Mr. Jones', 'etc. Jones', 'X. Jones', 'a.m. Jones', '12. Jones'])
def test_a_word_that_the_window_may_have_cut_is_no_abbreviation_and_no_number_of_a_list(text):
    assert described(text)['sentence_end'].index('1') == text.index(' ') - 1
    assert '1' not in described(f'⏹{text}')['sentence_end']


def test_a_line_break_within_a_sentence_is_a_line_end_but_ends_no_sentence():
    text = 'He sang,\nand we'
    assert described(f'⏹{text}⏹')['sentence_end'].index('1') == len(text)
    kinds = [CLASSES['english'][kind] for kind in classify(ids_of(text), BYTES, 'english')]
    assert kinds[text.index('\n')] == 'line end'


def test_documents_are_read_apart():
    found = described('We⏹So⏹It')
    assert found['sentence_start'] == '00010010'
    assert found['sentence_end'] == '01001000'
    assert found['since_line'] == '01001001'


@needs_gpt2
def test_all_tokens_of_a_word_take_what_is_said_of_the_word():
    bpe = encoding('gpt2')
    text = 'Once I met "Theodore Unforgettably". He left'
    ids = np.array([bpe.eot_token, *bpe.encode_ordinary(text)])
    found = structure(ids, bpe, 'english')
    pieces = [
        'Once',
        ' I',
        ' met',
        ' "',
        'The',
        'odore',
        ' Un',
        'for',
        'get',
        't',
        'ably',
        '".',
        ' He',
        ' left',
    ]
    assert [bpe.decode([i]) for i in ids[1:]] == pieces
    assert found['word_in_sentence'].tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 0, 1]
    assert found['capitalized'].tolist() == [c == '1' for c in '011001111111010']
    assert np.flatnonzero(found['sentence_start']).tolist() == [1, 13]
    assert np.flatnonzero(found['sentence_end']).tolist() == [12]


def test_quotes_of_several_bytes_begin_and_end_a_sentence_once():
    text = '⏹“Go.” So'
    found = structure(ids_of(text), BYTES, 'english')
    assert np.flatnonzero(found['sentence_start']).tolist() == [1, 11]
    assert np.flatnonzero(found['sentence_end']).tolist() == [9]


def test_any_bytes_can_be_read():
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 257, 300)
        assert all(len(column) == 300 for column in structure(ids, BYTES, 'english').values())
    assert all(len(column) == 0 for column in structure([], BYTES, 'english').values())


def test_the_function_words_are_lower_case_and_closed():
    assert all(word == word.lower() for word in FUNCTION_WORDS)
    assert 200 < len(FUNCTION_WORDS) < 350
    assert not {'dog', 'run', 'good', 'quickly'} & FUNCTION_WORDS
