"""The configuration: its keys, the conditions between them, and the way from files and overrides to a plan.

    config          the keys, one module per group (root.StageConfig holds a whole stage), and their description
    config.checks   conditions between keys, checked without loading a weight
    config.loader   files and overrides merged, validated and checked; `loader.run_plan.load_run` is the way in

Each imports only from those above it. Importing any of them imports neither torch nor transformers.
"""
