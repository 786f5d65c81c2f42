from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.daemon.config import Config, describe, settable_keys
from lmd.daemon.config_docs import render_example, render_reference
from lmd.daemon.config_file import ConfigError, line_of, load_config, variable_of
from lmd.daemon.quantities import FOR_EVER

DOCS = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def load(home: Path, toml: str | None = None, **env: str) -> Config:
    if toml is not None:
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(toml)
    return load_config(env, uid=os.getuid(), user_home=Path("/home/ada"), home=home)


def refusal(home: Path, toml: str | None = None, **env: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(home, toml, **env)
    return str(caught.value)


def test_defaults_without_a_file(home: Path) -> None:
    config = load(home)
    assert config.file is None
    assert config.server.socket == home / "run" / "lmd.sock"
    assert config.store.path == home / "store"
    assert config.store.grace_period == timedelta(hours=1)
    assert config.runtime.keep_alive == timedelta(minutes=5)
    assert config.runtime.memory_reserve_bytes == 512 << 20
    assert config.runtime.kv_disk_bytes == 4 << 30
    assert config.pull.endpoint == "https://huggingface.co"
    assert config.pull.token is None
    assert config.aliases_file is None
    assert config.dirs.private == home / "run" / "private"


def test_a_file_is_read(home: Path) -> None:
    config = load(
        home,
        """
        [runtime]
        keep_alive = -1
        memory_reserve_bytes = "1GiB"
        kv_disk_bytes = 0
        [store]
        path = "~/models"
        [dropin]
        enabled = false
        """,
    )
    assert config.file == home / "config.toml"
    assert config.runtime.keep_alive == FOR_EVER
    assert config.runtime.memory_reserve_bytes == 1 << 30
    assert config.runtime.kv_disk_bytes == 0
    assert config.store.path == Path("/home/ada/models")
    assert config.dropin.enabled is False


def test_the_environment_wins_over_the_file(home: Path) -> None:
    config = load(
        home,
        "[runtime]\nslots = 2\n[pull]\nendpoint = 'https://a.example'",
        LMD_RUNTIME_SLOTS="8",
        LMD_DROPIN_ENABLED="no",
        LMD_RUNTIME_KEEP_ALIVE="-1",
        LMD_LOG_LEVEL="",
        HF_ENDPOINT="http://127.0.0.2:8080/",
    )
    assert config.runtime.slots == 8
    assert config.dropin.enabled is False
    assert config.runtime.keep_alive == FOR_EVER
    assert config.log.level == "info"
    assert config.pull.endpoint == "http://127.0.0.2:8080"


def test_shares_of_callers_are_a_table_or_a_line(home: Path) -> None:
    assert load(home).runtime.caller_weights == {}
    written = load(home, '[runtime.caller_weights]\n"uid:1000" = 2\n"uid:0" = 0.5\n')
    assert written.runtime.caller_weights == {"uid:1000": 2.0, "uid:0": 0.5}
    inline = load(home, '[runtime]\ncaller_weights = { "uid:7" = 100.0 }\n')
    assert inline.runtime.caller_weights == {"uid:7": 100.0}
    from_variable = load(home, LMD_RUNTIME_CALLER_WEIGHTS="uid:1=3, uid:2=0.25")
    assert from_variable.runtime.caller_weights == {"uid:1": 3.0, "uid:2": 0.25}


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('"ada" = 2', "'ada' is no caller"),
        ('"uid:01" = 2', "'uid:01' is no caller"),
        ('"uid:1" = 0', "the share of uid:1 must be a number from 0.01 to 100, not 0"),
        ('"uid:1" = nan', "not nan"),
        ('"uid:1" = true', "not True"),
        ('"uid:1" = "2"', "not '2'"),
    ],
)
def test_shares_of_callers_are_checked(home: Path, toml: str, says: str) -> None:
    message = refusal(home, f"[runtime]\nslots = 1\n[runtime.caller_weights]\n{toml}\n")
    assert f"{home}/config.toml, line 3: `runtime.caller_weights` = " in message
    assert says in message


