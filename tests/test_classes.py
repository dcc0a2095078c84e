"""The specification of data/classes.py and data/python_source.py.

Lines are labelled by hand, byte by byte and in GPT-2's tokens; whole files are held to the standard
library's tokenize.
"""

import importlib.util
import keyword
import tokenize
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import needs_gpt2

from data.classes import CLASSES, TokenizerBytes, classify, describe, language_of, structure
from data.loader import UserError, encoding

BYTES, EOT = encoding('bytes'), 256
LETTER = {
    'k': 'keyword',
    'o': 'operator',
    'n': 'name',
    '1': 'number',
    's': 'string',
    'c': 'comment',
    '.': 'white space',
    '/': 'line end',
    'e': 'end of text',
    'f': 'function word',
    'w': 'content word',
    'p': 'punctuation',
}


def ids_of(text):
    """Bytes as ids; ⏹ stands for the end of text."""
    return [i for part in text.split('⏹') for i in (EOT, *part.encode())][1:]


def letters(classes, language):
    """Classes as a string, a letter each."""
    inverse = {name: letter for letter, name in LETTER.items()}
    return ''.join(inverse[CLASSES[language][c]] for c in classes)


@pytest.mark.parametrize(
    'text, expected',
    [
        ('if x1 >= 0x1F: # why\n', 'kk.nn.oo.1111o.c.ccc/'),
        ('def f(a, b=1.5e-3):\n', 'kkk.nono.no111111oo/'),
        ('x = rb"a b" + f\'{y}\'\n', 'n.o.ssss.ss.o.ssssss/'),
        ('lambda: None if _ else 2j\n', 'kkkkkko.kkkk.kk.n.kkkk.11/'),
        ('match x.y[-1]: pass\n', 'nnnnn.nonoo1oo.kkkk/'),
        ('s = """a\n  b"""\n', 'n.o.ssss/..ssss/'),
        ("t = 'it\\'s' 'two'\n", 'n.o.sssssss.sssss/'),
        ('α = "β" # γ\n', 'nn.o.ssss.c.cc/'),
        ('a = 1 + \\\n    2\n', 'n.o.1.o../....1/'),
        ('@d\nasync def g(): ...\n', 'on/kkkkk.kkk.nooo.ooo/'),
    ],
)
def test_python_lines_labelled_by_hand(text, expected):
    assert letters(classify(ids_of('⏹' + text)[1:], BYTES, 'python'), 'python') == expected


@pytest.mark.parametrize(
    'text, expected',
    [
        ("The cat, isn't it?\n", 'fff.wwwp.fffff.ffp/'),
        ('He paid $1,000.50 in 1999.', 'ff.wwww.p11111111.ff.1111p'),
        ("It's we've Kim's", 'ffff.fffff.wwwww'),
        ("“Don’t,” said O'Neil’s dog", 'ppp' + 'f' * 7 + 'pppp.wwww.wwwwwwwwww.www'),
        ('café_naïve 3rd A.I.\n\n', 'wwwwwpwwwwww.111.fpfp//'),
    ],
)
def test_english_lines_labelled_by_hand(text, expected):
    assert letters(classify(ids_of(text), BYTES, 'english'), 'english') == expected


@needs_gpt2
@pytest.mark.parametrize(
    'language, tokens, expected',
    [
        ('python', ['def', ' run', '_', 'all', '(', 'self', '):', '\n'], 'knnnono/'),
        # Tokens that straddle two: the first byte counts.
        ('python', ['print', '("', 'hello', ' world', '")', '\n'], 'nosss/'),
        ('python', ['x', ' =', ' not', ' y', ' ', ' ', ' #', ' not', ' in'], 'nokn..ccc'),
        ('english', ['She', ' was', ' un', 'for', 'getting', 'ly', ',', ' in', ' 1984', '.'], 'ffwwwwpf1p'),
        ('english', ['I', ' don', "'t", ' like', ' The', 'odore', "'s", ' hat'], 'ffffwwww'),
    ],
)
def test_gpt2_tokens_labelled_by_hand(language, tokens, expected):
    bpe = encoding('gpt2')
    ids = [bpe.encode_single_token(text) for text in tokens]
    assert letters(classify(ids, bpe, language), language) == expected


