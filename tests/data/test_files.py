"""Loaders on files the tests write: what was written comes back, and damage is named."""

import gzip
import itertools
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from companion.data import (
    FeatureShards,
    ImageFolderAD,
    load_features,
    load_labels,
    make_textures,
    read_cifar_binary,
    read_idx,
    read_mnist_idx,
)


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((100, 6)).astype(np.float32)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


class TestFeatures:
    def test_every_format_gives_back_what_was_written(self, tmp_path, features):
        np.save(tmp_path / "x.npy", features)
        np.savez(tmp_path / "one.npz", features)
        np.savez_compressed(tmp_path / "two.npz", features=features, labels=np.arange(100))
        save_file({"h": torch.tensor(features), "y": torch.arange(100)}, tmp_path / "x.safetensors")
        expected = torch.tensor(features)
        assert torch.equal(load_features(tmp_path / "x.npy"), expected)
        assert torch.equal(load_features(str(tmp_path / "one.npz")), expected)
        assert torch.equal(load_features(tmp_path / "two.npz", "features"), expected)
        assert torch.equal(load_features(tmp_path / "x.safetensors", "h"), expected)
        assert load_labels(tmp_path / "two.npz", "labels").tolist() == list(range(100))
        assert load_labels(tmp_path / "x.safetensors", "y").tolist() == list(range(100))

    @pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "int32", "uint8"])
    def test_numbers_of_every_kind(self, tmp_path, dtype):
        x = np.arange(12).reshape(4, 3).astype(dtype)
        np.save(tmp_path / "x.npy", x)
        loaded = load_features(tmp_path / "x.npy")
        assert loaded.is_floating_point()
        assert torch.equal(loaded.double(), torch.arange(12.0).view(4, 3).double())

    def test_bfloat16_and_fortran_order(self, tmp_path, features):
        save_file({"x": torch.tensor(features).bfloat16()}, tmp_path / "x.safetensors")
        assert load_features(tmp_path / "x.safetensors").dtype == torch.bfloat16
        np.save(tmp_path / "f.npy", np.asfortranarray(features))
        assert torch.equal(load_features(tmp_path / "f.npy"), torch.tensor(features))

    def test_a_loaded_file_is_mapped_and_never_written(self, tmp_path, features):
        path = tmp_path / "x.npy"
        np.save(path, features)
        before = path.read_bytes()
        x = load_features(path)
        x += 1
        assert path.read_bytes() == before

    def test_ambiguous_or_wrong_key(self, tmp_path, features):
        np.savez(tmp_path / "x.npz", a=features, b=features)
        with pytest.raises(ValueError, match=r"x\.npz.*pass key=.*a, b"):
            load_features(tmp_path / "x.npz")
        with pytest.raises(ValueError, match="no array 'c'"):
            load_features(tmp_path / "x.npz", "c")

    @pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (3, 0), (0, 3)])
    def test_other_shapes_are_refused(self, tmp_path, shape):
        np.save(tmp_path / "x.npy", np.zeros(shape))
        with pytest.raises(ValueError, match="expected"):
            load_features(tmp_path / "x.npy")

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.npy does not exist"):
            load_features(tmp_path / "nowhere.npy")
        with pytest.raises(FileNotFoundError, match="holds no"):
            load_features(tmp_path)
        (tmp_path / "x.pt").write_bytes(b"123")
        with pytest.raises(ValueError, match=r"x\.pt: expected a file ending in"):
            load_features(tmp_path / "x.pt")

    @pytest.mark.parametrize("kept", [0, 5, 40, 140, 1000])
    @pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
    def test_cut_off_files(self, tmp_path, features, ending, kept):
        path = tmp_path / f"x.{ending}"
        if ending == "npy":
            np.save(path, features)
        elif ending == "npz":
            np.savez(path, features)
        else:
            save_file({"x": torch.tensor(features)}, path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"x\.{ending} is not a readable"):
            load_features(path)

    def test_flipped_bytes_in_a_compressed_file(self, tmp_path, features):
        path = tmp_path / "x.npz"
        np.savez_compressed(path, features)
        data = bytearray(path.read_bytes())
        data[400:420] = bytes(20)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.npz is not a readable"):
            load_features(path)

    def test_nothing_is_unpickled(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        evil = np.empty(1, dtype=object)
        evil[0] = _Evil()
        np.save(tmp_path / "x.npy", evil)
        np.savez(tmp_path / "x.npz", evil)
        (tmp_path / "plain.npy").write_bytes(pickle.dumps(_Evil()))
        (tmp_path / "plain.npz").write_bytes(pickle.dumps(_Evil()))
        for name in ("x.npy", "x.npz", "plain.npy", "plain.npz"):
            with pytest.raises(ValueError, match=name):
                load_features(tmp_path / name)
        assert not (tmp_path / "unpickled").exists()

    def test_labels_must_be_whole_numbers(self, tmp_path):
        np.save(tmp_path / "y.npy", np.zeros(3))
        with pytest.raises(ValueError, match="integer labels"):
            load_labels(tmp_path / "y.npy")
        with pytest.raises(FileNotFoundError):
            load_labels(tmp_path / "z.npy")


class TestShards:
    @pytest.fixture(params=["npy", "npz", "safetensors"])
    def folder(self, request, tmp_path, features):
        cuts = [0, 10, 10, 45, 46, *range(50, 101, 10)]  # one shard is empty; more than ten, so that 10 follows 9
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            path = tmp_path / f"part-{i}.{request.param}"
            if request.param == "npy":
                np.save(path, features[start:stop])
            elif request.param == "npz":
                np.savez(path, features[start:stop])
            else:
                save_file({"x": torch.tensor(features[start:stop])}, path)
        return tmp_path

    def test_a_folder_is_one_matrix(self, folder, features):
        shards = FeatureShards(folder)
        assert (len(shards), shards.dim, shards.dtype) == (100, 6, torch.float32)
        assert torch.equal(load_features(folder), torch.tensor(features))
        assert torch.equal(shards.rows(8, 47), torch.tensor(features[8:47]))
        assert "100 x 6" in repr(shards)

    @pytest.mark.parametrize("size", [1, 7, 100, 1000])
    @pytest.mark.parametrize("world", [1, 3, 7])
    def test_chunks_cover_every_row_once(self, folder, features, size, world):
        shards = FeatureShards(folder)
        parts = [list(shards.chunks(size, rank, world)) for rank in range(world)]
        assert all(0 < len(chunk) <= size for part in parts for chunk in part)
        assert torch.equal(torch.cat([chunk for part in parts for chunk in part]), torch.tensor(features))
        shares = [sum(map(len, part)) for part in parts]
        assert max(shares) - min(shares) <= 1

    def test_numbers_in_names_are_numbers(self, tmp_path):
        for i in (2, 10, 1):
            np.save(tmp_path / f"s{i}.npy", np.full((1, 1), float(i)))
        assert load_features(tmp_path).flatten().tolist() == [1, 2, 10]

    def test_shards_that_do_not_fit(self, tmp_path, features):
        np.save(tmp_path / "a.npy", features)
        np.save(tmp_path / "b.npy", features[:, :3])
        with pytest.raises(ValueError, match=r"b\.npy: expected 6 columns.*got 3"):
            FeatureShards(tmp_path)
        np.save(tmp_path / "b.npy", features.astype(np.float64))
        with pytest.raises(ValueError, match="float64"):
            FeatureShards(tmp_path)
        np.savez(tmp_path / "b.npz", features)
        with pytest.raises(ValueError, match="one kind"):
            FeatureShards(tmp_path)

    def test_bad_arguments(self, folder):
        shards = FeatureShards(folder)
        with pytest.raises(ValueError, match="rank"):
            next(shards.chunks(5, 2, 2))
        with pytest.raises(ValueError, match="start"):
            shards.rows(5, 101)

    def test_chunks_do_not_alias_the_file(self, folder, features):
        shards = FeatureShards(folder)
        next(shards.chunks(10)).zero_()
        assert torch.equal(load_features(folder), torch.tensor(features))


def _idx(array, code=0x08):
    return struct.pack(">BBBB", 0, 0, code, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


class TestMnist:
    @pytest.fixture
    def pixels(self):
        return np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)

    def _write(self, folder, pixels, zipped=False, prefix="train"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(len(pixels), dtype=np.uint8))):
            data = _idx(array)
            name = f"{prefix}-{kind}-ubyte"
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)

    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
    def test_reads_what_was_written(self, tmp_path, pixels, zipped, split, prefix):
        self._write(tmp_path, pixels, zipped, prefix)
        images, labels = read_mnist_idx(tmp_path, split)
        assert torch.equal(images, torch.tensor(pixels)[:, None] / 255)
        assert labels.tolist() == list(range(7))
        assert labels.dtype == torch.int64

    def test_other_number_types(self, tmp_path):
        values = np.linspace(-2, 2, 6, dtype=">f4").reshape(2, 3)
        (tmp_path / "x").write_bytes(_idx(values, 0x0D))
        assert torch.equal(read_idx(tmp_path / "x"), torch.tensor(values.astype("f4")))

    def test_missing_names_the_file_and_where_to_get_it(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*yann\.lecun\.com"):
            read_mnist_idx(tmp_path)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_mnist_idx(tmp_path / "no")
        with pytest.raises(ValueError, match="split"):
            read_mnist_idx(tmp_path, "validation")

    @pytest.mark.parametrize("damage", ["cut", "magic", "header", "empty", "longer"])
    def test_damage(self, tmp_path, pixels, damage):
        self._write(tmp_path, pixels)
        path = tmp_path / "train-images-idx3-ubyte"
        data = path.read_bytes()
        bad = {
            "cut": data[:-1],
            "magic": b"\x89PNG" + data[4:],
            "header": data[:10],
            "empty": b"",
            "longer": data + b"0",
        }
        path.write_bytes(bad[damage])
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*the set is at"):
            read_mnist_idx(tmp_path)

    def test_cut_off_gzip_and_lengths_that_differ(self, tmp_path, pixels):
        self._write(tmp_path, pixels, zipped=True)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with pytest.raises(ValueError, match="cut off"):
            read_mnist_idx(tmp_path)
        path.write_bytes(gzip.compress(_idx(pixels[:3])))
        with pytest.raises(ValueError, match="3 images"):
            read_mnist_idx(tmp_path)
        path.write_bytes(gzip.compress(_idx(pixels[0])))
        with pytest.raises(ValueError, match="3 dimensions"):
            read_mnist_idx(tmp_path)


class TestCifar:
    @pytest.fixture
    def pixels(self):
        return np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)

    def test_cifar10(self, tmp_path, pixels):
        for i in range(1, 6):
            head = np.full((4, 1), i, np.uint8)
            (tmp_path / f"data_batch_{i}.bin").write_bytes(np.hstack([head, pixels.reshape(4, -1)]).tobytes())
        images, labels = read_cifar_binary(tmp_path)
        assert torch.equal(images[8:12], torch.tensor(pixels) / 255)
        assert labels.tolist() == [i for i in range(1, 6) for _ in range(4)]
        with pytest.raises(FileNotFoundError, match=r"test_batch\.bin.*cifar\.html"):
            read_cifar_binary(tmp_path, "test")
        with pytest.raises(ValueError, match="superclasses"):
            read_cifar_binary(tmp_path, coarse=True)

    def test_cifar100(self, tmp_path, pixels):
        head = np.array([[1, 90], [2, 91], [3, 92], [19, 93]], np.uint8)
        (tmp_path / "test.bin").write_bytes(np.hstack([head, pixels.reshape(4, -1)]).tobytes())
        images, labels = read_cifar_binary(tmp_path, "test")
        assert torch.equal(images, torch.tensor(pixels) / 255)
        assert labels.tolist() == [90, 91, 92, 93]
        assert read_cifar_binary(tmp_path, "test", coarse=True)[1].tolist() == [1, 2, 3, 19]

    def test_damage(self, tmp_path, pixels):
        head = np.full((4, 1), 3, np.uint8)
        whole = np.hstack([head, pixels.reshape(4, -1)]).tobytes()
        path = tmp_path / "test_batch.bin"
        for bad in (whole[:-1], b""):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"test_batch\.bin: expected a multiple of 3073"):
                read_cifar_binary(tmp_path, "test")
        path.write_bytes(b"\xff" + whole[1:])
        with pytest.raises(ValueError, match="labels below 10, got 255"):
            read_cifar_binary(tmp_path, "test")
        with pytest.raises(ValueError, match="split"):
            read_cifar_binary(tmp_path, "all")


