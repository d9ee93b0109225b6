"""Images of known factors: sprites by area and place, files by small copies of them."""

import os

import h5py
import numpy as np
import pytest
import torch

from ppvae import data

SMALL = (3, 2, 2, 3, 3)


def test_rows_and_factors_are_inverse():
    found = data.sprites(16, SMALL)
    rows = torch.arange(len(found))
    assert torch.equal(found.index(found.factors(rows)), rows)
    by_hand = np.stack(np.unravel_index(rows.numpy(), SMALL), -1)
    assert found.factors(rows).tolist() == by_hand.tolist()
    assert found.factors(rows.reshape(4, 27)).shape == (4, 27, 5)
    assert found.index(by_hand[7]).shape == ()


def test_samples_are_uniform_and_follow_the_generator():
    found = data.sprites(16, SMALL)
    one, again = (found.sample(6000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again)
    for column, size in zip(one.T, SMALL, strict=True):
        share = torch.bincount(column, minlength=size) / 6000
        error = (1 / size * (1 - 1 / size) / 6000) ** 0.5
        assert (share - 1 / size).abs().max() < 4.5 * error


def test_every_sprite_is_another_image():
    found = data.sprites()
    images = np.asarray(found.images)
    assert images.shape == (13_824, 1, 32, 32) and set(np.unique(images)) == {0, 1}
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 13_824


def test_places_move_a_sprite_by_whole_pixels():
    found = data.sprites(sizes=(3, 2, 3, 5, 4))
    images = torch.as_tensor(found.images).reshape(3, 2, 3, 5, 4, 32, 32)
    assert torch.equal(images[..., 1, 2, :, :], images[..., 0, 0, :, :].roll((8, 3), (-2, -1)))
    x, y = (images.sum((0, 1, 2, 5 + k)).float() for k in (0, 1))
    at = torch.arange(32) + 0.5
    centre_x, centre_y = ((s * at).sum(-1) / s.sum(-1) for s in (x, y))
    assert (centre_x.diff(dim=0) > 0).all() and (centre_y.diff(dim=1) > 0).all()
    assert abs(centre_x[2].mean() - 16) < 1


def test_areas_of_sprites():
    """With fine pixels the area is that of the shape, whatever the orientation."""
    found = data.sprites(256, sizes=(3, 3, 4, 1, 1))
    areas = torch.as_tensor(found.images).reshape(3, 3, 4, -1).sum(-1, dtype=torch.float64) / 80**2
    scales = torch.tensor([0.5, 0.75, 1]).double()[:, None] ** 2
    assert torch.allclose(areas[0], 4 * 0.68**2 * scales, rtol=0.03)
    assert torch.allclose(areas[1], np.pi * 0.95 * 0.5 * scales.expand(3, 4), rtol=0.03)
    assert torch.allclose(areas[2], 3.66 / 1.32**2 * scales.expand(3, 4), rtol=0.03)  # the heart


def test_orientations():
    """A quarter turn is a turn of the pixels; with full turns a square looks the same after it."""
    full = data.sprites(64, sizes=(3, 2, 8, 1, 1), full_turn=True)
    images = torch.as_tensor(full.images).reshape(3, 2, 8, 64, 64)
    assert torch.equal(images[:, :, 2:], images[:, :, :6].rot90(1, (-2, -1)))
    assert torch.equal(images[0, :, 2:], images[0, :, :6])
    quarter = data.sprites(64, sizes=(3, 2, 2, 1, 1))
    images_of_quarter = torch.as_tensor(quarter.images).reshape(3, 2, 2, 64, 64)
    assert torch.equal(images_of_quarter, images[:, :, :2])


def test_factors_as_a_data_set():
    found = data.sprites(16, SMALL)
    whole = found.dataset(valid=10, test=20, seed=3)
    parts = [whole.train, whole.valid, whole.test]
    assert [len(part) for part in parts] == [78, 10, 20]
    rows = torch.cat([found.index(part.y) for part in parts])
    assert rows.sort().values.tolist() == list(range(108))
    assert all(torch.equal(part.x, found[found.index(part.y)]) for part in parts)
    few = found.dataset(num=30, flatten=True)
    assert few.train.x.shape == (24, 256) and few.shape == (1, 16, 16)
    assert torch.equal(few.train.x, found.dataset(num=30, flatten=True).train.x)


def test_bytes_become_numbers_in_the_unit_interval():
    images = np.arange(2 * 3 * 3 * 2 * 2, dtype=np.uint8).reshape(6, 3, 2, 2) * 3
    found = data.Factors(images, (2, 3), ("a", "b"), "unit_interval")
    assert torch.allclose(found[[4, 1, 4]] * 255, torch.tensor(images[[4, 1, 4]]).float())
    assert found[5].shape == (3, 2, 2) and found[torch.zeros(2, 3).long()].shape == (2, 3, 3, 2, 2)
    assert data.Factors(torch.tensor(images), (2, 3), ("a", "b"), "unit_interval")[3].equal(
        found[3]
    )
    assert found.dataset(valid=1, test=1).support == "unit_interval"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.index([0, 0, 2, 0, 0]), "factor 'orientation' 2 of Factors .*give 0 to 1"),
        (lambda f: f.index([0, 0, 0, 0, -1]), "factor 'y' -1"),
        (lambda f: f.index([0.5, 0, 0, 0, 0]), "factor 'shape' 0.5"),
        (lambda f: f.index([0, 0]), r"factors have shape \(2,\): give \(..., F\)"),
        (lambda f: f.factors(108), "row 108"),
        (lambda f: f[-1], "row -1"),
        (lambda f: f.dataset(num=109), "num=109: give 3 to 108"),
        (lambda f: data.Factors(f.images, (3, 4), ("a", "b")), "108 images, and sizes=.3, 4. have"),
        (lambda f: data.Factors(f.images, (108,), ("a", "b")), "give one >= 1 for each"),
        (lambda f: data.Factors(f.images[:, 0], (108,), ("a",)), r"give uint8 \(N, C, H, W\)"),
        (lambda f: data.Factors(f[range(108)], (108,), ("a",)), "images are torch.float32"),
        (lambda f: data.Factors(f.images, (108,), ("a",), "real"), "support must be"),
        (lambda f: data.sprites(sizes=(4, 1, 1, 1, 1)), "at most 3 shapes"),
        (lambda f: data.sprites(sizes=(3, 0, 1, 1, 1)), "sizes must be at least 1, got 0"),
        (lambda f: data.sprites(16, sizes=(3, 1, 1, 16, 1)), "size=16 leaves no room"),
        (lambda f: data.sprites(4, sizes=(3, 1, 1, 1, 1)), "size must be at least 8, got 4"),
    ],
)
def test_bad_factors(call, message):
    with pytest.raises(ValueError, match=message):
        call(data.sprites(16, SMALL))


