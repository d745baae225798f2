import pytest
import torch

from veneer.errors import VeneerError
from veneer.ops import native


@pytest.fixture(params=native.ISAS)
def isa(request, monkeypatch):
    """Each instruction set this machine can run, forced by VENEER_ISA."""
    if native.missing() is not None:
        pytest.skip("no compiler built the kernels")
    monkeypatch.setenv("VENEER_ISA", request.param)
    try:
        native.isa()
    except VeneerError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def nan_empties():
    """Uninitialised memory holds NaN: a kernel that leaves a hole, or reads one, is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
