"""Tensors of a checkpoint by name, or parts of them: from one .safetensors file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InvalidArgument

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class CheckpointReader:
    """Opens files as they are needed and closes them at the end of its `with` block.

    path: a .safetensors file, or a folder with one or with an index. Raises InvalidArgument for any other.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._opened: dict[Path, Any] = {}
        self._names: dict[Path, frozenset[str]] = {}
        self._weight_map: dict[str, str] | None = None
        if self._path.is_dir():
            if (self._path / _INDEX).exists():
                self._weight_map = json.loads((self._path / _INDEX).read_text())["weight_map"]
            else:
                found = sorted(self._path.glob("*.safetensors"))
                if len(found) != 1:
                    accepted = f"a folder with {_INDEX} or exactly one .safetensors file"
                    raise InvalidArgument("path", f"{self._path} with {len(found)} of them", accepted)
                self._path = found[0]

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._opened.values():
            file.__exit__(kind, error, at)
        self._opened.clear()

    def __contains__(self, name: str) -> bool:
        if self._weight_map is not None:
            return name in self._weight_map
        self._open(self._path)
        return name in self._names[self._path]

    def dtype(self, name: str) -> torch.dtype | None:
        """None where no tensor of that name is listed."""
        if name not in self:
            return None
        _, tensor = self._find(name)
        return _DTYPES.get(tensor.get_dtype())

    def file(self, name: str) -> Path:
        """Where a tensor is. Raises InvalidArgument where it is not."""
        return self._find(name)[0]

    def read(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], part: tuple[slice, ...] = ()
    ) -> Tensor:
        """A tensor on the CPU, or the part of it that the slices name, of which alone is read.

        Raises InvalidArgument with tensor and file unless it has this whole shape and one of the dtypes.
        """
        file, tensor = self._find(name)
        found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if found != shape:
            raise InvalidArgument(name, f"shape {list(found)} in {file}", f"shape {list(shape)}")
        if _DTYPES.get(dtype) not in dtypes:
            raise InvalidArgument(name, f"{dtype} in {file}", " or ".join(str(each) for each in dtypes))
        # A slice of a safetensors file has no [()], which is how a number would be read.
        if not shape:
            whole: Tensor = self._opened[file].get_tensor(name)
            return whole
        read: Tensor = tensor[part or (slice(None),)]
        return read

    def _find(self, name: str) -> tuple[Path, Any]:
        """The file and safetensors' slice of a tensor."""
        file = self._path
        if self._weight_map is not None:
            if name not in self._weight_map:
                raise InvalidArgument("path", self._path / _INDEX, f"an index that lists {name}")
            file = self._path / self._weight_map[name]
            if not file.exists():
                raise InvalidArgument("path", f"no file {file}", f"the shard that the index names for {name}")
        opened = self._open(file)
        if name not in self._names[file]:
            raise InvalidArgument("path", file, f"a checkpoint that holds {name}")
        return file, opened.get_slice(name)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InvalidArgument("path", f"{file} ({error})", "a readable .safetensors file") from None
            self._opened[file] = opened.__enter__()
            self._names[file] = frozenset(opened.keys())
        return self._opened[file]
