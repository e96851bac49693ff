"""EDM's augmentation: each transform where it should go, told exactly, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal

from genjax_lab.objectives import augmentation, augmented, edm_augmentation
from genjax_lab.objectives.augmentation import Transforms, draw_transforms

SIDE, BATCH = 32, 16
SPREAD, TILT, PLACE = (4.0, 2.5), 0.4, np.array([3.0, -2.0])


@dataclasses.dataclass
class Row:
    """One image's transform, its geometry in mathematical axes (x right, y up, angles ccw)."""

    scale: float = 0.0
    rotation: float = 0.0
    anisotropy: float = 0.0
    axis: float = 0.0
    translation: tuple[float, float] = (0.0, 0.0)

    def forward(self):
        """The linear map and the shift that move a point of the image."""
        stretch = 2 ** (0.2 * self.anisotropy)
        along = turn(self.axis)
        linear = along @ np.diag([stretch, 1 / stretch]) @ along.T
        linear = linear @ turn(self.rotation) * 2 ** (0.2 * self.scale)
        return linear, SIDE / 8 * np.array([self.translation[0], -self.translation[1]])

    def label(self):
        return [
            0,
            0,
            self.scale,
            np.cos(self.rotation) - 1,
            np.sin(self.rotation),
            self.anisotropy * np.cos(self.axis),
            self.anisotropy * np.sin(self.axis),
            *self.translation,
        ]


ROWS = {
    "untouched": Row(),
    "enlarged": Row(scale=2.0),
    "shrunk": Row(scale=-2.0),
    "turned": Row(rotation=0.7),
    "turned_far": Row(rotation=-2.5),
    "stretched": Row(anisotropy=1.5),
    "stretched_obliquely": Row(anisotropy=-1.5, axis=1.0),
    "moved": Row(translation=(0.6, -1.1)),
    "everything": Row(1.0, 0.7, 1.2, 2.2, (-0.4, 0.3)),
}


def turn(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def transforms(rows):
    """Transforms without flips; untouched rows fill the batch, so that one shape is compiled."""
    rows = [*rows, *[Row()] * (BATCH - len(rows))]
    columns = ("scale", "rotation", "anisotropy", "axis", "translation")
    return Transforms(
        jnp.zeros(len(rows), bool),
        jnp.zeros(len(rows), bool),
        *(jnp.array([getattr(row, name) for row in rows], jnp.float32) for name in columns),
    )


def blob(linear, shift):
    """An elliptic Gaussian blob, moved by a map; and which pixels come from inside the image."""
    column, row = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    points = np.stack([column - (SIDE - 1) / 2, (SIDE - 1) / 2 - row], axis=-1)
    source = (points - shift) @ np.linalg.inv(linear).T
    # Within 3 pixels of a border the filter of 12 half pixels sees the reflection.
    inside = np.all(np.abs(source) < (SIDE - 1) / 2 - 3, axis=-1)
    return np.exp(-0.5 * np.sum(((source - PLACE) @ turn(TILT) / SPREAD) ** 2, axis=-1)), inside


@pytest.fixture(scope="module")
def warp():
    return jax.jit(augmentation.warp)


@pytest.fixture(scope="module")
def moved(warp):
    image, _ = blob(np.eye(2), np.zeros(2))
    images = np.stack([image[..., None]] * BATCH).astype(np.float32)
    return dict(
        zip(ROWS, np.asarray(warp(images, transforms(ROWS.values())))[..., 0], strict=False)
    )


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).uniform(-1, 1, (BATCH, SIDE, SIDE, 1)).astype(np.float32)


@pytest.mark.parametrize("name", ROWS)
def test_a_transform_moves_the_image_as_its_formula_says(moved, name):
    # Bilinear sampling at half-pixel spacing errs by at most (1/32) (1/4^2 + 1/2.5^2) = 0.007. The
    # wavelet's mass is centred 0.098 taps beside its centre: upsampling shifts by 0.049 pixels
    # along each side and downsampling back, which cancels unless the image turned or grew between
    # them. A blob of width s has slopes up to 0.61/s: 0.049 sqrt(2) 0.61 (1/2.5 + 1/1.9) = 0.039.
    expected, inside = blob(*ROWS[name].forward())
    assert inside.mean() > 0.3
    np.testing.assert_allclose(moved[name][inside], expected[inside], atol=0.046)


def test_an_image_that_does_not_move_is_returned(warp, photos):
    np.testing.assert_allclose(warp(photos, transforms([])), photos, atol=2e-6)


def test_labels_tell_exactly_what_was_done():
    labels = transforms(ROWS.values()).labels
    np.testing.assert_allclose(
        labels[: len(ROWS)], [row.label() for row in ROWS.values()], atol=1e-6
    )
    assert not np.any(labels[0])


def test_the_warp_is_upsampling_bilinear_sampling_and_downsampling_of_the_reflected_image(
    warp, photos
):
    rows = [Row(-4.0 + index / 2, 0.5 * index, 1.5, index, (0.9, 1.3)) for index in range(BATCH)]
    warped = warp(photos, transforms(rows))
    expected = np.stack([reference_warp(*pair) for pair in zip(photos, rows, strict=True)])
    # Coordinates reach 200 half pixels in float32 and neighbours differ by up to 2 and more.
    np.testing.assert_allclose(warped, expected, atol=2e-4)


