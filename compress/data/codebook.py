"""A codebook of image patches: images to rows of tokens and back.

The k-means codebook takes the place of the trained VQ autoencoder of MaskGIT (Chang et al. 2022,
https://arxiv.org/abs/2202.04200, section 3): each patch becomes the index of its nearest centre.
Ids of a model's vocabulary: codes, then classes, then "no class" (for guidance), then the mask.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.data.images import Images
from compress.errors import CompressError

FILE = "codebook.safetensors"  # beside a checkpoint whose tokens are patches
_MOST_IDS = 2**24
_FITTED_ON = 200_000  # patches; more move the centres no further


@dataclass(frozen=True)
class Codebook:
    """Centres of patches, for images of one size.

    Attributes:
        centres: float32 [codes, patch height * patch width].
        image: (height, width) in pixels.
        patch: (height, width) in pixels.
        classes: of the data set.
        slots: ids that the vocabulary keeps for codes, at least as many as there are.
    """

    centres: torch.Tensor
    image: tuple[int, int]
    patch: tuple[int, int]
    classes: int
    slots: int

    @property
    def codes(self) -> int:
        return len(self.centres)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens in an image."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def tokens(self) -> int:
        """Tokens an image."""
        return self.grid[0] * self.grid[1]

    @property
    def no_class(self) -> int:
        """The id that stands in the place of a class where none is given."""
        return self.slots + self.classes

    @property
    def mask(self) -> int:
        return self.slots + self.classes + 1

    @property
    def digest(self) -> str:
        """sha256, as hex, of sizes and centres."""
        head = f"{self.image}{self.patch}{self.classes},{self.slots}:".encode()
        return hashlib.sha256(head + self.centres.numpy().tobytes()).hexdigest()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images [n, height, width] in 0..1 to token ids, int64 [n, tokens], row by row.

        Raises:
            CompressError: images of another size.
        """
        if tuple(pixels.shape[1:]) != self.image:
            raise CompressError(
                f"images of {_size(self.image)}, as the codebook was fitted on",
                _size(tuple(pixels.shape[1:])),
                "Use images of that size, or fit a codebook on these (train a new model)",
            )
        patches = to_patches(pixels, self.patch)
        half_norm = 0.5 * self.centres.square().sum(dim=1)
        pieces = patches.reshape(-1, patches.shape[-1]).split(65536)
        codes = [(p @ self.centres.T - half_norm).argmax(dim=1) for p in pieces]
        return torch.cat(codes).view(len(pixels), self.tokens)

    def rows(self, images: Images) -> torch.Tensor:
        """What a model reads: int64 [n, 1 + tokens], the class id and the patches row by row.

        Raises:
            CompressError: images of another size, or classes that the codebook does not know.
        """
        if len(images) and int(images.labels.max()) >= self.classes:
            raise CompressError(
                f"classes from 0 to {self.classes - 1}, as the codebook was fitted on",
                f"class {int(images.labels.max())} in {images.description}",
                "Use images of the same data set",
            )
        return torch.cat([self.slots + images.labels[:, None], self.encode(images.pixels)], dim=1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids to images, float32 [n, height, width] in 0..1.

        Args:
            tokens: [n, tokens], or [n, 1 + tokens] with the class in front.

        Raises:
            CompressError: another number of tokens, or ids that are no codes.
        """
        tokens = tokens.cpu()
        if tokens.ndim == 2 and tokens.shape[1] == self.tokens + 1:
            tokens = tokens[:, 1:]
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens:
            raise CompressError(
                f"[n, {self.tokens}] token ids (a grid of {_size(self.grid)})",
                str(list(tokens.shape)),
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codes:
            raise CompressError(
                f"codes from 0 to {self.codes - 1}",
                f"ids from {int(tokens.min())} to {int(tokens.max())}",
                "Class and mask tokens have no picture",
            )
        (rows, columns), (high, wide) = self.grid, self.patch
        patches = self.centres[tokens].view(-1, rows, columns, high, wide)
        return patches.permute(0, 1, 3, 2, 4).reshape(-1, *self.image)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``codebook.safetensors`` into a folder, as tokenizers write theirs."""
        path = Path(folder) / FILE
        metadata = {
            "image": _size(self.image), "patch": _size(self.patch),
            "classes": str(self.classes), "slots": str(self.slots),
        }  # fmt: skip
        save_file({"centres": self.centres.contiguous()}, path, metadata)
        return path


def to_patches(pixels: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """[n, height, width] to [n, tokens, patch pixels], both row by row."""
    n, height, width = pixels.shape
    high, wide = patch
    grid = pixels.reshape(n, height // high, high, width // wide, wide)
    return grid.permute(0, 1, 3, 2, 4).reshape(n, -1, high * wide)


def fit_codebook(
    images: Images, patch: tuple[int, int], codes: int, classes: int | None = None, seed: int = 0
) -> Codebook:
    """k-means (k-means++ start, Lloyd) on the patches of ``images``.

    Where there are fewer different patches than ``codes``, the codebook holds them all and is
    lossless; the vocabulary keeps ``codes`` ids anyway.

    Args:
        classes: of the data set; those of ``images`` if None.

    Raises:
        CompressError: a patch that does not divide the images.
    """
    size = (images.pixels.shape[1], images.pixels.shape[2])
    if size[0] % patch[0] or size[1] % patch[1]:
        raise CompressError(
            f"a patch whose sides divide {_size(size)}, the size of the images", _size(patch),
            "Choose another patch",
        )  # fmt: skip
    patches = to_patches(images.pixels, patch).reshape(-1, patch[0] * patch[1]).numpy()
    if len(patches) > _FITTED_ON:
        picks = np.random.default_rng(seed).choice(len(patches), _FITTED_ON, replace=False)
        patches = patches[np.sort(picks)]
    distinct, counts = np.unique(patches, axis=0, return_counts=True)
    centres = distinct if len(distinct) <= codes else _centres(distinct, counts, codes, seed)
    return Codebook(
        torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32)), size, patch,
        classes or images.classes, codes,
    )  # fmt: skip


def _centres(points: np.ndarray, counts: np.ndarray, codes: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads on some platforms
        model = KMeans(codes, n_init=1, random_state=seed, max_iter=100)
        # Many patches are equal (blank ones above all): weights say so and cost nothing.
        model.fit(points.astype(np.float64), sample_weight=counts.astype(np.float64))
    return model.cluster_centers_.clip(0.0, 1.0)


def load_codebook(folder: Path) -> Codebook | None:
    """The codebook beside a checkpoint, or None where there is none.

    Raises:
        CompressError: a file that is no codebook.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            image, patch = _sides(about["image"]), _sides(about["patch"])
            classes, slots = int(about["classes"]), int(about["slots"])
            book = Codebook(file.get_tensor("centres"), image, patch, classes, slots)
        _check(book)
        return book
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CompressError(
            f"a codebook in {path}", f"{type(error).__name__}: {error}",
            "Copy the file again from the folder of the trained model",
        ) from error  # fmt: skip


def _check(book: Codebook) -> None:
    """A ValueError where the parts of a codebook do not fit each other."""
    (height, width), (high, wide) = book.image, book.patch
    if min(height, width, high, wide) < 1 or height % high or width % wide:
        raise ValueError(f"patches of {_size(book.patch)} in images of {_size(book.image)}")
    if book.centres.ndim != 2 or book.centres.shape[1] != high * wide or not len(book.centres):
        raise ValueError(f"centres {list(book.centres.shape)} for patches of {_size(book.patch)}")
    if not book.centres.is_floating_point() or not book.centres.isfinite().all():
        raise ValueError("centres that are no finite numbers")
    if book.classes < 1 or not book.codes <= book.slots <= _MOST_IDS:
        raise ValueError(f"{book.classes} classes and {book.slots} ids for {book.codes} centres")


def _size(pair: tuple[int, ...]) -> str:
    return "x".join(map(str, pair))


def _sides(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second
