"""What the report and the model card are made of; minillm/reporting/report.py and minillm/reporting/model_card.py put it together."""
