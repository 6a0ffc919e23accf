import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.running.cache import use_cache


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """As in a program of a user whose home is `tmp_path / "home"`."""
    for name in ("XDG_CACHE_HOME", "NGD_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        (None, "home/.cache/ngd_jax"),
        ("XDG_CACHE_HOME", "here/ngd_jax"),
        ("NGD_JAX_CACHE", "here"),
        ("jax_compilation_cache_dir", "here"),
        ("off", None),
    ],
)
def test_compiled_programs_are_kept_where_the_user_wants_them(
    tmp_path, monkeypatch, variable, folder
):
    if variable == "off":
        monkeypatch.setenv("NGD_JAX_CACHE", "off")
    elif variable == "jax_compilation_cache_dir":
        jax.config.update(variable, str(tmp_path / "here"))
    elif variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "here"))
    use_cache()
    jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(files) == (folder is not None)
    assert all(path.is_relative_to(tmp_path / folder) for path in files)
