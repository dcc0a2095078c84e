# The ledger: Deliberation is scratch, Commitment alone is decoded.
# Small enough for two CPU cores: about two minutes.
residual = 'ledger'
gate_rank = 16
commit_sparsity = 0.02

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

dataset = 'pysource_demo'  # bytes of Python's standard library; train.py makes it

batch_size = 8
max_iters = 1200
lr = 3e-3  # a small model bears a larger one
warmup_iters = 100
beta2 = 0.99  # a short run wants a short memory
eval_interval = 300
eval_sequences = 128
ckpt_interval = 600
compile = False  # it would take longer than it saves
init_from = 'auto'  # the same command again goes on where it was stopped
