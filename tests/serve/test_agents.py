"""A real agent framework, pydantic-ai, against the server: typed answers, calls and results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from tests.serve.conftest import Running, served
from tests.serve.test_forms import TEMPLATES, checkpoint
from whalefall import jit
from whalefall.engine import Engine, EngineConfig
from whalefall.serve import Settings

pydantic_ai = pytest.importorskip(
    "pydantic_ai", reason="pydantic-ai is not installed: pip install 'whalefall[clients]'"
)


class Forecast(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    before = jit.get_num_threads()
    jit.set_num_threads(1)
    folder = checkpoint(tmp_path_factory.mktemp("m") / "model", TEMPLATES["deepseek_v31"])
    with served(Engine(folder, EngineConfig(num_blocks=64)), Settings("agent")) as running:
        yield running
    jit.set_num_threads(before)


SETTINGS: Any = {"temperature": 0.3, "max_tokens": 400}


def with_model(server: Running, use: Callable[[Any], Awaitable[Any]]) -> Any:
    """What `use` makes of the server as the framework's model."""
    from openai import AsyncOpenAI
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def main() -> Any:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await use(
                OpenAIChatModel("agent", provider=OpenAIProvider(openai_client=client))
            )

    return asyncio.run(main())


def test_typed_answers_by_schema_and_by_a_required_call(server: Running) -> None:
    async def both(model: Any) -> list[Any]:
        kinds = (pydantic_ai.NativeOutput(Forecast), Forecast)
        agents = [pydantic_ai.Agent(model, output_type=kind) for kind in kinds]
        return [await agent.run("weather?", model_settings=SETTINGS) for agent in agents]

    for done in with_model(server, both):
        assert isinstance(done.output, Forecast)
        assert done.usage.output_tokens > 0


def test_a_stream_of_a_typed_answer(server: Running) -> None:
    async def last(model: Any) -> Any:
        agent = pydantic_ai.Agent(model, output_type=Forecast)
        async with agent.run_stream("weather?", model_settings=SETTINGS) as stream:
            return await stream.get_output()

    assert isinstance(with_model(server, last), Forecast)


def test_a_tool_runs_and_its_result_goes_back(server: Running) -> None:
    called: list[str] = []

    async def once(_: object, definition: Any) -> Any:
        return None if called else definition

    async def until_called(model: Any) -> Any:
        agent = pydantic_ai.Agent(model, output_type=Forecast)

        @agent.tool_plain(prepare=once)
        def look(city: Literal["Oslo", "Rome"]) -> str:
            """Look at the sky."""
            called.append(city)
            return "rain"

        for seed in range(12):  # which of its two calls the little model makes is chance
            settings = {**SETTINGS, "temperature": 1.0, "seed": seed}
            done = await agent.run("weather?", model_settings=settings)
            if called:
                return done
        return None

    done = with_model(server, until_called)
    assert isinstance(done.output, Forecast)
    assert set(called) <= {"Oslo", "Rome"}
    parts = [part for message in done.all_messages() for part in message.parts]
    results = [
        part.content
        for part in parts
        if part.part_kind == "tool-return" and part.tool_name == "look"
    ]
    assert results == ["rain"] * len(called)
