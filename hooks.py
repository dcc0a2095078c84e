"""
What passes through a model, seen and replaced by forward hooks: streams, reads and attention sinks.
"""

from contextlib import contextmanager
from functools import partial

import torch

from data.loader import UserError


def attention_sink(attention, q, k):
    """q, k: (B, n_head, T, d / n_head) of an Attention. Returns (B, n_head): the mean probability that
    queries give to position 0. Gu et al. 2025, §3."""
    # values that are 1 at position 0 and else 0: attention returns the probability itself
    one_hot = torch.zeros_like(k)
    one_hot[:, :, 0] = 1
    return attention.attend(q, k, one_hot)[..., 0].mean(-1)


@contextmanager
def hooked(model, on_streams, on_sinks=None, on_reads=None):
    """While it lasts, calls functions on what passes through an uncompiled model.

    on_streams(s, streams) is called after every sublayer s with {name: (B, T, d)}; streams that an operator
    derives from its own are among them. What it returns, a dict of streams or None, takes the place of these.
    on_sinks(layer, sinks) is called in every attention with the mean probability of position 0, (B, n_head).
    on_reads(s, parts) is called with what each stream alone adds to the read of sublayer s, {name: (B, T,
    d)}, if there are several. A model that has a method of this name is asked instead, as pretrained ones
    have."""
    if hasattr(model, 'hooked'):
        with model.hooked(on_streams, on_sinks):
            yield
        return
    handles = []
    for s, sublayer in enumerate(model.sublayers):
        handles.append(sublayer.register_forward_hook(stream_hook(s, on_streams)))
        if on_sinks and sublayer.kind == 'attn':
            attention = sublayer.function
            handles.append(attention.qkv.register_forward_hook(sink_hook(s // 2, attention, on_sinks)))
        if on_reads and len(model.stream_names) > 1:
            handles.append(sublayer.register_forward_pre_hook(read_hook(s, on_reads)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_hook(s, on_streams):
    """Returns the forward hook of sublayer s, whose output is its streams by name and its commit gate."""

    def hook(sublayer, inputs, output):
        streams, commit_gate = output
        replaced = on_streams(s, {**streams, **sublayer.residual.derived(streams)})
        if replaced is None:
            return None
        return {name: replaced.get(name, x) for name, x in streams.items()}, commit_gate

    return hook


def sink_hook(layer, attention, on_sinks):
    """Returns the forward hook of an attention's qkv map."""

    def hook(qkv, inputs, output):
        q, k, _ = attention.heads(*output.chunk(3, -1))
        on_sinks(layer, attention_sink(attention, q, k))

    return hook


def read_hook(s, on_reads):
    """Returns the forward pre-hook of sublayer s. A stream's part of the read is what is read of it alone."""

    def hook(sublayer, inputs):
        streams = inputs[0]
        nothing = {name: torch.zeros_like(x) for name, x in streams.items()}
        on_reads(s, {name: sublayer.residual.read({**nothing, name: x}) for name, x in streams.items()})

    return hook


@contextmanager
def modules_hooked(model, streams, on_streams):
    """The same for any model of torch. streams: {name of a stream: names of the modules whose outputs it is,
    in order}; 'blocks.3:input' is the first input of blocks.3. on_streams(s, {name: (B, T, d)}) is called at
    each."""
    modules, handles = dict(model.named_modules()), []
    try:
        for stream, places in streams.items():
            for s, place in enumerate(places):
                handles.append(hook_place(modules, place, partial(on_streams, s), stream))
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_place(modules, place, on_stream, stream):
    """Hooks one module of `modules`, {name: module}, so that on_stream({stream: (B, T, d)}) is called
    there."""
    name, _, side = place.partition(':')
    if name not in modules or side not in ('', 'input'):
        known = ', '.join(list(filter(None, modules))[:8])
        raise UserError(f"there is no module '{place}': name one of model.named_modules() ({known}, …)")

    def see(found):
        x = found[0] if isinstance(found, tuple) and found else found
        if not torch.is_tensor(x) or x.ndim != 3 or not x.is_floating_point():
            what = f'a tensor {tuple(x.shape)}' if torch.is_tensor(x) else f'a {type(x).__name__}'
            raise UserError(f"module '{place}' gives {what}: a stream is a tensor (B, T, d) of floats")
        on_stream({stream: x})

    if side == 'input':
        return modules[name].register_forward_pre_hook(lambda module, inputs: see(inputs))
    return modules[name].register_forward_hook(lambda module, inputs, output: see(output))
