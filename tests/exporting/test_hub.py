"""Uploads, against a hub that is none: what the real one raises, in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from layersample import ConfigError
from layersample.exporting import hub
from layersample.exporting.hub import Hub


class Response:
    """What of the answer of a server is read."""

    headers: dict[str, str] = {}
    request = None

    def __init__(self, status: int) -> None:
        self.status_code = status


class FakeApi:
    """Mirrors the calls of ``huggingface_hub.HfApi`` that are made, and raises where it is told to."""

    def __init__(self, **faults: Exception) -> None:
        self.faults, self.calls = faults, list[tuple[str, dict[str, Any]]]()

    def __call__(self) -> FakeApi:
        return self

    def _call(self, name: str, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        if name in self.faults:
            raise self.faults[name]

    def whoami(self) -> None:
        self._call("whoami")

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._call("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self._call("upload_folder", repo_id=repo_id, folder_path=folder_path)


def refused(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"{status} Client Error", response=Response(status))  # type: ignore[arg-type]


def fake(monkeypatch: pytest.MonkeyPatch, **faults: Exception) -> FakeApi:
    api = FakeApi(**faults)
    monkeypatch.setattr(hub, "HfApi", api)
    return api


def test_uploads_a_folder_into_a_repository_that_it_makes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api = fake(monkeypatch)
    assert Hub("me/mine", private=True).upload(tmp_path) == "https://huggingface.co/me/mine"
    assert api.calls == [
        ("whoami", {}),
        ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/mine", "folder_path": str(tmp_path)}),
    ]


def test_the_real_hub_has_the_calls_of_the_fake_one() -> None:
    import inspect

    for name in ("whoami", "create_repo", "upload_folder"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(getattr(FakeApi, name)).parameters) <= set(real)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("whoami", LocalTokenNotFoundError("no token"), "must be logged in: .*hf auth login.*HF_TOKEN"),
        ("whoami", refused(401), r"refuses your token for me/mine \(401\)"),
        ("create_repo", refused(403), r"refuses your token for me/mine \(403\).* may write to it"),
        ("upload_folder", refused(500), "refuses me/mine: 500 Client Error"),
        ("create_repo", OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        ("create_repo", ConnectionError("no route"), "can't be reached: no route"),
        ("upload_folder", RuntimeError("DNS"), "can't be reached: DNS"),
    ],
)
def test_what_the_hub_raises_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, error: Exception, message: str
) -> None:
    fake(monkeypatch, **{call: error})
    with pytest.raises(ConfigError, match=message):
        Hub("me/mine").upload(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "me/my model", ""])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    api = fake(monkeypatch)
    with pytest.raises(ConfigError, match="must name a repository"):
        Hub(name)
    assert api.calls == []
