"""What one test has compiled the next need not compile again."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Every run makes its functions anew, and most of their programs are the same."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    options = {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        # Files are not written whole, so processes do not share them: one folder is
        # for this one, one for those that it starts, which may be killed.
        folder = tmp_path_factory.mktemp("compiled")
        for name, value in (options | {"jax_compilation_cache_dir": folder}).items():
            patch.setenv(name.upper(), str(value))
        options["jax_compilation_cache_dir"] = str(tmp_path_factory.mktemp("compiled"))
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
