"""
What every token of a window is, told by rule: its class, and its place in lines of Python source or in
English sentences.

    classify(ids, encoding, language)     the class of each token: keyword, name, … or function word, …
    structure(ids, encoding, language)    where it stands: brackets and lines, or sentences and paragraphs

- The language of a data set is told from its meta.json: Python for what data/pysource makes, English for
  all else.
- Documents are separated by the end-of-text token and read one by one. A window starts and ends anywhere,
  so that its first document may lack its beginning, and its last one its end.
- A token takes the class of its first byte that is not blank. A token of blanks alone is a line end if it
  holds one, else white space.
- A tokenizer may split a word into several ids. Words are therefore joined across tokens before they are
  looked up, and all tokens of a word have its class. A word that the edge of the window cuts is looked up
  as it stands.

data/python_source.py and data/english.py read the text; here it is divided into documents and brought back
to the tokens.
"""

import re
from dataclasses import dataclass

import numpy as np

from data import english, python_source
from data.loader import UserError

CLASSES = {'python': python_source.CLASSES, 'english': english.CLASSES}
READERS = {'python': python_source.read, 'english': english.read}


def language_of(meta, tokens):
    """Returns 'python' for what data/pysource makes and for files that end in .py, and 'english' for all
    else.

    meta: the data set's meta.json. tokens: its Tokens, whose folder tells where the meta.json does not.
    """
    if 'source' in meta:
        is_python = str(meta['source']).startswith('Python ')
    else:
        is_source = all(path.suffix == '.py' for path in tokens.paths)
        is_python = is_source or tokens.path.parent.name.startswith('pysource')
    return 'python' if is_python else 'english'


@dataclass
class Window:
    """A window of T tokens, by the bytes of its text. The readers give the lower four by character.

    first: (T + 1,) the first byte of each token, and the number of bytes.
    is_end_of_text: (T,) bool.
    blank, newline: (bytes,) bool.
    kind: (bytes,) the place of each byte's class in CLASSES.
    values: {name: (bytes,)} what else is said of each byte.
    starts: {name: (bytes,) bool} true at the first byte of what begins; of the readers, a list of characters.
    ends: {name: (bytes,) bool} true at the last byte of what ends; of the readers, a list of characters.
    """

    first: np.ndarray
    is_end_of_text: np.ndarray
    kind: np.ndarray
    blank: np.ndarray
    newline: np.ndarray
    values: dict
    starts: dict
    ends: dict

    def first_byte(self, flags):
        """flags: (bytes,) bool.

        Returns (T,): the first byte of each token that has the flag, −1 where none has.
        """
        places = np.append(np.flatnonzero(flags), len(flags))
        place = places[places.searchsorted(self.first[:-1])]
        return np.where(place < self.first[1:], place, -1)

    def holds(self, flags):
        """flags: (bytes,) bool. Returns (T,) bool: does any byte of the token have the flag?"""
        return self.first_byte(flags) >= 0

    def at_tokens(self, column):
        """column: (bytes,).

        Returns (T,): its value at each token's first byte that is not blank, or else at its first; 0 for an
        end of text.
        """
        place = self.first_byte(~self.blank)
        place = np.where(place < 0, self.first[:-1], place)
        return np.where(self.is_end_of_text, 0, np.append(column, 0)[place])


