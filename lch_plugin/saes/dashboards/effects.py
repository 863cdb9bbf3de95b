"""What a feature's direction does: to the model's logits, and through which neurons.

An SAE's decoder row ``d`` is a direction in the space that the SAE reads. Of a centroid that is the
input space of a component: ``mu = J^T v`` is a vector there, and so is ``d``. Two questions about
``d`` have exact answers at a given token, the same for a centroid as for an activation:

- *What does it do?* Move what the component reads by ``e d`` at that token. To first order in ``e``
  the logits move by ``e`` times their directional derivative (`push`). It goes through the
  component, whose Jacobian takes ``d`` to ``J d``, through all later layers and the final norm. Of
  an SAE on an ordinary hook point the value there is moved instead: through the last layers that is
  the usual reading of a decoder row by the unembedding, with the final norm linearised.
- *Who makes it up?* The centroid of an MLP is a sum of one term a neuron, so ``mu . d`` is too
  (`neuron_terms`). The terms add up to it exactly.

Directional derivatives are forward-mode automatic differentiation (`torch.autograd.forward_ad`)
through the model as it is: one forward pass, no graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lch_plugin.adapters.hooked import readers
from lch_plugin.adapters.structure import recognise
from lch_plugin.adapters.transformer_lens import LensModel, Reader, locate_mlps
from lch_plugin.cotangents import AnyCotangent, Cotangent, Ones, evaluate, is_fixed
from lch_plugin.errors import NotDifferentiableError
from lch_plugin.mlp import MLP, at_least_float32, read_direction
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.steering import edited_input


def push(
    model: LensModel | HookedModel,
    hook_name: str,
    tokens: Int[Tensor, "row pos"],
    positions: Int[Tensor, " row"],
    directions: Float[Tensor, "row d_in"],
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_vocab"]]:
    """Move the space of a hook along a direction at one token a row, to first order.

    The hook's space is what the component reads if the hook is a centroid's, else the value at the
    hook point.

    Args:
        model: with the hook point attached.
        hook_name: where the directions live.
        tokens: without padding.
        positions: the token of each row.
        directions: one a row.

    Returns:
        The point moved from, and the derivative of the logits at that token along the direction, in
        logits for each unit of length.

    Raises:
        NotDifferentiableError: the logits do not depend on the hook's space, or an operation of the
            model has no forward-mode derivative.
    """
    at, along = positions[:, None], directions[:, None]
    points, logits = derivative(model, hook_name, lambda: model(tokens), tokens.shape, at, along)
    return points[:, 0], logits[:, 0]


def derivative(
    model: LensModel | HookedModel,
    hook_name: str,
    run: Callable[[], Float[Tensor, "row kept d_vocab"]],
    shape: Sequence[int],
    positions: Int[Tensor, "row place"],
    directions: Float[Tensor, "row place d_in"],
) -> tuple[Float[Tensor, "row place d_in"], Float[Tensor, "row place d_vocab"]]:
    """Of the logits at some positions, along a direction at each of them, all moved together.

    Args:
        model: with the hook point attached.
        hook_name: where the directions live.
        run: a pass of the model, which gives logits at all positions or at the last of them.
        shape: rows and positions of the pass.
        positions: of each row, where it is moved.
        directions: along which.

    Returns:
        The points moved from, and the derivatives of the logits.

    Raises:
        NotDifferentiableError: as `push`.
    """
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    points: list[Tensor] = []

    def edit(value: Tensor) -> Tensor:
        # Heads are joined, as SAELens does. OPT's blocks join batch and position.
        x = value.reshape(*shape, -1)
        points.append(x[rows, positions])
        tangent = torch.zeros_like(x)
        tangent[rows, positions] = directions.to(x)
        return forward_ad.make_dual(value, tangent.view_as(value))

    try:
        # Of torch's attention kernels only the plain one has a forward-mode derivative, and nothing
        # has one in inference mode.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            forward_ad.dual_level(),
            edited_input(model, hook_name, edit),
        ):
            moved = forward_ad.unpack_dual(run()).tangent
    except NotImplementedError as error:
        raise NotDifferentiableError(
            f"the effect of {hook_name} on the logits is not known: {error} Load the model with "
            "attn_implementation='eager'."
        ) from error
    if moved is None:
        raise NotDifferentiableError(
            f"the logits do not depend on {hook_name}: nothing there reaches them."
        )
    return points[0], moved[rows, positions - (shape[1] - moved.shape[1])]


def neuron_terms(
    mlp: MLP,
    x: Float[Tensor, "*batch d_in"],
    direction: Float[Tensor, "*#batch d_in"],
    cotangent: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_mlp"]:
    """What each neuron's term of the centroid at ``x`` adds to ``mu . direction``.

    The terms of `lch_plugin.mlp`: ``act'(z_j) s_j (w_in_j . d)`` of a plain MLP, and
    ``s_j (act'(g_j) u_j (w_gate_j . d) + act(g_j) (w_in_j . d))`` of a gated one. Their sum over
    neurons is ``mu . d``.

    Args:
        mlp: the weights.
        x: what the MLP reads.
        direction: ``d``, one for all or one for each ``x``.
        cotangent: ``v`` of the centroid; all ones if None.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.to(at_least_float32(x))
        s = read_direction(mlp, cotangent, dtype=x.dtype)
        terms = mlp.input_gradients(mlp.pre_activations(x), s)
        along = (c * (direction.to(x) @ W.to(x)) for c, W in terms)
        return functools.reduce(torch.add, along)


def closed_form(
    model: LensModel | HookedModel, hook_name: str
) -> tuple[MLP, Float[Tensor, " d_out"] | None] | None:
    """The MLP whose centroid a hook point shows, and its cotangent, None for all ones.

    None if it is no centroid of a whole MLP in closed form, or has a cotangent of each token's own.
    """
    reader = readers(model).get(hook_name)
    cotangent: AnyCotangent
    if isinstance(reader, Reader):
        if reader.site.kind != "mlp" or reader.method != "closed form":
            return None
        assert reader.layer is not None
        mlp, cotangent = locate_mlps(model, reader.layer)[0].weights, reader.site.v
    elif reader is not None and isinstance(model, HookedModel):
        first, last = (
            model.model.get_submodule(n) for n in (reader.target.first, reader.target.last)
        )
        structure = recognise(first, None if last is first else last)
        if structure is None:
            return None
        mlp, cotangent = structure.weights, reader.settings.v
    else:
        return None
    if not isinstance(cotangent, Cotangent) or not is_fixed(cotangent):
        return None
    if isinstance(cotangent, Ones):
        return mlp, None
    W_out = mlp.W_out
    like = W_out.new_empty(1, W_out.shape[-1], dtype=at_least_float32(W_out))
    return mlp, evaluate(cotangent, like)
