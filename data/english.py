"""
Reads English prose by rule: words and numbers, sentences and paragraphs.

What the rules cannot know they decide in one way, which is wrong now and then: a name after an abbreviation
("He left the U.S. Congress met"), a short line of verse without punctuation (taken for a heading), "May"
(always a function word).

Part of speech is left out. No list of words can tell whether "run" is a noun or a verb, and a trained
tagger would bring errors of its own.
"""

import re

import numpy as np

CLASSES = (
    'function word',
    'content word',
    'punctuation',
    'number',
    'white space',
    'line end',
    'end of text',
)

ENGLISH_TOKEN = re.compile(
    r"(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<number>\d+(?:[.,]\d+)*\w*)|\s+|(?P<punctuation>[^\w\s]+|_)"
)

# Determiners, pronouns, prepositions, auxiliary verbs, conjunctions, and adverbs that say little by
# themselves.
FUNCTION_WORDS = set(
    """
    a an the this that these those some any no every each either neither all both half such another other
    others much many more most few fewer little less least several enough own same

    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her
    hers herself it its itself they them their theirs themselves one ones who whom whose which what whoever
    whatever whichever someone somebody something anyone anybody anything everyone everybody everything nobody
    nothing none there here

    about above across after against along amid among around as at before behind below beneath beside besides
    between beyond by despite down during except for from in inside into like near of off on onto out outside
    over past per since through throughout till to toward towards under underneath until up upon via with
    within without

    am is are was were be been being do does did done doing have has had having can could may might must shall
    should will would ought can't won't shan't ain't cannot

    and but or nor so yet if unless because although though while whereas whether than when whenever where
    wherever why how lest once

    not too very also only just even ever never still already again then thus hence quite rather almost
    perhaps however therefore else
    """.split()
)

# What may end a sentence: marks, with spaces between them or not, and the quotes, brackets and references
# that close right after them.
SENTENCE_MARK = r"""(?P<mark>[.!?…](?: ?[.!?…])*)(?:["'”’)\]*_]|\[\d+\])*(?=\s|\Z)"""
BREAK = re.compile(rf'{SENTENCE_MARK}|(?P<lines>[^\S\n]*\n\s*)')

# What follows a mark: blanks, what opens a quotation or brackets, and the first word or else the first
# character.
FOLLOWING = re.compile(r"""(?P<blank>\s*)["'“‘(\[*_#]*(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*|\S)?""")
BETWEEN_WORDS = re.compile(r"[^\w.'’]+")
ENUMERATION = re.compile(r'\W*(?:\d{1,3}(?:\.\d{1,3})*|[IVXLC]+|[ivx]+|[A-Za-z])\Z')
NUMERAL = re.compile(r'\d|[IVXLC]+\Z')
LIST_ITEM = re.compile(r'[-*•#>|]|\d+[.)]\s')

# Abbreviations that end no sentence, as a name follows.
TITLES = set(
    """
    mr mrs ms messrs mme mlle dr prof st ste rev hon gen col capt cpt lt sgt maj cmdr adm gov sen rep pres
    bro fr cf vs viz e.g i.e eg ie ed eds trans
    """.split()
)

# Abbreviations that end no sentence where a number follows. Elsewhere they are words ("No. Never.").
BEFORE_NUMBERS = set(
    """
    no nos p pp vol vols ch chap chaps fig figs eq eqs sec secs sect art arts ver par para bk pt col ll v vv
    n nr b c ca d r op jan feb mar apr jun jul aug sep sept oct nov dec
    """.split()
)

# Abbreviations that may end a sentence or not, as initials and those with a period within (U.S., a.m.) may:
# the next word tells.
EITHER = set('etc al esq inc ltd co corp jr sr bros dept univ assn mt ft approx est anon ibid'.split())

# In a text without any line longer than LONG_LINE, lines may have been broken within a sentence, after at
# least FULL_LINE characters. A shorter line is a heading, or the last of a paragraph.
LONG_LINE, FULL_LINE = 100, 50


def is_function_word(word):
    word = word.lower().replace('’', "'")
    return (
        word in FUNCTION_WORDS
        or word.removesuffix("n't") in FUNCTION_WORDS
        or word.split("'")[0] in FUNCTION_WORDS
    )


def ends_sentence(sentence, match):
    """Returns whether a sentence ends at a mark. match: of BREAK, in the whole text.
    sentence: its text up to the mark, or '' where the window cuts the word before the mark, which then may
    be any word.

    These are the rules; the first that applies decides:
    - it does before a blank line;
    - it does not before a lower-case letter, a comma or a dash: '"Why?" he asked';
    - it does at ! and ?, and at an ellipsis unless "I" follows, which is always capitalized;
    - it does not after what is only a number or a letter, as in a list: "2. Methods";
    - it does not after a title: "Mr. Smith";
    - it does not between an abbreviation and its number: "vol. 3";
    - after initials and abbreviations that may end a sentence it does where a capitalized function word
      follows: "in the U.S. He";
    - it does after anything else.
    """
    following = FOLLOWING.match(match.string, match.end())
    next_word = following['word'] or ''
    if following['blank'].count('\n') > 1:
        return True
    if next_word and (next_word[0].islower() or next_word[0] in ',;:—–-&'):
        return False
    if '!' in match['mark'] or '?' in match['mark']:
        return True
    if match['mark'] != '.':
        return re.split("['’]", next_word)[0] != 'I'
    if ENUMERATION.match(sentence):
        return False
    word = BETWEEN_WORDS.split(sentence)[-1].strip(".'’")
    if word.lower() in TITLES:
        return False
    if word.lower() in BEFORE_NUMBERS and NUMERAL.match(next_word):
        return False
    has_period = '.' in word and not word[0].isdigit()
    if has_period or word.lower() in EITHER or is_initial(word, sentence):
        return len(next_word) > 1 and is_function_word(next_word)
    return True


