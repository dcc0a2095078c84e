"""
What every token of a window is: a keyword, a name, a function word, white space; inside a string, at the start of a line.

A window starts and ends anywhere in a file: in a word, in a string, in brackets. The standard library's tokenize needs a file from
its beginning, stops at the first thing it cannot read, and stops elsewhere in Python 3.12 than in 3.11. So Python source is read here by
one regular expression that follows tokenize's rules and never stops, with `keyword` for the keywords; a test holds it to tokenize on whole files.
What a window begins in is not known either: code, a string, a comment? Each is tried, and the reading with the fewest implausible lines wins.

- Documents are separated by the end of text and read apart. All but a window's first begin in code, at the start of a line.
- A token takes the class of its first byte that is not blank; one of blanks alone is a line end if it holds one, and white space otherwise,
  in strings and comments too: `structure` says where it stands.
- Words are joined across tokens before they are looked up; one that the window's edge cuts is looked up as it stands.
- A string is a string from its prefix to its last quote, the expressions of an f-string included.
"""

import keyword
import re
from pathlib import Path

import numpy as np

from data.loader import UserError

CLASSES = {
    'python': (
        'keyword',
        'operator',
        'name',
        'number',
        'string',
        'comment',
        'white space',
        'line end',
        'end of text',
    ),
    'english': (
        'function word',
        'content word',
        'punctuation',
        'number',
        'white space',
        'line end',
        'end of text',
    ),
}
CODE, STRING, COMMENT = range(3)  # what structure's 'inside' says

KEYWORD, OPERATOR, NAME, NUMBER, STRING_LITERAL, COMMENT_TEXT, BLANK = range(7)  # places in CLASSES['python']
PYTHON = re.compile(
    r'''(?P<blank>[^\S\n]+|\\\r?\n)|(?P<newline>\n)|(?P<comment>\#[^\n]*)
    |(?i:[rbuft]|[bft]r|r[bft])?(?P<quote>\'\'\'|"""|'|")
    |(?P<number>(?:0[xX][\da-fA-F_]+|0[bBoO][\d_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?)[jJ]?)
    |(?P<name>[^\W\d]\w*)|(?P<operator>[\s\S])''',
    re.VERBOSE,
)
REST = {
    '#': re.compile(
        r'[^\n]*'
    ),  # what follows once a comment or a string has begun; a string that its line does not end, ends with it
    **{quote: re.compile(rf'(?:[^\\\n{quote}]|\\[\s\S])*(?P<end>{quote})?') for quote in '\'"'},
    **{quote * 3: re.compile(rf'(?:[^\\]|\\[\s\S]|\\\Z)*?(?:(?P<end>{quote * 3})|\Z)') for quote in '\'"'},
}
STATEMENTS = {
    'assert',
    'break',
    'class',
    'continue',
    'def',
    'del',
    'elif',
    'except',
    'finally',
    'global',
    'import',
    'nonlocal',
    'pass',
    'raise',
    'return',
    'try',
    'while',
    'with',
}  # where a line begins with one of them, no bracket is open
CODE_LINE = re.compile(
    r'(?!.*>>>).*[=(\[{]|\s*(class|def|elif|else|except|finally|for|from|if|import|pass|return|try|while|with)\b'
)
SOFT_KEYWORDS = {'case', 'match', 'type'}  # names, by keyword.iskeyword; a second name may follow

ENGLISH = re.compile(
    r"(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<number>\d+(?:[.,]\d+)*\w*)|\s+|(?P<punctuation>[^\w\s]+|_)"
)
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s)|\n""")  # abbreviations count too
FUNCTION_WORDS = set(
    """
    a an the this that these those some any no every each either neither all both half such another other others much many more most few fewer
    little less least several enough own same
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its itself they them
    their theirs themselves one ones who whom whose which what whoever whatever whichever someone somebody something anyone anybody anything everyone
    everybody everything nobody nothing none there here
    about above across after against along amid among around as at before behind below beneath beside besides between beyond by despite down during
    except for from in inside into like near of off on onto out outside over past per since through throughout till to toward towards under underneath
    until up upon via with within without
    am is are was were be been being do does did done doing have has had having can could may might must shall should will would ought
    can't won't shan't ain't cannot
    and but or nor so yet if unless because although though while whereas whether than when whenever where wherever why how lest once
    not too very also only just even ever never still already again then thus hence quite rather almost perhaps however therefore else
    """.split()
)


def language_of(dataset):
    """dataset: a data set's name or folder, or its meta.json as a dict. Python for what data/pysource makes, English for all else."""
    if isinstance(dataset, dict):
        return 'python' if str(dataset.get('source', '')).startswith('Python ') else 'english'
    return 'python' if Path(dataset).name.startswith('pysource') else 'english'


