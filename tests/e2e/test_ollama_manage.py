"""Ollama's management routes, driven by its own Python package and by curl as its documentation shows it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import gguf
import httpx
import ollama
import pytest

from tests.support.hub import HubServer, Stall
from tests.support.management import Managed, managed
from tests.support.product import wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_adapters import make_tiny_adapter, merge
from tests.support.tiny_models import make_tiny_bert, make_tiny_llama

pytestmark = pytest.mark.e2e

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def daemon(lmd_home: Path, hub: HubServer) -> Iterator[Managed]:
    with managed(lmd_home, hub) as made:
        yield made


@pytest.fixture
def client(daemon: Managed) -> Iterator[ollama.Client]:
    with ollama.Client(daemon.url) as made:
        yield made


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [make_tiny_llama(folder / f"tiny-{seed}.gguf", seed=seed, chat_template=TEMPLATE) for seed in (1, 2)]


def test_a_model_is_pulled_listed_shown_run_copied_and_removed(client: ollama.Client) -> None:
    assert client.list().models == []
    steps = [(step.status, step.completed, step.total) for step in client.pull("hf.co/test/stories", stream=True)]
    size = STORIES.stat().st_size
    statuses = list(dict.fromkeys(status for status, _, _ in steps))
    layer = statuses[1]
    assert statuses == [
        "pulling manifest",
        layer,
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert [step for step in steps if step[0] == layer][-1] == (layer, size, size)
    (model,) = client.list().models
    assert (model.model, len(model.digest or "")) == ("hf.co/test/stories:latest", 64)
    assert model.modified_at is not None
    assert abs(datetime.now(UTC) - model.modified_at) < timedelta(minutes=10)
    shown = client.show("hf.co/test/stories")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.parameter_count"] == 292_800
    assert shown.details is not None
    assert (shown.details.family, shown.details.parameter_size, shown.details.format) == ("llama", "293K", "gguf")
    assert shown.capabilities == ["completion"]

    assert client.ps().models == []
    client.generate("hf.co/test/stories", "Once upon", options={"num_predict": 2}, keep_alive="10m")
    (loaded,) = client.ps().models
    assert (loaded.name, loaded.digest) == (model.model, model.digest)
    assert (loaded.size or 0) > size / 2
    assert loaded.expires_at is not None
    assert timedelta(minutes=9) < loaded.expires_at - datetime.now(UTC) <= timedelta(minutes=10)

    assert client.copy("hf.co/test/stories", "me/tale:v1").status == "success"
    assert {each.model for each in client.list().models} == {model.model, "me/tale:v1"}
    assert client.delete("hf.co/test/stories").status == "success"
    assert client.delete("me/tale:v1").status == "success"
    assert client.list().models == []


def test_models_are_made_of_uploaded_files_and_of_other_models(client: ollama.Client, tiny_files: list[Path]) -> None:
    digest = client.create_blob(tiny_files[0])
    statuses = [
        step.status
        for step in client.create(
            "base",
            files={"tiny.gguf": digest},
            system="Be brief.",
            parameters={"temperature": 0.5, "stop": ["END", "\n\n"], "num_ctx": 64},
            messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            license=["MIT", "and thanks"],
            stream=True,
        )
    ]
    assert statuses == ["parsing GGUF", f"using existing layer {digest}", "writing manifest", "success"]
    made = client.create("child", from_="base", template="{{ messages[0].content }}", parameters={"seed": 7})
    assert made.status == "success"
    shown = client.show("child")
    assert shown.template == "{{ messages[0].content }}"
    assert (shown.license or "").splitlines()[:1] == ["MIT"]
    assert shown.parameters == "\n".join(
        (
            f"{'num_ctx':<30} 64",
            f"{'seed':<30} 7",
            f'{"stop":<30} "END"',
            f'{"stop":<30} "\\n\\n"',
            f"{'temperature':<30} 0.5",
        )
    )
    assert [model.model for model in client.list().models] == ["child:latest", "base:latest"]


def test_an_adapter_is_added_to_a_model(client: ollama.Client, tiny_files: list[Path], tmp_path: Path) -> None:
    client.create("base", files={"tiny.gguf": client.create_blob(tiny_files[0])})
    fits = make_tiny_adapter(tmp_path / "fits.gguf", tiny_files[0])
    wide = make_tiny_adapter(tmp_path / "wide.gguf", tiny_files[0], widen=32)
    client.create("adapted", from_="base", adapters={"fits.gguf": client.create_blob(fits)})
    options = {"temperature": 0, "num_predict": 20, "num_ctx": 64}
    merged = merge(tmp_path / "merged.gguf", tiny_files[0], [(fits, 1.0)])
    client.create("merged", files={"merged.gguf": client.create_blob(merged)})
    names = ("base", "adapted", "merged")
    texts = {name: client.generate(name, "the people", options=options).response for name in names}
    assert texts["adapted"] == texts["merged"] != texts["base"]
    with pytest.raises(ollama.ResponseError, match="96 x 64, and the model's is of 64 x 64") as refused:
        client.create("bad", from_="base", adapters={"wide.gguf": client.create_blob(wide)})
    assert refused.value.status_code == 400


def test_a_model_that_is_not_here_is_pulled_to_build_on_it(client: ollama.Client) -> None:
    steps = [step.status for step in client.create("mine", from_="hf.co/test/chat", system="x", stream=True)]
    assert steps[0] == "pulling manifest"
    assert steps[-2:] == ["writing manifest", "success"]
    assert sorted(model.model or "" for model in client.list().models) == ["hf.co/test/chat:latest", "mine:latest"]


async def test_the_asynchronous_client_does_the_same(daemon: Managed, tiny_files: list[Path]) -> None:
    async with ollama.AsyncClient(daemon.url) as client:
        await _use(client, tiny_files)


async def _use(client: ollama.AsyncClient, tiny_files: list[Path]) -> None:
    # Its uploads do not tell their size.
    digests = await asyncio.gather(*(client.create_blob(file) for file in tiny_files))
    for name, file, digest in zip(("one", "two"), tiny_files, digests, strict=True):
        await client.create(name, files={file.name: digest})
    pulled = await client.pull("hf.co/test/stories")
    assert pulled.status == "success"
    assert [model.model for model in (await client.list()).models] == [
        "hf.co/test/stories:latest",
        "two:latest",
        "one:latest",
    ]
    assert (await client.show("one")).modelinfo
    await client.copy("one", "three")
    await client.delete("one")
    assert (await client.ps()).models == []
    with pytest.raises(ollama.ResponseError, match="model 'one' not found") as missing:
        await client.delete("one")
    assert missing.value.status_code == 404
    async for step in await client.create("four", from_="three", stream=True):
        last = step.status
    assert last == "success"


def test_errors_reach_the_user_of_the_package(client: ollama.Client, tiny_files: list[Path]) -> None:
    client.create("mine", files={"tiny.gguf": client.create_blob(tiny_files[0])})
    with pytest.raises(ollama.ResponseError, match="cannot push models") as pushed:
        client.push("mine")
    assert pushed.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="cannot push models"):
        list(client.push("mine", stream=True))
    with pytest.raises(ollama.ResponseError, match=re.escape("model 'nope:latest' not found")):
        client.show("nope")
    for name in ("nope", "hf.co/test/nope"):
        with pytest.raises(ollama.ResponseError, match=r"^pull model manifest: file does not exist") as pulled:
            client.pull(name)
        assert pulled.value.status_code == 500
        # The stream has begun by then.
        with pytest.raises(ollama.ResponseError, match=r"^pull model manifest: file does not exist"):
            list(client.pull(name, stream=True))
    with pytest.raises(ollama.ResponseError, match="is no quantization") as refused:
        client.create("small", from_="mine", quantize="q4_K_XXL")
    assert refused.value.status_code == 400


def test_a_model_is_quantized_for_the_user_of_the_package(client: ollama.Client, tiny_files: list[Path]) -> None:
    client.create("mine", files={"tiny.gguf": client.create_blob(tiny_files[0])})
    steps = list(client.create("small", from_="mine", quantize="q8_0", stream=True))
    quantizing = [step for step in steps if step.status == "quantizing F32 model to Q8_0"]
    assert quantizing[-1].total
    assert quantizing[-1].completed == quantizing[-1].total
    assert steps[-1].status == "success"
    details = client.show("small").details
    assert details is not None
    assert details.quantization_level == "Q8_0"
    with pytest.raises(ollama.ResponseError, match="quantized already"):
        client.create("smaller", from_="small", quantize="q4_0")


def test_the_list_is_never_out_of_date(daemon: Managed, tiny_files: list[Path]) -> None:
    """It is kept between requests, so everything that changes it is tried: both interfaces, and no change."""
    daemon.add("one", tiny_files[0])
    assert daemon.names() == ["one:latest"]
    daemon.product.lm("cp", "one", "two")
    assert daemon.names() == ["two:latest", "one:latest"]
    daemon.add("one", tiny_files[1])
    assert daemon.names() == ["one:latest", "two:latest"]
    daemon.product.lm("rm", "two")
    assert daemon.names() == ["one:latest"]
    before = daemon.request("GET", "/api/tags").json()
    daemon.add("one", tiny_files[1])
    assert daemon.request("GET", "/api/tags").json() == before
    daemon.add("one", tiny_files[1], system="changed")
    assert daemon.request("GET", "/api/tags").json() != before


def test_what_tags_and_ps_always_have(daemon: Managed, tiny_files: list[Path], tmp_path: Path) -> None:
    daemon.add("chat", tiny_files[0])
    daemon.add("embed", make_tiny_bert(tmp_path / "bert.gguf", pooling=gguf.PoolingType.CLS))
    tags = daemon.request("GET", "/api/tags").json()["models"]
    for model in tags:
        assert set(model) == {"name", "model", "modified_at", "size", "digest", "details", "capabilities"}
        assert set(model["details"]) >= {
            "parent_model",
            "format",
            "family",
            "families",
            "parameter_size",
            "quantization_level",
        }
        assert datetime.fromisoformat(model["modified_at"]).tzinfo is not None
        assert len(bytes.fromhex(model["digest"])) == 32
    assert [(model["name"], model["capabilities"]) for model in tags] == [
        ("embed:latest", ["embedding"]),
        ("chat:latest", ["completion"]),
    ]
    # One stays for ever, the other for an hour.
    daemon.request("POST", "/api/generate", {"model": "chat", "keep_alive": "1h"})
    daemon.request("POST", "/api/embed", {"model": "embed", "input": "hi", "keep_alive": -1})
    loaded = daemon.request("GET", "/api/ps").json()["models"]
    assert [model["name"] for model in loaded] == ["embed:latest", "chat:latest"]
    for model in loaded:
        assert set(model) == {
            "name",
            "model",
            "size",
            "digest",
            "details",
            "expires_at",
            "size_vram",
            "context_length",
        }
    assert datetime.fromisoformat(loaded[0]["expires_at"]).year > 2300
    assert loaded[0]["digest"] == tags[0]["digest"]


def test_show_has_all_of_a_model_when_it_is_verbose(daemon: Managed, tiny_files: list[Path]) -> None:
    daemon.add("mine", tiny_files[0])
    short = daemon.request("POST", "/api/show", {"name": "MINE:LATEST"}).json()
    assert short["model_info"]["tokenizer.ggml.tokens"] == []
    assert short["model_info"]["llama.attention.layer_norm_rms_epsilon"] == 1e-05
    assert not {"general.name", "tokenizer.chat_template"} & short["model_info"].keys()
    assert "tensors" not in short
    assert short["template"] == TEMPLATE
    whole = daemon.request("POST", "/api/show", {"model": "mine", "verbose": True}).json()
    header = gguf.GGUFReader(tiny_files[0])
    tokens = header.fields["tokenizer.ggml.tokens"].contents()
    assert whole["model_info"]["tokenizer.ggml.tokens"] == tokens
    assert [(tensor["name"], tensor["type"], tensor["shape"]) for tensor in whole["tensors"]] == [
        (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) for tensor in header.tensors
    ]
    assert {key: value for key, value in whole.items() if key not in ("model_info", "tensors")} == {
        key: value for key, value in short.items() if key != "model_info"
    }
    overridden = daemon.request("POST", "/api/show", {"model": "mine", "system": "other", "template": "{{ x }}"}).json()
    assert (overridden["system"], overridden["template"]) == ("other", "{{ x }}")


def test_copilot_shows_the_name_of_the_model(daemon: Managed, tiny_files: list[Path]) -> None:
    daemon.add("mine", tiny_files[0])
    answer = daemon.request(
        "POST", "/api/show", {"model": "mine:latest"}, headers={"user-agent": "GitHubCopilotChat/0.30"}
    )
    assert answer.json()["model_info"]["general.basename"] == "mine:latest"
    assert "general.basename" not in daemon.request("POST", "/api/show", {"model": "mine"}).json()["model_info"]


def test_a_modelfile_that_was_shown_makes_the_same_model_again(daemon: Managed, tiny_files: list[Path]) -> None:
    daemon.add("mine", tiny_files[0], system="x")
    shown = daemon.request("POST", "/api/show", {"model": "mine"}).json()
    base = next(line.removeprefix("FROM ") for line in shown["modelfile"].splitlines() if line.startswith("FROM "))
    body = {"model": "again", "from": base, "system": "x", "stream": False}
    assert daemon.request("POST", "/api/create", body).json() == {"status": "success"}
    first, second = daemon.request("GET", "/api/tags").json()["models"]
    assert first["digest"] == second["digest"]


def test_a_pull_stops_when_the_last_who_waits_for_it_leaves(daemon: Managed) -> None:
    daemon.hub.fault("test/stories", None, Stall(100_000))

    with daemon.http() as first, daemon.http() as second:
        body = {"model": "hf.co/test/stories"}
        with first.stream("POST", "/api/pull", json=body) as one:
            # A generator that is dropped closes the connection.
            lines = one.iter_lines()
            assert json.loads(next(lines)) == {"status": "pulling manifest"}
            with second.stream("POST", "/api/pull", json=body) as two:
                assert json.loads(next(two.iter_lines())) == {"status": "pulling manifest"}
            wait_until(lambda: _watchers(daemon) == [1], "the second has left, and the pull goes on")
            assert json.loads(next(lines))["total"] == STORIES.stat().st_size
        wait_until(lambda: _watchers(daemon) == [], "the first has left, and the pull has stopped")
    # One who waits for the end alone holds the pull in the same way, until it goes.
    with pytest.raises(httpx.ReadTimeout), daemon.http() as impatient:
        impatient.post("/api/pull", json=body | {"stream": False}, timeout=1.0)
    wait_until(lambda: _watchers(daemon) == [], "the pull has stopped again")
    daemon.hub.faults.clear()
    assert daemon.steps("/api/pull", body)[-1] == {"status": "success"}


def _watchers(daemon: Managed) -> list[int]:
    pulls = daemon.product.json("pull", "--list")
    return [pull["watchers"] for pull in pulls if pull["state"] == "active"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_as_in_the_documentation(daemon: Managed, tiny_files: list[Path]) -> None:
    def curl(*args: str) -> tuple[int, str]:
        command = ["curl", "-sS", "-m", "60", "-w", "\n%{http_code}", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text, _, status = done.stdout.rpartition("\n")
        return int(status), text

    url = daemon.url
    assert curl(url) == (200, "Ollama is running")
    status, text = curl(f"{url}/api/version")
    assert (status, json.loads(text)["version"].count(".")) == (200, 2)
    digest = daemon.upload(tiny_files[1])
    assert curl("-I", f"{url}/api/blobs/{digest}")[0] == 200
    assert curl("-I", f"{url}/api/blobs/sha256:{'0' * 64}")[0] == 404
    assert curl("-T", str(tiny_files[1]), "-X", "POST", f"{url}/api/blobs/{digest}")[0] == 200
    # curl says that this is a form; so it does in the documentation.
    body = json.dumps({"model": "mario", "files": {"x.gguf": digest}, "system": "You are Mario."})
    status, text = curl(f"{url}/api/create", "-d", body)
    assert (status, json.loads(text.splitlines()[-1])) == (200, {"status": "success"})
    assert json.loads(curl(f"{url}/api/tags")[1])["models"][0]["name"] == "mario:latest"
    assert json.loads(curl(f"{url}/api/show", "-d", '{"model": "mario"}')[1])["system"] == "You are Mario."
    assert curl(f"{url}/api/copy", "-d", '{"source": "mario", "destination": "mario-backup"}') == (200, "")
    assert curl("-X", "DELETE", f"{url}/api/delete", "-d", '{"model": "mario-backup"}') == (200, "")
    assert curl("-X", "DELETE", f"{url}/api/delete", "-d", '{"name": "mario-backup"}')[0] == 404
    status, text = curl(f"{url}/api/pull", "-d", '{"model": "hf.co/test/stories"}')
    assert (status, json.loads(text.splitlines()[-1])) == (200, {"status": "success"})
    for path in ("/", "/api/version", "/api/tags"):
        assert curl("-I", f"{url}{path}")[0] == 200
