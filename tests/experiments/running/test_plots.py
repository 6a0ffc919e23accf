import matplotlib.image
import pytest

from experiments.running.plots import plot_curves

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
    records = [{"step": step, **STEP, **extra} for step in range(1, 5)]
    path = tmp_path / "curves.png"
    metric = "rmse" if "rmse" in extra else "accuracy"
    plot_curves(records, path, "a run", metric=metric)
    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (1320, 900)
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_a_step_has_a_picture_too(tmp_path):
    plot_curves([], tmp_path / "curves.png", "nothing yet")
    assert (tmp_path / "curves.png").exists()


def test_a_task_without_a_metric_has_a_picture_too(tmp_path):
    plot_curves([{"step": 1, **STEP}], tmp_path / "curves.png", "a run", metric=None)
    assert (tmp_path / "curves.png").exists()
