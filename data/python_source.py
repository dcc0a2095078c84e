"""
Reads Python source, from a file's beginning or from anywhere in it: what each character is part of,
brackets, lines.

One regular expression follows the rules of the standard library's tokenize and never stops; a test holds it
to tokenize on whole files. (tokenize itself needs a file from its beginning, stops at the first thing that
it cannot read, and differs between Python 3.11 and 3.12.) A string is a string from its prefix to its last
quote, the expressions of an f-string included.

Whether a window begins in code, in a string or in a comment is not known. Each is tried, and the reading
with the fewest implausible lines is taken.
"""

import keyword
import re

import numpy as np

CLASSES = (
    'keyword',
    'operator',
    'name',
    'number',
    'string',
    'comment',
    'white space',
    'line end',
    'end of text',
)

# The values of structure's 'inside'.
CODE, STRING, COMMENT = range(3)

# Places in CLASSES.
KEYWORD, OPERATOR, NAME, NUMBER, STRING_LITERAL, COMMENT_TEXT, BLANK = range(7)

PYTHON_TOKEN = re.compile(
    r'''(?P<blank>[^\S\n]+|\\\r?\n)
    |(?P<newline>\n)
    |(?P<comment>\#[^\n]*)
    |(?i:[rbuft]|[bft]r|r[bft])?(?P<quote>\'\'\'|"""|'|")
    |(?P<number>(?:0[xX][\da-fA-F_]+|0[bBoO][\d_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?)[jJ]?)
    |(?P<name>[^\W\d]\w*) |(?P<operator>[\s\S])''',
    re.VERBOSE,
)

# What follows once a comment or a string has begun. A string in single quotes ends with its line at the
# latest.
REST = {
    '#': re.compile(r'[^\n]*'),
    "'": re.compile(r"(?:[^\\\n']|\\[\s\S])*(?P<end>')?"),
    '"': re.compile(r'(?:[^\\\n"]|\\[\s\S])*(?P<end>")?'),
    "'''": re.compile(r"(?:[^\\]|\\[\s\S]|\\\Z)*?(?:(?P<end>''')|\Z)"),
    '"""': re.compile(r'(?:[^\\]|\\[\s\S]|\\\Z)*?(?:(?P<end>""")|\Z)'),
}

# Where a line begins with one of these, no bracket is open.
STATEMENTS = set(
    """
    assert break class continue def del elif except finally global import nonlocal pass raise return
    try while with
    """.split()
)

# A line in a string of several lines that could well be code.
CODE_LINE = re.compile(
    r'(?!.*>>>).*[=(\[{]'
    r'|\s*(class|def|elif|else|except|finally|for|from|if|import|pass|return|try|while|with)\b'
)

# keyword.iskeyword takes these for names, but a second name may follow them.
SOFT_KEYWORDS = {'case', 'match', 'type'}