def by_tokenize(text):
    """Returns the class of each character by tokenize, None for those that are in no token or that are blank.

    An f-string is one string: Python 3.12 takes it apart.
    """
    lines, classes, begun = [0, *np.cumsum([len(line) for line in StringIO(text)])], [None] * len(text), []
    kinds = {
        tokenize.OP: 'operator',
        tokenize.NUMBER: 'number',
        tokenize.STRING: 'string',
        tokenize.COMMENT: 'comment',
    }
    for token in tokenize.generate_tokens(StringIO(text).readline):
        low, high = (lines[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name == 'FSTRING_START':
            begun.append(low)
        if name == 'FSTRING_END':
            classes[begun[-1] : high] = ['string'] * (high - begun.pop())
        kind = kinds.get(token.type) or ('keyword' if keyword.iskeyword(token.string) else 'name') * (
            token.type == tokenize.NAME
        )
        if kind and not begun:
            classes[low:high] = [kind] * (high - low)
    return [None if character.isspace() else kind for character, kind in zip(text, classes)]


@pytest.fixture(scope='module')
def modules():
    """Source of the standard library with every kind of string, number and bracket in it."""
    return [
        Path(importlib.util.find_spec(name).origin).read_text().encode('ascii', 'replace').decode()
        for name in ('textwrap', 'shlex', 'fractions', 'colorsys', 'tokenize', 'string', 'csv')
    ]


def test_whole_files_are_read_as_tokenize_reads_them(modules):
    for text in modules:
        found, expected = classify([EOT, *text.encode()], BYTES, 'python')[1:], by_tokenize(text)
        assert [CLASSES['python'][c] for c, e in zip(found, expected) if e] == [e for e in expected if e]


def test_a_window_from_the_middle_of_a_file_is_read_as_the_whole_file(modules):
    right = []
    for text in modules:
        ids = np.array([EOT, *text.encode()])
        whole, inside = classify(ids, BYTES, 'python'), structure(ids, BYTES)['inside']
        for start in range(1, len(ids) - 1000, 1709):
            window = slice(start, start + 1000)
            right.append(
                (
                    (classify(ids[window], BYTES, 'python') == whole[window])
                    & (structure(ids[window], BYTES)['inside'] == inside[window])
                ).mean()
            )
    assert np.mean(right) > 0.97 and np.mean(np.array(right) == 1) > 0.75


@pytest.mark.parametrize(
    'text, expected',
    [
        ('lo world")\nx = 1\n', 'ss.sssssso/n.o.1/'),  # in a string
        ('the lazy dog it is\nx = 1\n', 'ccc.cccc.ccc.cc.cc/n.o.1/'),  # in a comment
        (
            'quick brown fox\nof it all.\n"""\nx = 1\n',
            'sssss.sssss.sss/ss.ss.ssss/sss/n.o.1/',
        ),  # in a string of several lines
        ("quick brown fox\nof it all.\n'''\nx = 1\n", 'sssss.sssss.sss/ss.ss.ssss/sss/n.o.1/'),
        ('= 1\nmatch x:\n', 'o.1/nnnnn.no/'),  # in code, with a soft keyword
        ('urn x + 1\n', 'nnn.n.o.1/'),  # in a word
        ('b: 2}, [x])\n', 'no.1oo.onoo/'),
    ],
)  # in brackets
def test_what_a_window_begins_in_is_told_from_its_lines(text, expected):
    assert letters(classify(ids_of(text), BYTES, 'python'), 'python') == expected


@pytest.mark.parametrize('language', CLASSES)
def test_documents_are_read_apart(language):
    parts = ['x = """the (unfinished', 'foo = (1\n', "it's 'bad", 'y = 2\n', '']
    joined = classify(ids_of('⏹'.join(['', *parts])), BYTES, language)
    alone = [classify([EOT, *part.encode()], BYTES, language) for part in parts]
    assert joined.tolist() == np.concatenate(alone).tolist()
    assert CLASSES[language][joined[0]] == 'end of text'


def test_a_document_begins_in_code_however_much_it_looks_like_a_comment():
    assert (
        letters(classify(ids_of('x⏹the lazy dog it is\n'), BYTES, 'python'), 'python')
        == 'nennn.nnnn.nnn.nn.kk/'
    )


def depths(text):
    """Returns the depth of brackets at each byte, a digit for each."""
    return ''.join(str(depth) for depth in structure(ids_of(text), BYTES)['bracket_depth'])


def test_a_document_that_ends_in_brackets_leaves_none_open_for_the_next():
    assert depths('f((x⏹y') == '001200'


def test_blanks_are_white_space_wherever_they_stand_and_structure_says_where():
    ids = ids_of('⏹x = " \t" # a\n')
    assert letters(classify(ids, BYTES, 'python'), 'python') == 'en.o.s..s.c.c/'
    assert structure(ids, BYTES)['inside'].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 0]


def test_brackets_lines_and_distances_of_a_window_labelled_by_hand():
    found = structure(ids_of('⏹a(b[\n {(c)}])\n\nd'), BYTES)
    assert {name: ''.join(str(int(v)) for v in values) for name, values in found.items()} == {
        #               ⏹a(b[/ {(c)}])//d
        'line_start': '01000001000000001',
        'bracket_depth': '00011222333321000',
        'inside': '0' * 17,
        'since_line': '00123401234567800',
    }


def test_closing_brackets_whose_opening_ones_were_not_seen_raise_what_is_before_them():
    assert depths('a, b]) + c\n') == '22222100000'


def test_a_closing_bracket_too_many_in_a_whole_document_changes_nothing():
    assert depths('⏹a)b(c') == '000001'


def test_a_statement_closes_brackets_that_were_left_open_by_mistake():
    assert depths('(x\nreturn y') == '01100000000'


def test_bytes_of_one_character_are_one_class_also_where_the_window_cuts_it():
    ids = [*'€'.encode()[1:], *' 5")\nx = "€'.encode(), *'€'.encode()[:2]]
    assert letters(classify(ids, BYTES, 'python'), 'python') == 'ss.sso/n.o.ssss' + 'ss'


@needs_gpt2
def test_both_tokenizers_give_a_byte_the_same_class_where_a_token_is_all_of_one(modules):
    bpe = encoding('gpt2')
    ids = bpe.encode_ordinary(modules[0])
    by_byte, place = classify([EOT, *modules[0].encode()], BYTES, 'python')[1:], 0
    for i, kind in zip(ids, classify([bpe.eot_token, *ids], bpe, 'python')[1:]):
        piece = bpe.decode_single_token_bytes(i)
        first = next((j for j in range(len(piece)) if not piece[j : j + 1].isspace()), 0)
        assert kind == by_byte[place + first] or piece.isspace()
        place += len(piece)


def test_an_empty_window_and_one_of_blanks_are_read():
    for language in CLASSES:
        assert classify([], BYTES, language).tolist() == []
        assert letters(classify(ids_of(' \n\n'), BYTES, language), language) == './/'


def test_any_bytes_can_be_read():
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 257, 300)
        for language in CLASSES:
            assert (
                len(classify(ids, BYTES, language))
                == len(structure(ids, BYTES, language)['since_line'])
                == 300
            )


