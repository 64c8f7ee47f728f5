"""The room's names, its signatures beside the original's, and its example and page."""

import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import whalefall.record as record

ROOT = Path(__file__).parents[2]
# parameter names of FFRecord 1.4.0, recorded from its source
SIGNATURES = {
    "pack_folder": ["folder", "out_file", "verbose"],
    "dump": ["dataset", "fname", "nfiles", "verbose"],
    "FileReader": ["fname", "check_data"],
    "FileWriter": ["fname", "n"],
    "PackedFolder": ["ffr_file", "check_data"],
    "PackedFolder.list": ["path", "list_file", "list_dir", "recursive"],
    "PackedFolder.read_one": ["fname"],
    "PackedFolder.read": ["fnames"],
    "Dataset": ["fnames", "check_data"],
    "Dataset.process": ["indices", "data"],
    "Subset": ["dataset", "indices"],
    "ConcatDataset": ["datasets"],
    "DataLoader": [
        "dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "num_workers", "collate_fn",
        "pin_memory", "drop_last", "timeout", "worker_init_fn", "generator", "prefetch_factor",
        "persistent_workers", "skippable",
    ],
}  # fmt: skip


def test_the_public_names():
    assert record.__all__ == [
        "ChecksumError", "ConcatDataset", "DataLoader", "Dataset", "FileReader", "FileWriter",
        "GlobalShuffle", "IndexRangeError", "PackedFolder", "ReaderRegistry", "Subset",
        "append_shards", "dump", "pack_folder", "pack_shards", "permute",
    ]  # fmt: skip
    assert all(hasattr(record, name) for name in record.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        record.nothing  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_begin_as_the_originals(name):
    target = record
    for part in name.split("."):
        target = getattr(target, part)
    mine = [p for p in inspect.signature(target).parameters if p != "self"]
    assert mine[: len(SIGNATURES[name])] == SIGNATURES[name]


def test_the_room_needs_no_torch():
    code = (
        "import sys, whalefall.record, whalefall.record.commands; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_prints_what_it_says(capsys):
    runpy.run_path(str(ROOT / "examples" / "05_ffrecord.py"), run_name="__main__")
    text = (ROOT / "examples" / "05_ffrecord.py").read_text()
    wanted = re.search(r"Prints:\n(.*?)\"\"\"", text, re.S)[1]
    assert capsys.readouterr().out.split() == wanted.split()


def test_the_pages_first_example_runs(tmp_path):
    text = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_benchmark_rows_name_their_peer():
    rows = json.loads((ROOT / "docs" / "benchmarks" / "record.json").read_text())["rows"]
    assert rows
    assert all(row["against"] and row["ours"] for row in rows)
