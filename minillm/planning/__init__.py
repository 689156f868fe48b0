"""`minillm plan`: memory, time and the number of ranks of a configuration, from shapes alone.

Models are built and run as shapes (torch's fake tensors): the same modules, attention, checkpointing, autocast and
caches as in a run, with no weight in memory. ledger.py adds up the tensors that are alive. Code that a dispatch mode
cannot see, or that has no shape-only form, has a twin here that allocates the same buffers: loss.py,
quantized_layers.py, experts.py.
"""
