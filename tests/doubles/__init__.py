"""Doubles of CUDA and TensorRT: machines without a GPU run the real TensorRT backend on them.

They show what the backend asks for, in which order and on which memory. They show nothing about speed, nor about what
a real TensorRT makes of a plan: an engine's numbers come from ONNX Runtime on the CPU.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from runtime.manifest import PlanProvider
from runtime.plans import TENSORRT
from tests.doubles.cuda import CudaDouble
from tests.doubles.tensorrt import TensorRTDouble
from tests.plan_files import PLAN_VERSION


class GpuDouble(NamedTuple):
    """Both doubles, installed."""

    cuda: CudaDouble
    trt: TensorRTDouble


def install(patch: pytest.MonkeyPatch, cuda: CudaDouble, provider: PlanProvider = "tensorrt") -> GpuDouble:
    """Puts the doubles in the places of cuda-python and TensorRT."""
    trt = TensorRTDouble(cuda, PLAN_VERSION)
    patch.setattr("cuda.bindings.runtime", cuda)
    patch.setitem(sys.modules, TENSORRT[provider].module, trt)  # type: ignore[arg-type]
    return GpuDouble(cuda, trt)
