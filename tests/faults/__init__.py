"""What was tried to break it: `make faults` (python -m tests.faults). Each part of the table is a module here."""