# ------------------------------------------------------------------------------ files

SIZES = (1, 3, 2, 2, 2, 3)  # of a small dSprites
CLASSES = np.stack(np.unravel_index(np.arange(72), SIZES), -1)


def small_dsprites(path, **changed):
    images = np.random.default_rng(0).integers(2, size=(72, 64, 64)).astype(np.uint8)
    arrays = {"imgs": images, "latents_classes": CLASSES, "latents_values": CLASSES * 0.5}
    metadata = np.array({"pickled": "and never loaded"}, dtype=object)
    kept = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
    np.savez_compressed(path, metadata=metadata, **kept)
    return images


def test_dsprites(tmp_path):
    path = tmp_path / "dsprites.npz"
    images = small_dsprites(path)
    for _ in range(2):  # the second time from the file unpacked
        found = data.dsprites(path)
        assert found.sizes == SIZES[1:] and found.names[0] == "shape"
        assert isinstance(found.images, np.memmap)
        assert torch.equal(found[[70, 3]], torch.tensor(images[[70, 3], None]).float())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dsprites.imgs.npy", "dsprites.npz"]
    whole = found.dataset(valid=5, test=7)  # the images stay in the file
    assert whole.train.rows is not None and len(whole.train) == 60 and whole.support == "binary"
    assert torch.equal(whole.test.x, found[found.index(whole.test.y)])


def test_dsprites_of_another_day_are_unpacked_again(tmp_path):
    path = tmp_path / "dsprites.npz"
    small_dsprites(path)
    data.dsprites(path)
    other = np.ones((72, 64, 64), np.uint8)
    small_dsprites(path, imgs=other)
    unpacked = tmp_path / "dsprites.imgs.npy"
    os.utime(unpacked, (0, 0))
    assert data.dsprites(path)[0].eq(1).all()


def test_bad_dsprites(tmp_path):
    path = tmp_path / "dsprites.npz"
    with pytest.raises(ValueError, match="no file"):
        data.dsprites(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*dsprites\.npz.*Give the \.npz file"):
        data.dsprites(path)
    for changed, message in (
        ({"latents_classes": None}, r"has no \['latents_classes'\]"),
        ({"latents_classes": CLASSES[:, :5]}, r"has factors \(72, 5\)"),
        ({"latents_classes": CLASSES[:70]}, "has 70 images, of 72 combinations"),
        ({"latents_classes": CLASSES[::-1]}, "or in another order"),
        ({"imgs": np.zeros((70, 64, 64), np.uint8)}, "70 images, and sizes="),
    ):
        small_dsprites(path, **changed)
        with pytest.raises(ValueError, match=message):
            data.dsprites(path)
        (tmp_path / "dsprites.imgs.npy").unlink(missing_ok=True)


def small_shapes3d(path, keys=("images", "labels"), rows=48):
    sizes = (2, 2, 2, 3, 2, 1)
    classes = np.stack(np.unravel_index(np.arange(48), sizes), -1)
    images = np.random.default_rng(0).integers(256, size=(48, 64, 64, 3)).astype(np.uint8)
    values = {"images": images[:rows], "labels": classes[:rows] * 0.1 - 0.3}
    with h5py.File(path, "w") as file:
        for key in keys:
            file[key] = values[key]
    return images


def test_shapes3d(tmp_path):
    path = tmp_path / "3dshapes.h5"
    images = small_shapes3d(path)
    found = data.shapes3d(path)
    assert found.sizes == (2, 2, 2, 3, 2)
    assert found.names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape")
    wanted = torch.tensor(images[[40, 3, 40]]).movedim(-1, 1) / 255
    assert torch.allclose(found[[40, 3, 40]], wanted)
    assert found.dataset(num=20, valid=3, test=3).train.x.shape == (14, 3, 64, 64)


def test_bad_shapes3d(tmp_path):
    path = tmp_path / "3dshapes.h5"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*3dshapes\.h5.*Give the HDF5 file"):
        data.shapes3d(path)
    small_shapes3d(path, keys=("images",))
    with pytest.raises(ValueError, match=r"has no \['labels'\]"):
        data.shapes3d(path)
    small_shapes3d(path, rows=47)
    with pytest.raises(ValueError, match="has 47 images, of 48 combinations"):
        data.shapes3d(path)


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"ppvae\[h5\]"):
        data.shapes3d(tmp_path / "3dshapes.h5")
