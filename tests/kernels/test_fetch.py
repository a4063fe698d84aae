import pytest
import torch

from m3asr.kernels.fetch import fetch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numbers", [1, 4095, 40960, 3 << 20])
def test_fetching_reads_what_is_there_and_changes_nothing(device, dtype, numbers):
    """Less than a request, a remainder, more requests than threads: a request past the end would be an error."""
    if torch.cuda.get_device_properties(device).major < 9:
        pytest.skip("no requests of blocks before compute capability 9.0")
    weight = torch.randn(numbers, device=device).to(dtype)
    before = weight.clone()
    fetch(weight)
    torch.cuda.synchronize()
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
