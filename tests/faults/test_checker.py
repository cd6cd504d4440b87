"""The checker finds what it is there for: a copy with one fault at a time."""

import pytest
import torch
import triton
import triton.language as tl
from ttsem.sanitize import KernelFault

N, BLOCK = 40, 16


@triton.jit
def _copy_kernel(x_ptr, y_ptr, load_end, store_end, step, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < load_end, other=0.0)
    tl.store(y_ptr + offs, x + pid, mask=offs < store_end)


def copy(load_end=N, store_end=N, step=BLOCK):
    x = torch.randn(N, device="cuda")
    y = torch.empty_like(x)
    _copy_kernel[(3,)](x, y, load_end, store_end, step, BLOCK=BLOCK)
    return y, x + torch.arange(N, device="cuda") // BLOCK


def test_a_right_kernel_passes():
    y, want = copy()
    assert torch.equal(y, want)


def test_a_read_past_the_end():
    with pytest.raises(KernelFault, match=r"tl\.load.*reads 1 element\(s\) past the end .* `x_ptr`"):
        copy(load_end=N + 1)


def test_a_write_past_the_end():
    with pytest.raises(KernelFault, match=r"tl\.store.*writes 1 element\(s\) past the end .* `y_ptr`"):
        copy(store_end=N + 1)


def test_two_programs_that_write_one_element():
    with pytest.raises(KernelFault, match=r"both touch element 15 of `y_ptr`"):
        copy(step=BLOCK - 1)


def test_an_element_that_is_not_written():
    y, _ = copy(store_end=N - 1)
    assert y.isnan().sum() == 1
