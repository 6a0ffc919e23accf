"""The parts of the benchmark: fair clocks, the functions to time, tables."""
