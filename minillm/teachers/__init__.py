"""The models that judge the student: the protocol (teacher.py), its sources, and the pair of student and teacher (pair.py)."""
