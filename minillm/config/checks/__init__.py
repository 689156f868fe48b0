"""Conditions on the keys of a stage beyond the type of each. `stage_checks.check_stage` runs every check."""