def reference_warp(image, row):
    """The same by SciPy in float64, on an image padded by enough reflections."""
    low_pass, margin = augmentation._SYM6, 5 * SIDE
    plane = np.pad(image[..., 0].astype(float), margin, mode="reflect")
    for axis in (0, 1):
        plane = signal.upfirdn(low_pass, plane, up=2, axis=axis)
    linear, shift = row.forward()
    half = np.arange(-5, 2 * SIDE + 5) / 2 - (SIDE - 1) / 2
    right, down = np.meshgrid(half, half)
    source = (np.stack([right, -down], axis=-1) - shift) @ np.linalg.inv(linear).T
    pixel = (SIDE - 1) / 2 + np.stack([-source[..., 1], source[..., 0]])
    sampled = ndimage.map_coordinates(plane, 2 * (pixel + margin) + 5, order=1)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(sampled, len(low_pass), axis=axis)
        windows = windows[::2] if axis == 0 else windows[:, ::2]
        sampled = windows @ low_pass
    return sampled[:SIDE, :SIDE, None]


def test_the_filter_is_orthonormal_with_six_vanishing_moments():
    taps = augmentation._SYM6
    products = [taps[: len(taps) - shift] @ taps[shift:] for shift in range(0, len(taps), 2)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-10)
    place = np.arange(len(taps)) - augmentation._CENTER
    alternating = taps * (-1.0) ** place
    moments = [alternating @ place**power / 6.0**power for power in range(6)]
    np.testing.assert_allclose(moments, np.zeros(6), atol=1e-8)
    # Its mass lies where the warp takes it to be; db6, of as many moments, is off by 3 taps.
    assert abs(taps @ place / taps.sum()) < 0.1


def test_a_constant_image_stays_constant_to_its_borders(warp):
    images = np.full((BATCH, SIDE, SIDE, 1), 0.7, np.float32)
    np.testing.assert_allclose(warp(images, transforms(ROWS.values())), images, atol=2e-6)


def test_each_side_of_an_oblong_image_has_its_own_centre_and_length(warp):
    # A half turn, then a shift by exactly 2 columns and 3 rows: whole pixels, up to the shift of
    # twice 0.098 / 2 pixels by the filter's asymmetry (see above) along a slope of 0.1.
    row, column = np.meshgrid(np.arange(24), np.arange(16), indexing="ij")
    image = (0.1 * np.sin(column) + 0.1 * np.cos(row / 2)).astype(np.float32)
    images = np.stack([image[..., None]] * BATCH)
    done = transforms([Row(rotation=np.pi, translation=(1.0, 1.0))])
    warped = warp(images, done)[0, ..., 0]
    np.testing.assert_allclose(warped[3:, 2:], image[::-1, ::-1][:-3, :-2], atol=0.1 * 0.098 * 2)


def test_probability_zero_mirrors_exactly_and_says_so(photos):
    images, labels = jax.jit(edm_augmentation(0.0))(jax.random.key(0), photos)
    flipped = np.asarray(labels[:, 0]) == 1
    assert 0 < flipped.sum() < len(photos)
    np.testing.assert_array_equal(
        images, np.where(flipped[:, None, None, None], mirror(photos), photos)
    )
    assert not np.any(labels[:, 1:])


def mirror(images):
    return images[:, :, ::-1]


def test_flips_mirror_left_to_right_and_top_to_bottom(photos):
    flips = transforms([])._replace(x_flip=np.arange(BATCH) % 2 == 1, y_flip=np.arange(BATCH) > 7)
    flipped = augmentation.flip(photos, flips)
    np.testing.assert_array_equal(flipped[:8:2], photos[:8:2])
    np.testing.assert_array_equal(flipped[1:8:2], photos[1:8:2, :, ::-1])
    np.testing.assert_array_equal(flipped[8::2], photos[8::2, ::-1])
    np.testing.assert_array_equal(flipped[9::2], photos[9::2, ::-1, ::-1])
    np.testing.assert_array_equal(flips.labels[6:10, :2], [[0, 0], [1, 0], [0, 1], [1, 1]])


