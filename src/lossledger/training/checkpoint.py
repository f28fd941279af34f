"""Checkpoints on disk: a tree of plain values and tensors as one JSON and one safetensors file. No pickle.

The tensors are written first and the JSON after them, each under a temporary name, synced and renamed. A checkpoint
exists when its JSON does; both carry checksums, so that a damaged one is noticed before anything is taken from it.
"""

from __future__ import annotations

import base64
import json
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lossledger.errors import CheckpointError
from lossledger.ledger.segments import publish

SCHEMA = 1
FOLDER = "checkpoints"
# The newest one, and one to fall back on.
KEPT = 2
_FILE = re.compile(r"\.?(\d+)\.(json|safetensors)(\.tmp)?")
_TAGS = {"tensor", "array", "float", "bytes", "tuple", "dict", "counter"}


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What was read back.

    Args:
        number: counts the checkpoints of a run.
        state: the tree that was written.
    """

    number: int
    state: dict[str, Any]


def write(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a tree as the newest checkpoint in `folder`, remove all but the two newest, and return its JSON file.

    Args:
        folder: made if missing.
        state: dicts, lists, tuples, text, numbers, bytes, NumPy arrays and tensors.

    Raises:
        CheckpointError: a value of another kind, or a folder that cannot be written to.
    """
    tensors: dict[str, Tensor] = {}
    content = encode(dict(state), "", tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max(_numbers(folder, ("json", "safetensors")), default=0)
        packed, final = (folder / f"{number:06d}.{kind}" for kind in ("safetensors", "json"))
        temporary = _hidden(packed)
        safetensors.torch.save_file(tensors, str(temporary))
        size, checksum = temporary.stat().st_size, _checksum_of_file(temporary)
        publish(temporary, packed)
        text = json.dumps(content, allow_nan=False)
        head = {"schema": SCHEMA, "tensors": {"bytes": size, "crc32": checksum}, "crc32": zlib.crc32(text.encode())}
        temporary = _hidden(final)
        temporary.write_text(json.dumps(head)[:-1] + f', "state": {text}}}\n', encoding="utf-8")
        publish(temporary, final)
        _prune(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write a checkpoint in {folder}: {error}. Check the disk and the permissions."
        ) from error
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`; a damaged one is passed over with a warning. `None`: there is none.

    Raises:
        CheckpointError: every checkpoint is damaged, or one was written by a newer version.
    """
    damaged = []
    for number in sorted(_numbers(folder, ("json",)), reverse=True):
        try:
            found = Checkpoint(number, _read(folder / f"{number:06d}.json"))
        except _Damage as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            warnings.warn(f"{reason} Going on from the one before it, {number:06d}.", UserWarning, stacklevel=4)
        return found
    if damaged:
        raise CheckpointError(
            f"No whole checkpoint in {folder}: {' '.join(damaged)} Restore the files, or start in another run_dir."
        )
    return None


def files_of(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """The names of the files of a checkpoint and of those before it."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if (found := _FILE.fullmatch(name)) and int(found[1]) <= checkpoint.number]


# --- values ------------------------------------------------------------------------------------------------------


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go to `tensors`, named after their place.

    Raises:
        CheckpointError: a kind of value that has no place in a checkpoint.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Tensor | np.ndarray):
        return _encode_tensor(value, where, tensors)
    if isinstance(value, list | tuple):
        items = [encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        parts = {key: encode(part, f"{where}.{key}".lstrip("."), tensors) for key, part in value.items()}
        if isinstance(value, Counter):
            return {"counter": _pairs(parts, where)}
        return {"dict": _pairs(parts, where)} if _TAGS & set(parts) or not _all_text(parts) else parts
    raise CheckpointError(
        f"A checkpoint cannot hold {where}: expected numbers, text, tensors, or lists and dicts of them; received "
        f"{type(value).__name__}. Leave it out of state_dict(), or return plain values there."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given; arrays of NumPy stay arrays, named tuples become tuples."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or next(iter(value)) not in _TAGS:
        return {key: decode(part, tensors) for key, part in value.items()}
    (tag, content), *_ = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].numpy()
    if tag == "float":
        return float(content)
    if tag == "bytes":
        return base64.b64decode(content)
    if tag == "tuple":
        return tuple(decode(item, tensors) for item in content)
    pairs = {decode(key, tensors): decode(part, tensors) for key, part in content}
    return Counter(pairs) if tag == "counter" else pairs


def _encode_tensor(value: Tensor | np.ndarray, where: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    while where in tensors:
        where += "'"
    try:
        tensor = torch.as_tensor(value)
        # A copy: tensors that share memory (tied weights) are refused by the format.
        tensors[where] = tensor.detach().to("cpu", copy=True).contiguous()
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise TypeError(f"{tensor.layout}, {tensor.dtype}")
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"A checkpoint cannot hold {where}: expected a dense tensor of numbers, received {error}."
        ) from error
    return {"tensor" if isinstance(value, Tensor) else "array": where}


_WHOLE = {torch.bool, torch.int8, torch.int16, torch.int32, torch.int64}
_UNSIGNED = {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_DTYPES = _WHOLE | _UNSIGNED | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _pairs(parts: Mapping[Any, Any], where: str) -> list[list[Any]]:
    return [[encode(key, f"{where} (key)", {}), part] for key, part in parts.items()]


def _all_text(keys: Iterable[Any]) -> bool:
    return all(isinstance(key, str) for key in keys)


# --- files -------------------------------------------------------------------------------------------------------


class _Damage(Exception):
    """A checkpoint that is not whole."""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise CheckpointError(
                f"{path} has schema {schema}; this version of lossledger reads up to {SCHEMA}. Upgrade lossledger to "
                "resume this run."
            )
        state, stored, checksum = content["state"], content["tensors"], content["crc32"]
        if zlib.crc32(json.dumps(state, allow_nan=False).encode()) != checksum:
            raise _Damage(f"{path} is damaged: its checksum is not that of its content.")
        packed = path.with_suffix(".safetensors")
        if (packed.stat().st_size, _checksum_of_file(packed)) != (stored["bytes"], stored["crc32"]):
            raise _Damage(f"{packed} is damaged: size or checksum are not those that {path.name} has.")
        found = decode(state, safetensors.torch.load_file(str(packed)))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _Damage(f"{path} is no whole checkpoint: {type(error).__name__}: {error}.") from error
    if not isinstance(found, dict):
        raise _Damage(f"{path} is no checkpoint: expected an object 'state'.")
    return found


def _numbers(folder: Path, kinds: tuple[str, ...]) -> set[int]:
    """Numbers of the files that are in place."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = (_FILE.fullmatch(name) for name in names if not name.startswith("."))
    return {int(match[1]) for match in found if match and match[2] in kinds and not match[3]}


def _prune(folder: Path) -> None:
    kept = sorted(_numbers(folder, ("json",)))[-KEPT:]
    old = [p for p in folder.iterdir() if (found := _FILE.fullmatch(p.name)) and int(found[1]) < kept[0]]
    # The JSON goes first: what lacks its tensors must not look like a checkpoint.
    for path in sorted(old, key=lambda p: p.suffix != ".json"):
        path.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _checksum_of_file(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
