"""One layer of grouped GRUs and LSTMs.

On a CPU all groups and directions of a GRU run together, in one loop over time of batched products with hand-written
gradients: given the activations, the gradient of the state is a linear recurrence of three operations a step.
LSTMs run group by group there, in oneDNN's fused kernel. Forward at B 64, T 282, C 128, G 8 on 2 cores: the GRU 22 ms,
one block-diagonal torch.gru 34, eight small ones 53; the LSTM 8 ms, block-diagonal 18, in a loop like the GRU's 40.

On other devices the library's recurrences run, all groups as one with block-diagonal weights while that is small, else
one after another. `torch.compile` sees one operator, which does the same: tracing would unroll the time loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastblocks.eager.autocast import autocast_enabled, without_autocast
from fastblocks.eager.derivatives import by_formula, in_function_transform, twice_differentiable

# One recurrence with block-diagonal weights costs G times the FLOPs of G small ones, in a G-th of the steps. On a
# GPU the products of a step are free up to about this many hidden units (a prediction, not a measurement).
_BLOCK_DIAGONAL_HIDDEN = 256

# Most elements of a weight's gradient, all steps apart, that are held at once: 16 MB in float32.
_STEPS_AT_ONCE = 1 << 22

Tensors = tuple[Tensor | None, ...]


def grouped_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: Tensor | None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, Tensor]:
    y, h = _grouped(x, weight_ih, weight_hh, bias_ih, bias_hh, (state,))
    return y, h


def grouped_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    keep_gates: bool | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    y, h, c = _grouped(x, weight_ih, weight_hh, bias_ih, bias_hh, state or (None, None))
    return y, (h, c)


def _grouped(x, weight_ih, weight_hh, bias_ih, bias_hh, state: Tensors) -> Tensors:
    """A GRU where the state is (h,), an LSTM where it is (h, c); None: zeros."""
    directions, groups, _, hidden = weight_hh.shape
    dtype = x.dtype
    if dtype != torch.float64 and autocast_enabled(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
    if state[0] is None:
        state = tuple(x.new_zeros(directions, x.shape[0], groups * hidden) for _ in state)
    inputs = tuple(None if t is None else t.to(dtype) for t in (x, weight_ih, weight_hh, bias_ih, bias_hh, *state))
    # The state is kept in float32 through time: cuDNN does so by itself, oneDNN only with an LSTM's cell.
    on_onednn = x.is_cpu and len(state) == 2 and dtype == torch.bfloat16
    if (x.is_cpu and not on_onednn) or in_function_transform():
        wide = torch.promote_types(dtype, torch.float32)
        inputs = tuple(None if tensor is None else tensor.to(wide) for tensor in inputs)
    with without_autocast(x.device):
        if in_function_transform():
            outputs = _formula_of(state)(*inputs)
        elif torch.compiler.is_compiling():
            outputs = _operator(*inputs, *(None,) * (2 - len(state)))[: 1 + len(state)]
        else:
            outputs = _recurrence(*inputs)
    return tuple(tensor.to(dtype) for tensor in outputs)


def _recurrence(x, weight_ih, weight_hh, bias_ih, bias_hh, *state: Tensor) -> Tensors:
    """Inputs of one dtype -> y and the final states."""
    inputs = (x, weight_ih, weight_hh, bias_ih, bias_hh, *state)
    if x.shape[1] == 0:  # the libraries refuse it
        return _formula_of(state)(*inputs)
    if len(state) == 1 and (x.is_cpu or x.numel() == 0):
        return _CPUGRU.apply(*inputs)
    return twice_differentiable(_library, _formula_of(state), inputs)


def _formula_of(state: Tensors) -> Callable[..., Tensors]:
    return _gru_formula if len(state) == 1 else _lstm_formula


# --- The operator that the compiler sees


@contextmanager
def _autograd_inside_an_operator() -> Iterator[None]:
    """Operators run below autograd; this one needs it for the library's recurrences."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


