"""What the routes stand on: checks a request, submits its prompts, returns its `Generation`."""

from __future__ import annotations

import time
from typing import Any

from whalefall import __version__
from whalefall.engine import StructuredOutputs
from whalefall.errors import WhalefallError
from whalefall.serve.answers import Answer
from whalefall.serve.failures import ApiError
from whalefall.serve.forms import asked_form, chat_form
from whalefall.serve.generate import Generation, Prompt
from whalefall.serve.metrics import Metrics
from whalefall.serve.prompts import chat_prompt, completion_prompts
from whalefall.serve.protocol import ChatRequest, CompletionRequest, refuse_unsupported
from whalefall.serve.sampling import sampling_params
from whalefall.serve.settings import Settings
from whalefall.serve.worker import EngineWorker

__all__ = ["Service"]


class Service:
    """One served model: its worker, metrics and settings."""

    def __init__(self, worker: EngineWorker, metrics: Metrics, settings: Settings) -> None:
        self.worker = worker
        self.metrics = metrics
        self.settings = settings
        self.created = int(time.time())

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "whalefall",
            "max_model_len": self.worker.engine.max_model_len,
        }

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served; no name means the one that is."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; there is {self.settings.model_name!r}",
                "model",
                "model_not_found",
            )

    def generation(self, request: ChatRequest | CompletionRequest) -> Generation:
        """Check a request and submit its prompts.

        Raises: ApiError 400, 404 or 429; nothing stays submitted then.
        """
        self.check_model(request.model)
        refuse_unsupported(request)
        engine = self.worker.engine
        vocab = engine.model.vocab_size
        tokenizer = self.worker.tokenizer
        chat = isinstance(request, ChatRequest)
        form = None
        if isinstance(request, ChatRequest):
            form = chat_form(request, tokenizer)
            token_lists = [chat_prompt(tokenizer, request, form.tools)]
            form = form.after(tokenizer.decode(token_lists[0][-8:], False), tokenizer)
            structured = form.structured
            if form.keep_special:
                request = request.model_copy(update={"skip_special_tokens": False})
        else:
            structured = asked_form(request)
            token_lists = completion_prompts(tokenizer, vocab, request)
            if request.echo and request.logprobs is not None:
                raise ApiError(400, "echo with logprobs is not supported yet", "echo")
        try:
            params = [
                sampling_params(request, len(ids), engine.max_model_len, vocab, structured)
                for ids in token_lists
            ]
        except WhalefallError as error:  # fields that do not go together
            raise ApiError(400, str(error)) from None
        if structured is not None:
            self._compile(structured)
        answer = Answer(chat, self.settings.model_name, f"whalefall-{__version__}")
        each = request.n or 1
        prompts: list[Prompt] = []
        try:
            for number, (ids, options) in enumerate(zip(token_lists, params, strict=True)):
                stream = self.worker.submit(
                    f"{answer.id}-{number}", ids, options, request.priority or 0, request.cache_salt
                )
                echo = ""
                if isinstance(request, CompletionRequest) and request.echo:
                    echo = self.worker.tokenizer.decode(ids)
                prompts.append(Prompt(stream, number * each, echo))
        except BaseException:
            for prompt in prompts:
                self.worker.close(prompt.stream)
            raise
        return Generation(
            answer,
            prompts,
            self.worker,
            self.metrics,
            each * len(token_lists),
            self.settings.keep_alive_s,
            form,
        )

    def _compile(self, form: StructuredOutputs) -> None:
        """400 for a form that does not compile, before anything is submitted."""
        try:
            self.worker.engine.grammars.matcher(form)
        except WhalefallError as error:
            raise ApiError(400, str(error), "response_format") from None
