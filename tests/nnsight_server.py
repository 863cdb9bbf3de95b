"""What a trace goes through on its way to a remote server, without one.

``python nnsight_server.py DIRECTORY`` takes a model in the directory and the tokens of its
``ids.pt``. One process writes requests as ``remote=True`` would send them; another, which cannot
import this package nor what it imports, runs them.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import dec, inc

MISSING = ("lch_plugin", "jaxtyping", "transformer_lens", "sae_lens", "beartype", "datasets")


def load(directory: Path, **options: Any) -> Any:
    return TransformersModel(str(directory), task="text-generation", dispatch=True, **options)


def send(model: Any, directory: Path) -> None:
    import lch_plugin as lch

    class Send(Backend):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, tracer: Any) -> None:
            (directory / f"{self.name}.request").write_bytes(RequestModel.serialize(tracer))

    nnsight.register("lch_plugin")
    centroid, r = lch.nnsight.centroid, lch.cotangents.Random(3)
    layers, ids = model.model.layers, torch.load(directory / "ids.pt")
    with model.trace(ids):  # What was found out here about the model is not to travel.
        centroid(layers[1].mlp)
    with model.trace(ids, backend=Send("trace")):
        found = {"block": centroid(layers[1])}.save()
        found["attn"] = centroid(layers[1].self_attn, r)
        found["mlp"] = centroid(layers[1].mlp)
        found["other"] = centroid(layers[2].mlp, r)
    with model.generate(ids, backend=Send("generation"), max_new_tokens=3) as tracer:
        found = {"block": [], "mlp": []}.save()
        for _ in tracer.iter[:3]:
            found["block"].append(centroid(layers[1]))
            found["mlp"].append(centroid(layers[1].mlp))
    mine = load(directory, envoys=lch.nnsight.CentroidEnvoy)
    with mine.trace(ids, backend=Send("envoys")):
        found = {"block": mine.model.layers[1].centroid}.save()
        found["mlp"] = mine.model.layers[1].mlp.centroid


def run(model: Any, directory: Path) -> None:
    for name in MISSING:
        assert name not in sys.modules
        sys.modules[name] = None  # type: ignore[assignment]
    for request in directory.glob("*.request"):
        tracer = RequestModel.deserialize(
            request.read_bytes(), model._remoteable_persistent_objects()
        )
        inc()
        tracer.execute(tracer.info.code)
        found = tracer.info.frame.f_locals["found"]
        dec()
        torch.save(found, request.with_suffix(".pt"))


if __name__ == "__main__":
    arguments = (load(Path(sys.argv[1])), Path(sys.argv[1]))
    # Forked, to import torch and nnsight once.
    client = multiprocessing.get_context("fork").Process(target=send, args=arguments)
    client.start()
    client.join()
    assert client.exitcode == 0
    run(*arguments)
