"""Which modules are recognised as MLPs, and that their closed forms are torch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import lch_plugin as lch
from lch_plugin.adapters.structure import Structure, recognise
from lch_plugin.mlp import mlp_centroid
from tests.models import relative_error

F64 = torch.float64
D, M = 12, 20

_NEW = {
    "num_hidden_layers": 1,
    "hidden_size": D,
    "intermediate_size": M,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
}
_GQA = {**_NEW, "num_key_value_heads": 2}
_VISION = {
    "num_hidden_layers": 1,
    "hidden_size": D,
    "intermediate_size": M,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_T5 = {"d_model": D, "d_kv": 4, "d_ff": M, "num_layers": 1, "num_heads": 2, "vocab_size": 10}
_BERT_LAYER = ("encoder.layer.0.intermediate", "encoder.layer.0.output.dense")

# Model type, settings, names of the MLP's modules, and whether it is gated.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "gpt2 (Conv1D)": ("gpt2", {"n_layer": 1, "n_embd": D, "n_head": 2}, ("h.0.mlp",), False),
    "llama": ("llama", _GQA, ("layers.0.mlp",), True),
    "gemma2": ("gemma2", {**_GQA, "head_dim": 6}, ("layers.0.mlp",), True),
    "phi3 (fused)": ("phi3", _GQA, ("layers.0.mlp",), True),
    "glm (fused)": ("glm", {**_GQA, "head_dim": 6}, ("layers.0.mlp",), True),
    "gpt_neox": ("gpt_neox", _NEW, ("layers.0.mlp",), False),
    "falcon": ("falcon", {**_NEW, "ffn_hidden_size": M}, ("h.0.mlp",), False),
    "nemotron (squared relu)": ("nemotron", _GQA, ("layers.0.mlp",), False),
    "bert (in two modules)": ("bert", _NEW, _BERT_LAYER, False),
    "modernbert (fused)": ("modernbert", _NEW, ("layers.0.mlp",), True),
    "distilbert": (
        "distilbert",
        {"n_layers": 1, "dim": D, "hidden_dim": M, "n_heads": 2, "vocab_size": 10},
        ("transformer.layer.0.ffn",),
        False,
    ),
    "t5": ("t5", _T5, ("encoder.block.0.layer.1.DenseReluDense",), False),
    "t5 (gated)": (
        "t5",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        ("decoder.block.0.layer.2.DenseReluDense",),
        True,
    ),
    "vit": ("vit", _VISION, ("layers.0.mlp",), False),
    "clip": ("clip_vision_model", _VISION, ("encoder.layers.0.mlp",), False),
    "siglip": ("siglip_vision_model", _VISION, ("encoder.layers.0.mlp",), False),
    "dinov2": ("dinov2", {**_VISION, "mlp_ratio": 2}, ("encoder.layer.0.mlp",), False),
    "dinov2 (SwiGLU)": (
        "dinov2",
        {**_VISION, "mlp_ratio": 2, "use_swiglu_ffn": True},
        ("encoder.layer.0.mlp",),
        True,
    ),
    "dinov3": ("dinov3_vit", _VISION, ("model.layer.0.mlp",), False),
    "dinov3 (gated)": (
        "dinov3_vit",
        {**_VISION, "use_gated_mlp": True},
        ("model.layer.0.mlp",),
        True,
    ),
}


def fill(module: nn.Module, std: float = 0.4, dtype: torch.dtype = F64) -> Any:
    """Weights far enough from zero that every activation bends, biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return module.to(dtype).eval()