_INPUTS = "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor state, Tensor? cell"


@torch.library.custom_op(
    "fastblocks::eager_recurrence", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _operator(x, weight_ih, weight_hh, bias_ih, bias_hh, state, cell):
    """y and the final states; for a GRU, whose `cell` is None, the last one is empty."""
    states = (state,) if cell is None else (state, cell)
    with torch.no_grad():
        y, *final = _recurrence(x, weight_ih, weight_hh, bias_ih, bias_hh, *states)
    final = [tensor.clone(memory_format=torch.contiguous_format) for tensor in final]  # no views of y
    return y.contiguous(), *final, *([x.new_empty(0)] if cell is None else [])


@_operator.register_fake
def _(x, weight_ih, weight_hh, bias_ih, bias_hh, state, cell):
    directions, groups, _, hidden = weight_hh.shape
    y = x.new_empty(x.shape[0], x.shape[1], groups * directions * hidden)
    return y, state.new_empty(state.shape), x.new_empty(0) if cell is None else cell.new_empty(cell.shape)


@torch.library.custom_op(
    "fastblocks::eager_recurrence_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_state, Tensor grad_cell, {_INPUTS}) -> Tensor[]",
)
def _operator_backward(grad_y, grad_state, grad_cell, *inputs):
    """The gradient of every input that is not None. Runs forward once more: what a library keeps for its backward pass
    is of a size that only the library knows."""
    with _autograd_inside_an_operator():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        outputs = _recurrence(*leaves[:5], *(state for state in leaves[5:] if state is not None))
        wanted = [leaf for leaf in leaves if leaf is not None]
        grad_x, *grads = torch.autograd.grad(outputs, wanted, (grad_y, grad_state, grad_cell)[: len(outputs)])
    # one tensor may be the gradient of both biases
    return [grad_x.contiguous(), *(grad.clone(memory_format=torch.contiguous_format) for grad in grads)]


@_operator_backward.register_fake
def _(grad_y, grad_state, grad_cell, *inputs):
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _operator_autograd(ctx, *grads: Tensor) -> Tensors:
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():
        states = [tensor for tensor in inputs[5:] if tensor is not None]
        found = by_formula(_formula_of(states), [*inputs[:5], *states], grads[: 1 + len(states)])
        return *found, *(None,) * (7 - len(found))
    found = iter(_operator_backward(*grads, *inputs))
    return tuple(None if tensor is None else next(found) for tensor in inputs)


_operator.register_autograd(
    _operator_autograd, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# --- The library's recurrences


def _block_diagonal(weight: Tensor, gates: int) -> Tensor:
    """(G, gates·H, I) -> (gates·G·H, G·I), a bias (G, gates·H) -> (gates·G·H,): one recurrence in which no group sees
    another."""
    groups = weight.shape[0]
    if groups == 1:
        return weight[0]
    by_gate = weight.unflatten(1, (gates, -1)).movedim(1, 0)  # (gates, G, H, …)
    if weight.dim() == 2:
        return by_gate.flatten()
    eye = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    return (by_gate.unsqueeze(3) * eye[:, None, :, None]).flatten(0, 2).flatten(1)


def _library(x, weight_ih, weight_hh, bias_ih, bias_hh, *state: Tensor) -> Tensors:
    """All groups by torch.gru or torch.lstm: x (B, T, G·I) -> y (B, T, G·N·H) and the final states (N, B, G·H)."""
    directions, groups, rows, hidden = weight_hh.shape
    gates = rows // hidden
    given = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    if groups > 1 and (x.is_cpu or groups * hidden > _BLOCK_DIAGONAL_HIDDEN):
        # Each group time first, in memory of its own: oneDNN takes up to twice as long on slices. Several small copies:
        # one of all groups is fresh memory every time (forward, one thread, 8.4 ms instead of 7.5).
        by_group = [part.contiguous() for part in x.transpose(0, 1).chunk(groups, -1)]
        weights = [w.flatten(0, 1).unbind() for w in given]  # one backward node for all of them
        states = [s.unflatten(-1, (groups, hidden)).unbind(2) for s in state]
        parts = [
            _one_recurrence(
                x_g, [w[d * groups + g] for d in range(directions) for w in weights], *(s[g] for s in states)
            )
            for g, x_g in enumerate(by_group)
        ]
        y, *final = zip(*parts, strict=True)
        return torch.cat([part.transpose(0, 1) for part in y], -1), *(torch.cat(last, -1) for last in final)
    weights = [_block_diagonal(w[d], gates) for d in range(directions) for w in given]
    y, *final = _one_recurrence(x.transpose(0, 1), weights, *state)
    if directions == 2:  # (direction, group) -> (group, direction)
        y = y.unflatten(-1, (directions, groups, hidden)).transpose(-2, -3).flatten(-3)
    return y.transpose(0, 1), *final


def _one_recurrence(x: Tensor, weights: list[Tensor], *state: Tensor) -> Tensors:
    """x (T, B, I) and each direction's weights in torch.nn.LSTM's order -> y (T, B, N·H) and the final states."""
    directions = state[0].shape[0]
    bias = len(weights) == 4 * directions
    # cuDNN has a backward pass in training mode only; inference is cheaper
    train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights, *state))
    state = [s.contiguous() for s in state]
    options = weights, bias, 1, 0.0, train, directions == 2, False
    return torch.gru(x, *state, *options) if len(state) == 1 else torch.lstm(x, state, *options)


