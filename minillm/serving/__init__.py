"""A teacher behind HTTP, for students that are trained in other processes: docs/teachers.md."""
