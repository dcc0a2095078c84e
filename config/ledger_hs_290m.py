# The ledger with a high price on committing.
# The published setting (Vemula 2026), but for the precision, bfloat16, and for weight decay, which spares vectors.
residual = 'ledger'
gate_rank = 64
commit_sparsity = 0.3

n_layer = 12
n_head = 16
n_embd = 1024
block_size = 1024

dataset = 'fineweb_edu'

batch_size = 16
max_iters = 8000  # 131M tokens
lr = 3e-4
warmup_iters = 300
eval_interval = 1000  # the measurement costs under 2% of the time