def rows(dtype: torch.dtype = F64) -> Tensor:
    return 3 * torch.randn(2, 7, D, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


def in_closed_form(structure: Structure, x: Tensor, v: Tensor | None = None) -> Tensor:
    mlp = structure.weights
    return mlp_centroid(mlp, mlp.pre_activations(x), v)


def by_autograd(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor | None = None) -> Tensor:
    y, pull = torch.func.vjp(fn, x)
    return pull(torch.ones_like(y) if v is None else v.expand_as(y))[0]


def assert_recognised(*modules: nn.Module, is_gated: bool) -> None:
    structure = recognise(*modules)
    assert structure is not None
    assert (structure.gate is not None) == is_gated
    x, run = rows(), nn.Sequential(*modules)
    for v in (None, torch.linspace(-1, 2, run(x).shape[-1], dtype=F64)):
        truth = by_autograd(run, x, v).detach()
        assert relative_error(in_closed_form(structure, x, v), truth) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_of_transformers_are_recognised(family: str) -> None:
    model_type, settings, names, is_gated = FAMILIES[family]
    model = fill(AutoModel.from_config(AutoConfig.for_model(model_type, **settings)))
    assert_recognised(*(model.get_submodule(name) for name in names), is_gated=is_gated)


# ---------------------------------------------------------------- modules of our own


def activations() -> dict[str, Callable[[], nn.Module]]:
    """Every activation of torch that is a function of one number, without parameters."""
    from torch.nn.modules import activation

    others = {
        *("GLU", "MultiheadAttention", "PReLU", "RReLU", "Threshold"),
        *("Softmax", "Softmax2d", "Softmin", "LogSoftmax"),
    }
    found: dict[str, Callable[[], nn.Module]] = {
        name: getattr(activation, name) for name in activation.__all__ if name not in others
    }
    return {
        **found,
        "Threshold": lambda: nn.Threshold(0.1, 3.0),
        "GELU(tanh)": lambda: nn.GELU(approximate="tanh"),
        "LeakyReLU(0.2)": lambda: nn.LeakyReLU(0.2),
        "Identity": nn.Identity,
    }


ACTIVATIONS = activations()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [False, True])
def test_sequentials_are_recognised(name: str, dropout: bool) -> None:
    middle = [ACTIVATIONS[name](), *([nn.Dropout(0.5)] if dropout else [])]
    net = fill(nn.Sequential(nn.Linear(D, M), *middle, nn.Linear(M, 5)))
    assert_recognised(net, is_gated=False)


class Gated(nn.Module):
    """A gated MLP in any of the ways families write one."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor] = F.silu,
        *,
        fused: bool = False,
        gate_first: bool = True,
        sizes: tuple[int, int, int] = (D, M, 5),
        bias: bool = True,
    ) -> None:
        super().__init__()
        d, m, d_out = sizes
        self.act, self.gate_first = act, gate_first
        self.inputs = nn.ModuleList(
            nn.Linear(d, size, bias) for size in ([2 * m] if fused else [m, m])
        )
        self.out = nn.Linear(m, d_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        both = [
            y for projection in self.inputs for y in projection(x).split(self.out.in_features, -1)
        ]
        g, u = both if self.gate_first else reversed(both)
        return self.out(self.act(g) * u)


class WeightsInAndOut(nn.Module):
    """DINOv2's SwiGLU as releases of transformers before 5 had it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights_in = nn.Linear(D, 2 * M)
        self.weights_out = nn.Linear(M, D)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(x1) * x2)


class Plain(nn.Module):
    """A plain MLP that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, M), nn.Linear(M, D)
        self._functions = [function]  # Where no one looks for it.

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._functions[0](self.fc1(x)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
def test_gates_come_first_or_second_in_one_projection_or_two(fused: bool, gate_first: bool) -> None:
    assert_recognised(fill(Gated(fused=fused, gate_first=gate_first)), is_gated=True)


def test_swiglu_of_older_releases_is_recognised() -> None:
    assert_recognised(fill(WeightsInAndOut()), is_gated=True)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_functions_that_are_called_are_told_apart(name: str, dtype: torch.dtype) -> None:
    structure = recognise(fill(Plain(FUNCTIONS[name]), dtype=dtype))
    assert structure is not None
    z = torch.linspace(-6, 6, 101, dtype=F64)
    assert torch.allclose(structure.act(z), FUNCTIONS[name](z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_functions_that_are_not_known_are_not_taken_for_one(dtype: torch.dtype) -> None:
    for function in (F.mish, F.softplus, lambda z: z * torch.sigmoid(1.702 * z), F.elu, F.relu6):
        assert recognise(fill(Plain(function), dtype=dtype)) is None


def test_weights_of_half_precision_and_large_or_small_ones() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        for std in (1e-3, 0.3, 3.0):
            net = fill(nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D)), std, dtype)
            assert recognise(net) is not None, (dtype, std)
            assert {p.dtype for p in net.parameters()} == {dtype}


def test_mixed_dtypes_are_recognised() -> None:
    # T5 keeps its output projection in float32.
    config = AutoConfig.for_model("t5", **_T5)
    mlp = fill(AutoModel.from_config(config)).encoder.block[0].layer[1].DenseReluDense
    mlp.wi.to(torch.bfloat16)
    mlp.wo.to(torch.float32)
    assert recognise(mlp) is not None
    assert mlp.wi.weight.dtype is torch.bfloat16


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 24), st.integers(1, 9)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    kind=st.sampled_from(["plain", "two", "fused"]),
    gate_first=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_whatever_is_recognised_has_the_closed_form_of_torchs_vjp(
    sizes: tuple[int, int, int],
    activation: str,
    kind: str,
    gate_first: bool,
    bias: bool,
    seed: int,
) -> None:
    d, m, d_out = sizes
    torch.manual_seed(seed)
    act = ACTIVATIONS[activation]()
    if kind == "plain":
        net: nn.Module = nn.Sequential(nn.Linear(d, m, bias), act, nn.Linear(m, d_out, bias))
    else:
        net = Gated(act, fused=kind == "fused", gate_first=gate_first, sizes=sizes, bias=bias)
    structure = recognise(net.double())
    if structure is None:  # Every gradient at the noise may be zero, if neurons are few.
        assert m < 4 or activation in ("Threshold", "Hardshrink", "Softshrink")
        return
    x, v = 3 * torch.randn(5, d, dtype=F64), torch.randn(d_out, dtype=F64)
    truth = by_autograd(net, x, v)
    assert torch.allclose(in_closed_form(structure, x, v), truth, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- what is no MLP


class Other(nn.Module):
    """A module of two linear maps that computes something else."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, M), nn.Linear(M, D)
        for name, part in parts.items():
            self.add_module(name, part)
        self._forwards = [forward]

    def forward(self, x: Tensor) -> Any:
        return self._forwards[0](self, x)


