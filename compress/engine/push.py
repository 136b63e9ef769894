"""A result onto a hub, as anybody's client of it would put it there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.system.intake import reason, user_path
from compress.system.tensors import TensorIndex

# What belongs to a model; nothing else of a folder leaves the machine.
_FILES = (
    "*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.json", "*.jinja", "*.md", "*.txt",
    "*.model", "*.tiktoken", "bpe.codes", "LICENSE*", "NOTICE*",
)  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def push(
    model: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    message: str = "Add the model",
    endpoint: str | None = None,
) -> str:
    """Upload a result to a repository of a hub, which is made where there is none.

    Args:
        model: a run's folder, a checkpoint, a folder that was exported to ONNX, or a GGUF file.
        repository: ``owner/name``, or ``name`` for the account that is logged in.
        private: of a repository that is made; one that exists stays what it is.
        message: of the commit.
        endpoint: the hub's address; HF_ENDPOINT or the public hub if None.

    Returns:
        The commit's address.

    Raises:
        CompressError: no model there, or an incomplete one; an id that is none; a hub that refuses
            or does not answer.
    """
    import huggingface_hub

    if not _REPOSITORY.fullmatch(repository):
        raise CompressError("a repository as owner/name", repr(repository), "Check the spelling")
    folder, names = _content(user_path(model, "a folder or file to push"))
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=message,
            # A name is a literal, but the filter reads patterns.
            allow_patterns=[name.replace("[", "[[]") for name in names],
        )  # fmt: skip
    except Exception as error:  # refusals, no connection, answers that the library cannot read
        raise _failed(repository, error) from error
    return str(commit.commit_url)


def _content(place: Path) -> tuple[Path, list[str]]:
    """The folder and the names of its files that are the model."""
    if place.is_file() and place.suffix == ".gguf":
        card = [p.name for p in (place.parent / "README.md",) if p.is_file()]
        return place.parent, [place.name, *card]
    if (place / "journal.jsonl").is_file() and (place / "model").is_dir():
        place = place / "model"
    exported = (place / "model.onnx").is_file()
    if not place.is_dir() or not (exported or (place / "config.json").is_file()):
        raise CompressError(
            "a model to push: a run, a checkpoint, an exported folder or a .gguf file",
            f"{str(place)!r}, which is none", "Give the folder of a finished run",
        )  # fmt: skip
    if exported:
        from compress.runtimes.onnx.description import read_description

        read_description(place)
    else:
        TensorIndex.open(place)  # a file that was cut short is refused
    return place, sorted({p.name for pattern in _FILES for p in place.glob(pattern) if p.is_file()})


def _failed(repository: str, error: Exception) -> CompressError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ in (
        "LocalTokenNotFoundError",
        "GatedRepoError",
    ):
        return CompressError(
            f"the right to write to {repository}", reason(error),
            "Log in with a token that may write (hf auth login), or choose a repository of yours",
        )  # fmt: skip
    return CompressError(
        f"the hub to take {repository}", reason(error),
        "Run the same command again: what has arrived is not sent twice; HF_ENDPOINT names "
        "another hub",
    )  # fmt: skip
