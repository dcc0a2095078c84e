# The baseline with RMSNorm on queries and keys: a plain suppression of the outlier.
# The published setting (Vemula 2026), but for the precision, bfloat16, and for weight decay, which spares
# vectors. What does not stand here is train.py's default, the published setting at 160m.
residual = 'baseline'
qk_norm = True

eval_interval = 1000  # the measurement costs under 2% of the time