# --- All groups and directions in one loop
#
# A cell is a group in a direction; there are N·G of them. Tensors over time are (T, cells, B, features), in the order
# in which the cell takes its steps, so that a step is contiguous: batched products on strided memory take twelve times
# as long.


def _to_cells(x: Tensor, directions: int, groups: int) -> Tensor:
    """(B, T, G·I) -> (T, N·G, B, I)."""
    x = x.unflatten(2, (groups, -1)).permute(1, 2, 0, 3)
    return torch.cat((x, x.flip(0)), dim=1) if directions == 2 else x.contiguous()


def _from_cells(x: Tensor, directions: int) -> Tensor:
    """(T, N·G, B, H) -> (B, T, G·N·H)."""
    x = x.unflatten(1, (directions, -1))
    if directions == 2:
        x = torch.stack((x[:, 0], x[:, 1].flip(0)), dim=1)
    return x.permute(3, 0, 2, 1, 4).flatten(2)


def _gradient_to_cells(grad: Tensor, directions: int, groups: int) -> Tensor:
    """(B, T, G·N·H) -> (T, N·G, B, H): the gradient of `_from_cells`, in memory of its own."""
    x = grad.unflatten(2, (groups, directions, -1)).permute(1, 3, 2, 0, 4)
    if directions == 2:
        return torch.cat((x[:, 0], x[:, 1].flip(0)), dim=1)
    return x[:, 0].clone(memory_format=torch.contiguous_format)


def _state_to_cells(state: Tensor, groups: int) -> Tensor:
    """(N, B, G·H) -> (N·G, B, H), in memory of its own."""
    x = state.unflatten(2, (groups, -1)).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _state_from_cells(state: Tensor, directions: int) -> Tensor:
    """(N·G, B, H) -> (N, B, G·H)."""
    return state.unflatten(0, (directions, -1)).transpose(1, 2).flatten(2)


def _product(cells: Tensor, weight: Tensor) -> Tensor:
    """(T, cells, B, I) times (cells, I, O) -> (T, cells, B, O)."""
    steps = cells.shape[0]
    return torch.bmm(cells.flatten(0, 1), weight.repeat(steps, 1, 1)).unflatten(0, (steps, -1))


