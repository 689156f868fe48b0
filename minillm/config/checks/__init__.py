"""What must hold between the keys of a stage, beyond the type of each. `stage_checks.check_stage` runs every check."""
