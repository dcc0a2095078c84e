# The ledger: Deliberation is scratch, Commitment alone is decoded.
# The published setting (Vemula 2026), but for the precision, bfloat16, and for weight decay, which spares
# vectors. What does not stand here is train.py's default, the published setting at 160m.
residual = 'ledger'
commit_sparsity = 0.02

n_head = 16
n_embd = 1024

batch_size = 16
max_iters = 8000  # 131M tokens
eval_interval = 1000  # the measurement costs under 2% of the time
