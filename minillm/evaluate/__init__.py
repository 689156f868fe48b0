"""The worth of a model's answers, and its distance from its teacher: evaluator.py puts the pieces together."""
