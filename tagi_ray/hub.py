"""Models of the Hugging Face hub: one commit for a run, and one download for each node.

The driver asks which commit a branch or tag is, and workers are given the commit. On a node, the
first process that needs a repository fetches it while the others wait, and all load it from the
folder in the cache. Tokens are those of the node (HF_TOKEN, or the file of `hf auth login`).
"""

from __future__ import annotations

import fnmatch
import json
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from tagi_ray.errors import ConfigError
from tagi_ray.json_files import write_whole
from tagi_ray.sections import BackboneSettings

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
T = TypeVar("T")

COMMIT = re.compile(r"[0-9a-f]{40}")
KEYWORDS = frozenset({"demo", "demo_decoder", "random", "train"})
"""Values of backbone.path and backbone.tokenizer that are neither a folder nor a hub id."""
SMALL_FILES = ("*.json", "*.model", "*.txt")
"""Configuration and tokenizer."""
WEIGHTS = "*.safetensors"
SKIPPED = ["*/*", "consolidated*"]
"""What lies in subfolders belongs to other tools; `consolidated` are the same weights once more, for
Mistral's own library."""
WAITS = (1, 2, 4, 8, 16)
"""Seconds between the tries of a request that the hub may answer later."""
TIMEOUT = 20


def is_on_hub(path: str) -> bool:
    """Say whether a path of the settings is a hub id: no keyword, and no folder here."""
    return path not in KEYWORDS and not Path(path).exists()


def pinned(settings: BackboneSettings) -> BackboneSettings:
    """Return the settings with the commit of a hub model as their revision.

    Raises ConfigError where the hub knows no such model or revision, or can't be asked.
    """
    if not is_on_hub(settings.path):
        return settings
    commit = commit_of("backbone.path", settings.path, settings.revision)
    return settings.model_copy(update={"revision": commit})


def commit_of(field: str, path: str, revision: str | None, kind: Kind = "model") -> str:
    """Return the commit that a branch or tag of a repository stands for (None: its main branch).

    Where the hub can't be reached, it is the one in this node's cache. `field` names the setting
    in errors. Raises ConfigError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        raise ConfigError(
            [
                f"{field}={path} is no id of the hub: give one as OWNER/NAME, or data.source=records"
                " for files"
                if kind == "dataset"
                else f"{field}={path} is no folder here, and no id of the hub: give an existing folder,"
                " or an id OWNER/NAME"
            ]
        ) from None
    if revision and COMMIT.fullmatch(revision):
        return revision
    folder = repo_folder_name(repo_id=path, repo_type=kind)
    cached = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")

    def ask() -> str:
        found = HfApi().repo_info(path, repo_type=kind, revision=revision, timeout=TIMEOUT)
        return str(found.sha)

    try:
        commit = _patiently(ask)
    except (OSError, HTTPError) as error:
        # A hub that answers "no" is believed; one that doesn't answer is not needed.
        if _status(error) is None and cached.is_file():
            commit = cached.read_text("utf-8").strip()
            logger.warning("%s=%s: the hub can't be reached; cached: %s", field, path, commit)
            return commit
        raise ConfigError([_sentence(field, path, revision, kind, error)]) from error
    with suppress(OSError):  # it is only needed where the hub can't be asked again
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cached, commit)
    return commit


def model_folder(path: str, revision: str | None, weights: bool = True) -> Path:
    """Return a local folder with a model's files, which a hub id is fetched to once on each node.

    Without `weights` it need not have them, but the repository must. Raises ConfigError.
    """
    if Path(path).is_dir():
        return Path(path)
    commit = commit_of("backbone.path", path, revision)
    folder = _folder("backbone.path", path, commit, SMALL_FILES)
    if not any(fnmatch.fnmatch(name, WEIGHTS) for name in _known_files(path, commit, folder)):
        folder_name = path.rpartition("/")[2]
        raise ConfigError([
            f"backbone.path={path} has no .safetensors weights at revision {revision or 'main'},"
            " and pickles are never loaded: set backbone.revision to one that has them (see its"
            " pull requests on the hub: refs/pr/NUMBER), or make a local folder of it, whose name"
            " you set as backbone.path, with: python -c \"from transformers import"
            f" AutoModelForSeq2SeqLM as M, AutoTokenizer as T; M.from_pretrained('{path}',"
            f" use_safetensors=False).save_pretrained('{folder_name}');"
            f" T.from_pretrained('{path}').save_pretrained('{folder_name}')\""
        ])  # fmt: skip
    return _folder("backbone.path", path, commit, (*SMALL_FILES, WEIGHTS)) if weights else folder


def tokenizer_folder(field: str, path: str, revision: str | None) -> Path:
    """Return a local folder with a tokenizer's files, fetched as a model's. Raises ConfigError."""
    if Path(path).is_dir():
        return Path(path)
    return _folder(field, path, commit_of(field, path, revision), SMALL_FILES)


def _folder(field: str, path: str, commit: str, wanted: tuple[str, ...]) -> Path:
    from filelock import FileLock
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # in a log they are noise
    if found := _cached(path, commit, wanted):
        return found
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    name = f"{repo_folder_name(repo_id=path, repo_type='model')}--{commit}.lock"

    def fetch() -> str:
        return snapshot_download(
            path, revision=commit, allow_patterns=list(wanted), ignore_patterns=SKIPPED
        )

    try:
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / name):
            found = _cached(path, commit, wanted) or Path(_patiently(fetch))
            if not _complete(found, WEIGHTS in wanted):  # as the hub's library leaves it offline
                raise FileNotFoundError(f"{found} is incomplete")
            return found
    except (OSError, HTTPError) as error:
        raise ConfigError([_sentence(field, path, commit, "model", error)]) from error


def _cached(path: str, commit: str, wanted: tuple[str, ...]) -> Path | None:
    """Return the folder in the cache if it holds all files that are wanted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            path,
            revision=commit,
            local_files_only=True,
            allow_patterns=list(wanted),
            ignore_patterns=SKIPPED,
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return folder if _complete(folder, WEIGHTS in wanted) else None


