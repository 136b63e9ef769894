"""Loading a quantised checkpoint with its weights packed, to compute from them.

transformers hands a checkpoint with a ``quantization_config`` to a *quantizer*. The stock one reads
packed weights and unpacks all of them, at the first forward or while it loads. This one puts in
their place, before the weights are read, modules with parameters as they are stored, and when they
are read, layers that multiply with packed weights (``linear/packed.py``, ``linear/int8.py``). It
does so on CPUs, for checkpoints whose ``quantization_config`` is as this toolkit writes it, and
leaves all else to the stock one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from compress.checkpoint.packing import pack_codes, stored_dtypes, stored_shapes, unpack
from compress.checkpoint.tensors_config import read_quantization
from compress.errors import CompressError
from compress.linear.bags import kernels
from compress.linear.grid import QuantScheme
from compress.linear.int8 import Int8Linear
from compress.linear.matrix import features
from compress.linear.packed import PackedLinear, packing
from compress.linear.tables import PackedEmbedding
from compress.models.anatomy import find_blocks
from compress.system import memory

Served = PackedLinear | Int8Linear


def make_quantizer(quantization_config: Any, **kwargs: Any) -> CompressedTensorsHfQuantizer:
    """The quantizer that is to load a compressed-tensors checkpoint."""
    kind = PackedQuantizer if packing() else CompressedTensorsHfQuantizer
    return kind(quantization_config, **kwargs)


class PackedQuantizer(CompressedTensorsHfQuantizer):
    """Keeps weights packed where it can; see the top of this file."""

    packed: tuple[str, ...] = ()  # paths of those of this model
    _unpacks: bool = False  # what the config says of stock transformers

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        schemes = {}
        if _on_cpu(kwargs.get("device_map")) and kernels(torch.device("cpu")):
            schemes = _schemes(model, self.quantization_config.to_dict())
        if not schemes:
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        self.packed, self._unpacks = tuple(schemes), self.quantization_config.dequantize
        self.quantization_config.dequantize = False
        for path, scheme in schemes.items():
            linear = model.get_submodule(path)
            model.set_submodule(path, StoredLinear(scheme, features(linear), linear.bias))

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super().postprocess_model(model, **kwargs)
        if self.packed:
            # A copy of the checkpoint must say what its readers need to do.
            self.quantization_config.dequantize = self._unpacks
            for path in self.packed:
                model.set_submodule(path, model.get_submodule(path).served(path))
            leave_file(model)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """A packed model's tensors as a checkpoint stores them."""
        if not self.packed:
            return super().get_state_dict_and_metadata(model)
        return stored_state(model), {}


def leave_file(model: nn.Module) -> None:
    """Copy what still lies in the mapped file of the checkpoint: as long as anything does, all that
    was read of it counts as memory of the process."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    memory.trim()


def stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A packed model's tensors as a checkpoint stores them; a table that modules share once."""
    state, seen = dict(model.state_dict()), set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, Served):
            continue
        for name, _ in module.named_buffers(recurse=False):
            del state[f"{path}.{name}"]
        codes, scale, zero_point = _grid(module)
        if scale.data_ptr() in seen:
            continue
        seen.add(scale.data_ptr())
        parent = path.rpartition(".")[0]
        owner = parent if isinstance(modules.get(parent), PackedEmbedding) else path
        stored = pack_codes(codes, scale, zero_point, module.scheme, model.dtype)
        state.update((f"{owner}.{name}", tensor) for name, tensor in stored.items())
    return state


class StoredLinear(nn.Module):
    """Takes in the stored tensors of a quantised weight.

    Args:
        shape: (out, in) of the weight.
    """

    def __init__(
        self, scheme: QuantScheme, shape: tuple[int, int], bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.scheme, self.shape, self.bias = scheme, shape, bias
        dtypes = stored_dtypes(scheme)
        for name, size in stored_shapes(scheme, *shape).items():
            empty = torch.empty(size, dtype=dtypes[name], device="meta")
            self._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name not in self.__dict__["_parameters"]:
            return torch.empty(0)  # some classes initialise it, whatever the checkpoint holds
        return super().__getattr__(name)

    def grid(self, path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [out, in], scales and zero points [out, groups]."""
        own = {name: p.data for name, p in self.named_parameters() if name != "bias"}
        try:
            return unpack(own, self.scheme, self.shape)
        except CompressError as error:
            raise error.within(path) from None

    def served(self, path: str) -> Served:
        """The layer that computes from them."""
        codes, scale, zero_point = self.grid(path)
        if self.scheme.activation_bits is not None:
            return Int8Linear(codes, scale, self.bias).eval()
        return PackedLinear(codes, scale, zero_point, self.scheme, self.bias).eval()


def _schemes(model: PreTrainedModel, section: dict[str, Any]) -> dict[str, QuantScheme]:
    """Path in the model -> scheme of all that is quantised; {} where another tool wrote it."""
    try:
        blocks_path, blocks = find_blocks(model)
        records = read_quantization(section, len(blocks))
        found = {
            f"{blocks_path}.{index}.{path}": scheme
            for index, record in enumerate(records)
            for path, scheme in record.items()
        }
        # A Conv1D is packed as a linear of a class of ours: stock ones are to fail as they do.
        known = all(isinstance(model.get_submodule(path), nn.Linear) for path in found)
    except (CompressError, AttributeError, KeyError, TypeError, re.error):
        return {}
    return found if known else {}


def _grid(module: Served) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if isinstance(module, Int8Linear):
        return module.codes, module.scale.unsqueeze(1), None
    zero_point = None if module.zero_point is None else module.zero_point.t()
    return module.codes(), module.scale.t(), zero_point


def _on_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(place is None or str(place) == "cpu" for place in places)
