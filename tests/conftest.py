"""Eight host devices for the sharding tests, and fixtures that several files share."""

import itertools
import os

# Compiling takes most of the time, and the models are tiny: little optimisation, in one
# piece, by the emitters that compile faster. Set XLA_FLAGS to run the tests with what
# users get.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "sdp_jax", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("sdp_jax")
FILES = itertools.count(1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="a long study; run it with -m study")
    for item in items:
        if "study" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget():
    """What was compiled stays in memory for eight files, which have much in common."""
    yield
    if next(FILES) % 8 == 0:
        jax.clear_caches()
