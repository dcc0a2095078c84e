"""
Any causal language model of Hugging Face transformers, as a model that measure.py and the studies read.

    python measure.py --ckpt hf:EleutherAI/pythia-160m@step3000 --text novel.txt
    python measure.py --ckpt folder_of_save_pretrained --text novel.txt

What is worth knowing before reading on:
- a model is understood by running it once on a few tokens, not by its name. A block is sequential if its MLP
  starts from the block's input plus what attention wrote, and parallel if both are added at the end;
- a sequential block gives two sublayers, `attn` and `mlp`, a parallel one gives `block`. The stream is h;
- what is captured is checked when a model is opened: every block must be the sum of its input and of what its
  parts wrote, and must return the model's own `output_hidden_states`. A model that fails is refused;
- a model without attention heads, like Mamba, is measured at the ends of its blocks, with --blocks_only;
- attention is the model's own eager one. Its maps are reduced and dropped layer by layer.

transformers is imported in this file only, and only when a pretrained model is opened.
"""

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from checkpoint import OpenRun, output_folder
from data.loader import Texts, UserError

DEFAULT_BLOCK_SIZE = 1024
# How revisions, and folders of a Trainer, name a step: step3000, stage1-step1000-tokens3B, checkpoint-500.
STEP = re.compile(r'@(?:[^@]*[-_])?(?:step|checkpoint-)(\d+)')
TOKENS_OF_CHECK = 24  # how many tokens a model is run on when it is opened
# The share of a change at later tokens that may show at earlier ones: experts' sums may round differently.
CAUSAL_TOLERANCE = 1e-3
# How many numbers the largest tensors of a batch may hold: 2 GiB and 128 MiB in float32.
FLOATS_AT_ONCE = {'cuda': 2**29, 'cpu': 2**25}


class Sublayer(NamedTuple):
    kind: str  # 'attn', 'mlp', or 'block' where only the end of a block is measured


class Block(NamedTuple):
    """One block of a model, and the modules in it that are hooked."""

    module: nn.Module
    attention: nn.Module | None  # returns its output and its probabilities
    mlp_start: nn.Module | None  # the first module that reads the stream after attention, if that is measured


class Call(NamedTuple):
    """What one call of a module got and returned. The tensors are copies on the CPU: blocks add in place."""

    module: nn.Module
    address: int  # of the memory of the input
    input: torch.Tensor
    output: torch.Tensor
    is_attention: bool


@contextmanager
def in_a_sentence(beginning, reasons=None, advice=''):
    """Turns whatever goes wrong in transformers, or in what is asked of it, into one UserError.

    beginning: of the sentence, before what was found. advice: its end.
    reasons: {words in an error: what is said in its place}."""
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, its hub and the readers of files raise almost anything
        text = ' '.join(f'{type(error).__name__}: {error}'.split())
        known = [reason for words, reason in (reasons or {}).items() if words in text]
        raise UserError(f'{beginning}: {known[0] if known else text[:200]}{advice}') from None


def first_input(args, kwargs):
    """Returns the hidden states that a module was called with."""
    return args[0] if args else kwargs['hidden_states']


