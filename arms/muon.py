"""
Muon for the hidden matrices, AdamW for the rest (Jordan et al. 2024; Park et al. 2025, arXiv 2506.19697).

Park et al. trained without outliers under this optimizer and single-scale norms (muon_ssnorm), and hold Adam,
which scales each coordinate by itself, for the cause. Hidden matrices are those of the sublayers, a residual
operator's included; embeddings, head, gains and biases are AdamW's.

Muon is PyTorch's: momentum 0.95 with Nesterov, five Newton-Schulz steps on a whole matrix (queries, keys and
values are one), and the weight decay of the config. Its updates are scaled to the size of AdamW's
("match_rms_adamw"), so that both take the same learning rate, lr. The sources differ there: this is the
choice that adds no setting.
"""

import torch


class MuonAndAdamW:
    """Two optimizers that look like one to train.py. `found_inf`: while it is 1 no weight changes."""

    def __init__(self, muon, adamw):
        self.parts = muon, adamw
        self.found_inf = None
        for p in muon.param_groups[0]['params']:
            muon.state[p]['momentum_buffer'] = torch.zeros_like(p)

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def step(self):
        muon, adamw = self.parts
        adamw.found_inf = self.found_inf
        adamw.step()
        # AdamW's kernel looks at found_inf by itself. Muon does not know it, so what it should have left
        # alone
        # is put back. Asking for the value instead would make the processor wait for the GPU.
        momenta = [entry['momentum_buffer'] for entry in muon.state.values()]
        changed = muon.param_groups[0]['params'] + momenta
        before = [x.clone() for x in changed]
        muon.step()
        if self.found_inf is not None:
            for x, old in zip(changed, before):
                x.copy_(torch.where(self.found_inf > 0, old, x))

    def state_dict(self):
        """Returns {'state': {index of the parameter: …}, 'param_groups': […]}, Muon's parameters first."""
        first, second = (part.state_dict() for part in self.parts)
        offset = sum(len(group['params']) for group in first['param_groups'])
        state = {**first['state'], **{offset + i: entry for i, entry in second['state'].items()}}
        groups = [
            {**group, 'params': [offset + i for i in group['params']]} for group in second['param_groups']
        ]
        return {'state': state, 'param_groups': first['param_groups'] + groups}

    def load_state_dict(self, saved):
        for part, groups in zip(self.parts, (saved['param_groups'][:1], saved['param_groups'][1:])):
            indices = [i for group in groups for i in group['params']]
            state = {i: saved['state'][i] for i in indices if i in saved['state']}
            part.load_state_dict({'state': state, 'param_groups': groups})


def make_optimizer(model, config):
    hidden = [p for p in model.sublayers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    vector_decay = config.weight_decay if config.decay_all else 0.0
    groups = [
        {'params': [p for p in rest if p.ndim >= 2], 'weight_decay': config.weight_decay},
        {'params': [p for p in rest if p.ndim < 2], 'weight_decay': vector_decay},
    ]
    muon = torch.optim.Muon(
        hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn='match_rms_adamw'
    )
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    return MuonAndAdamW(muon, adamw)
