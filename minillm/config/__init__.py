"""Typed configuration: a file a group, and loading that finds every problem before any model loads.

Nothing here imports torch or transformers. `loading.load_run` is the door.
"""
