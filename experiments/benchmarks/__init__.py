"""What the benchmark is made of: fair clocks, the functions that are timed, tables."""
