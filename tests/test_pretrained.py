"""
pretrained.py: streams, sinks and interventions of the families of transformers, each built here from a tiny
config, against what the models themselves return and against hooks written by hand; what is refused; and the
commands, on local folders.
"""

import json
import math
import shutil
import sys
import weakref
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from byte_tokenizer import save_tokenizer

import checkpoint
import measure
import pretrained
from data.loader import UserError
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).resolve().parent.parent
V, T, D, LAYERS, HEADS = 97, 24, 32, 3, 4
FALCON = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    bos_token_id=1,
    eos_token_id=2,
)
SMALL = dict(FALCON, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
GROUPED = {**SMALL, 'num_key_value_heads': 2}
MAMBA = dict(hidden_size=D, num_hidden_layers=LAYERS, state_size=4, bos_token_id=1, eos_token_id=2)
GPT2_NAMES = dict(
    vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2
)
SEQUENTIAL = {
    'GPT-2': lambda: transformers.GPT2Config(**GPT2_NAMES),
    'GPT-NeoX, sequential': lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=False),
    'Llama, grouped heads': lambda: transformers.LlamaConfig(**GROUPED),
    'Mistral, sliding window': lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
    'Qwen 2': lambda: transformers.Qwen2Config(**GROUPED),
    'Qwen 3, QK-norm': lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    'Gemma 2, sandwich norms': lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8),
    'Gemma 3, sandwich norms': lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8),
    'OLMo 2, output norms': lambda: transformers.Olmo2Config(**GROUPED),
    'Phi-3': lambda: transformers.Phi3Config(**SMALL),
    'Falcon, sequential': lambda: transformers.FalconConfig(**FALCON, parallel_attn=False, alibi=True),
    'OPT': lambda: transformers.OPTConfig(**{**SMALL, 'ffn_dim': 64, 'word_embed_proj_dim': D}),
}
PARALLEL = {
    'GPT-NeoX, parallel': lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=True),
    'GPT-J': lambda: transformers.GPTJConfig(**GPT2_NAMES, rotary_dim=4),
    'Phi-2': lambda: transformers.PhiConfig(**SMALL),
    'Falcon': lambda: transformers.FalconConfig(**FALCON),
    'Falcon, new decoder': lambda: transformers.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True
    ),
}
FAMILIES = {**SEQUENTIAL, **PARALLEL}
# Where a block reads the stream after attention: the norm before the MLP, or the MLP where there is none.
BEFORE_MLP = {
    'GPT-2': 'ln_2',
    'Gemma 2, sandwich norms': 'pre_feedforward_layernorm',
    'Gemma 3, sandwich norms': 'pre_feedforward_layernorm',
    'OLMo 2, output norms': 'mlp',
    'OPT': 'final_layer_norm',
}


