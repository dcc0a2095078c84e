"""All numbers that stand in results/, at the rounding of a text: what a README says has to be among them."""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r'(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])%?')
# What is no measurement: blocks and pieces of code, addresses, names of papers, headings.
NO_PROSE = re.compile(r'^```.*?^```|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|^#.*?$|<!--.*?-->', re.S | re.M)


def numbers_in(text):
    """Returns the numbers that stand in the prose and the tables of a Markdown text, as they are written."""
    return NUMBER.findall(NO_PROSE.sub(' ', text))


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
def values_of_results():
    """Returns every number in the JSON files of results/, and in the tables of results/README.md.
    Those are made from the files; differences and counts stand in them alone."""
    values = set()
    for path in (ROOT / 'results').rglob('*.json*'):
        lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
        values.update(value for line in lines for value in values_in(json.loads(line)))
    for path in (ROOT / 'results').rglob('README.md'):
        tables = [line for line in path.read_text().splitlines() if line.startswith('|')]
        values.update(value for number in numbers_in('\n'.join(tables)) for value, _ in [parsed(number)])
    return values


def parsed(number):
    """number: as it is written. Returns its value, and the place of its last digit as a power of ten."""
    text = number.replace(',', '').replace('−', '-').rstrip('%')
    mantissa, _, exponent = text.partition('e')
    places = -len(mantissa.partition('.')[2]) + int(exponent or 0)
    if '.' not in mantissa and 'e' not in text:
        places = len(mantissa) - len(mantissa.rstrip('0')) if len(mantissa.rstrip('0')) > 1 else 0
    return float(text), places


@cache
def rounded_values(places, factor):
    """Returns the values of results/ times `factor`, as multiples of the power of ten `places`."""
    return {round(abs(value) * factor / 10.0**places) for value in values_of_results()}


def stands_in_results(number):
    """Does a number stand in a file of results/, at the rounding of the text? 12% may be 0.12 there, and 445
    thousand 445,012; signs are the text's."""
    value, places = parsed(number)
    factors = (1, 100) if number.endswith('%') else (1, 1e-3)
    return any(round(abs(value) / 10.0**places) in rounded_values(places, factor) for factor in factors)
