"""`largebatch export`: a run's model in a format that other programs read; each file is compared with the model."""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.report.files import write_bytes_atomically
from largebatch.use.model import Trained
from largebatch.wording import did_you_mean, printable, reason

FORMATS = {
    "safetensors": ("safetensors",),
    "torchscript": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
"""The formats, and the libraries that each needs."""
_METADATA = "inference.json"


def check_format(name: str) -> None:
    """Raise UserError if there is no such format, or its libraries are missing."""
    if name not in FORMATS:
        raise UserError(f"--to: {name!r} is not one of {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    for library in FORMATS[name]:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UserError(f"--to {name}: needs {library} ({error}): pip install 'largebatch[export]'") from None


def export(trained: Trained, name: str, path: Path) -> None:
    """Write the model to `path`, with class names, mean, std and sizes in the file's own metadata.

    It takes normalised float32 images [n, C, H, W] of any n, under the name ``images``, and gives ``logits``. Raises
    UserError if the model cannot be brought into that format, if what was written computes something else, or if
    `path` cannot be written.
    """
    metadata = json.dumps(asdict(trained.inference))
    generator = torch.Generator().manual_seed(0)
    # Traced with two images and compared on three: what depends on the number shows.
    images, others = (torch.randn(n, *trained.inference.shape, generator=generator) for n in (2, 3))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        written = Path(folder) / "model"
        try:
            if name == "safetensors":
                _safetensors(trained, metadata, written)
            else:
                write = _torchscript if name == "torchscript" else _onnx
                expected, found = trained.model(others), write(trained, images, others, metadata, written)
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        except Exception as error:  # an exporter's own
            why = printable(reason(error).splitlines()[0])
            raise UserError(f"--to {name}: this model cannot be exported so: {why}") from error
        try:
            write_bytes_atomically(path, written.read_bytes())
        except OSError as error:
            raise UserError(f"--out: {path}: {error.strerror}; give a file in a folder that can be written") from None


def _safetensors(trained: Trained, metadata: str, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt", _METADATA: metadata})
    for name, value in load_file(path).items():
        torch.testing.assert_close(value, weights.pop(name), rtol=0, atol=0, equal_nan=True)
    assert not weights, f"not written: {', '.join(weights)}"


def _torchscript(trained: Trained, images: Tensor, others: Tensor, metadata: str, path: Path) -> Tensor:
    torch.jit.trace(trained.model, images).save(str(path), _extra_files={_METADATA: metadata})
    return torch.jit.load(str(path))(others)


def _onnx(trained: Trained, images: Tensor, others: Tensor, metadata: str, path: Path) -> Tensor:
    import onnxruntime

    program = torch.onnx.export(
        trained.model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[_METADATA] = metadata
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": others.numpy()})[0])
