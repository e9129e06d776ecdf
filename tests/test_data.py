"""Augmentation against a slow reference, batches, and every reader with its bad inputs."""

import hashlib
import io
import os
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat, savemat

from conftest import REAL_DATA, refused
from defquant.cli import main
from defquant.data import Dataset, augment, batches, cifar, load, num_batches, pictures
from defquant.data.readers import pack as pack_data
from defquant.data.readers import read_mat
from defquant.errors import DefquantWarning, UserError
from test_fetch import pack

needs_shared = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real images in {REAL_DATA}")
rng = np.random.default_rng(0)


def make(n: int = 21, flip: bool = True, shift: int = 2, size: int = 6) -> Dataset:
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), np.uint8))
    return Dataset(images, torch.arange(n), tuple(map(str, range(n))), "made", flip, shift)


def fails(root: Path | None, *parts: str, name: str = "cifar10", split: Any = "train") -> str:
    return refused(lambda: load(name, root, split), *parts)


# ---------------------------------------------------------------- augmentation and batches


def slow_augment(
    images: NDArray[np.uint8], flip: bool, shift: int, generator: torch.Generator
) -> NDArray[np.uint8]:
    n, _, h, w = images.shape
    mirror = torch.randint(2 if flip else 1, (1, n), generator=generator)[0].tolist()
    offsets = torch.randint(2 * shift + 1, (2, n), generator=generator).tolist()
    out = np.empty_like(images)
    for i in range(n):
        padded = np.pad(images[i], ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        top, left = offsets[0][i], offsets[1][i]
        crop = padded[:, top : top + h, left : left + w]
        out[i] = crop[:, :, ::-1] if mirror[i] else crop
    return out


@given(
    shape=st.tuples(st.integers(0, 5), st.sampled_from([1, 3]), *[st.integers(1, 9)] * 2),
    flip=st.booleans(), seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_augment_is_pad_crop_flip(
    shape: tuple[int, ...], flip: bool, seed: int, data: st.DataObject
) -> None:
    """In any memory format; the images are left alone."""
    shift = data.draw(st.integers(0, min(shape[2:]) - 1))
    images = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    slow = slow_augment(images, flip, shift, torch.Generator().manual_seed(seed))
    for form in (torch.contiguous_format, torch.channels_last):
        given = torch.from_numpy(images).clone(memory_format=form)
        generator = torch.Generator().manual_seed(seed)
        fast = augment(given, flip=flip, shift=shift, generator=generator)
        assert fast.dtype == torch.uint8
        np.testing.assert_array_equal(fast.numpy(), slow)
        np.testing.assert_array_equal(given.numpy(), images)


@given(
    n=st.integers(1, 30), batch_size=st.integers(1, 12), world=st.integers(1, 3),
    shuffled=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_slices_of_all_processes_make_the_whole_batch(
    n: int, batch_size: int, world: int, shuffled: bool
) -> None:
    data = make(n)
    try:
        steps = num_batches(data, batch_size, world)
    except UserError:
        assert min(n, batch_size) < 2 * world
        return
    how: Any = {"seed": 1, "epoch": 2, "augment": shuffled}
    whole = list(batches(data, batch_size, **how))
    ranks = [list(batches(data, batch_size, **how, rank=r, world=world)) for r in range(world)]
    assert {len(part) for part in ranks} == {steps}
    assert len(whole) == num_batches(data, batch_size)
    for r, rank in enumerate(ranks):
        for (images, labels), (mine, my_labels) in zip(whole, rank, strict=False):
            assert len(my_labels) >= 2
            assert torch.equal(mine, images[r::world]) and torch.equal(my_labels, labels[r::world])


def test_an_epoch_holds_each_image_once_in_an_order_of_seed_and_epoch_only() -> None:
    data = make(40)

    def order(seed: int, epoch: int, batch_size: int = 8, augment: bool = True) -> list[int]:
        found = list(batches(data, batch_size, seed=seed, epoch=epoch, augment=augment))
        images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert sorted(labels.tolist()) == list(range(40))
        assert augment or torch.equal(images, data.images[labels].float() / 255)
        return labels.tolist()

    assert order(0, 1) == order(0, 1) == order(0, 1, 10) == order(0, 1, augment=False)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    first, again = (next(batches(data, 8, seed=0, epoch=1))[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_makes_the_same_batches() -> None:
    data = make(40)
    on_gpu = data.to("cuda")
    assert on_gpu.fingerprint == data.fingerprint
    pairs = zip(batches(data, 8, seed=0, epoch=0), batches(on_gpu, 8, seed=0, epoch=0), strict=True)
    for (images, labels), (gpu_images, gpu_labels) in pairs:
        assert gpu_images.is_cuda
        assert torch.equal(images, gpu_images.cpu())
        assert torch.equal(labels, gpu_labels.cpu())


def test_a_last_batch_of_one_image_is_left_out() -> None:
    data = make(21)
    assert num_batches(data, 5) == len(list(batches(data, 5, seed=0, epoch=0))) == 4
    assert num_batches(data, 9, world=2) == 2  # 9 + 9 + 3: the second process would get one image


def test_dataset_views() -> None:
    data = make(9)
    assert len(data) == data.num_classes == 9
    assert data.in_channels == 3
    assert data.first(None) is data is data.first(9) is data.to("cpu")
    assert torch.equal(data.first(4).images, data.images[:4])
    images, labels = data.take(torch.tensor([3, 3, 0]))
    assert labels.tolist() == [3, 3, 0]
    assert torch.equal(images, data.images[[3, 3, 0]] / 255)
    narrow = Dataset(data.images, data.labels.int(), data.classes, "x")
    assert narrow.labels.dtype == torch.int64
    assert repr(narrow) == "Dataset('x', 9 images 3 x 6 x 6, 9 classes)"


def four(images: torch.Tensor, labels: int = 4, classes: int = 4) -> Dataset:
    return Dataset(images, torch.arange(labels), ("a",) * classes, "x")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: augment(make().images, flip=False, shift=6, generator=torch.Generator()), "0..5"),
        (lambda: batches(make(shift=9), 4, seed=0, epoch=0), "shift must lie in 0..5"),
        (lambda: batches(make(), 1, seed=0, epoch=0), "2 images"),
        (lambda: batches(make(), 8, seed=0, epoch=0, rank=2, world=2), "in 0..1; found 2"),
        (lambda: make(9).first(0), "has 9 images here; found a request for the first 0"),
        (lambda: make(9).first(-1), "first -1"), (lambda: make(9).first(10), "first 10"),
        (lambda: four(torch.zeros(4, 3, 6, 6)), "float32 (4, 3, 6, 6): use images.mul"),
        (lambda: four(torch.zeros(4, 3, 6).byte()), "found torch.uint8 (4, 3, 6)"),
        (lambda: four(make(4).images, 3), "labels must be whole numbers of shape (4,)"),
        (lambda: four(make(4).images, classes=3), "from 0 to 2; found 3 among torch.int64"),
        (lambda: load("mnist"), "'mnist': choose one of digits, cifar10, svhn, folder, npz"),
        (lambda: load("svhn"), "the data root, or run `defquant data fetch svhn`"),
        (lambda: load("npz"), "data root"),
        (lambda: load("cifar10", "/gone"), "no data at /gone: correct the data root, or run"),
        (lambda: load("cifar10", "/", cast(Any, "val")), "train or test; found 'val'"),
    ],
)  # fmt: skip
def test_what_cannot_be(call: Callable[[], object], said: str) -> None:
    refused(call, said)


def test_fingerprint_tells_data_apart() -> None:
    data = make(4)
    images, labels = data.images, data.labels
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    variants = [
        Dataset(images, labels, data.classes, "renamed"),
        Dataset(other, labels, data.classes, "made"),
        Dataset(images, labels.flip(0), data.classes, "made"),
        Dataset(images.reshape(4, 3, 4, 9), labels, data.classes, "made"),
    ]
    assert [v.fingerprint == data.fingerprint for v in variants] == [True, False, False, False]
    strided = images.to(memory_format=torch.channels_last)
    assert Dataset(strided, labels, data.classes, "made").fingerprint == data.fingerprint
    raw = repr((4, 3, 6, 6)).encode() + images.numpy().tobytes() + labels.numpy().tobytes()
    assert data.fingerprint == hashlib.sha256(raw).hexdigest()[:16]


# ---------------------------------------------------------------- digits, names and roots


def test_digits() -> None:
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert (train.name, train.flip, train.shift) == ("digits", False, 1)
    both = torch.bincount(train.labels) + torch.bincount(test.labels)
    assert (4 * torch.bincount(test.labels) - both).abs().max() < 4
    # the split is part of every published number: this value must never change
    assert (train.fingerprint, test.fingerprint) == ("353226428bc18813", "5f2692a92eaff6bc")


# ---------------------------------------------------------------- CIFAR-10: pickles and tar


def in_memory(write: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def pixels(*shape: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape, np.uint8)


def batch(n: int = 4, **changes: Any) -> bytes:
    content = {
        b"data": pixels(n, 3072),
        b"labels": [i % 10 for i in range(n)],
        b"names": [b"a.png"],
    }
    return pickle.dumps(content | {key.encode(): value for key, value in changes.items()}, 3)


def encode(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    return in_memory(lambda file: Image.fromarray(image).save(file, form))


def parquet(images: Any, labels: Any, column: str = "img", compression: str = "none") -> bytes:
    if isinstance(images, list):
        images = [{"bytes": raw, "path": None} for raw in images]
    columns = {
        name: part for name, part in ((column, images), ("label", labels)) if part is not None
    }
    return in_memory(lambda f: pq.write_table(pa.table(columns), f, compression=compression))


def svhn(n: int = 5, compressed: bool = False, **changes: Any) -> bytes:
    labels = np.array([[i % 10 + 1] for i in range(n)], np.uint8)
    content = {"X": pixels(32, 32, 3, n), "y": labels} | changes
    return in_memory(lambda file: savemat(file, content, do_compression=compressed))


def npz(images: Any, labels: Any = (0, 1, 0, 2, 1), *, compressed: bool = False) -> bytes:
    save = np.savez_compressed if compressed else np.savez
    return in_memory(lambda file: save(file, images=images, labels=np.asarray(labels)))


def write_batches(folder: Path, n: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(batch(n))
    return folder


def test_cifar_pickles_loose_nested_and_in_a_tar(tmp_path: Path) -> None:
    folder = write_batches(tmp_path / "a" / "cifar-10-batches-py")
    members = {f"cifar-10-batches-py/{f.name}": f.read_bytes() for f in folder.iterdir()}
    (tmp_path / "b").mkdir()
    tar = tmp_path / "b" / "cifar-10-python.tar.gz"
    tar.write_bytes(pack(members))
    found = [load("cifar10", root) for root in (folder, tmp_path / "a", tar, tmp_path / "b")]
    assert len({data.fingerprint for data in found}) == 1
    data = found[0]
    assert data.images.shape == (20, 3, 32, 32)
    assert data.name == "CIFAR-10 (first 4 of each batch)"
    assert (data.classes[3], data.num_classes, data.flip, data.shift) == ("cat", 10, True, 4)
    assert len(load("cifar10", str(tar), "test")) == 4


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return __import__("os").system, ("touch hacked",)


def test_no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = {pickle.dumps(Hostile(), protocol): "posix.system" for protocol in (0, 2, 4)}
    calls |= {b"cos\nsystem\n(S'touch hacked'\ntR.": "os.system"}
    calls |= {b"\x80\x02cnumpy\nload\n.": "numpy.load"}
    for content, called in calls.items():
        Path("test_batch").write_bytes(content)
        fails(tmp_path, f"found a call for '{called}', which is not run", split="test")
    assert not Path("hacked").exists()
    fails(
        write_batches(tmp_path / "a") / "..", "data_batch_1", "cifar-10-python.tar.gz", "*.parquet"
    )
    (tmp_path / "a" / "data_batch_1").unlink()
    fails(tmp_path / "a", "missing data_batch_1")


# ---------------------------------------------------------------- CIFAR-10: parquet


def test_parquet(tmp_path: Path) -> None:
    made = pixels(4, 32, 32, 3)
    images = [encode(p) for p in made]
    (tmp_path / "train-0-of-2.parquet").write_bytes(parquet(images[:3], [1, 2, 3], "image"))
    (tmp_path / "train-1-of-2.parquet").write_bytes(parquet(images[3:], [9], "image"))
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), made)
    assert data.labels.tolist() == [1, 2, 3, 9]
    assert data.name == "CIFAR-10 (4 images)"
    gray = encode(made[0, :, :, 0], "JPEG")
    (tmp_path / "plain_text").mkdir()
    (tmp_path / "plain_text" / "test-0.parquet").write_bytes(parquet([gray, gray], [0, 1]))
    test = load("cifar10", tmp_path, "test")
    assert test.name == "CIFAR-10 (JPEG, 2 images)"
    assert test.in_channels == 3


def test_decoded_images_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cifar, "_WORTH_CACHING", 2)
    images, path = [encode(p) for p in pixels(3, 32, 32, 3)], tmp_path / "train-0.parquet"
    path.write_bytes(parquet(images, [1, 2, 3]))
    first = load("cifar10", tmp_path)
    (cached,) = (tmp_path / "cache" / "defquant").iterdir()
    assert cached.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.npy"
    whole = cached.read_bytes()
    monkeypatch.setattr(cifar, "decode", None)
    assert load("cifar10", tmp_path).fingerprint == first.fingerprint
    monkeypatch.setattr(cifar, "decode", pictures.decode)
    for broken in (b"", b"PK\x03\x04", whole[:-1], whole[:50], whole.replace(b"|u1", b"|i1")):
        cached.write_bytes(broken)
        assert load("cifar10", tmp_path).fingerprint == first.fingerprint
        assert cached.read_bytes() == whole
    other = parquet(images[:2], [1, 2])
    (tmp_path / "test-0.parquet").write_bytes(other)
    os.utime(cached, (0, 0))
    monkeypatch.setattr(cifar, "_CACHE", len(whole))  # room for one: that used last
    load("cifar10", tmp_path, "test")
    (left,) = cached.parent.iterdir()
    assert left.stem == hashlib.sha256(other).hexdigest()
    load("cifar10", tmp_path)
    assert list(cached.parent.iterdir()) == [cached]
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # cannot be written: they come all the same
    assert load("cifar10", tmp_path).fingerprint == first.fingerprint


# ---------------------------------------------------------------- SVHN


def test_svhn(tmp_path: Path) -> None:
    made = pixels(32, 32, 3, 2)
    train = svhn(X=made, y=np.array([[10], [3]], np.uint8))
    (tmp_path / "train_32x32.mat").write_bytes(train)
    assert load("svhn", tmp_path).name == "SVHN (2 digits)"
    (tmp_path / "test_32x32.mat").write_bytes(svhn())
    data = load("svhn", tmp_path)
    assert data.name == load("svhn", tmp_path, "test").name == "SVHN (7 digits)"
    assert data.labels.tolist() == [0, 3]
    assert (data.flip, data.shift) == (False, 0)
    np.testing.assert_array_equal(data.images[1].numpy(), made[..., 1].transpose(2, 0, 1))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [*np.typecodes["AllInteger"], "f", "d", ">f8"])
def test_mat_is_read_as_scipy_reads_it(tmp_path: Path, compressed: bool, dtype: str) -> None:
    """Long and short elements, other variables between, and each type of numbers."""
    path = tmp_path / "x.mat"
    wanted = {"X": np.arange(6, dtype=dtype).reshape(1, 3, 2), "y": np.array([[3]], dtype)}
    other = {"s": "text", "c": np.array([1j]), "cell": np.array([[1, "a"]], object), "o": {"a": 1}}
    savemat(path, {"a_longer_name": np.zeros((2, 0)), **wanted, **other}, do_compression=compressed)
    there = loadmat(path)
    for name, found in zip("yX", read_mat(path, "y", "X"), strict=True):
        np.testing.assert_array_equal(found, there[name])
    for cut in range(path.stat().st_size - 1, 0, -7):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises((ValueError, zlib.error)):
            read_mat(path, "X", "y", "o")


# ---------------------------------------------------------------- image folder


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:1], "big")
    Image.new("L", size, shade).convert(mode).save(path)
    return path


