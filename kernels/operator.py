"""An operation on kernels, declared once: registered operators, fakes and derivatives follow from it.

    operator = Operator("rope_attention", "(Tensor qkv, …, bool keep) -> (Tensor out, Tensor lse)", …)
    out, lse = operator(qkv, …)

A plain eager call goes straight into an autograd node, or, where no gradient is needed, straight to the launches. A
"watched" call (under `torch.compile`, with fake tensors, a dispatch mode or a tensor subclass) goes through
`torch.ops.fastblocks.<name>`, and its backward pass through `torch.ops.fastblocks.<name>_backward`. Both ways run the
same node and the same functions.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastblocks.eager.derivatives import by_formula

__all__ = ["Operator", "all_operators", "compute_dtype"]

_declared: "dict[str, Operator]" = {}

_library = torch.library.Library("fastblocks", "FRAGMENT")
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def all_operators() -> "dict[str, Operator]":
    """Every operator of the package by name, for tests and reports; imports all families."""
    import fastblocks.kernels as package

    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(info.name)
    return dict(_declared)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that results are computed in and rounded to: autocast's where that is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Operator:
    """One operation: its schema, what it allocates, how it runs, and how it is differentiated.

    Args:
        name: of the operators, `fastblocks::<name>` and `fastblocks::<name>_backward`.
        schema: of the forward pass. Its last argument is `bool keep`, whether a backward pass will follow: it is
            determined here, and callers do not pass it. Results must be named.
        results: how many of the results, from the first on, are for the caller; the others are kept for backward.
        outputs: `outputs(*arguments) -> tuple` allocates the results, None for those that a call does not have. It is
            the fake implementation, too.
        forward: `forward(outputs, *arguments)` fills them.
        saved: names of the results that the backward pass reads.
        kept_instead: argument -> result that backward pass and formula get in its place, where they need no more of it,
            so that it is not kept. The result has its shape and dtype.
        backward: `backward(grads, needs, *arguments, *saved) -> sequence`. grads: gradients of the caller's results,
            None for an unused one; needs: for each tensor argument, whether it needs a gradient; arguments: without
            `keep`; saved: the saved results. Returns a gradient for each tensor argument in order, contiguous unless
            `gradients` says otherwise; one that is not needed may be None.
        formula: `formula(*arguments) -> Tensor or tuple`: the same results in plain PyTorch, from the arguments without
            `keep`, for second derivatives. It runs under the autocast state of the forward pass.
        gradients: `gradients(needs, *arguments) -> sequence` allocates what `backward` returns, for its fake
            implementation. None: a contiguous tensor like each argument.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        results: int,
        outputs: Callable[..., tuple[Tensor | None, ...]],
        forward: Callable[..., None],
        backward: Callable[..., Sequence[Tensor | None]],
        formula: Callable[..., Tensor | tuple[Tensor, ...]],
        saved: Sequence[str] = (),
        kept_instead: Mapping[str, str] | None = None,
        gradients: Callable[..., Sequence[Tensor | None]] | None = None,
    ):
        parsed = torch._C.parse_schema(name + schema)
        arguments, returns = parsed.arguments, parsed.returns
        if arguments[-1].name != "keep":
            raise ValueError(f"{name}: the last argument must be `bool keep`, not {arguments[-1].name}")
        self.name, self.results = name, results
        self.outputs, self.forward, self.backward, self.formula = outputs, forward, backward, formula
        self.gradients = gradients or self._like_arguments
        self.tensors = [i for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        names, of_results = [a.name for a in arguments], [r.name for r in returns]
        self.saved = [of_results.index(kept) for kept in saved]
        self._instead = {names.index(a): of_results.index(r) for a, r in (kept_instead or {}).items()}
        self._has_one_result = len(returns) == 1
        # `apply` without what `autograd.Function` does in Python before it, 3 µs: that unwraps what a function
        # transform has left behind, which no kernel could read
        self._apply = super(torch.autograd.Function, _node_of(self)).apply

        inputs = schema[1 : schema.index(") ->")].split(", ")[:-1]
        grads, kept = (
            [f"Tensor? {prefix}{returns[i].name}" for i in indices]
            for prefix, indices in (("grad_", range(results)), ("", self.saved))
        )
        gradients = ", ".join("Tensor" for _ in self.tensors)
        _library.define(name + schema)
        _library.define(f"{name}_backward({', '.join([*grads, 'bool[] needs', *inputs, *kept])}) -> ({gradients})")
        for device in ("CPU", "CUDA"):  # the CPU's is the interpreter's
            _library.impl(name, self._as_operator, device)
            _library.impl(f"{name}_backward", self._backward_as_operator, device)
        _library.impl(name, self._differentiable, "Autograd")
        torch.library.register_fake(f"fastblocks::{name}", self._fake, lib=_library)
        torch.library.register_fake(f"fastblocks::{name}_backward", self._fake_backward, lib=_library)
        self._forward_op = getattr(torch.ops.fastblocks, name).default
        self._backward_op = getattr(torch.ops.fastblocks, f"{name}_backward").default
        _declared[name] = self

    def __call__(self, *arguments) -> tuple[Tensor | None, ...]:
        """Returns the caller's results, without those that are kept for a backward pass."""
        if self._is_watched(arguments):
            return self._dispatch(*arguments, False)[: self.results]
        if self._needs_gradients(arguments):
            return self._apply(False, *arguments)
        return self._run(*arguments, False)[: self.results]

    def rehearse(self, *arguments) -> None:
        """Run every launcher, for `launch.recording`: forward alone, then forward and backward with all gradients."""
        self._run(*arguments, False)
        results = self._run(*arguments, True)
        needs = [arguments[i] is not None for i in self.tensors]
        kept = [results[self._instead[i]] if i in self._instead else a for i, a in enumerate(arguments)]
        self.backward(results[: self.results], needs, *kept, *[results[i] for i in self.saved])

    def _run(self, *arguments) -> tuple[Tensor | None, ...]:
        results = self.outputs(*arguments)
        self.forward(results, *arguments)
        return results

    def _is_watched(self, arguments) -> bool:
        """Whether a compiler, dispatch mode or tensor subclass has to see this call as one operator."""
        return (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or not {type(arguments[i]) for i in self.tensors} <= _PLAIN
        )

    def _needs_gradients(self, arguments) -> bool:
        if torch.is_grad_enabled():
            for i in self.tensors:
                if arguments[i] is not None and arguments[i].requires_grad:
                    return True
        return False

    # ---- as registered operators, which cannot return None: an empty 1-D tensor stands for a result that is None. One
    # ---- with a single result returns that, not a tuple.

    def _dispatch(self, *arguments) -> tuple[Tensor, ...]:
        results = self._forward_op(*arguments)
        return (results,) if self._has_one_result else results

    def _only(self, results: tuple[Tensor, ...]):
        return results[0] if self._has_one_result else results

    def _filled(self, results, arguments) -> tuple[Tensor, ...]:
        like = arguments[self.tensors[0]]
        return tuple(like.new_empty(0) if result is None else result for result in results)

    def _as_operator(self, *arguments):
        return self._only(self._filled(self._run(*arguments), arguments))

    def _fake(self, *arguments):
        return self._only(self._filled(self.outputs(*arguments), arguments))

    def _differentiable(self, *arguments):
        """The operator at the dispatcher's key "Autograd"."""
        if self._needs_gradients(arguments):
            return self._only(self._apply(True, *arguments[:-1]))
        with torch._C._AutoDispatchBelowAutograd():  # keep may be True: in a graph traced with its backward
            return self._forward_op(*arguments)

    def _backward_as_operator(self, *arguments) -> tuple[Tensor, ...]:
        n = self.results
        grads, needs, rest = map(_absent_as_none, arguments[:n]), arguments[n], arguments[n + 1 :]
        end = len(rest) - len(self.saved)
        found = self.backward(tuple(grads), needs, *rest[:end], *map(_absent_as_none, rest[end:]))
        return self._filled([grad if needed else None for grad, needed in zip(found, needs, strict=True)], rest)

    def _fake_backward(self, *arguments) -> tuple[Tensor, ...]:
        needs, rest = arguments[self.results], arguments[self.results + 1 :]
        found = self.gradients(needs, *rest)
        return self._filled([grad if needed else None for grad, needed in zip(found, needs, strict=True)], rest)

    def _like_arguments(self, needs, *arguments) -> list[Tensor | None]:
        return [
            torch.empty_like(arguments[i], memory_format=torch.contiguous_format) if needed else None
            for i, needed in zip(self.tensors, needs, strict=True)
        ]


def _absent_as_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.shape == (0,) else tensor


def _node_of(operator: Operator) -> type[torch.autograd.Function]:
    """The operator's autograd.Function; autograd's graph shows it under the operator's name."""
    indices, n_results, instead = operator.tensors, operator.results, operator._instead

    def forward(ctx, watched, *arguments):
        if watched:
            with torch._C._AutoDispatchBelowAutograd():
                results = returned = operator._dispatch(*arguments, True)
            absent = [result for result in results[:n_results] if _absent_as_none(result) is None]
            ctx.mark_non_differentiable(*results[n_results:], *absent)
        else:
            results = operator._run(*arguments, True)
            returned = results[:n_results]
        kept = [results[instead[i]] if i in instead else arguments[i] for i in indices]
        ctx.save_for_backward(*kept, *[results[i] for i in operator.saved])
        scalars = list(arguments)
        for i in indices:
            scalars[i] = None
        device = arguments[indices[0]].device.type
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else (device,)
        ctx.kept = watched, scalars, autocast
        ctx.set_materialize_grads(False)
        return returned

    def backward(ctx, *grads):
        grads = grads[:n_results]
        watched, scalars, autocast = ctx.kept
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(scalars))
        tensors, arguments = ctx.saved_tensors, list(scalars)
        for i, tensor in zip(indices, tensors, strict=False):
            arguments[i] = tensor
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated
            with torch.autocast(*autocast, enabled=len(autocast) == 2):
                return None, *by_formula(operator.formula, arguments, grads)
        needed = ctx.needs_input_grad
        needs = [needed[1 + i] for i in indices]
        kept = tensors[len(indices) :]
        if watched or operator._is_watched(arguments):
            found = operator._backward_op(*grads, needs, *arguments, *kept)
        else:
            found = operator.backward(grads, needs, *arguments, *kept)
        result: list[Tensor | None] = [None] * (1 + len(arguments))
        for i, grad in zip(indices, found, strict=True):
            if needed[1 + i]:
                result[1 + i] = grad
        return tuple(result)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(operator.name, (torch.autograd.Function,), methods)