def first_output(output):
    """Returns the hidden states that a module gave back."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded(modules):
    """Gives a list that fills with a Call for every call of these modules, in the order of their returns."""
    calls, inputs, handles = [], [], []

    def before(module, args, kwargs):
        x = first_input(args, kwargs)
        inputs.append((x.data_ptr(), x.to('cpu', copy=True)))

    def after(module, args, kwargs, output):
        address, x = inputs.pop()
        is_attention = 'attention_mask' in kwargs and isinstance(output, tuple)
        output = first_output(output).to('cpu', copy=True)
        calls.append(Call(module, address, x, output, is_attention))

    for module in modules:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def is_sum(total, *terms, additions=2):
    """Is `total` the sum of `terms`, up to the rounding of so many additions in the precision of `total`?"""
    if any(term.numel() != total.numel() for term in terms):
        return False
    terms = [term.double().reshape(total.shape) for term in terms]
    error = (total.double() - sum(terms)).abs()
    bound = additions * torch.finfo(total.dtype).eps * sum(term.abs() for term in terms)
    return bool((error <= bound).all())


def understand_block(block, calls):
    """Finds out how a block adds to the stream. block: its own Call; calls: those of its children.

    Returns the Block and the two tensors that it added to its input. Raises UserError for anything else."""
    attention = next((i for i, call in enumerate(calls) if call.is_attention), None)
    if attention is not None:
        module, last = calls[attention].module, calls[-1]
        for writer, reader in zip(calls[attention:], calls[attention + 1 :]):
            is_new = reader.address != block.address
            reads_attention = is_new and is_sum(reader.input, block.input, writer.output)
            if reads_attention and is_sum(block.output, reader.input, last.output):
                return Block(block.module, module, reader.module), [writer.output, last.output]
        for writer in calls[attention:-1]:
            if is_sum(block.output, block.input, writer.output, last.output):
                return Block(block.module, module, None), [writer.output, last.output]
    parts = ', '.join(name for name, _ in block.module.named_children())
    raise UserError(
        f'the blocks of this model ({type(block.module).__name__}: {parts}) add neither attention and then '
        'the MLP to their input, nor both at once: measure what leaves its blocks, with --blocks_only'
    )


def find_blocks(model, count):
    """Returns the blocks of a model: the outermost ModuleList that has as many entries as it has layers."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    blocks = next((m for m in lists.values() if len(m) == count), None)
    if blocks is None:
        found = ', '.join(f'{name} of {len(m)}' for name, m in lists.items()) or 'none'
        raise UserError(
            f'{type(model).__name__} has no list of {count} blocks, so its streams are not known. '
            f'Lists of modules that were found: {found}'
        )
    return list(blocks)


