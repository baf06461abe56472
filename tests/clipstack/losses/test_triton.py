"""The Triton kernels against the torch tiles: in Triton's interpreter where triton is installed, on a GPU
where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from clipstack.errors import ConfigError
from clipstack.losses import Embeddings, build_objective
from clipstack.world import World

CONFIGS: list[dict[str, Any]] = [
    {"name": "clip"},
    {"name": "hard_negative", "beta": 0.5},
    {"name": "hard_negative", "beta": 1.0, "beta_mode": "cosine"},
]


def gaps(device: str, dtype: torch.dtype, n: int, dim: int) -> list[float]:
    """Largest relative gap of loss and gradients, Triton to torch tiles, of each configuration."""
    out = []
    for config in CONFIGS:
        results = []
        for triton in (False, True):
            generator = torch.Generator().manual_seed(0)
            image, text = (
                normalize(torch.randn(n, dim, generator=generator), dim=1).to(device, dtype).requires_grad_()
                for _ in range(2)
            )
            ids = (torch.arange(n, device=device) * 7 % (n - 3))[:, None]
            scale = torch.tensor(3.5, device=device, requires_grad=True)
            objective = build_objective(
                config, World(device=torch.device(device)), tile=(160, 96), triton=triton
            )
            total = objective(Embeddings(image, text, scale), sample_ids=ids).total
            total.backward()
            results.append([total, image.grad, text.grad, scale.grad])
        for torch_value, triton_value in zip(*results, strict=True):
            out.append(float((torch_value - triton_value).abs().max() / torch_value.abs().max()))
    return out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_the_torch_tiles_in_the_interpreter() -> None:
    # In a process of its own: triton decides when it is imported whether it interprets.
    code = (
        f"import runpy; module = runpy.run_path({__file__!r}); "
        "print(max(module['gaps']('cpu', module['torch'].float32, 200, 40)))"
    )
    root = str(Path(__file__).resolve().parents[3])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_kernels_equal_the_torch_tiles_on_a_gpu(dtype: torch.dtype, allowed: float) -> None:
    assert max(gaps("cuda", dtype, 3000, 512)) < allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process without CUDA is what is tested")
def test_asking_for_the_kernels_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="CLIPSTACK_TRITON=1"):
        build_objective({"name": "clip"}, World(), triton=True)
