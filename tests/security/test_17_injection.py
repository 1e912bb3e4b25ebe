"""Row 17: a checkpoint's template runs in an immutable sandbox, one of a GGUF file too; there is no route that skips it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gguf.forge import STRING, model
from tests.security.conftest import Attacked
from tests.text.test_template_worker import ESCAPES
from weft.errors import EngineError
from weft.front.renderer import Renderer
from weft.front.text import ModelText

SAY = [{"role": "user", "content": "a"}]
RUN = "{{ %s.__init__.__globals__['os'].popen('touch MARK').read() }}"
ATTACKS = [
    *(RUN % name for name in ("cycler", "joiner", "namespace", "lipsum", "self")),
    "{{ ''.__class__.__mro__[1].__subclasses__()[104].__init__.__globals__['sys'].modules['os'].system('touch MARK') }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'Popen' %}{{ c('touch MARK', shell=True) }}"
    "{% endif %}{% endfor %}",
    "{{ (''|attr('\\x5f\\x5fclass\\x5f\\x5f')).mro()[1] }}",
    "{{ open('MARK', 'w') }}",
    *(one for one in ESCAPES if "globals" in one or "subclasses" in one),
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(seconds=2.0, memory_bytes=512 << 20)
    yield made
    made.close()


def rendered(text: ModelText) -> str:
    try:
        return text.template.render(SAY)
    except EngineError as error:
        return str(error)


def quiet(said: str) -> None:
    for leak in ("class '", "<function", "<module", "subprocess", "uid="):
        assert leak not in said


def test_in_a_folder(tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in bundled.iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            shutil.copy(path, tmp_path / path.name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for attack in ATTACKS:
        settings["chat_template"] = attack.replace("MARK", str(tmp_path / "mark"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        quiet(rendered(ModelText.load(tmp_path)))
        assert not (tmp_path / "mark").exists()


def test_in_a_gguf_file(tmp_path: Path) -> None:
    for attack in ATTACKS[:9]:
        template = attack.replace("MARK", str(tmp_path / "mark"))
        path = model().set("tokenizer.chat_template", STRING, template).write(tmp_path / "x.gguf")
        quiet(rendered(ModelText.load(path)))
        assert not (tmp_path / "mark").exists()


def test_routes_that_skipped_it_elsewhere_are_not_there(server: Attacked) -> None:
    with server.attacked():
        for path in ("/v1/rerank", "/rerank", "/v1/score", "/v2/rerank"):
            assert server.post(path, {"query": ATTACKS[0], "documents": ["a"]}).status_code == 404