class Reading:
    """One document's characters, read: kind (n,) places in CLASSES, inside (n,), depth (n,) brackets open before each; cost: implausible lines."""

    def __init__(self, spans, cost):
        """spans: list of (length, kind, inside, depth)."""
        length, *columns = np.array(spans, dtype=np.int64).reshape(-1, 4).T
        self.kind, self.inside, self.depth = (np.repeat(column, length) for column in columns)
        self.cost = cost


def read_python(text, begins_in='', anchored=True):
    """text: Python source. begins_in: a quote or '#' if it starts in a string or a comment. anchored: it starts with no bracket open.
    Returns its Reading. A line costs 1 if it has two names side by side, a character that Python has no use for, or a string that its line
    should have ended; or if it lies in a string of several lines and could well be code."""
    spans, at, depth, line, odd = [], 0, 0, 0, set()
    before, fresh = (
        None,
        False,
    )  # the token before if it is a name, number or string; is this the first of its line?

    def close(kind, inside, match):
        nonlocal at
        spans.append((match.end() - at, kind, inside, depth))
        at = match.end()

    def lift():  # closing brackets whose opening ones were not seen raise all that is before them
        lowest = min([0, depth, *(span[3] for span in spans)])
        spans[:] = [(*span[:3], span[3] - lowest) for span in spans]

    quote = begins_in
    while at < len(text) or quote:
        if quote:
            first, match = at, REST[quote].match(text, at)
            close(
                COMMENT_TEXT if quote == '#' else STRING_LITERAL, COMMENT if quote == '#' else STRING, match
            )
            inner = text[first:at].split('\n')
            if len(quote) == 3:
                odd |= {
                    line + i
                    for i, part in enumerate(inner[1:-1], 1)
                    if CODE_LINE.match(part) and not read_python(part).cost
                }
            elif quote != '#' and not match['end'] and at < len(text):
                odd.add(line)
            before, fresh, line, quote = STRING_LITERAL, False, line + len(inner) - 1, ''
            continue
        match = PYTHON.match(text, at)
        piece, begins = match[0], at
        if match['quote']:
            if before in (NAME, NUMBER):
                odd.add(line)
            close(STRING_LITERAL, STRING, match)
            quote = match['quote']
        elif match['comment']:
            close(COMMENT_TEXT, COMMENT, match)
        elif match['blank']:
            close(BLANK, CODE, match)
            line += '\n' in piece
        elif match['newline']:
            close(BLANK, CODE, match)
            before, fresh, line = None, True, line + 1
        elif match['operator']:
            if piece in '?$`\\' or piece == '!' and text[at + 1 : at + 2] != '=' or piece > '\x7f':
                odd.add(line)
            close(OPERATOR, CODE, match)
            depth += (piece in '([{') - (piece in ')]}' and (depth > 0 or not anchored))
            before, fresh = None, False
        else:
            is_keyword = keyword.iskeyword(piece)
            if fresh and piece in STATEMENTS:
                if not anchored:
                    lift()
                depth, anchored = 0, True
            kind = NUMBER if match['number'] else KEYWORD if is_keyword else NAME
            if before is not None and kind != KEYWORD:
                odd.add(line)
            close(kind, CODE, match)
            cut = begins == 0 and begins_in == '' and not fresh  # the end of a word says nothing
            before, fresh = (None if is_keyword or cut or fresh and piece in SOFT_KEYWORDS else kind), False
    if not anchored:
        lift()
    return Reading(spans, len(odd))


def read_python_from_anywhere(text):
    """Returns the most plausible Reading of a text whose beginning is not known; the first of equals."""
    readings = (
        read_python(text, begins_in, anchored=False) for begins_in in ('', "'", '"', '#', '"""', "'''")
    )
    return min(readings, key=lambda reading: reading.cost)


def is_function_word(word):
    word = word.lower().replace('’', "'")
    return (
        word in FUNCTION_WORDS
        or word.removesuffix("n't") in FUNCTION_WORDS
        or word.split("'")[0] in FUNCTION_WORDS
    )


def read_english(text):
    """Returns the Reading of an English text: words, numbers in digits, blanks, and all else as punctuation."""
    spans, at = [], 0
    names = CLASSES['english']
    for match in ENGLISH.finditer(text):
        kind = (
            ('function word' if is_function_word(match['word']) else 'content word')
            if match['word']
            else 'number'
            if match['number']
            else 'punctuation'
            if match['punctuation']
            else 'white space'
        )
        spans.append((match.end() - at, names.index(kind), CODE, 0))
        at = match.end()
    return Reading(spans, 0)


