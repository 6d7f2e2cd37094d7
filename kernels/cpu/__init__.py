"""What a CPU runs natively: functions of numbers and NumPy arrays, compiled by numba once and kept on disk."""