def test_transforms_are_drawn_as_often_and_as_wide_as_the_paper_says():
    # Frequencies and moments of 16384 rows are normal to a good approximation; 14 comparisons at
    # 5 standard errors raise a false alarm for one key in 100 000.
    count, probability = 2**14, 0.3
    drawn = jax.jit(draw_transforms, static_argnums=(1, 2))(jax.random.key(3), count, probability)
    drawn = jax.tree.map(np.asarray, drawn)
    chosen = {
        "scale": drawn.scale != 0,
        "rotation": drawn.rotation != 0,
        "anisotropy": drawn.anisotropy != 0,
        "translation": np.any(drawn.translation != 0, axis=1),
    }
    for happened, rate in [
        (drawn.x_flip, 0.5),
        (drawn.y_flip, probability / 2),
        (drawn.anisotropy_axis != 0, 0.5),
        (chosen["scale"] & chosen["rotation"], probability**2),
        (chosen["anisotropy"] & chosen["translation"], probability**2),
        *((rows, probability) for rows in chosen.values()),
    ]:
        assert abs(happened.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / count)
    normal = [drawn.scale[chosen["scale"]], drawn.anisotropy[chosen["anisotropy"]]]
    normal.append(drawn.translation[chosen["translation"]].ravel())
    for values in normal:
        assert abs(np.mean(values**2) - 1) < 5 * np.sqrt(2 / len(values))
    for angles in (
        drawn.rotation[chosen["rotation"]],
        drawn.anisotropy_axis[drawn.anisotropy_axis != 0],
    ):
        # Uniform on [-pi, pi]: mean square pi^2 / 3, of variance (4 / 45) pi^4.
        assert abs(np.mean(angles**2) - np.pi**2 / 3) < 5 * np.pi**2 * np.sqrt(4 / 45 / len(angles))


@pytest.fixture(scope="module")
def augment():
    return jax.jit(edm_augmentation(0.6))


def test_a_row_depends_on_the_key_and_its_index_only(augment, photos):
    images, labels = augment(jax.random.key(1), photos)
    others = np.concatenate([photos[:1], -photos[1:]])
    first, same_labels = augment(jax.random.key(1), others)
    np.testing.assert_array_equal(first[0], images[0])
    np.testing.assert_array_equal(same_labels, labels)
    assert np.any(first[1:] != images[1:])
    fewer = jax.jit(draw_transforms, static_argnums=(1, 2))(jax.random.key(1), 3, 0.6)
    np.testing.assert_allclose(fewer.labels, labels[:3], rtol=1e-6)
    assert len(np.unique(labels, axis=0)) > BATCH / 2
    assert np.any(augment(jax.random.key(2), photos)[1] != labels)


def test_the_same_on_a_mesh_without_communication(augment, photos):
    alone, labels = augment(jax.random.key(4), photos)
    rows = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    split = jax.jit(edm_augmentation(0.6), in_shardings=(None, rows), out_shardings=rows)
    compiled = split.lower(jax.random.key(4), photos).compile()
    key = jax.device_put(jax.random.key(4), compiled.input_shardings[0][0])
    sharded, sharded_labels = compiled(key, jax.device_put(photos, rows))
    # Rounding may differ: coordinates reach 200 half pixels, where float32 resolves 1.5e-5.
    np.testing.assert_allclose(sharded_labels, labels, atol=1e-6)
    np.testing.assert_allclose(sharded, alone, atol=2e-4)
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [name for name in collectives if name in compiled.as_text()]


def test_keeps_the_type_of_the_images():
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.bfloat16)
    shapes = jax.eval_shape(edm_augmentation(0.6), jax.random.key(0), images)
    assert shapes[0].dtype == jnp.bfloat16
    assert (shapes[0].shape, shapes[1].shape) == ((2, 8, 8, 3), (2, 9))


def test_an_objective_sees_the_augmented_images_and_their_labels(photos):
    seen = {}

    def objective(variables, batch, key):
        seen.update(batch, variables=variables, key=key)
        return jnp.float32(3), {"metric": jnp.float32(4)}

    def augment(key, images):
        seen["augment_key"] = key
        return -images, jnp.ones((len(images), 9))

    batch = {"image": photos, "label": np.arange(len(photos))}
    key = jax.random.key(0)
    assert augmented(objective, augment)("weights", batch, key) == (3, {"metric": 4})
    np.testing.assert_array_equal(seen["image"], -photos)
    np.testing.assert_array_equal(seen["augment_label"], np.ones((len(photos), 9)))
    np.testing.assert_array_equal(seen["label"], batch["label"])
    assert seen["variables"] == "weights"
    assert set(batch) == {"image", "label"}
    # The objective splits its key; neither that key nor its children may drive the augmentation.
    used = [seen["key"], *jax.random.split(seen["key"], 5)]
    assert not any(np.all(seen["augment_key"] == other) for other in used)
    assert not np.all(seen["key"] == key)


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan"), True])
def test_refuses_what_is_no_probability(probability):
    with pytest.raises(ValueError, match="probability"):
        edm_augmentation(probability)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "float.*uint8"),
        (np.zeros((2, 8, 8), np.float32), r"\[2, 8, 8\]"),
        (np.zeros((2, 8, 1, 3), np.float32), "at least 2"),
    ],
)
def test_refuses_what_is_no_batch_of_images(images, message):
    with pytest.raises(ValueError, match=message):
        edm_augmentation(0.1)(jax.random.key(0), images)


@pytest.mark.parametrize("batch", [{}, {"image": 0, "augment_label": 0}])
def test_refuses_a_batch_without_images_or_augmented_before(batch):
    with pytest.raises(ValueError, match="augment_label"):
        augmented(None, edm_augmentation(0.1))({}, batch, jax.random.key(0))