def test_folder_with_its_own_split(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for part in ("train/cat/1.png", "train/cat/2.bmp", "train/dog/3.PNG", "test/dog/4.png"):
        picture(root / part)
    (root / "train" / ".hidden").mkdir()
    train, test = load("folder", root), load("folder", root, "test")
    assert train.classes == test.classes == ("cat", "dog")
    assert sorted(train.labels.tolist()) == [0, 0, 1]
    assert test.labels.tolist() == [1]
    assert train.images.shape == (3, 3, 4, 5)
    assert (train.name, train.flip, train.shift) == ("pets", False, 0)


def test_folder_split_here(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / "a" / f"{i}.png", "L")
        picture(tmp_path / "b" / f"x{i}.png", "L")
    picture(tmp_path / "single" / "0.png", "L")
    train, test = load("folder", tmp_path), load("folder", tmp_path, "test")
    assert train.images.shape == (17, 1, 4, 5)
    assert torch.bincount(train.labels).tolist() == [8, 8, 1]
    assert torch.bincount(test.labels).tolist() == [2, 2]
    assert load("folder", tmp_path).fingerprint == train.fingerprint
    assert len(set(train.labels[:8].tolist())) > 1  # the first n mix the classes
    picture(tmp_path / "a" / "0.png", "RGB")
    assert load("folder", tmp_path).in_channels == load("folder", tmp_path, "test").in_channels == 3


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_folder_is_walked_and_what_is_skipped_is_named(tmp_path: Path, top: str) -> None:
    classes = tmp_path / top
    for i in range(10):
        picture(classes / "cat" / ("more/deep" if i % 2 else "") / f"{i}.png")
        picture(classes / "dog" / f"{i}.gif")
    if top:
        picture(tmp_path / "test" / "dog" / "0.png")
    (classes / "__pycache__").mkdir()
    (classes / "cat" / "notes.txt").touch()
    (classes / "dog" / "circle").symlink_to(classes)
    picture(classes / "loose.png")
    with pytest.warns(DefquantWarning) as warned:
        train, test = load("folder", tmp_path), load("folder", tmp_path, "test")
    assert train.classes == ("cat", "dog")
    assert torch.bincount(train.labels).tolist() == ([10, 10] if top else [8, 8])
    assert len(train) + len(test) == 20 + bool(top)
    (message,) = {str(w.message) for w in warned}
    for part in (
        f"5 images in deeper folders count for the class above ({top}cat/more/deep/1.png, ...)",
        f"1 folders without an image are no class ({top}__pycache__)",
        f"1 files of another ending are skipped ({top}cat/notes.txt)",
        f"1 files outside of a class folder are skipped ({top}loose.png)",
        f"1 links to folders within a class are skipped ({top}dog/circle)",
    ):
        assert part in message


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*parts: str, split: str = "train") -> None:
        fails(tmp_path, *parts, name="folder", split=split)

    bad("must hold images", "0 classes")
    picture(tmp_path / "train" / "dog" / "1.png")  # one class alone is a wrong root
    bad("two classes or more; found 1 classes")
    first = picture(tmp_path / "train" / "cat" / "1.png")
    fails(first, "found the file", name="folder")
    bad("found no", "test", split="test")
    picture(tmp_path / "test" / "cow" / "1.png")
    bad("training set only", "'cow'", split="test")
    odd = picture(tmp_path / "train" / "cat" / "2.png", size=(6, 4))
    bad("one size", "6 x 4", "5 x 4", ".png")
    odd.write_bytes(first.read_bytes()[:50])
    bad("cannot decode", str(odd))
    odd.write_bytes(b"no picture")
    bad("cannot decode", str(odd), "no PNG, JPEG")
    odd.unlink()
    odd.symlink_to(tmp_path / "gone.png")
    bad("cannot decode", str(odd))
    odd.unlink()
    picture(odd, "I;16")
    bad("8 bits", str(odd))
    odd.unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    bad("cannot decode", str(first), "decompression bomb")