class ClampedGate(Gated):
    """As DeepSeek-V4 has it."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (projection(x) for projection in self.inputs)
        return self.out(F.silu(gate.clamp(max=10)) * up.clamp(-10, 10))


def _fails(m: Any, x: Tensor) -> Tensor:
    assert m.b(m.a(x)).shape[0] == 3, "only batches of three"
    return x


def _counts(m: Any, x: Tensor) -> Tensor:
    return {}["no such key"] * m.b(m.a(x))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "no activation known": lambda: Other(lambda m, x: m.b(torch.sin(m.a(x)))),
    "softmax": lambda: nn.Sequential(nn.Linear(D, M), nn.Softmax(-1), nn.Linear(M, D)),
    "prelu": lambda: nn.Sequential(nn.Linear(D, M), nn.PReLU(), nn.Linear(M, D)),
    "layer norm": lambda: nn.Sequential(nn.Linear(D, M), nn.LayerNorm(M), nn.Linear(M, D)),
    "norm without parameters": lambda: nn.Sequential(
        nn.Linear(D, M), nn.ReLU(), nn.LayerNorm(M, elementwise_affine=False), nn.Linear(M, D)
    ),
    "an activation at the end": lambda: nn.Sequential(
        nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D), nn.ReLU()
    ),
    "two activations": lambda: nn.Sequential(
        nn.Linear(D, M), nn.ReLU(), nn.Tanh(), nn.Linear(M, D)
    ),
    "glu": lambda: nn.Sequential(nn.Linear(D, 2 * M), nn.GLU(), nn.Linear(M, D)),
    "one linear map": lambda: nn.Sequential(nn.Linear(D, M), nn.ReLU()),
    "four linear maps": lambda: nn.Sequential(*(nn.Linear(D, D) for _ in range(4))),
    "two linear maps": lambda: nn.Sequential(nn.Linear(D, M), nn.Linear(M, D)),
    "three linear maps": lambda: nn.Sequential(
        nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)
    ),
    "a residual": lambda: Other(lambda m, x: x + m.b(F.relu(m.a(x)))),
    "a factor": lambda: Other(lambda m, x: 0.9 * m.b(F.relu(m.a(x)))),
    "a tuple": lambda: Other(lambda m, x: (m.b(F.relu(m.a(x))), None)),
    "a number": lambda: Other(lambda m, x: m.b(F.relu(m.a(x))).mean()),
    "a vector": lambda: Other(lambda m, x: m.b(F.relu(m.a(x)))[0, 0]),
    "fewer positions": lambda: Other(lambda m, x: m.b(F.relu(m.a(x)))[:, :2]),
    "integers": lambda: Other(lambda m, x: m.b(F.relu(m.a(x))).long()),
    "mixed positions": lambda: Other(lambda m, x: m.b(F.relu(m.a(x).cumsum(1)))),
    "two inputs": lambda: Other(lambda m, x: m.b(F.relu(m.a(x.x + x.y)))),
    "an assertion": lambda: Other(_fails),
    "a key error": lambda: Other(_counts),
    "an unused map": lambda: Other(lambda m, x: m.b(F.relu(m.a(x))), c=nn.Linear(D, M)),
    "a map used twice": lambda: nn.Sequential(
        (shared := nn.Linear(D, D)), nn.ReLU(), shared, nn.ReLU(), nn.Linear(D, D)
    ),
    "a clamp on the gate": ClampedGate,
    "a clamp on pre-activations": lambda: Other(lambda m, x: m.b(F.relu(m.a(x).clamp(-20, 20)))),
    "in place": lambda: nn.Sequential(nn.Linear(D, M), nn.SiLU(inplace=True), nn.Linear(M, D)),
    "detached": lambda: Other(lambda m, x: m.b(F.relu(m.a(x))).detach()),
    "attention": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
    "a convolution": lambda: nn.Sequential(nn.Conv1d(D, M, 1), nn.ReLU(), nn.Conv1d(M, D, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_not_recognised(name: str) -> None:
    assert recognise(fill(OTHERS[name]())) is None


@pytest.mark.parametrize(
    ("model_type", "settings", "name"),
    [
        ("bloom", {"n_layer": 1, "hidden_size": D, "n_head": 2, "vocab_size": 9}, "h.0.mlp"),
        ("mpt", {"n_layers": 1, "d_model": D, "n_heads": 2, "vocab_size": 9}, "blocks.0.ffn"),
        ("mixtral", {**_GQA, "num_local_experts": 2}, "layers.0.mlp"),
        ("apertus", _GQA, "layers.0.mlp"),  # An activation with parameters.
        ("bitnet", _GQA, "layers.0.mlp"),  # A norm in the middle.
        ("llama", _GQA, "layers.0.self_attn"),
        ("gpt2", {"n_layer": 1, "n_embd": D, "n_head": 2}, "h.0.attn"),
        ("gpt2", {"n_layer": 1, "n_embd": D, "n_head": 2}, "h.0"),
    ],
)
def test_other_modules_of_transformers_are_not_recognised(
    model_type: str, settings: dict[str, Any], name: str
) -> None:
    model = fill(AutoModel.from_config(AutoConfig.for_model(model_type, **settings)))
    assert recognise(model.get_submodule(name)) is None


def test_zero_weights_are_not_recognised() -> None:
    net = fill(Plain(F.silu))
    nn.init.zeros_(net.fc2.weight)
    assert recognise(net) is None


def test_an_in_place_relu_is_recognised() -> None:
    # Its derivative is the same at what it writes.
    structure = recognise(fill(nn.Sequential(nn.Linear(D, M), nn.ReLU(True), nn.Linear(M, D))))
    assert structure is not None


# ---------------------------------------------------------------- nothing is left of trying


def test_trying_a_module_out_changes_nothing() -> None:
    net = fill(nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Dropout(0.5), nn.Linear(M, D)))
    net = net.to(torch.bfloat16)
    net.train()
    net[1].eval()
    fired: list[str] = []
    net[0].register_forward_pre_hook(lambda *_: fired.append("pre"))
    net[3].register_forward_hook(lambda *_: fired.append("forward"))
    net[0].register_full_backward_hook(lambda *_: fired.append("backward"))
    net[3].register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    pointers = [p.data_ptr() for p in net.parameters()]
    states = [dict(vars(m)) for m in net.modules()]
    random = torch.get_rng_state()
    assert recognise(net) is not None
    assert [dict(vars(m)) for m in net.modules()] == states
    assert [m.training for m in net.modules()] == [True, True, False, True, True]
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not fired
    net.float()(rows(dtype=torch.float32).requires_grad_()).sum().backward()
    assert set(fired) == {"pre", "forward", "backward", "backward pre"}


def test_trying_a_module_out_that_fails_changes_nothing() -> None:
    net = fill(Other(_fails)).train()
    states = [dict(vars(m)) for m in net.modules()]
    assert recognise(net) is None
    assert [dict(vars(m)) for m in net.modules()] == states


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_modes_do_not_matter(mode: Callable[[], Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = fill(nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D)), dtype=dtype)
        with mode():
            assert recognise(net) is not None


def test_weights_are_those_of_the_moment() -> None:
    net = fill(Gated(F.gelu))
    structure = recognise(net)
    assert structure is not None
    fill(net, std=0.7)
    net.out.weight.data.mul_(2)
    net.inputs[0] = net.inputs[0].requires_grad_(False)
    truth = by_autograd(net, rows()).detach()
    assert relative_error(in_closed_form(structure, rows()), truth) < 1e-10


def test_weights_that_cannot_be_read_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D))
    with pytest.raises(lch.SiteError, match="meta"):
        recognise(net)
    net = fill(nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, D)))
    net[0].weight = nn.Parameter(torch.ones(M, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(lch.SiteError, match="int8"):
        recognise(net)
