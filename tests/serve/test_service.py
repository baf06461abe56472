"""What a server computes in advance, and what is left of a version that was replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serve.label_sets import LabelSet, MatrixKey
from serve.metrics import Metrics
from serve.runtime import Float32
from serve.service import Service
from serve.settings import Settings
from serve.versions import Version
from tests.serve.fakes import FakeRuntime

TEMPLATES = ("a {}",)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Service]:
    """A service of one model; each load of it is a new one."""
    loads = iter(range(1, 100))
    settings = Settings.model_validate(
        {"models": ("m=unused",), "device_lanes": 1, "label_set_file": folder / "sets.sqlite3"}
    )
    service = Service(settings, {"m": lambda: FakeRuntime(f"f{next(loads)}")}, metrics=Metrics())
    await service.start()
    try:
        yield service
    finally:
        await service.close()


class Builds:
    """Stands for `build_matrix`: computations without end, and which of them run."""

    def __init__(self) -> None:
        self.running: list[tuple[str, ...]] = []
        self.most = 0

    def __call__(self, version: Version, key: MatrixKey) -> Callable[[], Awaitable[Float32]]:
        async def build() -> Float32:
            self.running.append(key.labels)
            self.most = max(self.most, len(self.running))
            try:
                with version.lease():
                    return await asyncio.get_running_loop().create_future()
            finally:
                self.running.remove(key.labels)

        return build

    async def are(self, *labels: str) -> None:
        async with asyncio.timeout(20):
            while self.running != [(label,) for label in labels]:
                await asyncio.sleep(0.005)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds()
    monkeypatch.setattr("serve.service.build_matrix", made)
    return made


async def register(service: Service, set_id: str, label: str) -> None:
    """As PUT does."""
    await asyncio.to_thread(service.label_sets.put, LabelSet(set_id, (label,), TEMPLATES))
    service.warm(service.models["m"].version, (label,), TEMPLATES)


def test_registered_sets_are_computed_one_at_a_time_and_those_that_are_gone_not_at_all(
    tmp_path: Path, builds: Builds
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as service:
            for number in range(5):
                await register(service, "same", f"label {number}")
            await register(service, "other", "x")
            await builds.are("label 4")
            await asyncio.to_thread(service.label_sets.delete, "same")
            await builds.are("x")
            await asyncio.to_thread(service.label_sets.delete, "other")
            await builds.are()
        assert builds.most == 1

    asyncio.run(scenario())


def test_a_set_that_is_registered_again_and_again_waits_once(tmp_path: Path, builds: Builds) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as service:
            for number in range(5):
                await register(service, f"set {number}", "cat")
            assert len(service._warming) == 1

    asyncio.run(scenario())


def test_a_reload_does_not_wait_for_what_is_computed_in_advance(tmp_path: Path, builds: Builds) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as service:
            await register(service, "pets", "cat")
            await builds.are("cat")
            _, after = await asyncio.wait_for(service.reload(service.models["m"]), 20)
            assert after.info.fingerprint == "f2"
            await builds.are()

    asyncio.run(scenario())


def test_what_is_said_of_a_model_is_the_version_that_answers_while_the_old_one_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as service:
            model = service.models["m"]
            old, service.loaded_at["m"] = model.version, 0.0
            with old.lease():
                reload = asyncio.ensure_future(service.reload(model))
                async with asyncio.timeout(20):
                    while model.version is old:
                        await asyncio.sleep(0.005)
                shown = service.render_metrics().decode()
                assert 'fingerprint="f2"' in shown and 'fingerprint="f1"' not in shown
                assert service.loaded_at["m"] > 0 and not reload.done()
            await reload

    asyncio.run(scenario())


def test_a_set_registered_during_a_reload_leaves_nothing_of_the_replaced_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as service:
            await asyncio.to_thread(service.label_sets.put, LabelSet("pets", ("cat",), TEMPLATES))
            old, new = await service.reload(service.models["m"])
            for version in (old, new):
                service.warm(version, ("cat",), TEMPLATES)
            keys = [MatrixKey(version.info.fingerprint, ("cat",), TEMPLATES) for version in (old, new)]
            async with asyncio.timeout(20):
                while keys[1] not in service.matrices:
                    await asyncio.sleep(0.005)
            assert keys[0] not in service.matrices

    asyncio.run(scenario())
