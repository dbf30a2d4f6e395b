"""What is calibrated offline for one model: named tensors and JSON metadata, identified by their hash.

The bytes are a safetensors file whose metadata has one key, `kvstream`, holding the JSON. A profile is sent once per
model, and every chunk names the one it needs by SHA-256, so no chunk is decoded with the wrong tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.errors import CodecError

FORMAT = 1
MAX_PROFILE_BYTES = 1 << 30
_KEY = "kvstream"


class Profile:
    """Named arrays and metadata of one (model, codec).

    `metadata["codec"]` names the codec it was fitted for. Arrays are read-only.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        import safetensors.numpy

        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True, allow_nan=False)
        self._adopt(safetensors.numpy.save(contiguous, {_KEY: text}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Profile:
        """Read what `to_bytes` wrote. Raises CodecError for anything else."""
        profile = cls.__new__(cls)
        profile._adopt(bytes(data))
        return profile

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile file. Raises CodecError if it is missing or not a profile."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise CodecError(f"profile {path} cannot be read: {error.strerror}") from error

    def to_bytes(self) -> bytes:
        return self._data

    @property
    def sha256(self) -> str:
        """Hash of the profile's bytes, in hexadecimal."""
        return self._sha256

    @property
    def codec_id(self) -> str:
        return str(self.metadata.get("codec"))

    def tensor(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """The array `name`, checked; None in `shape` stands for any length. Raises CodecError."""
        array = self.tensors.get(name)
        if array is None:
            raise CodecError(f"profile {self.sha256[:12]} has no tensor {name!r}; calibrate again")
        fits = len(array.shape) == len(shape) and all(
            b is None or a == b for a, b in zip(array.shape, shape, strict=True)
        )
        if array.dtype != np.dtype(dtype) or not fits:
            raise CodecError(
                f"profile {self.sha256[:12]}: tensor {name!r} is {array.dtype} {array.shape}, "
                f"not {np.dtype(dtype)} {shape}; calibrate again"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CodecError(f"profile {self.sha256[:12]}: tensor {name!r} is not finite; calibrate again")
        return array

    def check_model(self, fingerprint: str) -> None:
        """Raise CodecError for a profile of another model than the one with this fingerprint.

        A model of the same shape would be coded without a complaint, at several times the bits or the distortion. A
        profile that names no model passes.
        """
        own = self.metadata.get("model")
        if own is not None and own != fingerprint:
            name = self.metadata.get("model_name")
            about = f"model {name} ({str(own)[:12]})" if name else f"model {str(own)[:12]}"
            raise CodecError(
                f"profile {self.sha256[:12]} was calibrated for {about}, not for the model with fingerprint "
                f"{fingerprint[:12]}; run 'kvstream codec calibrate' with that model, or force it (--force)"
            )

    def number(self, name: str) -> int:
        """A positive integer of the metadata. Raises CodecError."""
        value = self.metadata.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CodecError(f"profile {self.sha256[:12]}: {name} is {value!r}, not a positive integer")
        return value

    def _adopt(self, data: bytes) -> None:
        import safetensors.numpy
        from safetensors import SafetensorError

        if len(data) > MAX_PROFILE_BYTES:
            raise CodecError(f"a profile of {len(data)} bytes exceeds the limit of {MAX_PROFILE_BYTES}")
        try:
            tensors = safetensors.numpy.load(data)
            length = int.from_bytes(data[:8], "little")
            text = json.loads(data[8 : 8 + length])["__metadata__"][_KEY]
            metadata = json.loads(text)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CodecError(f"not a profile: {error}; calibrate again") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise CodecError(f"profile is not of format {FORMAT}; calibrate again")
        for array in tensors.values():
            array.setflags(write=False)
        self._data = data
        self._sha256 = hashlib.sha256(data).hexdigest()
        self.tensors: Mapping[str, NDArray[Any]] = MappingProxyType(tensors)
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
