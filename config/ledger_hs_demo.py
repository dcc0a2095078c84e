# The ledger with a high price on committing.
# Small enough for two CPU cores: about two minutes.
residual = 'ledger'
gate_rank = 16
commit_sparsity = 0.3

n_layer = 4
n_head = 4
n_embd = 128
block_size = 256

dataset = 'pysource_demo'   # bytes of Python's standard library; train.py makes it

batch_size = 16
max_iters = 500
lr = 2e-3                   # a small model bears a larger one
warmup_iters = 50
eval_interval = 250
eval_sequences = 64
ckpt_interval = 250
compile = False             # it would take longer than it saves
