"""Testing: what whalefall's own tests and benchmarks stand on, public for other projects.

`benchmark`: contenders interleaved in one run, medians, ratios, a page written from the results.
"""

__all__ = ["benchmark"]