def build(config, dtype=torch.float32):
    """A model with weights large enough that every part of it matters, norms' gains and biases included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype).eval()


@pytest.fixture(scope='module')
def models(one_thread):
    """Every family, as transformers builds it and as this project reads it."""
    built = {family: build(config()) for family, config in FAMILIES.items()}
    return {family: (model, pretrained.Pretrained(model)) for family, model in built.items()}


@pytest.fixture(scope='module')
def idx():
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)


@torch.no_grad()
def capture(model, idx):
    """The streams after every sublayer, in order."""
    streams = []
    with measure.hooked(model, lambda s, streams_by_name: streams.append(streams_by_name['h'].clone())):
        model(idx)
    return streams


@torch.no_grad()
def inputs_by_hand(model, family, idx):
    """What the norm before the MLP, or the MLP itself, reads in every block of a sequential family."""
    caught = []

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs['hidden_states']
        caught.append(x.detach().clone().reshape(*idx.shape, D))

    name = BEFORE_MLP.get(family, 'post_attention_layernorm')
    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        for block in blocks_of(model)
    ]
    model(idx)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize('family', FAMILIES)
def test_the_stream_after_every_block_is_the_models_own_hidden_state(models, idx, family):
    model, wrapped = models[family]
    per_block = 2 if family in SEQUENTIAL else 1
    ends = capture(wrapped, idx)[per_block - 1 :: per_block]
    with torch.no_grad():
        own = model(idx, output_hidden_states=True).hidden_states
    assert len(ends) == LAYERS
    assert torch.equal(wrapped.start(idx)['h'], own[0])
    for end, hidden in zip(ends[:-1], own[1:-1]):
        assert torch.equal(end, hidden)
    # The last of the model's hidden states is after the final norm.
    assert torch.allclose(wrapped.decoder_input_module(ends[-1]), own[-1], atol=1e-5)


@pytest.mark.parametrize('family', SEQUENTIAL)
def test_a_sequential_block_gives_the_stream_that_its_mlp_starts_from(models, idx, family):
    model, wrapped = models[family]
    assert [sublayer.kind for sublayer in wrapped.sublayers] == ['attn', 'mlp'] * LAYERS
    for captured, by_hand in zip(capture(wrapped, idx)[::2], inputs_by_hand(model, family, idx)):
        assert torch.equal(captured, by_hand)


@pytest.mark.parametrize('family', PARALLEL)
def test_a_parallel_block_gives_one_sublayer(models, family):
    assert [sublayer.kind for sublayer in models[family][1].sublayers] == ['block'] * LAYERS


def test_a_parallel_block_whose_attention_writes_nothing_is_still_parallel():
    model = build(PARALLEL['GPT-NeoX, parallel']())
    for block in blocks_of(model):
        nn.init.zeros_(block.attention.dense.weight)
        nn.init.zeros_(block.attention.dense.bias)
    assert {sublayer.kind for sublayer in pretrained.Pretrained(model).sublayers} == {'block'}


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_reading_does_not_change_what_the_model_says(models, idx, family):
    model, wrapped = models[family]
    before = model(idx).logits
    with measure.hooked(wrapped, lambda s, streams: None, lambda layer, sinks: None):
        assert torch.equal(wrapped(idx), before)
    assert torch.equal(model(idx).logits, before)


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_sinks_are_the_means_of_the_models_own_attentions(models, idx, family):
    model, wrapped = models[family]
    sinks = {}
    with measure.hooked(wrapped, lambda s, streams: None, sinks.__setitem__):
        wrapped(idx)
    own = model(idx, output_attentions=True).attentions
    assert list(sinks) == list(range(LAYERS))
    for layer, attention in enumerate(own):
        expected = attention.double().numpy()[..., 0].mean(-1)
        np.testing.assert_allclose(sinks[layer].numpy(), expected, rtol=1e-5)


@torch.no_grad()
def patched_by_hand(model, family, idx, block, after_attention):
    """The logits of a model where entry (0, 3, 5) of the stream in a block is set to zero.

    At the end of a block its output is changed. After attention, what attention adds is made the opposite
    of the block's input there, so that the sum is zero for the MLP and for the residual connection."""
    module = blocks_of(model)[block]
    entry = 0, 3, 5
    if not after_attention:

        def zero(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            h[entry] = 0

        handle = module.register_forward_hook(zero)
        logits = model(idx).logits
        handle.remove()
        return logits

    caught = {}

    def note_input(module, args, kwargs):
        caught['input'] = (args[0] if args else kwargs['hidden_states'])[entry].clone()

    def write(module, args, output):
        written = output[0] if isinstance(output, tuple) else output
        written[entry] = -caught['input']

    names = [name for name, _ in module.named_children()]
    writers = {
        'Gemma 2, sandwich norms': 'post_attention_layernorm',
        'Gemma 3, sandwich norms': 'post_attention_layernorm',
        'OLMo 2, output norms': 'post_attention_layernorm',
    }
    attention = next(name for name in ('attn', 'attention', 'self_attn', 'self_attention') if name in names)
    handles = [
        module.register_forward_pre_hook(note_input, with_kwargs=True),
        module.get_submodule(writers.get(family, attention)).register_forward_hook(write),
    ]
    logits = model(idx).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_setting_one_entry_to_zero_is_what_a_patch_by_hand_does(models, idx, family):
    model, wrapped = models[family]
    kinds = [sublayer.kind for sublayer in wrapped.sublayers]
    unchanged = wrapped(idx)
    for s in (
        len(kinds) // 2,
        len(kinds) // 2 + 1,
    ):  # of sequential families, the MLP and the attention after it

        def zero(sublayer, streams, s=s):
            if sublayer != s:
                return None
            h = streams['h'].clone()
            h[0, 3, 5] = 0
            return {'h': h}

        with measure.hooked(wrapped, zero):
            logits = wrapped(idx)
        block = s if kinds[s] == 'block' else s // 2
        by_hand = patched_by_hand(model, family, idx, block, kinds[s] == 'attn')
        torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, unchanged, rtol=1e-4, atol=1e-4)


