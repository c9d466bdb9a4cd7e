"""One request for text, checked: what every protocol makes of a client's options, and hands to the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.service import Listener, Service, Stream

MAX_TEMPERATURE = 2.0
MAX_INTEGER = 2**63 - 1  # of max_tokens, top_k and seed: what protocols with fixed types can carry
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256  # every token is searched for each


@dataclass(frozen=True)
class GenerationRequest:
    """Options have OpenAI's names and meanings, with the defaults of `fasa-trt generate`.

    prompt: text or token ids. max_tokens: of the answer; an engine that is full ends it earlier. stop: strings that end
    the answer and are not part of it. seed: None draws differently every time. ignore_eos: go on after the model's
    end-of-sequence tokens. stream: whether the client wants the text piece by piece. choice: which of several answers
    to one request this is; each draws for itself, like the rows of a batch of `fasa-trt generate`.

    Raises FasaError when a value is out of range. Whether the prompt fits the engine, `submit` tells.
    """

    prompt: str | Sequence[int]
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    choice: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MAX_INTEGER:
            raise FasaError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # false for NaN, too
            raise FasaError(f"temperature must be between 0 and {MAX_TEMPERATURE:g}, not {self.temperature}")
        for name, value in (("top_k", self.top_k), ("seed", self.seed or 0)):
            if not 0 <= value <= MAX_INTEGER:
                raise FasaError(f"{name} must be between 0 and 2^63 - 1, not {value}")
        if not 0 < self.top_p <= 1:
            raise FasaError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise FasaError(f"min_p must be between 0 and 1, not {self.min_p}")
        self._check_texts()

    def _check_texts(self) -> None:
        if not len(self.prompt):
            raise FasaError("the prompt is empty", hint="pass some text")
        if isinstance(self.prompt, str):
            _check_unicode("the prompt", self.prompt)
        if isinstance(self.stop, str):
            raise TypeError("stop is a sequence of strings")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise FasaError(f"{len(self.stop)} stop strings are too many", hint=f"at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise FasaError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters, not {len(text)}")
            _check_unicode("a stop string", text)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)

    def submit(self, service: Service, listener: Listener | None = None) -> Stream:
        """Hands the request to the runtime; listener: as of `Service.submit`.

        Raises FasaError for a request that the engine can never serve, and when the service is closed or broken.
        """
        return service.submit(
            self.prompt,
            max_new_tokens=min(self.max_tokens, service.engine.directory.max_seq_len),
            sampling=self.sampling,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            generator=self.sampling.generators(self.choice + 1)[self.choice],
            listener=listener,
        )


def _check_unicode(what: str, text: str) -> None:
    """A lone half of a surrogate pair is a str, but no text that a tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FasaError(f"{what} is not valid Unicode") from None
