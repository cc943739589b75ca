"""The reader of shards: the same bytes as zarr, nothing stale, nothing damaged, nothing from elsewhere."""

import os
import shutil

import numcodecs.zstd as zstd
import numpy as np
import pytest
import zarr
from fakes import in_threads
from zarr.codecs import Crc32cCodec, ZstdCodec

import pipeline.store.shard_file as chunks_module
from pipeline.store.shard_file import ChunkReader, OpenShards

SHAPE = (2, 5, 7, 16)


def make(root, dtype="float32", name="level0", count=10, compressors=None):
    """An array of two shards of 8 images; (values, reader)."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(count, *SHAPE)) * 50).astype(dtype)
    array = zarr.create_array(
        str(root / name),
        shape=values.shape,
        chunks=(1, *SHAPE),
        shards=(8, *SHAPE),
        dtype=dtype,
        compressors=compressors if compressors is not None else [Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    for start in range(0, count, 8):
        array[start : start + 8] = values[start : start + 8]
    return values, reader_of(root, name, compressed=compressors is not None)


def file_of(root, name, number):
    return root.resolve() / name / "c" / str(number) / "0/0/0/0"


def reader_of(root, name="level0", compressed=False, shards=None):
    return ChunkReader(
        lambda number: file_of(root, name, number), 8, compressed, OpenShards(128) if shards is None else shards
    )


def one(reader, image, dtype="float32"):
    out = np.full(SHAPE, 99, dtype)
    reader.read(image, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint16"])
@pytest.mark.parametrize("piece", [1 << 20, 64])
def test_reads_what_zarr_wrote(tmp_path, dtype, piece, monkeypatch):
    monkeypatch.setattr(chunks_module, "_PIECE", piece)  # one piece and many
    values, reader = make(tmp_path, dtype)
    for image in (9, 0, 7, 8, 0):
        np.testing.assert_array_equal(one(reader, image, dtype), values[image])


@pytest.mark.parametrize("level", [1, 3, 19])
def test_reads_compressed_chunks(tmp_path, level):
    values, reader = make(tmp_path, "uint8", compressors=[ZstdCodec(level=level), Crc32cCodec()])
    np.testing.assert_array_equal(one(reader, 9, "uint8"), values[9])


def test_a_shard_that_was_replaced_is_not_read_through_an_old_map(tmp_path):
    values, reader = make(tmp_path)
    np.testing.assert_array_equal(one(reader, 3), values[3])
    other, _ = make(tmp_path / "other", count=8)
    new = zarr.open_array(str(tmp_path / "other" / "level0"), mode="r+")
    new[0:8] = other[::-1].copy()
    os.replace(file_of(tmp_path / "other", "level0", 0), file_of(tmp_path, "level0", 0))
    np.testing.assert_array_equal(one(reader, 3), other[4])
    file_of(tmp_path, "level0", 0).unlink()
    with pytest.raises(FileNotFoundError):
        one(reader, 3)


def test_a_shard_that_was_changed_in_place_is_noticed(tmp_path):
    values, reader = make(tmp_path)
    one(reader, 3)
    file = file_of(tmp_path, "level0", 0)
    data = bytearray(file.read_bytes())
    data[3 * (4 * values[0].size + 4) + 1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        one(reader, 3)
    np.testing.assert_array_equal(one(reader, 2), values[2])
    os.truncate(file, len(data) // 2)
    with pytest.raises(ValueError, match="index"):
        one(reader, 2)
    os.truncate(file, 7)
    with pytest.raises(ValueError, match="7 bytes"):
        one(reader, 2)


def test_only_so_many_files_stay_open(tmp_path):
    shards = OpenShards(most=1)
    values, _ = make(tmp_path)
    reader = reader_of(tmp_path, shards=shards)
    before = len(os.listdir("/proc/self/fd"))
    for image in (0, 9, 1, 8, 9):
        np.testing.assert_array_equal(one(reader, image), values[image])
        assert len(shards) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_several_threads_while_files_are_given_up(tmp_path):
    values, _ = make(tmp_path)
    reader = reader_of(tmp_path, shards=OpenShards(most=1))
    wrong = []

    def work(seed):
        for image in np.random.default_rng(seed).integers(0, 10, 200):
            if not np.array_equal(one(reader, int(image)), values[image]):
                wrong.append(image)

    in_threads(work)
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 500, -1])
def test_nan_and_infinity_are_refused(tmp_path, dtype, value, place, monkeypatch):
    monkeypatch.setattr(chunks_module, "_PIECE", 64)
    values, reader = make(tmp_path, dtype)
    one(reader, 2, dtype)
    values[:8].reshape(8, -1)[2, place] = value
    zarr.open_array(str(tmp_path / "level0"), mode="r+")[0:8] = values[:8]
    with pytest.raises(ValueError, match="NaN or infinity"):
        one(reader, 2, dtype)
    one(reader, 3, dtype)


def test_the_largest_numbers_are_no_infinity(tmp_path):
    values, reader = make(tmp_path)
    values[:8].reshape(8, -1)[2, :2] = np.finfo("float32").max, np.finfo("float32").min
    values[:8].reshape(8, -1)[2, 2:4] = 1e-45, -0.0
    zarr.open_array(str(tmp_path / "level0"), mode="r+")[0:8] = values[:8]
    np.testing.assert_array_equal(one(reader, 2), values[2])


def write_index(file, change):
    """Change a shard's index and make its checksum right."""
    import google_crc32c

    data = file.read_bytes()
    entries = np.frombuffer(data[-(16 * 8 + 4) : -4], "<u8").reshape(8, 2).copy()
    change(entries)
    index = entries.tobytes()
    file.write_bytes(data[: -(16 * 8 + 4)] + index + google_crc32c.value(index).to_bytes(4, "little"))


@pytest.mark.parametrize("entry", [(2**64 - 2, 4484), (0, 2**63), (2**62, 4484), (0, 0), (0, 4483), (10**6, 4484)])
def test_an_index_that_points_elsewhere(tmp_path, entry):
    make(tmp_path)

    def change(entries):
        entries[2] = entry

    write_index(file_of(tmp_path, "level0", 0), change)
    with pytest.raises(ValueError, match="index places"):
        one(reader_of(tmp_path), 2)


def test_a_chunk_that_was_never_written(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="not there"):
        one(reader_of(tmp_path), 12)  # the last shard has two


def test_what_leads_elsewhere_is_not_opened(tmp_path):
    make(tmp_path)
    file = file_of(tmp_path, "level0", 0)
    shutil.move(file, tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="outside of the store"):
        one(reader_of(tmp_path), 2)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a file"):
        one(reader_of(tmp_path), 2)


def test_few_bytes_that_claim_to_be_many(tmp_path):
    """Asked before anything is unpacked."""
    for length in (1 << 30, 1119, 1121):
        with pytest.raises(ValueError, match="unpacks to"):
            chunks_module._expand(np.frombuffer(zstd.compress(bytes(length), 3), np.uint8), np.empty(1120, np.uint8))
    with pytest.raises(ValueError, match="unpacks to None"):
        chunks_module._expand(np.frombuffer(b"no frame at all", np.uint8), np.empty(1120, np.uint8))


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 65791, 65792, 1 << 20])
def test_the_length_in_a_frame(length):
    assert chunks_module._content_length(zstd.compress(bytes(length), 3)[:18]) == length