def test_replacing_what_the_head_reads_changes_the_logits_alone(models, idx):
    _, wrapped = models['Llama, grouped heads']
    handle = wrapped.decoder_input_module.register_forward_pre_hook(lambda module, args: (-args[0],))
    turned = wrapped(idx)
    handle.remove()
    torch.testing.assert_close(turned, -wrapped(idx))


def test_tied_embeddings_and_weights_in_bfloat16_are_read_like_others(idx):
    config = transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    model = build(config, torch.bfloat16)
    wrapped = pretrained.Pretrained(model)
    assert wrapped.num_params() == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        own = model(idx, output_hidden_states=True).hidden_states
    for end, hidden in zip(capture(wrapped, idx)[1::2][:-1], own[1:-1]):
        assert end.dtype == torch.bfloat16 and torch.equal(end, hidden)
    assert wrapped(idx).dtype == torch.float32


def test_an_attention_map_is_dropped_before_its_mlp_runs(models, idx):
    _, wrapped = models['Llama, grouped heads']
    block, alive = wrapped.blocks[0], []

    def note_map(module, args, output):
        alive.append(weakref.ref(output[1]))

    def look(module, args):
        alive.append(alive[0]() is not None)

    handles = [
        block.attention.register_forward_hook(note_map),
        block.mlp_start.register_forward_pre_hook(look),
    ]
    with torch.no_grad(), measure.hooked(wrapped, lambda s, streams: None):
        wrapped(idx)
    for handle in handles:
        handle.remove()
    assert alive[1] is False


def test_fewer_windows_go_through_a_model_at_once_the_larger_its_maps_and_vocabulary(models):
    _, wrapped = models['Llama, grouped heads']
    counts = [wrapped.sequences_at_once(T) for T in (16, 256, 4096)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert 3 * HEADS * 256**2 * counts[1] <= pretrained.FLOATS_AT_ONCE['cpu']


# ---- what is refused, and why


def test_an_encoder_is_refused():
    with pytest.raises(UserError, match='BertLMHeadModel is an encoder'):
        pretrained.Pretrained(build(transformers.BertConfig(**SMALL)), blocks_only=True)


@pytest.mark.parametrize(
    'config, parts',
    [
        (
            lambda: transformers.BloomConfig(vocab_size=V, hidden_size=D, n_layer=LAYERS, n_head=HEADS),
            'BloomBlock: ',
        ),
        (
            lambda: transformers.GraniteConfig(**GROUPED, residual_multiplier=0.5),
            'GraniteDecoderLayer: self_attn',
        ),
    ],
    ids=['attention that adds by itself', 'updates that are scaled'],
)
def test_a_block_that_is_not_understood_is_named_and_measured_at_its_end_if_asked(idx, config, parts):
    model = build(config())
    with pytest.raises(UserError, match=f'{parts}.*--blocks_only'):
        pretrained.Pretrained(model)
    wrapped = pretrained.Pretrained(model, blocks_only=True)
    assert [sublayer.kind for sublayer in wrapped.sublayers] == ['block'] * LAYERS
    with torch.no_grad():
        own = model(idx, output_hidden_states=True).hidden_states
    for end, hidden in zip(capture(wrapped, idx)[:-1], own[1:-1]):
        assert torch.equal(end, hidden)


def test_a_block_whose_residual_connection_reads_a_copy_is_refused(monkeypatch):
    def forward(self, hidden_states, **options):
        after_attention = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **options)[0]
        copy = after_attention.clone()
        return copy + self.mlp(self.post_attention_layernorm(after_attention))

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, 'forward', forward)
    with pytest.raises(UserError, match='does not go on from a stream that was replaced'):
        pretrained.Pretrained(build(transformers.LlamaConfig(**GROUPED)))


def test_hidden_states_that_are_not_what_blocks_return_are_refused(monkeypatch):
    model = build(transformers.LlamaConfig(**GROUPED))
    true = model.forward

    def forward(*args, **options):
        output = true(*args, **options)
        if output.hidden_states:
            output.hidden_states = tuple(h + 1 for h in output.hidden_states)
        return output

    monkeypatch.setattr(model, 'forward', forward)
    with pytest.raises(UserError, match='is not what it calls its hidden states'):
        pretrained.Pretrained(model)


