"""What a model's answers are worth, and how far it is from its teacher: evaluator.py puts the pieces together."""
