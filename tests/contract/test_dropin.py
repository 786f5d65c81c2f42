from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.catalog import Catalog
from lmd.daemon.creating import make_quantized
from lmd.daemon.dropin import DropIn
from lmd.daemon.dropin_state import DropInState, Made
from lmd.daemon.errors import QuantizeFailed
from lmd.daemon.names import Names
from lmd.daemon.quantizer import Quantizer, Wanted
from lmd.daemon.settling import Timing
from lmd.daemon.writers import has_writer
from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.model_store import read_blob_header
from lmd.registry.store import Store, TagRecord
from tests.support.tiny_models import make_tiny_llama, split_model

DEADLINE_S = 30.0
# Events have to do the work: without them a test would run into its deadline.
TIMING = Timing(settle_s=0.05, blind_settle_s=0.5, rescan_s=600.0)


async def until(condition: Callable[[], object], what: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline, f"still not: {what}"
        await asyncio.sleep(0.01)


@dataclass
class Scene:
    """A store and the folder; *model(n)* gives one of several different GGUF files."""

    root: Path
    store: Store
    pool: BlockingPool

    @property
    def folder(self) -> Path:
        return self.root / "dropin"

    @property
    def names(self) -> Names:
        return Names(self.store, AliasTable.load())

    def model(self, number: int = 1) -> Path:
        path = self.root / f"model{number}.gguf"
        return path if path.exists() else make_tiny_llama(path, seed=number, name=f"tiny {number}")

    def put(self, name: str, number: int = 1) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.model(number), path)
        return path

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def weights(self, name: str) -> Digest | None:
        """The digest of the weights that *name* stands for; None when there is no such model."""
        tag = self.store.get_tag(name)
        return None if tag is None else self.store.get_manifest(tag.manifest).weights[0].digest

    def system(self, name: str) -> str | None:
        """The system prompt of the model *name*; None when there is no such model."""
        tag = self.store.get_tag(name)
        return None if tag is None else self.store.get_manifest(tag.manifest).lm.system

    def is_model(self, name: str, number: int) -> bool:
        return self.weights(name) == Digest.of(self.model(number).read_bytes())

    @asynccontextmanager
    async def running(self, timing: Timing = TIMING) -> AsyncIterator[DropIn]:
        catalog = Catalog(self.store, AliasTable.load(), self.pool)
        quantizer = Quantizer(self.store, self.pool, self.root / "views")
        quantize = partial(make_quantized, catalog, quantizer, note="folder")
        dropin = DropIn(self.store, self.names, self.pool, self.folder, quantize, timing=timing)
        await dropin.start()
        try:
            yield dropin
        finally:
            await dropin.stop()
            await catalog.stop()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    store = Store.open(tmp_path / "store")
    pool = BlockingPool(2)
    yield Scene(tmp_path, store, pool)
    pool.close()
    store.close()


async def test_the_folder_is_made_for_its_owner(scene: Scene) -> None:
    async with scene.running():
        assert scene.folder.stat().st_mode & 0o777 == 0o700


async def test_a_gguf_becomes_a_model_and_goes_with_its_file(scene: Scene) -> None:
    async with scene.running() as dropin:
        path = scene.put("Tiny Model.Q8_0.gguf")
        await until(lambda: scene.is_model("tiny-model.q8_0:latest", 1), "the model is there")
        assert dropin.problems == {}
        path.unlink()
        await until(lambda: scene.weights("tiny-model.q8_0:latest") is None, "the model is gone")
        await until(lambda: scene.store.usage().blobs == 0, "its bytes are gone")


async def test_a_file_moved_in_becomes_a_model(scene: Scene) -> None:
    async with scene.running():
        partial = scene.put("a.gguf.part")
        partial.rename(scene.folder / "a.gguf")
        shutil.copyfile(scene.model(2), scene.root / "outside")
        (scene.root / "outside").rename(scene.folder / "b.gguf")
        await until(lambda: scene.is_model("a:latest", 1), "the renamed one")
        await until(lambda: scene.is_model("b:latest", 2), "the one from outside")


