"""GraySort: the Sort Benchmark's records made, sorted and checked.

Records have 100 bytes, of which the first 10 are the key. `gensort` makes record i from i alone;
`sort_file` sorts a file of any size in a stated memory, `gray_sort` files as tasks of a session;
`valsort` sums CRCs and finds disorder.
Source: sortbenchmark.org (gensort, valsort 1.5); smallpond's GraySort run.
"""

from whalefall.data.graysort.check import Summary, summarize, valsort
from whalefall.data.graysort.plan import gray_sort
from whalefall.data.graysort.records import KEY_BYTES, RECORD_BYTES, gensort, make_records
from whalefall.data.graysort.sort import sort_file

__all__ = [
    "KEY_BYTES",
    "RECORD_BYTES",
    "Summary",
    "gensort",
    "gray_sort",
    "make_records",
    "sort_file",
    "summarize",
    "valsort",
]
