"""
What a training step moves through memory and keeps for its backward pass, counted without a GPU:
torch.compile's own graphs, partition and fusion on fake tensors of 64 × 1024 tokens, with every kernel's
inputs and outputs once. This is a floor and not a time: it leaves out what a kernel reads twice.

    python -m speed.traffic --out=results/speed/traffic.json

It counts the baseline, the ledger, and the ledger through speed/kernels.py at 160m, in both precisions of
the streams. Counted is what the last of --layers layers adds, times 12. Products over tokens are in; the
embedding, the head and its loss are not. The program reads Inductor's internals (PyTorch 2.13) and takes
the fusions of its GPU backend, so the version on a GPU may fuse otherwise.
"""

import argparse
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

from model import GPT, GPTConfig
from speed.bench import machine, write_report

B, T, VOCAB, LAYERS = 64, 1024, 50257, 12
VIEWS = set(
    'view transpose permute detach alias t unsqueeze squeeze reshape expand unbind select split slice '
    'split_with_sizes _unsafe_view'.split()
)
KEYS = 'forward', 'backward', 'kept'


class Done(Exception):
    """Ends a compilation once everything has been counted."""


def bytes_of(tensor):
    size = tensor.get_dtype().itemsize
    for n in tensor.get_size():
        size *= int(n)
    return size


def bytes_of_external(node):
    """Returns what an operation that Inductor did not write reads and writes, by the shapes of its
    arguments: they may be parts of larger tensors."""
    if isinstance(node, ir.MultiOutput):
        return bytes_of(node)
    tensors = [x for x in node.inputs if isinstance(x, ir.IRNode)]
    if not isinstance(node.layout, ir.MultiOutputLayout):
        tensors.append(node)
    return sum(map(bytes_of, tensors))


def bytes_moved(graph_module, inputs):
    """Returns the bytes that the kernels of a graph read and write."""
    with V.set_fake_mode(fake_tensor_prop(graph_module, inputs)):
        post_grad_passes(graph_module, False)
        fake_tensor_prop(graph_module, inputs)
        graph = GraphLowering(graph_module)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            total = 0
            for kernel in Scheduler(graph.operations).nodes:
                node = kernel.node if len(kernel.get_nodes()) == 1 else None
                if isinstance(node, ir.ExternKernel):
                    total += bytes_of_external(node)
                else:
                    total += kernel.get_read_write_buffers_sizes()
    return total


def is_view(node):
    name = (str(node.target).split('.') + [''])[1] if getattr(node, 'op', '') == 'call_function' else ''
    return name in VIEWS


def bytes_kept(graph_module):
    """Returns the bytes that the forward graph hands to backward, other than its own inputs and the
    weights."""
    size_of = {}
    output = next(node for node in graph_module.graph.nodes if node.op == 'output')
    for node in output.args[0]:
        while is_view(node):
            node = node.args[0]
        value = getattr(node, 'meta', {}).get('val')
        is_made_here = isinstance(value, torch.Tensor) and node.op != 'placeholder'
        if is_made_here and value.ndim and value.shape[0] in (B, B * T):
            size_of[node] = value.numel() * value.element_size()
    return sum(size_of.values())


def make_model(layers, fast, **settings):
    model = GPT(GPTConfig(n_layer=layers, vocab_size=VOCAB, block_size=T, **settings))
    if not fast:
        return model
    from speed import kernels

    return kernels.as_fast(model)


def count(layers, fast, **settings):
    """Returns {forward, backward, kept}: bytes of a model of some layers."""
    found = {}

    def forward(graph_module, inputs):
        found.update(kept=bytes_kept(graph_module), forward=bytes_moved(graph_module, inputs))
        return graph_module

    def backward(graph_module, inputs):
        found['backward'] = bytes_moved(graph_module, inputs)
        raise Done

    def partition(graph_module, inputs, **options):
        joint_graph_passes(graph_module)
        return min_cut_rematerialization_partition(graph_module, inputs, **options)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    step = torch.compile(make_model(layers, fast, **settings), backend=backend, fullgraph=True, dynamic=False)
    idx = torch.zeros(B, T, dtype=torch.long)
    with (
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor_config.patch(cpu_backend='triton'),
        torch.autocast('cpu', torch.bfloat16),
    ):
        try:
            step(idx, idx)
        except Exception:  # Done, inside an exception of the compiler's
            if 'backward' not in found:
                raise
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--layers', type=int, default=3, help='2 or more: one layer adds a difference')
    parser.add_argument('--out', type=Path, help='JSON to write')
    args = parser.parse_args(argv)
    command = 'python -m speed.traffic ' + ' '.join(sys.argv[1:] if argv is None else argv)
    report = {'command': command, **machine(), 'tokens': B * T, 'GB in 12 layers': {}}
    arms = {
        'baseline': (False, 'baseline'),
        'ledger': (False, 'ledger'),
        'ledger through kernels.py': (True, 'ledger'),
    }
    print(f'{"GB in 12 layers":44}' + ''.join(f'{key:>10}' for key in KEYS))
    for bf16_streams in (False, True):
        for name, (fast, residual) in arms.items():
            settings = dict(residual=residual, bf16_streams=bf16_streams)
            fewer = count(args.layers - 1, fast, **settings)
            all_layers = count(args.layers, fast, **settings)
            line = {key: round(LAYERS * (all_layers[key] - fewer[key]) / 1e9, 1) for key in KEYS}
            label = f'{name}, {"bfloat16" if bf16_streams else "float32"} streams'
            report['GB in 12 layers'][label] = line
            print(f'{label:44}' + ''.join(f'{value:10.1f}' for value in line.values()), flush=True)
    write_report(report, args.out)


if __name__ == '__main__':
    main()