class PythonReader:
    """Reads Python source token by token, with one method for each kind of token.

    begins_in: a quote or '#' if the text begins in a string or a comment, else ''.
    anchored: whether no bracket is open where the text begins.

    After `read`, `spans` holds (length, kind, inside, depth) of each token, and `odd_lines` the implausible
    lines: those with two names side by side, with a character that Python has no use for, or with a string
    that the line should have ended; and those in a string of several lines that could well be code.
    """

    def __init__(self, text, begins_in='', anchored=True):
        self.text, self.begins_in, self.anchored = text, begins_in, anchored
        self.at = 0
        self.line = 0
        self.depth = 0
        self.spans = []
        self.odd_lines = set()
        self.open_quote = begins_in
        self.first_of_line = False
        # The kind of the token before, if it is a name, a number or a string on the same line.
        self.previous = None

    def read(self):
        methods = {
            'blank': self.read_blank,
            'newline': self.read_newline,
            'comment': self.read_comment,
            'quote': self.read_quote,
            'number': self.read_number,
            'name': self.read_name,
            'operator': self.read_operator,
        }
        while self.at < len(self.text) or self.open_quote:
            if self.open_quote:
                self.read_rest()
            else:
                match = PYTHON_TOKEN.match(self.text, self.at)
                methods[match.lastgroup](match)
        if not self.anchored:
            self.raise_depths()
        return self

    def add(self, match, kind, inside=CODE):
        self.spans.append((match.end() - self.at, kind, inside, self.depth))
        self.at = match.end()

    def read_blank(self, match):
        self.add(match, BLANK)
        self.line += '\n' in match[0]

    def read_newline(self, match):
        self.add(match, BLANK)
        self.line += 1
        self.previous = None
        self.first_of_line = True

    def read_comment(self, match):
        self.add(match, COMMENT_TEXT, COMMENT)

    def read_quote(self, match):
        """The beginning of a string; read_rest reads what follows."""
        if self.previous in (NAME, NUMBER):
            self.odd_lines.add(self.line)
        self.add(match, STRING_LITERAL, STRING)
        self.open_quote = match['quote']

    def read_rest(self):
        """The rest of a string or of a comment, once it has begun."""
        quote, first = self.open_quote, self.at
        match = REST[quote].match(self.text, self.at)
        if quote == '#':
            self.add(match, COMMENT_TEXT, COMMENT)
        else:
            self.add(match, STRING_LITERAL, STRING)
        lines = self.text[first : self.at].split('\n')
        if len(quote) == 3:
            within = enumerate(lines[1:-1], self.line + 1)
            self.odd_lines |= {number for number, text in within if could_be_code(text)}
        elif quote != '#' and not match['end'] and self.at < len(self.text):
            self.odd_lines.add(self.line)
        self.line += len(lines) - 1
        self.open_quote = ''
        self.previous = STRING_LITERAL
        self.first_of_line = False

    def read_operator(self, match):
        character = match[0]
        not_equal = self.text[self.at + 1 : self.at + 2] == '='
        if character in '?$`\\' or character == '!' and not not_equal or character > '\x7f':
            self.odd_lines.add(self.line)
        self.add(match, OPERATOR)
        if character in '([{':
            self.depth += 1
        if character in ')]}' and (self.depth > 0 or not self.anchored):
            self.depth -= 1
        self.previous = None
        self.first_of_line = False

    def read_number(self, match):
        self.read_word(match, NUMBER)

    def read_name(self, match):
        if self.first_of_line and match[0] in STATEMENTS:
            self.close_brackets()
        self.read_word(match, KEYWORD if keyword.iskeyword(match[0]) else NAME)

    def read_word(self, match, kind):
        # What a window begins with may be the end of a word, which says nothing of what may follow.
        may_be_cut = self.at == 0 and self.begins_in == ''
        is_soft_keyword = self.first_of_line and match[0] in SOFT_KEYWORDS
        if self.previous is not None and kind != KEYWORD:
            self.odd_lines.add(self.line)
        self.add(match, kind)
        self.previous = None if kind == KEYWORD or may_be_cut or is_soft_keyword else kind
        self.first_of_line = False

    def close_brackets(self):
        """A statement begins: no bracket is open, whatever was counted."""
        if not self.anchored:
            self.raise_depths()
        self.depth = 0
        self.anchored = True

    def raise_depths(self):
        """Closing brackets whose opening ones were not seen raise the depth of all that is before them."""
        lowest = min([0, self.depth, *(depth for *_, depth in self.spans)])
        self.spans = [(*span, depth - lowest) for *span, depth in self.spans]


def could_be_code(line):
    return CODE_LINE.match(line) and not PythonReader(line).read().odd_lines


def read_from_anywhere(text):
    """Returns the reader of the most plausible beginning, the first of equals."""
    beginnings = ('', "'", '"', '#', '"""', "'''")
    readers = [PythonReader(text, begins_in, anchored=False).read() for begins_in in beginnings]
    return min(readers, key=lambda reader: len(reader.odd_lines))


def read(text, begins_document, ends_document):
    """text: one document, or what a window shows of it. begins_document, ends_document: whether that includes
    its beginning and its end.

    Returns the parts of classes.Window, by character.
    """
    reader = PythonReader(text).read() if begins_document else read_from_anywhere(text)
    length, *columns = np.array(reader.spans, dtype=np.int64).reshape(-1, 4).T
    kind, inside, depth = (np.repeat(column, length) for column in columns)
    line_starts = [match.end() - 1 for match in re.finditer(r'\n\s*\S', text)]
    if begins_document:
        line_starts += [match.end() - 1 for match in re.finditer(r'\A[^\S\n]*\S', text)]
    line_ends = [match.start() for match in re.finditer('\n', text)]
    return {
        'kind': kind,
        'values': {'inside': inside, 'depth': depth},
        'starts': {'line_start': line_starts},
        'ends': {'boundary': line_ends},
    }