class TestImageFolder:
    @pytest.fixture
    def root(self, tmp_path):
        def write(array, *parts):
            path = tmp_path.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)

        def picture(image):
            return (image.movedim(0, 2) * 255).round().byte().numpy()

        generator = torch.Generator().manual_seed(0)
        for i, image in enumerate(make_textures(12, size=32, generator=generator).images):
            write(picture(image), "train", "good", f"{i:03}.png")
        for i, image in enumerate(make_textures(2, size=32, generator=generator).images):
            write(picture(image), "test", "good", f"{i:03}.png")
        for defect in ("blob", "scratch"):
            broken = make_textures(3, "weave", defect, size=32, generator=generator)
            for i, (image, mask) in enumerate(zip(broken.images, broken.masks)):
                write(picture(image), "test", defect, f"{i:03}.png")
                write(mask[0].byte().numpy() * 255, "ground_truth", defect, f"{i:03}_mask.png")
            (tmp_path / f"{defect}.pt").unlink(missing_ok=True)
            torch.save(tuple(broken), tmp_path / f"{defect}.pt")
        return tmp_path

    def test_reads_what_was_written(self, root):
        folder = ImageFolderAD(root, size=32)
        assert folder.defects == ["blob", "scratch"]
        assert folder.train().shape == (12, 3, 32, 32)
        test = folder.test()
        assert test.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
        assert not test.masks[:2].any()
        images, masks, _ = torch.load(root / "scratch.pt", weights_only=True)
        assert torch.allclose(test.images[5:], images, atol=0.5 / 255 + 1e-6)
        assert torch.equal(test.masks[5:], masks)
        assert [len(batch.labels) for batch in folder.test_batches(3)] == [3, 3, 2]

    def test_resampling_keeps_small_defects_and_grey_images_get_three_channels(self, root):
        small = ImageFolderAD(root, size=8)
        assert small.train().shape == (12, 3, 8, 8)
        assert small.test().masks[2:].flatten(1).any(1).all()
        Image.fromarray(np.full((20, 30), 100, np.uint8)).save(root / "train" / "good" / "000.png")
        first = ImageFolderAD(root, size=16).train()[0]
        assert torch.allclose(first, torch.full((3, 16, 16), 100 / 255))

    def test_missing_parts_are_named(self, root):
        (root / "ground_truth" / "blob" / "001_mask.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"001_mask\.png, the mask of .*001\.png.*mvtec"):
            ImageFolderAD(root)
        with pytest.raises(FileNotFoundError, match=r"does not exist.*mvtec"):
            ImageFolderAD(root / "bottle")
        for path in (root / "train" / "good").iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match="holds no image"):
            ImageFolderAD(root)

    def test_damaged_image(self, root):
        path = root / "train" / "good" / "003.png"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ValueError, match=r"003\.png is not a readable image"):
            ImageFolderAD(root).train()
        path.write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=r"003\.png is not a readable image"):
            ImageFolderAD(root).train()

    def test_missing_pillow_says_what_to_install(self, root, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "PIL", None)
        with pytest.raises(ImportError, match="pip install pillow"):
            ImageFolderAD(root).train()