class Pretrained(nn.Module):
    """A causal language model of transformers, with all that measure.py and the studies ask of a model.

    model: what AutoModelForCausalLM returns, with attn_implementation='eager'.
    blocks_only: measure the ends of blocks alone. A model without attention heads is measured only so.
    Raises UserError if the model is no decoder, if it cannot be run, or if its streams are not understood."""

    stream_names, decoded = ('h',), 'h'

    def __init__(self, model, blocks_only=False):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        name = type(model).__name__
        with in_a_sentence(f'the sizes of {name} are not known'):
            self.read_sizes()
        if not self.n_head and not blocks_only:
            raise UserError(
                f'{name} has no attention heads: measure what leaves its blocks, with --blocks_only'
            )
        generator = torch.Generator().manual_seed(0)
        idx = torch.randint(self.vocab_size, (1, TOKENS_OF_CHECK), generator=generator)
        idx = idx[:, : self.max_positions].to(self.device)
        with torch.no_grad():
            with in_a_sentence(f'{name} fails on {idx.shape[1]} tokens'):
                self.check_causal(idx)
            advice = '' if blocks_only else '. What leaves them may still be measured, with --blocks_only'
            with in_a_sentence(f'the blocks of {name} are not understood', advice=advice):
                self.understand(idx, find_blocks(model, self.n_layer), blocks_only)

    def read_sizes(self):
        """Takes the model's sizes from its config. n_head is 0 where it knows of no attention heads."""
        config = self.model.config.get_text_config()
        self.n_layer, self.n_embd = config.num_hidden_layers, config.hidden_size
        self.n_head = getattr(config, 'num_attention_heads', None) or 0
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.max_positions = getattr(config, 'max_position_embeddings', None)
        self.mlp_width = getattr(config, 'intermediate_size', None) or 4 * self.n_embd

    @property
    def device(self):
        """Where token ids go in. Streams and sinks are handed out there, wherever the blocks are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def sublayers(self):
        """A Sublayer for every place where the stream is captured, in order."""
        kinds = [('block',) if block.mlp_start is None else ('attn', 'mlp') for block in self.blocks]
        return [Sublayer(kind) for kinds_of_block in kinds for kind in kinds_of_block]

    @property
    def decoder_input_module(self):
        """What reads the stream after the last block: the final norm, or the head where there is none."""
        return self.reader[0]

    def num_params(self):
        return sum(p.numel() for p in self.model.parameters())

    def sequences_at_once(self, T):
        """Returns how many windows of T tokens go through the model together without taking much memory.
        The largest tensors are attention maps, logits, copies of the stream, and the inside of the MLP."""
        largest = max(3 * self.n_head * T, 3 * self.vocab_size, 8 * self.n_embd, 4 * self.mlp_width)
        return max(1, FLOATS_AT_ONCE[self.device.type] // (T * largest))

    def run(self, idx, **options):
        """idx: (B, T). Returns the output of the wrapped model."""
        self.shape = (*idx.shape, self.n_embd)
        return self.model(idx, use_cache=False, **options)

    def forward(self, idx):
        """idx: (B, T). Returns the logits, (B, T, V) float32."""
        return self.run(idx).logits.float()

    def start(self, idx):
        """idx: (B, T). Returns the streams before the first block, by name."""

        class Reached(Exception):
            pass

        def stop(module, args, kwargs):
            raise Reached(first_input(args, kwargs))

        handle = self.blocks[0].module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.run(idx)
        except Reached as reached:
            return {'h': reached.args[0].to(self.device)}
        finally:
            handle.remove()

    @contextmanager
    def hooked(self, on_streams, on_sinks=None):
        """Does what measure.hooked says.

        on_streams(s, {'h': (B, T, d)}) is called after every sublayer. What it returns, if anything, takes
        the place of the stream. on_sinks(layer, (B, n_head)) gets the mean probability of position 0."""

        def replacement(s, h):
            streams = on_streams(s, {'h': h.to(self.device)})
            return None if streams is None else streams['h'].to(h.device, h.dtype)

        def before_mlp(s, module, args, kwargs):
            h = first_input(args, kwargs).view(self.shape)
            changed = replacement(s, h)
            if changed is not None:  # in place, because the residual connection reads this very tensor
                h.copy_(changed)

        def after_block(s, module, args, output):
            changed = replacement(s, first_output(output))
            if changed is None or not isinstance(output, tuple):
                return changed
            return (changed, *output[1:])

        def after_attention(layer, module, args, output):
            probabilities = output[1]  # (B, n_head, T, T), or None where this model's attention keeps them
            if on_sinks and probabilities is not None:
                on_sinks(layer, probabilities[..., 0].float().mean(-1).to(self.device))
            return (output[0], None, *output[2:])  # a block would keep the map until its end

        handles, s = [], 0
        for layer, block in enumerate(self.blocks):
            if block.attention is not None:
                hook = partial(after_attention, layer)
                handles.append(block.attention.register_forward_hook(hook))
            if block.mlp_start is not None:
                hook = partial(before_mlp, s)
                handles.append(block.mlp_start.register_forward_pre_hook(hook, with_kwargs=True))
                s += 1
            handles.append(block.module.register_forward_hook(partial(after_block, s)))
            s += 1
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # What follows is run once, when a model is opened.

    def check_causal(self, idx):
        """Refuses a model whose answer at a token depends on later tokens. idx: (1, T)."""
        half = idx.shape[1] // 2
        other = idx.clone()
        other[:, half:] = (other[:, half:] + 1) % self.vocab_size
        change = (self(idx) - self(other)).abs()
        if not change.isfinite().all():
            raise UserError(
                f'{type(self.model).__name__} computes values that are not finite: its weights are damaged, '
                'or --dtype has too few digits for it'
            )
        if change[:, :half].mean() > CAUSAL_TOLERANCE * change[:, half:].mean():
            raise UserError(
                f'{type(self.model).__name__} is an encoder, since what it says at a token depends on later '
                'tokens: only causal language models are measured'
            )

    def trace(self, idx, modules):
        """Runs the model once. idx: (1, T); modules: its blocks.

        Returns three things: a list of the blocks' Calls, each with those of its children; the Calls after
        the last block; and the model's own hidden states."""
        inside = {m for block in modules for m in block.modules()}
        outside = [m for m in self.model.modules() if m not in inside and not list(m.children())]
        children = [child for block in modules for child in block.children()]
        calls_of_blocks, calls_since = [], []
        with recorded(dict.fromkeys([*modules, *children, *outside])) as calls:
            output = self.run(idx, output_hidden_states=True)
        for call in calls:
            if call.module not in modules:
                calls_since.append(call)
                continue
            own = set(call.module.children())
            calls_of_blocks.append((call, [c for c in calls_since if c.module in own]))
            calls_since = []
        return calls_of_blocks, calls_since, [h.cpu() for h in output.hidden_states]

    def understand(self, idx, modules, blocks_only):
        """Sets self.blocks and self.reader. idx: (1, T); modules: the model's blocks.

        Raises UserError where what would be captured is not what the model computes."""
        name = type(self.model).__name__
        calls, calls_after, hidden_states = self.trace(idx, modules)
        streams = [calls[0][0].input, *(block.output for block, _ in calls)]
        readers = [call for call in calls_after if torch.equal(call.input, streams[-1])]
        if [block.module for block, _ in calls] != modules or not readers:
            raise UserError(
                f'{name} does not run its {len(modules)} blocks one after the other, and then its head'
            )
        # Some models leave the embedding out of their hidden states.
        same = any(all(map(torch.equal, own, hidden_states)) for own in (streams[:-1], streams[1:]))
        # The last one mostly is after the final norm.
        ends = [streams[-1], readers[0].output]
        if not same or not any(torch.equal(h, hidden_states[-1]) for h in ends):
            raise UserError(f'what leaves the blocks of {name} is not what it calls its hidden states')
        self.reader = (readers[0].module,)  # in a tuple: the wrapped model has registered it
        if blocks_only:
            attentions = [next((c.module for c in own if c.is_attention), None) for _, own in calls]
            self.blocks = [Block(*parts, None) for parts in zip(modules, attentions)]
            return
        self.blocks, updates = [], []
        for block, own in calls:
            understood, written = understand_block(block, own)
            self.blocks.append(understood)
            updates += written
        if not is_sum(streams[-1], streams[0], *updates, additions=len(updates)):
            raise UserError(f'the embedding and all updates of {name} do not add up to its last hidden state')
        self.check_replacing(idx, modules)

    def check_replacing(self, idx, modules):
        """Turns the sign of the stream after every attention. Refuses a model that does not go on from it."""
        kinds = [sublayer.kind for sublayer in self.sublayers]

        def turned(s, streams):
            return {'h': -streams['h']} if kinds[s] == 'attn' else None

        with self.hooked(turned):
            calls, *_ = self.trace(idx, modules)
        for block, (call, own) in zip(self.blocks, calls):
            reader = next((c for c in own if c.module is block.mlp_start), None)
            if reader and not is_sum(call.output, reader.input, own[-1].output):
                raise UserError(f'{type(self.model).__name__} does not go on from a stream that was replaced')


