"""
Holds the numbers of a README to the files that it names: a helper of tests.

Nearly every number of two digits stands somewhere in results/, so that to look for it everywhere would
prove nothing. A section of a README (from a heading to the next) names the files that its numbers come
from, in links or in backticks: `results/h200/traffic.json`, or a section of results/README.md,
[here](results/README.md#the-rules). Each number has to stand in one of these, at the rounding of the text.
"""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r'(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])%?')
# What is no measurement: blocks and pieces of code, addresses, names of papers, headings, remarks.
NO_PROSE = re.compile(r'^```.*?^```|`[^`]*`|\]\([^)]*\)|arXiv\s+\d+\.\d+|^#.*?$|<!--.*?-->', re.S | re.M)
SOURCE = re.compile(r'[(`](results/[\w./\-]*?\.(?:jsonl?|md))(?:#([\w\-]+))?[)`]')


def numbers_in(text):
    """Returns the numbers that stand in the prose and the tables of a Markdown text, as they are written."""
    return NUMBER.findall(NO_PROSE.sub(' ', text))


def parsed(number):
    """number: as it is written. Returns its value, and the place of its last digit as a power of ten."""
    text = number.replace(',', '').replace('−', '-').rstrip('%')
    mantissa, _, exponent = text.partition('e')
    places = int(exponent or 0) - len(mantissa.partition('.')[2])
    return float(text), places


def is_measurement(number):
    """Numbers of one or two digits, like '3 seeds', are words."""
    return '%' in number or '.' in number or 'e' in number or len(re.sub(r'\D', '', number)) > 2


def sections_of(text):
    """Returns {heading: text below it, up to the next heading}; what stands before the first one has ''."""
    parts = re.split(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M), flags=re.M)
    return {'': parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def anchor_of(heading):
    """Returns what a link to a heading ends in."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


def values_in(x):
    """Yields the numbers in a JSON value."""
    if isinstance(x, dict):
        for value in x.values():
            yield from values_in(value)
    elif isinstance(x, list):
        for value in x:
            yield from values_in(value)
    elif isinstance(x, int | float) and not isinstance(x, bool):
        yield float(x)


@cache
def values_of(path, anchor=''):
    """path: of a file, from the root of the repository. Returns the numbers in it, or in the section of a
    README."""
    text = (ROOT / path).read_text()
    if path.endswith('.md'):
        sections = sections_of(text)
        chosen = [below for heading, below in sections.items() if anchor in ('', anchor_of(heading))]
        if not chosen:
            raise ValueError(f'{path} has no heading {anchor}')
        return {parsed(number)[0] for below in chosen for number in numbers_in(below)}
    lines = text.splitlines() if path.endswith('.jsonl') else [text]
    return {value for line in lines for value in values_in(json.loads(line))}


def stands_among(number, values):
    """Does a number stand among the values, at the rounding of the text? 12% may be 0.12 there, 445 thousand
    445,012, and signs are the text's."""
    value, places = parsed(number)
    unit = 10.0**places
    factors = (1, 100) if number.endswith('%') else (1, 1e-3)
    return any(
        abs(abs(other) * factor - abs(value)) <= 0.5001 * unit for other in values for factor in factors
    )


def without_source(text):
    """text: of a README. Returns the numbers, each with the heading of its section, that stand in none of
    the files of results/ that the section names. Sections that name none are left out."""
    missing = []
    for heading, below in sections_of(text).items():
        sources = set(SOURCE.findall(below))
        values = {value for path, anchor in sources for value in values_of(path, anchor)}
        numbers = [number for number in numbers_in(below) if is_measurement(number)] if sources else []
        missing += [(heading, number) for number in numbers if not stands_among(number, values)]
    return missing
