"""Every plot: what it draws, where it draws it, what it refuses."""

from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ppvae import plots
from ppvae.check import Structure
from ppvae.plots import common, posteriors

pytestmark = pytest.mark.filterwarnings("error")

X = torch.linspace(0, 1, 6 * 12).reshape(6, 12)  # six images of 3 x 4 pixels, no two alike
HIDDEN = torch.where(torch.arange(12) < 4, torch.nan, X)
GRID = torch.tensor([-1.5, 0.0, 1.5])

TABLE = pandas.DataFrame(
    {
        "family": ["IWELBO", "IWELBO", "IWELBO dreg", "IWELBO dreg"],
        "particles": [1, 8, 1, 8],
        "bound": [-5.0, -4.5, -5.1, -4.4],
        "bound_se": [0.1, 0.05, 0.1, 0.05],
        "snr_guide": [2.0, 1.0, 2.5, 4.0],
        "snr_model": [2.0, 5.0, 2.5, 6.0],
        "var_guide": [2.0, 1.0, 1.5, 0.1],
        "var_model": [2.0, 0.5, 1.5, 0.4],
        "ms": [1.0, 4.0, 1.2, 6.0],
    }
)
TABLE.attrs = {"log_evidence": -4.2, "reference": "exact"}

POINTS = torch.arange(1, 20) / 20
BAND = (POINTS, POINTS - 0.2, POINTS + 0.2)

DRAWS = torch.linspace(-2, 2, 400).repeat(2, 1).T + torch.sin(torch.arange(800.0)).reshape(400, 2)
GAPS = {
    name: SimpleNamespace(approximation=torch.tensor([0.2, 0.4]), amortisation=torch.tensor(values))
    for name, values in (("diagonal", [1.0, 2.0]), ("flow", [0.3, -0.4]))
}

STRUCTURE = Structure(
    "pair", {"z": (), "x": ("z", "y")}, ("y",), ("x",), {"data": ("z", "x")}, {"z": "Normal"}
)

# One call of every public function, as (function, arguments); all torch tensors.
CALLS = {
    "seed_curves": ([[torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([-4.0, -2.0])]], {}),
    "training_curve": ([torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([-4.0, -2.0, -3.0])], {}),
    "image_grid": ([X, (3, 4)], {"title": "six"}),
    "reconstructions": ([X, 1 - X, (3, 4), X**2], {}),
    "class_grid": ([X.reshape(2, 3, 12), (3, 4)], {}),
    "quadrant_completion": ([HIDDEN, torch.stack([1 - X, X**2]), X, (3, 4)], {}),
    "manifold": ([torch.linspace(0, 1, 9 * 12).reshape(9, 12), (3, 4), GRID], {}),
    "interpolation": ([X.reshape(2, 3, 12), (3, 4)], {}),
    "code_usage": ([torch.tensor([4.0, 0.0, 2.0])], {}),
    "code_maps": ([torch.arange(12).reshape(3, 2, 2), torch.arange(24.0).reshape(12, 2)], {}),
    "latent_scatter": ([X[:, :2], torch.tensor([0, 1, 2, 0, 1, 2])], {}),
    "em_steps": ([[-9.0, -7.0, -6.5], [-9.0, -7.0], [-8.0, -6.8]], {}),
    "gaussian_components": (
        [X[:, :2], torch.ones(6, 1), torch.zeros(1, 2), torch.eye(2).unsqueeze(0)],
        {},
    ),
    "levels_over_training": ([[1, 2], {"z1": [3.0, 9.0], "z2": [0.0, 1.0]}, "KL [nats]"], {}),
    "khat": ([torch.tensor([0.1, 0.9, 0.6, 0.3])], {}),
    "khat_images": ([X.reshape(6, 12)[:4], torch.tensor([0.1, 0.9, 0.6, 0.3]), (3, 4)], {}),
    "khat_histogram": ([torch.tensor([0.1, 0.9, 0.6, 0.3])], {}),
    "worst_points": ([X, torch.tensor([2.0, 1.0, 0.9, 0.8, 0.7, 0.6]), (3, 4)], {}),
    "kl_per_unit": ([torch.tensor([0.1, 2.0, 0.0]), torch.tensor([True, True, False])], {}),
    "rate_distortion": ([{"VAE": (20.0, 80.0), "beta 4": (8.0, 100.0)}], {}),
    "sbc_ecdf": ([{"z": torch.arange(40).reshape(20, 2) % 20}, 19, BAND], {}),
    "ratio_calibration": ([torch.linspace(-1, 3, 40), torch.linspace(-3, 1, 40)], {}),
    "coverage": ([torch.tensor([0.5, 0.9]), {"z": torch.tensor([[0.4], [0.8]])}, 100], {}),
    "gap_bars": ([GAPS], {}),
    "plates": ([STRUCTURE, STRUCTURE], {}),
    "posterior_contours": ([DRAWS, 1.3 * DRAWS.flip(0)], {}),
    "posterior_intervals": ([DRAWS, 1.3 * DRAWS.flip(0)], {}),
    "predictive_check": ([torch.tensor([1.0, 2.0]), torch.linspace(0, 3, 60).reshape(30, 2)], {}),
    "bound_against_particles": ([TABLE], {}),
    "snr_against_particles": ([TABLE], {"part": "model"}),
    "variance_against_time": ([TABLE], {}),
}
assert sorted(CALLS) == sorted(plots.__all__)


