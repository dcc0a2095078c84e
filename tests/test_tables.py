"""results/README.md and the files in results/: every table is made from them, and they are small."""

import re
import subprocess
from pathlib import Path

import pytest
from planted import write_run

from data.loader import UserError
from studies import tables
from studies.pack import read_json, untrained_report
from studies.results import RESULTS, significant, with_interval

ROOT = Path(__file__).resolve().parent.parent
README = (RESULTS / 'README.md').read_text()
READMES = '\n'.join(path.read_text() for path in sorted(RESULTS.rglob('README.md')))
MAKERS = tables.tables()


@pytest.mark.parametrize('name', MAKERS)
def test_every_table_is_made_from_the_files_in_results(name):
    block = re.search(rf'^<!-- table {re.escape(name)} -->\n(.*?)\n<!-- end -->', READMES, re.M | re.S)
    assert block, f'no README.md in results/ has a place for the table {name}'
    assert block[1] == MAKERS[name](), 'run python -m studies.tables --write'


@pytest.mark.parametrize('name', tables.ARM_SETS)
def test_the_table_beside_the_arms_is_the_one_in_the_readme(name):
    assert (RESULTS / name / 'table.md').read_text().strip() == MAKERS[f'side by side in {name}']().strip()


def test_a_place_for_a_table_that_nobody_makes_is_named():
    with pytest.raises(UserError, match='there is no table of nothing: expected one of arms'):
        tables.filled('<!-- table of nothing -->\n<!-- end -->')


def test_filling_a_text_leaves_the_rest_of_it_as_it_is():
    text = 'before\n\n<!-- table scaling -->\nold\n<!-- end -->\n\nafter\n'
    filled = tables.filled(text)
    assert filled.startswith('before\n\n<!-- table scaling -->\n| arm |') and filled.endswith('\n\nafter\n')
    assert 'old' not in filled and tables.filled(filled) == filled


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r'\]\(([^)#]+)\)', README):
        assert target.startswith('http') or (RESULTS / target).exists(), target


def test_every_heading_that_the_readme_links_is_there():
    headings = [line.lstrip('#').strip().lower() for line in README.splitlines() if line.startswith('#')]
    anchors = {re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in headings}
    assert set(re.findall(r'\]\(#([^)]+)\)', README)) <= anchors


def test_results_are_small_and_hold_no_programs():
    files = subprocess.run(['git', 'ls-files', 'results'], cwd=ROOT, capture_output=True, text=True).stdout
    paths = [ROOT / line for line in files.splitlines()] or [p for p in RESULTS.rglob('*') if p.is_file()]
    assert {path.suffix for path in paths} <= {'.json', '.jsonl', '.md', '.png'}
    blocks = sum(-(-path.stat().st_size // 4096) for path in paths if path.exists())
    assert blocks * 4096 <= 8e6


def test_every_picture_is_one_that_a_readme_shows():
    texts = README + (ROOT / 'README.md').read_text()
    assert [path.name for path in RESULTS.rglob('*.png') if path.name not in texts] == []


def test_every_run_that_shares_its_untrained_measurement_finds_it():
    folders = [path.parent for path in RESULTS.glob('*/*/measure.json')]
    sharing = [folder for folder in folders if 'untrained_in' in read_json(folder / 'measure.json')]
    assert sharing and all(untrained_report(folder)['streams'] for folder in sharing)


def test_how_many_leaves_out_what_nobody_knows():
    assert tables.how_many([None, True, False]) == '1 of 2'


def test_numbers_are_written_with_significant_digits_and_intervals():
    written = [significant(x, 3) for x in (12.345, 0.012345, 1234.5, 0.0012345, 0, None)]
    assert written == ['12.3', '0.0123', '1.23e3', '1.23e-3', '0', '–']
    assert with_interval({'value': 1.0, 'low': 0.5, 'high': 2.0}) == '1 [0.5, 2]'
    assert with_interval({'value': 1.0, 'low': None, 'high': None}) == '1'


def test_a_set_that_the_second_rules_judge_has_tables_for_each_of_its_scales(tmp_path):
    for scale in ('160m', '290m'):
        write_run(tmp_path / 'english', 'baseline', scale=scale)
    (tmp_path / 'english/chance.json').write_text('{}')
    makers = tables.second_tables(tmp_path / 'english')
    titles = ('premise', 'verdicts', 'objects', 'evidence')
    names = {f'{title}, english {scale}' for scale in ('160m', '290m') for title in titles}
    assert names <= makers.keys() and 'controls in english 290m' in makers
    assert '| premise | h has it | outlier dimension | yes' in makers['verdicts, english 290m']()