def test_the_gateway_listens_where_it_is_told(home: Path) -> None:
    assert load(home).http.listen == ("127.0.0.1:11434",)
    config = load(home, '[http]\nlisten = ["localhost", "[::1]:80", "::1", "0.0.0.0:0"]\n')
    assert config.http.listen == ("127.0.0.1:11434", "[::1]:80", "[::1]:11434", "0.0.0.0:0")
    config = load(home, LMD_HTTP_LISTEN="127.0.0.1:1, [::1]:2", LMD_HTTP_ALLOWED_HOSTS="A.example *.b.example")
    assert config.http.listen == ("127.0.0.1:1", "[::1]:2")
    assert config.http.allowed_hosts == ("a.example", "*.b.example")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('listen = ["example.org:80"]', "'example.org' is no IP address; names are not looked up"),
        ('listen = ["127.0.0.1:99999"]', "'99999' is no port"),
        ('listen = ["127.0.0.1:"]', "'' is no port"),
        ('listen = ["[::1]80"]', "is no IP address"),
        ("listen = []", "no address is named"),
        ("listen = 11434", "not a list of texts"),
        ('allowed_origins = ["*"]', "'*' is no origin"),
        ('allowed_origins = ["https://*"]', "https://* would let every web page use the models"),
        ('allowed_origins = ["https://*.example.org"]', "is no origin"),
        ('allowed_origins = ["example.org"]', "is no origin"),
        ('allowed_hosts = ["*"]', "'*' is no host name"),
        ('allowed_hosts = ["https://example.org"]', "write it without scheme and port"),
        ('users = "nobody"', '"socket" or "all"'),
        ('max_body_bytes = "10B"', "greater than or equal to 1024"),
    ],
)
def test_settings_of_the_gateway_are_checked(home: Path, toml: str, says: str) -> None:
    message = refusal(home, f"[http]\n{toml}\n")
    assert f"{home}/config.toml, line 2: `http.{toml.split()[0]}` = " in message
    assert says in message


def test_our_own_variable_beats_the_shared_one(home: Path) -> None:
    config = load(
        home, HF_ENDPOINT="https://a.example", LMD_PULL_ENDPOINT="https://b.example", LMD_SOCKET="/run/x.sock"
    )
    assert config.pull.endpoint == "https://b.example"
    assert config.server.socket == Path("/run/x.sock")


@pytest.mark.parametrize("key", settable_keys(), ids=".".join)
def test_every_key_has_a_variable_that_reaches_it(home: Path, key: tuple[str, ...]) -> None:
    message = refusal(home, **{variable_of(key): "\t"})
    assert variable_of(key) in message
    assert ".".join(key) in message
    assert describe(key)[1] in message


def test_a_wrong_value_names_file_line_key_value_and_what_is_legal(home: Path) -> None:
    message = refusal(home, '# my settings\n[runtime]\nnum_ctx = 2048\n\nslots = 0\nkeep_alive = "5 minutes"\n')
    slots, keep_alive = message.splitlines()
    assert slots.startswith(f"{home}/config.toml, line 5: `runtime.slots` = 0: ")
    assert slots.endswith("legal is a whole number from 1 to 64")
    assert keep_alive.startswith(f"{home}/config.toml, line 6: `runtime.keep_alive` = '5 minutes': ")
    assert '"-1" for ever' in keep_alive


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[runtime]\nslots = '4'", "line 2: `runtime.slots` = '4'"),
        ("[runtime]\nslots = true", "line 2: `runtime.slots` = true"),
        ("[dropin]\nenabled = 1", "line 2: `dropin.enabled` = 1"),
        ("[log]\nlevel = 'loud'", 'legal is "debug", "info", "warning" or "error"'),
        ("[store]\npath = 'models'", "not an absolute path"),
        ("[store]\ngrace_period = -1", "out of range 0s to 365d"),
        ("[runtime]\ndrain_timeout = 30", "no unit"),
        ("[pull]\nendpoint = 'http://hub.example'", "http without TLS is only for this machine"),
        ("[pull]\nendpoint = 'https://u:p@hub.example'", "= 'https://***@hub.example': a URL with a user name"),
        ("[pull]\nendpoint = 'ftp://hub.example'", "not an http(s) URL"),
        ("aliases_file = '/nowhere/at/all'", "line 1: /nowhere/at/all is not a file"),
        ("[runtime]\nslot = 4", "line 2: unknown key `runtime.slot`; did you mean `runtime.slots`"),
        ("[runtimes]\nslots = 4", "line 1: unknown table [runtimes]; did you mean `runtime`?"),
        ("slots = 4", "line 1: unknown key `slots`"),
        ("[runtime.deep]\nslots = 4", "line 1: unknown key `runtime.deep`"),
        ("runtime = 4", "line 1: `runtime` is a table: write [runtime]"),
        ("[runtime]\nslots = ", "line 2: not TOML: Invalid value"),
        ("[runtime\nslots = 4", "line 1: not TOML"),
        ("[runtime]\nslots = 4\nslots = 5", "not TOML: Cannot overwrite a value"),
    ],
)
def test_mistakes_in_a_file(home: Path, toml: str, says: str) -> None:
    message = refusal(home, toml)
    assert message.startswith(str(home / "config.toml"))
    assert says in message


