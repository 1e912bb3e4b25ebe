"""`weft serve --config`: flags from a file, refused where they are none, the command line before it; and who may be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from weft.cli import app as cli
from weft.cli._config_file import defaults
from weft.cli._guard import GuardFlags, is_loopback
from weft.errors import ConfigError

SERVE: Any = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
WHOLE = """
model = "bundled"
port = 9000
host = "127.0.0.1"
max_queue = 7
drain-timeout = 2.5
served-model-name = ["a", "b"]
with = "schedule=fair"
prefix-cache = false
share-prefixes = true
max-body = "1MB"
"""


def parsed(tmp_path: Path, text: str, *args: str) -> dict[str, Any]:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return dict(SERVE.make_context("serve", ["--config", str(path), *args]).params)


def test_every_kind_of_flag(tmp_path: Path) -> None:
    found = parsed(tmp_path, WHOLE)
    wanted = {
        "model": ["bundled"], "port": 9000, "max_queue": 7, "drain_timeout": 2.5, "served_model_name": ["a", "b"],
        "techniques": ["schedule=fair"], "prefix_cache": False, "share_prefixes": True, "max_body": "1MB",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_the_command_line_wins(tmp_path: Path) -> None:
    found = parsed(tmp_path, WHOLE, "other", "--port", "1", "--served-model-name", "c", "--prefix-cache")
    assert (found["model"], found["port"], found["prefix_cache"]) == (["other"], 1, True)
    assert found["served_model_name"] == ["c"]
    found = parsed(tmp_path, "no-prefix-cache = true\n")
    assert found["prefix_cache"] is False


def test_every_flag_has_its_name(tmp_path: Path) -> None:
    """Whatever the command takes, but the file itself and help, is known by its name."""
    for parameter in SERVE.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("--") and option not in ("--config", "--help"):
                value = "true" if parameter.is_flag else '["1"]' if parameter.multiple else '"1"'
                (tmp_path / "x.toml").write_text(f"{option[2:]} = {value}\n")
                (tmp_path / "x.toml").chmod(0o600)
                assert list(defaults(tmp_path / "x.toml", SERVE.params)) == [parameter.name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max-queu = 3", "did you mean max-queue"),
        ("apikeyfile = 'x'", "did you mean api-key-file"),
        ("qqqqqq = 1", "no flag --qqqqqq$"),
        ("config = 'x.toml'", "no flag --config"),
        ("port = true", "a number or a text"),
        ("port = [1]", "given once"),
        ("share-prefixes = 'yes'", "true or false"),
        ("[server]\nport = 1", "no flag --server"),
        ("port = {a = 1}", "a number or a text"),
        ("port = 1\n'max-queue' = 2\nmax_queue = 3", "said twice"),
        ("prefix-cache = true\nno-prefix-cache = true", "said twice"),
        ("port", "no TOML"),
        ("api-key = 'sesame'", "chmod 600"),
        ("admin_key = 'sesame'", "chmod 600"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parsed(tmp_path, text)
    assert "sesame" not in str(caught.value)


def test_values_are_checked_as_on_the_command_line(tmp_path: Path) -> None:
    for text in ("port = 'x'", "port = 70000", "port = 1.5", "max-queue = 0"):
        with pytest.raises(ConfigError, match=rf"\.toml: {text.partition(' ')[0]} = '.*': "):
            parsed(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        SERVE.make_context("serve", ["--config", str(tmp_path / "none.toml")])


# ---------------------------------------------------------------------------------------------- who may be served


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "llm.example.com", ""])
def test_what_others_reach_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"--api-key-file.*--no-auth"):
        GuardFlags().guard(host)
    with pytest.raises(ConfigError, match="--no-auth"):
        GuardFlags(admin_key="x").guard(host)
    assert not GuardFlags(no_auth=True).guard(host).keys
    assert GuardFlags(api_key="x").guard(host).keys.asks_clients
    (tmp_path / "keys").write_text("x\n")
    (tmp_path / "keys").chmod(0o600)
    assert GuardFlags(api_key_file=tmp_path / "keys").guard(host).keys.asks_clients
    monkeypatch.setenv("WEFT_API_KEY", "y")
    assert GuardFlags().guard(host).keys.find(b"y")
    with pytest.raises(ConfigError, match="leave one of them out"):
        GuardFlags(no_auth=True).guard(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_the_loopback_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    assert not GuardFlags().guard(host).keys


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_empty_key_is_no_key(host: str) -> None:
    """`--api-key "$KEY"` where KEY is not set must not serve without one."""
    for flags in (GuardFlags(api_key=""), GuardFlags(api_key="x", admin_key=" "), GuardFlags(api_key="", no_auth=True)):
        with pytest.raises(ConfigError, match="is empty"):
            flags.guard(host)


def test_halves_of_tls() -> None:
    with pytest.raises(ConfigError, match="go together"):
        GuardFlags(tls_cert=Path("x")).guard("127.0.0.1")
