"""An experiment: every arm with every seed trained and measured alike, one table, and a verdict on each claim.

config.py says what a file may hold, experiment_file.py reads it, jobs.py orders the work, runner.py does it, measuring.py
measures a finished arm, results.py reads everything back, and verdicts.py, figures.py and experiment_report.py write it
down.
"""