def _project(cells: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, cells, B, I) times weight (N, G, rows, I) -> (T, cells, B, rows)."""
    y = _product(cells, weight.flatten(0, 1).transpose(1, 2))
    return y if bias is None else y.add_(bias.flatten(0, 1)[:, None])


def _weight_gradient(grad: Tensor, inputs: Tensor, like: Tensor) -> Tensor:
    """grad (T, cells, B, rows) ⊗ inputs (T, cells, B, columns), summed over time and batch, in the weight's shape.

    Small weights: a product for every step, then the sum over steps. A small product over all T·B terms at once has up
    to seven times the error (24 × 8, 4096 terms: 8.5e-7 against 5.1e-8), and its operands have to be transposed first
    (2.5 ms against 1.0). Large products are summed in blocks by the library (384 × 128: 8.9e-8).
    """
    if grad.shape[0] * like.numel() <= _STEPS_AT_ONCE:
        shares = torch.bmm(grad.flatten(0, 1).transpose(1, 2), inputs.flatten(0, 1))
        return shares.view(grad.shape[0], *like.shape).sum(0)
    rows, columns = (t.transpose(0, 1).flatten(1, 2) for t in (grad, inputs))
    return torch.bmm(rows.transpose(1, 2), columns).view(like.shape)


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (T, cells, B, rows) through weight (N, G, rows, I) -> (B, T, G·I)."""
    directions, groups = weight.shape[:2]
    x = _product(grad, weight.flatten(0, 1)).unflatten(1, (directions, groups))
    x = x[:, 0] + x[:, 1].flip(0) if directions == 2 else x[:, 0]
    return x.permute(2, 0, 1, 3).flatten(2)


def _gru_formula(x, weight_ih, weight_hh, bias_ih, bias_hh, state) -> Tensors:
    """The textbook recurrence, for function transforms and second derivatives."""

    def step(projected: Tensor, product: Tensor, h: Tensor) -> tuple[Tensor]:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = projected.chunk(3, -1), product.chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return (n + z * (h - n),)

    return _walk(step, x, weight_ih, weight_hh, bias_ih, bias_hh, state)


