"""Many small samples in one file: write, read at random, shuffle, resume with other ranks.

Prints:
1000 samples, 4 of them: 34 0 999 34
damage found: sample 7
as batches: 1000 different samples
3 ranks go on where 2 stopped: 1000 different samples
a folder in one file: ['cat', 'dog'] meow
"""

import tempfile
from pathlib import Path

from whalefall.record import (
    ChecksumError,
    FileReader,
    FileWriter,
    GlobalShuffle,
    PackedFolder,
    pack_folder,
)

folder = Path(tempfile.mkdtemp())
with FileWriter(folder / "set.ffr", 1000) as writer:
    for i in range(1000):
        writer.write_one(str(i).encode())

reader = FileReader(folder / "set.ffr")
print(reader.n, "samples, 4 of them:", *(bytes(s).decode() for s in reader.read([34, 0, 999, 34])))

raw = bytearray((folder / "set.ffr").read_bytes())
raw[reader.get_offsets(0)[7]] ^= 1
(folder / "damaged.ffr").write_bytes(raw)
try:
    FileReader(folder / "damaged.ffr").read([7])
except ChecksumError as error:
    print("damage found:", str(error).split(", ")[1].split(":")[0])

shuffle = GlobalShuffle(reader.n, seed=1)
seen = [i for batch in shuffle.batches(64) for i in batch]
print("as batches:", len(set(seen)), "different samples")

seen = [i for rank in range(2) for batch in list(shuffle.batches(64, rank, 2))[:3] for i in batch]
shuffle.advance(3, 64, num_ranks=2)
state = shuffle.state_dict()  # goes into a checkpoint
shuffle = GlobalShuffle.from_state(state, reader.n)
seen += [i for rank in range(3) for batch in shuffle.batches(64, rank, 3) for i in batch]
print("3 ranks go on where 2 stopped:", len(set(seen)), "different samples")

for name, says in (("cat", "meow"), ("dog", "woof")):
    (folder / "animals" / name).mkdir(parents=True)
    (folder / "animals" / name / "says.txt").write_text(says)
pack_folder(folder / "animals", folder / "animals.ffr")
packed = PackedFolder(folder / "animals.ffr")
print("a folder in one file:", packed.list(), bytes(packed.read_one("cat/says.txt")).decode())