def import_transformers():
    """Returns the module transformers, told to be quiet."""
    try:
        import huggingface_hub
        import transformers
    except ImportError:
        raise UserError(
            'a pretrained model needs the package transformers: pip install -r requirements-dev.txt'
        ) from None
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def find_model(name):
    """name: 'hf:<owner>/<model>[@<revision>]', or a folder, whose revisions are the folders in it.

    Returns three things: what transformers is to open, its revision or None, and the name in tables."""
    name = str(name).removeprefix('hf:')
    if Path(name).is_dir():
        return name, None, Path(name).resolve().name
    model, _, revision = name.partition('@')
    if not Path(model).is_dir():
        return model, revision or None, name
    folder = Path(model, revision)
    if not folder.is_dir():
        raise UserError(
            f'there is no revision {revision} of {model}: of a folder, revisions are folders in it'
        )
    return str(folder), None, f'{Path(model).resolve().name}@{revision}'


NOT_REACHED = (
    'it is not on this machine, and huggingface.co cannot be reached: connect, or name a local folder'
)
NO_SAFETENSORS = (
    'it has no weights as safetensors, and pickles, which can run any program, are never read: '
    'save it again with save_pretrained'
)
REASONS = {  # words in an error of transformers, and what is said in their place
    'trust_remote_code': 'it needs code that comes with it, and such code is never run here',
    'git identifier': 'it has no such revision',
    'gated repo': 'accept the conditions on its page first, and log in with hf auth login',
    'valid model identifier': 'there is no such model, neither as a folder nor on huggingface.co',
    "couldn't connect": NOT_REACHED,
    'outgoing traffic has been disabled': NOT_REACHED,
    'SafetensorError': 'its weights are damaged: get them again',
    'safetensors': NO_SAFETENSORS,
    'accelerate': '--device_map needs the package accelerate: pip install accelerate',
    'configuration class': 'it is no causal language model',
    'backend tokenizer': 'its tokenizer is missing, or needs a package that is not installed',
}


