"""`import ffrecord` finds the record room, after `install()` only."""

import subprocess
import sys

CODE = """
import whalefall.compat, sys
whalefall.compat.install()
whalefall.compat.install()
import ffrecord, os, tempfile
from ffrecord import FileReader, FileWriter, PackedFolder, checkFsAlign, pack_folder, utils
from ffrecord.fileio import FileReader as same
from ffrecord.package import PackedFolder as packed
from ffrecord.utils import dump
import whalefall.record
assert same is FileReader is whalefall.record.FileReader and packed is PackedFolder
assert whalefall.record.__spec__.name == "whalefall.record"
assert utils.dump is dump and ffrecord.__all__ == sorted(ffrecord.__all__)
assert 'torch' not in sys.modules
from ffrecord.torch import ConcatDataset, DataLoader, Dataset, ReaderRegistry, Subset
assert checkFsAlign(sys.stderr.fileno()) is False
whalefall.compat.uninstall()
try:
    import ffrecord
except ModuleNotFoundError:
    print("gone")
"""


def test_the_originals_names_resolve():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (out.stdout, out.returncode) == ("gone\n", 0), out.stderr
