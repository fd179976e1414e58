"""What every test runs under: 8 CPU devices, no network, no rank promotion, compiled programs kept between runs."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEPT_FROM = 0.5  # seconds that a program takes to compile
MEMORY = 3 * 2**30  # above it a test process forgets what it has compiled
CACHES = tempfile.TemporaryDirectory(prefix="jaxalign-tests-")

# Read when jax, datasets and transformers are imported; processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = CACHES.name
os.environ["HF_DATASETS_CACHE"] = f"{CACHES.name}/datasets"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the workers compile for TPUs beside each other

import jax  # noqa: E402

from tests.compiling import quick_compiles  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Set here and not in the environment: a child process killed in the middle of a write would leave a broken entry.
# The size limit is what makes jax lock the folder, which parallel workers share.
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAXALIGN_TEST_CACHE") or str(ROOT / ".cache" / "xla"))
jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM)


# Files are handed out whole: the folders with the long ones come first, so that no worker is left with one at the end.
LONG = ("tests/run", "tests/methods", "tests/sampling", "tests/models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long folders first, otherwise in the order found."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT).parent.as_posix()
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: `JAXALIGN_SMOLLM2`, or where `make test` puts it."""
    path = Path(os.environ.get("JAXALIGN_SMOLLM2") or ROOT / "models" / "smollm2-135m-instruct.gguf")
    if path.is_file():
        return path
    reason = f"{path} is missing: `make test` fetches it, or set JAXALIGN_SMOLLM2 to a GGUF file of the model"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def libtpu() -> Iterator[None]:
    """The compiler for TPUs, which `make parity` brings; the test is skipped without it, in CI it fails."""
    if find_spec("libtpu") is None:
        reason = "libtpu, which compiles for TPUs, is not installed: `make parity` brings it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Programs for a TPU are not kept between runs: without one jax cannot read them back.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM)


@pytest.fixture(scope="module")
def compiled_quickly():
    """Programs compile in a sixth of the time, to slower code.

    For modules that test what is computed, not the program: nothing that reads memory or the compiled text, and
    no bound of the guarantees without a test elsewhere that compiles as users do (tests/methods/test_layouts.py,
    tests/sampling, SmolLM2).
    """
    with quick_compiles():
        yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """The compiled programs of all modules together would fill 10 GB of each test process."""
    yield
    if memory() > MEMORY:
        jax.clear_caches()


def memory() -> float:
    """Bytes that this process holds, as far as the system tells."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if pages.is_file() else float("inf")
