"""The command `minillm`: `main` parses and dispatches, and every verb that is more than one call has a module."""