def test_weights_that_are_not_finite_are_refused():
    model = build(transformers.LlamaConfig(**GROUPED))
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match='not finite'):
        pretrained.Pretrained(model)


def test_a_model_without_attention_heads_is_measured_at_the_ends_of_its_blocks_if_asked(idx):
    model = build(transformers.MambaConfig(**MAMBA, vocab_size=V))
    with pytest.raises(UserError, match='MambaForCausalLM has no attention heads.*--blocks_only'):
        pretrained.Pretrained(model)
    wrapped = pretrained.Pretrained(model, blocks_only=True)
    with torch.no_grad():
        own = model(idx, output_hidden_states=True).hidden_states
    ends = capture(wrapped, idx)
    assert len(ends) == LAYERS
    for end, hidden in zip(ends, own):
        assert torch.equal(end, hidden)


def sentence_of_refusal(model, **options):
    """What is said of a model that is refused."""
    with pytest.raises(UserError) as refused:
        pretrained.Pretrained(model, **options)
    assert '\n' not in str(refused.value)
    return str(refused.value)


def test_an_error_inside_a_models_forward_is_named_in_a_sentence():
    # Each of the 4 heads of the queries would have 8 of the keys.
    model = build(transformers.StableLmConfig(**SMALL, num_key_value_heads=32))
    for blocks_only in (False, True):
        said = sentence_of_refusal(model, blocks_only=blocks_only)
        assert said.startswith('StableLmForCausalLM fails on 24 tokens: RuntimeError: ')
        assert '--blocks_only' not in said


def test_an_error_while_blocks_are_taken_apart_ends_with_advice(monkeypatch):
    model = build(transformers.LlamaConfig(**GROUPED))

    def fail(block, calls):
        raise KeyError('hidden_states')

    monkeypatch.setattr(pretrained, 'understand_block', fail)
    said = sentence_of_refusal(model)
    assert "the blocks of LlamaForCausalLM are not understood: KeyError: 'hidden_states'" in said
    assert said.endswith('with --blocks_only')


def test_a_model_whose_sizes_are_not_known_is_named_in_a_sentence(monkeypatch):
    model = build(transformers.LlamaConfig(**GROUPED))
    monkeypatch.setattr(model, 'get_input_embeddings', lambda: None)
    assert sentence_of_refusal(model).startswith('the sizes of LlamaForCausalLM are not known: ')


# ---- folders of save_pretrained, text, and the commands


