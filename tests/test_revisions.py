"""Emergence of a pretrained model: its revisions, measured and fitted, on folders that are made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import save_tokenizer

from data.loader import UserError
from studies import emergence, predict, revisions
from studies.curves import Series

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('one_thread')

draw_curves = emergence.draw_curves  # the other tests do without it
STEPS = (0, 1, 8, 64, 256, 512, 1000, 2000)
BLOCKS, WINDOW = 3, 16
TEXT = 'a ledger, a line.'  # one window of WINDOW bytes, and the byte after it


def save_revisions(folder):
    """Eight revisions of a tiny GPT-NeoX, one dimension of which grows with the step."""
    config = transformers.GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    for step in STEPS:
        with torch.no_grad():
            embedding[:, 5] = 0.1 + step / 500
        model.save_pretrained(folder / f'step{step}')
        save_tokenizer(folder / f'step{step}', adds_bos=False)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp('revisions') / 'pythia'
    save_revisions(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A working directory with the revisions in pythia/, and text.txt."""
    monkeypatch.chdir(tmp_path)
    Path('pythia').symlink_to(saved)
    Path('text.txt').write_text(TEXT)
    for name in ('draw_curves', 'draw_peaks'):
        monkeypatch.setattr(emergence, name, lambda *_: None)
    return tmp_path


def command(steps=STEPS, *arguments, model='hf:pythia'):
    names = ','.join(f'step{step}' for step in steps)
    reading = ['--text', 'text.txt', f'--block_size={WINDOW}', '--device=cpu', '--sequences=2']
    emergence.main([model, f'--revisions={names}', *reading, *arguments])


def refusal(*arguments, **options):
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        command(*arguments, **options)
    assert stop.value.code.startswith('error: ') and '\n' not in stop.value.code
    return stop.value.code


def log(folder='out/pythia'):
    return [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]


@torch.no_grad()
def ratios_by_hand(path):
    """Largest over median of what every block but the last returns, by the model's own hidden states."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    idx = torch.tensor([tokenizer(TEXT[:WINDOW]).input_ids])
    hidden = model(idx, output_hidden_states=True).hidden_states[1:-1]
    magnitudes = [h.abs().double().numpy() for h in hidden]
    return [a.max() / np.median(a) for a in magnitudes]


def test_the_log_has_a_line_for_each_revision_with_largest_over_median_after_each_block(folder):
    command(reversed(STEPS))
    assert [line['iter'] for line in log()] == list(STEPS)
    for line in log():
        found = line['streams']['h']['max_over_median']
        assert len(found) == BLOCKS
        by_hand = ratios_by_hand(f'pythia/step{line["iter"]}')
        np.testing.assert_allclose(
            found[:-1], by_hand, rtol=0.02
        )  # the median of 512 is one of the middle two
    assert [path.name for path in Path('out').iterdir()] == ['pythia']


def test_the_curve_is_fitted_and_the_command_says_to_what(folder, capsys):
    command()
    report = json.loads(Path('out/pythia/emergence.json').read_text())
    said = 'h after each block: the largest entry of a sequence over its median, averaged over sequences'
    assert report['fitted'] == said and f'fitted: {said}' in capsys.readouterr().out
    places = [(one['run'], one['stream'], one['sublayer']) for one in report['series']]
    assert places == [('pythia', 'h', block) for block in range(BLOCKS)]
    assert report['summary'][0]['fitted'] == BLOCKS and report['summary'][0]['r2'] > 0.9


def test_a_panel_is_named_after_its_block(tmp_path, drawn):
    steps = np.array([0.0, 1, 2, 4, 8])
    series = [Series('pythia', 'h', b, steps, 5 + steps, model={'blocks_only': True}) for b in range(BLOCKS)]
    draw_curves('pythia', [(x, {'note': ''}) for x in series], tmp_path / 'curves.png')
    assert '3 of 3 blocks' in drawn[-1]._suptitle.get_text()
    titles = [axis.get_title() for axis in drawn[-1].axes]
    assert titles == [f'h, block {block}: no fit' for block in range(BLOCKS)]


def test_the_same_command_goes_on_where_it_stopped(folder, capsys):
    command(STEPS[:4])
    before = log()
    capsys.readouterr()
    command()
    assert log()[:4] == before and [line['iter'] for line in log()] == list(STEPS)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('pythia, step')]
    assert [line.split(':')[0] for line in said] == [f'pythia, step {step:,}' for step in STEPS[4:]]
    assert 'largest over median' in said[0] and 'after block' in said[0]


def test_a_log_of_another_text_is_not_mixed_with_this_one(folder):
    command(STEPS[:2])
    Path('text.txt').write_text(TEXT[::-1])
    assert 'is of another model, text or windows' in refusal()
    assert len(log()) == 2
    command(STEPS[:1], '--out=elsewhere')
    assert len(log('elsewhere')) == 1


def test_what_was_measured_stays_when_a_revision_is_missing(folder):
    assert 'there is no revision step77 of pythia' in refusal((0, 1, 77))
    assert [line['iter'] for line in log()] == [0, 1]


def test_revisions_are_read_as_a_run_with_settings(folder):
    command()
    (packed,) = emergence.read_packed(Path('out/pythia'))
    assert packed['model_args']['n_layer'] == BLOCKS and packed['model_args']['blocks_only']
    with pytest.raises(SystemExit, match='architectures'):
        predict.main(['out/pythia'])


@pytest.mark.parametrize(
    'name, step',
    [('step3000', 3000), ('checkpoint-500', 500), ('stage1-step1000-tokens3B', 1000), ('step0', 0)],
)
def test_the_step_is_the_number_in_the_name_of_a_revision(name, step):
    assert revisions.step_of(name) == step


@pytest.mark.parametrize('name', ['main', 'v2', 'footstep9', 'step'])
def test_a_revision_without_a_step_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' has no step in its name"):
        revisions.revisions_by_step(f'step0,{name}')


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['hf:pythia', '--revisions=step0,main', '--text', 'text.txt'], "'main' has no step in its name"),
        (['hf:pythia', '--revisions=step1,checkpoint-1', '--text', 'text.txt'], 'are the same step'),
        (['hf:pythia', '--revisions=,', '--text', 'text.txt'], '--revisions names none'),
        (['hf:pythia', '--revisions=step0'], '--text FILE'),
        (['hf:pythia', '--revisions=step0', '--text', 'no.txt'], 'cannot read the text no.txt'),
        (['hf:pythia'], 'name steps of its training with --revisions'),
        (['pythia/step0'], 'name steps of its training with --revisions'),
        (['hf:a', 'hf:b', '--revisions=step0'], 'those of one model'),
        (['out/run', '--text', 'text.txt'], '--text is what --revisions are measured on'),
    ],
)
def test_a_mistake_of_the_user_is_a_sentence(folder, arguments, said):
    with pytest.raises(SystemExit) as stop:
        emergence.main([*arguments])
    assert stop.value.code.startswith('error: ') and said in stop.value.code
    assert not Path('out').exists()


def test_a_folder_with_folders_of_revisions_needs_no_prefix(folder):
    command(STEPS[:1], model='pythia')
    assert len(log()) == 1
