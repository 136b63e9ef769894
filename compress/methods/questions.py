"""What can be asked of the passes of a step: their names, what they need and what they change."""

from __future__ import annotations

from compress.methods.passes import (
    KEPT,
    LEARN,
    SOLVE,
    SURVEY,
    TRAIN,
    KeepBlocks,
    Pass,
    Rounds,
    Sites,
    Stream,
    Survey,
    TrainModel,
    Whole,
)
from compress.models.anatomy import BlockAnatomy


def unrolled(passes: tuple[Pass | Rounds, ...], blocks: int) -> tuple[Pass, ...]:
    """The passes of a step on so many blocks, those of all rounds one after the other."""
    found: list[Pass] = []
    for step in passes:
        found += step.passes * step.count(blocks) if isinstance(step, Rounds) else (step,)
    return tuple(found)


def stages(passes: tuple[Pass, ...]) -> list[str]:
    """What a journal calls each pass: by its kind, and from the second of a kind on numbered."""
    names: list[str] = []
    for step in passes:
        match step:
            case Survey() | Whole():
                kind = SURVEY
            case TrainModel():
                kind = TRAIN
            case KeepBlocks():
                kind = KEPT
            case Stream():
                kind = SOLVE if step.keep is None else LEARN
        again = sum(name.partition("-")[0] == kind for name in names)
        names.append(f"{kind}-{again + 1}" if again else kind)
    return names


def kind_of(stage: str) -> str:
    """The kind of pass that a stage names."""
    return stage.partition("-")[0]


def uses_original(passes: tuple[Pass | Rounds, ...]) -> bool:
    """Whether the model that the recipe began with is asked for."""
    return compares_blocks(passes) or any(
        isinstance(p, TrainModel) and p.teacher for p in each_once(passes)
    )


def compares_blocks(passes: tuple[Pass | Rounds, ...]) -> bool:
    """Whether blocks learn to return what those of the model that the recipe began with do."""
    return any(
        isinstance(p, Stream) and p.targets == "original" and bool(p.learning)
        for p in each_once(passes)
    )


def changes_outer(passes: tuple[Pass | Rounds, ...]) -> bool:
    """Whether what lies outside the blocks may change."""
    streams = [p for p in each_once(passes) if isinstance(p, Stream)]
    return any(p.outer is not None or p.closing is not None for p in streams)


def trains(passes: tuple[Pass | Rounds, ...]) -> bool:
    """Whether gradients take part."""
    return any(
        isinstance(p, TrainModel)
        or (isinstance(p, Stream) and any(action.options for action in p.learning))
        for p in each_once(passes)
    )


def carries_inputs(passes: tuple[Pass | Rounds, ...]) -> bool:
    """Whether inputs of blocks are carried from one block to the next."""
    return any(
        isinstance(p, Survey) or (isinstance(p, Stream) and p.inputs) for p in each_once(passes)
    )


def merged(passes: tuple[Pass | Rounds, ...]) -> int:
    """Blocks that become one, at most."""
    return max((p.most for p in each_once(passes) if isinstance(p, Stream) and p.merge), default=1)


def together(passes: tuple[Pass | Rounds, ...]) -> int:
    """Blocks of the model that enters a streaming pass in memory at once, at most."""
    return max((p.most for p in each_once(passes) if isinstance(p, Stream)), default=1)


def sites_of(passes: tuple[Pass | Rounds, ...]) -> list[Sites]:
    """What is done to sites, wherever."""
    return [
        action
        for p in each_once(passes)
        if isinstance(p, Stream)
        for action in p.actions
        if isinstance(action, Sites)
    ]


def targets_of(passes: tuple[Pass | Rounds, ...], block: BlockAnatomy) -> list[str]:
    """Linears of a block that a step works on, each once, in the order of execution."""
    found = {
        name: None
        for action in sites_of(passes)
        for site in block.sites
        for name in action.targets(block, site)
    }
    return list(found)


def each_once(passes: tuple[Pass | Rounds, ...]) -> list[Pass]:
    """All passes, those of rounds as if there were one."""
    return [
        one for step in passes for one in (step.passes if isinstance(step, Rounds) else (step,))
    ]
