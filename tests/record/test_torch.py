"""The torch side: whole-batch data sets, the loader, set_step."""

import pickle

import numpy as np
import pytest
import torch

from whalefall.errors import ConfigError, DtypeError
from whalefall.record import (
    ConcatDataset,
    DataLoader,
    Dataset,
    FileReader,
    FileWriter,
    GlobalShuffle,
    ReaderRegistry,
    Subset,
)


class Numbers(Dataset):
    """Samples are pickled pairs; keeps the batches it was asked for."""

    def process(self, indices, data):
        return [pickle.loads(sample) for sample in data]


def numbers(path, count, start=0):
    with FileWriter(path, count) as writer:
        for i in range(start, start + count):
            writer.write_one(pickle.dumps((i * 2, i * 3)))
    return Numbers(path)


@pytest.fixture
def dataset(tmp_path):
    return numbers(tmp_path / "a.ffr", 50)


def plain(loader):
    return [[part.tolist() for part in batch] for batch in loader]


def reference(generator_seed=None, **options):
    """What torch's own loader gives for the same pairs."""
    pairs = [(i * 2, i * 3) for i in range(50)]
    if generator_seed is not None:
        options["generator"] = torch.Generator().manual_seed(generator_seed)
    return plain(torch.utils.data.DataLoader(pairs, **options))


def test_a_list_of_indices_is_one_read(dataset):
    assert dataset[[3, 0, 3]] == [(6, 9), (0, 0), (6, 9)]
    assert len(dataset) == 50
    for wrong in (3, slice(0, 2), np.array([1])):
        with pytest.raises(DtypeError, match="must be a list of index"):
            dataset[wrong]


def test_a_dataset_without_process_says_what_to_write(dataset):
    with pytest.raises(NotImplementedError, match="process"):
        Dataset(dataset.reader.fnames)[[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_torchs_batches(dataset, workers):
    got = plain(DataLoader(dataset, batch_size=8, num_workers=workers))
    assert got == reference(batch_size=8)


def test_a_batch_is_one_read(dataset, monkeypatch):
    asked = []
    read = FileReader.read
    monkeypatch.setattr(FileReader, "read", lambda s, i: asked.append(len(i)) or read(s, i))
    list(DataLoader(dataset, batch_size=16))
    assert asked == [16, 16, 16, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_set_step_skips_batches_of_the_same_order_unread(dataset, monkeypatch, workers):
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, generator=generator, num_workers=workers
    )
    loader.set_step(5)
    asked = []
    read = FileReader.read
    monkeypatch.setattr(FileReader, "read", lambda s, i: asked.append(i) or read(s, i))
    assert len(loader) == 8
    assert plain(loader) == reference(5, batch_size=4, shuffle=True)[5:]
    assert len(asked) == (0 if workers else 8)
    loader.set_step(0)
    assert len(loader) == 13


def test_set_step_is_refused_where_it_means_nothing(dataset):
    with pytest.raises(ConfigError, match="0 … 12"):
        DataLoader(dataset, batch_size=4).set_step(13)
    with pytest.raises(ConfigError, match="not skippable"):
        DataLoader(dataset, batch_size=4, skippable=False).set_step(1)
    with pytest.raises(ConfigError, match="skippable=False"):
        DataLoader(dataset, batch_size=None)


def test_torchs_own_data_sets_load_as_usual():
    assert plain(DataLoader([(i, i) for i in range(4)], batch_size=3)) == [
        [[0, 1, 2], [0, 1, 2]],
        [[3], [3]],
    ]


def test_concat_keeps_order_and_repeated_indices(tmp_path, dataset):
    both = dataset + numbers(tmp_path / "b.ffr", 10, start=100)
    assert isinstance(both, ConcatDataset)
    assert len(both) == 60
    assert both[[55, 3, 55, -1]] == [(210, 315), (6, 9), (210, 315), (218, 327)]
    with pytest.raises(IndexError):
        both[[60]]
    with pytest.raises(ValueError, match="-61"):
        both[[-61]]
    with pytest.raises(ConfigError, match="at least one"):
        ConcatDataset([])
    with pytest.raises(DtypeError):
        ConcatDataset([dataset, [1]])


def test_subset_maps_indices_numpys_too(dataset):
    part = Subset(dataset, np.array([40, 41]))
    assert len(part) == 2
    assert part[[1, 0]] == [(82, 123), (80, 120)]
    assert plain(DataLoader(part, batch_size=2)) == [[[80, 82], [120, 123]]]


def test_the_registry_finds_nested_readers(dataset):
    outer = ReaderRegistry()
    outer.inner, outer.own = dataset, FileReader(dataset.reader.fnames)
    assert outer.ffreaders() == [dataset.reader, outer.own]
    assert len((dataset + dataset).ffreaders()) == 2
    del outer.own
    assert outer.ffreaders() == [dataset.reader]


def test_the_global_shuffle_is_a_batch_sampler(dataset):
    sampler = GlobalShuffle(50, seed=2).batches(8)
    got = [pair for batch in plain(DataLoader(dataset, batch_sampler=sampler)) for pair in batch[0]]
    assert sorted(got) == [2 * i for i in range(50)]
