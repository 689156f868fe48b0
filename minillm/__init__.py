"""Distillation of language models with fused losses: minillm.losses for the losses alone, `minillm train` for the rest."""

__version__ = "0.1.0"


class UserError(ValueError):
    """An error whose text is for the person at the terminal: which input it is about, what was expected, what to do.

    The command line prints the text without a traceback and ends with `exit_status`. Every other exception is a defect
    of the program, and keeps its traceback.
    """

    exit_status = 2  # something to correct in what was given
