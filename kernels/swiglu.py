"""SwiGLU: silu(gate) * up of a fused gate-and-up projection, each step in fp32 and rounded to the model's dtype."""

import torch
import torch.nn.functional as F

from kernels import cpu


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for gate_up [..., 2F], gate first; differentiable."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Map gate_up [..., 2F], gate first, to [..., F]. In C++ a row has the same bits at every number of rows."""
    if not (torch.is_grad_enabled() and gate_up.requires_grad) and cpu.supports(gate_up):
        return torch.ops.skipfast_cpu.swiglu.default(gate_up.contiguous())
    return swiglu_reference(gate_up)
