"""Where the tests of one card run: on CUDA, else they are skipped; ``ALIGN_GPU_TESTS_ON=cpu`` tries the tests out."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """``cuda``, or what ``ALIGN_GPU_TESTS_ON`` says."""
    wanted = os.environ.get("ALIGN_GPU_TESTS_ON", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device; ALIGN_GPU_TESTS_ON=cpu runs this on a processor")
    return wanted
