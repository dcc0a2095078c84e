"""
A baseline with as many parameters as the ledger: its MLP is 5 n_embd wide instead of 4.

That makes 177M parameters at 160m (baseline 163M, ledger 175M) and 280M at 290m (255M, 271M). What the ledger
gains over the baseline, but not over this, it may owe to its size.
"""

SETTINGS = {'mlp_ratio': 5}