def _complete(folder: Path, weights: bool) -> bool:
    """Check what the hub's own library doesn't where another tool began the folder."""
    if not any(folder.glob("*.json")):
        return False
    index = folder / "model.safetensors.index.json"
    if not weights:
        return True
    if not index.is_file():
        return any(folder.glob(WEIGHTS))
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _known_files(path: str, commit: str, folder: Path) -> Iterator[str]:
    """Yield the names of a repository's own files, fetched or not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    yield from (one.name for one in folder.iterdir())
    try:
        tree = get_cached_repo_tree(path, revision=commit)
    except CachedRepoTreeNotFoundError:
        return
    yield from (one.path for one in tree if "/" not in one.path)


def _patiently(call: Callable[[], T]) -> T:
    """Call until the hub answers; what another try would not change is raised at once."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in WAITS:
        try:
            return call()
        except OSError as error:
            if (_status(error) or 0) not in (408, 429, 500, 502, 503, 504):
                raise
            answer = next(one for one in _chain(error) if isinstance(one, HfHubHTTPError)).response
            told = answer.headers.get("Retry-After", "")
            logger.warning("the hub answered %d, asking again", answer.status_code)
            time.sleep((min(int(told), 60) if told.isdigit() else wait) * random.uniform(1, 1.25))
    return call()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the status with which the hub refused, None where it didn't answer."""
    from huggingface_hub.errors import HfHubHTTPError

    for one in _chain(error):
        if isinstance(one, HfHubHTTPError):
            return one.response.status_code
    return None


def _sentence(field: str, path: str, revision: str | None, kind: Kind, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    chain, status = list(_chain(error)), _status(error)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{path}"

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if among(errors.GatedRepoError) or status == 403:
        return (
            f"{field}={path} is only for those who accepted its licence: accept it at {page}, and"
            " set HF_TOKEN to a token of that account on every node"
        )
    if among(errors.RevisionNotFoundError):
        return (
            f"{field.partition('.')[0]}.revision={revision} is no branch, tag or commit of {path}:"
            f" choose one of {page}/tree/main"
        )
    if status in (401, 404):
        return (
            f"{field}={path} is no repository of the hub that this token can see: check the id at"
            f" {page}; for a private one set HF_TOKEN on every node"
        )
    if status == 429:
        return (
            f"{field}={path}: the hub still answers 429 (too many requests) after"
            f" {len(WAITS) + 1} tries: start again in some minutes, or set HF_TOKEN on every node,"
            " for a higher limit"
        )
    if constants.HF_HUB_OFFLINE:
        wanted = f" at revision {revision}" if revision else ""
        option = " --repo-type dataset" if kind == "dataset" else ""
        return (
            f"{field}={path} is no folder here,{wanted} it is not in {constants.HF_HUB_CACHE}, and"
            f" HF_HUB_OFFLINE=1 forbids to fetch it: unset HF_HUB_OFFLINE, or run"
            f" `hf download{option} {path}` where there is a connection, and copy the cache"
        )
    reason = str(chain[-1]).partition("\n")[0] or type(chain[-1]).__name__
    return (
        f"{field}={path} can't be fetched from {constants.ENDPOINT} ({reason}): check the"
        " connection, or set HF_HUB_OFFLINE=1 where it is in the cache"
    )