# ---------------------------------------------------------------- npz


def test_npz(tmp_path: Path) -> None:
    made = pixels(10, 6, 7, 3)
    path = tmp_path / "mine.npz"
    labels = np.arange(10) % 3
    found = []
    for images in (made, made.transpose(0, 3, 1, 2), made / 255):
        path.write_bytes(npz(images, labels))
        found.append((load("npz", path), load("npz", path, "test")))
    train, test = found[0]
    assert len({(a.fingerprint, b.fingerprint) for a, b in found}) == 1
    assert (train.images.shape, len(test)) == ((8, 3, 6, 7), 2)
    assert (train.name, train.classes) == ("mine", ("0", "1", "2"))
    shown = ({p.tobytes() for p in part.images.numpy()} for part in (train, test))
    assert not set.intersection(*shown)
    one = made[:, :, :, :1]
    np.savez(path, x_train=one[..., 0], y_train=labels, x_test=one[:2], y_test=[[4], [0]])
    train, test = load("npz", path), load("npz", path, "test")
    assert train.images.shape == (10, 1, 6, 7)
    assert test.images.shape == (2, 1, 6, 7)
    assert train.num_classes == test.num_classes == 5
    assert test.labels.tolist() == [4, 0]


# ---------------------------------------------------------------- files that are not right

