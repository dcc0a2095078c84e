"""
What a training step moves through memory and keeps for backward, counted without a GPU: torch.compile's own graphs, partition and fusion on fake
tensors of 64 × 1024 tokens, each kernel's inputs and outputs once. A floor, not a time: it leaves out what a kernel reads twice.

    python -m speed.traffic --out=results/h200/traffic.json        160m: baseline, ledger, ledger through kernels.py; both precisions of the streams

Counted is what the last of --layers layers adds, times 12: products over tokens are in, the embedding, the head and its loss are not. It reads Inductor's
internals (PyTorch 2.13) and takes the fusions of its GPU backend, so a GPU's own version may fuse otherwise.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault('TRITON_INTERPRET', '1')
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import ir
from torch._inductor.compile_fx import fake_tensor_prop
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V

from data.loader import atomic_write
from model import GPT, GPTConfig
from speed.bench import machine

B, T, VOCAB = 64, 1024, 50257
VIEWS = {
    'view',
    'transpose',
    'permute',
    'detach',
    'alias',
    't',
    'unsqueeze',
    'squeeze',
    'reshape',
    'expand',
    'unbind',
    'select',
    'split',
    'slice',
    'split_with_sizes',
    '_unsafe_view',
}


class Done(Exception):
    pass


def bytes_of(x):
    size = 1
    for n in x.get_size():
        size *= int(n)
    return size * x.get_dtype().itemsize


def moved(gm, inputs):
    """Returns the bytes that the kernels of a graph read and write."""
    with V.set_fake_mode(fake_tensor_prop(gm, inputs)):
        post_grad_passes(gm, False)
        fake_tensor_prop(gm, inputs)
        graph = GraphLowering(gm)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            found = 0
            for kernel in Scheduler(graph.operations).nodes:
                node = kernel.node if len(kernel.get_nodes()) == 1 else None
                if isinstance(
                    node, ir.ExternKernel
                ):  # by the shapes of its arguments: they may be parts of larger tensors
                    tensors = [x for x in node.inputs if isinstance(x, ir.IRNode)] + (
                        [] if isinstance(node.layout, ir.MultiOutputLayout) else [node]
                    )
                    found += sum(map(bytes_of, [node] if isinstance(node, ir.MultiOutput) else tensors))
                else:
                    found += kernel.get_read_write_buffers_sizes()
    return found


def kept(gm):
    """Returns the bytes that the forward graph hands to backward, other than its own inputs and the weights."""
    storages = {}
    for node in next(n for n in gm.graph.nodes if n.op == 'output').args[0]:
        while getattr(node, 'op', '') == 'call_function' and (str(node.target).split('.') + [''])[1] in VIEWS:
            node = node.args[0]
        value = getattr(node, 'meta', {}).get('val')
        if (
            isinstance(value, torch.Tensor)
            and node.op != 'placeholder'
            and value.ndim
            and value.shape[0] in (B, B * T)
        ):
            storages[node] = value.numel() * value.element_size()
    return sum(storages.values())


def count(layers, fast, **settings):
    """Returns {forward, backward, kept}: bytes."""
    found = {}

    def forward(gm, inputs):
        found.update(kept=kept(gm), forward=moved(gm, inputs))
        return gm

    def backward(gm, inputs):
        found['backward'] = moved(gm, inputs)
        raise Done

    def partition(gm, inputs, **more):
        joint_graph_passes(gm)
        return min_cut_rematerialization_partition(gm, inputs, **more)

    torch._dynamo.reset()
    model = GPT(GPTConfig(n_layer=layers, vocab_size=VOCAB, block_size=T, **settings))
    if fast:
        from speed import kernels

        model = kernels.as_fast(model)
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    idx = torch.zeros(B, T, dtype=torch.long)
    with (
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor_config.patch(cpu_backend='triton'),
        torch.autocast('cpu', torch.bfloat16),
    ):
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(idx, idx)
        except Exception:  # Done, within the compiler's own
            if 'backward' not in found:
                raise
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--layers', type=int, default=3, help='at least 2: what one layer adds is a difference'
    )
    parser.add_argument('--out', type=Path)
    args, report = (
        parser.parse_args(argv),
        {
            'command': 'python -m speed.traffic ' + ' '.join(sys.argv[1:] if argv is None else argv),
            **machine(),
            'tokens': B * T,
            'GB in 12 layers': {},
        },
    )
    print(f'{"GB in 12 layers":44}{"forward":>10}{"backward":>10}{"kept":>10}')
    for bf16_streams in (False, True):
        for name, fast, residual in (
            ('baseline', False, 'baseline'),
            ('ledger', False, 'ledger'),
            ('ledger through kernels.py', True, 'ledger'),
        ):
            few, more = (
                count(n, fast, residual=residual, bf16_streams=bf16_streams)
                for n in (args.layers - 1, args.layers)
            )
            line = {
                key: round(12 * (more[key] - few[key]) / 1e9, 1) for key in ('forward', 'backward', 'kept')
            }
            label = f'{name}, {"bfloat16" if bf16_streams else "float32"} streams'
            report['GB in 12 layers'][label] = line
            print(f'{label:44}' + ''.join(f'{value:10.1f}' for value in line.values()), flush=True)
    if args.out:
        with atomic_write(args.out, 'w') as file:
            json.dump(report, file, indent=1)


if __name__ == '__main__':
    main()
