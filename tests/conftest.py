"""Fixtures and rules for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether its kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.evaluation_data import phantoms  # noqa: F401  (fixtures, made once for all test files)
from tests.evaluation_runs import data, single  # noqa: F401
from tests.folder_data import sound  # noqa: F401
from tests.nnunet_data import nnunet  # noqa: F401
from tests.report_data import example, page  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Small tensors gain nothing from more threads, and a shared machine has few cores, or even fewer."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True, scope="session")
def _float32_by_default() -> Iterator[None]:
    """Automatic precision depends on the processor; tests that want bfloat16 ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ima_seg.attacks.network._cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def organs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Phantoms of two organs, with MONAI bundles for them on demand."""
    from tests.bundle_data import Organs  # MONAI takes a while to import

    return Organs(tmp_path_factory.mktemp("organs"))