FILES = {
    "pickle": "test_batch", "tar": "cifar-10-python.tar.gz", "parquet": "test-0.parquet",
    "svhn": "test_32x32.mat", "npz": "a.npz",
}  # fmt: skip
GOOD, SMALL = encode(np.zeros((32, 32, 3), np.uint8)), encode(np.zeros((8, 9, 3), np.uint8))
PACKED = pack({"a/test_batch": batch(40)})
X = np.random.default_rng(0).random((5, 6, 6, 3))
BAD: list[tuple[str, bytes, str]] = [
    *(("pickle", batch()[:cut], "whole pickle.*fetch cifar10") for cut in (0, 1, 100, 6000, -1)),
    ("pickle", b"hello", "whole pickle"),
    ("pickle", pickle.dumps([1], 2), r"b'data'.*found \['1'\].*fetch cifar10"),
    ("pickle", pickle.dumps({b"pixels": 1}, 3), "pixels"),
    ("pickle", batch(data=np.zeros((4, 3072), np.float32)), r"uint8 \(n, 3072\)"),
    ("pickle", batch(data=np.zeros((4, 100), np.uint8)), r"uint8 \(n, 3072\)"),
    ("pickle", batch(data=[1, 2]), r"uint8 \(n, 3072\)"),
    ("pickle", batch(labels=["a"] * 4), "n integers"), ("pickle", batch(labels=7), "n integers"),
    ("pickle", batch(labels=[0, 1]), "n integers"),
    ("pickle", batch(labels=[0, 1, 10, 2]), "0 to 9; found 10"),
    ("tar", pack({"a/data_batch_1": b"x"}), "missing test_batch"),
    ("tar", PACKED[:-2000], "whole tar.gz.*cut"), ("tar", b"not a tar", "whole tar.gz"),
    ("parquet", parquet([GOOD], None), "columns img or image.*label"),
    ("parquet", parquet(None, [1]), "columns img or image"),
    ("parquet", parquet([GOOD], ["cat"]), "integers"),
    ("parquet", parquet([GOOD, b""], [1, 2]), "empty cell"),
    ("parquet", parquet(pa.array([1]), [1]), "columns img or image"),
    ("parquet", parquet([GOOD, b"\xff\xd8no jpeg"], [1, 2]), "parquet, image 1.*no PNG, JPEG"),
    ("parquet", parquet([GOOD, GOOD[:-30]], [1, 2]), "cannot decode .*parquet, image 1"),
    ("parquet", parquet([GOOD, SMALL], [1, 2]), "one size, here 32 x 32; found 9 x 8.*image 1"),
    ("parquet", parquet([GOOD, GOOD], [1, 10]), "0 to 9; found 10"),
    ("parquet", parquet([], []), ""), ("parquet", b"", "parquet"),
    ("parquet", b"PAR1 hello", "parquet"), ("parquet", parquet([GOOD], [1])[:-9], "parquet"),
    *(("svhn", svhn()[:cut], "cut.*data fetch svhn") for cut in (0, 60, 200, -10)),
    ("svhn", svhn(X=np.zeros((5, 3, 32, 32), np.uint8)), r"\(5, 3, 32, 32\)"),
    ("svhn", svhn(X=np.zeros((32, 32, 3, 4), np.uint8)), "5 labels"),
    ("svhn", svhn(y=np.array([[1.0], [2], [0], [3], [4]])), r"1\.\.10.*found 0"),
    ("svhn", in_memory(lambda file: savemat(file, {"Z": 1})), "X and y"),
    ("npz", npz(X * 1.5 + 1), r"\[0, 1\].*scale"), ("npz", npz(X * np.nan), r"\[0, 1\].*nan"),
    ("npz", npz((X * 255).astype(np.int64)), "int64.*uint8"),
    ("npz", npz((X * 65535).astype(np.uint16)), r"uint16: use images.float\(\) / 65535"),
    ("npz", npz(X > 0.5), r"bool: use images.float\(\)"),
    ("npz", npz(X.astype(str)), "plain numbers"), ("npz", npz(X[..., :2]), r"\(5, 6, 6, 2\)"),
    ("npz", npz(X[:, :3]), r"\(5, 3, 6, 3\)"), ("npz", npz(X[0, 0], [0] * 6), r"\(6, 3\)"),
    ("npz", npz(X, [0, 1, -1, 0, 0]), "0 to 9999; found -1"),
    ("npz", npz(X, [0, 1, 10_000_000, 0, 0]), "0 to 9999; found 10000000"),
    ("npz", npz(X, [0.0, 1, 1, 0, 0]), "whole numbers.*float64"),
    ("npz", npz(X, np.eye(5, 3, dtype=np.int64)), r"whole numbers.*\(5, 3\)"),
    ("npz", npz(X, [0, 1]), "one label for each"),
    ("npz", npz(np.array([None, "x"], object), [0, 1]), "plain arrays"),
    ("npz", in_memory(lambda file: np.savez(file, pictures=X)), "x_train.*found pictures"),
    ("npz", b"", "plain arrays"), ("npz", b"hello", "plain arrays"),
    ("npz", npz(X)[:2000], "plain arrays"), ("npz", pickle.dumps({"a": 1}), "plain arrays"),
    ("npz", in_memory(lambda file: np.save(file, X)), "npz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "raw", "said"), BAD, ids=[f"{kind}-{said}" for kind, _, said in BAD]
)
def test_bad_files(tmp_path: Path, kind: str, raw: bytes, said: str) -> None:
    path = tmp_path / FILES[kind]
    path.write_bytes(raw)
    name = kind if kind in ("svhn", "npz") else "cifar10"
    root = path if kind == "npz" else tmp_path
    assert re.search(said, fails(root, str(tmp_path), name=name, split="test"))


@pytest.mark.parametrize("name", ["cifar10", "npz"])
def test_packed_is_what_was_packed(tmp_path: Path, name: str) -> None:
    """Every field and the fingerprint; equal bytes each time; any change of them is refused."""
    root = write_batches(tmp_path) if name == "cifar10" else tmp_path / "d.npz"
    if name == "npz":
        root.write_bytes(npz(X))
    packed, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert main(["data", "pack", name, "--data-root", str(root), "--out", str(packed)]) == 0
    splits: Any = ("train", "test")
    pack_data(name, load(name, root, "train"), load(name, root, "test"), again)
    assert packed.read_bytes() == again.read_bytes()
    for split in splits:
        read, direct = load(name, packed, split), load(name, root, split)
        assert read.fingerprint == direct.fingerprint
        told = ("name", "classes", "flip", "shift")
        assert [getattr(read, t) for t in told] == [getattr(direct, t) for t in told]
    whole = packed.read_bytes()
    changes = {
        "not a whole packed file": whole[:-1],
        "other images or labels": whole[:-1] + bytes([whole[-1] ^ 1]),
        "no packed data": whole.replace(b"defquant-data", b"defquant-dote"),
        "in format 2": whole.replace(b'\\"format\\": 1', b'\\"format\\": 2'),
        "the header of": whole.replace(b'\\"flip\\": ', b'\\"flip\\":7'),
    }  # fmt: skip
    for said, raw in changes.items():
        packed.write_bytes(raw)
        refused(lambda: [load(name, packed, split) for split in splits], said)
    refused(lambda: load("svhn", again), f"must hold svhn in format 1; found {name}")
    refused(lambda: pack_data(name, read, read, tmp_path / "a.npz"), "NAME.safetensors")


def test_no_files(tmp_path: Path) -> None:
    fails(tmp_path, "test_32x32.mat", "defquant data fetch svhn", name="svhn", split="test")
    fails(tmp_path, name="npz")


# ---------------------------------------------------------------- the official files


@needs_shared
def test_official_pickles_and_svhn() -> None:
    folder = REAL_DATA / "cifar-10-batches-py"
    data = load("cifar10", folder, "test")
    assert data.name == "CIFAR-10 (first 1,000 of each batch)"
    raw = pickle.loads((folder / "test_batch").read_bytes(), encoding="bytes")
    np.testing.assert_array_equal(data.images.reshape(1000, -1).numpy(), raw[b"data"])
    assert data.labels.tolist() == raw[b"labels"]
    train, test = (load("svhn", REAL_DATA / "svhn", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (832, 251)
    assert train.name == test.name == "SVHN (1,083 digits)"
    raw = loadmat(REAL_DATA / "svhn" / "test_32x32.mat")
    np.testing.assert_array_equal(test.images.numpy(), raw["X"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(test.labels.numpy(), raw["y"][:, 0] % 10)


@needs_shared
@pytest.mark.slow
def test_hub_parquet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = load("cifar10", REAL_DATA / "cifar10-jpeg", "test")
    assert data.name == "CIFAR-10 (JPEG)"
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    assert load("cifar10", REAL_DATA / "cifar10-jpeg", "test").fingerprint == data.fingerprint
