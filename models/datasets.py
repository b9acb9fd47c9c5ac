"""Binary images for the models in this folder: scikit-learn's digits, an ``.npz`` file, or MNIST's own IDX files."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DATA_HELP = ".npz, or a folder of MNIST's IDX files; bundled digits if left out"


class Data(NamedTuple):
    """Binary images, one a row, and their height and width."""

    train: Tensor
    test: Tensor
    shape: tuple[int, int]

    def to(self, device: str) -> Data:
        """The same on another device."""
        return self._replace(train=self.train.to(device), test=self.test.to(device))


def load_data(path: Path | None, seed: int) -> Data:
    """Read the digits, an ``.npz`` or a folder of IDX files, binarised; at most 1000 test images are scored."""
    if path is None:
        from sklearn.datasets import load_digits  # 1797 images of 8 x 8 pixels, bundled

        pair = split(load_digits().images, seed)
    elif path.is_dir():
        pair = read_idx(path, "train-images-idx3-ubyte"), read_idx(path, "t10k-images-idx3-ubyte")
    elif path.exists():
        pair = read_npz(path, seed)
    else:
        raise ValueError(f"{path} does not exist; give an .npz file or a folder of IDX files")
    for images in pair:
        check(images, path)
    if pair[0].shape[1:] != pair[1].shape[1:]:
        raise ValueError(
            f"{path}: train images are {pair[0].shape[1:]}, test images {pair[1].shape[1:]}; make them equal"
        )
    top, dtype = pair[0].max(), torch.get_default_dtype()
    train, test = (torch.as_tensor(images.reshape(len(images), -1) / top >= 0.5).to(dtype) for images in pair)
    side = math.isqrt(train.shape[1])
    flat = (side, side) if side**2 == train.shape[1] else (1, train.shape[1])
    return Data(train, test[:1000], pair[0].shape[1:] if pair[0].ndim == 3 else flat)


def check(images: np.ndarray, path: Path | None) -> None:
    """Refuse what is no set of grey-scale images."""
    if images.dtype.kind not in "buif":
        raise ValueError(f"{path}: images are {images.dtype}, not numbers; store grey levels")
    if images.ndim not in (2, 3) or len(images) < 2 or images.size == 0:
        raise ValueError(
            f"{path}: an array of shape {images.shape}; give 2 rows or more, [rows, pixels] or [rows, h, w]"
        )
    if not np.isfinite(images).all() or images.min() < 0 or images.max() <= 0:
        raise ValueError(f"{path}: NaN, infinite, negative or only zero grey levels; give 0 up to any positive maximum")


def split(images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random 80 % to train on and 20 % to test on."""
    order = np.random.default_rng(seed).permutation(len(images))
    cut = len(images) - max(len(images) // 5, 2)
    return images[order[:cut]], images[order[cut:]]


def read_npz(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``x_train`` and ``x_test``, else ``train`` and ``test``, else the only array of images, which is split."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive raises any of ten kinds
        raise ValueError(f"{path}: not an .npz file of numbers; write one with numpy.savez") from error
    for first, second in (("x_train", "x_test"), ("train", "test")):
        if first in arrays and second in arrays:
            return arrays[first], arrays[second]
    images = [array for array in arrays.values() if array.ndim in (2, 3)]
    if len(images) != 1:
        raise ValueError(f"{path}: {len(images)} arrays of images; store x_train and x_test, or a single array")
    check(images[0], path)
    return split(images[0], seed)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Images of an IDX file: bytes 0, 0, 8 (uint8), 3 (dimensions), three big-endian int32 sizes, the pixels."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: neither {name} nor {name}.gz; put MNIST's files there")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except Exception as error:
        raise ValueError(f"{path}: cannot be read; fetch it again") from error
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in (4, 8, 12))
    if raw[:4] != b"\0\0\x08\x03" or len(raw) != 16 + math.prod(shape):
        raise ValueError(f"{path}: not a whole IDX file of images; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(shape)
