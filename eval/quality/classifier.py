"""A small image classifier that judges generated images, and whose features are their encoder.

It is trained on real images only and never sees the generator. Its test accuracy is part of every
result: what it cannot tell apart, it cannot judge.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError

WHERE = "image classifier"
STEPS = 1200
_RATE = 2e-3
_WIDTH = 32  # features: covariances of a few hundred images are still well determined
_AT_ONCE = 1024


class ImageClassifier:
    """Two convolutions and two linear layers, trained from a fixed seed.

    Args:
        pixels: float32 [n, height, width] in 0..1, real images for training.
        labels: int64 [n].
        test_pixels, test_labels: real images that were not trained on.
        seed: of the weights and the order of the images.
        steps: of training.

    Attributes:
        name: what the encoder is called in FD(<name>).
        accuracy: on the test images.

    Raises:
        CompressError: images and labels that do not belong together, or fewer than two classes.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        test_pixels: Tensor,
        test_labels: Tensor,
        *,
        seed: int = 0,
        steps: int = STEPS,
    ) -> None:
        for images, classes in ((pixels, labels), (test_pixels, test_labels)):
            if images.dim() != 3 or len(images) != len(classes) or not len(images):
                raise CompressError(
                    "images [n, height, width] with n labels",
                    f"{list(images.shape)} and {list(classes.shape)}", where=WHERE,
                )  # fmt: skip
        self.classes = int(labels.max()) + 1
        if len(labels.unique()) < 2:
            raise CompressError("images of at least two classes", "one class", where=WHERE)
        self.image = tuple(pixels.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features_of = _trunk(self.image)
            self.head = nn.Linear(_WIDTH, self.classes)
            _train(nn.Sequential(self.features_of, self.head), pixels, labels, steps)
        self.name = f"cnn-{_WIDTH}"
        self.accuracy = float((self.classify(test_pixels) == test_labels).float().mean())

    @torch.no_grad()
    def features(self, pixels: Tensor) -> np.ndarray:
        """Features of images [n, height, width], float64 [n, 32].

        Raises:
            CompressError: images of another size.
        """
        if tuple(pixels.shape[1:]) != self.image:
            raise CompressError(
                f"images of {self.image[0]}x{self.image[1]}, as the classifier was trained on",
                "x".join(map(str, pixels.shape[1:])), where=WHERE,
            )  # fmt: skip
        parts = [self.features_of(part[:, None].float()) for part in pixels.split(_AT_ONCE)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """The likeliest class of each image, int64 [n]."""
        return self.head(torch.from_numpy(self.features(pixels)).float()).argmax(dim=1)

    @property
    def digest(self) -> str:
        """sha256 of the weights, as hex: two results were judged by the same classifier."""
        found = hashlib.sha256()
        for tensor in (*self.features_of.parameters(), *self.head.parameters()):
            found.update(tensor.detach().numpy().tobytes())
        return found.hexdigest()


def _trunk(image: tuple[int, int]) -> nn.Sequential:
    first = 2 if min(image) > 16 else 1  # 8x8 digits are too small to be halved twice
    high, wide = (-(-side // (2 * first)) for side in image)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=first, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * high * wide, _WIDTH),
        nn.ReLU(),
    )


def _train(model: nn.Module, pixels: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch = 128 if len(pixels) > 10_000 else 64
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,))
        optimizer.zero_grad()
        logits = model(pixels[rows][:, None].float())
        nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    model.requires_grad_(False)