@pytest.fixture(autouse=True)
def agg():
    """Draw without a display, in the default style, and leave no figure open."""
    before = mpl.get_backend()
    plt.close("all")  # of other tests
    plt.switch_backend("Agg")
    with plt.style.context("default"):
        yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture
def ax():
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def picture(ax):
    """The tiled array as plain floats, NaN where missing."""
    (image,) = ax.images
    return np.ma.filled(image.get_array().astype(float), np.nan)


def tile(ax, row, column, height=3, width=4):
    return picture(ax)[row * height : (row + 1) * height, column * width : (column + 1) * width]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_image(drawn, image, shape=(3, 4)):
    np.testing.assert_allclose(drawn, image.reshape(shape), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
class TestEveryPlot:
    def test_draws_on_the_axes_given_and_makes_no_figure(self, name, ax):
        args, options = CALLS[name]
        assert getattr(plots, name)(*args, ax=ax, **options) is ax
        assert ax.has_data()
        assert plt.get_fignums() == []
        assert ax.figure.axes == [ax]

    def test_makes_one_figure_without_axes(self, name):
        args, options = CALLS[name]
        made = getattr(plots, name)(*args, **options)
        assert [plt.figure(number) for number in plt.get_fignums()] == [made.figure]

    def test_nothing_is_clipped(self, name):
        """All text, legend included, lies inside the figure that the function makes."""
        args, options = CALLS[name]
        made = getattr(plots, name)(*args, **options)
        made.figure.canvas.draw()
        box, whole = made.get_tightbbox(), made.figure.bbox
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= whole.x1
        assert box.y1 <= whole.y1

    @pytest.mark.parametrize(
        "kinds",
        [("numpy", "gradient"), pytest.param(("lists", "list"), marks=pytest.mark.slow)],
        ids=", ".join,
    )
    def test_same_picture_from_numpy_lists_and_gradients(self, name, kinds):
        args, options = CALLS[name]

        def render(convert):
            figure = Figure(figsize=(6, 4), dpi=40)
            converted = [convert(a) if isinstance(a, torch.Tensor) else a for a in args]
            getattr(plots, name)(*converted, ax=figure.subplots(), **options)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            return np.asarray(canvas.buffer_rgba())

        def with_gradient(a):
            return a.clone().requires_grad_() if a.is_floating_point() else a

        expected = render(lambda a: a)
        to = {
            "numpy": torch.Tensor.numpy,
            "gradient": with_gradient,
            "lists": torch.Tensor.tolist,
            "list": list,
        }
        for kind in kinds:
            np.testing.assert_array_equal(render(to[kind]), expected)

    def test_leaves_arguments_and_rcparams_alone(self, name, ax):
        args, options = CALLS[name]
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        settings = mpl.rcParams.copy()
        getattr(plots, name)(*args, ax=ax, **options)
        assert mpl.rcParams == settings
        for a, copy in zip(args, copies, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, copy, equal_nan=True, rtol=0, atol=0)


def test_units_are_called_active_only_if_that_is_known(ax):
    plots.kl_per_unit([0.1, 2.0], ax=ax)
    assert ax.get_legend() is None
    plots.kl_per_unit([0.1, 2.0], [False, True], ax=ax)
    assert legend(ax) == ["active: 1", "not active: 1"]


def test_units_stand_from_the_largest_mean_kl_down(ax):
    kl = torch.tensor([[0.0, 3.0, 0.5], [0.2, 1.0, 0.5]])
    plots.kl_per_unit(kl, [False, True, False], ax=ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [2.0, 0.5, 0.1])
    assert ticks(ax.xaxis) == ["1", "2", "0"]
    blue, grey = to_rgba(common.BLUE), to_rgba(common.GREY)
    assert [bar.get_facecolor() for bar in ax.patches] == [blue, grey, grey]


def test_a_khat_at_a_limit_belongs_to_the_better_band(ax):
    plots.khat_histogram([0.2, 0.5, 0.7, 0.7 + 1e-6, 3.0, torch.nan], ax=ax)
    assert legend(ax) == ["good: 2", "usable: 1", "unreliable: 2"]
    assert sum(bar.get_height() for bar in ax.patches) == 5  # 3.0 in the last bar
    assert ax.get_xlabel().endswith("(above 2 in the last bar)")


def test_each_image_stands_in_the_column_of_its_khat_in_its_colour(ax):
    """Full images of one pixel: what is not white is the brick of one datapoint."""
    khats = [0.5, 0.5 + 1e-6, 0.7, 0.71, -3.0, 9.0, torch.nan]
    plots.khat_images(torch.ones(7, 1), khats, (1, 1), ax=ax)
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape == (1, 40, 3)  # 0.05 wide, from 0 to 2
    columns = {9: common.BLUE, 10: common.ORANGE, 13: common.ORANGE, 14: common.RED}
    for column, colour in (columns | {0: common.BLUE, 39: common.RED}).items():
        np.testing.assert_allclose(picture[0, column], to_rgba(colour)[:3], atol=1e-9)
    assert (picture == 1).all(-1).sum() == 40 - 6
    assert legend(ax) == ["good: 33%", "usable: 33%", "unreliable: 33%"]
    with pytest.raises(ValueError, match="images"):
        plots.khat_images(torch.ones(3, 1), khats, (1, 1), ax=ax)


@pytest.mark.parametrize("values", [[0.0] * 3, [-1.5, 0.3, 0.7], [-4.0, 0.1, 1.2], [0.6, 0.6, 2.0]])
def test_every_khat_is_in_a_bar(values, ax):
    plots.khat_histogram(values, ax=ax)
    assert sum(bar.get_height() for bar in ax.patches) == len(values)


def test_lines_of_rate_and_distortion_have_one_elbo(ax):
    plots.rate_distortion({"a": (20.0, 80.0), "b": (8.0, 100.0)}, ax=ax)
    points = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [(20, 80), (8, 100)]
    sums = []
    for line in ax.lines:
        if len(line.get_xdata()) == 2:
            total = np.add(*line.get_data())
            np.testing.assert_allclose(total, total[0])
            sums.append(total[0])
    assert len(sums) == 5
    for text in ax.texts:  # each above the line of its own number
        elbo = float(text.get_text().split()[1].replace("\N{MINUS SIGN}", "-"))
        assert abs(sum(text.xy) + elbo) <= 0.5
        assert min(abs(total - sum(text.xy)) for total in sums) < 1e-9


def test_an_ecdf_leaves_its_band_on_either_side(ax):
    """Of four ranks 0 .. 3: lines by hand."""
    points = np.array([0.25, 0.5, 0.75])
    ranks = {"even": [[0], [1], [2], [3]], "low": [[0]] * 4, "high": [[3]] * 4}
    plots.sbc_ecdf(ranks, 3, (points, points - 0.3, points + 0.3), ax=ax)
    _, even, low, high = ax.lines
    np.testing.assert_allclose(even.get_ydata(), np.zeros(5))
    np.testing.assert_allclose(low.get_ydata(), [0, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(high.get_ydata(), [0, -0.25, -0.5, -0.75, 0])
    for line in (even, low, high):
        np.testing.assert_allclose(line.get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    assert ax.get_title() == "2 of 3 lines leave the band"


def test_coverage_has_a_band_of_two_standard_errors(ax):
    plots.coverage([0.2, 0.5], {"z": [[0.1, 0.3], [0.4, 0.6]]}, 100, ax=ax)
    edges = ax.collections[0].get_paths()[0].vertices
    at_half = edges[np.isclose(edges[:, 0], 0.5), 1]
    np.testing.assert_allclose([at_half.min(), at_half.max()], [0.4, 0.6])  # 0.5 / sqrt(100) twice
    at_fifth = edges[np.isclose(edges[:, 0], 0.2), 1]
    np.testing.assert_allclose([at_fifth.min(), at_fifth.max()], [0.12, 0.28])
    diagonal, *units = ax.lines
    np.testing.assert_allclose(diagonal.get_ydata(), [0, 1])
    np.testing.assert_allclose([unit.get_ydata() for unit in units], [[0.1, 0.4], [0.3, 0.6]])


@pytest.mark.parametrize(("value", "title"), [(-9.0, "below"), (9.0, "above")])
def test_a_predictive_check_beyond_all_draws_does_not_look_like_a_pass(ax, value, title):
    plots.predictive_check([value], torch.linspace(0, 3, 40).reshape(40, 1), ax=ax)
    assert ax.get_title() == f"the data lie {title} all 40 draws"
    assert ax.title.get_color() == common.RED


def test_numbers_of_draws_do_not_lie_on_each_other(ax):
    table = pandas.DataFrame({"family": list("aab"), "particles": [1, 64, 64],
                              "var_guide": [2.0, 1.0, 1.001], "ms": [1.0, 9.0, 9.01]})  # fmt: skip
    plots.variance_against_time(table, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["1", "64", "64"]
    _, one, other = (text.get_window_extent() for text in ax.texts)
    assert not one.overlaps(other)

    many = pandas.concat([table] * 5)  # there is no room for all, so some are left out
    many["family"] = [*"abcdefghijklmno"]
    assert len(plots.variance_against_time(many, ax=Figure().subplots()).texts) < 15


def test_a_predictive_check_shows_means_over_datapoints_and_half_of_ties(ax):
    drawn = torch.tensor([[0.0, 2.0], [1.0, 3.0], [0.0, 0.0], [2.0, 4.0]])  # means 1, 2, 0, 3
    plots.predictive_check([1.0, 3.0], drawn, "ink", ax=ax)  # mean 2
    (line,) = ax.lines
    assert line.get_xdata()[0] == 2
    assert ax.get_title() == f"{(1 + 0.5) / 4:.1%} of draws lie above the data"
    assert sum(bar.get_height() for bar in ax.patches) == 4


def test_intervals_are_the_quantiles_of_each_latent(ax):
    q, p = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)), DRAWS
    plots.posterior_intervals(q, p, ax=ax)
    wide_p, narrow_p, wide_q, narrow_q = ax.collections
    for draws, wide, narrow, median in ((p, wide_p, narrow_p, 0), (q, wide_q, narrow_q, 1)):
        for levels, lines in (((0.025, 0.975), wide), ((0.25, 0.75), narrow)):
            ends = np.array(lines.get_segments())[:, :, 0]
            np.testing.assert_allclose(ends, np.quantile(draws, levels, axis=0).T, rtol=1e-6)
        np.testing.assert_allclose(ax.lines[median].get_xdata(), draws.quantile(0.5, 0), rtol=1e-6)
        np.testing.assert_allclose(np.diff(ax.lines[median].get_ydata()), 1)  # latents in order


def test_contours_enclose_their_share_of_the_mass_where_the_draws_are():
    """Of an oblong normal: the heights by their definition, and x along the columns."""
    draws = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    draws = (draws * torch.tensor([3.0, 1.0]) + torch.tensor([10.0, 0.0])).numpy()
    x, y, density = posteriors._density(draws, [(-5.0, 25.0), (-5.0, 5.0)])
    along_x, along_y = density.sum(0) / density.sum(), density.sum(1) / density.sum()
    mean = along_x @ x, along_y @ y
    np.testing.assert_allclose(mean, draws.mean(0), atol=0.1)
    spread = np.sqrt([along_x @ (x - mean[0]) ** 2, along_y @ (y - mean[1]) ** 2])
    np.testing.assert_allclose(spread, [3.0, 1.0], rtol=0.1)
    low, high = posteriors._levels(density, [0.5, 0.9])
    for level, share in ((high, 0.5), (low, 0.9)):
        assert density[density >= level].sum() / density.sum() == pytest.approx(share, abs=0.01)
        assert density[density >= level].min() > density[density < level].max()  # the densest


def test_bars_of_gaps_are_means_and_two_standard_errors(ax):
    plots.gap_bars(GAPS, ax=ax)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [0.3, 0.3, 1.5, -0.05], rtol=1e-5)
    assert [bar.get_y() for bar in ax.patches] == pytest.approx([0, 0, 0.3, 0])
    for i, gaps in enumerate(GAPS.values()):
        total = gaps.approximation + gaps.amortisation
        reach = 2 * total.std().item() / 2**0.5
        (segment,) = ax.containers[2 + i].lines[2][0].get_segments()
        ends = total.mean().item() + np.array([-reach, reach])
        np.testing.assert_allclose(segment[:, 1], ends, rtol=1e-5)


class TestTrainingCurve:
    def test_lines_start_at_epoch_one(self, ax):
        plots.training_curve([-3.0, -1.0, -2.0], [-4.0, -3.5, -3.0], ax=ax, name="IWELBO-8")
        train, valid, best = ax.lines
        np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(train.get_ydata(), [-3, -1, -2])
        np.testing.assert_array_equal(valid.get_ydata(), [-4, -3.5, -3])
        assert (best.get_xdata()[0], best.get_ydata()[0]) == (3, -3)  # validation decides
        best_label = "best validation: \N{MINUS SIGN}3.00 at epoch 3"
        assert legend(ax) == ["training IWELBO-8", "validation IWELBO-8", best_label]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "bound [nats per datapoint]")
        assert 0 < ax.get_xlim()[0] < 1
        assert ax.get_xlim()[1] > 3

    def test_training_decides_alone(self, ax):
        plots.training_curve([-3.0, -1.0, -2.0], ax=ax, ylabel="bits per dimension")
        best = ax.lines[-1]
        assert best.get_xdata()[0] == 2
        assert ax.get_ylabel() == "bits per dimension"

    def test_epochs_without_validation_are_bridged(self, ax):
        plots.training_curve([-5.0, -4, -3, -2], [torch.nan, -4.5, -torch.inf, -3.5], ax=ax)
        np.testing.assert_array_equal(ax.lines[1].get_xdata(), [2, 4])
        assert ax.lines[2].get_xdata()[0] == 4

    def test_early_epochs_do_not_squash_the_rest(self, ax):
        curve = -100 - 1e4 * np.exp(-np.arange(50.0))
        plots.training_curve(curve, ax=ax)
        low, high = ax.get_ylim()
        assert high > curve.max()
        assert low > -101
        hidden = int((curve < low).sum())
        assert 0 < hidden <= 10
        assert ax.get_legend().get_title().get_text() == f"{hidden} values below the axis"

    @pytest.mark.parametrize("curve", [[-60.0, -45, -40, -38], list(range(30)), [-1.0] * 30, [2.0]])
    def test_an_even_curve_is_shown_whole(self, curve, ax):
        plots.training_curve(curve, ax=ax)
        low, high = ax.get_ylim()
        assert low < min(curve)
        assert high > max(curve)
        assert ax.get_legend().get_title().get_text() == ""

    @pytest.mark.parametrize(
        ("train", "valid", "argument"),
        [
            ([], None, "train"),
            (X, None, "train"),
            (-1.0, None, "train"),
            ([torch.nan, -torch.inf], None, "train"),
            ([1.0, 2.0], [1.0], "valid"),
            ([1.0, 2.0], [torch.nan] * 2, "valid"),
        ],
    )
    def test_refuses(self, train, valid, argument):
        with pytest.raises(ValueError, match=rf"^{argument} must be .* got shape \("):
            plots.training_curve(train, valid)
        assert plt.get_fignums() == []


class TestImageGrid:
    def test_fills_row_by_row_and_leaves_the_rest_empty(self, ax):
        plots.image_grid(X[:5], (3, 4), ax=ax, columns=2)
        assert picture(ax).shape == (9, 8)
        for k in range(5):
            assert_image(tile(ax, k // 2, k % 2), X[k])
        (image,) = ax.images
        assert (image.to_rgba(tile(ax, 2, 1))[..., 3] == 0).all()  # transparent
        assert image.get_clim() == (0, 1)
        np.testing.assert_allclose(
            image.to_rgba(np.array([[0.0, 1.0]]))[0, :, :3], [[0] * 3, [1] * 3]
        )

    def test_rows_and_columns_with_labels(self, ax):
        plots.image_grid(
            X.reshape(2, 3, 12),
            (1, 3, 4),
            ax=ax,
            row_labels=["a", "b"],
            column_labels=["u", "v", "w"],
            title="title",
        )
        for k in range(6):
            assert_image(tile(ax, k // 3, k % 3), X[k])
        assert ticks(ax.yaxis) == ["a", "b"]
        assert ticks(ax.xaxis) == ["u", "v", "w"]
        np.testing.assert_allclose(ax.get_yticks(), [1, 4])  # the middle of each row of pixels
        np.testing.assert_allclose(ax.get_xticks(), [1.5, 5.5, 9.5])
        assert ax.get_title() == "title"
        assert ax.xaxis.get_ticks_position() == "top"

    def test_separators_lie_between_images(self, ax):
        plots.image_grid(X, (3, 4), ax=ax, columns=3)
        vertical, horizontal = (np.array(c.get_segments()) for c in ax.collections)
        np.testing.assert_allclose(vertical[:, :, 0], [[3.5, 3.5], [7.5, 7.5]])
        np.testing.assert_allclose(horizontal[:, :, 1], [[2.5, 2.5]])
        assert ax.get_xlim() == (-0.5, 11.5)
        assert ax.get_ylim() == (5.5, -0.5)

    @pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2)])
    def test_near_square_by_default(self, count, columns, rows, ax):
        plots.image_grid(X[:count], (3, 4), ax=ax)
        assert picture(ax).shape == (3 * rows, 4 * columns)

    def test_colour(self, ax):
        images = torch.rand(3, 3, 2, 5, generator=torch.Generator().manual_seed(0))
        plots.image_grid(images.flatten(1), torch.Size([3, 2, 5]), ax=ax, columns=2)
        assert picture(ax).shape == (4, 10, 4)
        drawn = tile(ax, 1, 0, 2, 5)
        np.testing.assert_allclose(drawn[..., :3], images[2].permute(1, 2, 0), atol=1e-7)
        assert (drawn[..., 3] == 1).all()
        assert (tile(ax, 1, 1, 2, 5)[..., 3] == 0).all()

    @pytest.mark.parametrize("shape", [(2, 2), (3, 2, 2)])
    def test_missing_pixels_are_tinted(self, shape, ax):
        images = np.zeros((1, *shape))
        images[..., 0, 1] = np.nan
        plots.image_grid(images.reshape(1, -1), shape, ax=ax)
        (image,) = ax.images
        colours = image.to_rgba(image.get_array())
        np.testing.assert_allclose(colours[0, 1], to_rgba(common.MISSING))
        np.testing.assert_allclose(colours[1, 1], [0, 0, 0, 1])
        red, green, blue, _ = to_rgba(common.MISSING)
        assert max(red, green, blue) - min(red, green, blue) > 0.2  # unlike any grey

    def test_rounding_beyond_the_unit_interval_is_forgiven(self, ax):
        plots.image_grid([[1 + 5e-7, -5e-7]], (1, 2), ax=ax)
        np.testing.assert_array_equal(picture(ax), [[1, 0]])

    def test_low_precision(self, ax):
        plots.image_grid(X.bfloat16(), (3, 4), ax=ax, columns=2)
        assert_image(tile(ax, 2, 1), X[5].bfloat16().float())

    @pytest.mark.parametrize(
        ("images", "shape", "options", "message"),
        [
            (X, (3, 5), {}, r"^images must be \(M, D\) with D = 15.*got shape \(6, 12\).*Flatten"),
            (X[0], (3, 4), {}, r"^images must be \(M, D\).*got shape \(12,\)"),
            (X.reshape(6, 3, 4), (3, 4), {}, r"^images must be \(R, C, D\).*\(6, 3, 4\)\. Flatten"),
            (X[:0], (3, 4), {}, r"^images must .* got shape \(0, 12\)"),
            (X, (12,), {}, r"^shape must be .* got \(12,\)"),
            (X, (2, 2, 3), {}, r"^shape must be .* got \(2, 2, 3\)"),
            (X * 255, (3, 4), {}, r"^images must be in \[0, 1\].* 0 to 255\. Rescale"),
            (X - 0.001, (3, 4), {}, r"^images must be in \[0, 1\]"),
            (X / 0, (3, 4), {}, r"^images must be in \[0, 1\]"),
            (X, (3, 4), {"columns": 0}, "^columns must be >= 1.*columns=0"),
            (
                X[None],
                (3, 4),
                {"columns": 6},
                r"^columns must .* shape \(1, 6, 12\)\. Leave it out",
            ),
            (X, (3, 4), {"columns": 2, "row_labels": ["a"]}, "^row_labels has 1 labels for 3"),
            (X, (3, 4), {"column_labels": ["a"]}, "^column_labels has 1 labels for 3"),
        ],
    )
    def test_refuses(self, images, shape, options, message):
        with pytest.raises(ValueError, match=message):
            plots.image_grid(images, shape, **options)
        assert plt.get_fignums() == []


class TestPicturesOfAModel:
    def test_reconstructions(self, ax):
        plots.reconstructions(X, 1 - X, (3, 4), X**2, ax=ax)
        assert ticks(ax.yaxis) == ["original", "reconstruction", "sample"]
        for k in range(6):
            assert_image(tile(ax, 0, k), X[k])
            assert_image(tile(ax, 1, k), 1 - X[k])
            assert_image(tile(ax, 2, k), X[k] ** 2)

    def test_reconstructions_without_samples(self, ax):
        plots.reconstructions(X, 1 - X, (3, 4), ax=ax)
        assert ticks(ax.yaxis) == ["original", "reconstruction"]
        assert picture(ax).shape == (6, 24)

    def test_class_grid(self, ax):
        plots.class_grid(X.reshape(3, 2, 12), (3, 4), ax=ax)
        assert ticks(ax.yaxis) == ["0", "1", "2"]
        assert ax.get_ylabel() == "class"
        assert_image(tile(ax, 2, 1), X[5])

    def test_class_grid_with_names(self, ax):
        plots.class_grid(X.reshape(3, 2, 12), (3, 4), ["cat", "dog", "owl"], ax=ax)
        assert ticks(ax.yaxis) == ["cat", "dog", "owl"]

    def test_quadrant_completion(self, ax):
        plots.quadrant_completion(HIDDEN, torch.stack([1 - X, X**2]), X, (3, 4), ax=ax)
        assert ticks(ax.yaxis) == ["visible", "completion 1", "completion 2", "original"]
        for k in range(6):
            assert_image(tile(ax, 0, k), HIDDEN[k])
            assert_image(tile(ax, 1, k), 1 - X[k])
            assert_image(tile(ax, 2, k), X[k] ** 2)
            assert_image(tile(ax, 3, k), X[k])
        assert np.isnan(tile(ax, 0, 5)[0]).all()
        assert not np.isnan(tile(ax, 0, 5)[1:]).any()

    def test_manifold_puts_each_latent_where_its_ticks_say(self, ax):
        """Decode z to two pixels that are z itself: every tile then states its own place."""
        images = (torch.cartesian_prod(GRID, GRID) + 1.5) / 3
        plots.manifold(images, (1, 2), GRID, ax=ax)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
        number = [float(t.replace("\N{MINUS SIGN}", "-")) for t in ticks(ax.xaxis)]
        assert number == GRID.tolist()
        assert ticks(ax.yaxis) == ticks(ax.xaxis)
        for x, z1 in zip(ax.get_xticks(), GRID, strict=True):
            for y, z2 in zip(ax.get_yticks(), GRID, strict=True):
                drawn = picture(ax)[round(y), round(x - 0.5) : round(x + 0.5) + 1]
                np.testing.assert_allclose(drawn * 3 - 1.5, [z1, z2], atol=1e-6)
        bottom, top = ax.transData.transform([(0, y) for y in ax.get_yticks()[[0, -1]]])[:, 1]
        assert bottom < top  # z2 grows upwards

    def test_manifold_thins_its_ticks(self, ax):
        plots.manifold(torch.zeros(400, 4), (2, 2), torch.linspace(-2, 2, 20), ax=ax)
        labels = ticks(ax.xaxis)
        assert len(labels) == 5
        assert labels[0] == "\N{MINUS SIGN}2"
        assert labels[-1] == "2"

    def test_interpolation(self, ax):
        plots.interpolation(X.reshape(2, 3, 12), (3, 4), ax=ax)
        assert ticks(ax.xaxis) == ["start", "", "end"]
        for k in range(6):
            assert_image(tile(ax, k // 3, k % 3), X[k])

    @pytest.mark.parametrize(
        ("draw", "message"),
        [
            (lambda: plots.reconstructions(X, X[:5], (3, 4)), r"^reconstructions .*6.*\(5, 12\)"),
            (lambda: plots.reconstructions(X, X, (3, 4), X[:5]), r"^samples .*6.*\(5, 12\)"),
            (lambda: plots.reconstructions(X, X + 1, (3, 4)), r"^reconstructions must be in"),
            (lambda: plots.reconstructions(X[None], X, (3, 4)), r"^originals must be \(M, D\)"),
            (lambda: plots.class_grid(X, (3, 4)), r"^samples must be \(C, S, D\).*\(6, 12\)"),
            (lambda: plots.class_grid(X[None], (3, 4), ["a", "b"]), r"^class_names has 2.* 1 "),
            (lambda: plots.quadrant_completion(X[:5], X[None], X, (3, 4)), r"^visible .*\(5, 12\)"),
            (lambda: plots.quadrant_completion(X, X, X, (3, 4)), r"^completions .*\(S, M, D\)"),
            (
                lambda: plots.quadrant_completion(X, X.reshape(6, 1, 12), X, (3, 4)),
                r"^completions must hold 6 images.*\(6, 1, 12\)",
            ),
            (lambda: plots.manifold(X, (3, 4), GRID), r"^images must be \(G \* G, D\).*6 .*\(3,\)"),
            (lambda: plots.manifold(X[:1], (3, 4), GRID[:1, None]), r"^images .*shape \(1, 1\)"),
            (lambda: plots.interpolation(X, (3, 4)), r"^images must be \(R, S, D\)"),
            (lambda: plots.interpolation(X[:, None], (3, 4)), r"^images .*S >= 2.*\(6, 1, 12\)"),
        ],
    )
    def test_refuses(self, draw, message):
        with pytest.raises(ValueError, match=message):
            draw()
        assert plt.get_fignums() == []


class TestLatentScatter:
    def test_every_class_has_its_points_colour_and_marker(self, ax):
        labels = np.arange(40) % 10
        z = np.random.default_rng(0).normal(size=(40, 2))
        plots.latent_scatter(z, labels, ax=ax)
        assert legend(ax) == [str(k) for k in range(10)]
        for k, points in enumerate(ax.collections):
            np.testing.assert_array_equal(points.get_offsets(), z[labels == k])
        assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 10
        assert len({c.get_paths()[0].vertices.tobytes() for c in ax.collections}) == 10
        assert ax.get_aspect() == 1
        assert np.ptp(ax.get_xlim()) == pytest.approx(np.ptp(ax.get_ylim()))
        for (low, high), column in zip((ax.get_xlim(), ax.get_ylim()), z.T, strict=True):
            assert low < column.min()
            assert column.max() < high
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")

    def test_legend_stands_outside_the_axes_and_inside_the_figure(self):
        """Also in a plain 6 x 4 figure without a layout engine."""
        figure = Figure(figsize=(6, 4))
        ax = figure.subplots()
        plots.latent_scatter(X[:, :2], range(6), ax=ax, class_names=["T-shirt/top"] * 6)
        FigureCanvasAgg(figure).draw()
        box = ax.get_legend().get_window_extent()
        assert box.x0 >= ax.bbox.x1
        assert box.x1 <= figure.bbox.x1

    def test_a_label_looks_the_same_in_every_figure(self):
        def look(labels):
            made = plots.latent_scatter(X[:2, :2], labels, ax=Figure().subplots(),
                                        class_names=["cat", "dog", "owl"])  # fmt: skip
            last = made.collections[-1]
            return (
                legend(made)[-1],
                tuple(last.get_facecolor()[0]),
                last.get_paths()[0].vertices.tobytes(),
            )

        assert look([0, 2]) == look([1, 2]) != look([0, 1])

    def test_many_classes_stay_distinct(self, ax):
        plots.latent_scatter(np.random.default_rng(0).normal(size=(100, 2)), np.arange(100), ax=ax)
        looks = {
            (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
            for c in ax.collections
        }
        assert len(looks) == 100

    def test_without_labels(self, ax):
        plots.latent_scatter(X[:, :2], ax=ax)
        assert ax.get_legend() is None
        assert len(ax.collections) == 1

    @pytest.mark.parametrize(
        ("z", "labels", "names", "message"),
        [
            (
                X,
                None,
                None,
                r"^z must be \(N, 2\) and finite; got shape \(6, 12\)\. Pass two columns.*proj",
            ),
            (X[0], None, None, r"^z must be \(N, 2\) and finite; got shape \(12,\)"),
            (X[:0, :2], None, None, r"^z must be \(N, 2\).* got shape \(0, 2\)"),
            (X[:, :2] / 0, None, None, r"^z must be \(N, 2\) and finite"),
            (X[:, :2], [0, 1], None, r"^labels must be \(6,\).*got shape \(2,\)"),
            (X[:, :2], torch.eye(6), None, r"^labels .*got shape \(6, 6\).*argmax"),
            (X[:, :2], [0.5] * 6, None, r"^labels .*integers"),
            (X[:, :2], [-1] * 6, None, r"^labels .*>= 0"),
            (X[:, :2], [0, 1, 2] * 2, ["a", "b"], r"^class_names has 2 .*up to 2; give 3"),
        ],
    )
    def test_refuses(self, z, labels, names, message):
        with pytest.raises(ValueError, match=message):
            plots.latent_scatter(z, labels, class_names=names)
        assert plt.get_fignums() == []


class TestKhat:
    def test_sorted_points_thresholds_and_share(self, ax):
        plots.khat([0.1, 0.9, 0.5, 0.7, 0.6, 0.71, 0.2, 0.3], ax=ax)
        good, usable, unreliable = ax.collections
        np.testing.assert_allclose(good.get_offsets(), [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.5)])
        np.testing.assert_allclose(usable.get_offsets(), [(5, 0.6), (6, 0.7)])
        np.testing.assert_allclose(unreliable.get_offsets(), [(7, 0.71), (8, 0.9)])
        assert legend(ax) == ["good (4)", "usable (2)", "unreliable (2)"]
        assert [line.get_ydata()[0] for line in ax.lines] == [0.5, 0.7]
        assert [text.get_text() for text in ax.texts] == ["0.5", "0.7"]
        assert ax.get_title() == r"25.0% of 8 datapoints have $\hat{k}$ > 0.7"

    def test_infinite_counts_as_unreliable_and_nan_as_unknown(self, ax):
        plots.khat([0.1, torch.inf, torch.nan, 0.2, 0.3], ax=ax)
        assert ax.get_title().startswith("25.0% of 4 datapoints")
        assert legend(ax) == ["good (3)", "usable (0)", "unreliable (1)"]
        assert ax.get_xlabel() == "datapoint, sorted (2 infinite or NaN, not drawn)"
        assert sum(len(points.get_offsets()) for points in ax.collections) == 3

    @pytest.mark.parametrize("values", [[], X, 0.3, [torch.nan, torch.inf]])
    def test_refuses(self, values):
        with pytest.raises(ValueError, match=r"^khat_values must be \(N,\).*got shape \("):
            plots.khat(values)
        assert plt.get_fignums() == []


def test_a_component_that_is_nobodys_likeliest_is_drawn_without_points(ax):
    share = torch.tensor([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1]])
    plots.gaussian_components(X[:2, :2], share, torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2), ax)
    assert len(ax.collections) == 1  # the points of the first
    assert len(ax.lines) == 3 * 3  # ellipses and mean of each


def test_estimator_plots_show_every_row_of_the_table(ax):
    plots.bound_against_particles(TABLE, ax=ax)
    assert legend(ax)[0].startswith("log p(x), exact")
    assert {"IWELBO", "IWELBO dreg"} < set(legend(ax))
    drawn = {tuple(line.get_ydata()) for line in ax.lines}
    assert {(-5.0, -4.5), (-5.1, -4.4), (-4.2, -4.2)} <= drawn
    assert ticks(ax.xaxis) == ["1", "8"]


def test_bounds_have_bars_of_two_standard_errors(ax):
    plots.bound_against_particles(TABLE, ax=ax)
    for bars, rows in zip(ax.containers, (TABLE[:2], TABLE[2:]), strict=True):
        for segment, (_, row) in zip(bars.lines[2][0].get_segments(), rows.iterrows(), strict=True):
            ends = row["bound"] + 2 * row["bound_se"] * np.array([-1, 1])
            np.testing.assert_allclose(segment[:, 1], ends)


def test_averaging_trades_variance_for_time(ax):
    """Of n estimates the mean has 1/n of the variance and takes n times as long."""
    plots.variance_against_time(TABLE, ax=ax)
    (dotted,) = [line for line in ax.lines if line.get_label().startswith("averaging")]
    np.testing.assert_allclose(dotted.get_xdata(), [1.0, 6.0])
    np.testing.assert_allclose(np.multiply(*dotted.get_data()), 2.0 * 1.0)


def test_estimator_plots_refuse_another_part(ax):
    for draw in (plots.snr_against_particles, plots.variance_against_time):
        with pytest.raises(ValueError, match="part must be"):
            draw(TABLE, part="decoder", ax=ax)
    with pytest.raises(ValueError, match="timing_rounds >= 1"):
        plots.variance_against_time(TABLE.drop(columns="ms"), ax=ax)


def test_a_true_ratio_lies_on_the_diagonal_and_half_of_it_does_not():
    generator = torch.Generator().manual_seed(0)
    a, b = 1 + torch.randn(20000, generator=generator), torch.randn(20000, generator=generator)
    far = []
    for weight in (1.0, 0.5):  # T* = z - 1/2 for N(1, 1) against N(0, 1)
        ax = plots.ratio_calibration(weight * (a - 0.5), weight * (b - 0.5), ax=Figure().subplots())
        (said, share) = ax.lines[1].get_data()
        far.append(np.abs(share - said) / np.sqrt(said * (1 - said) / 4000))
    assert len(said) == 10
    assert far[0].max() < 4.5
    assert far[1].max() > 10


@pytest.mark.parametrize(
    ("values", "bins", "match"),
    [
        (([0.0, 1.0], [0.0]), 1, "denominator must be"),
        (([0.0, np.nan], [0.0, 1.0]), 1, "numerator must be"),
        (([0.0, 1.0], [0.0, 1.0]), 5, "bins must be 1 to"),
    ],
)
def test_ratio_calibration_refuses(values, bins, match):
    with pytest.raises(ValueError, match=match):
        plots.ratio_calibration(*values, bins=bins, ax=Figure().subplots())