def _lstm_formula(x, weight_ih, weight_hh, bias_ih, bias_hh, state, cell) -> Tensors:
    """As `_gru_formula`."""

    def step(projected: Tensor, product: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (projected + product).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return _walk(step, x, weight_ih, weight_hh, bias_ih, bias_hh, state, cell)


def _walk(step: Callable[..., Tensors], x, weight_ih, weight_hh, bias_ih, bias_hh, *state: Tensor) -> Tensors:
    directions, groups = weight_hh.shape[:2]
    projected = _to_cells(x, directions, groups) @ weight_ih.flatten(0, 1).transpose(1, 2)
    if bias_ih is not None:
        projected = projected + bias_ih.flatten(0, 1)[:, None]
    recurrent = weight_hh.flatten(0, 1).transpose(1, 2)

    def next_states(projected: Tensor, carried: Tensors) -> Tensors:
        product = carried[0] @ recurrent
        if bias_hh is not None:
            product = product + bias_hh.flatten(0, 1)[:, None]
        return step(projected, product, *carried)

    carried = tuple(_state_to_cells(s, groups) for s in state)
    outputs = []
    for t in range(x.shape[1]):
        carried = next_states(projected[t], carried)
        outputs.append(carried[0])
    if outputs:
        y = torch.stack(outputs)
    else:  # T = 0: empty, but connected to every input in the graph
        y = next_states(projected, tuple(s.expand(0, *s.shape) for s in carried))[0]
    return _from_cells(y, directions), *(_state_from_cells(s, directions) for s in carried)


class _CPUGRU(torch.autograd.Function):
    """Keeps the activations r, z, n and the states: four times the output. The product U_n h is computed again for all
    steps at once: at B 64, T 100, C 128, G 8 a training step's peak is 36 MB instead of 81 (the library's: 33)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight_ih, weight_hh, bias_ih, bias_hh, state):
        directions, groups, _, hidden = weight_hh.shape
        cells = _to_cells(x, directions, groups)
        projected = _project(cells, weight_ih, bias_ih)
        recurrent = weight_hh.flatten(0, 1).transpose(1, 2).contiguous()  # (cells, H, 3H)
        offset = None if bias_hh is None else bias_hh.flatten(0, 1)[:, None]
        steps = x.shape[1]
        states = projected.new_empty(steps + 1, directions * groups, x.shape[0], hidden)
        states[0] = _state_to_cells(state, groups)
        product = torch.empty_like(projected[0])
        product_gates, product_n = product[..., : 2 * hidden], product[..., 2 * hidden :]
        h = states.unbind()
        # r, z and n overwrite their projections
        gate, candidate = projected[..., : 2 * hidden].unbind(), projected[..., 2 * hidden :].unbind()
        for t in range(steps):
            if offset is None:
                torch.bmm(h[t], recurrent, out=product)
            else:
                torch.baddbmm(offset, h[t], recurrent, out=product)
            gate[t].add_(product_gates).sigmoid_()
            candidate[t].addcmul_(gate[t][..., :hidden], product_n).tanh_()
            torch.lerp(candidate[t], h[t], gate[t][..., hidden:], out=h[t + 1])
        ctx.save_for_backward(x, weight_ih, weight_hh, bias_ih, bias_hh, state, projected, states)
        ctx.set_materialize_grads(True)
        return _from_cells(states[1:], directions), _state_from_cells(states[-1], directions)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_y, grad_state):
        *inputs, activations, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_formula(_gru_formula, inputs, (grad_y, grad_state))
        x, weight_ih, weight_hh, bias_ih, bias_hh, _ = inputs
        directions, groups, _, hidden = weight_hh.shape
        recurrent = weight_hh.flatten(0, 1)  # (cells, 3H, H)
        r, z, n = activations.chunk(3, dim=-1)
        before = states[:-1]
        product_n = _product(before, recurrent[:, 2 * hidden :].transpose(1, 2))  # U_n h
        if bias_hh is not None:
            product_n += bias_hh.flatten(0, 1)[:, None, 2 * hidden :]
        # Every gate's gradient is the state's gradient times a factor that does not depend on it.
        factors = activations.new_empty(*n.shape[:-1], 3, hidden)
        to_r, to_z, to_product_n = factors.unbind(-2)
        to_candidate = (1 - n * n).mul_(1 - z)
        torch.mul(to_candidate, r, out=to_product_n)
        torch.mul(to_product_n, product_n, out=to_r).mul_(1 - r)
        torch.sub(before, n, out=to_z).mul_(z).mul_(1 - z)
        del product_n
        grad_h = _gradient_to_cells(grad_y, directions, groups)
        grad_products = factors.flatten(-2)  # overwrites the factors
        g, gates, gp, keep = grad_h.unbind(), factors.unbind(), grad_products.unbind(), z.unbind()
        carried = _state_to_cells(grad_state, groups)
        for t in reversed(range(x.shape[1])):
            g[t].add_(carried)
            gates[t].mul_(g[t].unsqueeze(-2))
            carried = torch.baddbmm(g[t] * keep[t], gp[t], recurrent)
        grad_weight_hh = _weight_gradient(grad_products, before, weight_hh)
        grad_bias_hh = _bias_gradient(bias_hh, grad_products)
        grad_projected = grad_products  # but for the candidate's
        torch.mul(grad_h, to_candidate, out=grad_projected[..., 2 * hidden :])
        del grad_h, to_candidate, g
        return (
            _input_gradient(grad_projected, weight_ih),
            _weight_gradient(grad_projected, _to_cells(x, directions, groups), weight_ih),
            grad_weight_hh,
            _bias_gradient(bias_ih, grad_projected),
            grad_bias_hh,
            _state_from_cells(carried, directions),
        )


def _bias_gradient(bias: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if bias is None else grad.sum(dim=(0, 2)).view(bias.shape)
