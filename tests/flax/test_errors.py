"""What the adapters refuse, and that the messages help."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from ngd_jax.flax import linen_model_fn, nnx_model_fn
from tests.flax.networks import (
    BATCH,
    LABELS,
    STATS,
    LinenNet,
    NnxMasked,
    NnxTied,
    X,
    nnx_net,
)

# --- Errors.


@pytest.mark.long
def test_importing_the_library_does_not_import_flax():
    code = "import ngd_jax, sys; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LINEN_ERRORS = {
    "no mapping": (X, {}, r'`batch` lacks the entry "x"'),
    "no inputs": ({"y": LABELS}, {}, r'`batch` lacks the entry "x".*got \[\'y\'\]'),
    "collection missing": (
        BATCH,
        {"collections": ("batch_stats",)},
        r'lacks the entry "batch_stats", which `collections` asks for',
    ),
    "collection not named": (BATCH, {}, r'collections=\("batch_stats",\)'),
    "no keys": (
        BATCH,
        {"rngs": ("dropout",)},
        r'lacks the entry "rngs", which `rngs` asks for',
    ),
    "key missing": (
        BATCH | {"rngs": {"noise": jax.random.key(0)}},
        {"rngs": ("dropout",)},
        "'dropout' is missing",
    ),
    "stream not named": (
        BATCH | {"batch_stats": {"norm": STATS}},
        {"collections": ("batch_stats",), "train": True},
        r'rngs=\("dropout",\)',
    ),
    "collection written but not named": (
        BATCH | {"rngs": {"dropout": jax.random.key(0)}},
        {"rngs": ("dropout",), "train": True},
        "collections",
    ),
}


@pytest.mark.parametrize("name", LINEN_ERRORS)
def test_linen_calls_that_lack_something_say_what(params, name):
    batch, options, message = LINEN_ERRORS[name]
    model_fn = linen_model_fn(LinenNet(rate=0.5), **options)
    with pytest.raises(ValueError, match=message):
        model_fn(params, batch)


def test_writing_to_a_collection_that_is_not_named_says_so():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.put_variable("counts", "n", 1)
            return x

    with pytest.raises(ValueError, match="not among `collections`"):
        linen_model_fn(Counter())({}, BATCH)


NNX_ERRORS = {
    "no inputs": ({"y": LABELS}, {}, r'`batch` lacks the entry "x"'),
    "no state": (
        BATCH,
        {"state": nnx.BatchStat},
        r'lacks the entry "state", which `state` asks for',
    ),
    "other state": (
        BATCH | {"state": {"norm": {"mean": jnp.ones(4)}}},
        {"state": nnx.BatchStat},
        r"missing \['norm/var'\]",
    ),
    "no keys": (BATCH, {"rngs": ("dropout",)}, r'lacks the entry "rngs"'),
    "stream not named": (BATCH, {}, r"rngs=\('dropout',\)"),
}


@pytest.mark.parametrize("name", NNX_ERRORS)
def test_nnx_calls_that_lack_something_say_what(params, name):
    batch, options, message = NNX_ERRORS[name]
    model_fn = nnx_model_fn(nnx_net(params, rate=0.5), **options)
    with pytest.raises(ValueError, match=message):
        model_fn(params, batch)


def test_nnx_params_of_another_model_are_refused(params):
    model_fn = nnx_model_fn(nnx_net(params))
    with pytest.raises(ValueError, match=r"`params`.*missing \['out/bias'"):
        model_fn({k: v for k, v in params.items() if k != "out"}, BATCH)


CONSTRUCTION_ERRORS = {
    "linen class": (
        lambda: linen_model_fn(LinenNet),
        TypeError,
        "`module` must be a flax.linen.Module",
    ),
    "nnx for linen": (
        lambda: linen_model_fn(NnxTied(nnx.Rngs(0))),
        TypeError,
        "`module` must be",
    ),
    "linen for nnx": (lambda: nnx_model_fn(LinenNet()), TypeError, "`model` must be"),
    "string of rngs": (
        lambda: linen_model_fn(LinenNet(), rngs="dropout"),
        TypeError,
        r"`rngs` must be a sequence of names.*\('dropout',\)",
    ),
    "params as a collection": (
        lambda: linen_model_fn(LinenNet(), collections=("params",)),
        ValueError,
        "`collections` must not hold 'params'",
    ),
    "unknown argument, linen": (
        lambda: linen_model_fn(LinenNet(), trian=True),
        TypeError,
        "`trian` is neither an option .* nor an argument",
    ),
    "unknown argument, nnx": (
        lambda: nnx_model_fn(NnxTied(nnx.Rngs(0)), train=True),
        TypeError,
        "`train` is neither an option .* nor an argument",
    ),
    "unknown method": (
        lambda: linen_model_fn(LinenNet(), method="decode"),
        ValueError,
        "`method` must be a method of `module`.*'decode'",
    ),
    "nothing selected": (
        lambda: nnx_model_fn(NnxTied(nnx.Rngs(0)), wrt=nnx.LoRAParam),
        ValueError,
        "`wrt` selects none",
    ),
    "unknown stream": (
        lambda: nnx_model_fn(NnxMasked(nnx.Rngs(0)), rngs=("dropout",)),
        ValueError,
        r"`rngs` must name streams of the model.*\['default'\]",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION_ERRORS)
def test_construction_refuses(name):
    make, error, message = CONSTRUCTION_ERRORS[name]
    with pytest.raises(error, match=message):
        make()
