"""minillm: distil a large causal language model into a small one. The fused losses are in `minillm.losses`."""

__version__ = "0.1.0"