def read_window(ids, encoding, language):
    """ids: (T,) of one window. Returns seven things. Of each byte of its text: its place in CLASSES[language], what it is inside of, the depth of
    brackets, whether it is blank, whether a boundary, of lines or of sentences, is there. Of each token: its first byte, and whether it is the end of text."""
    if language not in CLASSES:
        raise UserError(f"language is '{language}': expected one of {', '.join(CLASSES)}")
    ids = np.asarray(ids).tolist()
    try:
        pieces = [b'' if i == encoding.eot_token else encoding.decode_single_token_bytes(i) for i in ids]
    except KeyError as error:
        raise UserError(
            f'token id {error.args[0]} is not one of the tokenizer {encoding.name}: the data were made with another'
        ) from None
    cuts = [-1, *(i for i, token in enumerate(ids) if token == encoding.eot_token), len(ids)]
    columns = []
    for i, (low, high) in enumerate(zip(cuts, cuts[1:])):
        text = b''.join(pieces[low + 1 : high]).decode(
            'utf-8', 'surrogateescape'
        )  # a character cut by the window's edge stays apart
        if language == 'english':
            reading, ends = read_english(text), [match.end() - 1 for match in SENTENCE_END.finditer(text)]
        else:
            reading, ends = (
                read_python(text) if i else read_python_from_anywhere(text),
                [i for i, c in enumerate(text) if c == '\n'],
            )
        boundary = np.zeros(len(text), dtype=bool)
        boundary[ends] = True
        blank = np.array([c.isspace() for c in text], dtype=bool)
        width = (
            1 if text.isascii() else np.array([len(c.encode('utf-8', 'surrogateescape')) for c in text])
        )  # in bytes
        columns.append(
            [
                np.repeat(column, width)
                for column in (reading.kind, reading.inside, reading.depth, blank, boundary)
            ]
        )
    first = np.cumsum([0, *map(len, pieces)])
    return *(np.concatenate(column) for column in zip(*columns)), first, np.array(ids) == encoding.eot_token


def first_true(flags, first):
    """flags: (n,) of bytes; first: (T + 1,) each token's first byte. Returns (T,): the first byte of each token that has the flag, −1 where none has."""
    places = np.append(np.flatnonzero(flags), len(flags))
    place = places[places.searchsorted(first[:-1])]
    return np.where(place < first[1:], place, -1)


def classify(ids, encoding, language):
    """ids: (T,) token ids of one window. Returns (T,) int64: the place of each token's class in CLASSES[language]."""
    kind, _, _, blank, boundary, first, end_of_text = read_window(ids, encoding, language)
    index, place = CLASSES[language].index, first_true(~blank, first)
    blanks = np.where(
        first_true(boundary, first) < 0, index('white space'), index('line end')
    )  # the only boundary among blanks is a line end
    return np.where(end_of_text, index('end of text'), np.where(place < 0, blanks, np.append(kind, 0)[place]))


def structure(ids, encoding, language='python'):
    """ids: (T,) token ids of one window. Returns {name: (T,)}, of a token's first byte that is not blank, or else of its first byte:
    line_start: bool, it holds the first byte of a line that is not blank, in English of a line or a sentence; what the window cuts has no start
    bracket_depth: 0, 1, 2, or 3 for 3 and more brackets open before it, as far as the window shows
    inside: 0 code, 1 string, 2 comment
    since_line: tokens since the last one that held a line end, or in English a sentence's, 0 for the first; or else since the document or the window began.
    English has no bracket_depth and no inside. An end of text is 0 and False."""
    _, inside, depth, blank, boundary, first, end_of_text = read_window(ids, encoding, language)
    ends = first_true(boundary, first) >= 0
    line_start, since_line, fresh, since = np.zeros(len(ends), bool), np.zeros(len(ends), np.int64), False, 0
    for i in range(len(ends)):
        for byte in range(first[i], first[i + 1]):
            line_start[i] |= fresh and not blank[byte]
            fresh = boundary[byte] or fresh and blank[byte]
        since_line[i] = 0 if end_of_text[i] else since
        fresh, since = (True, 0) if end_of_text[i] else (fresh, 0 if ends[i] else since + 1)
    if language == 'english':
        return {'line_start': line_start, 'since_line': since_line}
    place = first_true(~blank, first)
    place = np.where(place < 0, first[:-1], place)
    depth, inside = (np.where(end_of_text, 0, np.append(column, 0)[place]) for column in (depth, inside))
    return {
        'line_start': line_start,
        'bracket_depth': np.minimum(depth, 3),
        'inside': inside,
        'since_line': since_line,
    }