def load_model(name, revision, args):
    """Returns a model of transformers, in the precision and on the devices of args, and its tokenizer."""
    transformers = import_transformers()
    source = dict(pretrained_model_name_or_path=name, revision=revision or 'main', trust_remote_code=False)
    config = transformers.AutoConfig.from_pretrained(**source)
    if config.is_encoder_decoder:
        raise UserError(f'{name} has an encoder and a decoder: only causal language models are measured')
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=getattr(torch, args.dtype),
        device_map=args.device_map,
        attn_implementation='eager',
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(info['missing_keys']):
        raise UserError(f'{name} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}')
    return model if args.device_map else model.to(args.device), tokenizer


def first_token(tokenizer, bos):
    """Returns the id that every window starts with, or None.

    bos: 'always', 'never', or 'auto' for what the tokenizer does."""
    if bos == 'never':
        return None
    if bos == 'always':
        if tokenizer.bos_token_id is None:
            raise UserError('this tokenizer has no token for the beginning of a text: use --bos=never')
        return tokenizer.bos_token_id
    with_special = tokenizer('a').input_ids
    plain = tokenizer('a', add_special_tokens=False).input_ids
    return None if with_special[: len(plain)] == plain else with_special[0]


def open_run(name, args):
    """Opens a pretrained model for reading, and returns a checkpoint.OpenRun.

    name: as find_model takes it; args: the arguments of checkpoint.run_parser."""
    source, revision, label = find_model(name)
    if not args.text:
        raise UserError(f'{label} reads text in its own tokenizer: name some with --text FILE …')
    with in_a_sentence(f'cannot open {label}', REASONS):
        hf_model, tokenizer = load_model(source, revision, args)
    model = Pretrained(hf_model, args.blocks_only)
    longest = model.max_positions or args.block_size or DEFAULT_BLOCK_SIZE
    block_size = args.block_size or min(DEFAULT_BLOCK_SIZE, longest)
    if block_size > longest:
        raise UserError(f'--block_size is {block_size}, but {label} has positions for {longest} tokens')

    def encode(text):
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    tokens = Texts(args.text, encode, block_size, model.vocab_size, first_token(tokenizer, args.bos))
    folder_name = label.replace('/', '_')
    out, suffix = output_folder(args, folder_name, Path('out', folder_name, 'ckpt.pt'))
    step = STEP.search(label)
    run = OpenRun(
        name=folder_name,
        path=Path(source, 'config.json') if Path(source).is_dir() else Path(label),
        model=model,
        tokens=tokens,
        meta={'tokenizer': label, 'vocab_size': model.vocab_size, 'eot': tokenizer.eos_token_id},
        data=tokens.describe(),
        iter_num=int(step[1]) if step else 0,
        model_args={
            # by the names of model.GPTConfig where it has them
            'architecture': type(hf_model).__name__,
            'dtype': args.dtype,
            'n_layer': model.n_layer,
            'n_head': model.n_head,
            'n_embd': model.n_embd,
            'vocab_size': model.vocab_size,
            'block_size': block_size,
        },
        out=out,
        suffix=suffix,
    )
    run.encoding = tokenizer
    return run
