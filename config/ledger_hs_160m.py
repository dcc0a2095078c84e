# The ledger with a high price on committing.
# The published setting (Vemula 2026), but for the precision, bfloat16, and for weight decay, which spares
# vectors. What does not stand here is train.py's default, the published setting at 160m.
residual = 'ledger'
commit_sparsity = 0.3

eval_interval = 1000  # the measurement costs under 2% of the time
