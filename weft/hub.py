"""Where a model's files are: a folder, the Hugging Face hub, or the model that comes with weft."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BUNDLED = "bundled"
BUNDLED_ID = "weft-tiny"
_BUNDLED_FOLDER = Path(__file__).parent / "bundled" / "tiny"
_BUNDLED_DRAFT = Path(__file__).parent / "bundled" / "draft"

PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.tiktoken", "merges.txt", "vocab.bpe")
"""What is fetched from the hub."""
CONFIGURATION = ("config.json", "generation_config.json")
"""What is fetched where only the model's shape is wanted."""
NEVER = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.py",
    "*.h5",
    "original/*",
    "onnx/*",
    "consolidated*",
)
"""What is not, whatever its name: pickles, code, other frameworks' weights, second copies."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?(@[A-Za-z0-9._/-]{1,96})?")


def resolve(model: str | os.PathLike[str] | None, *, progress: bool = True, weights: bool = True) -> Path:
    """The folder that holds the model's files, or the one GGUF file that holds all of it.

    weights: False fetches no more of a hub model than its small JSON files (a memory plan needs only those).

    model: a folder; a file that ends in .gguf; a hub id such as "Qwen/Qwen3-0.6B", with "@REVISION" for a branch, tag or commit;
    None or "bundled"
    for the model that comes with weft.  A hub model is fetched into the hub's own cache, under the token of its own
    configuration, and is read from the cache when there is no network.
    Raises ConfigError saying what to do: no such folder, a file, no config.json, no such model, no access, no network.
    """
    if model is None or model == BUNDLED:
        if not (_BUNDLED_FOLDER / "config.json").is_file():
            raise ConfigError(f"the bundled model is not in this installation ({_BUNDLED_FOLDER}); install weft again")
        return _BUNDLED_FOLDER
    name = os.fspath(model)
    if not name:
        raise ConfigError("the model's name is empty; give a folder or a hub id, or leave it out for the bundled model")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ConfigError(
            f"{name} is a file; give the folder that holds config.json and the *.safetensors files, or a .gguf file"
        )
    if path.is_dir():
        return _checked(path)
    if not _ID.fullmatch(name) or _looks_local(name):
        raise ConfigError(
            f"there is no folder {name}; give one with config.json, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    return _checked(_download(name, progress, PATTERNS if weights else CONFIGURATION))


def resolve_draft(model: str, *, progress: bool = True, weights: bool = True) -> Path:
    """As `resolve`, for a model that guesses for another: "bundled" is the one that comes with weft for its bundled model."""
    if model != BUNDLED:
        return resolve(model, progress=progress, weights=weights)
    if not (_BUNDLED_DRAFT / "config.json").is_file():
        raise ConfigError(
            f"the bundled draft model is not in this installation ({_BUNDLED_DRAFT}); give model='FOLDER' or a hub id"
        )
    return _BUNDLED_DRAFT


def model_id(model: str | os.PathLike[str] | None) -> str:
    """The name that a model is served under: weft-tiny for the bundled one, a folder's or a file's own name, or the hub id."""
    if model is None or model == BUNDLED:
        return BUNDLED_ID
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name or name
    if path.suffix == ".gguf" and path.is_file():
        return re.sub(r"-00001-of-\d{5}$", "", path.stem)
    return name.partition("@")[0]


def _looks_local(name: str) -> bool:
    return name.startswith((".", "~", "/", os.sep)) or name.endswith((".safetensors", ".gguf", ".bin", ".json"))


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        nested = sorted((*folder.glob("*/config.json"), *folder.glob("*.gguf")))
        nested = [p.parent if p.name == "config.json" else p for p in nested]
        hint = f"; did you mean {nested[0]}?" if nested else "; give the folder of a Hugging Face checkpoint"
        raise ConfigError(f"{folder} has no config.json{hint}")
    return folder


def _download(name: str, progress: bool, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")

    def fetch(offline: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(NEVER),
                local_files_only=offline,
            )
        )

    try:
        return _quietly(lambda: fetch(False), quiet=not progress)
    except GatedRepoError as e:
        raise ConfigError(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then run 'hf auth login'"
        ) from e
    except RevisionNotFoundError as e:
        raise ConfigError(f"{repository} has no revision {revision!r}; check the branch, tag or commit") from e
    except RepositoryNotFoundError as e:
        raise ConfigError(
            f"there is no folder {name}, and the hub has no model {repository} that you may read; check the name, or "
            "run 'hf auth login' if it is private"
        ) from e
    except HFValidationError as e:
        raise ConfigError(f"{repository} is neither a folder nor a hub id ({e})") from e
    except (
        Exception
    ) as e:  # no network, a hub that is down, answers that are none: what matters is that we have no files
        return _from_cache(name, fetch, e)


def _from_cache(name: str, fetch: Callable[[bool], Path], cause: Exception) -> Path:
    """What an earlier run fetched, when the hub cannot be reached now."""
    try:
        return fetch(True)
    except Exception as e:
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ConfigError(
            f"there is no folder {name}, and it cannot be fetched from the hub nor is it in its cache ({reason}); "
            "check the network, or give a folder"
        ) from e


def _quietly(call: Callable[[], Path], *, quiet: bool) -> Path:
    if not quiet:
        return call()
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return call()
    finally:
        if not before:
            enable_progress_bars()
