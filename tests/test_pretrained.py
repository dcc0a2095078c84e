"""
pretrained.py: streams, sinks and interventions of the families of transformers, each built here from a tiny
config, against what the models themselves return and against hooks written by hand; what is refused; and the
commands, on local folders.
"""

import numpy as np
import pytest
import torch
import torch.nn as nn

import measure

transformers = pytest.importorskip('transformers')
pretrained = pytest.importorskip('pretrained')

V, T, D, LAYERS, HEADS = 97, 24, 32, 3, 4
SMALL = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=64,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GROUPED = {**SMALL, 'num_key_value_heads': 2}
GPT2_NAMES = dict(
    vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2
)
FALCON = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    bos_token_id=1,
    eos_token_id=2,
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


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def models():
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
    of the block's input there, so that the sum is zero for the MLP's branch and for the residual connection."""
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
