"""Reports, model cards and the terminal: a run's records in words, tables and pictures."""