@pytest.mark.parametrize(
    'meta, path, language',
    [
        ({'source': 'Python 3.11.7 standard library'}, 'data/mine/val.bin', 'python'),
        ({'source': 'text'}, 'data/pysource/val.bin', 'english'),
        ({}, 'data/pysource_demo/val.bin', 'python'),
        ({}, 'data/fineweb_edu/val.bin', 'english'),
        ({}, 'pysource/text/val.bin', 'english'),
        ({}, 'anything/model.py', 'python'),
        ({}, 'anything/novel.txt', 'english'),
    ],
)
def test_the_language_follows_from_the_dataset(meta, path, language):
    assert language_of(meta, SimpleNamespace(path=Path(path), paths=[Path(path)])) == language


def window_of(ids, first_token=None):
    """Tokens that have one window, of these ids."""
    window = torch.tensor([ids])
    windows = lambda starts: (window[:, :-1], window[:, 1:])  # noqa: E731
    return SimpleNamespace(windows=windows, first_token=first_token)


def test_a_token_that_stands_before_every_window_begins_no_document():
    ids = ids_of('⏹the lazy dog it is\nx = 1\n')
    after_document, _ = describe(window_of(ids), [0], BYTES, 'python')
    anywhere, found = describe(window_of(ids, first_token=EOT), [0], BYTES, 'python')
    assert letters(after_document[0], 'python').startswith('ennn.nnnn')
    assert letters(anywhere[0], 'python').startswith('eccc.cccc')
    assert found['line_start'][0].nonzero()[0].tolist() == [20]


class Characters:
    """A tokenizer of transformers, as far as classes need it. vocabulary: its tokens, by id."""

    name_or_path, eos_token_id, all_special_ids = 'characters', 0, [0, 1]

    def __init__(self, *vocabulary):
        self.vocabulary = vocabulary

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.vocabulary)}

    def convert_ids_to_tokens(self, i):
        return self.vocabulary[i] if i < len(self.vocabulary) else None


@pytest.mark.parametrize(
    'tokenizer',
    [
        Characters('</s>', '<s>', '▁The', '▁caf', 'é', '.', '<0x0A>', '▁5'),
        Characters('</s>', '<s>', 'ĠThe', 'Ġcaf', 'Ã©', '.', 'Ċ', 'Ġ5'),
    ],
    ids=['SentencePiece', 'byte-level BPE'],
)
def test_tokenizers_of_transformers_are_read_too(tokenizer):
    kinds, found = describe(window_of([1, 2, 3, 4, 5, 6, 7, 0]), [0], tokenizer, 'english')
    assert letters(kinds[0], 'english') == 'efwwp/1e'
    assert found['sentence_start'][0].tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    pieces = [TokenizerBytes(tokenizer).decode_single_token_bytes(i) for i in range(2, 8)]
    assert b''.join(pieces).decode() == ' The café.\n 5'


def test_an_id_that_the_tokenizer_lacks_and_an_unknown_language_are_refused():
    with pytest.raises(UserError, match='token id 300 is not one of the tokenizer bytes'):
        classify([300], BYTES, 'python')
    with pytest.raises(UserError, match="language is 'latin': expected one of python, english"):
        classify([1], BYTES, 'latin')