async def test_a_half_copied_file_waits_however_long_the_writer_pauses(scene: Scene) -> None:
    data = scene.model().read_bytes()
    async with scene.running() as dropin:
        path = scene.folder / "slow.gguf"
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            if has_writer(path) is None:
                pytest.skip("this file system does not tell who writes")
            await until(lambda: "slow.gguf" in dropin.waiting, "the half file was looked at")
            looks = 5
            for number in range(looks):
                # Each of these makes the folder be looked at again while the writer does nothing.
                scene.put(f"other{number}.gguf", 2)
                await until(partial(scene.weights, f"other{number}:latest"), "the others do not wait")
            assert scene.weights("slow:latest") is None
            assert dropin.waiting["slow.gguf"] == "slow.gguf is being written"
            file.write(data[len(data) // 2 :])
        await until(lambda: scene.is_model("slow:latest", 1), "the whole file")
        assert dropin.problems == {}


async def test_an_edit_replaces_the_model_and_there_always_is_one(scene: Scene) -> None:
    async with scene.running():
        path = scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the first version")
        # As editors do it: the old file away, the new one in its place.
        path.rename(scene.folder / "a.gguf~")
        scene.put("a.gguf", 2)
        missing: list[bool] = []

        def replaced() -> bool:
            missing.append(scene.weights("a:latest") is None)
            return scene.is_model("a:latest", 2)

        await until(replaced, "the second version")
        assert not any(missing)
        # In place.
        path.write_bytes(scene.model(3).read_bytes())
        await until(lambda: scene.is_model("a:latest", 3), "the third version")


async def test_a_bad_file_is_reported_once_and_keeps_nobody_from_the_rest(scene: Scene) -> None:
    with capture_logs() as logs:
        async with scene.running() as dropin:
            path = scene.put("a.gguf", 1)
            await until(lambda: scene.is_model("a:latest", 1), "a good file")
            path.write_bytes(b"GGUF and then nonsense")
            scene.write("empty.gguf", "")
            await until(lambda: set(dropin.problems) == {"a.gguf", "empty.gguf"}, "both are reported")
            assert "GGUF" in dropin.problems["a.gguf"]
            assert scene.is_model("a:latest", 1), "the version before stays"
            scene.put("good.gguf", 2)
            await until(lambda: scene.is_model("good:latest", 2), "a good file beside bad ones")
            refused = [entry["file"] for entry in logs if entry["event"] == "dropin_file_refused"]
            assert sorted(refused) == ["a.gguf", "empty.gguf"]
            path.write_bytes(scene.model(3).read_bytes())
            await until(lambda: scene.is_model("a:latest", 3), "it is mended")
            await until(lambda: "a.gguf" not in dropin.problems, "and no problem any more")


async def test_what_is_no_regular_file_is_refused_and_never_opened(scene: Scene) -> None:
    scene.folder.mkdir()
    (scene.folder / "link.gguf").symlink_to(scene.model())
    os.mkfifo(scene.folder / "fifo.gguf")
    (scene.folder / "folder.gguf").mkdir()
    async with scene.running() as dropin:
        await until(lambda: len(dropin.problems) == 3, "all three are reported")
        scene.put("good.gguf")
        await until(lambda: scene.is_model("good:latest", 1), "the regular file")
        assert [tag.name for tag in scene.store.list_tags()] == ["good:latest"]


async def test_shards_wait_for_each_other(scene: Scene) -> None:
    shards = split_model(scene.model(), 3)
    async with scene.running() as dropin:
        for shard in shards[:2]:
            shutil.copy(shard, scene.folder / f"big{shard.name[-20:]}")
        await until(lambda: "2 of 3 shards are there" in dropin.problems.values(), "one is missing")
        shutil.copy(shards[2], scene.folder / f"big{shards[2].name[-20:]}")
        await until(lambda: scene.weights("big:latest"), "the whole")
        tag = scene.store.get_tag("big:latest")
        assert tag is not None
        assert [layer.filename for layer in scene.store.get_manifest(tag.manifest).weights] == ["big.gguf"]


async def test_a_modelfile_uses_the_files_beside_it(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.write("pirate/Modelfile", "FROM ./weights.gguf\nSYSTEM Arr.\nPARAMETER temperature 0.5\n")
        scene.put("pirate/weights.gguf")
        await until(lambda: scene.is_model("pirate:latest", 1), "the model of the subfolder")
        tag = scene.store.get_tag("pirate:latest")
        assert tag is not None
        lm = scene.store.get_manifest(tag.manifest).lm
        assert (lm.system, dict(lm.parameters)) == ("Arr.", {"temperature": 0.5})
        scene.put("pirate/weights.gguf", 2)
        await until(lambda: scene.is_model("pirate:latest", 2), "new weights for the same Modelfile")
        scene.write("child.modelfile", "FROM pirate\nSYSTEM Ahoy.\n")
        await until(lambda: scene.is_model("child:latest", 2), "a model made from a model")
        assert dropin.problems == {}


async def test_a_modelfile_names_a_draft_beside_it_or_in_the_store(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("fast/draft.gguf", 2)
        scene.put("fast/weights.gguf", 1)
        scene.write("fast/Modelfile", "FROM ./weights.gguf\nDRAFT ./draft.gguf\n")
        await until(lambda: scene.store.get_tag("fast:latest"), "the model")
        tag = scene.store.get_tag("fast:latest")
        assert tag is not None
        drafts = scene.store.get_manifest(tag.manifest).drafts
        assert [layer.digest for layer in drafts] == [Digest.of(scene.model(2).read_bytes())]
        scene.write("self.modelfile", "FROM fast\nDRAFT fast\n")
        await until(lambda: dropin.problems.get("self.modelfile") == "DRAFT names the model itself", "it is refused")


async def test_a_modelfile_wins_over_the_gguf_of_its_name(scene: Scene) -> None:
    async with scene.running():
        scene.put("a.gguf")
        await until(lambda: scene.is_model("a:latest", 1), "the bare file")
        bare = scene.store.get_tag("a:latest")
        recipe = scene.write("a.modelfile", "FROM ./a.gguf\nSYSTEM Arr.\n")
        await until(lambda: scene.store.get_tag("a:latest") != bare, "the Modelfile's")
        recipe.unlink()
        await until(
            lambda: (tag := scene.store.get_tag("a:latest")) and bare and tag.manifest == bare.manifest,
            "the bare file again",
        )


@pytest.mark.parametrize("value", ["/etc/hostname", "../model1.gguf", "./deep/er/x.gguf", "./link/x.gguf", "./l.gguf"])
async def test_a_modelfile_reaches_no_file_outside_of_the_folder(scene: Scene, value: str) -> None:
    scene.folder.mkdir()
    scene.model()
    (scene.folder / "link").symlink_to(scene.root)
    (scene.folder / "l.gguf").symlink_to(scene.model())
    (scene.root / "x.gguf").symlink_to(scene.model())
    async with scene.running() as dropin:
        scene.write("bad.modelfile", f"FROM {value}\n")
        await until(lambda: "bad.modelfile" in dropin.problems, "it is refused")
        assert scene.weights("bad:latest") is None


async def test_a_modelfile_with_mistakes_or_an_unknown_base_is_reported(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.write("a.modelfile", "FROM ./x.gguf\nNONSENSE 1\n")
        scene.write("b.modelfile", "FROM nobody-has-this\n")
        await until(lambda: len(dropin.problems) == 2, "both are reported")
        assert "line 2" in dropin.problems["a.modelfile"]
        assert dropin.problems["b.modelfile"] == "model `nobody-has-this` not found"


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ range .Messages }}"])
async def test_a_template_that_does_not_compile_is_reported(scene: Scene, template: str) -> None:
    """A Jinja template was found out only when the model was used."""
    async with scene.running() as dropin:
        scene.put("base.gguf")
        scene.write("broken.modelfile", f"FROM ./base.gguf\nTEMPLATE {template}\n")
        await until(lambda: "broken.modelfile" in dropin.problems, "the template is reported")
        assert "template does not compile" in dropin.problems["broken.modelfile"]
        assert scene.store.get_tag("broken:latest") is None


async def test_modelfiles_that_go_in_circles_make_nothing_and_do_not_turn(scene: Scene) -> None:
    timing = Timing(settle_s=0.05, blind_settle_s=0.5, rescan_s=0.1)
    async with scene.running(timing) as dropin:
        scene.write("self.modelfile", "FROM self\n")
        scene.write("a.modelfile", "FROM b\n")
        scene.write("b.modelfile", "FROM a\n")
        await until(lambda: len(dropin.problems) == 3, "all are reported")
        assert sorted(dropin.problems.values()) == [f"model `{name}` not found" for name in ("a", "b", "self")]
        scene.put("weights/w.gguf")
        scene.write("weights/Modelfile", "FROM ./w.gguf\n")
        scene.write("b.modelfile", "FROM weights\nSYSTEM One.\n")
        await until(lambda: scene.store.get_tag("a:latest"), "the circle is broken, and both are made")
        scene.write("b.modelfile", "FROM a\nSYSTEM Two.\n")
        await until(lambda: scene.system("b:latest") == "Two.", "closed again, it is made of the model there is")
        scene.write("last.modelfile", "FROM b\nSYSTEM Last.\n")
        await until(lambda: scene.system("last:latest") == "Last.", "another look")
        assert scene.system("a:latest") == "One."
        assert len(scene.store.tag_history("b:latest")) == 2


async def test_a_name_from_elsewhere_is_not_taken_over(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("mine.gguf", 1)
        await until(lambda: scene.is_model("mine:latest", 1), "the first model")
        tag = scene.store.get_tag("mine:latest")
        assert tag is not None
        scene.store.set_tag("theirs:latest", tag.manifest)
        scene.put("theirs.gguf", 2)
        await until(lambda: "theirs.gguf" in dropin.problems, "it is refused")
        assert scene.is_model("theirs:latest", 1)
        (scene.folder / "theirs.gguf").unlink()
        await until(lambda: "theirs.gguf" not in dropin.problems, "the file is forgotten")
        assert scene.is_model("theirs:latest", 1)


async def test_a_name_that_was_pointed_elsewhere_stays_when_the_file_goes(scene: Scene) -> None:
    async with scene.running():
        for name, number in (("a", 1), ("b", 2)):
            scene.put(f"{name}.gguf", number)
        await until(lambda: scene.weights("a:latest") and scene.weights("b:latest"), "both models")
        other = scene.store.get_tag("b:latest")
        assert other is not None
        scene.store.set_tag("a:latest", other.manifest)
        (scene.folder / "a.gguf").unlink()
        (scene.folder / "b.gguf").unlink()
        await until(lambda: scene.weights("b:latest") is None, "b is gone")
        assert scene.is_model("a:latest", 2)


async def test_what_happened_while_the_daemon_was_down_is_caught_up_with(scene: Scene) -> None:
    async with scene.running():
        for name, number in (("stays", 1), ("goes", 2), ("changes", 3)):
            scene.put(f"{name}.gguf", number)
        await until(lambda: len(scene.store.list_tags()) == 3, "three models")
    stayed = scene.store.get_tag("stays:latest")
    (scene.folder / "goes.gguf").unlink()
    scene.put("changes.gguf", 4)
    scene.put("comes.gguf", 5)
    async with scene.running():
        await until(lambda: scene.is_model("changes:latest", 4), "the change")
        await until(lambda: scene.is_model("comes:latest", 5), "the new file")
        await until(lambda: scene.weights("goes:latest") is None, "the removal")
        assert scene.store.get_tag("stays:latest") == stayed


async def test_a_model_that_the_user_removed_stays_removed_until_its_file_changes(scene: Scene) -> None:
    async with scene.running():
        scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the model")
        scene.store.delete_tag("a:latest")
        scene.put("b.gguf", 2)
        await until(lambda: scene.weights("b:latest"), "a later file")
        assert scene.weights("a:latest") is None
    async with scene.running():
        scene.put("c.gguf", 3)
        await until(lambda: scene.weights("c:latest"), "a file after the restart")
        assert scene.weights("a:latest") is None
        scene.put("a.gguf", 4)
        await until(lambda: scene.is_model("a:latest", 4), "the changed file")


async def test_a_folder_that_is_not_mounted_takes_no_models_away(scene: Scene) -> None:
    async with scene.running():
        scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the model")
    scene.folder.rename(scene.root / "elsewhere")
    async with scene.running():
        scene.put("b.gguf", 2)
        await until(lambda: scene.weights("b:latest"), "a file in the folder that took its place")
        assert scene.is_model("a:latest", 1)
    shutil.rmtree(scene.folder)
    (scene.root / "elsewhere").rename(scene.folder)
    async with scene.running() as dropin:
        (scene.folder / "a.gguf").unlink()
        await until(lambda: scene.weights("a:latest") is None, "it is gone where it was")
        assert dropin.problems == {}


async def test_a_folder_that_is_deleted_and_made_anew_is_watched_again(scene: Scene) -> None:
    async with scene.running(Timing(settle_s=0.05, blind_settle_s=0.5, rescan_s=0.1)):
        shutil.rmtree(scene.folder)
        await asyncio.to_thread(scene.folder.mkdir)
        scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the model in the new folder")


async def test_a_model_that_was_being_made_when_the_daemon_died_is_still_the_folders(scene: Scene) -> None:
    """The name is set, what was made is not yet remembered: the name must not count as somebody else's then."""
    async with scene.running():
        scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the model")
    state = DropInState(scene.store, scene.folder)
    state.put("a.gguf", Made("a:latest", "", {}, scene.folder.stat().st_ino))
    scene.put("a.gguf", 2)
    async with scene.running() as dropin:
        await until(lambda: scene.is_model("a:latest", 2), "the next version")
        assert dropin.problems == {}


async def test_a_state_that_cannot_be_read_is_begun_anew(scene: Scene) -> None:
    scene.store.remember("dropin", str(scene.folder), '{"version": 99}')
    async with scene.running():
        scene.put("a.gguf", 1)
        await until(lambda: scene.is_model("a:latest", 1), "the model")


async def test_an_edited_modelfile_makes_a_version_and_a_broken_one_leaves_the_model(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("pirate/weights.gguf", 1)
        recipe = scene.write("pirate/Modelfile", "FROM ./weights.gguf\nSYSTEM Arr.\n")

        def says(system: str) -> bool:
            tag = scene.store.get_tag("pirate:latest")
            return tag is not None and scene.store.get_manifest(tag.manifest).lm.system == system

        await until(lambda: says("Arr."), "the first version")
        recipe.write_text("FROM ./weights.gguf\nSYSTEM Ahoy.\n")
        await until(lambda: says("Ahoy."), "the second version")
        recipe.write_text("FROM ./weights.gguf\nSISTEM x\nPARAMETER temperature 1000\n")
        await until(lambda: "pirate/Modelfile" in dropin.problems, "the broken one is reported")
        problem = dropin.problems["pirate/Modelfile"]
        assert "line 2:1: unknown directive `SISTEM`" in problem
        assert "line 3:23: parameter `temperature` must be" in problem
        assert says("Ahoy."), "the version before stays"
        recipe.write_text("FROM ./weights.gguf\nSYSTEM Avast.\n")
        await until(lambda: says("Avast."), "it is mended")
        assert [version.note for version in scene.store.tag_versions("pirate:latest")] == ["folder"] * 3


async def test_the_folder_goes_on_from_an_edit_or_rollback_and_not_from_another_model(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("a/weights.gguf", 1)
        recipe = scene.write("a/Modelfile", "FROM ./weights.gguf\nSYSTEM One.\n")
        await until(lambda: scene.weights("a:latest"), "the first version")
        first = scene.store.get_tag("a:latest")
        assert first is not None
        recipe.write_text("FROM ./weights.gguf\nSYSTEM Two.\n")
        await until(lambda: scene.store.get_tag("a:latest") != first, "the second version")
        scene.store.set_tag("a:latest", first.manifest, note="rollback to version 1")
        # The folder is looked at again, and leaves the rollback alone until the file changes.
        scene.put("other.gguf", 2)
        await until(lambda: scene.weights("other:latest"), "another look")
        rolled_back = scene.store.get_tag("a:latest")
        assert rolled_back is not None
        assert rolled_back.manifest == first.manifest
        recipe.write_text("FROM ./weights.gguf\nSYSTEM Three.\n")
        await until(lambda: len(scene.store.tag_versions("a:latest")) == 4, "the file wins when it changes")
        assert dropin.problems == {}

        scene.store.delete_tag("a:latest")
        scene.store.set_tag("a:latest", rolled_back.manifest, note="pull")
        recipe.write_text("FROM ./weights.gguf\nSYSTEM Four.\n")
        await until(lambda: dropin.problems, "a model that took the place of a removed one is not the folder's")
        assert "belongs to a model from elsewhere" in dropin.problems["a/Modelfile"]


@pytest.mark.parametrize("value", ["./", ".", "./big-00002-of-00003.gguf"])
async def test_a_modelfile_names_shards_by_their_folder_or_one_of_them(scene: Scene, value: str) -> None:
    shards = split_model(scene.model(), 3)
    (scene.folder / "big").mkdir(parents=True)
    async with scene.running() as dropin:
        for shard in shards[:2]:
            shutil.copy(shard, scene.folder / "big" / f"big{shard.name[-20:]}")
        scene.write("big/Modelfile", f"FROM {value}\nSYSTEM Big.\n")
        waits = f"big-00003-of-00003.gguf of {value} is not there yet"
        await until(lambda: dropin.waiting.get("big/Modelfile") == waits, "it waits for the third")
        shutil.copy(shards[2], scene.folder / "big" / "big-00003-of-00003.gguf")
        await until(lambda: scene.weights("big:latest"), "the model of all three")
        tag = scene.store.get_tag("big:latest")
        assert tag is not None
        assert [layer.filename for layer in scene.store.get_manifest(tag.manifest).weights] == ["big.gguf"]
        assert dropin.problems == {}


async def test_an_adapter_is_a_file_of_the_folder_whatever_its_name(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("a/weights.gguf", 1)
        scene.write("a/Modelfile", "FROM ./weights.gguf\nADAPTER lora 0.5\n")
        await until(lambda: dropin.waiting.get("a/Modelfile") == "lora is not there yet", "it waits for the adapter")
        scene.write("a/Modelfile", "FROM ./weights.gguf\nADAPTER ../../lora\n")
        await until(lambda: "a/Modelfile" in dropin.problems, "it is refused")
        assert "outside of the drop-in folder" in dropin.problems["a/Modelfile"]


# Quantizing


async def test_a_modelfile_that_quantizes(scene: Scene) -> None:
    async with scene.running() as dropin:
        make_tiny_llama(scene.root / "wide.gguf", n_embd=256, n_ff=256)
        (scene.folder / "small").mkdir()
        shutil.copy(scene.root / "wide.gguf", scene.folder / "small" / "wide.gguf")
        scene.write("small/Modelfile", "FROM ./wide.gguf\nQUANTIZE Q8_0\nSYSTEM small\n")
        await until(lambda: scene.weights("small:latest") or dropin.problems, "the quantized model")
        assert dropin.problems == {}
        tag = scene.store.get_tag("small:latest")
        assert tag is not None
        manifest = scene.store.get_manifest(tag.manifest)
        assert (manifest.lm.system, manifest.lm.origin.quantize) == ("small", "Q8_0")
        assert read_blob_header(scene.store, manifest.weights[0].digest).quantization == "Q8_0"
        assert scene.store.tag_versions("small:latest")[-1].note == "folder"


async def test_what_cannot_be_quantized_is_a_problem_of_its_file(scene: Scene) -> None:
    async with scene.running() as dropin:
        scene.put("a/model.gguf")
        scene.write("a/Modelfile", "FROM ./model.gguf\nQUANTIZE Q9_9\n")
        await until(lambda: "a/Modelfile" in dropin.problems, "it is refused")
        assert "Q9_9" in dropin.problems["a/Modelfile"]


async def test_stopping_ends_a_quantization(scene: Scene) -> None:
    """The thread that looks at the folder waits for it, and the daemon for the thread."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(wanted: Wanted, given: Collection[Digest]) -> TagRecord:
        begun.set()
        try:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")
        finally:
            ended.set()

    dropin = DropIn(scene.store, scene.names, scene.pool, scene.folder, endless, timing=TIMING)
    await dropin.start()
    scene.put("a/model.gguf")
    scene.write("a/Modelfile", "FROM ./model.gguf\nQUANTIZE Q8_0\n")
    await asyncio.wait_for(begun.wait(), DEADLINE_S)
    await asyncio.wait_for(dropin.stop(), DEADLINE_S)
    assert ended.is_set()
    assert scene.store.get_tag("a:latest") is None


# Telling


async def test_obstacles_are_told_from_when_they_are_seen_until_they_are_gone(scene: Scene) -> None:
    async with scene.running() as dropin:
        before = time.time()
        scene.write("bad.modelfile", "FROM nobody-has-this\n")
        scene.write("slow/Modelfile", "FROM ./model.gguf\n")
        await until(lambda: dropin.problems and "slow/Modelfile" in dropin.waiting, "both are told")
        await until(lambda: "not there" in dropin.obstacles[-1].message, "both have settled")
        bad, slow = dropin.obstacles
        assert (bad.file, bad.message, bad.waiting) == ("bad.modelfile", "model `nobody-has-this` not found", False)
        assert (slow.file, slow.message, slow.waiting) == ("slow/Modelfile", "./model.gguf is not there yet", True)
        assert before <= bad.since <= time.time()
        scene.write("other.modelfile", "FROM nobody-has-this-either\n")
        await until(lambda: "other.modelfile" in dropin.problems, "the third is told")
        assert dropin.obstacles[0] == bad, "the time stays that of the first sight"
        scene.write("bad.modelfile", "FROM still-nobody-has-this\n")
        await until(lambda: "still" in dropin.obstacles[0].message, "what is wrong changes")
        assert dropin.obstacles[0].since > bad.since
        (scene.folder / "bad.modelfile").unlink()
        (scene.folder / "other.modelfile").unlink()
        scene.put("slow/model.gguf")
        await until(lambda: not dropin.obstacles, "nothing is in the way any more")
        assert scene.is_model("slow:latest", 1)


async def test_a_quantization_that_failed_is_not_tried_again_and_again(scene: Scene) -> None:
    tries: list[str] = []

    async def failing(wanted: Wanted, given: Collection[Digest]) -> TagRecord:
        tries.append(wanted.quantize)
        raise QuantizeFailed(wanted.name, "the engine cannot", log="")

    dropin = DropIn(scene.store, scene.names, scene.pool, scene.folder, failing, timing=replace(TIMING, rescan_s=0.01))
    await dropin.start()
    try:
        scene.put("a/model.gguf")
        path = scene.write("a/Modelfile", "FROM ./model.gguf\nQUANTIZE Q8_0\n")
        await until(lambda: "a/Modelfile" in dropin.problems, "it is told")
        scene.put("b.gguf", 2)
        await until(lambda: scene.is_model("b:latest", 2), "the folder was looked at again")
        assert tries == ["Q8_0"]
        path.write_text("FROM ./model.gguf\nQUANTIZE Q4_0\n")
        await until(lambda: len(tries) == 2, "the change is tried")
    finally:
        await dropin.stop()
