"""Operations on rows of channels: RMSNorm, SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblocks.eager.derivatives import by_formula, must_trace

# Hidden activations that are in work at once on a CPU: 2048 rows of 352 channels. Memory that is used again is cheaper
# than fresh memory: at 16384 rows of 128 channels, one thread, forward takes 59 ms (all rows at once 76), training 185
# (202). Fewer rows gain nothing (256 to 2048: 57 to 62 and 179 to 185), and every product of a few rows is one more
# point where threads wait for each other, which on a busy machine is what the time goes into.
# (ConvNeXt's MLP, whose weights are larger, gains nothing: 232 to 270 ms instead of 218 at 8000 rows of 256.)
_CPU_HIDDEN = 2048 * 352
# Matrix products are faster at widths that are a multiple of this: 128 -> 352 takes 9.4 ms there, 128 -> 341 11.4.
_CPU_WIDTH = 16
_WIDE = torch.float32, torch.float64


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    own = x.is_cpu and x.dtype == scale.dtype and x.dtype in _WIDE
    if not own or not x.is_contiguous() or not x.numel() or must_trace():
        return rms_norm_formula(x, scale, eps)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _CPURMSNorm.apply(x, scale, eps)
    return _rms_norm(x, scale, eps)[0]


def rms_norm_formula(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * scale


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The formula's numbers with one tensor of x's size in place of three; and 1 / √(mean(x²) + eps) of each row."""
    y = x * x
    rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x, rstd, out=y).mul_(scale), rstd


class _CPURMSNorm(torch.autograd.Function):
    """Keeps x and a number per row, where autograd of the formula keeps three tensors of x's size.

    At 16384 rows of 128 channels and one thread a training step takes 13.9 ms instead of 30.8.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm(x, scale, eps)
        ctx.save_for_backward(x, scale, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(rms_norm_formula, (x, scale, ctx.eps), grad)
        channels = x.shape[-1]
        product = (grad * x).mul_(rstd)  # grad · x̂
        rows = product.reshape(-1, channels)
        grad_scale = rows.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_scale, None
        slope = torch.mv(rows, scale).view(rstd.shape).mul_(rstd)
        grad_x = torch.mul(grad, scale, out=product).addcmul_(x, slope, value=-1 / channels).mul_(rstd)
        return grad_x, grad_scale, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype != up.dtype or not gate.is_cpu or must_trace():
        return _swiglu_formula(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        # In 16 bits, where the library converts both ways, silu costs more than keeping it: 14.3 ms instead of 11.6.
        return (_CPUSwiGLU.apply if gate.dtype in _WIDE else _swiglu_formula)(gate, up)
    return F.silu(gate).mul_(up)


def _swiglu_formula(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _CPUSwiGLU(torch.autograd.Function):
    """Keeps its two inputs, where autograd of the formula keeps silu(gate) too."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(_swiglu_formula, (gate, up), grad)
        wants_gate, wants_up = ctx.needs_input_grad
        return (
            torch.ops.aten.silu_backward(grad * up, gate) if wants_gate else None,
            F.silu(gate).mul_(grad) if wants_up else None,
        )


def swiglu_mlp(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    same_dtype = x.dtype == weight_gate.dtype == weight_up.dtype == weight_down.dtype
    own = x.is_cpu and same_dtype and x.dtype in _WIDE  # as in `swiglu`; training in bfloat16 96 ms instead of 90
    if own and x.numel() and not torch.is_autocast_enabled("cpu") and not must_trace():
        pad = -weight_gate.shape[0] % _CPU_WIDTH
        gate, up, down = (
            F.pad(weight_gate, (0, 0, 0, pad)),
            F.pad(weight_up, (0, 0, 0, pad)),
            F.pad(weight_down, (0, pad)),
        )
        y = _CPUSwiGLUMLP.apply(x.reshape(-1, x.shape[-1]), gate, up, down)
        return y.view(*x.shape[:-1], y.shape[-1])
    return _swiglu_mlp_formula(x, weight_gate, weight_up, weight_down)


def _swiglu_mlp_formula(x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
    return F.linear(_swiglu_formula(F.linear(x, weight_gate), F.linear(x, weight_up)), weight_down)


def _rows_at_once(hidden: int) -> int:
    return max(1, _CPU_HIDDEN // max(1, hidden))


class _CPUSwiGLUMLP(torch.autograd.Function):
    """The layer over rows (N, C), a few at a time; keeps the two preactivations, gate and up."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, weight_gate: Tensor, weight_up: Tensor, weight_down: Tensor) -> Tensor:
        keep = any(ctx.needs_input_grad)
        rows, hidden = x.shape[0], weight_gate.shape[0]
        at_once = _rows_at_once(hidden)
        gate, up = (x.new_empty(rows if keep else min(rows, at_once), hidden) for _ in range(2))
        y = x.new_empty(rows, weight_down.shape[0])
        for start in range(0, rows, at_once):
            part = slice(start, min(start + at_once, rows))
            kept = part if keep else slice(0, part.stop - start)
            torch.mm(x[part], weight_gate.T, out=gate[kept])
            torch.mm(x[part], weight_up.T, out=up[kept])
            torch.mm(F.silu(gate[kept]).mul_(up[kept]), weight_down.T, out=y[part])
        ctx.save_for_backward(x, weight_gate, weight_up, weight_down, *((gate, up) if keep else ()))
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(_swiglu_mlp_formula, inputs, grad_y)
        x, weight_gate, weight_up, weight_down = inputs
        grad_x = torch.empty_like(x)
        grads = [torch.zeros_like(weight) for weight in inputs[1:]]
        at_once = _rows_at_once(gate.shape[1])
        for start in range(0, x.shape[0], at_once):
            part = slice(start, start + at_once)
            grad_act = grad_y[part] @ weight_down
            act = F.silu(gate[part])
            grad_gate = torch.ops.aten.silu_backward(grad_act * up[part], gate[part])
            grad_up = grad_act.mul_(act)
            torch.mm(grad_gate, weight_gate, out=grad_x[part])
            grad_x[part].addmm_(grad_up, weight_up)
            grads[0].addmm_(grad_gate.T, x[part])
            grads[1].addmm_(grad_up.T, x[part])
            grads[2].addmm_(grad_y[part].T, act.mul_(up[part]))
        return grad_x, *grads
