"""The CPU stand-in: megatron's calls are answered, torch's own behaviour stays."""

import torch

from megalong.runtime import device


def test_what_megatron_asks_of_cuda_is_answered_by_the_cpu() -> None:
    device.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], dtype=torch.float, device="cuda:0").device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
    x = torch.ones(1)
    assert x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    torch.cuda.synchronize()


def test_torch_itself_behaves_as_before() -> None:
    device.install()
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1, dtype=torch.int64).type() == "torch.LongTensor"
    assert torch.zeros(2, 3, dtype=torch.float64).shape == (2, 3)
    assert not torch.cuda.is_available()


def test_the_generator_of_the_cpu_stands_in_for_cudas() -> None:
    device.install()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))


def test_installing_twice_changes_nothing() -> None:
    device.install()
    before = torch.zeros
    device.install()
    assert torch.zeros is before
    assert device.backend() == "gloo"
    assert device.peak_memory_bytes() > 0