def test_an_unknown_variable_in_our_name_is_refused(home: Path) -> None:
    message = refusal(home, LMD_RUNTIME_SLOT="4")
    assert "environment variable LMD_RUNTIME_SLOT: unknown setting; did you mean `LMD_RUNTIME_SLOTS`" in message


def test_every_mistake_is_told_at_once(home: Path) -> None:
    message = refusal(home, "[runtime]\nslot = 4\n[pul]\nx = 1", LMD_LOG_LEVL="info")
    assert len(message.splitlines()) == 3


def test_the_line_of_a_key_is_not_fooled_by_text_that_looks_like_it() -> None:
    text = '# slots = 1\n[log]\nfile = """\n[runtime]\nslots = 3"""\n[ runtime ]\n"num_ctx" = 1\nslots = 9\n'
    assert line_of(text, ("runtime", "slots")) == 8
    assert line_of(text, ("runtime", "num_ctx")) == 7
    assert line_of(text, ("log", "file")) == 3
    assert line_of("runtime.slots = 9", ("runtime", "slots")) == 1


@given(st.text(max_size=60))
def test_any_text_as_a_file_is_a_config_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.toml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            load(Path(directory))


def test_a_named_file_must_exist(home: Path) -> None:
    assert "there is no such file" in refusal(home, LMD_CONFIG=str(home / "other.toml"))


def test_a_directory_or_a_large_or_a_binary_file_is_refused(tmp_path: Path, home: Path) -> None:
    assert "cannot be read" in refusal(home, LMD_CONFIG=str(tmp_path))
    large = tmp_path / "large.toml"
    large.write_text("#" * 70_000)
    assert "larger than" in refusal(home, LMD_CONFIG=str(large))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"# ok\n\xff\xfe")
    assert "line 2: not UTF-8" in refusal(home, LMD_CONFIG=str(binary))


def test_systemds_directories_are_used(tmp_path: Path) -> None:
    env = {
        "RUNTIME_DIRECTORY": "/run/lmd",
        "STATE_DIRECTORY": "/var/lib/lmd:/var/lib/other",
        "CONFIGURATION_DIRECTORY": str(tmp_path),
        "LOGS_DIRECTORY": "/var/log/lmd",
    }
    (tmp_path / "config.toml").write_text("[runtime]\nslots = 7")
    (tmp_path / "aliases.toml").write_text("")
    config = load_config(env, uid=0, user_home=Path("/root"))
    assert config.server.socket == Path("/run/lmd/lmd.sock")
    assert config.store.path == Path("/var/lib/lmd/store")
    assert config.runtime.slots == 7
    assert config.aliases_file == tmp_path / "aliases.toml"
    assert config.dirs.log == Path("/var/log/lmd")


def test_a_users_places_follow_xdg() -> None:
    config = load_config({"XDG_RUNTIME_DIR": "/run/user/1000"}, uid=1000, user_home=Path("/home/ada"))
    assert config.server.socket == Path("/run/user/1000/lmd/lmd.sock")
    assert config.store.path == Path("/home/ada/.local/share/lmd/store")
    assert config.dirs.config == Path("/home/ada/.config/lmd")
    assert load_config({}, uid=1000, user_home=Path("/home/ada")).dirs.runtime == Path("/tmp/lmd-1000")


