"""Models by name or folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvstream.codec.targets import DTYPES
from kvstream.testbed.engine import random_model
from kvstream.testbed.engine.model import Model
from kvstream.testbed.errors import SpecError
from kvstream.testbed.models import catalogue

MODELS = Path(__file__).parent / "models"


def bundled_model_path() -> Path:
    """Folder of the bundled model. Raises SpecError if it is missing."""
    for config in sorted(MODELS.glob("*/config.json")):
        return config.parent
    raise SpecError(f"no bundled model under {MODELS}; give a model with --model PATH_OR_NAME")


def load_model(
    source: str | Path | None = None, *, device: torch.device | str = "cpu", dtype: str | None = None
) -> Model:
    """Load from a folder (no network is used) or by name; None or 'bundled' takes the bundled model, `smollm2` one that
    `kvstream model get` has fetched (`kvstream.testbed.models.catalogue`), and `random:mistral-7b` builds one of that
    size with random weights (`kvstream.testbed.engine.random_model`).

    On a CPU the default dtype is float32, which is exact and about as fast as bfloat16 there; elsewhere it is the dtype
    of the stored weights. Raises SpecError for a missing folder and for models whose cache is not one
    `[H, T, D]` for keys and values of every layer.
    """
    source = bundled_model_path() if source in (None, "bundled") else source
    assert source is not None
    if str(source).startswith(random_model.PREFIX):
        return random_model.build(str(source).removeprefix(random_model.PREFIX), device, dtype)
    folder = _folder(source)
    transformers_logging.disable_progress_bar()
    on_cpu = torch.device(device).type == "cpu"
    wanted = dtype or ("float32" if on_cpu else "auto")
    if wanted != "auto" and wanted not in DTYPES:
        raise SpecError(f"unknown dtype {wanted!r}; choose from {', '.join(DTYPES)}")
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto" if wanted == "auto" else DTYPES[wanted],
            **rope_arguments(folder),
        )
        network = network.to(device).eval()  # type: ignore[arg-type]  # transformers wraps torch's method
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SpecError(f"model {source} cannot be loaded: {_first_line(error)}") from error
    return Model(network, tokenizer, Path(str(source)).name, fingerprint(folder))


def rope_arguments(folder: Path) -> dict[str, Any]:
    """What transformers 4 must be told of a model that transformers 5 has saved, of whose configuration it does not
    read `rope_parameters`: it would take another rotary embedding, without a word. Raises SpecError where it cannot."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    saved = json.loads((folder / "config.json").read_text()).get("rope_parameters")
    if saved is None:
        return {}
    if "rope_theta" not in saved:
        raise SpecError(f"model {folder} has rope_parameters that transformers {transformers.__version__} cannot read")
    scaling = {key: value for key, value in saved.items() if key != "rope_theta"}
    is_default = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": saved["rope_theta"], "rope_scaling": None if is_default else scaling}


def fingerprint_of(source: str | Path) -> str:
    """The fingerprint of a model that `load_model` takes by name or folder, without loading it. Raises SpecError."""
    return fingerprint(bundled_model_path() if source == "bundled" else _folder(source))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's configuration and safetensors files, in order of their names."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SpecError(f"model {folder} has no *.safetensors file")
    digest = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _folder(source: str | Path) -> Path:
    """The folder of a model given by path, or by name from the catalogue, the local Hugging Face cache or its hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecError(f"model folder {path} has no config.json")
        return path
    if isinstance(source, Path) or path.is_absolute() or str(source).startswith("."):
        raise SpecError(f"model folder {path} does not exist")
    if (folder := catalogue.folder_of(str(source))) is not None:
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"model {source} is neither a folder nor a known name (kvstream model list): {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
