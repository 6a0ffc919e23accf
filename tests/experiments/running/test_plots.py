import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.running.plots import add_legend, plot_curves, save_figure, series

STEP = {"loss": 1.0, "measured_kl": 0.01}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"accuracy": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4},
        {"solver_steps": 3, "damping": 1e-3, "max_kl": 0.1, "predicted_kl": 0.02},
        {"linesearch_steps": 2},
        {"loss": None, "measured_kl": None, "solver_steps": 0, "damping": 0.0},
        {"loss": 0.0, "measured_kl": 0.0},
        {"loss": -1.0, "rmse": 2.0, "test_rmse": 3.0},
    ],
)
def test_curves_of_any_optimizer_and_task_become_one_picture(tmp_path, extra):
    records = [
        {"step": step, "seconds": 0.1 * step, **STEP, **extra} for step in range(1, 5)
    ]
    path = tmp_path / "curves.png"
    metric = "rmse" if "rmse" in extra else "accuracy"
    plot_curves(records, path, "a run", metric=metric)
    # All of them are flat, and the loss stays the same.
    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (660, 480)
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_a_step_has_a_picture_too(tmp_path):
    plot_curves([], tmp_path / "curves.png", "nothing yet")
    assert (tmp_path / "curves.png").exists()


def test_a_task_without_a_metric_has_a_picture_too(tmp_path):
    plot_curves([{"step": 1, **STEP}], tmp_path / "curves.png", "a run", metric=None)
    assert (tmp_path / "curves.png").exists()


def test_panels_are_over_steps_from_zero_and_seconds_and_flat_ones_are_left_out(
    tmp_path,
):
    figure = Figure()
    axes = figure.subplots(2, 2, sharex=True)
    steps, rising, flat = np.arange(5), np.arange(5.0), np.full(5, 20.0)
    for axis, values in zip(axes.flat, (rising, flat, flat, flat), strict=True):
        axis.plot(steps, values)
    axes[1, 0].twinx().plot(steps, rising)  # a flat panel whose twin is not
    records = [{"step": step, "seconds": 0.5 * step} for step in range(1, 5)]
    save_figure(figure, axes, tmp_path / "curves.png", records)
    assert [axis in figure.axes for axis in axes.flat] == [True, False, True, False]
    for axis in (axes[0, 0], axes[1, 0]):
        assert axis.get_xlim()[0] == 0.0
        [top] = axis.child_axes
        times = [float(label.get_text()) for label in top.get_xticklabels()]
        np.testing.assert_allclose(times, 0.5 * top.get_xticks())
    spots = [axis.get_subplotspec().get_topmost_subplotspec() for axis in figure.axes]
    assert {(spot.rowspan.start, spot.colspan.start) for spot in spots} == {
        (0, 0),
        (0, 1),
    }


@pytest.mark.parametrize("num_curves", [1, 2, 7])
def test_legends_cover_no_panel_and_no_labels(num_curves):
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        for number in range(num_curves):
            axis.plot(np.arange(5), label=f"the curve of number {number}")
        axis.set(title="A panel", xlabel="steps,\nin two lines", ylabel="value")
        add_legend(axis)
    figure.draw_without_rendering()
    for axis in axes.flat:
        legend = axis.get_legend().get_window_extent()
        assert figure.bbox.count_contains([legend.min, legend.max]) == 2
        assert not legend.overlaps(axis.xaxis.label.get_window_extent())
        for other in axes.flat:
            assert not legend.overlaps(other.get_window_extent())
            assert not legend.overlaps(other.title.get_window_extent())
            if other is not axis:
                assert not legend.overlaps(other.get_legend().get_window_extent())


def test_a_panel_without_labels_has_no_legend():
    axis = Figure().subplots()
    axis.plot([1.0, 2.0])
    add_legend(axis)
    assert axis.get_legend() is None


def test_what_is_measured_before_a_step_starts_at_zero():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3}]
    steps, values = series(records, "loss", is_before=True)
    np.testing.assert_array_equal(steps, [0, 1])
    np.testing.assert_array_equal(values, [3.0, np.nan])