class TokenizerBytes:
    """The bytes of the tokens of a tokenizer of transformers, under the names that tiktoken gives them.

    Its tokens are strings: of characters that stand for bytes each (byte-level BPE, which marks a blank as
    Ġ), or of text in which ▁ is a blank and <0x0A> a byte (SentencePiece).
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        self.eot_token = tokenizer.eos_token_id
        self.special_ids = set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab()
        has_sentencepiece_blank = any(token.startswith('▁') for token in vocabulary)
        self.is_byte_level = not has_sentencepiece_blank and any('Ġ' in token for token in vocabulary)
        # Bytes that are no printable character of Latin-1 are written as the characters from 256 on.
        is_printable = [33 <= byte <= 126 or 161 <= byte <= 255 and byte != 173 for byte in range(256)]
        others = [byte for byte in range(256) if not is_printable[byte]]
        self.byte_of = {chr(byte): byte for byte in range(256) if is_printable[byte]}
        self.byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}

    def decode_single_token_bytes(self, i):
        token = self.tokenizer.convert_ids_to_tokens(i)
        if token is None:
            raise KeyError(i)
        if self.is_byte_level and all(character in self.byte_of for character in token):
            return bytes(self.byte_of[character] for character in token)
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes([int(token[3:5], 16)])
        return token.replace('▁', ' ').encode()


def special_tokens(encoding):
    """Returns the ids of the tokens that are no text: the end of text, and what else a tokenizer of
    transformers has.
    """
    return getattr(encoding, 'special_ids', {encoding.eot_token})


def token_bytes(ids, encoding):
    """Returns the bytes of each token, none for a special one."""
    special = special_tokens(encoding)
    try:
        return [b'' if i in special else encoding.decode_single_token_bytes(i) for i in ids]
    except KeyError as error:
        raise UserError(
            f'token id {error.args[0]} is not one of the tokenizer {encoding.name}: '
            'the data were made with another'
        ) from None


def read_document(text, reader, begins_document, ends_document):
    """Returns what a Window says of the bytes of one document: {(part, name): (bytes,)}."""
    reading = reader(text, begins_document, ends_document)
    width = [len(character.encode('utf-8', 'surrogateescape')) for character in text]
    first = np.cumsum([0, *width])

    def to_bytes(column):
        return np.repeat(column, width)

    def flags(places):
        column = np.zeros(first[-1], dtype=bool)
        column[places] = True
        return column

    columns = {
        ('kind', ''): to_bytes(reading['kind']),
        ('blank', ''): to_bytes(np.array([character.isspace() for character in text], dtype=bool)),
        ('newline', ''): to_bytes(np.array([character == '\n' for character in text], dtype=bool)),
    }
    for name, column in reading['values'].items():
        columns['values', name] = to_bytes(column)
    for name, characters in reading['starts'].items():
        columns['starts', name] = flags(first[np.array(characters, dtype=np.int64)])
    for name, characters in reading['ends'].items():
        columns['ends', name] = flags(first[np.array(characters, dtype=np.int64) + 1] - 1)
    return columns


def read_window(ids, encoding, language, starts_with_special=False):
    """ids: (T,) token ids of one window. Returns its Window.

    starts_with_special: whether the first token was put before a window that begins anywhere, so that no
    document begins after it.
    """
    if language not in CLASSES:
        raise UserError(f"language is '{language}': expected one of {', '.join(CLASSES)}")
    ids = np.asarray(ids).tolist()
    pieces = token_bytes(ids, encoding)
    special = special_tokens(encoding)
    is_end_of_text = np.array([i in special for i in ids], dtype=bool)
    edges = [-1, *np.flatnonzero(is_end_of_text), len(ids)]
    first_whole = 2 if starts_with_special else 1
    documents = []
    for number, (low, high) in enumerate(zip(edges, edges[1:])):
        # A character that the window's edge cuts becomes surrogates, a byte each.
        text = b''.join(pieces[low + 1 : high]).decode('utf-8', 'surrogateescape')
        begins_document, ends_document = number >= first_whole, high < len(ids)
        documents.append(read_document(text, READERS[language], begins_document, ends_document))

    columns = {'values': {}, 'starts': {}, 'ends': {}}
    for part, name in documents[0]:
        joined = np.concatenate([document[part, name] for document in documents])
        if name:
            columns[part][name] = joined
        else:
            columns[part] = joined
    return Window(np.cumsum([0, *map(len, pieces)]), is_end_of_text, **columns)


def classify(ids, encoding, language, starts_with_special=False):
    """ids: (T,) token ids of one window. Returns (T,) int64: the place of each token's class in
    CLASSES[language].
    """
    return classes_in(read_window(ids, encoding, language, starts_with_special), language)


def classes_in(window, language):
    """As classify, of a Window."""
    place = CLASSES[language].index
    of_blanks = np.where(window.holds(window.newline), place('line end'), place('white space'))
    kind = np.where(window.holds(~window.blank), window.at_tokens(window.kind), of_blanks)
    return np.where(window.is_end_of_text, place('end of text'), kind)


def structure(ids, encoding, language='python', starts_with_special=False):
    """ids: (T,) token ids of one window. Returns {name: (T,)}, for Python:

    line_start: bool, whether the token holds the first byte of a line that is not blank.
    bracket_depth: how many brackets are open before it as far as the window shows, 3 for 3 and more.
    inside: 0 code, 1 string, 2 comment, at its first byte that is not blank.
    since_line: tokens since the last one that held a line end, 0 for the first; or else since the document
        or the window began.

    And for English:

    sentence_start, paragraph_start: bool, whether the token holds the first character, quotes included.
    sentence_end: bool, whether it holds the last character of a sentence, quotes included.
    word_in_sentence: how many words and numbers of its sentence stand before the token's word, as far as
        the window shows.
    capitalized: bool, whether the token's word, of which it may be any part, begins with a capital letter.
    since_line: tokens since the last one that held the end of a sentence, or of a line outside of sentences.

    What the window cuts has no start and no end. An end of text is 0 and False.
    """
    return structure_in(read_window(ids, encoding, language, starts_with_special), language)


def structure_in(window, language):
    """As structure, of a Window."""
    found = {name: window.holds(flags) for name, flags in window.starts.items()}
    if language == 'python':
        found['bracket_depth'] = np.minimum(window.at_tokens(window.values['depth']), 3)
        found['inside'] = window.at_tokens(window.values['inside'])
    else:
        found['sentence_end'] = window.holds(window.ends['sentence_end'])
        found['word_in_sentence'] = window.at_tokens(window.values['word_in_sentence'])
        found['capitalized'] = window.at_tokens(window.values['capitalized']).astype(bool)
    found['since_line'] = tokens_since(window.holds(window.ends['boundary']), window.is_end_of_text)
    return found


def tokens_since(ends, is_end_of_text):
    """ends, is_end_of_text: (T,) bool.

    Returns (T,) int64: the tokens since the last end, 0 for the one after it and for an end of text.
    """
    since = np.zeros(len(ends), dtype=np.int64)
    for i in range(1, len(ends)):
        if not (ends[i - 1] or is_end_of_text[i - 1] or is_end_of_text[i]):
            since[i] = since[i - 1] + 1
    return since


def describe(tokens, starts, encoding, language):
    """Returns the classes of the tokens of the windows at `starts` and of the one that each predicts last,
    (N, T + 1), and {name: (N, T + 1)}, what `structure` says of them.

    tokens: Tokens, or Texts of a pretrained model. encoding: their tokenizer, of tiktoken or of transformers.
    """
    if not hasattr(encoding, 'decode_single_token_bytes'):
        encoding = TokenizerBytes(encoding)
    starts_with_special = tokens.first_token is not None
    kinds, found = [], []
    for start in starts:
        idx, targets = tokens.windows([start])
        ids = np.append(idx[0].numpy(), targets[0, -1])
        window = read_window(ids, encoding, language, starts_with_special)
        kinds.append(classes_in(window, language))
        found.append(structure_in(window, language))
    return np.stack(kinds), {name: np.stack([window[name] for window in found]) for name in found[0]}
