"""The paper, made again: what to train and to measure, tables, figures, and verdicts on claims."""
