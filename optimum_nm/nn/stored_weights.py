"""Weights that stay in the safetensors files of a dense checkpoint until they are needed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from ..errors import NMError
from ..packing.safetensors_files import DTYPES, INDEX_FILE, SINGLE_FILE, TensorLocation, locate_tensors, read_header
from ..packing.tensor_files import read_tensor
from .experts import split_experts
from .modeling import auto_class
from .weights import check_finite


class StoredWeights:
    """The weights of a model on the meta device, read when they are opened.

    Args:
        model: its parameters and stored buffers without memory, its other buffers with it.
        locations: of every tensor of its state dictionary; tied ones have the same.
    """

    streamed = True

    def __init__(self, model: PreTrainedModel, locations: dict[str, TensorLocation]) -> None:
        self.model = model.eval()
        self.device = torch.device("cpu")
        self._locations = locations
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._placeholders: dict[str, Tensor] = {}
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[str, Future[Tensor]] = {}

    def to(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def check(self, names: Iterable[str]) -> None:
        for name in names:
            check_finite(name, self._read(name))

    def open(self, names: Iterable[str]) -> None:
        opened: dict[int, Tensor] = {}  # what takes the place of a placeholder, which tied weights share
        for name in names:
            holder, leaf = self._slot(name)
            placeholder = getattr(holder, leaf)
            if not placeholder.is_meta:
                continue
            if id(placeholder) not in opened:
                ahead = self._ahead.pop(name, None)
                tensor = self._read(name) if ahead is None else ahead.result()
                check_finite(name, tensor)
                tensor = tensor.to(self.device)
                is_parameter = isinstance(placeholder, nn.Parameter)
                opened[id(placeholder)] = nn.Parameter(tensor, placeholder.requires_grad) if is_parameter else tensor
            self._placeholders[name] = placeholder
            setattr(holder, leaf, opened[id(placeholder)])

    def prefetch(self, names: Iterable[str]) -> None:
        self._ahead = {name: self._reader.submit(self._read, name) for name in names}

    def close(self, names: Iterable[str]) -> None:
        for name in names:
            holder, leaf = self._slot(name)
            if name in self._placeholders:
                setattr(holder, leaf, self._placeholders.pop(name))

    def release(self, module: nn.Module) -> None:
        module.to("meta")

    def content(self, name: str, tensor: Tensor) -> Tensor | TensorLocation:
        if not tensor.is_meta:
            return tensor
        location = self._locations[name]
        return location if DTYPES[location.dtype] == self._dtypes[name] else self._read(name)

    def digest(self) -> str:
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for file in sorted({location.file for location in self._locations.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, location in self._locations.items():
            described = f"{name} {self._dtypes[name]} {location.file.name} {location.offset} {location.shape}"
            digest.update(f"{described} {location.dtype}\n".encode())
        return digest.hexdigest()

    def _slot(self, name: str) -> tuple[nn.Module, str]:
        holder, _, leaf = name.rpartition(".")
        return self.model.get_submodule(holder), leaf

    def _read(self, name: str) -> Tensor:
        try:
            return read_tensor(self._locations[name]).to(self._dtypes[name])
        except OSError as error:
            raise NMError(f"{self._locations[name].file} cannot be read ({error.strerror}).") from None


def find_stored_weights(
    model_name_or_path: str | Path, dtype: str | torch.dtype = "auto", **where: Any
) -> StoredWeights | None:
    """The weights of a model in safetensors files, none of them read.

    Args:
        dtype: to have the weights in; "auto" for the configuration's own.
        where: the arguments of `from_pretrained` that say where the files are.

    Returns:
        None where transformers does more on loading than to read tensors by their names: for other kinds of files,
        code of the model's own, quantized models, renamed or converted tensors, parts of another type; and where
        something is wrong, which transformers then finds.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **where)
        stored = _stored_tensors(model_name_or_path, where)
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        if not stored or not isinstance(dtype, torch.dtype) or hasattr(config, "quantization_config"):
            return None
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.dtype = dtype
        with init_empty_weights():
            model = auto_class(config).from_config(config, dtype=dtype)
    except (NMError, OSError, ValueError, KeyError, AttributeError):
        return None
    model.tie_weights()  # which were parted by becoming empty
    split_experts(model)
    _without_memory(model)
    if dtype != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return None
    locations = _locations(model, stored)
    if locations is None:
        return None
    if model.can_generate():
        with suppress(OSError):  # then the one made from the configuration stays
            model.generation_config = GenerationConfig.from_pretrained(model_name_or_path, **where)
    return StoredWeights(model, locations)


def _stored_tensors(model_name_or_path: str | Path, where: dict[str, Any]) -> dict[str, TensorLocation]:
    """Every tensor of the checkpoint's safetensors files, downloaded if need be; none if there are no such files."""

    def local(name: str) -> Path | None:
        file = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **where)
        return None if file is None else Path(file)

    if (file := local(SINGLE_FILE)) is not None:
        return read_header(file)
    if (index := local(INDEX_FILE)) is None:
        return {}
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        local(name)
    return locate_tensors(index.parent)


def _locations(model: PreTrainedModel, stored: dict[str, TensorLocation]) -> dict[str, TensorLocation] | None:
    """Of each tensor of the model; None if one is not stored under its name, with its shape, and for itself."""
    prefix = f"{model.base_model_prefix}."
    tensors = model.state_dict(keep_vars=True)
    by_tensor: dict[int, TensorLocation] = {}
    for name, tensor in tensors.items():
        location = stored.get(name, stored.get(name.removeprefix(prefix)))
        if location is not None and location.shape == tuple(tensor.shape):
            by_tensor.setdefault(id(tensor), location)
    if any(id(tensor) not in by_tensor for tensor in tensors.values()):
        return None
    times = Counter(map(id, tensors.values()))
    embedding = model.get_input_embeddings().weight
    if any(times[id(tensor)] > 1 and tensor is not embedding for tensor in tensors.values()):
        return None
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items()}


def _without_memory(model: PreTrainedModel) -> None:
    """Put stored buffers on the meta device, where parameters are already."""
    for name in model.state_dict():
        holder, _, leaf = name.rpartition(".")
        module = model.get_submodule(holder)
        if leaf in module._buffers:
            setattr(module, leaf, getattr(module, leaf).to("meta"))
