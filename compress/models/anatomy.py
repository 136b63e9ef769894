"""The anatomy of a transformer: its blocks, and in each block the linears by role.

A *site* is a set of linears that read the same input: query/key/value, the attention output
projection, the FFN's producers (up and gate), the FFN's output projection. Methods see sites, never
module names. Roles are inferred from names and shapes; :mod:`compress.models.families` adds what a
module tree cannot show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError
from compress.linear.layer import features_of, is_layer, is_map
from compress.models.described import described_family
from compress.models.experts import unfused_in
from compress.models.families import (
    CONCATENATED,
    FAMILIES,
    INTERLEAVED,
    SEPARATE,
    Family,
    inferred_family,
)
from compress.models.images import reads_images
from compress.models.mixtures import Mixture, mixture_in
from compress.models.norms import NormFinder

QKV, ATTENTION_OUT, UP, DOWN, OTHER = "qkv", "attention_out", "up", "down", "other"

# The first pattern that matches the end of a linear's path inside its block gives its role.
_ROLES: tuple[tuple[str, str], ...] = (
    (QKV, r"(q_proj|k_proj|v_proj|q_lin|k_lin|v_lin|query|key|value|to_q|to_k|to_v)$"),
    (QKV, r"(c_attn|qkv_proj|query_key_value|Wqkv|in_proj|qkv)$"),
    (ATTENTION_OUT, r"(attn|attention)\.(o_proj|out_proj|out_lin|c_proj|dense|Wo|proj)$"),
    (ATTENTION_OUT, r"(attention\.output\.dense|to_out\.0)$"),
    (UP, r"(gate_proj|up_proj|gate_up_proj|fc1|lin1|c_fc|dense_h_to_4h|Wi|fc_in|w1|w3)$"),
    (UP, r"(intermediate\.dense|^ffn)$"),
    (DOWN, r"(down_proj|fc2|lin2|mlp\.c_proj|dense_4h_to_h|mlp\.Wo|ffn_output|fc_out|w2)$"),
    (DOWN, r"output\.dense$"),
)


def _no_norm() -> str | None:
    return None


@dataclass(frozen=True)
class Site:
    """Linears that share one input, and the module whose forward a replay may skip to get there.

    Attributes:
        kind: qkv, attention_out, up, down, or other (a block whose roles are not known).
        linears: paths inside the block, in the order query, key, value or gate, up.
        core: for attention_out and down, the smallest module that holds the producers of this
            site's input (None where there is no such module).
        bound: modules of the core, other than linears, whose size goes with the core's width: a
            norm over all heads (OLMo-2, Cohere), a norm a head (StableLM). They tie the heads or
            neurons together, so that none can go without changing what the others compute.
        find_norm: looks for :attr:`norm`; finds nothing for a site that is not of a whole model.
    """

    kind: str
    linears: tuple[str, ...]
    core: str | None = None
    bound: tuple[str, ...] = ()
    find_norm: Callable[[], str | None] = field(default=_no_norm, repr=False, compare=False)

    @property
    def norm(self) -> str | None:
        """Path inside the block of the norm whose output all linears of the site read.

        None where they read something else, the norm of the block before (BERT's query, key and
        value), or what could not be found out. Others may read that output too: another site
        (Phi's attention and FFN share a norm) or the residual stream (BERT). Asking the first time
        takes tenths of a second, see :mod:`compress.models.norms`.
        """
        return self.find_norm()


@dataclass(frozen=True)
class BlockAnatomy:
    """One block: where it is, its sites in the order of execution, its widths.

    ``heads``, ``kv_heads``, ``head_dim`` and ``ffn`` are 0 where the block has no such part;
    ``hidden``, the width of the residual stream as the linears read and write it, is 0 where that
    does not show. ``others`` are path and shape of the parameters beside the linears' weights:
    their biases, norms, scales, tables. ``variant`` is what the config says of this layer by itself
    (``layer_types`` and other lists with an entry a layer): what differs in it computes another
    function of the same weights. ``experts`` is the number of routed experts, ``mixture`` says
    where they are; 0 and None where the block has none.
    """

    path: str
    index: int
    sites: tuple[Site, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    family: Family
    hidden: int = 0
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()
    variant: tuple[tuple[str, str], ...] = ()
    experts: int = 0
    mixture: Mixture | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites for name in site.linears)

    def site(self, kind: str) -> Site | None:
        return next((s for s in self.sites if s.kind == kind), None)

    @property
    def widths(self) -> dict[str, int]:
        widths = {"heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}
        return {**widths, "experts": self.experts} if self.experts else widths


@dataclass(frozen=True)
class Anatomy:
    """A model's blocks and family.

    Attributes:
        model_type: the stock model type (without our prefix).
        blocks_path: path of the ModuleList of blocks inside the model.
        applications: how often blocks run in one forward, more than there are where they share
            weights.
    """

    model_type: str
    family: Family
    blocks_path: str
    blocks: tuple[BlockAnatomy, ...]
    applications: int

    @cached_property
    def prefix(self) -> str:
        return self.blocks_path + "."

    def is_outer(self, tensor_name: str) -> bool:
        """True for tensors outside every block: embeddings, final norm, head."""
        return not tensor_name.startswith(self.prefix)


def stock_type(config: PreTrainedConfig) -> str:
    """Return the model type that the checkpoint had before it got modules of ours."""
    return config.model_type.removeprefix("compress_")


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a config: from the table, as somebody describes it, or else inferred
    from its fields."""
    kind = stock_type(config)
    return FAMILIES.get(kind) or described_family(config, kind) or inferred_family(config)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's transformer blocks.

    The list that the family names, or else the longest ModuleList whose members hold linears;
    ALBERT's single shared layer counts as a list of one.

    Raises:
        CompressError: the model has no such list (not a transformer of a known build), or reads
            images and has a list for each of several stages.
    """
    wanted = family_of(model.config).blocks
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if wanted is not None and path.rpartition(".")[2] != wanted:
            continue
        if not any(is_map(m) for m in module[0].modules()):
            continue
        # The innermost list wins among equals: ALBERT nests groups of layers.
        if best is None or len(module) > len(best[1]) or path.startswith(best[0] + "."):
            best = (path, module)
    if best is None:
        raise CompressError(
            "a transformer with a list of blocks that hold linear layers",
            f"{type(model).__name__} ({model.config.model_type})",
            "Supported families are listed by `compress methods --families`; of a new one the "
            "recipe can name the list (model.family.blocks)",
        )
    outside = best[0].rpartition(".")[0].rpartition(".")
    if outside[2].isdigit() and reads_images(model.config):
        stages = len(model.get_submodule(outside[0]))
        if stages > 1:  # Swin, ConvNeXt: the resolution changes from one to the next
            raise CompressError(
                "an encoder whose blocks are all in one list (ViT, DeiT and their kin)",
                f"{type(model).__name__}, which has {stages} stages of blocks",
                "Models of several resolutions are not supported",
            )
    return best


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Infer the anatomy of a model, real or on the meta device.

    Raises:
        CompressError: no blocks were found.
    """
    config = model.config
    family = family_of(config)
    path, blocks = find_blocks(model)
    paths = [f"{path}.{i}" for i in range(len(blocks))]
    norms = NormFinder(model, paths)
    anatomies = tuple(
        block_anatomy(block, paths[i], i, config, family, norms) for i, block in enumerate(blocks)
    )
    applications = getattr(config, family.layers) if family.shared_blocks else len(blocks)
    return Anatomy(stock_type(config), family, path, anatomies, applications)


def block_anatomy(
    block: nn.Module,
    path: str,
    index: int,
    config: PreTrainedConfig,
    family: Family,
    norms: NormFinder | None = None,
) -> BlockAnatomy:
    """Infer one block's sites and widths from its modules as they are now.

    Args:
        norms: of the model that the block is part of; without, sites know no norm.
    """
    # What a layer is made of acts as the one linear that it replaced.
    layers = tuple(f"{n}." for n, m in block.named_modules() if is_layer(m))
    names = [n for n, m in block.named_modules() if is_map(m) and not n.startswith(layers)]
    routed = tuple(n for path, _ in unfused_in(block) for n in names if n.startswith(f"{path}."))
    mixture, experts = mixture_in(block) or (None, 0)
    roles: dict[str, list[str]] = {}
    for name in names:
        if name in routed:
            continue
        roles.setdefault(_role(name, family), []).append(name)
    if OTHER in roles or len(roles.get(ATTENTION_OUT, [])) > 1 or len(roles.get(DOWN, [])) > 1:
        sites: tuple[Site, ...] = (Site(OTHER, tuple(names)),) if names else ()
        return BlockAnatomy(
            path, index, sites, 0, 0, 0, 0, family, experts=experts, mixture=mixture
        )
    order = {key: i for i, key in enumerate("qkv")}
    roles.get(QKV, []).sort(key=lambda n: order.get(n.rpartition(".")[2].removeprefix("to_")[0], 0))
    sites = tuple(
        Site(kind, tuple(roles[kind]), _core(kind, roles))
        for kind in (QKV, ATTENTION_OUT, UP, DOWN)
        if kind in roles
    )
    heads, kv_heads, head_dim = _heads(block, roles, config, family)
    ffn = _size(block, roles[DOWN][0])[1] if DOWN in roles else 0
    sites = tuple(_with_bound(site, block, heads, kv_heads, head_dim, ffn) for site in sites)
    if routed:  # each reads what was sent to its expert
        sites += (Site(OTHER, routed),)
    if norms is not None:
        sites = tuple(replace(s, find_norm=partial(norms.find, index, s.linears)) for s in sites)
    return BlockAnatomy(
        path, index, sites, heads, kv_heads, head_dim, ffn, family, _hidden(block, roles),
        _others(block, names), _variant(config, family, index), experts, mixture,
    )  # fmt: skip


def _others(block: nn.Module, linears: list[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    inside = tuple(f"{name}." for name in linears)
    # Wherever a layer in the place of a linear keeps its bias, it is that linear's.
    biases = {f"{name}.bias": block.get_submodule(name).bias for name in linears}
    found = [(n, p) for n, p in block.named_parameters() if not n.startswith(inside)]
    found += [(name, bias) for name, bias in biases.items() if bias is not None]
    return tuple((name, tuple(parameter.shape)) for name, parameter in found)


def _variant(config: PreTrainedConfig, family: Family, index: int) -> tuple[tuple[str, str], ...]:
    lists = per_layer_lists(config, getattr(config, family.layers, 0))
    return tuple((k, repr(v[index])) for k, v in sorted(lists.items()) if index < len(v))


def per_layer_lists(config: PreTrainedConfig, layers: int) -> dict[str, Sequence[Any]]:
    """The config's fields that have an entry for each of its layers, by name."""
    return {
        key: value
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == layers
    }


def _hidden(block: nn.Module, roles: dict[str, list[str]]) -> int:
    reads = {_size(block, n)[1] for role in (QKV, UP) for n in roles.get(role, ())}
    writes = {_size(block, n)[0] for role in (ATTENTION_OUT, DOWN) for n in roles.get(role, ())}
    return reads.pop() if len(reads) == 1 and reads == writes else 0


def _role(name: str, family: Family) -> str:
    own = ((role, f"(?:{pattern})$") for role, pattern in family.roles.items())
    return next((role for role, end in (*own, *_ROLES) if re.search(end, name)), OTHER)


def _core(kind: str, roles: dict[str, list[str]]) -> str | None:
    """Smallest module that holds the producers of an output projection, for replays to skip."""
    producers = {ATTENTION_OUT: QKV, DOWN: UP}.get(kind)
    if producers is None or producers not in roles:
        return None
    parts = [n.split(".")[:-1] for n in roles[producers]]
    common = parts[0]
    for other in parts[1:]:
        common = [a for a, b in zip(common, other, strict=False) if a == b]
    return ".".join(common) or None


def _with_bound(
    site: Site, block: nn.Module, heads: int, kv_heads: int, head_dim: int, ffn: int
) -> Site:
    """Find the modules of a core, linears aside, that have a size or a member for each unit."""
    if site.core is None:
        return site
    counts, widths = set(), {ffn}
    if site.kind == ATTENTION_OUT:
        counts = {heads, kv_heads} - {1}
        widths = {heads * head_dim, kv_heads * head_dim} - {head_dim}
    bound = []
    core = block.get_submodule(site.core)
    layers = tuple(f"{site.core}.{n}." for n, m in core.named_modules() if is_layer(m))
    for name, module in core.named_modules(prefix=site.core):
        if is_map(module) or name.startswith(layers):
            continue
        shapes = [p.shape for p in module.parameters(recurse=False)]
        sizes = {size for shape in shapes for size in shape} | {shape.numel() for shape in shapes}
        a_member_each = isinstance(module, nn.ModuleList) and len(module) in counts
        # A norm inside each head (Qwen3) has the size of a head, which may be the number of heads.
        if a_member_each or sizes & (widths | counts - {head_dim}):
            bound.append(name)
    return replace(site, bound=tuple(bound))


def _size(block: nn.Module, name: str) -> tuple[int, int]:
    return features_of(block.get_submodule(name))


def _heads(
    block: nn.Module, roles: dict[str, list[str]], config: PreTrainedConfig, family: Family
) -> tuple[int, int, int]:
    if QKV not in roles or ATTENTION_OUT not in roles:
        return 0, 0, 0
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // _global(config, family.heads)
    heads = _size(block, roles[ATTENTION_OUT][0])[1] // head_dim
    if family.qkv_layout == SEPARATE:
        kv_heads = _size(block, roles[QKV][1])[0] // head_dim if len(roles[QKV]) > 1 else heads
    elif family.qkv_layout in (CONCATENATED, INTERLEAVED):
        kv_heads = (_size(block, roles[QKV][0])[0] // head_dim - heads) // 2
    return heads, kv_heads, head_dim


def _global(config: PreTrainedConfig, name: str) -> int:
    """Read a config field that may differ by layer: the global value is what head sizes rest on."""
    if getattr(config, "is_heterogeneous", False):
        allowed = config.allow_global_per_layer_attribute_access
        config.allow_global_per_layer_attribute_access = True
        try:
            return getattr(config, name)
        finally:
            config.allow_global_per_layer_attribute_access = allowed
    return getattr(config, name)
