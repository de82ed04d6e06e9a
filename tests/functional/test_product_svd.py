from __future__ import annotations

import pytest
import torch

from lightning_peft.functional.product_svd import product_svd


@pytest.mark.parametrize(("d_out", "r", "d_in"), [(20, 4, 30), (5, 5, 5), (3, 6, 9), (9, 1, 4)])
def test_it_is_the_products_own(d_out: int, r: int, d_in: int) -> None:
    B, A = torch.randn(d_out, r), torch.randn(r, d_in)
    U, S, V = product_svd(B, A)
    product = B.double() @ A.double()
    torch.testing.assert_close(S, torch.linalg.svdvals(product)[: len(S)])
    torch.testing.assert_close(U @ torch.diag(S) @ V, product)
    eye = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye)
    torch.testing.assert_close(V @ V.T, eye)


def test_nothing_is_as_large_as_the_product() -> None:
    d = 4096  # the product would be 128 MB
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, each.numel() if isinstance(each, torch.Tensor) else 0)
            return out

    with Sizes():
        product_svd(torch.randn(d, 4), torch.randn(4, d))
    assert largest == 4 * d
