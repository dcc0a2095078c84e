"""
What the studies take from scipy. It is imported here alone, and when it is first needed: the main job has no
scipy.
"""

from importlib import import_module

import numpy as np

from data.loader import UserError


def scipy(part):
    """Returns scipy.<part>, or raises UserError with the command that installs it."""
    try:
        return import_module(f'scipy.{part}')
    except ImportError:
        raise UserError('this study needs scipy: pip install -r requirements-dev.txt') from None


def least_squares(function, start):
    """Returns the point of least squares that MINPACK's Levenberg–Marquardt reaches from `start`, (p,).

    function: from (p,) to the residuals, (n,) with n at least p."""
    return scipy('optimize').leastsq(function, start, xtol=1e-9, ftol=1e-9)[0]


def t_quantile(probability, freedom):
    """Returns the quantile of Student's t with so many degrees of freedom."""
    return float(scipy('special').stdtrit(freedom, probability))


def lambert_w_of_exp(z):
    """Returns W(eᶻ), the w > 0 with w + log w = z. It takes z, because eᶻ itself may overflow."""
    return float(scipy('special').wrightomega(z))


def rank_correlation(x, y):
    """x, y: (n,). Returns Spearman's rank correlation. Ties have the mean of their ranks."""
    return float(scipy('stats').spearmanr(x, y).statistic)


def rank_correlation_p(x, y, permutations=10_000):
    """x, y: (n,), neither constant. Returns the two-sided p-value of their rank correlation, over
    permutations of y.

    It is the share of permutations in which the correlation is at least as large in magnitude."""
    ranks_x, ranks_y = (scipy('stats').rankdata(values) for values in (x, y))
    ranks_x = ranks_x - ranks_x.mean()
    observed = abs(ranks_x @ ranks_y)
    generator = np.random.default_rng(0)
    shuffled = np.array([generator.permutation(ranks_y) for _ in range(permutations)])
    as_large = abs(shuffled @ ranks_x) > observed * (1 - 1e-12)
    return float((1 + as_large.sum()) / (1 + permutations))
