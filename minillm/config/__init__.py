"""The configuration: its keys, what must hold between them, and how files and overrides become a plan.

    config          the keys, one module per group (root.StageConfig holds all of one stage), and what describes them
    config.checks   what must hold between keys, checked without loading a weight
    config.loader   files and overrides merged, validated and checked; `loader.run_plan.load_run` is the way in

Each imports only from those above it. Importing any of them imports neither torch nor transformers.
"""
