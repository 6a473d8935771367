"""Models of the Hugging Face hub: the files a model needs, in the hub client's own cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from .checkpoint import INDEX_FILE, SINGLE_FILE, shard_names
from .errors import CheckpointError

_COMMIT: Final = re.compile("[0-9a-f]{40}")
# The weights come last: where they are, everything else has been asked for.
_OPTIONAL: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

ANSWER_S: Final = 10.0
_WEIGHTS: Final = (SINGLE_FILE, INDEX_FILE)

Progress = Callable[[str, int, int], None]


class _UnreachableError(CheckpointError):
    """The hub does not answer."""


def hub_folder(model: str, progress: Progress | None = None) -> Path:
    """The folder of a model of the hub, `org/name` or `org/name@revision`, downloaded where it is not cached.

    Only its configuration, safetensors, tokenizer and chat template are fetched; pickled weights and code never are.
    Where the hub cannot be reached, the cached copy serves. `progress` is called with a label, the bytes there are and
    the bytes there will be. The client's environment variables hold: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        CheckpointError: the hub cannot be reached and nothing is cached, there is no such repository or revision, it
            is gated, or it has no safetensors.
    """
    repo, _, revision = model.partition("@")
    revision = revision or "main"
    _expect_answer(repo, "config.json", revision)
    config = _fetch(repo, "config.json", revision, progress)
    if config is None:
        raise CheckpointError(f"hub: {model}: expected config.json, found none")
    commit = config.parent.name
    # Whoever cached the weights cached what is beside them: then a hub that is away is not asked again.
    complete = any(isinstance(_cached(repo, name, commit), Path) for name in _WEIGHTS)
    for name in _OPTIONAL:
        try:
            _fetch(repo, name, commit, progress)
        except _UnreachableError:
            if not complete:
                raise
            break
    for name in _WEIGHTS:
        found = _cached(repo, name, commit) if complete else _fetch(repo, name, commit, progress)
        if isinstance(found, Path):
            break
    else:
        raise CheckpointError(
            f"hub: {model}: expected {SINGLE_FILE}, found none; only safetensors are read, no other format"
        )
    for shard in sorted(shard_names(found)) if name == INDEX_FILE else ():
        if _fetch(repo, shard, commit, progress) is None:
            raise CheckpointError(f"hub: {model}: expected {shard}, which {INDEX_FILE} names, found none")
    return config.parent


def _cached(repo: str, name: str, commit: str) -> Path | bool:
    """A file of a commit in the client's cache; True where it is known not to exist, False where nothing is known."""
    client: Any = import_module("huggingface_hub")
    found = client.try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else found is not None


def _expect_answer(repo: str, name: str, revision: str) -> None:
    """Ask once for a file that is not cached: where nobody answers, the client would go on asking for half a minute.

    Raises:
        CheckpointError: nobody answers, within ten seconds.
    """
    client: Any = import_module("huggingface_hub")
    errors: Any = import_module("huggingface_hub.errors")
    if _cached(repo, name, revision):
        return
    try:
        client.get_hf_file_metadata(client.hf_hub_url(repo, name, revision=revision), timeout=ANSWER_S)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
        return  # An answer, or nobody is to be asked: the client has its own words for both.
    except Exception as problem:  # The errors of its transports have no base in common.
        raise _unreachable(repo, name, problem) from problem


def _unreachable(repo: str, name: str, problem: BaseException | None) -> _UnreachableError:
    return _UnreachableError(
        f"hub: {repo}: the hub cannot be reached and {name} is not in its cache ({_first_line(problem)})"
    )


def _fetch(repo: str, name: str, revision: str, progress: Progress | None) -> Path | None:
    """A file, in the client's cache; None where the repository has none of that name.

    What the cache knows of a commit is true for ever, of a branch or tag only until the hub says otherwise.
    """
    client: Any = import_module("huggingface_hub")
    errors: Any = import_module("huggingface_hub.errors")
    if _COMMIT.fullmatch(revision) and (known := _cached(repo, name, revision)):
        return known if isinstance(known, Path) else None
    try:
        return Path(client.hf_hub_download(repo, name, revision=revision, tqdm_class=_bar(progress)))
    except errors.LocalEntryNotFoundError as problem:
        raise _unreachable(repo, name, problem.__cause__) from problem
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as problem:
        raise CheckpointError(
            f"hub: {repo} is gated: accept its terms on its page and set HF_TOKEN to a token of yours"
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise CheckpointError(
            f"hub: expected a model folder or a repository {repo}, found neither (a private one needs HF_TOKEN)"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise CheckpointError(f"hub: {repo}: expected a revision {revision}, found none") from problem
    except Exception as problem:  # The errors of its transports have no base in common.
        raise CheckpointError(f"hub: {repo}: cannot fetch {name}: {_first_line(problem)}") from problem


def _bar(progress: Progress | None) -> Any:
    """A progress bar that draws nothing and reports the bytes of one file."""
    base: Any = import_module("tqdm").tqdm

    class Bar(base):
        def __init__(self, *, total: int | None = None, initial: int = 0, desc: str = "", **_: Any) -> None:
            super().__init__(disable=True)
            self.label, self.done, self.size = f"downloading {desc}", initial, total or 0

        def update(self, n: int = 1) -> None:
            self.done += n
            if progress is not None:
                progress(self.label, self.done, self.size)

    return Bar


def _first_line(problem: BaseException | None) -> str:
    """What a client's error says, on one line."""
    lines = str(problem).strip().splitlines() if problem is not None else []
    return f"{type(problem).__name__}: {lines[0].rstrip('.')}" if lines else "it is offline"
