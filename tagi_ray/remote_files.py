"""Files of the user's, on this machine or in a bucket (`s3://`, `gs://`), behind one small interface.

Credentials are those that each cloud's own tools find on a node, never settings of a run. What a
cloud refuses is one sentence after at most half a minute.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from tagi_ray.errors import DataError

BUFFER_BYTES = 1 << 18
"""Read at once from a bucket: a request takes as long as some megabytes."""
_CURES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) on every node, and"
    " AWS_ENDPOINT_URL for a store that is not Amazon's",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, on"
    " every node",
}


def is_remote(path: str) -> bool:
    """Say whether a path is in a bucket."""
    return "://" in path


def stem_of(path: str) -> str:
    """Return the name of a file without its last suffix."""
    return PurePosixPath(path).stem


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, with `seek` and `readline`.

    Raises DataError where it can't be opened, or be read in the block.
    """
    try:
        with _open(path) as file:
            yield file
    except _refusals(path) as error:
        raise DataError(_sentence(path, error)) from error


def read_bytes(path: str) -> bytes:
    """Return all that a file holds; raises DataError where it can't be read."""
    with opened(path) as file:
        return file.read()


def list_files(path: str, suffixes: Sequence[str]) -> list[str] | None:
    """Return the files of a folder that end in one of the suffixes, sorted; of a file, itself.

    None where there is nothing of that name. Raises DataError where a bucket can't be asked.
    """
    if not is_remote(path):
        local = Path(path)
        if not local.exists():
            return None
        names = [str(one) for one in local.iterdir()] if local.is_dir() else [path]
    else:
        try:
            names = _list_bucket(path)
        except _refusals(path) as error:
            raise DataError(_sentence(path, error)) from error
        if names is None:
            return None
    return sorted(name for name in names if name == path or name.endswith(tuple(suffixes)))


def _open(path: str) -> BinaryIO:
    if not is_remote(path):
        return open(path, "rb")
    files, place = _bucket(path)
    return cast(BinaryIO, io.BufferedReader(files.open_input_file(place), BUFFER_BYTES))


def _list_bucket(path: str) -> list[str] | None:
    from pyarrow.fs import FileSelector, FileType

    files, place = _bucket(path)
    if files.get_file_info(place).type == FileType.File:
        return [path]
    scheme = path.partition("://")[0]
    found = files.get_file_info(FileSelector(place, allow_not_found=True))
    names = [f"{scheme}://{one.path}" for one in found if one.type == FileType.File]
    return names or None  # a bucket has no empty folders


def _bucket(path: str) -> tuple[Any, str]:
    """Return the file system of a bucket's path, and the path without its scheme."""
    scheme, _, place = path.partition("://")
    if scheme not in _CURES:
        raise DataError(f"{path}: only local paths, s3:// and gs:// are read")
    place = place.rstrip("/")
    return _file_system(scheme, place.partition("/")[0]), place


@lru_cache(maxsize=8)
def _file_system(scheme: str, bucket: str) -> Any:
    from pyarrow import fs

    if scheme == "gs":
        # Its library asks a machine of Google's for a token, and where there is none for 15 minutes.
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=8))
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # A store of another maker has no regions, and Amazon's are not told by a bucket's name.
    elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        region=named or ("us-east-1" if elsewhere else fs.resolve_s3_region(bucket)),
        endpoint_override=elsewhere,
        connect_timeout=5,
        request_timeout=20,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
    )


def _refusals(path: str) -> tuple[type[Exception], ...]:
    if not is_remote(path):
        return (OSError,)
    from pyarrow import ArrowException

    return OSError, ArrowException


def _sentence(path: str, error: BaseException) -> str:
    if not is_remote(path):
        reason = getattr(error, "strerror", None) or error
        return f"{path}: can't be read ({reason}); name another file"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file or bucket; name an existing one"
    reason = " ".join(str(error).split()).rpartition("The underlying error message was: ")[2]
    reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
    return f"{path}: can't be read ({reason}); {_CURES[path.partition('://')[0]]}"
