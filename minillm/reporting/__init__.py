"""What the report and the model card are made of; minillm/report.py and minillm/model_card.py put it together."""
