# The baseline with RMSNorm on queries and keys: a plain suppression of the outlier.
# The published setting (Vemula 2026), but for the precision, bfloat16, and for weight decay, which spares vectors.
residual = 'baseline'
qk_norm = True

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
