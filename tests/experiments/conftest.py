"""What one test has compiled the next need not compile again."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Every run makes its functions anew, and most of their programs are the same."""
    if not jax.config.jax_compilation_cache_dir:
        compilation_cache.reset_cache()
        # Of this process alone: files are not written whole.
        folder = str(tmp_path_factory.mktemp("compiled"))
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
