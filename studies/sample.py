"""
Text from a checkpoint, as a first look at what it has learned.

    python -m studies.sample --ckpt out/ledger_demo --prompt 'def ' --samples=3
    python -m studies.sample --ckpt out/ledger_160m --prompt=FILE:opening.txt --temperature=0.7

A token is drawn from the softmax of the logits over the temperature, among the `--top_k` most probable ones.
A sample ends at the end-of-text id. The whole text is read again for each token, and its last block_size
tokens where it is longer: nothing is kept between steps, so every arm and every pretrained model can be
asked."""

from pathlib import Path

import torch

from checkpoint import check_run_arguments, open_runs, run_parser
from data.loader import UserError
from measure import command


@torch.no_grad()
def sample(model, idx, length, block_size, end, temperature, top_k, generator):
    """Yields the ids of one continuation, at most `length` of them.

    idx: (1, T), the prompt. end: the end-of-text id, which is not yielded. temperature: 0 takes the most
    probable token. generator: of the draws, on the CPU, so that they are the same on every device."""
    for _ in range(length):
        logits = model(idx[:, -block_size:])[0, -1].float().cpu()
        token = draw(logits, temperature, top_k, generator)
        if token == end:
            return
        yield token
        idx = torch.cat([idx, torch.tensor([[token]], device=idx.device)], 1)


def draw(logits, temperature, top_k, generator):
    """logits: (V,) float32. Returns a token id."""
    if temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(top_k, len(logits)))
    probabilities = (best.values / temperature).softmax(0)
    return int(best.indices[torch.multinomial(probabilities, 1, generator=generator)])


def prompt_text(prompt):
    """Returns the text of --prompt, or of the file that it names as FILE:<path>."""
    if not prompt.startswith('FILE:'):
        return prompt
    path = Path(prompt.removeprefix('FILE:'))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'cannot read {path} as text ({error}): name another file as --prompt=FILE:…'
        ) from None


def prompt_ids(run, text):
    """Returns (1, T): the id that windows start with or else the end of the text before, and the text's
    ids."""
    first = run.meta['eot'] if run.tokens.first_token is None else run.tokens.first_token
    if hasattr(run.encoding, 'encode_ordinary'):
        ids = run.encoding.encode_ordinary(text)
    else:  # a tokenizer of transformers
        ids = run.encoding.encode(text, add_special_tokens=False)
    return torch.tensor([[first, *ids] if first is not None else ids])


def run(argv):
    args = arguments().parse_args(argv)
    check_run_arguments(args, samples=1, length=1, top_k=1)
    if not 0 <= args.temperature < float('inf'):
        raise UserError(f'--temperature is {args.temperature}: expected 0 or more')
    text = prompt_text(args.prompt)
    for opened in open_runs(args):
        generator = torch.Generator().manual_seed(args.seed)
        idx, end = prompt_ids(opened, text).to(args.device), opened.meta.get('eot')
        for number in range(1, args.samples + 1):
            print(f'---- {opened.name}, iteration {opened.iter_num}, sample {number}')
            ids = sample(
                opened.model,
                idx,
                args.length,
                opened.tokens.block_size,
                end,
                args.temperature,
                args.top_k,
                generator,
            )
            print(text + opened.encoding.decode(list(ids)))


def arguments():
    parser = run_parser(__doc__, sequences=None, writes='nothing')
    parser.add_argument('--prompt', default='', help='what to continue, or FILE:<path> (default: nothing)')
    parser.add_argument('--samples', type=int, default=1, help='how many continuations (default 1)')
    parser.add_argument('--length', type=int, default=200, help='tokens of each, at most (default 200)')
    parser.add_argument('--temperature', type=float, default=0.8, help='0: the most probable (default 0.8)')
    parser.add_argument('--top_k', type=int, default=200, help='tokens to draw among (default 200)')
    return parser


def main(argv=None):
    command(run, argv)


if __name__ == '__main__':
    main()
