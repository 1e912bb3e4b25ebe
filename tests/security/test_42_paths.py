"""Row 42: no request names a file of the server: there is no media path, and addresses of files are refused unread."""

from __future__ import annotations

from pathlib import Path

from tests.security.conftest import Attacked
from tests.security.test_26_media import refused_everywhere
from weft.cli.serve import serve

SECRET = "weft-knows-nothing-of-this"


def test_files_are_not_read(server: Attacked, tmp_path: Path) -> None:
    """Every spelling of a readable file's path, in every part that could name one; the last reading would show its time."""
    file = tmp_path / "secret.png"
    file.write_text(SECRET)
    places = [file.as_uri(), str(file), f"file:{file}", f"FILE://localhost{file}", "file:///etc/passwd", "../../../etc/passwd",
              "/proc/self/environ", "file:///proc/self/fd/0", "attachment://1", "file-" + "0" * 48]  # fmt: skip
    with server.attacked():
        for place in places:
            for part in (
                {"type": "image_url", "image_url": {"url": place}},
                {"type": "input_image", "image_url": place},
                {"type": "input_image", "file_id": place},
                {"type": "input_file", "file_url": place},
                {"type": "document", "source": {"type": "url", "url": place}},
                {"type": "audio_url", "audio_url": {"url": place}},
                {"type": "video_url", "video_url": {"url": place}},
            ):
                refused_everywhere(server, part)


def test_there_is_no_flag_for_it() -> None:
    import inspect

    names = set(inspect.signature(serve).parameters)
    assert "lora_root" in names
    assert not {name for name in names if "media" in name or "image" in name}
