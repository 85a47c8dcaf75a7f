"""The child process that times several models in turn, loaded as a trial loads them."""

import time
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.child import answer_requests
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.speed_protocol import Drop, Dropped, TimeTogether, Together
from ramgguf.llama.trial import Deployed
from ramgguf.llama.trial_protocol import Load

Request = Load | Drop | TimeTogether
REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])


def time_together(models: list[Deployed], request: TimeTogether) -> Together:
    """Return the seconds of every model's prompts and generated tokens."""
    ids = np.arange(request.n_prompt, dtype=np.int32)
    prompts: list[list[float]] = [[] for _ in models]
    tokens: list[list[float]] = [[] for _ in models]
    for k in range(-1, request.n_rounds):
        for number, model in enumerate(models):
            model.clear()
            steps = [ids % model.vocab.n_tokens, *[ids[:1]] * request.n_generated]
            seconds = [_seconds(model, step) for step in steps]
            if k >= 0:  # what is touched first is slow
                prompts[number].append(seconds[0])
                tokens[number] += seconds[1:]
    return Together(
        prompt=tuple(tuple(p) for p in prompts), generation=tuple(tuple(t) for t in tokens)
    )


def _seconds(model: Deployed, ids: TokenIds) -> float:
    """Return what decoding takes: with one thread its CPU time, which other work disturbs less."""
    clock = time.process_time if model.n_threads == 1 else time.perf_counter
    started = clock()
    model.decode(ids)
    return clock() - started


def main() -> None:
    """Answer requests until the parent goes."""
    models: list[Deployed] = []

    def answer(request: Request) -> FrozenModel:
        match request:
            case Load():
                models.append(Deployed(request))
                return models[-1].loaded()
            case Drop():
                models.pop().close()
                return Dropped()
            case TimeTogether():
                return time_together(models, request)

    answer_requests(REQUESTS, answer)


if __name__ == "__main__":
    main()