def test_pulls_use_the_proxies_of_the_machine_and_do_not_show_their_password(home: Path) -> None:
    config = load(home, HTTPS_PROXY="http://u:pass@a:1", https_proxy="http://u:pass@b:2", no_proxy="localhost")
    assert config.pull.proxies == {"https": "http://u:pass@b:2", "no": "localhost"}
    assert "pass@" not in f"{config!r} {config.model_dump()}"


SECRET = "hf_abcdefghijklmnop"


def test_the_token_is_taken_from_the_first_place_that_has_one(tmp_path: Path, home: Path) -> None:
    (tmp_path / "hf_token").write_text("hf_credential\n")
    token_file = tmp_path / "token"
    token_file.write_text("hf_file\n")
    token_file.chmod(0o600)
    toml = f"[pull]\ntoken_file = '{token_file}'"

    def token(**env: str) -> str:
        secret = load(home, toml, **env).pull.token
        assert secret is not None
        return secret.get_secret_value()

    assert token() == "hf_file"
    assert token(CREDENTIALS_DIRECTORY=str(tmp_path)) == "hf_credential"
    assert token(CREDENTIALS_DIRECTORY=str(tmp_path), HF_TOKEN=SECRET) == SECRET


def test_the_token_shows_nowhere(home: Path) -> None:
    config = load(home, HF_TOKEN=SECRET)
    assert SECRET not in f"{config!r} {config!s} {config.model_dump()} {config.model_dump_json()}"


def test_a_refused_token_is_not_shown(home: Path) -> None:
    assert SECRET not in refusal(home, HF_TOKEN=f"{SECRET} twice")
    message = refusal(home, f"[pull]\ntoken = '{SECRET}'")
    assert SECRET not in message
    assert "does not belong into this file" in message


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path, home: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(SECRET)
    token_file.chmod(0o644)
    message = refusal(home, f"[pull]\ntoken_file = '{token_file}'")
    assert "line 2" in message
    assert f"chmod 600 {token_file}" in message
    assert "no token can be read" in refusal(home, "[pull]\ntoken_file = '/nowhere/token'")


def test_a_config_cannot_be_changed(home: Path) -> None:
    config = load(home)
    with pytest.raises(ValueError, match="frozen"):
        config.runtime.slots = 9


@pytest.mark.parametrize("key", settable_keys(), ids=".".join)
def test_every_key_is_in_the_reference_and_in_the_sample(key: tuple[str, ...]) -> None:
    reference = (DOCS / "configuration.md").read_text()
    sample = (DOCS / "config.example.toml").read_text()
    assert f"### `{'.'.join(key)}`" in reference
    assert f"`{variable_of(key)}`" in reference
    assert f"\n#{key[-1]} = " in sample


def test_the_documents_are_what_the_settings_say() -> None:
    assert (DOCS / "configuration.md").read_text() == render_reference(), "run python -m lmd.daemon.config_docs"
    assert (DOCS / "config.example.toml").read_text() == render_example(), "run python -m lmd.daemon.config_docs"


def test_the_sample_with_every_default_switched_on_changes_nothing(home: Path) -> None:
    lines = (DOCS / "config.example.toml").read_text().splitlines()
    toml = "\n".join(line.removeprefix("#") if line.startswith("#") and line[1] != " " else line for line in lines)
    document = tomllib.loads(toml)
    document.pop("aliases_file")
    places = [
        (section, key)
        for section, table in document.items()
        for key, value in table.items()
        if str(value).startswith("/path/to/")
    ]
    assert places == [
        ("server", "socket"),
        ("store", "path"),
        ("pull", "token_file"),
        ("dropin", "path"),
        ("http", "tokens_file"),
        ("log", "file"),
    ]
    kept = "\n".join(line for line in toml.splitlines() if "/path/to/" not in line)
    assert load(home, kept).model_copy(update={"file": None}) == load(home, "").model_copy(update={"file": None})


def test_the_daemons_settings_load_without_the_engine() -> None:
    code = "import lmd.daemon.config_file, sys; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"llama_cpp", "numpy", "jinja2", "huggingface_hub", "grpc"} & set(out)