def is_initial(word, sentence):
    """Whether the word that a sentence ends with is a letter that stands for a name. "I" is none after a
    lower-case word, as in "So did I".
    """
    if len(word) != 1 or not word.isupper():
        return False
    before = sentence[:-1].split()
    return not (word == 'I' and before and before[-1][0].islower())


class SentenceReader:
    """Finds the sentences and the paragraphs of an English text.

    A sentence ends at a mark, by the rules of `ends_sentence`, at a blank line, and at a single line end
    unless `goes_on`. A paragraph starts after a blank line and, in a text that is not wrapped, after every
    line that ends a sentence. A text is taken to be wrapped, its lines broken within sentences, if none of
    them is long.

    begins_document: whether the text begins with a document, and not somewhere in it.

    After reading:
    sentences: [(first character, one after the last)], without the blanks around.
    paragraphs: the first character of each.
    is_whole: whether the last sentence is known to end where the text ends.
    The first sentence and the first paragraph begin with the text, which may have cut them.
    """

    def __init__(self, text, begins_document=True):
        self.text, self.begins_document = text, begins_document
        self.is_wrapped = max(map(len, text.split('\n'))) <= LONG_LINE
        self.sentences, self.paragraphs = [], []
        self.begin(0, starts_paragraph=True)
        for match in BREAK.finditer(text):
            if match['mark']:
                self.read_mark(match)
            else:
                self.read_line_end(match)
        end = len(text.rstrip())
        self.is_whole = self.first >= end
        self.finish(end)

    def begin(self, at, starts_paragraph):
        """A sentence begins at the next character that is not blank."""
        self.first = len(self.text) - len(self.text[at:].lstrip())
        self.starts_paragraph = starts_paragraph

    def finish(self, end):
        """The sentence that has begun ends, if it holds anything."""
        if end <= self.first:
            return
        self.sentences.append((self.first, end))
        if self.starts_paragraph:
            self.paragraphs.append(self.first)

    def read_mark(self, match):
        sentence = self.text[self.first : match.start()]
        word_may_be_cut = not self.begins_document and not re.search(r'\s', self.text[: match.start()])
        if ends_sentence('' if word_may_be_cut else sentence, match):
            self.finish(match.end())
            self.begin(match.end(), starts_paragraph=False)

    def read_line_end(self, match):
        is_blank_line = match[0].count('\n') > 1
        if is_blank_line or not self.goes_on(match):
            self.finish(match.start())
            self.begin(match.end(), starts_paragraph=is_blank_line or not self.is_wrapped)

    def goes_on(self, match):
        """Whether a sentence goes on after a single line end: before a lower-case letter, after a comma, a
        colon or a dash, and after a full line of a wrapped text; but never before an item of a list."""
        line = self.text[self.text.rfind('\n', 0, match.start()) + 1 : match.start()]
        following = self.text[match.end() : match.end() + 5]
        if match.start() <= self.first or LIST_ITEM.match(following):
            return False
        is_full = self.is_wrapped and len(line) >= FULL_LINE
        return following[:1].islower() or line.endswith((',', ';', ':', '—', '–', '-')) or is_full


def class_of(match):
    """match: of ENGLISH_TOKEN. Returns its place in CLASSES."""
    if match['word']:
        return CLASSES.index('function word' if is_function_word(match['word']) else 'content word')
    return CLASSES.index(match.lastgroup or 'white space')


def count_words(words, sentence_starts, length):
    """words: the (first character, one after the last) of each. Returns (length,): how many words have ended
    before each character since its sentence began, or since the text began where that is cut.
    """
    characters = np.arange(length)
    ended = np.searchsorted(np.array([end for _, end in words], dtype=np.int64), characters, 'right')
    starts = np.array(sentence_starts, dtype=np.int64)
    sentence = np.searchsorted(starts, characters, 'right')
    ended_before = np.append(0, ended[starts])
    return ended - ended_before[sentence]


def lines_outside(text, sentences):
    """Returns the line ends that are not within a sentence."""
    outside = np.ones(len(text), dtype=bool)
    for first, end in sentences:
        outside[first:end] = False
    return [match.start() for match in re.finditer('\n', text) if outside[match.start()]]


def read(text, begins_document, ends_document):
    """text: one document, or what a window shows of it. begins_document, ends_document: whether that includes
    its beginning and its end.

    Returns the parts of classes.Window, by character.
    """
    tokens = list(ENGLISH_TOKEN.finditer(text))
    words = [match.span() for match in tokens if match['word'] or match['number']]
    capitalized = np.zeros(len(text), dtype=bool)
    for first, end in words:
        capitalized[first:end] = text[first].isupper()

    reader = SentenceReader(text, begins_document)
    starts, paragraphs = [first for first, _ in reader.sentences], reader.paragraphs
    ends = [end - 1 for _, end in reader.sentences]
    word_in_sentence = count_words(words, starts, len(text))

    # What the window cuts has no start and no end.
    leading_blanks = text[: len(text) - len(text.lstrip())]
    if not begins_document and leading_blanks.count('\n') < 2:
        starts, paragraphs = starts[1:], paragraphs[1:]
    if not ends_document and not reader.is_whole:
        ends = ends[:-1]
    return {
        'kind': np.repeat(
            np.array([class_of(match) for match in tokens], dtype=np.int64),
            [match.end() - match.start() for match in tokens],
        ),
        'values': {'word_in_sentence': word_in_sentence, 'capitalized': capitalized},
        'starts': {'sentence_start': starts, 'paragraph_start': paragraphs},
        'ends': {'sentence_end': ends, 'boundary': [*ends, *lines_outside(text, reader.sentences)]},
    }
