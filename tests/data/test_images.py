"""Images to tokens and back, and files that are not what they seem."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from compress.data.codebook import FILE, Codebook, fit_codebook, load_codebook, to_patches
from compress.data.images import ImageSpec, load_images, read_idx
from compress.errors import CompressError


def test_the_splits_of_the_digits_share_no_image():
    train, test = load_images("digits"), load_images(ImageSpec(split="test"))
    assert (len(train), len(test)) == (1438, 359)
    assert set(test.labels.tolist()) == set(range(10)) == set(train.labels.tolist())
    assert (float(train.pixels.min()), float(train.pixels.max())) == (0.0, 1.0)
    assert train.digest == load_images("digits").digest != test.digest
    assert len(load_images(ImageSpec(limit=5))) == 5


def test_patches_are_numbered_row_by_row():
    image = torch.arange(24.0).view(1, 4, 6)
    assert to_patches(image, (2, 3))[0, 1].tolist() == [3, 4, 5, 9, 10, 11]
    assert to_patches(image, (2, 3))[0, 2].tolist() == [12, 13, 14, 18, 19, 20]


def test_every_token_is_the_nearest_centre_and_survives_the_way_back():
    images = load_images(ImageSpec(limit=200))
    codebook = fit_codebook(images, (2, 4), 24)
    ids = codebook.encode(images.pixels)
    patches = to_patches(images.pixels, (2, 4))
    distances = torch.cdist(patches.flatten(0, 1), codebook.centres).view(*ids.shape, -1)
    assert torch.allclose(distances.gather(-1, ids[..., None])[..., 0], distances.amin(-1))
    tokens = torch.arange(24)[:, None].repeat(1, 8)
    assert torch.equal(codebook.encode(codebook.decode(tokens)), tokens)


def test_more_codes_lose_less_and_enough_codes_nothing():
    train, test = load_images(ImageSpec(limit=400)), load_images(ImageSpec(split="test"))
    errors = []
    for codes in (4, 32):
        codebook = fit_codebook(train, (2, 2), codes)
        again = codebook.decode(codebook.encode(test.pixels))
        errors.append(float((again - test.pixels).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    exact = fit_codebook(train, (1, 1), 20)
    assert exact.codes == 17 and exact.slots == 20  # the digits have 17 grey levels
    assert torch.equal(exact.decode(exact.encode(test.pixels)), test.pixels)


def test_a_codebook_survives_its_file(tmp_path):
    images = load_images(ImageSpec(limit=50))
    codebook = fit_codebook(images, (4, 2), 8, classes=12)
    codebook.save_pretrained(tmp_path)
    again = load_codebook(tmp_path)
    assert again.digest == codebook.digest and torch.equal(
        again.rows(images), codebook.rows(images)
    )
    assert (again.no_class, again.mask) == (20, 21)
    assert load_codebook(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_bytes(b"not a codebook")
    with pytest.raises(CompressError, match="a codebook in"):
        load_codebook(tmp_path)


def test_bad_input_is_told():
    images = load_images(ImageSpec(limit=50))
    codebook = fit_codebook(images, (2, 2), 8, classes=10)
    with pytest.raises(CompressError, match="images of 8x8.*got 4x8"):
        codebook.encode(images.pixels[:, :4])
    with pytest.raises(CompressError, match="codes from 0 to 7.*to 9"):
        codebook.decode(torch.full((1, 16), 9))
    with pytest.raises(CompressError, match=r"\[n, 16\] token ids"):
        codebook.decode(torch.zeros(1, 15, dtype=torch.int64))
    few = Codebook(codebook.centres, (8, 8), (2, 2), 3, 8)
    with pytest.raises(CompressError, match="classes from 0 to 2"):
        few.rows(images)
    with pytest.raises(CompressError, match="divide 8x8"):
        fit_codebook(images, (3, 2), 8)


def test_files_that_are_not_idx(tmp_path):
    for name, data in (
        ("a", b"PNG"),
        ("b.gz", b"no gzip"),
        ("c", bytes((0, 0, 8, 2, 0, 0, 0, 3, 0, 0, 0, 3, 1, 2))),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CompressError, match="an IDX file"):
            read_idx(tmp_path / name)
    with pytest.raises(CompressError, match="the file train-images-idx3-ubyte"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"patch": "0x0"}, {"patch": "3x3"}, {"image": "0x0"}, {"classes": "-5"}, {"slots": "9" * 12}],
)
def test_codebook_whose_parts_do_not_fit(change, tmp_path):
    book = fit_codebook(load_images("digits"), (2, 2), 8)
    book.save_pretrained(tmp_path)
    about = {"image": "8x8", "patch": "2x2", "classes": "10", "slots": "8"}
    assert load_codebook(tmp_path) is not None
    save_file({"centres": book.centres}, tmp_path / FILE, about | change)
    with pytest.raises(CompressError, match="a codebook in"):
        load_codebook(tmp_path)
