"""Limits of a server, which become flags of `dllm serve`. Nothing here imports torch."""

from dataclasses import dataclass

from dllm.config.fields import check, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    api_key: str | None = None  # every request must send it
    cors: str | None = setting(None, "origins whose pages may ask, separated by commas (https://my.site); *: all",
                               none="no other page may")
    max_tokens: int = setting(1024, "tokens of an answer at most", at_least=1)
    max_batch: int = setting(32, "texts denoised together at most", at_least=1)
    max_queue: int = setting(128, "requests that may wait; more get status 429", at_least=0)
    max_seconds: float = setting(120.0, "seconds of a request at most", above=0)
    max_body: int = setting(1 << 20, "bytes of a request at most", at_least=1)

    def __post_init__(self):
        check(self)