TEXT = 'Once upon a time there was a ledger, and every line of it was kept. ' * 12 + 'Ärger.\n'
B = 40  # tokens of a window


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a small Llama and its tokenizer in llama/, and text.txt."""
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    build(transformers.LlamaConfig(**{**GROUPED, 'vocab_size': 258})).save_pretrained('llama')
    save_tokenizer('llama')
    Path('text.txt').write_text(TEXT, encoding='utf-8')
    for name in ('draw_run', 'draw_comparison_of'):
        monkeypatch.setattr(measure.figures, name, lambda *args: ())
    return tmp_path


def command(*arguments):
    measure.main([str(a) for a in ('--device=cpu', '--text', 'text.txt', f'--block_size={B}', *arguments)])


def report(name):
    return json.loads(Path('out', name, 'measure.json').read_text())


def refusal(*arguments):
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code.startswith('error: ') and '\n' not in stop.value.code
    return stop.value.code


def change_config(folder, **changes):
    path = Path(folder, 'config.json')
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_statistics_of_a_folder_are_those_of_its_hidden_states(folder):
    command('--ckpt', 'llama', '--sequences=100')
    measured = report('llama')
    windows = pretrained.Texts(['text.txt'], lambda text: [2 + b for b in text.encode()], B, 258, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained('llama')
    tokenizer = transformers.AutoTokenizer.from_pretrained('llama')
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    rows = torch.tensor([[0, *ids[i : i + B]] for i in range(0, len(ids) - B + 1, B)])
    with torch.no_grad():
        output = model(rows[:, :-1], output_hidden_states=True)
    losses = F.cross_entropy(output.logits.flatten(0, 1).double(), rows[:, 1:].flatten())
    assert measured['data']['sequences'] == len(rows) == len(windows.fixed_starts(100))
    assert measured['loss']['value'] == pytest.approx(losses.item(), rel=1e-5)
    assert measured['loss_per_byte']['value'] == pytest.approx(
        losses.item() * len(ids) / len(TEXT.encode()), rel=1e-5
    )
    assert [s['kind'] for s in measured['streams']['h']['sublayers']] == ['attn', 'mlp'] * LAYERS
    a = np.abs(output.hidden_states[2].numpy().astype(np.float64))  # after block 1, which is sublayer 3
    sublayer = measured['streams']['h']['sublayers'][3]
    n, position, dim = np.unravel_index(a.argmax(), a.shape)
    top = sublayer['top'][0]
    assert (top['position'], top['dim'], top['token']) == (position, dim, rows[n, position])
    assert top['value'] == pytest.approx(a.max(), rel=1e-5)
    assert sublayer['median'] == pytest.approx(np.median(a.reshape(len(a), -1), 1).mean(), rel=1e-5)
    assert sublayer['start_ratio'] == pytest.approx(
        a[:, 0].mean(0).max() / np.median(a[:, 0].mean(0)), rel=1e-5
    )


def test_of_a_model_without_attention_heads_a_report_holds_streams_and_no_sinks(folder):
    shutil.rmtree('llama')
    build(transformers.MambaConfig(**MAMBA, vocab_size=258)).save_pretrained('mamba')
    save_tokenizer('mamba')
    assert '--blocks_only' in refusal('--ckpt', 'mamba', '--sequences=2')
    command('--ckpt', 'mamba', '--sequences=2', '--blocks_only')
    measured = report('mamba')
    assert measured['attention_sink'] is None
    assert [s['kind'] for s in measured['streams']['h']['sublayers']] == ['block'] * LAYERS


@pytest.mark.parametrize(
    'adds_bos, bos, first',
    [(True, 'auto', 0), (False, 'auto', None), (False, 'always', 0), (True, 'never', None)],
)
def test_windows_start_with_the_token_that_the_tokenizer_or_the_flag_says(
    folder, capsys, adds_bos, bos, first
):
    save_tokenizer('llama', adds_bos)
    command('--ckpt', 'llama', '--sequences=2', f'--bos={bos}')
    assert report('llama')['data']['first_token'] == first
    expected = 'position 0 is a token of the text' if first is None else "position 0 is '<s>'"
    assert expected in capsys.readouterr().out


def test_a_tokenizer_without_bos_cannot_always_start_with_it(folder):
    path = Path('llama/tokenizer_config.json')
    path.write_text(json.dumps({**json.loads(path.read_text()), 'bos_token': None}))
    assert '--bos=never' in refusal('--ckpt', 'llama', '--bos=always')


def save_run(path):
    """A checkpoint of ours, on data whose tokens are bytes; of the data only meta.json is there."""
    Path('data').mkdir()
    Path('data/meta.json').write_text(json.dumps({'tokenizer': 'bytes', 'vocab_size': 257, 'eot': 256}))
    size = dict(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**size))
    checkpoint = {
        'model': model.state_dict(),
        'model_args': asdict(model.config),
        'iter_num': 0,
        'config': {'dataset': str(Path('data').resolve())},
    }
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)


def test_a_run_of_ours_and_a_pretrained_model_stand_side_by_side_with_losses_per_byte(folder, capsys):
    save_run(Path('runs/mine/ckpt.pt'))
    command('--ckpt', 'runs/mine', 'hf:llama', '--sequences=4', '--block_size=16', '--out=reports')
    rows = capsys.readouterr().out.split('decoded stream of each run')[1].splitlines()
    assert rows[1].split() == ['mine', '(h)', 'llama', '(h)']
    per_byte = next(row for row in rows if row.startswith('loss (nats per byte)'))[22:].split(']')
    mine = json.loads(Path('reports/mine/measure.json').read_text())
    # Our tokenizer has one token a byte.
    assert mine['loss_per_byte'] == mine['loss'] and mine['data']['split'] == 'text'
    assert float(per_byte[0].split()[0]) == pytest.approx(mine['loss']['value'], rel=1e-3)


def test_losses_are_paired_where_two_models_see_the_same_tokens_and_only_there(folder):
    save_run(Path('runs/mine/ckpt.pt'))
    shutil.copytree('llama', 'other')
    command('--ckpt', 'runs/mine', 'llama', 'other', '--block_size=16', '--bos=never', '--out=all')
    reports = [Path('all', name, 'measure.json') for name in ('mine', 'llama', 'other')]
    mine, llama, other = (json.loads(path.read_text()) for path in reports)
    assert measure.paired_difference(other, llama)['value'] == 0
    assert measure.paired_difference(llama, mine)['value'] is None


def test_windows_of_one_token_are_measured(folder):
    command('--ckpt', 'llama', '--sequences=3', '--block_size=1')
    h = report('llama')['streams']['h']
    assert h['start_token_concentration']['value'] == h['top1_at_start']['value'] == 1


def test_a_model_in_bfloat16_is_measured_in_float32_unless_asked_otherwise(folder):
    transformers.AutoModelForCausalLM.from_pretrained('llama', dtype=torch.bfloat16).save_pretrained('llama')
    save_tokenizer('llama')
    losses = {}
    for dtype in ('float32', 'bfloat16'):
        command('--ckpt', 'llama', '--sequences=2', f'--dtype={dtype}')
        losses[dtype] = report('llama')['loss']['value']
    assert losses['float32'] == pytest.approx(losses['bfloat16'], rel=0.02)
    assert losses['float32'] != losses['bfloat16']


def test_texts_of_a_large_vocabulary_are_cut_into_windows_that_no_file_end_interrupts(tmp_path):
    paths = [tmp_path / 'a.txt', tmp_path / 'b.txt']
    for path, count in zip(paths, (11, 8)):
        path.write_text(' '.join(str(100_000 + i) for i in range(count)))

    def encode(text):
        return [int(word) for word in text.split()]

    plain = pretrained.Texts(paths, encode, 5, 200_000)
    inputs, targets = plain.windows(sorted(plain.fixed_starts(10)))
    assert inputs[:, 0].tolist() == [100_000, 100_005, 100_000]
    assert (targets == inputs + 1).all()
    started = pretrained.Texts(paths, encode, 4, 200_000, first_token=7)
    inputs, targets = started.windows(sorted(started.fixed_starts(10)))
    assert inputs.tolist()[1] == [7, 100_004, 100_005, 100_006] and targets.tolist()[1][-1] == 100_007
    assert len(inputs) == 4


@pytest.mark.parametrize(
    'arguments, said',
    [
        (('--block_size=1000',), '64 tokens'),
        (('--block_size=0',), 'at least 1'),
        (('--text', 'short.txt'), 'short.txt is 5 tokens long, too short for one window of 40'),
        (('--text', 'nowhere.txt'), 'No such file'),
        (('--text', 'binary.txt'), 'UTF-8'),
        (('--device_map=auto',), 'pip install accelerate'),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(folder, arguments, said):
    if 'accelerate' in said and transformers.utils.is_accelerate_available():
        pytest.skip('accelerate is installed')
    Path('short.txt').write_text('short')
    Path('binary.txt').write_bytes(b'\xff\xfe\xfa' * 99)
    assert said in refusal('--ckpt', 'llama', *arguments)


def remove_weights(folder):
    (folder / 'model.safetensors').unlink()


def pickle_weights(folder):
    torch.save({}, folder / 'pytorch_model.bin')
    remove_weights(folder)


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / 'model.safetensors')
    del weights['model.layers.1.mlp.up_proj.weight']
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


def cut_weights(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:1000])


def need_code(folder):
    change_config(
        folder, model_type='mine', auto_map={'AutoConfig': 'mine.Config', 'AutoModelForCausalLM': 'mine.M'}
    )


def make_encoder_decoder(folder):
    transformers.T5Config(vocab_size=258, d_model=D, num_layers=2).save_pretrained(folder)


def make_image_model(folder):
    transformers.ViTConfig(hidden_size=D).save_pretrained(folder)


@pytest.mark.parametrize(
    'damage, said',
    [
        (remove_weights, 'safetensors'),
        (pickle_weights, 'pickles, which can run any program, are never read'),
        (drop_a_weight, 'lacks 1 weights of LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight'),
        (cut_weights, 'its weights are damaged'),
        (need_code, 'such code is never run'),
        (make_encoder_decoder, 'an encoder and a decoder'),
        (make_image_model, 'no causal language model'),
        (lambda folder: (folder / 'config.json').write_text('{'), 'not a valid JSON'),
        (lambda folder: (folder / 'tokenizer.json').unlink(), 'its tokenizer is missing'),
    ],
)
def test_a_folder_that_is_no_whole_causal_model_is_refused_in_a_sentence(folder, damage, said):
    damage(folder / 'llama')
    assert said in refusal('--ckpt', 'llama')
    assert not Path('out').exists()


def test_revisions_of_a_folder_are_the_folders_in_it_and_give_lines_of_a_log(folder):
    for step in (0, 20):
        shutil.copytree('llama', f'runs/step{step}')
    args = measure.parse_arguments(
        ['--ckpt', 'hf:runs@step0', 'hf:runs@step20', '--text', 'text.txt', '--block_size=16', '--device=cpu']
    )
    lines = [measure.log_line(run, args) for run in checkpoint.open_runs(args)]
    assert [line['iter'] for line in lines] == [0, 20]
    assert lines[0]['val_loss'] == lines[1]['val_loss']
    assert len(lines[0]['streams']['h']['max_over_median']) == 2 * LAYERS


def test_a_revision_that_a_folder_does_not_hold_is_refused(folder):
    assert 'there is no revision step3 of llama' in refusal('--ckpt', 'hf:llama@step3')


def test_a_pretrained_model_needs_a_text(folder):
    with pytest.raises(SystemExit, match='--text FILE'):
        measure.main(['--ckpt', 'llama'])


def test_no_network_is_said_in_a_sentence(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert 'huggingface.co cannot be reached' in refusal('--ckpt', 'hf:nobody/nothing')


@pytest.mark.parametrize(
    'error, said',
    [
        ('RevisionNotFoundError', 'nobody/nothing@step3: it has no such revision'),
        ('RepositoryNotFoundError', 'there is no such model'),
        ('GatedRepoError', 'accept the conditions'),
    ],
)
def test_what_the_hub_answers_is_said_in_a_sentence(folder, monkeypatch, error, said):
    import huggingface_hub.errors

    def answer(*args, **options):
        raise getattr(huggingface_hub.errors, error)('no', response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(transformers.utils.hub, 'hf_hub_download', answer)
    assert said in refusal('--ckpt', 'hf:nobody/nothing@step3')


def test_without_transformers_a_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert 'pip install -r requirements-dev.txt' in refusal('--ckpt', 'llama')


def test_transformers_is_imported_in_one_place_and_not_at_the_top_of_a_file():
    importing = {}
    for path in ROOT.glob('**/*.py'):
        folders = path.relative_to(ROOT).parts
        is_ours = folders[0] != 'tests' and not any(name.startswith('.') for name in folders)  # no .venv
        if not is_ours:
            continue
        lines = [line for line in path.read_text().splitlines() if 'import transformers' in line]
        lines = [line for line in lines if not line.lstrip().startswith(('def', "'", '#'))]
        importing |= {path.name: lines} if lines else {}
    assert list(importing) == ['pretrained.py']
    assert all(line.startswith('  ') for line in importing['pretrained.py'])


# ---- real weights

# Beside the repository, or beside the folder that it is a worktree in.
PLACES = [parent / 'shared' / 'stories260K' for parent in ROOT.parents]
STORIES = next((place for place in PLACES if place.exists()), None)


@pytest.mark.skipif(STORIES is None, reason='needs ../shared/stories260K')
def test_a_trained_llama_gives_the_numbers_of_its_readme(folder):
    measure.main(
        ['--device=cpu', '--ckpt', str(STORIES), '--text', str(STORIES / 'story.txt'), '--block_size=175']
    )
    measured = report('stories260K')
    assert measured['loss']['value'] == pytest.approx(1.05595, abs=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    wrapped = pretrained.Pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation='eager')
    )
    idx = torch.tensor([tokenizer((STORIES / 'story.txt').read_text()).input_ids])
    assert idx.shape == (1, 176)
    tops, medians = [], []
    for h in capture(wrapped, idx)[1:8:2]:
        a = h[0].abs()
        tops.append((round(a.max().item(), 2), *divmod(a.argmax().item(), a.shape[1])))
        medians.append(round(a.median().item(), 4))  # of an even number of entries the lower middle one
    assert tops == [(3.66, 0, 30), (4.21, 0, 30), (4.82, 38, 35), (7.03, 0, 15)]
    assert medians == [0.2745, 0.3751, 0.5048, 0.7194]
